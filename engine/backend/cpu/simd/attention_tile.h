/* The pieces of the attention kernel that work on one tile: q K^T, scores to probabilities, P V.
 *
 * Everything is bit-equal per row whatever rows are beside it: q K^T by tile.h, P V by one accumulator per
 * element that takes the keys in order, sums over whole vectors from the start of the tile. */
#ifndef TM_ENGINE_BACKEND_CPU_SIMD_ATTENTION_TILE_H
#define TM_ENGINE_BACKEND_CPU_SIMD_ATTENTION_TILE_H

#include <math.h>

#include "common/check.h"
#include "engine/backend/cpu/simd/tile.h"
#include "engine/backend/cpu/simd/vmath.h"

enum { TILE_KEYS = 64 };

TM_INLINE float tile_exp1(float x)
{
    float lanes[VW];
    vf_store(lanes, vm_exp(vf_set1(x)));
    return lanes[0];
}

static inline void tile_scale(float *o, float alpha, int n)
{
    vf a = vf_set1(alpha);
    for (int i = 0; i < n; i += VW)
        vf_store(o + i, vf_mul(vf_load(o + i), a));
}

/* sum = sum * old + o * mine */
static inline void tile_mix(float *sum, float old, const float *o, float mine, int n)
{
    vf a = vf_set1(old), b = vf_set1(mine);
    for (int i = 0; i < n; i += VW)
        vf_store(sum + i, vf_fma(vf_load(o + i), b, vf_mul(vf_load(sum + i), a)));
}

static inline void tile_widen(float *out, const void *in, tm_dtype t, size_t n)
{
    size_t i = 0;
    if (t == TM_DTYPE_BF16)
        for (; i + VW <= n; i += VW)
            vf_store(out + i, vf_load_t(in, i, TM_DTYPE_BF16));
    else
        for (; i + VW <= n; i += VW)
            vf_store(out + i, vf_load_t(in, i, TM_DTYPE_F16));
    for (; i < n; i++)
        out[i] = tm_load_f32(in, i, t);
}

TM_TILE(1, 8)
TM_TILE(1, 1)
TM_TILE(2, 4)
TM_TILE(2, 1)
TM_TILE(4, 1)
#ifdef __AVX512F__
TM_TILE(4, 4)
#define TM_QK_ROWS 4
static const tile_fn g_qk_four[TM_DTYPE_COUNT] = TM_TILE_ROW(4, 4);
#else
TM_TILE(4, 3)
#define TM_QK_ROWS 3
static const tile_fn g_qk_four[TM_DTYPE_COUNT] = TM_TILE_ROW(4, 3);
#endif

static const struct {
    int tokens, rows;
    const tile_fn *full;
    tile_fn one[TM_DTYPE_COUNT];
} g_qk[] = {
    {4, TM_QK_ROWS, g_qk_four, TM_TILE_ROW(4, 1)},
    {2, 4, (const tile_fn[])TM_TILE_ROW(2, 4), TM_TILE_ROW(2, 1)},
    {1, 8, (const tile_fn[])TM_TILE_ROW(1, 8), TM_TILE_ROW(1, 1)},
};

/* S[rows][n] = q[rows][d] K[n][d]^T; rows of S are TILE_KEYS apart. */
static inline void tile_qk(const float *q, size_t ldq, int rows, const void *k, tm_dtype t,
                           size_t d, int n, float *s)
{
    size_t step = d * tm_dtype_size(t);
    int shape = 0;
    for (int r = 0; r < rows; r += g_qk[shape].tokens) {
        while (g_qk[shape].tokens > rows - r)
            shape++;
        for (int j = 0; j < n;) {
            bool full = j + g_qk[shape].rows <= n;
            int keys = full ? g_qk[shape].rows : 1;
            const char *at = (const char *)k + (size_t)j * step;
            tile_args g = {
                .x = q + (size_t)r * ldq,
                .ldx = ldq,
                .w = at,
                .ldw = d,
                .k = (int)d,
                .out = s + (size_t)r * TILE_KEYS + j,
                .ldo = TILE_KEYS,
                .next = at + (size_t)keys * step,
            };
            (full ? g_qk[shape].full : g_qk[shape].one)[t](&g);
            j += keys;
        }
    }
}

/* What a row of n scores may see: lo <= j < hi. `distance` is position of key 0 minus that of the query. */
typedef struct score_mask {
    int lo, hi, n;
    float softcap, slope, distance;
} score_mask;

/* Softcap and bias in place; masked scores become -inf. Returns the maximum. The rows of S hold whole
 * vectors, so the end of the last one may be overwritten. */
static inline float tile_scores(const score_mask *k, float *s)
{
    vf top = vf_set1(-INFINITY), none = vf_set1(-INFINITY);
    vf lo = vf_set1((float)k->lo), hi = vf_set1((float)k->hi);
    for (int j = 0; j < k->n; j += VW) {
        vf v = vf_load(s + j), at = vf_add(vf_set1((float)j), vf_iota());
        if (k->softcap > 0.0f)
            v = vf_mul(vf_set1(k->softcap), vm_tanh(vf_div(v, vf_set1(k->softcap))));
        if (k->slope != 0.0f)
            v = vf_fma(vf_set1(k->slope), vf_add(at, vf_set1(k->distance)), v);
        if (j < k->lo || j + VW > k->hi) {
            v = vf_select(vf_less(at, lo), none, v);
            v = vf_select(vf_less(at, hi), v, none);
        }
        vf_store(s + j, v);
        top = vf_max(top, v);
    }
    return vf_hmax(top);
}

/* exp(s - m) in place; returns the sum. */
static inline float tile_probs(const score_mask *k, float *s, float m)
{
    vf sum = vf_zero(), mm = vf_set1(m);
    for (int j = 0; j < k->n; j += VW) {
        vf p = vm_exp(vf_sub(vf_load(s + j), mm));
        vf_store(s + j, p);
        sum = vf_add(sum, p);
    }
    return vf_hsum(sum);
}

/* O[RR][NV vectors] += P[RR][n] V[n][...] */
TM_INLINE void pv_run(const int RR, const int NV, const tm_dtype t, const float *p, const void *v,
                      size_t d, int n, float *o, size_t ldo)
{
    vf acc[6][8];
#pragma GCC unroll 8
    for (int r = 0; r < RR; r++)
#pragma GCC unroll 8
        for (int c = 0; c < NV; c++)
            acc[r][c] = vf_load(o + (size_t)r * ldo + (size_t)(c * VW));
    for (int j = 0; j < n; j++) {
        vf x[8];
#pragma GCC unroll 8
        for (int c = 0; c < NV; c++)
            x[c] = vf_load_t(v, (size_t)j * d + (size_t)(c * VW), t);
#pragma GCC unroll 8
        for (int r = 0; r < RR; r++) {
            vf w = vf_set1(p[r * TILE_KEYS + j]);
#pragma GCC unroll 8
            for (int c = 0; c < NV; c++)
                acc[r][c] = vf_fma(w, x[c], acc[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < RR; r++)
#pragma GCC unroll 8
        for (int c = 0; c < NV; c++)
            vf_store(o + (size_t)r * ldo + (size_t)(c * VW), acc[r][c]);
}

/* The last columns, when d is no multiple of VW: one row at a time. */
static inline void pv_tail(tm_dtype t, const float *p, const void *v, size_t d, int n, float *o,
                           size_t from)
{
    int cols = (int)(d - from);
    vf acc = vf_load(o + from);
    for (int j = 0; j < n; j++)
        acc = vf_fma(vf_set1(p[j]), vf_loadn_t(v, (size_t)j * d + from, t, cols), acc);
    vf_store(o + from, acc);
}

typedef void (*pv_fn)(const float *p, const void *v, size_t d, int n, float *o, size_t ldo);

#define TM_PV_T(rr, nv, t, T)                                                                      \
    static void pv_##rr##x##nv##_##t(const float *p, const void *v, size_t d, int n, float *o,     \
                                     size_t ldo)                                                   \
    {                                                                                              \
        pv_run(rr, nv, T, p, v, d, n, o, ldo);                                                     \
    }
#define TM_PV(rr, nv)                                                                              \
    TM_PV_T(rr, nv, f32, TM_DTYPE_F32)                                                             \
    TM_PV_T(rr, nv, bf16, TM_DTYPE_BF16)                                                           \
    TM_PV_T(rr, nv, f16, TM_DTYPE_F16)
#define TM_PV_ROW(rr, nv)                                                                          \
    {                                                                                              \
        pv_##rr##x##nv##_f32, pv_##rr##x##nv##_bf16, pv_##rr##x##nv##_f16                          \
    }

TM_PV(6, 2)
TM_PV(6, 1)
TM_PV(4, 2)
TM_PV(4, 1)
TM_PV(2, 4)
TM_PV(2, 1)
#ifdef __AVX512F__
#define TM_PV_WIDE 4
TM_PV(1, 4)
#define TM_PV_ONE TM_PV_ROW(1, 4)
#else
#define TM_PV_WIDE 8
TM_PV(1, 8)
#define TM_PV_ONE  TM_PV_ROW(1, 8)
#endif
TM_PV(1, 1)

static const struct {
    int rows, vectors;
    pv_fn full[TM_DTYPE_COUNT], one[TM_DTYPE_COUNT];
} g_pv[] = {
    {6, 2, TM_PV_ROW(6, 2), TM_PV_ROW(6, 1)},
    {4, 2, TM_PV_ROW(4, 2), TM_PV_ROW(4, 1)},
    {2, 4, TM_PV_ROW(2, 4), TM_PV_ROW(2, 1)},
    {1, TM_PV_WIDE, TM_PV_ONE, TM_PV_ROW(1, 1)},
};

/* O[rows][d] += P[rows][n] V[n][d] */
static inline void tile_pv(const float *p, int rows, const void *v, tm_dtype t, int d, int n,
                           float *o, size_t ldo)
{
    int shape = 0;
    for (int r = 0; r < rows; r += g_pv[shape].rows) {
        while (g_pv[shape].rows > rows - r)
            shape++;
        const float *pr = p + (size_t)r * TILE_KEYS;
        float *out = o + (size_t)r * ldo;
        int c = 0;
        while (c + VW <= d) {
            bool full = c + g_pv[shape].vectors * VW <= d;
            const char *vc = (const char *)v + (size_t)c * tm_dtype_size(t);
            (full ? g_pv[shape].full : g_pv[shape].one)[t](pr, vc, (size_t)d, n, out + c, ldo);
            c += full ? g_pv[shape].vectors * VW : VW;
        }
        for (int i = 0; c < d && i < g_pv[shape].rows; i++)
            pv_tail(t, pr + i * TILE_KEYS, v, (size_t)d, n, out + (size_t)i * ldo, (size_t)c);
    }
}

#endif
