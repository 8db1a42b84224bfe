/* turbomesh tokenize: text to ids and back with the model's tokenizer, a line at a time, for scripts and tests. The
 * calls are those of the server's /tokenize and /detokenize.
 *
 * With --json a line is a JSON string (a text may hold newlines) or an array of ids; without, it is the text itself,
 * and ids are separated by spaces. An answer is written out before the next line is read, so that the command can
 * sit in a pipe. */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cmd.h"
#include "common/check.h"
#include "common/json.h"
#include "common/log.h"
#include "text/tokenizer.h"

#define LINE_MAX_BYTES ((size_t)256 << 20)

typedef struct tokenize_opts {
    bool decode, special, skip_special, json;
} tokenize_opts;

#define OFF(f) offsetof(tokenize_opts, f)
static const tm_opt_row ROWS[] = {
    {"decode", NULL, TM_OPT_BOOL, OFF(decode), "false", 0, 0, NULL, "Ids in, text out."},
    {"special", NULL, TM_OPT_BOOL, OFF(special), "false", 0, 0, NULL,
     "Add the special tokens that the tokenizer puts around a text (BOS, EOS)."},
    {"skip-special", "skip-special-tokens", TM_OPT_BOOL, OFF(skip_special), "false", 0, 0, NULL,
     "With --decode: leave special tokens out."},
    {"json", NULL, TM_OPT_BOOL, OFF(json), "false", 0, 0, NULL,
     "Lines are JSON: strings on one side, arrays of ids on the other."},
};
const tm_opt_table TM_TOKENIZE_OPTIONS = {
    "turbomesh tokenize",
    "turbomesh tokenize MODEL [--decode] [--special] [--json] < LINES",
    "Token ids of each line of standard input, or with --decode the text of each line of ids.",
    ROWS,
    TM_ARRAY_LEN(ROWS),
    1};

/* ---- lines ---- */

/* The next line without its newline; *end at the end of input. */
static tm_status read_line(tm_buf *line, bool *end, tm_err *err)
{
    char piece[1 << 16];
    tm_buf_clear(line);
    *end = false;
    for (;;) {
        /* A text may hold NUL bytes, so the length is not strlen's. */
        size_t n = 0;
        int c = EOF;
        while (n < sizeof(piece) && (c = getc_unlocked(stdin)) != EOF && c != '\n')
            piece[n++] = (char)c;
        if (!tm_buf_append(line, piece, n))
            return TM_FAIL(err, TM_STATUS_TOO_LARGE, "a line of more than %zu bytes",
                           LINE_MAX_BYTES);
        if (c == '\n')
            return TM_OK;
        if (c != EOF)
            continue;
        if (ferror(stdin))
            return TM_FAIL(err, TM_STATUS_IO, "standard input: %m");
        *end = line->len == 0;
        return TM_OK;
    }
}

typedef struct ids {
    int32_t *v;
    size_t count;
} ids;

static tm_status add_id(ids *list, size_t *cap, int64_t id, int32_t vocab, tm_err *err)
{
    if (id < 0 || id >= vocab)
        return TM_FAIL(err, TM_STATUS_INVALID,
                       "the vocabulary of %d tokens does not have the id %lld", vocab,
                       (long long)id);
    if (list->count == *cap) {
        size_t more = *cap ? *cap * 2 : 256;
        int32_t *grown = realloc(list->v, more * sizeof(*grown));
        if (!grown)
            return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
        list->v = grown;
        *cap = more;
    }
    list->v[list->count++] = (int32_t)id;
    return TM_OK;
}

static tm_status json_ids(const json_t *root, ids *list, int32_t vocab, tm_err *err)
{
    size_t cap = 0, i;
    json_t *v;
    if (!json_is_array(root))
        return TM_FAIL(err, TM_STATUS_INVALID, "expected an array of token ids, got %s",
                       tm_json_type_name(root));
    json_array_foreach(root, i, v)
    {
        if (!json_is_integer(v))
            return TM_FAIL(err, TM_STATUS_INVALID, "expected an array of token ids, got %s in it",
                           tm_json_type_name(v));
        TM_TRY(add_id(list, &cap, json_integer_value(v), vocab, err));
    }
    return TM_OK;
}

/* Ids between spaces or commas. */
static tm_status plain_ids(const char *text, ids *list, int32_t vocab, tm_err *err)
{
    size_t cap = 0;
    for (;;) {
        while (isspace((unsigned char)*text) || *text == ',')
            text++;
        if (!*text)
            return TM_OK;
        int64_t id = 0;
        const char *at = text;
        while (isdigit((unsigned char)*at) && at - text < 10)
            id = id * 10 + (*at++ - '0');
        if (at == text || (*at && *at != ',' && !isspace((unsigned char)*at)))
            return TM_FAIL(err, TM_STATUS_INVALID, "expected token ids at '%.40s'", text);
        TM_TRY(add_id(list, &cap, id, vocab, err));
        text = at;
    }
}

/* ---- one line ---- */

static tm_status encode(const tm_tokenizer *t, const tokenize_opts *o, const char *text, size_t len,
                        tm_buf *out, tm_err *err)
{
    const tm_encode_opts opts = {.add_special = o->special};
    ids list = {0};
    if (!tm_utf8_valid(text, len))
        return TM_FAIL(err, TM_STATUS_INVALID, "the text is not valid UTF-8");
    TM_TRY(tm_tokenizer_encode(t, text, len, &opts, &list.v, &list.count, err));
    tm_buf_puts(out, o->json ? "[" : "");
    for (size_t i = 0; i < list.count; i++)
        tm_buf_printf(out, "%s%d", i == 0 ? "" : o->json ? ", " : " ", list.v[i]);
    tm_buf_puts(out, o->json ? "]" : "");
    free(list.v);
    return TM_OK;
}

static tm_status decode(const tm_tokenizer *t, const tokenize_opts *o, const ids *list, tm_buf *out,
                        tm_err *err)
{
    char *text;
    size_t len;
    TM_TRY(tm_tokenizer_decode(t, list->v, list->count, o->skip_special, &text, &len, err));
    if (o->json) {
        tm_jw w;
        tm_jw_init(&w, out);
        tm_jw_strn(&w, text, len);
    } else {
        tm_buf_append(out, text, len);
    }
    free(text);
    return TM_OK;
}

static tm_status json_line(const tm_tokenizer *t, const tokenize_opts *o, const tm_buf *line,
                           tm_buf *out, tm_err *err)
{
    json_t *root = NULL;
    ids list = {0};
    tm_status st = tm_json_parse(line->data, line->len, &root, err);
    if (st != TM_OK)
        return st;
    if (o->decode) {
        st = json_ids(root, &list, tm_tokenizer_vocab(t), err);
        if (st == TM_OK)
            st = decode(t, o, &list, out, err);
    } else if (json_is_string(root)) {
        st = encode(t, o, json_string_value(root), json_string_length(root), out, err);
    } else {
        st = TM_FAIL(err, TM_STATUS_INVALID, "expected a string, got %s", tm_json_type_name(root));
    }
    free(list.v);
    json_decref(root);
    return st;
}

static tm_status one_line(const tm_tokenizer *t, const tokenize_opts *o, const tm_buf *line,
                          tm_buf *out, tm_err *err)
{
    ids list = {0};
    if (o->json)
        return json_line(t, o, line, out, err);
    if (!o->decode)
        return encode(t, o, line->data ? line->data : "", line->len, out, err);
    tm_status st = plain_ids(line->data ? line->data : "", &list, tm_tokenizer_vocab(t), err);
    if (st == TM_OK)
        st = decode(t, o, &list, out, err);
    free(list.v);
    return st;
}

static tm_status write_line(tm_buf *out, tm_err *err)
{
    tm_buf_putc(out, '\n');
    if (out->failed)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    if (fwrite(out->data, 1, out->len, stdout) != out->len || fflush(stdout) != 0)
        return TM_FAIL(err, TM_STATUS_IO, "standard output: %m");
    return TM_OK;
}

static tm_status all_lines(const tm_tokenizer *t, const tokenize_opts *o, tm_err *err)
{
    tm_buf line, out;
    bool end = false;
    size_t number = 0;
    tm_status st = TM_OK;
    tm_buf_init(&line, LINE_MAX_BYTES);
    tm_buf_init(&out, 0);
    while (st == TM_OK) {
        st = read_line(&line, &end, err);
        if (st != TM_OK || end)
            break;
        number++;
        tm_buf_clear(&out);
        if (o->json && line.len == 0)
            continue;
        st = one_line(t, o, &line, &out, err);
        if (st == TM_OK)
            st = write_line(&out, err);
    }
    if (st != TM_OK)
        tm_err_prefix(err, "line %zu", TM_MAX(number, (size_t)1));
    tm_buf_deinit(&line);
    tm_buf_deinit(&out);
    return st;
}

int tm_cmd_tokenize(int argc, char **argv)
{
    tokenize_opts o = {0};
    const char *model;
    int n = 0, code;
    if (!tm_cmd_parse(&TM_TOKENIZE_OPTIONS, argc, argv, &o, &model, &n, &code))
        return code;
    tm_err err = TM_ERR_INIT;
    tm_tokenizer *t;
    tm_log_init("turbomesh", TM_LOG_WARN, TM_LOG_AUTO);
    if (n != 1) {
        TM_FAIL(&err, TM_STATUS_INVALID, "give MODEL");
        return tm_cmd_fail("tokenize", &err);
    }
    if (tm_tokenizer_load(&t, model, &err) != TM_OK)
        return tm_cmd_fail("tokenize", &err);
    tm_status st = all_lines(t, &o, &err);
    tm_tokenizer_destroy(t);
    return st == TM_OK ? 0 : tm_cmd_fail("tokenize", &err);
}
