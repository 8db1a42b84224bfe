/* The attention phase of decode_step.cu: a block is TEAMS teams of four warps, and a team does what a block of
 * attention_decode.cu does: one sequence, one kv head, up to 8 of its query heads, one part of the keys; the last team
 * of these to finish adds the parts up. A team rotates its queries, and the one with the last key appends. */
#ifndef TM_ENGINE_BACKEND_CUDA_DECODE_ATTENTION_CUH
#define TM_ENGINE_BACKEND_CUDA_DECODE_ATTENTION_CUH

#include "engine/backend/cuda/decode_step.h"
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/mma.cuh"

namespace
{

constexpr int TEAM_WARPS = 4, TEAM = 32 * TEAM_WARPS;
constexpr int HEADS = 8;                  /* query heads of a team */
constexpr int TILE = 16;                  /* keys of a warp */
constexpr int STRIDE = TEAM_WARPS * TILE; /* keys of a team's step */
constexpr int SPLITS_MAX = 64;
constexpr float LOG2E = 1.4426950408889634f;

typedef tm_cuda_step_args step_args;

/* Eight numbers that another block wrote. */
template <typename T>
__device__ __forceinline__ pack<T, 8> load_shared_pack(const void *p, size_t i)
{
    const uint4 v = __ldcg(static_cast<const uint4 *>(p) + i);
    return *reinterpret_cast<const pack<T, 8> *>(&v);
}

/* What a team works on: one sequence, one kv head, up to 8 of its query heads, one part of the keys. */
struct part {
    int seq, kv_head, head0, rows;
    int len, begin, end, index, count, unit;
    const int32_t *blocks;
};

__device__ part find_part(const step_args &a, int item)
{
    part p;
    const int heads = a.kv_heads * a.head_groups;
    p.unit = item / a.splits;
    p.index = item % a.splits;
    p.seq = p.unit / heads;
    p.kv_head = p.unit % heads / a.head_groups;
    const int in_group = p.unit % a.head_groups * HEADS;
    p.head0 = p.kv_head * a.group + in_group;
    p.rows = min(HEADS, a.group - in_group);
    p.len = a.kv_len[p.seq];
    const int units = (p.len + STRIDE - 1) / STRIDE, each = (units + a.splits - 1) / a.splits;
    p.count = each > 0 ? (units + each - 1) / each : 0;
    p.begin = p.index * each * STRIDE;
    p.end = min(p.begin + each * STRIDE, p.len);
    p.blocks = a.blocks + (size_t)p.seq * a.max_blocks;
    return p;
}

/* A team's shared memory. */
template <typename T, int D> struct team_smem {
    float o[TEAM_WARPS][HEADS][D];
    float2 cs[D / 2];
    alignas(16) T q[HEADS][D + 8]; /* rotated; rows 16 bytes out of step with the banks */
    float m[TEAM_WARPS][HEADS], l[TEAM_WARPS][HEADS];
    float top[HEADS], sum[HEADS];
    float factor[TEAM_WARPS][SPLITS_MAX];
    int last;
};

/* By constants: with a name that is only known at run time the compiler sets all sixteen barriers aside. */
__device__ __forceinline__ void team_barrier()
{
    switch (threadIdx.x / TEAM) {
    case 0:
        return barrier_sync<1, TEAM>();
    case 1:
        return barrier_sync<2, TEAM>();
    case 2:
        return barrier_sync<3, TEAM>();
    default:
        return barrier_sync<4, TEAM>();
    }
}

template <int D>
__device__ __forceinline__ size_t key_at(const step_args &a, const part &p, int32_t block, int key)
{
    const int in_block = key & ((1 << a.block_shift) - 1);
    return (((size_t)(block * a.kv_heads + p.kv_head) << a.block_shift) + in_block) * D;
}

/* Cosines and sines of the row's angles, then the rotated queries into sm.q. */
template <typename T, int D>
__device__ void rotate_queries(const step_args &a, const part &p, team_smem<T, D> &sm)
{
    const int tid = threadIdx.x % TEAM;
    for (int i = tid; i < D / 2; i += TEAM) {
        float s, c;
        sincosf((float)(p.len - 1) * a.inv_freq[i], &s, &c);
        sm.cs[i] = make_float2(c * a.mscale, s * a.mscale);
    }
    team_barrier();
    const size_t row = (size_t)(a.heads + 2 * a.kv_heads) * D;
    const T *from = static_cast<const T *>(a.qkv) + p.seq * row + (size_t)p.head0 * D;
    for (int i = tid; i < HEADS * (D / 16); i += TEAM) {
        const int h = i / (D / 16), at = i % (D / 16); /* 8 pairs each */
        pack<T, 8> x = {}, y = {};
        if (h < p.rows) {
            x = load_shared_pack<T>(from + h * D, at);
            y = load_shared_pack<T>(from + h * D + D / 2, at);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 cs = sm.cs[at * 8 + j];
            const float u = to_f32(x.e[j]), v = to_f32(y.e[j]);
            x.e[j] = from_f32<T>(u * cs.x - v * cs.y);
            y.e[j] = from_f32<T>(v * cs.x + u * cs.y);
        }
        store_pack<T, 8>(&sm.q[h][0], at, x);
        store_pack<T, 8>(&sm.q[h][D / 2], at, y);
    }
    team_barrier();
}

/* The new key, rotated, and the new value into the cache; the team that has the last key reads them back. */
template <typename T, int D>
__device__ void append(const step_args &a, const part &p, const float2 *cs, T *k_cache, T *v_cache)
{
    const int pos = p.len - 1, tid = threadIdx.x % TEAM;
    const size_t at = key_at<D>(a, p, p.blocks[pos >> a.block_shift], pos);
    const T *from = static_cast<const T *>(a.qkv) +
                    ((size_t)p.seq * (a.heads + 2 * a.kv_heads) + a.heads + p.kv_head) * D;
    const T *value = from + (size_t)a.kv_heads * D;
    for (int i = tid; i < D / 16; i += TEAM) {
        pack<T, 8> x = load_shared_pack<T>(from, i), y = load_shared_pack<T>(from + D / 2, i);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float2 c = cs[i * 8 + j];
            const float u = to_f32(x.e[j]), v = to_f32(y.e[j]);
            x.e[j] = from_f32<T>(u * c.x - v * c.y);
            y.e[j] = from_f32<T>(v * c.x + u * c.y);
        }
        store_pack<T, 8>(k_cache + at, i, x);
        store_pack<T, 8>(k_cache + at + D / 2, i, y);
    }
    for (int i = tid; i < D / 8; i += TEAM)
        store_pack<T, 8>(v_cache + at, i, load_shared_pack<T>(value, i));
    __threadfence_block();
    team_barrier();
}

/* The dims that register i of a value belongs to for lane g: this one and the next. */
__device__ __forceinline__ int value_dim(int i, int g)
{
    return i / 4 * 64 + g * 8 + i % 4 * 2;
}

/* Running softmax of two heads (columns 2t and 2t + 1), in powers of two. */
struct softmax {
    float m[2], l[2];
};

/* s becomes the weights; o is scaled to the new maximum. */
template <int D>
__device__ __forceinline__ void update(const step_args &a, const part &p, softmax &m, float (&s)[4],
                                       float (&o)[D / 16][4], int j)
{
    const int g = threadIdx.x % 32 / 4;
    float corr[2];
#pragma unroll
    for (int i = 0; i < 4; i++)
        s[i] = j + g + (i & 2) * 4 < p.end ? s[i] * (a.scale * LOG2E) : -INFINITY;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float top = fmaxf(s[i], s[i + 2]);
        for (int x = 4; x < 32; x *= 2)
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, x));
        top = fmaxf(top, m.m[i]);
        const float safe = top == -INFINITY ? 0.0f : top;
        corr[i] = power2(m.m[i] - safe);
        s[i] = power2(s[i] - safe);
        s[i + 2] = power2(s[i + 2] - safe);
        m.l[i] = m.l[i] * corr[i] + s[i] + s[i + 2];
        m.m[i] = top;
    }
    if (__any_sync(0xffffffffu, corr[0] != 1.0f || corr[1] != 1.0f))
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            o[i][0] *= corr[0], o[i][1] *= corr[1], o[i][2] *= corr[0], o[i][3] *= corr[1];
}

template <typename T, int D>
__device__ __forceinline__ void attend(const step_args &a, const part &p, team_smem<T, D> &sm,
                                       const T *keys, const T *values, softmax &m,
                                       float (&o)[D / 16][4])
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int j = p.begin + threadIdx.x % TEAM / 32 * TILE; j < p.end; j += STRIDE) {
        const int32_t block = p.blocks[j >> a.block_shift];
        uint32_t k[2][D / 8], v[4][D / 16];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int key = j + g + 8 * h;
            const T *at = keys + key_at<D>(a, p, block, key) + t * 8;
#pragma unroll
            for (int c = 0; c < D / 32; c++)
                load_stream(&k[h][c * 4], at + c * 32, key < p.end);
        }
#pragma unroll
        for (int h = 0; h < 4; h++) {
            const int key = j + 2 * t + (h & 1) + (h & 2) * 4;
            const T *at = values + key_at<D>(a, p, block, key);
#pragma unroll
            for (int c = 0; c < D / 64; c++)
                load_stream(&v[h][c * 4], at + c * 64 + g * 8, key < p.end);
        }
        float s[4] = {};
#pragma unroll
        for (int c = 0; c < D / 32; c++) {
            const uint4 q = *reinterpret_cast<const uint4 *>(&sm.q[g][c * 32 + t * 8]);
            mma<T>(s, k[0][c * 4], k[1][c * 4], k[0][c * 4 + 1], k[1][c * 4 + 1], q.x, q.y);
            mma<T>(s, k[0][c * 4 + 2], k[1][c * 4 + 2], k[0][c * 4 + 3], k[1][c * 4 + 3], q.z, q.w);
        }
        update<D>(a, p, m, s, o, j);
        const uint32_t b0 = transpose8(pack2<T>(s[0], s[1])), b1 = transpose8(pack2<T>(s[2], s[3]));
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            mma<T>(o[i], __byte_perm(v[0][i], v[1][i], 0x5410),
                   __byte_perm(v[0][i], v[1][i], 0x7632), __byte_perm(v[2][i], v[3][i], 0x5410),
                   __byte_perm(v[2][i], v[3][i], 0x7632), b0, b1);
    }
}

/* Every warp's o, scaled to the team's maximum, into shared memory, and the team's maxima and sums. */
template <typename T, int D>
__device__ void merge_warps(team_smem<T, D> &sm, softmax &m, const float (&o)[D / 16][4])
{
    const int tid = threadIdx.x % TEAM, warp = tid / 32, g = tid % 32 / 4, t = tid % 4;
    for (int i = 0; i < 2; i++) {
        for (int x = 4; x < 32; x *= 2)
            m.l[i] += __shfl_xor_sync(0xffffffffu, m.l[i], x);
        if (g == 0) {
            sm.m[warp][2 * t + i] = m.m[i];
            sm.l[warp][2 * t + i] = m.l[i];
        }
    }
    team_barrier();
    float f[2];
    for (int i = 0; i < 2; i++) {
        float top = -INFINITY;
        for (int w = 0; w < TEAM_WARPS; w++)
            top = fmaxf(top, sm.m[w][2 * t + i]);
        f[i] = m.m[i] == -INFINITY ? 0.0f : power2(m.m[i] - top);
    }
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int d = value_dim(i, g);
        for (int e = 0; e < 4; e++)
            sm.o[warp][2 * t + (e & 1)][d + e / 2] = o[i][e] * f[e & 1];
    }
    if (tid < HEADS) {
        float top = -INFINITY, sum = 0.0f;
        for (int w = 0; w < TEAM_WARPS; w++)
            top = fmaxf(top, sm.m[w][tid]);
        for (int w = 0; w < TEAM_WARPS; w++)
            if (sm.m[w][tid] != -INFINITY)
                sum += sm.l[w][tid] * power2(sm.m[w][tid] - top);
        sm.top[tid] = top;
        sm.sum[tid] = sum;
    }
    team_barrier();
}

/* Floats of one part in scratch: [HEADS][D] sums, then [HEADS] maxima, then [HEADS] weights. */
template <int D> __host__ __device__ constexpr size_t part_floats()
{
    return HEADS * D + 2 * HEADS;
}

/* A warp per head: first the factor of every part, one lane a part, then the sum. */
template <typename T, int D>
__device__ void add_parts(const step_args &a, const part &p, const float *parts,
                          float (&factor)[TEAM_WARPS][SPLITS_MAX])
{
    const int warp = threadIdx.x % TEAM / 32, lane = threadIdx.x % 32;
    for (int h = warp; h < p.rows; h += TEAM_WARPS) {
        float m[SPLITS_MAX / 32], l[SPLITS_MAX / 32], top = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int k = 0; k < SPLITS_MAX / 32; k++) {
            const float *from = parts + (k * 32 + lane) * part_floats<D>() + HEADS * D + h;
            const bool there = k * 32 + lane < p.count;
            m[k] = there ? __ldcg(from) : -INFINITY;
            l[k] = there ? __ldcg(from + HEADS) : 0.0f;
            top = fmaxf(top, m[k]);
        }
        for (int x = 1; x < 32; x *= 2)
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, x));
#pragma unroll
        for (int k = 0; k < SPLITS_MAX / 32; k++) {
            const float f = power2(m[k] - top);
            factor[warp][k * 32 + lane] = f;
            sum += l[k] * f;
        }
        for (int x = 1; x < 32; x *= 2)
            sum += __shfl_xor_sync(0xffffffffu, sum, x);
        __syncwarp();
        float acc[D / 32] = {};
#pragma unroll 8
        for (int i = 0; i < p.count; i++)
#pragma unroll
            for (int e = 0; e < D / 32; e++)
                acc[e] +=
                    __ldcg(parts + i * part_floats<D>() + h * D + e * 32 + lane) * factor[warp][i];
        T *out = static_cast<T *>(a.attn) + ((size_t)p.seq * a.heads + p.head0 + h) * D;
        for (int e = 0; e < D / 32; e++)
            out[e * 32 + lane] = from_f32<T>(acc[e] / sum);
        __syncwarp();
    }
}

template <typename T, int D>
__device__ void attend_part(const step_args &a, const part &p, team_smem<T, D> &sm, T *keys,
                            T *values)
{
    const int tid = threadIdx.x % TEAM;
    softmax m = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    float o[D / 16][4] = {};
    rotate_queries<T, D>(a, p, sm);
    if (p.end == p.len)
        append<T, D>(a, p, sm.cs, keys, values);
    attend<T, D>(a, p, sm, keys, values, m, o);
    merge_warps<T, D>(sm, m, o);
    float *parts = a.scratch + (size_t)p.unit * a.splits * part_floats<D>();
    float *mine = parts + p.index * part_floats<D>();
    T *out = static_cast<T *>(a.attn) + ((size_t)p.seq * a.heads + p.head0) * D;
    for (int i = tid; i < p.rows * D; i += TEAM) {
        float v = 0.0f;
#pragma unroll
        for (int w = 0; w < TEAM_WARPS; w++)
            v += sm.o[w][i / D][i % D];
        if (p.count == 1)
            out[i] = from_f32<T>(v / sm.sum[i / D]);
        else
            mine[i] = v;
    }
    if (p.count == 1)
        return;
    if (tid < p.rows) {
        mine[HEADS * D + tid] = sm.top[tid];
        mine[HEADS * D + HEADS + tid] = sm.sum[tid];
    }
    __threadfence();
    team_barrier();
    if (tid == 0) {
        sm.last = atomicAdd(&a.tickets[p.unit], 1) == p.count - 1;
        if (sm.last)
            a.tickets[p.unit] = 0;
    }
    team_barrier();
    if (!sm.last)
        return;
    __threadfence();
    add_parts<T, D>(a, p, parts, sm.factor);
}

/* Parts go to different multiprocessors first. */
template <typename T, int D>
__device__ void attention_phase(const step_args &a, const tm_cuda_step_kv &kv, team_smem<T, D> *sm)
{
    const int team = threadIdx.x / TEAM;
    const int items = a.tokens * a.kv_heads * a.head_groups * a.splits;
    for (int item = team * gridDim.x + blockIdx.x; item < items;
         item += (blockDim.x / TEAM) * gridDim.x) {
        const part p = find_part(a, item);
        if (p.index < p.count)
            attend_part<T, D>(a, p, sm[team], static_cast<T *>(kv.k), static_cast<T *>(kv.v));
        team_barrier(); /* sm is used again */
    }
}

} /* namespace */

#endif
