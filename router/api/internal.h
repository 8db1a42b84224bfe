/* Inside router/api: the API object, one HTTP request (call), one generation request (job), one answer of it
 * (choice).
 *
 * Lifetimes: a call lives from the authorise hook to on_done. Its job lives as long. A choice's generation
 * belongs to dispatch; the handle is dropped at its end. A prep may outlive its call (the client left while
 * a thread worked on it); it then finds user == NULL and goes. */
#ifndef TM_ROUTER_API_INTERNAL_H
#define TM_ROUTER_API_INTERNAL_H

#include <sys/queue.h>

#include "common/json.h"
#include "router/api/api.h"
#include "router/api/error.h"
#include "router/api/prep.h"
#include "router/observe.h"

typedef struct tm_api_call tm_api_call;
typedef struct tm_api_job tm_api_job;
typedef struct tm_api_choice tm_api_choice;

/* A route and what the API knows about it; the first member is what net/http sees. */
typedef struct tm_api_route {
    tm_http_route http;
    const char *label; /* in metrics and logs */
    bool generates;    /* counts against a key's limits; refused while draining */
    bool admin;        /* needs the admin role */
    bool quiet;        /* probes: logged at debug level */
    bool json;         /* the body must be application/json */
    void (*handle)(tm_api_call *c);
} tm_api_route;

/* One token of the answer as logprobs need it; the best ones lie in the choice's `tops`. */
typedef struct tm_api_lp {
    int32_t token;
    float logprob;
    bool has_logprob; /* false: the first token of an echoed prompt */
    uint16_t top_count;
    uint32_t top_start;
    uint64_t begin;       /* bytes of text before it */
    uint64_t char_offset; /* characters of text before it */
} tm_api_lp;

#define TM_API_CALL_ID 40

/* A stretch of a choice's text and what it is; of an answer that is taken apart (answer.c). */
typedef struct tm_api_part {
    tm_parse_kind kind;
    bool dropped;
    int call;
    size_t begin, len;
    char id[TM_API_CALL_ID]; /* CALL: the text is the function's name */
} tm_api_part;

struct tm_api_choice {
    tm_api_job *job;
    tm_gen *gen; /* NULL: not started or over */
    tm_detok *detok;
    int index, prompt;
    bool admitted;
    bool role_sent;      /* its first chunk went out */
    bool echoed;         /* the prompt's text is in `text`, or was */
    bool finished;       /* no more tokens; finish is set */
    bool closed;         /* its last chunk went out */
    const char *finish;  /* finish_reason */
    int32_t generated;   /* tokens that the engine delivered and that count */
    int32_t prompt_pos;  /* echo: the next prompt position that on_prompt should bring */
    tm_buf text;         /* streaming: not yet sent; else everything */
    uint64_t text_bytes; /* text given out by the detokeniser so far, with the echoed prompt */
    uint64_t raw_bytes, raw_chars; /* text of the tokens pushed so far */
    /* A token that is a stop id, until it is known whether it ended the sequence. */
    bool holds;
    int32_t held;
    tm_api_lp held_lp;
    /* logprobs: waiting (streaming) or all; top entries by index */
    tm_api_lp *lps;
    size_t lp_count, lp_cap;
    tm_top *tops;
    size_t top_count, top_cap;
    /* token ids: waiting or all */
    int32_t *ids;
    size_t id_count, id_cap;
    /* taken apart: the detokeniser's text goes through `raw` into `text` and parts of it */
    tm_parse *parse; /* NULL: `text` is the content */
    tm_buf raw;
    tm_api_part *parts; /* waiting or all */
    size_t part_count, part_cap;
    int32_t reasoning_tokens;
};

struct tm_api_job {
    tm_api_call *call;
    tm_served *served;
    TAILQ_ENTRY(tm_api_job) link; /* in the list of streams */
    bool chat, stream, include_usage, include_stop, skip_special, return_ids, echo, ignore_eos;
    bool started; /* all its generations are with dispatch */
    bool begun;   /* the status line went out */
    bool paused;  /* the client reads slowly: text gathers until the drain */
    bool over;    /* answered or failed: nothing more is sent */
    int logprobs; /* -1 = none, else the number of best ones */
    char id[40];
    int64_t created;
    tm_buf head;   /* start of every chunk: data: {..."choices":[ */
    bool ids_sent; /* chat: prompt_token_ids went out with the first chunk */
    tm_api_prompt *prompts;
    int prompt_count;
    int32_t stop_ids[TM_API_STOP_IDS_ROOM];
    int stop_id_count;
    const tm_tool_parser *tool_parser;     /* NULL: calls are not looked for */
    const tm_reason_parser *reason_parser; /* NULL: reasoning is not looked for */
    int32_t keep[TM_PARSE_KEEP_MAX];       /* special tokens that these read */
    int keep_count;
    tm_api_tools tools;
    char *forced; /* how every answer begins; it is not generated */
    bool inside;  /* answers begin inside of reasoning */
    int n, open;
    int64_t last_write_ms;
    int choice_count;
    tm_api_choice choices[];
};
TAILQ_HEAD(tm_api_job_list, tm_api_job);

struct tm_api_call {
    tm_api *api;
    tm_http_req *http; /* NULL when the client has left */
    const tm_api_route *route;
    tm_key_owner *owner;
    bool limited;  /* counted in the owner's limit */
    tm_prep *prep; /* being worked on */
    tm_api_job *job;
    tm_observed seen;
};

struct tm_api {
    tm_api_opts opts;
    tm_prep_pool *pool;
    tm_buf out; /* reused for every body and chunk */
    struct tm_api_job_list streams;
    struct event *ev_ping;
    bool draining;
    int active;
    int unknown_count; /* names of fields without a row that were logged */
    char *unknown[64];
    char salt[17]; /* of this process, in ids */
    uint64_t ids;
};

/* ---- call.c: the life of an HTTP request ---- */
bool tm_api_on_authorise(void *user, tm_http_req *req, const tm_http_route *route);
void tm_api_on_request(void *user, tm_http_req *req);
void tm_api_on_done(void *user, tm_http_req *req);
void tm_api_on_error(void *user, tm_http_req *req, int http_status);
void tm_api_on_error_body(void *user, int http_status, tm_buf *out);
/* Answers. tm_api_reply sends api->out. */
void tm_api_headers(tm_api_call *c);
void tm_api_reply(tm_api_call *c, int status);
void tm_api_reply_error(tm_api_call *c, const tm_api_error *e);
void tm_api_unknown_field(void *api, const char *key);
/* The served model of that name, or false with 404, or 503 while nothing is served. */
bool tm_api_find_model(tm_api *a, const char *name, tm_served **out, tm_api_error *e);

/* ---- routes.c ---- */
const tm_api_route *tm_api_routes(int *count);
const tm_http_route *tm_api_http_routes(int *count);
const tm_api_route *tm_api_route_of(const tm_http_route *http);

/* ---- handlers ---- */
void tm_api_handle_chat(tm_api_call *c);
void tm_api_handle_completion(tm_api_call *c);
void tm_api_handle_models(tm_api_call *c);
void tm_api_handle_model(tm_api_call *c);
void tm_api_handle_health(tm_api_call *c);
void tm_api_handle_live(tm_api_call *c);
void tm_api_handle_ready(tm_api_call *c);
void tm_api_handle_metrics(tm_api_call *c);
void tm_api_handle_groups(tm_api_call *c);
void tm_api_handle_tokenize(tm_api_call *c);
void tm_api_handle_detokenize(tm_api_call *c);

/* ---- job.c: one generation request ---- */
void tm_api_job_start(tm_api_call *c, tm_prep *p);
void tm_api_job_end(tm_api_job *j); /* answered, failed or gone: cancels what still runs */
void tm_api_job_destroy(tm_api_job *j);
void tm_api_job_fail(tm_api_job *j, const tm_api_error *e);

/* ---- choice.c: tokens into text ---- */
extern const tm_gen_ops tm_api_choice_ops;
void tm_api_choice_deinit(tm_api_choice *ch);

/* ---- answer.c: reasoning and calls of an answer ---- */
bool tm_api_answer_open(tm_api_choice *ch); /* false without memory */
void tm_api_answer_take(tm_api_choice *ch); /* parses what is in `raw` */
/* The end of the text; the finish_reason, which calls may change. */
const char *tm_api_answer_finish(tm_api_choice *ch, const char *reason);
void tm_api_answer_deinit(tm_api_choice *ch);
/* Members of "message" but for the role; members of a "delta". */
void tm_api_answer_put(tm_jw *w, tm_api_choice *ch);
void tm_api_answer_put_delta(tm_jw *w, const tm_api_choice *ch, const tm_api_part *part);

/* ---- stream.c: server-sent events ---- */
void tm_api_stream_flush(tm_api_choice *ch); /* whatever is due; may end the stream */
void tm_api_stream_fail(tm_api_job *j, const tm_api_error *e);
void tm_api_stream_ping(tm_api *a, int64_t now_ms);

/* ---- reply.c: the whole answer in one body ---- */
void tm_api_reply_job(tm_api_job *j);
void tm_api_put_usage(tm_jw *w, const tm_api_job *j);
void tm_api_put_ids(tm_jw *w, const char *key, const int32_t *ids, size_t count);

/* ---- logprobs.c ---- */
tm_api_lp tm_api_lp_make(tm_api_choice *ch, const tm_gen_token *t, bool has_logprob);
void tm_api_lp_add(tm_api_choice *ch, tm_api_lp lp);
/* Drops records of text that was not given out (behind a stop string). */
void tm_api_lp_trim(tm_api_choice *ch);
/* How many of the waiting records belong to text already given out. */
size_t tm_api_lp_due(const tm_api_choice *ch, bool all);
/* The object after "logprobs":, for the first `count` records. */
void tm_api_lp_put(tm_jw *w, const tm_api_choice *ch, size_t count);
void tm_api_lp_consume(tm_api_choice *ch, size_t count);

#endif
