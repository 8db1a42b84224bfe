/* Regular expressions from tokenizer files: PCRE2 with Unicode classes, bounded in time and memory. */
#ifndef TM_TEXT_TOK_REGEX_H
#define TM_TEXT_TOK_REGEX_H

#include <stdbool.h>
#include <stddef.h>

#include "common/status.h"

#define TM_REGEX_PATTERN_MAX (64 << 10)

typedef struct tm_regex tm_regex;

/* `trusted` patterns may use PCRE2's compiler to machine code; others are interpreted. */
tm_status tm_regex_create(tm_regex **out, const char *pattern, size_t len, bool trusted,
                          tm_err *err);
void tm_regex_destroy(tm_regex *r);

/* What one thread needs while matching. */
typedef struct tm_regex_work tm_regex_work;
tm_regex_work *tm_regex_work_create(const tm_regex *r); /* NULL when out of memory */
void tm_regex_work_destroy(tm_regex_work *w);

typedef struct tm_regex_match {
    size_t begin, end;
} tm_regex_match;

/* The first match at or behind `from`. *found false = none. INVALID when the limits were passed. */
tm_status tm_regex_find(const tm_regex *r, tm_regex_work *w, const char *s, size_t len, size_t from,
                        tm_regex_match *m, bool *found, tm_err *err);

#endif
