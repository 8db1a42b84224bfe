/* What log-probabilities are computed from, of the row as the model gave it: its mass, and its best logits, by one block
 * that has the largest logit of every chunk. */
#ifndef TM_ENGINE_BACKEND_CUDA_SAMPLE_DETAIL_CUH
#define TM_ENGINE_BACKEND_CUDA_SAMPLE_DETAIL_CUH

#include "engine/backend/cuda/sample.cuh"

namespace
{

constexpr int TOP_KEYS = (TM_SAMPLE_TOP_MAX * CHUNK + THREADS - 1) / THREADS;

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
    const bool packed = is_packed(x);
    u64 mass = 0;
    each_chunk(
        warp_id(), WARPS, chunks,
        [&](int c) { return keys[c] && __fsub_rn(value_of(keys[c]), max) >= NO_MASS; },
        [&](const int(&c)[AHEAD]) {
            float v[AHEAD][EACH];
#pragma unroll
            for (int q = 0; q < AHEAD; q++)
                load_chunk(v[q], x, c[q] < 0 ? 0 : n, c[q] < 0 ? 0 : c[q], packed, NAN);
#pragma unroll
            for (int q = 0; q < AHEAD * EACH; q++)
                mass += mass_of(weight_of(v[q / EACH][q % EACH], max, 1.0f));
        });
    mass = block_sum(slots, mass);
    if (threadIdx.x == 0) {
        d->mass = mass;
        d->max = max;
    }
}

} /* namespace */

#endif
