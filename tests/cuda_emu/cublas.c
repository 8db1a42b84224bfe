/* The products that the project asks of cuBLASLt, in plain loops: d = a^T b + beta d for column-major matrices of 16-bit
 * numbers, sums in f32. Anything else is refused, as a shape without an algorithm would be. There are three
 * algorithms for a number of columns of b and d: one that computes the same as well down to half as many, one that cannot
 * but passes the check, and one that never runs. */
#include <cublasLt.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "engine/backend/cpu/convert.h"
#include "tests/cuda_emu/emu.h"

struct emu_matmul {
    cublasOperation_t a, b;
};

enum { ALGO_HALF, ALGO_EXACT, ALGO_NEVER, ALGO_COUNT };

struct emu_layout {
    cudaDataType type;
    size_t rows, cols, ld;
};

static const struct {
    const char *name;
    void (*at)(void);
} g_functions[] = {
#define ROW(name)                                                                                  \
    {                                                                                              \
#name, (void (*)(void))name                                                                \
    }
    ROW(cublasLtCreate),
    ROW(cublasLtDestroy),
    ROW(cublasLtMatmulDescCreate),
    ROW(cublasLtMatmulDescDestroy),
    ROW(cublasLtMatmulDescSetAttribute),
    ROW(cublasLtMatrixLayoutCreate),
    ROW(cublasLtMatrixLayoutDestroy),
    ROW(cublasLtMatmulPreferenceCreate),
    ROW(cublasLtMatmulPreferenceDestroy),
    ROW(cublasLtMatmulPreferenceSetAttribute),
    ROW(cublasLtMatmulAlgoGetHeuristic),
    ROW(cublasLtMatmulAlgoCheck),
    ROW(cublasLtMatmul),
#undef ROW
};

void *emu_library(const char *name, int flags)
{
    static char here;
    (void)flags;
    return strcmp(name, "libcublasLt.so.emulated") == 0 ? &here : NULL;
}

void *emu_library_function(void *library, const char *name)
{
    void *at = NULL;
    (void)library;
    for (size_t i = 0; i < TM_ARRAY_LEN(g_functions); i++)
        if (strcmp(g_functions[i].name, name) == 0)
            memcpy(&at, &g_functions[i].at, sizeof(at));
    return at;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    static char here;
    *handle = (cublasLtHandle_t)(void *)&here;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    return handle ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute,
                                        cudaDataType_t scale)
{
    if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    *desc = calloc(1, sizeof(**desc));
    TM_ASSERT(*desc);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc)
{
    free(desc);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attr,
                                              const void *value, size_t bytes)
{
    if (bytes != sizeof(cublasOperation_t))
        return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(attr == CUBLASLT_MATMUL_DESC_TRANSA ? &desc->a : &desc->b, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld)
{
    if (ld < 0 || (uint64_t)ld < rows)
        return CUBLAS_STATUS_INVALID_VALUE;
    *layout = malloc(sizeof(**layout));
    TM_ASSERT(*layout);
    **layout = (struct emu_layout){type, rows, cols, (size_t)ld};
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout)
{
    free(layout);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference)
{
    static char here;
    *preference = (cublasLtMatmulPreference_t)(void *)&here;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
    return preference ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attr,
                                                    const void *value, size_t bytes)
{
    (void)preference, (void)value;
    return attr == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES && bytes == sizeof(uint64_t)
               ? CUBLAS_STATUS_SUCCESS
               : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t *results, int *count)
{
    (void)handle, (void)c, (void)preference;
    if (a->rows != b->rows || d->rows != a->cols || d->cols != b->cols)
        return CUBLAS_STATUS_INVALID_VALUE;
    bool can = desc->a == CUBLAS_OP_T && desc->b == CUBLAS_OP_N && a->type == b->type &&
               a->type != CUDA_R_32F;
    *count = can ? TM_MIN(wanted, ALGO_COUNT) : 0;
    for (int i = 0; i < *count; i++)
        results[i] = (cublasLtMatmulHeuristicResult_t){.algo = {.data = {b->cols, (uint64_t)i}},
                                                       .state = CUBLAS_STATUS_SUCCESS};
    return CUBLAS_STATUS_SUCCESS;
}

static bool algo_takes(const cublasLtMatmulAlgo_t *algo, size_t cols)
{
    size_t most = algo->data[0];
    if (algo->data[1] == ALGO_EXACT)
        return cols == most;
    return algo->data[1] == ALGO_HALF && cols <= most && cols * 2 >= most;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t *algo,
                                       cublasLtMatmulHeuristicResult_t *result)
{
    (void)handle, (void)desc, (void)c;
    if (a->rows != b->rows || d->rows != a->cols || d->cols != b->cols)
        return CUBLAS_STATUS_INVALID_VALUE;
    *result = (cublasLtMatmulHeuristicResult_t){.algo = *algo, .state = CUBLAS_STATUS_SUCCESS};
    return algo->data[1] == ALGO_EXACT || algo_takes(algo, b->cols) ? CUBLAS_STATUS_SUCCESS
                                                                    : CUBLAS_STATUS_NOT_SUPPORTED;
}

typedef struct matmul_work {
    float alpha, beta;
    const uint16_t *a, *b;
    void *d;
    struct emu_layout la, lb, ld;
} matmul_work;

static void widen(float *to, const uint16_t *from, size_t n, cudaDataType type)
{
    if (type == CUDA_R_16F)
        for (size_t i = 0; i < n; i++)
            to[i] = tm_f16_to_f32(from[i]);
    else
        for (size_t i = 0; i < n; i++)
            to[i] = tm_bf16_to_f32(from[i]);
}

static float dot(const float *a, const float *b, size_t n)
{
    float sum[16] = {0}, all = 0.0f;
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++)
            sum[j] += a[i + (size_t)j] * b[i + (size_t)j];
    for (int j = 0; j < 16; j++)
        all += sum[j];
    for (; i < n; i++)
        all += a[i] * b[i];
    return all;
}

static void store(const matmul_work *w, size_t at, float v)
{
    float *f = w->d;
    uint16_t *h = w->d;
    const bool add = w->beta != 0.0f; /* with 0, what is there is not looked at */
    if (w->ld.type == CUDA_R_32F)
        f[at] = add ? v + w->beta * f[at] : v;
    else if (w->ld.type == CUDA_R_16F)
        h[at] = tm_f16_from_f32(add ? v + w->beta * tm_f16_to_f32(h[at]) : v);
    else
        h[at] = tm_bf16_from_f32(add ? v + w->beta * tm_bf16_to_f32(h[at]) : v);
}

static cudaError_t run_matmul(void *data)
{
    const matmul_work *w = data;
    const size_t k = w->la.rows;
    float *a = malloc(k * sizeof(float)), *b = malloc(k * w->lb.cols * sizeof(float));
    TM_ASSERT(a && b);
    for (size_t j = 0; j < w->lb.cols; j++)
        widen(b + j * k, w->b + j * w->lb.ld, k, w->lb.type);
    for (size_t i = 0; i < w->la.cols; i++) {
        widen(a, w->a + i * w->la.ld, k, w->la.type);
        for (size_t j = 0; j < w->lb.cols; j++)
            store(w, j * w->ld.ld + i, w->alpha * dot(a, b + j * k, k));
    }
    free(a);
    free(b);
    return cudaSuccess;
}

static bool matrix_inside(const void *p, const struct emu_layout *l)
{
    return emu_inside(p, ((l->cols - 1) * l->ld + l->rows) * (l->type == CUDA_R_32F ? 4 : 2));
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                              cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                              cublasLtMatrixLayout_t c_layout, void *d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo,
                              void *workspace, size_t workspace_bytes, cudaStream_t stream)
{
    (void)handle, (void)desc, (void)c_layout, (void)workspace, (void)workspace_bytes;
    if (c != d || !matrix_inside(a, a_layout) || !matrix_inside(b, b_layout) ||
        !matrix_inside(d, d_layout))
        return CUBLAS_STATUS_INVALID_VALUE;
    if (!algo_takes(algo, b_layout->cols))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    const matmul_work w = {
        *(const float *)alpha, *(const float *)beta, a, b, d, *a_layout, *b_layout, *d_layout};
    return emu_enqueue(stream, run_matmul, &w, sizeof(w)) == cudaSuccess
               ? CUBLAS_STATUS_SUCCESS
               : CUBLAS_STATUS_EXECUTION_FAILED;
}
