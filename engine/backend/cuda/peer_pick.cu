/* What ranks say to each other besides sums: that they are here, columns of a matrix, the best column of a row.
 *
 * Packets of picks have a mark of 31 bits of the call's number: a packet's place could be taken for filled if it was
 * last used exactly 2^31 calls ago. */
#include "engine/backend/cuda/peer.cuh"

namespace
{

__global__ void __launch_bounds__(32) meet_kernel(const __grid_constant__ tm_peers p)
{
    wait_previous();
    start_next();
    call c = begin_call(p);
    meet(p, c, 0, true);
}

__global__ void __launch_bounds__(256) copy_kernel(tm_peer_copy a)
{
    wait_previous();
    start_next();
    const float *x = a.x + (size_t)blockIdx.y * a.ldx;
    float *out = a.out + (size_t)blockIdx.y * a.ldo;
    for (int i = (int)(blockIdx.x * 256 + threadIdx.x); i < a.cols; i += (int)gridDim.x * 256)
        out[i] = x[i];
}

/* Larger for a larger number, and among equal ones for a lower column; 0 for none. Without numbers: rank 0 (v0) has the
 * only column. */
__device__ uint64_t key_of(const tm_argmax_args &a, int row)
{
    const int i = a.out[row];
    if (!a.x)
        return i < 0 || a.v0 > 0 ? 0 : (uint64_t)1 << 32 | (0xffffffffu - (uint32_t)i);
    if (i < 0)
        return 0;
    const uint32_t u = __float_as_uint(a.x[(size_t)row * (a.ld ? a.ld : a.n) + i]);
    const uint32_t order = u & 0x80000000u ? ~u : u | 0x80000000u;
    return (uint64_t)order << 32 | (0xffffffffu - (uint32_t)(a.v0 + i));
}

__device__ int32_t column_of(uint64_t key)
{
    return key ? (int32_t)(0xffffffffu - (uint32_t)key) : -1;
}

constexpr int PICKS = 128; /* rows of a block */

__global__ void __launch_bounds__(PICKS)
    pick_kernel(const __grid_constant__ tm_peers p, const __grid_constant__ tm_argmax_args a)
{
    wait_previous();
    start_next();
    call c = begin_call(p);
    __syncthreads();
    count_call(p, c, take_ticket(p), false);
    const int row = (int)(blockIdx.x * PICKS + threadIdx.x);
    if (row < a.n_rows) {
        uint64_t best = key_of(a, row);
        for (int r = 0; r < p.size; r++)
            if (r != p.rank)
                store_packet(packets_of(p, r, c.half, p.rank) + (size_t)row * 16, (uint32_t)best,
                             (uint32_t)(best >> 32), c.mark);
        for (int r = 0; r < p.size; r++) {
            if (r == p.rank)
                continue;
            const char *from = packets_of(p, p.rank, c.half, r) + (size_t)row * 16;
            uint4 w = load_packet(from);
            while ((w.y != c.mark || w.w != c.mark) && !too_late(p, c, r))
                w = load_packet(from);
            const uint64_t key = (uint64_t)w.z << 32 | w.x;
            best = key > best ? key : best;
        }
        a.out[row] = column_of(best);
    }
}

__global__ void __launch_bounds__(PICKS) keys_kernel(uint64_t *keys, tm_argmax_args a)
{
    wait_previous();
    start_next();
    const int row = (int)(blockIdx.x * PICKS + threadIdx.x);
    if (row < a.n_rows)
        keys[row] = key_of(a, row);
}

__global__ void __launch_bounds__(PICKS) unkey_kernel(const uint64_t *keys, tm_argmax_args a)
{
    wait_previous();
    start_next();
    const int row = (int)(blockIdx.x * PICKS + threadIdx.x);
    if (row < a.n_rows)
        a.out[row] = column_of(keys[row]);
}

dim3 pick_grid(const tm_argmax_args *a)
{
    return dim3((unsigned)((a->n_rows + PICKS - 1) / PICKS));
}

} /* namespace */

extern "C" cudaError_t tm_peer_meet_launch(const tm_peers *p, const tm_cuda_ctx *c)
{
    return launch_kernel(c, meet_kernel, dim3(1), 32, 0, *p);
}

extern "C" cudaError_t tm_peer_copy_launch(const tm_peer_copy *a, const tm_cuda_ctx *c)
{
    if (a->rows == 0 || a->cols <= 0)
        return cudaSuccess;
    const unsigned blocks = (unsigned)((a->cols + 2047) / 2048);
    return launch_kernel(c, copy_kernel, dim3(blocks, (unsigned)a->rows), 256, 0, *a);
}

extern "C" cudaError_t tm_peer_pick_launch(const tm_peers *p, const tm_argmax_args *a,
                                           const tm_cuda_ctx *c)
{
    if (a->n_rows == 0)
        return cudaSuccess;
    if ((size_t)a->n_rows * 16 > TM_PEER_PACKET_BYTES)
        return cudaErrorInvalidValue;
    return launch_kernel(c, pick_kernel, pick_grid(a), PICKS, 0, *p, *a);
}

extern "C" cudaError_t tm_peer_keys_launch(uint64_t *keys, const tm_argmax_args *a,
                                           const tm_cuda_ctx *c)
{
    return a->n_rows == 0 ? cudaSuccess
                          : launch_kernel(c, keys_kernel, pick_grid(a), PICKS, 0, keys, *a);
}

extern "C" cudaError_t tm_peer_unkey_launch(const uint64_t *keys, const tm_argmax_args *a,
                                            const tm_cuda_ctx *c)
{
    return a->n_rows == 0 ? cudaSuccess
                          : launch_kernel(c, unkey_kernel, pick_grid(a), PICKS, 0, keys, *a);
}
