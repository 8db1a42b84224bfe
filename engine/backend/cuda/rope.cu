/* Rotary positions on q and k in place, then k and v into the paged cache.
 *
 * One block per token and group of heads. The block's angles are computed once into shared memory (at most
 * 512 of them, f32, with the full-range sine: angles reach the context length). Then each warp takes heads in
 * turn. Rows of padding sequences (kv_len 0) are left alone.
 *
 * Bytes moved: T * (H + 2K) * d * 2 read, the same written, K * d * 4 of it to the cache. */
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/vec.cuh"

namespace
{

constexpr int THREADS = 128;
constexpr int HEADS_PER_BLOCK = 8;
constexpr int PAIRS_MAX = 512; /* of 1024 rotated dims */

/* The last sequence that begins at or before row t. */
__device__ int find_seq(const int32_t *begin, int n, int t)
{
    int lo = 0, hi = n - 1;
    while (lo < hi) {
        int mid = (lo + hi + 1) / 2;
        if (begin[mid] <= t)
            lo = mid;
        else
            hi = mid - 1;
    }
    return lo;
}

template <typename T>
__device__ void rotate(T *head, const tm_rope_append_args &a, const float2 *cs, int lane)
{
    const int half = a.rotary_dim / 2;
    for (int i = lane; i < half; i += 32) {
        T *u = head + (a.interleaved ? 2 * i : i);
        T *v = head + (a.interleaved ? 2 * i + 1 : i + half);
        float x = to_f32(*u), y = to_f32(*v);
        *u = from_f32<T>(x * cs[i].x - y * cs[i].y);
        *v = from_f32<T>(y * cs[i].x + x * cs[i].y);
    }
}

/* Queries beyond the trained length grow with ln(position). */
template <typename T> __device__ void scale_head(T *head, int d, float scale, int lane)
{
    for (int i = lane; i < d; i += 32)
        head[i] = from_f32<T>(to_f32(head[i]) * scale);
}

/* `head` counts query heads, key heads, value heads. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    rope_kernel(tm_rope_append_args a, tm_batch b, tm_kv_layer kv)
{
    SHARED(float2[PAIRS_MAX], cs);
    wait_previous();
    start_next();
    const int t = blockIdx.x, seq = t < b.n_decode ? t : find_seq(b.seq_begin, b.n_seqs, t);
    if (b.kv_len[seq] == 0)
        return;
    const int pos = b.positions[t], d = a.head_dim;
    const float *freq =
        a.seq_inv_freq ? a.seq_inv_freq + (size_t)seq * (a.rotary_dim / 2) : a.inv_freq;
    for (int i = threadIdx.x; i < a.rotary_dim / 2; i += THREADS) {
        float s, c;
        sincosf((float)pos * freq[i], &s, &c);
        cs[i] = make_float2(c * a.mscale, s * a.mscale);
    }
    __syncthreads();
    const int first = blockIdx.y * HEADS_PER_BLOCK, heads = a.n_heads + 2 * a.n_kv_heads;
    const int lane = threadIdx.x % 32;
    T *row = static_cast<T *>(a.qkv) + (size_t)t * heads * d;
    const size_t block = b.blocks[(size_t)seq * b.max_blocks + pos / kv.block_tokens];
    for (int h = first + threadIdx.x / 32; h < min(first + HEADS_PER_BLOCK, heads);
         h += THREADS / 32) {
        T *head = row + (size_t)h * d;
        if (h < a.n_heads + a.n_kv_heads)
            rotate(head, a, cs, lane);
        __syncwarp();
        if (h < a.n_heads) {
            if (a.logn_len > 0 && pos >= a.logn_len)
                scale_head(head, d, logf((float)pos + 1.0f) / logf((float)a.logn_len), lane);
            continue;
        }
        const bool value = h >= a.n_heads + a.n_kv_heads;
        if (value && kv.v == kv.k)
            continue;
        const int k = h - a.n_heads - (value ? a.n_kv_heads : 0);
        T *cache = static_cast<T *>(value ? kv.v : kv.k) +
                   ((block * a.n_kv_heads + k) * kv.block_tokens + pos % kv.block_tokens) * d;
        for (int i = lane; i < d; i += 32)
            cache[i] = head[i];
    }
}

} /* namespace */

extern "C" cudaError_t tm_cuda_rope_append_launch(const tm_rope_append_args *a,
                                                  const tm_cuda_ctx *c)
{
    const int heads = a->n_heads + 2 * a->n_kv_heads;
    if (a->rotary_dim > 2 * PAIRS_MAX || a->kv->dtype != c->act)
        return cudaErrorInvalidValue;
    if (a->batch->n_tokens == 0)
        return cudaSuccess;
    dim3 grid((unsigned)a->batch->n_tokens,
              (unsigned)((heads + HEADS_PER_BLOCK - 1) / HEADS_PER_BLOCK));
    switch (c->act) {
    case TM_DTYPE_BF16:
        return launch_kernel(c, rope_kernel<__nv_bfloat16>, grid, THREADS, 0, *a, *a->batch,
                             *a->kv);
    case TM_DTYPE_F16:
        return launch_kernel(c, rope_kernel<__half>, grid, THREADS, 0, *a, *a->batch, *a->kv);
    default:
        return cudaErrorInvalidValue;
    }
}
