/* tm-direct-client ADDRESS RATE REQUESTS TOKENS: load on a worker without a router between, for the figure that
 * says what the router adds. One Attach stream as a router would have, requests at a fixed rate, one JSON line with
 * the time from handing a Submit to gRPC until its first token is here. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/check.h"
#include "common/clock.h"
#include "net/rpc/rpc.h"
#include "proto/worker.pb-c.h"

#define REQUESTS_MAX   100000
#define PROMPT_TOKENS  16
#define NS_PER_S       1000000000
#define SETTLE_US      500000
#define END_WAIT_US    100000
#define END_WAITS      100
#define FIRST_TOKEN_ID 300

static int64_t g_begin[REQUESTS_MAX], g_first[REQUESTS_MAX];
static pthread_mutex_t g_lock = PTHREAD_MUTEX_INITIALIZER;
static int g_heard;

static void on_message(void *user, const void *data, size_t len)
{
    (void)user;
    int64_t now = tm_clock_ns();
    Turbomesh__Worker__V1__WorkerMessage *m =
        turbomesh__worker__v1__worker_message__unpack(NULL, len, data);
    if (!m || m->m_case != TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_STEP) {
        turbomesh__worker__v1__worker_message__free_unpacked(m, NULL);
        return;
    }
    pthread_mutex_lock(&g_lock);
    for (size_t i = 0; i < m->step->n_event; i++) {
        const Turbomesh__Worker__V1__RequestEvent *e = m->step->event[i];
        if (e->id < REQUESTS_MAX && e->n_token > 0 && g_first[e->id] == 0) {
            g_first[e->id] = now;
            g_heard++;
        }
    }
    pthread_mutex_unlock(&g_lock);
    turbomesh__worker__v1__worker_message__free_unpacked(m, NULL);
}

static void on_close(void *user, tm_status st, const char *message)
{
    (void)user;
    if (st != TM_OK && st != TM_STATUS_CANCELLED)
        fprintf(stderr, "closed: %s: %s\n", tm_status_name(st), message ? message : "");
}

static void submit(tm_rpc_stream *s, int id, int tokens)
{
    static uint8_t out[4096];
    int32_t prompt[PROMPT_TOKENS];
    Turbomesh__Worker__V1__Submit q = TURBOMESH__WORKER__V1__SUBMIT__INIT;
    Turbomesh__Worker__V1__RouterMessage m = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__INIT;
    for (int i = 0; i < PROMPT_TOKENS; i++)
        prompt[i] = FIRST_TOKEN_ID + i;
    q.id = (uint64_t)id;
    q.prompt = prompt;
    q.n_prompt = PROMPT_TOKENS;
    q.has_max_tokens = 1;
    q.max_tokens = tokens;
    m.m_case = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_SUBMIT;
    m.submit = &q;
    g_begin[id] = tm_clock_ns();
    size_t len = turbomesh__worker__v1__router_message__pack(&m, out);
    if (tm_rpc_stream_send(s, out, len) != TM_OK)
        fprintf(stderr, "request %d could not be sent\n", id);
}

static int compare(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static int report(int requests)
{
    int64_t *took = calloc((size_t)requests, sizeof *took);
    int n = 0;
    pthread_mutex_lock(&g_lock);
    for (int i = 0; i < requests; i++)
        if (g_first[i])
            took[n++] = g_first[i] - g_begin[i];
    pthread_mutex_unlock(&g_lock);
    if (n > 0) {
        qsort(took, (size_t)n, sizeof *took, compare);
        printf("{\"requests_ok\": %d, \"ttft_ms_p50\": %.4f, \"ttft_ms_p99\": %.4f}\n", n,
               (double)took[n / 2] / 1e6, (double)took[n * 99 / 100] / 1e6);
    }
    free(took);
    return n == requests ? 0 : 1;
}

int main(int argc, char **argv)
{
    static const tm_rpc_stream_ops ops = {NULL, on_message, on_close};
    tm_rpc_channel *ch;
    tm_rpc_stream *s;
    tm_err err = TM_ERR_INIT;
    if (argc != 5) {
        fprintf(stderr, "usage: tm-direct-client ADDRESS RATE REQUESTS TOKENS\n");
        return 2;
    }
    double rate = strtod(argv[2], NULL);
    int requests = (int)strtol(argv[3], NULL, 10), tokens = (int)strtol(argv[4], NULL, 10);
    requests = TM_MAX(1, TM_MIN(requests, REQUESTS_MAX));
    if (!(rate > 0) || tm_rpc_channel_create(&ch, argv[1], &err) != TM_OK ||
        tm_rpc_stream_open(&s, ch, "/turbomesh.worker.v1.Worker/Attach", NULL, 0, &ops, NULL,
                           &err) != TM_OK) {
        fprintf(stderr, "tm-direct-client: %s\n", err.msg);
        return 1;
    }
    usleep(SETTLE_US);
    int64_t start = tm_clock_ns();
    for (int i = 0; i < requests; i++) {
        int64_t due = start + (int64_t)((double)i * NS_PER_S / rate) - tm_clock_ns();
        if (due > 0)
            usleep((useconds_t)(due / 1000));
        submit(s, i, tokens);
    }
    for (int i = 0; i < END_WAITS; i++) {
        pthread_mutex_lock(&g_lock);
        bool all = g_heard == requests;
        pthread_mutex_unlock(&g_lock);
        if (all)
            break;
        usleep(END_WAIT_US);
    }
    int rc = report(requests);
    tm_rpc_stream_cancel(s);
    tm_rpc_stream_release(s);
    tm_rpc_channel_destroy(ch);
    return rc;
}
