/* NCCL behind dlopen: see nccl.h.
 *
 * NVLink multicast stays off (NCCL_NVLS_ENABLE=0 before the library reads its environment): it needs fabric
 * rights that a container often lacks, and a program that dies while it uses it can leave the host's devices unusable. */
#if __has_include(<nccl.h>)
#include "engine/backend/cuda/nccl.h"

#include <dlfcn.h>
#include <nccl.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"

#define LIBRARY     "libnccl.so.2"
#define VERSION_MIN 21800 /* 2.18: recordings and non-blocking communicators together */

/* Every function of the library that is used. */
#define FUNCTIONS(X)                                                                               \
    X(ncclGetVersion)                                                                              \
    X(ncclGetUniqueId)                                                                             \
    X(ncclCommInitRankConfig)                                                                      \
    X(ncclCommFinalize)                                                                            \
    X(ncclCommDestroy)                                                                             \
    X(ncclCommAbort)                                                                               \
    X(ncclCommGetAsyncError)                                                                       \
    X(ncclGetErrorString)                                                                          \
    X(ncclAllReduce)                                                                               \
    X(ncclGroupStart)                                                                              \
    X(ncclGroupEnd)                                                                                \
    X(ncclSend)                                                                                    \
    X(ncclRecv)

_Static_assert(TM_NCCL_ID_BYTES == sizeof(ncclUniqueId), "the id travels as bytes");

struct tm_nccl {
    void *library;
    int version, rank, size;
    ncclComm_t comm;
    tm_comm *peers;
    int64_t patience_ms;
    bool failed;
#define MEMBER(name) __typeof__(&name) name;
    FUNCTIONS(MEMBER)
#undef MEMBER
};

static bool find_functions(tm_nccl *n)
{
    /* POSIX's dlsym gives functions as void *, which ISO C does not convert. */
#define FIND(name)                                                                                 \
    {                                                                                              \
        void *at = dlsym(n->library, #name);                                                       \
        if (!at)                                                                                   \
            return false;                                                                          \
        memcpy(&n->name, &at, sizeof(at));                                                         \
    }
    FUNCTIONS(FIND)
#undef FIND
    return true;
}

tm_status tm_nccl_load(tm_nccl **out, int64_t patience_ms, tm_err *err)
{
    tm_nccl *n = calloc(1, sizeof(*n));
    if (!n)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for NCCL");
    setenv("NCCL_NVLS_ENABLE", "0", 1);
    n->patience_ms = patience_ms;
    n->library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    tm_status st = TM_OK;
    if (!n->library)
        st = TM_FAIL(err, TM_STATUS_NOT_FOUND, "%s cannot be loaded: %.160s", LIBRARY, dlerror());
    else if (!find_functions(n))
        st = TM_FAIL(err, TM_STATUS_NOT_FOUND, "%s: %.160s", LIBRARY, dlerror());
    else if (n->ncclGetVersion(&n->version) != ncclSuccess || n->version < VERSION_MIN)
        st = TM_FAIL(err, TM_STATUS_NOT_FOUND, "%s is version %d, expected at least %d", LIBRARY,
                     n->version, VERSION_MIN);
    if (st != TM_OK) {
        tm_nccl_destroy(n, false);
        return st;
    }
    *out = n;
    return TM_OK;
}

int tm_nccl_version(const tm_nccl *n)
{
    return n->version;
}

/* Logs the first failure; the text is the library's. */
static tm_status fail(tm_nccl *n, ncclResult_t rc, const char *call)
{
    if (!n->failed)
        tm_log(TM_LOG_ERROR, "nccl_failed", "%s: %s", call, n->ncclGetErrorString(rc));
    n->failed = true;
    return TM_STATUS_UNAVAILABLE;
}

static bool under_way(ncclResult_t rc)
{
    return rc == ncclSuccess || rc == ncclInProgress;
}

/* Until what the call began in the background is done: later work of the stream must come after it. */
static tm_status settle(tm_nccl *n, ncclResult_t rc, const char *call, int64_t patience_ms)
{
    int64_t begin = tm_clock_ms();
    for (unsigned i = 0; rc == ncclInProgress; i++) {
        ncclResult_t now = ncclSuccess;
        rc = n->ncclCommGetAsyncError(n->comm, &now);
        if (rc != ncclSuccess)
            break;
        rc = now;
        if (rc != ncclInProgress || i < 1000)
            continue;
        if (tm_comm_check(n->peers) != TM_OK || tm_clock_ms() - begin >= patience_ms) {
            if (!n->failed)
                tm_log(TM_LOG_ERROR, "nccl_failed", "%s: a rank ended or hangs", call);
            n->failed = true;
            return TM_STATUS_UNAVAILABLE;
        }
        tm_sleep_ms(1);
    }
    return rc == ncclSuccess ? TM_OK : fail(n, rc, call);
}

tm_status tm_nccl_make_id(tm_nccl *n, uint8_t id[TM_NCCL_ID_BYTES], tm_err *err)
{
    ncclUniqueId made;
    ncclResult_t rc = n->ncclGetUniqueId(&made);
    if (rc != ncclSuccess)
        return TM_FAIL(err, TM_STATUS_UNAVAILABLE, "NCCL cannot open its meeting place: %s",
                       n->ncclGetErrorString(rc));
    memcpy(id, &made, sizeof(made));
    return TM_OK;
}

tm_status tm_nccl_join(tm_nccl *n, const uint8_t id[TM_NCCL_ID_BYTES], tm_comm *comm, tm_err *err)
{
    enum { JOIN_MS = 120 * 1000 }; /* topology search and connections of a large host */
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclUniqueId made;
    memcpy(&made, id, sizeof(made));
    config.blocking = 0;
    n->peers = comm;
    n->rank = tm_comm_rank(comm);
    n->size = tm_comm_size(comm);
    ncclResult_t rc = n->ncclCommInitRankConfig(&n->comm, n->size, made, n->rank, &config);
    tm_status st = settle(n, rc, "ncclCommInitRankConfig", JOIN_MS);
    return st == TM_OK
               ? TM_OK
               : TM_FAIL(err, st, "NCCL cannot connect the ranks (NCCL_DEBUG=WARN says why)");
}

void tm_nccl_destroy(tm_nccl *n, bool lost)
{
    if (!n)
        return;
    if (n->comm && !lost && !n->failed &&
        settle(n, n->ncclCommFinalize(n->comm), "ncclCommFinalize", n->patience_ms) == TM_OK)
        n->ncclCommDestroy(n->comm);
    else if (n->comm)
        n->ncclCommAbort(n->comm);
    /* The library has threads and exit handlers of its own: it stays loaded. */
    free(n);
}

static ncclDataType_t data_type(tm_dtype t)
{
    switch (t) {
    case TM_DTYPE_BF16:
        return ncclBfloat16;
    case TM_DTYPE_F16:
        return ncclFloat16;
    default:
        return ncclFloat32;
    }
}

tm_status tm_nccl_sum(tm_nccl *n, void *x, size_t count, tm_dtype dtype, cudaStream_t stream)
{
    if (n->failed)
        return TM_STATUS_UNAVAILABLE;
    ncclResult_t rc = n->ncclAllReduce(x, x, count, data_type(dtype), ncclSum, n->comm, stream);
    return settle(n, rc, "ncclAllReduce", n->patience_ms);
}

tm_status tm_nccl_max_keys(tm_nccl *n, uint64_t *keys, size_t count, cudaStream_t stream)
{
    if (n->failed)
        return TM_STATUS_UNAVAILABLE;
    ncclResult_t rc = n->ncclAllReduce(keys, keys, count, ncclUint64, ncclMax, n->comm, stream);
    return settle(n, rc, "ncclAllReduce", n->patience_ms);
}

tm_status tm_nccl_gather(tm_nccl *n, const float *x, size_t count, float *all, cudaStream_t stream)
{
    if (n->failed)
        return TM_STATUS_UNAVAILABLE;
    ncclResult_t rc = n->ncclGroupStart();
    if (under_way(rc) && n->rank > 0)
        rc = n->ncclSend(x, count, ncclFloat32, 0, n->comm, stream);
    for (int r = 1; n->rank == 0 && r < n->size && under_way(rc); r++)
        rc = n->ncclRecv(all + (size_t)r * count, count, ncclFloat32, r, n->comm, stream);
    ncclResult_t ended = n->ncclGroupEnd();
    return settle(n, under_way(rc) ? ended : rc, "ncclGroupEnd", n->patience_ms);
}

tm_status tm_nccl_check(tm_nccl *n)
{
    ncclResult_t now = ncclSuccess;
    if (n->failed)
        return TM_STATUS_UNAVAILABLE;
    ncclResult_t rc = n->ncclCommGetAsyncError(n->comm, &now);
    rc = rc == ncclSuccess ? now : rc;
    return under_way(rc) ? TM_OK : fail(n, rc, "in the background");
}

#endif
