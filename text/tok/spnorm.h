/* What SentencePiece does to a text before its model sees it: replacements, white space, the space in front. */
#ifndef TM_TEXT_TOK_SPNORM_H
#define TM_TEXT_TOK_SPNORM_H

#include "text/tok/charsmap.h"
#include "text/tok/vec.h"

#define TM_SP_MARK     "\xE2\x96\x81" /* stands for a space in pieces */
#define TM_SP_MARK_LEN 3

typedef enum tm_sp_prefix {
    TM_SP_PREFIX_NEVER,
    TM_SP_PREFIX_FIRST, /* a space in front of the whole text */
    TM_SP_PREFIX_EVERY  /* ... and behind every special token, as old tokenizers have it */
} tm_sp_prefix;

typedef struct tm_spnorm {
    tm_charsmap map;
    tm_sp_prefix prefix;
    bool prefix_behind; /* the space goes to the end instead */
    bool trim;          /* no space at the ends, runs of spaces are one */
    bool escape;        /* spaces become marks */
    /* Pieces may be cut in front of a mark, unless a piece of the vocabulary has this byte before one. */
    bool cut, joins[256];
} tm_spnorm;

/* Overwrites out and appends the ranges to encode by themselves; check both for failure. */
void tm_spnorm_run(const tm_spnorm *n, const char *s, size_t len, bool at_start, tm_buf *out,
                   tm_ranges *ranges);

#endif
