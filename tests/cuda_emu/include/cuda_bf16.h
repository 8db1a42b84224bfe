/* bf16 and pairs of it, as cuda_fp16.h. */
#ifndef TM_TESTS_CUDA_EMU_BF16_H
#define TM_TESTS_CUDA_EMU_BF16_H

#include <cuda_runtime.h>

struct alignas(2) __nv_bfloat16 {
    unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 v)
{
    return __uint_as_float((unsigned)v.bits << 16);
}

/* To the nearest, ties to even. */
inline __nv_bfloat16 __float2bfloat16_rn(float f)
{
    const unsigned bits = __float_as_uint(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return {0x7fff};
    return {(unsigned short)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float f)
{
    return __float2bfloat16_rn(f);
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y)
{
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v)
{
    return {__bfloat162float(v.x), __bfloat162float(v.y)};
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v)
{
    return {v};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v)
{
    return v.bits;
}

#endif
