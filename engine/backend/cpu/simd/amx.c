/* out[T,N] = x[T,K] W^T + bias on Intel's matrix tiles (AMX, bf16), for bf16 weights in their own row-major layout.
 *
 * A tile product takes bf16 factors and adds in f32. The weights are bf16 already; x is cut into three bf16 parts
 * of 8 significant bits each, high, middle and low, whose sum is x itself. So three tile products give the product
 * of the f32 activations: nothing is rounded but the sums.
 *
 *   out^T (16 rows of W x 16 tokens) += W (16 rows x 32 of K) * part^T (32 of K x 16 tokens)
 *
 * W is the left factor, so its tiles are loaded as they lie in memory: 16 rows, a cache line of each. The parts of x
 * are packed once per call into the pairs that the right factor wants. Four tiles of sums are under way at a time: a
 * product takes 16 cycles, but its sum is there after 52.
 *
 * Every column of a tile is computed by itself and over K in order, so an output element is bit-equal in every batch
 * that comes here. Fewer than TOKENS_LEAST tokens take the AVX-512 path, as do other types of weights and sizes that
 * fill no tiles; its sums are rounded in another order. */
#include <immintrin.h>
#include <string.h>

#include "common/check.h"
#include "engine/backend/cpu/cpu.h"
#include "engine/backend/cpu/simd/simd.h"

enum {
    ROWS = 16,  /* of W in a tile, and tokens in a tile */
    DEPTH = 32, /* of K in a tile */
    TILE_BYTES = 1024,
    TOKENS_LEAST = 16, /* fewer are bound by memory, which AVX-512 follows better */
    PARTS = 3,
    GROUPS_MAX = 4, /* tiles of rows in a unit */
    UNITS_PER_THREAD = 4,
    CHUNK_BLOCKS = 8 /* tiles of tokens that a unit runs through: their parts stay in L2 */
};

/* Tiles 0-3 hold sums, 4-6 the parts of x, 7 weights. */
typedef struct __attribute__((packed)) tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} tile_config;

typedef struct amx_task {
    const tm_linear_args *a;
    char *packed; /* [blocks of 16 tokens][K / 32][3 parts] tiles */
    size_t block_bytes;
    int blocks, unit_rows, row_units;
} amx_task;

static void configure(void)
{
    tile_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.bytes_per_row[i] = 64;
        c.rows[i] = 16;
    }
    _tile_loadconfig(&c);
}

/* Rows and columns of 16 x 16 values of 32 bits change places. */
TM_INLINE void transpose(__m512i r[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]),
                b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]);
        __m512i d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    /* t[4g + j] holds, in its 128-bit lane L, column 4L + j of rows 4g .. 4g + 3. */
    for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88);
        __m512i b = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
        __m512i d = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
        r[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        r[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        r[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

/* The upper halves of 32 floats, in order: bf16 cut off, not rounded, so that the rest is exact. */
TM_INLINE __m512i upper_halves(__m512 a, __m512 b)
{
    const __m512i odd =
        _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                         25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(_mm512_castps_si512(a), odd, _mm512_castps_si512(b));
}

TM_INLINE __m512 rest(__m512 x)
{
    const __m512i mask = _mm512_set1_epi32((int)0xffff0000);
    return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), mask)));
}

/* Tokens of one block; those beyond T are zeros. */
static void pack_block(void *arg, int thread, int block)
{
    const amx_task *m = arg;
    const tm_linear_args *a = m->a;
    char *out = m->packed + (size_t)block * m->block_bytes;
    int n = TM_MIN(ROWS, a->n_tokens - block * ROWS);
    (void)thread;
    for (int k = 0; k < a->w->k; k += DEPTH, out += PARTS * TILE_BYTES) {
        const float *x = (const float *)a->x + (size_t)block * ROWS * (size_t)a->ldx + k;
        __m512i part[PARTS][ROWS];
        for (int t = 0; t < ROWS; t++) {
            __m512 lo = _mm512_setzero_ps(), hi = lo;
            if (t < n) {
                lo = _mm512_loadu_ps(x + (size_t)t * (size_t)a->ldx);
                hi = _mm512_loadu_ps(x + (size_t)t * (size_t)a->ldx + 16);
            }
            for (int p = 0; p < PARTS; p++) {
                part[p][t] = upper_halves(lo, hi);
                lo = rest(lo);
                hi = rest(hi);
            }
        }
        for (int p = 0; p < PARTS; p++) {
            transpose(part[p]);
            for (int i = 0; i < ROWS; i++)
                _mm512_store_si512(out + p * TILE_BYTES + i * 64, part[p][i]);
        }
    }
}

/* sums[row of W][token] to out[token][row of W]. */
static void put(const amx_task *m, const float *sums, int n0, int t0)
{
    const tm_linear_args *a = m->a;
    int n = TM_MIN(ROWS, a->n_tokens - t0);
    const float *bias = a->w->bias ? a->w->bias + n0 : NULL;
    float *out = (float *)a->out + (size_t)t0 * (size_t)a->ldo + n0;
    __m512i v[ROWS];
    for (int i = 0; i < ROWS; i++)
        v[i] = _mm512_loadu_si512(sums + i * ROWS);
    transpose(v);
    for (int t = 0; t < n; t++) {
        __m512 s = _mm512_castsi512_ps(v[t]);
        if (bias)
            s = _mm512_add_ps(s, _mm512_loadu_ps(bias));
        _mm512_storeu_ps(out + (size_t)t * (size_t)a->ldo, s);
    }
}

/* The sums' tile C of this part of x; its weights go through tile A. Numbers of tiles are literals. */
#define TM_AMX_PRODUCT(C, A)                                                                       \
    do {                                                                                           \
        if (groups > (C)) {                                                                        \
            _tile_loadd(A, w + (C)*apart, stride);                                                 \
            _tile_dpbf16ps(C, A, 4);                                                               \
        }                                                                                          \
    } while (0)

/* `groups` tiles of rows from n0 against the tokens of one block: sums in 0-3, x in 4, weights in 5-7. */
TM_INLINE void run_block(const amx_task *m, const int groups, int n0, int block)
{
    const tm_weight *wt = m->a->w;
    const size_t stride = (size_t)wt->k * 2, apart = ROWS * stride;
    const char *w = (const char *)wt->data + (size_t)n0 * stride;
    const char *x = m->packed + (size_t)block * m->block_bytes;
    float sums[GROUPS_MAX][ROWS * ROWS] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < wt->k; k += DEPTH, w += 64) {
        for (int p = 0; p < PARTS; p++, x += TILE_BYTES) {
            _tile_loadd(4, x, 64);
            TM_AMX_PRODUCT(0, 5);
            TM_AMX_PRODUCT(1, 6);
            TM_AMX_PRODUCT(2, 7);
            TM_AMX_PRODUCT(3, 5);
        }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (int g = 0; g < groups; g++)
        put(m, sums[g], n0 + g * ROWS, block * ROWS);
}

/* Two tiles of rows against two blocks of tokens: half the loads for each product. fetch: the rows behind these are
 * wanted next. */
static void run_square(const amx_task *m, int n0, int block, bool fetch)
{
    const tm_weight *wt = m->a->w;
    const size_t stride = (size_t)wt->k * 2, apart = ROWS * stride;
    const char *w = (const char *)wt->data + (size_t)n0 * stride;
    const char *x0 = m->packed + (size_t)block * m->block_bytes, *x1 = x0 + m->block_bytes;
    float sums[4][ROWS * ROWS] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < wt->k; k += DEPTH, w += 64) {
        for (size_t r = 2 * ROWS; fetch && r < 4 * ROWS; r++)
            _mm_prefetch(w + r * stride, _MM_HINT_T0);
        _tile_loadd(4, w, stride);
        _tile_loadd(5, w + apart, stride);
        for (int p = 0; p < PARTS; p++, x0 += TILE_BYTES, x1 += TILE_BYTES) {
            _tile_loadd(6, x0, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            _tile_loadd(7, x1, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (int i = 0; i < 4; i++)
        put(m, sums[i], n0 + i / 2 * ROWS, (block + i % 2) * ROWS);
}

/* A panel of rows from n0 to end against one block of tokens. */
static void run_rows(const amx_task *m, int n0, int end, int block)
{
    for (; end - n0 >= 4 * ROWS; n0 += 4 * ROWS)
        run_block(m, 4, n0, block);
    for (; n0 < end; n0 += ROWS)
        run_block(m, 1, n0, block);
}

/* A unit's rows against a chunk of tokens. */
static void run_unit(void *arg, int thread, int unit)
{
    const amx_task *m = arg;
    int n0 = unit % m->row_units * m->unit_rows, end = TM_MIN(n0 + m->unit_rows, m->a->w->n);
    int first = unit / m->row_units * CHUNK_BLOCKS, last = TM_MIN(first + CHUNK_BLOCKS, m->blocks);
    (void)thread;
    configure();
    for (int n = n0; n < end; n += GROUPS_MAX * ROWS) {
        int b = first, stop = TM_MIN(n + GROUPS_MAX * ROWS, end);
        for (; b + 2 <= last; b += 2) {
            int r = n;
            for (; r + 2 * ROWS <= stop; r += 2 * ROWS)
                run_square(m, r, b, b == first && r + 4 * ROWS <= end);
            for (int odd = b; r < stop && odd < b + 2; odd++)
                run_rows(m, r, stop, odd);
        }
        if (b < last)
            run_rows(m, n, stop, b);
    }
    _tile_release();
}

static tm_status amx_linear(tm_device *dev, const tm_linear_args *a)
{
    const tm_weight *w = a->w;
    if (w->dtype != TM_DTYPE_BF16 || w->n % ROWS != 0 || w->k % DEPTH != 0 ||
        a->n_tokens < TOKENS_LEAST)
        return TM_ISA(linear)(dev, a);
    amx_task m = {.a = a, .blocks = (a->n_tokens + ROWS - 1) / ROWS};
    int panel = GROUPS_MAX * ROWS;
    m.unit_rows = w->n >= panel * dev->threads * UNITS_PER_THREAD ? panel : 2 * ROWS;
    m.row_units = (w->n + m.unit_rows - 1) / m.unit_rows;
    m.block_bytes = (size_t)w->k / DEPTH * PARTS * TILE_BYTES;
    m.packed = tm_cpu_scratch(dev, (size_t)m.blocks * m.block_bytes);
    if (!m.packed)
        return TM_STATUS_NO_MEMORY;
    tm_cpu_run(dev, m.blocks, pack_block, &m);
    int chunks = (m.blocks + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS;
    tm_cpu_run(dev, chunks * m.row_units, run_unit, &m);
    return TM_OK;
}

const tm_op_table tm_cpu_amx_ops = {
    .linear_prepare = tm_cpu_linear_prepare,
    .linear_release = tm_cpu_linear_release,
    .embed = TM_ISA(embed),
    .norm = TM_ISA(norm),
    .linear = amx_linear,
    .rope_append = TM_ISA(rope_append),
    .attention_prefill = TM_ISA(attention_prefill),
    .attention_decode = TM_ISA(attention_decode),
    .act = TM_ISA(act),
    .gather_rows = tm_cpu_ref_gather_rows,
};
