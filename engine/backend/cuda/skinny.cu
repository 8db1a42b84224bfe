/* Linear layers of few tokens: the weight is streamed once, at the speed of memory.
 *
 * A tile is 16 rows of W (gated: 8 gate rows and the 8 up rows that belong to them) on the M side of the tensor
 * core, the tokens, up to 8, are its N side. There is one block per multiprocessor. The warps of a block share a
 * tile and split K between them 64 columns at a time in turn, so a warp reads whole 128-byte lines and a block 2 KiB of
 * each row. A lane owns 8 neighbouring k of two rows: two 16-byte loads feed two products, weights do not go through
 * shared memory (copies to it, by threads or by the copy engine, reach three quarters of this). DEPTH steps of 2 KiB are under
 * way per warp; they run on across the ends of tiles.
 *
 * Multiprocessors differ in speed by a tenth, so tiles are not dealt out: a block takes the one after its next as it begins
 * one. Where rows are long, a tile has half as many, and both halves of K are rows of the tensor core beside each other, each
 * with columns of its own (PARTS = 2): smaller tiles end more evenly. Which block computes a tile changes nothing in it.
 *
 * Weights depend on nothing, so before the kernel waits for the one in front of it, it asks for its first steps. A block takes
 * more than half of the registers, so that two of a kernel never share a multiprocessor while another has none, and few enough
 * that a block of the attention fits beside it.
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
constexpr int NORM_TOKENS = 2, NORM_ITEMS = 2; /* items: of 8 numbers, of a thread */
constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int DEPTH = 3;
constexpr int STEP = 64; /* k of one step of a warp */
constexpr size_t X_BYTES_MAX = 160 << 10;
constexpr int TOKENS_MAX = 8;
constexpr int KNOWN = 2; /* tiles of a block that follow from its index */

/* The block's n-th tile, at n % 4. Tile n + KNOWN is known from the end of tile n on: the stream, which runs DEPTH steps and
 * never a whole tile ahead, needs it later. */
struct tile_order {
    int at[4];
};

/* k of a tensor core row, which is one part's. */
template <int PARTS> __device__ __forceinline__ int row_k(const skinny_args &a)
{
    return a.k / PARTS;
}

/* The weights under way: DEPTH steps of tensor core rows g and g + 8, two halves of 32 k each, and the place of the next. */
template <typename T, bool GATED, int PARTS> struct weight_stream {
    uint4 lo[DEPTH][2], hi[DEPTH][2];
    const T *row_lo;
    size_t apart; /* of the two rows, numbers */
    int tile, nth, step;

    __device__ __forceinline__ void seek(const skinny_args &a)
    {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const T *w = static_cast<const T *>(a.w) + t * 8;
        if (PARTS == 2) {
            row_lo = w + (size_t)min(tile * 8 + g, a.n - 1) * a.k;
            apart = (size_t)(a.k / 2);
            return;
        }
        const int lo_row = min(GATED ? tile * 8 + g : tile * 16 + g, a.n - 1);
        const int hi_row = GATED ? a.n + lo_row : min(tile * 16 + 8 + g, a.n - 1);
        row_lo = w + (size_t)lo_row * a.k;
        apart = (size_t)(hi_row - lo_row) * a.k;
    }
    /* The next step of this warp into place i; steps behind the row's end are left out by every warp alike. */
    __device__ __forceinline__ void load(const skinny_args &a, const tile_order &order, int i)
    {
        const int steps = row_k<PARTS>(a) / STEP;
        const bool valid = tile < a.tiles && step < steps;
        const T *p = row_lo + (size_t)step * STEP;
        load_weights(lo[i][0], p, valid);
        load_weights(hi[i][0], p + apart, valid);
        load_weights(lo[i][1], p + 32, valid);
        load_weights(hi[i][1], p + apart + 32, valid);
        step += WARPS;
        if (step - (int)threadIdx.x / 32 >= steps) {
            step = threadIdx.x / 32;
            tile = a.taken ? order.at[++nth % 4] : tile + (int)gridDim.x;
            seek(a);
        }
    }
};

template <typename T, int PARTS> __device__ __forceinline__ void load_x(const skinny_args &a, T *xs)
{
    const int k = row_k<PARTS>(a);
    for (int row = 0; row < a.tokens; row++) {
        const T *from = static_cast<const T *>(a.x) + (size_t)row * a.ldx;
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            for (int i = threadIdx.x * 8; i < k; i += THREADS * 8)
                copy_async(xs + (row * PARTS + p) * a.stride + i, from + p * k + i, true);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
}

/* The norm's weights into shared memory, for store_normed. */
__device__ __forceinline__ void copy_norm_weights(const skinny_args &a, float *nw)
{
    for (int i = threadIdx.x * 4; i < a.k; i += THREADS * 4)
        copy_async(nw + i, a.norm_w + i, true);
    copy_commit();
}

/* What a thread has of residual and delta, and of their norm. */
template <typename T> struct norm_items {
    pack<T, 8> r[NORM_ITEMS], d[NORM_ITEMS];
    float sum[NORM_TOKENS];

    __device__ __forceinline__ void load(const skinny_args &a)
    {
#pragma unroll
        for (int j = 0; j < NORM_ITEMS; j++) {
            const int at = threadIdx.x + j * THREADS;
            if (at >= a.k / 8 * a.tokens)
                break;
            r[j] = load_pack<T, 8>(a.residual, at);
            if (a.delta)
                d[j] = load_pack<T, 8>(a.delta, at);
        }
    }

    /* The sum is rounded before it is normalised, and block 0 writes it; sum becomes this thread's squares by row. */
    __device__ __forceinline__ void add(const skinny_args &a)
    {
        const int packs = a.k / 8;
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int j = 0; j < NORM_ITEMS; j++) {
            const int at = threadIdx.x + j * THREADS;
            float squares = 0.0f;
            if (at >= packs * a.tokens)
                break;
            if (a.delta) {
#pragma unroll
                for (int e = 0; e < 8; e++)
                    r[j].e[e] = from_f32<T>(to_f32(r[j].e[e]) + to_f32(d[j].e[e]));
                if (blockIdx.x == 0)
                    store_pack<T, 8>(a.residual_out, at, r[j]);
            }
#pragma unroll
            for (int e = 0; e < 8; e++)
                squares += to_f32(r[j].e[e]) * to_f32(r[j].e[e]);
            sum[0] += at < packs ? squares : 0.0f;
            sum[1] += at < packs ? 0.0f : squares;
        }
    }

    /* What is normalised is rounded again, as the norm operator does. */
    __device__ __forceinline__ void store(const skinny_args &a, const float *nw,
                                          const float (&sums)[NORM_TOKENS][WARPS], T *xs)
    {
        const int packs = a.k / 8;
#pragma unroll
        for (int j = 0; j < NORM_ITEMS; j++) {
            const int at = threadIdx.x + j * THREADS, row = at >= packs, i = at - row * packs;
            if (at >= packs * a.tokens)
                break;
            float all = 0.0f;
            for (int w = 0; w < WARPS; w++)
                all += sums[row][w];
            const float inv = rsqrtf(all / a.k + a.eps);
#pragma unroll
            for (int e = 0; e < 8; e++)
                r[j].e[e] = from_f32<T>(to_f32(r[j].e[e]) * inv * (a.one + nw[i * 8 + e]));
            store_pack<T, 8>(xs + row * a.stride, i, r[j]);
        }
    }
};

/* x as the RMS norm of residual + delta. */
template <typename T>
__device__ __forceinline__ void store_normed(const skinny_args &a, norm_items<T> &n,
                                             const float *nw, T *xs)
{
    SHARED(float[NORM_TOKENS][WARPS], sums);
    n.add(a);
#pragma unroll
    for (int row = 0; row < NORM_TOKENS; row++) {
        for (int i = 16; i > 0; i >>= 1)
            n.sum[row] += __shfl_xor_sync(0xffffffffu, n.sum[row], i);
        if (threadIdx.x % 32 == 0)
            sums[row][threadIdx.x / 32] = n.sum[row];
    }
    copy_wait<0>(); /* the weights */
    __syncthreads();
    n.store(a, nw, sums, xs);
    __syncthreads();
}

/* One step: 64 k of the tile against all columns. */
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], const uint4 (&lo)[2],
                                         const uint4 (&hi)[2], const T *xs, bool column)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (column)
            x = *reinterpret_cast<const uint4 *>(xs + h * 32);
        mma<T>(acc, lo[h].x, hi[h].x, lo[h].y, hi[h].y, x.x, x.y);
        mma<T>(acc, lo[h].z, hi[h].z, lo[h].w, hi[h].w, x.z, x.w);
    }
}

template <typename T>
__device__ __forceinline__ void store_out(const skinny_args &a, int row, int token, float v)
{
    if (row >= a.n || token >= a.tokens)
        return;
    const size_t at = (size_t)token * a.ldo + row;
    if (a.bias)
        v += a.bias[row];
    write_out<T>(a, at, v);
}

/* Sum over the warps of element e of the tile's accumulators, [lane][4]. */
template <int WARPS> __device__ __forceinline__ float sum_warps(const float *red, int e)
{
    float v = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++)
        v += red[w * 128 + e];
    return v;
}

/* Row and token of result i of a tile, and where among a warp's sums it is: [lane][4], lane 4 g + t with rows g, g + 8 and
 * columns 2 t, 2 t + 1. */
__device__ __forceinline__ int sum_at(int row, int column)
{
    return (row % 8 * 4 + column / 2) * 4 + row / 8 * 2 + column % 2;
}

/* The tile's results from the warps' sums. Gated: rows g of the tile are gates, rows g + 8 what they multiply. PARTS: row r
 * of part p of K is the tensor core's row p * 16 / PARTS + r, token t of that part its column p * 8 / PARTS + t. */
template <typename T, int WARPS, bool GATED, int PARTS>
__device__ __forceinline__ void finish_tile(const skinny_args &a, const float *red, int tile)
{
    constexpr int ROWS = 16 / PARTS / (GATED ? 2 : 1), TOKENS = 8 / PARTS;
    const int i = threadIdx.x, row = i / TOKENS, token = i % TOKENS;
    if (i >= ROWS * TOKENS)
        return;
    float v = 0.0f;
    if (GATED) {
        v = gated_result<T>(sum_warps<WARPS>(red, sum_at(row, token)),
                            sum_warps<WARPS>(red, sum_at(row + 8, token)), a.act);
    } else {
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            v += sum_warps<WARPS>(red, sum_at(p * ROWS + row, p * TOKENS + token));
    }
    store_out<T>(a, tile * ROWS + row, token, v);
}

/* The warps' sums of a tile come together in red; acc starts anew. `next` is known to all from here on, at `where`. */
template <typename T, bool GATED, int PARTS>
__device__ __forceinline__ void finish(const skinny_args &a, float *red, int tile, int next,
                                       int &where, float (&acc)[4])
{
    *reinterpret_cast<float4 *>(red + threadIdx.x * 4) =
        make_float4(acc[0], acc[1], acc[2], acc[3]);
    acc[0] = acc[1] = acc[2] = acc[3] = 0.0f;
    if (a.taken && threadIdx.x == 0)
        where = next;
    __syncthreads();
    finish_tile<T, WARPS, GATED, PARTS>(a, red, tile);
}

/* By one thread, as the block begins a tile: its tile KNOWN further on. There are as many takings as tiles, so the last one
 * puts the counter back. */
__device__ __forceinline__ int take_tile(const skinny_args &a)
{
    return KNOWN * gridDim.x +
           atomicInc(reinterpret_cast<unsigned *>(a.counter), (unsigned)a.tiles - 1);
}

template <typename T, bool GATED, int PARTS>
__global__ void __maxnreg__(88) skinny_kernel(const __grid_constant__ skinny_args a)
{
    DYNAMIC_SHARED(uint4, smem);
    SHARED(tile_order, order);
    float *red = reinterpret_cast<float *>(smem); /* [2][WARPS][32 lanes][4] */
    T *xs = reinterpret_cast<T *>(red + 2 * WARPS * 128);
    float *nw = reinterpret_cast<float *>(xs + a.tokens * PARTS * a.stride); /* [k], with a norm */
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int steps = row_k<PARTS>(a) / STEP, rounds = (steps + WARPS - 1) / WARPS;

    if (threadIdx.x < KNOWN)
        order.at[threadIdx.x] = blockIdx.x + threadIdx.x * gridDim.x;
    __syncthreads();
    weight_stream<T, GATED, PARTS> w;
    w.tile = blockIdx.x;
    w.nth = 0;
    w.step = warp;
    w.seek(a);
    /* A norm's kernel begins late, as soon as others leave it room: there what x is made of goes before most of the weights,
     * since requests are answered in their order. */
    if (a.norm_w)
        copy_norm_weights(a, nw);
    w.load(a, order, 0);
    if (!a.norm_w) {
#pragma unroll
        for (int d = 1; d < DEPTH; d++)
            w.load(a, order, d);
    }
    wait_previous();
    start_next();
    if (a.norm_w) {
        norm_items<T> items;
        items.load(a);
#pragma unroll
        for (int d = 1; d < DEPTH; d++)
            w.load(a, order, d);
        store_normed<T>(a, items, nw, xs);
    } else {
        load_x<T, PARTS>(a, xs);
    }

    constexpr int TOKENS = 8 / PARTS;
    const T *mine = xs + (g % TOKENS * PARTS + g / TOKENS) * a.stride + t * 8;
    const bool column = g % TOKENS < a.tokens, takes = a.taken && threadIdx.x == 0;
    float acc[4] = {};
    int tile = blockIdx.x, n = 0, round = 0, next = takes ? take_tile(a) : 0;
    while (tile < a.tiles) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const int s = round * WARPS + warp;
            if (s < steps && tile < a.tiles)
                multiply<T>(acc, w.lo[d], w.hi[d], mine + s * STEP, column);
            w.load(a, order, d);
            if (++round < rounds)
                continue;
            round = 0;
            if (tile >= a.tiles)
                continue;
            /* Whoever writes this half of red again has passed the next barrier. */
            finish<T, GATED, PARTS>(a, red + n % 2 * (WARPS * 128), tile, next,
                                    order.at[(n + KNOWN) % 4], acc);
            n++;
            tile = a.taken ? order.at[n % 4] : tile + (int)gridDim.x;
            if (takes && tile < a.tiles)
                next = take_tile(a);
        }
    }
}

/* A tile has more rounds than the stream runs ahead. */
bool long_enough(int k)
{
    return k > DEPTH * WARPS * STEP;
}

/* Two parts of K beside each other halve a tile's bytes. */
int parts_of(const skinny_args &a, bool gated)
{
    return !gated && !a.norm_w && a.tokens <= 4 && a.k % (2 * STEP) == 0 && long_enough(a.k / 2)
               ? 2
               : 1;
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

template <typename T>
cudaError_t launch_kind(const skinny_args &a, bool gated, int parts, dim3 grid, size_t smem,
                        const tm_cuda_ctx *c)
{
    if (gated)
        return launch_kernel(c, skinny_kernel<T, true, 1>, grid, THREADS, smem, a);
    if (parts == 2)
        return launch_kernel(c, skinny_kernel<T, false, 2>, grid, THREADS, smem, a);
    return launch_kernel(c, skinny_kernel<T, false, 1>, grid, THREADS, smem, a);
}

cudaError_t launch_any(skinny_args a, bool gated, const tm_cuda_ctx *c)
{
    if (tm_cuda_skinny_ring_fits(a, gated, c))
        return tm_cuda_skinny_resident_fits(a, gated, c)
                   ? tm_cuda_skinny_resident_launch(a, gated, c)
                   : tm_cuda_skinny_ring_launch(a, gated, c);
    const int parts = parts_of(a, gated), rows = gated ? 8 : 16 / parts;
    a.tiles = (a.n + rows - 1) / rows;
    a.stride = skinny_stride(a.k / parts);
    a.taken = a.tiles > KNOWN * c->sms && long_enough(a.k / parts);
    a.counter = c->tickets + TM_CUDA_TICKETS; /* behind those of sequences and rows */
    const size_t smem = 2 * WARPS * 128 * sizeof(float) + x_bytes(a.k / parts, a.tokens * parts) +
                        (a.norm_w ? a.k * sizeof(float) : 0);
    const dim3 grid((unsigned)min(c->sms, a.tiles));
    return c->act == TM_DTYPE_BF16 ? launch_kind<__nv_bfloat16>(a, gated, parts, grid, smem, c)
                                   : launch_kind<__half>(a, gated, parts, grid, smem, c);
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
           n->n_tokens * n->h <= NORM_ITEMS * THREADS * 8 &&
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
