/* Rope with the cache append, and attention over ragged paged batches: the reference against double
 * precision computed here, every fast path against the reference, and bit for bit that a row's result is
 * the same in prefill and decode, alone and in a batch, and on any number of threads. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/check.h"
#include "engine/backend/cpu/convert.h"
#include "tests/engine/op_test.h"

typedef struct shape {
    int heads, kv_heads, d, block_tokens;
    tm_dtype dtype;
    int window;
    float softcap;
    bool alibi;
    /* rope */
    int rotary;
    bool interleaved;
    float mscale;
} shape;

static const shape g_shapes[] = {
    {8, 4, 64, 64, TM_DTYPE_BF16, 0, 0, false, 64, false, 1},
    {8, 4, 64, 64, TM_DTYPE_F32, 0, 0, false, 64, true, 1.2f},
    {4, 4, 64, 16, TM_DTYPE_F16, 0, 0, false, 32, false, 1},
    {6, 2, 80, 32, TM_DTYPE_BF16, 100, 0, false, 80, false, 1},
    {7, 1, 128, 64, TM_DTYPE_BF16, 0, 30.0f, false, 64, true, 1},
    {5, 5, 33, 7, TM_DTYPE_BF16, 0, 0, true, 16, false, 1},
    {4, 2, 20, 128, TM_DTYPE_F32, 70, 5.0f, true, 0, false, 1},
    {16, 2, 96, 64, TM_DTYPE_F16, 513, 0, true, 96, false, 1},
    {3, 1, 256, 64, TM_DTYPE_BF16, 0, 0, false, 128, false, 1},
    {1, 1, 8, 1, TM_DTYPE_F32, 3, 0, false, 8, false, 1},
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
    {1, 1, {{1, 700}}},
    {1, 0, {{70, 0}}},
    {1, 0, {{5, 1100}}},
    {3, 3, {{1, 63}, {1, 64}, {1, 511}}},
    {5, 2, {{1, 3}, {1, 530}, {2, 0}, {33, 480}, {1, 130}}},
};

typedef struct batch {
    tm_batch b;
    tm_kv_layer kv;
    int32_t *positions, *seq_begin, *kv_len, *blocks;
    float *qkv;
    float slopes[32];
    size_t width, cache_bytes;
    int h, k, d;
} batch;

static tm_device *g_ref, *g_fast[8];
static const char *g_name[8];
static int g_fast_count;

static const tm_op_table *ops(void)
{
    return tm_backend_find("cpu")->ops;
}

static int open_devices(void **state)
{
    (void)state;
    op_seed();
    g_ref = op_device_open("ref", 1);
    for (int i = 0; i < op_fast_isa_count; i++) {
        for (int threads = 1; threads <= 4; threads += 3) {
            tm_device *dev = op_device_open(op_fast_isas[i], threads);
            if (dev) {
                g_fast[g_fast_count] = dev;
                g_name[g_fast_count++] = op_fast_isas[i];
            }
        }
    }
    return g_ref ? 0 : -1;
}

static int close_devices(void **state)
{
    (void)state;
    op_device_close(g_ref);
    for (int i = 0; i < g_fast_count; i++)
        op_device_close(g_fast[i]);
    return 0;
}

/* Random q, k, v, a random cache, and blocks handed out in random order with a few spare ones. */
static batch make_batch(const shape *s, const layout *l)
{
    batch x = {.h = s->heads, .k = s->kv_heads, .d = s->d};
    int tokens = 0, max_blocks = 1, n_blocks = 3;
    for (int i = 0; i < l->n_seqs; i++) {
        int need = (l->seqs[i].fresh + l->seqs[i].before + s->block_tokens - 1) / s->block_tokens;
        tokens += l->seqs[i].fresh;
        max_blocks = TM_MAX(max_blocks, need);
        n_blocks += need;
    }
    TM_ASSERT(tokens > 0 && n_blocks > 0 && max_blocks > 0 && l->n_seqs > 0);
    x.positions = calloc((size_t)tokens, sizeof(int32_t));
    x.seq_begin = calloc((size_t)l->n_seqs + 1, sizeof(int32_t));
    x.kv_len = calloc((size_t)l->n_seqs, sizeof(int32_t));
    x.blocks = calloc((size_t)l->n_seqs * (size_t)max_blocks, sizeof(int32_t));
    int32_t *order = calloc((size_t)n_blocks, sizeof(int32_t));
    for (int i = 0; i < n_blocks; i++) {
        int j = op_pick(0, i);
        order[i] = order[j];
        order[j] = i;
    }
    int t = 0, next = 0;
    for (int i = 0; i < l->n_seqs; i++) {
        x.kv_len[i] = l->seqs[i].fresh + l->seqs[i].before;
        for (int j = 0; j * s->block_tokens < x.kv_len[i]; j++)
            x.blocks[i * max_blocks + j] = order[next++];
        for (int j = 0; j < l->seqs[i].fresh; j++)
            x.positions[t++] = l->seqs[i].before + j;
        x.seq_begin[i + 1] = t;
    }
    free(order);
    x.b = (tm_batch){.n_tokens = tokens,
                     .n_seqs = l->n_seqs,
                     .n_decode = l->n_decode,
                     .positions = x.positions,
                     .seq_begin = x.seq_begin,
                     .kv_len = x.kv_len,
                     .blocks = x.blocks,
                     .max_blocks = max_blocks};
    size_t elements = (size_t)n_blocks * (size_t)(s->kv_heads * s->block_tokens * s->d);
    x.cache_bytes = elements * tm_dtype_size(s->dtype);
    x.kv = (tm_kv_layer){.k = op_random_array(elements, s->dtype, -2, 2),
                         .v = op_random_array(elements, s->dtype, -1, 1),
                         .dtype = s->dtype,
                         .n_blocks = n_blocks,
                         .block_tokens = s->block_tokens,
                         .n_kv_heads = s->kv_heads,
                         .head_dim = s->d};
    x.width = (size_t)(s->heads + 2 * s->kv_heads) * (size_t)s->d;
    x.qkv = op_random_array((size_t)tokens * x.width, TM_DTYPE_F32, -2, 2);
    for (int i = 0; i < s->heads; i++)
        x.slopes[i] = exp2f(-8.0f * (float)(i + 1) / (float)s->heads);
    return x;
}

static void free_batch(batch *x)
{
    free(x->positions), free(x->seq_begin), free(x->kv_len), free(x->blocks);
    free(x->kv.k), free(x->kv.v), free(x->qkv);
}

static size_t cache_at(const batch *x, int seq, int kv_head, int pos)
{
    int bt = x->kv.block_tokens;
    size_t block = (size_t)x->blocks[seq * x->b.max_blocks + pos / bt];
    return ((block * (size_t)x->k + (size_t)kv_head) * (size_t)bt + (size_t)(pos % bt)) *
           (size_t)x->d;
}

/* ---- rope ---- */

static void rope_double(const shape *s, const batch *x, const float *inv_freq, double *out)
{
    int half = s->rotary / 2;
    for (int t = 0; t < x->b.n_tokens; t++) {
        for (size_t i = 0; i < x->width; i++)
            out[(size_t)t * x->width + i] = (double)x->qkv[(size_t)t * x->width + i];
        for (int hd = 0; hd < s->heads + s->kv_heads; hd++) {
            double *q = out + (size_t)t * x->width + (size_t)(hd * s->d);
            for (int i = 0; i < half; i++) {
                int a = s->interleaved ? 2 * i : i, b = s->interleaved ? 2 * i + 1 : i + half;
                float angle = (float)x->positions[t] * inv_freq[i]; /* f32 by contract */
                double c = cos((double)angle) * (double)s->mscale;
                double sn = sin((double)angle) * (double)s->mscale, u = q[a], v = q[b];
                q[a] = u * c - v * sn;
                q[b] = v * c + u * sn;
            }
        }
    }
}

/* The cache holds exactly the rounded k and v of the output rows, and nothing else changed. */
static void check_cache(const batch *x, const float *qkv, const void *k, const void *v)
{
    size_t size = tm_dtype_size(x->kv.dtype), d = (size_t)x->d;
    char *want_k = malloc(x->cache_bytes), *want_v = malloc(x->cache_bytes);
    memcpy(want_k, x->kv.k, x->cache_bytes);
    memcpy(want_v, x->kv.v, x->cache_bytes);
    for (int s = 0; s < x->b.n_seqs; s++) {
        for (int t = x->seq_begin[s]; t < x->seq_begin[s + 1]; t++) {
            for (int j = 0; j < x->k; j++) {
                const float *kr = qkv + (size_t)t * x->width + (size_t)(x->h + j) * d;
                size_t at = cache_at(x, s, j, x->positions[t]);
                for (size_t i = 0; i < d; i++) {
                    tm_store_f32(want_k, at + i, x->kv.dtype, kr[i]);
                    tm_store_f32(want_v, at + i, x->kv.dtype, kr[(size_t)x->k * d + i]);
                }
            }
        }
    }
    assert_int_equal(memcmp(k, want_k, x->cache_bytes / size * size), 0);
    assert_int_equal(memcmp(v, want_v, x->cache_bytes / size * size), 0);
    free(want_k), free(want_v);
}

static float *rope_run(tm_device *dev, const shape *s, const batch *x, const float *inv_freq)
{
    size_t n = (size_t)x->b.n_tokens * x->width;
    float *qkv = op_guarded(n);
    tm_kv_layer kv = x->kv;
    kv.k = malloc(x->cache_bytes);
    kv.v = malloc(x->cache_bytes);
    memcpy(kv.k, x->kv.k, x->cache_bytes);
    memcpy(kv.v, x->kv.v, x->cache_bytes);
    memcpy(qkv, x->qkv, n * sizeof *qkv);
    tm_rope_append_args a = {.qkv = qkv,
                             .inv_freq = inv_freq,
                             .batch = &x->b,
                             .kv = &kv,
                             .n_heads = s->heads,
                             .n_kv_heads = s->kv_heads,
                             .head_dim = s->d,
                             .rotary_dim = s->rotary,
                             .interleaved = s->interleaved,
                             .mscale = s->mscale};
    assert_int_equal(ops()->rope_append(dev, &a), TM_OK);
    op_guarded_check(qkv, n, "rope");
    check_cache(x, qkv, kv.k, kv.v);
    free(kv.k), free(kv.v);
    return qkv;
}

static void rope_test(void **state)
{
    (void)state;
    for (size_t c = 0; c < TM_ARRAY_LEN(g_shapes) * TM_ARRAY_LEN(g_layouts); c++) {
        const shape *s = &g_shapes[c / TM_ARRAY_LEN(g_layouts)];
        batch x = make_batch(s, &g_layouts[c % TM_ARRAY_LEN(g_layouts)]);
        size_t n = (size_t)x.b.n_tokens * x.width;
        float inv_freq[128];
        for (int i = 0; i < s->rotary / 2; i++)
            inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)s->rotary);
        double *want = malloc(n * sizeof *want);
        rope_double(s, &x, inv_freq, want);
        float *ref = rope_run(g_ref, s, &x, inv_freq);
        op_check(op_nmse_double(ref, want, n), OP_NMSE_REF, "rope ref, case %zu", c);
        for (int i = 0; i < g_fast_count; i++) {
            float *got = rope_run(g_fast[i], s, &x, inv_freq);
            op_check(op_nmse(got, ref, n), OP_NMSE_FAST, "rope %s, case %zu", g_name[i], c);
            op_guarded_free(got);
        }
        op_guarded_free(ref);
        free(want);
        free_batch(&x);
    }
}

/* ---- attention ---- */

static void attend_double(const shape *s, const batch *x, int seq, int t, int head, double *out)
{
    int pos = x->positions[t], kv_head = head / (s->heads / s->kv_heads);
    int first = s->window > 0 ? TM_MAX(0, pos - s->window + 1) : 0;
    double *p = malloc((size_t)(pos + 1) * sizeof *p), top = -INFINITY, sum = 0;
    const float *q = x->qkv + (size_t)t * x->width + (size_t)(head * s->d);
    for (int j = first; j <= pos; j++) {
        size_t at = cache_at(x, seq, kv_head, j);
        p[j] = 0;
        for (int i = 0; i < s->d; i++)
            p[j] += (double)q[i] * (double)tm_load_f32(x->kv.k, at + (size_t)i, s->dtype);
        p[j] *= (double)(1.0f / sqrtf((float)s->d));
        if (s->softcap > 0)
            p[j] = (double)s->softcap * tanh(p[j] / (double)s->softcap);
        if (s->alibi)
            p[j] += (double)x->slopes[head] * (j - pos);
        top = fmax(top, p[j]);
    }
    for (int i = 0; i < s->d; i++)
        out[i] = 0;
    for (int j = first; j <= pos; j++) {
        size_t at = cache_at(x, seq, kv_head, j);
        double e = exp(p[j] - top);
        sum += e;
        for (int i = 0; i < s->d; i++)
            out[i] += e * (double)tm_load_f32(x->kv.v, at + (size_t)i, s->dtype);
    }
    for (int i = 0; i < s->d; i++)
        out[i] /= sum;
    free(p);
}

static float *attention_run(tm_device *dev, const shape *s, const batch *x, const tm_batch *b)
{
    size_t n = (size_t)x->b.n_tokens * (size_t)(s->heads * s->d);
    float *out = op_guarded(n);
    tm_attention_args a = {.out = out,
                           .qkv = x->qkv,
                           .batch = b,
                           .kv = &x->kv,
                           .n_heads = s->heads,
                           .n_kv_heads = s->kv_heads,
                           .head_dim = s->d,
                           .window = s->window,
                           .scale = 1.0f / sqrtf((float)s->d),
                           .softcap = s->softcap,
                           .alibi = s->alibi ? x->slopes : NULL};
    assert_int_equal(ops()->attention_decode(dev, &a), TM_OK);
    size_t decoded = (size_t)b->seq_begin[b->n_decode] * (size_t)(s->heads * s->d);
    for (size_t i = decoded; i < n; i++)
        assert_true(op_untouched(out[i]));
    assert_int_equal(ops()->attention_prefill(dev, &a), TM_OK);
    op_guarded_check(out, n, "attention");
    return out;
}

/* The same rows with the decodes told to go through prefill: equal to the last bit. */
static void check_as_prefill(tm_device *dev, const shape *s, const batch *x, const float *got,
                             const char *isa, size_t c)
{
    tm_batch b = x->b;
    b.n_decode = 0;
    size_t n = (size_t)b.n_tokens * (size_t)(s->heads * s->d);
    float *again = attention_run(dev, s, x, &b);
    if (memcmp(again, got, n * sizeof *got) != 0)
        fail_msg("attention %s, case %zu: decode and prefill differ", isa, c);
    op_guarded_free(again);
}

static void attention_test(void **state)
{
    (void)state;
    for (size_t c = 0; c < TM_ARRAY_LEN(g_shapes) * TM_ARRAY_LEN(g_layouts); c++) {
        const shape *s = &g_shapes[c / TM_ARRAY_LEN(g_layouts)];
        batch x = make_batch(s, &g_layouts[c % TM_ARRAY_LEN(g_layouts)]);
        size_t row = (size_t)(s->heads * s->d), n = (size_t)x.b.n_tokens * row;
        double *want = malloc(n * sizeof *want);
        for (int q = 0; q < x.b.n_seqs; q++)
            for (int t = x.seq_begin[q]; t < x.seq_begin[q + 1]; t++)
                for (int i = 0; i < s->heads; i++)
                    attend_double(s, &x, q, t, i, want + (size_t)t * row + (size_t)(i * s->d));
        float *ref = attention_run(g_ref, s, &x, &x.b), *first = NULL;
        op_check(op_nmse_double(ref, want, n), OP_NMSE_REF, "attention ref, case %zu", c);
        for (int i = 0; i < g_fast_count; i++) {
            float *got = attention_run(g_fast[i], s, &x, &x.b);
            op_check(op_nmse(got, ref, n), OP_NMSE_FAST, "attention %s, case %zu", g_name[i], c);
            check_as_prefill(g_fast[i], s, &x, got, g_name[i], c);
            if (i % 2 == 0) {
                first = got;
                continue;
            }
            if (memcmp(first, got, n * sizeof *got) != 0)
                fail_msg("attention %s, case %zu: 1 and 4 threads differ", g_name[i], c);
            op_guarded_free(first);
            op_guarded_free(got);
        }
        op_guarded_free(ref);
        free(want);
        free_batch(&x);
    }
}

/* A token's result inside a chunk equals the one it gets alone. */
static void attention_alone_test(void **state)
{
    (void)state;
    static const layout chunk = {1, 0, {{37, 500}}};
    for (int i = 0; i < g_fast_count; i++) {
        for (size_t c = 0; c < TM_ARRAY_LEN(g_shapes); c++) {
            const shape *s = &g_shapes[c];
            batch x = make_batch(s, &chunk);
            size_t row = (size_t)(s->heads * s->d);
            float *all = attention_run(g_fast[i], s, &x, &x.b);
            batch one = x;
            int t = op_pick(0, 36);
            int32_t begin[2] = {0, 1}, len[1] = {x.positions[t] + 1};
            one.b.n_tokens = one.b.n_decode = 1;
            one.b.positions = x.positions + t;
            one.b.seq_begin = begin;
            one.b.kv_len = len;
            one.qkv = x.qkv + (size_t)t * x.width;
            float *alone = attention_run(g_fast[i], s, &one, &one.b);
            if (memcmp(alone, all + (size_t)t * row, row * sizeof *all) != 0)
                fail_msg("attention %s, shape %zu: token %d alone differs", g_name[i], c, t);
            op_guarded_free(alone);
            op_guarded_free(all);
            free_batch(&x);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rope_test),
        cmocka_unit_test(attention_test),
        cmocka_unit_test(attention_alone_test),
    };
    return cmocka_run_group_tests(tests, open_devices, close_devices);
}
