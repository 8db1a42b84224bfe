/* Row copies: the embedding and the rows whose logits are wanted. One block per output row.
 *
 * embed: out[t] = round(table[ids[t] - v0] * scale), zeros for ids of other ranks. An id that the step before chose is
 * read where that step left it: so this one can be enqueued before it is known. Bytes moved per call:
 * T * h * (size of the table's dtype + 2). gather_rows: R * h * 4. Packs of 8 elements where h allows. */
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/vec.cuh"

namespace
{

constexpr int THREADS = 256;

template <typename T, typename W, int V>
__global__ void __launch_bounds__(THREADS)
    embed_kernel(T *out, const int32_t *ids, const int32_t *picked, const W *table, int rows, int h,
                 int v0, float scale)
{
    wait_previous();
    start_next();
    int id = ids[blockIdx.x];
    if (id < 0 && picked)
        id = picked[-1 - id];
    id -= v0;
    const int packs = h / V;
    const bool here = id >= 0 && id < rows;
    for (int i = threadIdx.x; i < packs; i += THREADS) {
        pack<T, V> o;
        if (here) {
            const W *w = table + (size_t)id * h + (size_t)i * V;
#pragma unroll
            for (int j = 0; j < V; j++)
                o.e[j] = from_f32<T>(to_f32(w[j]) * scale);
        } else {
#pragma unroll
            for (int j = 0; j < V; j++)
                o.e[j] = from_f32<T>(0.0f);
        }
        store_pack<T, V>(out, (size_t)blockIdx.x * packs + i, o);
    }
}

template <typename T, typename W> cudaError_t launch(const tm_embed_args *a, const tm_cuda_ctx *c)
{
    const tm_weight *w = a->table;
    auto kernel = w->k % 8 == 0 ? embed_kernel<T, W, 8> : embed_kernel<T, W, 1>;
    return launch_kernel(c, kernel, dim3((unsigned)a->n_tokens), THREADS, 0,
                         static_cast<T *>(a->out), a->ids, a->picked,
                         static_cast<const W *>(w->data), w->n, w->k, a->v0, a->scale);
}

template <typename T> cudaError_t launch_table(const tm_embed_args *a, const tm_cuda_ctx *c)
{
    switch (a->table->dtype) {
    case TM_DTYPE_BF16:
        return launch<T, __nv_bfloat16>(a, c);
    case TM_DTYPE_F16:
        return launch<T, __half>(a, c);
    case TM_DTYPE_F32:
        return launch<T, float>(a, c);
    default:
        return cudaErrorInvalidValue;
    }
}

/* Rows of `words` 16- or 2-byte words. */
template <typename W>
__global__ void __launch_bounds__(THREADS)
    gather_kernel(W *out, const W *x, const int32_t *rows, int words)
{
    wait_previous();
    start_next();
    const W *from = x + (size_t)rows[blockIdx.x] * words;
    for (int i = threadIdx.x; i < words; i += THREADS)
        out[(size_t)blockIdx.x * words + i] = from[i];
}

} /* namespace */

extern "C" cudaError_t tm_cuda_embed_launch(const tm_embed_args *a, const tm_cuda_ctx *c)
{
    if (a->n_tokens == 0)
        return cudaSuccess;
    switch (c->act) {
    case TM_DTYPE_BF16:
        return launch_table<__nv_bfloat16>(a, c);
    case TM_DTYPE_F16:
        return launch_table<__half>(a, c);
    default:
        return cudaErrorInvalidValue;
    }
}

extern "C" cudaError_t tm_cuda_gather_rows_launch(const tm_gather_rows_args *a,
                                                  const tm_cuda_ctx *c)
{
    if (c->act == TM_DTYPE_F32)
        return cudaErrorInvalidValue;
    if (a->n_rows == 0)
        return cudaSuccess;
    dim3 grid((unsigned)a->n_rows);
    if (a->h % 8 == 0)
        return launch_kernel(c, gather_kernel<uint4>, grid, THREADS, 0,
                             static_cast<uint4 *>(a->out), static_cast<const uint4 *>(a->x),
                             a->rows, a->h / 8);
    return launch_kernel(c, gather_kernel<uint16_t>, grid, THREADS, 0,
                         static_cast<uint16_t *>(a->out), static_cast<const uint16_t *>(a->x),
                         a->rows, a->h);
}
