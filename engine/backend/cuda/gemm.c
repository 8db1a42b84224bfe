/* cuBLASLt, loaded with dlopen so that the same program starts where CUDA is not installed.
 *
 * Row-major out[T,N] = x[T,K] W[N,K]^T is, in the library's column-major eyes, out'[N,T] = W'^T x' with W' [K,N]
 * and x' [K,T]. What a shape needs is kept in a small direct-mapped table: decode batches come back to the same few
 * shapes, and a prompt's odd length costs one search of some tens of microseconds.
 *
 * The library's own first guess is not always its best for few tokens, where the weights' bandwidth decides. So its
 * best guesses can be timed (tune), each after L2 was filled with something else; the fastest is kept for good and
 * also serves somewhat fewer tokens. A product never times anything itself: it would stand in the way of a request. */
#include "engine/backend/cuda/gemm.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"

#define PLANS           1024
#define CHOICES         512
#define WORKSPACE_BYTES ((size_t)32 << 20)
#define CANDIDATES      12
#define TIMED_ROUNDS    3
#define TIMED_TOKENS                                                                               \
    256 /* more tokens keep the first guess: the weights' bandwidth decides no longer */
#define NEAR_BEST  1.15f /* what is slower than that in one round is not timed again */
#define LOADING_NS 50000 /* a launch that takes the host longer has loaded the kernel's code */
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
    X(cublasLtMatmulAlgoCheck)                                                                     \
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
    bool borrowed; /* the algorithm was chosen for another number of tokens */
} plan;

/* The fastest algorithm of a shape that was timed. */
typedef struct choice {
    key of;
    cublasLtMatmulAlgo_t algo;
} choice;

struct tm_cuda_gemm {
    void *library;
    cublasLtHandle_t handle;
    cublasLtMatmulPreference_t preference;
    void *workspace;
    cudaEvent_t begin[CANDIDATES], end[CANDIDATES];
    plan plans[PLANS];
    choice choices[CHOICES];
    int choice_count;
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

static cudaError_t create_events(tm_cuda_gemm *g)
{
    cudaError_t e = cudaSuccess;
    for (int i = 0; e == cudaSuccess && i < CANDIDATES; i++) {
        e = cudaEventCreate(&g->begin[i]);
        if (e == cudaSuccess)
            e = cudaEventCreate(&g->end[i]);
    }
    return e;
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
    else if (create_events(g) != cudaSuccess)
        st = TM_FAIL(err, TM_STATUS_INTERNAL, "no events for cuBLASLt's choices");
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
    for (int i = 0; i < CANDIDATES; i++) {
        if (g->begin[i])
            cudaEventDestroy(g->begin[i]);
        if (g->end[i])
            cudaEventDestroy(g->end[i]);
    }
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

static int describe(tm_cuda_gemm *g, const key *k, plan *p)
{
    const cublasOperation_t transposed = CUBLAS_OP_T;
    cudaDataType_t in = data_type(k->dtype), out = k->f32_out ? CUDA_R_32F : in;
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
    return st;
}

/* The library's best guesses, the best first, of which there are 1 to `wanted`. */
static int guess(tm_cuda_gemm *g, const plan *p, int wanted, cublasLtMatmulHeuristicResult_t *found,
                 int *count)
{
    *count = 0;
    int st = g->cublasLtMatmulAlgoGetHeuristic(g->handle, p->op, p->w, p->x, p->out, p->out,
                                               g->preference, wanted, found, count);
    return !st && *count == 0 ? (int)CUBLAS_STATUS_NOT_SUPPORTED : st;
}

static bool same_key(const key *a, const key *b)
{
    return a->n == b->n && a->k == b->k && a->tokens == b->tokens && a->ldx == b->ldx &&
           a->ldo == b->ldo && a->f32_out == b->f32_out && a->dtype == b->dtype;
}

/* What was chosen for as many tokens, or for the next larger number up to twice as many; NULL when nothing was. */
static const choice *find_choice(const tm_cuda_gemm *g, const key *k)
{
    const choice *best = NULL;
    for (int i = 0; i < g->choice_count; i++) {
        const choice *c = &g->choices[i];
        key wanted = *k;
        wanted.tokens = c->of.tokens;
        if (c->of.tokens >= k->tokens && c->of.tokens <= 2 * k->tokens &&
            same_key(&c->of, &wanted) && (!best || c->of.tokens < best->of.tokens))
            best = c;
    }
    return best;
}

static bool usable(tm_cuda_gemm *g, const plan *p, const cublasLtMatmulAlgo_t *algo)
{
    cublasLtMatmulHeuristicResult_t r = {.state = CUBLAS_STATUS_SUCCESS};
    return g->cublasLtMatmulAlgoCheck(g->handle, p->op, p->w, p->x, p->out, p->out, algo, &r) ==
               CUBLAS_STATUS_SUCCESS &&
           r.state == CUBLAS_STATUS_SUCCESS && r.workspaceSize <= WORKSPACE_BYTES;
}

/* may_borrow: with an algorithm that was chosen for another number of tokens. */
static int make_plan(tm_cuda_gemm *g, const key *k, plan *p, bool may_borrow)
{
    cublasLtMatmulHeuristicResult_t found = {0};
    const choice *c = find_choice(g, k);
    int count, st = describe(g, k, p);
    if (!st && c && (c->of.tokens == k->tokens || (may_borrow && usable(g, p, &c->algo)))) {
        p->algo = c->algo;
        p->borrowed = c->of.tokens != k->tokens;
        return 0;
    }
    if (!st)
        st = guess(g, p, 1, &found, &count);
    if (st)
        drop_plan(g, p);
    else
        p->algo = found.algo;
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

static key key_of(const tm_linear_args *a)
{
    return (key){.n = a->w->n,
                 .k = a->w->k,
                 .tokens = a->n_tokens,
                 .ldx = a->ldx,
                 .ldo = a->ldo,
                 .f32_out = a->f32_out,
                 .dtype = a->w->dtype};
}

static int run_plan(tm_cuda_gemm *g, const plan *p, const tm_linear_args *a, bool add,
                    const tm_cuda_ctx *c)
{
    tm_cuda_profile *profile = c->profile; /* may be set meanwhile */
    if (profile) {
        char name[80];
        snprintf(name, sizeof(name), "cublaslt [%d, %d] x %d", p->of.n, p->of.k, p->of.tokens);
        tm_cuda_profile_enter(profile, g, name, c->stream);
    }
    int st = matmul(g, p, &p->algo, a, add ? 1.0f : 0.0f, c);
    if (profile)
        tm_cuda_profile_leave(profile, c->stream);
    return st;
}

int tm_cuda_gemm_run(tm_cuda_gemm *g, const tm_linear_args *a, bool add, const tm_cuda_ctx *c)
{
    const key k = key_of(a);
    plan *p = place_of(g, &k);
    int st = 0;
    if (!p->op || !same_key(&p->of, &k)) {
        drop_plan(g, p);
        st = make_plan(g, &k, p, true);
    }
    if (!st)
        st = run_plan(g, p, a, add, c);
    if (!st || !p->borrowed)
        return st;
    /* The library's check of the shape does not look at everything: so its own guess. */
    drop_plan(g, p);
    st = make_plan(g, &k, p, false);
    return st ? st : run_plan(g, p, a, add, c);
}

/* Candidates in one round: ms of each, negative where it cannot run. */
typedef struct contest {
    const plan *p;
    const tm_linear_args *a;
    const tm_cuda_ctx *c;
    cublasLtMatmulHeuristicResult_t found[CANDIDATES];
    float ms[CANDIDATES];
    bool out[CANDIDATES]; /* takes part no longer */
    int count;
} contest;

/* Enqueues a run with a cold L2 between the candidate's events. Where it had to load the kernel's code first, for which the
 * device has waited, once more. */
static cudaError_t enqueue_candidate(tm_cuda_gemm *g, contest *t, int i)
{
    int64_t took = LOADING_NS + 1;
    for (int k = 0; k < 2 && took > LOADING_NS; k++) {
        cudaError_t e = cudaMemsetAsync(t->c->scratch, 0, TM_CUDA_SCRATCH_BYTES, t->c->stream);
        if (e == cudaSuccess)
            e = cudaEventRecord(g->begin[i], t->c->stream);
        if (e != cudaSuccess)
            return e;
        int64_t from = tm_clock_ns();
        t->out[i] = matmul(g, t->p, &t->found[i].algo, t->a, 0.0f, t->c) != CUBLAS_STATUS_SUCCESS;
        took = tm_clock_ns() - from;
        if (t->out[i])
            return cudaSuccess;
        e = cudaEventRecord(g->end[i], t->c->stream);
        if (e != cudaSuccess)
            return e;
    }
    return cudaSuccess;
}

/* All that still take part, one behind the other; the best of all rounds counts. */
static cudaError_t run_round(tm_cuda_gemm *g, contest *t)
{
    cudaError_t e = cudaSuccess;
    for (int i = 0; e == cudaSuccess && i < t->count; i++)
        if (!t->out[i])
            e = enqueue_candidate(g, t, i);
    if (e == cudaSuccess)
        e = cudaStreamSynchronize(t->c->stream);
    for (int i = 0; e == cudaSuccess && i < t->count; i++) {
        float ms = 0.0f;
        if (t->out[i])
            continue;
        e = cudaEventElapsedTime(&ms, g->begin[i], g->end[i]);
        t->ms[i] = t->ms[i] < 0 ? ms : TM_MIN(t->ms[i], ms);
    }
    return e;
}

/* The index of the fastest, or -1. */
static int leader(const contest *t)
{
    int best = -1;
    for (int i = 0; i < t->count; i++)
        if (t->ms[i] >= 0 && (best < 0 || t->ms[i] < t->ms[best]))
            best = i;
    return best;
}

static cudaError_t hold_contest(tm_cuda_gemm *g, contest *t, int *winner)
{
    for (int i = 0; i < CANDIDATES; i++)
        t->ms[i] = -1.0f;
    for (int round = 0; round < TIMED_ROUNDS; round++) {
        cudaError_t e = run_round(g, t);
        if (e != cudaSuccess)
            return e;
        *winner = leader(t);
        for (int i = 0; *winner >= 0 && i < t->count; i++)
            t->out[i] = t->out[i] || t->ms[i] > NEAR_BEST * t->ms[*winner];
    }
    return cudaSuccess;
}

cudaError_t tm_cuda_gemm_tune(tm_cuda_gemm *g, const tm_linear_args *a, const tm_cuda_ctx *c)
{
    const key k = key_of(a);
    const choice *have = find_choice(g, &k);
    plan p = {0}, *place = place_of(g, &k);
    contest t = {.p = &p, .a = a, .c = c};
    cudaError_t e = cudaSuccess;
    int winner = -1;
    if (k.tokens > TIMED_TOKENS || g->choice_count == CHOICES ||
        (have && have->of.tokens == k.tokens))
        return cudaSuccess;
    /* What the library refuses here it refuses again when the product is wanted, which is then told. */
    if (!describe(g, &k, &p) && !guess(g, &p, CANDIDATES, t.found, &t.count))
        e = hold_contest(g, &t, &winner);
    drop_plan(g, &p);
    if (winner < 0 || e != cudaSuccess)
        return e;
    g->choices[g->choice_count++] = (choice){k, t.found[winner].algo};
    if (place->op && same_key(&place->of, &k))
        drop_plan(g, place);
    return cudaSuccess;
}
