/* NCCL, for large messages and for devices that cannot reach each other's memory.
 *
 * The library is loaded at run time, so that the same program starts where it is not installed. The communicator
 * does not block: a call that NCCL finishes in the background is waited for here, with a limit of time and an eye on
 * the peers. A failure is UNAVAILABLE, and the communicator is then only good for being aborted. */
#ifndef TM_ENGINE_BACKEND_CUDA_NCCL_H
#define TM_ENGINE_BACKEND_CUDA_NCCL_H

#include "engine/backend/cuda/kernels.h"
#include "parallel/comm.h"

#define TM_NCCL_ID_BYTES 128

typedef struct tm_nccl tm_nccl;

/* NOT_FOUND when the library is not there or too old; err says which. */
tm_status tm_nccl_load(tm_nccl **out, int64_t patience_ms, tm_err *err);
int tm_nccl_version(const tm_nccl *n);
/* Rank 0 makes the id that all ranks join with. */
tm_status tm_nccl_make_id(tm_nccl *n, uint8_t id[TM_NCCL_ID_BYTES], tm_err *err);
tm_status tm_nccl_join(tm_nccl *n, const uint8_t id[TM_NCCL_ID_BYTES], tm_comm *comm, tm_err *err);
/* lost: the group is; then nothing is waited for. */
void tm_nccl_destroy(tm_nccl *n, bool lost);

/* Enqueued on the stream. */
tm_status tm_nccl_sum(tm_nccl *n, void *x, size_t count, tm_dtype dtype, cudaStream_t stream);
tm_status tm_nccl_max_keys(tm_nccl *n, uint64_t *keys, size_t count, cudaStream_t stream);
/* Rank 0 gets all[r * count ...] of ranks r > 0. */
tm_status tm_nccl_gather(tm_nccl *n, const float *x, size_t count, float *all, cudaStream_t stream);
/* What went wrong in the background since; TM_OK: nothing. */
tm_status tm_nccl_check(tm_nccl *n);

#endif
