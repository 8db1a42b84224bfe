/* Launching with programmatic dependent launch: a kernel may start while the one before it drains.
 *
 * Rules that make this safe. Every kernel started through launch_kernel calls wait_previous before it reads or
 * writes anything that the kernel in front of it touches. A kernel is complete only when all its blocks are, and they
 * have waited, so the order is kept through any chain of kernels.
 *
 * Most call start_next only after that: so when the kernel behind such a one begins, everything in front of that one
 * is complete. Eager ones (norms, sums of ranks, products of one token on Hopper) call it before, so that what is behind them
 * begins still earlier. A step's first kernel, the embedding, is not eager; so every later one of the step may read before
 * wait_previous what was there when the step began: weights, the batch, and keys and values of older tokens, as
 * attention_decode.cu does. Where the device cannot do this (sm_80) the attribute is left out and both calls are empty. */
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

/* Clusters of `cluster` blocks, 1 for none; where there are none (sm_80) only 1 will do. */
template <typename... P>
cudaError_t launch_blocks(const tm_cuda_ctx *c, void (*kernel)(P...), dim3 grid, int threads,
                          size_t smem, int cluster, typename same<P>::type... args)
{
    cudaLaunchAttribute attr[2] = {};
    unsigned n = 0;
    if (c->dependent_launch) {
        attr[n].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attr[n++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attr[n].id = cudaLaunchAttributeClusterDimension;
        attr[n].val.clusterDim.x = (unsigned)cluster;
        attr[n].val.clusterDim.y = attr[n].val.clusterDim.z = 1;
        n++;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = smem;
    config.stream = c->stream;
    config.attrs = attr;
    config.numAttrs = n;
    return launch_config(c, &config, kernel, args...);
}

template <typename... P>
cudaError_t launch_clusters(const tm_cuda_ctx *c, void (*kernel)(P...), dim3 grid, int threads,
                            int cluster, typename same<P>::type... args)
{
    return launch_blocks(c, kernel, grid, threads, 0, cluster, args...);
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
    return launch_blocks(c, kernel, grid, threads, smem, 1, args...);
}

#endif
