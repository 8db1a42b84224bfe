/* yajl gives events; a small stack of open containers turns them into a jansson tree. While the path is
 * model.vocab or model.merges, events go to the tables. Depth, entries and lengths are bounded here, before
 * anything is built from them. */
#include "text/tok/jread.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <yajl/yajl_parse.h>

#include "common/check.h"
#include "common/file.h"
#include "common/json.h"
#include "text/tok/vocab.h"

#define DEPTH_MAX 64

typedef enum part { PART_TREE, PART_VOCAB, PART_MERGES } part;

typedef struct reader {
    tm_tokenizer_file *file; /* NULL = no parts are taken out */
    json_t *root, *open[DEPTH_MAX];
    int depth;
    char *key[DEPTH_MAX]; /* pending key of each open object */
    size_t key_len[DEPTH_MAX];
    bool in_model; /* inside the value of the key "model" */
    part part;
    int part_depth; /* containers open inside the part, itself included */
    int in_entry;   /* values seen in the entry array at hand */
    size_t key_at;  /* vocab object: text of the pending entry */
    uint32_t key_size;
    tm_status status;
    tm_err *err;
} reader;

static int fail(reader *r, tm_status st, const char *what, size_t index)
{
    r->status = index == SIZE_MAX
                    ? TM_FAIL(r->err, st, "%s", what)
                    : TM_FAIL(r->err, st, "%s[%zu]: expected %s",
                              r->part == PART_VOCAB ? "model.vocab" : "model.merges", index, what);
    return 0;
}

static int no_memory(reader *r)
{
    return fail(r, TM_STATUS_NO_MEMORY, "out of memory", SIZE_MAX);
}

/* ---- tables --------------------------------------------------------------------------------------------- */

static int add_vocab(reader *r, size_t text, uint32_t len, int64_t id, double score)
{
    tm_tokenizer_file *f = r->file;
    if (f->vocab_n >= TM_VOCAB_IDS_MAX || id < 0 || id >= TM_VOCAB_IDS_MAX) {
        char q[64];
        r->status = TM_FAIL(
            r->err, TM_STATUS_DATA, "model.vocab: %s has id %lld, allowed are 0..%d",
            tm_token_quote(f->blob.data + text, len, q), (long long)id, TM_VOCAB_IDS_MAX - 1);
        return 0;
    }
    if (f->vocab_n == f->vocab_cap) {
        size_t cap = f->vocab_cap ? f->vocab_cap * 2 : 4096;
        tm_vocab_entry *v = realloc(f->vocab, cap * sizeof(*v));
        if (!v)
            return no_memory(r);
        f->vocab = v;
        f->vocab_cap = cap;
    }
    f->vocab[f->vocab_n++] = (tm_vocab_entry){text, len, (int32_t)id, score};
    return 1;
}

static int add_merge(reader *r, tm_merge_entry m)
{
    tm_tokenizer_file *f = r->file;
    if (f->merges_n >= TM_JREAD_MERGES_MAX)
        return fail(r, TM_STATUS_TOO_LARGE, "model.merges: more than 4194304 entries", SIZE_MAX);
    if (f->merges_n == f->merges_cap) {
        size_t cap = f->merges_cap ? f->merges_cap * 2 : 4096;
        tm_merge_entry *v = realloc(f->merges, cap * sizeof(*v));
        if (!v)
            return no_memory(r);
        f->merges = v;
        f->merges_cap = cap;
    }
    f->merges[f->merges_n++] = m;
    return 1;
}

/* "a b" */
static int add_joined_merge(reader *r, const char *s, size_t len)
{
    const char *gap = memchr(s, ' ', len);
    size_t left = gap ? (size_t)(gap - s) : 0, right = gap ? len - left - 1 : 0;
    if (!left || !right || memchr(gap + 1, ' ', right))
        return fail(r, TM_STATUS_DATA, "two words with one space between them", r->file->merges_n);
    size_t at = r->file->blob.len;
    tm_buf_append(&r->file->blob, s, left);
    if (!tm_buf_append(&r->file->blob, gap + 1, right))
        return no_memory(r);
    return add_merge(r, (tm_merge_entry){at, (uint32_t)left, (uint32_t)right});
}

static int part_string(reader *r, const char *s, size_t len)
{
    tm_tokenizer_file *f = r->file;
    if (len > TM_TOKEN_LENGTH_MAX)
        return fail(r, TM_STATUS_TOO_LARGE, "a shorter string",
                    r->part == PART_VOCAB ? f->vocab_n : f->merges_n);
    if (r->part == PART_MERGES && r->part_depth == 1)
        return add_joined_merge(r, s, len);
    bool vocab = r->part == PART_VOCAB;
    if (r->part_depth != 2 || r->in_entry > (vocab ? 0 : 1))
        return fail(r, TM_STATUS_DATA, vocab ? "an id or [string, number]" : "two strings",
                    vocab ? f->vocab_n : f->merges_n);
    if (r->in_entry++ == 0) {
        r->key_at = f->blob.len;
        r->key_size = (uint32_t)len;
    }
    if (!tm_buf_append(&f->blob, s, len))
        return no_memory(r);
    return vocab || r->in_entry == 1
               ? 1
               : add_merge(r, (tm_merge_entry){r->key_at, r->key_size, (uint32_t)len});
}

static int part_number(reader *r, const char *s, double v)
{
    tm_tokenizer_file *f = r->file;
    if (r->part != PART_VOCAB)
        return fail(r, TM_STATUS_DATA, "two strings", f->merges_n);
    if (!f->vocab_is_array) {
        if (strspn(s, "0123456789") != strlen(s) || v >= TM_VOCAB_IDS_MAX)
            return fail(r, TM_STATUS_DATA, "an id below 4194304", f->vocab_n);
        return add_vocab(r, r->key_at, r->key_size, (int64_t)v, 0);
    }
    if (r->part_depth != 2 || r->in_entry++ != 1)
        return fail(r, TM_STATUS_DATA, "[string, number]", f->vocab_n);
    return add_vocab(r, r->key_at, r->key_size, (int64_t)f->vocab_n, v);
}

static int part_open(reader *r, bool array)
{
    tm_tokenizer_file *f = r->file;
    bool object_vocab = r->part == PART_VOCAB && r->part_depth > 0 && !f->vocab_is_array;
    if (!array || r->part_depth >= 2 || object_vocab)
        return fail(r, TM_STATUS_DATA,
                    r->part == PART_VOCAB ? "an id or [string, number]" : "two strings",
                    r->part == PART_VOCAB ? f->vocab_n : f->merges_n);
    r->part_depth++;
    r->in_entry = 0;
    return 1;
}

static int part_close(reader *r)
{
    tm_tokenizer_file *f = r->file;
    if (r->part_depth == 2 && r->in_entry != 2)
        return fail(r, TM_STATUS_DATA, r->part == PART_VOCAB ? "[string, number]" : "two strings",
                    r->part == PART_VOCAB ? f->vocab_n : f->merges_n);
    if (--r->part_depth == 0)
        r->part = PART_TREE;
    return 1;
}

/* ---- tree ----------------------------------------------------------------------------------------------- */

static bool key_is(const reader *r, int level, const char *name)
{
    return r->key[level] && r->key_len[level] == strlen(name) &&
           memcmp(r->key[level], name, r->key_len[level]) == 0;
}

/* Does the container that opens now begin one of the parts? */
static part begins_part(const reader *r)
{
    if (!r->file || r->depth != 2 || !r->in_model)
        return PART_TREE;
    if (key_is(r, 1, "vocab"))
        return PART_VOCAB;
    return key_is(r, 1, "merges") ? PART_MERGES : PART_TREE;
}

/* Takes over v. */
static int place(reader *r, json_t *v)
{
    if (!v)
        return no_memory(r);
    if (r->depth == 0) {
        r->root = v;
        return 1;
    }
    json_t *top = r->open[r->depth - 1];
    int rc;
    if (json_is_array(top)) {
        rc = json_array_append_new(top, v);
    } else {
        char **key = &r->key[r->depth - 1];
        rc = json_object_setn_new_nocheck(top, *key, r->key_len[r->depth - 1], v);
        free(*key);
        *key = NULL;
    }
    return rc == 0 ? 1 : no_memory(r);
}

static int open_container(reader *r, json_t *v)
{
    if (r->depth == DEPTH_MAX) {
        json_decref(v);
        return fail(r, TM_STATUS_DATA, "nested more than 64 deep", SIZE_MAX);
    }
    bool model = r->depth == 1 && key_is(r, 0, "model");
    if (!place(r, v))
        return 0;
    r->in_model |= model;
    r->open[r->depth++] = v;
    return 1;
}

static int begin_part(reader *r, part p, bool array)
{
    r->part = p;
    r->part_depth = 1;
    free(r->key[1]);
    r->key[1] = NULL;
    if (p == PART_VOCAB)
        r->file->vocab_is_array = array;
    else if (!array)
        return fail(r, TM_STATUS_DATA, "model.merges: expected an array, got an object", SIZE_MAX);
    else
        r->file->has_merges = true;
    return 1;
}

static int on_null(void *ctx)
{
    reader *r = ctx;
    if (r->part == PART_TREE)
        return place(r, json_null());
    return fail(r, TM_STATUS_DATA, "no null",
                r->part == PART_VOCAB ? r->file->vocab_n : r->file->merges_n);
}

static int on_bool(void *ctx, int v)
{
    reader *r = ctx;
    if (r->part == PART_TREE)
        return place(r, json_boolean(v));
    return fail(r, TM_STATUS_DATA, "no boolean",
                r->part == PART_VOCAB ? r->file->vocab_n : r->file->merges_n);
}

static int on_number(void *ctx, const char *s, size_t len)
{
    reader *r = ctx;
    char text[64];
    if (len >= sizeof(text))
        return fail(r, TM_STATUS_DATA, "a number of more than 63 digits", SIZE_MAX);
    memcpy(text, s, len);
    text[len] = 0;
    double d = strtod(text, NULL);
    if (!(d <= 1.7976931348623157e308 && d >= -1.7976931348623157e308))
        return fail(r, TM_STATUS_DATA, "a number is too large", SIZE_MAX);
    if (r->part != PART_TREE)
        return part_number(r, text, d);
    errno = 0;
    long long i = strtoll(text, NULL, 10);
    bool whole = !strpbrk(text, ".eE") && errno == 0;
    return place(r, whole ? json_integer(i) : json_real(d));
}

static bool is_text(reader *r, const unsigned char *s, size_t len)
{
    return tm_utf8_valid((const char *)s, len) ||
           fail(r, TM_STATUS_DATA, "a string holds a lone surrogate", SIZE_MAX);
}

static int on_string(void *ctx, const unsigned char *s, size_t len)
{
    reader *r = ctx;
    if (!is_text(r, s, len))
        return 0;
    if (r->part != PART_TREE)
        return part_string(r, (const char *)s, len);
    return place(r, json_stringn_nocheck((const char *)s, len));
}

static int on_key(void *ctx, const unsigned char *s, size_t len)
{
    reader *r = ctx;
    if (!is_text(r, s, len))
        return 0;
    if (r->part == PART_VOCAB) {
        if (len > TM_TOKEN_LENGTH_MAX)
            return fail(r, TM_STATUS_TOO_LARGE, "a shorter key", r->file->vocab_n);
        r->key_at = r->file->blob.len;
        r->key_size = (uint32_t)len;
        return tm_buf_append(&r->file->blob, s, len) ? 1 : no_memory(r);
    }
    char *key = malloc(len + 1);
    if (!key)
        return no_memory(r);
    memcpy(key, s, len);
    key[len] = 0;
    free(r->key[r->depth - 1]);
    r->key[r->depth - 1] = key;
    r->key_len[r->depth - 1] = len;
    return 1;
}

static int on_open_object(void *ctx)
{
    reader *r = ctx;
    if (r->part != PART_TREE)
        return part_open(r, false);
    part p = begins_part(r);
    return p != PART_TREE ? begin_part(r, p, false) : open_container(r, json_object());
}

static int on_open_array(void *ctx)
{
    reader *r = ctx;
    if (r->part != PART_TREE)
        return part_open(r, true);
    part p = begins_part(r);
    return p != PART_TREE ? begin_part(r, p, true) : open_container(r, json_array());
}

static int on_close(void *ctx)
{
    reader *r = ctx;
    if (r->part != PART_TREE)
        return part_close(r);
    if (--r->depth < 2)
        r->in_model = false;
    return 1;
}

/* ---- running -------------------------------------------------------------------------------------------- */

static tm_status report(reader *r, yajl_handle h, const char *data, size_t len)
{
    if (r->status != TM_OK)
        return r->status;
    const char *disguise = tm_file_disguise(data, len);
    if (disguise)
        return TM_FAIL(r->err, TM_STATUS_DATA, "not JSON: %s", disguise);
    size_t at = yajl_get_bytes_consumed(h), line = 1;
    for (size_t i = 0; i < at && i < len; i++)
        line += data[i] == '\n';
    unsigned char *text = yajl_get_error(h, 0, NULL, 0);
    char why[120] = "not JSON";
    if (text) {
        size_t n = strcspn((const char *)text, "\n");
        n = n < sizeof(why) - 1 ? n : sizeof(why) - 1;
        memcpy(why, text, n);
        why[n] = 0;
        yajl_free_error(h, text);
    }
    return TM_FAIL(r->err, TM_STATUS_DATA, "not JSON: line %zu: %s", line, why);
}

static tm_status read_all(reader *r, const char *data, size_t len)
{
    static const yajl_callbacks calls = {.yajl_null = on_null,
                                         .yajl_boolean = on_bool,
                                         .yajl_number = on_number,
                                         .yajl_string = on_string,
                                         .yajl_start_map = on_open_object,
                                         .yajl_map_key = on_key,
                                         .yajl_end_map = on_close,
                                         .yajl_start_array = on_open_array,
                                         .yajl_end_array = on_close};
    yajl_handle h = yajl_alloc(&calls, NULL, r);
    if (!h)
        return TM_FAIL(r->err, TM_STATUS_NO_MEMORY, "out of memory");
    tm_status st = TM_OK;
    if (yajl_parse(h, (const unsigned char *)data, len) != yajl_status_ok ||
        yajl_complete_parse(h) != yajl_status_ok)
        st = report(r, h, data, len);
    else if (!r->root)
        st = TM_FAIL(r->err, TM_STATUS_DATA, "not JSON: the file is empty");
    yajl_free(h);
    for (int i = 0; i < DEPTH_MAX; i++)
        free(r->key[i]);
    if (st != TM_OK)
        json_decref(r->root);
    return st;
}

tm_status tm_jread_tree(const char *data, size_t len, json_t **out, tm_err *err)
{
    reader r = {.err = err};
    TM_TRY(read_all(&r, data, len));
    *out = r.root;
    return TM_OK;
}

tm_status tm_tokenizer_file_read(tm_tokenizer_file *out, const char *data, size_t len, tm_err *err)
{
    tm_tokenizer_file f = {0};
    tm_buf_init(&f.blob, 0);
    reader r = {.file = &f, .err = err};
    tm_status st = read_all(&r, data, len);
    if (st != TM_OK) {
        tm_tokenizer_file_deinit(&f);
        return st;
    }
    f.tree = r.root;
    *out = f;
    return TM_OK;
}

void tm_tokenizer_file_deinit(tm_tokenizer_file *f)
{
    json_decref(f->tree);
    tm_buf_deinit(&f->blob);
    free(f->vocab);
    free(f->merges);
    *f = (tm_tokenizer_file){0};
}
