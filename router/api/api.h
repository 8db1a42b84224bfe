/* The HTTP face of the router: routes, hooks and the requests in flight.
 *
 * tm_api_create makes the table of routes that tm_http_server_create takes, with the object itself as `user`.
 * Everything runs on the loop thread; only the tokenizing of long prompts happens on threads of its own. */
#ifndef TM_ROUTER_API_API_H
#define TM_ROUTER_API_API_H

#include "common/metrics.h"
#include "net/http/http.h"
#include "router/api/fields.h"
#include "router/dispatch.h"
#include "router/limit/keys.h"

typedef struct tm_api tm_api;

typedef struct tm_api_opts {
    struct event_base *base;
    tm_dispatch *dispatch;
    tm_metrics *metrics;
    tm_keys *keys;
    tm_limit_opts limit; /* of each key */
    tm_api_limits limits;
    int text_threads;         /* for long prompts */
    int text_queue;           /* long prompts waiting or being worked on */
    size_t text_inline_bytes; /* up to this much text is tokenized at once */
    int64_t ping_ms;          /* comment on a silent stream */
} tm_api_opts;
tm_api_opts tm_api_opts_default(void);

tm_status tm_api_create(tm_api **out, const tm_api_opts *opts, tm_err *err);
/* After the HTTP server is gone (which ends every request). */
void tm_api_destroy(tm_api *a);
/* Fills routes, route_count, user and the hooks of *http. */
void tm_api_serve(tm_api *a, tm_http_opts *http);
/* From now on new generations are answered 503 draining, and /readyz 503. */
void tm_api_drain(tm_api *a);
int tm_api_active(const tm_api *a); /* generations of clients not yet answered completely */

#endif
