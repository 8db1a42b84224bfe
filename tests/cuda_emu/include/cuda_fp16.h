/* f16 and pairs of it: the conversions that kernels use. Arithmetic is done in f32, as in the kernels. */
#ifndef TM_TESTS_CUDA_EMU_FP16_H
#define TM_TESTS_CUDA_EMU_FP16_H

#include <cuda_runtime.h>

struct alignas(2) __half {
    unsigned short bits;
};
struct alignas(4) __half2 {
    __half x, y;
};

/* Exact: the exponent is moved by a product with a power of two. */
inline float __half2float(__half v)
{
    const unsigned magnitude = (v.bits & 0x7fffu) << 13, sign = (v.bits & 0x8000u) << 16;
    const unsigned bits = magnitude >= 0x0f800000u
                              ? magnitude | 0x7f800000u
                              : __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);
    return __uint_as_float(bits | sign);
}

/* To the nearest, ties to even. Below the normal range a sum with 0.5 rounds at the right place. */
inline __half __float2half_rn(float f)
{
    const unsigned bits = __float_as_uint(f), sign = bits >> 16 & 0x8000u;
    unsigned m = bits & 0x7fffffffu;
    if (m > 0x7f800000u)
        m = 0x7fffu;
    else if (m >= 0x477ff000u) /* 65520 */
        m = 0x7c00u;
    else if (m < 0x38800000u) /* 2^-14 */
        m = __float_as_uint(__uint_as_float(m) + 0.5f) - 0x3f000000u;
    else
        m = (m - 0x38000000u + 0xfffu + (m >> 13 & 1)) >> 13;
    return {(unsigned short)(m | sign)};
}
inline __half __float2half(float f)
{
    return __float2half_rn(f);
}
inline __half2 __floats2half2_rn(float x, float y)
{
    return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 v)
{
    return {__half2float(v.x), __half2float(v.y)};
}
inline __half __ushort_as_half(unsigned short v)
{
    return {v};
}
inline unsigned short __half_as_ushort(__half v)
{
    return v.bits;
}
typedef __half half;
typedef __half2 half2;

#endif
