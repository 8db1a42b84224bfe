/* Small operators that some families need: norms of single heads, bounds, strided copies. Each is one pass over
 * data that is still in L2, bound by bandwidth.
 *
 * head_norm: one warp per head, x = round(x / sqrt(mean(x^2) + eps) * w), sums in f32, in place; a head is read
 * twice, the second time from L1. Bytes moved: T * heads * d * 4. bound: T * n * 4 (f32: 8). copy: T * groups *
 * cols * 4. Packs of 16 bytes where sizes, strides and addresses allow. */
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/vec.cuh"

namespace
{

constexpr int THREADS = 256;

bool aligned(const void *p)
{
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

dim3 blocks_for(size_t n)
{
    return dim3((unsigned)((n + THREADS - 1) / THREADS));
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS) head_norm_kernel(tm_head_norm_args a)
{
    wait_previous();
    start_next();
    const size_t unit = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (unit >= (size_t)a.n_tokens * a.n_heads)
        return;
    T *x = static_cast<T *>(a.x) + unit / a.n_heads * a.ld + unit % a.n_heads * a.d;
    float sq = 0.0f;
    for (int i = lane; i < a.d / V; i += 32) {
        const pack<T, V> p = load_pack<T, V>(x, i);
#pragma unroll
        for (int j = 0; j < V; j++)
            sq += to_f32(p.e[j]) * to_f32(p.e[j]);
    }
    for (int i = 16; i > 0; i >>= 1)
        sq += __shfl_xor_sync(0xffffffffu, sq, i);
    const float inv = rsqrtf(sq / a.d + a.eps), one = a.add_one ? 1.0f : 0.0f;
    for (int i = lane; i < a.d / V; i += 32) {
        pack<T, V> p = load_pack<T, V>(x, i);
#pragma unroll
        for (int j = 0; j < V; j++)
            p.e[j] = from_f32<T>(to_f32(p.e[j]) * inv * (one + a.w[i * V + j]));
        store_pack<T, V>(x, i, p);
    }
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
    bound_kernel(T *x, size_t packs, float limit, bool smooth)
{
    wait_previous();
    start_next();
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= packs)
        return;
    pack<T, V> p = load_pack<T, V>(x, i);
#pragma unroll
    for (int j = 0; j < V; j++) {
        const float v = to_f32(p.e[j]);
        p.e[j] = from_f32<T>(smooth ? limit * tanhf(v / limit) : fminf(fmaxf(v, -limit), limit));
    }
    store_pack<T, V>(x, i, p);
}

/* One thread per word; all counts and strides are in words. */
template <typename W> __global__ void __launch_bounds__(THREADS) copy_kernel(tm_copy_args a)
{
    wait_previous();
    start_next();
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x, row = (size_t)a.groups * a.cols;
    if (i >= row * a.n_tokens)
        return;
    const size_t t = i / row, g = i % row / a.cols, c = i % a.cols;
    static_cast<W *>(a.out)[t * a.ldo + g * a.gdo + c] =
        static_cast<const W *>(a.x)[t * a.ldx + g * a.gdx + c];
}

template <typename T, int V> cudaError_t launch_bound(const tm_bound_args *a, const tm_cuda_ctx *c)
{
    const size_t n = (size_t)a->n_rows * (size_t)a->n;
    T *x = static_cast<T *>(a->x);
    if (n % V == 0 && aligned(x))
        return launch_kernel(c, bound_kernel<T, V>, blocks_for(n / V), THREADS, 0, x, n / V,
                             a->limit, a->smooth);
    return launch_kernel(c, bound_kernel<T, 1>, blocks_for(n), THREADS, 0, x, n, a->limit,
                         a->smooth);
}

template <typename T> cudaError_t launch_head_norm(const tm_head_norm_args *a, const tm_cuda_ctx *c)
{
    const dim3 grid = blocks_for((size_t)a->n_tokens * (size_t)a->n_heads * 32);
    const bool wide = a->d % 8 == 0 && a->ld % 8 == 0 && aligned(a->x);
    return launch_kernel(c, wide ? head_norm_kernel<T, 8> : head_norm_kernel<T, 1>, grid, THREADS,
                         0, *a);
}

} /* namespace */

extern "C" cudaError_t tm_cuda_head_norm_launch(const tm_head_norm_args *a, const tm_cuda_ctx *c)
{
    if (a->n_tokens == 0 || a->n_heads == 0)
        return cudaSuccess;
    switch (c->act) {
    case TM_DTYPE_BF16:
        return launch_head_norm<__nv_bfloat16>(a, c);
    case TM_DTYPE_F16:
        return launch_head_norm<__half>(a, c);
    default:
        return cudaErrorInvalidValue;
    }
}

extern "C" cudaError_t tm_cuda_bound_launch(const tm_bound_args *a, const tm_cuda_ctx *c)
{
    if (a->n_rows == 0 || a->n == 0)
        return cudaSuccess;
    switch (a->f32 ? TM_DTYPE_F32 : c->act) {
    case TM_DTYPE_F32:
        return launch_bound<float, 4>(a, c);
    case TM_DTYPE_BF16:
        return launch_bound<__nv_bfloat16, 8>(a, c);
    case TM_DTYPE_F16:
        return launch_bound<__half, 8>(a, c);
    default:
        return cudaErrorInvalidValue;
    }
}

extern "C" cudaError_t tm_cuda_copy_launch(const tm_copy_args *a, const tm_cuda_ctx *c)
{
    const size_t n = (size_t)a->n_tokens * (size_t)a->groups * (size_t)a->cols;
    const int sizes[] = {a->cols, a->ldo, a->gdo, a->ldx, a->gdx};
    bool wide = aligned(a->out) && aligned(a->x);
    tm_copy_args w = *a;
    if (c->act == TM_DTYPE_F32)
        return cudaErrorInvalidValue;
    if (n == 0)
        return cudaSuccess;
    for (int s : sizes)
        wide = wide && s % 8 == 0;
    if (!wide)
        return launch_kernel(c, copy_kernel<uint16_t>, blocks_for(n), THREADS, 0, w);
    w.cols /= 8, w.ldo /= 8, w.gdo /= 8, w.ldx /= 8, w.gdx /= 8;
    return launch_kernel(c, copy_kernel<uint4>, blocks_for(n / 8), THREADS, 0, w);
}
