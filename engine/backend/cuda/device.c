/* The CUDA device: memory, copies and synchronisation on one stream, and the operator table.
 *
 * After any CUDA failure the context cannot be trusted, so the device is poisoned: the failure is logged
 * once, with the call that saw it, and every later operator returns the same status. The engine ends the
 * group. Operators without a kernel are NULL: a model that needs one is refused when it is opened. */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/check.h"
#include "common/log.h"
#include "engine/backend/cuda/cuda.h"
#include "engine/backend/cuda/kernels.h"

enum { CAPABILITY_MIN = 80 }; /* sm_80: bf16 arithmetic and asynchronous copies */

struct tm_device {
    int index;
    cudaStream_t stream;
    bool poisoned;
    char text[160];
};

/* Passes a result on; the first failure is logged and poisons the device. */
static tm_status check_call(tm_device *dev, cudaError_t e, const char *call)
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

#define TM_CUDA(dev, call) check_call((dev), (call), #call)

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

static tm_status cuda_open(tm_device **out, const tm_device_opts *opts, tm_err *err)
{
    struct cudaDeviceProp prop;
    TM_TRY(probe_device(opts->index, &prop, err));
    tm_device *d = calloc(1, sizeof *d);
    if (!d)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for the cuda device");
    d->index = opts->index;
    cudaError_t e = cudaSetDevice(d->index);
    if (e == cudaSuccess)
        e = cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking);
    if (e != cudaSuccess) {
        free(d);
        return TM_FAIL(err, TM_STATUS_CONFIG, "CUDA device %d cannot be used: %s", opts->index,
                       cudaGetErrorString(e));
    }
    snprintf(d->text, sizeof d->text, "cuda %.100s, sm_%d%d, device %d", prop.name, prop.major,
             prop.minor, d->index);
    *out = d;
    return TM_OK;
}

static void cuda_close(tm_device *dev)
{
    if (!dev)
        return;
    cudaError_t e = cudaStreamDestroy(dev->stream);
    if (e != cudaSuccess && !dev->poisoned)
        tm_log(TM_LOG_WARN, "cuda_close", "device %d: %s", dev->index, cudaGetErrorString(e));
    free(dev);
}

static tm_status cuda_mem_free(tm_device *dev, size_t *bytes, tm_err *err)
{
    size_t left, total;
    cudaError_t e = cudaMemGetInfo(&left, &total);
    if (e != cudaSuccess)
        return TM_FAIL(err, TM_STATUS_INTERNAL, "CUDA device %d: memory: %s", dev->index,
                       cudaGetErrorString(e));
    *bytes = left;
    return TM_OK;
}

/* cudaMalloc aligns to 256 bytes. */
static tm_status cuda_alloc(tm_device *dev, size_t bytes, void **out, tm_err *err)
{
    void *p = NULL;
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
    return TM_CUDA(dev, cudaMemcpyAsync(dst, host, bytes, cudaMemcpyHostToDevice, dev->stream));
}

static tm_status cuda_sync(tm_device *dev)
{
    return TM_CUDA(dev, cudaStreamSynchronize(dev->stream));
}

/* The data is there on return. */
static tm_status cuda_download(tm_device *dev, void *host, const void *src, size_t bytes)
{
    TM_TRY(TM_CUDA(dev, cudaMemcpyAsync(host, src, bytes, cudaMemcpyDeviceToHost, dev->stream)));
    return cuda_sync(dev);
}

static const char *cuda_describe(tm_device *dev)
{
    return dev->text;
}

static tm_status cuda_embed(tm_device *dev, const tm_embed_args *a)
{
    return TM_CUDA(dev, tm_cuda_embed_launch(a, tm_backend_cuda.act_dtype, dev->stream));
}

static tm_status cuda_norm(tm_device *dev, const tm_norm_args *a)
{
    return TM_CUDA(dev, tm_cuda_norm_launch(a, tm_backend_cuda.act_dtype, dev->stream));
}

static tm_status cuda_gather_rows(tm_device *dev, const tm_gather_rows_args *a)
{
    return TM_CUDA(dev, tm_cuda_gather_rows_launch(a, tm_backend_cuda.act_dtype, dev->stream));
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
};

static const tm_op_table g_ops = {
    .embed = cuda_embed,
    .norm = cuda_norm,
    .gather_rows = cuda_gather_rows,
};

const tm_backend tm_backend_cuda = {
    .name = "cuda",
    .act_dtype = TM_DTYPE_BF16,
    .dev = &g_device_ops,
    .ops = &g_ops,
};
