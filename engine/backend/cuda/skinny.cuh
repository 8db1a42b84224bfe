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
    int stride; /* of x in shared memory, numbers (skinny.cu) */
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

/* The tile's results from the warps' sums. Gated: rows g of the tile are gates, rows g + 8 what they multiply. */
template <typename T, int WARPS, bool GATED>
__device__ __forceinline__ void finish_tile(const skinny_args &a, const float *red, int tile)
{
    const int i = threadIdx.x;
    if (GATED) {
        const int e = i / 2 * 4 + i % 2, lane = e / 4;
        if (i < 64)
            store_out<T>(a, tile * 8 + lane / 4, lane % 4 * 2 + i % 2,
                         activate(sum_warps<WARPS>(red, e), a.act) * sum_warps<WARPS>(red, e + 2));
    } else if (i < 128) {
        const int lane = i / 4;
        store_out<T>(a, tile * 16 + lane / 4 + (i & 2) * 4, lane % 4 * 2 + (i & 1),
                     sum_warps<WARPS>(red, i));
    }
}

/* The kernel through a ring in shared memory, where the device is a Hopper and the shape fits. */
bool tm_cuda_skinny_ring_fits(const skinny_args &a, const tm_cuda_ctx *c);
cudaError_t tm_cuda_skinny_ring_launch(const skinny_args &a, bool gated, const tm_cuda_ctx *c);

#endif
