/* A block's share of decode attention (attention_decode.cu): its part of the keys, from loading them to the sums of its warps. */
#ifndef TM_ENGINE_BACKEND_CUDA_ATTENTION_DECODE_CUH
#define TM_ENGINE_BACKEND_CUDA_ATTENTION_DECODE_CUH

#include "engine/backend/cuda/kernels.h"
#include "engine/backend/cuda/mma.cuh"
#include "engine/backend/cuda/softmax.cuh"
#include "engine/backend/cuda/vec.cuh"

namespace
{

constexpr int HEADS = 8;                         /* of a block */
constexpr int TILE = 16;                         /* keys of a warp's step */
template <int W> constexpr int STRIDE = W *TILE; /* keys of a step of a block of W warps */
constexpr int SPLITS_MAX = 64;

struct decode_args {
    void *out;
    const void *qkv, *k, *v;
    const int32_t *blocks, *kv_len;
    const float *alibi;
    float *scratch;
    int *tickets;
    int max_blocks, block_shift, heads, kv_heads, group, head_groups, window;
    float scale, softcap;
    int few;     /* parts of a short sequence; long ones have as many as there are blocks */
    bool shaped; /* softcap or alibi */
    /* With inv_freq: q is rotated while it is loaded, and the part with the last key appends k and v. */
    const float *inv_freq;
    int freq_stride; /* from sequence to sequence; 0: all have the same */
    float mscale;
};

/* What a block works on. */
struct part {
    int seq, kv_head, head0, rows; /* rows: query heads of this block */
    int first, len;                /* keys that the row sees: first..len-1 */
    int begin, end, index, count;  /* this part's keys; parts of the sequence */
    int stored; /* up to here its keys are in the cache; the new one may not be */
    const int32_t *blocks;
};

/* W: warps of a block. longest: steps of a block, from which on a part more is worth its share of the end. */
template <int W> __device__ __forceinline__ part find_part(const decode_args &a, int longest)
{
    part p;
    p.seq = blockIdx.z;
    p.kv_head = blockIdx.y / a.head_groups;
    const int in_group = blockIdx.y % a.head_groups * HEADS;
    p.head0 = p.kv_head * a.group + in_group;
    p.rows = min(HEADS, a.group - in_group);
    p.len = __ldcg(a.kv_len + p.seq); /* a decode row is its sequence's last position */
    p.first = a.window > 0 && p.len > a.window ? p.len - a.window : 0;
    const int base = p.first / STRIDE<W> * STRIDE<W>;
    const int units = (p.len - base + STRIDE<W> - 1) / STRIDE<W>;
    int each = (units + a.few - 1) / a.few;
    if (each > longest)
        each = max((units + (int)gridDim.x - 1) / (int)gridDim.x, longest);
    p.index = blockIdx.x;
    p.count = each > 0 ? (units + each - 1) / each : 0;
    p.begin = base + p.index * each * STRIDE<W>;
    p.end = min(p.begin + each * STRIDE<W>, p.len);
    p.stored = a.inv_freq ? min(p.end, p.len - 1) : p.end;
    p.blocks = a.blocks + (size_t)p.seq * a.max_blocks;
    return p;
}

/* 16 keys in registers. k: dims c * 32 + 8 t of keys g and g + 8. v: dims of lane g of keys 2t, 2t+1, 2t+8, 2t+9,
 * D / 8 of them: in runs of 8 that are 64 apart where D allows, else in one run. */
template <int D> struct tile_regs {
    static constexpr bool WIDE = D % 64 == 0;
    uint32_t k[2][D / 8], v[4][D / 16];
};

template <typename T, int D>
__device__ __forceinline__ size_t key_at(const decode_args &a, const part &p, int32_t block,
                                         int key)
{
    const int in_block = key & ((1 << a.block_shift) - 1);
    return (((size_t)(block * a.kv_heads + p.kv_head) << a.block_shift) + in_block) * D;
}

template <typename T, int D>
__device__ __forceinline__ void load_keys(tile_regs<D> &r, const decode_args &a, const part &p,
                                          int32_t block, int j)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int key = j + g + 8 * h;
        const T *at = static_cast<const T *>(a.k) + key_at<T, D>(a, p, block, key) + t * 8;
#pragma unroll
        for (int c = 0; c < D / 32; c++)
            load_stream(&r.k[h][c * 4], at + c * 32, key < p.stored);
    }
}

/* Values behind the end are zeros: what lies there may be no number. */
template <typename T, int D>
__device__ __forceinline__ void load_values(tile_regs<D> &r, const decode_args &a, const part &p,
                                            int32_t block, int j)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 4; h++) {
        const int key = j + 2 * t + (h & 1) + (h & 2) * 4;
        const T *at = static_cast<const T *>(a.v) + key_at<T, D>(a, p, block, key);
        if constexpr (tile_regs<D>::WIDE) {
#pragma unroll
            for (int c = 0; c < D / 64; c++)
                load_stream(&r.v[h][c * 4], at + c * 64 + g * 8, key < p.stored);
        } else {
#pragma unroll
            for (int c = 0; c < D / 32; c++)
                load_stream8(&r.v[h][c * 2], at + g * (D / 8) + c * 4, key < p.stored);
        }
    }
}

/* The dims that register i of tile_regs::v holds for lane g: this one and the next. */
template <int D> __device__ __forceinline__ int value_dim(int i, int g)
{
    return tile_regs<D>::WIDE ? i / 4 * 64 + g * 8 + i % 4 * 2 : g * (D / 8) + i * 2;
}

/* Running softmax of two heads (columns 2t and 2t + 1), in powers of two. */
struct softmax {
    float m[2], l[2];
};

__device__ __forceinline__ float key_score(const decode_args &a, const part &p, float s, int key,
                                           int head)
{
    if (key < p.first || key >= p.end)
        return -INFINITY;
    if (!a.shaped)
        return s * (a.scale * LOG2E);
    s *= a.scale;
    if (a.softcap > 0.0f)
        s = a.softcap * tanhf(s / a.softcap);
    if (a.alibi && head < p.rows)
        s += a.alibi[p.head0 + head] * (float)(key - (p.len - 1));
    return s * LOG2E;
}

/* s becomes the weights; o is scaled to the new maximum. */
template <int D>
__device__ __forceinline__ void update(const decode_args &a, const part &p, softmax &m,
                                       float (&s)[4], float (&o)[D / 16][4], int j)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float corr[2];
#pragma unroll
    for (int i = 0; i < 4; i++)
        s[i] = key_score(a, p, s[i], j + g + (i & 2) * 4, 2 * t + (i & 1));
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float top = fmaxf(s[i], s[i + 2]);
        for (int x = 4; x < 32; x *= 2)
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, x));
        top = fmaxf(whole_maximum(top), m.m[i]);
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

/* Cosine and sine of the row's angles. */
template <int D> __device__ void fill_angles(const decode_args &a, const part &p, float2 *cs)
{
    for (int i = threadIdx.x; i < D / 2; i += blockDim.x) {
        float s, c;
        sincosf((float)(p.len - 1) * a.inv_freq[p.seq * a.freq_stride + i], &s, &c);
        cs[i] = make_float2(c * a.mscale, s * a.mscale);
    }
    __syncthreads();
}

/* The new key, rotated, and the new value: into the cache, and into `fresh` ([2][D]) for this block. */
template <typename T, int D>
__device__ void append(const decode_args &a, const part &p, const float2 *cs, T *fresh)
{
    const int pos = p.len - 1;
    const size_t at = key_at<T, D>(a, p, __ldcg(p.blocks + (pos >> a.block_shift)), pos);
    T *k = static_cast<T *>(const_cast<void *>(a.k)) + at;
    T *v = static_cast<T *>(const_cast<void *>(a.v)) + at;
    const T *key = static_cast<const T *>(a.qkv) +
                   ((size_t)p.seq * (a.heads + 2 * a.kv_heads) + a.heads + p.kv_head) * D;
    const T *value = key + (size_t)a.kv_heads * D;
    /* One half of the threads has the key, the other the value, so both are asked for at once. */
    for (int n = threadIdx.x; n < D; n += blockDim.x) {
        const int i = n % (D / 2);
        const T *from = n < D / 2 ? key : value;
        const T lo = from[i], hi = from[i + D / 2];
        if (n < D / 2) {
            const float x = to_f32(lo), y = to_f32(hi);
            fresh[i] = k[i] = from_f32<T>(x * cs[i].x - y * cs[i].y);
            fresh[i + D / 2] = k[i + D / 2] = from_f32<T>(y * cs[i].x + x * cs[i].y);
        } else {
            fresh[D + i] = v[i] = lo;
            fresh[D + i + D / 2] = v[i + D / 2] = hi;
        }
    }
    __syncthreads();
}

/* The new key's and value's places in the tile at j are taken from `fresh`. */
template <typename T, int D>
__device__ void patch(tile_regs<D> &r, const part &p, const T *fresh, int j)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, at = p.len - 1 - j;
    const uint32_t *k = reinterpret_cast<const uint32_t *>(fresh);
    const uint32_t *v = reinterpret_cast<const uint32_t *>(fresh + D);
#pragma unroll
    for (int h = 0; h < 2; h++)
        if (g + 8 * h == at)
#pragma unroll
            for (int i = 0; i < D / 8; i++)
                r.k[h][i] = k[i / 4 * 16 + t * 4 + i % 4];
#pragma unroll
    for (int h = 0; h < 4; h++)
        if (2 * t + (h & 1) + (h & 2) * 4 == at)
#pragma unroll
            for (int i = 0; i < D / 16; i++)
                r.v[h][i] = v[value_dim<D>(i, g) / 2];
}

/* Both numbers of a register as f32, and back. */
template <typename T> __device__ __forceinline__ float2 unpack2(uint32_t v)
{
    const T *e = reinterpret_cast<const T *>(&v);
    return make_float2(to_f32(e[0]), to_f32(e[1]));
}

/* q[chunk * 4 + r] holds dims chunk * 32 + 8 t + 2 r and the next; a pair's other half is D / 64 chunks on. */
template <typename T, int D>
__device__ __forceinline__ void rotate_query(uint32_t (&q)[D / 8], const float2 *cs)
{
    constexpr int HALF = D / 16;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float2 *at = cs + i / 4 * 32 + threadIdx.x % 4 * 8 + i % 4 * 2;
        const float2 x = unpack2<T>(q[i]), y = unpack2<T>(q[i + HALF]);
        q[i] = pack2<T>(x.x * at[0].x - y.x * at[0].y, x.y * at[1].x - y.y * at[1].y);
        q[i + HALF] = pack2<T>(y.x * at[0].x + x.x * at[0].y, y.y * at[1].x + x.y * at[1].y);
    }
}

template <typename T, int D>
__device__ __forceinline__ void load_query(uint32_t (&q)[D / 8], const decode_args &a,
                                           const part &p)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const size_t row = (size_t)(a.heads + 2 * a.kv_heads) * D;
    const T *from = static_cast<const T *>(a.qkv) + p.seq * row + (size_t)(p.head0 + g) * D + t * 8;
#pragma unroll
    for (int c = 0; c < D / 32; c++)
        load_stream(&q[c * 4], from + c * 32, g < p.rows);
}

/* The warp's keys from j on, of which the first 16 are in r. */
template <typename T, int D, int W>
__device__ __forceinline__ void attend(const decode_args &a, const part &p, softmax &m,
                                       float (&o)[D / 16][4], const uint32_t (&q)[D / 8],
                                       tile_regs<D> &r, int j, const T *fresh)
{
    int32_t block = 0, next = 0;
    if (j + STRIDE<W> < p.end)
        next = __ldcg(p.blocks + ((j + STRIDE<W>) >> a.block_shift));
    for (; j < p.end; j += STRIDE<W>) {
        const int ahead = j + STRIDE<W>;
        block = next;
        if (ahead + STRIDE<W> < p.end)
            next = __ldcg(p.blocks + ((ahead + STRIDE<W>) >> a.block_shift));
        if (p.stored < p.end && j + TILE >= p.end)
            patch<T, D>(r, p, fresh, j);
        float s[4] = {};
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            mma<T>(s, r.k[0][2 * i], r.k[1][2 * i], r.k[0][2 * i + 1], r.k[1][2 * i + 1], q[2 * i],
                   q[2 * i + 1]);
        if (ahead < p.end)
            load_keys<T, D>(r, a, p, block, ahead);
        update<D>(a, p, m, s, o, j);
        const uint32_t b0 = transpose8(pack2<T>(s[0], s[1])), b1 = transpose8(pack2<T>(s[2], s[3]));
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            mma<T>(o[i], __byte_perm(r.v[0][i], r.v[1][i], 0x5410),
                   __byte_perm(r.v[0][i], r.v[1][i], 0x7632),
                   __byte_perm(r.v[2][i], r.v[3][i], 0x5410),
                   __byte_perm(r.v[2][i], r.v[3][i], 0x7632), b0, b1);
        if (ahead < p.end)
            load_values<T, D>(r, a, p, block, ahead);
    }
}

/* Where dim d of a head is in shared memory: with it the lanes of a warp, whose dims are 8 apart, meet in no bank. */
template <int D> __host__ __device__ constexpr int place_of(int d)
{
    return tile_regs<D>::WIDE ? d / 64 * 64 + d % 8 * 8 + d % 64 / 8 : d;
}

/* Shared by the warps at the end of a part; o by place_of. */
template <int D, int W> struct merge_smem {
    float o[W][HEADS][D + 4];
    float m[W][HEADS], l[W][HEADS];
    float top[HEADS], sum[HEADS]; /* of the block */
};

/* Every warp's o, scaled to the block's maximum, into shared memory, and the block's maxima and sums. */
template <int D, int W>
__device__ void merge_warps(merge_smem<D, W> &sm, softmax &m, const float (&o)[D / 16][4])
{
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 2; i++) {
        for (int x = 4; x < 32; x *= 2)
            m.l[i] += __shfl_xor_sync(0xffffffffu, m.l[i], x);
        if (g == 0) {
            sm.m[warp][2 * t + i] = m.m[i];
            sm.l[warp][2 * t + i] = m.l[i];
        }
    }
    __syncthreads();
    float f[2];
    for (int i = 0; i < 2; i++) {
        float top = -INFINITY;
        for (int w = 0; w < W; w++)
            top = fmaxf(top, sm.m[w][2 * t + i]);
        f[i] = m.m[i] == -INFINITY ? 0.0f : power2(m.m[i] - top);
    }
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int d = value_dim<D>(i, g);
        for (int e = 0; e < 4; e++)
            sm.o[warp][2 * t + (e & 1)][place_of<D>(d + e / 2)] = o[i][e] * f[e & 1];
    }
    if (threadIdx.x < HEADS) {
        float top = -INFINITY, sum = 0.0f;
        for (int w = 0; w < W; w++)
            top = fmaxf(top, sm.m[w][threadIdx.x]);
        for (int w = 0; w < W; w++)
            if (sm.m[w][threadIdx.x] != -INFINITY)
                sum += sm.l[w][threadIdx.x] * power2(sm.m[w][threadIdx.x] - top);
        sm.top[threadIdx.x] = top;
        sm.sum[threadIdx.x] = sum;
    }
    __syncthreads();
}

} /* namespace */

#endif
