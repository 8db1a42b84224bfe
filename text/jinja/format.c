/* "..." % args and "...".format(args): the common part of both. Anything else (format of attributes, nested
 * fields) is refused by name. */
#include <math.h>
#include <stdio.h>

#include "common/check.h"
#include "text/jinja/strings.h"
#include "text/tok/unicode.h"

#define WIDTH_MAX 1000

typedef struct spec {
    char fill[8];
    char align; /* < > ^ = or 0 */
    char sign;  /* + space or 0 */
    bool alt, zero, comma;
    int width, precision; /* -1 = none */
    char type;            /* 0 = by value */
} spec;

static bool put_padded(tm_jrun *r, tm_jbuf *out, const tm_jval *text, const spec *s, char natural)
{
    char align = s->align ? s->align : natural;
    tm_jval v;
    int where = align == '<' ? -1 : align == '^' ? 0 : 1;
    if (where != 0)
        return tm_jstr_pad(r, text, s->width, s->fill, where, &v) && tm_jbuf_append_str(r, out, &v);
    int64_t missing = s->width - (int64_t)tm_jv_chars(text);
    for (int64_t i = 0; i < missing / 2; i++)
        if (!tm_jbuf_puts(r, out, s->fill))
            return false;
    if (!tm_jbuf_append_str(r, out, text))
        return false;
    for (int64_t i = missing / 2; i < missing; i++)
        if (!tm_jbuf_puts(r, out, s->fill))
            return false;
    return true;
}

/* Digits with separators and sign, zero-padded where asked: behind the sign and a base's prefix. */
static bool put_digits(tm_jrun *r, tm_jbuf *out, const char *digits, bool negative, const spec *s)
{
    char text[WIDTH_MAX + 512];
    size_t n = 0, whole = strcspn(digits, ".e");
    if (negative || s->sign)
        text[n++] = negative ? '-' : s->sign;
    size_t zeros =
        s->zero && s->width > (int)(n + strlen(digits)) ? (size_t)s->width - n - strlen(digits) : 0;
    if (s->alt && memchr("xXo", s->type, 3)) {
        memcpy(text + n, digits, 2);
        n += 2;
        digits += 2;
    }
    memset(text + n, '0', zeros);
    n += zeros;
    for (const char *d = digits; *d; d++) {
        size_t at = (size_t)(d - digits);
        if (s->comma && at > 0 && at < whole && (whole - at) % 3 == 0)
            text[n++] = ',';
        text[n++] = *d;
    }
    tm_jval v;
    return tm_jv_str(r, text, n, &v) && put_padded(r, out, &v, s, '>');
}

static bool put_int(tm_jrun *r, tm_jbuf *out, int64_t v, const spec *s)
{
    char digits[80];
    uint64_t u = v < 0 ? 0 - (uint64_t)v : (uint64_t)v;
    unsigned long long n = u;
    int least = TM_MAX(s->precision, 1); /* digits */
    if (s->type == 'x')
        snprintf(digits, sizeof(digits), "%s%.*llx", s->alt ? "0x" : "", least, n);
    else if (s->type == 'X')
        snprintf(digits, sizeof(digits), "%s%.*llX", s->alt ? "0X" : "", least, n);
    else if (s->type == 'o')
        snprintf(digits, sizeof(digits), "%s%.*llo", s->alt ? "0o" : "", least, n);
    else
        snprintf(digits, sizeof(digits), "%.*llu", least, n);
    return put_digits(r, out, digits, v < 0, s);
}

static bool put_float(tm_jrun *r, tm_jbuf *out, double f, const spec *s)
{
    char digits[400];
    bool negative = f < 0;
    double v = negative ? -f : f;
    int prec = s->precision < 0 ? 6 : s->precision;
    if (s->type == 'e')
        snprintf(digits, sizeof(digits), "%.*e", prec, v);
    else if (s->type == 'g')
        snprintf(digits, sizeof(digits), "%.*g", prec ? prec : 1, v);
    else if (s->type == '%')
        snprintf(digits, sizeof(digits), "%.*f%%", prec, v * 100);
    else
        snprintf(digits, sizeof(digits), "%.*f", prec, v);
    return put_digits(r, out, digits, negative, s);
}

/* Text, cut to the precision. */
static bool put_text(tm_jrun *r, tm_jbuf *out, const tm_jval *v, bool repr, const spec *s,
                     char natural)
{
    tm_jval text;
    if (repr) {
        tm_jbuf *b = tm_jbuf_new(r, 32);
        if (!b || !tm_jv_repr(r, b, v))
            return false;
        text = tm_jbuf_value(b);
    } else if (!tm_jv_to_str(r, v, &text)) {
        return false;
    }
    size_t end = text.len;
    if (s->precision >= 0) {
        end = 0;
        for (int i = 0; i < s->precision && end < text.len; i++)
            tm_utf8_next(tm_jv_text(&text), &end);
    }
    text = tm_jv_slice(&text, 0, end);
    return put_padded(r, out, &text, s, natural);
}

static int read_int(const char *t, size_t len, size_t *pos)
{
    int v = 0;
    while (*pos < len && t[*pos] >= '0' && t[*pos] <= '9' && v <= WIDTH_MAX)
        v = v * 10 + (t[(*pos)++] - '0');
    return v;
}

static bool too_wide(tm_jrun *r, const spec *s)
{
    return (s->width > WIDTH_MAX || s->precision > 60) && !tm_jrun_fail(r, "a format is too wide");
}

/* ---- percent -------------------------------------------------------------------------------------------- */

typedef struct percent {
    tm_jrun *r;
    const char *t;
    size_t len, pos;
    const tm_jargs *args;
    const tm_jval *map;
    int used;
    bool mapped;
} percent;

static bool percent_value(percent *p, tm_jval *v)
{
    if (p->pos < p->len && p->t[p->pos] == '(') {
        const char *end = memchr(p->t + p->pos, ')', p->len - p->pos);
        if (!end || !p->map)
            return tm_jrun_fail(p->r, "format requires a mapping");
        tm_jval key;
        size_t from = p->pos + 1;
        p->pos = (size_t)(end - p->t) + 1;
        if (!tm_jv_str(p->r, p->t + from, p->pos - 1 - from, &key))
            return false;
        const tm_jval *got = tm_jdict_get(p->map->u.d, &key);
        if (!got)
            return tm_jrun_fail(p->r, "a key of the format is missing");
        p->mapped = true;
        *v = *got;
    } else {
        *v = TM_JV_ABSENT;
    }
    return true;
}

static bool percent_spec(percent *p, spec *s)
{
    *s = (spec){.fill = " ", .precision = -1};
    bool left = false;
    for (; p->pos < p->len && memchr("-+ #0", p->t[p->pos], 5); p->pos++) {
        char c = p->t[p->pos];
        left |= c == '-';
        s->alt |= c == '#';
        s->zero |= c == '0';
        if (c == '+' || (c == ' ' && !s->sign))
            s->sign = c;
    }
    s->width = read_int(p->t, p->len, &p->pos);
    if (p->pos < p->len && p->t[p->pos] == '.') {
        p->pos++;
        s->precision = read_int(p->t, p->len, &p->pos);
    }
    s->align = left ? '<' : '>';
    s->zero &= !left;
    if (p->pos >= p->len)
        return tm_jrun_fail(p->r, "incomplete format");
    s->type = p->t[p->pos++];
    return !too_wide(p->r, s);
}

/* A float as %d: its whole part, which may have three hundred digits. */
static bool put_whole_part(tm_jrun *r, tm_jbuf *out, double f, const spec *s)
{
    char digits[400];
    if (s->type != 'd' && s->type != 'i' && s->type != 'u')
        return tm_jrun_fail(r, "%%%c format: an integer is required, not float", s->type);
    if (!isfinite(f))
        return tm_jrun_fail(r, "cannot convert float %s to integer", isnan(f) ? "NaN" : "infinity");
    snprintf(digits, sizeof(digits), "%0*.0f", TM_MAX(s->precision, 1), trunc(fabs(f)));
    return put_digits(r, out, digits, f <= -1, s);
}

static bool percent_field(percent *p, tm_jbuf *out)
{
    tm_jval v;
    spec s;
    if (!percent_value(p, &v) || !percent_spec(p, &s))
        return false;
    if (s.type == '%')
        return tm_jbuf_puts(p->r, out, "%");
    if (v.type == TM_J_ABSENT) {
        if (p->used >= p->args->n)
            return tm_jrun_fail(p->r, "not enough arguments for format string");
        v = p->args->v[p->used++];
    }
    if (s.type == 's' || s.type == 'r' || s.type == 'a') {
        s.zero = false;
        return put_text(p->r, out, &v, s.type != 's', &s, '>');
    }
    if (v.type == TM_J_UNDEFINED)
        return tm_jrun_undefined(p->r, &v);
    bool whole = memchr("diuxXo", s.type, 6) != NULL;
    if (!tm_jv_is_number(&v) || v.type == TM_J_BIGINT || (!whole && !memchr("feg", s.type, 3)))
        return tm_jrun_fail(p->r, "%%%c format: a number is required, not %s", s.type,
                            tm_jv_type_name(&v));
    if (!whole)
        return put_float(p->r, out, tm_jv_double(&v), &s);
    if (v.type == TM_J_FLOAT)
        return put_whole_part(p->r, out, v.u.f, &s);
    return put_int(p->r, out, v.type == TM_J_BOOL ? v.u.b : v.u.i, &s);
}

bool tm_jformat_percent(tm_jrun *r, const tm_jval *fmt, const tm_jargs *args, const tm_jval *map,
                        tm_jval *out)
{
    percent p = {.r = r, .t = tm_jv_text(fmt), .len = fmt->len, .args = args, .map = map};
    tm_jbuf *b = tm_jbuf_new(r, fmt->len);
    if (!b)
        return false;
    while (p.pos < p.len) {
        const char *hit = memchr(p.t + p.pos, '%', p.len - p.pos);
        size_t end = hit ? (size_t)(hit - p.t) : p.len;
        tm_jval part = tm_jv_slice(fmt, p.pos, end - p.pos);
        if (!tm_jrun_step(r) || !tm_jbuf_append_str(r, b, &part))
            return false;
        p.pos = end + 1;
        if (hit && !percent_field(&p, b))
            return false;
    }
    if (p.used < args->n && !map)
        return tm_jrun_fail(r, "not all arguments converted during string formatting");
    *out = tm_jbuf_value(b);
    return true;
}

/* ---- braces --------------------------------------------------------------------------------------------- */

/* [[fill]align][sign][#][0][width][,][.precision][type] */
static bool brace_spec(tm_jrun *r, const char *t, size_t len, spec *s)
{
    size_t pos = 0, fill = 0;
    *s = (spec){.fill = " ", .precision = -1};
    if (len > 0) {
        tm_utf8_next(t, &fill);
        if (fill < len && memchr("<>^=", t[fill], 4)) {
            memcpy(s->fill, t, fill);
            s->fill[fill] = 0;
            s->align = t[fill];
            pos = fill + 1;
        } else if (memchr("<>^=", t[0], 4)) {
            s->align = t[0];
            pos = 1;
        }
    }
    if (pos < len && (t[pos] == '+' || t[pos] == ' ' || t[pos] == '-')) {
        s->sign = t[pos] == '-' ? 0 : t[pos];
        pos++;
    }
    if (pos < len && t[pos] == '#') {
        s->alt = true;
        pos++;
    }
    if (pos < len && t[pos] == '0') {
        s->zero = !s->align;
        pos++;
    }
    s->width = read_int(t, len, &pos);
    if (pos < len && t[pos] == ',') {
        s->comma = true;
        pos++;
    }
    if (pos < len && t[pos] == '.') {
        pos++;
        s->precision = read_int(t, len, &pos);
    }
    if (pos < len)
        s->type = t[pos++];
    if (pos < len || (s->type && !memchr("sdxXofFeg%", s->type, 10)))
        return tm_jrun_fail(r, "format: the field \"%.*s\" is not supported", (int)TM_MIN(len, 40u),
                            t);
    return !too_wide(r, s);
}

static bool brace_value(tm_jrun *r, const char *name, size_t len, const tm_jargs *args, int *next,
                        tm_jval *out)
{
    if (len == 0 || (name[0] >= '0' && name[0] <= '9')) {
        size_t pos = 0;
        int i = len ? read_int(name, len, &pos) : (*next)++;
        if (pos != len || i >= args->n)
            return tm_jrun_fail(r, "Replacement index %d out of range for positional args tuple",
                                i);
        *out = args->v[i];
        return true;
    }
    for (int i = 0; i < args->kn; i++) {
        if (strlen(args->kw[i].name) == len && memcmp(args->kw[i].name, name, len) == 0) {
            *out = args->kw[i].v;
            return true;
        }
    }
    return tm_jrun_fail(r, "format: no argument '%.*s'", (int)TM_MIN(len, 60u), name);
}

static bool brace_field(tm_jrun *r, tm_jbuf *out, const char *t, size_t len, const tm_jargs *args,
                        int *next)
{
    const char *colon = memchr(t, ':', len);
    size_t name = colon ? (size_t)(colon - t) : len;
    bool repr = name >= 2 && t[name - 2] == '!' && t[name - 1] == 'r';
    bool str = name >= 2 && t[name - 2] == '!' && t[name - 1] == 's';
    tm_jval v;
    spec s;
    if (!brace_value(r, t, name - (repr || str ? 2 : 0), args, next, &v) ||
        !brace_spec(r, colon ? colon + 1 : "", colon ? len - name - 1 : 0, &s))
        return false;
    bool number =
        tm_jv_is_number(&v) && v.type != TM_J_BIGINT && v.type != TM_J_BOOL && !repr && !str;
    if (s.type == 's' || (!number && !s.type) ||
        (number && !s.type && s.precision < 0 && !s.comma && !s.zero && !s.sign))
        return put_text(r, out, &v, repr, &s, number ? '>' : '<');
    if (!number)
        return tm_jrun_fail(r, "Unknown format code '%c' for object of type '%s'", s.type,
                            tm_jv_type_name(&v));
    bool whole = s.type ? memchr("dxXo", s.type, 4) != NULL : v.type == TM_J_INT;
    if (whole && v.type != TM_J_INT)
        return tm_jrun_fail(r, "Unknown format code '%c' for object of type 'float'", s.type);
    if (whole && s.precision >= 0)
        return tm_jrun_fail(r, "Precision not allowed in integer format specifier");
    return whole ? put_int(r, out, v.u.i, &s) : put_float(r, out, tm_jv_double(&v), &s);
}

bool tm_jformat_braces(tm_jrun *r, const tm_jval *fmt, const tm_jargs *args, tm_jval *out)
{
    const char *t = tm_jv_text(fmt);
    tm_jbuf *b = tm_jbuf_new(r, fmt->len);
    int next = 0;
    if (!b)
        return false;
    for (size_t pos = 0; pos < fmt->len;) {
        size_t end = pos;
        while (end < fmt->len && t[end] != '{' && t[end] != '}')
            end++;
        bool twice = end + 1 < fmt->len && t[end + 1] == t[end];
        tm_jval part = tm_jv_slice(fmt, pos, end - pos + (end < fmt->len && twice));
        if (!tm_jrun_step(r) || !tm_jbuf_append_str(r, b, &part))
            return false;
        pos = end + (twice ? 2 : 1);
        if (end >= fmt->len || twice)
            continue;
        const char *close = t[end] == '{' ? memchr(t + end, '}', fmt->len - end) : NULL;
        if (!close)
            return tm_jrun_fail(r, "Single '%c' encountered in format string", t[end]);
        if (!brace_field(r, b, t + pos, (size_t)(close - t) - pos, args, &next))
            return false;
        pos = (size_t)(close - t) + 1;
    }
    *out = tm_jbuf_value(b);
    return true;
}
