/* Rotary positions and the append to the cache, in units of tokens.
 *
 * The sines and cosines of a token are computed once and used for all its q and k heads. Half pairing
 * rotates whole vectors; interleaved pairing, which few families use, goes pair by pair. */
#include <math.h>

#include "common/check.h"
#include "engine/backend/cpu/cpu.h"
#include "engine/backend/cpu/simd/simd.h"
#include "engine/backend/cpu/simd/vmath.h"

enum { SERIAL_ELEMENTS = 16 * 1024 };

typedef struct rope_task {
    const tm_rope_append_args *a;
    float *tables; /* per thread: cos[pairs], sin[pairs], each padded to whole vectors */
    size_t pairs;  /* padded rotary_dim / 2 */
    int units;
} rope_task;

static void fill_table(const tm_rope_append_args *a, const float *freq, int32_t pos, float *cosines,
                       float *sines)
{
    int half = a->rotary_dim / 2;
    vf p = vf_set1((float)pos), m = vf_set1(a->mscale), s, c;
    for (int i = 0; i < half; i += VW) {
        int n = TM_MIN(VW, half - i);
        vf f = n == VW ? vf_load(freq + i) : vf_loadn(freq + i, n);
        vm_sincos(vf_mul(p, f), &s, &c);
        vf_store(cosines + i, vf_mul(c, m));
        vf_store(sines + i, vf_mul(s, m));
    }
}

static void rotate_halves(float *head, int half, const float *cosines, const float *sines)
{
    int i = 0;
    for (; i + VW <= half; i += VW) {
        vf c = vf_load(cosines + i), s = vf_load(sines + i);
        vf x = vf_load(head + i), y = vf_load(head + half + i);
        vf_store(head + i, vf_fnma(y, s, vf_mul(x, c)));
        vf_store(head + half + i, vf_fma(x, s, vf_mul(y, c)));
    }
    for (; i < half; i++) {
        float x = head[i], y = head[half + i];
        head[i] = x * cosines[i] - y * sines[i];
        head[half + i] = y * cosines[i] + x * sines[i];
    }
}

static void rotate_pairs(float *head, int half, const float *cosines, const float *sines)
{
    for (int i = 0; i < half; i++) {
        float x = head[2 * i], y = head[2 * i + 1];
        head[2 * i] = x * cosines[i] - y * sines[i];
        head[2 * i + 1] = y * cosines[i] + x * sines[i];
    }
}

/* See logn_len; one factor per token. */
static void scale_queries(const tm_rope_append_args *a, float *q, int32_t pos)
{
    if (a->logn_len <= 0 || pos < a->logn_len)
        return;
    float s = (float)(log((double)pos + 1.0) / log((double)a->logn_len));
    for (int i = 0; i < a->n_heads * a->head_dim; i++)
        q[i] *= s;
}

static void store_head(void *cache, size_t at, tm_dtype dtype, const float *src, int d)
{
    int i = 0;
    for (; i + VW <= d; i += VW)
        vf_store_t(cache, at + (size_t)i, dtype, vf_load(src + i));
    if (i < d)
        vf_storen_t(cache, at + (size_t)i, dtype, vf_loadn(src + i, d - i), d - i);
}

static void rope_token(const rope_task *r, int seq, int t, float *cosines, float *sines)
{
    const tm_rope_append_args *a = r->a;
    const tm_kv_layer *kv = a->kv;
    int d = a->head_dim, half = a->rotary_dim / 2, pos = a->batch->positions[t];
    float *q = (float *)a->qkv + (size_t)t * (size_t)(a->n_heads + 2 * a->n_kv_heads) * (size_t)d;
    float *k = q + (size_t)a->n_heads * (size_t)d, *v = k + (size_t)a->n_kv_heads * (size_t)d;
    if (half > 0)
        fill_table(a, a->seq_inv_freq ? a->seq_inv_freq + seq * half : a->inv_freq, pos, cosines,
                   sines);
    for (int i = 0; half > 0 && i < a->n_heads + a->n_kv_heads; i++)
        (a->interleaved ? rotate_pairs : rotate_halves)(q + (size_t)i * (size_t)d, half, cosines,
                                                        sines);
    scale_queries(a, q, pos);
    int32_t block =
        a->batch
            ->blocks[(size_t)seq * (size_t)a->batch->max_blocks + (size_t)(pos / kv->block_tokens)];
    for (int j = 0; j < a->n_kv_heads; j++) {
        size_t row =
            ((size_t)block * (size_t)a->n_kv_heads + (size_t)j) * (size_t)kv->block_tokens +
            (size_t)(pos % kv->block_tokens);
        store_head(kv->k, row * (size_t)d, kv->dtype, k + j * d, d);
        if (kv->v != kv->k)
            store_head(kv->v, row * (size_t)d, kv->dtype, v + j * d, d);
    }
}

static void rope_unit(void *arg, int thread, int unit)
{
    const rope_task *r = arg;
    const tm_batch *b = r->a->batch;
    float *cosines = r->tables + (size_t)thread * 2 * r->pairs;
    int t0 = (int)((int64_t)b->n_tokens * unit / r->units);
    int t1 = (int)((int64_t)b->n_tokens * (unit + 1) / r->units);
    for (int s = 0; s < b->n_seqs; s++) {
        int end = TM_MIN(b->seq_begin[s + 1], t1);
        for (int t = TM_MAX(b->seq_begin[s], t0); t < end; t++)
            rope_token(r, s, t, cosines, cosines + r->pairs);
    }
}

tm_status TM_ISA(rope_append)(tm_device *dev, const tm_rope_append_args *a)
{
    int64_t width = (int64_t)(a->n_heads + 2 * a->n_kv_heads) * a->head_dim;
    bool small = a->batch->n_tokens * width < SERIAL_ELEMENTS;
    rope_task r = {.a = a, .pairs = ((size_t)a->rotary_dim / 2 + 15) / 16 * 16};
    r.tables = tm_cpu_scratch(dev, (size_t)dev->threads * 2 * r.pairs * sizeof(float) + 64);
    if (!r.tables)
        return TM_STATUS_NO_MEMORY;
    r.units = small ? 1 : TM_MIN(a->batch->n_tokens, 4 * dev->threads);
    tm_cpu_run(dev, r.units, rope_unit, &r);
    return TM_OK;
}
