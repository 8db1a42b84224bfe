/* The pool's transport in the real world: gRPC streams, the monotonic clock, text files fetched by a helper
 * thread. What arrives goes through the mailbox, whose notes act on the pool. */
#ifndef TM_ROUTER_POOL_LINK_H
#define TM_ROUTER_POOL_LINK_H

#include "router/pool/mailbox.h"
#include "router/pool/pool.h"
#include "router/served.h"

typedef struct tm_links tm_links;

/* The mailbox's owner argument must be the tm_pool. opts: its strings must outlive. */
tm_status tm_links_create(tm_links **out, tm_mailbox *mailbox, const tm_served_opts *opts,
                          tm_err *err);
tm_transport tm_links_transport(tm_links *l);
/* After the pool closed its links: joins every thread. The mailbox must still be there. */
void tm_links_destroy(tm_links *l);

#endif
