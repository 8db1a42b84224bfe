/* The activation functions in f32. */
#ifndef TM_ENGINE_BACKEND_CUDA_ACT_CUH
#define TM_ENGINE_BACKEND_CUDA_ACT_CUH

#include "engine/backend/backend.h"

__device__ __forceinline__ float activate(float x, tm_act_kind kind)
{
    switch (kind) {
    case TM_ACT_SILU:
        return __fdividef(x, 1.0f + __expf(-x)); /* 0 where the sum is infinite */
    case TM_ACT_GELU_ERF:
        return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    default: {
        float u = 0.79788456080286536f * (x + 0.044715f * x * x * x);
        return 0.5f * x * (1.0f + tanhf(u));
    }
    }
}

#endif
