/* Linear layers of few tokens: the weight is streamed once, at the speed of memory.
 *
 * A tile is 16 rows of W (gated: 8 gate rows and the 8 up rows that belong to them) on the M side of the tensor
 * core, the tokens are its N side, 8 at a time. The warps of a block share a tile and split K between them 32
 * columns at a time in turn, so a block reads each row in pieces of 512 neighbouring bytes. A lane owns 8
 * neighbouring k of two rows: two 16-byte loads feed two products, nothing goes through shared memory. DEPTH
 * such steps are under way per warp; they run on across the ends of tiles, and the first ones are asked for
 * before the kernel waits for the one in front of it, because weights depend on nothing.
 *
 * x of the block's slice of K lies in shared memory, [tokens][k] with rows an odd multiple of 64 bytes apart
 * (no bank conflicts). When it does not fit, K is cut into slices (grid y); the last block to finish a tile adds
 * the partial sums, in order, so that the result does not depend on timing.
 *
 * Bytes moved: N * K * 2 from memory, plus T * K * 2 per block from L2. An output depends on its row of x
 * alone, but which kernel computes it, and so its last bit, depends on T. */
#include "engine/backend/cuda/act.cuh"
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/mma.cuh"

namespace
{

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int DEPTH = 4;
constexpr int STEP = 32;                 /* k of one step of a warp */
constexpr size_t X_BYTES_MAX = 96 << 10; /* of one slice: two blocks per multiprocessor */

struct skinny_args {
    const void *w, *x;
    void *out;
    const float *bias;
    int n, k, tokens, ldx, ldo, tiles, stride; /* stride: of x in shared memory, elements */
    bool f32_out;
    tm_act_kind act;
    float *scratch;
    int *tickets;
};

/* The weights under way: DEPTH steps of rows g and g + 8 of the tile at the cursor. */
template <typename T, bool GATED> struct weight_stream {
    uint4 lo[DEPTH], hi[DEPTH];
    const T *row_lo, *row_hi;
    int tile, group;

    __device__ void seek(const skinny_args &a, int k0, int g, int t)
    {
        const T *w = static_cast<const T *>(a.w) + k0 + t * 8;
        int lo_row = min(GATED ? tile * 8 + g : tile * 16 + g, a.n - 1);
        int hi_row = GATED ? a.n + lo_row : min(tile * 16 + 8 + g, a.n - 1);
        row_lo = w + (size_t)lo_row * a.k;
        row_hi = w + (size_t)hi_row * a.k;
    }
    __device__ void load(const skinny_args &a, int i, int step, int steps)
    {
        if (tile < a.tiles && step < steps) {
            lo[i] = load_weights(row_lo + (size_t)step * STEP);
            hi[i] = load_weights(row_hi + (size_t)step * STEP);
        }
    }
};

template <typename T, int NT> __device__ void load_x(const skinny_args &a, T *xs, int k0, int steps)
{
    const int packs = steps * (STEP / 8);
    for (int i = threadIdx.x; i < packs * a.tokens; i += THREADS) {
        int row = i / packs, at = i % packs * 8;
        *reinterpret_cast<uint4 *>(xs + row * a.stride + at) = *reinterpret_cast<const uint4 *>(
            static_cast<const T *>(a.x) + (size_t)row * a.ldx + k0 + at);
    }
    __syncthreads();
}

template <typename T> __device__ void store_out(const skinny_args &a, int row, int token, float v)
{
    if (row >= a.n || token >= a.tokens)
        return;
    const size_t at = (size_t)token * a.ldo + row;
    if (a.bias)
        v += a.bias[row];
    if (a.f32_out)
        static_cast<float *>(a.out)[at] = v;
    else
        static_cast<T *>(a.out)[at] = from_f32<T>(v);
}

/* Sum over the warps of element e of the tile's accumulators, [NT][lane][4]. */
template <int NT> __device__ float sum_warps(const float *red, int e)
{
    float v = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        v += red[w * NT * 128 + e];
    return v;
}

/* True in the block that finished the tile last; then all partial sums are in scratch. */
template <int NT> __device__ bool share_partial(const skinny_args &a, const float *red, int tile)
{
    __shared__ bool last;
    float *mine = a.scratch + ((size_t)tile * gridDim.y + blockIdx.y) * (NT * 128);
    for (int e = threadIdx.x; e < NT * 128; e += THREADS)
        mine[e] = sum_warps<NT>(red, e);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(&a.tickets[tile], 1) == (int)gridDim.y - 1;
        if (last)
            a.tickets[tile] = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

template <typename T, int NT>
__device__ void finish_tile(const skinny_args &a, const float *red, int tile)
{
    const bool split = gridDim.y > 1;
    if (split && !share_partial<NT>(a, red, tile))
        return;
    for (int e = threadIdx.x; e < NT * 128; e += THREADS) {
        float v = 0.0f;
        if (split)
            for (int y = 0; y < (int)gridDim.y; y++)
                v += __ldcg(a.scratch + ((size_t)tile * gridDim.y + y) * (NT * 128) + e);
        else
            v = sum_warps<NT>(red, e);
        const int lane = e % 128 / 4, r = e % 4;
        store_out<T>(a, tile * 16 + lane / 4 + (r & 2) * 4, e / 128 * 8 + lane % 4 * 2 + (r & 1),
                     v);
    }
}

/* Rows g of the tile are gates, rows g + 8 what they multiply. */
template <typename T, int NT>
__device__ void finish_gated(const skinny_args &a, const float *red, int tile)
{
    for (int i = threadIdx.x; i < NT * 64; i += THREADS) {
        const int e = i / 2 * 4 + i % 2, lane = e % 128 / 4;
        float v = activate(sum_warps<NT>(red, e), a.act) * sum_warps<NT>(red, e + 2);
        store_out<T>(a, tile * 8 + lane / 4, e / 128 * 8 + lane % 4 * 2 + i % 2, v);
    }
}

template <typename T, int NT, bool GATED>
__global__ void __launch_bounds__(THREADS, NT == 1 ? 3 : 2) skinny_kernel(skinny_args a)
{
    extern __shared__ uint4 smem[];
    float *red = reinterpret_cast<float *>(smem); /* [2][WARPS][NT][32 lanes][4] */
    T *xs = reinterpret_cast<T *>(red + 2 * WARPS * NT * 128);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int all = a.k / STEP, s0 = all * (int)blockIdx.y / (int)gridDim.y;
    const int steps = all * (int)(blockIdx.y + 1) / (int)gridDim.y - s0;
    const int groups = (steps + WARPS * DEPTH - 1) / (WARPS * DEPTH);

    weight_stream<T, GATED> w;
    w.tile = blockIdx.x;
    w.group = 0;
    w.seek(a, s0 * STEP, g, t);
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        w.load(a, d, warp + WARPS * d, steps);
    start_next();
    wait_previous();
    load_x<T, NT>(a, xs, s0 * STEP, steps);

    int buffer = 0;
    for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
        float acc[NT][4] = {};
        for (int group = 0; group < groups; group++) {
            if (++w.group == groups) {
                w.group = 0;
                w.tile += gridDim.x;
                w.seek(a, s0 * STEP, g, t);
            }
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                const int s = warp + WARPS * (group * DEPTH + d);
                if (s < steps) {
#pragma unroll
                    for (int nt = 0; nt < NT; nt++) {
                        const int token = nt * 8 + g;
                        uint4 x = make_uint4(0, 0, 0, 0);
                        if (token < a.tokens)
                            x = *reinterpret_cast<const uint4 *>(xs + token * a.stride + s * STEP +
                                                                 t * 8);
                        mma<T>(acc[nt], w.lo[d].x, w.hi[d].x, w.lo[d].y, w.hi[d].y, x.x, x.y);
                        mma<T>(acc[nt], w.lo[d].z, w.hi[d].z, w.lo[d].w, w.hi[d].w, x.z, x.w);
                    }
                }
                w.load(a, d, warp + WARPS * (w.group * DEPTH + d), steps);
            }
        }
        float *mine = red + buffer * (WARPS * NT * 128);
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
            *reinterpret_cast<float4 *>(mine + (warp * NT + nt) * 128 + lane * 4) =
                make_float4(acc[nt][0], acc[nt][1], acc[nt][2], acc[nt][3]);
        __syncthreads();
        if (GATED)
            finish_gated<T, NT>(a, mine, tile);
        else
            finish_tile<T, NT>(a, mine, tile);
        buffer ^= 1; /* whoever writes this buffer again has passed the next barrier */
    }
}

struct shape {
    int nt, slices, stride;
    size_t smem;
};

shape shape_of(int k, int tokens)
{
    shape s;
    s.nt = tokens <= 8 ? 1 : tokens <= 16 ? 2 : 4;
    const size_t bytes = (size_t)tokens * k * 2;
    s.slices = (int)((bytes + X_BYTES_MAX - 1) / X_BYTES_MAX);
    const int steps = (k / STEP + s.slices - 1) / s.slices;
    s.stride = (steps | 1) * STEP;
    s.smem = (size_t)2 * WARPS * s.nt * 128 * sizeof(float) + (size_t)tokens * s.stride * 2;
    return s;
}

template <typename T, int NT>
cudaError_t launch(const skinny_args &a, const shape &s, bool gated, const tm_cuda_ctx *c)
{
    const int per_sm = s.smem < (72u << 10) ? 3 : 2;
    const int wide = max(c->sms * (NT == 1 ? per_sm : 2) / s.slices, 1);
    dim3 grid((unsigned)min(wide, a.tiles), (unsigned)s.slices);
    if (gated)
        return launch_kernel(c, skinny_kernel<T, NT, true>, grid, THREADS, s.smem, a);
    return launch_kernel(c, skinny_kernel<T, NT, false>, grid, THREADS, s.smem, a);
}

template <typename T>
cudaError_t launch_tokens(const skinny_args &a, const shape &s, bool gated, const tm_cuda_ctx *c)
{
    switch (s.nt) {
    case 1:
        return launch<T, 1>(a, s, gated, c);
    case 2:
        return launch<T, 2>(a, s, gated, c);
    default:
        return launch<T, 4>(a, s, gated, c);
    }
}

cudaError_t launch_any(skinny_args a, bool gated, const tm_cuda_ctx *c)
{
    const shape s = shape_of(a.k, a.tokens);
    a.stride = s.stride;
    a.scratch = c->scratch;
    a.tickets = c->tickets;
    return c->act == TM_DTYPE_BF16 ? launch_tokens<__nv_bfloat16>(a, s, gated, c)
                                   : launch_tokens<__half>(a, s, gated, c);
}

} /* namespace */

extern "C" bool tm_cuda_skinny_fits(const tm_weight *w, int n_tokens, int ldx, const tm_cuda_ctx *c)
{
    if (w->dtype != c->act || w->k % STEP != 0 || ldx % 8 != 0 || n_tokens > TM_CUDA_SKINNY_MAX)
        return false;
    const shape s = shape_of(w->k, n_tokens);
    const size_t tiles = ((size_t)w->n + 15) / 16;
    return s.slices == 1 ||
           (tiles <= TM_CUDA_TICKETS &&
            tiles * s.slices * s.nt * 128 * sizeof(float) <= TM_CUDA_SCRATCH_BYTES);
}

extern "C" cudaError_t tm_cuda_skinny_launch(const tm_linear_args *a, const tm_cuda_ctx *c)
{
    skinny_args s = {};
    s.w = a->w->data;
    s.x = a->x;
    s.out = a->out;
    s.bias = a->w->bias;
    s.n = a->w->n;
    s.k = a->w->k;
    s.tokens = a->n_tokens;
    s.ldx = a->ldx;
    s.ldo = a->ldo;
    s.tiles = (s.n + 15) / 16;
    s.f32_out = a->f32_out;
    return launch_any(s, false, c);
}

extern "C" bool tm_cuda_skinny_gated_fits(const tm_linear_gated_args *a, const tm_cuda_ctx *c)
{
    return !a->w->bias && tm_cuda_skinny_fits(a->w, a->n_tokens, a->ldx, c) &&
           shape_of(a->w->k, a->n_tokens).slices == 1;
}

extern "C" cudaError_t tm_cuda_skinny_gated_launch(const tm_linear_gated_args *a,
                                                   const tm_cuda_ctx *c)
{
    skinny_args s = {};
    s.w = a->w->data;
    s.x = a->x;
    s.out = a->out;
    s.n = a->w->n / 2;
    s.k = a->w->k;
    s.tokens = a->n_tokens;
    s.ldx = a->ldx;
    s.ldo = s.n;
    s.tiles = (s.n + 7) / 8;
    s.act = a->act;
    return launch_any(s, true, c);
}
