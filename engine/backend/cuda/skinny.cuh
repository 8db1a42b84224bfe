/* What the kernels of linear layers of few tokens share (skinny.cu, skinny_hopper.cu): arguments, and how a result is written. */
#ifndef TM_ENGINE_BACKEND_CUDA_SKINNY_CUH
#define TM_ENGINE_BACKEND_CUDA_SKINNY_CUH

#include "engine/backend/cuda/act.cuh"
#include "engine/backend/cuda/kernels.h"
#include "engine/backend/cuda/vec.cuh"

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

/* Rounded as if gate and up had passed through memory: a token's numbers do not depend on how many are beside it. */
template <typename T>
__device__ __forceinline__ float gated_result(float gate, float up, tm_act_kind act)
{
    return activate(to_f32(from_f32<T>(gate)), act) * to_f32(from_f32<T>(up));
}

/* v to place `at` of out, in its type. */
template <typename T>
__device__ __forceinline__ void write_out(const skinny_args &a, size_t at, float v)
{
    if (a.f32_out)
        static_cast<float *>(a.out)[at] = v;
    else
        static_cast<T *>(a.out)[at] = from_f32<T>(v);
}

/* The kernel with all of a block's weights in shared memory, where the next one fits, too. */
bool tm_cuda_skinny_resident_fits(const skinny_args &a, bool gated, const tm_cuda_ctx *c);
cudaError_t tm_cuda_skinny_resident_launch(const skinny_args &s, bool gated, const tm_cuda_ctx *c);

/* The kernel through a ring in shared memory, where the device is a Hopper and the shape fits. */
bool tm_cuda_skinny_ring_fits(const skinny_args &a, bool gated, const tm_cuda_ctx *c);
cudaError_t tm_cuda_skinny_ring_launch(const skinny_args &a, bool gated, const tm_cuda_ctx *c);

#endif
