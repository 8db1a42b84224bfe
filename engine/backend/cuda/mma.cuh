/* Tensor core products of 16-bit numbers with f32 sums, and the copies that feed them.
 *
 * mma: c[16 x 8] += a[16 x 16] * b[16 x 8]. Lane = 4 g + t holds
 *   a: (row g, k 2t 2t+1) (row g+8, same k) (row g, k 2t+8 2t+9) (row g+8, same)
 *   b: (k 2t 2t+1, column g) (k 2t+8 2t+9, column g)
 *   c: (row g, columns 2t 2t+1) (row g+8, columns 2t 2t+1)
 * The k order is free as long as a and b agree: kernels here let a lane own 8 neighbouring k, so that it
 * loads 16 bytes at once straight from memory. */
#ifndef TM_ENGINE_BACKEND_CUDA_MMA_CUH
#define TM_ENGINE_BACKEND_CUDA_MMA_CUH

#include <stdint.h>

#include "engine/backend/cuda/vec.cuh"

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

/* Two numbers in one register, lo in the low half. */
template <typename T> __device__ __forceinline__ uint32_t pack2(float lo, float hi);
template <> __device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float lo, float hi)
{
    __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<uint32_t *>(&v);
}
template <> __device__ __forceinline__ uint32_t pack2<__half>(float lo, float hi)
{
    __half2 v = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<uint32_t *>(&v);
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

/* Data that is read once: it does not push anything out of L1. Where !valid nothing is read and v stays. The
 * condition is part of the instruction: around it, the compiler puts moves that wait for each load in turn. */
__device__ __forceinline__ void load_weights(uint4 &v, const void *p, bool valid)
{
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %5, 0;\n"
                 "@q ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4]; }"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(p), "r"((int)valid));
}

/* The same for what an earlier kernel of the stream wrote; zeros where !valid. */
__device__ __forceinline__ void load_stream(uint32_t *v, const void *p, bool valid)
{
    v[0] = v[1] = v[2] = v[3] = 0;
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %5, 0;\n"
                 "@q ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4]; }"
                 : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3])
                 : "l"(p), "r"((int)valid)
                 : "memory");
}
__device__ __forceinline__ void load_stream8(uint32_t *v, const void *p, bool valid)
{
    v[0] = v[1] = 0;
    asm volatile("{ .reg .pred q; setp.ne.b32 q, %3, 0;\n"
                 "@q ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2]; }"
                 : "+r"(v[0]), "+r"(v[1])
                 : "l"(p), "r"((int)valid)
                 : "memory");
}

#endif
