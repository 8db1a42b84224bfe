/* CUDA C++ for a C++ compiler: what the compiler of CUDA puts in front of every file. Kernels are ordinary functions that
 * tests/cuda_emu/block.c calls once per thread; the words that have no meaning here are empty.
 *
 * __shared__ is missing on purpose: kernels use SHARED and DYNAMIC_SHARED of ptx.cuh, which the emulator can place. */
#ifndef TM_TESTS_CUDA_EMU_RUNTIME_H
#define TM_TESTS_CUDA_EMU_RUNTIME_H

#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tuple>
#include <type_traits>
#include <utility>

#include "tests/cuda_emu/emu.h"

#define __global__
#define __device__
#define __host__
#define __constant__    static const
#define __forceinline__ inline
#define __noinline__    __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __maxnreg__(n)
#define __grid_constant__
#define __restrict__ __restrict

#define threadIdx (emu_self->index)
#define blockIdx  (emu_self->block->index)
#define warpSize  32

/* blockDim and gridDim are also members of a launch's configuration, so they cannot be macros. */
#define EMU_DIM(name, dim)                                                                         \
    static const struct {                                                                          \
        struct {                                                                                   \
            operator unsigned() const                                                              \
            {                                                                                      \
                return emu_self->block->launch->dim.x;                                             \
            }                                                                                      \
        } x;                                                                                       \
        struct {                                                                                   \
            operator unsigned() const                                                              \
            {                                                                                      \
                return emu_self->block->launch->dim.y;                                             \
            }                                                                                      \
        } y;                                                                                       \
        struct {                                                                                   \
            operator unsigned() const                                                              \
            {                                                                                      \
                return emu_self->block->launch->dim.z;                                             \
            }                                                                                      \
        } z;                                                                                       \
    } name __attribute__((unused)) = {}
EMU_DIM(blockDim, block);
EMU_DIM(gridDim, grid);

/* ---- vectors ---- */

#define EMU_VECTORS(T, name, align2, align4)                                                       \
    struct name##1                                                                                 \
    {                                                                                              \
        T x;                                                                                       \
    };                                                                                             \
    struct alignas(align2) name##2                                                                 \
    {                                                                                              \
        T x, y;                                                                                    \
    };                                                                                             \
    struct alignas(align4) name##4                                                                 \
    {                                                                                              \
        T x, y, z, w;                                                                              \
    };                                                                                             \
    inline name##2 make_##name##2(T x, T y)                                                        \
    {                                                                                              \
        return {x, y};                                                                             \
    }                                                                                              \
    inline name##4 make_##name##4(T x, T y, T z, T w)                                              \
    {                                                                                              \
        return {x, y, z, w};                                                                       \
    }
EMU_VECTORS(int, int, 8, 16)
EMU_VECTORS(unsigned, uint, 8, 16)
EMU_VECTORS(float, float, 8, 16)
EMU_VECTORS(unsigned short, ushort, 4, 8)
struct float3 {
    float x, y, z;
};
inline float3 make_float3(float x, float y, float z)
{
    return {x, y, z};
}

/* ---- arithmetic ---- */

#define EMU_MIN_MAX(T)                                                                             \
    inline T min(T a, T b)                                                                         \
    {                                                                                              \
        return b < a ? b : a;                                                                      \
    }                                                                                              \
    inline T max(T a, T b)                                                                         \
    {                                                                                              \
        return a < b ? b : a;                                                                      \
    }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
/* As CUDA has them: those of two floats give the number where one is none. */
inline float min(float a, float b)
{
    return fminf(a, b);
}
inline float max(float a, float b)
{
    return fmaxf(a, b);
}
inline unsigned min(int a, unsigned b)
{
    return min((unsigned)a, b);
}
inline unsigned min(unsigned a, int b)
{
    return min(a, (unsigned)b);
}
inline unsigned max(int a, unsigned b)
{
    return max((unsigned)a, b);
}
inline unsigned max(unsigned a, int b)
{
    return max(a, (unsigned)b);
}

inline float rsqrtf(float x)
{
    return 1.0f / sqrtf(x);
}
inline float __expf(float x)
{
    return expf(x);
}
inline float __logf(float x)
{
    return logf(x);
}
inline float __fdividef(float a, float b)
{
    return a / b;
}
inline float __frcp_rn(float x)
{
    return 1.0f / x;
}
inline float __fsqrt_rn(float x)
{
    return sqrtf(x);
}
inline float __fadd_rn(float a, float b)
{
    return a + b;
}
inline float __fsub_rn(float a, float b)
{
    return a - b;
}
inline float __fdiv_rn(float a, float b)
{
    return a / b;
}
inline float __fmul_rn(float a, float b)
{
    return a * b;
}
inline float __fmaf_rn(float a, float b, float c)
{
    return fmaf(a, b, c);
}
inline float __saturatef(float x)
{
    return x > 0.0f ? x < 1.0f ? x : 1.0f : 0.0f;
}

inline unsigned long long __float2ull_rn(float x)
{
    return (unsigned long long)llrintf(x);
}

/* ---- bits ---- */

template <typename To, typename From> inline To emu_bits(From v)
{
    To to;
    static_assert(sizeof(To) == sizeof(From), "the same size");
    memcpy(&to, &v, sizeof(to));
    return to;
}
inline unsigned __float_as_uint(float v)
{
    return emu_bits<unsigned>(v);
}
inline int __float_as_int(float v)
{
    return emu_bits<int>(v);
}
inline float __uint_as_float(unsigned v)
{
    return emu_bits<float>(v);
}
inline float __int_as_float(int v)
{
    return emu_bits<float>(v);
}
inline int __popc(unsigned v)
{
    return __builtin_popcount(v);
}
inline int __popcll(unsigned long long v)
{
    return __builtin_popcountll(v);
}
inline int __clz(int v)
{
    return v ? __builtin_clz((unsigned)v) : 32;
}
inline int __clzll(long long v)
{
    return v ? __builtin_clzll((unsigned long long)v) : 64;
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __ffs(int v)
{
    return __builtin_ffs(v);
}
/* Byte i of the result is byte s >> 4 i & 7 of b:a; the sign forms (bit 3) are not used. */
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s)
{
    const unsigned long long all = (unsigned long long)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++)
        r |= (unsigned)(all >> (s >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return r;
}

/* ---- memory ---- */

#define EMU_LOAD(name)                                                                             \
    template <typename T> inline T name(const T *p)                                                \
    {                                                                                              \
        emu_check_aligned(p, alignof(T));                                                          \
        return *p;                                                                                 \
    }
EMU_LOAD(__ldg)
EMU_LOAD(__ldcg)
EMU_LOAD(__ldca)
EMU_LOAD(__ldcs)
EMU_LOAD(__ldlu)
#define EMU_STORE(name)                                                                            \
    template <typename T> inline void name(T *p, typename std::enable_if<true, T>::type v)         \
    {                                                                                              \
        emu_check_aligned(p, alignof(T));                                                          \
        *p = v;                                                                                    \
    }
EMU_STORE(__stcg)
EMU_STORE(__stcs)
EMU_STORE(__stwb)
EMU_STORE(__stwt)
/* Whoever loads past the caches waits for somebody. */
template <typename T> inline T __ldcv(const T *p)
{
    emu_yield();
    return *static_cast<const volatile T *>(p);
}

inline void __threadfence_block()
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence()
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline void __threadfence_system()
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

template <typename T> using emu_plain = typename std::enable_if<true, T>::type;
template <typename T> inline T atomicAdd(T *p, emu_plain<T> v)
{
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
template <> inline float atomicAdd<float>(float *p, float v)
{
    unsigned *bits = reinterpret_cast<unsigned *>(p), old = __atomic_load_n(bits, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(bits, &old, __float_as_uint(__uint_as_float(old) + v),
                                        false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return __uint_as_float(old);
}
template <typename T> inline T atomicSub(T *p, emu_plain<T> v)
{
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);
}
inline unsigned atomicInc(unsigned *p, unsigned limit)
{
    unsigned old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(p, &old, old >= limit ? 0 : old + 1, false,
                                        __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return old;
}
template <typename T> inline T atomicExch(T *p, emu_plain<T> v)
{
    T old;
    __atomic_exchange(p, &v, &old, __ATOMIC_SEQ_CST);
    return old;
}
template <typename T> inline T atomicOr(T *p, emu_plain<T> v)
{
    return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);
}
template <typename T> inline T atomicAnd(T *p, emu_plain<T> v)
{
    return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);
}
/* A loop around it may wait for a lock. */
template <typename T> inline T atomicCAS(T *p, emu_plain<T> old, emu_plain<T> v)
{
    emu_yield();
    __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return old;
}
template <typename T> inline T atomicMax(T *p, emu_plain<T> v)
{
    T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (old < v &&
           !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return old;
}
template <typename T> inline T atomicMin(T *p, emu_plain<T> v)
{
    T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
    while (v < old &&
           !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return old;
}
#define atomicAdd_system  atomicAdd
#define atomicExch_system atomicExch
#define atomicCAS_system  atomicCAS
#define atomicMax_system  atomicMax

/* ---- time: loops that wait look at it, so others run ---- */

inline void __nanosleep(unsigned)
{
    emu_yield();
}
inline long long clock64()
{
    emu_yield();
    return emu_clock_ns();
}
[[noreturn]] inline void __trap()
{
    emu_fail("executes __trap");
}

/* ---- threads together; the place of the call is part of it ---- */

#define EMU_SITE_PARAMS const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMU_SITE_PARAMS)
{
    emu_barrier(0, {"__syncthreads", file, line});
}
inline int __syncthreads_or(int v, EMU_SITE_PARAMS)
{
    return emu_barrier(v != 0, {"__syncthreads_or", file, line}) != 0;
}
inline int __syncthreads_count(int v, EMU_SITE_PARAMS)
{
    return emu_barrier(v != 0, {"__syncthreads_count", file, line});
}
inline int __syncthreads_and(int v, EMU_SITE_PARAMS)
{
    return emu_barrier(v == 0, {"__syncthreads_and", file, line}) == 0;
}
inline void __syncwarp(unsigned mask = EMU_ALL, EMU_SITE_PARAMS)
{
    emu_warp(mask, emu_op_sync, nullptr, {"__syncwarp", file, line});
}
inline unsigned __activemask()
{
    emu_fail("asks for __activemask, which says nothing about who comes");
}

template <typename T> inline T emu_shuffle_value(unsigned mask, T v, int from, const emu_site &site)
{
    static_assert(sizeof(T) <= 8, "at most 8 bytes");
    emu_shuffle s = {0, 0, from};
    memcpy(&s.in, &v, sizeof(v));
    emu_warp(mask, emu_op_shuffle, &s, site);
    memcpy(&v, &s.out, sizeof(v));
    return v;
}
/* Within segments of `width` lanes; a lane outside of its segment keeps its own. */
inline int emu_lane()
{
    return (int)emu_self->lane;
}
template <typename T>
inline T __shfl_sync(unsigned mask, T v, int from, int width = 32, EMU_SITE_PARAMS)
{
    return emu_shuffle_value(mask, v, emu_lane() / width * width + (from & (width - 1)),
                             {"__shfl_sync", file, line});
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, EMU_SITE_PARAMS)
{
    const int from = emu_lane() ^ lanes;
    return emu_shuffle_value(mask, v, from >= (emu_lane() / width + 1) * width ? emu_lane() : from,
                             {"__shfl_xor_sync", file, line});
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, EMU_SITE_PARAMS)
{
    const int from = emu_lane() - (int)by;
    return emu_shuffle_value(mask, v, from < emu_lane() / width * width ? emu_lane() : from,
                             {"__shfl_up_sync", file, line});
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, EMU_SITE_PARAMS)
{
    const int from = emu_lane() + (int)by;
    return emu_shuffle_value(mask, v, from >= (emu_lane() / width + 1) * width ? emu_lane() : from,
                             {"__shfl_down_sync", file, line});
}

inline emu_vote emu_vote_value(unsigned mask, int v, const emu_site &site)
{
    emu_vote vote = {v, 0, 0};
    emu_warp(mask, emu_op_vote, &vote, site);
    return vote;
}
inline unsigned __ballot_sync(unsigned mask, int v, EMU_SITE_PARAMS)
{
    return emu_vote_value(mask, v, {"__ballot_sync", file, line}).ballot;
}
inline int __any_sync(unsigned mask, int v, EMU_SITE_PARAMS)
{
    return emu_vote_value(mask, v, {"__any_sync", file, line}).ballot != 0;
}
inline int __all_sync(unsigned mask, int v, EMU_SITE_PARAMS)
{
    const emu_vote vote = emu_vote_value(mask, v, {"__all_sync", file, line});
    return vote.ballot == vote.lanes;
}

#define EMU_REDUCE(name, T, op)                                                                    \
    inline T name(unsigned mask, T v, EMU_SITE_PARAMS)                                             \
    {                                                                                              \
        emu_reduce r = {op, std::is_signed<T>::value, (unsigned)v, 0};                             \
        emu_warp(mask, emu_op_reduce, &r, {#name, file, line});                                    \
        return (T)r.out;                                                                           \
    }
EMU_REDUCE(__reduce_add_sync, unsigned, '+')
EMU_REDUCE(__reduce_add_sync, int, '+')
EMU_REDUCE(__reduce_min_sync, unsigned, 'm')
EMU_REDUCE(__reduce_min_sync, int, 'm')
EMU_REDUCE(__reduce_max_sync, unsigned, 'M')
EMU_REDUCE(__reduce_max_sync, int, 'M')
EMU_REDUCE(__reduce_and_sync, unsigned, '&')
EMU_REDUCE(__reduce_or_sync, unsigned, '|')
EMU_REDUCE(__reduce_xor_sync, unsigned, '^')

/* ---- launches ---- */

template <typename... P>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attr, int value)
{
    void *k = reinterpret_cast<void *>(kernel);
    if (attr == cudaFuncAttributeNonPortableClusterSizeAllowed)
        return value ? emu_func_large_clusters(k) : cudaErrorInvalidValue;
    return attr == cudaFuncAttributeMaxDynamicSharedMemorySize ? emu_func_smem(k, (size_t)value)
                                                               : cudaSuccess;
}

/* As many as threads and shared memory leave room for; registers are not known here. */
template <typename... P>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void (*)(P...),
                                                                 int threads, size_t smem)
{
    *blocks = (int)min((size_t)(2048 / threads), ((size_t)228 << 10) / (smem + 1024));
    return cudaSuccess;
}

template <typename... P> struct emu_packed {
    emu_launch launch;
    std::tuple<P...> args;
};

template <typename... P> inline void emu_call(const void *data)
{
    const emu_packed<P...> *p = static_cast<const emu_packed<P...> *>(data);
    std::apply(reinterpret_cast<void (*)(P...)>(p->launch.kernel), p->args);
}

template <typename... P, typename... A>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...),
                                      A &&...args)
{
    static_assert((std::is_trivially_copyable<P>::value && ...), "arguments are copied as bytes");
    emu_packed<typename std::remove_const<P>::type...> p = {{}, {std::forward<A>(args)...}};
    p.launch.grid = config->gridDim;
    p.launch.block = config->blockDim;
    p.launch.smem = config->dynamicSmemBytes;
    p.launch.cluster = 1;
    p.launch.kernel = reinterpret_cast<void *>(kernel);
    p.launch.call = emu_call<typename std::remove_const<P>::type...>;
    for (unsigned i = 0; i < config->numAttrs; i++) {
        const cudaLaunchAttribute &a = config->attrs[i];
        if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization)
            p.launch.dependent = a.val.programmaticStreamSerializationAllowed;
        else if (a.id == cudaLaunchAttributeClusterDimension)
            p.launch.cluster = a.val.clusterDim.x;
        else
            p.launch.cooperative = a.val.cooperative;
    }
    return emu_enqueue_launch(config->stream, &p, sizeof(p));
}

#endif
