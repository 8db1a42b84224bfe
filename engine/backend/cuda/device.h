/* Inside the CUDA backend: the device, shared by the files of this folder. */
#ifndef TM_ENGINE_BACKEND_CUDA_DEVICE_H
#define TM_ENGINE_BACKEND_CUDA_DEVICE_H

#include "engine/backend/cuda/gemm.h"
#include "engine/backend/cuda/kernels.h"
#include "engine/backend/cuda/ranks.h"

struct tm_device {
    int index;
    tm_cuda_ctx ctx;
    tm_cuda_gemm *gemm;
    tm_ranks *ranks; /* NULL: this device is alone */
    tm_device_opts opts;
    bool poisoned;
    char text[160];
};

extern const tm_op_table tm_cuda_ops;

/* Passes a result on; the first failure is logged and poisons the device: after it every call fails. */
tm_status tm_cuda_check(tm_device *dev, cudaError_t e, const char *call);

#define TM_CUDA(dev, call) tm_cuda_check((dev), (call), #call)

#endif
