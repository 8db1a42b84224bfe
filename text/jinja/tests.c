/* The tests behind "is". */
#include <math.h>

#include "common/check.h"
#include "text/jinja/strings.h"

#define FN(name)                                                                                   \
    static bool name(tm_jrun *r, const tm_jval *self, const tm_jval *arg, const tm_jargs *all,     \
                     tm_jval *out)
/* A test that looks at the value alone. */
#define PLAIN(name, expr)                                                                          \
    FN(name)                                                                                       \
    {                                                                                              \
        (void)r, (void)arg, (void)all;                                                             \
        *out = tm_jv_bool(expr);                                                                   \
        return true;                                                                               \
    }

PLAIN(is_defined, self->type != TM_J_UNDEFINED)
PLAIN(is_undefined, self->type == TM_J_UNDEFINED)
PLAIN(is_none, self->type == TM_J_NONE)
PLAIN(is_boolean, self->type == TM_J_BOOL)
PLAIN(is_true, self->type == TM_J_BOOL && self->u.b)
PLAIN(is_false, self->type == TM_J_BOOL && !self->u.b)
PLAIN(is_integer, self->type == TM_J_INT || self->type == TM_J_BIGINT)
PLAIN(is_float, self->type == TM_J_FLOAT)
PLAIN(is_number, tm_jv_is_number(self))
PLAIN(is_string, self->type == TM_J_STR)
PLAIN(is_mapping, self->type == TM_J_DICT)
PLAIN(is_callable, self->type == TM_J_CALL || self->type == TM_J_LOOP)
PLAIN(is_iterable, self->type == TM_J_STR || self->type == TM_J_DICT ||
                       self->type == TM_J_UNDEFINED || self->type == TM_J_LOOP ||
                       tm_jv_has_list(self))
/* Something with a length and items: Undefined has both, a generator none. */
PLAIN(is_sequence, self->type == TM_J_STR || self->type == TM_J_DICT || self->type == TM_J_LIST ||
                       self->type == TM_J_TUPLE || self->type == TM_J_RANGE ||
                       self->type == TM_J_UNDEFINED)
PLAIN(is_filter, self->type == TM_J_STR && self->len < 64 &&
                     tm_jfilter_find(tm_arena_strndup(r->arena, tm_jv_text(self), self->len)))
PLAIN(is_test, self->type == TM_J_STR && self->len < 64 &&
                   tm_jtest_find(tm_arena_strndup(r->arena, tm_jv_text(self), self->len)))
PLAIN(is_escaped, self->type == TM_J_STR && (self->flags & TM_JF_MARKUP))

static bool remainder_of(tm_jrun *r, const tm_jval *v, int64_t by, int64_t want, bool negate,
                         tm_jval *out)
{
    tm_jval n = tm_jv_int(by), rest;
    if (!tm_jbinary(r, TM_JOP_MOD, v, &n, &rest))
        return false;
    tm_jval wanted = tm_jv_int(want);
    *out = tm_jv_bool(tm_jv_equal(r, &rest, &wanted) != negate);
    return true;
}

FN(is_odd)
{
    (void)arg, (void)all;
    return remainder_of(r, self, 2, 1, false, out);
}

FN(is_even)
{
    (void)arg, (void)all;
    return remainder_of(r, self, 2, 0, false, out);
}

FN(is_divisibleby)
{
    int64_t by;
    (void)all;
    return tm_jarg_int(r, &arg[0], 0, &by) && remainder_of(r, self, by, 0, false, out);
}

FN(is_eq)
{
    (void)all;
    *out = tm_jv_bool(tm_jv_equal(r, self, &arg[0]));
    return r->status == TM_OK;
}

FN(is_ne)
{
    (void)all;
    *out = tm_jv_bool(!tm_jv_equal(r, self, &arg[0]));
    return r->status == TM_OK;
}

static bool ordered(tm_jrun *r, const tm_jval *a, const tm_jval *b, bool less, bool same,
                    tm_jval *out)
{
    int order;
    if (!tm_jv_compare(r, a, b, &order))
        return false;
    *out = tm_jv_bool(order == 0 ? same : (order < 0) == less);
    return true;
}

FN(is_lt)
{
    (void)all;
    return ordered(r, self, &arg[0], true, false, out);
}

FN(is_le)
{
    (void)all;
    return ordered(r, self, &arg[0], true, true, out);
}

FN(is_gt)
{
    (void)all;
    return ordered(r, self, &arg[0], false, false, out);
}

FN(is_ge)
{
    (void)all;
    return ordered(r, self, &arg[0], false, true, out);
}

FN(is_in)
{
    bool yes;
    (void)all;
    if (!tm_jcontains(r, self, &arg[0], &yes))
        return false;
    *out = tm_jv_bool(yes);
    return true;
}

/* "is": small values are the same object when they are equal. */
FN(is_sameas)
{
    (void)all;
    *out = tm_jv_bool(self->type == arg[0].type && tm_jv_equal(r, self, &arg[0]));
    return r->status == TM_OK;
}

static bool has_case(tm_jrun *r, const tm_jval *self, tm_jcase how, tm_jval *out)
{
    tm_jval s, same, other;
    if (!tm_jv_to_str(r, self, &s) || !tm_jstr_case(r, &s, how, &same) ||
        !tm_jstr_case(r, &s, how == TM_JC_UPPER ? TM_JC_LOWER : TM_JC_UPPER, &other))
        return false;
    *out = tm_jv_bool(tm_jv_equal(r, &s, &same) && !tm_jv_equal(r, &s, &other));
    return true;
}

FN(is_upper)
{
    (void)arg, (void)all;
    return has_case(r, self, TM_JC_UPPER, out);
}

FN(is_lower)
{
    (void)arg, (void)all;
    return has_case(r, self, TM_JC_LOWER, out);
}

static const tm_jfn_row rows[] = {
    {"defined", "", 0, is_defined},    {"undefined", "", 0, is_undefined},
    {"none", "", 0, is_none},          {"boolean", "", 0, is_boolean},
    {"true", "", 0, is_true},          {"false", "", 0, is_false},
    {"integer", "", 0, is_integer},    {"float", "", 0, is_float},
    {"number", "", 0, is_number},      {"string", "", 0, is_string},
    {"mapping", "", 0, is_mapping},    {"callable", "", 0, is_callable},
    {"iterable", "", 0, is_iterable},  {"sequence", "", 0, is_sequence},
    {"filter", "", 0, is_filter},      {"test", "", 0, is_test},
    {"escaped", "", 0, is_escaped},    {"odd", "", 0, is_odd},
    {"even", "", 0, is_even},          {"divisibleby", "num", 1, is_divisibleby},
    {"eq", "other", 1, is_eq},         {"equalto", "other", 1, is_eq},
    {"==", "other", 1, is_eq},         {"ne", "other", 1, is_ne},
    {"!=", "other", 1, is_ne},         {"lt", "other", 1, is_lt},
    {"lessthan", "other", 1, is_lt},   {"<", "other", 1, is_lt},
    {"le", "other", 1, is_le},         {"<=", "other", 1, is_le},
    {"gt", "other", 1, is_gt},         {"greaterthan", "other", 1, is_gt},
    {">", "other", 1, is_gt},          {"ge", "other", 1, is_ge},
    {">=", "other", 1, is_ge},         {"in", "seq", 1, is_in},
    {"sameas", "other", 1, is_sameas}, {"upper", "", 0, is_upper},
    {"lower", "", 0, is_lower},
};

const tm_jfn_row *tm_jtest_find(const char *name)
{
    for (size_t i = 0; name && i < TM_ARRAY_LEN(rows); i++)
        if (strcmp(rows[i].name, name) == 0)
            return &rows[i];
    return NULL;
}
