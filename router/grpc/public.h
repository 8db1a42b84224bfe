/* The public gRPC face: turbomesh.v1.TurboMesh (Generate, Chat, ListModels), grpc.health.v1 and server
 * reflection (v1, v1alpha), over the same dispatch and text code as the HTTP API.
 *
 * Everything runs on the loop thread; calls arrive on the gRPC thread and are handed over. How the router
 * uses it (only with --grpc-port):
 *
 *   create     after dispatch, with its options
 *   drain      tm_public_set_serving(p, false): health says NOT_SERVING and new generations are answered
 *              UNAVAILABLE; then wait for tm_public_active(p) == 0 or the drain timeout on the loop
 *   destroy    before dispatch: ends what is left with UNAVAILABLE and blocks up to grace_ms while it goes out
 */
#ifndef TM_ROUTER_GRPC_PUBLIC_H
#define TM_ROUTER_GRPC_PUBLIC_H

#include "router/api/fields.h"
#include "router/dispatch.h"

typedef struct tm_public tm_public;

/* Who may call. enter is asked for every call but health's, with the value of the `authorization` metadata
 * (or NULL): TM_OK, DENIED (UNAUTHENTICATED) or BUSY (RESOURCE_EXHAUSTED, over the key's limits). After TM_OK
 * with `generates`, leave follows once with the ticket when the call is over; other calls have no leave. A NULL
 * enter lets everybody in. */
typedef struct tm_public_entry {
    void *ticket;
    const char *key;  /* owner's name for the log, valid until leave */
    const char *text; /* of a refusal */
    int64_t retry_after_ms;
} tm_public_entry;

typedef struct tm_public_access {
    tm_status (*enter)(void *user, const char *authorization, bool generates, tm_public_entry *out);
    void (*leave)(void *user, void *ticket);
    void *user;
} tm_public_access;

typedef struct tm_public_opts {
    struct event_base *base;
    tm_dispatch *dispatch;
    tm_metrics *metrics;
    const char *address; /* "127.0.0.1:9000"; port 0 picks one */
    tm_public_access access;
    tm_api_limits limits;
    size_t message_max; /* bytes of a request, 0 = 8 MiB; larger ones get RESOURCE_EXHAUSTED */
    int calls_max;      /* calls at once, 0 = 4096; more are answered RESOURCE_EXHAUSTED */
    int64_t write_timeout_ms; /* a client that takes nothing for so long is cut, 0 = 60 s */
    int text_threads;         /* for long prompts, 0 = 1 */
    int text_queue;           /* long prompts waiting or being worked on, 0 = 256 */
    size_t text_inline_bytes; /* up to this much text is tokenized at once */
} tm_public_opts;

tm_status tm_public_create(tm_public **out, const tm_public_opts *opts, tm_err *err);
int tm_public_port(const tm_public *p);
void tm_public_set_serving(tm_public *p, bool serving); /* true after create */
int tm_public_active(const tm_public *p);               /* generation calls not yet over */
void tm_public_destroy(tm_public *p, int64_t grace_ms);

#endif
