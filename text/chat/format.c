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

static tm_status read_capability(const json_t *root, bool *raw, tm_err *err)
{
    static const struct {
        const char *name;
        bool raw;
    } rows[] = {{"chat", false}, {"completion", true}};
    const char *name = NULL;
    TM_TRY(tm_json_str(root, "capability", &name, err));
    if (!name)
        return TM_OK;
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        if (strcmp(rows[i].name, name) == 0) {
            *raw = rows[i].raw;
            return TM_OK;
        }
    }
    return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                   "capability '%.40s': only chat and completion are supported", name);
}

static tm_status read_fields(const json_t *root, tm_chat_format *f, tm_err *err)
{
    const char *name = NULL;
    if (!json_is_object(root))
        return TM_FAIL(err, TM_STATUS_INVALID, "expected an object, got %s",
                       tm_json_type_name(root));
    TM_TRY(tm_json_str(root, "model_name", &name, err));
    if (!name)
        return TM_FAIL(err, TM_STATUS_INVALID, "model_name is missing");
    const tm_chat_format *base = tm_chat_builtin_find(name);
    /* A name of its own starts from nothing: then there is no instruction by default either. */
    *f = base ? *base : (tm_chat_format){.meta = NULL};
    for (size_t i = 0; i < TM_ARRAY_LEN(fields); i++) {
        const char *value = NULL;
        TM_TRY(tm_json_str(root, fields[i].key, &value, err));
        if (value)
            memcpy((char *)f + fields[i].offset, &value, sizeof(value));
    }
    return read_capability(root, &f->raw, err);
}

tm_status tm_chat_format_read(tm_template *t, const char *data, size_t len, tm_err *err)
{
    json_t *root;
    tm_chat_format f;
    tm_status st = tm_json_parse(data, len, &root, err);
    if (st == TM_OK) {
        st = read_fields(root, &f, err);
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

typedef struct role_box {
    const char *role, *begin, *end;
} role_box;

static void put(tm_rendered *r, const char *s)
{
    if (s)
        tm_buf_puts(&r->text, s);
}

/* The text of a message: from the request, so it is marked. input has room for one span a message. */
static tm_status put_content(tm_rendered *r, const json_t *message, tm_err *err)
{
    tm_buf room;
    const char *text;
    size_t len;
    tm_buf_init(&room, 0);
    bool ok = tm_chat_text(json_object_get(message, "content"), &room, &text, &len);
    size_t begin = r->text.len;
    if (ok && len > 0 && tm_buf_append(&r->text, text, len))
        r->input[r->input_count++] = (tm_text_span){begin, r->text.len};
    r->text.failed |= room.failed;
    tm_buf_deinit(&room);
    return ok ? TM_OK
              : TM_FAIL(err, TM_STATUS_INVALID, "the chat template takes messages of text only");
}

static tm_status put_message(const tm_chat_format *f, tm_rendered *r, const json_t *message,
                             bool open, tm_err *err)
{
    const role_box boxes[] = {{"system", f->system, f->eosys},
                              {"user", f->user, f->eoh},
                              {"assistant", f->assistant, f->eoa},
                              {"tool", f->tool, f->eotool}};
    const char *role = json_string_value(json_object_get(message, "role"));
    const role_box *box = NULL;
    for (size_t i = 0; role && i < TM_ARRAY_LEN(boxes); i++)
        if (strcmp(boxes[i].role, role) == 0)
            box = &boxes[i];
    if (!box || (box == &boxes[3] && !f->tool))
        return TM_FAIL(err, TM_STATUS_INVALID,
                       "the chat template has no place for the role '%.40s'", role ? role : "");
    put(r, f->raw ? NULL : box->begin);
    TM_TRY(put_content(r, message, err));
    if (!f->raw && !open) {
        put(r, box->end);
        put(r, box == &boxes[2] ? f->separator : NULL);
    }
    return TM_OK;
}

static bool is_role(const json_t *message, const char *role)
{
    const char *s = json_string_value(json_object_get(message, "role"));
    return s && strcmp(s, role) == 0;
}

/* The default instruction, and the tokens before everything unless the format writes them itself. */
static void put_opening(const tm_template *t, const tm_render_args *a, tm_rendered *r)
{
    const tm_chat_format *f = t->format;
    bool instruct = !f->raw && f->meta && !is_role(json_array_get(a->messages, 0), "system");
    bool system = instruct || is_role(json_array_get(a->messages, 0), "system");
    const char *first = f->raw ? "" : system ? f->system : f->user;
    if (t->prefix_len > 0 && strncmp(first ? first : "", t->prefix, t->prefix_len) != 0)
        tm_buf_append(&r->text, t->prefix, t->prefix_len);
    if (!instruct)
        return;
    put(r, f->system);
    put(r, f->meta);
    put(r, f->eosys);
}

static tm_status render(const tm_template *t, const tm_render_args *a, tm_rendered *r, tm_err *err)
{
    size_t i, n = json_array_size(a->messages);
    json_t *m;
    put_opening(t, a, r);
    json_array_foreach((json_t *)(uintptr_t)a->messages, i, m)
    {
        TM_TRY(put_message(t->format, r, m, a->continue_final_message && i + 1 == n, err));
    }
    if (a->add_generation_prompt && !t->format->raw)
        put(r, t->format->assistant);
    return r->text.failed ? TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a prompt") : TM_OK;
}

tm_status tm_chat_format_render(const tm_template *t, const tm_render_args *args, tm_rendered *out,
                                tm_err *err)
{
    tm_rendered r = {.input_count = 0};
    tm_buf_init(&r.text, 0);
    r.input = calloc(json_array_size(args->messages) + 1, sizeof(*r.input));
    tm_status st = r.input ? render(t, args, &r, err)
                           : TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a prompt");
    if (st != TM_OK) {
        tm_rendered_deinit(&r);
        return st;
    }
    *out = r;
    return TM_OK;
}
