/* Rotary positions on q and k in place, then k and v into the paged cache.
 *
 * Angle of pair i at position p: p * inv_freq[i], in f32. (a, b) -> (a c - b s, b c + a s), c and s times
 * mscale. Cache element: [block][kv head][slot][dim], rounded to the cache's dtype. */
#include <math.h>

#include "engine/backend/cpu/convert.h"
#include "engine/backend/cpu/cpu.h"

static void rotate_head(const tm_rope_append_args *a, const float *inv_freq, float *head,
                        int32_t pos)
{
    int half = a->rotary_dim / 2;
    for (int i = 0; i < half; i++) {
        float angle = (float)pos * inv_freq[i];
        float c = cosf(angle) * a->mscale, s = sinf(angle) * a->mscale;
        float *u = head + (a->interleaved ? 2 * i : i);
        float *v = head + (a->interleaved ? 2 * i + 1 : i + half);
        float x = *u, y = *v;
        *u = x * c - y * s;
        *v = y * c + x * s;
    }
}

static void append_token(const tm_rope_append_args *a, int seq, int32_t pos, const float *k,
                         const float *v)
{
    const tm_kv_layer *kv = a->kv;
    int32_t block =
        a->batch
            ->blocks[(size_t)seq * (size_t)a->batch->max_blocks + (size_t)(pos / kv->block_tokens)];
    for (int j = 0; j < a->n_kv_heads; j++) {
        size_t row =
            ((size_t)block * (size_t)a->n_kv_heads + (size_t)j) * (size_t)kv->block_tokens +
            (size_t)(pos % kv->block_tokens);
        for (int i = 0; i < a->head_dim; i++) {
            size_t at = row * (size_t)a->head_dim + (size_t)i;
            tm_store_f32(kv->k, at, kv->dtype, k[j * a->head_dim + i]);
            if (kv->v != kv->k)
                tm_store_f32(kv->v, at, kv->dtype, v[j * a->head_dim + i]);
        }
    }
}

/* Queries beyond the trained length grow with ln(position), so that attention stays as sharp as it was. */
static void scale_queries(const tm_rope_append_args *a, float *q, int32_t pos)
{
    if (a->logn_len <= 0 || pos < a->logn_len)
        return;
    float s = (float)(log((double)pos + 1.0) / log((double)a->logn_len));
    for (int i = 0; i < a->n_heads * a->head_dim; i++)
        q[i] *= s;
}

tm_status tm_cpu_ref_rope_append(tm_device *dev, const tm_rope_append_args *a)
{
    (void)dev;
    const tm_batch *b = a->batch;
    size_t d = (size_t)a->head_dim;
    size_t row = ((size_t)a->n_heads + 2 * (size_t)a->n_kv_heads) * d;
    for (int s = 0; s < b->n_seqs; s++) {
        const float *freq =
            a->seq_inv_freq ? a->seq_inv_freq + s * (a->rotary_dim / 2) : a->inv_freq;
        for (int t = b->seq_begin[s]; t < b->seq_begin[s + 1]; t++) {
            float *q = (float *)a->qkv + (size_t)t * row;
            for (int i = 0; i < a->n_heads + a->n_kv_heads; i++)
                rotate_head(a, freq, q + (size_t)i * d, b->positions[t]);
            scale_queries(a, q, b->positions[t]);
            float *k = q + (size_t)a->n_heads * d;
            append_token(a, s, b->positions[t], k, k + (size_t)a->n_kv_heads * d);
        }
    }
    return TM_OK;
}
