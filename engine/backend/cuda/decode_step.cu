/* A whole decode step of few sequences as one kernel: all layers and the head of a dense decoder.
 *
 * Separate kernels lose some microseconds at every border: the last blocks of one run alone, the first loads of the
 * next take their time, small models consist of little else. Here one block on every multiprocessor stays, and
 * phases follow each other across a barrier of the grid:
 *   norm + qkv | rope, append, attention | o | norm + gate, up, activation | down   (per layer)   norm + head
 * What a phase multiplies with is known before the barrier, so each block has its first weights in registers and
 * up to AHEAD_BYTES more (of the next phases, too, where one is small) on their way to L2 while it waits.
 *
 * The products are those of skinny.cu, the attention that of attention_decode.cu; see there for what lanes hold. What
 * another block wrote is read past L1 (cp.async.cg, ld.cg), which no barrier empties.
 *
 * Bytes moved: all weights once, keys and values once; x and the partial sums of the attention stay in L2. */
#include "engine/backend/cuda/act.cuh"
#include "engine/backend/cuda/decode_attention.cuh"
#include "engine/backend/cuda/decode_step.h"
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/mma.cuh"
#include "engine/backend/cuda/system.cuh"

namespace
{

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int DEPTH = 3; /* steps of a warp under way */
constexpr int STEP = 64; /* k of one step of a warp */
constexpr int STEP_BYTES = 16 * STEP * 2;
constexpr int TOKENS_MAX = TM_CUDA_STEP_TOKENS;
constexpr int AHEAD_BYTES = 160 << 10; /* of a block */
constexpr int TEAMS = WARPS / TEAM_WARPS;
constexpr int RING = 4, AHEAD_PHASES = RING - 1;

typedef tm_cuda_phase phase;

/* ---- the grid's barrier ---- */

/* All blocks have come here and what they wrote can be read past L1. `target` counts the arrivals so far. */
__device__ __forceinline__ void grid_barrier(const step_args &a, int &target)
{
    target += gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(a.arrived, 1);
        while (*reinterpret_cast<volatile int *>(a.arrived) < target)
            spin_pause();
        __threadfence();
    }
    __syncthreads();
}

/* The last block to leave makes the counters zero for the next launch. */
__device__ __forceinline__ void leave(const step_args &a)
{
    __syncthreads();
    if (threadIdx.x != 0)
        return;
    __threadfence();
    if (atomicAdd(a.left, 1) == (int)gridDim.x - 1) {
        *reinterpret_cast<volatile int *>(a.arrived) = 0;
        *reinterpret_cast<volatile int *>(a.left) = 0;
        __threadfence();
    }
}

/* ---- products ---- */

/* The weights under way, and the place of the next step. */
template <typename T> struct weight_stream {
    uint4 lo[DEPTH][2], hi[DEPTH][2];
    const T *row_lo;
    size_t apart; /* of the two rows of a lane, numbers */
    int tile, step;

    __device__ __forceinline__ void seek(const phase &p)
    {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const int lo_row = min(p.gated ? tile * 8 + g : tile * 16 + g, p.n - 1);
        const int hi_row = p.gated ? p.n + lo_row : min(tile * 16 + 8 + g, p.n - 1);
        row_lo = static_cast<const T *>(p.w) + t * 8 + (size_t)lo_row * p.k;
        apart = (size_t)(hi_row - lo_row) * p.k;
    }
    __device__ __forceinline__ void load(const phase &p, int i)
    {
        const bool valid = tile < p.tiles && step < p.k / STEP;
        const T *at = row_lo + (size_t)step * STEP;
        load_weights(lo[i][0], at, valid);
        load_weights(hi[i][0], at + apart, valid);
        load_weights(lo[i][1], at + 32, valid);
        load_weights(hi[i][1], at + apart + 32, valid);
        step += WARPS;
        if (step - (int)threadIdx.x / 32 >= p.k / STEP) {
            step = threadIdx.x / 32;
            tile += gridDim.x;
            seek(p);
        }
    }
    __device__ __forceinline__ void begin(const phase &p)
    {
        tile = blockIdx.x;
        step = threadIdx.x / 32;
        seek(p);
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            lo[d][0] = lo[d][1] = hi[d][0] = hi[d][1] = make_uint4(0, 0, 0, 0);
            load(p, d);
        }
    }
    /* The tile's rows into L2: two lanes of a quad take a row each, 128 bytes (64 k) a step. */
    __device__ __forceinline__ void prefetch(int steps) const
    {
        const int t = threadIdx.x % 4;
        const T *at = row_lo - t * 8 + (t == 1 ? apart : 0);
        if (t < 2)
            for (int s = threadIdx.x / 32; s < steps; s += WARPS)
                prefetch_l2(at + (size_t)s * STEP);
    }
};

/* This block's weights of the phases from i on, as far as AHEAD_BYTES go. */
template <typename T> __device__ void prefetch_phases(const step_args &a, const phase *ring, int i)
{
    weight_stream<T> w;
    int bytes = AHEAD_BYTES;
    for (int q = i; q < min(i + AHEAD_PHASES, a.phases) && bytes > 0; q++) {
        const phase &p = ring[q % RING];
        const int steps = p.k / STEP;
        for (w.tile = blockIdx.x; w.tile < p.tiles && bytes > 0; w.tile += gridDim.x) {
            w.seek(p);
            w.prefetch(min(steps, bytes / STEP_BYTES));
            bytes -= steps * STEP_BYTES;
        }
    }
}

template <typename T> __device__ void load_x(const step_args &a, const phase &p, T *xs, int stride)
{
    for (int row = 0; row < a.tokens; row++) {
        const T *from = static_cast<const T *>(p.x) + (size_t)row * p.k;
        for (int i = threadIdx.x * 8; i < p.k; i += THREADS * 8)
            copy_async(xs + row * stride + i, from + i, true);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
}

/* x as the RMS norm of residual + delta, rounded where the norm operator rounds; block 0 writes the sum. */
template <typename T>
__device__ void load_normed(const step_args &a, const phase &p, T *xs, int stride,
                            float (&sums)[TOKENS_MAX][WARPS])
{
    const int packs = p.k / 8, warp = threadIdx.x / 32;
    for (int row = 0; row < a.tokens; row++) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < packs; i += THREADS) {
            const size_t at = (size_t)row * packs + i;
            pack<T, 8> r = load_shared_pack<T>(p.x, at);
            if (p.delta) {
                const pack<T, 8> d = load_shared_pack<T>(p.delta, at);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    r.e[j] = from_f32<T>(to_f32(r.e[j]) + to_f32(d.e[j]));
                if (blockIdx.x == 0)
                    store_pack<T, 8>(p.x_out, at, r);
            }
            store_pack<T, 8>(xs + row * stride, i, r);
#pragma unroll
            for (int j = 0; j < 8; j++)
                sum += to_f32(r.e[j]) * to_f32(r.e[j]);
        }
        for (int i = 16; i > 0; i >>= 1)
            sum += __shfl_xor_sync(0xffffffffu, sum, i);
        if (threadIdx.x % 32 == 0)
            sums[row][warp] = sum;
    }
    __syncthreads();
    for (int row = 0; row < a.tokens; row++) {
        float sum = 0.0f;
        for (int i = 0; i < WARPS; i++)
            sum += sums[row][i];
        const float inv = rsqrtf(sum / p.k + a.eps);
        for (int i = threadIdx.x; i < packs; i += THREADS) {
            pack<T, 8> r = load_pack<T, 8>(xs + row * stride, i);
#pragma unroll
            for (int j = 0; j < 8; j++)
                r.e[j] = from_f32<T>(to_f32(r.e[j]) * inv * (a.one + p.norm_w[i * 8 + j]));
            store_pack<T, 8>(xs + row * stride, i, r);
        }
    }
    __syncthreads();
}

template <typename T>
__device__ __forceinline__ void store_out(const step_args &a, const phase &p, int row, int token,
                                          float v)
{
    if (row >= p.n || token >= a.tokens)
        return;
    const size_t at = (size_t)token * p.ldo + row;
    if (p.bias)
        v += p.bias[row];
    if (p.f32_out)
        static_cast<float *>(p.out)[at] = v;
    else
        static_cast<T *>(p.out)[at] = from_f32<T>(v);
}

/* Sum over the warps of element e of the tile's accumulators, [lane][4]. */
__device__ __forceinline__ float sum_warps(const float *red, int e)
{
    float v = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        v += red[w * 128 + e];
    return v;
}

/* The warps' sums of a tile come together in red; acc starts anew. Gated: rows g of the tile are gates, rows g + 8
 * what they multiply. */
template <typename T>
__device__ __forceinline__ void finish(const step_args &a, const phase &p, float *red, int tile,
                                       float (&acc)[4])
{
    const int i = threadIdx.x;
    *reinterpret_cast<float4 *>(red + i * 4) = make_float4(acc[0], acc[1], acc[2], acc[3]);
    acc[0] = acc[1] = acc[2] = acc[3] = 0.0f;
    __syncthreads();
    if (p.gated) {
        const int e = i / 2 * 4 + i % 2, lane = e / 4;
        if (i < 64)
            store_out<T>(a, p, tile * 8 + lane / 4, lane % 4 * 2 + i % 2,
                         activate(sum_warps(red, e), a.act) * sum_warps(red, e + 2));
    } else if (i < 128) {
        const int lane = i / 4;
        store_out<T>(a, p, tile * 16 + lane / 4 + (i & 2) * 4, lane % 4 * 2 + (i & 1),
                     sum_warps(red, i));
    }
}

/* One step: 64 k of the tile against all tokens. */
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], const uint4 (&lo)[2],
                                         const uint4 (&hi)[2], const T *xs, bool token)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (token)
            x = *reinterpret_cast<const uint4 *>(xs + h * 32);
        mma<T>(acc, lo[h].x, hi[h].x, lo[h].y, hi[h].y, x.x, x.y);
        mma<T>(acc, lo[h].z, hi[h].z, lo[h].w, hi[h].w, x.z, x.w);
    }
}

/* This block's tiles of a phase, whose first steps are under way in w. */
template <typename T>
__device__ __forceinline__ void run_phase(const step_args &a, const phase &p, weight_stream<T> &w,
                                          const T *xs, int stride, float *red)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int steps = p.k / STEP, rounds = (steps + WARPS - 1) / WARPS;
    const T *mine = xs + g * stride + t * 8;
    float acc[4] = {};
    int tile = blockIdx.x, round = 0, buffer = 0;
    while (tile < p.tiles) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const int s = round * WARPS + warp;
            if (s < steps && tile < p.tiles)
                multiply<T>(acc, w.lo[d], w.hi[d], mine + s * STEP, g < a.tokens);
            w.load(p, d);
            if (++round < rounds)
                continue;
            if (tile < p.tiles)
                finish<T>(a, p, red + buffer * (WARPS * 128), tile, acc);
            buffer ^= 1; /* whoever writes this buffer again has passed the next barrier */
            round = 0;
            tile += gridDim.x;
        }
    }
}

/* ---- the kernel ---- */

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1)
    decode_step_kernel(const __grid_constant__ step_args a)
{
    DYNAMIC_SHARED(uint4, smem);
    SHARED(phase[RING], ring);
    SHARED(float[TOKENS_MAX][WARPS], sums);
    float *red = reinterpret_cast<float *>(smem); /* [2][WARPS][32 lanes][4] */
    T *xs = reinterpret_cast<T *>(red + 2 * WARPS * 128);
    team_smem<T, D> *teams = reinterpret_cast<team_smem<T, D> *>(smem); /* between products */
    int target = 0;

    for (int i = threadIdx.x; i < AHEAD_PHASES * (int)sizeof(phase) / 4; i += THREADS)
        if (i < a.phases * (int)sizeof(phase) / 4)
            reinterpret_cast<int *>(ring)[i] = reinterpret_cast<const int *>(a.table)[i];
    __syncthreads();
    for (int i = 0; i < a.phases; i++) {
        prefetch_phases<T>(a, ring, i);
        if (i % 4 == 1) {
            grid_barrier(a, target);
            attention_phase<T, D>(a, a.kv[i / 4], teams);
        }
        const phase p = ring[i % RING]; /* in registers: the loops read it at every step */
        weight_stream<T> w;             /* not alive in the attention */
        w.begin(p);
        if (i > 0)
            grid_barrier(a, target);
        if (i + AHEAD_PHASES < a.phases && threadIdx.x < sizeof(phase) / 4)
            reinterpret_cast<int *>(&ring[(i + AHEAD_PHASES) % RING])[threadIdx.x] =
                reinterpret_cast<const int *>(a.table + i + AHEAD_PHASES)[threadIdx.x];
        const int stride = p.k + 32;
        if (p.norm_w)
            load_normed<T>(a, p, xs, stride, sums);
        else
            load_x<T>(a, p, xs, stride);
        run_phase<T>(a, p, w, xs, stride, red);
    }
    leave(a);
}

template <typename T, int D> size_t smem_of(const step_args &a)
{
    const size_t products =
        2 * WARPS * 128 * sizeof(float) + (size_t)a.tokens * (size_t)(a.k_max + 32) * sizeof(T);
    const size_t attention = TEAMS * sizeof(team_smem<T, D>);
    return products > attention ? products : attention;
}

template <typename T, int D> cudaError_t launch(step_args a, const tm_cuda_ctx *c)
{
    const int units = a.tokens * a.kv_heads * a.head_groups, teams = c->sms * TEAMS;
    a.splits = min(max(teams / units, 1), SPLITS_MAX);
    while (a.splits > 1 && (size_t)units * (size_t)a.splits * part_floats<D>() * sizeof(float) >
                               TM_CUDA_SCRATCH_BYTES)
        a.splits--;
    if (units > TM_CUDA_TICKETS)
        return cudaErrorInvalidValue;
    return launch_cooperative(c, decode_step_kernel<T, D>, c->sms, THREADS, smem_of<T, D>(a), a);
}

} /* namespace */

extern "C" size_t tm_cuda_step_smem(const tm_cuda_step_args *a, int head_dim)
{
    return head_dim == 64 ? smem_of<__half, 64>(*a) : smem_of<__half, 128>(*a);
}

extern "C" cudaError_t tm_cuda_step_launch(const tm_cuda_step_args *a, int head_dim,
                                           const tm_cuda_ctx *c)
{
    const bool bf16 = c->act == TM_DTYPE_BF16;
    if (head_dim == 64)
        return bf16 ? launch<__nv_bfloat16, 64>(*a, c) : launch<__half, 64>(*a, c);
    if (head_dim == 128)
        return bf16 ? launch<__nv_bfloat16, 128>(*a, c) : launch<__half, 128>(*a, c);
    return cudaErrorInvalidValue;
}
