/* Rope with the cache append, and attention over ragged paged batches: the GPU against the CPU reference, over
 * head sizes, groups, block sizes, windows, caps and biases; one long decode; rows of padding. */
#include <math.h>

#include "common/check.h"
#include "tests/engine/op_cuda.h"

typedef struct shape {
    int heads, kv_heads, d, block_tokens, window;
    float softcap;
    bool alibi;
    int rotary;
    bool interleaved;
    float mscale;
    bool latent; /* keys are their values */
} shape;

static const shape g_shapes[] = {
    {8, 4, 64, 64, 0, 0, false, 64, false, 1, false},
    {14, 2, 64, 64, 0, 0, false, 64, false, 1, false},
    {32, 8, 128, 64, 0, 0, false, 128, false, 1, false},
    {4, 4, 128, 16, 0, 0, false, 32, true, 1.2f, false},
    {28, 4, 128, 64, 0, 0, false, 128, false, 1, false},
    {6, 2, 96, 32, 100, 0, false, 96, false, 1, false},
    {7, 1, 128, 64, 0, 30.0f, false, 64, true, 1, false},
    {16, 1, 96, 256, 513, 0, true, 96, false, 1, false},
    {3, 1, 256, 64, 0, 0, false, 128, false, 1, false},
    {12, 1, 64, 128, 70, 5.0f, true, 0, false, 1, false},
    {8, 8, 256, 16, 300, 0, false, 256, false, 1, false},
};

/* What the general kernel takes: other head sizes, blocks of any length, latent keys for many heads. */
static const shape g_other_shapes[] = {
    {4, 2, 80, 64, 0, 0, false, 80, false, 1, false},
    {3, 3, 16, 64, 0, 0, false, 8, true, 1, false},
    {2, 1, 32, 5, 20, 0, false, 32, false, 1, false},
    {5, 1, 112, 24, 0, 20.0f, true, 0, false, 1, false},
    {8, 1, 192, 64, 70, 0, false, 64, false, 1.1f, false},
    {70, 1, 576, 64, 0, 0, false, 64, true, 1, true},
    {4, 2, 64, 7, 33, 0, false, 64, false, 1, false},
    {2, 2, 40, 1, 0, 0, false, 40, false, 1, false},
    {3, 1, 576, 16, 0, 5.0f, false, 64, false, 1, false},
    {1, 1, 8, 64, 0, 0, false, 8, false, 1, false},
    {6, 3, 320, 32, 0, 0, true, 320, false, 1, false},
    {12, 1, 96, 16, 0, 0, false, 32, true, 1, true},
    {9, 1, 144, 64, 50, 0, false, 16, true, 1, true},
};

/* Sequences of a batch: new tokens and tokens that were in the cache before. Decodes come first. */
typedef struct span {
    int fresh, before;
} span;
typedef struct layout {
    int n_seqs, n_decode;
    span seqs[8];
} layout;

static const layout g_layouts[] = {
    {1, 1, {{1, 0}}},
    {1, 1, {{1, 1700}}},
    {1, 0, {{70, 0}}},
    {1, 0, {{300, 0}}},
    {1, 0, {{5, 1100}}},
    {3, 3, {{1, 63}, {1, 64}, {1, 511}}},
    {6, 2, {{1, 3}, {1, 530}, {2, 0}, {133, 480}, {128, 0}, {1, 130}}},
};

static const layout g_other_layouts[] = {
    {1, 1, {{1, 0}}},
    {1, 1, {{1, 700}}},
    {1, 0, {{37, 60}}},
    {5, 2, {{1, 3}, {1, 230}, {2, 0}, {33, 90}, {1, 130}}},
};

typedef struct batch {
    tm_batch b;
    tm_kv_layer kv;
    int32_t *positions, *seq_begin, *kv_len, *blocks;
    void *qkv; /* 16 bit */
    float slopes[32];
    float inv_freq[256];
    size_t width, cache;
} batch;

static batch make_batch(const shape *s, const layout *l)
{
    batch x = {0};
    int tokens = 0, max_blocks = 1, n_blocks = 3;
    for (int i = 0; i < l->n_seqs; i++) {
        int need = (l->seqs[i].fresh + l->seqs[i].before + s->block_tokens - 1) / s->block_tokens;
        tokens += l->seqs[i].fresh;
        max_blocks = TM_MAX(max_blocks, need);
        n_blocks += need;
    }
    x.positions = calloc((size_t)tokens, sizeof(int32_t));
    x.seq_begin = calloc((size_t)l->n_seqs + 1, sizeof(int32_t));
    x.kv_len = calloc((size_t)l->n_seqs, sizeof(int32_t));
    x.blocks = calloc((size_t)l->n_seqs * (size_t)max_blocks, sizeof(int32_t));
    int t = 0, next = n_blocks;
    for (int i = 0; i < l->n_seqs;
         i++) { /* blocks from the end, so that neighbours are not in order */
        x.kv_len[i] = l->seqs[i].fresh + l->seqs[i].before;
        for (int j = 0; j * s->block_tokens < x.kv_len[i]; j++)
            x.blocks[i * max_blocks + j] = --next;
        for (int j = 0; j < l->seqs[i].fresh; j++)
            x.positions[t++] = l->seqs[i].before + j;
        x.seq_begin[i + 1] = t;
    }
    x.b = (tm_batch){.n_tokens = tokens,
                     .n_seqs = l->n_seqs,
                     .n_decode = l->n_decode,
                     .positions = x.positions,
                     .seq_begin = x.seq_begin,
                     .kv_len = x.kv_len,
                     .blocks = x.blocks,
                     .max_blocks = max_blocks};
    x.width = (size_t)(s->heads + 2 * s->kv_heads) * (size_t)s->d;
    x.cache = (size_t)n_blocks * (size_t)(s->kv_heads * s->block_tokens * s->d);
    x.qkv = op_random_array((size_t)tokens * x.width, gpu_dtype, -1, 1);
    x.kv = (tm_kv_layer){.k = op_random_array(x.cache, gpu_dtype, -1, 1),
                         .v = op_random_array(x.cache, gpu_dtype, -1, 1),
                         .dtype = gpu_dtype,
                         .n_blocks = n_blocks,
                         .block_tokens = s->block_tokens,
                         .n_kv_heads = s->kv_heads,
                         .head_dim = s->d};
    if (s->latent) {
        free(x.kv.v);
        x.kv.v = x.kv.k;
    }
    for (int i = 0; i < 32; i++)
        x.slopes[i] = exp2f(-(float)(i + 1) / 4);
    for (int i = 0; i < 256; i++)
        x.inv_freq[i] = powf(10000.0f, -(float)i / 64.0f);
    return x;
}

static void drop_batch(batch *x)
{
    free(x->positions), free(x->seq_begin), free(x->kv_len), free(x->blocks), free(x->qkv);
    if (x->kv.v != x->kv.k)
        free(x->kv.v);
    free(x->kv.k);
}

/* The same batch on the GPU. */
typedef struct gpu_batch {
    tm_batch b;
    tm_kv_layer kv;
    void *qkv, *out, *slopes, *inv_freq;
} gpu_batch;

static gpu_batch to_gpu(const shape *s, const batch *x)
{
    size_t t = (size_t)x->b.n_tokens, n = (size_t)x->b.n_seqs;
    gpu_batch g = {.b = x->b, .kv = x->kv};
    g.b.positions = gpu_put(x->positions, t * 4);
    g.b.seq_begin = gpu_put(x->seq_begin, (n + 1) * 4);
    g.b.kv_len = gpu_put(x->kv_len, n * 4);
    g.b.blocks = gpu_put(x->blocks, n * (size_t)x->b.max_blocks * 4);
    g.kv.k = gpu_put(x->kv.k, x->cache * 2);
    g.kv.v = s->latent ? g.kv.k : gpu_put(x->kv.v, x->cache * 2);
    g.qkv = gpu_put(x->qkv, t * x->width * 2);
    g.out = gpu_take(t * (size_t)(s->heads * s->d) * 2);
    g.slopes = gpu_put(x->slopes, sizeof x->slopes);
    g.inv_freq = gpu_put(x->inv_freq, sizeof x->inv_freq);
    return g;
}

static void drop_gpu(gpu_batch *g)
{
    void *all[] = {(void *)(uintptr_t)g->b.positions,
                   (void *)(uintptr_t)g->b.seq_begin,
                   (void *)(uintptr_t)g->b.kv_len,
                   (void *)(uintptr_t)g->b.blocks,
                   g->kv.k,
                   g->kv.v == g->kv.k ? NULL : g->kv.v,
                   g->qkv,
                   g->out,
                   g->slopes,
                   g->inv_freq};
    for (size_t i = 0; i < TM_ARRAY_LEN(all); i++)
        gpu_free(all[i]);
}

static void rope_one(const shape *s, const layout *l)
{
    batch x = make_batch(s, l);
    gpu_batch g = to_gpu(s, &x);
    size_t n = (size_t)x.b.n_tokens * x.width;
    float *qkv = gpu_widen(x.qkv, gpu_dtype, n), *got = malloc(n * sizeof *got);
    float *cache = malloc(x.cache * sizeof *cache);
    tm_rope_append_args a = {.qkv = qkv,
                             .inv_freq = x.inv_freq,
                             .batch = &x.b,
                             .kv = &x.kv,
                             .n_heads = s->heads,
                             .n_kv_heads = s->kv_heads,
                             .head_dim = s->d,
                             .rotary_dim = s->rotary,
                             .interleaved = s->interleaved,
                             .mscale = s->mscale};
    assert_int_equal(tm_backend_find("cpu")->ops->rope_append(gpu_ref, &a), TM_OK);
    a.qkv = g.qkv, a.inv_freq = g.inv_freq, a.batch = &g.b, a.kv = &g.kv;
    assert_int_equal(gpu->ops->rope_append(gpu_dev, &a), TM_OK);
    gpu_get(got, g.qkv, n);
    op_check(op_nmse(got, qkv, n), gpu_bound(), "rope d=%d", s->d);
    for (int i = 0; i < 2; i++) {
        float *want = gpu_widen(i ? x.kv.v : x.kv.k, gpu_dtype, x.cache);
        gpu_get(cache, i ? g.kv.v : g.kv.k, x.cache);
        op_check(op_nmse(cache, want, x.cache), gpu_bound(), "append d=%d", s->d);
        free(want);
    }
    free(qkv), free(got), free(cache);
    drop_gpu(&g);
    drop_batch(&x);
}

static void rope_test(void **state)
{
    (void)state;
    for (size_t i = 0; i < TM_ARRAY_LEN(g_shapes); i++)
        for (size_t j = 0; j < TM_ARRAY_LEN(g_layouts); j++)
            if (gpu_takes(3))
                rope_one(&g_shapes[i], &g_layouts[j]);
}

static void attention_one(const shape *s, const layout *l)
{
    batch x = make_batch(s, l);
    gpu_batch g = to_gpu(s, &x);
    const tm_op_table *cpu = tm_backend_find("cpu")->ops;
    size_t n = (size_t)x.b.n_tokens * (size_t)(s->heads * s->d);
    float *qkv = gpu_widen(x.qkv, gpu_dtype, (size_t)x.b.n_tokens * x.width);
    float *want = malloc(n * sizeof *want), *got = malloc(n * sizeof *got);
    tm_attention_args a = {.out = want,
                           .qkv = qkv,
                           .batch = &x.b,
                           .kv = &x.kv,
                           .n_heads = s->heads,
                           .n_kv_heads = s->kv_heads,
                           .head_dim = s->d,
                           .window = s->window,
                           .scale = 4.0f / sqrtf((float)s->d), /* so that the weights differ */
                           .softcap = s->softcap,
                           .alibi = s->alibi ? x.slopes : NULL};
    assert_int_equal(cpu->attention_prefill(gpu_ref, &a), TM_OK);
    assert_int_equal(cpu->attention_decode(gpu_ref, &a), TM_OK);
    a.out = g.out, a.qkv = g.qkv, a.batch = &g.b, a.kv = &g.kv;
    a.alibi = s->alibi ? g.slopes : NULL;
    for (int i = 0; i < 2; i++) { /* the second run finds the counters of the first at zero */
        assert_int_equal(gpu->ops->attention_prefill(gpu_dev, &a), TM_OK);
        assert_int_equal(gpu->ops->attention_decode(gpu_dev, &a), TM_OK);
        gpu_get(got, g.out, n);
        op_check(op_nmse(got, want, n), gpu_bound(),
                 "attention d=%d H=%d K=%d, %d sequences, kv %d", s->d, s->heads, s->kv_heads,
                 l->n_seqs, x.kv_len[0]);
    }
    free(qkv), free(want), free(got);
    drop_gpu(&g);
    drop_batch(&x);
}

static void attention_test(void **state)
{
    (void)state;
    for (size_t i = 0; i < TM_ARRAY_LEN(g_shapes); i++)
        for (size_t j = 0; j < TM_ARRAY_LEN(g_layouts); j++)
            if (gpu_takes(24))
                attention_one(&g_shapes[i], &g_layouts[j]);
}

/* Prompts and later chunks of them, ragged: the kernels that take tiles of rows. Every second batch has lengths at the
 * edges of tiles. */
static void prompts_test(void **state)
{
    static const int groups[][2] = {{2, 2}, {4, 1}, {8, 1}, {8, 2}};
    const bool slow = !gpu_takes(1 << 20);
    const int batches = slow ? 2 : 24, most = slow ? 200 : 600;
    (void)state;
    for (int i = 0; i < batches; i++) {
        const int *g = groups[slow ? op_pick(0, 1) : i / 4 % 4];
        const shape s = {.heads = g[0],
                         .kv_heads = g[1],
                         .d = i % 2 ? 64 : 128,
                         .block_tokens = op_pick(0, 3) ? 64 : 128};
        layout l = {.n_decode = op_pick(0, 1)};
        l.n_seqs = l.n_decode + op_pick(1, slow ? 2 : 7);
        for (int k = 0; k < l.n_seqs; k++) {
            span *q = &l.seqs[k];
            if (i / 2 % 2)
                *q = (span){op_pick(0, 1) ? 64 * op_pick(1, 3) : op_pick(1, 3),
                            64 * op_pick(0, 3) + op_pick(0, 2)};
            else
                *q = (span){op_pick(1, most), op_pick(0, 1) ? op_pick(0, most) : 0};
            if (k < l.n_decode)
                q->fresh = 1;
        }
        attention_one(&s, &l);
    }
}

static void other_shapes_test(void **state)
{
    (void)state;
    for (size_t i = 0; i < TM_ARRAY_LEN(g_other_shapes); i++) {
        assert_true(gpu->ops->attention_fits(g_other_shapes[i].d, g_other_shapes[i].block_tokens));
        for (size_t j = 0; j < TM_ARRAY_LEN(g_other_layouts); j++) {
            rope_one(&g_other_shapes[i], &g_other_layouts[j]);
            if (gpu_takes(4))
                attention_one(&g_other_shapes[i], &g_other_layouts[j]);
        }
    }
}

/* Rope, append and attention of decodes as one operator against the three of the reference. */
static void fused_one(const shape *s, const layout *l)
{
    batch x = make_batch(s, l);
    gpu_batch g = to_gpu(s, &x);
    const tm_op_table *cpu = tm_backend_find("cpu")->ops;
    size_t n = (size_t)x.b.n_tokens * (size_t)(s->heads * s->d);
    float *qkv = gpu_widen(x.qkv, gpu_dtype, (size_t)x.b.n_tokens * x.width);
    float *want = malloc(n * sizeof *want), *got = malloc(n * sizeof *got);
    float *cache = malloc(x.cache * sizeof *cache);
    tm_rope_append_args r = {.qkv = qkv,
                             .inv_freq = x.inv_freq,
                             .batch = &x.b,
                             .kv = &x.kv,
                             .n_heads = s->heads,
                             .n_kv_heads = s->kv_heads,
                             .head_dim = s->d,
                             .rotary_dim = s->rotary,
                             .interleaved = s->interleaved,
                             .mscale = s->mscale};
    tm_attention_args a = {.out = want,
                           .qkv = qkv,
                           .batch = &x.b,
                           .kv = &x.kv,
                           .n_heads = s->heads,
                           .n_kv_heads = s->kv_heads,
                           .head_dim = s->d,
                           .window = s->window,
                           .scale = 4.0f / sqrtf((float)s->d),
                           .softcap = s->softcap,
                           .alibi = s->alibi ? x.slopes : NULL};
    assert_int_equal(cpu->rope_append(gpu_ref, &r), TM_OK);
    assert_int_equal(cpu->attention_decode(gpu_ref, &a), TM_OK);
    r.qkv = g.qkv, r.inv_freq = g.inv_freq, r.batch = &g.b, r.kv = &g.kv;
    a.out = g.out, a.qkv = g.qkv, a.batch = &g.b, a.kv = &g.kv;
    a.alibi = s->alibi ? g.slopes : NULL;
    assert_int_equal(gpu->ops->rope_attention_decode(gpu_dev, &r, &a), TM_OK);
    gpu_get(got, g.out, n);
    op_check(op_nmse(got, want, n), gpu_bound(), "fused attention d=%d H=%d K=%d", s->d, s->heads,
             s->kv_heads);
    for (int i = 0; i < 2; i++) {
        float *host = gpu_widen(i ? x.kv.v : x.kv.k, gpu_dtype, x.cache);
        gpu_get(cache, i ? g.kv.v : g.kv.k, x.cache);
        op_check(op_nmse(cache, host, x.cache), gpu_bound(), "fused append d=%d", s->d);
        free(host);
    }
    free(qkv), free(want), free(got), free(cache);
    drop_gpu(&g);
    drop_batch(&x);
}

static void fused_test(void **state)
{
    (void)state;
    for (size_t i = 0; i < TM_ARRAY_LEN(g_shapes); i++)
        for (size_t j = 0; j < TM_ARRAY_LEN(g_layouts); j++)
            if (g_layouts[j].n_decode == g_layouts[j].n_seqs && gpu_takes(3))
                fused_one(&g_shapes[i], &g_layouts[j]);
    for (size_t i = 0; i < TM_ARRAY_LEN(g_other_shapes); i++)
        fused_one(&g_other_shapes[i], &g_other_layouts[1]);
}

static void long_decode_test(void **state)
{
    (void)state;
    const shape s = {4, 1, 128, 64, 0, 0, false, 128, false, 1, false};
    const layout l = {2, 2, {{1, 20000}, {1, 77}}};
    attention_one(&s, &l);
}

/* Long sequences among short ones, with so many units that short ones have fewer parts: on the emulator three, on a GPU of
 * some 130 multiprocessors a hundred and more; and with so few that teams have them, but for one that is too long. */
static void mixed_decode_test(void **state)
{
    (void)state;
    const shape few = {4, 1, 128, 64, 0, 0, false, 128, false, 1, false};
    const shape many = {16, 16, 64, 64, 0, 0, false, 64, false, 1, false};
    const layout three = {3, 3, {{1, 2100}, {1, 77}, {1, 640}}};
    const layout eight = {
        8, 8, {{1, 3000}, {1, 1279}, {1, 1280}, {1, 5}, {1, 1023}, {1, 1024}, {1, 0}, {1, 63}}};
    const shape narrow = {3, 1, 64, 64, 0, 0, false, 64, false, 1, false};
    const shape wide = {2, 1, 128, 64, 0, 0, false, 128, false, 1, false};
    const layout uneven = {3, 3, {{1, 9000}, {1, 70}, {1, 1100}}};
    const layout even = {2, 2, {{1, 1024}, {1, 2}}};
    fused_one(&few, &three);
    fused_one(&many, &eight);
    fused_one(&narrow, &uneven);
    fused_one(&narrow, &even);
    fused_one(&wide, &uneven);
}

/* A decode row with kv_len 0 changes neither the cache nor the other rows. */
static void padding_test(void **state)
{
    (void)state;
    const shape *s = &g_shapes[0];
    const layout l = {3, 3, {{1, 100}, {1, 5}, {1, 40}}};
    batch x = make_batch(s, &l);
    x.kv_len[1] = 0;
    gpu_batch g = to_gpu(s, &x);
    tm_rope_append_args r = {.qkv = g.qkv,
                             .inv_freq = g.inv_freq,
                             .batch = &g.b,
                             .kv = &g.kv,
                             .n_heads = s->heads,
                             .n_kv_heads = s->kv_heads,
                             .head_dim = s->d,
                             .rotary_dim = s->rotary,
                             .mscale = 1};
    assert_int_equal(gpu->ops->rope_append(gpu_dev, &r), TM_OK);
    float *before = gpu_widen(x.kv.k, gpu_dtype, x.cache), *after = malloc(x.cache * sizeof *after);
    gpu_get(after, g.kv.k, x.cache);
    size_t row = (size_t)(s->kv_heads * s->block_tokens * s->d);
    size_t at = (size_t)x.blocks[x.b.max_blocks] * row;
    assert_memory_equal(before + at, after + at, row * sizeof *after);
    assert_memory_not_equal(before, after, x.cache * sizeof *after);
    free(before), free(after);
    drop_gpu(&g);
    drop_batch(&x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rope_test),         cmocka_unit_test(attention_test),
        cmocka_unit_test(fused_test),        cmocka_unit_test(long_decode_test),
        cmocka_unit_test(mixed_decode_test), cmocka_unit_test(padding_test),
        cmocka_unit_test(other_shapes_test), cmocka_unit_test(prompts_test),
    };
    return gpu_run(tests, TM_ARRAY_LEN(tests));
}
