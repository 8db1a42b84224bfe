/* A model's text files from one of its groups: GetModelAssets and tm_served_create on a helper thread. The
 * result goes to the pool as a note (tm_pool_on_served). */
#ifndef TM_ROUTER_POOL_ASSETS_H
#define TM_ROUTER_POOL_ASSETS_H

#include "router/pool/jobs.h"
#include "router/pool/mailbox.h"
#include "router/served.h"

/* Strings are copied, apart from those of opts, which must outlive the helper. */
tm_status tm_assets_fetch(tm_jobs *helper, tm_mailbox *mailbox, const char *address,
                          const char *model, const char *digest, const tm_served_opts *opts);

#endif
