/* A sandboxed interpreter for the Jinja templates of chat models: the language of Jinja2 3.1 as transformers
 * sets it up (immutable sandbox, trim_blocks, lstrip_blocks, break and continue, generation blocks).
 *
 * No I/O, no imports, no attribute walk. A render has bounds on steps, depth, memory and output. A template
 * is constant after compiling and may be rendered from any thread. */
#ifndef TM_TEXT_JINJA_JINJA_H
#define TM_TEXT_JINJA_JINJA_H

#include <jansson.h>
#include <time.h>

#include "common/buf.h"
#include "text/tokenizer.h"

#define TM_JINJA_SOURCE_MAX (64 << 10)

typedef struct tm_jinja tm_jinja;

tm_status tm_jinja_compile(tm_jinja **out, const char *source, size_t len, tm_err *err);
void tm_jinja_destroy(tm_jinja *t);
bool tm_jinja_mentions(const tm_jinja *t, const char *text); /* the source holds it */

/* A variable of the render. Strings below it are input, unless `trusted`. */
typedef struct tm_jinja_var {
    const char *name;
    const json_t *value; /* NULL = none */
    const char *json;    /* used when value is NULL and this is not: JSON text, exact integers */
    size_t json_len;
    const char *text; /* used when both are NULL and this is not */
    bool trusted;
} tm_jinja_var;

typedef struct tm_jinja_args {
    const tm_jinja_var *vars; /* a later one replaces an earlier one of the same name */
    int count;
    const struct tm *now; /* local time for strftime_now; NULL = the clock */
    size_t input_bytes;   /* size of the request: the output may be a multiple of it */
} tm_jinja_args;

/* INVALID with the template's own words (raise_exception) or "line N: what"; outputs change only on TM_OK.
 * *marks is malloc'ed. */
tm_status tm_jinja_render(const tm_jinja *t, const tm_jinja_args *args, tm_buf *text,
                          tm_text_span **marks, size_t *mark_count, tm_err *err);

#endif
