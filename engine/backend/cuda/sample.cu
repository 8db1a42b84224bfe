/* Sampling: one token of each row by the parameters of engine/sample, without the row leaving the device.
 *
 * Four kernels. keys: the largest logit of every chunk of a row; the whole GPU reads all rows. begin: one block a row
 * reports log-probabilities, edits the row and takes the largest logit of a greedy one, for which the following two
 * have nothing to do. weigh: weight and mass of every chunk, again by the whole GPU. choose: one block a row cuts and
 * draws, and looks only at chunks whose largest weight is not below every cut. So rows of a language model are read
 * twice, and greedy ones once.
 *
 * Sums are of whole numbers (engine/sample/mass.h), so the order in which threads come does not show: cuts and draws
 * are those of the CPU, bit for bit. */
#include "engine/backend/cuda/sample_choose.cuh"

namespace
{

constexpr int PART = 256; /* threads of keys and weigh */
constexpr int CHUNKS_MAX = TM_SAMPLE_VOCAB_MAX / CHUNK;
constexpr int TOP_KEYS = (TM_SAMPLE_TOP_MAX * CHUNK + THREADS - 1) / THREADS;

typedef struct row_state {
    float max; /* after edits */
    int draws; /* 0: the token is known, or there is none */
} row_state;

/* Places in the device's scratch memory. */
typedef struct work {
    row_state *states; /* [R] */
    u64 *masses;       /* [R, chunks] */
    /* [R, chunks]: order_of the largest logit, then bits of the largest weight, then ties */
    unsigned *keys;
    int chunks;
} work;

__device__ __forceinline__ float *row_at(const tm_sample_args &a, int row)
{
    return a.x + (size_t)row * (size_t)(a.ld ? a.ld : a.n);
}

/* This lane's part of the key of chunk c, which is the largest of all lanes. */
__device__ __forceinline__ unsigned lane_key(const float *x, int n, int c)
{
    unsigned key = 0;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int i = c * CHUNK + j * 32 + lane_id();
        if (i < n)
            key = max(key, order_of(x[i]));
    }
    return key;
}

/* Two chunks at once: loads under way are what this waits for. */
__global__ void __launch_bounds__(PART) keys_kernel(tm_sample_args a, work w)
{
    wait_previous();
    start_next();
    const int row = (int)blockIdx.y, step = (int)gridDim.x * (PART / 32);
    const float *x = row_at(a, row);
    unsigned *keys = w.keys + (size_t)row * w.chunks;
    for (int c = (int)blockIdx.x * (PART / 32) + warp_id(); c < w.chunks; c += 2 * step) {
        const unsigned first = lane_key(x, a.n, c), second = lane_key(x, a.n, c + step);
        const unsigned a_key = __reduce_max_sync(ALL, first),
                       b_key = __reduce_max_sync(ALL, second);
        if (lane_id() == 0) {
            keys[c] = a_key;
            if (c + step < w.chunks)
                keys[c + step] = b_key;
        }
    }
}

/* ---- begin ---- */

/* The largest chunk key and, among equal ones, the lowest chunk: key and complement of the chunk. */
__device__ u64 best_chunk(slots_t &slots, const unsigned *keys, int chunks, u64 below)
{
    u64 best = 0;
    for (int c = (int)threadIdx.x; c < chunks; c += THREADS) {
        const u64 key = (u64)keys[c] << 32 | (0xffffffffu - (unsigned)c);
        if (keys[c] && key < below && key > best)
            best = key;
    }
    return block_max(slots, best);
}

__device__ __forceinline__ int index_of(u64 key)
{
    return (int)(0xffffffffu - (unsigned)key);
}

/* The k best chunks hold the k best logits: outside of them every logit has k chunks with a better one each. */
__device__ void list_tops(slots_t &slots, int *picked, const float *x, const unsigned *keys,
                          int chunks, int n, int k, tm_sample_detail *d)
{
    int have = 0, count = 0;
    u64 below = ~0ull, own[TOP_KEYS];
    for (; have < k; have++) {
        below = best_chunk(slots, keys, chunks, below);
        if (!below)
            break;
        if (threadIdx.x == 0)
            picked[have] = index_of(below);
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < TOP_KEYS; s++) {
        const int at = s * THREADS + (int)threadIdx.x;
        const int i = at < have * CHUNK ? picked[at / CHUNK] * CHUNK + at % CHUNK : n;
        const unsigned order = i < n ? order_of(x[i]) : 0;
        own[s] = order ? (u64)order << 32 | (0xffffffffu - (unsigned)i) : 0;
    }
    for (below = ~0ull; count < k; count++) {
        u64 best = 0;
#pragma unroll
        for (int s = 0; s < TOP_KEYS; s++)
            best = own[s] < below && own[s] > best ? own[s] : best;
        below = block_max(slots, best);
        if (!below)
            break;
        if (threadIdx.x == 0) {
            d->top_ids[count] = index_of(below);
            d->top_logits[count] = x[index_of(below)];
        }
    }
    if (threadIdx.x == 0)
        d->top_count = count;
}

/* Of the row before edits. */
__device__ void describe(slots_t &slots, const float *x, const unsigned *keys, int chunks, int n,
                         float max, tm_sample_detail *d)
{
    u64 mass = 0;
    for (int c = warp_id(); c < chunks; c += WARPS) {
        if (!keys[c] || __fsub_rn(value_of(keys[c]), max) < NO_MASS)
            continue;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int i = c * CHUNK + j * 32 + lane_id();
            mass += i < n ? mass_of(weight_of(x[i], max, 1.0f)) : 0;
        }
    }
    mass = block_sum(slots, mass);
    if (threadIdx.x == 0) {
        d->mass = mass;
        d->max = max;
    }
}

/* The edits of one kind; each leaves the logit that it found. */
template <typename F>
__device__ void edit(float *x, tm_sample_edit *edits, int n, unsigned *touched, F change)
{
    for (int i = (int)threadIdx.x; i < n; i += THREADS) {
        const tm_sample_edit e = edits[i];
        const float before = x[e.token];
        x[e.token] = change(before, e.value);
        edits[i].value = before;
        atomicOr(&touched[e.token / CHUNK / 32], 1u << (e.token / CHUNK % 32));
    }
    __syncthreads();
}

__device__ void edit_row(const tm_sample_row &p, float *x, tm_sample_edit *edits, unsigned *keys,
                         int chunks, int n, unsigned *touched)
{
    for (int i = (int)threadIdx.x; i < CHUNKS_MAX / 32; i += THREADS)
        touched[i] = 0;
    __syncthreads();
    edit(x, edits, p.n_seen, touched, [&](float v, float times) {
        v = v > 0.0f ? __fdiv_rn(v, p.repetition) : __fmul_rn(v, p.repetition);
        return times > 0.0f ? __fsub_rn(v, __fadd_rn(__fmul_rn(p.frequency, times), p.presence))
                            : v;
    });
    edits += p.n_seen;
    edit(x, edits, p.n_bias, touched, [](float v, float bias) { return __fadd_rn(v, bias); });
    edits += p.n_bias;
    edit(x, edits, p.n_banned, touched, [](float, float) { return -INFINITY; });
    for (int c = warp_id(); c < chunks; c += WARPS)
        if (touched[c / 32] >> (c % 32) & 1) {
            const unsigned key = __reduce_max_sync(ALL, lane_key(x, n, c));
            if (lane_id() == 0)
                keys[c] = key;
        }
    __syncthreads();
}

/* All threads come with the token; its logit before edits is in the first edit of it, if there is one. */
__device__ void finish(slots_t &slots, const tm_sample_args &a, const tm_sample_row &p, int row,
                       int token)
{
    if (threadIdx.x == 0)
        a.out[row] = token;
    if (!p.logprobs || token < 0)
        return;
    u64 first = 0;
    for (int i = (int)threadIdx.x; i < p.n_seen + p.n_bias + p.n_banned; i += THREADS)
        if (a.edits[p.first_edit + i].token == token && !first)
            first = 0xffffffffu - (unsigned)i;
    first = block_max(slots, first);
    if (threadIdx.x == 0)
        a.details[row].logit =
            first ? a.edits[p.first_edit + index_of(first)].value : row_at(a, row)[token];
}

/* The lowest index of the chunk's largest logit; by the first warp. */
__device__ int first_of(const float *x, int n, int c, unsigned key)
{
    for (int j = 0; j < EACH; j++) {
        const int i = c * CHUNK + j * 32 + lane_id();
        const unsigned same = __ballot_sync(ALL, i < n && order_of(x[i]) == key);
        if (same)
            return c * CHUNK + j * 32 + __ffs((int)same) - 1;
    }
    return -1;
}

__device__ bool finite_key(u64 best)
{
    return best && fabsf(value_of((unsigned)(best >> 32))) < INFINITY;
}

__global__ void __launch_bounds__(THREADS) begin_kernel(tm_sample_args a, work w)
{
    SHARED(slots_t, slots);
    SHARED(unsigned[CHUNKS_MAX / 32], touched);
    SHARED(int[TM_SAMPLE_TOP_MAX], picked);
    SHARED(int, token);
    wait_previous();
    start_next();
    const int row = (int)blockIdx.x;
    const tm_sample_row p = a.rows[row];
    float *x = row_at(a, row);
    unsigned *keys = w.keys + (size_t)row * w.chunks;
    u64 best = best_chunk(slots, keys, w.chunks, ~0ull);
    bool usable = finite_key(best);
    if (usable && p.logprobs) {
        describe(slots, x, keys, w.chunks, a.n, value_of((unsigned)(best >> 32)), &a.details[row]);
        list_tops(slots, picked, x, keys, w.chunks, a.n, min(p.logprobs - 1, TM_SAMPLE_TOP_MAX),
                  &a.details[row]);
    }
    if (p.n_seen + p.n_bias + p.n_banned > 0) {
        __syncthreads(); /* nobody looks at the row as it was */
        edit_row(p, x, a.edits + p.first_edit, keys, w.chunks, a.n, touched);
        best = best_chunk(slots, keys, w.chunks, ~0ull);
        usable = (usable || !p.logprobs) && finite_key(best);
    }
    const bool draws = usable && p.scale > 0.0f;
    if (threadIdx.x == 0)
        w.states[row] = {value_of((unsigned)(best >> 32)), draws};
    if (draws)
        return;
    if (warp_id() == 0) {
        const int first = usable ? first_of(x, a.n, index_of(best), (unsigned)(best >> 32)) : -1;
        if (lane_id() == 0)
            token = first;
    }
    __syncthreads();
    finish(slots, a, p, row, token);
}

/* ---- weigh ---- */

/* Weights that choose looks at several times are kept in the row; not where its logits are wanted later. */
__device__ bool keeps_weights(const tm_sample_row &p)
{
    return (p.top_k > 0 || p.top_p > 0) && !p.logprobs;
}

__global__ void __launch_bounds__(PART) weigh_kernel(tm_sample_args a, work w)
{
    wait_previous();
    start_next();
    const int row = (int)blockIdx.y;
    const row_state s = w.states[row];
    if (!s.draws)
        return;
    const tm_sample_row p = a.rows[row];
    const bool keeps = keeps_weights(p);
    const float least = p.top_k == 0 ? top_p_floor(p.top_p, 0.25f, a.n) : 0.0f;
    float *x = row_at(a, row);
    const int step = (int)gridDim.x * (PART / 32);
    for (int c = (int)blockIdx.x * (PART / 32) + warp_id(); c < w.chunks; c += step) {
        const size_t at = (size_t)row * w.chunks + c;
        float e[EACH];
        unsigned top = 0;
        u64 mass = 0;
        if (w.keys[at] && __fmul_rn(__fsub_rn(value_of(w.keys[at]), s.max), p.scale) >= NO_MASS) {
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const int i = c * CHUNK + j * 32 + lane_id();
                e[j] = i < a.n ? weight_of(x[i], s.max, p.scale) : 0.0f;
                mass += mass_of(e[j]);
                top = max(top, __float_as_uint(e[j]));
            }
            mass = warp_sum(mass);
            top = __reduce_max_sync(ALL, top);
            if (keeps && __uint_as_float(top) >= least)
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    const int i = c * CHUNK + j * 32 + lane_id();
                    if (i < a.n)
                        x[i] = e[j];
                }
        }
        __syncwarp();
        if (lane_id() == 0) {
            w.keys[at] = top;
            w.masses[at] = mass;
        }
    }
}

/* ---- choose ---- */

__global__ void __launch_bounds__(THREADS) choose_kernel(tm_sample_args a, work w)
{
    SHARED(board, b);
    SHARED(int, token);
    wait_previous();
    start_next();
    const int row = (int)blockIdx.x;
    const row_state state = w.states[row];
    if (!state.draws)
        return;
    const tm_sample_row p = a.rows[row];
    const size_t at = (size_t)row * w.chunks;
    const weights v = {row_at(a, row), w.keys + at, w.masses + at, a.n,
                       w.chunks,       state.max,   p.scale,       keeps_weights(p)};
    const bool filters = p.top_k > 0 || p.top_p > 0 || p.min_p > 0.0f;
    stay s = {0, 0};
    if (filters) {
        s = filter(b, p, v);
        __syncthreads();
        weigh_stay(v, s);
    }
    find_chunk(b, v, filters ? &s : nullptr, p.uniform);
    __syncthreads();
    if (warp_id() == 0) {
        const int i = walk(v, filters ? &s : nullptr, b.chunk, b.ties, b.rest);
        if (lane_id() == 0)
            token = i;
    }
    __syncthreads();
    finish(b.slots, a, p, row, token);
}

/* Blocks of a row in keys and weigh: as many as the device holds at once (one more would have all wait for it twice), and
 * no more than have two chunks for each warp. */
unsigned parts_of(int chunks, int rows, int sms)
{
    const int most = (chunks + PART / 16 - 1) / (PART / 16), fill = 2048 / PART * sms / rows;
    const int parts = fill < most ? fill : most;
    return (unsigned)(parts > 1 ? parts : 1);
}

} /* namespace */

extern "C" cudaError_t tm_cuda_sample_launch(const tm_sample_args *all, const tm_cuda_ctx *c)
{
    work w = {};
    w.chunks = (all->n + CHUNK - 1) / CHUNK;
    const size_t each =
        sizeof(row_state) + (size_t)w.chunks * (sizeof(*w.masses) + sizeof(*w.keys));
    const int most = (int)(TM_CUDA_SCRATCH_BYTES / each);
    if (w.chunks > CHUNKS_MAX)
        return cudaErrorInvalidValue;
    for (int first = 0; first < all->n_rows; first += most) {
        tm_sample_args a = *all;
        const int rows = all->n_rows - first < most ? all->n_rows - first : most;
        const dim3 grid(parts_of(w.chunks, rows, c->sms), (unsigned)rows);
        a.n_rows = rows;
        a.out += first;
        a.rows += first;
        a.x += (size_t)first * (size_t)(a.ld ? a.ld : a.n);
        a.details = a.details ? a.details + first : nullptr;
        w.states = reinterpret_cast<row_state *>(c->scratch);
        w.masses = reinterpret_cast<u64 *>(w.states + rows);
        w.keys = reinterpret_cast<unsigned *>(w.masses + (size_t)rows * w.chunks);
        cudaError_t e = launch_kernel(c, keys_kernel, grid, PART, 0, a, w);
        if (e == cudaSuccess)
            e = launch_kernel(c, begin_kernel, dim3((unsigned)rows), THREADS, 0, a, w);
        if (e == cudaSuccess)
            e = launch_kernel(c, weigh_kernel, grid, PART, 0, a, w);
        if (e == cudaSuccess)
            e = launch_kernel(c, choose_kernel, dim3((unsigned)rows), THREADS, 0, a, w);
        if (e != cudaSuccess)
            return e;
    }
    return cudaSuccess;
}
