/* Products of experts with many tokens: a grouped matrix product on the tensor cores.
 *
 * A block has one item (up to ROWS pairs of one expert, their rows gathered through the order) and 128 rows of the
 * expert's weight: for gate_up 64 gate rows and the 64 up rows that belong to them, laid so that a warp has both of
 * an output and the activation needs no exchange. Its warps have 32 x 64 sums each. Rows of x and of W pass through
 * shared memory 64 numbers at a time in STAGES stages of asynchronous copies; a row there is 16 bytes longer than
 * its numbers, so that ldmatrix has no bank conflicts. K and n are multiples of 8; what lies behind either, and
 * behind the item's rows, is filled with zeros.
 *
 * Blocks go round in groups of 8 items by all columns, which then share rows in L2. Work: pairs * n * K * 2
 * operations (gate_up twice that); each block reads (ROWS + 128) * K * 2 bytes, mostly from L2. */
#include "engine/backend/cuda/act.cuh"
#include "engine/backend/cuda/mma.cuh"
#include "engine/backend/cuda/moe.cuh"

namespace
{

constexpr int W_ROWS = 128, BK = 64, LD = BK + 8, STAGES = 3, GROUP = 8;

template <int ROWS> struct geometry {
    static constexpr int THREADS = ROWS * 2;  /* warps of 32 x 64 */
    static constexpr int LINES = THREADS / 8; /* rows that the block copies at once, 8 lanes each */
    static constexpr int STAGE = (ROWS + W_ROWS) * LD; /* numbers */
    static constexpr size_t SMEM = (size_t)STAGES * STAGE * 2;
};

/* What a thread copies in each stage: 16 bytes of some rows of x and of W. NULL: zeros. */
template <typename T, int ROWS> struct copier {
    const T *x[ROWS / geometry<ROWS>::LINES], *w[W_ROWS / geometry<ROWS>::LINES];
    const T *any; /* an address that may be named when nothing is read */

    template <bool GATED>
    __device__ void seek(const moe_product &a, const moe_item &item, int col_tile)
    {
        const int line = threadIdx.x / 8;
        any = static_cast<const T *>(a.w);
        const T *base = any + (size_t)item.expert * (GATED ? 2 : 1) * a.n * a.k;
        for (int i = 0; i < ROWS / geometry<ROWS>::LINES; i++) {
            const int row = line + i * geometry<ROWS>::LINES, at = item.first + row;
            x[i] = NULL;
            if (row < item.rows)
                x[i] = static_cast<const T *>(a.x) +
                       (size_t)(GATED ? a.order[at] / a.top_k : at) * a.k;
        }
        for (int i = 0; i < W_ROWS / geometry<ROWS>::LINES; i++) {
            const int row = line + i * geometry<ROWS>::LINES;
            const int half = row / 64,
                      in = row % 64; /* half: whose of the two warps beside each other */
            const int col = GATED ? col_tile * 64 + half * 32 + in % 32 : col_tile * W_ROWS + row;
            const int up = GATED && in >= 32 ? a.n : 0;
            w[i] = col < a.n ? base + (size_t)(up + col) * a.k : NULL;
        }
    }
    __device__ __forceinline__ void load(T *stage, int k0, int k) const
    {
        const int line = threadIdx.x / 8, at = k0 + threadIdx.x % 8 * 8;
        T *to = stage + line * LD + threadIdx.x % 8 * 8;
#pragma unroll
        for (int i = 0; i < ROWS / geometry<ROWS>::LINES; i++) {
            const bool valid = x[i] && at < k;
            copy_async(to + i * geometry<ROWS>::LINES * LD, valid ? x[i] + at : any, valid);
        }
        to += ROWS * LD;
#pragma unroll
        for (int i = 0; i < W_ROWS / geometry<ROWS>::LINES; i++) {
            const bool valid = w[i] && at < k;
            copy_async(to + i * geometry<ROWS>::LINES * LD, valid ? w[i] + at : any, valid);
        }
    }
};

/* One stage: acc[32 rows, 64 columns] of the warp. */
template <typename T, int ROWS>
__device__ __forceinline__ void multiply(float (&acc)[2][8][4], const T *stage)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const T *x = stage + (warp / 2 * 32 + lane % 16) * LD + lane / 16 * 8;
    const T *w = stage + (ROWS + warp % 2 * 64 + lane / 16 * 8 + lane % 8) * LD + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
        uint32_t a[2][4];
        load_matrix(a[0], x + k);
        load_matrix(a[1], x + 16 * LD + k);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            uint32_t b[4];
            load_matrix(b, w + n * 16 * LD + k);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                mma<T>(acc[m][2 * n], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
                mma<T>(acc[m][2 * n + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
            }
        }
    }
}

template <typename T, bool GATED>
__device__ void store_tile(const moe_product &a, const moe_item &item, int col_tile,
                           const float (&acc)[2][8][4])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int col0 = col_tile * (GATED ? 64 : W_ROWS) + warp % 2 * (GATED ? 32 : 64);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = warp / 2 * 32 + m * 16 + h * 8 + lane / 4, i = item.first + row;
            if (row >= item.rows)
                continue;
            T *to = static_cast<T *>(a.out) + (size_t)(GATED ? i : a.order[i]) * a.n;
#pragma unroll
            for (int n = 0; n < (GATED ? 4 : 8); n++) {
                const int col = col0 + n * 8 + lane % 4 * 2;
                float u = acc[m][n][2 * h], v = acc[m][n][2 * h + 1];
                if (GATED) {
                    u = activate(u, a.act) * acc[m][n % 4 + 4][2 * h];
                    v = activate(v, a.act) * acc[m][n % 4 + 4][2 * h + 1];
                }
                if (col < a.n)
                    *reinterpret_cast<uint32_t *>(to + col) = pack2<T>(u, v);
            }
        }
}

template <typename T, int ROWS, bool GATED>
__global__ void __launch_bounds__(geometry<ROWS>::THREADS) tiles_kernel(moe_product a)
{
    DYNAMIC_SHARED(uint4, smem);
    T *stages = reinterpret_cast<T *>(smem);
    wait_previous();
    start_next();
    const int columns = GATED ? 64 : W_ROWS, col_tiles = (a.n + columns - 1) / columns;
    const int group = blockIdx.x / (GROUP * col_tiles), in = blockIdx.x % (GROUP * col_tiles);
    const int at = group * GROUP + in % GROUP, col_tile = in / GROUP;
    if (at >= *a.n_items)
        return;
    const moe_item item = a.items[at];
    copier<T, ROWS> from;
    from.template seek<GATED>(a, item, col_tile);
    float acc[2][8][4] = {};
    const int steps = (a.k + BK - 1) / BK;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        from.load(stages + s * geometry<ROWS>::STAGE, s * BK, a.k);
        copy_commit();
    }
    for (int s = 0; s < steps; s++) {
        copy_wait<STAGES - 2>();
        __syncthreads(); /* the stage is there, and the one in front of it has been used */
        const int next = s + STAGES - 1;
        if (next < steps)
            from.load(stages + next % STAGES * geometry<ROWS>::STAGE, next * BK, a.k);
        copy_commit();
        multiply<T, ROWS>(acc, stages + s % STAGES * geometry<ROWS>::STAGE);
    }
    store_tile<T, GATED>(a, item, col_tile, acc);
}

template <typename T, int ROWS>
cudaError_t launch(const moe_product &p, bool gated, const tm_cuda_ctx *c)
{
    const int columns = gated ? 64 : W_ROWS, col_tiles = (p.n + columns - 1) / columns;
    const int groups = (p.max_items + GROUP - 1) / GROUP;
    return launch_kernel(c, gated ? tiles_kernel<T, ROWS, true> : tiles_kernel<T, ROWS, false>,
                         dim3((unsigned)(groups * GROUP * col_tiles)), geometry<ROWS>::THREADS,
                         geometry<ROWS>::SMEM, p);
}

} /* namespace */

cudaError_t moe_tiles_launch(const moe_product &p, bool gated, int rows, const tm_cuda_ctx *c)
{
    if (c->act == TM_DTYPE_BF16)
        return rows == 128 ? launch<__nv_bfloat16, 128>(p, gated, c)
                           : launch<__nv_bfloat16, 64>(p, gated, c);
    return rows == 128 ? launch<__half, 128>(p, gated, c) : launch<__half, 64>(p, gated, c);
}
