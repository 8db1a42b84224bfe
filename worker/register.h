/* Registration of a group in etcd: key /turbomesh/v1/groups/<pool>/<group>, value one JSON object
 * {epoch, address, model, digest, tp, max_batch_size, max_context, blocks_total, version, state}.
 *
 * The epoch is wall-clock milliseconds and rises with every registration attempt; the service is told before
 * the value is put. state is READY, or DRAINING after tm_worker_reg_drain. */
#ifndef TM_WORKER_REGISTER_H
#define TM_WORKER_REGISTER_H

#include "worker/service.h"

typedef struct tm_worker_reg tm_worker_reg;

typedef struct tm_worker_reg_opts {
    const char *etcd, *pool, *group, *address, *model;
    const tm_engine_info *info;
    tm_worker_service *service;
    uint64_t epoch; /* of the first registration */
} tm_worker_reg_opts;

/* Starts in the background; strings are copied. */
tm_status tm_worker_reg_create(tm_worker_reg **out, const tm_worker_reg_opts *opts, tm_err *err);
void tm_worker_reg_drain(tm_worker_reg *r);
void tm_worker_reg_destroy(tm_worker_reg *r, int64_t timeout_ms); /* revokes the lease */

#endif
