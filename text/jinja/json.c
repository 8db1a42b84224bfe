/* JSON into template values: from a jansson tree (the request) and from text, where integers of any size stay
 * exact. Strings are marked as input, but for roles: those are words of a fixed list. */
#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <yajl/yajl_parse.h>

#include "common/check.h"
#include "text/jinja/json.h"

static bool is_role(const char *s, size_t len)
{
    static const char *const roles[] = {"system",    "user",     "assistant", "tool",
                                        "developer", "function", "ipython"};
    for (size_t i = 0; i < TM_ARRAY_LEN(roles); i++)
        if (strlen(roles[i]) == len && memcmp(roles[i], s, len) == 0)
            return true;
    return false;
}

static bool wrap(tm_jrun *r, const char *s, size_t len, bool marked, tm_jval *out)
{
    tm_jbuf *b = tm_jbuf_wrap(r, s, len, marked);
    if (b)
        *out = tm_jbuf_value(b);
    return b != NULL;
}

/* ---- from jansson --------------------------------------------------------------------------------------- */

static bool from_object(tm_jrun *r, json_t *v, bool marked, tm_jval *out)
{
    tm_jval d, key, val;
    if (!tm_jv_dict(r, TM_J_DICT, &d))
        return false;
    for (void *it = json_object_iter(v); it; it = json_object_iter_next(v, it)) {
        const char *name = json_object_iter_key(it);
        const json_t *value = json_object_iter_value(it);
        size_t len = json_object_iter_key_len(it);
        bool role = len == 4 && memcmp(name, "role", 4) == 0 && json_is_string(value) &&
                    is_role(json_string_value(value), json_string_length(value));
        if (!wrap(r, name, len, marked, &key) ||
            !tm_jv_from_json(r, value, marked && !role, &val) || !tm_jdict_set(r, d.u.d, &key, val))
            return false;
    }
    *out = d;
    return true;
}

static bool from_array(tm_jrun *r, const json_t *v, bool marked, tm_jval *out)
{
    tm_jval l, item;
    if (!tm_jv_list(r, TM_J_LIST, json_array_size(v), &l))
        return false;
    for (size_t i = 0; i < json_array_size(v); i++)
        if (!tm_jv_from_json(r, json_array_get(v, i), marked, &item) ||
            !tm_jlist_push(r, l.u.l, item))
            return false;
    *out = l;
    return true;
}

bool tm_jv_from_json(tm_jrun *r, const json_t *v, bool marked, tm_jval *out)
{
    bool ok = true;
    if (!tm_jrun_enter(r))
        return false;
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        ok = from_object(r, (json_t *)(uintptr_t)v, marked, out);
        break;
    case JSON_ARRAY:
        ok = from_array(r, v, marked, out);
        break;
    case JSON_STRING:
        ok = wrap(r, json_string_value(v), json_string_length(v), marked, out);
        break;
    case JSON_INTEGER:
        *out = tm_jv_int(json_integer_value(v));
        break;
    case JSON_REAL:
        *out = tm_jv_float(json_real_value(v));
        break;
    case JSON_TRUE:
    case JSON_FALSE:
        *out = tm_jv_bool(json_is_true(v));
        break;
    case JSON_NULL:
        *out = TM_JV_NONE;
        break;
    }
    tm_jrun_leave(r);
    return ok;
}

/* ---- from text ------------------------------------------------------------------------------------------ */

#define TEXT_DEPTH_MAX 64

typedef struct text_reader {
    tm_jrun *r;
    bool marked;
    tm_jval root, open[TEXT_DEPTH_MAX], key[TEXT_DEPTH_MAX];
    int depth;
    bool done;
} text_reader;

static int place(text_reader *x, tm_jval v)
{
    if (x->depth == 0) {
        x->root = v;
        x->done = true;
        return 1;
    }
    tm_jval *top = &x->open[x->depth - 1];
    if (top->type == TM_J_LIST)
        return tm_jlist_push(x->r, top->u.l, v);
    return tm_jdict_set(x->r, top->u.d, &x->key[x->depth - 1], v);
}

static int on_null(void *ctx)
{
    return place(ctx, TM_JV_NONE);
}

static int on_bool(void *ctx, int v)
{
    return place(ctx, tm_jv_bool(v));
}

static int on_number(void *ctx, const char *s, size_t len)
{
    text_reader *x = ctx;
    bool real = false;
    for (size_t i = 0; i < len; i++)
        real |= s[i] == '.' || s[i] == 'e' || s[i] == 'E';
    if (real)
        return place(x, tm_jv_float(tm_parse_double(s, len)));
    char text[24];
    errno = len < sizeof(text) ? 0 : ERANGE;
    int64_t i = 0;
    if (errno == 0) {
        memcpy(text, s, len);
        text[len] = 0;
        i = strtoll(text, NULL, 10);
    }
    if (errno == 0)
        return place(x, tm_jv_int(i));
    tm_jval big;
    if (!tm_jv_str(x->r, s, len, &big))
        return 0;
    big.type = TM_J_BIGINT;
    return place(x, big);
}

static int read_string(text_reader *x, const unsigned char *s, size_t len, bool marked,
                       tm_jval *out)
{
    tm_jbuf *b = tm_jbuf_new(x->r, len);
    if (!b || !tm_jbuf_append(x->r, b, (const char *)s, len, marked))
        return 0;
    *out = tm_jbuf_value(b);
    return 1;
}

static int on_string(void *ctx, const unsigned char *s, size_t len)
{
    text_reader *x = ctx;
    tm_jval v;
    bool role = x->depth > 0 && x->open[x->depth - 1].type == TM_J_DICT &&
                tm_jv_is(&x->key[x->depth - 1], "role") && is_role((const char *)s, len);
    return read_string(x, s, len, x->marked && !role, &v) && place(x, v);
}

static int on_key(void *ctx, const unsigned char *s, size_t len)
{
    text_reader *x = ctx;
    return read_string(x, s, len, x->marked, &x->key[x->depth - 1]);
}

static int open_container(text_reader *x, tm_jval v)
{
    if (x->depth == TEXT_DEPTH_MAX || !place(x, v))
        return 0;
    x->open[x->depth++] = v;
    x->done = false;
    return 1;
}

static int on_open_object(void *ctx)
{
    text_reader *x = ctx;
    tm_jval v;
    return tm_jv_dict(x->r, TM_J_DICT, &v) && open_container(x, v);
}

static int on_open_array(void *ctx)
{
    text_reader *x = ctx;
    tm_jval v;
    return tm_jv_list(x->r, TM_J_LIST, 0, &v) && open_container(x, v);
}

static int on_close(void *ctx)
{
    text_reader *x = ctx;
    x->done = --x->depth == 0;
    return 1;
}

bool tm_jv_parse_json(tm_jrun *r, const char *s, size_t len, bool marked, tm_jval *out, bool *valid)
{
    static const yajl_callbacks calls = {.yajl_null = on_null,
                                         .yajl_boolean = on_bool,
                                         .yajl_number = on_number,
                                         .yajl_string = on_string,
                                         .yajl_start_map = on_open_object,
                                         .yajl_map_key = on_key,
                                         .yajl_end_map = on_close,
                                         .yajl_start_array = on_open_array,
                                         .yajl_end_array = on_close};
    text_reader *x = tm_jrun_alloc(r, sizeof(*x));
    yajl_handle h = x ? yajl_alloc(&calls, NULL, x) : NULL;
    if (!h)
        return x ? tm_jrun_bound(r, "out of memory") : false;
    x->r = r;
    x->marked = marked;
    *valid = yajl_parse(h, (const unsigned char *)s, len) == yajl_status_ok &&
             yajl_complete_parse(h) == yajl_status_ok && x->done;
    yajl_free(h);
    if (*valid)
        *out = x->root;
    return r->status == TM_OK;
}
