/* What server and client of this folder share: completion tags, the send queue of one stream, channel
 * arguments, messages in and out of gRPC's slices. Nothing outside net/rpc includes this.
 *
 * Rules of gRPC core that shape it: one batch of each kind may be outstanding per call, batches that send
 * must be serialised among themselves (here: under the sender's lock), batches that receive likewise
 * (here: only the completion-queue thread starts them), and every started batch completes exactly once on
 * the completion queue, also after a cancel. A stream is over when its close or status event came and no
 * batch is outstanding. */
#ifndef TM_NET_RPC_INTERNAL_H
#define TM_NET_RPC_INTERNAL_H

#include <grpc/grpc.h>
#include <pthread.h>

#include "net/rpc/rpc.h"

#define RPC_MESSAGE_MAX    ((size_t)64 << 20)
#define RPC_QUEUE_MAX      ((size_t)64 << 20)
#define RPC_METADATA_MAX   8192
#define RPC_METADATA_PAIRS 16

/* What grpc_completion_queue_next gives back: the function to run on the queue's thread. */
typedef struct rpc_tag {
    void (*fn)(void *owner, bool ok);
    void *owner;
} rpc_tag;

typedef struct rpc_msg {
    struct rpc_msg *next;
    grpc_byte_buffer *bytes;
    size_t len;
} rpc_msg;

/* Everything one side sends on one call, in order: initial metadata, messages, the end (the server's
 * status or the client's half close). `closed` is set when the call is over; nothing starts afterwards. */
typedef struct rpc_sender {
    pthread_mutex_t lock;
    grpc_call *call; /* borrowed from the owner; valid until closed */
    rpc_tag tag;
    rpc_msg *head, *tail, *flying;
    size_t queued, max; /* bytes, the message in flight included */
    bool in_flight, end_wanted, end_sent, closed;
    grpc_op end;
    grpc_slice end_text; /* status message that `end` refers to */
} rpc_sender;

void rpc_sender_init(rpc_sender *s, grpc_call *call, size_t max, void (*done)(void *, bool),
                     void *owner);
void rpc_sender_deinit(rpc_sender *s);
/* The first batch: initial metadata, whose array must live until it completed. */
void rpc_sender_begin(rpc_sender *s, grpc_metadata *metadata, size_t count);
tm_status rpc_sender_push(rpc_sender *s, const void *data, size_t len);
/* Sends `end` after everything queued. The first end wins. text is the message of a status, or NULL. */
void rpc_sender_end(rpc_sender *s, const grpc_op *end, const char *text);
/* The owner's completion function passes the result on; starts the next batch. */
void rpc_sender_done(rpc_sender *s, bool ok);
/* Drops what is queued and refuses more; returns whether a batch is still in flight. */
bool rpc_sender_close(rpc_sender *s);
void rpc_sender_cancel(rpc_sender *s, grpc_status_code code, const char *why);
size_t rpc_sender_queued(rpc_sender *s);

/* Starts one receiving batch; completion-queue thread only. */
void rpc_batch(grpc_call *call, const grpc_op *ops, size_t count, rpc_tag *tag);
/* Calls fn with the bytes in one piece. False when out of memory. */
bool rpc_with_bytes(grpc_byte_buffer *b, void (*fn)(void *, const void *, size_t), void *arg);

void rpc_library_acquire(void);
void rpc_library_release(void);
/* Runs tags until the queue is shut down; the thread function of servers and channels. */
void *rpc_queue_run(void *cq);

typedef struct rpc_arg {
    const char *key;
    int value;
} rpc_arg;
/* At most RPC_ARGS_MAX rows into out; the channel arguments point into rows. */
#define RPC_ARGS_MAX 20
void rpc_args_fill(grpc_arg out[RPC_ARGS_MAX], const rpc_arg *rows, size_t count);

tm_status rpc_status_from_grpc(grpc_status_code code);

#endif
