/* The parts that server and client share (see internal.h).
 *
 * The send queue keeps messages separate and starts one batch at a time: a message is given to gRPC when
 * the one before it was accepted by the transport, so `queued` is the truth about a slow reader and the
 * bound on it bounds memory. Batches are started by whichever thread sends or by the completion of the
 * one before; both hold the sender's lock, which also guards the life of the call handle. */
#include "net/rpc/internal.h"

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/slice.h>
#include <grpc/support/log.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/log.h"

static void log_grpc(gpr_log_func_args *args)
{
    if (args->severity == GPR_LOG_SEVERITY_ERROR)
        tm_log(TM_LOG_DEBUG, "grpc", "%s", args->message);
}

static void set_log(void)
{
    gpr_set_log_function(log_grpc);
}

void rpc_library_acquire(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, set_log);
    grpc_init();
}

void rpc_library_release(void)
{
    grpc_shutdown_blocking();
}

void *rpc_queue_run(void *cq)
{
    for (;;) {
        grpc_event ev = grpc_completion_queue_next(cq, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        if (ev.type == GRPC_QUEUE_SHUTDOWN)
            return NULL;
        if (ev.type == GRPC_OP_COMPLETE) {
            rpc_tag *tag = ev.tag;
            tag->fn(tag->owner, ev.success != 0);
        }
    }
}

void rpc_args_fill(grpc_arg out[RPC_ARGS_MAX], const rpc_arg *rows, size_t count)
{
    TM_ASSERT(count <= RPC_ARGS_MAX);
    for (size_t i = 0; i < count; i++) {
        union {
            const char *text;
            char *arg;
        } key = {rows[i].key}; /* gRPC's struct wants char * and only reads it */
        out[i].type = GRPC_ARG_INTEGER;
        out[i].key = key.arg;
        out[i].value.integer = rows[i].value;
    }
}

tm_status rpc_status_from_grpc(grpc_status_code code)
{
    static const tm_status table[] = {
        [GRPC_STATUS_OK] = TM_OK,
        [GRPC_STATUS_CANCELLED] = TM_STATUS_CANCELLED,
        [GRPC_STATUS_UNKNOWN] = TM_STATUS_INTERNAL,
        [GRPC_STATUS_INVALID_ARGUMENT] = TM_STATUS_INVALID,
        [GRPC_STATUS_DEADLINE_EXCEEDED] = TM_STATUS_TIMEOUT,
        [GRPC_STATUS_NOT_FOUND] = TM_STATUS_NOT_FOUND,
        [GRPC_STATUS_ALREADY_EXISTS] = TM_STATUS_INVALID,
        [GRPC_STATUS_PERMISSION_DENIED] = TM_STATUS_DENIED,
        [GRPC_STATUS_RESOURCE_EXHAUSTED] = TM_STATUS_BUSY,
        [GRPC_STATUS_FAILED_PRECONDITION] = TM_STATUS_STALE,
        [GRPC_STATUS_ABORTED] = TM_STATUS_UNAVAILABLE,
        [GRPC_STATUS_OUT_OF_RANGE] = TM_STATUS_INVALID,
        [GRPC_STATUS_UNIMPLEMENTED] = TM_STATUS_UNSUPPORTED,
        [GRPC_STATUS_INTERNAL] = TM_STATUS_INTERNAL,
        [GRPC_STATUS_UNAVAILABLE] = TM_STATUS_UNAVAILABLE,
        [GRPC_STATUS_DATA_LOSS] = TM_STATUS_DATA,
        [GRPC_STATUS_UNAUTHENTICATED] = TM_STATUS_DENIED,
    };
    if (code < 0 || (size_t)code >= TM_ARRAY_LEN(table))
        return TM_STATUS_INTERNAL;
    return table[code];
}

void rpc_batch(grpc_call *call, const grpc_op *ops, size_t count, rpc_tag *tag)
{
    grpc_call_error e = grpc_call_start_batch(call, ops, count, tag, NULL);
    TM_ASSERT(e == GRPC_CALL_OK); /* anything else is a misuse of the calling sequence */
}

bool rpc_with_bytes(grpc_byte_buffer *b, void (*fn)(void *, const void *, size_t), void *arg)
{
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, b))
        return false;
    grpc_slice *first = NULL;
    size_t total = grpc_byte_buffer_length(reader.buffer_out); /* decompressed */
    if (total == 0) {
        fn(arg, "", 0);
    } else if (grpc_byte_buffer_reader_peek(&reader, &first) &&
               GRPC_SLICE_LENGTH(*first) == total) {
        fn(arg, GRPC_SLICE_START_PTR(*first), total);
    } else {
        grpc_byte_buffer_reader_destroy(&reader);
        if (!grpc_byte_buffer_reader_init(&reader, b))
            return false;
        grpc_slice all = grpc_byte_buffer_reader_readall(&reader);
        fn(arg, GRPC_SLICE_START_PTR(all), GRPC_SLICE_LENGTH(all));
        grpc_slice_unref(all);
    }
    grpc_byte_buffer_reader_destroy(&reader);
    return true;
}

void rpc_sender_init(rpc_sender *s, grpc_call *call, size_t max, void (*done)(void *, bool),
                     void *owner)
{
    memset(s, 0, sizeof(*s));
    pthread_mutex_init(&s->lock, NULL);
    s->call = call;
    s->max = max;
    s->tag.fn = done;
    s->tag.owner = owner;
    s->end_text = grpc_empty_slice();
}

static void msg_free(rpc_msg *m)
{
    grpc_byte_buffer_destroy(m->bytes);
    free(m);
}

static void drop_queue(rpc_sender *s)
{
    while (s->head) {
        rpc_msg *m = s->head;
        s->head = m->next;
        s->queued -= m->len;
        msg_free(m);
    }
    s->tail = NULL;
}

void rpc_sender_deinit(rpc_sender *s)
{
    TM_ASSERT(!s->in_flight);
    drop_queue(s);
    grpc_slice_unref(s->end_text);
    pthread_mutex_destroy(&s->lock);
}

/* Starts the next batch when none is in flight. The lock is held. */
static void pump(rpc_sender *s)
{
    if (s->in_flight || s->closed)
        return;
    grpc_op op;
    if (s->head) {
        memset(&op, 0, sizeof(op));
        s->flying = s->head;
        s->head = s->flying->next;
        if (!s->head)
            s->tail = NULL;
        op.op = GRPC_OP_SEND_MESSAGE;
        op.data.send_message.send_message = s->flying->bytes;
    } else if (s->end_wanted && !s->end_sent) {
        op = s->end;
        s->end_sent = true;
    } else {
        return;
    }
    s->in_flight = true;
    rpc_batch(s->call, &op, 1, &s->tag);
}

void rpc_sender_begin(rpc_sender *s, grpc_metadata *metadata, size_t count)
{
    grpc_op op;
    memset(&op, 0, sizeof(op));
    op.op = GRPC_OP_SEND_INITIAL_METADATA;
    op.data.send_initial_metadata.metadata = metadata;
    op.data.send_initial_metadata.count = count;
    pthread_mutex_lock(&s->lock);
    s->in_flight = true;
    rpc_batch(s->call, &op, 1, &s->tag);
    pthread_mutex_unlock(&s->lock);
}

static rpc_msg *msg_create(const void *data, size_t len)
{
    rpc_msg *m = calloc(1, sizeof(*m));
    if (!m)
        return NULL;
    grpc_slice slice = grpc_slice_from_copied_buffer(data, len);
    m->bytes = grpc_raw_byte_buffer_create(&slice, 1);
    m->len = len;
    grpc_slice_unref(slice);
    return m;
}

tm_status rpc_sender_push(rpc_sender *s, const void *data, size_t len)
{
    if (len > RPC_MESSAGE_MAX)
        return TM_STATUS_TOO_LARGE;
    rpc_msg *m = msg_create(data ? data : "", len);
    if (!m)
        return TM_STATUS_NO_MEMORY;
    tm_status st = TM_OK;
    pthread_mutex_lock(&s->lock);
    /* A single message always fits into an empty queue, so that a small bound cannot block for ever. */
    if (s->closed || s->end_wanted) {
        st = TM_STATUS_CLOSED;
    } else if (s->queued && s->queued + len > s->max) {
        st = TM_STATUS_BUSY;
    } else {
        if (s->tail)
            s->tail->next = m;
        else
            s->head = m;
        s->tail = m;
        s->queued += len;
        pump(s);
    }
    pthread_mutex_unlock(&s->lock);
    if (st != TM_OK)
        msg_free(m);
    return st;
}

void rpc_sender_end(rpc_sender *s, const grpc_op *end, const char *text)
{
    pthread_mutex_lock(&s->lock);
    if (!s->end_wanted && !s->closed) {
        s->end = *end;
        if (text) {
            s->end_text = grpc_slice_from_copied_string(text);
            s->end.data.send_status_from_server.status_details = &s->end_text;
        }
        s->end_wanted = true;
        pump(s);
    }
    pthread_mutex_unlock(&s->lock);
}

void rpc_sender_done(rpc_sender *s, bool ok)
{
    pthread_mutex_lock(&s->lock);
    s->in_flight = false;
    if (s->flying) {
        s->queued -= s->flying->len;
        msg_free(s->flying);
        s->flying = NULL;
    }
    /* A failed send means that the call is ending: its close event follows and nothing more goes out. */
    if (!ok) {
        s->closed = true;
        drop_queue(s);
    }
    pump(s);
    pthread_mutex_unlock(&s->lock);
}

bool rpc_sender_close(rpc_sender *s)
{
    pthread_mutex_lock(&s->lock);
    s->closed = true;
    drop_queue(s);
    bool in_flight = s->in_flight;
    pthread_mutex_unlock(&s->lock);
    return in_flight;
}

void rpc_sender_cancel(rpc_sender *s, grpc_status_code code, const char *why)
{
    pthread_mutex_lock(&s->lock);
    drop_queue(s);
    if (!s->closed)
        grpc_call_cancel_with_status(s->call, code, why, NULL);
    s->closed = true;
    pthread_mutex_unlock(&s->lock);
}

size_t rpc_sender_queued(rpc_sender *s)
{
    pthread_mutex_lock(&s->lock);
    size_t n = s->queued;
    pthread_mutex_unlock(&s->lock);
    return n;
}
