/* The row loops that live in vector registers, once per width: row_base.c and row_avx2.c include this file with
 * TM_ROW_LANES and TM_ROW_OPS set. GCC vectors instead of intrinsics: one source for every processor.
 *
 * Element i always goes to partial sum i mod 16, and nothing is fused, so every width gives the same bits: a
 * stream that moves to another machine draws from the same weights. */
#include <math.h>
#include <string.h>

#include "common/check.h"
#include "engine/sample/row.h"
#include "engine/sample/row_ops.h"

typedef float vf __attribute__((vector_size(4 * TM_ROW_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * TM_ROW_LANES)));

#define PARTS   16
#define VECTORS (PARTS / TM_ROW_LANES)

static inline vf load(const float *x)
{
    vf v;
    memcpy(&v, x, sizeof(v));
    return v;
}

static inline vf splat(float x)
{
    return x - (vf){0};
}

static inline vf choose(vi mask, vf yes, vf no)
{
    return (vf)((mask & (vi)yes) | (~mask & (vi)no));
}

/* NaN in b loses. */
static inline vf larger(vf a, vf b)
{
    return choose(b > a, b, a);
}

static float row_max(const float *x, int n)
{
    vf m[VECTORS];
    float part[PARTS], best = -INFINITY;
    for (int j = 0; j < VECTORS; j++)
        m[j] = splat(-INFINITY);
    int i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (int j = 0; j < VECTORS; j++)
            m[j] = larger(m[j], load(x + i + TM_ROW_LANES * j));
    memcpy(part, m, sizeof(part));
    for (int j = 0; j < PARTS; j++)
        best = part[j] > best ? part[j] : best;
    for (; i < n; i++)
        best = x[i] > best ? x[i] : best;
    return best;
}

/* Range reduction x = k ln2 + r, |r| <= ln2/2, a polynomial of degree 6 for exp(r), and k into the exponent. */
static inline vf exp_of(vf x)
{
    vi low = ~(x >= splat(-87.0f)); /* true for NaN too */
    vf safe = choose(low, splat(-87.0f), x);
    const vf shift = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vf k = safe * splat(1.44269504088896341f) + shift;
    vi exponent = ((vi)k - (vi)shift + 127) << 23;
    k -= shift;
    vf r = safe - k * splat(0.693359375f) - k * splat(-2.12194440e-4f);
    vf p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    return choose(low, splat(0.0f), p * (vf)exponent);
}

static float one_exp(float x)
{
    return exp_of(splat(x))[0];
}

/* w = exp((x - max) * scale) for one block of at most TM_ROW_BLOCK values; returns the sum. */
static float block_weights(const float *x, int n, float max, float scale, float *w, float *top)
{
    vf sum[VECTORS], most[VECTORS], m = splat(max), s = splat(scale);
    float sums[PARTS], peaks[PARTS], total = 0.0f, peak = 0.0f;
    for (int j = 0; j < VECTORS; j++)
        sum[j] = most[j] = splat(0.0f);
    int i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (int j = 0; j < VECTORS; j++) {
            vf e = exp_of((load(x + i + TM_ROW_LANES * j) - m) * s);
            memcpy(w + i + TM_ROW_LANES * j, &e, sizeof(e));
            sum[j] += e;
            most[j] = larger(most[j], e);
        }
    memcpy(sums, sum, sizeof(sums));
    memcpy(peaks, most, sizeof(peaks));
    for (int j = 0; j < PARTS; j++) {
        total += sums[j];
        peak = peaks[j] > peak ? peaks[j] : peak;
    }
    for (; i < n; i++) {
        w[i] = one_exp((x[i] - max) * scale);
        total += w[i];
        peak = w[i] > peak ? w[i] : peak;
    }
    *top = peak;
    return total;
}

static double row_weights(const float *x, int n, float max, float scale, float *w, float *block_sum,
                          float *block_max)
{
    double total = 0.0;
    for (int b = 0, i = 0; i < n; b++, i += TM_ROW_BLOCK) {
        int len = TM_MIN(TM_ROW_BLOCK, n - i);
        block_sum[b] = block_weights(x + i, len, max, scale, w + i, &block_max[b]);
        total += (double)block_sum[b];
    }
    return total;
}

static double row_sum_exp(const float *x, int n, float max)
{
    float w[TM_ROW_BLOCK], top;
    double total = 0.0;
    for (int i = 0; i < n; i += TM_ROW_BLOCK)
        total += (double)block_weights(x + i, TM_MIN(TM_ROW_BLOCK, n - i), max, 1.0f, w, &top);
    return total;
}

const tm_row_ops TM_ROW_OPS = {row_max, one_exp, row_weights, row_sum_exp};
