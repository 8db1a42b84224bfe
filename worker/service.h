/* The gRPC service of rank 0: Attach streams of routers, model assets, status, health.
 *
 * A pump thread takes each step's events from the engine and sends every router one message with what
 * concerns its requests. A router that leaves, or does not read (its send queue reached the bound), loses
 * its stream and its requests are cancelled at once. Load is reported to every router at least every 100 ms
 * and at most every 50 ms, and at once when the state changes.
 *
 * Epochs: a group that registers again gets a new epoch; streams that are open keep the epoch of their
 * Hello until they end, and Submits that name either epoch are taken. */
#ifndef TM_WORKER_SERVICE_H
#define TM_WORKER_SERVICE_H

#include "engine/engine.h"

typedef struct tm_worker_service tm_worker_service;

typedef struct tm_worker_service_opts {
    tm_engine *engine;      /* borrowed; open */
    const char *address;    /* "127.0.0.1:0" */
    const char *group;      /* name in the registry */
    const char *model_name; /* served name; NULL = the folder's */
    const char *model_dir;  /* assets are read from here once */
    uint64_t epoch;
    size_t stream_queue_max; /* bytes a router may leave unread; 0 = 16 MiB */
    /* The engine reported that the group is lost; pump thread. */
    void (*on_lost)(void *user);
    /* A router asked for a drain; RPC thread. deadline_ms < 0: the default. May be NULL. */
    void (*on_drain)(void *user, int64_t deadline_ms);
    void *user;
} tm_worker_service_opts;

tm_status tm_worker_service_create(tm_worker_service **out, const tm_worker_service_opts *opts,
                                   tm_err *err);
int tm_worker_service_port(const tm_worker_service *s);
void tm_worker_service_set_epoch(tm_worker_service *s, uint64_t epoch);

/* From now on new Submits are rejected as DRAINING; routers are told at once. */
void tm_worker_service_drain(tm_worker_service *s);
int tm_worker_service_live(tm_worker_service *s); /* requests not yet finished */
/* Ends what is left with HANDBACK: the routers go on elsewhere. Live reaches 0 with the next steps. */
void tm_worker_service_hand_back(tm_worker_service *s);
int tm_worker_service_handed_back(tm_worker_service *s); /* requests, so far */
/* Ends the streams after what is queued, waiting up to grace_ms, and joins the threads. The engine stays. */
void tm_worker_service_destroy(tm_worker_service *s, int64_t grace_ms);

#endif
