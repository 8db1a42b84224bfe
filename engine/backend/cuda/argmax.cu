/* The largest number of each row, and the read bandwidth probe.
 *
 * A row is cut into parts; a number and its index become one 64-bit key whose order is that of the number, then of
 * the lower index. The last block of a row takes the largest of the parts' keys. Bytes moved: R * n * 4. */
#include "engine/backend/cuda/launch.cuh"

namespace
{

constexpr int THREADS = 256;
constexpr int PARTS = 32;

__device__ unsigned long long key_of(float v, int i)
{
    if (!(fabsf(v) < INFINITY)) /* not a number or not finite: below every key, 0 means none */
        return 0;
    const unsigned int u = __float_as_uint(v);
    const unsigned int order = u & 0x80000000u ? ~u : u | 0x80000000u;
    return (unsigned long long)order << 32 | (0xffffffffu - (unsigned)i);
}

__device__ unsigned long long block_max(unsigned long long key)
{
    SHARED(unsigned long long[THREADS / 32], slots);
    for (int i = 16; i > 0; i >>= 1)
        key = max(key, __shfl_xor_sync(0xffffffffu, key, i));
    if (threadIdx.x % 32 == 0)
        slots[threadIdx.x / 32] = key;
    __syncthreads();
    for (int i = 0; i < THREADS / 32; i++)
        key = max(key, slots[i]);
    __syncthreads();
    return key;
}

__global__ void __launch_bounds__(THREADS)
    argmax_kernel(tm_argmax_args a, unsigned long long *keys, int *tickets)
{
    SHARED(bool, last);
    wait_previous();
    start_next();
    const int row = blockIdx.y, each = (a.n + PARTS - 1) / PARTS;
    const float *x = a.x + (size_t)row * (a.ld ? a.ld : a.n);
    const int end = min((int)(blockIdx.x + 1) * each, a.n);
    unsigned long long key = 0;
    for (int i = blockIdx.x * each + threadIdx.x; i < end; i += THREADS)
        key = max(key, key_of(x[i], i));
    key = block_max(key);
    if (threadIdx.x == 0) {
        keys[row * PARTS + blockIdx.x] = key;
        __threadfence();
        last = atomicAdd(&tickets[row], 1) == PARTS - 1;
    }
    __syncthreads();
    if (!last)
        return;
    __threadfence();
    key = block_max(threadIdx.x < PARTS ? __ldcg(&keys[row * PARTS + threadIdx.x]) : 0);
    if (threadIdx.x == 0) {
        tickets[row] = 0;
        a.out[row] = key ? (int32_t)(0xffffffffu - (unsigned)key) : -1;
    }
}

/* 16 bytes a load, 8 loads under way a thread. */
__global__ void __launch_bounds__(512) read_kernel(const uint4 *p, size_t n, float *out)
{
    wait_previous();
    start_next();
    unsigned int sum = 0;
    const size_t stride = (size_t)gridDim.x * 512;
    size_t i = (size_t)blockIdx.x * 512 + threadIdx.x;
    for (; i + 7 * stride < n; i += 8 * stride) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = __ldcs(p + i + j * stride);
#pragma unroll
        for (int j = 0; j < 8; j++)
            sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < n; i += stride)
        sum += p[i].x;
    if (sum == 0x9e3779b9u) /* never by design: keeps the loads */
        out[0] = (float)sum;
}

} /* namespace */

extern "C" cudaError_t tm_cuda_argmax_launch(const tm_argmax_args *a, const tm_cuda_ctx *c)
{
    if (a->n_rows == 0)
        return cudaSuccess;
    if (a->n_rows > TM_CUDA_TICKETS)
        return cudaErrorInvalidValue;
    return launch_kernel(c, argmax_kernel, dim3(PARTS, (unsigned)a->n_rows), THREADS, 0, *a,
                         reinterpret_cast<unsigned long long *>(c->scratch), c->tickets);
}

extern "C" cudaError_t tm_cuda_read_launch(const void *p, size_t bytes, const tm_cuda_ctx *c)
{
    return launch_kernel(c, read_kernel, dim3((unsigned)c->sms * 4), 512, 0,
                         static_cast<const uint4 *>(p), bytes / 16, c->scratch);
}
