/* Products of experts with few tokens each: every chosen expert's weights are read once, at the speed of memory.
 *
 * A block has one item (up to 8 pairs of one expert) and 16 rows of the expert's weight (gate_up: 8 gate rows and
 * the 8 up rows that belong to them) on the M side of the tensor core; the pairs are its N side. The 4 warps
 * split K between them 64 columns at a time in turn. A lane owns 8 neighbouring k of two rows and of one pair,
 * so everything goes straight from memory to registers, DEPTH steps under way; blocks are many and small, so
 * that they fill the device whatever was chosen. K is any multiple of 8.
 *
 * Bytes moved: (chosen experts) * rows * K * 2 from memory, and for every 16 rows of W the item's rows of x from L2. */
#include "engine/backend/cuda/act.cuh"
#include "engine/backend/cuda/moe.cuh"
#include "engine/backend/cuda/stream.cuh"

namespace
{

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int DEPTH = 3;

template <typename T, bool GATED>
__device__ lane_rows<T> find_rows(const moe_product &a, const moe_item &item)
{
    const int g = threadIdx.x % 32 / 4, parts = GATED ? 2 : 1;
    const int lo = blockIdx.x * (GATED ? 8 : 16) + g, hi = GATED ? a.n + lo : lo + 8;
    const T *w = static_cast<const T *>(a.w) + (size_t)item.expert * parts * a.n * a.k;
    const int i = item.first + (g < item.rows ? g : 0);
    lane_rows<T> r;
    r.has_lo = lo < a.n;
    r.has_hi = r.has_lo && hi < parts * a.n;
    r.has_x = g < item.rows;
    r.lo = w + (size_t)(r.has_lo ? lo : 0) * a.k;
    r.hi = w + (size_t)(r.has_hi ? hi : 0) * a.k;
    r.x = static_cast<const T *>(a.x) + (size_t)(GATED ? a.order[i] / a.top_k : i) * a.k;
    return r;
}

/* Element e of the tile's sums, [lane][4], over the warps. */
__device__ __forceinline__ float sum_warps(const float *red, int e)
{
    float v = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        v += red[w * 128 + e];
    return v;
}

template <typename T, bool GATED>
__device__ void store_tile(const moe_product &a, const moe_item &item, const float *red)
{
    /* Gated, element e + 2 is what gate e multiplies. */
    const int e = GATED ? threadIdx.x / 2 * 4 + threadIdx.x % 2 : threadIdx.x, lane = e / 4;
    const int row = blockIdx.x * (GATED ? 8 : 16) + lane / 4 + (e & 2) * 4;
    const int col = lane % 4 * 2 + (e & 1);
    if (e >= 128 || row >= a.n || col >= item.rows)
        return;
    float v = sum_warps(red, e);
    if (GATED)
        v = activate(v, a.act) * sum_warps(red, e + 2);
    const int i = item.first + col;
    static_cast<T *>(a.out)[(size_t)(GATED ? i : a.order[i]) * a.n + row] = from_f32<T>(v);
}

template <typename T, bool GATED>
__global__ void __launch_bounds__(THREADS) stream_kernel(moe_product a)
{
    SHARED(float4[WARPS * 32], red);
    wait_previous();
    start_next();
    if ((int)blockIdx.y >= *a.n_items)
        return;
    const moe_item item = a.items[blockIdx.y];
    const lane_rows<T> r = find_rows<T, GATED>(a, item);
    const int warp = threadIdx.x / 32, steps = (a.k + STREAM_STEP - 1) / STREAM_STEP;
    step_regs s[DEPTH];
    float acc[4] = {};
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        load_step<T>(s[d], r, warp + d * WARPS, a.k);
    for (int at = warp; at < steps; at += DEPTH * WARPS) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            multiply_step<T>(acc, s[d]); /* zeros behind the end */
            load_step<T>(s[d], r, at + (d + DEPTH) * WARPS, a.k);
        }
    }
    red[threadIdx.x] = make_float4(acc[0], acc[1], acc[2], acc[3]);
    __syncthreads();
    store_tile<T, GATED>(a, item, reinterpret_cast<const float *>(red));
}

} /* namespace */

cudaError_t moe_stream_launch(const moe_product &p, bool gated, const tm_cuda_ctx *c)
{
    const int rows = gated ? 8 : 16;
    const dim3 grid((unsigned)((p.n + rows - 1) / rows), (unsigned)p.max_items);
    if (c->act == TM_DTYPE_BF16)
        return launch_kernel(
            c, gated ? stream_kernel<__nv_bfloat16, true> : stream_kernel<__nv_bfloat16, false>,
            grid, THREADS, 0, p);
    return launch_kernel(c, gated ? stream_kernel<__half, true> : stream_kernel<__half, false>,
                         grid, THREADS, 0, p);
}
