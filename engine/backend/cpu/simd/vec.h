/* One vocabulary for the vector registers of AVX2 and AVX-512.
 *
 * The files of this folder are compiled once per instruction set, with that set's flags; this header maps
 * the names. `vf` is VW floats. Numbers of other dtypes become f32 on load and are rounded (nearest, ties
 * to even) on store. Functions with n take the first n < VW elements, read nothing behind them and fill
 * with zeros.
 *
 * vf_hsum and vf_hsum4 add the lanes in one fixed tree, so that a dot product does not depend on how many
 * neighbours were computed with it. */
#ifndef TM_ENGINE_BACKEND_CPU_SIMD_VEC_H
#define TM_ENGINE_BACKEND_CPU_SIMD_VEC_H

#include <immintrin.h>

#include "engine/backend/cpu/convert.h"

#define TM_INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__

typedef __m512 vf;
typedef __mmask16 vf_mask;
enum { VW = 16 };
#define TM_ISA(name) tm_cpu_avx512_##name

TM_INLINE vf vf_zero(void)
{
    return _mm512_setzero_ps();
}
TM_INLINE vf vf_set1(float a)
{
    return _mm512_set1_ps(a);
}
TM_INLINE vf vf_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
TM_INLINE void vf_store(float *p, vf a)
{
    _mm512_storeu_ps(p, a);
}
TM_INLINE __mmask16 vf_first(int n)
{
    return (__mmask16)((1u << n) - 1u);
}
TM_INLINE vf vf_loadn(const float *p, int n)
{
    return _mm512_maskz_loadu_ps(vf_first(n), p);
}
TM_INLINE void vf_storen(float *p, vf a, int n)
{
    _mm512_mask_storeu_ps(p, vf_first(n), a);
}
TM_INLINE vf vf_add(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}
TM_INLINE vf vf_sub(vf a, vf b)
{
    return _mm512_sub_ps(a, b);
}
TM_INLINE vf vf_mul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}
TM_INLINE vf vf_div(vf a, vf b)
{
    return _mm512_div_ps(a, b);
}
TM_INLINE vf vf_max(vf a, vf b)
{
    return _mm512_max_ps(a, b);
}
TM_INLINE vf vf_min(vf a, vf b)
{
    return _mm512_min_ps(a, b);
}
TM_INLINE vf vf_fma(vf a, vf b, vf c) /* a b + c */
{
    return _mm512_fmadd_ps(a, b, c);
}
TM_INLINE vf vf_fnma(vf a, vf b, vf c) /* c - a b */
{
    return _mm512_fnmadd_ps(a, b, c);
}
TM_INLINE vf vf_round(vf a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
TM_INLINE vf vf_abs(vf a)
{
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)));
}
/* a with the sign of b; a must not be negative. */
TM_INLINE vf vf_copysign(vf a, vf b)
{
    __m512i sign = _mm512_and_si512(_mm512_castps_si512(b), _mm512_set1_epi32((int)0x80000000u));
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), sign));
}
/* 2^a for whole a in -126..127. */
TM_INLINE vf vf_pow2(vf a)
{
    __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
}
TM_INLINE vf_mask vf_less(vf a, vf b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
}
TM_INLINE vf vf_select(vf_mask m, vf yes, vf no)
{
    return _mm512_mask_blend_ps(m, no, yes);
}
/* Bit `bit` (0 or 1) of the whole number a. */
TM_INLINE vf_mask vf_int_bit(vf a, int bit)
{
    return _mm512_test_epi32_mask(_mm512_cvtps_epi32(a), _mm512_set1_epi32(1 << bit));
}
TM_INLINE vf vf_iota(void)
{
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
TM_INLINE __m256 vf_fold(vf a)
{
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}
TM_INLINE float vf_hmax(vf a)
{
    return _mm512_reduce_max_ps(a);
}
TM_INLINE vf vf_load_bf16(const uint16_t *p)
{
    __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
}
TM_INLINE vf vf_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
TM_INLINE void vf_store_bf16(uint16_t *p, vf a)
{
    __m512i u = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    __m512i nan = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    r = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), r, nan);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}
TM_INLINE void vf_store_f16(uint16_t *p, vf a)
{
    _mm256_storeu_si256((__m256i *)p,
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

typedef __m256 vf;
typedef __m256 vf_mask;
enum { VW = 8 };
#define TM_ISA(name) tm_cpu_avx2_##name

TM_INLINE vf vf_zero(void)
{
    return _mm256_setzero_ps();
}
TM_INLINE vf vf_set1(float a)
{
    return _mm256_set1_ps(a);
}
TM_INLINE vf vf_load(const float *p)
{
    return _mm256_loadu_ps(p);
}
TM_INLINE void vf_store(float *p, vf a)
{
    _mm256_storeu_ps(p, a);
}
TM_INLINE __m256i vf_first(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TM_INLINE vf vf_loadn(const float *p, int n)
{
    return _mm256_maskload_ps(p, vf_first(n));
}
TM_INLINE void vf_storen(float *p, vf a, int n)
{
    _mm256_maskstore_ps(p, vf_first(n), a);
}
TM_INLINE vf vf_add(vf a, vf b)
{
    return _mm256_add_ps(a, b);
}
TM_INLINE vf vf_sub(vf a, vf b)
{
    return _mm256_sub_ps(a, b);
}
TM_INLINE vf vf_mul(vf a, vf b)
{
    return _mm256_mul_ps(a, b);
}
TM_INLINE vf vf_div(vf a, vf b)
{
    return _mm256_div_ps(a, b);
}
TM_INLINE vf vf_max(vf a, vf b)
{
    return _mm256_max_ps(a, b);
}
TM_INLINE vf vf_min(vf a, vf b)
{
    return _mm256_min_ps(a, b);
}
TM_INLINE vf vf_fma(vf a, vf b, vf c) /* a b + c */
{
    return _mm256_fmadd_ps(a, b, c);
}
TM_INLINE vf vf_fnma(vf a, vf b, vf c) /* c - a b */
{
    return _mm256_fnmadd_ps(a, b, c);
}
TM_INLINE vf vf_round(vf a)
{
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
TM_INLINE vf vf_abs(vf a)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
}
/* a with the sign of b; a must not be negative. */
TM_INLINE vf vf_copysign(vf a, vf b)
{
    return _mm256_or_ps(a, _mm256_and_ps(_mm256_set1_ps(-0.0f), b));
}
/* 2^a for whole a in -126..127. */
TM_INLINE vf vf_pow2(vf a)
{
    __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
TM_INLINE vf_mask vf_less(vf a, vf b)
{
    return _mm256_cmp_ps(a, b, _CMP_LT_OQ);
}
TM_INLINE vf vf_select(vf_mask m, vf yes, vf no)
{
    return _mm256_blendv_ps(no, yes, m);
}
/* Bit `bit` (0 or 1) of the whole number a. */
TM_INLINE vf_mask vf_int_bit(vf a, int bit)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtps_epi32(a), 31 - bit));
}
TM_INLINE vf vf_iota(void)
{
    return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
}
TM_INLINE __m256 vf_fold(vf a)
{
    return a;
}
TM_INLINE float vf_hmax(vf a)
{
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
TM_INLINE vf vf_load_bf16(const uint16_t *p)
{
    __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
}
TM_INLINE vf vf_load_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
TM_INLINE void vf_store_bf16(uint16_t *p, vf a)
{
    __m256i u = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    r = _mm256_blendv_epi8(r, nan, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
    r = _mm256_srli_epi32(r, 16);
    r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(r));
}
TM_INLINE void vf_store_f16(uint16_t *p, vf a)
{
    _mm_storeu_si128((__m128i *)p,
                     _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#endif

/* Sums of the lanes of four vectors: ((l0 + l1) + (l2 + l3)) + ((l4 + l5) + (l6 + l7)), after the upper
 * half of a 512-bit vector was added to the lower one. */
TM_INLINE __m128 vf_hsum4(vf a, vf b, vf c, vf d)
{
    __m256 ab = _mm256_hadd_ps(vf_fold(a), vf_fold(b));
    __m256 cd = _mm256_hadd_ps(vf_fold(c), vf_fold(d));
    __m256 s = _mm256_hadd_ps(ab, cd);
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

TM_INLINE float vf_hsum(vf a)
{
    return _mm_cvtss_f32(vf_hsum4(a, a, a, a));
}

/* VW elements from element i of an array of dtype t; t is a constant where it matters. */
TM_INLINE vf vf_load_t(const void *p, size_t i, tm_dtype t)
{
    if (t == TM_DTYPE_BF16)
        return vf_load_bf16((const uint16_t *)p + i);
    if (t == TM_DTYPE_F16)
        return vf_load_f16((const uint16_t *)p + i);
    return vf_load((const float *)p + i);
}

TM_INLINE vf vf_loadn_t(const void *p, size_t i, tm_dtype t, int n)
{
    if (t == TM_DTYPE_F32)
        return vf_loadn((const float *)p + i, n);
    uint16_t tail[2 * VW] = {0}; /* twice: the compiler sees the f32 load, too */
    memcpy(tail, (const uint16_t *)p + i, (size_t)n * sizeof tail[0]);
    return vf_load_t(tail, 0, t);
}

TM_INLINE void vf_store_t(void *p, size_t i, tm_dtype t, vf a)
{
    if (t == TM_DTYPE_BF16)
        vf_store_bf16((uint16_t *)p + i, a);
    else if (t == TM_DTYPE_F16)
        vf_store_f16((uint16_t *)p + i, a);
    else
        vf_store((float *)p + i, a);
}

TM_INLINE void vf_storen_t(void *p, size_t i, tm_dtype t, vf a, int n)
{
    if (t == TM_DTYPE_F32) {
        vf_storen((float *)p + i, a, n);
        return;
    }
    uint16_t tail[2 * VW];
    vf_store_t(tail, 0, t, a);
    memcpy((uint16_t *)p + i, tail, (size_t)n * sizeof tail[0]);
}

#endif
