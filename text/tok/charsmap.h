/* SentencePiece's precompiled normalisation: a double-array trie from byte strings to replacements. */
#ifndef TM_TEXT_TOK_CHARSMAP_H
#define TM_TEXT_TOK_CHARSMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/buf.h"
#include "common/status.h"

typedef struct tm_charsmap {
    uint32_t *units;
    size_t unit_count;
    char *text; /* replacements, each with a NUL behind */
    size_t text_len;
} tm_charsmap;

/* An empty blob is a map without entries. */
tm_status tm_charsmap_read(tm_charsmap *out, const char *blob, size_t len, tm_err *err);
void tm_charsmap_deinit(tm_charsmap *m);

/* The replacement for the longest (or shortest) key that s begins with; *used is the key's length. NULL =
 * no key. */
const char *tm_charsmap_find(const tm_charsmap *m, const char *s, size_t len, bool longest,
                             size_t *used);

/* Appends valid UTF-8 text with its longest keys replaced, as SentencePiece does. */
bool tm_charsmap_apply(const tm_charsmap *m, const char *s, size_t len, tm_buf *out);
/* The same as the Hugging Face library does it: by grapheme clusters. */
bool tm_charsmap_apply_clusters(const tm_charsmap *m, const char *s, size_t len, tm_buf *out);

#endif
