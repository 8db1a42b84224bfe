/* Edits of a row: the few tokens whose logits penalties, biases and bans change.
 *
 * A block applies those of the part of the row that is its own, so nobody else waits for it; it looks at all of the row's
 * edits, which are in no order. */
#ifndef TM_ENGINE_BACKEND_CUDA_SAMPLE_EDIT_CUH
#define TM_ENGINE_BACKEND_CUDA_SAMPLE_EDIT_CUH

#include "engine/backend/cuda/sample.cuh"

namespace
{

/* Chunks of a row. */
typedef struct stretch {
    int begin, end;
} stretch;

/* Edits of one kind, which are of different tokens, as far as their tokens lie in the stretch; each leaves the logit
 * that it found. done(chunk). */
template <typename F, typename D>
__device__ __forceinline__ void edit(float *x, tm_sample_edit *edits, int n, const stretch &part,
                                     F change, D done)
{
    constexpr int N = 4;
    for (int first = (int)threadIdx.x; first < n; first += N * (int)blockDim.x) {
        tm_sample_edit e[N];
        float before[N];
        bool mine[N];
#pragma unroll
        for (int k = 0; k < N; k++) {
            const int i = first + k * (int)blockDim.x;
            e[k] = i < n ? edits[i] : tm_sample_edit{-1, 0.0f};
            mine[k] = e[k].token >= part.begin * CHUNK && e[k].token < part.end * CHUNK;
        }
#pragma unroll
        for (int k = 0; k < N; k++)
            before[k] = mine[k] ? x[e[k].token] : 0.0f;
#pragma unroll
        for (int k = 0; k < N; k++)
            if (mine[k]) {
                x[e[k].token] = change(before[k], e[k].value);
                edits[first + k * (int)blockDim.x].value = before[k];
                done(e[k].token / CHUNK);
            }
    }
    __syncthreads();
}

template <typename D>
__device__ void edit_stretch(const tm_sample_row &p, float *x, tm_sample_edit *edits,
                             const stretch &part, D done)
{
    const auto seen = [&](float v, float times) {
        v = v > 0.0f ? __fdiv_rn(v, p.repetition) : __fmul_rn(v, p.repetition);
        return times > 0.0f ? __fsub_rn(v, __fadd_rn(__fmul_rn(p.frequency, times), p.presence))
                            : v;
    };
    edit(x, edits, p.n_seen, part, seen, done);
    edits += p.n_seen;
    edit(
        x, edits, p.n_bias, part, [](float v, float bias) { return __fadd_rn(v, bias); }, done);
    edits += p.n_bias;
    edit(
        x, edits, p.n_banned, part, [](float, float) { return -INFINITY; }, done);
}

__device__ __forceinline__ int edits_of(const tm_sample_row &p)
{
    return p.n_seen + p.n_bias + p.n_banned;
}

} /* namespace */

#endif
