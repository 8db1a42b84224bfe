/* Launching with programmatic dependent launch: a kernel may start while the one before it drains.
 *
 * Rule that makes this safe: every kernel started through launch_kernel calls wait_previous before it reads or
 * writes anything that an earlier kernel of the stream touches; before that it may only read weights, which
 * never change. A kernel is complete only when all its blocks are, and they have waited, so the order is kept
 * through any chain of kernels. Where the device cannot do this (sm_80) the attribute is left out and both
 * calls are empty. */
#ifndef TM_ENGINE_BACKEND_CUDA_LAUNCH_CUH
#define TM_ENGINE_BACKEND_CUDA_LAUNCH_CUH

#include "engine/backend/cuda/kernels.h"
#include "engine/backend/cuda/ptx.cuh"

template <typename T> struct same {
    typedef T type;
};

template <typename... P>
cudaError_t launch_config(const tm_cuda_ctx *c, const cudaLaunchConfig_t *config,
                          void (*kernel)(P...), typename same<P>::type... args)
{
    tm_cuda_profile *profile = c->profile; /* may be set meanwhile */
    if (!profile)
        return cudaLaunchKernelEx(config, kernel, args...);
    tm_cuda_profile_enter(profile, reinterpret_cast<const void *>(kernel), NULL, c->stream);
    cudaError_t e = cudaLaunchKernelEx(config, kernel, args...);
    tm_cuda_profile_leave(profile, c->stream);
    return e;
}

/* Arguments are converted to the kernel's parameter types. Shared memory near 48 KiB and above is asked for; what
 * the kernel has in static arrays counts, too. The split of L1 and shared memory is left to the driver: loads under
 * way need room in L1, and with most of it given to shared memory kernels here lose a third of their speed. */
template <typename... P>
cudaError_t launch_kernel(const tm_cuda_ctx *c, void (*kernel)(P...), dim3 grid, int threads,
                          size_t smem, typename same<P>::type... args)
{
    if (smem > 40 * 1024) {
        cudaError_t e =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem);
        if (e != cudaSuccess)
            return e;
    }
    cudaLaunchAttribute attr = {};
    attr.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = smem;
    config.stream = c->stream;
    config.attrs = &attr;
    config.numAttrs = c->dependent_launch ? 1 : 0;
    return launch_config(c, &config, kernel, args...);
}

#endif
