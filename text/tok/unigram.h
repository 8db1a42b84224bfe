/* The unigram model: of all ways to cut a text into pieces, the one with the highest sum of scores. */
#ifndef TM_TEXT_TOK_UNIGRAM_H
#define TM_TEXT_TOK_UNIGRAM_H

#include "common/status.h"
#include "text/tok/vec.h"

typedef struct tm_unigram tm_unigram;

typedef struct tm_unigram_piece {
    const char *text;
    size_t len;
    int32_t id;
    double score;
    bool always; /* user-defined: taken wherever it stands */
} tm_unigram_piece;

typedef struct tm_unigram_opts {
    double min_score, max_score; /* over the model's normal pieces */
    int32_t unk;                 /* -1 = characters that no piece has are dropped */
    const int32_t *byte_id;      /* 256 ids, -1 = none; NULL = no byte fallback */
    bool single;                 /* sums in single precision, as SentencePiece has them */
} tm_unigram_opts;

tm_status tm_unigram_create(tm_unigram **out, const tm_unigram_piece *pieces, size_t count,
                            const tm_unigram_opts *opts, tm_err *err);
void tm_unigram_destroy(tm_unigram *u);
/* s is valid UTF-8; a failed allocation shows in out->failed. */
void tm_unigram_encode(const tm_unigram *u, const char *s, size_t len, tm_ids *out);

#endif
