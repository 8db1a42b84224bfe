/* The public gRPC service in front of the scripted dispatch, and a client of net/rpc for it. The client's callbacks
 * run on its own thread and only record; the loop runs in the test. */
#ifndef TM_TESTS_ROUTER_GRPC_HARNESS_H
#define TM_TESTS_ROUTER_GRPC_HARNESS_H

#include "tests/router/api_harness.h"

#include <pthread.h>

#include "common/clock.h"
#include "net/rpc/rpc.h"
#include "proto/turbomesh.pb-c.h"
#include "router/access.h"
#include "router/grpc/public.h"

#define PUB(name)    Turbomesh__V1__##name
#define SERVICE      "/turbomesh.v1.TurboMesh/"
#define MESSAGES_MAX 256
#define WAIT_MS      20000

typedef struct grpc_rig {
    struct event_base *base;
    tm_metrics *metrics;
    tm_keys *keys;
    tm_access access;
    tm_public *server;
    tm_rpc_channel *channel;
} grpc_rig;
extern grpc_rig grig;

/* key_file, over: NULL = none, defaults. */
void grig_start(const char *key_file, const tm_public_opts *over, tm_limit_opts limit);
int grig_setup(void **state); /* grig_start with defaults */
int grig_teardown(void **state);
void grig_turn(void);

/* Runs the loop until it is so; the time only bounds what hangs. */
#define WAIT_FOR(what)                                                                             \
    for (int64_t end_ = tm_clock_ms() + WAIT_MS; !(what);) {                                       \
        grig_turn();                                                                               \
        if (tm_clock_ms() > end_)                                                                  \
            fail_msg("not within %d ms: %s", WAIT_MS, #what);                                      \
    }

/* ---- a call ---- */

typedef struct gcall {
    pthread_mutex_t lock;
    pthread_cond_t go;
    bool hold; /* the client reads no further */
    tm_rpc_stream *stream;
    struct {
        void *data;
        size_t len;
    } got[MESSAGES_MAX];
    int count;
    bool closed;
    tm_status st;
    char text[600];
} gcall;

void gcall_open(gcall *c, const char *path, const char *authorization, int64_t deadline_ms);
void gcall_send(gcall *c, const ProtobufCMessage *m);
/* Open, one message, half-close. method: of SERVICE, or a path. */
void gcall_start(gcall *c, const char *method, const ProtobufCMessage *m);
bool gcall_closed(gcall *c);
int gcall_count(gcall *c);
void gcall_free(gcall *c); /* cancels what is still open */
void *gcall_unpack(const gcall *c, int i, const ProtobufCMessageDescriptor *d);
/* Waits for the end with this status and a text that has `part`; frees. */
void gcall_expect(gcall *c, tm_status st, const char *part);

/* ---- what a generation brought ---- */

typedef struct told {
    tm_buf text;
    int32_t ids[1000];
    float lps[1000];
    int id_count, lp_count, top_count;
    char finish[16], request_id[200];
    int prompt, completion, cached;
} told;

/* Waits for a good end and checks the form of all chunks. */
void gcall_hear(gcall *c, told *t);
void told_free(told *t);
void assert_told(const told *t, const char *want);

PUB(GenerateRequest) empty_request(void);
PUB(GenerateRequest) text_request(const char *text, PUB(SamplingParams) * sampling);

#endif
