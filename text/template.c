/* Chat templates: where a model's template comes from, and the two kinds behind one face.
 *
 * A publisher may write the template in three files; a user may name one of ours, give a file, or give the
 * text itself. All of that is decided once, when the template is made (choose); rendering only follows
 * what was chosen. */
#include "text/template.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/file.h"
#include "common/model_dir.h"
#include "common/json.h"
#include "text/chat/chat.h"
#include "text/tok/files.h"
#include "text/tok/jread.h"
#include "text/tok/tok.h"

#define PREFIX_MAX 256

/* Editors write a byte order mark; no template means it. */
static size_t mark_length(const char *text, size_t len)
{
    return len >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0;
}

static tm_status compile(tm_jinja **out, const char *text, size_t len, const char *where,
                         tm_err *err)
{
    size_t mark = mark_length(text, len);
    tm_status st = tm_jinja_compile(out, text + mark, len - mark, err);
    if (st != TM_OK)
        tm_err_prefix(err, "%s", where);
    return st;
}

/* ---- the model's own template --------------------------------------------------------------------------- */

/* A list of {name, template}: "default" for plain conversations, "tool_use" for those with tools. */
static tm_status take_list(tm_template *t, const json_t *list, const char *where, tm_err *err)
{
    size_t i;
    json_t *item;
    json_array_foreach((json_t *)(uintptr_t)list, i, item)
    {
        const json_t *name = json_object_get(item, "name");
        const json_t *text = json_object_get(item, "template");
        if (!json_is_string(name) || !json_is_string(text))
            return TM_FAIL(err, TM_STATUS_DATA,
                           "%s: chat_template[%zu]: expected {\"name\": ..., \"template\": ...}",
                           where, i);
        bool tools = strcmp(json_string_value(name), "tool_use") == 0;
        tm_jinja **out = tools ? &t->with_tools : &t->plain;
        if ((!tools && strcmp(json_string_value(name), "default") != 0) || *out)
            continue;
        TM_TRY(compile(out, json_string_value(text), json_string_length(text), where, err));
    }
    if (!t->plain)
        return TM_FAIL(err, TM_STATUS_DATA, "%s: chat_template has no entry named default", where);
    return TM_OK;
}

static tm_status take_member(tm_template *t, const tm_text_file *f, tm_err *err)
{
    json_t *root;
    tm_status st = tm_jread_tree(f->data, f->len, &root, err);
    if (st != TM_OK) {
        tm_err_prefix(err, "%s", f->name);
        return st;
    }
    const json_t *v = tm_json_get(root, "chat_template");
    if (json_is_string(v))
        st = compile(&t->plain, json_string_value(v), json_string_length(v), f->name, err);
    else if (json_is_array(v))
        st = take_list(t, v, f->name, err);
    else if (v)
        st = TM_FAIL(err, TM_STATUS_DATA, "%s: chat_template: expected a string or a list, got %s",
                     f->name, tm_json_type_name(v));
    json_decref(root);
    return st;
}

static tm_status take_text(tm_template *t, const tm_text_file *f, tm_err *err)
{
    return compile(&t->plain, f->data, f->len, f->name, err);
}

static tm_status take_tools(tm_template *t, const tm_text_file *f, tm_err *err)
{
    return compile(&t->with_tools, f->data, f->len, f->name, err);
}

static tm_status take_model(tm_template *t, const tm_text_file *files, int count, tm_err *err)
{
    static const struct {
        const char *file;
        tm_status (*take)(tm_template *t, const tm_text_file *f, tm_err *err);
    } places[] = {{"chat_template.jinja", take_text},
                  {"tokenizer_config.json", take_member},
                  {"chat_template.json", take_member}};
    for (size_t i = 0; i < TM_ARRAY_LEN(places) && !t->plain; i++) {
        const tm_text_file *f = tm_text_file_find(files, count, places[i].file);
        if (f)
            TM_TRY(places[i].take(t, f, err));
    }
    const tm_text_file *tools = tm_text_file_find(files, count, TM_TEXT_TOOLS_FILE);
    return t->plain && tools && !t->with_tools ? take_tools(t, tools, err) : TM_OK;
}

/* ---- the user's choice ---------------------------------------------------------------------------------- */

/* Template text in either language; *is tells that it was one. */
static tm_status take_source(tm_template *t, const char *text, size_t len, bool *is, tm_err *err)
{
    size_t mark = mark_length(text, len), at = mark;
    while (at < len && isspace((unsigned char)text[at]))
        at++;
    *is = true;
    if (memmem(text, len, "{%", 2) || memmem(text, len, "{{", 2) || memmem(text, len, "{#", 2))
        return compile(&t->plain, text, len, "chat template", err);
    if (at < len && text[at] == '{')
        return tm_chat_format_read(t, text + mark, len - mark, err);
    *is = false;
    return TM_OK;
}

static tm_status take_file(tm_template *t, const char *path, tm_err *err)
{
    char *data;
    size_t len;
    bool is;
    TM_TRY(tm_file_read(path, TM_JINJA_SOURCE_MAX, &data, &len, err));
    tm_status st = take_source(t, data, len, &is, err);
    if (st == TM_OK && !is) /* text without any statement is a template, too: it says one thing */
        st = compile(&t->plain, data, len, "chat template", err);
    if (st != TM_OK)
        tm_err_prefix(err, "%s", path);
    free(data);
    return st;
}

static tm_status take_override(tm_template *t, const char *override, tm_err *err)
{
    bool is;
    t->format = tm_chat_builtin_find(override);
    if (t->format)
        return TM_OK;
    TM_TRY(take_source(t, override, strlen(override), &is, err));
    if (is)
        return TM_OK;
    if (tm_file_exists(override))
        return take_file(t, override, err);
    char close[256];
    tm_chat_builtin_closest(override, close, sizeof(close));
    return TM_FAIL(err, TM_STATUS_CONFIG,
                   "'%.60s' is neither a file, nor template text, nor the name of a built-in "
                   "template; the closest of those are %s",
                   override, close);
}

/* ---- what the tokenizer tells --------------------------------------------------------------------------- */

static tm_status copy_names(tm_template *t, const tm_tokenizer *tok, tm_err *err)
{
    int count = tok ? tok->name_count : 0;
    t->names = calloc((size_t)count + 1, sizeof(*t->names));
    for (int i = 0; t->names && i < count; i++) {
        t->names[i] = (tm_chat_name){strdup(tok->names[i].name), strdup(tok->names[i].value)};
        t->name_count = i + 1;
        if (!t->names[i].name || !t->names[i].value)
            return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a chat template");
    }
    return t->names ? TM_OK
                    : TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a chat template");
}

/* Prompts are encoded without the tokenizer's additions, so a format writes them as text: Jinja templates do
 * that themselves. */
static tm_status copy_prefix(tm_template *t, const tm_tokenizer *tok, tm_err *err)
{
    const tm_encode_opts opts = {.add_special = true};
    int32_t *ids;
    size_t n, len;
    tm_buf b;
    TM_TRY(tm_tokenizer_encode(tok, "", 0, &opts, &ids, &n, err));
    tm_buf_init(&b, PREFIX_MAX);
    for (size_t i = 0; i < n && ids[i] != tm_tokenizer_eos(tok); i++) {
        const char *piece = tm_tokenizer_piece(tok, ids[i], &len);
        if (piece)
            tm_buf_append(&b, piece, len);
    }
    free(ids);
    t->prefix = tm_buf_steal(&b, &len);
    return TM_OK;
}

/* ---- the model's name ----------------------------------------------------------------------------------- */

/* What a workspace's config says: the name of a built-in one. */
static const tm_chat_format *take_name(const tm_text_file *files, int count)
{
    char name[128];
    const tm_text_file *f = tm_text_file_find(files, count, TM_MODEL_TEMPLATE_FILE);
    if (!f || f->len >= sizeof(name))
        return NULL;
    memcpy(name, f->data, f->len);
    name[f->len] = '\0';
    return tm_chat_builtin_find(name);
}

/* Old checkpoints have no template, but say in config.json what they were copied from. */
static tm_status take_origin(tm_template *t, const tm_text_file *files, int count, tm_err *err)
{
    json_t *root;
    const char *origin = NULL;
    const tm_text_file *f = tm_text_file_find(files, count, "config.json");
    if (!f)
        return TM_OK;
    tm_status st = tm_jread_tree(f->data, f->len, &root, err);
    if (st == TM_OK) {
        st = tm_json_str(root, "_name_or_path", &origin, err);
        if (st == TM_OK && origin)
            t->format = tm_chat_builtin_match(origin);
        json_decref(root);
    }
    if (st != TM_OK)
        tm_err_prefix(err, "%s", f->name);
    return st;
}

/* ---- the face ------------------------------------------------------------------------------------------- */

/* dir: the model's folder, or NULL. */
static tm_status choose(tm_template *t, const tm_text_file *files, int count, const char *override,
                        const char *dir, tm_err *err)
{
    if (override && *override)
        return take_override(t, override, err);
    TM_TRY(take_model(t, files, count, err));
    if (!t->plain)
        t->format = take_name(files, count);
    if (!t->plain && !t->format && dir)
        t->format = tm_chat_builtin_match(dir);
    if (!t->plain && !t->format)
        TM_TRY(take_origin(t, files, count, err));
    if (!t->plain && !t->format)
        return TM_FAIL(err, TM_STATUS_NOT_FOUND, "the model has no chat template");
    return TM_OK;
}

static tm_status create(tm_template **out, const tm_text_file *files, int count,
                        const char *override, const char *dir, const tm_tokenizer *tok, tm_err *err)
{
    tm_template *t = calloc(1, sizeof(*t));
    if (!t)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a chat template");
    tm_status st = choose(t, files, count, override, dir, err);
    if (st == TM_OK)
        st = copy_names(t, tok, err);
    if (st == TM_OK && t->format && tok)
        st = copy_prefix(t, tok, err);
    if (st != TM_OK) {
        tm_template_destroy(t);
        return st;
    }
    *out = t;
    return TM_OK;
}

tm_status tm_template_create(tm_template **out, const tm_text_file *files, int count,
                             const char *override, const tm_tokenizer *t, tm_err *err)
{
    return create(out, files, count, override, NULL, t, err);
}

tm_status tm_template_load(tm_template **out, const char *dir, const char *override,
                           const tm_tokenizer *t, tm_err *err)
{
    tm_text_files f = {.count = 0};
    TM_TRY(tm_text_files_load(&f, dir, err));
    tm_status st = create(out, f.v, f.count, override, dir, t, err);
    if (st != TM_OK)
        tm_err_prefix(err, "%s", dir);
    tm_text_files_deinit(&f);
    return st;
}

void tm_template_destroy(tm_template *t)
{
    if (!t)
        return;
    tm_jinja_destroy(t->plain);
    tm_jinja_destroy(t->with_tools);
    json_decref(t->owned);
    free(t->prefix);
    free(t->meta);
    for (int i = 0; i < t->name_count; i++) {
        free(t->names[i].name);
        free(t->names[i].value);
    }
    free(t->names);
    free(t);
}

const char *tm_template_name(const tm_template *t)
{
    return t->format ? t->format->name : "jinja";
}

const char *tm_template_stop(const tm_template *t, int index)
{
    return t->format && index >= 0 && index < TM_CHAT_STOPS_MAX ? t->format->stops[index] : NULL;
}

tm_status tm_template_set_meta(tm_template *t, const char *text, tm_err *err)
{
    if (!text || !*text)
        return TM_OK;
    char *copy = strdup(text);
    if (!copy)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a chat template");
    free(t->meta);
    t->meta = copy;
    return TM_OK;
}

bool tm_template_mentions(const tm_template *t, const char *text)
{
    const tm_chat_format *f = t->format;
    if (!f)
        return tm_jinja_mentions(t->plain, text) ||
               (t->with_tools && tm_jinja_mentions(t->with_tools, text));
    const char *const parts[] = {f->system, f->user, f->assistant, f->tool,
                                 f->tools,  f->call, f->eocall,    f->start};
    for (size_t i = 0; i < TM_ARRAY_LEN(parts); i++)
        if (parts[i] && strstr(parts[i], text))
            return true;
    return false;
}

bool tm_template_takes_tools(const tm_template *t)
{
    if (t->format)
        return t->format->tools != NULL;
    return t->with_tools || tm_jinja_mentions(t->plain, "tools");
}

tm_status tm_template_render(const tm_template *t, const tm_render_args *args, tm_rendered *out,
                             tm_err *err)
{
    if (args->add_generation_prompt && args->continue_final_message)
        return TM_FAIL(
            err, TM_STATUS_INVALID,
            "continuing the final message and a prompt for the next one exclude each other");
    return t->format ? tm_chat_format_render(t, args, out, err)
                     : tm_chat_jinja_render(t, args, out, err);
}

void tm_rendered_deinit(tm_rendered *r)
{
    tm_buf_deinit(&r->text);
    free(r->input);
    *r = (tm_rendered){.input = NULL};
}
