/* The instructions that only sm_90a has: products of a warpgroup, tiles copied by the copy engine, barriers in shared
 * memory. As in ptx.cuh, each function has a twin in the tests' emulator. Kernels that use them have a body only where
 * HOPPER is defined, and are started only where tm_cuda_ctx.tensor_map is set.
 *
 * Tiles of 16-bit numbers lie in shared memory as columns of 64 numbers: rows of 128 bytes, whose 16-byte pieces are
 * swapped so that piece c of row r is at c ^ r % 8 (address bits 4..6 ^ bits 7..9). A tile begins at a multiple of
 * 1024 bytes. */
#ifndef TM_ENGINE_BACKEND_CUDA_HOPPER_CUH
#define TM_ENGINE_BACKEND_CUDA_HOPPER_CUH

#include <cuda.h>
#include <type_traits>

#include "engine/backend/cuda/ptx.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER
#endif

/* Registers of each thread of the warpgroup, from here on; all its warps call it. */
template <int N> __device__ __forceinline__ void take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void give_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* ---- barriers ---- */

__device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* A phase ends when `arrivals` threads have arrived and all announced bytes are there. */
__device__ __forceinline__ void barrier_init(uint64_t *b, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals)
                 : "memory");
}
/* By the thread that called barrier_init, before the block's barrier. */
__device__ __forceinline__ void barriers_made()
{
    asm volatile("fence.mbarrier_init.release.cluster;\n"
                 "fence.proxy.async;" ::
                     : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t *b)
{
    asm volatile(
        "{ .reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0]; }" ::"r"(shared_address(b))
        : "memory");
}
/* Arrives when the copies that this thread has begun (copy_async) are done. */
__device__ __forceinline__ void arrive_copied(uint64_t *b)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(b))
                 : "memory");
}
/* Arrives and announces bytes that tile_load or row_load brings. */
__device__ __forceinline__ void barrier_expect(uint64_t *b, int bytes)
{
    asm volatile("{ .reg .b64 s; mbarrier.arrive.expect_tx.shared::cta.b64 s, [%0], %1; }" ::"r"(
                     shared_address(b)),
                 "r"(bytes)
                 : "memory");
}
/* Until the phase of this parity has ended; phases count from 0, and before the first the one of parity 1 has. */
__device__ __forceinline__ void barrier_wait(uint64_t *b, int parity)
{
    asm volatile("{ .reg .pred p;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@!p bra again; }" ::"r"(shared_address(b)),
                 "r"(parity)
                 : "memory");
}

/* v to the variable of the cluster's block `rank` that is p in this one, whose bytes count for its barrier b. */
__device__ __forceinline__ void send_cluster(float4 *p, int rank, float4 v, uint64_t *b)
{
    uint32_t at, bar;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(bar) : "r"(shared_address(b)), "r"(rank));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
                 "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(at),
                 "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(bar)
                 : "memory");
}

/* Barriers by number, 1 to 15: THREADS threads in all come to it, some of which do not wait. */
template <int THREADS> __device__ __forceinline__ void turn_wait(int name)
{
    asm volatile("bar.sync %0, %1;" ::"r"(name), "n"(THREADS) : "memory");
}
template <int THREADS> __device__ __forceinline__ void turn_pass(int name)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "n"(THREADS) : "memory");
}

/* What this thread wrote to shared memory is seen by products and by the copy engine after the next barrier, and what
 * earlier kernels wrote to memory by the copy engine. */
__device__ __forceinline__ void fence_async()
{
    asm volatile("fence.proxy.async;" ::: "memory");
}

/* The map will be wanted soon. */
__device__ __forceinline__ void prefetch_map(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* The box of the map that begins at column x, row y; zeros outside of the map. Its bytes count for b. */
__device__ __forceinline__ void tile_load(void *to, const CUtensorMap *map, int x, int y,
                                          uint64_t *b)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(shared_address(b))
                 : "memory");
}

/* Bytes that follow each other, a multiple of 16 and so are both places; they count for b. */
__device__ __forceinline__ void row_load(void *to, const void *from, int bytes, uint64_t *b)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(b))
                 : "memory");
}

/* ---- products ---- */

/* A tile of shared memory as operand. Rows along the sum's direction k ("k-major", Q and K): `wide` is not used. Rows
 * across it (values): `wide` is the distance in bytes between columns of 64. */
__device__ __forceinline__ uint64_t tile_operand(const void *p, int wide)
{
    return (uint64_t)((shared_address(p) & 0x3ffff) >> 4) | (uint64_t)(wide >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
/* The operand some bytes further, a multiple of 16. */
__device__ __forceinline__ uint64_t operand_at(uint64_t tile, int bytes)
{
    return tile + (uint64_t)(bytes >> 4);
}

/* Before products that use registers written since the last wait, and again behind a branch. */
__device__ __forceinline__ void products_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
/* Closes a group of products. */
__device__ __forceinline__ void products_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

#define HOPPER_8(c, i)                                                                             \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]),    \
        "+f"(c[i + 6]), "+f"(c[i + 7])
#define HOPPER_32(c, i) HOPPER_8(c, i), HOPPER_8(c, i + 8), HOPPER_8(c, i + 16), HOPPER_8(c, i + 24)
#define HOPPER_NAMES_32                                                                            \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"       \
    "%24,%25,%26,%27,%28,%29,%30,%31"
#define HOPPER_NAMES_64                                                                            \
    HOPPER_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,"    \
                    "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

/* Until at most N groups are under way; c is a sum of those that have ended. */
template <int N> __device__ __forceinline__ void products_wait(float (&c)[64])
{
    asm volatile("wgmma.wait_group.sync.aligned %64;"
                 : HOPPER_32(c, 0), HOPPER_32(c, 32)
                 : "n"(N)
                 : "memory");
}
template <int N> __device__ __forceinline__ void products_wait(float (&c)[32])
{
    asm volatile("wgmma.wait_group.sync.aligned %32;" : HOPPER_32(c, 0) : "n"(N) : "memory");
}

/* c[64 x 128] = a[64 x 16] b[16 x 128], both k-major in shared memory; ADD: +=. Warp w of the warpgroup has rows 16 w
 * to 16 w + 15, and of its columns 8 i .. 8 i + 7 c[4 i .. 4 i + 3] is what mma.cuh says. */
#define HOPPER_SHARED(type)                                                                        \
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %66, 0;\n"                                    \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" HOPPER_NAMES_64 \
                 "}, %64, %65, add, 1, 1, 0, 0; }"                                                 \
                 : HOPPER_32(c, 0), HOPPER_32(c, 32)                                               \
                 : "l"(a), "l"(b), "n"((int)ADD))
template <typename T, bool ADD>
__device__ __forceinline__ void product_shared(float (&c)[64], uint64_t a, uint64_t b)
{
    if constexpr (std::is_same<T, __nv_bfloat16>::value)
        HOPPER_SHARED("bf16");
    else
        HOPPER_SHARED("f16");
}

/* c[64 x 2 N] += a[64 x 16] b[16 x 2 N], a in registers as for mma, b in shared memory with its rows across k. */
#define HOPPER_REGISTERS(type)                                                                     \
    if constexpr (N == 64)                                                                         \
        asm volatile("{ .reg .pred add; setp.eq.b32 add, 0, 0;\n"                                  \
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                  \
                     " {" HOPPER_NAMES_64 "}, {%64,%65,%66,%67}, %68, add, 1, 1, 1; }"             \
                     : HOPPER_32(c, 0), HOPPER_32(c, 32 % N)                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    else                                                                                           \
        asm volatile("{ .reg .pred add; setp.eq.b32 add, 0, 0;\n"                                  \
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                   \
                     " {" HOPPER_NAMES_32 "}, {%32,%33,%34,%35}, %36, add, 1, 1, 1; }"             \
                     : HOPPER_32(c, 0)                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
template <typename T, int N>
__device__ __forceinline__ void product_registers(float (&c)[N], const uint32_t (&a)[4], uint64_t b)
{
    static_assert(N == 32 || N == 64, "64 or 128 columns");
    if constexpr (std::is_same<T, __nv_bfloat16>::value) {
        HOPPER_REGISTERS("bf16");
    } else {
        HOPPER_REGISTERS("f16");
    }
}

#undef HOPPER_SHARED
#undef HOPPER_REGISTERS
#undef HOPPER_NAMES_64
#undef HOPPER_NAMES_32
#undef HOPPER_32
#undef HOPPER_8

#endif
