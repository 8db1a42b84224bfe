/* What a model wrote, taken apart: reasoning, content and tool calls, while the text is still coming.
 *
 * One tm_parse follows one answer. Text goes in as the detokeniser gives it, in pieces of any size; events come
 * out as soon as they are certain. Which events, joined, is a function of the text alone, not of how it was
 * cut. Nothing a model wrote is lost: what looks like a call but is none, comes out as content.
 *
 * Rows of two tables (table.c) say how families write calls and reasoning. Rows are constant; a tm_parse
 * belongs to one thread. */
#ifndef TM_TEXT_PARSE_PARSE_H
#define TM_TEXT_PARSE_PARSE_H

#include "common/buf.h"
#include "text/template.h"

#define TM_PARSE_CALLS_MAX 128               /* of one answer; text behind them is content */
#define TM_PARSE_CALL_MAX  ((size_t)1 << 20) /* bytes of one call; a longer one is content */
#define TM_PARSE_NAME_MAX  128
#define TM_PARSE_KEEP_MAX  12

typedef struct tm_tool_parser tm_tool_parser;
typedef struct tm_reason_parser tm_reason_parser;

/* ---- the tables ---- */

/* By name or by one of LMDeploy's and vLLM's names for it; NULL = none. */
const tm_tool_parser *tm_tool_parser_find(const char *name);
const tm_reason_parser *tm_reason_parser_find(const char *name);
/* The one whose marks the template writes, or that the model's type (config.json; may be NULL) is known to
 * need; NULL = none. */
const tm_tool_parser *tm_tool_parser_detect(const tm_template *t, const char *model_type);
const tm_reason_parser *tm_reason_parser_detect(const tm_template *t);
const char *tm_tool_parser_name(const tm_tool_parser *p);
const char *tm_reason_parser_name(const tm_reason_parser *p);
/* "hermes, llama3, ..." */
void tm_tool_parser_list(tm_buf *out);
void tm_reason_parser_list(tm_buf *out);
/* Ids of calls must have nine letters and digits (Mistral). */
bool tm_tool_parser_short_ids(const tm_tool_parser *p);
/* A text that ends the answer besides the usual ones; NULL = none. */
const char *tm_tool_parser_stop(const tm_tool_parser *p);
/* The special tokens that parsers need to see although they are not text for users. Either may be NULL.
 * keep has room for TM_PARSE_KEEP_MAX ids; returns how many there are. */
int tm_parse_keep(const tm_tool_parser *tools, const tm_reason_parser *reason,
                  const tm_tokenizer *t, int32_t *keep);
/* How an answer begins that is a call: of the function `name`, or of any (NULL). For prompts that leave the
 * model no choice. false: this family's calls cannot be begun without a name. */
bool tm_tool_parser_begin(const tm_tool_parser *p, const char *name, tm_buf *out);
/* Whether a prompt leaves the model inside of its reasoning: it ends in the opening mark, or the parser always
 * begins inside and it does not end in the closing one. */
bool tm_reason_parser_inside(const tm_reason_parser *p, const char *prompt, size_t len);
/* Whether the text of an answer to be continued opens reasoning and does not close it. */
bool tm_reason_parser_open(const tm_reason_parser *p, const char *text, size_t len);
const char *tm_reason_parser_close(const tm_reason_parser *p);

/* ---- one answer ---- */

typedef enum tm_parse_kind {
    TM_PARSE_CONTENT,
    TM_PARSE_REASONING,
    TM_PARSE_CALL,      /* a call begins; text is the function's name */
    TM_PARSE_ARGUMENTS, /* the next piece of the JSON text of its arguments */
    TM_PARSE_CALL_END,  /* it is complete */
    TM_PARSE_DROP       /* it was none: its whole text follows as content */
} tm_parse_kind;

typedef struct tm_parse_event {
    tm_parse_kind kind;
    int call; /* from 0; a number that was dropped is not used again */
    const char *text;
    size_t len;
} tm_parse_event;
typedef void (*tm_parse_fn)(void *user, const tm_parse_event *e);

typedef struct tm_parse_opts {
    const tm_tool_parser *tools;    /* NULL: no calls are looked for */
    const tm_reason_parser *reason; /* NULL: no reasoning is looked for */
    bool inside;                    /* the prompt leaves the model inside of its reasoning */
    const json_t *functions;        /* the request's tools, {type, function: {...}}; must outlive */
    bool known_only;                /* calls of other functions are content */
    int calls_max;                  /* 0 = TM_PARSE_CALLS_MAX */
} tm_parse_opts;

typedef struct tm_parse tm_parse;
tm_status tm_parse_create(tm_parse **out, const tm_parse_opts *opts, tm_parse_fn fn, void *user,
                          tm_err *err);
void tm_parse_destroy(tm_parse *p);
void tm_parse_push(tm_parse *p, const char *text, size_t len);
/* The end of the text. cut: a limit ended it, so a call that is not complete stays as far as it came;
 * otherwise it is malformed. */
void tm_parse_finish(tm_parse *p, bool cut);
bool tm_parse_inside(const tm_parse *p);  /* now in reasoning */
int tm_parse_complete(const tm_parse *p); /* calls that are complete */
bool tm_parse_in_call(const tm_parse *p); /* a call has begun and is not complete */
bool tm_parse_full(const tm_parse *p); /* calls_max are complete: what follows is of no interest */
bool tm_parse_failed(const tm_parse *p); /* memory ran out; events are missing */

#endif
