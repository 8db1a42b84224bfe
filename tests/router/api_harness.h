/* A router API with a scripted dispatch behind it and a real HTTP client in front, all on one event base.
 *
 * The fake dispatch implements router/dispatch.h. By itself it answers every generation with fake.tokens in
 * batches of fake.batch, one event per loop turn; with fake.manual it waits for fake_admit, fake_tokens ... */
#ifndef TM_TESTS_ROUTER_API_HARNESS_H
#define TM_TESTS_ROUTER_API_HARNESS_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "common/json.h"
#include "net/http/client.h"
#include "router/api/api.h"

#define FAKE_GENS_MAX 4096

/* ---- the fake dispatch ---- */

struct tm_gen {
    bool over, cancelled;
    int step; /* of the script */
    int sent;
    const tm_gen_ops *ops;
    void *user;
    struct event *ev;
    /* copies of what it was asked */
    int32_t *prompt;
    size_t prompt_len;
    int32_t max_tokens;
    int32_t stop_ids[64];
    size_t stop_count;
    tm_sampling sampling;
    tm_logit_bias bias[8];
    char session[256];
    int32_t priority;
    uint64_t cache_salt;
    int64_t deadline_ms;
};

typedef struct fake_dispatch {
    bool manual;
    tm_status start_status; /* of tm_dispatch_start */
    int start_fail_at;      /* the k-th start (from 0) fails with start_status */
    int64_t retry_after_ms;
    int32_t tokens[4096];
    int count, batch;
    int top_count; /* best tokens that come with each token */
    tm_gen_finish finish;
    int error_after; /* tokens before on_error, -1 = none */
    tm_gen_error error;
    int32_t cached;
    int groups_ready;
    int served_count;
    tm_gen *gens[FAKE_GENS_MAX];
    int gen_count; /* ever started */
    int active, cancels;
} fake_dispatch;

extern fake_dispatch fake;
extern struct event_base *fake_base;
extern tm_served *fake_served; /* models/demo-20m under the name "demo" */

void fake_load_served(void);
void fake_reset(void);
/* The text's tokens as the answer of every generation; the stop id of the model follows when eos. */
void fake_answer(const char *text, bool eos);
int fake_encode(const char *text, int32_t *ids, int max);
char *fake_prompt(int i); /* text of generation i's prompt, for free() */
void fake_admit(tm_gen *g);
void fake_tokens(tm_gen *g, const int32_t *ids, int count);
void fake_end(tm_gen *g, tm_gen_finish finish);
void fake_error(tm_gen *g, tm_gen_error error, int64_t retry_after_ms);

/* ---- the server ---- */

typedef struct rig {
    struct event_base *base;
    tm_metrics *metrics;
    tm_keys *keys;
    tm_api *api;
    tm_http_server *http;
    int port;
} rig;

typedef struct rig_opts {
    const char *key_file;
    tm_api_opts api;   /* base, dispatch, metrics and keys are filled in */
    tm_http_opts http; /* routes and hooks are filled in */
} rig_opts;
rig_opts rig_opts_default(void);
void rig_start(rig *r, const rig_opts *o); /* NULL = defaults */
/* With another template and other parsers; NULL = the model's. */
void rig_start_model(rig *r, const char *template, const char *tool_parser,
                     const char *reason_parser, const char *meta_instruction);
void rig_stop(rig *r);

/* ---- the client ---- */

typedef struct answer {
    rig *rig;
    tm_http_call *call;
    int status; /* 0 = no answer */
    bool done;
    tm_status end;
    tm_buf body;
    char headers[16][200]; /* of the names in RIG_HEADERS */
    json_t *json;          /* parsed by answer_json */
} answer;

/* Sends; the answer comes while the loop runs. extra: more header lines, NULL-terminated, or NULL. */
void rig_send(rig *r, answer *a, const char *method, const char *target, const char *body,
              const char *const *extra);
/* With the given header lines alone. */
void rig_send_raw(rig *r, answer *a, const char *method, const char *target, const char *body,
                  const char *const *headers);
void rig_turn(rig *r);                     /* one pass of the loop */
void rig_wait(answer *a);                  /* until done, at most 20 s */
void rig_wait_gens(rig *r, int count);     /* until so many generations were started */
void rig_wait_body(answer *a, size_t len); /* until so many bytes came */
void rig_call(rig *r, answer *a, const char *method, const char *target, const char *body);
void rig_post(rig *r, answer *a, const char *target, const char *body);
const char *answer_header(const answer *a, const char *name);
const json_t *answer_json(answer *a);
void answer_free(answer *a);
/* The value at "choices.0.message.content". */
const json_t *at(const json_t *root, const char *path);
const char *str_at(const json_t *root, const char *path);
int64_t int_at(const json_t *root, const char *path);
/* Checks the whole error form; code may be NULL (JSON null), param NULL = null. */
void assert_error(answer *a, int status, const char *type, const char *code, const char *param);

#endif
