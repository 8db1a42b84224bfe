/* Row loops above the vector ones: arg max, the largest k, and cuts by count or mass.
 *
 * The cuts are a radix selection over the bit patterns of the weights: non-negative floats order as their
 * bits do, so three histograms of 1024 bins (count and mass together) find the boundary exactly, in linear
 * time for any input; after the first one only the values of one bin are left. Sorting would be simpler and is
 * what makes top-p slow elsewhere; a heap works for top-k only. */
#include "engine/sample/row.h"

#include <math.h>
#include <string.h>

#include "common/check.h"
#include "engine/sample/mass.h"
#include "engine/sample/row_ops.h"

static const tm_row_ops *ops(void)
{
#ifdef TM_SAMPLE_AVX2
    if (__builtin_cpu_supports("avx2"))
        return &tm_row_avx2;
#endif
    return &tm_row_base;
}

float tm_row_max(const float *x, int n)
{
    return ops()->max(x, n);
}

/* One pass: the maximum of each stretch, and at the end a look for its place in the best stretch. */
int tm_row_argmax(const float *x, int n, float *max)
{
    enum { STRETCH = 512 };
    float best = -INFINITY;
    int from = 0;
    for (int i = 0; i < n; i += STRETCH) {
        float m = ops()->max(x + i, TM_MIN(STRETCH, n - i));
        if (m > best) {
            best = m;
            from = i;
        }
    }
    *max = best;
    for (int i = from; i < n && i < from + STRETCH; i++)
        if (x[i] == best)
            return i;
    return -1;
}

float tm_row_exp(float x)
{
    return ops()->exp(x);
}

uint64_t tm_row_weights(const float *x, int n, float max, float scale, float *w,
                        uint64_t *block_mass, float *block_max)
{
    return ops()->weights(x, n, max, scale, w, block_mass, block_max);
}

double tm_row_lse_of(float max, uint64_t mass)
{
    return (double)max + log((double)mass * TM_MASS_VALUE);
}

double tm_row_lse(const float *x, int n, float max)
{
    return tm_row_lse_of(max, ops()->mass_exp(x, n, max));
}

/* Puts (id, value) into the sorted list, which holds *have <= k entries. */
static void top_insert(int32_t *ids, float *values, int *have, int k, int32_t id, float value)
{
    int at = *have < k ? (*have)++ : k - 1;
    for (; at > 0 && values[at - 1] < value; at--) {
        values[at] = values[at - 1];
        ids[at] = ids[at - 1];
    }
    values[at] = value;
    ids[at] = id;
}

int tm_row_top(const float *x, int n, int k, int32_t *ids, float *values)
{
    int have = 0;
    if (k <= 0)
        return 0;
    for (int i = 0; i < n; i += TM_ROW_BLOCK) {
        int end = TM_MIN(i + TM_ROW_BLOCK, n);
        if (have == k && !(tm_row_max(x + i, end - i) > values[k - 1]))
            continue;
        for (int j = i; j < end; j++)
            if (have < k ? x[j] == x[j] : x[j] > values[k - 1])
                top_insert(ids, values, &have, k, j, x[j]);
    }
    return have;
}

#define RADIX_BITS 10
#define RADIX_BINS (1 << RADIX_BITS)

static inline uint32_t bits_of(float w)
{
    uint32_t u;
    memcpy(&u, &w, sizeof(u));
    return u;
}

typedef struct histogram {
    int count[RADIX_BINS];
    uint64_t mass[RADIX_BINS];
} histogram;

static inline int bin_of(float w, int shift)
{
    return (int)(bits_of(w) >> shift & (RADIX_BINS - 1));
}

static void count_bins(const float *w, int n, int shift, histogram *h)
{
    memset(h, 0, sizeof(*h));
    for (int i = 0; i < n; i++) {
        int bin = bin_of(w[i], shift);
        h->count[bin]++;
        h->mass[bin] += tm_mass_of(w[i]);
    }
}

/* The values of one bin; out may be w. */
static int keep_bin(const float *w, int n, int shift, int bin, float *out)
{
    int kept = 0;
    for (int i = 0; i < n; i++) {
        float v = w[i];
        out[kept] = v;
        kept += bin_of(v, shift) == bin;
    }
    return kept;
}

/* Goes down the bins until count or mass is reached; what lies above is added to *count and *mass. */
static int find_bin(const histogram *h, int want_count, uint64_t want_mass, int *count,
                    uint64_t *mass)
{
    for (int bin = RADIX_BINS - 1; bin >= 0; bin--) {
        if (!h->count[bin])
            continue;
        if (*count + h->count[bin] >= want_count || *mass + h->mass[bin] >= want_mass)
            return bin;
        *count += h->count[bin];
        *mass += h->mass[bin];
    }
    return -1;
}

/* One of the two is within what the values have. */
static tm_row_cut cut(const float *w, int n, int want_count, uint64_t want_mass, float *scratch)
{
    histogram h;
    uint32_t bits = 0;
    int count = 0;
    uint64_t mass = 0;
    for (int shift = 2 * RADIX_BITS; shift >= 0; shift -= RADIX_BITS) {
        count_bins(w, n, shift, &h);
        int bin = find_bin(&h, want_count, want_mass, &count, &mass);
        TM_ASSERT(bin >= 0);
        bits |= (uint32_t)bin << shift;
        n = keep_bin(w, n, shift, bin, scratch);
        w = scratch;
    }
    tm_row_cut c;
    memcpy(&c.least, &bits, sizeof(c.least));
    uint64_t each = tm_mass_of(c.least), ties = (uint64_t)(want_count - count);
    if (each > 0)
        ties = TM_MIN(ties, (want_mass - mass + each - 1) / each);
    c.ties = (int)TM_MIN(ties, (uint64_t)n);
    return c;
}

tm_row_cut tm_row_cut_count(const float *w, int n, int k, float *scratch)
{
    return cut(w, n, TM_MIN(TM_MAX(k, 1), n), UINT64_MAX / 2, scratch);
}

tm_row_cut tm_row_cut_mass(const float *w, int n, uint64_t mass, float *scratch)
{
    return cut(w, n, n + 1, mass, scratch);
}
