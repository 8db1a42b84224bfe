/* Streams, events and graphs. A stream is a queue of work that runs when somebody waits for it, in whoever waits; a graph
 * is a list of the same work, recorded instead of queued. Streams that are recorded together share the list: the order
 * in which their work was given is one of the orders that their events allow. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "tests/cuda_emu/emu.h"

#define QUEUE_MAX 4096 /* then it runs at once: no program may depend on more */

typedef struct work {
    struct work *next;
    emu_work_run *run;
    char data[] __attribute__((aligned(16)));
} work;

typedef struct queue {
    work *first, **end;
    int count;
} queue;

struct emu_graph {
    queue works;
    int users; /* graph and executable graphs */
};

struct emu_stream {
    queue works;
    pthread_mutex_t lock, running;
    struct emu_graph *capture;
    bool origin;   /* the capture began here */
    bool relaxed;  /* its mode */
    bool blocking; /* in step with the default stream */
    struct emu_stream *next;
};

struct emu_event {
    struct emu_stream *stream; /* of the last record */
    struct emu_graph *capture; /* recorded into it */
    unsigned recorded, done;
    long long time_ns;
};

static pthread_mutex_t g_lock = PTHREAD_MUTEX_INITIALIZER;
static struct emu_stream *g_streams;
static struct emu_stream g_default;
static pthread_once_t g_once = PTHREAD_ONCE_INIT;
static __thread int g_captures; /* of this thread, not relaxed */

static void set_up(struct emu_stream *s, bool blocking)
{
    pthread_mutexattr_t a;
    pthread_mutexattr_init(&a);
    pthread_mutexattr_settype(&a, PTHREAD_MUTEX_RECURSIVE);
    *s = (struct emu_stream){.blocking = blocking};
    s->works.end = &s->works.first;
    pthread_mutex_init(&s->lock, NULL);
    pthread_mutex_init(&s->running, &a);
    pthread_mutexattr_destroy(&a);
}

static void set_up_default(void)
{
    set_up(&g_default, true);
}

static struct emu_stream *stream_of(cudaStream_t s)
{
    pthread_once(&g_once, set_up_default);
    return s ? s : &g_default;
}

bool emu_capturing(cudaStream_t s)
{
    return s ? s->capture != NULL : g_captures > 0;
}

/* ---- queues ---- */

static void append(queue *q, emu_work_run *run, const void *data, size_t bytes)
{
    work *w = malloc(sizeof(*w) + bytes);
    TM_ASSERT(w);
    w->next = NULL;
    w->run = run;
    memcpy(w->data, data, bytes);
    *q->end = w;
    q->end = &w->next;
    q->count++;
}

static work *pop(struct emu_stream *s)
{
    pthread_mutex_lock(&s->lock);
    work *w = s->works.first;
    if (w) {
        s->works.first = w->next;
        s->works.count--;
        if (!w->next)
            s->works.end = &s->works.first;
    }
    pthread_mutex_unlock(&s->lock);
    return w;
}

/* After a failure nothing runs any more, and the queue is dropped. */
static cudaError_t run_work(work *w)
{
    cudaError_t e = emu_sticky();
    if (e == cudaSuccess)
        e = w->run(w->data);
    if (e != cudaSuccess)
        emu_set_sticky(e);
    return e;
}

cudaError_t emu_drain(cudaStream_t stream)
{
    struct emu_stream *s = stream_of(stream);
    pthread_mutex_lock(&s->running);
    for (work *w; (w = pop(s)) != NULL; free(w))
        run_work(w);
    pthread_mutex_unlock(&s->running);
    return emu_sticky();
}

/* Work of the default stream comes behind that of all blocking streams, and theirs behind its. */
static void keep_order(struct emu_stream *s)
{
    if (!s->blocking || s->capture)
        return;
    if (s != &g_default) {
        emu_drain(NULL);
        return;
    }
    pthread_mutex_lock(&g_lock);
    for (struct emu_stream *o = g_streams; o; o = o->next)
        if (o->blocking && !o->capture)
            emu_drain(o);
    pthread_mutex_unlock(&g_lock);
}

cudaError_t emu_enqueue(cudaStream_t stream, emu_work_run *run, const void *data, size_t bytes)
{
    struct emu_stream *s = stream_of(stream);
    if (emu_sticky())
        return emu_return(emu_sticky());
    keep_order(s);
    if (!s->capture && s->works.count >= QUEUE_MAX)
        emu_drain(s);
    pthread_mutex_lock(&s->lock);
    append(s->capture ? &s->capture->works : &s->works, run, data, bytes);
    pthread_mutex_unlock(&s->lock);
    return cudaSuccess;
}

/* ---- streams ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    struct emu_stream *s = malloc(sizeof(*s));
    if (!s)
        return emu_return(cudaErrorMemoryAllocation);
    set_up(s, !(flags & cudaStreamNonBlocking));
    pthread_mutex_lock(&g_lock);
    s->next = g_streams;
    g_streams = s;
    pthread_mutex_unlock(&g_lock);
    *stream = s;
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

static void drop_graph(struct emu_graph *g)
{
    if (--g->users > 0)
        return;
    for (work *w = g->works.first, *next; w; w = next) {
        next = w->next;
        free(w);
    }
    free(g);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    const cudaError_t e = emu_drain(stream);
    if (!stream)
        return emu_return(cudaErrorInvalidResourceHandle);
    pthread_mutex_lock(&g_lock);
    for (struct emu_stream **at = &g_streams; *at; at = &(*at)->next)
        if (*at == stream) {
            *at = stream->next;
            break;
        }
    pthread_mutex_unlock(&g_lock);
    pthread_mutex_destroy(&stream->lock);
    pthread_mutex_destroy(&stream->running);
    free(stream);
    return emu_return(e);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    if (stream && stream->capture)
        return emu_return(cudaErrorStreamCaptureUnsupported);
    return emu_return(emu_drain(stream));
}

/* It is done as soon as somebody asks. */
cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    return cudaStreamSynchronize(stream);
}

cudaError_t cudaDeviceSynchronize(void)
{
    pthread_mutex_lock(&g_lock);
    for (struct emu_stream *s = g_streams; s; s = s->next)
        if (!s->capture)
            emu_drain(s);
    pthread_mutex_unlock(&g_lock);
    return emu_return(emu_drain(NULL));
}

/* ---- events ---- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    (void)flags;
    *event = calloc(1, sizeof(**event));
    return *event ? cudaSuccess : emu_return(cudaErrorMemoryAllocation);
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    const cudaError_t e = event->capture ? cudaSuccess : cudaEventSynchronize(event);
    free(event);
    return e;
}

typedef struct event_work {
    struct emu_event *event;
    unsigned number;
} event_work;

static cudaError_t run_record(void *data)
{
    const event_work *w = data;
    w->event->done = w->number;
    w->event->time_ns = emu_clock_ns();
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    struct emu_stream *s = stream_of(stream);
    event->capture = s->capture;
    if (s->capture)
        return cudaSuccess;
    event->stream = s;
    const event_work w = {event, ++event->recorded};
    return emu_enqueue(stream, run_record, &w, sizeof(w));
}

/* What is behind the event stays in the queue. After a failure nothing is done any more, and the queue is emptied. */
static void run_up_to(const struct emu_event *event)
{
    struct emu_stream *s = event->stream;
    work *w;
    pthread_mutex_lock(&s->running);
    for (; event->done != event->recorded && (w = pop(s)) != NULL; free(w))
        run_work(w);
    pthread_mutex_unlock(&s->running);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    if (event->capture)
        return emu_return(cudaErrorStreamCaptureUnsupported);
    if (event->done != event->recorded)
        run_up_to(event);
    return emu_return(emu_sticky());
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    return cudaEventSynchronize(event);
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end)
{
    if (begin->done != begin->recorded || end->done != end->recorded)
        return emu_return(cudaErrorNotReady);
    if (begin->recorded == 0 || end->recorded == 0)
        return emu_return(cudaErrorInvalidResourceHandle);
    *ms = (float)(end->time_ns - begin->time_ns) * 1e-6f;
    return cudaSuccess;
}

static cudaError_t run_wait(void *data)
{
    const event_work *w = data;
    return (int)(w->event->done - w->number) < 0 ? emu_drain(w->event->stream) : cudaSuccess;
}

/* Behind an event of a capture the stream takes part in it. */
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags)
{
    struct emu_stream *s = stream_of(stream);
    (void)flags;
    if (event->capture) {
        s->capture = event->capture;
        return cudaSuccess;
    }
    if (event->recorded == 0)
        return cudaSuccess;
    const event_work w = {event, event->recorded};
    return emu_enqueue(stream, run_wait, &w, sizeof(w));
}

/* ---- graphs ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode)
{
    if (!stream || stream->capture)
        return emu_return(cudaErrorStreamCaptureUnsupported);
    if (emu_sticky())
        return emu_return(emu_sticky());
    stream->capture = calloc(1, sizeof(*stream->capture));
    TM_ASSERT(stream->capture);
    stream->capture->works.end = &stream->capture->works.first;
    stream->capture->users = 1;
    stream->origin = true;
    stream->relaxed = mode == cudaStreamCaptureModeRelaxed;
    g_captures += !stream->relaxed;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    *graph = NULL;
    if (!stream || !stream->capture || !stream->origin)
        return emu_return(cudaErrorStreamCaptureInvalidated);
    *graph = stream->capture;
    stream->origin = false;
    g_captures -= !stream->relaxed;
    pthread_mutex_lock(&g_lock);
    for (struct emu_stream *s = g_streams; s; s = s->next)
        if (s->capture == *graph)
            s->capture = NULL;
    pthread_mutex_unlock(&g_lock);
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status)
{
    *status =
        stream && stream->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags)
{
    (void)flags;
    graph->users++;
    *exec = graph;
    return cudaSuccess;
}

static cudaError_t run_graph(void *data)
{
    const struct emu_graph *g = *(struct emu_graph *const *)data;
    cudaError_t e = cudaSuccess;
    for (work *w = g->works.first; w && e == cudaSuccess; w = w->next)
        e = run_work(w);
    return e;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
    return emu_enqueue(stream, run_graph, &exec, sizeof(exec));
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    drop_graph(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
    const cudaError_t e = cudaDeviceSynchronize();
    drop_graph(exec);
    return e;
}
