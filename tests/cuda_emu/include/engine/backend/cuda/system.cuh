/* The emulator's twin of engine/backend/cuda/system.cuh: the same functions for the CPU, where another process stands
 * for the other device. A pause lets other threads and processes go on, so that a waiting loop comes to its end. */
#ifndef TM_TESTS_CUDA_EMU_SYSTEM_CUH
#define TM_TESTS_CUDA_EMU_SYSTEM_CUH

#include <stdint.h>
#include <time.h>

inline void store_release_system(uint64_t *p, uint64_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}

inline uint64_t load_acquire_system(const uint64_t *p)
{
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

inline void store_word(uint32_t *p, uint32_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELAXED);
}

inline uint32_t load_word(const uint32_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}

/* The halves arrive in either order. */
inline void store_packet(void *p, uint32_t a, uint32_t b, uint32_t mark)
{
    uint64_t *at = static_cast<uint64_t *>(p);
    emu_check_aligned(p, 16);
    __atomic_store_n(at + 1, (uint64_t)mark << 32 | b, __ATOMIC_RELAXED);
    __atomic_store_n(at, (uint64_t)mark << 32 | a, __ATOMIC_RELAXED);
}

inline uint4 load_packet(const void *p)
{
    const uint64_t *at = static_cast<const uint64_t *>(p);
    emu_check_aligned(p, 16);
    const uint64_t x = __atomic_load_n(at, __ATOMIC_RELAXED), y = __atomic_load_n(at + 1, __ATOMIC_RELAXED);
    return {(uint32_t)x, (uint32_t)(x >> 32), (uint32_t)y, (uint32_t)(y >> 32)};
}

/* The last word first. */
inline void store_peer(void *p, uint4 v)
{
    uint32_t *at = static_cast<uint32_t *>(p);
    emu_check_aligned(p, 16);
    __atomic_store_n(at + 3, v.w, __ATOMIC_RELAXED);
    __atomic_store_n(at + 1, v.y, __ATOMIC_RELAXED);
    __atomic_store_n(at + 2, v.z, __ATOMIC_RELAXED);
    __atomic_store_n(at, v.x, __ATOMIC_RELAXED);
}

inline uint4 load_peer(const void *p)
{
    emu_check_aligned(p, 16);
    return *static_cast<const uint4 *>(p);
}

inline uint64_t timer_ns()
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

inline void spin_pause()
{
    emu_yield();
}

#endif
