/* What the kernels of linear layers of few tokens share (skinny.cu, skinny_hopper.cu): arguments, and the end of a tile. */
#ifndef TM_ENGINE_BACKEND_CUDA_SKINNY_CUH
#define TM_ENGINE_BACKEND_CUDA_SKINNY_CUH

#include "engine/backend/cuda/act.cuh"
#include "engine/backend/cuda/kernels.h"

struct skinny_args {
    const void *w, *x;
    void *out;
    const float *bias;
    int n, k, tokens, ldx, ldo, tiles;
    /* Of skinny.cu. */
    int stride;   /* of a row of x, or a part of one, in shared memory, numbers */
    bool taken;   /* tiles go to blocks that are free; else they follow from the block's index */
    int *counter; /* of tiles taken, zero between kernels */
    bool f32_out;
    tm_act_kind act;
    /* With norm_w, x is norm(residual + delta) * norm_w, computed by every block; block 0 writes the sum. */
    const void *residual, *delta;
    void *residual_out;
    const float *norm_w;
    float eps, one; /* one: 1 where the weight is 1 + w */
};

template <typename T>
__device__ __forceinline__ void store_out(const skinny_args &a, int row, int token, float v)
{
    if (row >= a.n || token >= a.tokens)
        return;
    const size_t at = (size_t)token * a.ldo + row;
    if (a.bias)
        v += a.bias[row];
    if (a.f32_out)
        static_cast<float *>(a.out)[at] = v;
    else
        static_cast<T *>(a.out)[at] = from_f32<T>(v);
}

/* Sum over the warps of element e of the tile's accumulators, [lane][4]. */
template <int WARPS> __device__ __forceinline__ float sum_warps(const float *red, int e)
{
    float v = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        v += red[w * 128 + e];
    return v;
}

/* Row and token of result i of a tile, and where among a warp's sums it is: [lane][4], lane 4 g + t with rows g, g + 8 and
 * columns 2 t, 2 t + 1. */
__device__ __forceinline__ int sum_at(int row, int column)
{
    return (row % 8 * 4 + column / 2) * 4 + row / 8 * 2 + column % 2;
}

/* The tile's results from the warps' sums. Gated: rows g of the tile are gates, rows g + 8 what they multiply. PARTS: row r
 * of part p of K is the tensor core's row p * 16 / PARTS + r, token t of that part its column p * 8 / PARTS + t. */
template <typename T, int WARPS, bool GATED, int PARTS>
__device__ __forceinline__ void finish_tile(const skinny_args &a, const float *red, int tile)
{
    constexpr int ROWS = 16 / PARTS / (GATED ? 2 : 1), TOKENS = 8 / PARTS;
    const int i = threadIdx.x, row = i / TOKENS, token = i % TOKENS;
    if (i >= ROWS * TOKENS)
        return;
    float v = 0.0f;
    if (GATED) {
        v = activate(sum_warps<WARPS>(red, sum_at(row, token)), a.act) *
            sum_warps<WARPS>(red, sum_at(row + 8, token));
    } else {
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            v += sum_warps<WARPS>(red, sum_at(p * ROWS + row, p * TOKENS + token));
    }
    store_out<T>(a, tile * ROWS + row, token, v);
}

/* The kernel through a ring in shared memory, where the device is a Hopper and the shape fits. */
bool tm_cuda_skinny_ring_fits(const skinny_args &a, bool gated, const tm_cuda_ctx *c);
cudaError_t tm_cuda_skinny_ring_launch(const skinny_args &a, bool gated, const tm_cuda_ctx *c);

#endif
