/* tiktoken's ranks: lines of base64 and a number. The file has neither pattern nor special tokens: they stand
 * in the publishers' code, so here is a table of the published vocabularies, told apart by their size.
 *
 * tiktoken merges the neighbours whose bytes together have the lowest rank; over the vocabulary that is a
 * list of pairs, as for SentencePiece. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/hash.h"
#include "text/tok/tok.h"

#define TOKEN_MAX 1024 /* the longest published tokens have 128 bytes */
#define RULES_MAX ((size_t)16 << 20)

#define CONTRACTIONS "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#define REST         "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define QWEN2        CONTRACTIONS "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" REST
#define LLAMA3       CONTRACTIONS "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}" REST
#define UPPER        "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER        "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define O200K                                                                                      \
    "[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "+" CONTRACTIONS "?|[^\\r\\n\\p{L}\\p{N}]?" UPPER     \
    "+" LOWER "*" CONTRACTIONS "?|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|"      \
    "\\s+(?!\\S)|\\s+"

typedef struct special_run {
    int32_t id;
    const char *text; /* %d counts from `from` */
    int from, count;  /* count 0 = one token, taken as it is */
} special_run;

static const struct {
    const char *name;
    int32_t ranks;
    const char *pattern;
    bool nfc;
    const char *bos, *eos;
    const char *prefix[2]; /* what encoding with special tokens begins with */
    special_run specials[24];
} rows[] = {
    {"qwen",
     151643,
     QWEN2,
     true,
     NULL,
     "<|endoftext|>",
     {NULL},
     {{151643, "<|endoftext|>", 0, 0},
      {151644, "<|im_start|>", 0, 0},
      {151645, "<|im_end|>", 0, 0},
      {151646, "<|extra_%d|>", 0, 205}}},
    {"llama3",
     128000,
     LLAMA3,
     false,
     "<|begin_of_text|>",
     "<|end_of_text|>",
     {"<|begin_of_text|>"},
     {{128000, "<|begin_of_text|>", 0, 0},
      {128001, "<|end_of_text|>", 0, 0},
      {128002, "<|reserved_special_token_%d|>", 0, 4},
      {128006, "<|start_header_id|>", 0, 0},
      {128007, "<|end_header_id|>", 0, 0},
      {128008, "<|reserved_special_token_%d|>", 4, 1},
      {128009, "<|eot_id|>", 0, 0},
      {128010, "<|reserved_special_token_%d|>", 5, 246}}},
    {"glm4",
     151329,
     LLAMA3,
     false,
     NULL,
     "<|endoftext|>",
     {"[gMASK]", "<sop>"},
     {{151329, "<|endoftext|>", 0, 0},
      {151330, "[MASK]", 0, 0},
      {151331, "[gMASK]", 0, 0},
      {151332, "[sMASK]", 0, 0},
      {151333, "<sop>", 0, 0},
      {151334, "<eop>", 0, 0},
      {151335, "<|system|>", 0, 0},
      {151336, "<|user|>", 0, 0},
      {151337, "<|assistant|>", 0, 0},
      {151338, "<|observation|>", 0, 0},
      {151339, "<|begin_of_image|>", 0, 0},
      {151340, "<|end_of_image|>", 0, 0},
      {151341, "<|begin_of_video|>", 0, 0},
      {151342, "<|end_of_video|>", 0, 0}}},
    {"cl100k",
     100256,
     LLAMA3,
     false,
     NULL,
     "<|endoftext|>",
     {NULL},
     {{100257, "<|endoftext|>", 0, 0},
      {100258, "<|fim_prefix|>", 0, 0},
      {100259, "<|fim_middle|>", 0, 0},
      {100260, "<|fim_suffix|>", 0, 0},
      {100276, "<|endofprompt|>", 0, 0},
      {100278, "<|im_start|>", 0, 0},
      {100279, "<|im_end|>", 0, 0}}},
    {"o200k",
     199998,
     O200K,
     false,
     NULL,
     "<|endoftext|>",
     {NULL},
     {{199999, "<|endoftext|>", 0, 0}, {200018, "<|endofprompt|>", 0, 0}}},
};

/* ---- the file ------------------------------------------------------------------------------------------- */

static tm_status add_line(tm_tokenizer *t, const char *s, size_t len, tm_err *err)
{
    char bytes[TOKEN_MAX + 3];
    size_t n, id = 0;
    const char *space = memchr(s, ' ', len);
    size_t text = space ? (size_t)(space - s) : 0;
    if (text > TOKEN_MAX / 3 * 4)
        return TM_FAIL(err, TM_STATUS_TOO_LARGE, "a token has more than %d bytes", TOKEN_MAX);
    if (!space || text + 1 == len || len - text > 9 || !tm_base64_bytes(bytes, &n, s, text) ||
        n == 0)
        return TM_FAIL(err, TM_STATUS_DATA, "expected a token in base64 and its rank");
    for (size_t i = text + 1; i < len; i++) {
        if (s[i] < '0' || s[i] > '9')
            return TM_FAIL(err, TM_STATUS_DATA, "expected a token in base64 and its rank");
        id = id * 10 + (size_t)(s[i] - '0');
    }
    return tm_vocab_add(&t->vocab, (int32_t)id, bytes, n, NULL, 0, 0, err);
}

static tm_status load_ranks(tm_tokenizer *t, const char *s, size_t len, tm_err *err)
{
    size_t line = 1;
    for (size_t pos = 0; pos < len; line++) {
        const char *end = memchr(s + pos, '\n', len - pos);
        size_t stop = end ? (size_t)(end - s) : len, n = stop - pos;
        if (n > 0 && s[stop - 1] == '\r')
            n--;
        tm_status st = n > 0 ? add_line(t, s + pos, n, err) : TM_OK;
        if (st != TM_OK) {
            tm_err_prefix(err, "line %zu", line);
            return st;
        }
        pos = stop + 1;
    }
    if (t->vocab.count == 0)
        return TM_FAIL(err, TM_STATUS_DATA, "has no tokens");
    return tm_vocab_index(&t->vocab, err);
}

/* add false: only counts. */
static size_t each_rule(tm_tokenizer *t, int32_t first, int32_t end, bool add)
{
    const tm_vocab *v = &t->vocab;
    size_t n = 0;
    for (int32_t id = first; id < end; id++) {
        if (!tm_vocab_has(v, id))
            continue;
        const char *s = tm_vocab_key(v, id);
        size_t len = v->tokens[id].key_len;
        for (size_t at = 1; at < len; at++) {
            int32_t left = tm_vocab_find(v, s, at);
            int32_t right = left < 0 ? -1 : tm_vocab_find(v, s + at, len - at);
            if (right < 0)
                continue;
            if (add)
                tm_bpe_add(&t->bpe, left, right, (uint32_t)id, id);
            n++;
        }
    }
    return n;
}

static void model_bpe(const tm_tokenizer *t, const char *piece, size_t len, tm_ids *out)
{
    tm_bpe_encode(&t->bpe, piece, len, out);
}

tm_status tm_tok_rank_model(tm_tokenizer *t, int32_t first, int32_t end, tm_err *err)
{
    tm_bpe *b = &t->bpe;
    for (int i = 0; i < 256; i++) {
        char c = (char)i;
        b->byte_id[i] = tm_vocab_find(&t->vocab, &c, 1);
        if (b->byte_id[i] < 0)
            return TM_FAIL(err, TM_STATUS_DATA, "has no token for the byte 0x%02X", i);
    }
    size_t rules = each_rule(t, first, end, false);
    if (rules > RULES_MAX)
        return TM_FAIL(err, TM_STATUS_TOO_LARGE, "the ranks make %zu merges, at most %zu", rules,
                       RULES_MAX);
    TM_TRY(tm_bpe_reserve(b, rules, err));
    each_rule(t, first, end, true);
    b->whole_first = true;
    t->model = model_bpe;
    return tm_bpe_finish(b, &t->vocab, err);
}

/* ---- special tokens ------------------------------------------------------------------------------------- */

static tm_status add_special(tm_tokenizer *t, int32_t id, const char *text, tm_err *err)
{
    return tm_tok_add(
        t, &(tm_added_spec){.text = text, .len = strlen(text), .id = id, .special = true}, err);
}

static tm_status add_specials(tm_tokenizer *t, size_t row, tm_err *err)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(rows[row].specials); i++) {
        const special_run *r = &rows[row].specials[i];
        if (!r->text)
            break;
        if (r->count == 0)
            TM_TRY(add_special(t, r->id, r->text, err));
        const char *number = strstr(r->text, "%d");
        for (int k = 0; k < r->count; k++) {
            char text[64];
            snprintf(text, sizeof(text), "%.*s%d%s", (int)(number - r->text), r->text, r->from + k,
                     number + 2);
            TM_TRY(add_special(t, r->id + k, text, err));
        }
    }
    return TM_OK;
}

static tm_status set_ends(tm_tokenizer *t, size_t row, const tm_tok_config *c, tm_err *err)
{
    if (rows[row].bos)
        TM_TRY(tm_tok_name(t, "bos_token", rows[row].bos, err));
    TM_TRY(tm_tok_name(t, "eos_token", rows[row].eos, err));
    const char *eos = tm_tokenizer_special(t, "eos_token");
    t->eos = tm_tok_lookup(t, eos, strlen(eos));
    for (int i = 0; i < 2 && rows[row].prefix[i]; i++)
        tm_ids_push(&t->prefix, tm_tok_lookup(t, rows[row].prefix[i], strlen(rows[row].prefix[i])));
    return t->prefix.failed ? TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory")
                            : tm_tok_config_ends(c, t, true, err);
}

tm_status tm_tok_load_tiktoken(tm_tokenizer *t, const tm_text_file *file, const tm_tok_config *c,
                               tm_err *err)
{
    t->bpe.bytes = true;
    TM_TRY(load_ranks(t, file->data, file->len, err));
    int32_t count = t->vocab.count;
    size_t row = 0;
    while (row < TM_ARRAY_LEN(rows) && rows[row].ranks != count)
        row++;
    if (row == TM_ARRAY_LEN(rows))
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "%d ranks: no published vocabulary of this size is known", (int)count);
    if (rows[row].nfc)
        TM_TRY(tm_norm_create_form(&t->norm, TM_UC_NFC, err));
    else
        TM_TRY(tm_norm_create(&t->norm, NULL, err));
    TM_TRY(tm_pretok_create_split(&t->pretok, rows[row].pattern, err));
    TM_TRY(add_specials(t, row, err));
    TM_TRY(tm_tok_config_apply(c, t, err));
    TM_TRY(set_ends(t, row, c, err));
    return tm_tok_rank_model(t, 0, count, err);
}
