/* RPC: byte messages over gRPC core's C surface, which is used in this folder only (it is private
 * upstream and pinned by version). net knows nothing of protobuf: messages are byte strings.
 *
 * Every method is treated as a stream of messages in both directions; a unary call is a stream with one
 * message each way. Callbacks run on the handle's own completion-queue thread and must not block; sends
 * may come from any thread, are queued per stream up to queue_max bytes, and return TM_STATUS_BUSY beyond
 * it (the stream is then the caller's to cancel or to pause).
 *
 * Limits: 64 MiB a message, 8 KiB metadata. Keepalive pings find a cut network in about 3 s; retries of
 * gRPC itself are off. Never fork after the first create. */
#ifndef TM_NET_RPC_RPC_H
#define TM_NET_RPC_RPC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

typedef struct tm_rpc_server tm_rpc_server;
typedef struct tm_rpc_call tm_rpc_call;       /* server side of one stream */
typedef struct tm_rpc_channel tm_rpc_channel; /* client connection */
typedef struct tm_rpc_stream tm_rpc_stream;   /* client side of one stream */

/* Server side. on_open: a client called; return the per-call user pointer. on_message: one message;
 * data is valid during the call. on_half_close: the client will send no more, also because it cancelled or is gone
 * (gRPC tells both alike; sends may fail already, and on_close says which it was): a method that needs a message asks
 * whether one came. on_close: the last callback: the call ended (cancelled says whether by the client or the network);
 * the tm_rpc_call is invalid once it returns, and sends racing with it are dropped safely if the owner stops using it
 * there. */
typedef struct tm_rpc_method {
    const char *path; /* "/turbomesh.worker.v1.Worker/Attach" */
    void *(*on_open)(void *service, tm_rpc_call *call);
    void (*on_message)(void *user, tm_rpc_call *call, const void *data, size_t len);
    void (*on_half_close)(void *user, tm_rpc_call *call);
    void (*on_close)(void *user, tm_rpc_call *call, bool cancelled);
} tm_rpc_method;

typedef struct tm_rpc_server_opts {
    const char *address; /* "127.0.0.1:0" picks a port */
    const tm_rpc_method *methods;
    int method_count;
    void *service;    /* passed to on_open */
    size_t queue_max; /* bytes queued per call; 0 = 64 MiB */
} tm_rpc_server_opts;

tm_status tm_rpc_server_create(tm_rpc_server **out, const tm_rpc_server_opts *opts, tm_err *err);
int tm_rpc_server_port(const tm_rpc_server *s);
/* Refuses new calls, waits up to grace_ms for the open ones, cancels the rest, joins the thread. */
void tm_rpc_server_destroy(tm_rpc_server *s, int64_t grace_ms);

tm_status tm_rpc_call_send(tm_rpc_call *c, const void *data, size_t len);
/* Ends the call with a gRPC status after everything queued went out. */
void tm_rpc_call_finish(tm_rpc_call *c, tm_status st, const char *message);
/* Ends the call at once: what is queued is dropped (a client that does not read). on_close follows. */
void tm_rpc_call_abort(tm_rpc_call *c, tm_status st, const char *message);
/* Value of a request metadata key ("authorization"), or NULL; valid until on_close. */
const char *tm_rpc_call_metadata(tm_rpc_call *c, const char *key);
int64_t tm_rpc_call_deadline_ms(const tm_rpc_call *c); /* left, INT64_MAX = none */
size_t tm_rpc_call_queued(const tm_rpc_call *c);       /* bytes not yet given to the transport */

/* Client side. on_ready: the peer accepted the stream (initial metadata came). on_close: the last
 * callback; st is TM_OK or the mapped gRPC status. */
typedef struct tm_rpc_stream_ops {
    void (*on_ready)(void *user);
    void (*on_message)(void *user, const void *data, size_t len);
    void (*on_close)(void *user, tm_status st, const char *message);
} tm_rpc_stream_ops;

tm_status tm_rpc_channel_create(tm_rpc_channel **out, const char *address, tm_err *err);
/* Cancels open streams (their on_close runs) and joins the channel's thread. Not from a callback. */
void tm_rpc_channel_destroy(tm_rpc_channel *ch);

/* metadata: pairs key, value, NULL-terminated, or NULL. deadline_ms 0 = none. */
tm_status tm_rpc_stream_open(tm_rpc_stream **out, tm_rpc_channel *ch, const char *path,
                             const char *const *metadata, int64_t deadline_ms,
                             const tm_rpc_stream_ops *ops, void *user, tm_err *err);
tm_status tm_rpc_stream_send(tm_rpc_stream *s, const void *data, size_t len);
void tm_rpc_stream_half_close(tm_rpc_stream *s);
void tm_rpc_stream_cancel(tm_rpc_stream *s);
/* The caller gives its handle up; memory goes when on_close has run too. Call exactly once. */
void tm_rpc_stream_release(tm_rpc_stream *s);

/* A blocking unary call on top of the above (CLI, GetModelAssets). *reply is freed by the caller. */
tm_status tm_rpc_unary(tm_rpc_channel *ch, const char *path, const void *req, size_t req_len,
                       int64_t deadline_ms, void **reply, size_t *reply_len, tm_err *err);

#endif
