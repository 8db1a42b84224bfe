/* Every decoder of the library but Strip and Metaspace works token by token, so its effect is the piece. */
#include "text/tok/decode.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "text/tok/tok.h"
#include "text/tok/unicode.h"

#define DEPTH_MAX 8

static tm_status add_step(tm_decoder *d, tm_decoder_op op, const char *from, const char *to,
                          tm_err *err)
{
    if (d->count == TM_DECODER_STEPS_MAX)
        return TM_FAIL(err, TM_STATUS_TOO_LARGE, "more than %d steps", TM_DECODER_STEPS_MAX);
    char *a = from ? strdup(from) : NULL, *b = to ? strdup(to) : NULL;
    if ((from && !a) || (to && !b)) {
        free(a);
        free(b);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    }
    d->steps[d->count].op = op;
    d->steps[d->count].from = a;
    d->steps[d->count++].to = b;
    return TM_OK;
}

static tm_status parse_byte_level(tm_decoder *d, const json_t *v, int depth, tm_err *err)
{
    (void)v;
    (void)depth;
    return add_step(d, TM_DECODER_BYTE_LEVEL, NULL, NULL, err);
}

static tm_status parse_byte_fallback(tm_decoder *d, const json_t *v, int depth, tm_err *err)
{
    (void)v;
    (void)depth;
    d->per_byte = true;
    return add_step(d, TM_DECODER_BYTE_FALLBACK, NULL, NULL, err);
}

static tm_status parse_replace(tm_decoder *d, const json_t *v, int depth, tm_err *err)
{
    (void)depth;
    const char *from = NULL, *to = NULL;
    const json_t *pattern = tm_json_get(v, "pattern");
    TM_TRY(tm_json_str(v, "content", &to, err));
    if (json_is_object(pattern))
        TM_TRY(tm_json_str(pattern, "String", &from, err));
    if (!from || !from[0] || !to)
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "Replace: only {\"String\": ...} patterns are supported");
    return add_step(d, TM_DECODER_REPLACE, from, to, err);
}

static tm_status parse_fuse(tm_decoder *d, const json_t *v, int depth, tm_err *err)
{
    (void)v;
    (void)depth;
    (void)err;
    d->fused = true;
    return TM_OK;
}

static tm_status parse_strip(tm_decoder *d, const json_t *v, int depth, tm_err *err)
{
    (void)depth;
    const char *content = NULL;
    int64_t start = 0, stop = 0;
    TM_TRY(tm_json_str(v, "content", &content, err));
    TM_TRY(tm_json_int(v, "start", 0, 1 << 20, &start, err));
    TM_TRY(tm_json_int(v, "stop", 0, 1 << 20, &stop, err));
    if (!d->fused || !content || strcmp(content, " ") != 0 || start > 1 || stop > 0)
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "Strip: only one leading space after Fuse is supported");
    d->strip_first_space = start == 1;
    return TM_OK;
}

static tm_status parse_metaspace(tm_decoder *d, const json_t *v, int depth, tm_err *err)
{
    (void)depth;
    const char *mark = "\xE2\x96\x81", *scheme = NULL;
    bool prefix = true;
    TM_TRY(tm_json_str(v, "replacement", &mark, err));
    TM_TRY(tm_json_str(v, "prepend_scheme", &scheme, err));
    TM_TRY(tm_json_bool(v, "add_prefix_space", &prefix, err));
    d->strip_first_space = scheme ? strcmp(scheme, "never") != 0 : prefix;
    if (!mark[0])
        return TM_FAIL(err, TM_STATUS_DATA, "replacement: is empty");
    return add_step(d, TM_DECODER_REPLACE, mark, " ", err);
}

static tm_status parse_any(tm_decoder *d, const json_t *v, int depth, tm_err *err);

static tm_status parse_sequence(tm_decoder *d, const json_t *v, int depth, tm_err *err)
{
    const json_t *list = tm_json_get(v, "decoders");
    if (!json_is_array(list))
        return TM_FAIL(err, TM_STATUS_DATA, "decoders: expected an array, got %s",
                       tm_json_type_name(list));
    for (size_t i = 0; i < json_array_size(list); i++) {
        tm_status st = parse_any(d, json_array_get(list, i), depth + 1, err);
        if (st != TM_OK) {
            tm_err_prefix(err, "decoders[%zu]", i);
            return st;
        }
    }
    return TM_OK;
}

static const struct {
    const char *type;
    tm_status (*parse)(tm_decoder *d, const json_t *v, int depth, tm_err *err);
} rows[] = {
    {"ByteLevel", parse_byte_level}, {"ByteFallback", parse_byte_fallback},
    {"Replace", parse_replace},      {"Fuse", parse_fuse},
    {"Strip", parse_strip},          {"Metaspace", parse_metaspace},
    {"Sequence", parse_sequence},
};

static tm_status parse_any(tm_decoder *d, const json_t *v, int depth, tm_err *err)
{
    const char *type = NULL;
    if (depth > DEPTH_MAX)
        return TM_FAIL(err, TM_STATUS_DATA, "nested more than %d deep", DEPTH_MAX);
    if (!json_is_object(v))
        return TM_FAIL(err, TM_STATUS_DATA, "expected an object, got %s", tm_json_type_name(v));
    TM_TRY(tm_json_str(v, "type", &type, err));
    for (size_t i = 0; type && i < TM_ARRAY_LEN(rows); i++)
        if (strcmp(rows[i].type, type) == 0)
            return rows[i].parse(d, v, depth, err);
    return TM_FAIL(err, TM_STATUS_UNSUPPORTED, "type: \"%.60s\" is not supported",
                   type ? type : "");
}

tm_status tm_decoder_parse(tm_decoder *d, const json_t *v, tm_err *err)
{
    return parse_any(d, v, 0, err);
}

void tm_decoder_deinit(tm_decoder *d)
{
    for (int i = 0; i < d->count; i++) {
        free(d->steps[i].from);
        free(d->steps[i].to);
    }
    d->count = 0;
}

/* All characters in the alphabet: their bytes; otherwise the token stays as it is. */
static void byte_level(tm_buf *b)
{
    size_t n = 0;
    for (size_t pos = 0; pos < b->len;)
        if (tm_byte_of_char(tm_utf8_next(b->data, &pos)) < 0)
            return;
    for (size_t pos = 0; pos < b->len;) {
        int byte = tm_byte_of_char(tm_utf8_next(b->data, &pos));
        b->data[n++] = (char)byte;
    }
    b->len = n;
}

static int hex(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c = (char)(c | 0x20);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* "<0xE2>" */
static void byte_fallback(tm_buf *b)
{
    if (b->len != 6 || memcmp(b->data, "<0x", 3) != 0 || b->data[5] != '>')
        return;
    int hi = hex(b->data[3]), lo = hex(b->data[4]);
    if (hi < 0 || lo < 0)
        return;
    b->data[0] = (char)(hi * 16 + lo);
    b->len = 1;
}

static void replace(tm_buf *b, const char *from, const char *to)
{
    size_t from_len = strlen(from);
    tm_buf out;
    tm_buf_init(&out, 0);
    for (size_t pos = 0; pos < b->len;) {
        if (b->len - pos >= from_len && memcmp(b->data + pos, from, from_len) == 0) {
            tm_buf_puts(&out, to);
            pos += from_len;
        } else {
            tm_buf_putc(&out, b->data[pos++]);
        }
    }
    out.failed |= b->failed;
    tm_buf_deinit(b);
    *b = out;
}

void tm_decoder_piece(const tm_decoder *d, const char *s, size_t len, tm_buf *out)
{
    tm_buf_clear(out);
    tm_buf_append(out, s, len);
    for (int i = 0; i < d->count && !out->failed; i++) {
        if (d->steps[i].op == TM_DECODER_BYTE_LEVEL)
            byte_level(out);
        else if (d->steps[i].op == TM_DECODER_BYTE_FALLBACK)
            byte_fallback(out);
        else
            replace(out, d->steps[i].from, d->steps[i].to);
    }
}
