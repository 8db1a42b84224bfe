/* Client side: a channel is one connection with a completion queue and a thread of its own.
 *
 * A stream has two lives that end independently: the caller's handle (until release) and the call (until
 * on_close ran); memory goes with the later one. The channel keeps a list of live streams so that destroy
 * can cancel them and wait. gRPC reconnects by itself, with a short backoff because the router's own
 * logic decides where requests go; a stream opened meanwhile fails at once with UNAVAILABLE. */
#include "net/rpc/internal.h"

#include <grpc/byte_buffer.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"

struct tm_rpc_channel {
    grpc_channel *grpc;
    grpc_completion_queue *cq;
    pthread_t thread;
    pthread_mutex_t lock; /* guards streams, closing */
    pthread_cond_t empty;
    tm_rpc_stream *streams;
    bool closing;
};

struct tm_rpc_stream {
    tm_rpc_channel *channel;
    tm_rpc_stream *prev, *next; /* in channel->streams while live */
    grpc_call *call;
    rpc_sender sender;
    rpc_tag ready_tag, recv_tag, status_tag;
    tm_rpc_stream_ops ops;
    void *user;
    grpc_metadata_array initial, trailing;
    grpc_byte_buffer *received;
    grpc_status_code code;
    grpc_slice details;
    bool waiting_ready, receiving, ended; /* queue thread only */
    int refs;                             /* atomic: the caller's and the live call's */
    size_t pair_count;
    grpc_metadata pairs[RPC_METADATA_PAIRS];
};

static void stream_unref(tm_rpc_stream *s)
{
    if (__atomic_sub_fetch(&s->refs, 1, __ATOMIC_ACQ_REL) != 0)
        return;
    rpc_sender_deinit(&s->sender);
    free(s);
}

static void unlink_stream(tm_rpc_stream *s)
{
    tm_rpc_channel *ch = s->channel;
    pthread_mutex_lock(&ch->lock);
    if (s->prev)
        s->prev->next = s->next;
    else
        ch->streams = s->next;
    if (s->next)
        s->next->prev = s->prev;
    if (!ch->streams)
        pthread_cond_signal(&ch->empty);
    pthread_mutex_unlock(&ch->lock);
}

static void drop_call(tm_rpc_stream *s)
{
    grpc_metadata_array_destroy(&s->initial);
    grpc_metadata_array_destroy(&s->trailing);
    grpc_slice_unref(s->details);
    for (size_t i = 0; i < s->pair_count; i++) {
        grpc_slice_unref(s->pairs[i].key);
        grpc_slice_unref(s->pairs[i].value);
    }
    grpc_call_unref(s->call);
}

/* Runs after every completion: the last callback, when the status came and nothing is outstanding. */
static void stream_settle(tm_rpc_stream *s)
{
    if (!s->ended || s->waiting_ready || s->receiving || rpc_sender_close(&s->sender))
        return;
    char *text = grpc_slice_to_c_string(s->details);
    if (s->ops.on_close)
        s->ops.on_close(s->user, rpc_status_from_grpc(s->code), text);
    gpr_free(text);
    drop_call(s);
    unlink_stream(s);
    stream_unref(s);
}

static void stream_receive(tm_rpc_stream *s)
{
    grpc_op op;
    memset(&op, 0, sizeof(op));
    op.op = GRPC_OP_RECV_MESSAGE;
    op.data.recv_message.recv_message = &s->received;
    s->received = NULL;
    s->receiving = true;
    rpc_batch(s->call, &op, 1, &s->recv_tag);
}

static void give_message(void *stream, const void *data, size_t len)
{
    tm_rpc_stream *s = stream;
    if (s->ops.on_message)
        s->ops.on_message(s->user, data, len);
}

static void stream_received(void *stream, bool ok)
{
    tm_rpc_stream *s = stream;
    s->receiving = false;
    if (ok && s->received) {
        bool given = rpc_with_bytes(s->received, give_message, s);
        grpc_byte_buffer_destroy(s->received);
        if (!given)
            rpc_sender_cancel(&s->sender, GRPC_STATUS_INTERNAL, "message could not be decoded");
        stream_receive(s);
    }
    stream_settle(s);
}

static void stream_ready(void *stream, bool ok)
{
    tm_rpc_stream *s = stream;
    s->waiting_ready = false;
    if (ok) {
        if (s->ops.on_ready && !s->ended)
            s->ops.on_ready(s->user);
        stream_receive(s);
    }
    stream_settle(s);
}

static void stream_ended(void *stream, bool ok)
{
    tm_rpc_stream *s = stream;
    (void)ok; /* always succeeds; the code tells what happened */
    s->ended = true;
    stream_settle(s);
}

static void stream_sent(void *stream, bool ok)
{
    tm_rpc_stream *s = stream;
    rpc_sender_done(&s->sender, ok);
    stream_settle(s);
}

static grpc_channel *new_grpc_channel(const char *address)
{
    static const rpc_arg rows[] = {
        {GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)RPC_MESSAGE_MAX},
        {GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, (int)RPC_MESSAGE_MAX},
        {GRPC_ARG_MAX_METADATA_SIZE, RPC_METADATA_MAX},
        /* One connection per channel: channels share nothing, not even a transport lock. */
        {GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1},
        {GRPC_ARG_ENABLE_RETRIES, 0},
        {GRPC_ARG_ENABLE_HTTP_PROXY, 0},
        {GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1},
        /* A cut network is found in 3 s, also while no call is open. */
        {GRPC_ARG_KEEPALIVE_TIME_MS, 1000},
        {GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 2000},
        {GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1},
        {GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0},
        {GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100},
        {GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 2000}, /* time for one attempt to connect */
        {GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000},
    };
    grpc_arg args[RPC_ARGS_MAX];
    rpc_args_fill(args, rows, TM_ARRAY_LEN(rows));
    grpc_channel_args list = {TM_ARRAY_LEN(rows), args};
    grpc_channel_credentials *creds = grpc_insecure_credentials_create();
    grpc_channel *ch = grpc_channel_create(address, creds, &list);
    grpc_channel_credentials_release(creds);
    return ch;
}

tm_status tm_rpc_channel_create(tm_rpc_channel **out, const char *address, tm_err *err)
{
    if (!address || !*address)
        return TM_FAIL(err, TM_STATUS_INVALID, "rpc channel: no address");
    tm_rpc_channel *ch = calloc(1, sizeof(*ch));
    if (!ch)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "rpc channel: out of memory");
    rpc_library_acquire();
    pthread_mutex_init(&ch->lock, NULL);
    pthread_cond_init(&ch->empty, NULL);
    ch->cq = grpc_completion_queue_create_for_next(NULL);
    ch->grpc = new_grpc_channel(address);
    if (pthread_create(&ch->thread, NULL, rpc_queue_run, ch->cq) != 0) {
        grpc_channel_destroy(ch->grpc);
        grpc_completion_queue_shutdown(ch->cq);
        rpc_queue_run(ch->cq);
        grpc_completion_queue_destroy(ch->cq);
        free(ch);
        rpc_library_release();
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "rpc channel: cannot start a thread");
    }
    *out = ch;
    return TM_OK;
}

void tm_rpc_channel_destroy(tm_rpc_channel *ch)
{
    if (!ch)
        return;
    pthread_mutex_lock(&ch->lock);
    ch->closing = true;
    for (tm_rpc_stream *s = ch->streams; s; s = s->next)
        rpc_sender_cancel(&s->sender, GRPC_STATUS_CANCELLED, "channel closed");
    while (ch->streams)
        pthread_cond_wait(&ch->empty, &ch->lock);
    pthread_mutex_unlock(&ch->lock);
    grpc_channel_destroy(ch->grpc);
    grpc_completion_queue_shutdown(ch->cq);
    pthread_join(ch->thread, NULL);
    grpc_completion_queue_destroy(ch->cq);
    pthread_mutex_destroy(&ch->lock);
    pthread_cond_destroy(&ch->empty);
    free(ch);
    rpc_library_release();
}

static gpr_timespec deadline_in(int64_t ms)
{
    if (ms <= 0)
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_millis(ms, GPR_TIMESPAN));
}

static tm_status copy_pairs(tm_rpc_stream *s, const char *const *metadata, tm_err *err)
{
    size_t n = 0;
    while (metadata && metadata[2 * n] && metadata[2 * n + 1])
        n++;
    if (n > RPC_METADATA_PAIRS)
        return TM_FAIL(err, TM_STATUS_INVALID, "rpc stream: more than %d metadata pairs",
                       RPC_METADATA_PAIRS);
    for (size_t i = 0; i < n; i++) {
        s->pairs[i].key = grpc_slice_from_copied_string(metadata[2 * i]);
        s->pairs[i].value = grpc_slice_from_copied_string(metadata[2 * i + 1]);
    }
    s->pair_count = n;
    return TM_OK;
}

/* Starts the three receiving batches and the first sending one, in that order: the status must be asked
 * for before anything can fail. */
static void stream_start(tm_rpc_stream *s)
{
    grpc_op op;
    memset(&op, 0, sizeof(op));
    op.op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    op.data.recv_status_on_client.trailing_metadata = &s->trailing;
    op.data.recv_status_on_client.status = &s->code;
    op.data.recv_status_on_client.status_details = &s->details;
    rpc_sender_begin(&s->sender, s->pairs, s->pair_count);
    grpc_op first;
    memset(&first, 0, sizeof(first));
    first.op = GRPC_OP_RECV_INITIAL_METADATA;
    first.data.recv_initial_metadata.recv_initial_metadata = &s->initial;
    rpc_batch(s->call, &first, 1, &s->ready_tag);
    rpc_batch(s->call, &op, 1, &s->status_tag);
}

static void stream_prepare(tm_rpc_stream *s, tm_rpc_channel *ch, const tm_rpc_stream_ops *ops,
                           void *user)
{
    s->channel = ch;
    s->ops = *ops;
    s->user = user;
    s->refs = 2;
    s->waiting_ready = true;
    s->ready_tag = (rpc_tag){stream_ready, s};
    s->recv_tag = (rpc_tag){stream_received, s};
    s->status_tag = (rpc_tag){stream_ended, s};
    s->details = grpc_empty_slice();
    grpc_metadata_array_init(&s->initial);
    grpc_metadata_array_init(&s->trailing);
}

tm_status tm_rpc_stream_open(tm_rpc_stream **out, tm_rpc_channel *ch, const char *path,
                             const char *const *metadata, int64_t deadline_ms,
                             const tm_rpc_stream_ops *ops, void *user, tm_err *err)
{
    tm_rpc_stream *s = calloc(1, sizeof(*s));
    if (!s)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "rpc stream: out of memory");
    tm_status st = copy_pairs(s, metadata, err);
    if (st != TM_OK) {
        free(s);
        return st;
    }
    stream_prepare(s, ch, ops, user);
    grpc_slice method = grpc_slice_from_copied_string(path);
    s->call = grpc_channel_create_call(ch->grpc, NULL, GRPC_PROPAGATE_DEFAULTS, ch->cq, method,
                                       NULL, deadline_in(deadline_ms), NULL);
    grpc_slice_unref(method);
    rpc_sender_init(&s->sender, s->call, RPC_QUEUE_MAX, stream_sent, s);

    pthread_mutex_lock(&ch->lock);
    if (ch->closing) {
        pthread_mutex_unlock(&ch->lock);
        drop_call(s);
        rpc_sender_deinit(&s->sender);
        free(s);
        return TM_FAIL(err, TM_STATUS_CLOSED, "rpc stream: the channel is being closed");
    }
    s->next = ch->streams;
    if (s->next)
        s->next->prev = s;
    ch->streams = s;
    *out = s; /* before the first batch: callbacks may run before this function returns */
    stream_start(s);
    pthread_mutex_unlock(&ch->lock);
    return TM_OK;
}

tm_status tm_rpc_stream_send(tm_rpc_stream *s, const void *data, size_t len)
{
    return rpc_sender_push(&s->sender, data, len);
}

void tm_rpc_stream_half_close(tm_rpc_stream *s)
{
    grpc_op op;
    memset(&op, 0, sizeof(op));
    op.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    rpc_sender_end(&s->sender, &op, NULL);
}

void tm_rpc_stream_cancel(tm_rpc_stream *s)
{
    rpc_sender_cancel(&s->sender, GRPC_STATUS_CANCELLED, "cancelled by the caller");
}

void tm_rpc_stream_release(tm_rpc_stream *s)
{
    if (s)
        stream_unref(s);
}
