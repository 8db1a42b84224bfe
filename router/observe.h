/* What is counted and logged about a request, whichever face it came through: the metrics of generations and
 * one log line. The record is filled by the face while the request lives. Loop thread only. */
#ifndef TM_ROUTER_OBSERVE_H
#define TM_ROUTER_OBSERVE_H

#include <stdbool.h>

#include "common/metrics.h"
#include "router/api/error.h"

#define TM_REQUEST_ID_MAX 129 /* with the NUL */

typedef struct tm_observed {
    char request_id[TM_REQUEST_ID_MAX];
    /* The model is one that is served, so that a client cannot make series. */
    char model[128], group[64], user[65];
    int64_t start_ns; /* first byte of the request */
    int64_t prompt_tokens, cached_tokens, output_tokens;
    int64_t first_token_ns, last_token_ns;
    int moves;
    const char *finish, *error;
} tm_observed;

/* A request id given by the client, when it is harmless in logs and headers. */
bool tm_observe_id_ok(const char *id);

extern const tm_metric_desc TM_METRIC_STAGE; /* stages: "text", "queue", "prefill" */
void tm_observe_text(tm_metrics *m, int64_t ns);
void tm_observe_shed(tm_metrics *m, const char *reason);
void tm_observe_start(tm_metrics *m, const tm_observed *o); /* handed to dispatch */
void tm_observe_tokens(tm_metrics *m, tm_observed *o, int count);

typedef struct tm_observe_end {
    const char *route; /* "chat_completions", "grpc_chat" */
    const char *key;   /* owner, or NULL */
    int status;        /* HTTP, or the HTTP status that says the same as the gRPC one */
    bool generated;    /* it was a generation that began */
    bool gone;         /* the client left first */
    bool quiet;        /* a probe: logged at debug level */
} tm_observe_end;
void tm_observe_done(tm_metrics *m, const tm_observed *o, const tm_observe_end *end);

#endif
