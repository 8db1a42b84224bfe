/* The operator table: each entry picks a kernel by shape and enqueues it. */
#include "common/check.h"
#include "common/log.h"
#include "engine/backend/cuda/device.h"

static tm_status op_embed(tm_device *dev, const tm_embed_args *a)
{
    return TM_CUDA(dev, tm_cuda_embed_launch(a, &dev->ctx));
}

static tm_status op_norm(tm_device *dev, const tm_norm_args *a)
{
    return TM_CUDA(dev, tm_cuda_norm_launch(a, &dev->ctx));
}

static tm_status op_gather_rows(tm_device *dev, const tm_gather_rows_args *a)
{
    return TM_CUDA(dev, tm_cuda_gather_rows_launch(a, &dev->ctx));
}

static tm_status op_act(tm_device *dev, const tm_act_args *a)
{
    return TM_CUDA(dev, tm_cuda_act_launch(a, &dev->ctx));
}

static tm_status op_rope_append(tm_device *dev, const tm_rope_append_args *a)
{
    return TM_CUDA(dev, tm_cuda_rope_append_launch(a, &dev->ctx));
}

static tm_status op_attention_prefill(tm_device *dev, const tm_attention_args *a)
{
    if (tm_cuda_attention_hopper_fits(a, &dev->ctx))
        return TM_CUDA(dev, tm_cuda_attention_hopper_launch(a, &dev->ctx));
    if (tm_cuda_attention_prefill_fits(a->head_dim))
        return TM_CUDA(dev, tm_cuda_attention_prefill_launch(a, &dev->ctx));
    return TM_CUDA(dev, tm_cuda_attention_any_launch(a, false, &dev->ctx));
}

static tm_status op_attention_decode(tm_device *dev, const tm_attention_args *a)
{
    if (tm_cuda_attention_decode_fits(a->head_dim, a->kv->block_tokens))
        return TM_CUDA(dev, tm_cuda_attention_decode_launch(a, NULL, &dev->ctx));
    return TM_CUDA(dev, tm_cuda_attention_any_launch(a, true, &dev->ctx));
}

static tm_status op_rope_attention_decode(tm_device *dev, const tm_rope_append_args *r,
                                          const tm_attention_args *a)
{
    if (tm_cuda_rope_decode_fits(r) &&
        tm_cuda_attention_decode_fits(a->head_dim, a->kv->block_tokens))
        return TM_CUDA(dev, tm_cuda_attention_decode_launch(a, r, &dev->ctx));
    TM_TRY(op_rope_append(dev, r));
    return op_attention_decode(dev, a);
}

static tm_status op_head_norm(tm_device *dev, const tm_head_norm_args *a)
{
    return TM_CUDA(dev, tm_cuda_head_norm_launch(a, &dev->ctx));
}

static tm_status op_bound(tm_device *dev, const tm_bound_args *a)
{
    return TM_CUDA(dev, tm_cuda_bound_launch(a, &dev->ctx));
}

static tm_status op_copy(tm_device *dev, const tm_copy_args *a)
{
    return TM_CUDA(dev, tm_cuda_copy_launch(a, &dev->ctx));
}

static tm_status op_moe_route(tm_device *dev, const tm_moe_route_args *a)
{
    return TM_CUDA(dev, tm_cuda_moe_route_launch(a, &dev->ctx));
}

static tm_status op_moe_experts(tm_device *dev, const tm_moe_experts_args *a)
{
    return TM_CUDA(dev, tm_cuda_moe_experts_launch(a, &dev->ctx));
}

static tm_status op_argmax(tm_device *dev, const tm_argmax_args *a)
{
    return TM_CUDA(dev, tm_cuda_argmax_launch(a, &dev->ctx));
}

static tm_status op_sample(tm_device *dev, const tm_sample_args *a)
{
    return TM_CUDA(dev, tm_cuda_sample_launch(a, &dev->ctx));
}

static tm_status gemm(tm_device *dev, const tm_linear_args *a)
{
    if (a->w->bias)
        TM_TRY(TM_CUDA(dev, tm_cuda_bias_rows_launch(a, &dev->ctx)));
    int st = dev->poisoned ? 0 : tm_cuda_gemm_run(dev->gemm, a, a->w->bias != NULL, &dev->ctx);
    if (st) {
        tm_log(TM_LOG_ERROR, "cublaslt", "device %d: [%d, %d] x %d tokens: status %d", dev->index,
               a->w->n, a->w->k, a->n_tokens, st);
        return TM_CUDA(dev, cudaErrorUnknown);
    }
    return dev->poisoned ? TM_STATUS_INTERNAL : TM_OK;
}

/* Columns in the middle of a row may begin anywhere; the fast kernels read and write 16 bytes at once. */
static bool aligned(const void *p)
{
    return (uintptr_t)p % 16 == 0;
}

/* Products whose numbers the fast kernels can read. */
static bool skinny_takes(const tm_device *dev, const tm_linear_args *a)
{
    return aligned(a->x) && aligned(a->w->data) &&
           tm_cuda_skinny_fits(a->w, a->n_tokens, a->ldx, &dev->ctx);
}

static bool gemm_takes(const tm_device *dev, const tm_linear_args *a)
{
    return aligned(a->x) && aligned(a->w->data) && aligned(a->out) &&
           tm_cuda_gemm_fits(a, &dev->ctx);
}

static tm_status op_linear(tm_device *dev, const tm_linear_args *a)
{
    if (a->n_tokens == 0)
        return TM_OK;
    if (skinny_takes(dev, a))
        return TM_CUDA(dev, tm_cuda_skinny_launch(a, NULL, &dev->ctx));
    if (gemm_takes(dev, a))
        return gemm(dev, a);
    if (tm_cuda_linear_f32_fits(a))
        return TM_CUDA(dev, tm_cuda_linear_f32_launch(a, &dev->ctx));
    return TM_CUDA(dev, tm_cuda_linear_any_launch(a, &dev->ctx));
}

static tm_status op_linear_tune(tm_device *dev, const tm_linear_args *a)
{
    if (a->n_tokens == 0 || skinny_takes(dev, a) || !gemm_takes(dev, a))
        return TM_OK;
    if (dev->poisoned)
        return TM_STATUS_INTERNAL;
    return TM_CUDA(dev, tm_cuda_gemm_tune(dev->gemm, a, &dev->ctx));
}

static tm_status op_linear_heads(tm_device *dev, const tm_linear_heads_args *a)
{
    if (a->n_tokens == 0)
        return TM_OK;
    if (tm_cuda_linear_heads_fits(a, &dev->ctx))
        return TM_CUDA(dev, tm_cuda_linear_heads_launch(a, &dev->ctx));
    size_t bytes = (size_t)a->n * (size_t)a->w->k * tm_dtype_size(a->w->dtype);
    size_t act = tm_dtype_size(dev->ctx.act);
    for (int i = 0; i < a->groups; i++) {
        tm_weight w = *a->w;
        w.n = a->n;
        w.data = (const char *)a->w->data + (size_t)i * bytes;
        const tm_linear_args l = {.out = (char *)a->out + (size_t)i * (size_t)a->gdo * act,
                                  .x = (const char *)a->x + (size_t)i * (size_t)a->gdx * act,
                                  .w = &w,
                                  .n_tokens = a->n_tokens,
                                  .ldx = a->ldx,
                                  .ldo = a->ldo};
        TM_TRY(op_linear(dev, &l));
    }
    return TM_OK;
}

static tm_status op_linear_gated(tm_device *dev, const tm_linear_gated_args *a)
{
    if (a->n_tokens == 0)
        return TM_OK;
    if (tm_cuda_skinny_gated_fits(a, &dev->ctx))
        return TM_CUDA(dev, tm_cuda_skinny_gated_launch(a, NULL, &dev->ctx));
    const tm_linear_args l = {.out = a->gate_up,
                              .x = a->x,
                              .w = a->w,
                              .n_tokens = a->n_tokens,
                              .ldx = a->ldx,
                              .ldo = a->w->n};
    const tm_act_args s = {.out = a->out,
                           .gate_up = a->gate_up,
                           .n_tokens = a->n_tokens,
                           .f = a->w->n / 2,
                           .act = a->act,
                           .gated = true};
    TM_TRY(op_linear(dev, &l));
    return op_act(dev, &s);
}

static tm_status op_norm_linear(tm_device *dev, const tm_norm_args *n, const tm_linear_args *a)
{
    if (a->n_tokens > 0 && tm_cuda_skinny_fits(a->w, a->n_tokens, a->ldx, &dev->ctx) &&
        tm_cuda_skinny_norm_fits(n, a->w))
        return TM_CUDA(dev, tm_cuda_skinny_launch(a, n, &dev->ctx));
    TM_TRY(op_norm(dev, n));
    return op_linear(dev, a);
}

static tm_status op_norm_linear_gated(tm_device *dev, const tm_norm_args *n,
                                      const tm_linear_gated_args *a)
{
    if (a->n_tokens > 0 && tm_cuda_skinny_gated_fits(a, &dev->ctx) &&
        tm_cuda_skinny_norm_fits(n, a->w))
        return TM_CUDA(dev, tm_cuda_skinny_gated_launch(a, n, &dev->ctx));
    TM_TRY(op_norm(dev, n));
    return op_linear_gated(dev, a);
}

/* Weights are used as they lie in memory. */
static tm_status op_linear_prepare(tm_device *dev, tm_weight *w, tm_err *err)
{
    (void)dev, (void)w, (void)err;
    return TM_OK;
}

static void op_linear_release(tm_device *dev, tm_weight *w)
{
    (void)dev, (void)w;
}

static bool op_attention_fits(int head_dim, int block_tokens)
{
    return head_dim >= 8 && head_dim % 8 == 0 && head_dim <= TM_CUDA_HEAD_DIM_MAX &&
           block_tokens >= 1;
}

const tm_op_table tm_cuda_ops = {
    .features = TM_FEATURE_SEQ_ROPE | TM_FEATURE_LOGN | TM_FEATURE_LATENT_KV,
    .linear_prepare = op_linear_prepare,
    .linear_release = op_linear_release,
    .embed = op_embed,
    .norm = op_norm,
    .linear = op_linear,
    .linear_tune = op_linear_tune,
    .rope_append = op_rope_append,
    .attention_prefill = op_attention_prefill,
    .attention_decode = op_attention_decode,
    .act = op_act,
    .gather_rows = op_gather_rows,
    .head_norm = op_head_norm,
    .bound = op_bound,
    .copy = op_copy,
    .moe_route = op_moe_route,
    .moe_experts = op_moe_experts,
    .moe_work_bytes = tm_cuda_moe_work_bytes,
    .attention_fits = op_attention_fits,
    .linear_gated = op_linear_gated,
    .argmax = op_argmax,
    .norm_linear = op_norm_linear,
    .norm_linear_gated = op_norm_linear_gated,
    .rope_attention_decode = op_rope_attention_decode,
    .sum = tm_cuda_op_sum,
    .sum_norm = tm_cuda_op_sum_norm,
    .gather_cols = tm_cuda_op_gather_cols,
    .argmax_ranks = tm_cuda_op_argmax_ranks,
    .linear_heads = op_linear_heads,
    .sample = op_sample,
    .spread = tm_cuda_op_spread,
};
