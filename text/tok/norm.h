/* Normalisers: a list of rewriting steps for a whole stretch of text. Constant after loading. */
#ifndef TM_TEXT_TOK_NORM_H
#define TM_TEXT_TOK_NORM_H

#include <jansson.h>

#include "common/buf.h"
#include "common/status.h"
#include "text/tok/unicode.h"

typedef struct tm_norm tm_norm;

/* From the value of tokenizer.json's "normalizer" (NULL or null: text stays as it is). */
tm_status tm_norm_create(tm_norm **out, const json_t *v, tm_err *err);
tm_status tm_norm_create_form(tm_norm **out, tm_uc_form form, tm_err *err);
void tm_norm_destroy(tm_norm *n);

/* Two buffers that the steps write to by turns. */
typedef struct tm_norm_work {
    tm_buf buf[2];
} tm_norm_work;

void tm_norm_work_init(tm_norm_work *w);
void tm_norm_work_deinit(tm_norm_work *w);
/* *text and *len are replaced when a step changes something; the new text lies in w. */
tm_status tm_norm_run(const tm_norm *n, tm_norm_work *w, const char **text, size_t *len,
                      tm_err *err);

#endif
