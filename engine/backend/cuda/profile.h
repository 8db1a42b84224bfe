/* Times of single kernels, for `bench engine --profile`: an event before and one after each launch. Kernels then no
 * longer overlap, so their sum is more than a step that is not watched. */
#ifndef TM_ENGINE_BACKEND_CUDA_PROFILE_H
#define TM_ENGINE_BACKEND_CUDA_PROFILE_H

#include <cuda_runtime_api.h>

#include "engine/backend/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tm_cuda_profile tm_cuda_profile;

tm_cuda_profile *tm_cuda_profile_create(void); /* NULL: no memory */
void tm_cuda_profile_destroy(tm_cuda_profile *p);

/* Around what is enqueued: the row is known by id. name, if given, is the row's name; else id is a kernel, and its own
 * name is taken. */
void tm_cuda_profile_enter(tm_cuda_profile *p, const void *id, const char *name, cudaStream_t s);
void tm_cuda_profile_leave(tm_cuda_profile *p, cudaStream_t s);

/* Waits for what was enqueued and gives the rows, the longest first. */
cudaError_t tm_cuda_profile_rows(tm_cuda_profile *p, tm_profile_row *rows, int max, int *count);

#ifdef __cplusplus
}
#endif
#endif
