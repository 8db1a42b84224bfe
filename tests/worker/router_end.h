/* A router's end of an Attach stream, for tests: records what comes, sends what a router sends, and sums up
 * what the stream said about one request. */
#ifndef TM_TESTS_WORKER_ROUTER_END_H
#define TM_TESTS_WORKER_ROUTER_END_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "net/rpc/rpc.h"
#include "proto/worker.pb-c.h"

#define PB(name)  Turbomesh__Worker__V1__##name
#define FINISH(x) TURBOMESH__WORKER__V1__FINISH_REASON__FINISH_##x
#define REJECT(x) TURBOMESH__WORKER__V1__REJECT_REASON__REJECT_##x
#define STATE(x)  TURBOMESH__WORKER__V1__LOAD_REPORT__STATE__##x
#define WORKER(m) "/turbomesh.worker.v1.Worker/" m
#define MODEL     "models/demo-20m"
#define VOCAB     8192 /* of models/demo-20m */
#define WAIT_MS   20000
#define MSGS_MAX  4096

typedef struct router {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    tm_rpc_stream *stream;
    PB(WorkerMessage) * msg[MSGS_MAX];
    int count;  /* messages received */
    int loads;  /* of which LoadReports */
    int events; /* request events in StepEvents */
    bool closed, paused;
    tm_status st;
} router;

typedef bool (*condition)(const router *r, int n);

/* False when it did not come true within WAIT_MS. */
bool wait_router(router *r, condition is, int n);
bool has_messages(const router *r, int n);
bool has_loads(const router *r, int n);
bool has_events(const router *r, int n);
bool is_closed(const router *r, int n);
bool last_load_drains(const router *r, int n);

router *attach(tm_rpc_channel *channel); /* waits for Hello and the first load report */
void detach(router *r);                  /* cancels when still open, and frees */

extern int32_t PROMPT[4];
PB(Submit) plain(uint64_t id, int max_tokens);
void send_message(router *r, const PB(RouterMessage) * m);
void send_submit(router *r, PB(Submit) * s);
void send_plain(router *r, uint64_t id, int max_tokens);
void send_cancel(router *r, uint64_t id);

/* What the stream said about one request, all messages together. */
typedef struct told {
    int admitted, tokens, finishes, rejects, messages;
    int first_pos, next_pos; /* -1 = none yet */
    int32_t token[256];
    PB(FinishReason) finish;
    PB(RejectReason) reject;
    char detail[480];
    uint32_t prompt_tokens;
    bool broken; /* positions not in sequence */
} told;

told tell(router *r, uint64_t id);

#endif
