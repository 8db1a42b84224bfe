/* out[T,N] = x[T,K] W^T + bias, from bf16, f16 or f32 weights in their own row-major layout.
 *
 * One parallel region: the rows of W are cut into equal static shares of whole tiles; when there are more
 * threads than shares and many tokens, the tokens are cut too. Within a share:
 *
 *   for panel of W rows (stays in L2) : for block of K : for TT tokens (stay in L1) : for RR rows : tile
 *
 * so W is read from memory once whatever T is, also for T of 2 to 8. Each tile fetches the next one's rows
 * ahead; at T = 1 a panel is one tile and the weights stream at the speed of memory.
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
    ROW_UNIT = 24,    /* a share of W rows is a multiple of this: every RR below divides it */
    PANEL_ROWS = 96,  /* 96 rows x 1024 x 2 bytes = 192 KiB of L2 */
    TOKENS_SPLIT = 64 /* tokens per thread below which the tokens are not cut */
};

TM_TILE(1, 8)
TM_TILE(3, 4)
#ifdef __AVX512F__
TM_TILE(2, 8)
TM_TILE(4, 6)
TM_TILE(6, 4)
#else
TM_TILE(2, 6)
TM_TILE(4, 3)
#endif

typedef struct tile_shape {
    int tokens, rows;
    tile_fn fn[TM_DTYPE_COUNT];
} tile_shape;

/* Most tokens first: a step takes the first shape that still fits. */
static const tile_shape g_shapes[] = {
#ifdef __AVX512F__
    {6, 4, TM_TILE_ROW(6, 4)}, {4, 6, TM_TILE_ROW(4, 6)},
    {3, 4, TM_TILE_ROW(3, 4)}, {2, 8, TM_TILE_ROW(2, 8)},
#else
    {4, 3, TM_TILE_ROW(4, 3)},
    {3, 4, TM_TILE_ROW(3, 4)},
    {2, 6, TM_TILE_ROW(2, 6)},
#endif
    {1, 8, TM_TILE_ROW(1, 8)},
};

typedef struct linear_task {
    const tm_linear_args *a;
    int k_block;   /* length of a block of K, the last may be shorter */
    int panel;     /* rows of W per panel */
    int row_parts; /* threads = row_parts x token_parts, row_parts first */
    int token_parts;
} linear_task;

/* Rows n0..n1 of W times `s->tokens` tokens from t, block of K from k0. */
static void run_rows(const linear_task *l, const tile_shape *s, int t, int n0, int n1, int k0)
{
    const tm_linear_args *a = l->a;
    const tm_weight *w = a->w;
    int k1 = TM_MIN(k0 + l->k_block, w->k);
    bool last = k1 == w->k;
    size_t size = tm_dtype_size(w->dtype);
    /* The tile after this one: the next block of K of the same rows, or the next rows from their start. */
    ptrdiff_t ahead = last ? (ptrdiff_t)s->rows * w->k - k0 : k1 - k0;
    tile_args g = {
        .x = (const float *)a->x + (size_t)t * (size_t)a->ldx + k0,
        .ldx = (size_t)a->ldx,
        .w = (const char *)w->data + ((size_t)n0 * (size_t)w->k + (size_t)k0) * size,
        .ldw = (size_t)w->k,
        .k = k1 - k0,
        .out = (float *)a->out + (size_t)t * (size_t)a->ldo + n0,
        .ldo = (size_t)a->ldo,
        .bias = last && w->bias ? w->bias + n0 : NULL,
        .add = k0 > 0,
        .ahead = ahead * (ptrdiff_t)size,
    };
    s->fn[w->dtype](&g, n1 - n0);
}

/* Splits n into `parts` shares of whole units; share i is [*from, *to). */
static void share(int n, int unit, int parts, int i, int *from, int *to)
{
    int units = (n + unit - 1) / unit;
    int64_t a = (int64_t)units * i / parts, b = (int64_t)units * (i + 1) / parts;
    *from = TM_MIN((int)a * unit, n);
    *to = TM_MIN((int)b * unit, n);
}

static void linear_thread(void *arg, int thread, int threads)
{
    const linear_task *l = arg;
    const tm_linear_args *a = l->a;
    int n0, n1, t0, t1;
    TM_ASSERT(threads == 1 || threads >= l->row_parts * l->token_parts);
    if (thread >= l->row_parts * l->token_parts)
        return;
    share(a->w->n, ROW_UNIT, l->row_parts, thread % l->row_parts, &n0, &n1);
    share(a->n_tokens, 12, l->token_parts, thread / l->row_parts, &t0, &t1);
    for (int p = n0; p < n1; p += l->panel) {
        int end = TM_MIN(p + l->panel, n1);
        for (int k = 0; k < a->w->k; k += l->k_block) {
            const tile_shape *s = g_shapes;
            for (int t = t0; t < t1; t += s->tokens) {
                while (s->tokens > t1 - t)
                    s++;
                run_rows(l, s, t, p, end, k);
            }
        }
    }
}

tm_status TM_ISA(linear)(tm_device *dev, const tm_linear_args *a)
{
    if (a->n_tokens == 0)
        return TM_OK;
    int blocks = (a->w->k + K_BLOCK - 1) / K_BLOCK;
    int k_block = ((a->w->k + blocks - 1) / blocks + 31) / 32 * 32;
    linear_task l = {.a = a, .k_block = k_block, .token_parts = 1};
    l.panel = a->n_tokens == 1 ? 8 : a->n_tokens <= 8 ? ROW_UNIT : PANEL_ROWS;
    int units = (a->w->n + ROW_UNIT - 1) / ROW_UNIT;
    l.row_parts = TM_MIN(dev->threads, units);
    if (l.row_parts < dev->threads)
        l.token_parts = TM_MAX(1, TM_MIN(dev->threads / l.row_parts, a->n_tokens / TOKENS_SPLIT));
    /* A join costs about as much as reading 32 KiB of weights. */
    bool small = (int64_t)a->w->n * a->w->k * a->n_tokens < 16 * 1024;
    if (small)
        l.row_parts = l.token_parts = 1;
    tm_cpu_run(small ? 1 : dev->threads, linear_thread, &l);
    return TM_OK;
}
