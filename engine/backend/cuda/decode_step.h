/* The kernel of a whole decode step (decode_step.cu): what it reads, and its launcher. */
#ifndef TM_ENGINE_BACKEND_CUDA_DECODE_STEP_H
#define TM_ENGINE_BACKEND_CUDA_DECODE_STEP_H

#include "engine/backend/cuda/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TM_CUDA_STEP_TOKENS 8 /* sequences at most */

/* One product, in device memory: out[T, n] = x w^T, x [T, k]. With norm_w, x is norm(x + delta) * norm_w and the sum
 * goes to x_out. Gated: w is [2n, k], gates first. Its size is a multiple of 4 bytes. */
typedef struct tm_cuda_phase {
    const void *w, *x, *delta;
    void *out, *x_out;
    const float *bias, *norm_w;
    int n, k, tiles, ldo;
    int gated, f32_out;
} tm_cuda_phase;

typedef struct tm_cuda_step_kv {
    void *k, *v;
} tm_cuda_step_kv;

/* Phases of a layer are qkv, o, gate_up, down; the head is the last. */
typedef struct tm_cuda_step_args {
    const tm_cuda_phase *table; /* [phases] */
    const tm_cuda_step_kv *kv;  /* [layers] */
    int phases, k_max;
    const void *qkv; /* [T, (H + 2 K) d] */
    void *attn;      /* [T, H d] */
    const int32_t *blocks, *kv_len;
    const float *inv_freq;
    float *scratch;
    int *tickets, *arrived, *left;
    int tokens, max_blocks, block_shift, heads, kv_heads, group, head_groups, splits;
    float scale, mscale, eps, one; /* one: 1 where a norm's weight is 1 + w */
    tm_act_kind act;
} tm_cuda_step_args;

size_t tm_cuda_step_smem(const tm_cuda_step_args *a, int head_dim);
/* One block on every multiprocessor; splits is chosen here. */
cudaError_t tm_cuda_step_launch(const tm_cuda_step_args *a, int head_dim, const tm_cuda_ctx *c);

/* decode_plan.c: the table's operators. */
tm_status tm_cuda_decode_plan(tm_device *dev, const tm_decode_shape *s, tm_decode_plan **out,
                              tm_err *err);
void tm_cuda_decode_plan_free(tm_device *dev, tm_decode_plan *plan);
int tm_cuda_decode_plan_rows(const tm_decode_plan *plan);
tm_status tm_cuda_decode_run(tm_device *dev, const tm_decode_plan *plan, const tm_batch *b);

#ifdef __cplusplus
}
#endif
#endif
