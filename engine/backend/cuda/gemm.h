/* Matrix products of many tokens through cuBLASLt. */
#ifndef TM_ENGINE_BACKEND_CUDA_GEMM_H
#define TM_ENGINE_BACKEND_CUDA_GEMM_H

#include "engine/backend/cuda/kernels.h"

typedef struct tm_cuda_gemm tm_cuda_gemm;

/* Finds the library, which is loaded at run time: a host without a GPU need not have it. */
tm_status tm_cuda_gemm_create(tm_cuda_gemm **out, tm_err *err);
void tm_cuda_gemm_destroy(tm_cuda_gemm *g);

/* K, N and the strides are multiples of 8 and the weight has the activations' dtype. */
bool tm_cuda_gemm_fits(const tm_linear_args *a, const tm_cuda_ctx *c);
/* out = x W^T, or out += x W^T when `add`. 0, or the library's status. */
int tm_cuda_gemm_run(tm_cuda_gemm *g, const tm_linear_args *a, bool add, const tm_cuda_ctx *c);
/* Times the library's best guesses for this shape, up to 256 tokens, once; from then on the fastest runs, with and without
 * `add`. out is overwritten. Not while a graph is recorded. */
cudaError_t tm_cuda_gemm_tune(tm_cuda_gemm *g, const tm_linear_args *a, const tm_cuda_ctx *c);

#endif
