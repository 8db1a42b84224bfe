/* Every instruction that CUDA C++ has no name for, and the placing of shared memory: the whole of what the kernels
 * say outside C++. The tests' emulator (tests/cuda_emu) puts a file of the same name in front of this one, so each
 * function here has a twin there; no other file has an asm statement or names __shared__, but system.cuh (memory of other
 * devices) and hopper.cuh (what only sm_90a has). */
#ifndef TM_ENGINE_BACKEND_CUDA_PTX_CUH
#define TM_ENGINE_BACKEND_CUDA_PTX_CUH

#include <stdint.h>

#include "engine/backend/cuda/vec.cuh"

/* Shared memory of the block: SHARED(float[32], slots) declares `float slots[32]`; dynamic is what the launch asked
 * for, without an end. */
template <typename T> using shared_type = T;
#define SHARED(type, name)         __shared__ shared_type<type> name
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]

/* Programmatic dependent launch: the rule is in launch.cuh. */
__device__ __forceinline__ void wait_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* The next kernel may be scheduled as soon as there is room for its blocks. */
__device__ __forceinline__ void start_next()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* In place of wait_previous, by a block that ends without having written anything; some other block of its kernel waits. */
__device__ __forceinline__ void wait_left_to_others()
{
}

/* Clusters: a block that was launched without is one of its own. Every thread of all its blocks arrives, then waits; what
 * each wrote before it arrived, all see after. */
__device__ __forceinline__ int cluster_size()
{
    uint32_t n = 1;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
#endif
    return (int)n;
}
__device__ __forceinline__ int cluster_rank()
{
    uint32_t n = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(n));
#endif
    return (int)n;
}
__device__ __forceinline__ void cluster_arrive()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}
/* To the variable of the cluster's block `rank` that is p in this one. */
__device__ __forceinline__ void store_cluster(float *p, int rank, float v)
{
#if __CUDA_ARCH__ >= 900
    const uint32_t own = (uint32_t)__cvta_generic_to_shared(p);
    uint32_t at;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(own), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
#else
    (void)rank;
    *p = v;
#endif
}

/* 2^x to 2 units in the last place; minus infinity gives 0. */
__device__ __forceinline__ float power2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* The line of p will be wanted soon. */
__device__ __forceinline__ void prefetch_l2(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* c += a b for one 16 x 8 tile of the warp: the lanes' parts are in mma.cuh. */
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], uint32_t a0, uint32_t a1,
                                                   uint32_t a2, uint32_t a3, uint32_t b0,
                                                   uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
        "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, "
        "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Of an 8 x 8 matrix of 16-bit numbers spread over the warp, row by row: its transpose. */
__device__ __forceinline__ uint32_t transpose8(uint32_t v)
{
    uint32_t r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

/* Four 8 x 8 matrices from shared memory; lane i gives the address of row i % 8 of matrix i / 8. */
__device__ __forceinline__ void load_matrix(uint32_t (&r)[4], const void *p)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(p);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void load_matrix_trans(uint32_t (&r)[4], const void *p)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(p);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

/* 16 bytes to shared memory in the background; zeros where !valid. */
__device__ __forceinline__ void copy_async(void *dst, const void *src, bool valid)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(dst);
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(src), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/* Until at most N groups are under way. */
template <int N> __device__ __forceinline__ void copy_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Weights, which are read once: they do not push anything out of L1. A warp asks for half a line of each row at a time, so L2
 * is told to fetch the whole: without that, memory gives 5 % less. Where !valid nothing is read and v stays. The
 * condition is part of the instruction: around it, the compiler puts moves that wait for each load in turn. */
__device__ __forceinline__ void load_weights(uint4 &v, const void *p, bool valid)
{
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %5, 0;\n"
                 "@q ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4]; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(p), "r"((int)valid));
}

/* The same for what an earlier kernel of the stream wrote; zeros where !valid. */
__device__ __forceinline__ void load_stream(uint32_t *v, const void *p, bool valid)
{
    v[0] = v[1] = v[2] = v[3] = 0;
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %5, 0;\n"
                 "@q ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4]; }"
                 : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3])
                 : "l"(p), "r"((int)valid)
                 : "memory");
}
__device__ __forceinline__ void load_stream8(uint32_t *v, const void *p, bool valid)
{
    v[0] = v[1] = 0;
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %3, 0;\n"
                 "@q ld.global.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2]; }"
                 : "+r"(v[0]), "+r"(v[1])
                 : "l"(p), "r"((int)valid)
                 : "memory");
}

#endif
