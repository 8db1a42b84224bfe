/* Sixteen-bit activations as vectors: V elements of T loaded at once and widened to f32. */
#ifndef TM_ENGINE_BACKEND_CUDA_VEC_CUH
#define TM_ENGINE_BACKEND_CUDA_VEC_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

__device__ inline float to_f32(float v)
{
    return v;
}
__device__ inline float to_f32(__nv_bfloat16 v)
{
    return __bfloat162float(v);
}
__device__ inline float to_f32(__half v)
{
    return __half2float(v);
}

template <typename T> __device__ inline T from_f32(float v);
template <> __device__ inline __nv_bfloat16 from_f32<__nv_bfloat16>(float v)
{
    return __float2bfloat16_rn(v);
}
template <> __device__ inline float from_f32<float>(float v)
{
    return v;
}
template <> __device__ inline __half from_f32<__half>(float v)
{
    return __float2half_rn(v);
}

/* One access of V * sizeof(T) bytes, at most 16; the address is a multiple of that. */
template <typename T, int V> struct alignas(sizeof(T) * V) pack {
    T e[V];
};

template <typename T, int V> __device__ inline pack<T, V> load_pack(const void *p, size_t i)
{
    return reinterpret_cast<const pack<T, V> *>(p)[i];
}

template <typename T, int V> __device__ inline void store_pack(void *p, size_t i, pack<T, V> v)
{
    reinterpret_cast<pack<T, V> *>(p)[i] = v;
}

#endif
