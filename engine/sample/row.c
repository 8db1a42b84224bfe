/* Row loops: maxima, exponentials, the largest k, and cuts by count or mass.
 *
 * The cuts are a radix selection over the bit patterns of the weights: non-negative floats order as their
 * bits do, so three histograms of 1024 bins (count and mass together) find the boundary exactly, in linear
 * time for any input. Sorting would be simpler and is what makes top-p slow elsewhere; a heap works for
 * top-k only.
 *
 * Four-lane GCC vectors instead of intrinsics: the loops are bound by memory, and one source serves every
 * processor. */
#include "engine/sample/row.h"

#include <math.h>
#include <string.h>

#include "common/check.h"

typedef float v4 __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));

#define LANES 4

static inline v4 load(const float *x)
{
    v4 v;
    memcpy(&v, x, sizeof(v));
    return v;
}

static inline v4 splat(float x)
{
    return (v4){x, x, x, x};
}

static inline v4 choose(v4i mask, v4 yes, v4 no)
{
    return (v4)((mask & (v4i)yes) | (~mask & (v4i)no));
}

/* NaN in b loses. */
static inline v4 larger(v4 a, v4 b)
{
    return choose(b > a, b, a);
}

float tm_row_max(const float *x, int n)
{
    v4 m[4];
    for (int j = 0; j < 4; j++)
        m[j] = splat(-INFINITY);
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 4; j++)
            m[j] = larger(m[j], load(x + i + LANES * j));
    v4 all = larger(larger(m[0], m[1]), larger(m[2], m[3]));
    float best = -INFINITY;
    for (int j = 0; j < LANES; j++)
        best = all[j] > best ? all[j] : best;
    for (; i < n; i++)
        best = x[i] > best ? x[i] : best;
    return best;
}

/* One pass: the maximum of each stretch, and at the end a look for its place in the best stretch. */
int tm_row_argmax(const float *x, int n, float *max)
{
    enum { STRETCH = 512 };
    float best = -INFINITY;
    int from = 0;
    for (int i = 0; i < n; i += STRETCH) {
        float m = tm_row_max(x + i, TM_MIN(STRETCH, n - i));
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

/* Range reduction x = k ln2 + r, |r| <= ln2/2, a polynomial of degree 6 for exp(r), and k into the exponent. */
static inline v4 exp4(v4 x)
{
    v4i low = ~(x >= splat(-87.0f)); /* true for NaN too */
    v4 safe = choose(low, splat(-87.0f), x);
    const v4 shift = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    v4 k = safe * splat(1.44269504088896341f) + shift;
    v4i exponent = ((v4i)k - (v4i)shift + 127) << 23;
    k -= shift;
    v4 r = safe - k * splat(0.693359375f) - k * splat(-2.12194440e-4f);
    v4 p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    return choose(low, splat(0.0f), p * (v4)exponent);
}

float tm_row_exp(float x)
{
    return exp4(splat(x))[0];
}

/* One block of at most TM_ROW_BLOCK values. */
static float block_weights(const float *x, int n, float max, float scale, float *w, float *top)
{
    v4 sum[4], most[4], m = splat(max), s = splat(scale);
    for (int j = 0; j < 4; j++)
        sum[j] = most[j] = splat(0.0f);
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 4; j++) {
            v4 e = exp4((load(x + i + LANES * j) - m) * s);
            memcpy(w + i + LANES * j, &e, sizeof(e));
            sum[j] += e;
            most[j] = larger(most[j], e);
        }
    v4 all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    v4 best = larger(larger(most[0], most[1]), larger(most[2], most[3]));
    float total = (all[0] + all[1]) + (all[2] + all[3]), peak = 0.0f;
    for (int j = 0; j < LANES; j++)
        peak = best[j] > peak ? best[j] : peak;
    for (; i < n; i++) {
        w[i] = tm_row_exp((x[i] - max) * scale);
        total += w[i];
        peak = w[i] > peak ? w[i] : peak;
    }
    *top = peak;
    return total;
}

double tm_row_weights(const float *x, int n, float max, float scale, float *w, float *block_sum,
                      float *block_max)
{
    double total = 0.0;
    for (int b = 0, i = 0; i < n; b++, i += TM_ROW_BLOCK) {
        int len = TM_MIN(TM_ROW_BLOCK, n - i);
        block_sum[b] = block_weights(x + i, len, max, scale, w + i, &block_max[b]);
        total += block_sum[b];
    }
    return total;
}

double tm_row_lse(const float *x, int n, float max)
{
    float w[TM_ROW_BLOCK], top;
    double total = 0.0;
    for (int i = 0; i < n; i += TM_ROW_BLOCK)
        total += block_weights(x + i, TM_MIN(TM_ROW_BLOCK, n - i), max, 1.0f, w, &top);
    return (double)max + log(total);
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
    double mass[RADIX_BINS];
} histogram;

/* Values whose bits above `shift + RADIX_BITS` equal prefix, by their next RADIX_BITS bits. */
static void count_bins(const float *w, int n, uint32_t prefix, int shift, histogram *h)
{
    memset(h, 0, sizeof(*h));
    for (int i = 0; i < n; i++) {
        uint32_t u = bits_of(w[i]);
        if (u >> shift >> RADIX_BITS != prefix)
            continue;
        uint32_t bin = u >> shift & (RADIX_BINS - 1);
        h->count[bin]++;
        h->mass[bin] += (double)w[i];
    }
}

/* Goes down the bins until count or mass is reached; what lies above is added to *count and *mass. When rounding
 * keeps the target out of reach, the lowest filled bin it is. */
static int find_bin(const histogram *h, int want_count, double want_mass, int *count, double *mass)
{
    int last = -1, last_count = 0;
    double last_mass = 0.0;
    for (int bin = RADIX_BINS - 1; bin >= 0; bin--) {
        if (!h->count[bin])
            continue;
        last = bin;
        last_count = *count;
        last_mass = *mass;
        if (*count + h->count[bin] >= want_count || *mass + h->mass[bin] >= want_mass)
            return bin;
        *count += h->count[bin];
        *mass += h->mass[bin];
    }
    *count = last_count;
    *mass = last_mass;
    return last;
}

static tm_row_cut cut(const float *w, int n, int want_count, double want_mass)
{
    histogram h;
    uint32_t prefix = 0;
    int count = 0, equal = 0;
    double mass = 0.0;
    for (int shift = 2 * RADIX_BITS; shift >= 0; shift -= RADIX_BITS) {
        count_bins(w, n, prefix, shift, &h);
        int bin = find_bin(&h, want_count, want_mass, &count, &mass);
        TM_ASSERT(bin >= 0);
        prefix = prefix << RADIX_BITS | (uint32_t)bin;
        equal = h.count[bin];
    }
    tm_row_cut c;
    memcpy(&c.least, &prefix, sizeof(c.least));
    double by_mass = c.least > 0.0f ? ceil((want_mass - mass) / (double)c.least) : (double)equal;
    double ties = TM_MIN((double)(want_count - count), by_mass);
    c.ties = ties < 1.0 ? 1 : ties > (double)equal ? equal : (int)ties;
    return c;
}

tm_row_cut tm_row_cut_count(const float *w, int n, int k)
{
    return cut(w, n, TM_MAX(k, 1), INFINITY);
}

tm_row_cut tm_row_cut_mass(const float *w, int n, double mass)
{
    return cut(w, n, n + 1, mass);
}
