/* bf16 and fp16 to f32 and back, one number at a time, in portable C.
 *
 * To f32 is exact. From f32 rounds to nearest, ties to even, as the vector instructions do; a NaN stays
 * a NaN. The SIMD paths use them for tails only. */
#ifndef TM_ENGINE_BACKEND_CPU_CONVERT_H
#define TM_ENGINE_BACKEND_CPU_CONVERT_H

#include <stdint.h>
#include <string.h>

#include "engine/backend/backend.h"

static inline float tm_f32_from_bits(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline uint32_t tm_f32_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline float tm_bf16_to_f32(uint16_t h)
{
    return tm_f32_from_bits((uint32_t)h << 16);
}

static inline uint16_t tm_bf16_from_f32(float f)
{
    uint32_t u = tm_f32_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float tm_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exp = (h >> 10) & 31u, man = h & 1023u;
    if (exp == 31)
        return tm_f32_from_bits(sign | 0x7f800000u | (man << 13));
    if (exp != 0)
        return tm_f32_from_bits(sign | ((exp + 112u) << 23) | (man << 13));
    /* Zero and subnormals: man units of 2^-24. */
    float f = (float)man * 0x1p-24f;
    return sign ? -f : f;
}

static inline uint16_t tm_f16_from_f32(float f)
{
    uint32_t u = tm_f32_bits(f), a = u & 0x7fffffffu;
    uint16_t sign = (uint16_t)((u >> 16) & 0x8000u);
    if (a > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
    if (a >= 0x477ff000u) /* 65520 and above round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (a < 0x38800000u) {
        /* Below 2^-14: adding 0.5 lets the float adder round to units of 2^-24. */
        uint32_t sub = tm_f32_bits(tm_f32_from_bits(a) + 0.5f) - 0x3f000000u;
        return (uint16_t)(sign | sub);
    }
    uint32_t r = a + 0xfffu + ((a >> 13) & 1u);
    return (uint16_t)(sign | ((r - 0x38000000u) >> 13));
}

/* Element i of an array of any dtype. */
static inline float tm_load_f32(const void *p, size_t i, tm_dtype t)
{
    switch (t) {
    case TM_DTYPE_BF16:
        return tm_bf16_to_f32(((const uint16_t *)p)[i]);
    case TM_DTYPE_F16:
        return tm_f16_to_f32(((const uint16_t *)p)[i]);
    default:
        return ((const float *)p)[i];
    }
}

static inline void tm_store_f32(void *p, size_t i, tm_dtype t, float v)
{
    switch (t) {
    case TM_DTYPE_BF16:
        ((uint16_t *)p)[i] = tm_bf16_from_f32(v);
        break;
    case TM_DTYPE_F16:
        ((uint16_t *)p)[i] = tm_f16_from_f32(v);
        break;
    default:
        ((float *)p)[i] = v;
        break;
    }
}

#endif
