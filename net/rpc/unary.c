/* A blocking unary call: one stream, one message each way, a condition to wait on. The wait ends with
 * on_close, which gRPC guarantees for every stream (deadline, reply, or a lost connection). */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "net/rpc/rpc.h"

typedef struct unary_wait {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool done, no_memory;
    int messages;
    tm_status st;
    char *data;
    size_t len;
    char text[256];
} unary_wait;

static void unary_message(void *user, const void *data, size_t len)
{
    unary_wait *w = user;
    if (w->messages++)
        return;
    w->data = malloc(len + 1);
    if (!w->data) {
        w->no_memory = true;
        return;
    }
    memcpy(w->data, data, len);
    w->data[len] = '\0';
    w->len = len;
}

static void unary_close(void *user, tm_status st, const char *message)
{
    unary_wait *w = user;
    size_t n = strnlen(message, sizeof(w->text) - 1);
    memcpy(w->text, message, n);
    w->text[n] = '\0';
    pthread_mutex_lock(&w->lock);
    w->st = st;
    w->done = true;
    pthread_cond_signal(&w->cond);
    pthread_mutex_unlock(&w->lock);
}

static tm_status unary_result(const unary_wait *w, const char *path, tm_err *err)
{
    if (w->st != TM_OK)
        return TM_FAIL(err, w->st, "%s: %s", path, *w->text ? w->text : tm_status_name(w->st));
    if (w->no_memory)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "%s: out of memory", path);
    if (w->messages != 1)
        return TM_FAIL(err, TM_STATUS_INTERNAL, "%s: %d replies, expected one", path, w->messages);
    return TM_OK;
}

tm_status tm_rpc_unary(tm_rpc_channel *ch, const char *path, const void *req, size_t req_len,
                       int64_t deadline_ms, void **reply, size_t *reply_len, tm_err *err)
{
    static const tm_rpc_stream_ops ops = {NULL, unary_message, unary_close};
    unary_wait w = {.lock = PTHREAD_MUTEX_INITIALIZER, .cond = PTHREAD_COND_INITIALIZER};
    tm_rpc_stream *s = NULL;
    tm_status st = tm_rpc_stream_open(&s, ch, path, NULL, deadline_ms, &ops, &w, err);
    if (st != TM_OK)
        return st;
    tm_status sent = tm_rpc_stream_send(s, req, req_len);
    if (sent == TM_OK)
        tm_rpc_stream_half_close(s);
    else
        tm_rpc_stream_cancel(s); /* or it has ended already: on_close then says why */
    pthread_mutex_lock(&w.lock);
    while (!w.done)
        pthread_cond_wait(&w.cond, &w.lock);
    pthread_mutex_unlock(&w.lock);
    tm_rpc_stream_release(s);

    if (sent != TM_OK && sent != TM_STATUS_CLOSED)
        st = TM_FAIL(err, sent, "%s: the request of %zu bytes was not sent", path, req_len);
    else
        st = unary_result(&w, path, err);
    if (st == TM_OK) {
        *reply = w.data;
        *reply_len = w.len;
    } else {
        free(w.data);
    }
    pthread_mutex_destroy(&w.lock);
    pthread_cond_destroy(&w.cond);
    return st;
}
