/* Linear layers of any shape and weight dtype, one warp per output: for weights whose K no fast kernel takes
 * (not a multiple of 32). Correct, not fast. And the bias in every row, which cuBLASLt then adds to. */
#include "engine/backend/cuda/any.cuh"
#include "engine/backend/cuda/launch.cuh"

namespace
{

constexpr int THREADS = 256;

__global__ void __launch_bounds__(THREADS)
    linear_kernel(tm_linear_args a, tm_weight w, tm_dtype in, tm_dtype out)
{
    wait_previous();
    start_next();
    const int n = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, token = blockIdx.y;
    if (n >= w.n)
        return;
    float sum = 0.0f;
    for (int i = threadIdx.x % 32; i < w.k; i += 32)
        sum += load_number(a.x, (size_t)token * a.ldx + i, in) *
               load_number(w.data, (size_t)n * w.k + i, w.dtype);
    for (int i = 16; i > 0; i >>= 1)
        sum += __shfl_xor_sync(0xffffffffu, sum, i);
    if (threadIdx.x % 32 == 0)
        store_number(a.out, (size_t)token * a.ldo + n, out, w.bias ? sum + w.bias[n] : sum);
}

__global__ void __launch_bounds__(THREADS) bias_kernel(tm_linear_args a, tm_weight w, tm_dtype out)
{
    wait_previous();
    start_next();
    const int n = blockIdx.x * THREADS + threadIdx.x;
    if (n < w.n)
        store_number(a.out, (size_t)blockIdx.y * a.ldo + n, out, w.bias[n]);
}

} /* namespace */

extern "C" cudaError_t tm_cuda_linear_any_launch(const tm_linear_args *a, const tm_cuda_ctx *c)
{
    dim3 grid((unsigned)((a->w->n + THREADS / 32 - 1) / (THREADS / 32)), (unsigned)a->n_tokens);
    return launch_kernel(c, linear_kernel, grid, THREADS, 0, *a, *a->w, c->act,
                         a->f32_out ? TM_DTYPE_F32 : c->act);
}

extern "C" cudaError_t tm_cuda_bias_rows_launch(const tm_linear_args *a, const tm_cuda_ctx *c)
{
    dim3 grid((unsigned)((a->w->n + THREADS - 1) / THREADS), (unsigned)a->n_tokens);
    return launch_kernel(c, bias_kernel, grid, THREADS, 0, *a, *a->w,
                         a->f32_out ? TM_DTYPE_F32 : c->act);
}
