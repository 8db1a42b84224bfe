/* The decoder of tokenizer.json, applied once per token while loading: what bytes does a token stand for?
 * Only the drop of one leading space concerns the whole sequence and stays for the detokeniser. */
#ifndef TM_TEXT_TOK_DECODE_H
#define TM_TEXT_TOK_DECODE_H

#include <jansson.h>

#include "common/buf.h"
#include "common/status.h"

#define TM_DECODER_STEPS_MAX 16

typedef enum tm_decoder_op {
    TM_DECODER_BYTE_LEVEL,
    TM_DECODER_BYTE_FALLBACK,
    TM_DECODER_REPLACE
} tm_decoder_op;

typedef struct tm_decoder {
    struct {
        tm_decoder_op op;
        char *from, *to;
    } steps[TM_DECODER_STEPS_MAX];
    int count;
    bool fused;             /* a Fuse step was seen */
    bool strip_first_space; /* of the sequence */
    bool per_byte;
} tm_decoder;

tm_status tm_decoder_parse(tm_decoder *d, const json_t *v, tm_err *err);
void tm_decoder_deinit(tm_decoder *d);
/* out is overwritten; check out->failed. */
void tm_decoder_piece(const tm_decoder *d, const char *s, size_t len, tm_buf *out);

#endif
