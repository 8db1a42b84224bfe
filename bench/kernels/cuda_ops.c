/* tm-bench-cuda [sample|layers|rows|attention|experts|linear] [device]: the CUDA operators alone, or some of them, as
 * fractions of the read bandwidth in the same run. For sums over ranks see cuda_allreduce.c.
 *
 * A case is recorded as a graph of many calls and replayed, so that launches cost what they cost in a decode step.
 * Weights rotate over more memory than any cache holds. Numbers are random: zeros flatter the matrix units. The
 * median of several replays counts. Shapes are those of an 8B model with grouped heads. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/kernels/cuda_allreduce.h"
#include "common/check.h"
#include "common/clock.h"
#include "engine/backend/backend.h"
#include "engine/backend/cuda/device.h"

enum { ROUNDS = 9, TOKENS_MAX = 8192, CALLS_MAX = 64 };

typedef struct lab {
    const tm_backend *b;
    tm_device *dev;
    double read_rate;
    char *pool; /* random bf16 */
    size_t pool_bytes;
    void *x, *out, *more;
} lab;

static void must(tm_status st, const char *what)
{
    if (st == TM_OK)
        return;
    fprintf(stderr, "tm-bench-cuda: %s: %s\n", what, tm_status_name(st));
    exit(1);
}

static void *take(lab *l, size_t bytes)
{
    void *p = NULL;
    must(l->b->dev->alloc(l->dev, bytes, &p, NULL), "memory");
    return p;
}

/* Random bf16 in +-0.06, from a block that is repeated. */
static void fill(lab *l, void *to, size_t bytes)
{
    enum { BLOCK = 1 << 20 };
    static uint16_t block[BLOCK];
    uint64_t r = 88172645463325252u;
    for (size_t i = 0; i < BLOCK; i++) {
        r = r * 6364136223846793005u + 1442695040888963407u;
        block[i] = (uint16_t)((r >> 48 & 0x807fu) | (0x3c80u + ((r >> 40) & 0x0fu) * 8u));
    }
    for (size_t at = 0; at < bytes; at += sizeof block)
        must(l->b->dev->upload(l->dev, (char *)to + at, block, TM_MIN(sizeof block, bytes - at)),
             "copy");
}

typedef void (*enqueue_fn)(lab *l, int call, const void *arg);

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Seconds of one call. */
static double time_calls(lab *l, enqueue_fn fn, const void *arg, int calls)
{
    tm_graph *graph = NULL;
    double t[ROUNDS];
    fn(l, 0, arg);
    must(l->b->dev->sync(l->dev), "first call");
    must(l->b->dev->graph_begin(l->dev), "recording");
    for (int i = 0; i < calls; i++)
        fn(l, i, arg);
    must(l->b->dev->graph_end(l->dev, &graph), "recording");
    for (int i = -2; i < ROUNDS; i++) {
        int64_t begin = tm_clock_ns();
        must(l->b->dev->graph_launch(l->dev, graph), "replay");
        must(l->b->dev->sync(l->dev), "replay");
        if (i >= 0)
            t[i] = (double)(tm_clock_ns() - begin) * 1e-9 / calls;
    }
    l->b->dev->graph_free(l->dev, graph);
    qsort(t, ROUNDS, sizeof t[0], by_value);
    return t[ROUNDS / 2];
}

typedef struct linear_case {
    const char *name;
    int n, k;
    bool gated, f32;
    int tokens;
} linear_case;

static void linear_call(lab *l, int call, const void *arg)
{
    const linear_case *c = arg;
    size_t bytes = (size_t)c->n * (size_t)c->k * 2;
    size_t places = TM_MAX(l->pool_bytes / bytes, (size_t)1);
    tm_weight w = {.dtype = TM_DTYPE_BF16,
                   .n = c->n,
                   .k = c->k,
                   .data = l->pool + (size_t)call % places * bytes};
    tm_linear_args a = {.out = l->out,
                        .x = l->x,
                        .w = &w,
                        .n_tokens = c->tokens,
                        .ldx = c->k,
                        .ldo = c->n,
                        .f32_out = c->f32};
    tm_linear_gated_args g = {.out = l->out,
                              .gate_up = l->more,
                              .x = l->x,
                              .w = &w,
                              .n_tokens = c->tokens,
                              .ldx = c->k,
                              .act = TM_ACT_SILU};
    must(c->gated ? l->b->ops->linear_gated(l->dev, &g) : l->b->ops->linear(l->dev, &a), c->name);
}

/* As the start of an engine does. */
static void tune(lab *l, int n, int k, int tokens, bool f32)
{
    const tm_weight w = {.dtype = TM_DTYPE_BF16, .n = n, .k = k, .data = l->pool};
    const tm_linear_args a = {
        .out = l->out, .x = l->x, .w = &w, .n_tokens = tokens, .ldx = k, .ldo = n, .f32_out = f32};
    must(l->b->ops->linear_tune(l->dev, &a), "tune");
}

static void bench_linear(lab *l)
{
    static const linear_case cases[] = {
        {"qkv", 6144, 4096, false, false, 0},        {"o", 4096, 4096, false, false, 0},
        {"gate_up", 28672, 4096, true, false, 0},    {"down", 4096, 14336, false, false, 0},
        {"head", 128256, 4096, false, true, 0},      {"0.5b qkv", 1152, 896, false, false, 0},
        {"0.5b gate_up", 9728, 896, true, false, 0}, {"0.5b down", 896, 4864, false, false, 0},
    };
    static const int tokens[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 2048};
    printf("%-14s", "us, TB/s");
    for (size_t t = 0; t < TM_ARRAY_LEN(tokens); t++)
        printf("%14d", tokens[t]);
    printf("\n");
    for (size_t i = 0; i < TM_ARRAY_LEN(cases); i++) {
        printf("%-14s", cases[i].name);
        for (size_t t = 0; t < TM_ARRAY_LEN(tokens); t++) {
            linear_case c = cases[i];
            c.tokens = tokens[t];
            if (c.n > 100000 && c.tokens > 256)
                continue;
            double bytes = (double)c.n * c.k * 2;
            tune(l, c.n, c.k, c.tokens, c.f32);
            double s = time_calls(l, linear_call, &c, c.n > 100000 || c.tokens > 256 ? 4 : 32);
            printf("%9.1f %4.2f", s * 1e6, bytes / s * 1e-12);
            fflush(stdout);
        }
        printf("\n");
    }
}

typedef struct attention_shape {
    int seqs, rows, context, heads, kv_heads, d;
} attention_shape;

typedef struct attention_case {
    attention_shape s;
    tm_batch batch;
    tm_kv_layer kv;
} attention_case;

static tm_attention_args attention_args(const lab *l, const attention_case *c)
{
    return (tm_attention_args){.out = l->out,
                               .qkv = l->x,
                               .batch = &c->batch,
                               .kv = &c->kv,
                               .n_heads = c->s.heads,
                               .n_kv_heads = c->s.kv_heads,
                               .head_dim = c->s.d,
                               .scale = 0.088f};
}

static void attention_call(lab *l, int call, const void *arg)
{
    const attention_case *c = arg;
    tm_attention_args a = attention_args(l, c);
    (void)call;
    must(c->s.rows == 1 ? l->b->ops->attention_decode(l->dev, &a)
                        : l->b->ops->attention_prefill(l->dev, &a),
         "attention");
}

/* The kernel of every processor, where there is one for this one alone. */
static void attention_plain_call(lab *l, int call, const void *arg)
{
    tm_attention_args a = attention_args(l, arg);
    (void)call;
    must(TM_CUDA(l->dev, tm_cuda_attention_prefill_launch(&a, &l->dev->ctx)), "attention");
}

static const int32_t *put(lab *l, const int32_t *host, size_t n)
{
    int32_t *p = take(l, n * sizeof *p);
    must(l->b->dev->upload(l->dev, p, host, n * sizeof *p), "copy");
    return p;
}

/* DeepSeek's: keys are their own values. */
static bool latent(const attention_shape *s)
{
    return s->d == 576;
}

/* seqs sequences of `context` keys with `rows` new tokens each; blocks in order over the pool, which they share when
 * it is too small. */
static void setup_attention(lab *l, attention_case *c)
{
    enum { BT = 64 };
    int per = (c->s.context + BT - 1) / BT, tokens = c->s.seqs * c->s.rows;
    size_t block = (size_t)c->s.kv_heads * BT * (size_t)c->s.d * 2, half = l->pool_bytes / 2;
    int pool = (int)(half / block);
    int32_t *h = calloc((size_t)(tokens * 2 + c->s.seqs * (per + 3) + 8), sizeof *h);
    int32_t *positions = h, *begin = h + tokens, *len = begin + c->s.seqs + 1,
            *blocks = len + c->s.seqs;
    for (int s = 0; s < c->s.seqs; s++) {
        for (int i = 0; i < c->s.rows; i++)
            positions[s * c->s.rows + i] = c->s.context - c->s.rows + i;
        begin[s + 1] = (s + 1) * c->s.rows;
        len[s] = c->s.context;
        for (int i = 0; i < per; i++)
            blocks[s * per + i] = (s * per + i) % pool;
    }
    c->batch = (tm_batch){.n_tokens = tokens,
                          .n_seqs = c->s.seqs,
                          .n_decode = c->s.rows == 1 ? c->s.seqs : 0,
                          .positions = put(l, positions, (size_t)tokens),
                          .seq_begin = put(l, begin, (size_t)c->s.seqs + 1),
                          .kv_len = put(l, len, (size_t)c->s.seqs),
                          .blocks = put(l, blocks, (size_t)(c->s.seqs * per)),
                          .max_blocks = per};
    c->kv = (tm_kv_layer){.k = l->pool,
                          .v = latent(&c->s) ? l->pool : l->pool + half,
                          .dtype = TM_DTYPE_BF16,
                          .n_blocks = pool,
                          .block_tokens = BT,
                          .n_kv_heads = c->s.kv_heads,
                          .head_dim = c->s.d};
    free(h);
}

static void bench_attention(lab *l)
{
    static const attention_shape shapes[] = {
        {1, 1, 1024, 32, 8, 128},    {1, 1, 8192, 32, 8, 128},     {8, 1, 1024, 32, 8, 128},
        {32, 1, 1024, 32, 8, 128},   {64, 1, 4096, 32, 8, 128},    {128, 1, 1024, 32, 8, 128},
        {64, 1, 4096, 64, 8, 128},   {1, 1, 1024, 14, 2, 64},      {32, 1, 1024, 32, 32, 128},
        {1, 1024, 1024, 32, 8, 128}, {1, 2048, 2048, 32, 8, 128},  {1, 8192, 8192, 32, 8, 128},
        {4, 512, 4096, 32, 8, 128},  {16, 512, 512, 32, 8, 128},   {1, 8192, 8192, 32, 8, 64},
        {1, 8192, 8192, 8, 1, 128},  {1, 1, 4096, 128, 1, 576},    {32, 1, 4096, 128, 1, 576},
        {64, 1, 4096, 16, 1, 576},   {1, 2048, 2048, 128, 1, 576}, {32, 1, 1024, 32, 8, 112},
        {1, 2048, 2048, 32, 8, 112},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(shapes); i++) {
        attention_case one = {.s = shapes[i]}, *c = &one;
        setup_attention(l, c);
        double s = time_calls(l, attention_call, c, c->s.rows > 1 ? 4 : 32);
        double bytes =
            (latent(&c->s) ? 2.0 : 4.0) * c->s.seqs * c->s.context * c->s.kv_heads * c->s.d;
        double before = c->s.context - c->s.rows;
        double flop =
            4.0 * c->s.seqs * c->s.heads * c->s.d * c->s.rows * (before + 0.5 * c->s.rows);
        printf("attention B=%-3d rows=%-5d context=%-5d H=%d K=%d d=%d: %8.1f us", c->s.seqs,
               c->s.rows, c->s.context, c->s.heads, c->s.kv_heads, c->s.d, s * 1e6);
        if (c->s.rows == 1)
            printf(" %.2f TB/s = %.0f %%\n", bytes / s * 1e-12, 100 * bytes / s / l->read_rate);
        else
            printf(" %.0f TFLOP/s", flop / s * 1e-12);
        tm_attention_args a = attention_args(l, c);
        if (c->s.rows > 1 && tm_cuda_attention_hopper_fits(&a, &l->dev->ctx)) {
            s = time_calls(l, attention_plain_call, c, 4);
            printf(" by wgmma; by mma.sync %.1f us %.0f TFLOP/s", s * 1e6, flop / s * 1e-12);
        }
        if (c->s.rows > 1)
            printf("\n");
    }
}

typedef struct experts_case {
    const char *name;
    int h, f, experts, top_k;
    int tokens;
    const int32_t *ids;
    const float *weights;
    void *work;
} experts_case;

static void experts_call(lab *l, int call, const void *arg)
{
    const experts_case *c = arg;
    size_t rows = (size_t)c->experts * (size_t)c->h * (size_t)c->f * 2;
    size_t places = TM_MAX(l->pool_bytes / (3 * rows), (size_t)1);
    char *at = l->pool + (size_t)call % places * 3 * rows;
    tm_weight up = {.dtype = TM_DTYPE_BF16, .n = c->experts * 2 * c->f, .k = c->h, .data = at};
    tm_weight down = {
        .dtype = TM_DTYPE_BF16, .n = c->experts * c->h, .k = c->f, .data = at + 2 * rows};
    const tm_moe_experts_args a = {.out = l->out,
                                   .x = l->x,
                                   .ids = c->ids,
                                   .weights = c->weights,
                                   .gate_up = &up,
                                   .down = &down,
                                   .work = c->work,
                                   .n_tokens = c->tokens,
                                   .h = c->h,
                                   .f = c->f,
                                   .n_experts = c->experts,
                                   .top_k = c->top_k,
                                   .act = TM_ACT_SILU};
    must(l->b->ops->moe_experts(l->dev, &a), c->name);
}

/* Random experts, all of a token different; *chosen: how many the first n tokens have between them. */
static int32_t *draw_experts(const experts_case *c, int n, int *chosen)
{
    uint64_t r = 88172645463325252u;
    bool seen[1024] = {false};
    int32_t *ids = calloc((size_t)(n * c->top_k), sizeof *ids);
    TM_ASSERT(ids && c->experts <= 1024);
    *chosen = 0;
    for (int i = 0; i < n * c->top_k;) {
        bool taken = false;
        r = r * 6364136223846793005u + 1442695040888963407u;
        ids[i] = (int32_t)((r >> 33) % (uint64_t)c->experts);
        for (int j = i / c->top_k * c->top_k; j < i; j++)
            taken = taken || ids[j] == ids[i];
        if (taken)
            continue;
        *chosen += !seen[ids[i]];
        seen[ids[i++]] = true;
    }
    return ids;
}

static void bench_experts(lab *l)
{
    static const experts_case cases[] = {{.name = "Qwen3-30B", 2048, 768, 128, 8},
                                         {.name = "Mixtral 8x7B / 2", 4096, 7168, 8, 2},
                                         {.name = "DeepSeek-V3 / 8", 7168, 256, 256, 8}};
    static const int tokens[] = {1, 4, 8, 32, 64, 256, 1024, 4096};
    float *weights = take(l, (size_t)TOKENS_MAX * 8 * sizeof *weights);
    fill(l, weights, (size_t)TOKENS_MAX * 8 * sizeof *weights);
    for (size_t i = 0; i < TM_ARRAY_LEN(cases); i++) {
        experts_case c = cases[i];
        tm_moe_experts_args most = {.n_tokens = 4096, .h = c.h, .f = c.f};
        most.n_experts = c.experts, most.top_k = c.top_k;
        c.work = take(l, l->b->ops->moe_work_bytes(&most));
        c.weights = weights;
        for (size_t t = 0; t < TM_ARRAY_LEN(tokens); t++) {
            int chosen;
            c.tokens = tokens[t];
            int32_t *ids = draw_experts(&c, c.tokens, &chosen);
            c.ids = put(l, ids, (size_t)(c.tokens * c.top_k));
            free(ids);
            double s = time_calls(l, experts_call, &c, c.tokens > 64 ? 4 : 16);
            double size = 6.0 * c.h * c.f, flop = size * c.tokens * c.top_k;
            printf("experts %-16s T=%-5d %3d chosen: %8.1f us %5.2f TB/s %4.0f TFLOP/s\n", c.name,
                   c.tokens, chosen, s * 1e6, size * chosen / s * 1e-12, flop / s * 1e-12);
        }
        l->b->dev->free(l->dev, c.work);
    }
}

typedef struct row_case {
    int tokens, h;
    float *w;
} row_case;

static void norm_call(lab *l, int call, const void *arg)
{
    const row_case *c = arg;
    tm_norm_args a = {.out = l->out,
                      .residual = l->x,
                      .delta = l->more,
                      .w = c->w,
                      .n_tokens = c->tokens,
                      .h = c->h,
                      .eps = 1e-5f};
    (void)call;
    must(l->b->ops->norm(l->dev, &a), "norm");
}

static void argmax_call(lab *l, int call, const void *arg)
{
    const row_case *c = arg;
    tm_argmax_args a = {.out = l->out, .x = l->x, .n_rows = c->tokens, .n = c->h};
    (void)call;
    must(l->b->ops->argmax(l->dev, &a), "argmax");
}

static void bench_rows(lab *l)
{
    static const int tokens[] = {1, 8, 128, 2048};
    float *w = take(l, 4096 * sizeof *w);
    fill(l, w, 4096 * sizeof *w);
    for (size_t i = 0; i < TM_ARRAY_LEN(tokens); i++) {
        row_case n = {tokens[i], 4096, w}, m = {TM_MIN(tokens[i], 128), 128256, w};
        printf("norm + residual T=%-5d %7.1f us   argmax R=%-4d %7.1f us\n", n.tokens,
               time_calls(l, norm_call, &n, CALLS_MAX) * 1e6, m.tokens,
               time_calls(l, argmax_call, &m, 16) * 1e6);
    }
}

/* Rows of logits like a language model's: a wide middle, and some tokens far above it. Sampling changes them, so each
 * call gets a copy, whose time is taken off. */
typedef struct sample_case {
    const char *name;
    tm_sample_row row;
    bool copies_only;
    int rows;
    const float *logits;
    float *x;
    tm_sample_row *params;
    tm_sample_edit *edits;
    int32_t *out;
} sample_case;

enum { VOCAB = 128256, SAMPLE_ROWS = 256, SEEN = 1000 };

static void sample_call(lab *l, int call, const void *arg)
{
    const sample_case *c = arg;
    const tm_copy_args copy = {.out = c->x,
                               .x = c->logits,
                               .n_tokens = c->rows,
                               .groups = 1,
                               .cols = 2 * VOCAB,
                               .ldo = 2 * VOCAB,
                               .ldx = 2 * VOCAB};
    const tm_sample_args a = {.out = c->out,
                              .x = c->x,
                              .rows = c->params,
                              .edits = c->edits,
                              .n_rows = c->rows,
                              .n = VOCAB};
    (void)call;
    must(l->b->ops->copy(l->dev, &copy), "copy");
    if (!c->copies_only)
        must(l->b->ops->sample(l->dev, &a), "sample");
}

static float *draw_logits(void)
{
    float *x = malloc((size_t)SAMPLE_ROWS * VOCAB * sizeof *x);
    uint64_t r = 88172645463325252u;
    TM_ASSERT(x);
    for (size_t i = 0; i < (size_t)SAMPLE_ROWS * VOCAB; i++) {
        int sum = 0;
        r = r * 6364136223846793005u + 1442695040888963407u;
        for (int k = 0; k < 6; k++)
            sum += (int)(r >> (16 + 8 * k) & 0xff);
        x[i] = ((float)sum - 765.0f) / 181.0f * 2.5f;
        if (r >> 16 & 0xfff)
            continue;
        x[i] = 8.0f + (float)(r >> 32 & 0xff) / 18.0f;
    }
    return x;
}

static void bench_sample_case(lab *l, sample_case *c)
{
    static const int rows[] = {1, 8, 64, SAMPLE_ROWS};
    tm_sample_row params[SAMPLE_ROWS];
    printf("sample %-22s", c->name);
    for (int i = 0; i < SAMPLE_ROWS; i++) {
        params[i] = c->row;
        params[i].first_edit = i * SEEN;
        params[i].uniform = (uint64_t)i * 0x9E3779B97F4A7C15u;
    }
    must(l->b->dev->upload(l->dev, c->params, params, sizeof params), "copy");
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        c->rows = rows[i];
        c->copies_only = true;
        double copies = time_calls(l, sample_call, c, 8);
        c->copies_only = false;
        printf("  R=%-3d %7.1f us", c->rows, (time_calls(l, sample_call, c, 8) - copies) * 1e6);
    }
    printf("\n");
}

static void bench_sample(lab *l)
{
    static const struct {
        const char *name;
        tm_sample_row row;
    } cases[] = {
        {"greedy", {.logprobs = 0}},
        {"temperature 1", {.scale = 1}},
        {"temperature 0.7", {.scale = 1 / 0.7f}},
        {"top-p 0.9", {.scale = 1, .top_p = (uint64_t)(0.9 * 0x1p64)}},
        {"top-k 50", {.scale = 1, .top_k = 50}},
        {"top-k 50, penalties",
         {.scale = 1, .top_k = 50, .n_seen = SEEN, .repetition = 1.1f, .presence = 0.5f}},
        {"top-k 50, top-p 0.9", {.scale = 1, .top_k = 50, .top_p = (uint64_t)(0.9 * 0x1p64)}},
        {"min-p 0.05", {.scale = 1, .min_p = 0.05f}},
        {"hot, top-p 0.9", {.scale = 0.2f, .top_p = (uint64_t)(0.9 * 0x1p64)}},
        {"hot, top-k 50", {.scale = 0.2f, .top_k = 50}},
    };
    size_t bytes = (size_t)SAMPLE_ROWS * VOCAB * sizeof(float);
    tm_sample_edit *edits = malloc((size_t)SAMPLE_ROWS * SEEN * sizeof *edits);
    float *logits = draw_logits(), *x = take(l, 2 * bytes);
    TM_ASSERT(edits);
    for (int i = 0; i < SAMPLE_ROWS * SEEN; i++)
        edits[i] = (tm_sample_edit){i % SEEN * 127, 1.0f};
    must(l->b->dev->upload(l->dev, x, logits, bytes), "copy");
    must(l->b->dev->upload(l->dev, l->x, edits, (size_t)SAMPLE_ROWS * SEEN * sizeof *edits),
         "copy");
    for (size_t i = 0; i < TM_ARRAY_LEN(cases); i++) {
        sample_case c = {.name = cases[i].name,
                         .row = cases[i].row,
                         .logits = x,
                         .x = x + (size_t)SAMPLE_ROWS * VOCAB,
                         .params = l->more,
                         .edits = l->x,
                         .out = l->out};
        bench_sample_case(l, &c);
    }
    l->b->dev->free(l->dev, x);
    fill(l, l->x, (size_t)SAMPLE_ROWS * SEEN * sizeof *edits);
    fill(l, l->more, SAMPLE_ROWS * sizeof(tm_sample_row));
    free(edits);
    free(logits);
}

/* A decode step's layers as the model enqueues them; parts can be left out to see what they cost. */
typedef struct layer_case {
    int tokens;
    bool no_attention, no_norm;
    attention_case attention;
    float *w;
    const float *inv_freq;
} layer_case;

enum { LAYERS = 32, H = 4096, F = 14336, QKV = 6144 };

static tm_weight next_weight(lab *l, size_t *at, int n, int k)
{
    size_t bytes = (size_t)n * (size_t)k * 2;
    if (*at + bytes > l->pool_bytes)
        *at = 0;
    tm_weight w = {.dtype = TM_DTYPE_BF16, .n = n, .k = k, .data = l->pool + *at};
    *at += bytes;
    return w;
}

static void layers_call(lab *l, int call, const void *arg)
{
    const layer_case *c = arg;
    const tm_op_table *ops = l->b->ops;
    char *x = l->x, *next = x + ((size_t)64 << 20), *normed = next + ((size_t)64 << 20);
    char *qkv = l->more, *attn = qkv + ((size_t)64 << 20), *delta = attn + ((size_t)64 << 20);
    size_t at = (size_t)call % 3 * 1000003u * 256u % (l->pool_bytes / 2);
    int t = c->tokens;
    for (int i = 0; i < LAYERS; i++) {
        tm_weight wq = next_weight(l, &at, QKV, H), wo = next_weight(l, &at, H, H);
        tm_weight wg = next_weight(l, &at, 2 * F, H), wd = next_weight(l, &at, H, F);
        tm_norm_args n = {.out = normed,
                          .residual = x,
                          .delta = delta,
                          .w = c->w,
                          .residual_out = next,
                          .n_tokens = t,
                          .h = H,
                          .eps = 1e-5f};
        tm_linear_args q = {.out = qkv, .x = normed, .w = &wq, .n_tokens = t, .ldx = H, .ldo = QKV};
        tm_linear_args o = {.out = delta, .x = attn, .w = &wo, .n_tokens = t, .ldx = H, .ldo = H};
        tm_linear_gated_args g = {.out = l->out,
                                  .gate_up = (char *)l->out + ((size_t)200 << 20),
                                  .x = normed,
                                  .w = &wg,
                                  .n_tokens = t,
                                  .ldx = H,
                                  .act = TM_ACT_SILU};
        tm_linear_args d = {.out = delta, .x = l->out, .w = &wd, .n_tokens = t, .ldx = F, .ldo = H};
        tm_rope_append_args r = {.qkv = qkv,
                                 .inv_freq = c->inv_freq,
                                 .batch = &c->attention.batch,
                                 .kv = &c->attention.kv,
                                 .n_heads = 32,
                                 .n_kv_heads = 8,
                                 .head_dim = 128,
                                 .rotary_dim = 128,
                                 .mscale = 1};
        tm_attention_args a = {.out = attn,
                               .qkv = qkv,
                               .batch = &c->attention.batch,
                               .kv = &c->attention.kv,
                               .n_heads = 32,
                               .n_kv_heads = 8,
                               .head_dim = 128,
                               .scale = 0.088f};
        must(c->no_norm ? ops->linear(l->dev, &q) : ops->norm_linear(l->dev, &n, &q), "qkv");
        if (!c->no_attention)
            must(ops->rope_attention_decode(l->dev, &r, &a), "attention");
        must(ops->linear(l->dev, &o), "o");
        n.residual = next, n.residual_out = x;
        must(c->no_norm ? ops->linear_gated(l->dev, &g) : ops->norm_linear_gated(l->dev, &n, &g),
             "gate_up");
        must(ops->linear(l->dev, &d), "down");
    }
}

static void bench_layers(lab *l)
{
    static const int tokens[] = {1, 2, 4, 8, 16, 32, 64, 128};
    float *w = take(l, H * sizeof *w);
    fill(l, w, H * sizeof *w);
    double bytes = 2.0 * H * (QKV + H + 3.0 * F);
    for (size_t i = 0; i < TM_ARRAY_LEN(tokens); i++) {
        layer_case c = {.tokens = tokens[i], .w = w, .inv_freq = w};
        c.attention.s = (attention_shape){tokens[i], 1, 1024, 32, 8, 128};
        setup_attention(l, &c.attention);
        tune(l, QKV, H, c.tokens, false);
        tune(l, H, H, c.tokens, false);
        tune(l, 2 * F, H, c.tokens, false);
        tune(l, H, F, c.tokens, false);
        double s[4];
        for (int k = 0; k < 4; k++) {
            c.no_attention = k & 1;
            c.no_norm = k & 2;
            s[k] = time_calls(l, layers_call, &c, 1) / LAYERS;
        }
        printf("layer T=%-4d %7.1f us; without attention %7.1f (%.2f TB/s), without norms %7.1f, "
               "without both %7.1f\n",
               c.tokens, s[0] * 1e6, s[1] * 1e6, bytes / s[1] * 1e-12, s[2] * 1e6, s[3] * 1e6);
    }
}

static const struct {
    const char *name;
    void (*run)(lab *l);
} g_parts[] = {{"sample", bench_sample},   {"layers", bench_layers},
               {"rows", bench_rows},       {"attention", bench_attention},
               {"experts", bench_experts}, {"linear", bench_linear}};

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "allreduce") == 0)
        return bench_allreduce(argc > 2 ? (int)strtol(argv[2], NULL, 10) : 15,
                               argc > 3 ? (int)strtol(argv[3], NULL, 10) : 8192);
    const char *only =
        argc > 1 && strtol(argv[1], NULL, 10) == 0 && argv[1][0] != '0' ? argv[1] : "";
    if (*only)
        argc--, argv++;
    lab l = {.b = tm_backend_find("cuda"), .pool_bytes = (size_t)4 << 30};
    tm_device_opts o = {.index = argc > 1 ? (int)strtol(argv[1], NULL, 10) : 0};
    tm_err err = TM_ERR_INIT;
    if (!l.b || l.b->dev->open(&l.dev, &o, &err) != TM_OK) {
        fprintf(stderr, "tm-bench-cuda: %s\n", l.b ? err.msg : "no CUDA in this build");
        return 1;
    }
    must(l.b->dev->read_rate(l.dev, (size_t)8 << 30, &l.read_rate, &err), "read rate");
    l.pool = take(&l, l.pool_bytes);
    l.x = take(&l, (size_t)TOKENS_MAX * 28672 * 2);
    l.out = take(&l, (size_t)TOKENS_MAX * 28672 * 2);
    l.more = take(&l, (size_t)TOKENS_MAX * 28672 * 2);
    fill(&l, l.pool, l.pool_bytes);
    fill(&l, l.x, (size_t)TOKENS_MAX * 28672 * 2);
    fill(&l, l.more, (size_t)TOKENS_MAX * 28672 * 2);
    printf("%s: reads %.2f TB/s\n", l.b->dev->describe(l.dev), l.read_rate * 1e-12);
    for (size_t i = 0; i < TM_ARRAY_LEN(g_parts); i++)
        if (!*only || strcmp(only, g_parts[i].name) == 0)
            g_parts[i].run(&l);
    l.b->dev->close(l.dev);
    return 0;
}
