/* Parts of sampling: order of floats, weights and masses as the CPU has them, reading a row in chunks, exchanges inside a
 * block, and histograms of weights. */
#ifndef TM_ENGINE_BACKEND_CUDA_SAMPLE_CUH
#define TM_ENGINE_BACKEND_CUDA_SAMPLE_CUH

#include "engine/backend/cuda/launch.cuh"

namespace
{

typedef unsigned long long u64;

constexpr int THREADS = 1024; /* of a block that has a row to itself */
constexpr int WARPS = THREADS / 32;
constexpr int CHUNK = 128; /* values of a row that are looked at together, by one warp */
constexpr int EACH = CHUNK / 32;
constexpr unsigned ALL = 0xffffffffu;

/* Orders as the floats do, both zeros the same; 0 for what is not a number. */
__device__ __forceinline__ unsigned order_of(float v)
{
    if (v != v)
        return 0;
    const unsigned u = __float_as_uint(__fadd_rn(v, 0.0f));
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float value_of(unsigned order)
{
    return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

/* row_lanes.inc: the same operations in the same order, none of them fused. */
__device__ __forceinline__ float exp_of(float x)
{
    if (!(x >= -87.0f))
        return 0.0f;
    const float shift = 12582912.0f;
    float k = __fadd_rn(__fmul_rn(x, 1.44269504088896341f), shift);
    const int exponent = (__float_as_int(k) - __float_as_int(shift) + 127) << 23;
    k = __fsub_rn(k, shift);
    const float r =
        __fsub_rn(__fsub_rn(x, __fmul_rn(k, 0.693359375f)), __fmul_rn(k, -2.12194440e-4f));
    float p = 1.9875691500e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3981999507e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
    p = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.0f);
    return __fmul_rn(p, __int_as_float(exponent));
}

__device__ __forceinline__ float weight_of(float x, float max, float scale)
{
    return exp_of(__fmul_rn(__fsub_rn(x, max), scale));
}

/* Below it a weight, exp of this, has no mass. */
constexpr float NO_MASS = -32.0f;

/* engine/sample/mass.h */
__device__ __forceinline__ u64 mass_of(float w)
{
    return __float2ull_rn(w * 0x1p44f);
}
__device__ __forceinline__ u64 mass_of_bits(unsigned w)
{
    return mass_of(__uint_as_float(w));
}

__device__ __forceinline__ int lane_id()
{
    return (int)(threadIdx.x % 32);
}
__device__ __forceinline__ int warp_id()
{
    return (int)(threadIdx.x / 32);
}

/* Where a lane's values of a chunk are; packed: the row can be read 16 bytes at a time. */
__device__ __forceinline__ int place_of(int c, int j, bool packed)
{
    return c * CHUNK + (packed ? lane_id() * EACH + j : j * 32 + lane_id());
}
__device__ __forceinline__ bool is_packed(const float *x)
{
    return (uintptr_t)x % 16 == 0;
}

/* Behind the end of the row: `none`. */
__device__ __forceinline__ void load_chunk(float (&v)[EACH], const float *x, int n, int c,
                                           bool packed, float none)
{
    const int first = place_of(c, 0, packed);
    if (packed && first + EACH <= n) {
        const pack<float, EACH> p = load_pack<float, EACH>(x + first, 0);
#pragma unroll
        for (int j = 0; j < EACH; j++)
            v[j] = p.e[j];
        return;
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const int i = place_of(c, j, packed);
        v[j] = i < n ? x[i] : none;
    }
}

__device__ __forceinline__ void store_chunk(float *x, int n, int c, bool packed,
                                            const float (&v)[EACH])
{
    const int first = place_of(c, 0, packed);
    if (packed && first + EACH <= n) {
        store_pack<float, EACH>(x + first, 0, {v[0], v[1], v[2], v[3]});
        return;
    }
#pragma unroll
    for (int j = 0; j < EACH; j++)
        if (place_of(c, j, packed) < n)
            x[place_of(c, j, packed)] = v[j];
}

constexpr int AHEAD = 4; /* chunks of a warp whose loads are under way together */

/* Chunks first, first + step, ...: every lane asks of one whether it is worth reading; those that are come to
 * read(chunks), by the whole warp, AHEAD at a time; behind the last one: -1. */
template <typename W, typename R>
__device__ __forceinline__ void each_chunk(int first, int step, int end, W worth, R read)
{
    for (; first < end; first += 32 * step) {
        const int mine = first + lane_id() * step;
        unsigned left = __ballot_sync(ALL, mine < end && worth(mine));
        while (left) {
            int c[AHEAD];
#pragma unroll
            for (int q = 0; q < AHEAD; q++) {
                c[q] = left ? first + (__ffs((int)left) - 1) * step : -1;
                left &= left - 1;
            }
            read(c);
        }
    }
}

/* Values below 2^48. */
__device__ __forceinline__ u64 warp_sum(u64 v)
{
    const unsigned low = __reduce_add_sync(ALL, (unsigned)v & 0xffffffu);
    const unsigned high = __reduce_add_sync(ALL, (unsigned)(v >> 24));
    return ((u64)high << 24) + low;
}

__device__ __forceinline__ u64 warp_max(u64 v)
{
    const unsigned high = __reduce_max_sync(ALL, (unsigned)(v >> 32));
    const unsigned low = __reduce_max_sync(ALL, (unsigned)(v >> 32) == high ? (unsigned)v : 0u);
    return (u64)high << 32 | low;
}

/* Up to and with this lane. */
__device__ __forceinline__ u64 warp_scan(u64 v)
{
    for (int i = 1; i < 32; i *= 2) {
        const u64 other = __shfl_up_sync(ALL, v, (unsigned)i);
        v += lane_id() >= i ? other : 0;
    }
    return v;
}

/* One value of each warp, and a last one of the block. */
typedef u64 slots_t[WARPS + 1];

__device__ u64 block_max(slots_t &slots, u64 v)
{
    v = warp_max(v);
    __syncthreads(); /* the last user of the slots is through */
    if (lane_id() == 0)
        slots[warp_id()] = v;
    __syncthreads();
    return warp_max(slots[lane_id()]);
}

/* What the threads before this one have; *all: what the block has. */
__device__ u64 block_scan(slots_t &slots, u64 v, u64 *all)
{
    const u64 through = warp_scan(v);
    __syncthreads();
    if (lane_id() == 31)
        slots[warp_id()] = through;
    __syncthreads();
    if (warp_id() == 0) {
        const u64 own = slots[lane_id()], until = warp_scan(own);
        __syncwarp();
        slots[lane_id()] = until - own;
        if (lane_id() == 31)
            slots[WARPS] = until;
    }
    __syncthreads();
    *all = slots[WARPS];
    return slots[warp_id()] + through - v;
}

__device__ u64 block_sum(slots_t &slots, u64 v)
{
    u64 all;
    block_scan(slots, v, &all);
    return all;
}

/* ---- filters ---- */

__device__ __forceinline__ bool cuts_by_number(const tm_sample_row &p, int n)
{
    return p.top_k > 0 && p.top_k < n;
}
/* Some cut depends on the row. */
__device__ __forceinline__ bool cuts(const tm_sample_row &p, int n)
{
    return cuts_by_number(p, n) || p.top_p > 0;
}

/* No cut by top_p lies below: what weighs less weighs, all together, less than is left out. */
__device__ __forceinline__ float top_p_floor(u64 top_p, int n)
{
    return 0.25f * 0x1p-64f * (float)(0ull - top_p) / (float)n;
}

/* ---- histograms of weights ---- */

constexpr int RADIX = 10;
constexpr int BINS = 1 << RADIX; /* one for each thread */
static_assert(BINS == THREADS, "");

constexpr unsigned ONE = 0x3f800000;         /* bits of the largest weight */
constexpr unsigned NO_MASS_BITS = 82u << 23; /* of 2^-45: this and what is below has no mass */
/* Weights from here on, 2^-21, are multiples of a unit of mass. */
constexpr unsigned WHOLE = 106u << 23;
/* Weights of the same row order as their logits do, up to this many units in the last place. */
constexpr unsigned DISORDER = 64;

/* Bits of weights in BINS bins of 2^shift. least is a multiple of that; shift is at most 23, so no bin is in two binades. */
typedef struct range {
    unsigned least;
    int shift;
} range;

/* From `floor` (or a little below) to 1. */
__device__ __forceinline__ range range_from(unsigned floor)
{
    int shift = 0;
    while ((ONE >> shift) - (floor >> shift) >= BINS)
        shift++;
    return {floor >> shift << shift, shift};
}

/* Of one block. The mass of a weight w in a bin that begins at b is mass(b) + (w - b) << k, where only the middle part
 * is the weight's own and has few bits; below WHOLE the mass itself has few. So one 32-bit sum will do, whose carries are
 * counted above the counts. */
typedef struct tally {
    unsigned sums[BINS], counts[BINS];
} tally;
constexpr int COUNT_BITS = 20;
static_assert(TM_SAMPLE_VOCAB_MAX < 1 << COUNT_BITS, "");

/* Of a row, in the device's memory. */
typedef struct histogram {
    u64 *masses;      /* [BINS] */
    unsigned *counts; /* [BINS] */
} histogram;

/* By THREADS or fewer threads; a barrier has to follow. */
__device__ __forceinline__ void clear(tally &t)
{
    for (int i = (int)threadIdx.x; i < BINS; i += (int)blockDim.x)
        t.sums[i] = t.counts[i] = 0;
}

__device__ __forceinline__ void add(tally &t, unsigned bin, unsigned sum, unsigned count)
{
    const unsigned old = atomicAdd(&t.sums[bin], sum);
    atomicAdd(&t.counts[bin], count + (old + sum < old ? 1u << COUNT_BITS : 0u));
}

/* By whole warps. Where all lanes have the same bin, as in rows of equal logits, one adds for them. */
__device__ __forceinline__ void add_weight(tally &t, const range &r, unsigned bits)
{
    const unsigned bin = (bits - r.least) >> r.shift;
    const bool there = bits >= r.least && bin < BINS;
    const unsigned lanes = __ballot_sync(ALL, there);
    if (!lanes)
        return;
    const unsigned own =
        bits >= WHOLE ? bits & ((1u << r.shift) - 1) : (unsigned)mass_of_bits(bits);
    const unsigned first = __shfl_sync(ALL, bin, __ffs((int)lanes) - 1);
    if (__all_sync(ALL, !there || bin == first)) {
        const unsigned sum = __reduce_add_sync(ALL, there ? own : 0);
        if (lane_id() == 0)
            add(t, first, sum, (unsigned)__popc(lanes));
    } else if (there) {
        add(t, bin, own, 1);
    }
}

/* What the block has counted, behind a barrier, is added to the row's. */
__device__ __forceinline__ void give(const tally &t, const range &r, const histogram &h)
{
    for (int i = (int)threadIdx.x; i < BINS; i += (int)blockDim.x) {
        const unsigned count = t.counts[i] & ((1u << COUNT_BITS) - 1);
        const unsigned least = r.least + ((unsigned)i << r.shift);
        u64 mass = (u64)(t.counts[i] >> COUNT_BITS) << 32 | t.sums[i];
        if (!count)
            continue;
        if (least >= WHOLE)
            mass = count * mass_of_bits(least) + (mass << ((least >> 23) - (WHOLE >> 23)));
        atomicAdd(&h.masses[i], mass);
        atomicAdd(&h.counts[i], count);
    }
}

} /* namespace */

#endif
