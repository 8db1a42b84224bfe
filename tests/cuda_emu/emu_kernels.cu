/* See emu_kernels.h. The mistakes are made on purpose. */
#include "tests/cuda_emu/emu_kernels.h"

#include "engine/backend/cuda/hopper.cuh"
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/mma.cuh"

namespace
{

__global__ void mistake_kernel(int *out, emu_mistake mode)
{
    SHARED(int[64], slots);
    const int i = threadIdx.x;
    float c[4] = {};
    if (mode != EMU_NO_WAIT)
        wait_previous();
    slots[i] = i;
    if (mode == EMU_BARRIER_AFTER_END && i == 7)
        return;
    if (mode == EMU_TWO_BARRIERS && i < 32)
        __syncthreads();
    else if (mode != EMU_BARRIER_SKIPPED || i != 3)
        __syncthreads();
    if (mode == EMU_SHUFFLE_MISSING && i == 40)
        __syncthreads();
    int v = __shfl_xor_sync(mode == EMU_SHUFFLE_MASKS && i == 5    ? 0xffu
                            : mode == EMU_SHUFFLE_NOT_IN && i == 5 ? 1u
                                                                   : 0xffffffffu,
                            slots[i], 1);
    if (mode == EMU_MMA_HALF && i % 32 < 16)
        return;
    mma<__half>(c, 0, 0, 0, 0, 0, 0);
    if (mode == EMU_MISALIGNED)
        load_weights(*reinterpret_cast<uint4 *>(slots), reinterpret_cast<char *>(out) + 2, true);
    if (mode == EMU_TRAP && i == 9)
        __trap();
    out[i] = v + (int)c[0];
}

/* Every block gets a number from each of its cluster, twice. */
__global__ void cluster_kernel(float *out, emu_cluster mode)
{
    SHARED(float[2][8], slots);
    const int i = threadIdx.x, size = cluster_size(), rank = cluster_rank();
    cluster_arrive();
    wait_previous();
    if (mode != EMU_CLUSTER_UNBEGUN)
        cluster_wait();
    for (int k = 0; k < 2; k++) {
        if (i < size)
            store_cluster(&slots[mode == EMU_CLUSTER_RACE ? 0 : k][rank], i, (float)(blockIdx.x + 1000 * k));
        cluster_arrive();
        cluster_wait();
        if (i < size)
            out[((size_t)blockIdx.x * 2 + k) * size + i] = slots[mode == EMU_CLUSTER_RACE ? 0 : k][size - 1 - i];
    }
}

/* Every block gets four numbers from each of its cluster, twice by the same barrier. */
__global__ void sends_kernel(float4 *out, emu_sends mode)
{
    SHARED(float4[2][16], slots);
    SHARED(uint64_t[1], sent);
    const int i = threadIdx.x, size = cluster_size(), rank = cluster_rank();
    const bool made = mode != EMU_SENDS_UNMADE || rank != 1;
    if (i == 0 && made) {
        barrier_init(sent, 1);
        barriers_made();
    }
    cluster_arrive();
    wait_previous();
    if (mode != EMU_SENDS_UNBEGUN)
        cluster_wait();
    for (int k = 0; k < 2; k++) {
        if (i == 0 && made)
            barrier_expect(sent, 16 * size); /* the first may have come already */
        if (i < size) {
            const float4 v = make_float4((float)blockIdx.x, (float)i, (float)k, -(float)blockIdx.x);
            char *to = reinterpret_cast<char *>(&slots[k][rank]) + (mode == EMU_SENDS_AT) * 8;
            send_cluster(reinterpret_cast<float4 *>(to), i, v, sent);
        }
        if (mode != EMU_SENDS_EARLY)
            barrier_wait(sent, k);
        else
            __syncthreads();
        if (i < size)
            out[((size_t)blockIdx.x * 2 + k) * size + i] = slots[k][i];
        if (k == 0 || mode == EMU_SENDS_EARLY) { /* nothing of round 1 may count for round 0 */
            cluster_arrive();
            cluster_wait();
        }
    }
}

__global__ void rows_kernel(uint32_t *out, const char *from, int rows, int bytes, int pitch,
                            emu_rows mode)
{
    DYNAMIC_SHARED(char, to);
    SHARED(uint64_t[1], full);
    const int t = threadIdx.x, apart = bytes + 16;
    wait_previous();
    if (t == 0) {
        barrier_init(full, 1);
        barriers_made();
        barrier_expect(full, rows * bytes + (mode == EMU_ROWS_BYTES));
    }
    __syncthreads();
    for (int r = t; r < rows; r += blockDim.x)
        row_load(to + r * apart + (mode == EMU_ROWS_TO) * 8,
                 from + r * pitch + (mode == EMU_ROWS_FROM) * 8,
                 mode == EMU_ROWS_NONE ? 0 : bytes - (mode == EMU_ROWS_SIZE) * 8, full);
    if (mode == EMU_ROWS_EARLY)
        __syncthreads();
    else if (mode != EMU_ROWS_RACE)
        barrier_wait(full, 0);
    for (int i = t; i < rows * apart / 4; i += blockDim.x)
        out[i] = reinterpret_cast<const uint32_t *>(to)[i];
}

__global__ void exchange_kernel(uint32_t *out, const uint32_t *in)
{
    const int i = threadIdx.x, lane = i % 32;
    const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u, mine = in[i];
    wait_previous();
    out[i * 6] = __shfl_sync(0xffffffffu, mine, 5);
    out[i * 6 + 1] = __shfl_xor_sync(half, mine, 3, 16);
    out[i * 6 + 2] = __shfl_up_sync(0xffffffffu, mine, 2) + __shfl_down_sync(0xffffffffu, mine, 7, 8);
    out[i * 6 + 3] = __ballot_sync(half, mine & 1);
    out[i * 6 + 4] = __reduce_max_sync(half, mine) ^ (unsigned)__reduce_min_sync(0xffffffffu, (int)mine);
    out[i * 6 + 5] = (unsigned)__syncthreads_count(mine & 1);
}

template <typename T> __global__ void product_kernel(float *out, const uint16_t *a, const uint16_t *b, bool loads)
{
    SHARED(uint16_t[16][24], as);
    SHARED(uint16_t[16][24], bs); /* [k][n] */
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4 * 2;
    uint32_t x[4], y[4];
    float c[4] = {};
    wait_previous();
    for (int i = lane; i < 256; i += 32)
        as[i / 16][i % 16] = a[i];
    for (int i = lane; i < 128; i += 32)
        bs[i % 16][i / 16] = b[i];
    __syncwarp();
    if (loads) {
        load_matrix(x, &as[lane % 16][lane / 16 * 8]);
        load_matrix_trans(y, &bs[lane % 16][0]);
    } else {
        for (int r = 0; r < 4; r++)
            memcpy(&x[r], &a[(g + r % 2 * 8) * 16 + t + r / 2 * 8], 4);
        for (int r = 0; r < 2; r++)
            memcpy(&y[r], &b[g * 16 + t + r * 8], 4);
    }
    mma<T>(c, x[0], x[1], x[2], x[3], y[0], y[1]);
    for (int e = 0; e < 4; e++)
        out[(g + e / 2 * 8) * 8 + t + e % 2] = c[e];
}

__global__ void transpose_kernel(uint16_t *out, const uint16_t *in)
{
    uint32_t v;
    wait_previous();
    memcpy(&v, in + threadIdx.x * 2, 4);
    v = transpose8(v);
    memcpy(out + threadIdx.x * 2, &v, 4);
}

__global__ void copies_kernel(uint32_t *out, const uint32_t *in, int waits)
{
    SHARED(uint4[3], to);
    wait_previous();
    for (int i = 0; i < 3; i++) {
        copy_async(&to[i], in + i * 4, i != 1);
        copy_commit();
    }
    if (waits == 1)
        copy_wait<2>();
    if (waits == 2)
        copy_wait<1>();
    if (waits == 3)
        copy_wait<0>();
    memcpy(out, to, sizeof(to));
}

__device__ int look(const int *p)
{
    return __ldcv(p);
}

__global__ void turns_kernel(int *turn, int *order)
{
    wait_previous();
    const int behind = gridDim.x - 1 - blockIdx.x;
    while (look(turn) != behind) {
    }
    order[behind] = blockIdx.x;
    __threadfence();
    atomicAdd(turn, 1);
}

__global__ void ping_kernel(int *mine, int *theirs, int rounds)
{
    wait_previous();
    for (int i = 0; i < rounds; i++) {
        const int now = atomicAdd(mine, 1) + 1;
        while (look(theirs) < now) {
        }
    }
}

__global__ void poke_kernel(int *p, int i, int v)
{
    wait_previous();
    p[i] = v;
}

__global__ void copy_int_kernel(int *p, const int *from)
{
    wait_previous();
    *p = *from;
}

__global__ void shared_kernel(uint32_t *out, bool dynamic)
{
    SHARED(uint32_t[8], fixed);
    wait_previous();
    out[0] = fixed[0];
    if (dynamic) {
        DYNAMIC_SHARED(uint32_t, more);
        out[1] = more[0];
    }
}

__global__ void race_kernel(int *out, bool safe)
{
    SHARED(int[128], slots);
    wait_previous();
    const int i = threadIdx.x;
    slots[i] = i;
    __syncwarp();
    if (safe)
        __syncthreads();
    out[i] = slots[blockDim.x - 1 - i];
}

template <typename T>
__global__ void convert_kernel(float *wide, uint16_t *back, const float *from, uint16_t *rounded, int n)
{
    wait_previous();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    T v = emu_bits<T>((uint16_t)i);
    wide[i] = to_f32(v);
    back[i] = emu_bits<uint16_t>(from_f32<T>(to_f32(v)));
    if (i < n)
        rounded[i] = emu_bits<uint16_t>(from_f32<T>(from[i]));
}

struct tiles_args {
    CUtensorMap a, b;
    float *scores, *sums;
    const uint32_t *pairs; /* a, two numbers at once */
};

__global__ void tiles_kernel(const __grid_constant__ tiles_args x, emu_tiles mode)
{
    constexpr int TILE = 64 * 128;
    DYNAMIC_SHARED(char, tiles);
    SHARED(uint64_t[1], full);
    const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4, pair = t % 4;
    wait_previous();
    if (t == 0) {
        barrier_init(full, 1);
        barriers_made();
    }
    __syncthreads();
    if (t == 0) {
        barrier_expect(full, 3 * TILE + (mode == EMU_TILES_BYTES));
        tile_load(tiles, &x.a, 0, 0, full);
        tile_load(tiles + TILE, &x.b, 0, 0, full);
        tile_load(tiles + 2 * TILE, &x.b, 0, 64, full);
    }
    barrier_wait(full, 0);
    __syncthreads();
    if (t == 7) /* what is there already: piece 0 of row 0 is at its place */
        *reinterpret_cast<volatile uint32_t *>(tiles) = x.pairs[0];
    if (mode != EMU_TILES_FENCE)
        fence_async();
    if (mode != EMU_TILES_RACE)
        __syncthreads();

    float scores[64], sums[32] = {};
    uint32_t part[4];
    for (int i = 0; i < 4; i++)
        part[i] = x.pairs[(row + i % 2 * 8) * 32 + pair + i / 2 * 4];
    if (mode != EMU_TILES_BEGIN)
        products_begin();
    for (int k = 0; k < 4; k++) {
        const uint64_t a = operand_at(tile_operand(tiles, 16), 32 * k),
                       b = operand_at(tile_operand(tiles + TILE, 16), 32 * k);
        if (k == 0)
            product_shared<__nv_bfloat16, false>(scores, a, b);
        else
            product_shared<__nv_bfloat16, true>(scores, a, b);
    }
    products_commit();
    product_registers<__nv_bfloat16>(sums, part, tile_operand(tiles + TILE, 2 * TILE));
    products_commit();
    products_wait<1>(scores);
    if (mode == EMU_TILES_CHANGED)
        part[2]++;
    if (mode != EMU_TILES_EARLY)
        products_wait<0>(sums);
    for (int i = 0; i < 64; i++)
        x.scores[(row + i / 2 % 2 * 8) * 128 + i / 4 * 8 + pair * 2 + i % 2] = scores[i];
    for (int i = 0; i < 32; i++)
        x.sums[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + pair * 2 + i % 2] = sums[i];
}

} /* namespace */

const char *const emu_tiles_says[EMU_TILES_MODES] = {
    [EMU_TILES_RIGHT] = "",
    [EMU_TILES_EARLY] = "",
    [EMU_TILES_FENCE] = "with no fence_async behind it",
    [EMU_TILES_BEGIN] = "without products_begin",
    [EMU_TILES_CHANGED] = "has changed registers",
    [EMU_TILES_BYTES] = "0 arrivals and 1 bytes to come",
    [EMU_TILES_RACE] = "with no barrier between",
};

static cudaError_t make_map(CUtensorMap *map, const uint16_t *p, int rows)
{
    const cuuint64_t size[2] = {64, (cuuint64_t)rows}, pitch[1] = {128};
    const cuuint32_t box[2] = {64, 64}, step[2] = {1, 1};
    return cuTensorMapEncodeTiled(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                                  const_cast<uint16_t *>(p), size, pitch, box, step,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS
               ? cudaSuccess
               : cudaErrorInvalidValue;
}

cudaError_t emu_tiles_launch(float *scores, float *sums, const uint16_t *a, const uint16_t *b,
                             emu_tiles mode, const tm_cuda_ctx *c)
{
    tiles_args x = {};
    x.scores = scores;
    x.sums = sums;
    x.pairs = reinterpret_cast<const uint32_t *>(a);
    cudaError_t e = make_map(&x.a, a, 64);
    if (e == cudaSuccess)
        e = make_map(&x.b, b, 128);
    return e ? e : launch_kernel(c, tiles_kernel, dim3(1), 128, 3 * 64 * 128, x, mode);
}

const char *const emu_sends_says[EMU_SENDS_MODES] = {
    [EMU_SENDS_RIGHT] = "",
    [EMU_SENDS_EARLY] = "",
    [EMU_SENDS_UNBEGUN] = "has not begun",
    [EMU_SENDS_UNMADE] = "that nobody made",
    [EMU_SENDS_AT] = "is not a multiple",
};

cudaError_t emu_sends_launch(float *out, int clusters, int size, emu_sends mode,
                             const tm_cuda_ctx *c)
{
    const cudaError_t e =
        cudaFuncSetAttribute(sends_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return e ? e
             : launch_clusters(c, sends_kernel, dim3((unsigned)(clusters * size)), 64, size,
                               reinterpret_cast<float4 *>(out), mode);
}

const char *const emu_rows_says[EMU_ROWS_MODES] = {
    [EMU_ROWS_RIGHT] = "",
    [EMU_ROWS_EARLY] = "",
    [EMU_ROWS_BYTES] = "0 arrivals and 1 bytes to come",
    [EMU_ROWS_FROM] = "is not a multiple",
    [EMU_ROWS_TO] = "is not a multiple",
    [EMU_ROWS_SIZE] = "loads 72 bytes",
    [EMU_ROWS_NONE] = "loads 0 bytes",
    [EMU_ROWS_RACE] = "with no barrier between",
};

cudaError_t emu_rows_launch(uint32_t *out, const void *from, int rows, int bytes, int pitch,
                            emu_rows mode, const tm_cuda_ctx *c)
{
    return launch_kernel(c, rows_kernel, dim3(1), 64, (size_t)(rows * (bytes + 16)), out,
                         static_cast<const char *>(from), rows, bytes, pitch, mode);
}

const char *const emu_mistake_says[EMU_MISTAKES] = {
    [EMU_NO_MISTAKE] = "",
    [EMU_BARRIER_SKIPPED] = "threads that do not come",
    [EMU_BARRIER_AFTER_END] = "1 of 64 threads have ended before",
    [EMU_TWO_BARRIERS] = "while others wait at another barrier",
    [EMU_SHUFFLE_MISSING] = "lanes 0xfffffeff of warp 1 wait at __shfl_xor_sync",
    [EMU_SHUFFLE_MASKS] = "lanes 0x20 of warp 0 wait at __shfl_xor_sync",
    [EMU_SHUFFLE_NOT_IN] = "does not have its own lane",
    [EMU_MMA_HALF] = "takes a whole warp",
    [EMU_MISALIGNED] = "is not a multiple",
    [EMU_NO_WAIT] = "without wait_previous",
    [EMU_TRAP] = "executes __trap",
};

cudaError_t emu_mistake_launch(int *out, emu_mistake mode, const tm_cuda_ctx *c)
{
    return launch_kernel(c, mistake_kernel, dim3(1), 64, 0, out, mode);
}

cudaError_t emu_exchange_launch(uint32_t *out, const uint32_t *in, int threads, const tm_cuda_ctx *c)
{
    return launch_kernel(c, exchange_kernel, dim3(1), threads, 0, out, in);
}

cudaError_t emu_product_launch(float *out, const uint16_t *a, const uint16_t *b, bool f16, bool loads,
                               const tm_cuda_ctx *ctx)
{
    return launch_kernel(ctx, f16 ? product_kernel<__half> : product_kernel<__nv_bfloat16>, dim3(1), 32, 0, out, a, b,
                         loads);
}

cudaError_t emu_transpose_launch(uint16_t *out, const uint16_t *in, const tm_cuda_ctx *c)
{
    return launch_kernel(c, transpose_kernel, dim3(1), 32, 0, out, in);
}

cudaError_t emu_copies_launch(uint32_t *out, const uint32_t *in, int waits, const tm_cuda_ctx *c)
{
    return launch_kernel(c, copies_kernel, dim3(1), 1, 0, out, in, waits);
}

cudaError_t emu_turns_launch(int *turn, int *order, int blocks, const tm_cuda_ctx *c)
{
    return launch_kernel(c, turns_kernel, dim3((unsigned)blocks), 1, 0, turn, order);
}

cudaError_t emu_ping_launch(int *mine, int *theirs, int rounds, const tm_cuda_ctx *c)
{
    return launch_kernel(c, ping_kernel, dim3(1), 1, 0, mine, theirs, rounds);
}

cudaError_t emu_poke_launch(int *p, int i, int v, const tm_cuda_ctx *c)
{
    return launch_kernel(c, poke_kernel, dim3(1), 1, 0, p, i, v);
}

cudaError_t emu_copy_int_launch(int *p, const int *from, const tm_cuda_ctx *c)
{
    return launch_kernel(c, copy_int_kernel, dim3(1), 1, 0, p, from);
}

cudaError_t emu_shared_launch(uint32_t *out, size_t smem, const tm_cuda_ctx *c)
{
    return launch_kernel(c, shared_kernel, dim3(1), 1, smem, out, smem > 0);
}

cudaError_t emu_race_launch(int *out, int threads, bool safe, const tm_cuda_ctx *c)
{
    return launch_kernel(c, race_kernel, dim3(1), threads, 0, out, safe);
}

cudaError_t emu_cluster_launch(float *out, int clusters, int size, emu_cluster mode, const tm_cuda_ctx *c)
{
    return launch_clusters(c, cluster_kernel, dim3((unsigned)(clusters * size)), 64, size, out, mode);
}

cudaError_t emu_convert_launch(float *wide, uint16_t *back, const float *from, uint16_t *rounded, int n, bool f16,
                               const tm_cuda_ctx *c)
{
    return launch_kernel(c, f16 ? convert_kernel<__half> : convert_kernel<__nv_bfloat16>, dim3(256), 256, 0, wide, back,
                         from, rounded, n);
}
