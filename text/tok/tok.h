/* The inside of a tokenizer, shared by the loaders (hf.c, ...), the encoder (tokenizer.c) and the detokeniser. */
#ifndef TM_TEXT_TOK_TOK_H
#define TM_TEXT_TOK_TOK_H

#include <jansson.h>

#include "text/tok/added.h"
#include "text/tok/bpe.h"
#include "text/tok/norm.h"
#include "text/tok/pretok.h"
#include "text/tok/spnorm.h"
#include "text/tok/unigram.h"
#include "text/tok/vec.h"
#include "text/tok/vocab.h"
#include "text/tokenizer.h"

#define TM_TEXT_BYTES_MAX     ((size_t)256 << 20) /* one text to encode */
#define TM_SPECIAL_NAMES_MAX  64                  /* more are ignored */
#define TM_TOKENIZER_FILE_MAX ((size_t)64 << 20)

typedef struct tm_special_name {
    char *name, *value;
} tm_special_name;

struct tm_tokenizer {
    tm_vocab vocab;
    tm_norm *norm;
    tm_pretok *pretok;
    tm_added added[2]; /* matched on the raw text, on the normalised text */
    tm_bpe bpe;
    tm_unigram *unigram;
    tm_spnorm spnorm; /* SentencePiece models only */
    tm_ids *unused;   /* by id: what an unused piece is written as; NULL = there are none */
    int32_t unused_n;
    /* The model: the ids of one piece. */
    void (*model)(const tm_tokenizer *t, const char *piece, size_t len, tm_ids *out);
    tm_ids prefix, suffix;  /* what add_special puts around the text */
    bool strip_first_space; /* decoding drops one space at the start of the sequence */
    bool strip_all_spaces;  /* ... or all of them */
    bool per_byte;          /* a wrong byte is one U+FFFD (SentencePiece), not a wrong part */
    tm_special_name names[TM_SPECIAL_NAMES_MAX];
    int name_count;
    int32_t eos;
};

/* The small files beside the tokenizer proper; each tree may be NULL. */
typedef struct tm_tok_config {
    json_t *config;   /* tokenizer_config.json */
    json_t *specials; /* special_tokens_map.json */
    json_t *added;    /* added_tokens.json */
    const tm_text_file *files;
    int file_count;
} tm_tok_config;

tm_status tm_tok_config_read(tm_tok_config *out, const tm_text_file *files, int count, tm_err *err);
void tm_tok_config_deinit(tm_tok_config *c);
/* Adds the tokens and names that these files declare. To be called after the vocabulary was indexed. */
tm_status tm_tok_config_apply(const tm_tok_config *c, tm_tokenizer *t, tm_err *err);
/* add_bos_token / add_eos_token where the tokenizer class obeys them (always, if so told): may change prefix
 * and suffix. */
tm_status tm_tok_config_ends(const tm_tok_config *c, tm_tokenizer *t, bool always, tm_err *err);
/* Names a special token, unless the name is taken. */
tm_status tm_tok_name(tm_tokenizer *t, const char *name, const char *value, tm_err *err);
/* Is tokenizer_class this class, or its "Fast" twin? */
bool tm_tok_config_class(const tm_tok_config *c, const char *name);

typedef struct tm_added_spec {
    const char *text;
    size_t len;
    int32_t id; /* -1 = only if the vocabulary has it */
    bool special, normalized, lstrip, rstrip, single_word, guarded;
} tm_added_spec;

/* Declares an added token: gives it its flags, an entry in the vocabulary and a place in the matcher. */
tm_status tm_tok_add(tm_tokenizer *t, const tm_added_spec *a, tm_err *err);
/* The id of a token by its content, added or of the model; -1 = none. */
int32_t tm_tok_lookup(const tm_tokenizer *t, const char *text, size_t len);

const tm_text_file *tm_text_file_find(const tm_text_file *files, int count, const char *name);

/* Loaders: fill *t, which is zeroed but for empty containers. */
tm_status tm_tok_load_hf(tm_tokenizer *t, const tm_text_file *file, const tm_tok_config *c,
                         tm_err *err);
tm_status tm_tok_load_sp(tm_tokenizer *t, const tm_text_file *file, const tm_tok_config *c,
                         tm_err *err);
tm_status tm_tok_load_tiktoken(tm_tokenizer *t, const tm_text_file *file, const tm_tok_config *c,
                               tm_err *err);
tm_status tm_tok_load_tekken(tm_tokenizer *t, const tm_text_file *file, const tm_tok_config *c,
                             tm_err *err);
tm_status tm_tok_load_pair(tm_tokenizer *t, const tm_text_file *file, const tm_tok_config *c,
                           tm_err *err);
/* Byte-level merging where the token with the lowest id wins; the ids [first, end) are in the vocabulary. */
tm_status tm_tok_rank_model(tm_tokenizer *t, int32_t first, int32_t end, tm_err *err);

#endif
