/* Tensor core products of 16-bit numbers with f32 sums, and the copies that feed them (ptx.cuh): what the lanes hold.
 *
 * mma: c[16 x 8] += a[16 x 16] * b[16 x 8]. Lane = 4 g + t holds
 *   a: (row g, k 2t 2t+1) (row g+8, same k) (row g, k 2t+8 2t+9) (row g+8, same)
 *   b: (k 2t 2t+1, column g) (k 2t+8 2t+9, column g)
 *   c: (row g, columns 2t 2t+1) (row g+8, columns 2t 2t+1)
 * The k order is free as long as a and b agree: kernels here let a lane own 8 neighbouring k, so that it
 * loads 16 bytes at once straight from memory. */
#ifndef TM_ENGINE_BACKEND_CUDA_MMA_CUH
#define TM_ENGINE_BACKEND_CUDA_MMA_CUH

#include "engine/backend/cuda/ptx.cuh"

/* Two numbers in one register, lo in the low half. */
template <typename T> __device__ __forceinline__ uint32_t pack2(float lo, float hi);
template <> __device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float lo, float hi)
{
    __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<uint32_t *>(&v);
}
template <> __device__ __forceinline__ uint32_t pack2<__half>(float lo, float hi)
{
    __half2 v = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<uint32_t *>(&v);
}

#endif
