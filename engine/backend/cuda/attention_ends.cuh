/* The ends of decode attention's kernel: what the blocks of a sequence's kv head found becomes one result.
 *
 * end_by_ticket: through memory; the last block to come adds the parts up. end_by_team: a cluster of blocks, each of which gets
 * its share of the results from all through shared memory: two trips to memory and an atomic less, but clusters have to
 * find room together. */
#ifndef TM_ENGINE_BACKEND_CUDA_ATTENTION_ENDS_CUH
#define TM_ENGINE_BACKEND_CUDA_ATTENTION_ENDS_CUH

#include "engine/backend/cuda/attention_decode.cuh"
#include "engine/backend/cuda/hopper.cuh"

namespace
{

/* Floats of one part in scratch: [HEADS][D] sums, then [HEADS] maxima, then [HEADS] weights. */
template <int D> __host__ __device__ constexpr size_t part_floats()
{
    return HEADS * D + 2 * HEADS;
}

constexpr int BATCH = 16; /* parts whose sums are asked for at once */

/* factor[h][i]: what the sums of part i weigh in head h's result. 4 lanes of each warp a head, a part each in turn. */
template <int D, int W>
__device__ __forceinline__ void weigh_parts(const part &p, const float *parts,
                                            float (&factor)[HEADS][SPLITS_MAX])
{
    constexpr int LANES = 32 * W / HEADS, TURNS = SPLITS_MAX / LANES;
    const int h = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    float m[TURNS], l[TURNS], top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int k = 0; k < TURNS; k++) {
        const int i = k * LANES + lane;
        const float *from = parts + i * part_floats<D>() + HEADS * D + h;
        const bool there = i < p.count && h < p.rows;
        m[k] = there ? __ldcg(from) : -INFINITY;
        l[k] = there ? __ldcg(from + HEADS) : 0.0f;
        top = fmaxf(top, m[k]);
    }
    for (int x = 1; x < LANES; x *= 2)
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, x));
    const float safe = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int k = 0; k < TURNS; k++) {
        m[k] = power2(m[k] - safe);
        sum += l[k] * m[k];
    }
    for (int x = 1; x < LANES; x *= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, x);
#pragma unroll
    for (int k = 0; k < TURNS; k++)
        factor[h][k * LANES + lane] = m[k] / sum;
    __syncthreads();
}

/* The unit's result from its parts' sums, 4 neighbouring dims of a head a thread. The first ones are asked for before the
 * parts' weights are known. */
template <typename T, int D, int W>
__device__ void add_parts(const decode_args &a, const part &p, const float *parts,
                          float (&factor)[HEADS][SPLITS_MAX])
{
    constexpr int PACKS = D / 4;
    T *out = static_cast<T *>(a.out) + ((size_t)p.seq * a.heads + p.head0) * D;
    bool weighed = false;
    for (int i = threadIdx.x; !weighed || i < p.rows * PACKS; i += blockDim.x) {
        const float *from = parts + i * 4;
        float acc[4] = {};
        for (int n = 0; n < p.count; n += BATCH) {
            float4 v[BATCH];
#pragma unroll
            for (int k = 0; k < BATCH; k++)
                v[k] = n + k < p.count && i < p.rows * PACKS
                           ? __ldcg(reinterpret_cast<const float4 *>(from +
                                                                     (n + k) * part_floats<D>()))
                           : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (!weighed)
                weigh_parts<D, W>(p, parts, factor);
            weighed = true;
#pragma unroll
            for (int k = 0; k < BATCH; k++) {
                const float f = n + k < p.count ? factor[i / PACKS % HEADS][n + k] : 0.0f;
                acc[0] += v[k].x * f, acc[1] += v[k].y * f;
                acc[2] += v[k].z * f, acc[3] += v[k].w * f;
            }
        }
        if (i < p.rows * PACKS) {
            pack<T, 4> o;
            for (int e = 0; e < 4; e++)
                o.e[e] = from_f32<T>(acc[e]);
            store_pack<T, 4>(out, i, o);
        }
    }
}

template <int D> struct ticket_smem {
    float factor[HEADS][SPLITS_MAX];
    bool last;
};

/* What a block's warps found of result i. */
template <int D, int W>
__device__ __forceinline__ float block_sum(const merge_smem<D, W> &sm, int i)
{
    float v = 0.0f;
#pragma unroll
    for (int w = 0; w < W; w++)
        v += sm.o[w][i / D][place_of<D>(i % D)];
    return v;
}

template <typename T, int D, int W>
__device__ __forceinline__ void end_by_ticket(const decode_args &a, const part &p,
                                              const merge_smem<D, W> &sm, ticket_smem<D> &ts)
{
    const int unit = p.seq * gridDim.y + blockIdx.y;
    float *parts = a.scratch + (size_t)unit * gridDim.x * part_floats<D>();
    float *mine = parts + p.index * part_floats<D>();
    T *out = static_cast<T *>(a.out) + ((size_t)p.seq * a.heads + p.head0) * D;
    for (int i = threadIdx.x; i < p.rows * D; i += blockDim.x) {
        const float v = block_sum<D, W>(sm, i);
        if (p.count == 1)
            out[i] = from_f32<T>(v / sm.sum[i / D]);
        else
            mine[i] = v;
    }
    if (p.count > 1 && threadIdx.x < p.rows) {
        mine[HEADS * D + threadIdx.x] = sm.top[threadIdx.x];
        mine[HEADS * D + HEADS + threadIdx.x] = sm.sum[threadIdx.x];
    }
    if (p.count == 1)
        return;
    __syncthreads(); /* the fence of one thread is then one of all that this block wrote */
    if (threadIdx.x == 0) {
        __threadfence();
        ts.last = atomicAdd(&a.tickets[unit], 1) == p.count - 1;
        __threadfence();
        if (ts.last)
            a.tickets[unit] = 0;
    }
    __syncthreads();
    if (!ts.last)
        return;
    add_parts<T, D, W>(a, p, parts, ts.factor);
}

constexpr int TEAM = 16; /* blocks */

#if defined(HOPPER)

/* What the blocks of a team have sent this one: its share of the results from each, and what they weigh: maxima and sums of
 * the two heads that a share, half a head's dims at most, may touch. */
template <int D> struct team_smem {
    float4 o[TEAM][HEADS * D / TEAM / 4];
    float2 weight[TEAM][2];
};

/* Results of a block of the team, a multiple of 4. */
template <int D> __device__ __forceinline__ int share_of(const part &p)
{
    return (p.rows * D + TEAM * 4 - 1) / (TEAM * 4) * 4;
}

/* Before the team's first barrier: what will come. */
template <int D> __device__ __forceinline__ void expect_shares(const part &p, uint64_t *sent)
{
    if (threadIdx.x == 0) {
        barrier_init(sent, 1);
        barriers_made();
        barrier_expect(sent, TEAM * (share_of<D>(p) / 4 + 1) * (int)sizeof(float4));
    }
}

/* Maximum and sum of the heads of the results from `at` on. */
template <int D, int W>
__device__ __forceinline__ float4 weight_of(const part &p, const merge_smem<D, W> &sm, int at)
{
    const int h = min(at / D, p.rows - 1), next = min(h + 1, p.rows - 1);
    return make_float4(sm.top[h], sm.sum[h], sm.top[next], sm.sum[next]);
}

/* Every block of the team comes here, those without keys too; all have begun and expect what is sent. */
template <typename T, int D, int W>
__device__ __forceinline__ void end_by_team(const decode_args &a, const part &p,
                                            const merge_smem<D, W> &sm, team_smem<D> &in,
                                            uint64_t *sent)
{
    constexpr int LANES = 16; /* that send to one block */
    const int results = p.rows * D, share = share_of<D>(p), me = cluster_rank();
    const int lane = threadIdx.x % LANES;
#pragma unroll 1
    for (int to = threadIdx.x / LANES; to < TEAM; to += 32 * W / LANES) {
        for (int n = lane; n < share / 4; n += LANES) {
            const int at = to * share + n * 4;
            float v[4] = {};
            for (int e = 0; e < 4 && at < results; e++)
                v[e] = block_sum<D, W>(sm, at + e);
            send_cluster(&in.o[me][n], to, make_float4(v[0], v[1], v[2], v[3]), sent);
        }
        if (lane == LANES - 1)
            send_cluster(reinterpret_cast<float4 *>(in.weight[me]), to,
                         weight_of<D, W>(p, sm, to * share), sent);
    }
    barrier_wait(sent, 0);
    T *out = static_cast<T *>(a.out) + ((size_t)p.seq * a.heads + p.head0) * D;
    for (int i = threadIdx.x; i < share && me * share + i < results; i += blockDim.x) {
        const int at = me * share + i;
        const int h = at / D - me * share / D;
        float top = -INFINITY, sum = 0.0f, v = 0.0f;
#pragma unroll
        for (int f = 0; f < TEAM; f++)
            top = fmaxf(top, in.weight[f][h].x);
#pragma unroll
        for (int f = 0; f < TEAM; f++) {
            const float2 w = in.weight[f][h];
            const float factor = power2(w.x - top);
            sum += w.y * factor;
            v += reinterpret_cast<const float *>(in.o[f])[i] * factor;
        }
        out[at] = from_f32<T>(v / sum);
    }
}

#endif

} /* namespace */

#endif
