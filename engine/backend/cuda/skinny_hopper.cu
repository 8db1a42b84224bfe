/* Linear layers of one token on Hopper: as skinny.cu, but weights come through a ring in shared memory.
 *
 * Three warps of a block do nothing but fetch its share of the weights, 16 rows of W (gated: 8 gate rows and the 8 up rows
 * that belong to them) times CHUNK of K a stage, by asynchronous copies; eight multiply, each its 64 k of every stage. Since
 * weights depend on nothing, fetching begins before the kernel in front has ended, and since a block takes less than half
 * of a multiprocessor's shared memory, threads and registers, it begins while that kernel still runs: when x is there at
 * last, the first stages are, too. So memory is busy across the borders of kernels; but all products of a step have to be of
 * this kind, since a block of skinny.cu leaves no room for one of these beside it.
 *
 * Rows of W are the M side of the tensor core, tokens its N side, and a lane owns 8 neighbouring k of two rows; rows of a
 * stage lie an odd multiple of 64 bytes apart (no bank conflicts). At the end of a tile the warps' sums come together.
 *
 * One token only: with two, the longest rows of a model leave no room for the ring.
 *
 * Bytes moved: N * K * 2 from memory, plus K * 2 per block from L2. */
#include "engine/backend/cuda/act.cuh"
#include "engine/backend/cuda/hopper.cuh"
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/mma.cuh"
#include "engine/backend/cuda/skinny.cuh"

namespace
{

constexpr int WARPS = 8, WORKERS = 32 * WARPS;
constexpr int FETCHERS = 3, THREADS = WORKERS + 32 * FETCHERS;
constexpr int ROWS = 16;   /* of a stage */
constexpr int WARP_K = 64; /* k of a stage that a warp has */
constexpr int CHUNK = WARPS * WARP_K;
constexpr int PITCH = CHUNK * 2 + 64;
constexpr int STAGE_BYTES = ROWS * PITCH;
constexpr int STAGES_MIN = FETCHERS, STAGES_MAX = 8;
constexpr int PACKS = 2; /* of 8 numbers of x that a thread has where the norm is computed here */
constexpr int HIDDEN_MAX = 2048; /* of models that gain: the others stream long enough without it */
constexpr int SUMS = 2 * WARPS * 128;
/* Two blocks and what the driver takes of each fit a multiprocessor's 228 KiB. */
constexpr size_t SMEM_MAX = 112 << 10;
enum { WORK = 1 }; /* the workers' barrier */

struct ring_args {
    skinny_args s;
    int chunk, stages; /* chunk: k of a stage, a multiple of 32 */
};

#if defined(HOPPER)

__device__ __forceinline__ void workers_barrier()
{
    turn_wait<WORKERS>(WORK);
}

/* ---- fetching ---- */

/* Where a fetching warp is: a tile and a piece of K. */
struct cursor {
    const char *lo, *hi; /* row 0 and row 8 of the tile */
    int tile, at, rows;  /* rows that there are of each half; 0: fetch row by row */

    __device__ __forceinline__ void seek(const ring_args &a, bool gated)
    {
        const size_t pitch = (size_t)a.s.k * 2;
        const char *w = static_cast<const char *>(a.s.w);
        const int row = gated ? tile * 8 : tile * 16, left = a.s.n - row;
        lo = w + (size_t)row * pitch;
        hi = lo + (size_t)(gated ? a.s.n : left > 8 ? 8 : 0) * pitch;
        rows = left >= (gated ? 8 : 16) ? 8 : 0;
        at = 0;
    }
    __device__ __forceinline__ void next(const ring_args &a, bool gated)
    {
        at += a.chunk;
        if (at < a.s.k)
            return;
        tile += gridDim.x;
        seek(a, gated);
    }
};

/* A stage: the warp's lanes take 16 bytes each, two times 512 bytes of a row. Rows that are not there are others. */
__device__ __forceinline__ void fetch_stage(const ring_args &a, const cursor &c, bool gated,
                                            char *to)
{
    const int at = threadIdx.x % 32 * 16, bytes = min(a.chunk, a.s.k - c.at) * 2;
    const size_t pitch = (size_t)a.s.k * 2;
    const char *lo = c.lo + (size_t)c.at * 2 + at, *hi = c.hi + (size_t)c.at * 2 + at;
    to += at;
    if (c.rows == 8) {
        const bool first = at < bytes, second = at + 512 < bytes;
#pragma unroll
        for (int r = 0; r < 8; r++, lo += pitch, hi += pitch) {
            if (first) {
                copy_async(to + r * PITCH, lo, true);
                copy_async(to + (r + 8) * PITCH, hi, true);
            }
            if (second) {
                copy_async(to + r * PITCH + 512, lo + 512, true);
                copy_async(to + (r + 8) * PITCH + 512, hi + 512, true);
            }
        }
        return;
    }
    const int left = a.s.n - c.tile * (gated ? 8 : 16);
    const int lo_rows = min(left, 8), hi_rows = gated || left <= 8 ? lo_rows : min(left - 8, 8);
    for (int r = 0; r < 8; r++)
        for (int i = 0; i < bytes - at; i += 512) {
            copy_async(to + r * PITCH + i, lo + min(r, lo_rows - 1) * pitch + i, true);
            copy_async(to + (r + 8) * PITCH + i, hi + min(r, hi_rows - 1) * pitch + i, true);
        }
}

/* Every FETCHERS-th stage is this warp's. */
__device__ void fetch(const ring_args &a, bool gated, char *ring, uint64_t *full, uint64_t *empty)
{
    int stage = threadIdx.x / 32 - WARPS, parity = 1; /* the first round finds every stage empty */
    cursor c;
    c.tile = blockIdx.x;
    c.seek(a, gated);
    for (int i = 0; i < stage; i++)
        c.next(a, gated);
    while (c.tile < a.s.tiles) {
        barrier_wait(&empty[stage], parity);
        fetch_stage(a, c, gated, ring + stage * STAGE_BYTES);
        arrive_copied(&full[stage]);
        for (int i = 0; i < FETCHERS; i++)
            c.next(a, gated);
        stage += FETCHERS;
        if (stage >= a.stages) {
            stage -= a.stages;
            parity ^= 1;
        }
    }
    wait_previous(); /* the rule for every thread; what was fetched needed none */
    start_next();
}

/* ---- x ---- */

template <typename T> __device__ void load_x(const skinny_args &a, T *xs)
{
    for (int i = threadIdx.x * 8; i < a.k; i += WORKERS * 8)
        copy_async(xs + i, static_cast<const T *>(a.x) + i, true);
    copy_commit();
    copy_wait<0>();
    workers_barrier();
}

struct norm_weights {
    float4 w[PACKS][2];
};

__device__ __forceinline__ norm_weights load_norm_weights(const skinny_args &a)
{
    norm_weights n = {};
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        const int i = threadIdx.x + j * WORKERS;
        if (i < a.k / 8) {
            n.w[j][0] = reinterpret_cast<const float4 *>(a.norm_w)[i * 2];
            n.w[j][1] = reinterpret_cast<const float4 *>(a.norm_w)[i * 2 + 1];
        }
    }
    return n;
}

/* The RMS norm of residual + delta. The sum is rounded before it is normalised and what is normalised is rounded again,
 * as the norm operator does. */
template <typename T>
__device__ void load_normed(const skinny_args &a, const norm_weights &n, T *xs)
{
    SHARED(float[WARPS], sums);
    pack<T, 8> r[PACKS] = {};
    const int packs = a.k / 8;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        const int i = threadIdx.x + j * WORKERS;
        if (i >= packs)
            continue;
        r[j] = load_pack<T, 8>(a.residual, i);
        if (a.delta) {
            const pack<T, 8> d = load_pack<T, 8>(a.delta, i);
#pragma unroll
            for (int e = 0; e < 8; e++)
                r[j].e[e] = from_f32<T>(to_f32(r[j].e[e]) + to_f32(d.e[e]));
            if (blockIdx.x == 0)
                store_pack<T, 8>(a.residual_out, i, r[j]);
        }
#pragma unroll
        for (int e = 0; e < 8; e++)
            sum += to_f32(r[j].e[e]) * to_f32(r[j].e[e]);
    }
    for (int i = 16; i > 0; i >>= 1)
        sum += __shfl_xor_sync(0xffffffffu, sum, i);
    if (threadIdx.x % 32 == 0)
        sums[threadIdx.x / 32] = sum;
    workers_barrier();
    sum = 0.0f;
    for (int i = 0; i < WARPS; i++)
        sum += sums[i];
    const float inv = rsqrtf(sum / a.k + a.eps);
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        const int i = threadIdx.x + j * WORKERS;
        const float4 lo = n.w[j][0], hi = n.w[j][1];
        const float w[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
        if (i >= packs)
            continue;
#pragma unroll
        for (int e = 0; e < 8; e++)
            r[j].e[e] = from_f32<T>(to_f32(r[j].e[e]) * inv * (a.one + w[e]));
        store_pack<T, 8>(xs, i, r[j]);
    }
    workers_barrier();
}

/* ---- products ---- */

/* This warp's part of a stage. */
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], const char *rows, const T *x, bool token)
{
#pragma unroll
    for (int h = 0; h < WARP_K / 32; h++) {
        const uint4 lo = *reinterpret_cast<const uint4 *>(rows + h * 64);
        const uint4 hi = *reinterpret_cast<const uint4 *>(rows + h * 64 + 8 * PITCH);
        uint4 v = make_uint4(0, 0, 0, 0);
        if (token)
            v = *reinterpret_cast<const uint4 *>(x + h * 32);
        mma<T>(acc, lo.x, hi.x, lo.y, hi.y, v.x, v.y);
        mma<T>(acc, lo.z, hi.z, lo.w, hi.w, v.z, v.w);
    }
}

/* The warps' sums of a tile come together in red; acc starts anew. */
template <typename T, bool GATED>
__device__ __forceinline__ void finish(const skinny_args &a, float *red, int tile, float (&acc)[4])
{
    *reinterpret_cast<float4 *>(red + threadIdx.x * 4) =
        make_float4(acc[0], acc[1], acc[2], acc[3]);
    acc[0] = acc[1] = acc[2] = acc[3] = 0.0f;
    workers_barrier();
    finish_tile<T, WARPS, GATED, 1>(a, red, tile);
}

template <typename T, bool GATED>
__device__ __forceinline__ void work(const ring_args &a, const char *ring, uint64_t *full,
                                     uint64_t *empty, float *red, T *xs)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (a.s.norm_w) {
        const norm_weights n = load_norm_weights(a.s);
        wait_previous();
        start_next();
        load_normed<T>(a.s, n, xs);
    } else {
        wait_previous();
        start_next();
        load_x<T>(a.s, xs);
    }
    const T *x = xs + warp * WARP_K + t * 8;
    const char *rows = ring + g * PITCH + (warp * WARP_K + t * 8) * 2;
    float acc[4] = {};
    int stage = 0, parity = 0, buffer = 0;
    for (int tile = blockIdx.x; tile < a.s.tiles; tile += gridDim.x) {
        for (int k = 0; k < a.s.k; k += a.chunk) {
            const int left = min(a.chunk, a.s.k - k) - warp * WARP_K; /* of this warp */
            barrier_wait(&full[stage], parity);
            if (left >= WARP_K)
                multiply<T>(acc, rows + stage * STAGE_BYTES, x + k, g == 0);
            __syncwarp();
            if (lane == 0)
                barrier_arrive(&empty[stage]);
            if (++stage == a.stages) {
                stage = 0;
                parity ^= 1;
            }
        }
        finish<T, GATED>(a.s, red + buffer * (WARPS * 128), tile, acc);
        buffer ^= 1; /* whoever writes this buffer again has passed the next barrier */
    }
}

template <typename T, bool GATED>
__global__ void __launch_bounds__(THREADS, 2) ring_kernel(const __grid_constant__ ring_args a)
{
    DYNAMIC_SHARED(uint4, smem);
    SHARED(uint64_t[STAGES_MAX], full);
    SHARED(uint64_t[STAGES_MAX], empty);
    char *ring = reinterpret_cast<char *>(smem);
    float *red = reinterpret_cast<float *>(ring + a.stages * STAGE_BYTES); /* SUMS */
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.stages; i++) {
            barrier_init(&full[i], 32);
            barrier_init(&empty[i], WARPS);
        }
    }
    __syncthreads();
    if (threadIdx.x >= WORKERS)
        fetch(a, GATED, ring, full, empty);
    else
        work<T, GATED>(a, ring, full, empty, red, reinterpret_cast<T *>(red + SUMS));
}

#else

/* Not for this processor, and not started there. */
template <typename T, bool GATED> __global__ void ring_kernel(const __grid_constant__ ring_args a)
{
    (void)a;
    __trap();
}

#endif

size_t work_bytes(int k)
{
    return SUMS * sizeof(float) + (size_t)k * 2;
}

int stages_of(int k)
{
    const size_t work = work_bytes(k);
    return work > SMEM_MAX ? 0 : min((int)((SMEM_MAX - work) / STAGE_BYTES), STAGES_MAX);
}

/* Pieces of K as even as multiples of a warp's share allow. */
int chunk_of(int k)
{
    const int pieces = (k + CHUNK - 1) / CHUNK, each = (k + pieces - 1) / pieces;
    return (each + WARP_K - 1) / WARP_K * WARP_K;
}

} /* namespace */

/* Every product of a model has its hidden size as n or k, so all of them are taken, or none: k of what reads the residual
 * stream, n of what is added to it. */
bool tm_cuda_skinny_ring_fits(const skinny_args &a, bool gated, const tm_cuda_ctx *c)
{
    const int hidden = a.norm_w || gated || a.f32_out ? a.k : a.n;
    return c->tensor_map && a.tokens == 1 && a.k % WARP_K == 0 && hidden <= HIDDEN_MAX &&
           (!a.norm_w || a.k <= PACKS * WORKERS * 8) && stages_of(a.k) >= STAGES_MIN;
}

cudaError_t tm_cuda_skinny_ring_launch(const skinny_args &s, bool gated, const tm_cuda_ctx *c)
{
    ring_args a = {s, chunk_of(s.k), stages_of(s.k)};
    const size_t smem = (size_t)a.stages * STAGE_BYTES + work_bytes(s.k);
    const dim3 grid((unsigned)min(c->sms, s.tiles));
    if (c->act == TM_DTYPE_BF16)
        return launch_kernel(
            c, gated ? ring_kernel<__nv_bfloat16, true> : ring_kernel<__nv_bfloat16, false>, grid,
            THREADS, smem, a);
    return launch_kernel(c, gated ? ring_kernel<__half, true> : ring_kernel<__half, false>, grid,
                         THREADS, smem, a);
}
