/* JSON into template values. */
#ifndef TM_TEXT_JINJA_JSON_H
#define TM_TEXT_JINJA_JSON_H

#include <jansson.h>

#include "text/jinja/run.h"

/* Strings point into the tree, which must outlive the render. */
bool tm_jv_from_json(tm_jrun *r, const json_t *v, bool marked, tm_jval *out);
/* *valid false: the text is not JSON (no failure). Strings are copied. */
bool tm_jv_parse_json(tm_jrun *r, const char *s, size_t len, bool marked, tm_jval *out,
                      bool *valid);

#endif
