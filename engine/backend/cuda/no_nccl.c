/* In place of nccl.c where NCCL's header is not installed: sums then go through peer memory alone. */
#if !__has_include(<nccl.h>)
#include "common/check.h"
#include "engine/backend/cuda/nccl.h"

tm_status tm_nccl_load(tm_nccl **out, int64_t patience_ms, tm_err *err)
{
    (void)out;
    (void)patience_ms;
    return TM_FAIL(err, TM_STATUS_NOT_FOUND, "this build has no NCCL");
}

int tm_nccl_version(const tm_nccl *n)
{
    (void)n;
    return 0;
}

tm_status tm_nccl_make_id(tm_nccl *n, uint8_t id[TM_NCCL_ID_BYTES], tm_err *err)
{
    (void)n;
    (void)id;
    return TM_FAIL(err, TM_STATUS_NOT_FOUND, "this build has no NCCL");
}

tm_status tm_nccl_join(tm_nccl *n, const uint8_t id[TM_NCCL_ID_BYTES], tm_comm *comm, tm_err *err)
{
    (void)n;
    (void)id;
    (void)comm;
    return TM_FAIL(err, TM_STATUS_NOT_FOUND, "this build has no NCCL");
}

void tm_nccl_destroy(tm_nccl *n, bool lost)
{
    (void)n;
    (void)lost;
}

tm_status tm_nccl_sum(tm_nccl *n, void *x, size_t count, tm_dtype dtype, cudaStream_t stream)
{
    (void)n;
    (void)x;
    (void)count;
    (void)dtype;
    (void)stream;
    return TM_STATUS_UNSUPPORTED;
}

tm_status tm_nccl_max_keys(tm_nccl *n, uint64_t *keys, size_t count, cudaStream_t stream)
{
    (void)n;
    (void)keys;
    (void)count;
    (void)stream;
    return TM_STATUS_UNSUPPORTED;
}

tm_status tm_nccl_gather(tm_nccl *n, const float *x, size_t count, float *all, cudaStream_t stream)
{
    (void)n;
    (void)x;
    (void)count;
    (void)all;
    (void)stream;
    return TM_STATUS_UNSUPPORTED;
}

tm_status tm_nccl_check(tm_nccl *n)
{
    (void)n;
    return TM_OK;
}

#endif
