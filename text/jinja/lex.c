/* The rules are those of Jinja2's lexer with trim_blocks and lstrip_blocks: newlines become \n, one newline at
 * the end of the template goes, "-" strips all white space on its side, "+" switches the automatic stripping
 * off, block tags and comments alone on their line leave nothing of it. */
#include "text/jinja/lex.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "common/check.h"
#include "text/tok/unicode.h"

#define BRACES_MAX 256

typedef struct lexer {
    tm_arena *arena;
    tm_err *err;
    const char *s;
    size_t len, pos;
    int line;
    bool line_start; /* the last tag ended with a newline, or nothing came yet */
    tm_jtoken *tok;
    size_t n, cap;
    char open[BRACES_MAX];
    int open_n;
} lexer;

static tm_status no_memory(lexer *x)
{
    return TM_FAIL(x->err, TM_STATUS_NO_MEMORY, "out of memory for a chat template");
}

static tm_status push(lexer *x, tm_jtok type, const char *s, size_t len, int op)
{
    if (x->n == x->cap) {
        size_t cap = x->cap ? x->cap * 2 : 256;
        tm_jtoken *t = tm_arena_alloc(x->arena, cap * sizeof(*t));
        if (!t)
            return no_memory(x);
        if (x->n)
            memcpy(t, x->tok, x->n * sizeof(*t));
        x->tok = t;
        x->cap = cap;
    }
    x->tok[x->n++] = (tm_jtoken){(uint8_t)type, op, x->line, s, len};
    return TM_OK;
}

static tm_status push_copy(lexer *x, tm_jtok type, const char *s, size_t len)
{
    char *copy = tm_arena_strndup(x->arena, s, len);
    return copy ? push(x, type, copy, len, 0) : no_memory(x);
}

static bool is_space(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r') || (c >= 0x1C && c <= 0x1F);
}

static bool is_word(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           (unsigned char)c >= 0x80;
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

static bool at(const lexer *x, size_t pos, const char *what)
{
    size_t n = strlen(what);
    return pos + n <= x->len && memcmp(x->s + pos, what, n) == 0;
}

static void count_lines(lexer *x, size_t from, size_t to)
{
    for (size_t i = from; i < to; i++)
        x->line += x->s[i] == '\n';
}

/* ---- text and the tags around it ------------------------------------------------------------------------ */

/* Text before a tag, cut as the tag says. sign: the character behind the tag's opening; block: not {{. */
static tm_status push_data(lexer *x, size_t from, size_t to, char sign, bool block)
{
    size_t end = to;
    if (sign == '-') {
        while (end > from && is_space(x->s[end - 1]))
            end--;
    } else if (sign != '+' && block) {
        size_t start = end;
        while (start > from && x->s[start - 1] != '\n')
            start--;
        bool blank = start > from || x->line_start;
        for (size_t i = start; i < end && blank; i++)
            blank = is_space(x->s[i]);
        if (blank)
            end = start;
    }
    tm_status st = end > from ? push(x, TM_JT_DATA, x->s + from, end - from, 0) : TM_OK;
    count_lines(x, from, to);
    return st;
}

/* Behind a closing tag: "-" swallows all white space, otherwise a block swallows one newline. */
static void after_tag(lexer *x, char sign, bool block)
{
    size_t from = x->pos;
    if (sign == '-') {
        while (x->pos < x->len && is_space(x->s[x->pos]))
            x->pos++;
    } else if (sign != '+' && block && x->pos < x->len && x->s[x->pos] == '\n') {
        x->pos++;
    }
    count_lines(x, from, x->pos);
    x->line_start = x->pos > from && x->s[x->pos - 1] == '\n';
}

static tm_status skip_comment(lexer *x)
{
    for (size_t i = x->pos; i + 1 < x->len; i++) {
        if (x->s[i] != '#' || x->s[i + 1] != '}')
            continue;
        char sign = i > x->pos && (x->s[i - 1] == '-' || x->s[i - 1] == '+') ? x->s[i - 1] : 0;
        count_lines(x, x->pos, i);
        x->pos = i + 2;
        after_tag(x, sign, true);
        return TM_OK;
    }
    return TM_FAIL(x->err, TM_STATUS_DATA, "line %d: a comment has no end", x->line);
}

/* At "{%": is it "{% name %}"? Then *end is behind it and *open, *close are its signs. */
static bool is_lone_tag(const lexer *x, size_t pos, const char *name, size_t *end, char *open,
                        char *close)
{
    size_t i = pos + 2;
    *open = i < x->len && (x->s[i] == '-' || x->s[i] == '+') ? x->s[i++] : 0;
    while (i < x->len && is_space(x->s[i]))
        i++;
    if (!at(x, i, name))
        return false;
    i += strlen(name);
    if (i < x->len && is_word(x->s[i]))
        return false;
    while (i < x->len && is_space(x->s[i]))
        i++;
    *close = i < x->len && (x->s[i] == '-' || x->s[i] == '+') ? x->s[i++] : 0;
    if (!at(x, i, "%}"))
        return false;
    *end = i + 2;
    return true;
}

/* x->pos is behind "{% raw %}". */
static tm_status lex_raw(lexer *x)
{
    size_t from = x->pos, end;
    char open, close;
    for (size_t i = from; i + 1 < x->len; i++) {
        if (!at(x, i, "{%") || !is_lone_tag(x, i, "endraw", &end, &open, &close))
            continue;
        tm_status st = push_data(x, from, i, open, true);
        x->pos = end;
        after_tag(x, close, true);
        return st;
    }
    return TM_FAIL(x->err, TM_STATUS_DATA, "line %d: raw has no endraw", x->line);
}

/* ---- inside of tags ------------------------------------------------------------------------------------- */

static int hex_value(const char *s, int digits)
{
    int v = 0;
    for (int i = 0; i < digits; i++) {
        char c = (char)(s[i] | 0x20);
        if (is_digit(s[i]))
            v = v * 16 + (s[i] - '0');
        else if (c >= 'a' && c <= 'f')
            v = v * 16 + (c - 'a' + 10);
        else
            return -1;
    }
    return v;
}

/* One escape behind the backslash at s[*i]; appends to out. False = malformed. */
static bool unescape(const char *s, size_t len, size_t *i, char *out, size_t *n)
{
    static const char from[] = "\\'\"abfnrtv", to[] = "\\'\"\a\b\f\n\r\t\v";
    char c = s[*i];
    const char *simple = memchr(from, c, sizeof(from) - 1);
    if (simple) {
        out[(*n)++] = to[simple - from];
        (*i)++;
        return true;
    }
    if (c == '\n') {
        (*i)++;
        return true;
    }
    int digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (digits > 0) {
        int v = *i + (size_t)digits < len ? hex_value(s + *i + 1, digits) : -1;
        if (v < 0 || v > 0x10FFFF || (v >= 0xD800 && v < 0xE000))
            return false;
        *n += tm_utf8_put((uint32_t)v, out + *n);
        *i += 1 + (size_t)digits;
        return true;
    }
    if (c >= '0' && c <= '7') {
        uint32_t v = 0;
        for (int k = 0; k < 3 && *i < len && s[*i] >= '0' && s[*i] <= '7'; k++)
            v = v * 8 + (uint32_t)(s[(*i)++] - '0');
        *n += tm_utf8_put(v, out + *n);
        return true;
    }
    out[(*n)++] = '\\'; /* unknown escapes keep their backslash */
    return true;
}

static tm_status lex_string(lexer *x)
{
    char quote = x->s[x->pos];
    size_t end = x->pos + 1, n = 0;
    while (end < x->len && x->s[end] != quote)
        end += x->s[end] == '\\' ? 2 : 1;
    if (end >= x->len)
        return TM_FAIL(x->err, TM_STATUS_DATA, "line %d: a string has no end", x->line);
    /* An escape never gives more bytes than it takes: \777 (4 bytes) gives 2. */
    char *out = tm_arena_alloc(x->arena, end - x->pos + 8);
    if (!out)
        return no_memory(x);
    for (size_t i = x->pos + 1; i < end;) {
        if (x->s[i] != '\\') {
            out[n++] = x->s[i++];
            continue;
        }
        i++;
        if (!unescape(x->s, end, &i, out, &n))
            return TM_FAIL(x->err, TM_STATUS_DATA, "line %d: a bad escape in a string", x->line);
    }
    tm_status st = push(x, TM_JT_STRING, out, n, 0);
    count_lines(x, x->pos, end);
    x->pos = end + 1;
    return st;
}

static size_t digits_end(const lexer *x, size_t i)
{
    while (i < x->len &&
           (is_digit(x->s[i]) || (x->s[i] == '_' && i + 1 < x->len && is_digit(x->s[i + 1]))))
        i++;
    return i;
}

static tm_status lex_number(lexer *x)
{
    size_t i = digits_end(x, x->pos);
    bool real = false;
    if (i + 1 < x->len && x->s[i] == '.' && is_digit(x->s[i + 1])) {
        real = true;
        i = digits_end(x, i + 1);
    }
    if (i < x->len && (x->s[i] == 'e' || x->s[i] == 'E')) {
        size_t k = i + 1;
        k += k < x->len && (x->s[k] == '+' || x->s[k] == '-');
        if (k < x->len && is_digit(x->s[k])) {
            real = true;
            i = digits_end(x, k);
        }
    }
    char *text = tm_arena_alloc(x->arena, i - x->pos + 1);
    size_t n = 0;
    if (!text)
        return no_memory(x);
    for (size_t k = x->pos; k < i; k++)
        if (x->s[k] != '_')
            text[n++] = x->s[k];
    x->pos = i;
    return push(x, real ? TM_JT_FLOAT : TM_JT_INT, text, n, 0);
}

static tm_status lex_operator(lexer *x)
{
    static const char pairs[][3] = {"==", "!=", "<=", ">=", "//", "**"};
    char c = x->s[x->pos];
    for (size_t i = 0; i < TM_ARRAY_LEN(pairs); i++) {
        if (at(x, x->pos, pairs[i])) {
            x->pos += 2;
            return push(x, TM_JT_OP, NULL, 0, TM_JOPC(pairs[i][0], pairs[i][1]));
        }
    }
    if (!c || !strchr("+-*/%~<>=.,:|()[]{};", c)) {
        char shown = c > ' ' && c <= '~' ? c : '?';
        return TM_FAIL(x->err, TM_STATUS_DATA, "line %d: unexpected character '%c' (0x%02x)",
                       x->line, shown, (unsigned char)c);
    }
    const char *close = strchr("()[]{}", c);
    if (close && strchr("([{", c)) {
        if (x->open_n == BRACES_MAX)
            return TM_FAIL(x->err, TM_STATUS_DATA, "line %d: nested too deep", x->line);
        x->open[x->open_n++] = close[1];
    } else if (close) {
        if (x->open_n == 0 || x->open[--x->open_n] != c)
            return TM_FAIL(x->err, TM_STATUS_DATA, "line %d: unexpected '%c'", x->line, c);
    }
    x->pos++;
    return push(x, TM_JT_OP, NULL, 0, c);
}

/* The end of the tag at x->pos, if it stands there: "}}", "-}}", "%}" ... */
static bool tag_end(lexer *x, bool block, char *sign)
{
    const char *end = block ? "%}" : "}}";
    if (x->open_n > 0)
        return false;
    *sign = 0;
    if (at(x, x->pos, end)) {
        x->pos += 2;
        return true;
    }
    char c = x->s[x->pos];
    if ((c == '-' || (c == '+' && block)) && at(x, x->pos + 1, end)) {
        *sign = c;
        x->pos += 3;
        return true;
    }
    return false;
}

static tm_status lex_tag(lexer *x, bool block)
{
    int line = x->line;
    x->open_n = 0;
    TM_TRY(push(x, block ? TM_JT_BLOCK_BEGIN : TM_JT_VAR_BEGIN, NULL, 0, 0));
    while (x->pos < x->len) {
        char c = x->s[x->pos], sign;
        if (tag_end(x, block, &sign)) {
            TM_TRY(push(x, block ? TM_JT_BLOCK_END : TM_JT_VAR_END, NULL, 0, 0));
            after_tag(x, sign, block);
            return TM_OK;
        }
        if (is_space(c)) {
            x->line += c == '\n';
            x->pos++;
        } else if (c == '"' || c == '\'') {
            TM_TRY(lex_string(x));
        } else if (is_digit(c)) {
            TM_TRY(lex_number(x));
        } else if (is_word(c)) {
            size_t from = x->pos;
            while (x->pos < x->len && is_word(x->s[x->pos]))
                x->pos++;
            TM_TRY(push_copy(x, TM_JT_NAME, x->s + from, x->pos - from));
        } else {
            TM_TRY(lex_operator(x));
        }
    }
    return TM_FAIL(x->err, TM_STATUS_DATA, "line %d: a tag has no end", line);
}

/* ---- the whole template --------------------------------------------------------------------------------- */

/* \r\n and \r become \n; one newline at the end goes. */
static char *normalize(tm_arena *arena, const char *s, size_t *len)
{
    char *out = tm_arena_alloc(arena, *len + 1);
    size_t n = 0;
    if (!out)
        return NULL;
    for (size_t i = 0; i < *len; i++) {
        if (s[i] == '\r' && i + 1 < *len && s[i + 1] == '\n')
            continue;
        out[n++] = s[i] == '\r' ? '\n' : s[i];
    }
    *len = n - (n > 0 && out[n - 1] == '\n');
    return out;
}

static tm_status lex_any_tag(lexer *x, size_t text)
{
    char kind = x->s[x->pos + 1], sign = x->pos + 2 < x->len ? x->s[x->pos + 2] : 0, open, close;
    size_t end;
    sign = sign == '-' || (sign == '+' && kind != '{') ? sign : 0;
    if (kind == '%' && is_lone_tag(x, x->pos, "raw", &end, &open, &close)) {
        TM_TRY(push_data(x, text, x->pos, open, true));
        x->pos = end;
        after_tag(x, close == '-' ? '-' : '+', true); /* raw keeps the newline behind it */
        return lex_raw(x);
    }
    TM_TRY(push_data(x, text, x->pos, sign, kind != '{'));
    x->pos += 2 + (sign != 0);
    return kind == '#' ? skip_comment(x) : lex_tag(x, kind == '%');
}

tm_status tm_jlex(tm_arena *arena, const char *source, size_t len, tm_jtoken **tokens,
                  size_t *count, tm_err *err)
{
    lexer x = {.arena = arena, .err = err, .line = 1, .line_start = true};
    x.s = normalize(arena, source, &len);
    x.len = len;
    if (!x.s)
        return no_memory(&x);
    size_t text = 0;
    while (x.pos < x.len) {
        const char *brace = memchr(x.s + x.pos, '{', x.len - x.pos);
        x.pos = brace ? (size_t)(brace - x.s) : x.len;
        if (x.pos + 1 < x.len && strchr("{%#", x.s[x.pos + 1]) && x.s[x.pos + 1]) {
            TM_TRY(lex_any_tag(&x, text));
            text = x.pos;
        } else if (x.pos < x.len) {
            x.pos++;
        }
    }
    if (text < x.len)
        TM_TRY(push(&x, TM_JT_DATA, x.s + text, x.len - text, 0));
    TM_TRY(push(&x, TM_JT_EOF, NULL, 0, 0));
    *tokens = x.tok;
    *count = x.n;
    return TM_OK;
}
