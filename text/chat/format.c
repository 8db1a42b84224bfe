/* Conversations through formats of fixed strings, as LMDeploy renders them: each message in the box of its
 * role, the default instruction first when the conversation brings none, the assistant's box at the end. */
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "text/chat/chat.h"

/* ---- the JSON form -------------------------------------------------------------------------------------- */

static const struct {
    const char *key;
    size_t offset;
} fields[] = {
    {"model_name", offsetof(tm_chat_format, name)},
    {"system", offsetof(tm_chat_format, system)},
    {"meta_instruction", offsetof(tm_chat_format, meta)},
    {"eosys", offsetof(tm_chat_format, eosys)},
    {"user", offsetof(tm_chat_format, user)},
    {"eoh", offsetof(tm_chat_format, eoh)},
    {"assistant", offsetof(tm_chat_format, assistant)},
    {"eoa", offsetof(tm_chat_format, eoa)},
    {"separator", offsetof(tm_chat_format, separator)},
    {"tool", offsetof(tm_chat_format, tool)},
    {"eotool", offsetof(tm_chat_format, eotool)},
};

static tm_status read_capability(const json_t *root, tm_template *t, tm_chat_format *f, tm_err *err)
{
    static const struct {
        const char *name;
        bool raw, fill;
    } rows[] = {{"chat", false, false},
                {"completion", true, false},
                {"python", true, false},
                {"infilling", true, true}};
    const char *name = NULL;
    TM_TRY(tm_json_str(root, "capability", &name, err));
    if (!name)
        return TM_OK;
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        if (strcmp(rows[i].name, name) != 0)
            continue;
        if (rows[i].fill && !f->infill)
            return TM_FAIL(err, TM_STATUS_UNSUPPORTED, "capability: %s cannot fill in", f->name);
        f->raw = rows[i].raw;
        t->infilling = rows[i].fill;
        return TM_OK;
    }
    return TM_FAIL(err, TM_STATUS_INVALID,
                   "capability: '%.40s' is not chat, completion, infilling or python", name);
}

static tm_status read_stops(const json_t *root, tm_chat_format *f, tm_err *err)
{
    const json_t *list = tm_json_get(root, "stop_words");
    if (!list)
        return TM_OK;
    if (!json_is_array(list) || json_array_size(list) > TM_CHAT_STOPS_MAX)
        return TM_FAIL(err, TM_STATUS_INVALID, "stop_words: expected a list of at most %d strings",
                       TM_CHAT_STOPS_MAX);
    for (size_t i = 0; i < TM_CHAT_STOPS_MAX; i++) {
        const json_t *word = json_array_get(list, i);
        f->stops[i] = json_string_value(word);
        if (word && (!f->stops[i] || !f->stops[i][0]))
            return TM_FAIL(err, TM_STATUS_INVALID, "stop_words[%zu]: expected a string", i);
    }
    return TM_OK;
}

static tm_status read_fields(const json_t *root, tm_template *t, tm_chat_format *f, tm_err *err)
{
    const char *name = NULL;
    if (!json_is_object(root))
        return TM_FAIL(err, TM_STATUS_INVALID, "expected an object, got %s",
                       tm_json_type_name(root));
    TM_TRY(tm_json_str(root, "model_name", &name, err));
    const tm_chat_format *base = name ? tm_chat_builtin_find(name) : NULL;
    *f = base ? *base : (tm_chat_format){.name = "format", .meta = ""};
    for (size_t i = 0; i < TM_ARRAY_LEN(fields); i++) {
        const char *value = NULL;
        TM_TRY(tm_json_str(root, fields[i].key, &value, err));
        if (value)
            memcpy((char *)f + fields[i].offset, &value, sizeof(value));
    }
    /* A box for answers that was changed is also how answers are asked for. */
    if (tm_json_get(root, "assistant"))
        f->prompt = NULL;
    TM_TRY(read_stops(root, f, err));
    return read_capability(root, t, f, err);
}

tm_status tm_chat_format_read(tm_template *t, const char *data, size_t len, tm_err *err)
{
    json_t *root;
    tm_chat_format f;
    tm_status st = tm_json_parse(data, len, &root, err);
    if (st == TM_OK) {
        st = read_fields(root, t, &f, err);
        if (st != TM_OK)
            json_decref(root);
    }
    if (st != TM_OK) {
        tm_err_prefix(err, "chat template");
        return st;
    }
    t->owned = root;
    t->made = f;
    t->format = &t->made;
    return TM_OK;
}

/* ---- rendering ------------------------------------------------------------------------------------------ */

bool tm_chat_text(const json_t *content, tm_buf *room, const char **text, size_t *len)
{
    size_t i;
    json_t *part;
    *text = "";
    *len = 0;
    if (!content || json_is_null(content))
        return true;
    if (json_is_string(content)) {
        *text = json_string_value(content);
        *len = json_string_length(content);
        return true;
    }
    if (!json_is_array(content))
        return false;
    json_array_foreach((json_t *)(uintptr_t)content, i, part)
    {
        const char *type = json_string_value(json_object_get(part, "type"));
        const json_t *piece = json_object_get(part, "text");
        if (!type || strcmp(type, "text") != 0 || !json_is_string(piece))
            return false;
        if (i > 0)
            tm_buf_putc(room, '\n');
        tm_buf_append(room, json_string_value(piece), json_string_length(piece));
    }
    *text = room->data ? room->data : "";
    *len = room->len;
    return true;
}

typedef struct writer {
    const tm_template *t;
    const tm_chat_format *f;
    tm_rendered r;
    size_t cap; /* of r.input */
    int round;
    tm_err *err;
} writer;

static void put(writer *w, const char *s)
{
    if (s)
        tm_buf_puts(&w->r.text, s);
}

/* Text of the request: it is marked. */
static void put_input(writer *w, const char *text, size_t len)
{
    size_t begin = w->r.text.len;
    if (len == 0 || !tm_buf_append(&w->r.text, text, len))
        return;
    if (w->r.input_count == w->cap) {
        size_t cap = w->cap ? w->cap * 2 : 16;
        tm_text_span *input = realloc(w->r.input, cap * sizeof(*input));
        if (!input) {
            w->r.text.failed = true;
            return;
        }
        w->r.input = input;
        w->cap = cap;
    }
    w->r.input[w->r.input_count++] = (tm_text_span){begin, w->r.text.len};
}

static tm_status put_json(writer *w, const json_t *v)
{
    char *s = json_dumps(v, JSON_ENCODE_ANY);
    if (!s)
        return TM_FAIL(w->err, TM_STATUS_NO_MEMORY, "out of memory for a prompt");
    put_input(w, s, strlen(s));
    free(s);
    return TM_OK;
}

/* Code Llama's question for what stands at <FILL>. */
static tm_status put_filling(writer *w, const char *text, size_t len)
{
    static const char gap[] = "<FILL>";
    const size_t n = sizeof(gap) - 1;
    const char *at = memmem(text, len, gap, n);
    size_t before = at ? (size_t)(at - text) : len;
    if (!at || memmem(at + n, len - before - n, gap, n))
        return TM_FAIL(w->err, TM_STATUS_INVALID, "text to be filled in holds <FILL> once");
    put(w, "<PRE> ");
    put_input(w, text, before);
    put(w, " <SUF>");
    put_input(w, at + n, len - before - n);
    put(w, " <MID>");
    return TM_OK;
}

static tm_status put_content(writer *w, const json_t *message)
{
    tm_buf room;
    const char *text;
    size_t len;
    tm_status st = TM_OK;
    tm_buf_init(&room, 0);
    if (!tm_chat_text(json_object_get(message, "content"), &room, &text, &len))
        st = TM_FAIL(w->err, TM_STATUS_INVALID, "the chat template takes messages of text only");
    else if (w->t->infilling)
        st = put_filling(w, text, len);
    else
        put_input(w, text, len);
    w->r.text.failed |= room.failed;
    tm_buf_deinit(&room);
    return st;
}

/* {"name": ..., "parameters": ...}; arguments that are JSON text are written as they are. */
static tm_status put_call(writer *w, const json_t *call)
{
    const json_t *fn = json_object_get(call, "function");
    const json_t *name = json_object_get(fn, "name"), *args = json_object_get(fn, "arguments");
    if (!json_is_string(name))
        return TM_FAIL(w->err, TM_STATUS_INVALID, "a tool call has no function name");
    put(w, w->f->call);
    put(w, "{\"name\": ");
    TM_TRY(put_json(w, name));
    put(w, ", \"parameters\": ");
    if (json_is_string(args))
        put_input(w, json_string_value(args), json_string_length(args));
    else if (args)
        TM_TRY(put_json(w, args));
    else
        put(w, "{}");
    put(w, "}");
    put(w, w->f->eocall);
    return TM_OK;
}

static tm_status put_calls(writer *w, const json_t *message)
{
    const json_t *calls = json_object_get(message, "tool_calls");
    if (json_array_size(calls) == 0)
        return TM_OK;
    if (!w->f->call)
        return TM_FAIL(w->err, TM_STATUS_INVALID,
                       "the chat template %s has no place for tool calls", w->f->name);
    for (size_t i = 0; i < json_array_size(calls); i++)
        TM_TRY(put_call(w, json_array_get(calls, i)));
    return TM_OK;
}

enum { SYSTEM, USER, ASSISTANT, TOOL };

/* open: the message is to be continued, its end is left out. */
static tm_status put_message(writer *w, const json_t *message, bool open)
{
    const tm_chat_format *f = w->f;
    const struct {
        const char *role, *begin, *end;
    } boxes[] = {[SYSTEM] = {"system", f->system, f->eosys},
                 [USER] = {"user", f->user, f->eoh},
                 [ASSISTANT] = {"assistant", f->assistant, f->eoa},
                 [TOOL] = {"tool", f->tool, f->eotool}};
    const char *role = json_string_value(json_object_get(message, "role"));
    size_t k = 0;
    while (role && k < TM_ARRAY_LEN(boxes) && strcmp(boxes[k].role, role) != 0)
        k++;
    if (!role || k == TM_ARRAY_LEN(boxes) || (k == TOOL && !f->tool && !f->raw))
        return TM_FAIL(w->err, TM_STATUS_INVALID,
                       "the chat template %s has no place for the role '%.40s'", f->name,
                       role ? role : "");
    if (f->raw)
        return put_content(w, message);
    if (k == USER && f->rounds)
        tm_buf_printf(&w->r.text, "[Round %d]\n\n", ++w->round);
    put(w, boxes[k].begin);
    TM_TRY(put_content(w, message));
    if (k == ASSISTANT)
        TM_TRY(put_calls(w, message));
    if (!open) {
        put(w, boxes[k].end);
        put(w, k == ASSISTANT ? f->separator : NULL);
    }
    return TM_OK;
}

static tm_status put_tools(writer *w, const json_t *tools)
{
    if (json_array_size(tools) == 0 || w->f->raw)
        return TM_OK;
    if (!w->f->tools)
        return TM_FAIL(w->err, TM_STATUS_INVALID, "the chat template %s has no place for tools",
                       w->f->name);
    put(w, w->f->tools);
    TM_TRY(put_json(w, tools));
    put(w, w->f->eotools);
    return TM_OK;
}

static bool begins(const char *text, const char *part)
{
    return text && strncmp(text, part, strlen(part)) == 0;
}

/* What stands before the first message. The tokenizer's own beginning is not doubled when a box has it. */
static void put_opening(writer *w, bool system)
{
    const tm_chat_format *f = w->f;
    const char *meta = w->t->meta ? w->t->meta : f->meta;
    bool instruct = !f->raw && !system && meta;
    const char *begin = f->raw                 ? NULL
                        : (system || instruct) ? f->system
                        : f->first             ? f->first
                                               : f->user;
    if (f->start && !f->raw)
        put(w, f->start);
    else if (w->t->prefix && !begins(begin, w->t->prefix))
        put(w, w->t->prefix);
    if (instruct) {
        put(w, f->system);
        put(w, meta);
        put(w, f->eosys);
    } else if (!system && !f->raw) {
        put(w, f->first);
    }
}

static tm_status write_all(writer *w, const tm_render_args *a)
{
    size_t n = json_array_size(a->messages);
    const char *role = json_string_value(json_object_get(json_array_get(a->messages, 0), "role"));
    bool system = role && strcmp(role, "system") == 0;
    put_opening(w, system);
    if (!system)
        TM_TRY(put_tools(w, a->tools));
    for (size_t i = 0; i < n; i++) {
        bool open = a->continue_final_message && i + 1 == n;
        TM_TRY(put_message(w, json_array_get(a->messages, i), open));
        if (i == 0 && system)
            TM_TRY(put_tools(w, a->tools));
    }
    if (a->add_generation_prompt && !w->f->raw)
        put(w, w->f->prompt ? w->f->prompt : w->f->assistant);
    return w->r.text.failed ? TM_FAIL(w->err, TM_STATUS_NO_MEMORY, "out of memory for a prompt")
                            : TM_OK;
}

tm_status tm_chat_format_render(const tm_template *t, const tm_render_args *args, tm_rendered *out,
                                tm_err *err)
{
    writer w = {.t = t, .f = t->format, .err = err};
    tm_buf_init(&w.r.text, 0);
    tm_status st = write_all(&w, args);
    if (st != TM_OK) {
        tm_rendered_deinit(&w.r);
        return st;
    }
    *out = w.r;
    return TM_OK;
}
