/* Short pieces (nearly all) merge in a fixed array with a scan for the best pair: O(n^2) with n <= 48 and no
 * allocation. Longer ones go to bpe_long.c. */
#include "text/tok/bpe.h"

#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "text/tok/bpe_rules.h"
#include "text/tok/unicode.h"

#define SHORT_SYMBOLS 48
#define NO_RANK       TM_BPE_NO_RANK

void tm_bpe_init(tm_bpe *b, const tm_vocab *vocab)
{
    *b = (tm_bpe){.vocab = vocab, .unk = -1};
    memset(b->byte_id, 0xFF, sizeof(b->byte_id));
}

void tm_bpe_deinit(tm_bpe *b)
{
    free(b->rules);
    b->rules = NULL;
}

tm_status tm_bpe_reserve(tm_bpe *b, size_t rules, tm_err *err)
{
    size_t size = 16;
    while (size < rules * 2)
        size *= 2;
    b->rules = malloc(size * sizeof(*b->rules));
    if (!b->rules)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for %zu merges", rules);
    memset(b->rules, 0xFF, size * sizeof(*b->rules));
    b->mask = (uint32_t)(size - 1);
    return TM_OK;
}

void tm_bpe_add(tm_bpe *b, int32_t left, int32_t right, uint32_t rank, int32_t id)
{
    tm_bpe_rule *r = tm_bpe_slot(b, tm_bpe_pair(left, right));
    TM_ASSERT(b->count < b->mask);
    b->count += r->pair == UINT64_MAX;
    *r = (tm_bpe_rule){tm_bpe_pair(left, right), rank, id};
}

/* ---- first symbols ------------------------------------------------------------------------------------ */

/* Special tokens are cut out before the model; text that merely spells one must not become it. */
static inline int32_t find_plain(const tm_vocab *v, const char *s, size_t len)
{
    int32_t id = tm_vocab_find(v, s, len);
    return id >= 0 && (v->tokens[id].flags & TM_TOKEN_SPECIAL) ? -1 : id;
}

/* One step of cutting a piece into symbols: writes 1 id, or up to 4 by byte fallback. A character that has
 * no id and no bytes becomes `unk` (-1 when there is none, dropped at the end). */
static int next_symbols(const tm_bpe *b, const char *s, size_t *pos, int32_t out[4])
{
    if (b->bytes) {
        out[0] = b->byte_id[(unsigned char)s[*pos]];
        *pos += 1;
        if (out[0] < 0)
            out[0] = b->unk;
        return 1;
    }
    size_t from = *pos;
    tm_utf8_next(s, pos);
    out[0] = find_plain(b->vocab, s + from, *pos - from);
    if (out[0] >= 0)
        return 1;
    bool all = b->byte_fallback;
    for (size_t i = from; all && i < *pos; i++) {
        out[i - from] = b->byte_id[(unsigned char)s[i]];
        all = out[i - from] >= 0;
    }
    if (all)
        return (int)(*pos - from);
    out[0] = b->unk;
    return 1;
}

static void emit(const tm_bpe *b, int32_t id, int32_t *last, tm_ids *out)
{
    int32_t before = *last;
    *last = id;
    if (id < 0 || (b->fuse_unk && id == b->unk && before == b->unk))
        return;
    if (b->expand && (b->vocab->tokens[id].flags & TM_TOKEN_HIDDEN))
        b->expand(b->expand_ctx, id, out);
    else
        tm_ids_push(out, id);
}

/* ---- short pieces --------------------------------------------------------------------------------------- */

typedef struct short_symbol {
    int32_t id;
    uint32_t rank; /* of merging with the next symbol */
    int32_t merged;
} short_symbol;

static void merge_short(const tm_bpe *b, short_symbol *s, int n, tm_ids *out)
{
    for (int i = 0; i + 1 < n; i++)
        s[i].rank = tm_bpe_rank(b, s[i].id, s[i + 1].id, &s[i].merged);
    s[n - 1].rank = NO_RANK;
    for (;;) {
        int best = 0;
        for (int i = 1; i < n; i++)
            if (s[i].rank < s[best].rank)
                best = i;
        if (s[best].rank == NO_RANK)
            break;
        s[best].id = s[best].merged;
        memmove(s + best + 1, s + best + 2, (size_t)(n - best - 2) * sizeof(*s));
        n--;
        s[best].rank =
            best + 1 < n ? tm_bpe_rank(b, s[best].id, s[best + 1].id, &s[best].merged) : NO_RANK;
        if (best > 0)
            s[best - 1].rank = tm_bpe_rank(b, s[best - 1].id, s[best].id, &s[best - 1].merged);
    }
    int32_t last = -1;
    for (int i = 0; i < n; i++)
        emit(b, s[i].id, &last, out);
}

/* ---- long pieces ---------------------------------------------------------------------------------------- */

static void encode_long(const tm_bpe *b, const char *s, size_t pos, size_t len,
                        const short_symbol *head, int head_n, tm_ids *out)
{
    tm_ids symbols = {0}, merged = {0};
    for (int i = 0; i < head_n; i++)
        tm_ids_push(&symbols, head[i].id);
    while (pos < len && !symbols.failed) {
        int32_t sym[4];
        int n = next_symbols(b, s, &pos, sym);
        for (int i = 0; i < n; i++)
            tm_ids_push(&symbols, sym[i]);
    }
    if (!symbols.failed)
        tm_bpe_merge_long(b, symbols.v, symbols.n, &merged);
    int32_t last = -1;
    for (size_t i = 0; i < merged.n; i++)
        emit(b, merged.v[i], &last, out);
    out->failed |= symbols.failed || merged.failed;
    tm_ids_deinit(&symbols);
    tm_ids_deinit(&merged);
}

/* ---- one piece ------------------------------------------------------------------------------------------ */

static void merge_piece(const tm_bpe *b, const char *piece, size_t len, tm_ids *out)
{
    short_symbol sym[SHORT_SYMBOLS + 4];
    int n = 0;
    size_t pos = 0;
    while (pos < len && n < SHORT_SYMBOLS) {
        int32_t ids[4];
        int k = next_symbols(b, piece, &pos, ids);
        for (int i = 0; i < k; i++)
            sym[n++].id = ids[i];
    }
    if (pos < len)
        encode_long(b, piece, pos, len, sym, n, out);
    else if (n > 0)
        merge_short(b, sym, n, out);
}

void tm_bpe_encode(const tm_bpe *b, const char *piece, size_t len, tm_ids *out)
{
    int32_t id = find_plain(b->vocab, piece, len);
    if (id >= 0 && (b->whole_first || (b->vocab->tokens[id].flags & TM_TOKEN_WHOLE)))
        tm_ids_push(out, id);
    else
        merge_piece(b, piece, len, out);
}

void tm_bpe_encode_without(tm_bpe *b, const char *piece, size_t len, int32_t id, tm_ids *out)
{
    uint32_t rank = NO_RANK;
    for (uint32_t i = 0; i <= b->mask; i++) {
        if (b->rules[i].pair != UINT64_MAX && b->rules[i].id == id) {
            rank = b->rules[i].rank;
            b->rules[i].rank = NO_RANK;
        }
    }
    merge_piece(b, piece, len, out);
    for (uint32_t i = 0; i <= b->mask; i++)
        if (b->rules[i].pair != UINT64_MAX && b->rules[i].id == id)
            b->rules[i].rank = rank;
}

tm_status tm_bpe_finish(tm_bpe *b, tm_vocab *vocab, tm_err *err)
{
    tm_ids ids = {0};
    for (int32_t id = 0; id < vocab->count && !ids.failed; id++) {
        tm_token *t = &vocab->tokens[id];
        if (!(t->flags & TM_TOKEN_USED) || (t->flags & TM_TOKEN_HIDDEN) || t->key_len == 0)
            continue;
        ids.n = 0;
        merge_piece(b, tm_vocab_key(vocab, id), t->key_len, &ids);
        if (ids.n == 1 && ids.v[0] == id)
            t->flags |= TM_TOKEN_WHOLE;
    }
    bool failed = ids.failed;
    tm_ids_deinit(&ids);
    return failed ? TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for the vocabulary") : TM_OK;
}
