/* Tokenizer files are written for other engines (Oniguruma, Rust's regex), which read \s as the White_Space
 * property, count marks and connectors to \w, and let ^ and $ match at every line; PCRE2 adds U+180E to the
 * first and leaves those out of the second. The pattern is therefore rewritten: both become explicit lists,
 * inside and outside of character classes. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "text/tok/regex.h"

#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

#include "common/buf.h"
#include "common/check.h"

#define MATCH_LIMIT   10000000
#define DEPTH_LIMIT   100000
#define HEAP_LIMIT_KB (64 * 1024)
#define SPACE_SET                                                                                  \
    "\\t-\\r\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}"                   \
    "\\x{202f}\\x{205f}\\x{3000}"

#define WORD_SET "\\p{L}\\p{M}\\p{Nd}\\p{Pc}"

static const struct {
    char letter;
    const char *set, *outside;
} escapes[] = {{'s', SPACE_SET, "[" SPACE_SET "]"},
               {'S', NULL, "[^" SPACE_SET "]"},
               {'w', WORD_SET, "[" WORD_SET "]"},
               {'W', NULL, "[^" WORD_SET "]"}};

struct tm_regex {
    pcre2_code *code;
};

struct tm_regex_work {
    pcre2_match_data *data;
    pcre2_match_context *ctx;
};

static void put_escape(char c, bool in_class, tm_buf *out)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(escapes); i++) {
        const char *to = in_class ? escapes[i].set : escapes[i].outside;
        if (escapes[i].letter == c && to) {
            tm_buf_puts(out, to);
            return;
        }
    }
    tm_buf_putc(out, '\\');
    tm_buf_putc(out, c);
}

static bool rewrite_classes(const char *p, size_t len, tm_buf *out)
{
    int depth = 0; /* inside [...] */
    for (size_t i = 0; i < len; i++) {
        if (p[i] == '\\' && i + 1 < len) {
            put_escape(p[++i], depth > 0, out);
            continue;
        }
        if (p[i] == '[' && (depth == 0 || (i + 1 < len && p[i + 1] == ':')))
            depth++;
        else if (p[i] == ']' && depth > 0)
            depth--;
        tm_buf_putc(out, p[i]);
    }
    return !out->failed;
}

tm_status tm_regex_create(tm_regex **out, const char *pattern, size_t len, bool trusted,
                          tm_err *err)
{
    if (len > TM_REGEX_PATTERN_MAX)
        return TM_FAIL(err, TM_STATUS_TOO_LARGE, "the pattern is longer than %d bytes",
                       TM_REGEX_PATTERN_MAX);
    tm_buf text;
    tm_buf_init(&text, 0);
    tm_regex *r = calloc(1, sizeof(*r));
    if (!r || !rewrite_classes(pattern, len, &text)) {
        free(r);
        tm_buf_deinit(&text);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a pattern");
    }
    int code;
    PCRE2_SIZE at;
    r->code = pcre2_compile((PCRE2_SPTR)(text.data ? text.data : ""), text.len,
                            PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &code, &at, NULL);
    tm_buf_deinit(&text);
    if (!r->code) {
        PCRE2_UCHAR why[120];
        pcre2_get_error_message(code, why, sizeof(why));
        free(r);
        return TM_FAIL(err, TM_STATUS_DATA, "bad regular expression: %s", (const char *)why);
    }
    if (trusted)
        (void)pcre2_jit_compile(r->code,
                                PCRE2_JIT_COMPLETE); /* without it matching is only slower */
    *out = r;
    return TM_OK;
}

void tm_regex_destroy(tm_regex *r)
{
    if (!r)
        return;
    pcre2_code_free(r->code);
    free(r);
}

tm_regex_work *tm_regex_work_create(const tm_regex *r)
{
    tm_regex_work *w = calloc(1, sizeof(*w));
    if (!w)
        return NULL;
    w->data = pcre2_match_data_create_from_pattern(r->code, NULL);
    w->ctx = pcre2_match_context_create(NULL);
    if (!w->data || !w->ctx) {
        tm_regex_work_destroy(w);
        return NULL;
    }
    pcre2_set_match_limit(w->ctx, MATCH_LIMIT);
    pcre2_set_depth_limit(w->ctx, DEPTH_LIMIT);
    pcre2_set_heap_limit(w->ctx, HEAP_LIMIT_KB);
    return w;
}

void tm_regex_work_destroy(tm_regex_work *w)
{
    if (!w)
        return;
    pcre2_match_data_free(w->data);
    pcre2_match_context_free(w->ctx);
    free(w);
}

tm_status tm_regex_find(const tm_regex *r, tm_regex_work *w, const char *s, size_t len, size_t from,
                        tm_regex_match *m, bool *found, tm_err *err)
{
    int rc = pcre2_match(r->code, (PCRE2_SPTR)s, len, from, PCRE2_NO_UTF_CHECK, w->data, w->ctx);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(r->code, (PCRE2_SPTR)s, len, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                         w->data, w->ctx);
    *found = rc >= 0;
    if (rc == PCRE2_ERROR_NOMATCH)
        return TM_OK;
    if (rc < 0)
        return TM_FAIL(
            err, TM_STATUS_INVALID,
            "the tokenizer's split pattern passed its limits on this text (PCRE2 error %d)", rc);
    const PCRE2_SIZE *o = pcre2_get_ovector_pointer(w->data);
    /* \K in a look-ahead can put the start behind the end: such a match is empty. */
    *m = (tm_regex_match){o[0] < o[1] ? o[0] : o[1], o[1]};
    return TM_OK;
}
