/* The text side of a request before it can be dispatched: JSON checks of prompts, template, tokenizer.
 *
 * A prep is one request's work, a plain value that any thread can carry out: it refers to the parsed body,
 * which it owns, and to a served model, whose text side is immutable. Short texts are worked on at once;
 * long ones go to a small pool of threads, so that a prompt of a megabyte does not hold up the streams of
 * the loop thread. The pool's queue is bounded. */
#ifndef TM_ROUTER_API_PREP_H
#define TM_ROUTER_API_PREP_H

#include "router/api/fields.h"
#include "router/api/tools.h"

struct event_base;

typedef struct tm_api_prompt {
    const char *text; /* borrowed from root; NULL when ids were given */
    size_t text_len;
    int32_t *ids;
    size_t len;
    char *echo; /* text of the prompt, when wanted */
    size_t echo_len;
} tm_api_prompt;

typedef enum tm_prep_kind { TM_PREP_CHAT, TM_PREP_COMPLETION, TM_PREP_TOKENIZE } tm_prep_kind;

typedef struct tm_prep tm_prep;
struct tm_prep {
    /* in */
    tm_prep_kind kind;
    json_t *root;      /* owned */
    tm_served *served; /* owned reference */
    tm_api_params params;
    const tm_api_limits *limits;
    bool add_special; /* tokenize: BOS/EOS as the tokenizer would add them */
    /* out */
    int64_t work_ns; /* how long it took */
    bool ok;
    tm_api_error error;
    tm_api_prompt *prompts;
    int prompt_count;
    tm_api_tools tools;
    char *forced; /* how the answer begins by the end of the prompt: a call; NULL = freely */
    bool inside;  /* the prompt leaves the model inside of its reasoning */
    /* hand-over; the pool's while it runs */
    struct tm_prep *next;
    void (*done)(tm_prep *p); /* loop thread; takes the prep back */
    void *user;
};

/* Takes root. NULL when out of memory (root is released). */
tm_prep *tm_prep_create(tm_prep_kind kind, json_t *root, const tm_api_limits *limits);
void tm_prep_destroy(tm_prep *p); /* loop thread */
/* Does the work: sets ok, and prompts or error. Any thread. */
void tm_prep_work(tm_prep *p);
/* Bytes of text to be tokenized, roughly: decides where the work is done. */
size_t tm_prep_weight(const tm_prep *p);

typedef struct tm_prep_pool tm_prep_pool;
tm_status tm_prep_pool_create(tm_prep_pool **out, struct event_base *base, int threads,
                              int queue_max, tm_err *err);
/* Waits for running work; preps not yet done are destroyed without done(). */
void tm_prep_pool_destroy(tm_prep_pool *pool);
/* false: the queue is full, the prep stays the caller's. */
bool tm_prep_pool_submit(tm_prep_pool *pool, tm_prep *p);

#endif
