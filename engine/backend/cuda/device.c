/* The CUDA device: memory, copies, synchronisation and graphs on one stream.
 *
 * After any CUDA failure the context cannot be trusted, so the device is poisoned: the failure is logged
 * once, with the call that saw it, and every later operator returns the same status. The engine ends the
 * group. */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/check.h"
#include "common/log.h"
#include "engine/backend/cuda/cuda.h"
#include "engine/backend/cuda/device.h"

enum { CAPABILITY_MIN = 80 }; /* sm_80: bf16 arithmetic and asynchronous copies */

/* Not offered to the KV pool: what the driver takes after the start, for the code of kernels at their first launch and for
 * recorded steps (192 of them with some hundred kernels, less than 1 KB each), and NCCL for its connections. */
#define RESERVE_BYTES ((size_t)512 << 20)

struct tm_graph {
    cudaGraphExec_t exec;
};

struct tm_dev_event {
    cudaEvent_t event;
};

tm_status tm_cuda_check(tm_device *dev, cudaError_t e, const char *call)
{
    if (dev->poisoned)
        return TM_STATUS_INTERNAL;
    if (e == cudaSuccess)
        return TM_OK;
    dev->poisoned = true;
    tm_log(TM_LOG_ERROR, "cuda_failed", "device %d: %s: %s", dev->index, call,
           cudaGetErrorString(e));
    return TM_STATUS_INTERNAL;
}

/* Looks the device up and refuses it when it is too old. */
static tm_status probe_device(int index, struct cudaDeviceProp *prop, tm_err *err)
{
    int count = 0;
    cudaError_t e = cudaGetDeviceCount(&count);
    if (e != cudaSuccess)
        return TM_FAIL(err, TM_STATUS_CONFIG, "no CUDA device: %s", cudaGetErrorString(e));
    if (index < 0 || index >= count)
        return TM_FAIL(err, TM_STATUS_CONFIG, "CUDA device %d was asked for, but there are %d",
                       index, count);
    e = cudaGetDeviceProperties(prop, index);
    if (e != cudaSuccess)
        return TM_FAIL(err, TM_STATUS_CONFIG, "CUDA device %d: %s", index, cudaGetErrorString(e));
    if (prop->major * 10 + prop->minor < CAPABILITY_MIN)
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "CUDA device %d (%s) is sm_%d%d, expected sm_80 or later", index, prop->name,
                       prop->major, prop->minor);
    return TM_OK;
}

/* What the kernels for sm_90a need of the driver; NULL where they cannot run or are not in this build. */
static void *find_tensor_map(const struct cudaDeviceProp *prop)
{
    void *f = NULL;
#ifdef TM_CUDA_SM90A
    enum { SINCE = 12000 };
    enum cudaDriverEntryPointQueryResult found;
    if (prop->major == 9 && prop->minor == 0 &&
        (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, SINCE, cudaEnableDefault,
                                          &found) != cudaSuccess ||
         found != cudaDriverEntryPointSuccess)) {
        (void)cudaGetLastError();
        f = NULL;
    }
#endif
    (void)prop;
    return f;
}

/* Stream, scratch and counters; what was taken is given back by cuda_close. */
static cudaError_t take_resources(tm_device *d, const struct cudaDeviceProp *prop)
{
    void *scratch = NULL, *tickets = NULL;
    d->ctx.sms = prop->multiProcessorCount;
    d->ctx.dependent_launch = prop->major >= 9;
    cudaError_t e = cudaSetDevice(d->index);
    d->ctx.tensor_map = find_tensor_map(prop);
    if (e == cudaSuccess)
        e = cudaStreamCreateWithFlags(&d->ctx.stream, cudaStreamNonBlocking);
    if (e == cudaSuccess)
        e = cudaMalloc(&scratch, TM_CUDA_SCRATCH_BYTES);
    d->ctx.scratch = scratch;
    if (e == cudaSuccess)
        e = cudaMalloc(&tickets, (TM_CUDA_TICKETS + 1) * sizeof(int));
    d->ctx.tickets = tickets;
    if (e == cudaSuccess)
        e = cudaMemset(tickets, 0, (TM_CUDA_TICKETS + 1) * sizeof(int));
    if (e == cudaSuccess)
        e = cudaDeviceSynchronize();
    return e;
}

static void cuda_close(tm_device *dev)
{
    if (!dev)
        return;
    tm_ranks_leave(dev);
    tm_cuda_gemm_destroy(dev->gemm);
    tm_cuda_profile_destroy(dev->ctx.profile);
    cudaFree(dev->ctx.scratch);
    cudaFree(dev->ctx.tickets);
    cudaError_t e = dev->ctx.stream ? cudaStreamDestroy(dev->ctx.stream) : cudaSuccess;
    if (e != cudaSuccess && !dev->poisoned)
        tm_log(TM_LOG_WARN, "cuda_close", "device %d: %s", dev->index, cudaGetErrorString(e));
    free(dev);
}

static tm_status cuda_open(tm_device **out, const tm_device_opts *opts, tm_err *err)
{
    struct cudaDeviceProp prop;
    TM_TRY(probe_device(opts->index, &prop, err));
    tm_device *d = calloc(1, sizeof *d);
    if (!d)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for the cuda device");
    d->index = opts->index;
    d->opts = *opts;
    d->ctx.act = opts->dtype == TM_DTYPE_F32 ? TM_DTYPE_BF16 : opts->dtype;
    cudaError_t e = take_resources(d, &prop);
    tm_status st = TM_OK;
    if (e != cudaSuccess)
        st = TM_FAIL(err, TM_STATUS_CONFIG, "CUDA device %d cannot be used: %s", opts->index,
                     cudaGetErrorString(e));
    else
        st = tm_cuda_gemm_create(&d->gemm, err);
    if (st != TM_OK) {
        cuda_close(d);
        return st;
    }
    snprintf(d->text, sizeof d->text, "cuda %.100s, sm_%d%d, device %d", prop.name, prop.major,
             prop.minor, d->index);
    *out = d;
    return TM_OK;
}

/* The runtime keeps the current device for each thread, and the engine's thread is not the one that opened it: every
 * way into a step comes by here. */
static void bind_thread(const tm_device *dev)
{
    static _Thread_local int bound = -1;
    if (bound != dev->index && cudaSetDevice(dev->index) == cudaSuccess)
        bound = dev->index;
}

static tm_dtype cuda_act_dtype(tm_device *dev)
{
    return dev->ctx.act;
}

static tm_status cuda_mem_free(tm_device *dev, size_t *bytes, tm_err *err)
{
    size_t left, total;
    bind_thread(dev);
    cudaError_t e = cudaMemGetInfo(&left, &total);
    if (e != cudaSuccess)
        return TM_FAIL(err, TM_STATUS_INTERNAL, "CUDA device %d: memory: %s", dev->index,
                       cudaGetErrorString(e));
    *bytes = left > RESERVE_BYTES ? left - RESERVE_BYTES : 0;
    return TM_OK;
}

/* cudaMalloc aligns to 256 bytes. */
static tm_status cuda_alloc(tm_device *dev, size_t bytes, void **out, tm_err *err)
{
    void *p = NULL;
    bind_thread(dev);
    cudaError_t e = cudaMalloc(&p, bytes ? bytes : 1);
    if (e == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError(); /* not sticky: the device goes on */
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "CUDA device %d has no %zu bytes left", dev->index,
                       bytes);
    }
    if (e != cudaSuccess)
        return TM_FAIL(err, TM_STATUS_INTERNAL, "CUDA device %d: %s", dev->index,
                       cudaGetErrorString(e));
    *out = p;
    return TM_OK;
}

static void cuda_free(tm_device *dev, void *p)
{
    (void)TM_CUDA(dev, cudaFree(p));
}

/* Pageable host memory may be reused on return; pinned memory only after sync. */
static tm_status cuda_upload(tm_device *dev, void *dst, const void *host, size_t bytes)
{
    bind_thread(dev);
    return TM_CUDA(dev, cudaMemcpyAsync(dst, host, bytes, cudaMemcpyHostToDevice, dev->ctx.stream));
}

static tm_status cuda_sync(tm_device *dev)
{
    bind_thread(dev);
    if (dev->ranks)
        return tm_ranks_wait(dev, NULL);
    return TM_CUDA(dev, cudaStreamSynchronize(dev->ctx.stream));
}

static tm_status cuda_download_async(tm_device *dev, void *host, const void *src, size_t bytes)
{
    return TM_CUDA(dev, cudaMemcpyAsync(host, src, bytes, cudaMemcpyDeviceToHost, dev->ctx.stream));
}

/* The data is there on return. A copy to pageable memory waits inside the driver, where no peer is watched: so the
 * stream is waited for first. */
static tm_status cuda_download(tm_device *dev, void *host, const void *src, size_t bytes)
{
    if (dev->ranks)
        TM_TRY(tm_ranks_wait(dev, NULL));
    TM_TRY(cuda_download_async(dev, host, src, bytes));
    return cuda_sync(dev);
}

static tm_status cuda_alloc_host(tm_device *dev, size_t bytes, void **out, tm_err *err)
{
    void *p = NULL;
    bind_thread(dev);
    cudaError_t e = cudaHostAlloc(&p, bytes ? bytes : 1, cudaHostAllocDefault);
    if (e == cudaSuccess) {
        *out = p;
        return TM_OK;
    }
    (void)cudaGetLastError();
    return TM_FAIL(err, TM_STATUS_NO_MEMORY, "device %d: %zu bytes of pinned host memory: %s",
                   dev->index, bytes, cudaGetErrorString(e));
}

static void cuda_free_host(tm_device *dev, void *p)
{
    (void)TM_CUDA(dev, cudaFreeHost(p));
}

static tm_status cuda_event_create(tm_device *dev, tm_dev_event **out, tm_err *err)
{
    tm_dev_event *ev = calloc(1, sizeof(*ev));
    if (!ev)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for an event");
    bind_thread(dev);
    cudaError_t e = cudaEventCreateWithFlags(&ev->event, cudaEventDisableTiming);
    if (e != cudaSuccess) {
        free(ev);
        return TM_FAIL(err, TM_STATUS_INTERNAL, "CUDA device %d: event: %s", dev->index,
                       cudaGetErrorString(e));
    }
    *out = ev;
    return TM_OK;
}

static tm_status cuda_event_record(tm_device *dev, tm_dev_event *event)
{
    bind_thread(dev);
    return TM_CUDA(dev, cudaEventRecord(event->event, dev->ctx.stream));
}

static tm_status cuda_event_wait(tm_device *dev, tm_dev_event *event)
{
    bind_thread(dev);
    if (dev->ranks)
        return tm_ranks_wait(dev, event->event);
    return TM_CUDA(dev, cudaEventSynchronize(event->event));
}

static void cuda_event_free(tm_device *dev, tm_dev_event *event)
{
    if (!event)
        return;
    (void)TM_CUDA(dev, cudaEventDestroy(event->event));
    free(event);
}

static tm_status cuda_graph_begin(tm_device *dev)
{
    bind_thread(dev);
    return TM_CUDA(dev, cudaStreamBeginCapture(dev->ctx.stream, cudaStreamCaptureModeThreadLocal));
}

static tm_status cuda_graph_end(tm_device *dev, tm_graph **out)
{
    cudaGraph_t graph = NULL;
    tm_status st = TM_CUDA(dev, cudaStreamEndCapture(dev->ctx.stream, &graph));
    tm_graph *g = st == TM_OK ? calloc(1, sizeof(*g)) : NULL;
    if (st == TM_OK && !g)
        st = TM_STATUS_NO_MEMORY;
    if (st == TM_OK)
        st = TM_CUDA(dev, cudaGraphInstantiate(&g->exec, graph, 0));
    if (graph)
        cudaGraphDestroy(graph);
    if (st != TM_OK) {
        free(g);
        return st;
    }
    *out = g;
    return TM_OK;
}

static tm_status cuda_graph_launch(tm_device *dev, tm_graph *graph)
{
    bind_thread(dev);
    return TM_CUDA(dev, cudaGraphLaunch(graph->exec, dev->ctx.stream));
}

static void cuda_graph_free(tm_device *dev, tm_graph *graph)
{
    if (!graph)
        return;
    (void)TM_CUDA(dev, cudaGraphExecDestroy(graph->exec));
    free(graph);
}

/* Random bytes are not needed: the kernel reads integers, and their value does not change the speed of a read. */
static tm_status time_reads(tm_device *dev, const void *p, size_t bytes, double *rate)
{
    cudaEvent_t begin, end;
    float best = 0.0f, ms;
    TM_TRY(TM_CUDA(dev, cudaEventCreate(&begin)));
    TM_TRY(TM_CUDA(dev, cudaEventCreate(&end)));
    for (int i = 0; i < 7; i++) {
        TM_TRY(TM_CUDA(dev, cudaEventRecord(begin, dev->ctx.stream)));
        TM_TRY(TM_CUDA(dev, tm_cuda_read_launch(p, bytes, &dev->ctx)));
        TM_TRY(TM_CUDA(dev, cudaEventRecord(end, dev->ctx.stream)));
        TM_TRY(cuda_sync(dev));
        TM_TRY(TM_CUDA(dev, cudaEventElapsedTime(&ms, begin, end)));
        best = i == 0 || ms < best ? ms : best;
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    *rate = (double)bytes / ((double)best * 1e-3);
    return TM_OK;
}

static tm_status cuda_read_rate(tm_device *dev, size_t bytes, double *rate, tm_err *err)
{
    void *p = NULL;
    TM_TRY(cuda_alloc(dev, bytes, &p, err));
    tm_status st = TM_CUDA(dev, cudaMemsetAsync(p, 1, bytes, dev->ctx.stream));
    if (st == TM_OK)
        st = time_reads(dev, p, bytes, rate);
    cuda_free(dev, p);
    return st == TM_OK ? TM_OK : TM_FAIL(err, st, "device %d: the read probe failed", dev->index);
}

static tm_status cuda_profile_begin(tm_device *dev)
{
    if (!dev->ctx.profile)
        dev->ctx.profile = tm_cuda_profile_create();
    return dev->ctx.profile ? TM_OK : TM_STATUS_NO_MEMORY;
}

static tm_status cuda_profile_end(tm_device *dev, tm_profile_row *rows, int max, int *count)
{
    tm_cuda_profile *p = dev->ctx.profile;
    dev->ctx.profile = NULL;
    tm_status st = TM_CUDA(dev, tm_cuda_profile_rows(p, rows, max, count));
    tm_cuda_profile_destroy(p);
    return st;
}

static const char *cuda_describe(tm_device *dev)
{
    return dev->text;
}

static const tm_device_ops g_device_ops = {
    .open = cuda_open,
    .close = cuda_close,
    .mem_free = cuda_mem_free,
    .alloc = cuda_alloc,
    .free = cuda_free,
    .upload = cuda_upload,
    .download = cuda_download,
    .sync = cuda_sync,
    .describe = cuda_describe,
    .act_dtype = cuda_act_dtype,
    .alloc_host = cuda_alloc_host,
    .free_host = cuda_free_host,
    .download_async = cuda_download_async,
    .event_create = cuda_event_create,
    .event_record = cuda_event_record,
    .event_wait = cuda_event_wait,
    .event_free = cuda_event_free,
    .graph_begin = cuda_graph_begin,
    .graph_end = cuda_graph_end,
    .graph_launch = cuda_graph_launch,
    .graph_free = cuda_graph_free,
    .read_rate = cuda_read_rate,
    .join = tm_ranks_join,
    .profile_begin = cuda_profile_begin,
    .profile_end = cuda_profile_end,
};

const tm_backend tm_backend_cuda = {
    .name = "cuda",
    .act_dtype = TM_DTYPE_BF16,
    .dev = &g_device_ops,
    .ops = &tm_cuda_ops,
};
