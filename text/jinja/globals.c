/* Functions that every template may call. Nothing here reaches outside of the render but the clock. */
#include <time.h>

#include "common/check.h"
#include "text/jinja/strings.h"

#define FN(name)                                                                                   \
    static bool name(tm_jrun *r, const tm_jval *self, const tm_jval *arg, const tm_jargs *all,     \
                     tm_jval *out)

FN(g_raise)
{
    tm_jval text;
    (void)self, (void)all, (void)out;
    return tm_jv_to_str(r, &arg[0], &text) && tm_jrun_raise(r, tm_jv_text(&text), text.len);
}

FN(g_strftime_now)
{
    char fmt[128], text[512];
    (void)self, (void)all;
    if (!tm_jarg_str(r, &arg[0], "the format"))
        return false;
    if (arg[0].len >= sizeof(fmt))
        return tm_jrun_fail(r, "strftime_now: the format is too long");
    memcpy(fmt, tm_jv_text(&arg[0]), arg[0].len);
    fmt[arg[0].len] = 0;
/* The format is the template's; unlike printf's it can read nothing but the given time. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    size_t n = fmt[0] ? strftime(text, sizeof(text), fmt, &r->now) : 0;
#pragma GCC diagnostic pop
    return tm_jv_str(r, text, n, out);
}

FN(g_range)
{
    int64_t start = 0, stop, step = 1;
    (void)self, (void)all;
    if (!tm_jarg_int(r, &arg[0], 0, &stop))
        return false;
    if (arg[1].type != TM_J_ABSENT) {
        start = stop;
        if (!tm_jarg_int(r, &arg[1], 0, &stop) || !tm_jarg_int(r, &arg[2], 1, &step))
            return false;
    }
    if (step == 0)
        return tm_jrun_fail(r, "range() arg 3 must not be zero");
    if (!tm_jv_list(r, TM_J_RANGE, 0, out))
        return false;
    for (int64_t i = start; step > 0 ? i < stop : i > stop;) {
        if (out->u.l->n == TM_JRANGE_MAX)
            return tm_jrun_bound(r, "a range has more than 100000 items");
        if (!tm_jlist_push(r, out->u.l, tm_jv_int(i)))
            return false;
        if (__builtin_add_overflow(i, step, &i))
            break;
    }
    return true;
}

/* dict(), namespace(): one optional mapping and keywords. */
static bool make_mapping(tm_jrun *r, tm_jtype type, const tm_jargs *all, tm_jval *out)
{
    if (all->n > 1)
        return tm_jrun_fail(r, "expected at most 1 argument, got %d", all->n);
    if (!tm_jv_dict(r, type, out))
        return false;
    if (all->n == 1) {
        tm_jval *items, *pair;
        size_t n, two;
        const tm_jval *from = &all->v[0];
        bool dict = from->type == TM_J_DICT;
        if (!tm_jv_iterate(r, from, &items, &n))
            return false;
        for (size_t i = 0; i < n; i++) {
            if (!dict && (!tm_jv_iterate(r, &items[i], &pair, &two) || two != 2))
                return tm_jrun_fail(r, "a dictionary needs pairs of key and value");
            if (!tm_jdict_set(r, out->u.d, dict ? &items[i] : &pair[0],
                              dict ? from->u.d->val[i] : pair[1]))
                return false;
        }
    }
    for (int i = 0; i < all->kn; i++)
        if (!tm_jdict_sets(r, out->u.d, all->kw[i].name, all->kw[i].v))
            return false;
    return true;
}

FN(g_dict)
{
    (void)self, (void)arg;
    return make_mapping(r, TM_J_DICT, all, out);
}

FN(g_namespace)
{
    (void)self, (void)arg;
    return make_mapping(r, TM_J_NAMESPACE, all, out);
}

static const tm_jfn_row rows[] = {
    {"raise_exception", "message", 1, g_raise}, {"strftime_now", "format", 1, g_strftime_now},
    {"range", "start,stop,step", 1, g_range},   {"dict", "*", 0, g_dict},
    {"namespace", "*", 0, g_namespace},
};

const tm_jfn_row *tm_jglobal_find(const char *name)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++)
        if (strcmp(rows[i].name, name) == 0)
            return &rows[i];
    return NULL;
}
