/* Single numbers of any dtype, for the paths that take every shape. */
#ifndef TM_ENGINE_BACKEND_CUDA_ANY_CUH
#define TM_ENGINE_BACKEND_CUDA_ANY_CUH

#include "engine/backend/backend.h"
#include "engine/backend/cuda/vec.cuh"

__device__ inline float load_number(const void *p, size_t i, tm_dtype t)
{
    if (t == TM_DTYPE_F32)
        return static_cast<const float *>(p)[i];
    if (t == TM_DTYPE_F16)
        return to_f32(static_cast<const __half *>(p)[i]);
    return to_f32(static_cast<const __nv_bfloat16 *>(p)[i]);
}

__device__ inline void store_number(void *p, size_t i, tm_dtype t, float v)
{
    if (t == TM_DTYPE_F32)
        static_cast<float *>(p)[i] = v;
    else if (t == TM_DTYPE_F16)
        static_cast<__half *>(p)[i] = from_f32<__half>(v);
    else
        static_cast<__nv_bfloat16 *>(p)[i] = from_f32<__nv_bfloat16>(v);
}

#endif
