/* The feed-forward parts of a mixture of experts: sort pairs by expert, two grouped products, weighted sum.
 *
 * sort -> act(x W_gate^T) * (x W_up^T) -> W_down -> out[t] = sum_j weight * y[pair] + add. Every pair's result is a
 * row of its own in the activation's dtype, and a token adds its rows in the order of its choices: no atomic
 * addition, so the same input gives the same bits. Everything is decided on the device; a recorded graph holds for
 * every routing. Long steps go in chunks of PAIRS_MAX pairs, which bounds the workspace.
 *
 * Three ways by shape: few pairs per expert stream the weights (moe_stream.cu), many go through tiles (moe_tiles.cu),
 * widths that are no multiple of 8 and weights of another dtype through a plain kernel here, one warp per number. */
#include "engine/backend/cuda/act.cuh"
#include "engine/backend/cuda/any.cuh"
#include "engine/backend/cuda/moe.cuh"

namespace
{

constexpr int PAIRS_MAX = 32768;
constexpr int STREAM_TOKENS = 8; /* up to here an expert has one item */
constexpr int THREADS = 256;

/* The places of a call's workspace; all begin at multiples of 256 bytes. */
struct moe_work {
    int32_t *order; /* [pairs] pairs by expert */
    moe_item *items;
    int *n_items;
    void *act; /* [pairs, F] */
    void *y;   /* [pairs, h] */
    size_t bytes;
};

int chunk_tokens(const tm_moe_experts_args *a)
{
    const int most = a->top_k < PAIRS_MAX ? PAIRS_MAX / a->top_k : 1;
    return a->n_tokens < most ? a->n_tokens : most;
}

/* Items of at most `rows` pairs that `pairs` pairs can make. */
int items_max(int pairs, int experts, int rows)
{
    const int open = pairs / rows + (experts < pairs ? experts : pairs);
    return open < pairs ? open : pairs;
}

moe_work carve(const tm_moe_experts_args *a)
{
    const size_t pairs = (size_t)chunk_tokens(a) * (size_t)a->top_k;
    const size_t items = (size_t)items_max((int)pairs, a->n_experts, MOE_STREAM_ROWS);
    const size_t sizes[] = {pairs * sizeof(int32_t), items * sizeof(moe_item), sizeof(int),
                            pairs * (size_t)a->f * 2, pairs * (size_t)a->h * 2};
    size_t at[6] = {0};
    for (int i = 0; i < 5; i++)
        at[i + 1] = (at[i] + sizes[i] + 255) / 256 * 256;
    char *base = static_cast<char *>(a->work);
    moe_work w = {};
    w.bytes = at[5];
    if (!base)
        return w;
    w.order = reinterpret_cast<int32_t *>(base + at[0]);
    w.items = reinterpret_cast<moe_item *>(base + at[1]);
    w.n_items = reinterpret_cast<int *>(base + at[2]);
    w.act = base + at[3];
    w.y = base + at[4];
    return w;
}

/* The sum of v over the threads before this one; the total in *all. sums is shared memory for a number per warp. */
__device__ int sum_before(int v, int *sums, int *all)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int through = v;
    for (int i = 1; i < 32; i *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, through, i);
        through += lane >= i ? below : 0;
    }
    __syncthreads(); /* the sums of an earlier call have been read */
    if (lane == 31)
        sums[warp] = through;
    __syncthreads();
    int before = 0, total = 0;
    for (int w = 0; w < warps; w++) {
        before += w < warp ? sums[w] : 0;
        total += sums[w];
    }
    *all = total;
    return before + through - v;
}

/* Counting sort in one block; thread e has expert e. The order within an expert is not fixed, and nothing that
 * follows depends on it. */
__global__ void __launch_bounds__(MOE_EXPERTS_MAX)
    sort_kernel(const int32_t *ids, int pairs, int experts, int item_rows, int32_t *order,
                moe_item *items, int *n_items)
{
    SHARED(int[MOE_EXPERTS_MAX], count);
    SHARED(int[32], sums);
    wait_previous();
    start_next();
    const int e = threadIdx.x;
    count[e] = 0;
    __syncthreads();
    for (int i = e; i < pairs; i += blockDim.x)
        atomicAdd(&count[ids[i]], 1);
    __syncthreads();
    const int n = e < experts ? count[e] : 0, m = (n + item_rows - 1) / item_rows;
    int all;
    const int first = sum_before(n, sums, &all), item = sum_before(m, sums, &all);
    if (e == 0)
        *n_items = all;
    for (int j = 0; j < m; j++) {
        const moe_item x = {e, first + j * item_rows, min(item_rows, n - j * item_rows)};
        items[item + j] = x;
    }
    count[e] = first; /* now: where the next pair of e goes */
    __syncthreads();
    for (int i = e; i < pairs; i += blockDim.x)
        order[atomicAdd(&count[ids[i]], 1)] = i;
}

/* Thread by pack: V numbers of one token. y has the chunk's pairs alone, all others are the chunk's part. */
struct combine_args {
    void *out;
    const void *y, *add;
    const float *weights, *add_gate;
    int n_tokens, h, top_k;
};

template <typename T, int V>
__global__ void __launch_bounds__(THREADS) combine_kernel(combine_args a)
{
    wait_previous();
    start_next();
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x, packs = a.h / V;
    if (i >= packs * a.n_tokens)
        return;
    const size_t t = i / packs, at = i % packs;
    float sum[V] = {};
    for (int j = 0; j < a.top_k; j++) {
        const size_t pair = t * a.top_k + j;
        const pack<T, V> y = load_pack<T, V>(a.y, pair * packs + at);
        const float w = a.weights[pair];
#pragma unroll
        for (int k = 0; k < V; k++)
            sum[k] += w * to_f32(y.e[k]);
    }
    if (a.add) {
        const float gate = a.add_gate ? 1.0f / (1.0f + expf(-a.add_gate[t])) : 1.0f;
        const pack<T, V> y = load_pack<T, V>(a.add, i);
#pragma unroll
        for (int k = 0; k < V; k++)
            sum[k] += gate * to_f32(y.e[k]);
    }
    pack<T, V> o;
#pragma unroll
    for (int k = 0; k < V; k++)
        o.e[k] = from_f32<T>(sum[k]);
    store_pack<T, V>(a.out, i, o);
}

/* The plain way: a warp has output n of pair blockIdx.y. Not gated, x has a row for every pair. */
struct any_args {
    void *out;
    const void *x, *w;
    const int32_t *ids;
    int top_k, n, k;
    tm_dtype dtype, act_dtype; /* of w; of x and out */
    tm_act_kind act;
    bool gated;
};

__global__ void __launch_bounds__(THREADS) any_kernel(any_args a)
{
    wait_previous();
    start_next();
    const int n = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, pair = blockIdx.y;
    if (n >= a.n)
        return;
    const size_t x = (size_t)(a.gated ? pair / a.top_k : pair) * a.k;
    const size_t row = (size_t)a.ids[pair] * (a.gated ? 2 : 1) * a.n + n;
    float u = 0.0f, v = 0.0f;
    for (int i = threadIdx.x % 32; i < a.k; i += 32) {
        const float f = load_number(a.x, x + i, a.act_dtype);
        u += f * load_number(a.w, row * a.k + i, a.dtype);
        if (a.gated)
            v += f * load_number(a.w, (row + a.n) * a.k + i, a.dtype);
    }
    for (int i = 16; i > 0; i >>= 1) {
        u += __shfl_xor_sync(0xffffffffu, u, i);
        v += __shfl_xor_sync(0xffffffffu, v, i);
    }
    if (threadIdx.x % 32 == 0)
        store_number(a.out, (size_t)pair * a.n + n, a.act_dtype,
                     a.gated ? activate(u, a.act) * v : u);
}

cudaError_t run_any(const tm_moe_experts_args *a, const moe_work &w, const tm_cuda_ctx *c)
{
    const int per = THREADS / 32;
    any_args g = {};
    g.out = w.act;
    g.x = a->x;
    g.w = a->gate_up->data;
    g.ids = a->ids;
    g.top_k = a->top_k;
    g.n = a->f;
    g.k = a->h;
    g.dtype = a->gate_up->dtype;
    g.act_dtype = c->act;
    g.act = a->act;
    g.gated = true;
    any_args d = g;
    d.out = w.y;
    d.x = w.act;
    d.w = a->down->data;
    d.n = a->h;
    d.k = a->f;
    d.dtype = a->down->dtype;
    d.gated = false;
    const unsigned pairs = (unsigned)(a->n_tokens * a->top_k);
    cudaError_t e =
        launch_kernel(c, any_kernel, dim3((unsigned)((g.n + per - 1) / per), pairs), THREADS, 0, g);
    if (e != cudaSuccess)
        return e;
    return launch_kernel(c, any_kernel, dim3((unsigned)((d.n + per - 1) / per), pairs), THREADS, 0,
                         d);
}

/* Rows of an item; 8 means that the weights are streamed. */
int item_rows_for(int tokens, int pairs, int experts)
{
    if (tokens <= STREAM_TOKENS || pairs <= 4 * experts)
        return MOE_STREAM_ROWS;
    return pairs >= 96 * experts ? 128 : 64;
}

cudaError_t run_product(const moe_product &p, bool gated, int rows, const tm_cuda_ctx *c)
{
    return rows == MOE_STREAM_ROWS ? moe_stream_launch(p, gated, c)
                                   : moe_tiles_launch(p, gated, rows, c);
}

cudaError_t run_grouped(const tm_moe_experts_args *a, const moe_work &w, const tm_cuda_ctx *c)
{
    const int pairs = a->n_tokens * a->top_k;
    const int rows = item_rows_for(a->n_tokens, pairs, a->n_experts);
    /* One thread an expert, and more of them for many pairs. */
    const int threads = a->n_experts > 256 || pairs > 2048 ? MOE_EXPERTS_MAX : 256;
    cudaError_t e = launch_kernel(c, sort_kernel, dim3(1), threads, 0, a->ids, pairs, a->n_experts,
                                  rows, w.order, w.items, w.n_items);
    if (e != cudaSuccess)
        return e;
    moe_product p = {};
    p.order = w.order;
    p.items = w.items;
    p.n_items = w.n_items;
    p.max_items = items_max(pairs, a->n_experts, rows);
    p.top_k = a->top_k;
    p.act = a->act;
    p.x = a->x;
    p.w = a->gate_up->data;
    p.out = w.act;
    p.n = a->f;
    p.k = a->h;
    e = run_product(p, true, rows, c);
    if (e != cudaSuccess)
        return e;
    p.x = w.act;
    p.w = a->down->data;
    p.out = w.y;
    p.n = a->h;
    p.k = a->f;
    return run_product(p, false, rows, c);
}

template <typename T>
cudaError_t run_combine(const tm_moe_experts_args *a, const moe_work &w, const tm_cuda_ctx *c)
{
    const int v = a->h % 8 == 0 ? 8 : 1;
    const size_t n = (size_t)a->n_tokens * (size_t)(a->h / v);
    const combine_args s = {a->out,      w.y,         a->add, a->weights,
                            a->add_gate, a->n_tokens, a->h,   a->top_k};
    return launch_kernel(c, v == 8 ? combine_kernel<T, 8> : combine_kernel<T, 1>,
                         dim3((unsigned)((n + THREADS - 1) / THREADS)), THREADS, 0, s);
}

cudaError_t run_chunk(const tm_moe_experts_args *a, const moe_work &w, const tm_cuda_ctx *c)
{
    const bool fast =
        a->h % 8 == 0 && a->f % 8 == 0 && a->gate_up->dtype == c->act && a->down->dtype == c->act;
    cudaError_t e = fast ? run_grouped(a, w, c) : run_any(a, w, c);
    if (e != cudaSuccess)
        return e;
    return c->act == TM_DTYPE_BF16 ? run_combine<__nv_bfloat16>(a, w, c)
                                   : run_combine<__half>(a, w, c);
}

} /* namespace */

extern "C" size_t tm_cuda_moe_work_bytes(const tm_moe_experts_args *a)
{
    tm_moe_experts_args sizes = *a;
    sizes.work = NULL;
    return carve(&sizes).bytes;
}

extern "C" cudaError_t tm_cuda_moe_experts_launch(const tm_moe_experts_args *a,
                                                  const tm_cuda_ctx *c)
{
    if (c->act == TM_DTYPE_F32 || a->n_experts > MOE_EXPERTS_MAX || a->top_k > PAIRS_MAX)
        return cudaErrorInvalidValue;
    const moe_work w = carve(a);
    const int chunk = chunk_tokens(a);
    for (int t = 0; t < a->n_tokens; t += chunk) {
        const size_t at = (size_t)t * (size_t)a->h * 2, pair = (size_t)t * (size_t)a->top_k;
        tm_moe_experts_args part = *a;
        part.n_tokens = a->n_tokens - t < chunk ? a->n_tokens - t : chunk;
        part.out = static_cast<char *>(a->out) + at;
        part.x = static_cast<const char *>(a->x) + at;
        part.ids = a->ids + pair;
        part.weights = a->weights + pair;
        part.add = a->add ? static_cast<const char *>(a->add) + at : NULL;
        part.add_gate = a->add_gate ? a->add_gate + t : NULL;
        cudaError_t e = run_chunk(&part, w, c);
        if (e != cudaSuccess)
            return e;
    }
    return cudaSuccess;
}
