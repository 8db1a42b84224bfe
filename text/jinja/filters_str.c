/* Filters that give text or numbers. Values that are not strings are printed first (soft_str), as in Jinja. */
#include <math.h>
#include <stdio.h>

#include "common/check.h"
#include "text/jinja/json.h"
#include "text/jinja/strings.h"
#include "text/tok/unicode.h"

#define FN(name)                                                                                   \
    static bool name(tm_jrun *r, const tm_jval *self, const tm_jval *arg, const tm_jargs *all,     \
                     tm_jval *out)

static bool change_case(tm_jrun *r, const tm_jval *v, tm_jcase how, tm_jval *out)
{
    tm_jval s;
    return tm_jv_to_str(r, v, &s) && tm_jstr_case(r, &s, how, out);
}

FN(f_upper)
{
    (void)arg, (void)all;
    return change_case(r, self, TM_JC_UPPER, out);
}

FN(f_lower)
{
    (void)arg, (void)all;
    return change_case(r, self, TM_JC_LOWER, out);
}

FN(f_capitalize)
{
    (void)arg, (void)all;
    return change_case(r, self, TM_JC_CAPITALIZE, out);
}

/* Words end at white space, hyphens and opening brackets. */
FN(f_title)
{
    tm_jval s, part;
    (void)arg, (void)all;
    if (!tm_jv_to_str(r, self, &s))
        return false;
    tm_jbuf *b = tm_jbuf_new(r, s.len);
    if (!b)
        return false;
    for (size_t pos = 0; pos < s.len;) {
        size_t end = pos, at = pos;
        for (; end < s.len; end = at) {
            uint32_t cp = tm_utf8_next(tm_jv_text(&s), &at);
            if (tm_jis_space(cp) || cp == '-' || cp == '(' || cp == '{' || cp == '[' || cp == '<') {
                end = at;
                break;
            }
        }
        tm_jval word = tm_jv_slice(&s, pos, end - pos);
        if (!tm_jstr_case(r, &word, TM_JC_CAPITALIZE, &part) || !tm_jbuf_append_str(r, b, &part))
            return false;
        pos = end;
    }
    *out = tm_jbuf_value(b);
    return true;
}

FN(f_trim)
{
    tm_jval s;
    (void)all;
    return tm_jv_to_str(r, self, &s) && tm_jstr_strip(r, &s, &arg[0], true, true, out);
}

FN(f_string)
{
    (void)arg, (void)all;
    return tm_jv_to_str(r, self, out);
}

FN(f_safe)
{
    (void)arg, (void)all;
    if (!tm_jv_to_str(r, self, out))
        return false;
    out->flags |= TM_JF_MARKUP;
    return true;
}

static bool escape(tm_jrun *r, const tm_jval *s, tm_jval *out)
{
    static const struct {
        char c;
        const char *text;
    } rows[] = {{'&', "&amp;"}, {'<', "&lt;"}, {'>', "&gt;"}, {'"', "&#34;"}, {'\'', "&#39;"}};
    tm_jbuf *b = tm_jbuf_new(r, s->len);
    if (!b)
        return false;
    for (size_t pos = 0; pos < s->len; pos++) {
        const char *t = tm_jv_text(s) + pos;
        size_t n = 1;
        for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
            if (rows[i].c == *t) {
                t = rows[i].text;
                n = strlen(t);
                break;
            }
        }
        if (!tm_jbuf_append(r, b, t, n, tm_jv_marked(s, pos)))
            return false;
    }
    *out = tm_jbuf_value(b);
    out->flags = TM_JF_MARKUP;
    return true;
}

FN(f_escape)
{
    tm_jval s;
    (void)arg, (void)all;
    if (!tm_jv_to_str(r, self, &s))
        return false;
    if (s.flags & TM_JF_MARKUP) {
        *out = s;
        return true;
    }
    return escape(r, &s, out);
}

FN(f_forceescape)
{
    tm_jval s;
    (void)arg, (void)all;
    return tm_jv_to_str(r, self, &s) && escape(r, &s, out);
}

FN(f_replace)
{
    tm_jval s, from, to;
    int64_t count = -1;
    (void)all;
    if (!tm_jabsent(&arg[2]) && !tm_jarg_int(r, &arg[2], -1, &count))
        return false;
    return tm_jv_to_str(r, self, &s) && tm_jv_to_str(r, &arg[0], &from) &&
           tm_jv_to_str(r, &arg[1], &to) && tm_jstr_replace(r, &s, &from, &to, count, out);
}

FN(f_indent)
{
    tm_jval s, pad, lines;
    int64_t width = 4;
    (void)all;
    bool first = tm_jv_truth(&arg[1]), blank = tm_jv_truth(&arg[2]);
    if (self->type != TM_J_STR)
        return tm_jrun_fail(r, "indent takes a string, not '%s'", tm_jv_type_name(self));
    s = *self;
    if (arg[0].type != TM_J_STR && !tm_jarg_int(r, &arg[0], 4, &width))
        return false;
    if (width > 10000)
        return tm_jrun_fail(r, "the indentation is too wide");
    if (!tm_jv_str(r, "", 0, &pad))
        return false;
    if (arg[0].type == TM_J_STR)
        pad = arg[0];
    else if (!tm_jstr_pad(r, &pad, width, " ", -1, &pad))
        return false;
    tm_jbuf *b = tm_jbuf_new(r, (size_t)s.len * 2);
    if (!b || !tm_jstr_lines(r, &s, false, &lines))
        return false;
    /* Jinja adds a newline before it splits, so a text that ends with one has an empty line behind it. */
    bool extra = s.len == 0 || lines.u.l->n == 0 || tm_jv_text(&s)[s.len - 1] == '\n';
    size_t n = lines.u.l->n + extra;
    for (size_t i = 0; i < n; i++) {
        tm_jval line = i < lines.u.l->n ? lines.u.l->v[i] : tm_jv_slice(&s, s.len, 0);
        bool wide = i == 0 ? first : blank || line.len > 0;
        if ((i > 0 && !tm_jbuf_puts(r, b, "\n")) || (wide && !tm_jbuf_append_str(r, b, &pad)) ||
            !tm_jbuf_append_str(r, b, &line))
            return false;
    }
    *out = tm_jbuf_value(b);
    return true;
}

FN(f_center)
{
    tm_jval s;
    int64_t width;
    (void)all;
    return tm_jv_to_str(r, self, &s) && tm_jarg_int(r, &arg[0], 80, &width) &&
           tm_jstr_pad(r, &s, width, " ", 0, out);
}

FN(f_truncate)
{
    tm_jval s, tail;
    int64_t length, leeway;
    (void)all;
    if (!tm_jv_to_str(r, self, &s) || !tm_jarg_int(r, &arg[0], 255, &length) ||
        !tm_jarg_int(r, &arg[3], 5, &leeway))
        return false;
    if (arg[2].type == TM_J_ABSENT ? !tm_jv_str(r, "...", 3, &tail)
                                   : !tm_jv_to_str(r, &arg[2], &tail))
        return false;
    int64_t room = length - (int64_t)tm_jv_chars(&tail);
    if (room < 0 || leeway < 0)
        return tm_jrun_fail(r, "truncate: the length is shorter than the end");
    if ((int64_t)tm_jv_chars(&s) <= length + leeway) {
        *out = s;
        return true;
    }
    size_t cut = 0;
    for (int64_t i = 0; i < room; i++)
        tm_utf8_next(tm_jv_text(&s), &cut);
    tm_jval head = tm_jv_slice(&s, 0, cut), space = {0}, pieces;
    (void)space;
    if (!tm_jv_truth(&arg[1])) {
        tm_jval sep;
        if (!tm_jv_str(r, " ", 1, &sep) || !tm_jstr_split(r, &head, &sep, 1, true, &pieces))
            return false;
        head = pieces.u.l->v[0];
    }
    return tm_jv_concat(r, &head, &tail, out);
}

FN(f_wordcount)
{
    tm_jval s;
    int64_t n = 0;
    bool in = false;
    (void)arg, (void)all;
    if (!tm_jv_to_str(r, self, &s))
        return false;
    for (size_t pos = 0; pos < s.len;) {
        uint32_t cp = tm_utf8_next(tm_jv_text(&s), &pos);
        bool word = cp == '_' || (tm_uc_class(cp) & (TM_UC_LETTER | TM_UC_NUMBER));
        n += word && !in;
        in = word;
    }
    *out = tm_jv_int(n);
    return true;
}

FN(f_format)
{
    tm_jval s, map;
    (void)arg;
    if (all->n > 0 && all->kn > 0)
        return tm_jrun_fail(r, "can't handle positional and keyword arguments at the same time");
    if (!tm_jv_to_str(r, self, &s) || !tm_jv_dict(r, TM_J_DICT, &map))
        return false;
    for (int i = 0; i < all->kn; i++)
        if (!tm_jdict_sets(r, map.u.d, all->kw[i].name, all->kw[i].v))
            return false;
    return tm_jformat_percent(r, &s, all, all->kn > 0 ? &map : NULL, out);
}

FN(f_urlencode)
{
    static const char safe[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-~/";
    tm_jval s;
    (void)arg, (void)all;
    if (!tm_jv_to_str(r, self, &s))
        return false;
    tm_jbuf *b = tm_jbuf_new(r, s.len);
    if (!b)
        return false;
    for (size_t i = 0; i < s.len; i++) {
        char c = tm_jv_text(&s)[i], text[4] = {c};
        if (!c || !strchr(safe, c))
            snprintf(text, sizeof(text), "%%%02X", (unsigned char)c);
        if (!tm_jbuf_append(r, b, text, strlen(text), tm_jv_marked(&s, i)))
            return false;
    }
    *out = tm_jbuf_value(b);
    return true;
}

/* ---- JSON ----------------------------------------------------------------------------------------------- */

/* transformers' tojson: json.dumps with ensure_ascii off, and no escaping for HTML. */
FN(f_tojson)
{
    const char *item = NULL, *key = ": ";
    (void)all;
    tm_jjson_opts o = {.ensure_ascii = tm_jv_truth(&arg[0]),
                       .sort_keys = tm_jv_truth(&arg[3]),
                       .indent = tm_jabsent(&arg[1]) ? NULL : &arg[1]};
    item = o.indent ? "," : ", ";
    if (!tm_jabsent(&arg[2])) {
        const tm_jval *s = &arg[2];
        if (!tm_jv_has_list(s) || s->u.l->n != 2 || s->u.l->v[0].type != TM_J_STR ||
            s->u.l->v[1].type != TM_J_STR)
            return tm_jrun_fail(r, "separators: expected two strings");
        item = tm_arena_strndup(r->arena, tm_jv_text(&s->u.l->v[0]), s->u.l->v[0].len);
        key = tm_arena_strndup(r->arena, tm_jv_text(&s->u.l->v[1]), s->u.l->v[1].len);
        if (!item || !key)
            return tm_jrun_bound(r, "the template uses too much memory");
    }
    o.item_sep = item;
    o.key_sep = key;
    if (o.indent && o.indent->type != TM_J_INT && o.indent->type != TM_J_STR)
        return tm_jrun_fail(r, "indent: expected an integer or a string");
    tm_jbuf *b = tm_jbuf_new(r, 64);
    if (!b || !tm_jv_json(r, b, self, &o))
        return false;
    *out = tm_jbuf_value(b);
    return true;
}

/* Not in Jinja; some templates expect the server to bring it. */
FN(f_fromjson)
{
    bool valid;
    (void)arg, (void)all;
    if (self->type != TM_J_STR)
        return tm_jrun_fail(r, "the JSON object must be str, not %s", tm_jv_type_name(self));
    if (!tm_jv_parse_json(r, tm_jv_text(self), self->len, tm_jv_any_mark(self), out, &valid))
        return false;
    return valid || tm_jrun_fail(r, "the text is not valid JSON");
}

/* ---- numbers -------------------------------------------------------------------------------------------- */

/* A number in text as Python's int() or float() reads it: spaces around, underscores between digits. */
static bool read_number(const tm_jval *s, bool real, tm_jval *out)
{
    char text[400];
    size_t n = 0, from = 0, to = s->len;
    const char *t = tm_jv_text(s);
    while (from < to && tm_jis_space((unsigned char)t[from]) && (unsigned char)t[from] < 128)
        from++;
    while (to > from && (unsigned char)t[to - 1] < 128 && tm_jis_space((unsigned char)t[to - 1]))
        to--;
    if (from == to || to - from >= sizeof(text))
        return false;
    for (size_t i = from; i < to; i++) {
        bool inner = i > from && i + 1 < to && t[i - 1] >= '0' && t[i - 1] <= '9' &&
                     t[i + 1] >= '0' && t[i + 1] <= '9';
        if (t[i] == '_' && inner)
            continue;
        text[n++] = t[i];
    }
    text[n] = 0;
    const char *digits = text + (text[0] == '-' || text[0] == '+');
    char *end;
    if (!real) {
        if (strspn(digits, "0123456789") != strlen(digits) || !*digits || strlen(digits) > 18)
            return false;
        *out = tm_jv_int(strtoll(text, NULL, 10));
        return true;
    }
    if (strpbrk(digits, "xXpP()"))
        return false;
    *out = tm_jv_float(strtod(text, &end));
    return end != text && *end == 0;
}

static bool float_to_int(double f, tm_jval *out)
{
    if (!(f > -9.2e18 && f < 9.2e18))
        return false;
    *out = tm_jv_int((int64_t)f);
    return true;
}

FN(f_int)
{
    tm_jval v;
    (void)all;
    if (self->type == TM_J_UNDEFINED)
        return tm_jrun_undefined(r, self);
    if (self->type == TM_J_INT || self->type == TM_J_BIGINT) {
        *out = *self;
        return true;
    }
    if (self->type == TM_J_BOOL) {
        *out = tm_jv_int(self->u.b);
        return true;
    }
    int64_t base;
    if (!tm_jarg_int(r, &arg[1], 10, &base))
        return false;
    if (base != 10)
        return tm_jrun_fail(r, "int: only base 10 is supported");
    if (self->type == TM_J_FLOAT && float_to_int(self->u.f, out))
        return true;
    if (self->type == TM_J_STR && read_number(self, false, out))
        return true;
    if (self->type == TM_J_STR && read_number(self, true, &v) && float_to_int(v.u.f, out))
        return true;
    *out = arg[0].type == TM_J_ABSENT ? tm_jv_int(0) : arg[0];
    return true;
}

FN(f_float)
{
    (void)all;
    if (self->type == TM_J_UNDEFINED)
        return tm_jrun_undefined(r, self);
    if (tm_jv_is_number(self))
        *out = tm_jv_float(tm_jv_double(self));
    else if (self->type != TM_J_STR || !read_number(self, true, out))
        *out = arg[0].type == TM_J_ABSENT ? tm_jv_float(0) : arg[0];
    return true;
}

FN(f_abs)
{
    tm_jval zero = tm_jv_int(0);
    (void)arg, (void)all;
    if (self->type == TM_J_UNDEFINED)
        return tm_jrun_undefined(r, self);
    if (!tm_jv_is_number(self))
        return tm_jrun_fail(r, "bad operand type for abs(): '%s'", tm_jv_type_name(self));
    if (tm_jv_double(self) >= 0 && self->type != TM_J_BOOL) {
        *out = *self;
        return true;
    }
    return tm_jbinary(r, self->type == TM_J_BOOL ? TM_JOP_ADD : TM_JOP_SUB, &zero, self, out);
}

FN(f_round)
{
    int64_t places;
    (void)all;
    if (self->type == TM_J_UNDEFINED)
        return tm_jrun_undefined(r, self);
    if (!tm_jv_is_number(self) || !tm_jarg_int(r, &arg[0], 0, &places))
        return tm_jrun_fail(r, "round: expected a number");
    if (places < -15 || places > 15)
        return tm_jrun_fail(r, "round: precision is out of range");
    double v = tm_jv_double(self), scale = pow(10, (double)places);
    if (tm_jv_is(&arg[1], "ceil")) {
        v = ceil(v * scale) / scale;
    } else if (tm_jv_is(&arg[1], "floor")) {
        v = floor(v * scale) / scale;
    } else if (arg[1].type == TM_J_ABSENT || tm_jv_is(&arg[1], "common")) {
        char
            text[360]; /* printf rounds the exact value, halves to even: what Python's round does */
        snprintf(text, sizeof(text), "%.*f", places > 0 ? (int)places : 0,
                 places < 0 ? v * scale : v);
        v = tm_parse_double(text, strlen(text)) / (places < 0 ? scale : 1);
    } else {
        return tm_jrun_fail(r, "method must be common, ceil or floor");
    }
    *out = self->type == TM_J_FLOAT || places > 0 || arg[1].type != TM_J_ABSENT
               ? tm_jv_float(v)
               : tm_jv_int((int64_t)v);
    return true;
}

const tm_jfn_row tm_jfilters_str[] = {
    {"upper", "", 0, f_upper},
    {"lower", "", 0, f_lower},
    {"capitalize", "", 0, f_capitalize},
    {"title", "", 0, f_title},
    {"trim", "chars", 0, f_trim},
    {"string", "", 0, f_string},
    {"safe", "", 0, f_safe},
    {"escape", "", 0, f_escape},
    {"e", "", 0, f_escape},
    {"forceescape", "", 0, f_forceescape},
    {"replace", "old,new,count", 2, f_replace},
    {"indent", "width,first,blank", 0, f_indent},
    {"center", "width", 0, f_center},
    {"truncate", "length,killwords,end,leeway", 0, f_truncate},
    {"wordcount", "", 0, f_wordcount},
    {"format", "*", 0, f_format},
    {"urlencode", "", 0, f_urlencode},
    {"tojson", "ensure_ascii,indent,separators,sort_keys", 0, f_tojson},
    {"from_json", "", 0, f_fromjson},
    {"fromjson", "", 0, f_fromjson},
    {"int", "default,base", 0, f_int},
    {"float", "default", 0, f_float},
    {"abs", "", 0, f_abs},
    {"round", "precision,method", 0, f_round},
    {0},
};
