/* Conversations through Jinja templates, called as transformers calls them: the same variables, the same way
 * of continuing a final message (a mark is written behind its text, and the rendering is cut at the mark). */
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "text/chat/chat.h"

#define VARS_MAX  160
#define DEPTH_MAX 64
/* The space at the end shows whether the template strips what it prints. */
#define MARK "TURBOMESH_CONTINUES_HERE "

/* ---- the request ---------------------------------------------------------------------------------------- */

/* Bytes of all strings, the measure for the bounds of a render. */
static size_t text_bytes(const json_t *v, int depth)
{
    size_t sum = 8, i;
    const char *key;
    json_t *item;
    if (depth > DEPTH_MAX)
        return sum;
    if (json_is_string(v))
        return sum + json_string_length(v);
    json_array_foreach((json_t *)(uintptr_t)v, i, item)
    {
        sum += text_bytes(item, depth + 1);
    }
    json_object_foreach((json_t *)(uintptr_t)v, key, item)
    {
        sum += strlen(key) + text_bytes(item, depth + 1);
    }
    return sum;
}

/* ---- continuing the final message ----------------------------------------------------------------------- */

/* Where the text of the final message stands; `message` and `text` are references of its own. */
typedef struct final_text {
    json_t *message, *text;
    bool in_part; /* the content is a list, the text that of its member `index` */
    size_t index;
} final_text;

static bool find_final(const json_t *messages, final_text *f)
{
    size_t n = json_array_size(messages);
    json_t *message = n ? json_array_get(messages, n - 1) : NULL;
    json_t *content = json_object_get(message, "content"), *text = content;
    size_t i = json_array_size(content);
    bool in_part = i > 0;
    while (i > 0 && !(text = json_object_get(json_array_get(content, i - 1), "text")))
        i--;
    if (!json_is_string(text))
        return false;
    *f = (final_text){json_incref(message), json_incref(text), in_part, in_part ? i - 1 : 0};
    return true;
}

static void drop_final(final_text *f)
{
    json_decref(f->message);
    json_decref(f->text);
}

static json_t *marked_text(const json_t *text)
{
    tm_buf b;
    tm_buf_init(&b, 0);
    tm_buf_append(&b, json_string_value(text), json_string_length(text));
    tm_buf_puts(&b, MARK);
    json_t *out = b.failed ? NULL : json_stringn_nocheck(b.data, b.len);
    tm_buf_deinit(&b);
    return out;
}

/* A copy of the list of parts in which the text of one is replaced; takes `text`. */
static json_t *marked_parts(const final_text *f, json_t *text)
{
    json_t *content = json_object_get(f->message, "content");
    json_t *list = json_copy(content), *part = json_copy(json_array_get(content, f->index));
    bool ok =
        json_object_set_new(part, "text", text) == 0 && json_array_set(list, f->index, part) == 0;
    json_decref(part);
    if (ok)
        return list;
    json_decref(list);
    return NULL;
}

/* Replaces the last of `messages` by a copy whose text ends in the mark. */
static tm_status mark_final(json_t *messages, const final_text *f, tm_err *err)
{
    json_t *text = marked_text(f->text);
    json_t *content = f->in_part ? marked_parts(f, text) : text;
    json_t *message = json_copy(f->message);
    bool ok = json_object_set_new(message, "content", content) == 0 &&
              json_array_set(messages, json_array_size(messages) - 1, message) == 0;
    json_decref(message);
    return ok ? TM_OK : TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a prompt");
}

static const char *find_last(const char *text, size_t len, const char *word, size_t word_len)
{
    const char *found = NULL, *at = text;
    while ((at = memmem(at, len - (size_t)(at - text), word, word_len)) != NULL)
        found = at++;
    return found;
}

static bool is_space(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static void cut_at(tm_rendered *r, size_t len)
{
    r->text.len = len;
    r->text.data[len] = 0;
    while (r->input_count > 0 && r->input[r->input_count - 1].begin >= len)
        r->input_count--;
    if (r->input_count > 0)
        r->input[r->input_count - 1].end = TM_MIN(r->input[r->input_count - 1].end, len);
}

static bool cut_final(tm_rendered *r, const final_text *f)
{
    const char *text = json_string_value(f->text);
    size_t len = json_string_length(f->text), mark = strlen(MARK);
    while (len > 0 && is_space(text[len - 1]))
        len--;
    while (len > 0 && is_space(*text))
        text++, len--;
    const char *all = r->text.data, *at = find_last(all, r->text.len, MARK, mark - 1);
    if (!at || (len > 0 && !memmem(all, r->text.len, text, len)))
        return false;
    size_t end = (size_t)(at - all);
    bool kept = end + mark <= r->text.len && at[mark - 1] == MARK[mark - 1];
    while (!kept && end > 0 && is_space(all[end - 1]))
        end--;
    cut_at(r, end);
    return true;
}

/* ---- rendering ------------------------------------------------------------------------------------------ */

typedef struct var_list {
    tm_jinja_var v[VARS_MAX];
    int n;
} var_list;

static tm_status add_kwargs(var_list *l, const json_t *kwargs, tm_err *err)
{
    static const char *const taken[] = {"messages", "tools", "add_generation_prompt"};
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)kwargs, key, v)
    {
        for (size_t i = 0; i < TM_ARRAY_LEN(taken); i++)
            if (strcmp(key, taken[i]) == 0)
                return TM_FAIL(err, TM_STATUS_INVALID,
                               "chat_template_kwargs: '%s' is a field of the request itself", key);
        if (l->n == VARS_MAX)
            return TM_FAIL(err, TM_STATUS_INVALID, "chat_template_kwargs: too many variables");
        l->v[l->n++] = (tm_jinja_var){.name = key, .value = v};
    }
    return TM_OK;
}

static tm_status list_vars(const tm_template *t, const tm_render_args *a, const json_t *messages,
                           var_list *l, tm_err *err)
{
    *l = (var_list){.n = 0};
    for (int i = 0; i < t->name_count; i++)
        l->v[l->n++] =
            (tm_jinja_var){.name = t->names[i].name, .text = t->names[i].value, .trusted = true};
    l->v[l->n++] = (tm_jinja_var){.name = "messages", .value = messages};
    l->v[l->n++] = (tm_jinja_var){.name = "tools", .value = a->tools};
    l->v[l->n++] = (tm_jinja_var){.name = "documents"};
    l->v[l->n++] = (tm_jinja_var){.name = "add_generation_prompt",
                                  .value = a->add_generation_prompt ? json_true() : json_false()};
    return add_kwargs(l, a->kwargs, err);
}

static tm_status render(const tm_template *t, const tm_jinja *jinja, const tm_render_args *a,
                        const json_t *messages, tm_rendered *out, tm_err *err)
{
    var_list vars;
    TM_TRY(list_vars(t, a, messages, &vars, err));
    const tm_jinja_args args = {.vars = vars.v,
                                .count = vars.n,
                                .now = a->now,
                                .input_bytes = text_bytes(messages, 0) + text_bytes(a->tools, 0) +
                                               text_bytes(a->kwargs, 0)};
    return tm_jinja_render(jinja, &args, &out->text, &out->input, &out->input_count, err);
}

/* The user's system message in front of a conversation that has none. */
static tm_status add_meta(const tm_template *t, json_t *messages, tm_err *err)
{
    const json_t *first = json_array_get(messages, 0);
    const char *role = json_string_value(json_object_get(first, "role"));
    if (!t->meta || (role && strcmp(role, "system") == 0))
        return TM_OK;
    json_t *m = json_pack("{s:s, s:s}", "role", "system", "content", t->meta);
    return m && json_array_insert_new(messages, 0, m) == 0
               ? TM_OK
               : TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a prompt");
}

tm_status tm_chat_jinja_render(const tm_template *t, const tm_render_args *args, tm_rendered *out,
                               tm_err *err)
{
    const tm_jinja *jinja = args->tools && t->with_tools ? t->with_tools : t->plain;
    tm_rendered r = {.input = NULL};
    final_text f = {.text = NULL};
    tm_status st = TM_OK;
    json_t *messages = json_copy((json_t *)(uintptr_t)args->messages);
    if (!messages)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a prompt");
    tm_buf_init(&r.text, 0);
    st = add_meta(t, messages, err);
    if (st == TM_OK && args->continue_final_message) {
        st = find_final(messages, &f)
                 ? mark_final(messages, &f, err)
                 : TM_FAIL(err, TM_STATUS_INVALID, "the final message has no text to continue");
    }
    if (st == TM_OK)
        st = render(t, jinja, args, messages, &r, err);
    if (st == TM_OK && args->continue_final_message && !cut_final(&r, &f))
        st = TM_FAIL(err, TM_STATUS_INVALID,
                     "the final message does not appear in the rendered chat");
    drop_final(&f);
    json_decref(messages);
    if (st != TM_OK) {
        tm_rendered_deinit(&r);
        return st;
    }
    *out = r;
    return TM_OK;
}
