/* The emulator's twin of engine/backend/cuda/hopper.cuh; what the functions do is in tests/cuda_emu/hopper.c. */
#ifndef TM_TESTS_CUDA_EMU_HOPPER_CUH
#define TM_TESTS_CUDA_EMU_HOPPER_CUH

#include <cuda.h>

#include "engine/backend/cuda/ptx.cuh"

#define HOPPER

template <int N> inline void take_registers()
{
}
template <int N> inline void give_registers()
{
}

inline uint32_t shared_address(const void *p)
{
    return emu_shared_address(p);
}

inline void barrier_init(uint64_t *b, int arrivals)
{
    emu_mbarrier_init(b, arrivals);
}
inline void barriers_made()
{
}
inline void barrier_arrive(uint64_t *b)
{
    emu_mbarrier_arrive(b, 0);
}
inline void arrive_copied(uint64_t *b)
{
    emu_copy_commit();
    emu_copy_wait(0);
    emu_mbarrier_arrive(b, 0);
}
inline void barrier_expect(uint64_t *b, int bytes)
{
    emu_mbarrier_arrive(b, bytes);
}
inline void barrier_wait(uint64_t *b, int parity, EMU_SITE_PARAMS)
{
    emu_mbarrier_wait(b, parity, {"barrier_wait", file, line});
}

inline void send_cluster(float4 *p, int rank, float4 v, uint64_t *b)
{
    emu_cluster_send(p, rank, &v, sizeof(v), b);
}

template <int THREADS> inline void turn_wait(int name, EMU_SITE_PARAMS)
{
    emu_turn(name, THREADS, true, {"turn_wait", file, line});
}
template <int THREADS> inline void turn_pass(int name, EMU_SITE_PARAMS)
{
    emu_turn(name, THREADS, false, {"turn_pass", file, line});
}

inline void fence_async()
{
    emu_fence_async();
}

inline void prefetch_map(const CUtensorMap *)
{
}
inline void tile_load(void *to, const CUtensorMap *map, int x, int y, uint64_t *b)
{
    emu_tile_load(to, map, x, y, b);
}
inline void row_load(void *to, const void *from, int bytes, uint64_t *b)
{
    emu_row_load(to, from, bytes, b);
}

inline uint64_t tile_operand(const void *p, int wide)
{
    return (uint64_t)(shared_address(p) >> 4) | (uint64_t)(wide >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
inline uint64_t operand_at(uint64_t tile, int bytes)
{
    return tile + (uint64_t)(bytes >> 4);
}

inline void products_begin(EMU_SITE_PARAMS)
{
    emu_warp_all(emu_op_products_begin, nullptr, {"products_begin", file, line});
}
inline void products_commit(EMU_SITE_PARAMS)
{
    emu_warp_all(emu_op_products_commit, nullptr, {"products_commit", file, line});
}
template <int N, int M> inline void products_wait(float (&)[M], EMU_SITE_PARAMS)
{
    int groups = N;
    emu_warp_all(emu_op_products_wait, &groups, {"products_wait", file, line});
}

template <typename T, bool ADD>
inline void product_shared(float (&c)[64], uint64_t a, uint64_t b, EMU_SITE_PARAMS)
{
    emu_product p = {c, nullptr, a, b, 128, std::is_same<T, __half>::value, ADD};
    emu_warp_all(emu_op_product, &p, {"product_shared", file, line});
}
template <typename T, int N>
inline void product_registers(float (&c)[N], const uint32_t (&a)[4], uint64_t b, EMU_SITE_PARAMS)
{
    emu_product p = {c, a, 0, b, 2 * N, std::is_same<T, __half>::value, true};
    emu_warp_all(emu_op_product, &p, {"product_registers", file, line});
}

#endif
