/* Pre-tokenizers: a list of stages that cut a stretch of text into pieces. Stages may also rewrite the text
 * (a space in front, spaces as U+2581), so a result is a text with ranges in it. Constant after loading. */
#ifndef TM_TEXT_TOK_PRETOK_H
#define TM_TEXT_TOK_PRETOK_H

#include <jansson.h>

#include "common/buf.h"
#include "common/status.h"
#include "text/tok/spnorm.h"
#include "text/tok/vec.h"

typedef struct tm_pretok tm_pretok;

/* From the value of tokenizer.json's "pre_tokenizer" (NULL or null: one piece). */
tm_status tm_pretok_create(tm_pretok **out, const json_t *v, tm_err *err);
/* A single Split stage, Isolated, with this pattern (tiktoken). */
tm_status tm_pretok_create_split(tm_pretok **out, const char *pattern, tm_err *err);
/* SentencePiece's preparation; n must outlive the result. */
tm_status tm_pretok_create_sp(tm_pretok **out, const tm_spnorm *n, tm_err *err);
void tm_pretok_destroy(tm_pretok *p);
bool tm_pretok_is_byte_level(const tm_pretok *p);

typedef struct tm_pieces {
    const char *text;
    tm_ranges ranges;
    tm_buf own[2]; /* rewritten text; stages alternate between the two */
    tm_ranges spare;
} tm_pieces;

void tm_pieces_init(tm_pieces *p);
void tm_pieces_deinit(tm_pieces *p);
/* at_start: the stretch begins where the whole text begins. */
tm_status tm_pretok_run(const tm_pretok *p, const char *text, size_t len, bool at_start,
                        tm_pieces *out, tm_err *err);

#endif
