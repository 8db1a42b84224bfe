/* What the kernels of linear layers of one token on Hopper share (skinny_hopper.cu, skinny_resident.cu): their workers, x, and
 * the product of a warp.
 *
 * Rows of a stage are the M side of the tensor core, tokens its N side, and a lane owns 8 neighbouring k of two rows; rows
 * lie an odd multiple of 64 bytes apart (no bank conflicts). Of a warp's sums only the token's column is kept, and those of
 * all of a block's tiles come together at once where they are few: for so short a kernel a barrier counts. */
#ifndef TM_ENGINE_BACKEND_CUDA_SKINNY_HOPPER_CUH
#define TM_ENGINE_BACKEND_CUDA_SKINNY_HOPPER_CUH

#include "engine/backend/cuda/act.cuh"
#include "engine/backend/cuda/hopper.cuh"
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/mma.cuh"
#include "engine/backend/cuda/skinny.cuh"

namespace
{

constexpr int WARPS = 8, WORKERS = 32 * WARPS;
constexpr int ROWS = 16; /* of a stage */
constexpr int STEP = 64; /* k of a warp at a time, one or two of them a stage */
constexpr int PACKS = 2; /* of 8 numbers of x that a thread has where the norm is computed here */
constexpr int SUMS = WARPS * 16; /* of a tile */
constexpr int TOGETHER_MAX = 6;  /* tiles that are finished together, where a block has no more */
constexpr int MOST_SHARED = 100; /* per cent */
enum { WORK = 1 };               /* the workers' barrier */

/* What rows 0 to 7 and 8 to 15 of a stage are: 16 rows of W, 8 gate rows and their up rows, or both halves of K of 8 rows,
 * where 16 rows a block would leave blocks without any. */
enum shape { PLAIN, GATED, HALVES };

__host__ __device__ constexpr int rows_of(shape s)
{
    return s == PLAIN ? 16 : 8;
}

/* The model's hidden size: k of what reads the residual stream, n of what is added to it. */
inline int hidden_of(const skinny_args &a, bool gated)
{
    return a.norm_w || gated || a.f32_out ? a.k : a.n;
}

inline shape shape_of(const skinny_args &a, bool gated, const tm_cuda_ctx *c)
{
    if (gated)
        return GATED;
    return (a.n + 7) / 8 <= c->sms && a.k % (2 * STEP) == 0 ? HALVES : PLAIN;
}

/* Pieces of K as even as multiples of a step allow. */
inline int chunk_of(int k, int warp_k)
{
    const int most = WARPS * warp_k, pieces = (k + most - 1) / most,
              each = (k + pieces - 1) / pieces;
    return (each + STEP - 1) / STEP * STEP;
}

/* A multiprocessor changes its split of L1 and shared memory only when it is empty, so neighbours all want the same. */
template <typename A>
cudaError_t launch_beside(void (*kernel)(A), dim3 grid, int threads, size_t smem, const A &a,
                          const tm_cuda_ctx *c)
{
    const cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, MOST_SHARED);
    return e == cudaSuccess ? launch_kernel(c, kernel, grid, threads, smem, a) : e;
}

#if defined(HOPPER)

__device__ __forceinline__ void workers_barrier()
{
    turn_wait<WORKERS>(WORK);
}

/* ---- x ---- */

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
        if (j * WORKERS >= packs)
            break; /* all threads: what is left out takes no time */
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
    const float inv = rsqrtf(__fdividef(sum, (float)a.k) + a.eps);
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        const int i = threadIdx.x + j * WORKERS;
        if (j * WORKERS >= packs)
            break;
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

/* 64 k of this warp's part of a stage; x: of this lane's column, where it is one of a token. */
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], const char *lo, const char *hi,
                                         const T *x, bool token)
{
#pragma unroll
    for (int h = 0; h < STEP / 32; h++) {
        const uint4 a = *reinterpret_cast<const uint4 *>(lo + h * 64);
        const uint4 b = *reinterpret_cast<const uint4 *>(hi + h * 64);
        uint4 v = make_uint4(0, 0, 0, 0);
        if (token)
            v = *reinterpret_cast<const uint4 *>(x + h * 32);
        mma<T>(acc, a.x, b.x, a.y, b.y, v.x, v.y);
        mma<T>(acc, a.z, b.z, a.w, b.w, v.z, v.w);
    }
}

/* A warp's sums of a tile, of which those of the token's column are wanted, or with halves of K of its two columns: [16], by
 * the row of the stage. */
template <shape S> __device__ __forceinline__ void leave_sums(float *sums, float (&acc)[2][4])
{
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (t == 0)
        sums[warp * 16 + g] = acc[0][0] + acc[1][0];
    if (t == (S == HALVES ? 2 : 0))
        sums[warp * 16 + g + 8] = acc[0][2] + acc[1][2];
#pragma unroll
    for (int i = 0; i < 4; i++)
        acc[0][i] = acc[1][i] = 0.0f;
}

__device__ __forceinline__ float add_sums(const float *sums, int row)
{
    float v = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        v += sums[w * 16 + row];
    return v;
}

/* Row r of a tile, from its sums. */
template <typename T, shape S>
__device__ __forceinline__ float tile_result(const skinny_args &a, const float *sums, int r)
{
    float v = add_sums(sums, r);
    if (S == GATED)
        v = gated_result<T>(v, add_sums(sums, r + 8), a.act);
    if (S == HALVES)
        v += add_sums(sums, r + 8);
    return v;
}

#endif

} /* namespace */

#endif
