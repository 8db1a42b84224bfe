/* tm-bench-ops [isa] [threads] [file.csv]: the CPU operators alone, as fractions of what the machine does.
 *
 * Shapes are those of models/demo-20m. The weights of all five layers and the head lie in memory one
 * after another (40 MB) and are used in the order of a step, so that caches are as warm as in a real
 * step. Every call is timed alone and counts with its best time over several rounds, because the machine
 * may be shared and a whole step is longer than the calm between two interruptions; a step is the sum of
 * its calls. Limits and operators are measured in turn in each round, so that their ratio is from one run. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/kernels/cpu_limits.h"
#include "common/check.h"
#include "engine/backend/cpu/cpu.h"

enum {
    LAYERS = 5,
    HIDDEN = 512,
    HEADS = 8,
    KV_HEADS = 4,
    DIM = 64,
    FFN = 1536,
    VOCAB = 8192,
    TOKENS_MAX = 512,
    CONTEXT = 2048,
    BIG_BYTES = 256 << 20,
    ROUNDS = 16
};

typedef struct linear_shape {
    const char *name;
    int n, k, per_step;
} linear_shape;

static const linear_shape g_shapes[] = {
    {"qkv", (HEADS + 2 * KV_HEADS) * DIM, HIDDEN, LAYERS},
    {"o", HIDDEN, HEADS *DIM, LAYERS},
    {"gate_up", 2 * FFN, HIDDEN, LAYERS},
    {"down", HIDDEN, FFN, LAYERS},
    {"head", VOCAB, HIDDEN, 1},
};
enum { SHAPES = (int)TM_ARRAY_LEN(g_shapes) };

static const int g_tokens[] = {1, 2, 4, 8, 16, 32, 64, 512};
enum { TOKEN_ROWS = (int)TM_ARRAY_LEN(g_tokens) };

typedef struct bench {
    tm_device *dev;
    const tm_op_table *ops;
    int threads;
    char *weights;
    size_t weight_bytes;
    tm_weight layers[LAYERS + 1][SHAPES]; /* the head is the last layer's */
    float *x, *out, *residual, *ones;
    char *big;
    FILE *csv;
    double read_big, read_weights, fma; /* bytes/s, bytes/s, FLOP/s */
} bench;

static void *must(void *p)
{
    TM_ASSERT(p);
    return p;
}

static float *floats(size_t n)
{
    float *p = must(aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64));
    for (size_t i = 0; i < n; i++)
        p[i] = (float)((i * 2654435761u >> 8) & 1023) / 1024.0f - 0.5f;
    return p;
}

/* Through the device's own allocator, so that pages are as in the engine. */
static void *device_memory(const bench *b, size_t bytes)
{
    void *p = NULL;
    TM_ASSERT(tm_backend_cpu.dev->alloc(b->dev, bytes, &p, NULL) == TM_OK);
    memset(p, 0, bytes);
    return p;
}

static void bench_open(bench *b, const char *isa, int threads)
{
    tm_err err = TM_ERR_INIT;
    tm_device_opts o = {.threads = threads, .isa = isa};
    if (tm_backend_cpu.dev->open(&b->dev, &o, &err) != TM_OK) {
        fprintf(stderr, "%s\n", err.msg);
        exit(78);
    }
    b->ops = tm_backend_cpu.ops;
    b->threads = b->dev->threads;
    for (int i = 0; i < SHAPES; i++)
        b->weight_bytes +=
            (size_t)g_shapes[i].n * (size_t)g_shapes[i].k * 2 * (size_t)g_shapes[i].per_step;
    b->weights = device_memory(b, b->weight_bytes);
    uint16_t *w = (uint16_t *)(void *)b->weights;
    for (size_t i = 0; i < b->weight_bytes / 2; i++)
        w[i] = (uint16_t)(0x3c00 + ((i * 2654435761u >> 12) & 0x81ff)); /* +-0.0078 .. 0.12 */
    const char *at = b->weights;
    for (int layer = 0; layer <= LAYERS; layer++) {
        for (int i = 0; i < SHAPES; i++) {
            if ((layer == LAYERS) != (g_shapes[i].per_step == 1))
                continue;
            tm_weight *m = &b->layers[layer][i];
            *m = (tm_weight){
                .dtype = TM_DTYPE_BF16, .n = g_shapes[i].n, .k = g_shapes[i].k, .data = at};
            TM_ASSERT(b->ops->linear_prepare(b->dev, m, NULL) == TM_OK);
            at += (size_t)m->n * (size_t)m->k * 2;
        }
    }
    b->big = device_memory(b, BIG_BYTES);
    b->x = floats((size_t)TOKENS_MAX * 2 * FFN);
    b->out = floats((size_t)TOKENS_MAX * VOCAB);
    b->residual = floats((size_t)TOKENS_MAX * HIDDEN);
    b->ones = floats(HIDDEN);
}

static double best(double old, double now)
{
    return old == 0 || now < old ? now : old;
}

/* One step's linear layers in order; the best time of a call of each shape goes to `each`. The head sees
 * one row per sequence in decode and one row in a prefill chunk. */
static void linear_step(bench *b, int tokens, double each[SHAPES])
{
    for (int layer = 0; layer <= LAYERS; layer++) {
        for (int i = 0; i < SHAPES; i++) {
            const linear_shape *s = &g_shapes[i];
            if ((layer == LAYERS) != (s->per_step == 1))
                continue;
            tm_linear_args a = {.out = b->out,
                                .x = b->x,
                                .w = &b->layers[layer][i],
                                .n_tokens = tokens >= 512 && s->per_step == 1 ? 1 : tokens,
                                .ldx = s->k,
                                .ldo = s->n};
            double t = bench_now();
            b->ops->linear(b->dev, &a);
            each[i] = best(each[i], bench_now() - t);
        }
    }
}

static void row(bench *b, const char *what, int tokens, double seconds, double value,
                const char *unit, double share)
{
    printf("%-22s %5d %10.1f us %10.2f %-8s", what, tokens, seconds * 1e6, value, unit);
    if (share > 0)
        printf(" %5.1f %%", share * 100);
    printf("\n");
    if (b->csv)
        fprintf(b->csv, "%s,%d,%s,%d,%.1f,%.2f,%s,%.3f\n", b->dev->isa->name, b->threads, what,
                tokens, seconds * 1e6, value, unit, share);
}

static void measure_limits(bench *b)
{
    for (int i = 0; i < 3; i++)
        b->read_big = fmax(b->read_big, BIG_BYTES / bench_read_seconds(b->dev, b->big, BIG_BYTES));
    for (int i = 0; i < 20; i++) {
        double t = bench_read_seconds(b->dev, b->weights, b->weight_bytes);
        b->read_weights = fmax(b->read_weights, (double)b->weight_bytes / t);
        b->fma = fmax(b->fma, bench_fma_flops(b->dev));
    }
}

static void bench_linear(bench *b)
{
    static double each[TOKEN_ROWS][SHAPES];
    for (int r = 0; r < ROUNDS; r++) {
        measure_limits(b);
        for (int i = 0; i < TOKEN_ROWS; i++)
            for (int again = 0; again < (g_tokens[i] <= 8 ? 8 : 1); again++)
                linear_step(b, g_tokens[i], each[i]);
    }
    row(b, "read 256 MB", 0, BIG_BYTES / b->read_big, b->read_big * 1e-9, "GB/s", 0);
    row(b, "read 40 MB of weights", 0, (double)b->weight_bytes / b->read_weights,
        b->read_weights * 1e-9, "GB/s", 0);
    row(b, "fma peak", 0, 0, b->fma * 1e-9, "GFLOP/s", 0);
    for (int i = 0; i < TOKEN_ROWS; i++) {
        double step = 0, flop = 0;
        for (int s = 0; s < SHAPES; s++) {
            int t = g_tokens[i] >= 512 && g_shapes[s].per_step == 1 ? 1 : g_tokens[i];
            double bytes = 2.0 * g_shapes[s].n * g_shapes[s].k, f = bytes * t;
            flop += f * g_shapes[s].per_step;
            step += each[i][s] * g_shapes[s].per_step;
            if (t == 1)
                row(b, g_shapes[s].name, t, each[i][s], bytes / each[i][s] * 1e-9, "GB/s",
                    bytes / each[i][s] / b->read_weights);
            else if (t >= 64)
                row(b, g_shapes[s].name, t, each[i][s], f / each[i][s] * 1e-9, "GFLOP/s",
                    f / each[i][s] / b->fma);
        }
        double rate = (double)b->weight_bytes / step;
        if (g_tokens[i] <= 4)
            row(b, "linear step", g_tokens[i], step, rate * 1e-9, "GB/s", rate / b->read_weights);
        if (g_tokens[i] > 1)
            row(b, "linear step", g_tokens[i], step, flop / step * 1e-9, "GFLOP/s",
                flop / step / b->fma);
    }
}

/* One sequence with `fresh` new tokens at the end of a context, in blocks of 64. */
typedef struct context {
    tm_batch batch;
    int32_t positions[TOKENS_MAX], begin[2], len[1], blocks[CONTEXT / 64];
} context;

static void fill_context(context *c, int fresh, int length)
{
    c->begin[0] = 0, c->begin[1] = fresh, c->len[0] = length;
    for (int i = 0; i < CONTEXT / 64; i++)
        c->blocks[i] = (i * 7) % (CONTEXT / 64);
    for (int i = 0; i < fresh; i++)
        c->positions[i] = length - fresh + i;
    c->batch = (tm_batch){.n_tokens = fresh,
                          .n_seqs = 1,
                          .n_decode = fresh == 1,
                          .positions = c->positions,
                          .seq_begin = c->begin,
                          .kv_len = c->len,
                          .blocks = c->blocks,
                          .max_blocks = CONTEXT / 64};
}

static void bench_attention(bench *b)
{
    static const int cases[][2] = {{1, 128}, {1, 512}, {1, 2048}, {512, 512}, {512, 2048}};
    static context c;
    size_t elements = (size_t)CONTEXT * KV_HEADS * DIM;
    tm_kv_layer kv = {.k = device_memory(b, elements * 2),
                      .v = device_memory(b, elements * 2),
                      .dtype = TM_DTYPE_BF16,
                      .n_blocks = CONTEXT / 64,
                      .block_tokens = 64,
                      .n_kv_heads = KV_HEADS,
                      .head_dim = DIM};
    for (size_t i = 0; i < TM_ARRAY_LEN(cases); i++) {
        int fresh = cases[i][0], length = cases[i][1];
        fill_context(&c, fresh, length);
        tm_attention_args a = {.out = b->out,
                               .qkv = b->x,
                               .batch = &c.batch,
                               .kv = &kv,
                               .n_heads = HEADS,
                               .n_kv_heads = KV_HEADS,
                               .head_dim = DIM,
                               .scale = 0.125f};
        double t = 0;
        for (int r = 0; r < (fresh == 1 ? 200 : 10); r++) {
            double start = bench_now();
            (fresh == 1 ? b->ops->attention_decode : b->ops->attention_prefill)(b->dev, &a);
            t = best(t, bench_now() - start);
        }
        /* Scores below the diagonal only; two products of d per score. */
        double scores = (double)fresh * (length - fresh) + (double)fresh * (fresh + 1) / 2;
        double flop = 4.0 * scores * HEADS * DIM, bytes = 4.0 * length * KV_HEADS * DIM;
        char name[32];
        snprintf(name, sizeof name, "attention ctx %d", length);
        if (fresh == 1)
            row(b, name, fresh, t, bytes / t * 1e-9, "GB/s", bytes / t / b->read_weights);
        else
            row(b, name, fresh, t, flop / t * 1e-9, "GFLOP/s", flop / t / b->fma);
    }
    tm_backend_cpu.dev->free(b->dev, kv.k);
    tm_backend_cpu.dev->free(b->dev, kv.v);
}

static void bench_rows(bench *b)
{
    static context c;
    static const int tokens[] = {1, 64, 512};
    float inv_freq[DIM / 2];
    size_t elements = (size_t)CONTEXT * KV_HEADS * DIM;
    tm_kv_layer kv = {.k = device_memory(b, elements * 2),
                      .v = device_memory(b, elements * 2),
                      .dtype = TM_DTYPE_BF16,
                      .n_blocks = CONTEXT / 64,
                      .block_tokens = 64,
                      .n_kv_heads = KV_HEADS,
                      .head_dim = DIM};
    for (int i = 0; i < DIM / 2; i++)
        inv_freq[i] = powf(10000.0f, -(float)i / (DIM / 2));
    for (size_t i = 0; i < TM_ARRAY_LEN(tokens); i++) {
        int n = tokens[i];
        double t[3] = {0};
        fill_context(&c, n, CONTEXT);
        tm_norm_args norm = {.out = b->out,
                             .residual = b->residual,
                             .delta = b->out + (size_t)TOKENS_MAX * HIDDEN,
                             .w = b->ones,
                             .n_tokens = n,
                             .h = HIDDEN,
                             .eps = 1e-5f,
                             .kind = TM_NORM_RMS};
        tm_act_args act = {.out = b->out,
                           .gate_up = b->x,
                           .n_tokens = n,
                           .f = FFN,
                           .act = TM_ACT_SILU,
                           .gated = true};
        tm_rope_append_args rope = {.qkv = b->out,
                                    .inv_freq = inv_freq,
                                    .batch = &c.batch,
                                    .kv = &kv,
                                    .n_heads = HEADS,
                                    .n_kv_heads = KV_HEADS,
                                    .head_dim = DIM,
                                    .rotary_dim = DIM,
                                    .mscale = 1};
        for (int r = 0; r < 100; r++) {
            double t0 = bench_now();
            b->ops->norm(b->dev, &norm);
            double t1 = bench_now();
            b->ops->rope_append(b->dev, &rope);
            double t2 = bench_now();
            b->ops->act(b->dev, &act);
            double t3 = bench_now();
            t[0] = best(t[0], t1 - t0), t[1] = best(t[1], t2 - t1), t[2] = best(t[2], t3 - t2);
        }
        row(b, "norm", n, t[0], 12.0 * n * HIDDEN / t[0] * 1e-9, "GB/s", 0);
        row(b, "rope_append", n, t[1], 8.0 * n * 1024 / t[1] * 1e-9, "GB/s", 0);
        row(b, "act", n, t[2], 12.0 * n * FFN / t[2] * 1e-9, "GB/s", 0);
    }
    tm_backend_cpu.dev->free(b->dev, kv.k);
    tm_backend_cpu.dev->free(b->dev, kv.v);
}

int main(int argc, char **argv)
{
    static bench b;
    bench_open(&b, argc > 1 ? argv[1] : "auto", argc > 2 ? (int)strtol(argv[2], NULL, 10) : 0);
    if (argc > 3) {
        b.csv = fopen(argv[3], "w");
        if (!b.csv) {
            perror(argv[3]);
            return 1;
        }
        fprintf(b.csv, "isa,threads,what,tokens,us,value,unit,share_of_limit\n");
    }
    printf("%s\n%-22s %5s %13s %19s %8s\n", tm_backend_cpu.dev->describe(b.dev), "what", "T",
           "time", "rate", "of limit");
    bench_linear(&b);
    bench_attention(&b);
    bench_rows(&b);
    return b.csv ? fclose(b.csv) : 0;
}
