/* What the ways of a sum share: packs of 16 bytes, a row's norm by a team of blocks. */
#ifndef TM_ENGINE_BACKEND_CUDA_PEER_NORM_CUH
#define TM_ENGINE_BACKEND_CUDA_PEER_NORM_CUH

#include "engine/backend/cuda/peer.cuh"
#include "engine/backend/cuda/vec.cuh"

namespace
{

template <typename T> constexpr int lanes = 16 / (int)sizeof(T);
template <typename T> using pack16 = pack<T, lanes<T>>;

template <typename T> union bits {
    pack16<T> p;
    uint4 u;
};

/* Pack i of x[n]; zeros behind the end. */
template <typename T> __device__ pack16<T> load_numbers(const void *x, size_t i, size_t n)
{
    constexpr int V = lanes<T>;
    if ((i + 1) * V <= n)
        return load_pack<T, V>(x, i);
    pack16<T> o;
    for (int j = 0; j < V; j++)
        o.e[j] = i * V + j < n ? static_cast<const T *>(x)[i * V + j] : from_f32<T>(0.0f);
    return o;
}

template <typename T> __device__ void store_numbers(void *x, size_t i, size_t n, pack16<T> v)
{
    constexpr int V = lanes<T>;
    if ((i + 1) * V <= n) {
        store_pack<T, V>(x, i, v);
        return;
    }
    for (int j = 0; j < V && i * V + j < n; j++)
        static_cast<T *>(x)[i * V + j] = v.e[j];
}

template <typename T> __device__ void add_pack(float *sum, uint4 u)
{
    bits<T> b;
    b.u = u;
#pragma unroll
    for (int j = 0; j < lanes<T>; j++)
        sum[j] += to_f32(b.p.e[j]);
}

template <typename T> __device__ pack16<T> rounded(const float *sum)
{
    pack16<T> o;
#pragma unroll
    for (int j = 0; j < lanes<T>; j++)
        o.e[j] = from_f32<T>(sum[j]);
    return o;
}

/* The blocks that share a row, and which threads these are. */
struct team {
    int size, member, width, thread;
};

__device__ inline team this_team()
{
    team t;
    t.size = cluster_size();
    t.member = cluster_rank();
    t.width = t.size * (int)blockDim.x;
    t.thread = t.member * (int)blockDim.x + (int)threadIdx.x;
    return t;
}

/* The sum over the team, in every thread; one slot for each of its warps, at most 32. */
__device__ inline float team_sum(const team &t, float v, float *slots)
{
    for (int i = 16; i > 0; i >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, i);
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32,
              warps = (int)blockDim.x / 32;
    if (t.size > 1) {
        if (lane < t.size)
            store_cluster(slots + t.member * warps + warp, lane, v);
        cluster_arrive();
        cluster_wait();
    } else {
        if (lane == 0)
            slots[warp] = v;
        __syncthreads();
    }
    v = lane < t.size * warps ? slots[lane] : 0.0f;
    for (int i = 16; i > 0; i >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, i);
    return v;
}

/* Eight of a norm's weights. */
__device__ inline void load_eight(float *o, const float *w, bool aligned)
{
    if (aligned) {
        const float4 a = reinterpret_cast<const float4 *>(w)[0],
                     b = reinterpret_cast<const float4 *>(w)[1];
        o[0] = a.x, o[1] = a.y, o[2] = a.z, o[3] = a.w;
        o[4] = b.x, o[5] = b.y, o[6] = b.z, o[7] = b.w;
        return;
    }
    for (int j = 0; j < 8; j++)
        o[j] = w[j];
}

/* The norm's rows for one thread: packs thread, thread + width, ... of each. The slots of a sum are free again after the
 * next one: all have read them when they come to its barrier. */
template <typename T, int N> struct normer {
    const tm_norm_args &a;
    const team t;
    float (&slots)[2][32];
    const int packs;
    int turn;
    float w[N][8];

    __device__ normer(const tm_norm_args &args, const team &t0, float (&s)[2][32])
        : a(args), t(t0), slots(s), packs(args.h / 8), turn(0)
    {
    }

    __device__ bool has(int k) const
    {
        return k * t.width + t.thread < packs;
    }

    /* Weights never change, so this may come before the kernel in front has ended. */
    __device__ void load_weights_early()
    {
        const bool aligned = (uintptr_t)a.w % 16 == 0;
        const float one = a.add_one ? 1.0f : 0.0f;
#pragma unroll
        for (int k = 0; k < N; k++)
            if (a.out && has(k)) {
                const int i = (k * t.width + t.thread) * 8;
                load_eight(w[k], a.w + i, aligned);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    w[k][j] = one + w[k][j];
                if (a.b)
                    prefetch_l2(a.b + i);
            }
    }

    __device__ float sum(float v)
    {
        return team_sum(t, v, slots[turn++ & 1]);
    }

    /* residual + get's packs is rounded, kept and normalised; the same arithmetic as norm.cu. get(base, d) sets d[k] to
     * pack base + k * width of the ranks' sum, for those that the thread has. */
    template <typename GET> __device__ void row(int row, GET get)
    {
        const size_t base = (size_t)row * packs + t.thread;
        void *residual_out = a.residual_out ? a.residual_out : a.residual;
        bits<T> r[N], d[N];
        float s = 0.0f, sq = 0.0f;
#pragma unroll
        for (int k = 0; k < N; k++)
            if (has(k))
                r[k].p = load_pack<T, 8>(a.residual, base + k * t.width);
        get(base, d);
#pragma unroll
        for (int k = 0; k < N; k++)
            if (has(k)) {
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    r[k].p.e[j] = from_f32<T>(to_f32(r[k].p.e[j]) + to_f32(d[k].p.e[j]));
                    s += to_f32(r[k].p.e[j]);
                }
                store_pack<T, 8>(residual_out, base + k * t.width, r[k].p);
            }
        if (!a.out)
            return;
        const float mean = a.kind == TM_NORM_LAYER ? sum(s) / a.h : 0.0f;
#pragma unroll
        for (int k = 0; k < N; k++)
            if (has(k))
#pragma unroll
                for (int j = 0; j < 8; j++)
                    sq += (to_f32(r[k].p.e[j]) - mean) * (to_f32(r[k].p.e[j]) - mean);
        const float inv = rsqrtf(sum(sq) / a.h + a.eps);
#pragma unroll
        for (int k = 0; k < N; k++)
            if (has(k)) {
                const float *b = a.b ? a.b + (k * t.width + t.thread) * 8 : NULL;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float v = (to_f32(r[k].p.e[j]) - mean) * inv * w[k][j];
                    r[k].p.e[j] = from_f32<T>(b ? v + b[j] : v);
                }
                store_pack<T, 8>(a.out, base + k * t.width, r[k].p);
            }
    }
};
} /* namespace */

#endif
