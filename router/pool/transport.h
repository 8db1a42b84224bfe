/* What the pool needs from the outside: time, links and model assets, as a table of functions. The router
 * gives it gRPC (link.h) and the clock; tests give it scripted groups and a virtual clock.
 *
 * Everything is called on the loop thread, and nothing calls back from within: a link's messages, its end
 * and fetched assets come later through tm_pool_on_*, named by link_id (never reused), so events of a
 * closed link are recognised and dropped. */
#ifndef TM_ROUTER_POOL_TRANSPORT_H
#define TM_ROUTER_POOL_TRANSPORT_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

typedef struct tm_transport {
    void *ctx;
    int64_t (*now_ns)(void *ctx); /* monotonic */
    /* Starts an Attach stream. TM_OK: exactly one tm_pool_on_closed follows unless closed before. */
    tm_status (*open)(void *ctx, uint64_t link_id, const char *address, void **link);
    /* One packed RouterMessage, copied. BUSY: the link's queue is full. */
    tm_status (*send)(void *ctx, void *link, const void *data, size_t len);
    void (*close)(void *ctx, void *link);
    /* Starts GetModelAssets at a group; ends in tm_pool_on_served. */
    tm_status (*fetch)(void *ctx, const char *address, const char *model, const char *digest);
} tm_transport;

#endif
