/* Memory that another process's device reads or writes: loads and stores of system scope, and waiting for them.
 *
 * Like ptx.cuh this is a file of asm statements alone, and the tests' emulator (tests/cuda_emu) puts a twin of the
 * same name in front of it. */
#ifndef TM_ENGINE_BACKEND_CUDA_SYSTEM_CUH
#define TM_ENGINE_BACKEND_CUDA_SYSTEM_CUH

#include <stdint.h>

/* What the storing thread wrote and saw before is seen by who loads the value with acquire. */
__device__ __forceinline__ void store_release_system(uint64_t *p, uint64_t v)
{
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

__device__ __forceinline__ uint64_t load_acquire_system(const uint64_t *p)
{
    uint64_t v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

/* A word that the host reads or writes; no order. */
__device__ __forceinline__ void store_word(uint32_t *p, uint32_t v)
{
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ uint32_t load_word(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

/* 16 bytes of two words and two marks {a, mark, b, mark}: each half arrives whole, so no order is needed between
 * packets; who finds the mark has the word beside it. */
__device__ __forceinline__ void store_packet(void *p, uint32_t a, uint32_t b, uint32_t mark)
{
    asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%2};" ::"l"(p), "r"(a), "r"(mark),
                 "r"(b)
                 : "memory");
}

__device__ __forceinline__ uint4 load_packet(const void *p)
{
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

/* 16 bytes to where another device, or this one, polls: words arrive whole and in any order. */
__device__ __forceinline__ void store_peer(void *p, uint4 v)
{
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}

/* 16 bytes that another device may have written, past this one's first-level cache. */
__device__ __forceinline__ uint4 load_peer(const void *p)
{
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint64_t timer_ns()
{
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

/* Between two looks. */
__device__ __forceinline__ void spin_pause()
{
}

#endif
