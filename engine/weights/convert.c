/* Conversion between f32, bf16 and f16, through blocks of f32.
 *
 * Plain integer code: loading is bound by the disk or the page cache, and the compiler turns the bf16
 * loops, which are nearly all of the traffic, into vector code by itself. */
#include "engine/weights/convert.h"

#include <string.h>

#include "common/check.h"

#define BLOCK 512

static uint32_t bits_of(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof(u));
    return u;
}

static float float_of(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof(f));
    return f;
}

float tm_bf16_to_f32(uint16_t b)
{
    return float_of((uint32_t)b << 16);
}

uint16_t tm_f32_to_bf16(float f)
{
    uint32_t u = bits_of(f);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    uint32_t nan = (u >> 16) | 0x40u; /* quiet; rounding could carry it into infinity */
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

float tm_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exp = (h >> 10) & 0x1fu, frac = h & 0x3ffu;
    if (exp == 0x1f)
        return float_of(sign | 0x7f800000u | frac << 13);
    if (exp != 0)
        return float_of(sign | (exp + 112) << 23 | frac << 13);
    float tiny = (float)frac * 0x1p-24f; /* zero and subnormals: exact */
    return float_of(sign | bits_of(tiny));
}

uint16_t tm_f32_to_f16(float f)
{
    uint32_t u = bits_of(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
    if (a >= 0x477ff000u) /* 65520 and above round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (a < 0x38800000u) { /* below the smallest normal: let the float adder round at 2^-24 */
        float shifted = float_of(a) + 0.5f;
        return (uint16_t)(sign | (bits_of(shifted) - bits_of(0.5f)));
    }
    uint32_t rounded = a + 0xfffu + ((a >> 13) & 1);
    return (uint16_t)(sign | (rounded - 0x38000000u) >> 13);
}

static void widen(float *out, const void *src, tm_dtype from, size_t n)
{
    uint16_t half[BLOCK];
    if (from == TM_DTYPE_F32) {
        memcpy(out, src, n * sizeof(float));
        return;
    }
    memcpy(half, src, n * sizeof(half[0])); /* files do not promise alignment */
    if (from == TM_DTYPE_BF16)
        for (size_t i = 0; i < n; i++)
            out[i] = tm_bf16_to_f32(half[i]);
    else
        for (size_t i = 0; i < n; i++)
            out[i] = tm_f16_to_f32(half[i]);
}

static void narrow(void *dst, tm_dtype to, const float *in, size_t n)
{
    uint16_t *half = dst;
    if (to == TM_DTYPE_F32)
        memcpy(dst, in, n * sizeof(float));
    else if (to == TM_DTYPE_BF16)
        for (size_t i = 0; i < n; i++)
            half[i] = tm_f32_to_bf16(in[i]);
    else
        for (size_t i = 0; i < n; i++)
            half[i] = tm_f32_to_f16(in[i]);
}

void tm_convert(void *dst, tm_dtype to, const void *src, tm_dtype from, size_t n)
{
    size_t from_size = from == TM_DTYPE_F32 ? 4 : 2, to_size = to == TM_DTYPE_F32 ? 4 : 2;
    if (from == to) {
        memcpy(dst, src, n * to_size);
        return;
    }
    float block[BLOCK];
    for (size_t i = 0; i < n; i += BLOCK) {
        size_t m = TM_MIN(n - i, (size_t)BLOCK);
        widen(block, (const char *)src + i * from_size, from, m);
        narrow((char *)dst + i * to_size, to, block, m);
    }
}
