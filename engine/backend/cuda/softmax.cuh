/* What the attention kernels share of their softmax, which is taken in powers of two. */
#ifndef TM_ENGINE_BACKEND_CUDA_SOFTMAX_CUH
#define TM_ENGINE_BACKEND_CUDA_SOFTMAX_CUH

constexpr float LOG2E = 1.4426950408889634f;

/* What scores are taken relative to: the whole number at or above the largest. Weights then have the same digits whatever
 * their maximum, so how keys are shared out among tiles, warps and blocks does not change how weights are rounded. */
__device__ __forceinline__ float whole_maximum(float score)
{
    return ceilf(score);
}

#endif
