/* A reader by recursive descent; its depth is bounded. The output is in the form of Python's json.dumps, because
 * that is how the other families write their arguments. */
#include "text/parse/pylit.h"

#include <string.h>

#include "common/check.h"
#include "common/json.h"

#define DEPTH_MAX 32

static bool value(tm_pylit *r, tm_buf *out, int depth);

static void skip_white(tm_pylit *r)
{
    while (r->at < r->end && strchr(" \t\r\n", *r->at))
        r->at++;
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

static bool is_word(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || is_digit(c);
}

bool tm_pylit_char(tm_pylit *r, char c)
{
    skip_white(r);
    if (r->at == r->end || *r->at != c)
        return false;
    r->at++;
    return true;
}

bool tm_pylit_name(tm_pylit *r, const char **name, size_t *len)
{
    skip_white(r);
    const char *begin = r->at;
    while (r->at < r->end && (is_word(*r->at) || *r->at == '.'))
        r->at++;
    *name = begin;
    *len = (size_t)(r->at - begin);
    return *len > 0 && !is_digit(*begin) && *begin != '.';
}

/* ---- strings -------------------------------------------------------------------------------------------- */

static void put_utf8(tm_buf *b, uint32_t c)
{
    if (c < 0x80) {
        tm_buf_putc(b, (char)c);
    } else if (c < 0x800) {
        tm_buf_putc(b, (char)(0xc0 | c >> 6));
        tm_buf_putc(b, (char)(0x80 | (c & 0x3f)));
    } else if (c < 0x10000) {
        tm_buf_putc(b, (char)(0xe0 | c >> 12));
        tm_buf_putc(b, (char)(0x80 | (c >> 6 & 0x3f)));
        tm_buf_putc(b, (char)(0x80 | (c & 0x3f)));
    } else {
        tm_buf_putc(b, (char)(0xf0 | c >> 18));
        tm_buf_putc(b, (char)(0x80 | (c >> 12 & 0x3f)));
        tm_buf_putc(b, (char)(0x80 | (c >> 6 & 0x3f)));
        tm_buf_putc(b, (char)(0x80 | (c & 0x3f)));
    }
}

static bool hex(tm_pylit *r, int digits, uint32_t *out)
{
    *out = 0;
    for (int i = 0; i < digits; i++) {
        static const char set[] = "0123456789abcdef";
        if (r->at == r->end || *r->at == 0)
            return false;
        const char *d = strchr(set, *r->at | (*r->at >= 'A' ? 0x20 : 0));
        if (!d)
            return false;
        *out = *out << 4 | (uint32_t)(d - set);
        r->at++;
    }
    return *out <= 0x10ffff && (*out < 0xd800 || *out > 0xdfff);
}

static bool escape(tm_pylit *r, tm_buf *b)
{
    static const char from[] = "\\'\"nrtbfav0", to[] = "\\'\"\n\r\t\b\f\a\v\0";
    uint32_t c;
    if (r->at == r->end || *r->at == 0)
        return false;
    char kind = *r->at++;
    int digits = kind == 'x' ? 2 : kind == 'u' ? 4 : kind == 'U' ? 8 : 0;
    if (digits > 0) {
        if (!hex(r, digits, &c))
            return false;
        put_utf8(b, c);
        return true;
    }
    const char *at = strchr(from, kind);
    if (kind == '\n')
        return true;
    if (at) {
        tm_buf_putc(b, to[at - from]);
    } else { /* Python keeps a backslash that means nothing */
        tm_buf_putc(b, '\\');
        tm_buf_putc(b, kind);
    }
    return true;
}

static bool string(tm_pylit *r, tm_buf *out)
{
    tm_buf text;
    tm_jw w;
    char quote = *r->at++;
    bool closed = false, ok = true;
    tm_buf_init(&text, 0);
    while (ok && !closed && r->at < r->end) {
        char c = *r->at++;
        closed = c == quote;
        if (c == '\\')
            ok = escape(r, &text);
        else if (!closed)
            tm_buf_putc(&text, c);
    }
    tm_jw_init(&w, out);
    tm_jw_strn(&w, text.data ? text.data : "", text.len);
    ok = ok && closed && !text.failed;
    tm_buf_deinit(&text);
    return ok;
}

/* ---- other literals ------------------------------------------------------------------------------------- */

static bool word(tm_pylit *r, tm_buf *out)
{
    static const char *const words[][2] = {{"True", "true"}, {"False", "false"}, {"None", "null"},
                                           {"true", "true"}, {"false", "false"}, {"null", "null"}};
    const char *s;
    size_t len;
    if (!tm_pylit_name(r, &s, &len))
        return false;
    for (size_t i = 0; i < TM_ARRAY_LEN(words); i++)
        if (strlen(words[i][0]) == len && memcmp(words[i][0], s, len) == 0)
            return tm_buf_puts(out, words[i][1]);
    return false;
}

/* What JSON also takes as a number; other spellings (0x10, 1_000, 1.) are refused. */
static bool number(tm_pylit *r, tm_buf *out)
{
    const char *begin = r->at;
    if (*r->at == '-' || *r->at == '+')
        r->at++;
    while (r->at < r->end && (is_word(*r->at) || *r->at == '.' ||
                              ((*r->at == '-' || *r->at == '+') && (r->at[-1] | 0x20) == 'e')))
        r->at++;
    begin += *begin == '+';
    json_t *v = json_loadb(begin, (size_t)(r->at - begin), JSON_DECODE_ANY, NULL);
    bool ok = json_is_number(v);
    json_decref(v);
    return ok && tm_buf_append(out, begin, (size_t)(r->at - begin));
}

/* Members up to the closing bracket; a comma may stand behind the last one. */
static bool list(tm_pylit *r, tm_buf *out, int depth, char close)
{
    tm_buf_putc(out, '[');
    r->at++;
    for (int n = 0; !tm_pylit_char(r, close); n++) {
        if (n > 0) {
            if (!tm_pylit_char(r, ','))
                return false;
            if (tm_pylit_char(r, close))
                break;
            tm_buf_puts(out, ", ");
        }
        if (!value(r, out, depth + 1))
            return false;
    }
    return tm_buf_putc(out, ']');
}

static bool dict(tm_pylit *r, tm_buf *out, int depth)
{
    tm_buf_putc(out, '{');
    r->at++;
    for (int n = 0; !tm_pylit_char(r, '}'); n++) {
        if (n > 0) {
            if (!tm_pylit_char(r, ','))
                return false;
            if (tm_pylit_char(r, '}'))
                break;
            tm_buf_puts(out, ", ");
        }
        skip_white(r);
        if (r->at == r->end || (*r->at != '"' && *r->at != '\'') || !string(r, out) ||
            !tm_pylit_char(r, ':'))
            return false;
        tm_buf_puts(out, ": ");
        if (!value(r, out, depth + 1))
            return false;
    }
    return tm_buf_putc(out, '}');
}

static bool value(tm_pylit *r, tm_buf *out, int depth)
{
    skip_white(r);
    if (r->at == r->end || depth > DEPTH_MAX)
        return false;
    switch (*r->at) {
    case '"':
    case '\'':
        return string(r, out);
    case '[':
        return list(r, out, depth, ']');
    case '(':
        return list(r, out, depth, ')');
    case '{':
        return dict(r, out, depth);
    case '-':
    case '+':
    case '.':
        return number(r, out);
    default:
        return is_digit(*r->at) ? number(r, out) : word(r, out);
    }
}

bool tm_pylit_arguments(tm_pylit *r, tm_buf *out)
{
    if (!tm_pylit_char(r, '('))
        return false;
    tm_buf_putc(out, '{');
    for (int n = 0; !tm_pylit_char(r, ')'); n++) {
        const char *name;
        size_t len;
        tm_jw w;
        if (n > 0) {
            if (!tm_pylit_char(r, ','))
                return false;
            if (tm_pylit_char(r, ')'))
                break;
            tm_buf_puts(out, ", ");
        }
        if (!tm_pylit_name(r, &name, &len) || memchr(name, '.', len) || !tm_pylit_char(r, '='))
            return false;
        tm_jw_init(&w, out);
        tm_jw_strn(&w, name, len);
        tm_buf_puts(out, ": ");
        if (!value(r, out, 0))
            return false;
    }
    return tm_buf_putc(out, '}');
}
