/* The emulator's twin of engine/backend/cuda/ptx.cuh: the same functions for the CPU. It lies in front of that file
 * on the path of includes. A function added there is added here. */
#ifndef TM_TESTS_CUDA_EMU_PTX_CUH
#define TM_TESTS_CUDA_EMU_PTX_CUH

#include <stdint.h>

#include "engine/backend/cuda/vec.cuh"

template <typename T> using shared_type = T;
/* The variable's own name in the block's memory is the address of a byte of its function. */
#define SHARED(type, name)                                                                         \
    static char name##_id;                                                                         \
    shared_type<type> &name = *static_cast<shared_type<type> *>(                                   \
        emu_shared(&name##_id, sizeof(shared_type<type>), alignof(shared_type<type>)))
#define DYNAMIC_SHARED(type, name) type *name = static_cast<type *>(emu_shared_dynamic())

inline void wait_previous()
{
    emu_self->waited = true;
}
inline void wait_left_to_others()
{
    emu_self->waited = true;
}
inline void start_next()
{
}

inline int cluster_size()
{
    return (int)emu_self->block->launch->cluster;
}
inline int cluster_rank()
{
    return (int)(emu_self->block->index.x % emu_self->block->launch->cluster);
}
inline void cluster_arrive()
{
}
inline void cluster_wait(EMU_SITE_PARAMS)
{
    emu_cluster_wait({"cluster_wait", file, line});
}
inline void store_cluster(float *p, int rank, float v)
{
    emu_cluster_store(p, rank, &v, sizeof(v));
}

inline float power2(float x)
{
    return exp2f(x);
}

inline void prefetch_l2(const void *p)
{
    __builtin_prefetch(p);
}

template <typename T>
inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                uint32_t b1, EMU_SITE_PARAMS)
{
    emu_mma m = {c, {a0, a1, a2, a3}, {b0, b1}, std::is_same<T, __half>::value};
    emu_warp_all(emu_op_mma, &m, {"mma", file, line});
}

inline uint32_t transpose8(uint32_t v, EMU_SITE_PARAMS)
{
    emu_transpose8 t = {v, 0};
    emu_warp_all(emu_op_transpose8, &t, {"transpose8", file, line});
    return t.out;
}

inline void load_matrix(uint32_t (&r)[4], const void *p, EMU_SITE_PARAMS)
{
    emu_load_matrix m = {r, p, 4, false};
    emu_check_aligned(p, 16);
    emu_watch(p, 16, false);
    emu_warp_all(emu_op_load_matrix, &m, {"load_matrix", file, line});
}
inline void load_matrix_trans(uint32_t (&r)[4], const void *p, EMU_SITE_PARAMS)
{
    emu_load_matrix m = {r, p, 4, true};
    emu_check_aligned(p, 16);
    emu_watch(p, 16, false);
    emu_warp_all(emu_op_load_matrix, &m, {"load_matrix_trans", file, line});
}

inline void copy_async(void *dst, const void *src, bool valid)
{
    emu_copy_async(dst, src, 16, valid);
}
inline void copy_commit()
{
    emu_copy_commit();
}
template <int N> inline void copy_wait()
{
    emu_copy_wait(N);
}

inline void load_weights(uint4 &v, const void *p, bool valid)
{
    if (!valid)
        return;
    emu_check_aligned(p, 16);
    v = *static_cast<const uint4 *>(p);
}

inline void load_stream(uint32_t *v, const void *p, bool valid)
{
    v[0] = v[1] = v[2] = v[3] = 0;
    if (!valid)
        return;
    emu_check_aligned(p, 16);
    memcpy(v, p, 16);
}
inline void load_stream8(uint32_t *v, const void *p, bool valid)
{
    v[0] = v[1] = 0;
    if (!valid)
        return;
    emu_check_aligned(p, 8);
    memcpy(v, p, 8);
}

#endif
