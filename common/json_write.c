/* The streaming JSON writer, and the UTF-8 and number helpers below it.
 *
 * SSE chunks are written here, once per step and stream, so the string path copies runs of plain
 * bytes and looks closer only at escapes and non-ASCII. U+0085, U+2028 and U+2029 are escaped although
 * JSON allows them raw: some clients split an event stream into lines at them. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/fmt.h"
#include "common/json.h"

#define JW_DEPTH_MAX 64

size_t tm_utf8_seq(const char *s, size_t len)
{
    const unsigned char *p = (const unsigned char *)s;
    unsigned char c = p[0];
    if (c < 0x80)
        return 1;
    size_t n = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
    if (c < 0xc2 || c > 0xf4 || n > len)
        return 0;
    /* The second byte's range excludes overlong forms, surrogates and what lies over U+10FFFF. */
    unsigned char lo = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
    unsigned char hi = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
    if (p[1] < lo || p[1] > hi)
        return 0;
    for (size_t i = 2; i < n; i++)
        if ((p[i] & 0xc0) != 0x80)
            return 0;
    return n;
}

bool tm_utf8_valid(const char *s, size_t len)
{
    for (size_t i = 0; i < len;) {
        size_t n = tm_utf8_seq(s + i, len - i);
        if (n == 0)
            return false;
        i += n;
    }
    return true;
}

size_t tm_int_format(char out[TM_NUM_MAX], int64_t v)
{
    char digits[20];
    size_t n = 0, len = 0;
    uint64_t u = v < 0 ? 0 - (uint64_t)v : (uint64_t)v;
    do {
        digits[n++] = (char)('0' + u % 10);
        u /= 10;
    } while (u);
    if (v < 0)
        out[len++] = '-';
    while (n > 0)
        out[len++] = digits[--n];
    out[len] = '\0';
    return len;
}

/* printf writes the locale's decimal point, which may be several bytes: one '.' instead. */
static size_t unlocalise(char *out, const char *s)
{
    size_t o = 0;
    bool point = false;
    for (size_t i = 0; s[i]; i++) {
        if ((s[i] >= '0' && s[i] <= '9') || s[i] == '-' || s[i] == '+' || s[i] == 'e') {
            out[o++] = s[i];
        } else if (!point) {
            out[o++] = '.';
            point = true;
        }
    }
    out[o] = '\0';
    return o;
}

size_t tm_num_format(char out[TM_NUM_MAX], double v, bool single)
{
    if (single)
        v = (double)(float)v;
    if (v == 0 && signbit(v)) {
        memcpy(out, "-0.0", 5); /* "-0" is an integer to many readers: the sign would be lost */
        return 4;
    }
    if (v == floor(v) && fabs(v) < 1e15)
        return tm_int_format(out, (int64_t)v);
    /* 6 and 15 digits always survive text -> number -> text; 9 and 17 are always enough. */
    char text[TM_NUM_MAX];
    for (int digits = single ? 6 : 15;; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, v);
        double back = single ? (double)strtof(text, NULL) : strtod(text, NULL);
        if (back == v || digits == (single ? 9 : 17))
            return unlocalise(out, text);
    }
}

void tm_jw_init(tm_jw *w, tm_buf *buf)
{
    *w = (tm_jw){.buf = buf};
}

static void before_value(tm_jw *w)
{
    if (w->after_key) {
        w->after_key = false;
        return;
    }
    uint64_t bit = (uint64_t)1 << w->depth;
    if (w->comma & bit)
        tm_buf_putc(w->buf, ',');
    w->comma |= bit;
}

static void open_level(tm_jw *w, char c)
{
    before_value(w);
    tm_buf_putc(w->buf, c);
    w->depth++;
    TM_ASSERT(w->depth < JW_DEPTH_MAX);
    w->comma &= ~((uint64_t)1 << w->depth);
}

static void close_level(tm_jw *w, char c)
{
    TM_ASSERT(w->depth > 0);
    w->depth--;
    tm_buf_putc(w->buf, c);
}

void tm_jw_obj(tm_jw *w)
{
    open_level(w, '{');
}

void tm_jw_obj_end(tm_jw *w)
{
    close_level(w, '}');
}

void tm_jw_arr(tm_jw *w)
{
    open_level(w, '[');
}

void tm_jw_arr_end(tm_jw *w)
{
    close_level(w, ']');
}

static void put_escape(tm_buf *b, unsigned char c)
{
    static const char names[] = "\"\"\\\\\bb\ff\nn\rr\tt";
    for (size_t i = 0; i + 1 < sizeof names; i += 2) {
        if ((unsigned char)names[i] == c) {
            char pair[2] = {'\\', names[i + 1]};
            tm_buf_append(b, pair, 2);
            return;
        }
    }
    tm_buf_printf(b, "\\u%04x", c);
}

static const char *line_separator(const char *s, size_t n)
{
    if (n == 2 && memcmp(s, "\xc2\x85", 2) == 0)
        return "\\u0085";
    if (n == 3 && memcmp(s, "\xe2\x80\xa8", 3) == 0)
        return "\\u2028";
    if (n == 3 && memcmp(s, "\xe2\x80\xa9", 3) == 0)
        return "\\u2029";
    return NULL;
}

static void put_string(tm_buf *b, const char *s, size_t len)
{
    tm_buf_reserve(b, len < SIZE_MAX - 2 ? len + 2 : len);
    tm_buf_putc(b, '"');
    size_t start = 0, i = 0;
    while (i < len) {
        unsigned char c = (unsigned char)s[i];
        if (c >= 0x20 && c < 0x80 && c != '"' && c != '\\') {
            i++;
            continue;
        }
        size_t n = c < 0x80 ? 1 : tm_utf8_seq(s + i, len - i);
        const char *sep = n > 1 ? line_separator(s + i, n) : NULL;
        if (n > 1 && !sep) {
            i += n;
            continue;
        }
        tm_buf_append(b, s + start, i - start);
        if (sep) {
            tm_buf_puts(b, sep);
        } else if (n == 1) {
            put_escape(b, c);
        } else {
            /* A run of bad bytes becomes one U+FFFD. */
            n = 1;
            while (i + n < len && tm_utf8_seq(s + i + n, len - i - n) == 0)
                n++;
            tm_buf_puts(b, "\xef\xbf\xbd");
        }
        i += n;
        start = i;
    }
    tm_buf_append(b, s + start, len - start);
    tm_buf_putc(b, '"');
}

void tm_jw_key(tm_jw *w, const char *key)
{
    before_value(w);
    put_string(w->buf, key, strlen(key));
    tm_buf_putc(w->buf, ':');
    w->after_key = true;
}

void tm_jw_str(tm_jw *w, const char *s)
{
    if (s)
        tm_jw_strn(w, s, strlen(s));
    else
        tm_jw_null(w);
}

void tm_jw_strn(tm_jw *w, const char *s, size_t len)
{
    before_value(w);
    put_string(w->buf, s, len);
}

void tm_jw_int(tm_jw *w, int64_t v)
{
    char text[TM_NUM_MAX];
    size_t n = tm_int_format(text, v);
    tm_jw_raw(w, text, n);
}

static void put_num(tm_jw *w, double v, bool single)
{
    if (!isfinite(v)) {
        tm_jw_null(w);
        return;
    }
    char text[TM_NUM_MAX];
    size_t n = tm_num_format(text, v, single);
    tm_jw_raw(w, text, n);
}

void tm_jw_num(tm_jw *w, double v)
{
    put_num(w, v, false);
}

void tm_jw_f32(tm_jw *w, float v)
{
    put_num(w, (double)v, true);
}

void tm_jw_bool(tm_jw *w, bool v)
{
    tm_jw_raw(w, v ? "true" : "false", v ? 4 : 5);
}

void tm_jw_null(tm_jw *w)
{
    tm_jw_raw(w, "null", 4);
}

void tm_jw_raw(tm_jw *w, const char *json, size_t len)
{
    before_value(w);
    tm_buf_append(w->buf, json, len);
}

void tm_jw_kstr(tm_jw *w, const char *key, const char *s)
{
    tm_jw_key(w, key);
    tm_jw_str(w, s);
}

void tm_jw_kint(tm_jw *w, const char *key, int64_t v)
{
    tm_jw_key(w, key);
    tm_jw_int(w, v);
}

void tm_jw_knum(tm_jw *w, const char *key, double v)
{
    tm_jw_key(w, key);
    tm_jw_num(w, v);
}

void tm_jw_kbool(tm_jw *w, const char *key, bool v)
{
    tm_jw_key(w, key);
    tm_jw_bool(w, v);
}

void tm_jw_knull(tm_jw *w, const char *key)
{
    tm_jw_key(w, key);
    tm_jw_null(w);
}
