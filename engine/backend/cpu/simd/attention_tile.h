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

enum {
    TILE_KEYS = 64,
    S_STRIDE = TILE_KEYS + 16 /* between rows of scores; padding for whole stores */
};

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

/* With few rows memory is the limit, and a block is too short for the processor to see a stream in it. So
 * each cache line of keys or values fetches the one that lies `ahead`, in the tile that comes next. */
enum { FETCH_ROWS = 2 };

/* TT queries against n keys, RR at a time and the rest singly. The sums go straight to S: a store of four
 * may pass the RR-th, into scores that the next store writes or that lie in the padding of the row. */
TM_INLINE void qk_run(const int TT, const int RR, const tm_dtype t, tile_args *g, int n, float *s)
{
    const size_t step = g->ldw * (t == TM_DTYPE_F32 ? 4 : 2);
    vf acc[6][8];
    int j = 0;
    for (; j + RR <= n; j += RR) {
        tile_sum(TT, RR, t, TT <= FETCH_ROWS, g, acc);
#pragma GCC unroll 8
        for (int i = 0; i < TT; i++)
#pragma GCC unroll 2
            for (int r = 0; r < RR; r += 4)
                _mm_storeu_ps(s + i * S_STRIDE + j + r,
                              vf_hsum4(acc[i][r], acc[i][r + 1], acc[i][r + 2],
                                       acc[i][r + 3 < RR ? r + 3 : r]));
        g->w = (const char *)g->w + RR * step;
    }
    for (; j < n; j++) {
        tile_sum(TT, 1, t, false, g, acc);
#pragma GCC unroll 8
        for (int i = 0; i < TT; i++)
            s[i * S_STRIDE + j] = vf_hsum(acc[i][0]);
        g->w = (const char *)g->w + step;
    }
}

typedef void (*qk_fn)(tile_args *g, int n, float *s);

#define TM_QK_T(tt, rr, t, T)                                                                      \
    static void qk_##tt##x##rr##_##t(tile_args *g, int n, float *s)                                \
    {                                                                                              \
        qk_run(tt, rr, T, g, n, s);                                                                \
    }
#define TM_QK(tt, rr)                                                                              \
    TM_QK_T(tt, rr, f32, TM_DTYPE_F32)                                                             \
    TM_QK_T(tt, rr, bf16, TM_DTYPE_BF16)                                                           \
    TM_QK_T(tt, rr, f16, TM_DTYPE_F16)
#define TM_QK_ROW(tt, rr)                                                                          \
    {                                                                                              \
        qk_##tt##x##rr##_f32, qk_##tt##x##rr##_bf16, qk_##tt##x##rr##_f16                          \
    }

TM_QK(1, 8)
TM_QK(2, 4)
#ifdef __AVX512F__
TM_QK(4, 4)
#define TM_QK_FOUR TM_QK_ROW(4, 4)
#else
TM_QK(4, 3)
#define TM_QK_FOUR TM_QK_ROW(4, 3)
#endif

static const struct {
    int tokens;
    qk_fn fn[TM_DTYPE_COUNT];
} g_qk[] = {{4, TM_QK_FOUR}, {2, TM_QK_ROW(2, 4)}, {1, TM_QK_ROW(1, 8)}};

/* S[rows][n] = q[rows][d] K[n][d]^T; ahead: bytes to the keys that come next. */
static inline void tile_qk(const float *q, size_t ldq, int rows, const void *k, tm_dtype t,
                           size_t d, int n, ptrdiff_t ahead, float *s)
{
    int shape = 0;
    for (int r = 0; r < rows; r += g_qk[shape].tokens) {
        while (g_qk[shape].tokens > rows - r)
            shape++;
        tile_args g = {
            .x = q + (size_t)r * ldq, .ldx = ldq, .w = k, .ldw = d, .k = (int)d, .ahead = ahead};
        g_qk[shape].fn[t](&g, n, s + (size_t)r * S_STRIDE);
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
                      size_t d, int n, ptrdiff_t ahead, float *o, size_t ldo)
{
    const size_t size = t == TM_DTYPE_F32 ? 4 : 2;
    vf acc[6][8];
#pragma GCC unroll 8
    for (int r = 0; r < RR; r++)
#pragma GCC unroll 8
        for (int c = 0; c < NV; c++)
            acc[r][c] = vf_load(o + (size_t)r * ldo + (size_t)(c * VW));
    for (int j = 0; j < n; j++) {
        vf x[8];
        if (RR <= FETCH_ROWS)
            _mm_prefetch((const char *)v + (size_t)j * d * size + ahead, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int c = 0; c < NV; c++)
            x[c] = vf_load_t(v, (size_t)j * d + (size_t)(c * VW), t);
#pragma GCC unroll 8
        for (int r = 0; r < RR; r++) {
            vf w = vf_set1(p[r * S_STRIDE + j]);
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

typedef void (*pv_fn)(const float *p, const void *v, size_t d, int n, ptrdiff_t ahead, float *o,
                      size_t ldo);

#define TM_PV_T(rr, nv, t, T)                                                                      \
    static void pv_##rr##x##nv##_##t(const float *p, const void *v, size_t d, int n,               \
                                     ptrdiff_t ahead, float *o, size_t ldo)                        \
    {                                                                                              \
        pv_run(rr, nv, T, p, v, d, n, ahead, o, ldo);                                              \
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

/* O[rows][d] += P[rows][n] V[n][d]; ahead: bytes to the values that come next. */
static inline void tile_pv(const float *p, int rows, const void *v, tm_dtype t, int d, int n,
                           ptrdiff_t ahead, float *o, size_t ldo)
{
    int shape = 0;
    for (int r = 0; r < rows; r += g_pv[shape].rows) {
        while (g_pv[shape].rows > rows - r)
            shape++;
        const float *pr = p + (size_t)r * S_STRIDE;
        float *out = o + (size_t)r * ldo;
        int c = 0;
        while (c + VW <= d) {
            bool full = c + g_pv[shape].vectors * VW <= d;
            const char *vc = (const char *)v + (size_t)c * tm_dtype_size(t);
            (full ? g_pv[shape].full : g_pv[shape].one)[t](pr, vc, (size_t)d, n, ahead, out + c,
                                                           ldo);
            c += full ? g_pv[shape].vectors * VW : VW;
        }
        for (int i = 0; c < d && i < g_pv[shape].rows; i++)
            pv_tail(t, pr + i * S_STRIDE, v, (size_t)d, n, out + (size_t)i * ldo, (size_t)c);
    }
}

#endif
