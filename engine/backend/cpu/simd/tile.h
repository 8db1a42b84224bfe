/* The dot-product tile: TT rows of x times RR rows of w, K elements, in registers; and the loop that takes
 * TT rows of x past many rows of w.
 *
 * out[t * ldo + r] (=, or += with `add`) sum over k of x[t][k] * w[r][k], plus bias[r] if given. Both
 * operands have k contiguous, so weights are used as they lie in the checkpoint: no repacking, no second
 * copy. Each output has one vector accumulator whose lane j sums the products k = j, j + VW, ... in order,
 * and one fixed tree adds the lanes; a K that is no multiple of VW ends with a zero-filled step. This
 * order depends on K alone, never on TT or RR, so an output is bit-equal whatever is computed beside it.
 *
 * Registers: AVX2 4 x 3 = 12 accumulators + 3 weight vectors + 1 of x = 16; AVX-512 6 x 4 + 4 + 1 = 29.
 * A tile issues TT + RR loads for TT * RR fused multiply-adds, so it is bound by the multipliers, and the
 * conversion of bf16 (widen, shift) fits beside them. */
#ifndef TM_ENGINE_BACKEND_CPU_SIMD_TILE_H
#define TM_ENGINE_BACKEND_CPU_SIMD_TILE_H

#include <stdbool.h>

#include "engine/backend/cpu/simd/vec.h"

typedef struct tile_args {
    const float *x;
    size_t ldx;
    const void *w;
    size_t ldw; /* in elements */
    int k;
    float *out;
    size_t ldo;
    const float *bias;
    bool add;
    ptrdiff_t ahead; /* bytes from a tile of w to the one that is used next, to fetch it early */
} tile_args;

/* TT rows of x against the n rows of w from a->w on. */
typedef void (*tile_fn)(const tile_args *a, int n);

/* The smaller side is held in registers, the larger one goes by: TT * RR + min(TT, RR) + 1 registers. */
TM_INLINE void tile_step(const int TT, const int RR, const tm_dtype dt, const tile_args *a, int k,
                         vf (*acc)[8])
{
    vf held[8];
    if (TT < RR) {
#pragma GCC unroll 8
        for (int t = 0; t < TT; t++)
            held[t] = vf_load(a->x + (size_t)t * a->ldx + (size_t)k);
#pragma GCC unroll 8
        for (int r = 0; r < RR; r++) {
            vf w = vf_load_t(a->w, (size_t)r * a->ldw + (size_t)k, dt);
#pragma GCC unroll 8
            for (int t = 0; t < TT; t++)
                acc[t][r] = vf_fma(held[t], w, acc[t][r]);
        }
        return;
    }
#pragma GCC unroll 8
    for (int r = 0; r < RR; r++)
        held[r] = vf_load_t(a->w, (size_t)r * a->ldw + (size_t)k, dt);
#pragma GCC unroll 8
    for (int t = 0; t < TT; t++) {
        vf x = vf_load(a->x + (size_t)t * a->ldx + (size_t)k);
#pragma GCC unroll 8
        for (int r = 0; r < RR; r++)
            acc[t][r] = vf_fma(x, held[r], acc[t][r]);
    }
}

TM_INLINE void tile_tail(const int TT, const int RR, const tm_dtype dt, const tile_args *a, int k,
                         vf (*acc)[8])
{
    int n = a->k - k;
#pragma GCC unroll 8
    for (int r = 0; r < RR; r++) {
        vf w = vf_loadn_t(a->w, (size_t)r * a->ldw + (size_t)k, dt, n);
#pragma GCC unroll 8
        for (int t = 0; t < TT; t++)
            acc[t][r] = vf_fma(vf_loadn(a->x + (size_t)t * a->ldx + (size_t)k, n), w, acc[t][r]);
    }
}

TM_INLINE void tile_finish(const int TT, const int RR, const tile_args *a, vf (*acc)[8])
{
#pragma GCC unroll 8
    for (int t = 0; t < TT; t++) {
        float sum[8];
#pragma GCC unroll 8
        for (int r = 0; r < RR; r += 4)
            _mm_storeu_ps(sum + r,
                          vf_hsum4(acc[t][r], acc[t][r + 1 < RR ? r + 1 : r],
                                   acc[t][r + 2 < RR ? r + 2 : r], acc[t][r + 3 < RR ? r + 3 : r]));
        float *out = a->out + (size_t)t * a->ldo;
#pragma GCC unroll 8
        for (int r = 0; r < RR; r++) {
            float v = a->add ? out[r] + sum[r] : sum[r];
            out[r] = a->bias ? v + a->bias[r] : v;
        }
    }
}

/* The sums of the tile, one vector each. `fetch`: w comes from memory rather than from L1. Measured: 10 to
 * 25 % on weights beyond L2, nothing lost on weights in L2. */
TM_INLINE void tile_sum(const int TT, const int RR, const tm_dtype dt, const bool fetch,
                        const tile_args *a, vf (*acc)[8])
{
    /* Elements of w per cache line, so that each line is fetched once. */
    const int line = dt == TM_DTYPE_F32 ? 16 : 32;
#pragma GCC unroll 8
    for (int t = 0; t < TT; t++)
#pragma GCC unroll 8
        for (int r = 0; r < RR; r++)
            acc[t][r] = vf_zero();
    int k = 0;
    for (; k + line <= a->k; k += line) {
        if (fetch) {
#pragma GCC unroll 8
            for (int r = 0; r < RR; r++) {
                size_t at = ((size_t)r * a->ldw + (size_t)k) * (dt == TM_DTYPE_F32 ? 4 : 2);
                _mm_prefetch((const char *)a->w + at + a->ahead, _MM_HINT_T0);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < line; i += VW)
            tile_step(TT, RR, dt, a, k + i, acc);
    }
    for (; k + VW <= a->k; k += VW)
        tile_step(TT, RR, dt, a, k, acc);
    if (k < a->k)
        tile_tail(TT, RR, dt, a, k, acc);
}

TM_INLINE void tile_one(const int TT, const int RR, const tm_dtype dt, tile_args *g)
{
    vf acc[6][8];
    tile_sum(TT, RR, dt, true, g, acc);
    tile_finish(TT, RR, g, acc);
    g->w = (const char *)g->w + RR * g->ldw * (dt == TM_DTYPE_F32 ? 4 : 2);
    g->out += RR;
    g->bias = g->bias ? g->bias + RR : NULL;
}

/* RR rows of w at a time, the rest singly. */
TM_INLINE void tile_run(const int TT, const int RR, const tm_dtype dt, const tile_args *a, int n)
{
    tile_args g = *a;
    for (; n >= RR; n -= RR)
        tile_one(TT, RR, dt, &g);
    for (; n > 0; n--)
        tile_one(TT, 1, dt, &g);
}

/* tile_1x8_bf16 and so on. */
#define TM_TILE(tt, rr)                                                                            \
    static void tile_##tt##x##rr##_f32(const tile_args *a, int n)                                  \
    {                                                                                              \
        tile_run(tt, rr, TM_DTYPE_F32, a, n);                                                      \
    }                                                                                              \
    static void tile_##tt##x##rr##_bf16(const tile_args *a, int n)                                 \
    {                                                                                              \
        tile_run(tt, rr, TM_DTYPE_BF16, a, n);                                                     \
    }                                                                                              \
    static void tile_##tt##x##rr##_f16(const tile_args *a, int n)                                  \
    {                                                                                              \
        tile_run(tt, rr, TM_DTYPE_F16, a, n);                                                      \
    }
#define TM_TILE_ROW(tt, rr)                                                                        \
    {                                                                                              \
        tile_##tt##x##rr##_f32, tile_##tt##x##rr##_bf16, tile_##tt##x##rr##_f16                    \
    }

#endif
