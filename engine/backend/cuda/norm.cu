/* Residual add and RMS or layer norm, one block per token.
 *
 *   x = round(residual + delta); residual = x; out = norm(x) * w (+ b)       [T, h], h contiguous
 *
 * x is rounded to the activation's dtype before it is normalised, so that the value that goes on in the
 * residual stream is the one that was normalised. Sums are f32. A block holds its whole row in registers
 * (PACKS packs of V elements per thread) between the passes: memory is read once and written once.
 *
 * Bytes moved per call: T * h * (2 read residual + 2 read delta + 2 write residual + 2 write out), and the
 * f32 weights from L2. Rows that are no multiple of 8 elements take V = 1. Largest row: 1024 threads *
 * PACKS * V = 32768 elements (V = 8) or 4096 (V = 1); longer ones are refused as invalid. */
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/vec.cuh"

namespace
{

constexpr int PACKS = 4;
constexpr int THREADS_MAX = 1024;

/* The sum over the block, in every thread. `slots` is shared memory for one float per warp. */
__device__ float block_sum(float v, float *slots)
{
    for (int i = 16; i > 0; i >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, i);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0)
        slots[warp] = v;
    __syncthreads();
    v = lane < warps ? slots[lane] : 0.0f;
    for (int i = 16; i > 0; i >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, i);
    __syncthreads(); /* the slots may be written again */
    return v;
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS_MAX) norm_kernel(tm_norm_args a)
{
    SHARED(float[32], slots);
    const int packs = a.h / V;
    const size_t row = (size_t)blockIdx.x * packs;
    float x[PACKS][V], sum = 0.0f;
    if (a.out) /* the weights have left L2 since the last step */
        for (int i = threadIdx.x * 32; i < a.h; i += blockDim.x * 32)
            prefetch_l2(a.w + i);
    start_next();
    wait_previous();
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        int i = p * blockDim.x + threadIdx.x;
        if (i >= packs)
            break;
        pack<T, V> r = load_pack<T, V>(a.residual, row + i);
        if (a.delta) {
            pack<T, V> d = load_pack<T, V>(a.delta, row + i);
#pragma unroll
            for (int j = 0; j < V; j++)
                r.e[j] = from_f32<T>(to_f32(r.e[j]) + to_f32(d.e[j]));
            store_pack<T, V>(a.residual_out ? a.residual_out : a.residual, row + i, r);
        }
#pragma unroll
        for (int j = 0; j < V; j++) {
            x[p][j] = to_f32(r.e[j]);
            sum += x[p][j];
        }
    }
    if (!a.out)
        return;
    float mean = a.kind == TM_NORM_LAYER ? block_sum(sum, slots) / a.h : 0.0f, sq = 0.0f;
#pragma unroll
    for (int p = 0; p < PACKS; p++)
        if (p * (int)blockDim.x + (int)threadIdx.x < packs)
#pragma unroll
            for (int j = 0; j < V; j++)
                sq += (x[p][j] - mean) * (x[p][j] - mean);
    const float inv = rsqrtf(block_sum(sq, slots) / a.h + a.eps);
    const float one = a.add_one ? 1.0f : 0.0f;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        int i = p * blockDim.x + threadIdx.x;
        if (i >= packs)
            break;
        pack<T, V> o;
#pragma unroll
        for (int j = 0; j < V; j++) {
            float v = (x[p][j] - mean) * inv * (one + a.w[i * V + j]);
            o.e[j] = from_f32<T>(a.b ? v + a.b[i * V + j] : v);
        }
        store_pack<T, V>(a.out, row + i, o);
    }
}

template <typename T> cudaError_t launch(const tm_norm_args *a, const tm_cuda_ctx *c)
{
    const int v = a->h % 8 == 0 ? 8 : 1, packs = a->h / v;
    if (packs > THREADS_MAX * PACKS)
        return cudaErrorInvalidValue;
    int threads = (packs + 31) / 32 * 32;
    if (threads > 256 && packs <= 256 * PACKS)
        threads = 256;
    threads = threads > THREADS_MAX ? THREADS_MAX : threads;
    dim3 grid((unsigned)a->n_tokens);
    return v == 8 ? launch_kernel(c, norm_kernel<T, 8>, grid, threads, 0, *a)
                  : launch_kernel(c, norm_kernel<T, 1>, grid, threads, 0, *a);
}

} /* namespace */

extern "C" cudaError_t tm_cuda_norm_launch(const tm_norm_args *a, const tm_cuda_ctx *c)
{
    if (a->n_tokens == 0)
        return cudaSuccess;
    switch (c->act) {
    case TM_DTYPE_BF16:
        return launch<__nv_bfloat16>(a, c);
    case TM_DTYPE_F16:
        return launch<__half>(a, c);
    default:
        return cudaErrorInvalidValue;
    }
}
