/* Calls as Python writes them, f(a=1, b=["x"]), read as data: keyword arguments with literal values become a
 * JSON object. Nothing is evaluated. */
#ifndef TM_TEXT_PARSE_PYLIT_H
#define TM_TEXT_PARSE_PYLIT_H

#include "common/buf.h"

typedef struct tm_pylit {
    const char *at, *end;
} tm_pylit;

/* A dotted name: *len bytes at *name. */
bool tm_pylit_name(tm_pylit *r, const char **name, size_t *len);
/* White space, then the character. */
bool tm_pylit_char(tm_pylit *r, char c);
/* Keyword arguments from "(" to ")", as a JSON object behind what is in out. */
bool tm_pylit_arguments(tm_pylit *r, tm_buf *out);

#endif
