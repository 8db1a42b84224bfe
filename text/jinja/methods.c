/* Methods of strings, dictionaries, lists and loops. Those that would change a list or a dictionary exist only
 * to be refused, as in Jinja's immutable sandbox. */
#include "common/check.h"
#include "text/jinja/strings.h"
#include "text/tok/unicode.h"

#define FN(name)                                                                                   \
    static bool name(tm_jrun *r, const tm_jval *self, const tm_jval *arg, const tm_jargs *all,     \
                     tm_jval *out)
#define UNUSED_ALL (void)all
#define UNUSED_ARG (void)arg, (void)all

/* ---- strings -------------------------------------------------------------------------------------------- */

FN(str_strip)
{
    UNUSED_ALL;
    return tm_jstr_strip(r, self, &arg[0], true, true, out);
}

FN(str_lstrip)
{
    UNUSED_ALL;
    return tm_jstr_strip(r, self, &arg[0], true, false, out);
}

FN(str_rstrip)
{
    UNUSED_ALL;
    return tm_jstr_strip(r, self, &arg[0], false, true, out);
}

FN(str_split)
{
    int64_t max;
    UNUSED_ALL;
    return tm_jarg_int(r, &arg[1], -1, &max) && tm_jstr_split(r, self, &arg[0], max, false, out);
}

FN(str_rsplit)
{
    int64_t max;
    UNUSED_ALL;
    return tm_jarg_int(r, &arg[1], -1, &max) && tm_jstr_split(r, self, &arg[0], max, true, out);
}

FN(str_splitlines)
{
    UNUSED_ALL;
    return tm_jstr_lines(r, self, tm_jv_truth(&arg[0]), out);
}

static bool has_affix(const tm_jval *s, const tm_jval *what, bool end)
{
    return what->len <= s->len &&
           memcmp(tm_jv_text(s) + (end ? s->len - what->len : 0), tm_jv_text(what), what->len) == 0;
}

static bool test_affix(tm_jrun *r, const tm_jval *s, const tm_jval *what, bool end, tm_jval *out)
{
    bool yes = false;
    if (what->type == TM_J_TUPLE) {
        for (size_t i = 0; i < what->u.l->n; i++) {
            if (!tm_jarg_str(r, &what->u.l->v[i], "the affix"))
                return false;
            yes |= has_affix(s, &what->u.l->v[i], end);
        }
    } else {
        if (!tm_jarg_str(r, what, end ? "endswith first arg" : "startswith first arg"))
            return false;
        yes = has_affix(s, what, end);
    }
    *out = tm_jv_bool(yes);
    return true;
}

FN(str_startswith)
{
    UNUSED_ALL;
    return test_affix(r, self, &arg[0], false, out);
}

FN(str_endswith)
{
    UNUSED_ALL;
    return test_affix(r, self, &arg[0], true, out);
}

FN(str_removeprefix)
{
    UNUSED_ALL;
    if (!tm_jarg_str(r, &arg[0], "the prefix"))
        return false;
    size_t cut = has_affix(self, &arg[0], false) ? arg[0].len : 0;
    *out = tm_jv_slice(self, cut, self->len - cut);
    return true;
}

FN(str_removesuffix)
{
    UNUSED_ALL;
    if (!tm_jarg_str(r, &arg[0], "the suffix"))
        return false;
    *out = tm_jv_slice(self, 0, self->len - (has_affix(self, &arg[0], true) ? arg[0].len : 0));
    return true;
}

FN(str_replace)
{
    int64_t count;
    UNUSED_ALL;
    return tm_jarg_str(r, &arg[0], "replace() argument 1") &&
           tm_jarg_str(r, &arg[1], "replace() argument 2") && tm_jarg_int(r, &arg[2], -1, &count) &&
           tm_jstr_replace(r, self, &arg[0], &arg[1], count, out);
}

FN(str_upper)
{
    UNUSED_ARG;
    return tm_jstr_case(r, self, TM_JC_UPPER, out);
}

FN(str_lower)
{
    UNUSED_ARG;
    return tm_jstr_case(r, self, TM_JC_LOWER, out);
}

FN(str_capitalize)
{
    UNUSED_ARG;
    return tm_jstr_case(r, self, TM_JC_CAPITALIZE, out);
}

FN(str_title)
{
    UNUSED_ARG;
    return tm_jstr_case(r, self, TM_JC_TITLE, out);
}

FN(str_swapcase)
{
    UNUSED_ARG;
    return tm_jstr_case(r, self, TM_JC_SWAP, out);
}

static bool find_chars(tm_jrun *r, const tm_jval *s, const tm_jval *what, bool last, bool must,
                       tm_jval *out)
{
    if (!tm_jarg_str(r, what, "the argument") || !tm_jrun_charge(r, s->len))
        return false;
    int64_t at = tm_jstr_find(s, what, last);
    if (at < 0 && must)
        return tm_jrun_fail(r, "substring not found");
    tm_jval before = tm_jv_slice(s, 0, at < 0 ? 0 : (size_t)at);
    *out = tm_jv_int(at < 0 ? -1 : (int64_t)tm_jv_chars(&before));
    return true;
}

FN(str_find)
{
    UNUSED_ALL;
    return find_chars(r, self, &arg[0], false, false, out);
}

FN(str_rfind)
{
    UNUSED_ALL;
    return find_chars(r, self, &arg[0], true, false, out);
}

FN(str_index)
{
    UNUSED_ALL;
    return find_chars(r, self, &arg[0], false, true, out);
}

FN(str_rindex)
{
    UNUSED_ALL;
    return find_chars(r, self, &arg[0], true, true, out);
}

FN(str_count)
{
    int64_t n = 0, at;
    UNUSED_ALL;
    if (!tm_jarg_str(r, &arg[0], "the argument") || !tm_jrun_charge(r, self->len))
        return false;
    tm_jval rest = *self;
    if (arg[0].len == 0)
        n = (int64_t)tm_jv_chars(self) + 1;
    else
        for (; (at = tm_jstr_find(&rest, &arg[0], false)) >= 0; n++)
            rest = tm_jv_slice(&rest, (size_t)at + arg[0].len, rest.len - (size_t)at - arg[0].len);
    *out = tm_jv_int(n);
    return true;
}

FN(str_join)
{
    tm_jval *items;
    size_t n;
    UNUSED_ALL;
    if (arg[0].type == TM_J_UNDEFINED)
        return tm_jv_str(r, "", 0, out);
    return tm_jv_iterate(r, &arg[0], &items, &n) && tm_jstr_join(r, self, items, n, true, out);
}

FN(str_format)
{
    (void)arg;
    return tm_jformat_braces(r, self, all, out);
}

static bool partition(tm_jrun *r, const tm_jval *s, const tm_jval *sep, bool last, tm_jval *out)
{
    if (!tm_jarg_str(r, sep, "the separator"))
        return false;
    if (sep->len == 0)
        return tm_jrun_fail(r, "empty separator");
    int64_t at = tm_jstr_find(s, sep, last);
    size_t a = at < 0 ? (last ? 0 : s->len) : (size_t)at, b = at < 0 ? a : a + sep->len;
    if (!tm_jrun_charge(r, s->len) || !tm_jv_list(r, TM_J_TUPLE, 3, out))
        return false;
    return tm_jlist_push(r, out->u.l, tm_jv_slice(s, 0, a)) &&
           tm_jlist_push(r, out->u.l, tm_jv_slice(s, a, b - a)) &&
           tm_jlist_push(r, out->u.l, tm_jv_slice(s, b, s->len - b));
}

FN(str_partition)
{
    UNUSED_ALL;
    return partition(r, self, &arg[0], false, out);
}

FN(str_rpartition)
{
    UNUSED_ALL;
    return partition(r, self, &arg[0], true, out);
}

static bool pad(tm_jrun *r, const tm_jval *self, const tm_jval *arg, int where, tm_jval *out)
{
    int64_t width;
    char fill[8] = " ";
    if (!tm_jarg_int(r, &arg[0], 0, &width))
        return false;
    if (arg[1].type != TM_J_ABSENT) {
        if (!tm_jarg_str(r, &arg[1], "the fill character"))
            return false;
        if (tm_jv_chars(&arg[1]) != 1)
            return tm_jrun_fail(r, "The fill character must be exactly one character long");
        memcpy(fill, tm_jv_text(&arg[1]), arg[1].len);
        fill[arg[1].len] = 0;
    }
    return tm_jstr_pad(r, self, width, fill, where, out);
}

FN(str_ljust)
{
    UNUSED_ALL;
    return pad(r, self, arg, -1, out);
}

FN(str_rjust)
{
    UNUSED_ALL;
    return pad(r, self, arg, 1, out);
}

FN(str_center)
{
    UNUSED_ALL;
    return pad(r, self, arg, 0, out);
}

FN(str_zfill)
{
    int64_t width;
    UNUSED_ALL;
    if (!tm_jarg_int(r, &arg[0], 0, &width))
        return false;
    bool sign = self->len > 0 && (tm_jv_text(self)[0] == '-' || tm_jv_text(self)[0] == '+');
    tm_jval digits = tm_jv_slice(self, sign, self->len - sign), head = tm_jv_slice(self, 0, sign),
            padded;
    return tm_jstr_pad(r, &digits, width - sign, "0", 1, &padded) &&
           tm_jv_concat(r, &head, &padded, out);
}

/* All characters are of a kind, and there is one. */
static bool all_chars(tm_jrun *r, const tm_jval *s, bool (*is)(uint32_t cp), tm_jval *out)
{
    bool yes = s->len > 0;
    for (size_t pos = 0; pos < s->len && yes;)
        yes = is(tm_utf8_next(tm_jv_text(s), &pos));
    *out = tm_jv_bool(yes);
    return tm_jrun_charge(r, s->len);
}

static bool is_number(uint32_t cp)
{
    return tm_uc_class(cp) & TM_UC_NUMBER;
}

static bool is_digit(uint32_t cp)
{
    return cp < 128 ? cp >= '0' && cp <= '9' : is_number(cp);
}

static bool is_letter(uint32_t cp)
{
    return tm_uc_class(cp) & TM_UC_LETTER;
}

static bool is_alnum(uint32_t cp)
{
    return tm_uc_class(cp) & (TM_UC_LETTER | TM_UC_NUMBER);
}

FN(str_isdigit)
{
    UNUSED_ARG;
    return all_chars(r, self, is_digit, out);
}

FN(str_isalpha)
{
    UNUSED_ARG;
    return all_chars(r, self, is_letter, out);
}

FN(str_isalnum)
{
    UNUSED_ARG;
    return all_chars(r, self, is_alnum, out);
}

FN(str_isspace)
{
    UNUSED_ARG;
    return all_chars(r, self, tm_jis_space, out);
}

/* There is a cased character and none of the other case. */
static bool one_case(tm_jrun *r, const tm_jval *s, tm_jcase how, tm_jval *out)
{
    tm_jval same, other;
    if (!tm_jstr_case(r, s, how, &same) ||
        !tm_jstr_case(r, s, how == TM_JC_UPPER ? TM_JC_LOWER : TM_JC_UPPER, &other))
        return false;
    *out = tm_jv_bool(tm_jv_equal(r, s, &same) && !tm_jv_equal(r, s, &other));
    return true;
}

FN(str_isupper)
{
    UNUSED_ARG;
    return one_case(r, self, TM_JC_UPPER, out);
}

FN(str_islower)
{
    UNUSED_ARG;
    return one_case(r, self, TM_JC_LOWER, out);
}

static const tm_jfn_row str_methods[] = {
    {"strip", "chars", 0, str_strip},
    {"lstrip", "chars", 0, str_lstrip},
    {"rstrip", "chars", 0, str_rstrip},
    {"split", "sep,maxsplit", 0, str_split},
    {"rsplit", "sep,maxsplit", 0, str_rsplit},
    {"splitlines", "keepends", 0, str_splitlines},
    {"startswith", "prefix", 1, str_startswith},
    {"endswith", "suffix", 1, str_endswith},
    {"removeprefix", "prefix", 1, str_removeprefix},
    {"removesuffix", "suffix", 1, str_removesuffix},
    {"replace", "old,new,count", 2, str_replace},
    {"upper", "", 0, str_upper},
    {"lower", "", 0, str_lower},
    {"casefold", "", 0, str_lower},
    {"capitalize", "", 0, str_capitalize},
    {"title", "", 0, str_title},
    {"swapcase", "", 0, str_swapcase},
    {"find", "sub", 1, str_find},
    {"rfind", "sub", 1, str_rfind},
    {"index", "sub", 1, str_index},
    {"rindex", "sub", 1, str_rindex},
    {"count", "sub", 1, str_count},
    {"join", "iterable", 1, str_join},
    {"format", "*", 0, str_format},
    {"partition", "sep", 1, str_partition},
    {"rpartition", "sep", 1, str_rpartition},
    {"ljust", "width,fillchar", 1, str_ljust},
    {"rjust", "width,fillchar", 1, str_rjust},
    {"center", "width,fillchar", 1, str_center},
    {"zfill", "width", 1, str_zfill},
    {"isdigit", "", 0, str_isdigit},
    {"isdecimal", "", 0, str_isdigit},
    {"isnumeric", "", 0, str_isdigit},
    {"isalpha", "", 0, str_isalpha},
    {"isalnum", "", 0, str_isalnum},
    {"isspace", "", 0, str_isspace},
    {"isupper", "", 0, str_isupper},
    {"islower", "", 0, str_islower},
    {0},
};

/* ---- dictionaries and lists ----------------------------------------------------------------------------- */

FN(dict_get)
{
    (void)all;
    if (!tm_jv_hashable(&arg[0]))
        return tm_jrun_fail(r, "unhashable type: '%s'", tm_jv_type_name(&arg[0]));
    const tm_jval *v = tm_jdict_get(self->u.d, &arg[0]);
    *out = v ? *v : arg[1].type == TM_J_ABSENT ? TM_JV_NONE : arg[1];
    return true;
}

static bool dict_view(tm_jrun *r, const tm_jdict *d, bool keys, bool values, tm_jval *out)
{
    tm_jval view, pair;
    if (!tm_jv_list(r, TM_J_VIEW, d->n, &view))
        return false;
    for (size_t i = 0; i < d->n; i++) {
        pair = keys ? d->key[i] : d->val[i];
        if (keys && values &&
            (!tm_jv_list(r, TM_J_TUPLE, 2, &pair) || !tm_jlist_push(r, pair.u.l, d->key[i]) ||
             !tm_jlist_push(r, pair.u.l, d->val[i])))
            return false;
        if (!tm_jlist_push(r, view.u.l, pair))
            return false;
    }
    *out = view;
    return true;
}

FN(dict_items)
{
    UNUSED_ARG;
    return dict_view(r, self->u.d, true, true, out);
}

FN(dict_keys)
{
    UNUSED_ARG;
    return dict_view(r, self->u.d, true, false, out);
}

FN(dict_values)
{
    UNUSED_ARG;
    return dict_view(r, self->u.d, false, true, out);
}

FN(dict_copy)
{
    UNUSED_ARG;
    if (!tm_jv_dict(r, TM_J_DICT, out))
        return false;
    for (size_t i = 0; i < self->u.d->n; i++)
        if (!tm_jdict_set(r, out->u.d, &self->u.d->key[i], self->u.d->val[i]))
            return false;
    return true;
}

FN(list_index)
{
    UNUSED_ALL;
    for (size_t i = 0; i < self->u.l->n; i++) {
        if (!tm_jrun_step(r))
            return false;
        if (tm_jv_equal(r, &self->u.l->v[i], &arg[0])) {
            *out = tm_jv_int((int64_t)i);
            return true;
        }
    }
    return tm_jrun_fail(r, "the value is not in the list");
}

FN(list_count)
{
    int64_t n = 0;
    UNUSED_ALL;
    for (size_t i = 0; i < self->u.l->n; i++) {
        if (!tm_jrun_step(r))
            return false;
        n += tm_jv_equal(r, &self->u.l->v[i], &arg[0]);
    }
    *out = tm_jv_int(n);
    return true;
}

FN(list_copy)
{
    UNUSED_ARG;
    if (!tm_jv_list(r, TM_J_LIST, self->u.l->n, out))
        return false;
    for (size_t i = 0; i < self->u.l->n; i++)
        if (!tm_jlist_push(r, out->u.l, self->u.l->v[i]))
            return false;
    return true;
}

static const tm_jfn_row dict_methods[] = {
    {"get", "key,default", 1, dict_get}, {"items", "", 0, dict_items}, {"keys", "", 0, dict_keys},
    {"values", "", 0, dict_values},      {"copy", "", 0, dict_copy},   {0},
};

static const tm_jfn_row list_methods[] = {
    {"index", "value", 1, list_index},
    {"count", "value", 1, list_count},
    {"copy", "", 0, list_copy},
    {0},
};

static const tm_jfn_row tuple_methods[] = {
    {"index", "value", 1, list_index},
    {"count", "value", 1, list_count},
    {0},
};

static const char *const dict_forbidden[] = {"clear",      "pop",    "popitem",
                                             "setdefault", "update", NULL};
static const char *const list_forbidden[] = {"append", "clear",   "extend", "insert", "pop",
                                             "remove", "reverse", "sort",   NULL};

/* ---- loops ---------------------------------------------------------------------------------------------- */

FN(loop_cycle)
{
    (void)arg;
    if (all->n == 0)
        return tm_jrun_fail(r, "no items for cycling given");
    *out = all->v[self->u.loop->at % (size_t)all->n];
    return true;
}

FN(loop_changed)
{
    tm_jval now;
    (void)arg;
    if (!tm_jv_list(r, TM_J_TUPLE, 0, &now))
        return false;
    for (int i = 0; i < all->n; i++)
        if (!tm_jlist_push(r, now.u.l, all->v[i]))
            return false;
    tm_jval *last = &self->u.loop->last_changed;
    *out = tm_jv_bool(last->type == TM_J_ABSENT || !tm_jv_equal(r, last, &now));
    *last = now;
    return true;
}

static const tm_jfn_row loop_methods[] = {
    {"cycle", "*", 0, loop_cycle},
    {"changed", "*", 0, loop_changed},
    {0},
};

const tm_jfn_row *tm_jmethod_find(const tm_jval *v, const char *name, size_t len, bool *unsafe)
{
    const tm_jfn_row *rows = v->type == TM_J_STR     ? str_methods
                             : v->type == TM_J_DICT  ? dict_methods
                             : v->type == TM_J_LIST  ? list_methods
                             : v->type == TM_J_TUPLE ? tuple_methods
                             : v->type == TM_J_LOOP  ? loop_methods
                                                     : NULL;
    const char *const *no = v->type == TM_J_DICT   ? dict_forbidden
                            : v->type == TM_J_LIST ? list_forbidden
                                                   : NULL;
    *unsafe = false;
    for (; rows && rows->name; rows++)
        if (strlen(rows->name) == len && memcmp(rows->name, name, len) == 0)
            return rows;
    for (; no && *no; no++)
        *unsafe |= strlen(*no) == len && memcmp(*no, name, len) == 0;
    return NULL;
}
