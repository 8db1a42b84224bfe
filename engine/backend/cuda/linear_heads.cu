/* A linear layer of each head's own, for few tokens: latent attention's ways into the latent space and back, which one
 * by one would cost a launch per head.
 *
 * A block has 64 rows of one head's weight, 16 a warp, and 8 tokens; see stream.cuh for the way of the data. Bytes
 * moved: groups * N * K * 2 for every 8 tokens (the first time from memory), and x from L2. */
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/stream.cuh"

namespace
{

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int TOKENS = 8;
constexpr int TOKENS_MAX =
    64; /* with more, the products are large enough for launches of their own */
constexpr int DEPTH = 2;

template <typename T>
__device__ lane_rows<T> find_rows(const tm_linear_heads_args &a, const tm_weight &w, int row0)
{
    const int g = threadIdx.x % 32 / 4, token = blockIdx.z * TOKENS + g, group = blockIdx.y;
    const T *at = static_cast<const T *>(w.data) + (size_t)group * a.n * w.k;
    lane_rows<T> r;
    r.has_lo = row0 + g < a.n;
    r.has_hi = row0 + g + 8 < a.n;
    r.has_x = token < a.n_tokens;
    r.lo = at + (size_t)(r.has_lo ? row0 + g : 0) * w.k;
    r.hi = at + (size_t)(r.has_hi ? row0 + g + 8 : 0) * w.k;
    r.x =
        static_cast<const T *>(a.x) + (size_t)(r.has_x ? token : 0) * a.ldx + (size_t)group * a.gdx;
    return r;
}

template <typename T>
__global__ void __launch_bounds__(THREADS) heads_kernel(tm_linear_heads_args a, tm_weight w)
{
    const int lane = threadIdx.x % 32, row0 = (blockIdx.x * WARPS + threadIdx.x / 32) * 16;
    const int steps = (w.k + STREAM_STEP - 1) / STREAM_STEP;
    wait_previous();
    start_next();
    if (row0 >= a.n)
        return;
    const lane_rows<T> r = find_rows<T>(a, w, row0);
    step_regs s[DEPTH];
    float acc[4] = {};
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        load_step<T>(s[d], r, d, w.k);
    for (int at = 0; at < steps; at += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            multiply_step<T>(acc, s[d]); /* zeros behind the end */
            load_step<T>(s[d], r, at + d + DEPTH, w.k);
        }
    }
    T *out = static_cast<T *>(a.out) + (size_t)blockIdx.y * a.gdo;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int row = row0 + lane / 4 + e / 2 * 8;
        const int token = blockIdx.z * TOKENS + lane % 4 * 2 + e % 2;
        if (row < a.n && token < a.n_tokens)
            out[(size_t)token * a.ldo + row] = from_f32<T>(acc[e]);
    }
}

} /* namespace */

extern "C" bool tm_cuda_linear_heads_fits(const tm_linear_heads_args *a, const tm_cuda_ctx *c)
{
    const uintptr_t places =
        reinterpret_cast<uintptr_t>(a->w->data) | reinterpret_cast<uintptr_t>(a->x);
    return a->w->dtype == c->act && !a->w->bias && a->w->k % 8 == 0 && a->ldx % 8 == 0 &&
           a->gdx % 8 == 0 && places % 16 == 0 && a->n_tokens <= TOKENS_MAX;
}

extern "C" cudaError_t tm_cuda_linear_heads_launch(const tm_linear_heads_args *a,
                                                   const tm_cuda_ctx *c)
{
    const int rows = WARPS * 16;
    dim3 grid((unsigned)((a->n + rows - 1) / rows), (unsigned)a->groups,
              (unsigned)((a->n_tokens + TOKENS - 1) / TOKENS));
    return c->act == TM_DTYPE_BF16
               ? launch_kernel(c, heads_kernel<__nv_bfloat16>, grid, THREADS, 0, *a, *a->w)
               : launch_kernel(c, heads_kernel<__half>, grid, THREADS, 0, *a, *a->w);
}
