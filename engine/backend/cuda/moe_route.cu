/* The experts of each token: one warp per token, everything in f32.
 *
 * The scores of a token and what its choice goes by lie in shared memory, a lane owns every 32nd expert. An
 * expert is taken in each of top_k rounds: each lane looks for its own best, then the warp for the best of those,
 * the lowest index on ties; a taken expert (or one of a closed group) is marked. Something is always chosen, also
 * where logits are no numbers. Bytes moved: T * (E + 2 k) * 4; time goes into k * E / 32 steps of a warp. */
#include "engine/backend/cuda/launch.cuh"

namespace
{

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int EXPERTS_MAX = 1024, GROUPS_MAX = 128;

struct warp_smem {
    float score[EXPERTS_MAX], choice[EXPERTS_MAX];
    float group[GROUPS_MAX];
    uint32_t taken[EXPERTS_MAX / 32]; /* bit e % 32 of word e / 32 */
    uint32_t closed[GROUPS_MAX / 32];
};

__device__ __forceinline__ bool bit_of(const uint32_t *bits, int i)
{
    return bits[i / 32] >> i % 32 & 1u;
}

__device__ float warp_max(float v)
{
    for (int i = 16; i > 0; i >>= 1)
        v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, i));
    return v;
}

__device__ float warp_sum(float v)
{
    for (int i = 16; i > 0; i >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, i);
    return v;
}

/* The index of the largest number whose bit is clear, in every lane; -1 when all are set. */
__device__ int best_of(const float *x, const uint32_t *bits, int n)
{
    int best = -1;
    float top = 0.0f;
    for (int i = threadIdx.x % 32; i < n; i += 32)
        if (!bit_of(bits, i) && (best < 0 || x[i] > top)) {
            best = i;
            top = x[i];
        }
    for (int i = 16; i > 0; i >>= 1) {
        const int other = __shfl_xor_sync(0xffffffffu, best, i);
        const float value = __shfl_xor_sync(0xffffffffu, top, i);
        const bool first = best < 0 || value > top || (!(value < top) && other < best);
        if (other >= 0 && first) {
            best = other;
            top = value;
        }
    }
    /* With numbers that are none the lanes may not agree. */
    return __shfl_sync(0xffffffffu, best, 0);
}

/* Sets bit i; all lanes see it afterwards. */
__device__ void set_bit(uint32_t *bits, int i)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        bits[i / 32] |= 1u << i % 32;
    __syncwarp();
}

__device__ void fill_scores(const tm_moe_route_args &a, const float *logits, warp_smem &s)
{
    const int lane = threadIdx.x % 32;
    float max = -INFINITY, sum = 0.0f;
    for (int e = lane; e < a.n_experts; e += 32)
        max = fmaxf(max, logits[e]);
    max = warp_max(max);
    for (int e = lane; e < a.n_experts; e += 32) {
        const float v =
            a.score == TM_MOE_SIGMOID ? 1.0f / (1.0f + expf(-logits[e])) : expf(logits[e] - max);
        s.score[e] = v;
        sum += v;
    }
    sum = a.score == TM_MOE_SIGMOID ? 1.0f : warp_sum(sum);
    for (int e = lane; e < a.n_experts; e += 32) {
        s.score[e] /= sum;
        s.choice[e] = a.bias ? s.score[e] + a.bias[e] : s.score[e];
    }
    __syncwarp();
}

/* Marks the experts of all groups but the best as taken. */
__device__ void close_groups(const tm_moe_route_args &a, warp_smem &s)
{
    const int lane = threadIdx.x % 32, per = a.n_experts / a.n_groups;
    for (int g = lane; g < a.n_groups; g += 32) {
        float first = -INFINITY, second = -INFINITY;
        for (int i = g * per; i < (g + 1) * per; i++) {
            second = fmaxf(second, fminf(first, s.choice[i]));
            first = fmaxf(first, s.choice[i]);
        }
        s.group[g] = a.group_score == TM_GROUP_TOP2 ? first + second : first;
    }
    __syncwarp();
    for (int i = 0; i < a.top_groups; i++)
        set_bit(s.closed, best_of(s.group, s.closed, a.n_groups)); /* "closed" to this search */
    for (int w = lane; w < (a.n_experts + 31) / 32; w += 32) {
        uint32_t bits = 0;
        for (int i = 0; i < 32 && w * 32 + i < a.n_experts; i++)
            bits |= (uint32_t)!bit_of(s.closed, (w * 32 + i) / per) << i;
        s.taken[w] = bits;
    }
    __syncwarp();
}

__global__ void __launch_bounds__(THREADS) route_kernel(tm_moe_route_args a)
{
    SHARED(warp_smem[WARPS], smem);
    wait_previous();
    start_next();
    const int token = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= a.n_tokens)
        return;
    warp_smem &s = smem[threadIdx.x / 32];
    s.taken[lane] = 0;
    if (lane < GROUPS_MAX / 32)
        s.closed[lane] = 0;
    fill_scores(a, a.logits + (size_t)token * a.n_experts, s);
    if (a.n_groups > 1)
        close_groups(a, s);
    int32_t *ids = a.ids + (size_t)token * a.top_k;
    float *weights = a.weights + (size_t)token * a.top_k, sum = 0.0f;
    for (int i = 0; i < a.top_k; i++) {
        const int e = best_of(s.choice, s.taken, a.n_experts);
        set_bit(s.taken, e);
        sum += s.score[e];
        if (lane == 0)
            ids[i] = e;
    }
    __syncwarp();
    const float scale = a.normalise ? a.scale / (sum + 1e-20f) : a.scale;
    for (int i = lane; i < a.top_k; i += 32)
        weights[i] = s.score[ids[i]] * scale;
}

} /* namespace */

extern "C" cudaError_t tm_cuda_moe_route_launch(const tm_moe_route_args *a, const tm_cuda_ctx *c)
{
    const int groups = a->n_groups > 1 ? a->n_groups : 1;
    if (a->n_experts < 1 || a->n_experts > EXPERTS_MAX || groups > GROUPS_MAX ||
        a->n_experts % groups != 0 ||
        a->top_k > (groups > 1 ? a->top_groups * (a->n_experts / groups) : a->n_experts) ||
        (groups > 1 && a->top_groups > groups))
        return cudaErrorInvalidValue;
    if (a->n_tokens == 0)
        return cudaSuccess;
    return launch_kernel(c, route_kernel, dim3((unsigned)((a->n_tokens + WARPS - 1) / WARPS)),
                         THREADS, 0, *a);
}
