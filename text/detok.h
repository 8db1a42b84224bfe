/* Streaming detokeniser and stop strings: tokens in, text out that never ends inside a UTF-8 character
 * and never contains a stop string (nor a part of one that later became whole).
 *
 * State is a pure function of the tokens pushed, so a continued stream is rebuilt by pushing them again.
 * Not thread-safe. */
#ifndef TM_TEXT_DETOK_H
#define TM_TEXT_DETOK_H

#include "common/buf.h"
#include "text/tokenizer.h"

typedef struct tm_detok tm_detok;

#define TM_DETOK_STOPS_MAX 24
#define TM_DETOK_KEEP_MAX  16

typedef struct tm_detok_opts {
    bool skip_special;        /* default of the API: true */
    const char *const *stops; /* NUL-terminated, copied */
    int stop_count;           /* <= TM_DETOK_STOPS_MAX, each 1..256 bytes */
    bool include_stop;        /* include_stop_str_in_output */
    const int32_t *keep;      /* special tokens that are text although others are skipped; copied */
    int keep_count;           /* <= TM_DETOK_KEEP_MAX */
    bool continues; /* goes on after a text: a first space, which tokenizers drop, stays */
} tm_detok_opts;

tm_status tm_detok_create(tm_detok **out, const tm_tokenizer *t, const tm_detok_opts *opts,
                          tm_err *err);
void tm_detok_destroy(tm_detok *d);

/* Appends to `text` what is safe to send after this token. Returns true when a stop string completed: the
 * text up to it was appended, and nothing more will come. */
bool tm_detok_push(tm_detok *d, int32_t id, tm_buf *text);
/* The end of the sequence: appends everything held back (cut characters as U+FFFD). */
void tm_detok_finish(tm_detok *d, tm_buf *text);
int tm_detok_matched(const tm_detok *d); /* index of the stop string that matched, -1 = none */

#endif
