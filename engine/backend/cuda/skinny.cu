/* Linear layers of few tokens: the weight is streamed once, at the speed of memory.
 *
 * A tile is 16 rows of W (gated: 8 gate rows and the 8 up rows that belong to them) on the M side of the tensor
 * core, the tokens, up to 8, are its N side. There is one block per multiprocessor, and tiles go round. The
 * warps of a block share a tile and split K between them 64 columns at a time in turn, so a warp reads whole
 * 128-byte lines and a block 2 KiB of each row. A lane owns 8 neighbouring k of two rows: two 16-byte loads feed two
 * products, weights do not go through shared memory. DEPTH steps of 2 KiB are under way per warp; they run on
 * across the ends of tiles.
 *
 * Weights depend on nothing, so before the kernel waits for the one in front of it, it asks for its first steps, and
 * has the rest of its first AHEAD_BYTES brought to L2. A block takes more than half of the registers, so that two
 * of a kernel never share a multiprocessor while another has none, and few enough that a block of the attention
 * fits beside it.
 *
 * x lies in shared memory, [tokens][k] with rows an odd multiple of 64 bytes apart (no bank conflicts). Shapes whose x
 * does not fit are left to cuBLASLt, which reaches the same speed from some 8 tokens on (bench/kernels).
 *
 * Bytes moved: N * K * 2 from memory, plus T * K * 2 per block from L2. An output depends on its row of x
 * alone, but which kernel computes it, and so its last bit, depends on T. */
#include "engine/backend/cuda/act.cuh"
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/mma.cuh"
#include "engine/backend/cuda/skinny.cuh"

namespace
{

/* Up to here every block computing the norm beats a kernel of its own. */
constexpr int NORM_TOKENS = 2;
constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int DEPTH = 3;
constexpr int STEP = 64; /* k of one step of a warp */
constexpr int STEP_BYTES = 16 * STEP * 2;
constexpr size_t X_BYTES_MAX = 160 << 10;
constexpr int TOKENS_MAX = 8;
constexpr int AHEAD_BYTES = 128 << 10; /* of a block: 17 MB of L2 in all */

/* The weights under way: DEPTH steps of rows g and g + 8, two halves of 32 k each, and the place of the next step. */
template <typename T, bool GATED> struct weight_stream {
    uint4 lo[DEPTH][2], hi[DEPTH][2];
    const T *row_lo;
    size_t apart; /* of the two rows, numbers */
    int tile, step;

    __device__ __forceinline__ void seek(const skinny_args &a)
    {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const int lo_row = min(GATED ? tile * 8 + g : tile * 16 + g, a.n - 1);
        const int hi_row = GATED ? a.n + lo_row : min(tile * 16 + 8 + g, a.n - 1);
        row_lo = static_cast<const T *>(a.w) + t * 8 + (size_t)lo_row * a.k;
        apart = (size_t)(hi_row - lo_row) * a.k;
    }
    /* The next step of this warp into place i; steps behind the row's end are left out by every warp alike. */
    __device__ __forceinline__ void load(const skinny_args &a, int i)
    {
        const bool valid = tile < a.tiles && step < a.k / STEP;
        const T *p = row_lo + (size_t)step * STEP;
        load_weights(lo[i][0], p, valid);
        load_weights(hi[i][0], p + apart, valid);
        load_weights(lo[i][1], p + 32, valid);
        load_weights(hi[i][1], p + apart + 32, valid);
        step += WARPS;
        if (step - (int)threadIdx.x / 32 >= a.k / STEP) {
            step = threadIdx.x / 32;
            tile += gridDim.x;
            seek(a);
        }
    }
    /* The tile's rows into L2: two lanes of a quad take a row each, 128 bytes (64 k) a step. */
    __device__ __forceinline__ void prefetch(int steps) const
    {
        const int t = threadIdx.x % 4;
        const T *p = row_lo - t * 8 + (t == 1 ? apart : 0);
        if (t < 2)
            for (int s = threadIdx.x / 32; s < steps; s += WARPS)
                prefetch_l2(p + (size_t)s * STEP);
    }
};

/* The block's first tiles, as far as AHEAD_BYTES go. */
template <typename T, bool GATED>
__device__ __forceinline__ void prefetch_ahead(const skinny_args &a)
{
    weight_stream<T, GATED> w;
    const int steps = a.k / STEP;
    w.tile = blockIdx.x;
    for (int bytes = 0; bytes < AHEAD_BYTES && w.tile < a.tiles; bytes += steps * STEP_BYTES) {
        w.seek(a);
        w.prefetch(min(steps, (AHEAD_BYTES - bytes) / STEP_BYTES));
        w.tile += gridDim.x;
    }
}

template <typename T> __device__ void load_x(const skinny_args &a, T *xs)
{
    for (int row = 0; row < a.tokens; row++) {
        const T *from = static_cast<const T *>(a.x) + (size_t)row * a.ldx;
        for (int i = threadIdx.x * 8; i < a.k; i += THREADS * 8)
            copy_async(xs + row * a.stride + i, from + i, true);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
}

/* The same, as the RMS norm of residual + delta. The sum is rounded before it is normalised and what is normalised is
 * rounded again, as the norm operator does. */
template <typename T> __device__ void load_normed(const skinny_args &a, T *xs)
{
    SHARED(float[NORM_TOKENS][WARPS], sums);
    const int packs = a.k / 8, warp = threadIdx.x / 32;
    for (int row = 0; row < a.tokens; row++) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < packs; i += THREADS) {
            const size_t at = (size_t)row * packs + i;
            pack<T, 8> r = load_pack<T, 8>(a.residual, at);
            if (a.delta) {
                pack<T, 8> d = load_pack<T, 8>(a.delta, at);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    r.e[j] = from_f32<T>(to_f32(r.e[j]) + to_f32(d.e[j]));
                if (blockIdx.x == 0)
                    store_pack<T, 8>(a.residual_out, at, r);
            }
            store_pack<T, 8>(xs + row * a.stride, i, r);
#pragma unroll
            for (int j = 0; j < 8; j++)
                sum += to_f32(r.e[j]) * to_f32(r.e[j]);
        }
        for (int i = 16; i > 0; i >>= 1)
            sum += __shfl_xor_sync(0xffffffffu, sum, i);
        if (threadIdx.x % 32 == 0)
            sums[row][warp] = sum;
    }
    __syncthreads();
    for (int row = 0; row < a.tokens; row++) {
        float sum = 0.0f;
        for (int i = 0; i < WARPS; i++)
            sum += sums[row][i];
        const float inv = rsqrtf(sum / a.k + a.eps);
        for (int i = threadIdx.x; i < packs; i += THREADS) {
            pack<T, 8> r = load_pack<T, 8>(xs + row * a.stride, i);
#pragma unroll
            for (int j = 0; j < 8; j++)
                r.e[j] = from_f32<T>(to_f32(r.e[j]) * inv * (a.one + a.norm_w[i * 8 + j]));
            store_pack<T, 8>(xs + row * a.stride, i, r);
        }
    }
    __syncthreads();
}

/* The warps' sums of a tile come together in red; acc starts anew. */
template <typename T, bool GATED>
__device__ __forceinline__ void finish(const skinny_args &a, float *red, int tile, float (&acc)[4])
{
    *reinterpret_cast<float4 *>(red + threadIdx.x * 4) =
        make_float4(acc[0], acc[1], acc[2], acc[3]);
    acc[0] = acc[1] = acc[2] = acc[3] = 0.0f;
    __syncthreads();
    finish_tile<T, WARPS, GATED>(a, red, tile);
}

/* One step: 64 k of the tile against all tokens. */
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], const uint4 (&lo)[2],
                                         const uint4 (&hi)[2], const T *xs, bool token)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (token)
            x = *reinterpret_cast<const uint4 *>(xs + h * 32);
        mma<T>(acc, lo[h].x, hi[h].x, lo[h].y, hi[h].y, x.x, x.y);
        mma<T>(acc, lo[h].z, hi[h].z, lo[h].w, hi[h].w, x.z, x.w);
    }
}

template <typename T, bool GATED> __global__ void __maxnreg__(88) skinny_kernel(skinny_args a)
{
    DYNAMIC_SHARED(uint4, smem);
    float *red = reinterpret_cast<float *>(smem); /* [2][WARPS][32 lanes][4] */
    T *xs = reinterpret_cast<T *>(red + 2 * WARPS * 128);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int steps = a.k / STEP, rounds = (steps + WARPS - 1) / WARPS;

    weight_stream<T, GATED> w;
    w.tile = blockIdx.x;
    w.step = warp;
    w.seek(a);
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        w.load(a, d);
    prefetch_ahead<T, GATED>(a);
    if (a.norm_w && threadIdx.x < a.k / 32) /* lines of 32 weights */
        prefetch_l2(a.norm_w + threadIdx.x * 32);
    start_next();
    wait_previous();
    if (a.norm_w)
        load_normed<T>(a, xs);
    else
        load_x<T>(a, xs);

    const T *mine = xs + g * a.stride + t * 8;
    float acc[4] = {};
    int tile = blockIdx.x, round = 0, buffer = 0;
    while (tile < a.tiles) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const int s = round * WARPS + warp;
            if (s < steps && tile < a.tiles)
                multiply<T>(acc, w.lo[d], w.hi[d], mine + s * STEP, g < a.tokens);
            w.load(a, d);
            if (++round < rounds)
                continue;
            if (tile < a.tiles)
                finish<T, GATED>(a, red + buffer * (WARPS * 128), tile, acc);
            buffer ^= 1; /* whoever writes this buffer again has passed the next barrier */
            round = 0;
            tile += gridDim.x;
        }
    }
}

/* Numbers from row to row of x in shared memory: an odd multiple of 64 bytes. */
int skinny_stride(int k)
{
    return k + 32;
}

size_t x_bytes(int k, int tokens)
{
    return (size_t)tokens * skinny_stride(k) * 2;
}

cudaError_t launch_any(skinny_args a, bool gated, const tm_cuda_ctx *c)
{
    if (tm_cuda_skinny_ring_fits(a, c))
        return tm_cuda_skinny_ring_launch(a, gated, c);
    const size_t smem = 2 * WARPS * 128 * sizeof(float) + x_bytes(a.k, a.tokens);
    const dim3 grid((unsigned)min(c->sms, a.tiles));
    a.stride = skinny_stride(a.k);
    if (c->act == TM_DTYPE_BF16)
        return launch_kernel(
            c, gated ? skinny_kernel<__nv_bfloat16, true> : skinny_kernel<__nv_bfloat16, false>,
            grid, THREADS, smem, a);
    return launch_kernel(c, gated ? skinny_kernel<__half, true> : skinny_kernel<__half, false>,
                         grid, THREADS, smem, a);
}

} /* namespace */

extern "C" bool tm_cuda_skinny_fits(const tm_weight *w, int n_tokens, int ldx, const tm_cuda_ctx *c)
{
    return w->dtype == c->act && w->k % STEP == 0 && ldx % 8 == 0 && n_tokens <= TOKENS_MAX &&
           x_bytes(w->k, n_tokens) <= X_BYTES_MAX;
}

static skinny_args linear_args_of(const tm_linear_args *a)
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
    return s;
}

static skinny_args gated_args_of(const tm_linear_gated_args *a)
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
    return s;
}

static void set_norm(skinny_args *s, const tm_norm_args *n)
{
    s->residual = n->residual;
    s->delta = n->delta;
    s->residual_out = n->residual_out;
    s->norm_w = n->w;
    s->eps = n->eps;
    s->one = n->add_one ? 1.0f : 0.0f;
}

extern "C" cudaError_t tm_cuda_skinny_launch(const tm_linear_args *a, const tm_norm_args *n,
                                             const tm_cuda_ctx *c)
{
    skinny_args s = linear_args_of(a);
    if (n)
        set_norm(&s, n);
    return launch_any(s, false, c);
}

extern "C" bool tm_cuda_skinny_norm_fits(const tm_norm_args *n, const tm_weight *w)
{
    return n->kind == TM_NORM_RMS && !n->b && n->w && n->n_tokens <= NORM_TOKENS && n->h == w->k &&
           (!n->delta || (n->residual_out && n->residual_out != n->residual));
}

extern "C" bool tm_cuda_skinny_gated_fits(const tm_linear_gated_args *a, const tm_cuda_ctx *c)
{
    return !a->w->bias && tm_cuda_skinny_fits(a->w, a->n_tokens, a->ldx, c);
}

extern "C" cudaError_t tm_cuda_skinny_gated_launch(const tm_linear_gated_args *a,
                                                   const tm_norm_args *n, const tm_cuda_ctx *c)
{
    skinny_args s = gated_args_of(a);
    if (n)
        set_norm(&s, n);
    return launch_any(s, true, c);
}
