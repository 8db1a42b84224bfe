/* A served model as the router knows it: its text side (tokenizer, template) and its limits, built once per
 * model digest from the assets of a worker or a folder. Reference counted: a stream holds one while it
 * runs. Loop thread only, apart from building. */
#ifndef TM_ROUTER_SERVED_H
#define TM_ROUTER_SERVED_H

#include "common/status.h"
#include "text/detok.h"
#include "text/parse/parse.h"
#include "text/template.h"
#include "text/tokenizer.h"

typedef struct tm_served {
    int refs;
    char name[128]; /* name in the API */
    char digest[65];
    tm_tokenizer *tokenizer;
    tm_template *template;                 /* NULL: chat is refused, completions work */
    const tm_tool_parser *tool_parser;     /* NULL: calls stay text */
    const tm_reason_parser *reason_parser; /* NULL: reasoning stays text */
    int32_t max_context, vocab;
    int32_t stop_ids[16]; /* the engine stops at these; here for skip and usage */
    int stop_count;
    int64_t created; /* wall seconds */
    /* generation_config defaults, used when a request leaves the field out */
    float temperature, top_p;
    int32_t top_k;
    float repetition_penalty;
} tm_served;

/* The user's choices for every model; NULL members = what the model brings. */
typedef struct tm_served_opts {
    const char *chat_template;    /* a built-in name, a file or a text */
    const char *meta_instruction; /* system message of conversations that bring none */
    const char *tool_parser;      /* a row of text/parse, "auto" or "none" */
    const char *reason_parser;
} tm_served_opts;
/* CONFIG when a parser's name is unknown. */
tm_status tm_served_opts_check(const tm_served_opts *o, tm_err *err);

/* opts: NULL = all defaults. */
tm_status tm_served_create(tm_served **out, const char *name, const char *digest,
                           const tm_text_file *files, int count, const tm_served_opts *opts,
                           tm_err *err);
tm_served *tm_served_acquire(tm_served *s);
void tm_served_release(tm_served *s);
bool tm_served_stops_at(const tm_served *s, int32_t token); /* one of the model's own stop ids */

#endif
