/* Byte-pair merging of one piece of text, for every tokenizer that merges pairs by rank.
 *
 * A rule is (left id, right id) -> (rank, id): lists of merges, tiktoken ranks and SentencePiece scores all
 * come down to it. Ranks may be equal (SentencePiece); the leftmost pair wins then. Immutable after
 * tm_bpe_finish, usable from any thread. */
#ifndef TM_TEXT_TOK_BPE_H
#define TM_TEXT_TOK_BPE_H

#include "common/status.h"
#include "text/tok/vec.h"
#include "text/tok/vocab.h"

typedef struct tm_bpe_rule {
    uint64_t pair; /* left << 32 | right; UINT64_MAX = free slot */
    uint32_t rank;
    int32_t id;
} tm_bpe_rule;

typedef struct tm_bpe {
    const tm_vocab *vocab;
    tm_bpe_rule *rules;
    uint32_t mask;
    size_t count;
    /* How a piece becomes its first symbols: raw bytes (true), or characters. */
    bool bytes;
    int32_t byte_id[256]; /* symbol of a byte, -1 = none; with characters: byte fallback */
    bool byte_fallback;   /* characters only */
    int32_t unk;          /* -1 = symbols without an id are dropped */
    bool fuse_unk;        /* a run of unknown symbols is one unk */
    bool whole_first;     /* a piece that is a token is taken without merging */
    /* Replaces a hidden id in the result; NULL = not needed. */
    void (*expand)(const void *ctx, int32_t id, tm_ids *out);
    const void *expand_ctx;
} tm_bpe;

void tm_bpe_init(tm_bpe *b, const tm_vocab *vocab);
void tm_bpe_deinit(tm_bpe *b);
tm_status tm_bpe_reserve(tm_bpe *b, size_t rules, tm_err *err);
/* A later rule for the same pair replaces the earlier one. Room must have been reserved. */
void tm_bpe_add(tm_bpe *b, int32_t left, int32_t right, uint32_t rank, int32_t id);
/* Marks the tokens that their own spelling merges to, so that most words need one lookup. */
tm_status tm_bpe_finish(tm_bpe *b, tm_vocab *vocab, tm_err *err);

/* Appends the ids of one piece; a failed allocation shows in out->failed. */
void tm_bpe_encode(const tm_bpe *b, const char *piece, size_t len, tm_ids *out);
/* The same by merging alone, as if no rule made `id`. While loading. */
void tm_bpe_encode_without(tm_bpe *b, const char *piece, size_t len, int32_t id, tm_ids *out);

#endif
