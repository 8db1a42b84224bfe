/* JSON files of a model, read as a stream of events.
 *
 * jansson refuses NUL in object keys and integers of 2^63 and more; tokenizer files have both. Here they
 * are read: the tree is still jansson's, big integers become reals, and the two huge parts of
 * tokenizer.json (model.vocab, model.merges) go to flat tables instead of the tree. */
#ifndef TM_TEXT_TOK_JREAD_H
#define TM_TEXT_TOK_JREAD_H

#include <jansson.h>

#include "common/buf.h"
#include "common/status.h"

#define TM_JREAD_MERGES_MAX (4 << 20)

typedef struct tm_vocab_entry {
    size_t text; /* offset in blob */
    uint32_t len;
    int32_t id;   /* the value of an object entry, the index of an array entry */
    double score; /* array entries only */
} tm_vocab_entry;

typedef struct tm_merge_entry {
    size_t text; /* left, then right */
    uint32_t left_len, right_len;
} tm_merge_entry;

typedef struct tm_tokenizer_file {
    json_t *tree; /* without the two parts below */
    tm_buf blob;
    tm_vocab_entry *vocab;
    size_t vocab_n, vocab_cap;
    bool vocab_is_array; /* Unigram: [[text, score], ...] */
    tm_merge_entry *merges;
    size_t merges_n, merges_cap;
    bool has_merges; /* the key is there, though it may be empty */
} tm_tokenizer_file;

tm_status tm_tokenizer_file_read(tm_tokenizer_file *out, const char *data, size_t len, tm_err *err);
void tm_tokenizer_file_deinit(tm_tokenizer_file *f);

/* The whole text as one jansson tree. */
tm_status tm_jread_tree(const char *data, size_t len, json_t **out, tm_err *err);

#endif
