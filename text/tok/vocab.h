/* The table of tokens: id to bytes and spelling to id.
 *
 * Each id has a key (the spelling the model works on; raw bytes for byte-level models) and a piece (the
 * bytes it stands for in text). Ids may have holes. Filled while loading, constant afterwards. */
#ifndef TM_TEXT_TOK_VOCAB_H
#define TM_TEXT_TOK_VOCAB_H

#include "common/buf.h"
#include "common/status.h"

#define TM_VOCAB_IDS_MAX    (1 << 22)
#define TM_TOKEN_LENGTH_MAX (64 << 10)

enum {
    TM_TOKEN_USED = 1,
    TM_TOKEN_SPECIAL = 2, /* left out by skip_special, never recognised in user text */
    TM_TOKEN_ADDED = 4,
    TM_TOKEN_WHOLE = 8,  /* merging the token's own spelling gives the token */
    TM_TOKEN_HIDDEN = 16 /* the model cannot produce it: not found by spelling */
};

typedef struct tm_token {
    uint32_t key, key_len;
    uint32_t piece, piece_len;
    uint8_t flags;
} tm_token;

typedef struct tm_vocab_slot {
    uint32_t hash;
    int32_t id; /* -1 = free */
} tm_vocab_slot;

typedef struct tm_vocab {
    tm_token *tokens;
    int32_t count, cap; /* count = 1 + highest id */
    tm_buf blob;
    tm_vocab_slot *slots;
    uint32_t mask;
} tm_vocab;

void tm_vocab_init(tm_vocab *v);
void tm_vocab_deinit(tm_vocab *v);
/* A token whose id is free. piece NULL = same as key. */
tm_status tm_vocab_add(tm_vocab *v, int32_t id, const char *key, size_t key_len, const char *piece,
                       size_t piece_len, uint8_t flags, tm_err *err);
/* Changes the piece of a token that exists (an added token that renames it). */
tm_status tm_vocab_set_piece(tm_vocab *v, int32_t id, const char *piece, size_t len, tm_err *err);
/* Builds the hash; to be called once, after the last model token. Two ids with one key are refused. */
tm_status tm_vocab_index(tm_vocab *v, tm_err *err);
int32_t tm_vocab_find(const tm_vocab *v, const char *key, size_t len); /* -1 = none */

static inline bool tm_vocab_has(const tm_vocab *v, int32_t id)
{
    return id >= 0 && id < v->count && (v->tokens[id].flags & TM_TOKEN_USED);
}

static inline const char *tm_vocab_key(const tm_vocab *v, int32_t id)
{
    return v->blob.data + v->tokens[id].key;
}

static inline const char *tm_vocab_piece(const tm_vocab *v, int32_t id)
{
    return v->blob.data + v->tokens[id].piece;
}

/* A short printable form of token bytes for error messages: quoted, escaped, cut. */
const char *tm_token_quote(const char *s, size_t len, char out[64]);

#endif
