/* Attention over the paged cache, prefill and decode, by one blocked kernel ("flash": no score matrix).
 *
 * A unit of work is one kv head of some tokens of one sequence: their rows (token, query head of that kv
 * head) share every key and value that is read. Keys go by in tiles of at most TILE_KEYS inside a block:
 *
 *   S[rows][keys] = q K^T (tile.h) ; softcap, ALiBi, mask ; running max m and sum l ; O = a O + P V
 *
 * Tiles form spans of SPAN_KEYS positions with an (m, l, O) of their own; spans are merged in order at the
 * end. Tile and span limits are absolute positions, so a row's result depends on its q, its position and
 * the cache alone: equal in prefill and decode, alone and in a batch, on any number of threads. Spans are
 * also what a few long decodes are cut into, so that all threads have work.
 *
 * Read per decode step: each key and value once per kv head, in the cache's dtype. With many rows a tile
 * is first widened to f32 in L1/L2, because every row would repeat the conversion. */
#include <limits.h>
#include <math.h>

#include "common/check.h"
#include "engine/backend/cpu/cpu.h"
#include "engine/backend/cpu/simd/attention_tile.h"
#include "engine/backend/cpu/simd/simd.h"

enum {
    SPAN_KEYS = 512,
    ROWS_MAX = 48,  /* rows of a prefill unit; more than that falls out of L2 for d = 128 */
    WIDEN_ROWS = 7, /* from here on a tile is widened first */
};

/* Workspace of one thread; floats. d is padded to whole vectors. */
typedef struct work {
    float *q;                     /* [rows][dp], scaled */
    float *s;                     /* [rows][S_STRIDE] */
    float *o;                     /* [rows][dp] of the span */
    float *sum_o;                 /* [rows][dp] of the spans so far */
    float *keys;                  /* [TILE_KEYS][d] */
    float *values;                /* [TILE_KEYS][d] */
    float *m, *l, *sum_m, *sum_l; /* [rows] */
} work;

typedef struct attn_task {
    const tm_attention_args *a;
    int group;    /* query heads per kv head */
    int rows_max; /* rows of a unit at most */
    int tokens;   /* tokens of a unit at most */
    int span;     /* positions per span, whole blocks */
    size_t dp;    /* padded d */
    float *scratch;
    size_t scratch_floats; /* per thread */
    int first_seq, end_seq;
    int64_t n_units;
    /* Long decodes: partial results of every (sequence, kv head, span). */
    int max_spans; /* 0: spans are merged as they come */
    float *partial;
} attn_task;

typedef struct unit {
    int seq, kv_head, t0, n_tokens; /* rows t0 .. t0 + n_tokens of the batch */
    int rows;
    const int32_t *blocks;
} unit;

static float *carve(float **at, size_t n)
{
    float *p = *at;
    *at += (n + 15) / 16 * 16;
    return p;
}

static work carve_work(float *at, size_t rows, size_t dp, size_t d)
{
    work w;
    w.q = carve(&at, rows * dp);
    w.s = carve(&at, rows * S_STRIDE);
    w.o = carve(&at, rows * dp);
    w.sum_o = carve(&at, rows * dp);
    w.keys = carve(&at, TILE_KEYS * d);
    w.values = carve(&at, TILE_KEYS * d);
    w.m = carve(&at, rows);
    w.l = carve(&at, rows);
    w.sum_m = carve(&at, rows);
    w.sum_l = carve(&at, rows);
    return w;
}

static size_t work_floats(size_t rows, size_t dp, size_t d)
{
    return 3 * (rows * dp + 16) + rows * S_STRIDE + 16 + 2 * (TILE_KEYS * d + 16) + 4 * (rows + 16);
}

static int row_pos(const attn_task *x, const unit *u, int row)
{
    return x->a->batch->positions[u->t0 + row / x->group];
}

static void load_queries(const attn_task *x, const unit *u, const work *w)
{
    const tm_attention_args *a = x->a;
    size_t d = (size_t)a->head_dim;
    size_t stride = ((size_t)a->n_heads + 2 * (size_t)a->n_kv_heads) * d;
    for (int r = 0; r < u->rows; r++) {
        int head = u->kv_head * x->group + r % x->group;
        const float *q =
            (const float *)a->qkv + (size_t)(u->t0 + r / x->group) * stride + (size_t)head * d;
        for (size_t i = 0; i < d; i++)
            w->q[(size_t)r * x->dp + i] = q[i] * a->scale;
    }
}

/* Turns a row of scores at positions j0.. into probabilities against the new running maximum; the rest of
 * the row becomes 0. Rescales the row of O when the maximum grew. */
static void softmax_row(const attn_task *x, const unit *u, const work *w, int row, int j0, int n)
{
    const tm_attention_args *a = x->a;
    int pos = row_pos(x, u, row);
    score_mask k = {
        .lo = a->window > 0 ? TM_MAX(0, pos - a->window + 1 - j0) : 0,
        .hi = TM_MIN(n, pos + 1 - j0),
        .n = n,
        .softcap = a->softcap,
        .slope = a->alibi ? a->alibi[u->kv_head * x->group + row % x->group] : 0.0f,
        .distance = (float)(j0 - pos),
    };
    float *s = w->s + (size_t)row * S_STRIDE;
    if (k.lo >= k.hi) {
        memset(s, 0, (size_t)n * sizeof *s);
        return;
    }
    float m = fmaxf(w->m[row], tile_scores(&k, s));
    if (m > w->m[row]) {
        float alpha = w->m[row] == -INFINITY ? 0.0f : tile_exp1(w->m[row] - m);
        w->l[row] *= alpha;
        tile_scale(w->o + (size_t)row * x->dp, alpha, (int)x->dp);
        w->m[row] = m;
    }
    w->l[row] += tile_probs(&k, s, m);
}

/* Where the key at position j lies, in elements of the cache; values lie alike. */
static size_t key_at(const attn_task *x, const unit *u, int j)
{
    const tm_kv_layer *kv = x->a->kv;
    size_t head =
        (size_t)u->blocks[j / kv->block_tokens] * (size_t)x->a->n_kv_heads + (size_t)u->kv_head;
    return (head * (size_t)kv->block_tokens + (size_t)(j % kv->block_tokens)) *
           (size_t)x->a->head_dim;
}

/* One tile: n keys from position j0, which all lie in one block. The next one starts at position next. */
static void attend_tile(const attn_task *x, const unit *u, const work *w, int j0, int n, int next)
{
    const tm_attention_args *a = x->a;
    const tm_kv_layer *kv = a->kv;
    size_t d = (size_t)a->head_dim;
    size_t key = key_at(x, u, j0), size = tm_dtype_size(kv->dtype), at = key * size;
    ptrdiff_t ahead = ((ptrdiff_t)key_at(x, u, next) - (ptrdiff_t)key) * (ptrdiff_t)size;
    const void *k = (const char *)kv->k + at, *v = (const char *)kv->v + at;
    tm_dtype dtype = kv->dtype;
    if (dtype != TM_DTYPE_F32 && u->rows >= WIDEN_ROWS) {
        tile_widen(w->keys, k, dtype, (size_t)n * d);
        tile_widen(w->values, v, dtype, (size_t)n * d);
        k = w->keys, v = w->values, dtype = TM_DTYPE_F32;
    }
    tile_qk(w->q, x->dp, u->rows, k, dtype, d, n, ahead, w->s);
    for (int r = 0; r < u->rows; r++)
        softmax_row(x, u, w, r, j0, n);
    tile_pv(w->s, u->rows, v, dtype, (int)d, n, ahead, w->o, x->dp);
}

/* Where the tile that begins at position j ends: with its TILE_KEYS, its block, or at stop. */
static int tile_end(const attn_task *x, int j, int stop)
{
    int bt = x->a->kv->block_tokens, in_block = j % bt;
    int end = TM_MIN(in_block / TILE_KEYS * TILE_KEYS + TILE_KEYS, bt);
    return TM_MIN(j - in_block + end, stop);
}

/* The span that starts at position s0: (m, l, O) of all rows. */
static void attend_span(const attn_task *x, const unit *u, const work *w, int first, int end,
                        int s0)
{
    for (int r = 0; r < u->rows; r++)
        w->m[r] = -INFINITY, w->l[r] = 0.0f;
    memset(w->o, 0, (size_t)u->rows * x->dp * sizeof *w->o);
    int stop = TM_MIN(s0 + x->span, end);
    for (int j = s0; j < stop;) {
        int next = tile_end(x, j, stop);
        if (next > first)
            attend_tile(x, u, w, j, next - j, next < stop ? next : j);
        j = next;
    }
}

/* (m, l, O) into the running (sum_m, sum_l, sum_o) of a row. */
static void merge_row(float m, float l, const float *o, float *sum_m, float *sum_l, float *sum_o,
                      size_t dp)
{
    if (l == 0.0f)
        return;
    float top = fmaxf(m, *sum_m);
    float old = *sum_l > 0.0f ? tile_exp1(*sum_m - top) : 0.0f, mine = tile_exp1(m - top);
    tile_mix(sum_o, old, o, mine, (int)dp);
    *sum_l = *sum_l * old + l * mine;
    *sum_m = top;
}

static void start_sums(const unit *u, const work *w, size_t dp)
{
    for (int r = 0; r < u->rows; r++)
        w->sum_m[r] = -INFINITY, w->sum_l[r] = 0.0f;
    memset(w->sum_o, 0, (size_t)u->rows * dp * sizeof *w->sum_o);
}

static void write_out(const attn_task *x, const unit *u, const work *w)
{
    const tm_attention_args *a = x->a;
    size_t d = (size_t)a->head_dim;
    for (int r = 0; r < u->rows; r++) {
        size_t head = (size_t)(u->kv_head * x->group + r % x->group);
        float *out =
            (float *)a->out + ((size_t)(u->t0 + r / x->group) * (size_t)a->n_heads + head) * d;
        float inv = 1.0f / w->sum_l[r];
        for (size_t i = 0; i < d; i++)
            out[i] = w->sum_o[(size_t)r * x->dp + i] * inv;
    }
}

/* First position that any row of the unit sees, and one past the last. */
static void key_range(const attn_task *x, const unit *u, int *first, int *end)
{
    int p0 = x->a->batch->positions[u->t0];
    *first = x->a->window > 0 ? TM_MAX(0, p0 - x->a->window + 1) : 0;
    *end = x->a->batch->positions[u->t0 + u->n_tokens - 1] + 1;
}

static void run_unit(const attn_task *x, const unit *u, const work *w)
{
    int first, end;
    key_range(x, u, &first, &end);
    load_queries(x, u, w);
    start_sums(u, w, x->dp);
    for (int s0 = first / x->span * x->span; s0 < end; s0 += x->span) {
        attend_span(x, u, w, first, end, s0);
        for (int r = 0; r < u->rows; r++)
            merge_row(w->m[r], w->l[r], w->o + (size_t)r * x->dp, &w->sum_m[r], &w->sum_l[r],
                      w->sum_o + (size_t)r * x->dp, x->dp);
    }
    write_out(x, u, w);
}

/* Finds unit i; units go by sequence, token tile, kv head. */
static unit find_unit(const attn_task *x, int64_t i)
{
    const tm_batch *b = x->a->batch;
    unit u = {.seq = x->first_seq};
    int heads = x->a->n_kv_heads;
    for (;; u.seq++) {
        int n = b->seq_begin[u.seq + 1] - b->seq_begin[u.seq];
        int64_t units = (int64_t)((n + x->tokens - 1) / x->tokens) * heads;
        if (i < units)
            break;
        i -= units;
    }
    u.kv_head = (int)(i % heads);
    u.t0 = b->seq_begin[u.seq] + (int)(i / heads) * x->tokens;
    u.n_tokens = TM_MIN(x->tokens, b->seq_begin[u.seq + 1] - u.t0);
    u.rows = u.n_tokens * x->group;
    u.blocks = b->blocks + (size_t)u.seq * (size_t)b->max_blocks;
    return u;
}

static void attend_unit(void *arg, int thread, int unit_no)
{
    const attn_task *x = arg;
    work w = carve_work(x->scratch + (size_t)thread * x->scratch_floats, (size_t)x->rows_max, x->dp,
                        (size_t)x->a->head_dim);
    unit u = find_unit(x, unit_no);
    run_unit(x, &u, &w);
}

/* Where span i of unit n keeps its rows: O[rows][dp], then m[rows], then l[rows]. */
static float *partial_at(const attn_task *x, int64_t n, int i)
{
    size_t each = (size_t)x->group * (x->dp + 2);
    return x->partial + ((size_t)n * (size_t)x->max_spans + (size_t)i) * each;
}

static void attend_one_span(void *arg, int thread, int span_no)
{
    const attn_task *x = arg;
    work w = carve_work(x->scratch + (size_t)thread * x->scratch_floats, (size_t)x->rows_max, x->dp,
                        (size_t)x->a->head_dim);
    int first, end, span = span_no % x->max_spans;
    unit u = find_unit(x, span_no / x->max_spans);
    key_range(x, &u, &first, &end);
    if (span * x->span >= end || (span + 1) * x->span <= first)
        return;
    load_queries(x, &u, &w);
    attend_span(x, &u, &w, first, end, span * x->span);
    float *p = partial_at(x, span_no / x->max_spans, span);
    size_t rows = (size_t)u.rows;
    memcpy(p, w.o, rows * x->dp * sizeof *p);
    memcpy(p + rows * x->dp, w.m, rows * sizeof *p);
    memcpy(p + rows * (x->dp + 1), w.l, rows * sizeof *p);
}

static void merge_spans(const attn_task *x, const work *w)
{
    for (int64_t n = 0; n < x->n_units; n++) {
        int first, end;
        unit u = find_unit(x, n);
        key_range(x, &u, &first, &end);
        start_sums(&u, w, x->dp);
        for (int i = first / x->span; i * x->span < end; i++) {
            const float *p = partial_at(x, n, i);
            size_t rows = (size_t)u.rows;
            for (size_t r = 0; r < rows; r++)
                merge_row(p[rows * x->dp + r], p[rows * (x->dp + 1) + r], p + r * x->dp,
                          &w->sum_m[r], &w->sum_l[r], w->sum_o + r * x->dp, x->dp);
        }
        write_out(x, &u, w);
    }
}

static int64_t count_units(const attn_task *x)
{
    int64_t n = 0;
    const tm_batch *b = x->a->batch;
    for (int s = x->first_seq; s < x->end_seq; s++)
        n += (b->seq_begin[s + 1] - b->seq_begin[s] + x->tokens - 1) / x->tokens;
    return n * x->a->n_kv_heads;
}

/* Spans of the longest context, when cutting decodes into spans is what keeps all threads busy. */
static int spans_to_cut(const attn_task *x, const tm_device *dev)
{
    int longest = 0;
    if (x->tokens > 1 || dev->threads == 1 || x->n_units >= 2 * (int64_t)dev->threads)
        return 0;
    for (int s = x->first_seq; s < x->end_seq; s++)
        longest = TM_MAX(longest, x->a->batch->kv_len[s]);
    return longest > x->span ? (longest + x->span - 1) / x->span : 0;
}

static tm_status attention(tm_device *dev, const tm_attention_args *a, int first_seq, int end_seq,
                           bool decode)
{
    if (first_seq >= end_seq)
        return TM_OK;
    int bt = a->kv->block_tokens;
    size_t d = (size_t)a->head_dim;
    attn_task x = {.a = a, .group = a->n_heads / a->n_kv_heads, .dp = (d + 15) / 16 * 16};
    x.tokens = decode ? 1 : TM_MAX(1, ROWS_MAX / x.group);
    x.rows_max = x.tokens * x.group;
    x.span = TM_MAX(1, SPAN_KEYS / bt) * bt;
    x.first_seq = first_seq;
    x.end_seq = end_seq;
    x.n_units = count_units(&x);
    x.max_spans = spans_to_cut(&x, dev);
    x.scratch_floats = work_floats((size_t)x.rows_max, x.dp, d);
    size_t partial = (size_t)x.n_units * (size_t)x.max_spans * (size_t)x.group * (x.dp + 2);
    size_t threads = (size_t)dev->threads;
    x.scratch = tm_cpu_scratch(dev, (threads * x.scratch_floats + partial) * sizeof(float));
    if (!x.scratch)
        return TM_STATUS_NO_MEMORY;
    x.partial = x.scratch + threads * x.scratch_floats;
    int64_t n = x.n_units * TM_MAX(1, x.max_spans);
    TM_ASSERT(n <= INT_MAX);
    tm_cpu_run(dev, (int)n, x.max_spans ? attend_one_span : attend_unit, &x);
    if (x.max_spans == 0)
        return TM_OK;
    work w = carve_work(x.scratch, (size_t)x.rows_max, x.dp, d);
    merge_spans(&x, &w);
    return TM_OK;
}

tm_status TM_ISA(attention_prefill)(tm_device *dev, const tm_attention_args *a)
{
    return attention(dev, a, a->batch->n_decode, a->batch->n_seqs, false);
}

tm_status TM_ISA(attention_decode)(tm_device *dev, const tm_attention_args *a)
{
    return attention(dev, a, 0, a->batch->n_decode, true);
}
