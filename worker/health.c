/* grpc.health.v1: Check answers once, Watch answers now and at every change. The whole process ("") and the
 * Worker service have one state: SERVING until the drain begins. */
#include <stdlib.h>
#include <string.h>

#include "proto/health.pb-c.h"
#include "worker/internal.h"

#define STATUS(name) GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__##name

static void send_status(tm_rpc_call *call, Grpc__Health__V1__HealthCheckResponse__ServingStatus st)
{
    Grpc__Health__V1__HealthCheckResponse r = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    uint8_t bytes[32];
    r.has_status = 1;
    r.status = st;
    size_t n = grpc__health__v1__health_check_response__get_packed_size(&r);
    if (n <= sizeof(bytes))
        tm_rpc_call_send(call, bytes, grpc__health__v1__health_check_response__pack(&r, bytes));
}

static bool names_us(const void *data, size_t len, bool *parsed)
{
    Grpc__Health__V1__HealthCheckRequest *q =
        grpc__health__v1__health_check_request__unpack(NULL, len, data);
    *parsed = q != NULL;
    if (!q)
        return false;
    bool ours =
        !q->service || !*q->service || strcmp(q->service, "turbomesh.worker.v1.Worker") == 0;
    grpc__health__v1__health_check_request__free_unpacked(q, NULL);
    return ours;
}

static Grpc__Health__V1__HealthCheckResponse__ServingStatus state(const tm_worker_service *s)
{
    return s->draining ? STATUS(NOT_SERVING) : STATUS(SERVING);
}

void worker_check_message(void *user, tm_rpc_call *call, const void *data, size_t len)
{
    tm_worker_service *s = user;
    bool parsed;
    if (names_us(data, len, &parsed)) {
        pthread_mutex_lock(&s->lock);
        send_status(call, state(s));
        pthread_mutex_unlock(&s->lock);
        tm_rpc_call_finish(call, TM_OK, NULL);
    } else {
        tm_rpc_call_finish(call, parsed ? TM_STATUS_NOT_FOUND : TM_STATUS_INVALID,
                           parsed ? "unknown service" : "the message does not parse");
    }
}

typedef struct watch {
    worker_watcher entry;
    tm_worker_service *service;
    bool listed;
} watch;

void *worker_watch_open(void *service, tm_rpc_call *call)
{
    watch *w = calloc(1, sizeof(*w));
    if (!w) {
        tm_rpc_call_finish(call, TM_STATUS_BUSY, "out of memory");
        return NULL;
    }
    w->service = service;
    w->entry.call = call;
    return w;
}

void worker_watch_message(void *user, tm_rpc_call *call, const void *data, size_t len)
{
    watch *w = user;
    bool parsed;
    if (!w || w->listed)
        return;
    tm_worker_service *s = w->service;
    if (!names_us(data, len, &parsed)) {
        send_status(call, STATUS(SERVICE_UNKNOWN));
        return;
    }
    pthread_mutex_lock(&s->lock);
    w->listed = true;
    w->entry.next = s->watchers;
    if (w->entry.next)
        w->entry.next->prev = &w->entry;
    s->watchers = &w->entry;
    send_status(call, state(s));
    pthread_mutex_unlock(&s->lock);
}

void worker_watch_close(void *user, tm_rpc_call *call, bool cancelled)
{
    watch *w = user;
    (void)call;
    (void)cancelled;
    if (!w)
        return;
    tm_worker_service *s = w->service;
    pthread_mutex_lock(&s->lock);
    if (w->listed) {
        if (w->entry.prev)
            w->entry.prev->next = w->entry.next;
        else
            s->watchers = w->entry.next;
        if (w->entry.next)
            w->entry.next->prev = w->entry.prev;
    }
    pthread_mutex_unlock(&s->lock);
    free(w);
}

void worker_watch_notify(tm_worker_service *s)
{
    for (worker_watcher *w = s->watchers; w; w = w->next)
        send_status(w->call, state(s));
}
