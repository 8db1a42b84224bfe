/* Parts of sampling: order of floats, weights and masses as the CPU has them, and exchanges inside a block. */
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

} /* namespace */

#endif
