/* Attributes, items and slices. The dot looks for a method first and an item second, brackets the other way
 * round; what is not there is undefined, not an error; attributes with underscores do not exist. */
#include <stdio.h>

#include "common/check.h"
#include "text/jinja/run.h"
#include "text/tok/unicode.h"

/* As Python's messages call the object. */
static const char *object_name(const tm_jval *v, char *buf, size_t size)
{
    if (v->type == TM_J_NONE)
        return "None";
    snprintf(buf, size, "%s object", tm_jv_type_name(v));
    return buf;
}

static tm_jval missing_attr(tm_jrun *r, const tm_jval *v, const char *name, size_t len)
{
    char buf[64];
    return tm_jrun_missing(r, "'%s' has no attribute '%.*s'", object_name(v, buf, sizeof(buf)),
                           (int)TM_MIN(len, 80), name);
}

static bool loop_attr(tm_jrun *r, const tm_jloop *l, const char *name, size_t len, tm_jval *out)
{
    const struct {
        const char *name;
        int64_t v;
        bool flag;
    } rows[] = {
        {"index", (int64_t)l->at + 1, false},
        {"index0", (int64_t)l->at, false},
        {"revindex", (int64_t)(l->n - l->at), false},
        {"revindex0", (int64_t)(l->n - l->at) - 1, false},
        {"length", (int64_t)l->n, false},
        {"depth", l->depth0 + 1, false},
        {"depth0", l->depth0, false},
        {"first", l->at == 0, true},
        {"last", l->at + 1 == l->n, true},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        if (strlen(rows[i].name) == len && memcmp(rows[i].name, name, len) == 0) {
            *out = rows[i].flag ? tm_jv_bool(rows[i].v) : tm_jv_int(rows[i].v);
            return true;
        }
    }
    if (len == 8 && memcmp(name, "previtem", 8) == 0) {
        *out = l->at > 0 ? l->items[l->at - 1] : tm_jrun_missing(r, "there is no previous item");
        return true;
    }
    if (len == 8 && memcmp(name, "nextitem", 8) == 0) {
        *out = l->at + 1 < l->n ? l->items[l->at + 1] : tm_jrun_missing(r, "there is no next item");
        return true;
    }
    return false;
}

/* Python's getattr: methods and the attributes of special objects; false = no such attribute. */
static bool get_attr(tm_jrun *r, const tm_jval *v, const char *name, size_t len, tm_jval *out)
{
    bool unsafe = len > 4 && name[0] == '_' && name[1] == '_' && name[len - 1] == '_';
    const tm_jfn_row *row = unsafe ? NULL : tm_jmethod_find(v, name, len, &unsafe);
    if (unsafe) {
        *out = tm_jrun_missing(r, "access to attribute '%.*s' of '%s' object is unsafe.",
                               (int)TM_MIN(len, 80), name, tm_jv_type_name(v));
        out->flags = TM_JF_UNSAFE;
        return true;
    }
    if (row) {
        tm_jcall *c = tm_jrun_alloc(r, sizeof(*c));
        if (!c)
            return false;
        c->row = row;
        c->self = *v;
        *out = (tm_jval){.type = TM_J_CALL, .u.call = c};
        return true;
    }
    if (v->type == TM_J_LOOP)
        return loop_attr(r, v->u.loop, name, len, out);
    if (v->type != TM_J_NAMESPACE)
        return false;
    tm_jbuf b = {.data = (char *)(uintptr_t)name, .used = len};
    tm_jval key = tm_jbuf_value(&b), *got = tm_jdict_get(v->u.d, &key);
    if (got)
        *out = *got;
    return got != NULL;
}

/* Python's obj[key] without slices; false = TypeError or LookupError. */
static bool get_item(tm_jrun *r, const tm_jval *v, const tm_jval *key, tm_jval *out)
{
    if (v->type == TM_J_DICT) {
        tm_jval *got = tm_jv_hashable(key) ? tm_jdict_get(v->u.d, key) : NULL;
        if (got)
            *out = *got;
        return got != NULL;
    }
    if (key->type != TM_J_INT && key->type != TM_J_BOOL)
        return false;
    int64_t i = key->type == TM_J_BOOL ? key->u.b : key->u.i;
    if (v->type == TM_J_LIST || v->type == TM_J_TUPLE || v->type == TM_J_RANGE) {
        int64_t n = (int64_t)v->u.l->n;
        i += i < 0 ? n : 0;
        if (i < 0 || i >= n)
            return false;
        *out = v->u.l->v[i];
        return true;
    }
    if (v->type != TM_J_STR || !tm_jrun_charge(r, v->len))
        return false;
    int64_t n = (int64_t)tm_jv_chars(v);
    i += i < 0 ? n : 0;
    if (i < 0 || i >= n)
        return false;
    size_t pos = 0, from = 0;
    for (; i >= 0; i--) {
        from = pos;
        tm_utf8_next(tm_jv_text(v), &pos);
    }
    *out = tm_jv_slice(v, from, pos - from);
    return true;
}

bool tm_jattr(tm_jrun *r, const tm_jval *v, const char *name, size_t len, tm_jval *out)
{
    if (v->type == TM_J_UNDEFINED)
        return tm_jrun_undefined(r, v);
    if (get_attr(r, v, name, len, out))
        return true;
    tm_jbuf b = {.data = (char *)(uintptr_t)name, .used = len};
    tm_jval key = tm_jbuf_value(&b);
    if (!get_item(r, v, &key, out))
        *out = missing_attr(r, v, name, len);
    return r->status == TM_OK;
}

bool tm_jitem(tm_jrun *r, const tm_jval *v, const tm_jval *key, tm_jval *out)
{
    if (v->type == TM_J_UNDEFINED)
        return tm_jrun_undefined(r, v);
    if (get_item(r, v, key, out))
        return true;
    if (key->type == TM_J_STR) {
        if (!get_attr(r, v, tm_jv_text(key), key->len, out))
            *out = missing_attr(r, v, tm_jv_text(key), key->len);
    } else {
        char buf[64];
        if (key->type == TM_J_INT)
            *out = tm_jrun_missing(r, "%s has no element %lld", object_name(v, buf, sizeof(buf)),
                                   (long long)key->u.i);
        else
            *out = tm_jrun_missing(r, "%s has no such element", object_name(v, buf, sizeof(buf)));
    }
    return r->status == TM_OK;
}

/* ---- slices --------------------------------------------------------------------------------------------- */

static bool slice_bound(tm_jrun *r, const tm_jval *v, int64_t def, int64_t *out)
{
    if (!v || v->type == TM_J_NONE) {
        *out = def;
        return true;
    }
    if (v->type == TM_J_UNDEFINED)
        return tm_jrun_undefined(r, v);
    if (v->type != TM_J_INT && v->type != TM_J_BOOL)
        return tm_jrun_fail(r, "slice indices must be integers or None");
    *out = v->type == TM_J_BOOL ? v->u.b : v->u.i;
    return true;
}

static int64_t clamp(int64_t i, int64_t n, int64_t low, int64_t high)
{
    i += i < 0 ? n : 0;
    return i < low ? low : i > high ? high : i;
}

/* Python's slice.indices. */
static bool slice_range(tm_jrun *r, const tm_jval *const part[3], int64_t n, int64_t *start,
                        int64_t *stop, int64_t *step)
{
    if (!slice_bound(r, part[2], 1, step))
        return false;
    if (*step == 0)
        return tm_jrun_fail(r, "slice step cannot be zero");
    *step = *step > INT32_MAX ? INT32_MAX : *step < -INT32_MAX ? -INT32_MAX : *step;
    bool back = *step < 0;
    int64_t low = back ? -1 : 0, high = back ? n - 1 : n;
    if (!slice_bound(r, part[0], INT64_MIN, start) || !slice_bound(r, part[1], INT64_MIN, stop))
        return false;
    *start = *start == INT64_MIN ? (back ? high : low) : clamp(*start, n, low, high);
    *stop = *stop == INT64_MIN ? (back ? low : high) : clamp(*stop, n, low, high);
    return true;
}

static size_t byte_of_char(const tm_jval *s, int64_t chars)
{
    size_t pos = 0;
    while (chars-- > 0 && pos < s->len)
        tm_utf8_next(tm_jv_text(s), &pos);
    return pos;
}

static bool slice_string(tm_jrun *r, const tm_jval *v, int64_t start, int64_t stop, int64_t step,
                         tm_jval *out)
{
    if (step == 1) {
        size_t from = byte_of_char(v, start), to = stop > start ? byte_of_char(v, stop) : from;
        *out = tm_jv_slice(v, from, to - from);
        return tm_jrun_charge(r, v->len);
    }
    tm_jval *chars;
    size_t n;
    tm_jbuf *b = tm_jbuf_new(r, v->len);
    if (!b || !tm_jv_iterate(r, v, &chars, &n))
        return false;
    for (int64_t i = start; step > 0 ? i < stop : i > stop; i += step)
        if (!tm_jbuf_append_str(r, b, &chars[i]))
            return false;
    *out = tm_jbuf_value(b);
    return true;
}

bool tm_jslice(tm_jrun *r, const tm_jval *v, const tm_jval *const part[3], tm_jval *out)
{
    bool list = v->type == TM_J_LIST || v->type == TM_J_TUPLE || v->type == TM_J_RANGE;
    int64_t start = 0, stop = 0, step = 1;
    if (v->type == TM_J_UNDEFINED)
        return tm_jrun_undefined(r, v);
    if (!list && v->type != TM_J_STR)
        return tm_jrun_fail(r, "'%s' object is not subscriptable", tm_jv_type_name(v));
    int64_t n = list ? (int64_t)v->u.l->n : (int64_t)tm_jv_chars(v);
    if (!slice_range(r, part, n, &start, &stop, &step))
        return false;
    if (!list)
        return slice_string(r, v, start, stop, step, out);
    tm_jlist src = *v->u.l;
    if (!tm_jv_list(r, (tm_jtype)v->type, 0, out))
        return false;
    for (int64_t i = start; step > 0 ? i < stop : i > stop; i += step)
        if (!tm_jlist_push(r, out->u.l, src.v[i]))
            return false;
    return tm_jrun_charge(r, (size_t)n * sizeof(tm_jval));
}
