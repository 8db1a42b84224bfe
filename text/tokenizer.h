/* Tokenizers: text to ids and back. One interface, several kinds behind a table of functions (tokenizer.json,
 * SentencePiece's tokenizer.model, tiktoken's ranks).
 *
 * A tokenizer is immutable after loading and may be used from any thread. Text is (pointer, length) and may
 * hold NUL. Files are input: unknown components, merges that name unknown tokens and values over the
 * limits are refused with a line that names them. */
#ifndef TM_TEXT_TOKENIZER_H
#define TM_TEXT_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

typedef struct tm_tokenizer tm_tokenizer;

/* A model's text files in memory: from a folder, or fetched from a worker (GetModelAssets). */
typedef struct tm_text_file {
    const char *name; /* "tokenizer.json" */
    const char *data;
    size_t len;
} tm_text_file;

tm_status tm_tokenizer_create(tm_tokenizer **out, const tm_text_file *files, int count,
                              tm_err *err);
tm_status tm_tokenizer_load(tm_tokenizer **out, const char *dir, tm_err *err);
void tm_tokenizer_destroy(tm_tokenizer *t);

/* Byte ranges of the text that came from a user: no special token is recognised in them (see
 * reference: user text must not become control tokens). Ascending, not overlapping. */
typedef struct tm_text_span {
    size_t begin, end;
} tm_text_span;

typedef struct tm_encode_opts {
    bool add_special;          /* BOS/EOS as the tokenizer would add them */
    bool plain;                /* special tokens are ordinary text everywhere */
    const tm_text_span *input; /* parts that are plain although the rest is not */
    size_t input_count;
} tm_encode_opts;

/* *ids is malloc'ed, freed by the caller. */
tm_status tm_tokenizer_encode(const tm_tokenizer *t, const char *text, size_t len,
                              const tm_encode_opts *opts, int32_t **ids, size_t *count,
                              tm_err *err);

/* Raw bytes of one token (byte map inverted), valid as long as t; NULL when the id is unknown. */
const char *tm_tokenizer_piece(const tm_tokenizer *t, int32_t id, size_t *len);
bool tm_tokenizer_is_special(const tm_tokenizer *t, int32_t id);
int32_t tm_tokenizer_id(const tm_tokenizer *t, const char *token, size_t len); /* -1 = none */
int32_t tm_tokenizer_vocab(const tm_tokenizer *t);                             /* 1 + highest id */
int32_t tm_tokenizer_eos(const tm_tokenizer *t);                               /* -1 = none */
/* Named special tokens for templates ("bos_token", "eos_token", ...); NULL = none. */
const char *tm_tokenizer_special(const tm_tokenizer *t, const char *name);

/* Whole decode; each maximal invalid UTF-8 part becomes U+FFFD. *text is malloc'ed, NUL-terminated. */
tm_status tm_tokenizer_decode(const tm_tokenizer *t, const int32_t *ids, size_t count,
                              bool skip_special, char **text, size_t *len, tm_err *err);

#endif
