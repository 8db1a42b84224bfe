/* Added tokens: strings that are cut out of the text before the model sees it.
 *
 * Matching is leftmost, then longest, without overlap. A set is built once and constant afterwards. */
#ifndef TM_TEXT_TOK_ADDED_H
#define TM_TEXT_TOK_ADDED_H

#include "common/status.h"
#include "text/tokenizer.h"

#define TM_ADDED_MAX        (64 << 10)
#define TM_ADDED_LENGTH_MAX 1024

typedef struct tm_added_token {
    const char *text; /* not NUL-terminated; owned by the set */
    uint32_t len;
    int32_t id;
    uint32_t order; /* of arrival; set by tm_added_put */
    bool special, lstrip, rstrip, single_word;
    bool guarded; /* an ordinary token, but never recognised in user text (roles of old models) */
} tm_added_token;

typedef struct tm_added {
    tm_added_token *v; /* sorted by bytes after tm_added_build */
    size_t n, cap;
    bool first[256]; /* bytes a token can begin with */
    int only_first;  /* the single such byte, -1 = several */
} tm_added;

void tm_added_deinit(tm_added *a);
/* Copies the text. Empty texts are ignored; a text that is there already is replaced. */
tm_status tm_added_put(tm_added *a, const tm_added_token *t, tm_err *err);
void tm_added_build(tm_added *a);
const tm_added_token *tm_added_find(const tm_added *a, const char *text, size_t len);

/* What may not be cut out: special tokens everywhere (plain), or where they touch user text. */
typedef struct tm_added_rules {
    bool plain;
    const tm_text_span *input; /* ascending */
    size_t input_count;
} tm_added_rules;

typedef struct tm_added_match {
    size_t begin, end; /* with the white space that lstrip and rstrip swallow */
    const tm_added_token *token;
} tm_added_match;

typedef struct tm_added_scan {
    const tm_added *set;
    const tm_added_rules *rules;
    const char *text;
    size_t len, pos; /* where the search goes on */
    size_t taken;    /* end of the last match */
    size_t span;     /* first input span that may still overlap */
} tm_added_scan;

/* The next match at or behind s->pos, false = none. */
bool tm_added_next(tm_added_scan *s, tm_added_match *m);

#endif
