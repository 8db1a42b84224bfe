/* Template text to tokens, with Jinja's white-space control applied. */
#ifndef TM_TEXT_JINJA_LEX_H
#define TM_TEXT_JINJA_LEX_H

#include <stddef.h>
#include <stdint.h>

#include "common/arena.h"
#include "common/status.h"

typedef enum tm_jtok {
    TM_JT_EOF,
    TM_JT_DATA,        /* text outside of tags */
    TM_JT_VAR_BEGIN,   /* {{ */
    TM_JT_VAR_END,     /* }} */
    TM_JT_BLOCK_BEGIN, /* {% */
    TM_JT_BLOCK_END,   /* %} */
    TM_JT_NAME,
    TM_JT_STRING, /* escapes resolved */
    TM_JT_INT,
    TM_JT_FLOAT,
    TM_JT_OP /* op: one or two characters, first in the low byte */
} tm_jtok;

#define TM_JOPC(a, b) ((a) | (b) << 8)

typedef struct tm_jtoken {
    uint8_t type;
    int op, line;
    const char *s; /* in the arena, NUL-terminated for names and numbers */
    size_t len;
} tm_jtoken;

tm_status tm_jlex(tm_arena *arena, const char *source, size_t len, tm_jtoken **tokens,
                  size_t *count, tm_err *err);

#endif
