/* out[T,N] = x[T,K] W^T + bias, from bf16, f16 or f32 weights in their own row-major layout.
 *
 * Two ways, by the number of tokens, each one parallel loop over units of rows of W:
 *
 *   few:   for row of a quarter of a thread's share : for TT tokens : for block of K : tile
 *          A tile takes one row of each quarter (or third), so W is read from memory once, as a few long
 *          sequential streams: what prefetchers follow best (twice the speed of neighbouring rows).
 *   many:  for block of K : widen the rows to f32 in L2 : for TT tokens (stay in L1)
 *          : for RR rows : tile
 *          The conversion competes with the multipliers for ports; here it is done once per weight.
 *
 * K is cut into equal blocks of at most K_BLOCK; each block's dot product (see tile.h) is added to the
 * output in order. So an output element depends on its row of x and of W alone: it is bit-equal alone, in
 * a batch, in a prefill chunk, and on any number of threads (per instruction set and dtype).
 *
 * A bf16 dot product instruction (vdpbf16ps) is not used: it would round x to bf16, and where decoding is
 * bound by memory the conversion costs nothing. */
#include "common/check.h"
#include "engine/backend/cpu/cpu.h"
#include "engine/backend/cpu/simd/simd.h"
#include "engine/backend/cpu/simd/tile.h"

enum {
    K_BLOCK = 1024,
    ROW_UNIT = 24, /* the rows of a unit are a multiple of this: whole tiles */
    UNITS_PER_THREAD = 8,
    WIDEN_TOKENS = 24,       /* from here on panels are widened */
    STREAM_AHEAD = 1024,     /* bytes fetched ahead in each stream */
    STREAM_BYTES = 64 << 10, /* of a unit */
    PANEL_ROWS = 48,
    PANEL_BYTES = 288 << 10, /* of f32; leaves room in an L2 of 512 KiB */
    TOKENS_LEAST = 60        /* of a unit, when the tokens are cut */
};

/* TT rows of x against rows of w. */
typedef struct rows_args {
    const float *x;
    size_t ldx;
    const void *w;
    size_t ldw; /* in elements */
    int k;
    int k_block; /* sums of so many elements are added to out in order */
    float *out;
    size_t ldo;
    const float *bias;
    bool add; /* to what is in out */
} rows_args;

/* Tiles from `row` on; the rows of a tile are `apart` from each other. */
typedef void (*rows_fn)(const rows_args *a, int row, int tiles, int apart);

/* Reads and writes n of four neighbours; n is 1, 3 or 4. */
TM_INLINE __m128 load_lanes(const float *p, const int n)
{
    if (n == 4)
        return _mm_loadu_ps(p);
    if (n == 1)
        return _mm_load_ss(p);
    return _mm_movelh_ps(_mm_loadl_pi(_mm_setzero_ps(), (const __m64 *)p), _mm_load_ss(p + 2));
}

TM_INLINE void store_lanes(float *p, __m128 v, const int n)
{
    if (n == 4) {
        _mm_storeu_ps(p, v);
        return;
    }
    if (n == 3)
        _mm_storel_pi((__m64 *)p, v);
    _mm_store_ss(p + n - 1, n == 3 ? _mm_movehl_ps(v, v) : v);
}

TM_INLINE void put_sums(const int RR, __m128 s, float *out, const float *bias, bool add, int apart)
{
    if (apart == 1) {
        s = add ? _mm_add_ps(load_lanes(out, RR), s) : s;
        store_lanes(out, bias ? _mm_add_ps(s, load_lanes(bias, RR)) : s, RR);
        return;
    }
    float sum[4];
    _mm_storeu_ps(sum, s);
#pragma GCC unroll 4
    for (int r = 0; r < RR; r++) {
        size_t at = (size_t)r * (size_t)apart;
        float v = add ? out[at] + sum[r] : sum[r];
        out[at] = bias ? v + bias[at] : v;
    }
}

TM_INLINE void run_tile(const int TT, const int RR, const tm_dtype dt, const rows_args *a, int row,
                        int apart)
{
    const size_t size = dt == TM_DTYPE_F32 ? 4 : 2;
    for (int k = 0; k < a->k; k += a->k_block) {
        vf acc[6][8];
        tile_args g = {
            .x = a->x + k,
            .ldx = a->ldx,
            .w = (const char *)a->w + ((size_t)row * a->ldw + (size_t)k) * size,
            .ldw = a->ldw * (size_t)apart,
            .k = TM_MIN(a->k_block, a->k - k),
            .ahead = STREAM_AHEAD,
        };
        tile_sum(TT, RR, dt, dt != TM_DTYPE_F32, &g, acc); /* f32 is mostly a panel in L2 */
        const float *bias = a->bias && k + a->k_block >= a->k ? a->bias + row : NULL;
#pragma GCC unroll 8
        for (int t = 0; t < TT; t++)
            put_sums(RR,
                     vf_hsum4(acc[t][0], acc[t][RR > 1 ? 1 : 0], acc[t][RR > 2 ? 2 : 0],
                              acc[t][RR > 3 ? 3 : 0]),
                     a->out + (size_t)t * a->ldo + row, bias, a->add || k > 0, apart);
    }
}

TM_INLINE void run_rows(const int TT, const int RR, const tm_dtype dt, const rows_args *a, int row,
                        int tiles, int apart)
{
    for (int i = 0; i < tiles; i++)
        run_tile(TT, RR, dt, a, apart == 1 ? row + i * RR : row + i, apart);
}

/* rows_1x4_bf16 and so on. */
#define TM_ROWS_T(tt, rr, t, T)                                                                    \
    static void rows_##tt##x##rr##_##t(const rows_args *a, int row, int tiles, int apart)          \
    {                                                                                              \
        run_rows(tt, rr, T, a, row, tiles, apart);                                                 \
    }
#define TM_ROWS(tt, rr)                                                                            \
    TM_ROWS_T(tt, rr, f32, TM_DTYPE_F32)                                                           \
    TM_ROWS_T(tt, rr, bf16, TM_DTYPE_BF16)                                                         \
    TM_ROWS_T(tt, rr, f16, TM_DTYPE_F16)
#define TM_ROWS_ROW(tt, rr)                                                                        \
    {                                                                                              \
        rows_##tt##x##rr##_f32, rows_##tt##x##rr##_bf16, rows_##tt##x##rr##_f16                    \
    }

typedef struct tile_shape {
    int tokens, rows;
    rows_fn fn[TM_DTYPE_COUNT];
} tile_shape;

TM_ROWS(1, 1)
TM_ROWS(1, 4)
TM_ROWS(2, 4)
TM_ROWS(3, 4)
#ifdef __AVX512F__
TM_ROWS(4, 4)
TM_ROWS(6, 4)
#else
TM_ROWS(1, 3)
TM_ROWS(2, 3)
TM_ROWS(3, 3)
TM_ROWS(4, 3)
#endif

/* Most tokens first: a step takes the first shape that still fits. All shapes of streams take as many rows. */
static const tile_shape g_stream4[] = {
#ifdef __AVX512F__
    {6, 4, TM_ROWS_ROW(6, 4)}, {4, 4, TM_ROWS_ROW(4, 4)},
#endif
    {3, 4, TM_ROWS_ROW(3, 4)}, {2, 4, TM_ROWS_ROW(2, 4)}, {1, 4, TM_ROWS_ROW(1, 4)},
};

#ifndef __AVX512F__
/* Fewer registers: four tokens go with three rows. */
static const tile_shape g_stream3[] = {
    {4, 3, TM_ROWS_ROW(4, 3)},
    {3, 3, TM_ROWS_ROW(3, 3)},
    {2, 3, TM_ROWS_ROW(2, 3)},
    {1, 3, TM_ROWS_ROW(1, 3)},
};
#endif

static const tile_shape g_panel[] = {
#ifdef __AVX512F__
    {6, 4, {rows_6x4_f32}}, {4, 4, {rows_4x4_f32}},
#else
    {4, 3, {rows_4x3_f32}},
#endif
    {3, 4, {rows_3x4_f32}}, {2, 4, {rows_2x4_f32}}, {1, 4, {rows_1x4_f32}},
};

/* The shapes that fill most tiles. */
static const tile_shape *stream_shapes(int tokens)
{
#ifndef __AVX512F__
    if (tokens > 3 && (tokens % 4 == 0 || tokens % 4 == 3))
        return g_stream3;
#endif
    (void)tokens;
    return g_stream4;
}

static const rows_fn g_one[] = TM_ROWS_ROW(1, 1);

typedef struct linear_task {
    const tm_linear_args *a;
    int k_block; /* length of a block of K, the last may be shorter */
    const tile_shape *shapes;
    /* Few tokens: units of tiles of a thread's share of the rows, which lie along the same streams. */
    int shares, share_units;
    /* Many: units of rows and tokens. */
    int rows, tokens, row_units;
    float *wide; /* per thread rows x k_block */
} linear_task;

/* A part of the output. */
typedef struct part {
    int n0, n1, t0, t1;
} part;

/* From token t and row n on. */
static rows_args rows_from(const linear_task *l, int t, int n)
{
    const tm_linear_args *a = l->a;
    const tm_weight *w = a->w;
    size_t at = (size_t)n * (size_t)w->k * tm_dtype_size(w->dtype);
    return (rows_args){
        .x = (const float *)a->x + (size_t)t * (size_t)a->ldx,
        .ldx = (size_t)a->ldx,
        .w = (const char *)w->data + at,
        .ldw = (size_t)w->k,
        .k = w->k,
        .k_block = l->k_block,
        .out = (float *)a->out + (size_t)t * (size_t)a->ldo + n,
        .ldo = (size_t)a->ldo,
        .bias = w->bias ? w->bias + n : NULL,
    };
}

static void step_tokens(rows_args *r, int tokens)
{
    r->x += (size_t)tokens * r->ldx;
    r->out += (size_t)tokens * r->ldo;
}

/* Rows that fill no tile, one token at a time. */
static void run_singly(rows_args r, tm_dtype dt, int tokens, int row, int end)
{
    for (int t = 0; row < end && t < tokens; t++) {
        g_one[dt](&r, row, end - row, 1);
        step_tokens(&r, 1);
    }
}

/* Splits n into `parts` shares of whole units; share i is [*from, *to). */
static void share(int n, int unit, int parts, int i, int *from, int *to)
{
    int units = (n + unit - 1) / unit;
    int64_t a = (int64_t)units * i / parts, b = (int64_t)units * (i + 1) / parts;
    *from = TM_MIN((int)a * unit, n);
    *to = TM_MIN((int)b * unit, n);
}

static void stream_unit(void *arg, int thread, int unit)
{
    const linear_task *l = arg;
    int n0, n1, i, end, tokens = l->a->n_tokens, step = unit % l->share_units;
    (void)thread;
    share(l->a->w->n, ROW_UNIT, l->shares, unit / l->share_units, &n0, &n1);
    int apart = (n1 - n0) / l->shapes->rows;
    share(apart, 1, l->share_units, step, &i, &end);
    rows_args start = rows_from(l, 0, n0);
    tm_dtype dt = l->a->w->dtype;
    /* With one tile of tokens it takes all rows in one call. */
    int tiles = l->shapes->tokens == tokens ? end - i : 1;
    for (; i < end; i += tiles) {
        rows_args r = start;
        const tile_shape *s = l->shapes;
        for (int t = 0; t < tokens; t += s->tokens) {
            while (s->tokens > tokens - t)
                s++;
            s->fn[dt](&r, i, tiles, apart);
            step_tokens(&r, s->tokens);
        }
    }
    if (step == l->share_units - 1)
        run_singly(start, dt, tokens, apart * l->shapes->rows, n1 - n0);
}

/* Copies `streams` rows of k elements as f32; w's and out's are `apart` rows from each other. */
TM_INLINE void widen_rows(const int streams, const tm_dtype dt, const void *w, size_t ldw,
                          size_t apart, int k, float *out)
{
    int i = 0;
    for (; i + VW <= k; i += VW)
#pragma GCC unroll 4
        for (int s = 0; s < streams; s++)
            vf_store(out + (size_t)s * apart * (size_t)k + i,
                     vf_load_t(w, (size_t)s * apart * ldw + (size_t)i, dt));
    for (int s = 0; i < k && s < streams; s++)
        vf_storen(out + (size_t)s * apart * (size_t)k + i,
                  vf_loadn_t(w, (size_t)s * apart * ldw + (size_t)i, dt, k - i), k - i);
}

/* n rows as f32: the values are the same, so are the results. Read in four streams, as above. */
TM_INLINE void widen_panel(const tm_dtype dt, const void *w, size_t ldw, int n, int k, float *out)
{
    const size_t row = ldw * (dt == TM_DTYPE_F32 ? 4 : 2);
    int apart = n / 4;
    for (int r = 0; r < apart; r++)
        widen_rows(4, dt, (const char *)w + (size_t)r * row, ldw, (size_t)apart, k,
                   out + (size_t)r * (size_t)k);
    for (int r = 4 * apart; r < n; r++)
        widen_rows(1, dt, (const char *)w + (size_t)r * row, ldw, 0, k,
                   out + (size_t)r * (size_t)k);
}

static void widen(const tm_weight *w, int n0, int n, int k0, int k, float *out)
{
    size_t at = (size_t)n0 * (size_t)w->k + (size_t)k0, ldw = (size_t)w->k;
    const char *from = (const char *)w->data + at * tm_dtype_size(w->dtype);
    if (w->dtype == TM_DTYPE_BF16)
        widen_panel(TM_DTYPE_BF16, from, ldw, n, k, out);
    else if (w->dtype == TM_DTYPE_F16)
        widen_panel(TM_DTYPE_F16, from, ldw, n, k, out);
    else
        widen_panel(TM_DTYPE_F32, from, ldw, n, k, out);
}

/* The block of K from k0 on. */
static void run_panel(const linear_task *l, const part *p, float *wide, int k0)
{
    const tm_weight *w = l->a->w;
    rows_args r = rows_from(l, p->t0, p->n0);
    int k = TM_MIN(l->k_block, w->k - k0), tokens = p->t1 - p->t0, rows = p->n1 - p->n0;
    widen(w, p->n0, rows, k0, k, wide);
    r.x += k0;
    r.w = wide;
    r.ldw = (size_t)k;
    r.k = k;
    r.add = k0 > 0;
    r.bias = k0 + k == w->k ? r.bias : NULL;
    const tile_shape *s = l->shapes;
    for (int t = 0; t < tokens; t += s->tokens) {
        while (s->tokens > tokens - t)
            s++;
        int tiles = rows / s->rows;
        s->fn[TM_DTYPE_F32](&r, 0, tiles, 1);
        run_singly(r, TM_DTYPE_F32, s->tokens, tiles * s->rows, rows);
        step_tokens(&r, s->tokens);
    }
}

static void panel_unit(void *arg, int thread, int unit)
{
    const linear_task *l = arg;
    const tm_linear_args *a = l->a;
    part p = {.n0 = unit % l->row_units * l->rows, .t0 = unit / l->row_units * l->tokens};
    p.n1 = TM_MIN(p.n0 + l->rows, a->w->n);
    p.t1 = TM_MIN(p.t0 + l->tokens, a->n_tokens);
    float *wide = l->wide + (size_t)thread * (size_t)l->rows * (size_t)l->k_block;
    for (int k = 0; k < a->w->k; k += l->k_block)
        run_panel(l, &p, wide, k);
}

static void linear_streams(tm_device *dev, linear_task *l)
{
    const tm_weight *w = l->a->w;
    size_t bytes = (size_t)w->n * (size_t)w->k * tm_dtype_size(w->dtype);
    l->shapes = stream_shapes(l->a->n_tokens);
    while (l->shapes->tokens > l->a->n_tokens)
        l->shapes++;
    /* A join costs about as much as reading 32 KiB of weights. */
    bool small = bytes * (size_t)l->a->n_tokens < 32 * 1024;
    l->shares = small ? 1 : TM_MIN(dev->threads, (w->n + ROW_UNIT - 1) / ROW_UNIT);
    l->share_units = small ? 1 : (int)(bytes / (size_t)l->shares / STREAM_BYTES) + 1;
    tm_cpu_run(dev, l->shares * l->share_units, stream_unit, l);
}

/* Enough units to share, each a panel that stays in L2. */
static tm_status linear_panels(tm_device *dev, linear_task *l)
{
    int n = l->a->w->n, tokens = l->a->n_tokens;
    int most = PANEL_BYTES / ((int)sizeof(float) * l->k_block);
    int fair = n / (dev->threads * UNITS_PER_THREAD);
    l->rows = TM_MAX(TM_MIN(TM_MIN(most, fair), PANEL_ROWS) / ROW_UNIT * ROW_UNIT, ROW_UNIT);
    l->row_units = (n + l->rows - 1) / l->rows;
    l->tokens = tokens;
    if (l->row_units < dev->threads)
        l->tokens = TM_MAX(TOKENS_LEAST, tokens * l->row_units / dev->threads / 12 * 12);
    l->shapes = g_panel;
    size_t each = (size_t)l->rows * (size_t)l->k_block * sizeof(float);
    l->wide = tm_cpu_scratch(dev, (size_t)dev->threads * each);
    if (!l->wide)
        return TM_STATUS_NO_MEMORY;
    tm_cpu_run(dev, l->row_units * ((tokens + l->tokens - 1) / l->tokens), panel_unit, l);
    return TM_OK;
}

tm_status TM_ISA(linear)(tm_device *dev, const tm_linear_args *a)
{
    if (a->n_tokens == 0)
        return TM_OK;
    int blocks = (a->w->k + K_BLOCK - 1) / K_BLOCK;
    linear_task l = {.a = a, .k_block = ((a->w->k + blocks - 1) / blocks + 31) / 32 * 32};
    if (a->n_tokens >= WIDEN_TOKENS)
        return linear_panels(dev, &l);
    linear_streams(dev, &l);
    return TM_OK;
}
