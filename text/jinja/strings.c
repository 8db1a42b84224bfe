/* Python's string operations on marked UTF-8. */
#include "text/jinja/strings.h"

#include <utf8proc.h>

#include "common/check.h"
#include "text/tok/unicode.h"

bool tm_jarg_int(tm_jrun *r, const tm_jval *v, int64_t def, int64_t *out)
{
    *out = def;
    if (v->type == TM_J_ABSENT)
        return true;
    if (v->type == TM_J_UNDEFINED)
        return tm_jrun_undefined(r, v);
    if (v->type != TM_J_INT && v->type != TM_J_BOOL)
        return tm_jrun_fail(r, "'%s' object cannot be interpreted as an integer",
                            tm_jv_type_name(v));
    *out = v->type == TM_J_BOOL ? v->u.b : v->u.i;
    return true;
}

bool tm_jarg_str(tm_jrun *r, const tm_jval *v, const char *what)
{
    if (v->type == TM_J_STR)
        return true;
    if (v->type == TM_J_UNDEFINED)
        return tm_jrun_undefined(r, v);
    return tm_jrun_fail(r, "%s must be str, not %s", what, tm_jv_type_name(v));
}

bool tm_jis_space(uint32_t cp)
{
    return (tm_uc_class(cp) & TM_UC_SPACE) || (cp >= 0x1C && cp <= 0x1F);
}

static bool in_set(uint32_t cp, const tm_jval *chars)
{
    if (!chars || tm_jabsent(chars))
        return tm_jis_space(cp);
    for (size_t pos = 0; pos < chars->len;)
        if (tm_utf8_next(tm_jv_text(chars), &pos) == cp)
            return true;
    return false;
}

bool tm_jstr_strip(tm_jrun *r, const tm_jval *s, const tm_jval *chars, bool left, bool right,
                   tm_jval *out)
{
    size_t from = 0, to = s->len;
    if (chars && !tm_jabsent(chars) && !tm_jarg_str(r, chars, "strip arg"))
        return false;
    while (left && from < to) {
        size_t at = from;
        if (!in_set(tm_utf8_next(tm_jv_text(s), &at), chars))
            break;
        from = at;
    }
    while (right && to > from) {
        size_t at = to;
        if (!in_set(tm_utf8_prev(tm_jv_text(s), &at), chars))
            break;
        to = at;
    }
    *out = tm_jv_slice(s, from, to - from);
    return tm_jrun_charge(r, s->len - (to - from));
}

/* ---- case ----------------------------------------------------------------------------------------------- */

static size_t put_upper(uint32_t cp, char *out)
{
    if (cp == 0xDF) {
        memcpy(out, "SS", 2);
        return 2;
    }
    return tm_utf8_put((uint32_t)utf8proc_toupper((utf8proc_int32_t)cp), out);
}

static size_t put_lower(uint32_t cp, char *out)
{
    if (cp == 0x130) {
        memcpy(out, "i\xCC\x87", 3);
        return 3;
    }
    return tm_utf8_put((uint32_t)utf8proc_tolower((utf8proc_int32_t)cp), out);
}

bool tm_jstr_case(tm_jrun *r, const tm_jval *s, tm_jcase how, tm_jval *out)
{
    tm_jbuf *b = tm_jbuf_new(r, (size_t)s->len + 8);
    bool word = false; /* the character before is a letter */
    if (!b)
        return false;
    for (size_t pos = 0; pos < s->len;) {
        size_t from = pos;
        uint32_t cp = tm_utf8_next(tm_jv_text(s), &pos);
        bool letter = (tm_uc_class(cp) & TM_UC_LETTER) != 0;
        bool upper = how == TM_JC_UPPER || (how == TM_JC_CAPITALIZE && from == 0) ||
                     (how == TM_JC_TITLE && !word) ||
                     (how == TM_JC_SWAP && (uint32_t)utf8proc_tolower((utf8proc_int32_t)cp) != cp
                          ? false
                          : how == TM_JC_SWAP);
        char c[8];
        size_t n = upper ? put_upper(cp, c) : put_lower(cp, c);
        if (!tm_jbuf_append(r, b, c, n, tm_jv_marked(s, from)))
            return false;
        word = letter;
    }
    *out = tm_jbuf_value(b);
    out->flags = s->flags;
    return true;
}

/* ---- searching ------------------------------------------------------------------------------------------ */

int64_t tm_jstr_find(const tm_jval *s, const tm_jval *what, bool last)
{
    const char *t = tm_jv_text(s), *w = tm_jv_text(what);
    if (what->len > s->len)
        return -1;
    if (what->len == 0)
        return last ? s->len : 0;
    if (!last) {
        const char *hit = memmem(t, s->len, w, what->len);
        return hit ? hit - t : -1;
    }
    for (size_t i = s->len - what->len + 1; i-- > 0;)
        if (memcmp(t + i, w, what->len) == 0)
            return (int64_t)i;
    return -1;
}

/* An empty pattern matches before every character and at the end. */
static bool replace_empty(tm_jrun *r, const tm_jval *s, const tm_jval *to, int64_t count,
                          tm_jbuf *b)
{
    size_t pos = 0;
    for (;;) {
        if (count != 0 && (!tm_jbuf_append_str(r, b, to) || !tm_jrun_step(r)))
            return false;
        count -= count > 0;
        if (pos >= s->len)
            return true;
        size_t from = pos;
        tm_utf8_next(tm_jv_text(s), &pos);
        tm_jval c = tm_jv_slice(s, from, pos - from);
        if (!tm_jbuf_append_str(r, b, &c))
            return false;
    }
}

bool tm_jstr_replace(tm_jrun *r, const tm_jval *s, const tm_jval *from, const tm_jval *to,
                     int64_t count, tm_jval *out)
{
    tm_jbuf *b = tm_jbuf_new(r, s->len);
    tm_jval rest = *s;
    if (!b || !tm_jrun_charge(r, s->len))
        return false;
    if (from->len == 0) {
        if (!replace_empty(r, s, to, count, b))
            return false;
        *out = tm_jbuf_value(b);
        return true;
    }
    while (count != 0) {
        int64_t at = tm_jstr_find(&rest, from, false);
        if (at < 0)
            break;
        tm_jval before = tm_jv_slice(&rest, 0, (size_t)at);
        if (!tm_jrun_step(r) || !tm_jbuf_append_str(r, b, &before) || !tm_jbuf_append_str(r, b, to))
            return false;
        rest = tm_jv_slice(&rest, (size_t)at + from->len, rest.len - (size_t)at - from->len);
        count -= count > 0;
    }
    if (!tm_jbuf_append_str(r, b, &rest))
        return false;
    *out = tm_jbuf_value(b);
    out->flags = s->flags;
    return true;
}

/* ---- splitting ------------------------------------------------------------------------------------------ */

static bool split_spaces(tm_jrun *r, const tm_jval *s, int64_t max, tm_jlist *l)
{
    tm_jval rest = *s;
    for (;;) {
        if (!tm_jrun_step(r) || !tm_jstr_strip(r, &rest, NULL, true, false, &rest))
            return false;
        if (rest.len == 0)
            return true;
        if (max == 0) {
            tm_jval last;
            return tm_jstr_strip(r, &rest, NULL, false, true, &last) && tm_jlist_push(r, l, last);
        }
        max -= max > 0;
        size_t end = 0;
        for (size_t at = 0; end < rest.len; end = at)
            if (tm_jis_space(tm_utf8_next(tm_jv_text(&rest), &at)))
                break;
        if (!tm_jlist_push(r, l, tm_jv_slice(&rest, 0, end)))
            return false;
        rest = tm_jv_slice(&rest, end, rest.len - end);
    }
}

static void reverse_list(tm_jlist *l)
{
    for (size_t i = 0; i < l->n / 2; i++) {
        tm_jval t = l->v[i];
        l->v[i] = l->v[l->n - 1 - i];
        l->v[l->n - 1 - i] = t;
    }
}

static bool rsplit_spaces(tm_jrun *r, const tm_jval *s, int64_t max, tm_jlist *l)
{
    tm_jval rest = *s;
    for (;;) {
        if (!tm_jrun_step(r) || !tm_jstr_strip(r, &rest, NULL, max == 0, true, &rest))
            return false;
        if (rest.len == 0)
            break;
        size_t begin = rest.len;
        for (size_t at = begin; begin > 0 && max != 0; begin = at)
            if (tm_jis_space(tm_utf8_prev(tm_jv_text(&rest), &at)))
                break;
        if (max == 0)
            begin = 0;
        if (!tm_jlist_push(r, l, tm_jv_slice(&rest, begin, rest.len - begin)))
            return false;
        if (max == 0)
            break;
        max -= max > 0;
        rest = tm_jv_slice(&rest, 0, begin);
    }
    reverse_list(l);
    return true;
}

static bool split_text(tm_jrun *r, const tm_jval *s, const tm_jval *sep, int64_t max, bool last,
                       tm_jlist *l)
{
    tm_jval rest = *s;
    for (;;) {
        int64_t at = max == 0 ? -1 : tm_jstr_find(&rest, sep, last);
        if (at < 0)
            break;
        size_t behind = (size_t)at + sep->len;
        tm_jval head = tm_jv_slice(&rest, 0, (size_t)at),
                tail = tm_jv_slice(&rest, behind, rest.len - behind);
        if (!tm_jrun_step(r) || !tm_jlist_push(r, l, last ? tail : head))
            return false;
        rest = last ? head : tail;
        max -= max > 0;
    }
    if (!tm_jlist_push(r, l, rest))
        return false;
    if (last)
        reverse_list(l);
    return true;
}

bool tm_jstr_split(tm_jrun *r, const tm_jval *s, const tm_jval *sep, int64_t max, bool from_right,
                   tm_jval *out)
{
    tm_jval l;
    if (!tm_jv_list(r, TM_J_LIST, 0, &l) || !tm_jrun_charge(r, s->len))
        return false;
    bool ok;
    if (!sep || tm_jabsent(sep))
        ok = from_right ? rsplit_spaces(r, s, max, l.u.l) : split_spaces(r, s, max, l.u.l);
    else if (!tm_jarg_str(r, sep, "the separator"))
        return false;
    else if (sep->len == 0)
        return tm_jrun_fail(r, "empty separator");
    else
        ok = split_text(r, s, sep, max, from_right, l.u.l);
    *out = l;
    return ok;
}

/* Python's line ends: \n \r \r\n \v \f \x1c-\x1e U+0085 U+2028 U+2029. */
static bool is_line_end(uint32_t cp)
{
    return (cp >= 10 && cp <= 13) || (cp >= 0x1C && cp <= 0x1E) || cp == 0x85 || cp == 0x2028 ||
           cp == 0x2029;
}

bool tm_jstr_lines(tm_jrun *r, const tm_jval *s, bool keep_ends, tm_jval *out)
{
    tm_jval l;
    if (!tm_jv_list(r, TM_J_LIST, 0, &l) || !tm_jrun_charge(r, s->len))
        return false;
    const char *t = tm_jv_text(s);
    size_t begin = 0;
    for (size_t pos = 0; pos < s->len;) {
        size_t at = pos;
        uint32_t cp = tm_utf8_next(t, &pos);
        if (!is_line_end(cp))
            continue;
        if (cp == '\r' && pos < s->len && t[pos] == '\n')
            pos++;
        if (!tm_jlist_push(r, l.u.l, tm_jv_slice(s, begin, (keep_ends ? pos : at) - begin)))
            return false;
        begin = pos;
    }
    if (begin < s->len && !tm_jlist_push(r, l.u.l, tm_jv_slice(s, begin, s->len - begin)))
        return false;
    *out = l;
    return true;
}

bool tm_jstr_join(tm_jrun *r, const tm_jval *sep, const tm_jval *items, size_t n, bool strict,
                  tm_jval *out)
{
    tm_jbuf *b = tm_jbuf_new(r, 64);
    if (!b)
        return false;
    for (size_t i = 0; i < n; i++) {
        if (strict && items[i].type != TM_J_STR)
            return tm_jrun_fail(r, "sequence item %zu: expected str instance, %s found", i,
                                tm_jv_type_name(&items[i]));
        if (!tm_jrun_step(r) || (i > 0 && !tm_jbuf_append_str(r, b, sep)) ||
            !tm_jv_print(r, b, &items[i]))
            return false;
    }
    *out = tm_jbuf_value(b);
    return true;
}

/* where < 0: text to the left, 0: centred, > 0: text to the right. */
bool tm_jstr_pad(tm_jrun *r, const tm_jval *s, int64_t width, const char *fill, int where,
                 tm_jval *out)
{
    int64_t missing = width - (int64_t)tm_jv_chars(s);
    if (missing <= 0) {
        *out = *s;
        return true;
    }
    if (missing > (1 << 20))
        return tm_jrun_fail(r, "the width is too large");
    /* str.center puts the odd space to the left when the width is odd. */
    int64_t left = where < 0 ? 0 : where > 0 ? missing : missing / 2 + (missing & width & 1);
    tm_jbuf *b = tm_jbuf_new(r, s->len + (size_t)missing * strlen(fill));
    if (!b)
        return false;
    for (int64_t i = 0; i < left; i++)
        if (!tm_jbuf_puts(r, b, fill))
            return false;
    if (!tm_jbuf_append_str(r, b, s))
        return false;
    for (int64_t i = left; i < missing; i++)
        if (!tm_jbuf_puts(r, b, fill))
            return false;
    *out = tm_jbuf_value(b);
    return true;
}
