/* Filters over sequences and mappings. Those that are generators in Jinja give iterators here: true even when
 * empty, without a length, gone after one walk. */
#include <math.h>

#include "common/check.h"
#include "text/jinja/strings.h"
#include "text/tok/unicode.h"

#define FN(name)                                                                                   \
    static bool name(tm_jrun *r, const tm_jval *self, const tm_jval *arg, const tm_jargs *all,     \
                     tm_jval *out)

typedef struct walk {
    tm_jval *v;
    size_t n;
} walk;

static bool start(tm_jrun *r, const tm_jval *v, walk *w)
{
    return tm_jv_iterate(r, v, &w->v, &w->n);
}

/* map, select and their kin take anything that is false for an empty list. */
static bool start_lenient(tm_jrun *r, const tm_jval *v, walk *w)
{
    *w = (walk){0};
    return !tm_jv_truth(v) || start(r, v, w);
}

/* "a.b.0" as a path of attributes; integers are taken as they are. */
static bool get_path(tm_jrun *r, const tm_jval *item, const tm_jval *path, tm_jval *out)
{
    if (path->type != TM_J_STR)
        return tm_jitem(r, item, path, out);
    tm_jval cur = *item, key;
    for (size_t pos = 0; pos <= path->len;) {
        const char *t = tm_jv_text(path);
        const char *dot = memchr(t + pos, '.', path->len - pos);
        size_t end = dot ? (size_t)(dot - t) : path->len;
        bool number = end > pos && end - pos < 10;
        int64_t index = 0;
        for (size_t i = pos; i < end && number; i++) {
            number = t[i] >= '0' && t[i] <= '9';
            index = index * 10 + (t[i] - '0');
        }
        key = number ? tm_jv_int(index) : tm_jv_slice(path, pos, end - pos);
        if (!tm_jitem(r, &cur, &key, &cur))
            return false;
        pos = end + 1;
    }
    *out = cur;
    return true;
}

/* ---- length, ends, copies ------------------------------------------------------------------------------- */

FN(f_length)
{
    (void)arg, (void)all;
    switch (self->type) {
    case TM_J_UNDEFINED:
        *out = tm_jv_int(0);
        return true;
    case TM_J_STR:
        *out = tm_jv_int((int64_t)tm_jv_chars(self));
        return tm_jrun_charge(r, self->len);
    case TM_J_DICT:
        *out = tm_jv_int((int64_t)self->u.d->n);
        return true;
    case TM_J_LOOP:
        *out = tm_jv_int((int64_t)self->u.loop->n);
        return true;
    default:
        break;
    }
    if (!tm_jv_has_list(self) || self->type == TM_J_ITER)
        return tm_jrun_fail(r, "object of type '%s' has no len()", tm_jv_type_name(self));
    *out = tm_jv_int((int64_t)self->u.l->n);
    return true;
}

FN(f_first)
{
    walk w;
    (void)arg, (void)all;
    if (self->type == TM_J_ITER && self->u.l->n > 0) {
        *out = self->u.l->v[0]; /* only one item is taken */
        self->u.l->v++;
        self->u.l->n--;
        self->u.l->cap--;
        return true;
    }
    if (!start(r, self, &w))
        return false;
    *out = w.n ? w.v[0] : tm_jrun_missing(r, "No first item, sequence was empty.");
    return true;
}

FN(f_last)
{
    walk w;
    (void)arg, (void)all;
    if (self->type == TM_J_ITER)
        return tm_jrun_fail(r, "'generator' object is not reversible");
    if (!start(r, self, &w))
        return false;
    *out = w.n ? w.v[w.n - 1] : tm_jrun_missing(r, "No last item, sequence was empty.");
    return true;
}

static bool copy_list(tm_jrun *r, tm_jtype type, const walk *w, tm_jval *out)
{
    if (!tm_jv_list(r, type, w->n, out))
        return false;
    for (size_t i = 0; i < w->n; i++)
        if (!tm_jlist_push(r, out->u.l, w->v[i]))
            return false;
    return tm_jrun_charge(r, w->n * sizeof(tm_jval));
}

FN(f_list)
{
    walk w;
    (void)arg, (void)all;
    return start(r, self, &w) && copy_list(r, TM_J_LIST, &w, out);
}

FN(f_reverse)
{
    walk w;
    tm_jval l;
    (void)arg, (void)all;
    if (!start(r, self, &w) || !copy_list(r, TM_J_ITER, &w, &l))
        return false;
    for (size_t i = 0; i < l.u.l->n / 2; i++) {
        tm_jval t = l.u.l->v[i];
        l.u.l->v[i] = l.u.l->v[l.u.l->n - 1 - i];
        l.u.l->v[l.u.l->n - 1 - i] = t;
    }
    *out = l;
    tm_jval empty = tm_jv_slice(self, 0, 0);
    return self->type != TM_J_STR || tm_jstr_join(r, &empty, l.u.l->v, l.u.l->n, true, out);
}

FN(f_default)
{
    (void)all;
    bool use = self->type == TM_J_UNDEFINED || (tm_jv_truth(&arg[1]) && !tm_jv_truth(self));
    if (use && arg[0].type == TM_J_ABSENT)
        return tm_jv_str(r, "", 0, out);
    *out = use ? arg[0] : *self;
    return true;
}

FN(f_join)
{
    walk w;
    tm_jval sep;
    (void)all;
    if (arg[0].type == TM_J_ABSENT ? !tm_jv_str(r, "", 0, &sep) : !tm_jv_to_str(r, &arg[0], &sep))
        return false;
    if (!start(r, self, &w))
        return false;
    if (!tm_jabsent(&arg[1])) {
        tm_jval picked;
        if (!tm_jv_list(r, TM_J_LIST, w.n, &picked))
            return false;
        for (size_t i = 0; i < w.n; i++) {
            tm_jval v;
            if (!get_path(r, &w.v[i], &arg[1], &v) || !tm_jlist_push(r, picked.u.l, v))
                return false;
        }
        w.v = picked.u.l->v;
    }
    return tm_jstr_join(r, &sep, w.v, w.n, false, out);
}

FN(f_items)
{
    tm_jval l, pair;
    (void)arg, (void)all;
    if (self->type != TM_J_DICT && self->type != TM_J_UNDEFINED)
        return tm_jrun_fail(r, "Can only get item pairs from a mapping.");
    if (!tm_jv_list(r, TM_J_ITER, 0, &l))
        return false;
    for (size_t i = 0; self->type == TM_J_DICT && i < self->u.d->n; i++)
        if (!tm_jv_list(r, TM_J_TUPLE, 2, &pair) ||
            !tm_jlist_push(r, pair.u.l, self->u.d->key[i]) ||
            !tm_jlist_push(r, pair.u.l, self->u.d->val[i]) || !tm_jlist_push(r, l.u.l, pair))
            return false;
    *out = l;
    return true;
}

FN(f_attr)
{
    tm_jval name;
    (void)all;
    if (!tm_jv_to_str(r, &arg[0], &name))
        return false;
    /* attr looks at attributes only; without a method of that name the result is undefined. */
    bool unsafe;
    if (self->type != TM_J_NAMESPACE && self->type != TM_J_LOOP &&
        !tm_jmethod_find(self, tm_jv_text(&name), name.len, &unsafe)) {
        *out = tm_jrun_missing(r, "'%s object' has no attribute '%.*s'", tm_jv_type_name(self),
                               (int)TM_MIN(name.len, 80u), tm_jv_text(&name));
        return true;
    }
    return tm_jattr(r, self, tm_jv_text(&name), name.len, out);
}

/* ---- map, select, reject -------------------------------------------------------------------------------- */

static const tm_jval *find_kw(const tm_jargs *a, const char *name)
{
    for (int i = 0; i < a->kn; i++)
        if (strcmp(a->kw[i].name, name) == 0)
            return &a->kw[i].v;
    return NULL;
}

static const char *name_arg(tm_jrun *r, const tm_jval *v)
{
    const char *s = v->type == TM_J_STR ? tm_arena_strndup(r->arena, tm_jv_text(v), v->len) : NULL;
    if (!s)
        tm_jrun_fail(r, "expected the name of a filter or test");
    return s;
}

FN(f_map)
{
    walk w;
    tm_jval l, v;
    (void)arg;
    const tm_jval *path = find_kw(all, "attribute"), *def = find_kw(all, "default");
    const char *name = NULL;
    tm_jargs rest = {.v = all->n > 0 ? all->v + 1 : NULL,
                     .n = all->n > 0 ? all->n - 1 : 0,
                     .kw = all->kw,
                     .kn = all->kn};
    if (!path && all->n == 0)
        return tm_jrun_fail(r, "map requires a filter argument");
    if (!path && !(name = name_arg(r, &all->v[0])))
        return false;
    if (!start_lenient(r, self, &w) || !tm_jv_list(r, TM_J_ITER, w.n, &l))
        return false;
    for (size_t i = 0; i < w.n; i++) {
        if (!tm_jrun_step(r))
            return false;
        if (path ? !get_path(r, &w.v[i], path, &v) : !tm_jrun_filter(r, name, &w.v[i], &rest, &v))
            return false;
        if (path && def && v.type == TM_J_UNDEFINED)
            v = *def;
        if (!tm_jlist_push(r, l.u.l, v))
            return false;
    }
    *out = l;
    return true;
}

/* The four of them: attr = the first argument names an attribute to test; want = what is kept. */
static bool select_items(tm_jrun *r, const tm_jval *self, const tm_jargs *all, bool attr, bool want,
                         tm_jval *out)
{
    walk w;
    tm_jval l;
    int used = attr;
    const char *test = NULL;
    if (attr && all->n == 0)
        return tm_jrun_fail(r, "missing the attribute name");
    if (all->n > used && !(test = name_arg(r, &all->v[used])))
        return false;
    used += test != NULL;
    tm_jargs rest = {
        .v = all->v ? all->v + used : NULL, .n = all->n - used, .kw = all->kw, .kn = all->kn};
    if (!start_lenient(r, self, &w) || !tm_jv_list(r, TM_J_ITER, 0, &l))
        return false;
    for (size_t i = 0; i < w.n; i++) {
        tm_jval v = w.v[i];
        bool yes;
        if (!tm_jrun_step(r) || (attr && !get_path(r, &w.v[i], &all->v[0], &v)))
            return false;
        if (test && !tm_jrun_test(r, test, &v, &rest, &yes))
            return false;
        if (!test)
            yes = tm_jv_truth(&v);
        if (yes == want && !tm_jlist_push(r, l.u.l, w.v[i]))
            return false;
    }
    *out = l;
    return true;
}

FN(f_select)
{
    (void)arg;
    return select_items(r, self, all, false, true, out);
}

FN(f_reject)
{
    (void)arg;
    return select_items(r, self, all, false, false, out);
}

FN(f_selectattr)
{
    (void)arg;
    return select_items(r, self, all, true, true, out);
}

FN(f_rejectattr)
{
    (void)arg;
    return select_items(r, self, all, true, false, out);
}

/* ---- order ---------------------------------------------------------------------------------------------- */

/* What an item is ordered by: the attribute, strings in lower case unless case matters. */
static bool sort_key(tm_jrun *r, const tm_jval *item, const tm_jval *path, bool cased, tm_jval *key)
{
    *key = *item;
    if (path && !tm_jabsent(path) && !get_path(r, item, path, key))
        return false;
    return cased || key->type != TM_J_STR || tm_jstr_case(r, key, TM_JC_LOWER, key);
}

typedef struct keyed {
    tm_jval key, item;
} keyed;

/* Merge sort: stable, and it can stop with an error in the middle. */
static bool merge_sort(tm_jrun *r, keyed *v, keyed *tmp, size_t n, bool down)
{
    if (n < 2)
        return true;
    size_t mid = n / 2, a = 0, b = mid, k = 0;
    if (!merge_sort(r, v, tmp, mid, down) || !merge_sort(r, v + mid, tmp, n - mid, down))
        return false;
    while (a < mid || b < n) {
        int c = a == mid ? 1 : b == n ? -1 : 0;
        if (a < mid && b < n) {
            /* Equal values need no order: that of two undefined ones, or of two dictionaries. */
            if (!tm_jv_equal(r, &v[a].key, &v[b].key) &&
                !tm_jv_compare(r, &v[a].key, &v[b].key, &c))
                return false;
            c = down ? -c : c;
        }
        tmp[k++] = c <= 0 ? v[a++] : v[b++];
    }
    memcpy(v, tmp, n * sizeof(*v));
    return true;
}

static bool sorted(tm_jrun *r, const walk *w, const tm_jval *path, bool cased, bool down,
                   keyed **out)
{
    keyed *v = tm_jrun_alloc(r, (w->n + 1) * sizeof(*v)),
          *tmp = tm_jrun_alloc(r, (w->n + 1) * sizeof(*v));
    if (!v || !tmp)
        return false;
    for (size_t i = 0; i < w->n; i++) {
        v[i].item = w->v[i];
        if (!sort_key(r, &w->v[i], path, cased, &v[i].key))
            return false;
    }
    *out = v;
    return merge_sort(r, v, tmp, w->n, down);
}

FN(f_sort)
{
    walk w;
    keyed *v;
    (void)all;
    if (!start(r, self, &w) ||
        !sorted(r, &w, &arg[2], tm_jv_truth(&arg[1]), tm_jv_truth(&arg[0]), &v) ||
        !tm_jv_list(r, TM_J_LIST, w.n, out))
        return false;
    for (size_t i = 0; i < w.n; i++)
        if (!tm_jlist_push(r, out->u.l, v[i].item))
            return false;
    return true;
}

FN(f_dictsort)
{
    tm_jval pairs, path = tm_jv_int(tm_jv_is(&arg[1], "value"));
    keyed *v;
    (void)all;
    if (self->type != TM_J_DICT)
        return self->type == TM_J_UNDEFINED
                   ? tm_jrun_undefined(r, self)
                   : tm_jrun_fail(r, "'%s' object has no attribute 'items'", tm_jv_type_name(self));
    if (!f_items(r, self, arg, all, &pairs))
        return false;
    walk w = {pairs.u.l->v, pairs.u.l->n};
    if (!sorted(r, &w, &path, tm_jv_truth(&arg[0]), tm_jv_truth(&arg[2]), &v) ||
        !tm_jv_list(r, TM_J_LIST, w.n, out))
        return false;
    for (size_t i = 0; i < w.n; i++)
        if (!tm_jlist_push(r, out->u.l, v[i].item))
            return false;
    return true;
}

static bool extreme(tm_jrun *r, const tm_jval *self, const tm_jval *arg, int sign, tm_jval *out)
{
    walk w;
    tm_jval best, key;
    if (!start(r, self, &w))
        return false;
    if (w.n == 0) {
        *out = tm_jrun_missing(r, "No aggregated item, sequence was empty.");
        return true;
    }
    for (size_t i = 0; i < w.n; i++) {
        int c = 1;
        if (!sort_key(r, &w.v[i], &arg[1], tm_jv_truth(&arg[0]), &key))
            return false;
        if (i > 0 && !tm_jv_compare(r, &key, &best, &c))
            return false;
        if (i == 0 || c * sign > 0) {
            best = key;
            *out = w.v[i];
        }
    }
    return true;
}

FN(f_min)
{
    (void)all;
    return extreme(r, self, arg, -1, out);
}

FN(f_max)
{
    (void)all;
    return extreme(r, self, arg, 1, out);
}

FN(f_sum)
{
    walk w;
    tm_jval v, acc = arg[1].type == TM_J_ABSENT ? tm_jv_int(0) : arg[1];
    (void)all;
    if (!start(r, self, &w))
        return false;
    for (size_t i = 0; i < w.n; i++) {
        v = w.v[i];
        if (!tm_jabsent(&arg[0]) && !get_path(r, &w.v[i], &arg[0], &v))
            return false;
        if (!tm_jrun_step(r) || !tm_jbinary(r, TM_JOP_ADD, &acc, &v, &acc))
            return false;
    }
    *out = acc;
    return true;
}

FN(f_unique)
{
    walk w;
    tm_jval l, seen, key;
    (void)all;
    if (!start(r, self, &w) || !tm_jv_list(r, TM_J_ITER, 0, &l) || !tm_jv_dict(r, TM_J_DICT, &seen))
        return false;
    for (size_t i = 0; i < w.n; i++) {
        if (!tm_jrun_step(r) || !sort_key(r, &w.v[i], &arg[1], tm_jv_truth(&arg[0]), &key))
            return false;
        if (tm_jv_hashable(&key) && tm_jdict_get(seen.u.d, &key))
            continue;
        if (!tm_jdict_set(r, seen.u.d, &key, TM_JV_NONE) || !tm_jlist_push(r, l.u.l, w.v[i]))
            return false;
    }
    *out = l;
    return true;
}

/* [(key, [items]), ...] in the order of the keys. */
FN(f_groupby)
{
    walk w;
    keyed *v;
    tm_jval pair, group, key;
    (void)all;
    bool cased = tm_jv_truth(&arg[2]);
    if (!start(r, self, &w) || !sorted(r, &w, &arg[0], cased, false, &v) ||
        !tm_jv_list(r, TM_J_LIST, 0, out))
        return false;
    for (size_t i = 0; i < w.n;) {
        size_t first = i;
        if (!get_path(r, &v[i].item, &arg[0], &key) || !tm_jv_list(r, TM_J_LIST, 0, &group) ||
            !tm_jv_list(r, TM_J_TUPLE, 2, &pair))
            return false;
        if (key.type == TM_J_UNDEFINED && arg[1].type != TM_J_ABSENT)
            key = arg[1];
        for (; i < w.n && tm_jv_equal(r, &v[i].key, &v[first].key); i++)
            if (!tm_jlist_push(r, group.u.l, v[i].item))
                return false;
        if (i == first || !tm_jlist_push(r, pair.u.l, key) || !tm_jlist_push(r, pair.u.l, group) ||
            !tm_jlist_push(r, out->u.l, pair))
            return false;
    }
    return true;
}

FN(f_batch)
{
    walk w;
    tm_jval l, row;
    int64_t size;
    (void)all;
    if (!start(r, self, &w) || !tm_jarg_int(r, &arg[0], 0, &size) ||
        !tm_jv_list(r, TM_J_ITER, 0, &l))
        return false;
    if (size < 1 || size > TM_JRANGE_MAX)
        return tm_jrun_fail(r, "batch: the size is out of range");
    for (size_t i = 0; i < w.n; i += (size_t)size) {
        if (!tm_jv_list(r, TM_J_LIST, 0, &row))
            return false;
        for (size_t k = i; k < i + (size_t)size && (k < w.n || !tm_jabsent(&arg[1])); k++)
            if (!tm_jrun_step(r) || !tm_jlist_push(r, row.u.l, k < w.n ? w.v[k] : arg[1]))
                return false;
        if (!tm_jlist_push(r, l.u.l, row))
            return false;
    }
    *out = l;
    return true;
}

FN(f_slice)
{
    walk w;
    tm_jval l, row;
    int64_t count;
    (void)all;
    if (!start(r, self, &w) || !tm_jarg_int(r, &arg[0], 0, &count) ||
        !tm_jv_list(r, TM_J_ITER, 0, &l))
        return false;
    if (count < 1 || count > TM_JRANGE_MAX)
        return tm_jrun_fail(r, "slice: the number of slices is out of range");
    size_t per = w.n / (size_t)count, more = w.n % (size_t)count, at = 0;
    for (size_t i = 0; i < (size_t)count; i++) {
        size_t end = at + per + (i < more);
        if (!tm_jrun_step(r) || !tm_jv_list(r, TM_J_LIST, 0, &row))
            return false;
        for (; at < end; at++)
            if (!tm_jlist_push(r, row.u.l, w.v[at]))
                return false;
        if (!tm_jabsent(&arg[1]) && i >= more && more > 0 && !tm_jlist_push(r, row.u.l, arg[1]))
            return false;
        if (!tm_jlist_push(r, l.u.l, row))
            return false;
    }
    *out = l;
    return true;
}

const tm_jfn_row tm_jfilters_list[] = {
    {"length", "", 0, f_length},
    {"count", "", 0, f_length},
    {"first", "", 0, f_first},
    {"last", "", 0, f_last},
    {"list", "", 0, f_list},
    {"reverse", "", 0, f_reverse},
    {"default", "default_value,boolean", 0, f_default},
    {"d", "default_value,boolean", 0, f_default},
    {"join", "d,attribute", 0, f_join},
    {"items", "", 0, f_items},
    {"attr", "name", 1, f_attr},
    {"map", "*", 0, f_map},
    {"select", "*", 0, f_select},
    {"reject", "*", 0, f_reject},
    {"selectattr", "*", 0, f_selectattr},
    {"rejectattr", "*", 0, f_rejectattr},
    {"sort", "reverse,case_sensitive,attribute", 0, f_sort},
    {"dictsort", "case_sensitive,by,reverse", 0, f_dictsort},
    {"min", "case_sensitive,attribute", 0, f_min},
    {"max", "case_sensitive,attribute", 0, f_max},
    {"sum", "attribute,start", 0, f_sum},
    {"unique", "case_sensitive,attribute", 0, f_unique},
    {"groupby", "attribute,default,case_sensitive", 1, f_groupby},
    {"batch", "linecount,fill_with", 1, f_batch},
    {"slice", "slices,fill_with", 1, f_slice},
    {0},
};

const tm_jfn_row *tm_jfilter_find(const char *name)
{
    static const tm_jfn_row *const tables[] = {tm_jfilters_list, tm_jfilters_str};
    for (size_t t = 0; name && t < TM_ARRAY_LEN(tables); t++)
        for (const tm_jfn_row *row = tables[t]; row->name; row++)
            if (strcmp(row->name, name) == 0)
                return row;
    return NULL;
}
