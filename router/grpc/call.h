/* Inside router/grpc: one call, from the gRPC thread to the loop thread and back.
 *
 * A call is shared: the gRPC thread holds it until on_close, the loop thread until it has seen the close.
 * `rpc` is only touched under `lock`, and is NULL from on_close on, so the loop may answer a call that has
 * just gone without harm. Messages are unpacked on the gRPC thread and travel as notes. */
#ifndef TM_ROUTER_GRPC_CALL_H
#define TM_ROUTER_GRPC_CALL_H

#include <pthread.h>
#include <stdatomic.h>

#include "common/buf.h"
#include "net/rpc/rpc.h"
#include "proto/health.pb-c.h"
#include "proto/reflection.pb-c.h"
#include "proto/turbomesh.pb-c.h"
#include "router/api/prep.h"
#include "router/grpc/public.h"
#include "router/observe.h"
#include "router/pool/mailbox.h"

#define PUB(name) Turbomesh__V1__##name

typedef struct tm_pcall tm_pcall;
typedef struct tm_pstream tm_pstream; /* a running Generate or Chat */

/* What the face knows about a method beside its path. */
typedef struct tm_pmethod {
    const char *path;
    const char *label; /* in metrics and the log, NULL = in neither */
    const ProtobufCMessageDescriptor *request;
    bool open;      /* no access check */
    bool generates; /* counts as active, refused while draining */
    bool many;      /* the client may send several messages */
    void (*handle)(tm_pcall *c,
                   ProtobufCMessage **m); /* loop thread; may take *m and set it NULL */
} tm_pmethod;

struct tm_pcall {
    tm_public *owner;
    const tm_pmethod *method;
    atomic_int refs;
    pthread_mutex_t lock;
    tm_rpc_call *rpc; /* under lock */
    /* gRPC thread */
    bool got_message;
    char *authorization;
    int64_t deadline_ms; /* left when it came, INT64_MAX = none */
    int64_t start_ns;
    /* loop thread */
    tm_pcall *prev, *next; /* calls with a message, until their close was seen */
    bool listed, entered, finished, closed;
    uint64_t sent_bytes, taken_bytes; /* given to the stream; of those, taken by the client */
    int64_t stalled_ns;               /* since when it takes nothing, although there is something */
    void *ticket;
    const char *key; /* the ticket's */
    tm_pstream *stream;
    bool watching; /* health Watch */
    int watched;   /* status told last, -1 = none */
};

struct tm_public {
    tm_public_opts opts;
    tm_rpc_server *server;
    tm_mailbox *mailbox;
    tm_prep_pool *pool; /* long prompts */
    struct event *mail, *timer;
    tm_pcall *calls;
    int active;
    atomic_int open_calls; /* gRPC thread; from on_open to on_close, with or without a message */
    bool serving, closing;
    unsigned ticks;
    tm_buf pack;
    char salt[17]; /* of this process, in request ids */
    uint64_t ids;
    /* The chunk being put together: text, token ids, log-probabilities, the best tokens of each and how many
     * they are, and the messages made of them. */
    tm_buf text, ids_out, lps, tops, top_at, top_rows;
};

/* call.c */
#define TM_PUBLIC_METHODS 7
void tm_pcall_rpc_methods(tm_rpc_method rows[TM_PUBLIC_METHODS]);
/* Loop thread. CLOSED when the client is gone, BUSY when it does not read. */
tm_status tm_pcall_send(tm_pcall *c, const ProtobufCMessage *m);
/* Ends the call; what was sent before goes out first. Only the first end counts. */
void tm_pcall_finish(tm_pcall *c, tm_status st, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Ends it at once: a client that does not read. */
void tm_pcall_abort(tm_pcall *c, tm_status st, const char *message);
/* Cuts the calls whose clients took nothing for the write timeout; now and then. */
void tm_pcalls_watch(tm_public *p, int64_t now_ns);
void tm_pcall_acquire(tm_pcall *c);
void tm_pcall_release(tm_pcall *c);

/* Handlers. */
void tm_public_generate(tm_pcall *c, ProtobufCMessage **m);
void tm_public_chat(tm_pcall *c, ProtobufCMessage **m);
void tm_public_list_models(tm_pcall *c, ProtobufCMessage **m);
void tm_public_health_check(tm_pcall *c, ProtobufCMessage **m);
void tm_public_health_watch(tm_pcall *c, ProtobufCMessage **m);
void tm_public_health_tick(tm_public *p);
void tm_public_reflect(tm_pcall *c, ProtobufCMessage **m);
/* The client is gone (CANCELLED), does not read (TIMEOUT), or the router stops (UNAVAILABLE): the generation
 * ends and nothing more is sent. */
void tm_pstream_drop(tm_pcall *c, tm_status why);

/* request.c: what Generate and Chat ask for. One of generate and chat is set. */
typedef struct tm_public_ask {
    const char *model, *session;
    const PUB(SamplingParams) * sampling; /* NULL = defaults */
    const PUB(GenerateRequest) * generate;
    const PUB(ChatRequest) * chat;
} tm_public_ask;
/* Checked parameters, ready for tm_prep_work once it has its model; NULL with *e. */
tm_prep *tm_public_prep(const tm_public_ask *ask, const tm_api_limits *limits, tm_api_error *e);

#endif
