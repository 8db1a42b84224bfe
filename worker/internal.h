/* Shared by the files of the worker's service: sessions (one Attach stream each), live requests and their
 * lookup tables.
 *
 * One lock guards all of it. It is taken by the RPC thread (requests in), the pump thread (events out) and
 * the main thread (drain). Calls into RPC and engine happen under it: both only take inner locks of their
 * own and never call back while holding them. A tm_rpc_call is used only while its session is in the
 * list, and on_close takes it out under the lock, so no call is touched after its end. */
#ifndef TM_WORKER_INTERNAL_H
#define TM_WORKER_INTERNAL_H

#include <pthread.h>

#include "common/buf.h"
#include "net/rpc/rpc.h"
#include "proto/worker.pb-c.h"
#include "worker/service.h"

#define PB(name) Turbomesh__Worker__V1__##name

typedef struct worker_session worker_session;

typedef struct worker_live {
    uint64_t engine_id;      /* unique in this process */
    uint64_t id;             /* the router's, unique in its session */
    worker_session *session; /* NULL: the router left, the engine's FINISHED is awaited */
    struct worker_live *engine_next, *id_next; /* hash chains */
    struct worker_live *prev, *next;           /* of the session */
    bool logprobs, prompt_logprobs;
    bool handback; /* cancelled by the drain: the router goes on elsewhere */
    uint64_t slot_step;
    int slot; /* in the scratch of step slot_step */
} worker_live;

struct worker_session {
    tm_worker_service *service;
    tm_rpc_call *call;
    worker_session *prev, *next;
    worker_live *lives;
    uint64_t epoch; /* of its Hello; stays when the group registers again */
    uint64_t submit_seq, load_seq;
    bool dead; /* aborted: waits for on_close */
    char router[64];
    int slot_head, slot_tail; /* chain of this step's slots, -1 = none */
};

typedef struct worker_table {
    worker_live **by_engine, **by_id;
    size_t mask;
    int count; /* entries, those without a session included */
} worker_table;

typedef struct worker_watcher { /* a grpc.health.v1 Watch */
    tm_rpc_call *call;
    struct worker_watcher *prev, *next;
} worker_watcher;

typedef struct worker_scratch worker_scratch;

struct tm_worker_service {
    pthread_mutex_t lock;
    tm_engine *engine;
    const tm_engine_info *info;
    tm_rpc_server *server;
    pthread_t pump;
    bool pump_started, stopping;
    char group[128], model[128], digest[65];
    int32_t stop_ids[16];
    uint64_t epoch, next_engine_id, step_count;
    bool draining;
    worker_session *sessions;
    worker_watcher *watchers;
    worker_table table;
    int handed_back;
    int64_t last_load_ms;
    bool load_dirty; /* something was submitted or finished since the last report */
    tm_buf pack;     /* of the thread that holds the lock */
    worker_scratch *scratch;
    char *assets; /* packed AssetsReply */
    size_t assets_len;
    void (*on_lost)(void *user);
    void (*on_drain)(void *user, int64_t deadline_ms);
    void *user;
};

bool worker_table_init(worker_table *t, size_t entries_hint);
void worker_table_deinit(worker_table *t);
void worker_table_add(worker_table *t, worker_live *l);
worker_live *worker_table_engine(const worker_table *t, uint64_t engine_id);
worker_live *worker_table_id(const worker_table *t, const worker_session *s, uint64_t id);
/* Takes the entry from its session and the id table; the engine's entry stays. */
void worker_table_orphan(worker_table *t, worker_live *l);
void worker_table_remove(worker_table *t, worker_live *l); /* and frees */

/* All with the lock held. */
tm_status worker_pack(tm_worker_service *s, const ProtobufCMessage *m);
void worker_session_send(worker_session *n, PB(WorkerMessage) * m);
void worker_session_abort(worker_session *n, tm_status st, const char *why);
void worker_send_load(worker_session *n, const tm_engine_stats *stats);
void worker_send_loads(tm_worker_service *s);
void worker_fill_hello(tm_worker_service *s, uint64_t epoch, PB(Hello) * h);
void worker_fill_load(const tm_worker_service *s, const tm_engine_stats *stats,
                      PB(LoadReport) * load);

/* Attach: submit.c. */
void *worker_attach_open(void *service, tm_rpc_call *call);
void worker_attach_message(void *user, tm_rpc_call *call, const void *data, size_t len);
void worker_attach_half_close(void *user, tm_rpc_call *call);
void worker_attach_close(void *user, tm_rpc_call *call, bool cancelled);

/* Sends one step's events to the sessions they belong to; takes the lock. deliver.c */
void worker_deliver(tm_worker_service *s, const tm_step_events *ev);
worker_scratch *worker_scratch_create(void);
void worker_scratch_destroy(worker_scratch *x);

/* Reads what a router needs to speak the model's language, packed as AssetsReply. assets.c */
tm_status worker_assets_load(const char *model_dir, const char *digest, char **out, size_t *len,
                             tm_err *err);

/* grpc.health.v1: health.c. */
void *worker_watch_open(void *service, tm_rpc_call *call);
void worker_watch_message(void *user, tm_rpc_call *call, const void *data, size_t len);
void worker_watch_close(void *user, tm_rpc_call *call, bool cancelled);
void worker_check_message(void *user, tm_rpc_call *call, const void *data, size_t len);
void worker_watch_notify(tm_worker_service *s); /* lock held */

#endif
