/* The CUDA backend as the rest of the engine sees it: one row of the backend array. */
#ifndef TM_ENGINE_BACKEND_CUDA_CUDA_H
#define TM_ENGINE_BACKEND_CUDA_CUDA_H

#include "engine/backend/backend.h"

extern const tm_backend tm_backend_cuda;

#endif
