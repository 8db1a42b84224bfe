/* The launchers of the CUDA kernels, callable from C. Each enqueues on the context's stream and returns; the
 * returned code is that of the launch. One operator family per .cu file; template instances stay inside it. */
#ifndef TM_ENGINE_BACKEND_CUDA_KERNELS_H
#define TM_ENGINE_BACKEND_CUDA_KERNELS_H

#include <cuda_runtime_api.h>

#include "engine/backend/backend.h"
#include "engine/backend/cuda/profile.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TM_CUDA_SCRATCH_BYTES ((size_t)64 << 20)
#define TM_CUDA_TICKETS       (1 << 16)
#define TM_CUDA_HEAD_DIM_MAX  576

/* What every launch needs of the device. */
typedef struct tm_cuda_ctx {
    cudaStream_t stream;
    tm_dtype act; /* of activations: bf16 or f16 */
    int sms;
    bool
        dependent_launch; /* the device starts a kernel before the one in front has ended (launch.cuh) */
    float *scratch;       /* partial results of one kernel, TM_CUDA_SCRATCH_BYTES */
    int *tickets; /* [TM_CUDA_TICKETS + 1] counters, zero between kernels; the last: tiles */
    tm_cuda_profile *profile; /* NULL: nothing is timed */
    void *tensor_map; /* cuTensorMapEncodeTiled, where the kernels for sm_90a can run; else NULL */
} tm_cuda_ctx;

cudaError_t tm_cuda_norm_launch(const tm_norm_args *a, const tm_cuda_ctx *c);
cudaError_t tm_cuda_embed_launch(const tm_embed_args *a, const tm_cuda_ctx *c);
cudaError_t tm_cuda_gather_rows_launch(const tm_gather_rows_args *a, const tm_cuda_ctx *c);
cudaError_t tm_cuda_act_launch(const tm_act_args *a, const tm_cuda_ctx *c);
cudaError_t tm_cuda_rope_append_launch(const tm_rope_append_args *a, const tm_cuda_ctx *c);
/* r, or NULL: rotates q and appends k and v first, in the same kernel, where tm_cuda_rope_decode_fits. */
cudaError_t tm_cuda_attention_decode_launch(const tm_attention_args *a,
                                            const tm_rope_append_args *r, const tm_cuda_ctx *c);
bool tm_cuda_attention_decode_fits(int head_dim, int block_tokens);
bool tm_cuda_rope_decode_fits(const tm_rope_append_args *r);
cudaError_t tm_cuda_attention_prefill_launch(const tm_attention_args *a, const tm_cuda_ctx *c);
bool tm_cuda_attention_prefill_fits(int head_dim);
/* On Hopper: heads of 64 and 128 without windows, caps and biases, blocks of a multiple of 64 tokens. */
cudaError_t tm_cuda_attention_hopper_launch(const tm_attention_args *a, const tm_cuda_ctx *c);
bool tm_cuda_attention_hopper_fits(const tm_attention_args *a, const tm_cuda_ctx *c);
/* Every block size and head sizes that are multiples of 8 up to TM_CUDA_HEAD_DIM_MAX; of the prompts' sequences, or
 * of the decodes. */
cudaError_t tm_cuda_attention_any_launch(const tm_attention_args *a, bool decode,
                                         const tm_cuda_ctx *c);
cudaError_t tm_cuda_head_norm_launch(const tm_head_norm_args *a, const tm_cuda_ctx *c);
cudaError_t tm_cuda_bound_launch(const tm_bound_args *a, const tm_cuda_ctx *c);
cudaError_t tm_cuda_copy_launch(const tm_copy_args *a, const tm_cuda_ctx *c);
cudaError_t tm_cuda_moe_route_launch(const tm_moe_route_args *a, const tm_cuda_ctx *c);
cudaError_t tm_cuda_moe_experts_launch(const tm_moe_experts_args *a, const tm_cuda_ctx *c);
size_t tm_cuda_moe_work_bytes(const tm_moe_experts_args *a);
cudaError_t tm_cuda_argmax_launch(const tm_argmax_args *a, const tm_cuda_ctx *c);
cudaError_t tm_cuda_sample_launch(const tm_sample_args *a, const tm_cuda_ctx *c);

/* True when the kernel of few tokens takes the shape: at most 8 tokens, K a multiple of 64. */
bool tm_cuda_skinny_fits(const tm_weight *w, int n_tokens, int ldx, const tm_cuda_ctx *c);
bool tm_cuda_skinny_gated_fits(const tm_linear_gated_args *a, const tm_cuda_ctx *c);
/* True when the norm in front of a layer that fits can be part of the same kernel. */
bool tm_cuda_skinny_norm_fits(const tm_norm_args *n, const tm_weight *w);
/* n, or NULL: then x is given. */
cudaError_t tm_cuda_skinny_launch(const tm_linear_args *a, const tm_norm_args *n,
                                  const tm_cuda_ctx *c);
/* out[T,F] = act(x W_gate^T) * (x W_up^T); no bias. */
cudaError_t tm_cuda_skinny_gated_launch(const tm_linear_gated_args *a, const tm_norm_args *n,
                                        const tm_cuda_ctx *c);
/* f32 weights, K a multiple of 4. */
bool tm_cuda_linear_f32_fits(const tm_linear_args *a);
cudaError_t tm_cuda_linear_f32_launch(const tm_linear_args *a, const tm_cuda_ctx *c);
/* Up to 64 tokens, K and x's strides multiples of 8. */
bool tm_cuda_linear_heads_fits(const tm_linear_heads_args *a, const tm_cuda_ctx *c);
cudaError_t tm_cuda_linear_heads_launch(const tm_linear_heads_args *a, const tm_cuda_ctx *c);
/* Any shape, slowly: one warp per output. */
cudaError_t tm_cuda_linear_any_launch(const tm_linear_args *a, const tm_cuda_ctx *c);
/* out[T,N] = bias in every row. */
cudaError_t tm_cuda_bias_rows_launch(const tm_linear_args *a, const tm_cuda_ctx *c);

/* Sums `bytes` of device memory once, for the read bandwidth. */
cudaError_t tm_cuda_read_launch(const void *p, size_t bytes, const tm_cuda_ctx *c);

#ifdef __cplusplus
}
#endif
#endif
