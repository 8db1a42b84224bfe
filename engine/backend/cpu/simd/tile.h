/* The dot-product tile: TT rows of x times RR rows of w, K elements, in registers.
 *
 * Both operands have k contiguous, so weights are used as they lie in the checkpoint: no repacking, no
 * second copy. Each output has one vector accumulator whose lane j sums the products k = j, j + VW, ... in
 * order, and one fixed tree adds the lanes; a K that is no multiple of VW ends with a zero-filled step. This
 * order depends on K alone, never on TT or RR, so an output is bit-equal whatever is computed beside it.
 *
 * Registers: AVX2 4 x 3 = 12 accumulators + 3 weight vectors + 1 of x = 16; AVX-512 6 x 4 + 4 + 1 = 29.
 * A tile issues TT + RR loads for TT * RR fused multiply-adds, so it is bound by the multipliers; on some
 * processors the conversion of bf16 (widen, shift) competes for their ports. */
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
    ptrdiff_t ahead; /* bytes from a cache line of w to the one to fetch early */
} tile_args;

/* acc += a * b, with the accumulator where it is and the factors in registers. Left alone, the compiler
 * loads an f32 factor again at each use, or moves accumulators through the stack; either costs a third. */
#define TM_ACCUMULATE(acc, a, b) __asm__("vfmadd231ps %1, %2, %0" : "+v"(acc) : "v"(a), "v"(b))

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
                TM_ACCUMULATE(acc[t][r], held[t], w);
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
            TM_ACCUMULATE(acc[t][r], x, held[r]);
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

/* The sums of the tile, one vector each. `fetch`: w comes from memory rather than from a cache. */
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

#endif
