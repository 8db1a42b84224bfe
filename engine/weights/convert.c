/* Conversion between f32, bf16 and f16, through blocks of f32.
 *
 * Loading is bound by the disk or the page cache: the compiler turns the bf16 loops into vector code by itself, and f16
 * has instructions where the processor is not very old. */
#include "engine/weights/convert.h"

#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

/* ---- f16, one number at a time, and eight at once: the same but for the digits of what is no number ---- */

static void widen_f16_each(float *out, const uint16_t *in, size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] = tm_f16_to_f32(in[i]);
}

static void narrow_f16_each(uint16_t *out, const float *in, size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] = tm_f32_to_f16(in[i]);
}

#if defined(__x86_64__)

#define F16_TARGET __attribute__((target("avx2,f16c")))

static bool has_f16(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
}

F16_TARGET static __m128i load8(const uint16_t *p)
{
    return _mm_loadu_si128((const __m128i *)(const void *)p);
}

F16_TARGET static void store8_f16(uint16_t *p, __m256 v)
{
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

F16_TARGET static void widen_f16_fast(float *out, const uint16_t *in, size_t n)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(load8(in + i)));
    widen_f16_each(out + i, in + i, n - i);
}

F16_TARGET static void narrow_f16_fast(uint16_t *out, const float *in, size_t n)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        store8_f16(out + i, _mm256_loadu_ps(in + i));
    narrow_f16_each(out + i, in + i, n - i);
}

/* Straight, since most checkpoints are bf16 and most devices compute in f16. */
F16_TARGET static void bf16_to_f16_fast(uint16_t *out, const unsigned char *in, size_t n)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256i wide = _mm256_cvtepu16_epi32(
            _mm_loadu_si128((const __m128i *)(const void *)(in + i * sizeof(*out))));
        store8_f16(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
    }
    for (; i < n; i++) {
        uint16_t b;
        memcpy(&b, in + i * sizeof(b), sizeof(b));
        out[i] = tm_f32_to_f16(tm_bf16_to_f32(b));
    }
}

F16_TARGET static void adjust_f16_fast(uint16_t *x, size_t n, float factor, float addend)
{
    const __m256 by = _mm256_set1_ps(factor), plus = _mm256_set1_ps(addend);
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        store8_f16(x + i, _mm256_add_ps(_mm256_mul_ps(_mm256_cvtph_ps(load8(x + i)), by), plus));
    for (; i < n; i++)
        x[i] = tm_f32_to_f16(tm_f16_to_f32(x[i]) * factor + addend);
}

#else

static bool has_f16(void)
{
    return false;
}

#define widen_f16_fast                      widen_f16_each
#define narrow_f16_fast                     narrow_f16_each
#define bf16_to_f16_fast(out, in, n)        ((void)(out), (void)(in), (void)(n))
#define adjust_f16_fast(x, n, factor, plus) ((void)(x), (void)(n), (void)(factor), (void)(plus))

#endif

/* ---- any format ---- */

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
    else if (has_f16())
        widen_f16_fast(out, half, n);
    else
        widen_f16_each(out, half, n);
}

static void narrow(void *dst, tm_dtype to, const float *in, size_t n)
{
    uint16_t *half = dst;
    if (to == TM_DTYPE_F32)
        memcpy(dst, in, n * sizeof(float));
    else if (to == TM_DTYPE_BF16)
        for (size_t i = 0; i < n; i++)
            half[i] = tm_f32_to_bf16(in[i]);
    else if (has_f16())
        narrow_f16_fast(half, in, n);
    else
        narrow_f16_each(half, in, n);
}

void tm_convert(void *dst, tm_dtype to, const void *src, tm_dtype from, size_t n)
{
    size_t from_size = from == TM_DTYPE_F32 ? 4 : 2, to_size = to == TM_DTYPE_F32 ? 4 : 2;
    if (from == to) {
        memcpy(dst, src, n * to_size);
        return;
    }
    if (from == TM_DTYPE_BF16 && to == TM_DTYPE_F16 && has_f16()) {
        bf16_to_f16_fast(dst, src, n);
        return;
    }
    float block[BLOCK];
    for (size_t i = 0; i < n; i += BLOCK) {
        size_t m = TM_MIN(n - i, (size_t)BLOCK);
        widen(block, (const char *)src + i * from_size, from, m);
        narrow((char *)dst + i * to_size, to, block, m);
    }
}

void tm_adjust(void *x, tm_dtype type, size_t n, float factor, float addend)
{
    float block[BLOCK];
    size_t size = type == TM_DTYPE_F32 ? 4 : 2;
    if (type == TM_DTYPE_F16 && has_f16()) {
        adjust_f16_fast(x, n, factor, addend);
        return;
    }
    for (size_t i = 0; i < n; i += BLOCK) {
        size_t m = TM_MIN(n - i, (size_t)BLOCK);
        char *at = (char *)x + i * size;
        widen(block, at, type, m);
        for (size_t k = 0; k < m; k++)
            block[k] = block[k] * factor + addend;
        narrow(at, type, block, m);
    }
}

bool tm_f16_all_finite(const uint16_t *x, size_t n)
{
    uint16_t bad = 0; /* the sign is where an exponent of ones carries to */
    for (size_t i = 0; i < n; i++)
        bad |= (uint16_t)((x[i] & 0x7fffu) + 0x400u);
    return (bad & 0x8000u) == 0;
}
