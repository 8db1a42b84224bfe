/* Causal attention of each query row over its sequence's pages, in the plainest order.
 *
 * For head i of token t at position p: s_j = scale * q.k_j for the visible j, softcap, ALiBi bias
 * slope * (j - p); out = sum_j exp(s_j - max) v_j / sum_j exp(s_j - max). The maximum is found first and
 * the scores are computed again, so no row of scores is stored and any length works. */
#include <math.h>

#include "engine/backend/cpu/convert.h"
#include "engine/backend/cpu/cpu.h"

typedef struct ref_row {
    const tm_attention_args *a;
    const float *q;
    int seq, head;
    int32_t pos;
} ref_row;

/* First element of the cached key (and value) of position j. */
static size_t cache_at(const ref_row *r, int32_t j)
{
    const tm_attention_args *a = r->a;
    const tm_kv_layer *kv = a->kv;
    int32_t block = a->batch->blocks[(size_t)r->seq * (size_t)a->batch->max_blocks +
                                     (size_t)(j / kv->block_tokens)];
    size_t kv_head = (size_t)(r->head / (a->n_heads / a->n_kv_heads));
    size_t row = ((size_t)block * (size_t)a->n_kv_heads + kv_head) * (size_t)kv->block_tokens +
                 (size_t)(j % kv->block_tokens);
    return row * (size_t)a->head_dim;
}

static float score(const ref_row *r, int32_t j)
{
    const tm_attention_args *a = r->a;
    size_t at = cache_at(r, j);
    float s = 0.0f;
    for (int i = 0; i < a->head_dim; i++)
        s += r->q[i] * tm_load_f32(a->kv->k, at + (size_t)i, a->kv->dtype);
    s *= a->scale;
    if (a->softcap > 0.0f)
        s = a->softcap * tanhf(s / a->softcap);
    if (a->alibi)
        s += a->alibi[r->head] * (float)(j - r->pos);
    return s;
}

static void attend_row(const ref_row *r, float *out)
{
    const tm_attention_args *a = r->a;
    int32_t first = a->window > 0 && r->pos >= a->window ? r->pos - a->window + 1 : 0;
    float max = -INFINITY, sum = 0.0f;
    for (int32_t j = first; j <= r->pos; j++)
        max = fmaxf(max, score(r, j));
    for (int i = 0; i < a->head_dim; i++)
        out[i] = 0.0f;
    for (int32_t j = first; j <= r->pos; j++) {
        float p = expf(score(r, j) - max);
        size_t at = cache_at(r, j);
        sum += p;
        for (int i = 0; i < a->head_dim; i++)
            out[i] += p * tm_load_f32(a->kv->v, at + (size_t)i, a->kv->dtype);
    }
    for (int i = 0; i < a->head_dim; i++)
        out[i] /= sum;
}

static void attend_seqs(const tm_attention_args *a, int first, int end)
{
    const tm_batch *b = a->batch;
    size_t d = (size_t)a->head_dim, heads = (size_t)a->n_heads;
    size_t row = (heads + 2 * (size_t)a->n_kv_heads) * d;
    for (int s = first; s < end; s++) {
        for (int t = b->seq_begin[s]; t < b->seq_begin[s + 1]; t++) {
            for (int i = 0; i < a->n_heads; i++) {
                ref_row r = {a, (const float *)a->qkv + (size_t)t * row + (size_t)i * d, s, i,
                             b->positions[t]};
                attend_row(&r, (float *)a->out + ((size_t)t * heads + (size_t)i) * d);
            }
        }
    }
}

tm_status tm_cpu_ref_attention_prefill(tm_device *dev, const tm_attention_args *a)
{
    (void)dev;
    attend_seqs(a, a->batch->n_decode, a->batch->n_seqs);
    return TM_OK;
}

tm_status tm_cpu_ref_attention_decode(tm_device *dev, const tm_attention_args *a)
{
    (void)dev;
    attend_seqs(a, 0, a->batch->n_decode);
    return TM_OK;
}
