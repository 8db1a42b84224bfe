/* Attention of sequences with one new token, over paged keys and values: bound by reading them once.
 *
 * A block has one sequence, one kv head, up to 8 of the query heads that share it, and one part of the keys; its
 * 4 warps take 16 keys each in turn. Keys are the M side of the tensor core and heads its N side:
 *   S[16 keys, 8 heads] = K Q^T, then O[d, 8 heads] += V^T P^T
 * Both operands of the first product are loaded from memory as they are (a lane owns 8 neighbouring dims); for
 * the second a lane loads its own dims of 4 keys and pairs keys by byte permutes, and P is transposed in
 * registers. So keys and values go through no shared memory, and the loads of the next 16 keys are under way
 * while these are used. The first 16 are asked for before the kernel in front, which makes q, has ended: what older
 * tokens left in the cache is there (launch.cuh), and the new token's key and value are put among them by hand.
 *
 * The parts of one sequence are as many as fill the device (fixed by the number of sequences alone, so that a
 * recorded graph serves every length) and are cut from its length on the device; the last block to finish adds
 * them up in order. Bytes moved: B * K * length * d * 4. */
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/mma.cuh"

namespace
{

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int HEADS = 8;             /* of a block */
constexpr int TILE = 16;             /* keys of a warp's step */
constexpr int STRIDE = WARPS * TILE; /* keys of a block's step */
constexpr int SPLITS_MAX = 64;
constexpr int LONG = 20; /* steps of a block, from which on a part is worth its share of the end */
constexpr float LOG2E = 1.4426950408889634f;

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

__device__ part find_part(const decode_args &a)
{
    part p;
    p.seq = blockIdx.z;
    p.kv_head = blockIdx.y / a.head_groups;
    const int in_group = blockIdx.y % a.head_groups * HEADS;
    p.head0 = p.kv_head * a.group + in_group;
    p.rows = min(HEADS, a.group - in_group);
    p.len = __ldcg(a.kv_len + p.seq); /* a decode row is its sequence's last position */
    p.first = a.window > 0 && p.len > a.window ? p.len - a.window : 0;
    const int base = p.first / STRIDE * STRIDE;
    const int units = (p.len - base + STRIDE - 1) / STRIDE;
    int each = (units + a.few - 1) / a.few;
    if (each > LONG)
        each = max((units + (int)gridDim.x - 1) / (int)gridDim.x, LONG);
    p.index = blockIdx.x;
    p.count = each > 0 ? (units + each - 1) / each : 0;
    p.begin = base + p.index * each * STRIDE;
    p.end = min(p.begin + each * STRIDE, p.len);
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

/* Cosine and sine of the row's angles. */
template <int D> __device__ void fill_angles(const decode_args &a, const part &p, float2 *cs)
{
    for (int i = threadIdx.x; i < D / 2; i += THREADS) {
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
    const T *from = static_cast<const T *>(a.qkv) +
                    ((size_t)p.seq * (a.heads + 2 * a.kv_heads) + a.heads + p.kv_head) * D;
    for (int i = threadIdx.x; i < D / 2; i += THREADS) {
        const float x = to_f32(from[i]), y = to_f32(from[i + D / 2]);
        fresh[i] = k[i] = from_f32<T>(x * cs[i].x - y * cs[i].y);
        fresh[i + D / 2] = k[i + D / 2] = from_f32<T>(y * cs[i].x + x * cs[i].y);
    }
    for (int i = threadIdx.x; i < D; i += THREADS)
        fresh[D + i] = v[i] = from[(size_t)a.kv_heads * D + i];
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
template <typename T, int D>
__device__ __forceinline__ void attend(const decode_args &a, const part &p, softmax &m,
                                       float (&o)[D / 16][4], const uint32_t (&q)[D / 8],
                                       tile_regs<D> &r, int j, const T *fresh)
{
    int32_t block = 0, next = 0;
    if (j + STRIDE < p.end)
        next = __ldcg(p.blocks + ((j + STRIDE) >> a.block_shift));
    for (; j < p.end; j += STRIDE) {
        const int ahead = j + STRIDE;
        block = next;
        if (ahead + STRIDE < p.end)
            next = __ldcg(p.blocks + ((ahead + STRIDE) >> a.block_shift));
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

/* Shared by the warps at the end of a part. */
template <int D> struct merge_smem {
    float o[WARPS][HEADS][D];
    float m[WARPS][HEADS], l[WARPS][HEADS];
    float top[HEADS], sum[HEADS]; /* of the block */
    float factor[WARPS][SPLITS_MAX];
    bool last;
};

/* Every warp's o, scaled to the block's maximum, into shared memory, and the block's maxima and sums. */
template <int D>
__device__ void merge_warps(merge_smem<D> &sm, softmax &m, const float (&o)[D / 16][4])
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
        for (int w = 0; w < WARPS; w++)
            top = fmaxf(top, sm.m[w][2 * t + i]);
        f[i] = m.m[i] == -INFINITY ? 0.0f : power2(m.m[i] - top);
    }
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int d = value_dim<D>(i, g);
        for (int e = 0; e < 4; e++)
            sm.o[warp][2 * t + (e & 1)][d + e / 2] = o[i][e] * f[e & 1];
    }
    if (threadIdx.x < HEADS) {
        float top = -INFINITY, sum = 0.0f;
        for (int w = 0; w < WARPS; w++)
            top = fmaxf(top, sm.m[w][threadIdx.x]);
        for (int w = 0; w < WARPS; w++)
            if (sm.m[w][threadIdx.x] != -INFINITY)
                sum += sm.l[w][threadIdx.x] * power2(sm.m[w][threadIdx.x] - top);
        sm.top[threadIdx.x] = top;
        sm.sum[threadIdx.x] = sum;
    }
    __syncthreads();
}

/* Floats of one part in scratch: [HEADS][D] sums, then [HEADS] maxima, then [HEADS] weights. */
template <int D> __host__ __device__ constexpr size_t part_floats()
{
    return HEADS * D + 2 * HEADS;
}

constexpr int FIRST = 16; /* parts whose sums are asked for at once */

/* A warp per head: first the factor of every part, one lane a part, then the sum. */
template <typename T, int D>
__device__ void add_parts(const decode_args &a, const part &p, const float *parts,
                          float (&factor)[WARPS][SPLITS_MAX])
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int h = warp; h < p.rows; h += WARPS) {
        float m[SPLITS_MAX / 32], l[SPLITS_MAX / 32], top = -INFINITY, sum = 0.0f;
        float first[FIRST][D / 32], acc[D / 32] = {}; /* asked for before their factors are known */
#pragma unroll
        for (int i = 0; i < FIRST; i++)
#pragma unroll
            for (int e = 0; e < D / 32; e++)
                first[i][e] = i < p.count
                                  ? __ldcg(parts + i * part_floats<D>() + h * D + e * 32 + lane)
                                  : 0.0f;
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
#pragma unroll
        for (int i = 0; i < FIRST; i++)
#pragma unroll
            for (int e = 0; e < D / 32; e++)
                acc[e] += first[i][e] * (i < p.count ? factor[warp][i] : 0.0f);
#pragma unroll 8
        for (int i = FIRST; i < p.count; i++)
#pragma unroll
            for (int e = 0; e < D / 32; e++)
                acc[e] +=
                    __ldcg(parts + i * part_floats<D>() + h * D + e * 32 + lane) * factor[warp][i];
        T *out = static_cast<T *>(a.out) + ((size_t)p.seq * a.heads + p.head0 + h) * D;
        for (int e = 0; e < D / 32; e++)
            out[e * 32 + lane] = from_f32<T>(acc[e] / sum);
        __syncwarp();
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, D <= 128 ? 3 : 1) decode_kernel(decode_args a)
{
    SHARED(merge_smem<D>, sm);
    SHARED(float2[D / 2], cs);
    SHARED(uint4[2 * D / 8], fresh_words);
    T *fresh = reinterpret_cast<T *>(fresh_words); /* [2][D], the new key and value */
    if (!a.inv_freq)
        wait_previous();
    const part p = find_part(a);
    if (p.index >= p.count) {
        wait_left_to_others();
        return;
    }
    softmax m = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    float o[D / 16][4] = {};
    tile_regs<D> r;
    uint32_t q[D / 8];
    const int j = p.begin + threadIdx.x / 32 * TILE;
    if (j < p.end) {
        const int32_t block = __ldcg(p.blocks + (j >> a.block_shift));
        load_keys<T, D>(r, a, p, block, j);
        load_values<T, D>(r, a, p, block, j);
    }
    if (a.inv_freq) {
        fill_angles<D>(a, p, cs);
        wait_previous();
    }
    start_next();
    load_query<T, D>(q, a, p);
    if constexpr (D % 64 == 0) {
        if (a.inv_freq) {
            if (p.end == p.len)
                append<T, D>(a, p, cs, fresh);
            rotate_query<T, D>(q, cs);
        }
    }
    attend<T, D>(a, p, m, o, q, r, j, fresh);
    merge_warps<D>(sm, m, o);

    const int unit = p.seq * gridDim.y + blockIdx.y;
    float *parts = a.scratch + (size_t)unit * gridDim.x * part_floats<D>();
    float *mine = parts + p.index * part_floats<D>();
    T *out = static_cast<T *>(a.out) + ((size_t)p.seq * a.heads + p.head0) * D;
    for (int i = threadIdx.x; i < p.rows * D; i += THREADS) {
        float v = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            v += sm.o[w][i / D][i % D];
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
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        sm.last = atomicAdd(&a.tickets[unit], 1) == p.count - 1;
        if (sm.last)
            a.tickets[unit] = 0;
    }
    __syncthreads();
    if (!sm.last)
        return;
    __threadfence();
    add_parts<T, D>(a, p, parts, sm.factor);
}

/* Parts of a unit: as few as leave little of the last round of places empty. */
int find_splits(int units, int places)
{
    int best = 1;
    double best_share = 0.0;
    for (int s = 1; s <= SPLITS_MAX && (s == 1 || units * s <= 4 * places); s++) {
        const double rounds = (double)units * s / places;
        const double share = rounds / ceil(rounds);
        if (share > best_share + 0.03) {
            best = s;
            best_share = share;
        }
        if (rounds > 0.95 && best_share > 0.93)
            break;
    }
    return best;
}

template <typename T, int D> cudaError_t launch(decode_args a, int seqs, const tm_cuda_ctx *c)
{
    const int units = seqs * a.kv_heads * a.head_groups;
    int splits = find_splits(units, c->sms * (D <= 128 ? 3 : 1));
    if (units > TM_CUDA_TICKETS ||
        (size_t)units * splits * part_floats<D>() * sizeof(float) > TM_CUDA_SCRATCH_BYTES)
        splits = 1;
    /* Two blocks a multiprocessor read as fast as three: with many units, short sequences are spared the end of parts. */
    a.few = units < c->sms * 3 / 4 ? splits : min(splits, (c->sms * 9 / 5 + units - 1) / units);
    dim3 grid((unsigned)splits, (unsigned)(a.kv_heads * a.head_groups), (unsigned)seqs);
    return launch_kernel(c, decode_kernel<T, D>, grid, THREADS, 0, a);
}

template <typename T>
cudaError_t launch_dim(const decode_args &a, int head_dim, int seqs, const tm_cuda_ctx *c)
{
    switch (head_dim) {
    case 64:
        return launch<T, 64>(a, seqs, c);
    case 96:
        return launch<T, 96>(a, seqs, c);
    case 128:
        return launch<T, 128>(a, seqs, c);
    case 256:
        return launch<T, 256>(a, seqs, c);
    default:
        return cudaErrorInvalidValue;
    }
}

} /* namespace */

extern "C" bool tm_cuda_rope_decode_fits(const tm_rope_append_args *r)
{
    return r->rotary_dim == r->head_dim && r->head_dim % 64 == 0 && !r->interleaved &&
           r->logn_len == 0 && r->kv->k != r->kv->v && r->n_heads / r->n_kv_heads <= HEADS;
}

extern "C" bool tm_cuda_attention_decode_fits(int head_dim, int block_tokens)
{
    return (head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256) &&
           block_tokens >= TILE && (block_tokens & (block_tokens - 1)) == 0;
}

extern "C" cudaError_t tm_cuda_attention_decode_launch(const tm_attention_args *a,
                                                       const tm_rope_append_args *r,
                                                       const tm_cuda_ctx *c)
{
    const tm_batch *b = a->batch;
    if (b->n_decode == 0)
        return cudaSuccess;
    if (a->kv->dtype != c->act || !tm_cuda_attention_decode_fits(a->head_dim, a->kv->block_tokens))
        return cudaErrorInvalidValue;
    decode_args d = {};
    d.out = a->out;
    d.qkv = a->qkv;
    d.k = a->kv->k;
    d.v = a->kv->v;
    d.blocks = b->blocks;
    d.kv_len = b->kv_len;
    d.alibi = a->alibi;
    d.scratch = c->scratch;
    d.tickets = c->tickets;
    d.max_blocks = b->max_blocks;
    while (1 << d.block_shift < a->kv->block_tokens)
        d.block_shift++;
    d.heads = a->n_heads;
    d.kv_heads = a->n_kv_heads;
    d.group = a->n_heads / a->n_kv_heads;
    d.head_groups = (d.group + HEADS - 1) / HEADS;
    d.window = a->window;
    if (r) {
        d.inv_freq = r->seq_inv_freq ? r->seq_inv_freq : r->inv_freq;
        d.freq_stride = r->seq_inv_freq ? r->rotary_dim / 2 : 0;
    }
    d.mscale = r ? r->mscale : 1.0f;
    d.scale = a->scale;
    d.softcap = a->softcap;
    d.shaped = a->softcap > 0.0f || a->alibi;
    return c->act == TM_DTYPE_BF16 ? launch_dim<__nv_bfloat16>(d, a->head_dim, b->n_decode, c)
                                   : launch_dim<__half>(d, a->head_dim, b->n_decode, c);
}
