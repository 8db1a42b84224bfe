/* Linear layers with f32 weights: the routers of experts and the gates of shared ones, few outputs that must be exact.
 *
 * A warp has one output of up to 16 tokens, so a row of W is read once for all of them; lanes own 4 neighbouring k,
 * sums are f32. The 8 warps of a block have the same tokens, whose rows then come from L1. Bytes moved: for every 16
 * tokens N * K * 4, from L2, and for every 8 outputs T * K * 2. K is a multiple of 4. */
#include "engine/backend/cuda/any.cuh"
#include "engine/backend/cuda/launch.cuh"

namespace
{

constexpr int WARPS = 8, THREADS = 32 * WARPS;

template <typename T, int TOKENS>
__global__ void __launch_bounds__(THREADS) f32_kernel(tm_linear_args a, tm_weight w, tm_dtype out)
{
    wait_previous();
    start_next();
    const int n = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = blockIdx.y * TOKENS, last = a.n_tokens - 1;
    if (n >= w.n)
        return;
    const float *row = static_cast<const float *>(w.data) + (size_t)n * w.k;
    const T *x = static_cast<const T *>(a.x);
    float sum[TOKENS] = {};
    for (int i = lane; i < w.k / 4; i += 32) {
        const pack<float, 4> u = load_pack<float, 4>(row, i);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) { /* behind the last token: that one again */
            const pack<T, 4> v = load_pack<T, 4>(x + (size_t)min(first + t, last) * a.ldx, i);
#pragma unroll
            for (int j = 0; j < 4; j++)
                sum[t] += u.e[j] * to_f32(v.e[j]);
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        for (int i = 16; i > 0; i >>= 1)
            sum[t] += __shfl_xor_sync(0xffffffffu, sum[t], i);
        if (lane == 0 && first + t <= last)
            store_number(a.out, (size_t)(first + t) * a.ldo + n, out,
                         w.bias ? sum[t] + w.bias[n] : sum[t]);
    }
}

template <typename T, int TOKENS> cudaError_t launch(const tm_linear_args *a, const tm_cuda_ctx *c)
{
    dim3 grid((unsigned)((a->w->n + WARPS - 1) / WARPS),
              (unsigned)((a->n_tokens + TOKENS - 1) / TOKENS));
    return launch_kernel(c, f32_kernel<T, TOKENS>, grid, THREADS, 0, *a, *a->w,
                         a->f32_out ? TM_DTYPE_F32 : c->act);
}

template <typename T> cudaError_t launch_tokens(const tm_linear_args *a, const tm_cuda_ctx *c)
{
    if (a->n_tokens == 1)
        return launch<T, 1>(a, c);
    return a->n_tokens <= 4 ? launch<T, 4>(a, c) : launch<T, 16>(a, c);
}

} /* namespace */

extern "C" bool tm_cuda_linear_f32_fits(const tm_linear_args *a)
{
    const uintptr_t w = reinterpret_cast<uintptr_t>(a->w->data);
    const uintptr_t x = reinterpret_cast<uintptr_t>(a->x);
    return a->w->dtype == TM_DTYPE_F32 && a->w->k % 4 == 0 && a->ldx % 4 == 0 && w % 16 == 0 &&
           x % 8 == 0;
}

extern "C" cudaError_t tm_cuda_linear_f32_launch(const tm_linear_args *a, const tm_cuda_ctx *c)
{
    return c->act == TM_DTYPE_BF16 ? launch_tokens<__nv_bfloat16>(a, c)
                                   : launch_tokens<__half>(a, c);
}
