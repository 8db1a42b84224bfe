/* The launchers of the CUDA kernels, callable from C. Each enqueues on the stream and returns; the
 * returned code is that of the launch. `act` is the dtype of activations: bf16 or f16. One operator
 * family per .cu file; template instances stay inside it. */
#ifndef TM_ENGINE_BACKEND_CUDA_KERNELS_H
#define TM_ENGINE_BACKEND_CUDA_KERNELS_H

#include <cuda_runtime_api.h>

#include "engine/backend/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

cudaError_t tm_cuda_norm_launch(const tm_norm_args *a, tm_dtype act, cudaStream_t stream);
cudaError_t tm_cuda_embed_launch(const tm_embed_args *a, tm_dtype act, cudaStream_t stream);
cudaError_t tm_cuda_gather_rows_launch(const tm_gather_rows_args *a, tm_dtype act,
                                       cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
