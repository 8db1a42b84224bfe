/* Causal attention of prompt chunks over paged keys and values, ragged over sequences: bound by tensor cores.
 *
 * A block has up to 128 (head size 256: 64) rows of one sequence and one query head; each of its 4 warps holds
 * 32 (16) rows. Keys and values pass through shared memory 64 at a time: while the scores of one tile are
 * computed its values are being copied, and during the weighted sum the next keys. Scores and weights stay in
 * registers: the accumulator of S = Q K^T is, packed to 16 bits, the operand of O += P V.
 *
 * Rows of shared memory are 16 bytes longer than the head: ldmatrix then has no bank conflicts. Tiles with the
 * most keys come first in the grid. A sequence's rows are contiguous positions ending at kv_len - 1. */
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/mma.cuh"
#include "engine/backend/cuda/prefill.cuh"
#include "engine/backend/cuda/softmax.cuh"

namespace
{

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int KEYS = 64; /* of a tile */

template <int D> struct geometry {
    static constexpr int MT = D <= 128 ? 2 : 1;  /* 16-row pieces of a warp */
    static constexpr int ROWS = WARPS * MT * 16; /* of a block */
    static constexpr int LD = D + 8;             /* row of shared memory, numbers */
    static constexpr size_t SMEM = (size_t)(ROWS + 2 * KEYS) * LD * 2;
};

/* KEYS rows of a kv head from key j0 on, zeros behind the sequence. Blocks of KEYS tokens are the common case. */
template <typename T, int D>
__device__ __forceinline__ void copy_keys(const prefill_args &a, const tile &t, const void *cache,
                                          int kv_head, T *to, int j0)
{
    constexpr int CHUNKS = D / 8;
    const T *from = static_cast<const T *>(cache);
    if (a.block_tokens == KEYS) {
        from += (size_t)(t.blocks[j0 / KEYS] * a.kv_heads + kv_head) * (KEYS * D);
#pragma unroll
        for (int i = threadIdx.x; i < KEYS * CHUNKS; i += THREADS)
            copy_async(to + i / CHUNKS * geometry<D>::LD + i % CHUNKS * 8, from + i * 8,
                       j0 + i / CHUNKS < t.len);
        copy_commit();
        return;
    }
    for (int i = threadIdx.x; i < KEYS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, c = i % CHUNKS * 8, key = j0 + row;
        const bool valid = key < t.len;
        const int32_t block = valid ? t.blocks[key / a.block_tokens] : 0;
        const size_t at = (((size_t)block * a.kv_heads + kv_head) * a.block_tokens +
                           (valid ? key % a.block_tokens : 0)) *
                          D;
        copy_async(to + row * geometry<D>::LD + c, from + at + c, valid);
    }
    copy_commit();
}

template <typename T, int D>
__device__ void copy_queries(const prefill_args &a, const tile &t, int head, T *to)
{
    constexpr int CHUNKS = D / 8;
    const size_t ld = (size_t)(a.heads + 2 * a.kv_heads) * D;
    const T *from = static_cast<const T *>(a.qkv) + t.row0 * ld + (size_t)head * D;
    for (int i = threadIdx.x; i < geometry<D>::ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, c = i % CHUNKS * 8;
        const bool valid = row < t.rows;
        copy_async(to + row * geometry<D>::LD + c, from + (valid ? row : 0) * ld + c, valid);
    }
}

/* S[rows of the warp, KEYS] = Q K^T, unscaled. */
template <typename T, int D>
__device__ __forceinline__ void scores(float (&s)[geometry<D>::MT][KEYS / 8][4], const T *q,
                                       const T *k)
{
    constexpr int LD = geometry<D>::LD, MT = geometry<D>::MT;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
#pragma unroll
    for (int c = 0; c < D; c += 16) {
        uint32_t x[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++)
            load_matrix(x[m], q + (m * 16 + lane % 16) * LD + c + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            uint32_t y[4];
            load_matrix(y, k + (n * 16 + lane / 16 * 8 + lane % 8) * LD + c + lane / 8 % 2 * 8);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma<T>(s[m][2 * n], x[m][0], x[m][1], x[m][2], x[m][3], y[0], y[1]);
                mma<T>(s[m][2 * n + 1], x[m][0], x[m][1], x[m][2], x[m][3], y[2], y[3]);
            }
        }
    }
}

template <typename T, int D> struct warp_rows {
    static constexpr int MT = geometry<D>::MT;
    float o[MT][D / 8][4];
    float m[MT][2], l[MT][2]; /* rows g and g + 8 of each piece; l is the lane's own share */
};

/* Cap and bias, where the model has them: scores become what the softmax takes, in powers of two. By value and out
 * of line: the common loop keeps its registers. */
template <int MT> struct score_block {
    float s[MT][KEYS / 8][4];
};

template <int MT>
__device__ __noinline__ score_block<MT> shape_scores(score_block<MT> b, float scale, float cap,
                                                     float slope, int first)
{
    for (int m = 0; m < MT; m++)
        for (int n = 0; n < KEYS / 8; n++)
            for (int e = 0; e < 4; e++) {
                const int ahead = first + n * 8 + threadIdx.x % 4 * 2 + e % 2 - m * 16 - e / 2 * 8;
                float x = b.s[m][n][e] * scale;
                if (cap > 0.0f)
                    x = cap * tanhf(x / cap);
                b.s[m][n][e] = (x + slope * (float)ahead) * LOG2E;
            }
    return b;
}

/* Keys that a row does not see. */
template <int MT>
__device__ __forceinline__ void mask_scores(float (&s)[MT][KEYS / 8][4], int window, int pos,
                                            int j0)
{
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int p = pos + m * 16 + e / 2 * 8;
                const int key = j0 + n * 8 + threadIdx.x % 4 * 2 + e % 2;
                if (key > p || (window > 0 && key <= p - window))
                    s[m][n][e] = -INFINITY;
            }
}

/* Scores become weights, 2^(factor * s - m); o and l are scaled to the new maximum. */
template <typename T, int D>
__device__ __forceinline__ void soften(warp_rows<T, D> &w, float (&s)[geometry<D>::MT][KEYS / 8][4],
                                       float factor)
{
#pragma unroll
    for (int m = 0; m < geometry<D>::MT; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = -INFINITY;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            top = fmaxf(w.m[m][h], whole_maximum(top * factor));
            const float safe = top == -INFINITY ? 0.0f : top;
            const float corr = power2(w.m[m][h] - safe);
            w.m[m][h] = top;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &x = s[m][n][2 * h + e];
                    x = power2(x * factor - safe);
                    sum += x;
                }
            w.l[m][h] = w.l[m][h] * corr + sum;
#pragma unroll
            for (int i = 0; i < D / 8; i++)
                w.o[m][i][2 * h] *= corr, w.o[m][i][2 * h + 1] *= corr;
        }
    }
}

/* O += P V; v is [KEYS][LD]. */
template <typename T, int D>
__device__ __forceinline__ void weigh(warp_rows<T, D> &w,
                                      const float (&s)[geometry<D>::MT][KEYS / 8][4], const T *v)
{
    constexpr int LD = geometry<D>::LD, MT = geometry<D>::MT;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++) {
        uint32_t x[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            x[m][0] = pack2<T>(s[m][2 * n][0], s[m][2 * n][1]);
            x[m][1] = pack2<T>(s[m][2 * n][2], s[m][2 * n][3]);
            x[m][2] = pack2<T>(s[m][2 * n + 1][0], s[m][2 * n + 1][1]);
            x[m][3] = pack2<T>(s[m][2 * n + 1][2], s[m][2 * n + 1][3]);
        }
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            uint32_t y[4];
            load_matrix_trans(y, v + (n * 16 + lane % 16) * LD + i * 16 + lane / 16 * 8);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma<T>(w.o[m][2 * i], x[m][0], x[m][1], x[m][2], x[m][3], y[0], y[1]);
                mma<T>(w.o[m][2 * i + 1], x[m][0], x[m][1], x[m][2], x[m][3], y[2], y[3]);
            }
        }
    }
}

/* Through the warp's own rows of q in shared memory, so that memory is written 16 bytes at a time. */
template <typename T, int D>
__device__ void store_rows(const prefill_args &a, const tile &t, warp_rows<T, D> &w, T *q, int head)
{
    constexpr int LD = geometry<D>::LD, MT = geometry<D>::MT;
    const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * MT * 16;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float l = w.l[m][h];
            l += __shfl_xor_sync(0xffffffffu, l, 1);
            l += __shfl_xor_sync(0xffffffffu, l, 2);
            const float f = l > 0.0f ? 1.0f / l : 0.0f; /* rows behind the tile's end see nothing */
            T *to = q + (row0 + m * 16 + h * 8 + lane / 4) * LD + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < D / 8; i++)
                *reinterpret_cast<uint32_t *>(to + i * 8) =
                    pack2<T>(w.o[m][i][2 * h] * f, w.o[m][i][2 * h + 1] * f);
        }
    __syncwarp();
    T *out = static_cast<T *>(a.out) + ((size_t)t.row0 * a.heads + head) * D;
    for (int i = lane; i < MT * 16 * (D / 8); i += 32) {
        const int row = row0 + i / (D / 8), c = i % (D / 8) * 8;
        if (row < t.rows)
            *reinterpret_cast<uint4 *>(out + (size_t)row * a.heads * D + c) =
                *reinterpret_cast<const uint4 *>(q + row * LD + c);
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS) prefill_kernel(prefill_args a)
{
    DYNAMIC_SHARED(uint4, smem);
    constexpr int LD = geometry<D>::LD, MT = geometry<D>::MT;
    T *q = reinterpret_cast<T *>(smem), *k = q + geometry<D>::ROWS * LD, *v = k + KEYS * LD;
    wait_previous();
    start_next();
    tile t;
    if (!find_tile(a, geometry<D>::ROWS, blockIdx.y, &t))
        return;
    const int head = blockIdx.x, kv_head = head / (a.heads / a.kv_heads);
    const int warp_row = threadIdx.x / 32 * MT * 16;
    const int pos = t.pos0 + warp_row + threadIdx.x % 32 / 4;
    const float slope = a.alibi ? a.alibi[head] : 0.0f;
    const int last = (t.pos0 + t.rows - 1) / KEYS * KEYS;
    const bool shaped = a.softcap > 0.0f || a.alibi;
    const float factor = shaped ? 1.0f : a.scale * LOG2E;
    const int first = a.window > 0 ? max(t.pos0 - a.window + 1, 0) / KEYS * KEYS : 0;

    warp_rows<T, D> w = {};
    for (int m = 0; m < MT; m++)
        w.m[m][0] = w.m[m][1] = -INFINITY;
    copy_queries<T, D>(a, t, head, q);
    copy_keys<T, D>(a, t, a.k, kv_head, k, last);
    for (int j = last; j >= first; j -= KEYS) {
        score_block<MT> b;
        copy_wait<0>();
        __syncthreads(); /* keys are there, and the last tile's values have been used */
        copy_keys<T, D>(a, t, a.v, kv_head, v, j);
        scores<T, D>(b.s, q + warp_row * LD, k);
        __syncthreads(); /* the keys have been used */
        if (j > first)
            copy_keys<T, D>(a, t, a.k, kv_head, k, j - KEYS);
        if (shaped)
            b = shape_scores<MT>(b, a.scale, a.softcap, slope, j - pos);
        if (j + KEYS > t.pos0 + 1 || a.window > 0)
            mask_scores<MT>(b.s, a.window, pos, j);
        soften<T, D>(w, b.s, factor);
        if (j > first)
            copy_wait<1>();
        else
            copy_wait<0>();
        __syncthreads(); /* values are there */
        weigh<T, D>(w, b.s, v);
    }
    store_rows<T, D>(a, t, w, q, head);
}

template <typename T, int D>
cudaError_t launch(const prefill_args &a, const tm_batch *b, const tm_cuda_ctx *c)
{
    dim3 grid((unsigned)a.heads, (unsigned)tiles_at_most(b, geometry<D>::ROWS));
    return launch_kernel(c, prefill_kernel<T, D>, grid, THREADS, geometry<D>::SMEM, a);
}

template <typename T>
cudaError_t launch_dim(const prefill_args &a, int head_dim, const tm_batch *b, const tm_cuda_ctx *c)
{
    switch (head_dim) {
    case 64:
        return launch<T, 64>(a, b, c);
    case 96:
        return launch<T, 96>(a, b, c);
    case 128:
        return launch<T, 128>(a, b, c);
    case 256:
        return launch<T, 256>(a, b, c);
    default:
        return cudaErrorInvalidValue;
    }
}

} /* namespace */

extern "C" bool tm_cuda_attention_prefill_fits(int head_dim)
{
    return head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

extern "C" cudaError_t tm_cuda_attention_prefill_launch(const tm_attention_args *a,
                                                        const tm_cuda_ctx *c)
{
    const tm_batch *b = a->batch;
    if (b->n_seqs == b->n_decode)
        return cudaSuccess;
    if (a->kv->dtype != c->act)
        return cudaErrorInvalidValue;
    const prefill_args p = prefill_args_of(a);
    return c->act == TM_DTYPE_BF16 ? launch_dim<__nv_bfloat16>(p, a->head_dim, b, c)
                                   : launch_dim<__half>(p, a->head_dim, b, c);
}
