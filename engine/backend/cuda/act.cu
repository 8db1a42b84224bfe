/* Gated and plain activations, row by row.
 *
 *   out[t, i] = act(gate_up[t, i]) * gate_up[t, F + i]      gated
 *   out[t, i] = act(gate_up[t, i])                          not gated
 *
 * One thread per pack of 8 outputs (1 where F is odd). Bytes moved: T * F * (4 + 2), or T * F * (2 + 2). */
#include "engine/backend/cuda/act.cuh"
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/vec.cuh"

namespace
{

constexpr int THREADS = 256;

template <typename T, int V> __global__ void __launch_bounds__(THREADS) act_kernel(tm_act_args a)
{
    wait_previous();
    start_next();
    const size_t packs = (size_t)(a.f / V), width = a.gated ? 2 * packs : packs;
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= packs * (size_t)a.n_tokens)
        return;
    const size_t at = i / packs * width + i % packs;
    pack<T, V> g = load_pack<T, V>(a.gate_up, at), u = g, o;
    if (a.gated)
        u = load_pack<T, V>(a.gate_up, at + packs);
#pragma unroll
    for (int j = 0; j < V; j++) {
        float v = activate(to_f32(g.e[j]), a.act);
        o.e[j] = from_f32<T>(a.gated ? v * to_f32(u.e[j]) : v);
    }
    store_pack<T, V>(a.out, i, o);
}

template <typename T> cudaError_t launch(const tm_act_args *a, const tm_cuda_ctx *c)
{
    const int v = a->f % 8 == 0 ? 8 : 1;
    const size_t n = (size_t)(a->f / v) * (size_t)a->n_tokens;
    dim3 grid((unsigned)((n + THREADS - 1) / THREADS));
    return v == 8 ? launch_kernel(c, act_kernel<T, 8>, grid, THREADS, 0, *a)
                  : launch_kernel(c, act_kernel<T, 1>, grid, THREADS, 0, *a);
}

} /* namespace */

extern "C" cudaError_t tm_cuda_act_launch(const tm_act_args *a, const tm_cuda_ctx *c)
{
    if (a->n_tokens == 0)
        return cudaSuccess;
    switch (c->act) {
    case TM_DTYPE_BF16:
        return launch<__nv_bfloat16>(a, c);
    case TM_DTYPE_F16:
        return launch<__half>(a, c);
    default:
        return cudaErrorInvalidValue;
    }
}
