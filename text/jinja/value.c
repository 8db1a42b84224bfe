/* Strings, lists and dictionaries of the interpreter.
 *
 * A string is a slice of a buffer, so strip, split and slicing cost nothing, and adding to the string that ends
 * where its buffer ends writes in place: a template that collects text piece by piece stays linear. */
#include "text/jinja/value.h"

#include <math.h>

#include "common/check.h"
#include "text/jinja/run.h"
#include "text/tok/unicode.h"

#define INDEX_FROM 8

/* ---- strings -------------------------------------------------------------------------------------------- */

tm_jbuf *tm_jbuf_new(tm_jrun *r, size_t cap)
{
    tm_jbuf *b = tm_jrun_alloc(r, sizeof(*b));
    if (!b)
        return NULL;
    b->cap = cap < 32 ? 32 : cap;
    b->data = tm_jrun_alloc(r, b->cap);
    return b->data ? b : NULL;
}

tm_jbuf *tm_jbuf_wrap(tm_jrun *r, const char *s, size_t len, bool marked)
{
    tm_jbuf *b = tm_jrun_alloc(r, sizeof(*b));
    if (!b)
        return NULL;
    b->data = (char *)(uintptr_t)s;
    b->used = len;
    if (!marked || len == 0)
        return b;
    b->marks = tm_jrun_alloc(r, sizeof(*b->marks));
    if (!b->marks)
        return NULL;
    b->marks[0] = (tm_text_span){0, len};
    b->mark_n = b->mark_cap = 1;
    return b;
}

static bool add_mark(tm_jrun *r, tm_jbuf *b, size_t begin, size_t end)
{
    if (b->mark_n > 0 && b->marks[b->mark_n - 1].end == begin) {
        b->marks[b->mark_n - 1].end = end;
        return true;
    }
    if (b->mark_n == b->mark_cap) {
        size_t cap = b->mark_cap ? b->mark_cap * 2 : 4;
        tm_text_span *m = tm_jrun_alloc(r, cap * sizeof(*m));
        if (!m)
            return false;
        if (b->mark_n)
            memcpy(m, b->marks, b->mark_n * sizeof(*m));
        b->marks = m;
        b->mark_cap = cap;
    }
    b->marks[b->mark_n++] = (tm_text_span){begin, end};
    return true;
}

static bool reserve(tm_jrun *r, tm_jbuf *b, size_t len)
{
    if (b->cap - b->used >= len && b->cap > 0)
        return true;
    if (len > TM_JSTR_MAX || b->used + len > TM_JSTR_MAX)
        return tm_jrun_bound(r, "a string is longer than 1 GiB");
    size_t cap = (b->used + len) * 2;
    char *data = tm_jrun_alloc(r, cap);
    if (!data)
        return false;
    memcpy(data, b->data, b->used);
    b->data = data;
    b->cap = cap;
    return true;
}

bool tm_jbuf_append(tm_jrun *r, tm_jbuf *b, const char *s, size_t len, bool marked)
{
    if (len == 0)
        return true;
    if (!reserve(r, b, len) || !tm_jrun_charge(r, len))
        return false;
    memcpy(b->data + b->used, s, len);
    b->used += len;
    return !marked || add_mark(r, b, b->used - len, b->used);
}

bool tm_jbuf_puts(tm_jrun *r, tm_jbuf *b, const char *s)
{
    return tm_jbuf_append(r, b, s, strlen(s), false);
}

/* First mark that ends behind `at`. */
static size_t mark_from(const tm_jbuf *b, size_t at)
{
    size_t lo = 0, hi = b->mark_n;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (b->marks[mid].end <= at)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

bool tm_jbuf_append_str(tm_jrun *r, tm_jbuf *b, const tm_jval *str)
{
    const tm_jbuf *src = str->u.s;
    size_t base = b->used, from = str->off, to = str->off + str->len;
    if (str->len == 0)
        return true;
    if (!reserve(r, b, str->len) || !tm_jrun_charge(r, str->len))
        return false;
    memcpy(b->data + base, src->data + from, str->len);
    b->used += str->len;
    for (size_t i = mark_from(src, from); i < src->mark_n && src->marks[i].begin < to; i++) {
        size_t x = TM_MAX(src->marks[i].begin, from), y = TM_MIN(src->marks[i].end, to);
        if (!add_mark(r, b, base + x - from, base + y - from))
            return false;
    }
    return true;
}

tm_jval tm_jbuf_value(tm_jbuf *b)
{
    return (tm_jval){.type = TM_J_STR, .len = (uint32_t)b->used, .u.s = b};
}

bool tm_jv_str(tm_jrun *r, const char *s, size_t len, tm_jval *out)
{
    tm_jbuf *b = tm_jbuf_new(r, len);
    if (!b || !tm_jbuf_append(r, b, s, len, false))
        return false;
    *out = tm_jbuf_value(b);
    return true;
}

tm_jval tm_jv_slice(const tm_jval *str, size_t off, size_t len)
{
    tm_jval v = *str;
    v.off += (uint32_t)off;
    v.len = (uint32_t)len;
    return v;
}

bool tm_jv_concat(tm_jrun *r, const tm_jval *a, const tm_jval *b, tm_jval *out)
{
    tm_jbuf *buf = a->u.s;
    tm_jval res = *a;
    if (buf->cap == 0 || a->off + a->len != buf->used || buf->cap - buf->used < b->len) {
        buf = tm_jbuf_new(r, ((size_t)a->len + b->len) * 2);
        if (!buf || !tm_jbuf_append_str(r, buf, a))
            return false;
        res.u.s = buf;
        res.off = 0;
    }
    if (!tm_jbuf_append_str(r, buf, b))
        return false;
    res.len += b->len;
    *out = res;
    return true;
}

bool tm_jv_marked(const tm_jval *str, size_t at)
{
    const tm_jbuf *b = str->u.s;
    size_t i = mark_from(b, str->off + at);
    return i < b->mark_n && b->marks[i].begin <= str->off + at;
}

bool tm_jv_any_mark(const tm_jval *str)
{
    const tm_jbuf *b = str->u.s;
    size_t i = mark_from(b, str->off);
    return i < b->mark_n && b->marks[i].begin < (size_t)str->off + str->len;
}

size_t tm_jv_chars(const tm_jval *str)
{
    const char *s = tm_jv_text(str);
    size_t n = 0;
    for (size_t i = 0; i < str->len; i++)
        n += ((unsigned char)s[i] & 0xC0) != 0x80;
    return n;
}

/* ---- lists and dictionaries ----------------------------------------------------------------------------- */

bool tm_jv_list(tm_jrun *r, tm_jtype type, size_t cap, tm_jval *out)
{
    tm_jlist *l = tm_jrun_alloc(r, sizeof(*l));
    if (!l)
        return false;
    if (cap > 0 && !(l->v = tm_jrun_alloc(r, cap * sizeof(*l->v))))
        return false;
    l->cap = cap;
    *out = (tm_jval){.type = (uint8_t)type, .u.l = l};
    return true;
}

bool tm_jlist_push(tm_jrun *r, tm_jlist *l, tm_jval v)
{
    if (l->n == l->cap) {
        size_t cap = l->cap ? l->cap * 2 : 8;
        tm_jval *a = tm_jrun_alloc(r, cap * sizeof(*a));
        if (!a)
            return false;
        if (l->n)
            memcpy(a, l->v, l->n * sizeof(*a));
        l->v = a;
        l->cap = cap;
    }
    l->v[l->n++] = v;
    return true;
}

bool tm_jv_dict(tm_jrun *r, tm_jtype type, tm_jval *out)
{
    tm_jdict *d = tm_jrun_alloc(r, sizeof(*d));
    if (!d)
        return false;
    *out = (tm_jval){.type = (uint8_t)type, .u.d = d};
    return true;
}

bool tm_jv_hashable(const tm_jval *v)
{
    if (v->type == TM_J_TUPLE) {
        for (size_t i = 0; i < v->u.l->n; i++)
            if (v->u.l->v[i].type == TM_J_TUPLE || !tm_jv_hashable(&v->u.l->v[i]))
                return false;
        return true;
    }
    return v->type != TM_J_LIST && v->type != TM_J_DICT && v->type != TM_J_VIEW;
}

/* Equal keys have equal hashes: numbers by value, so that 1, 1.0 and true are one key. */
static uint32_t hash_key(const tm_jval *k)
{
    uint64_t h = 0xCBF29CE484222325u;
    if (k->type == TM_J_STR) {
        const unsigned char *s = (const unsigned char *)tm_jv_text(k);
        for (uint32_t i = 0; i < k->len; i++)
            h = (h ^ s[i]) * 0x100000001B3u;
    } else if (tm_jv_is_number(k)) {
        double f = tm_jv_double(k) + 0.0;
        uint64_t bits;
        memcpy(&bits, &f, sizeof(bits));
        h = (h ^ bits) * 0x9E3779B97F4A7C15u;
    }
    return (uint32_t)(h ^ h >> 32);
}

static bool same_key(const tm_jval *a, const tm_jval *b)
{
    if (a->type == TM_J_STR && b->type == TM_J_STR)
        return a->len == b->len && memcmp(tm_jv_text(a), tm_jv_text(b), a->len) == 0;
    if (a->type == TM_J_TUPLE && b->type == TM_J_TUPLE) {
        /* Tuples as keys are flat (tm_jv_hashable), so this goes one level down. */
        if (a->u.l->n != b->u.l->n)
            return false;
        for (size_t i = 0; i < a->u.l->n; i++)
            if (!same_key(&a->u.l->v[i], &b->u.l->v[i]))
                return false;
        return true;
    }
    if (tm_jv_is_number(a) && tm_jv_is_number(b))
        return tm_jv_double(a) == tm_jv_double(b);
    return a->type == b->type && a->type == TM_J_NONE;
}

static void index_put(tm_jdict *d, size_t entry)
{
    size_t i = hash_key(&d->key[entry]) & d->mask;
    while (d->index[i])
        i = (i + 1) & d->mask;
    d->index[i] = (uint32_t)entry + 1;
}

tm_jval *tm_jdict_get(const tm_jdict *d, const tm_jval *key)
{
    if (d->index) {
        for (size_t i = hash_key(key) & d->mask; d->index[i]; i = (i + 1) & d->mask)
            if (same_key(&d->key[d->index[i] - 1], key))
                return &d->val[d->index[i] - 1];
        return NULL;
    }
    for (size_t i = 0; i < d->n; i++)
        if (same_key(&d->key[i], key))
            return &d->val[i];
    return NULL;
}

tm_jval *tm_jdict_gets(const tm_jdict *d, const char *key)
{
    tm_jbuf b = {.data = (char *)(uintptr_t)key, .used = strlen(key)};
    tm_jval k = tm_jbuf_value(&b);
    return tm_jdict_get(d, &k);
}

static bool dict_grow(tm_jrun *r, tm_jdict *d)
{
    size_t cap = d->cap ? d->cap * 2 : 4;
    tm_jval *key = tm_jrun_alloc(r, cap * sizeof(*key)),
            *val = tm_jrun_alloc(r, cap * sizeof(*val));
    if (!key || !val)
        return false;
    if (d->n) {
        memcpy(key, d->key, d->n * sizeof(*key));
        memcpy(val, d->val, d->n * sizeof(*val));
    }
    d->key = key;
    d->val = val;
    d->cap = cap;
    if (cap < INDEX_FROM)
        return true;
    d->index = tm_jrun_alloc(r, cap * 2 * sizeof(*d->index));
    if (!d->index)
        return false;
    d->mask = cap * 2 - 1;
    for (size_t i = 0; i < d->n; i++)
        index_put(d, i);
    return true;
}

bool tm_jdict_set(tm_jrun *r, tm_jdict *d, const tm_jval *key, tm_jval v)
{
    if (!tm_jv_hashable(key))
        return tm_jrun_fail(r, "unhashable type: '%s'", tm_jv_type_name(key));
    tm_jval *old = tm_jdict_get(d, key);
    if (old) {
        *old = v;
        return true;
    }
    if (d->n == d->cap && !dict_grow(r, d))
        return false;
    d->key[d->n] = *key;
    d->val[d->n] = v;
    if (d->index)
        index_put(d, d->n);
    d->n++;
    return true;
}

bool tm_jdict_sets(tm_jrun *r, tm_jdict *d, const char *key, tm_jval v)
{
    tm_jbuf *b = tm_jbuf_wrap(r, key, strlen(key), false);
    if (!b)
        return false;
    tm_jval k = tm_jbuf_value(b);
    return tm_jdict_set(r, d, &k, v);
}

/* ---- meaning -------------------------------------------------------------------------------------------- */

bool tm_jv_truth(const tm_jval *v)
{
    switch ((tm_jtype)v->type) {
    case TM_J_UNDEFINED:
    case TM_J_NONE:
    case TM_J_ABSENT:
        return false;
    case TM_J_BOOL:
        return v->u.b;
    case TM_J_INT:
        return v->u.i != 0;
    case TM_J_FLOAT:
        return v->u.f != 0;
    case TM_J_STR:
        return v->len > 0;
    case TM_J_LIST:
    case TM_J_TUPLE:
    case TM_J_VIEW:
    case TM_J_RANGE:
        return v->u.l->n > 0;
    case TM_J_DICT:
        return v->u.d->n > 0;
    case TM_J_BIGINT:
    case TM_J_NAMESPACE:
    case TM_J_ITER:
    case TM_J_CALL:
    case TM_J_LOOP:
        break;
    }
    return true;
}

bool tm_jv_is_number(const tm_jval *v)
{
    return v->type == TM_J_INT || v->type == TM_J_FLOAT || v->type == TM_J_BOOL ||
           v->type == TM_J_BIGINT;
}

double tm_jv_double(const tm_jval *v)
{
    switch (v->type) {
    case TM_J_INT:
        return (double)v->u.i;
    case TM_J_BOOL:
        return v->u.b;
    case TM_J_BIGINT:
        return tm_parse_double(tm_jv_text(v), v->len);
    default:
        return v->u.f;
    }
}

const char *tm_jv_type_name(const tm_jval *v)
{
    static const char *const names[] = {
        "Undefined",   "NoneType",  "bool",       "int",   "int",
        "float",       "str",       "list",       "tuple", "dict",
        "Namespace",   "generator", "dict_items", "range", "builtin_function_or_method",
        "LoopContext", "missing"};
    return names[v->type];
}

static bool equal_lists(tm_jrun *r, const tm_jlist *a, const tm_jlist *b)
{
    if (a->n != b->n)
        return false;
    for (size_t i = 0; i < a->n; i++)
        if (!tm_jv_equal(r, &a->v[i], &b->v[i]))
            return false;
    return true;
}

static bool equal_dicts(tm_jrun *r, const tm_jdict *a, const tm_jdict *b)
{
    if (a->n != b->n)
        return false;
    for (size_t i = 0; i < a->n; i++) {
        const tm_jval *o = tm_jdict_get(b, &a->key[i]);
        if (!o || !tm_jv_equal(r, &a->val[i], o))
            return false;
    }
    return true;
}

bool tm_jv_equal(tm_jrun *r, const tm_jval *a, const tm_jval *b)
{
    if (tm_jv_is_number(a) && tm_jv_is_number(b)) {
        if (a->type == TM_J_INT && b->type == TM_J_INT)
            return a->u.i == b->u.i;
        if (a->type == TM_J_BIGINT && b->type == TM_J_BIGINT)
            return a->len == b->len && memcmp(tm_jv_text(a), tm_jv_text(b), a->len) == 0;
        return tm_jv_double(a) == tm_jv_double(b);
    }
    if (a->type != b->type)
        return false;
    if (!tm_jrun_enter(r))
        return false;
    bool same = false;
    if (a->type == TM_J_STR)
        same = a->len == b->len && memcmp(tm_jv_text(a), tm_jv_text(b), a->len) == 0;
    else if (a->type == TM_J_LIST || a->type == TM_J_TUPLE || a->type == TM_J_RANGE)
        same = a->u.l == b->u.l || equal_lists(r, a->u.l, b->u.l);
    else if (a->type == TM_J_DICT)
        same = a->u.d == b->u.d || equal_dicts(r, a->u.d, b->u.d);
    else if (a->type == TM_J_NONE || a->type == TM_J_UNDEFINED)
        same = true;
    else
        same = a->u.l == b->u.l;
    tm_jrun_leave(r);
    return same;
}

static bool compare_lists(tm_jrun *r, const tm_jlist *a, const tm_jlist *b, int *order)
{
    for (size_t i = 0; i < a->n && i < b->n; i++)
        if (!tm_jv_equal(r, &a->v[i], &b->v[i]))
            return tm_jv_compare(r, &a->v[i], &b->v[i], order);
    *order = (a->n > b->n) - (a->n < b->n);
    return true;
}

bool tm_jv_compare(tm_jrun *r, const tm_jval *a, const tm_jval *b, int *order)
{
    if (!tm_jrun_enter(r))
        return false;
    bool ok = true;
    if (a->type == TM_J_INT && b->type == TM_J_INT) {
        *order = (a->u.i > b->u.i) - (a->u.i < b->u.i);
    } else if (tm_jv_is_number(a) && tm_jv_is_number(b)) {
        double x = tm_jv_double(a), y = tm_jv_double(b);
        *order = (x > y) - (x < y);
    } else if (a->type == TM_J_STR && b->type == TM_J_STR) {
        /* UTF-8 keeps the order of code points. */
        int c = memcmp(tm_jv_text(a), tm_jv_text(b), TM_MIN(a->len, b->len));
        *order = c ? c : (a->len > b->len) - (a->len < b->len);
    } else if (a->type == b->type && (a->type == TM_J_LIST || a->type == TM_J_TUPLE)) {
        ok = compare_lists(r, a->u.l, b->u.l, order);
    } else if (a->type == TM_J_UNDEFINED || b->type == TM_J_UNDEFINED) {
        ok = tm_jrun_undefined(r, a->type == TM_J_UNDEFINED ? a : b);
    } else {
        ok = tm_jrun_fail(r, "'<' not supported between instances of '%s' and '%s'",
                          tm_jv_type_name(a), tm_jv_type_name(b));
    }
    tm_jrun_leave(r);
    return ok;
}

static bool iterate_chars(tm_jrun *r, const tm_jval *v, tm_jval **items, size_t *n)
{
    size_t count = tm_jv_chars(v), k = 0;
    if (!tm_jrun_charge(r, v->len) || !(*items = tm_jrun_alloc(r, (count + 1) * sizeof(**items))))
        return false;
    for (size_t pos = 0; pos < v->len && k < count;) {
        size_t from = pos;
        tm_utf8_next(tm_jv_text(v), &pos);
        (*items)[k++] = tm_jv_slice(v, from, pos - from);
    }
    *n = k;
    return true;
}

bool tm_jv_iterate(tm_jrun *r, const tm_jval *v, tm_jval **items, size_t *n)
{
    *items = NULL;
    *n = 0;
    if (tm_jv_has_list(v)) {
        *items = v->u.l->v;
        *n = v->u.l->n;
        if (v->type == TM_J_ITER)
            *v->u.l = (tm_jlist){0};
        return true;
    }
    switch (v->type) {
    case TM_J_UNDEFINED:
        return true;
    case TM_J_STR:
        return iterate_chars(r, v, items, n);
    case TM_J_DICT:
        *items = v->u.d->key;
        *n = v->u.d->n;
        return true;
    default:
        return tm_jrun_fail(r, "'%s' object is not iterable", tm_jv_type_name(v));
    }
}
