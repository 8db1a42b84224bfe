/* cuBLASLt, loaded with dlopen so that the same program starts where CUDA is not installed.
 *
 * Row-major out[T,N] = x[T,K] W[N,K]^T is, in the library's column-major eyes, out'[N,T] = W'^T x' with W' [K,N]
 * and x' [K,T]. The chosen algorithm of a shape is kept in a small direct-mapped table: decode batches come back
 * to the same few shapes, and a prompt's odd length costs one search of some tens of microseconds.
 *
 * The library's own first guess is not always its best for few tokens, where the weights' bandwidth decides: for the
 * sizes of recorded decode steps its best guesses are timed once, each after L2 was filled with something else. */
#include "engine/backend/cuda/gemm.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"

#define PLANS           1024
#define WORKSPACE_BYTES ((size_t)32 << 20)
#define CANDIDATES      12
#define TIMED_ROUNDS    3
#define TIMED_TOKENS                                                                               \
    256 /* more tokens keep the first guess: prompts have too many lengths to time each */
#define STRING2(x) #x
#define STRING(x)  STRING2(x)
#define LIBRARY    "libcublasLt.so." STRING(CUBLAS_VER_MAJOR)

/* Every function of the library that is used. */
#define FUNCTIONS(X)                                                                               \
    X(cublasLtCreate)                                                                              \
    X(cublasLtDestroy)                                                                             \
    X(cublasLtMatmulDescCreate)                                                                    \
    X(cublasLtMatmulDescDestroy)                                                                   \
    X(cublasLtMatmulDescSetAttribute)                                                              \
    X(cublasLtMatrixLayoutCreate)                                                                  \
    X(cublasLtMatrixLayoutDestroy)                                                                 \
    X(cublasLtMatmulPreferenceCreate)                                                              \
    X(cublasLtMatmulPreferenceDestroy)                                                             \
    X(cublasLtMatmulPreferenceSetAttribute)                                                        \
    X(cublasLtMatmulAlgoGetHeuristic)                                                              \
    X(cublasLtMatmul)

typedef struct key {
    int n, k, tokens, ldx, ldo, f32_out;
    tm_dtype dtype;
} key;

typedef struct plan {
    key of;
    cublasLtMatmulDesc_t op; /* NULL: an empty place */
    cublasLtMatrixLayout_t w, x, out;
    cublasLtMatmulAlgo_t algo;
} plan;

struct tm_cuda_gemm {
    void *library;
    cublasLtHandle_t handle;
    cublasLtMatmulPreference_t preference;
    void *workspace;
    plan plans[PLANS];
#define MEMBER(name) __typeof__(&name) name;
    FUNCTIONS(MEMBER)
#undef MEMBER
};

static bool find_functions(tm_cuda_gemm *g)
{
    /* POSIX's dlsym gives functions as void *, which ISO C does not convert. */
#define FIND(name)                                                                                 \
    {                                                                                              \
        void *at = dlsym(g->library, #name);                                                       \
        if (!at)                                                                                   \
            return false;                                                                          \
        memcpy(&g->name, &at, sizeof(at));                                                         \
    }
    FUNCTIONS(FIND)
#undef FIND
    return true;
}

tm_status tm_cuda_gemm_create(tm_cuda_gemm **out, tm_err *err)
{
    tm_cuda_gemm *g = calloc(1, sizeof(*g));
    if (!g)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for cuBLASLt");
    uint64_t bytes = WORKSPACE_BYTES;
    g->library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    tm_status st = TM_OK;
    if (!g->library)
        st = TM_FAIL(err, TM_STATUS_CONFIG,
                     "%s cannot be loaded (is CUDA's library folder on "
                     "LD_LIBRARY_PATH?): %.120s",
                     LIBRARY, dlerror());
    else if (!find_functions(g))
        st = TM_FAIL(err, TM_STATUS_CONFIG, "%s: %.120s", LIBRARY, dlerror());
    else if (g->cublasLtCreate(&g->handle) != CUBLAS_STATUS_SUCCESS ||
             g->cublasLtMatmulPreferenceCreate(&g->preference) != CUBLAS_STATUS_SUCCESS ||
             g->cublasLtMatmulPreferenceSetAttribute(
                 g->preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes)) !=
                 CUBLAS_STATUS_SUCCESS)
        st = TM_FAIL(err, TM_STATUS_INTERNAL, "cuBLASLt does not start on this device");
    else if (cudaMalloc(&g->workspace, WORKSPACE_BYTES) != cudaSuccess)
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "no device memory for cuBLASLt's workspace");
    if (st != TM_OK) {
        tm_cuda_gemm_destroy(g);
        return st;
    }
    *out = g;
    return TM_OK;
}

static void drop_plan(tm_cuda_gemm *g, plan *p)
{
    if (p->op)
        g->cublasLtMatmulDescDestroy(p->op);
    if (p->w)
        g->cublasLtMatrixLayoutDestroy(p->w);
    if (p->x)
        g->cublasLtMatrixLayoutDestroy(p->x);
    if (p->out)
        g->cublasLtMatrixLayoutDestroy(p->out);
    *p = (plan){0};
}

void tm_cuda_gemm_destroy(tm_cuda_gemm *g)
{
    if (!g)
        return;
    for (size_t i = 0; i < PLANS; i++)
        drop_plan(g, &g->plans[i]);
    if (g->preference)
        g->cublasLtMatmulPreferenceDestroy(g->preference);
    if (g->handle)
        g->cublasLtDestroy(g->handle);
    if (g->workspace)
        cudaFree(g->workspace);
    if (g->library)
        dlclose(g->library);
    free(g);
}

bool tm_cuda_gemm_fits(const tm_linear_args *a, const tm_cuda_ctx *c)
{
    return a->w->dtype == c->act && a->w->k % 8 == 0 && a->w->n % 8 == 0 && a->ldx % 8 == 0 &&
           a->ldo % 8 == 0;
}

static cudaDataType_t data_type(tm_dtype t)
{
    return t == TM_DTYPE_F16 ? CUDA_R_16F : CUDA_R_16BF;
}

/* What a run of this plan needs besides the algorithm. */
static cublasStatus_t matmul(tm_cuda_gemm *g, const plan *p, const cublasLtMatmulAlgo_t *algo,
                             const tm_linear_args *a, float beta, const tm_cuda_ctx *c)
{
    const float one = 1.0f;
    return g->cublasLtMatmul(g->handle, p->op, &one, a->w->data, p->w, a->x, p->x, &beta, a->out,
                             p->out, a->out, p->out, algo, g->workspace, WORKSPACE_BYTES,
                             c->stream);
}

/* Seconds of one run with a cold L2, or a negative number. */
static float time_algo(tm_cuda_gemm *g, const plan *p, const cublasLtMatmulAlgo_t *algo,
                       const tm_linear_args *a, const tm_cuda_ctx *c, const cudaEvent_t ends[2])
{
    float ms = -1.0f;
    if (cudaMemsetAsync(c->scratch, 0, TM_CUDA_SCRATCH_BYTES, c->stream) != cudaSuccess ||
        cudaEventRecord(ends[0], c->stream) != cudaSuccess ||
        matmul(g, p, algo, a, 0.0f, c) != CUBLAS_STATUS_SUCCESS ||
        cudaEventRecord(ends[1], c->stream) != cudaSuccess ||
        cudaEventSynchronize(ends[1]) != cudaSuccess ||
        cudaEventElapsedTime(&ms, ends[0], ends[1]) != cudaSuccess)
        return -1.0f;
    return ms;
}

/* The index of the fastest of found[count]; what out holds is overwritten by its own result again and again. */
static int fastest(tm_cuda_gemm *g, const plan *p, const cublasLtMatmulHeuristicResult_t *found,
                   int count, const tm_linear_args *a, const tm_cuda_ctx *c)
{
    cudaEvent_t ends[2] = {NULL, NULL};
    float best[CANDIDATES];
    int winner = 0;
    if (cudaEventCreate(&ends[0]) != cudaSuccess || cudaEventCreate(&ends[1]) != cudaSuccess)
        count = 0;
    for (int round = 0; round < TIMED_ROUNDS; round++)
        for (int i = 0; i < count; i++) {
            float ms = time_algo(g, p, &found[i].algo, a, c, ends);
            if (round == 0 || (ms >= 0 && ms < best[i]))
                best[i] = ms;
        }
    for (int i = 1; i < count; i++)
        if (best[i] >= 0 && (best[winner] < 0 || best[i] < best[winner]))
            winner = i;
    for (int i = 0; i < 2; i++)
        if (ends[i])
            cudaEventDestroy(ends[i]);
    return winner;
}

/* Not while a graph is recorded, nor where out holds what is added to. */
static bool may_time(const tm_linear_args *a, bool add, const tm_cuda_ctx *c)
{
    enum cudaStreamCaptureStatus recording = cudaStreamCaptureStatusActive;
    return a->n_tokens <= TIMED_TOKENS && a->n_tokens % 8 == 0 && !add &&
           cudaStreamIsCapturing(c->stream, &recording) == cudaSuccess &&
           recording == cudaStreamCaptureStatusNone;
}

static int make_plan(tm_cuda_gemm *g, const key *k, plan *p, const tm_linear_args *a, bool add,
                     const tm_cuda_ctx *c)
{
    const cublasOperation_t transposed = CUBLAS_OP_T;
    cudaDataType_t in = data_type(k->dtype), out = k->f32_out ? CUDA_R_32F : in;
    cublasLtMatmulHeuristicResult_t found[CANDIDATES];
    const bool timed = may_time(a, add, c);
    int count = 0;
    p->of = *k;
    int st = g->cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (!st)
        st = g->cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                               sizeof(transposed));
    if (!st)
        st = g->cublasLtMatrixLayoutCreate(&p->w, in, (uint64_t)k->k, (uint64_t)k->n, k->k);
    if (!st)
        st = g->cublasLtMatrixLayoutCreate(&p->x, in, (uint64_t)k->k, (uint64_t)k->tokens, k->ldx);
    if (!st)
        st = g->cublasLtMatrixLayoutCreate(&p->out, out, (uint64_t)k->n, (uint64_t)k->tokens,
                                           k->ldo);
    if (!st)
        st =
            g->cublasLtMatmulAlgoGetHeuristic(g->handle, p->op, p->w, p->x, p->out, p->out,
                                              g->preference, timed ? CANDIDATES : 1, found, &count);
    if (!st && count == 0)
        st = CUBLAS_STATUS_NOT_SUPPORTED;
    if (st)
        drop_plan(g, p);
    else
        p->algo = found[timed && count > 1 ? fastest(g, p, found, count, a, c) : 0].algo;
    return st;
}

static plan *place_of(tm_cuda_gemm *g, const key *k)
{
    uint64_t h = 0;
    const int parts[] = {k->n, k->k, k->tokens, k->ldx, k->ldo, k->f32_out, (int)k->dtype};
    for (size_t i = 0; i < TM_ARRAY_LEN(parts); i++)
        h = (h ^ (uint64_t)parts[i]) * 0x9e3779b97f4a7c15u;
    return &g->plans[(h >> 40) % PLANS];
}

static bool same_key(const key *a, const key *b)
{
    return a->n == b->n && a->k == b->k && a->tokens == b->tokens && a->ldx == b->ldx &&
           a->ldo == b->ldo && a->f32_out == b->f32_out && a->dtype == b->dtype;
}

int tm_cuda_gemm_run(tm_cuda_gemm *g, const tm_linear_args *a, bool add, const tm_cuda_ctx *c)
{
    const key k = {.n = a->w->n,
                   .k = a->w->k,
                   .tokens = a->n_tokens,
                   .ldx = a->ldx,
                   .ldo = a->ldo,
                   .f32_out = a->f32_out,
                   .dtype = a->w->dtype};
    plan *p = place_of(g, &k);
    if (!p->op || !same_key(&p->of, &k)) {
        drop_plan(g, p);
        int st = make_plan(g, &k, p, a, add, c);
        if (st)
            return st;
    }
    tm_cuda_profile *profile = c->profile; /* may be set meanwhile */
    if (profile) {
        char name[80];
        snprintf(name, sizeof(name), "cublaslt [%d, %d] x %d", k.n, k.k, k.tokens);
        tm_cuda_profile_enter(profile, g, name, c->stream);
    }
    int st = matmul(g, p, &p->algo, a, add ? 1.0f : 0.0f, c);
    if (profile)
        tm_cuda_profile_leave(profile, c->stream);
    return st;
}
