/* The router as one object: event loop, dispatch, API, HTTP server, signals.
 *
 * Everything runs on the thread of tm_router_run, apart from helper threads of the parts. SIGTERM and SIGINT
 * drain (a second one ends at once), SIGHUP reads the key file again. */
#ifndef TM_ROUTER_ROUTER_H
#define TM_ROUTER_ROUTER_H

#include "common/status.h"
#include "router/options.h"

typedef struct tm_router tm_router;

/* Listens when it returns TM_OK. opts is copied, its strings are borrowed. */
tm_status tm_router_create(tm_router **out, const tm_router_opts *opts, tm_err *err);
int tm_router_port(const tm_router *r);
int tm_router_grpc_port(const tm_router *r); /* 0 = off */
/* Until drained or stopped. */
tm_status tm_router_run(tm_router *r, tm_err *err);
/* Stops accepting and taking new requests; run ends when the open ones are answered or drain_ms passed. */
void tm_router_drain(tm_router *r);
/* Run ends now; open requests are cut. */
void tm_router_stop(tm_router *r);
void tm_router_destroy(tm_router *r);

#endif
