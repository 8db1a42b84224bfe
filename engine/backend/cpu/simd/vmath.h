/* exp, tanh, erf, sine and cosine of vectors, by range reduction and short polynomials.
 *
 * Bounds, measured by tests/engine/op_vmath_test.c over dense samples against double precision:
 *   vm_exp     relative error below 1.5e-7 for -87.3 <= x <= 88.3; below that 0, above that the value at 88.3
 *   vm_tanh    absolute error below 2e-7, relative below 4e-7
 *   vm_erfc_pos absolute error below 6e-7 for x >= 0
 *   vm_sincos  absolute error below 2e-7 for |x| < 1e6
 * The coefficients are near-minimax fits (exp, sin, cos, tanh) and Abramowitz and Stegun 7.1.26 (erf). */
#ifndef TM_ENGINE_BACKEND_CPU_SIMD_VMATH_H
#define TM_ENGINE_BACKEND_CPU_SIMD_VMATH_H

#include "engine/backend/cpu/simd/vec.h"

/* x = n ln 2 + r with |r| <= ln 2 / 2; exp(x) = 2^n exp(r). ln 2 in two parts, so that n ln 2 is exact. */
TM_INLINE vf vm_exp(vf x)
{
    vf_mask tiny = vf_less(x, vf_set1(-87.3f));
    /* In this order of operands a NaN passes through both. */
    x = vf_min(vf_set1(88.3f), vf_max(vf_set1(-87.3f), x));
    vf n = vf_round(vf_mul(x, vf_set1(1.44269504f)));
    vf r = vf_fnma(n, vf_set1(0.693359375f), x);
    r = vf_fnma(n, vf_set1(-2.12194440e-4f), r);
    vf p = vf_set1(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set1(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set1(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set1(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set1(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set1(5.0000001201e-1f));
    p = vf_fma(p, vf_mul(r, r), vf_add(r, vf_set1(1.0f)));
    return vf_select(tiny, vf_zero(), vf_mul(p, vf_pow2(n)));
}

/* 1 / (1 + exp(-x)) */
TM_INLINE vf vm_sigmoid(vf x)
{
    vf one = vf_set1(1.0f);
    return vf_div(one, vf_add(one, vm_exp(vf_sub(vf_zero(), x))));
}

/* Odd polynomial below 0.625, where 1 - 2 / (exp(2x) + 1) would cancel. */
TM_INLINE vf vm_tanh(vf x)
{
    vf a = vf_abs(x), z = vf_mul(x, x), one = vf_set1(1.0f);
    vf p = vf_set1(-5.70498872745e-3f);
    p = vf_fma(p, z, vf_set1(2.06390887954e-2f));
    p = vf_fma(p, z, vf_set1(-5.37397155531e-2f));
    p = vf_fma(p, z, vf_set1(1.33314422036e-1f));
    p = vf_fma(p, z, vf_set1(-3.33332819422e-1f));
    vf small = vf_fma(vf_mul(p, z), x, x);
    vf e = vm_exp(vf_add(a, a));
    vf large = vf_sub(one, vf_div(vf_set1(2.0f), vf_add(e, one)));
    return vf_select(vf_less(a, vf_set1(0.625f)), small, vf_copysign(large, x));
}

/* 1 - erf(x) for x >= 0, absolute error below 6e-7. It is a product with exp(-x^2), so the tail of the
 * GELU on the negative side keeps its shape instead of cancelling. */
TM_INLINE vf vm_erfc_pos(vf x)
{
    vf one = vf_set1(1.0f);
    vf t = vf_div(one, vf_fma(vf_set1(0.3275911f), x, one));
    vf p = vf_set1(1.061405429f);
    p = vf_fma(p, t, vf_set1(-1.453152027f));
    p = vf_fma(p, t, vf_set1(1.421413741f));
    p = vf_fma(p, t, vf_set1(-0.284496736f));
    p = vf_fma(p, t, vf_set1(0.254829592f));
    return vf_mul(vf_mul(p, t), vm_exp(vf_sub(vf_zero(), vf_mul(x, x))));
}

/* x = n pi / 2 + r, |r| <= pi / 4. pi / 2 in three parts: n times the first is exact in the fused
 * multiply-add for |n| < 2^23, so large positions lose nothing here. */
TM_INLINE void vm_sincos(vf x, vf *sin_out, vf *cos_out)
{
    vf n = vf_round(vf_mul(x, vf_set1(0.636619772f)));
    vf r = vf_fnma(n, vf_set1(1.57079637e+0f), x);
    r = vf_fnma(n, vf_set1(-4.37113883e-8f), r);
    r = vf_fnma(n, vf_set1(-1.71512389e-15f), r);
    vf z = vf_mul(r, r);
    vf s = vf_set1(-1.9515295891e-4f);
    s = vf_fma(s, z, vf_set1(8.3321608736e-3f));
    s = vf_fma(s, z, vf_set1(-1.6666654611e-1f));
    s = vf_fma(vf_mul(s, z), r, r);
    vf c = vf_set1(2.443315711809948e-5f);
    c = vf_fma(c, z, vf_set1(-1.388731625493765e-3f));
    c = vf_fma(c, z, vf_set1(4.166664568298827e-2f));
    c = vf_fma(vf_mul(c, z), z, vf_fnma(vf_set1(0.5f), z, vf_set1(1.0f)));
    /* Quadrant n mod 4: swap in 1 and 3, sine negative in 2 and 3, cosine negative in 1 and 2. */
    vf_mask swap = vf_int_bit(n, 0);
    vf_mask sneg = vf_int_bit(n, 1), cneg = vf_int_bit(vf_add(n, vf_set1(1.0f)), 1);
    vf ss = vf_select(swap, c, s), cc = vf_select(swap, s, c);
    *sin_out = vf_select(sneg, vf_sub(vf_zero(), ss), ss);
    *cos_out = vf_select(cneg, vf_sub(vf_zero(), cc), cc);
}

#endif
