/* String operations that filters and methods share. Results keep their marks. */
#ifndef TM_TEXT_JINJA_STRINGS_H
#define TM_TEXT_JINJA_STRINGS_H

#include "text/jinja/run.h"

typedef enum tm_jcase {
    TM_JC_UPPER,
    TM_JC_LOWER,
    TM_JC_CAPITALIZE,
    TM_JC_TITLE,
    TM_JC_SWAP
} tm_jcase;

bool tm_jis_space(uint32_t cp); /* str.isspace */
/* chars NULL, none or absent: white space. */
bool tm_jstr_strip(tm_jrun *r, const tm_jval *s, const tm_jval *chars, bool left, bool right,
                   tm_jval *out);
bool tm_jstr_case(tm_jrun *r, const tm_jval *s, tm_jcase how, tm_jval *out);
/* count < 0: all. */
bool tm_jstr_replace(tm_jrun *r, const tm_jval *s, const tm_jval *from, const tm_jval *to,
                     int64_t count, tm_jval *out);
/* sep NULL: runs of white space. max < 0: no bound. */
bool tm_jstr_split(tm_jrun *r, const tm_jval *s, const tm_jval *sep, int64_t max, bool from_right,
                   tm_jval *out);
bool tm_jstr_lines(tm_jrun *r, const tm_jval *s, bool keep_ends, tm_jval *out);
bool tm_jstr_join(tm_jrun *r, const tm_jval *sep, const tm_jval *items, size_t n, bool strict,
                  tm_jval *out);
/* Byte offset of the first (last) occurrence, -1 = none. */
int64_t tm_jstr_find(const tm_jval *s, const tm_jval *what, bool last);
bool tm_jstr_pad(tm_jrun *r, const tm_jval *s, int64_t width, const char *fill, int where,
                 tm_jval *out);

/* An argument that must be of a kind; absent gives def. */
bool tm_jarg_int(tm_jrun *r, const tm_jval *v, int64_t def, int64_t *out);
bool tm_jarg_str(tm_jrun *r, const tm_jval *v, const char *what);
static inline bool tm_jabsent(const tm_jval *v)
{
    return v->type == TM_J_ABSENT || v->type == TM_J_NONE;
}

#endif
