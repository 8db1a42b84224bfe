/* Linear layers of one token on Hopper where a block's share of the weights fits its shared memory. A step of a small model is a
 * chain of such short kernels, of which everything that can be is done before x is there.
 *
 * The copy engine brings all of the block's weights, row by row, while the kernels in front run: nothing waits behind its
 * requests, as shared memory's users of the same multiprocessor would behind those of threads. Kernels are eager (launch.cuh) and
 * have no warps besides those that multiply, so that registers let three such blocks and one of attention be on a
 * multiprocessor: while one works, the weights of the next two come. Rows are dealt out so that no block has more than one
 * more than another, since the largest share decides what fits beside what: every block has `full` tiles, and of the rows
 * left `each`.
 *
 * With x there all that is left is some hundred instructions, and their number counts: what does not depend on x is computed
 * before (where results go, whether weights have come), and the loop over tiles has no more than loads and products.
 *
 * Bytes moved: N * K * 2 from memory, plus K * 2 per block from L2. */
#include "engine/backend/cuda/skinny_hopper.cuh"

namespace
{

/* Of a block's shared memory: with it fits a block of what follows. */
constexpr size_t SMEM_MAX = 140 << 10;
/* Of models that gain: of larger ones the largest products need a ring, and blocks of both kinds get into each other's way. */
constexpr int HIDDEN_MAX = 1024;
constexpr int WARP_K = 2 * STEP; /* k of a stage that a warp has */
constexpr int LOADS = 4;         /* packs of x that a thread asks for at once */

struct resident_args {
    skinny_args s;
    int k;             /* of a part of K */
    int chunk;         /* k of a stage, a multiple of STEP */
    int pitch;         /* of a row of a stage, bytes, an odd multiple of 64 */
    int pieces;        /* stages of a tile */
    int full, each;    /* tiles of every block; rows of its last, smaller one, or 0 */
    int weights, sums; /* bytes of the weights, tiles whose sums there is room for */
};

#if defined(HOPPER)

/* What the weights begin at a multiple of: the copy engine is slower to places that cut its pieces of 32 bytes. */
struct alignas(128) line {
    uint4 of[8];
};

/* One of the block's tiles. */
struct place {
    int row, rows; /* of W, with halves of K or gates 8 of them at most */
    int lo, hi;    /* rows of each half of a stage; hi's lie behind lo's */
};

template <shape S> __device__ __forceinline__ place place_of(const resident_args &a, int i)
{
    constexpr int N = rows_of(S);
    place p;
    if (i < a.full) {
        p.row = (i * (int)gridDim.x + (int)blockIdx.x) * N;
        p.rows = N;
    } else {
        p.row = a.full * (int)gridDim.x * N + (int)blockIdx.x * a.each;
        p.rows = max(min(a.each, a.s.n - p.row), 0);
    }
    p.lo = min(p.rows, 8);
    p.hi = S == PLAIN ? p.rows - p.lo : p.lo;
    return p;
}

__device__ __forceinline__ int tiles_of(const resident_args &a)
{
    return a.full + (a.each > 0);
}

/* ---- weights ---- */

/* All of the block's weights, by one warp; `there` is the barrier that waits for them. */
template <shape S>
__device__ __forceinline__ void fetch(const resident_args &a, char *to, uint64_t *there)
{
    const int lane = threadIdx.x % 32, tiles = tiles_of(a);
    const size_t pitch = (size_t)a.s.k * 2;
    if (lane == 0) {
        const place last = place_of<S>(a, a.full);
        barrier_expect(there, (a.full * ROWS + last.lo + last.hi) * a.k * 2);
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < tiles; i++) {
        const place p = place_of<S>(a, i);
        const char *lo = static_cast<const char *>(a.s.w) + (size_t)p.row * pitch;
        const char *hi = lo + (S == HALVES ? (size_t)a.k * 2 : (S == GATED ? a.s.n : 8) * pitch);
        const char *row = lane < p.lo ? lo + lane * pitch : hi + (lane - p.lo) * pitch;
#pragma unroll 1
        for (int k = 0; k < a.k; k += a.chunk) {
            if (lane < p.lo + p.hi)
                row_load(to + lane * a.pitch, row + (size_t)k * 2, min(a.chunk, a.k - k) * 2,
                         there);
            to += (p.lo + p.hi) * a.pitch;
        }
    }
}

/* ---- x ---- */

/* Through registers: the copies of the ring, which has none to spare, brought a long x 0.3 us later. */
template <typename T> __device__ __forceinline__ void load_x(const skinny_args &a, T *xs)
{
    const int packs = a.k / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < packs; i += LOADS * WORKERS) {
        pack<T, 8> v[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++)
            if (i + j * WORKERS < packs)
                v[j] = load_pack<T, 8>(a.x, i + j * WORKERS);
#pragma unroll
        for (int j = 0; j < LOADS; j++)
            if (i + j * WORKERS < packs)
                store_pack<T, 8>(xs, i + j * WORKERS, v[j]);
    }
    __syncthreads();
}

/* ---- products ---- */

/* A warp's k of x, or as many as it has: C times 32. */
template <int C> struct x_regs {
    uint4 v[C];

    template <typename T> __device__ __forceinline__ void load(const T *x)
    {
#pragma unroll
        for (int c = 0; c < C; c++)
            v[c] = *reinterpret_cast<const uint4 *>(x + c * 32);
    }
};

/* The same k of rows lo and hi of a stage. */
template <typename T, int C>
__device__ __forceinline__ void multiply_stage(float (&acc)[2][4], const char *lo, const char *hi,
                                               const x_regs<C> &x)
{
    uint4 a[C], b[C];
#pragma unroll
    for (int c = 0; c < C; c++) {
        a[c] = *reinterpret_cast<const uint4 *>(lo + c * 64);
        b[c] = *reinterpret_cast<const uint4 *>(hi + c * 64);
    }
#pragma unroll
    for (int c = 0; c < C; c++) {
        mma<T>(acc[0], a[c].x, b[c].x, a[c].y, b[c].y, x.v[c].x, x.v[c].y);
        mma<T>(acc[1], a[c].z, b[c].z, a[c].w, b[c].w, x.v[c].z, x.v[c].w);
    }
}

/* What a lane of a warp works on. */
template <typename T> struct lane_part {
    const char *weights; /* its k of the block's first row */
    const T *x;          /* its k of the first piece */
    float *sums;
    int k; /* of a stage, those of the warp and what follows them */
};

/* The lane's rows of a tile, in bytes from its stage: rows that are not there are others. */
template <shape S> __device__ __forceinline__ int2 lane_rows(const resident_args &a, int tile)
{
    const int g = threadIdx.x % 32 / 4;
    const place p = place_of<S>(a, tile);
    return make_int2(min(g, max(p.lo, 1) - 1) * a.pitch,
                     (p.hi > 0 ? p.lo + min(g, p.hi - 1) : 0) * a.pitch);
}

/* Where K is one piece: x stays in registers. */
template <typename T, shape S, int C>
__device__ __forceinline__ void multiply_tiles(const resident_args &a, const lane_part<T> &l)
{
    const int g = threadIdx.x % 32 / 4;
    const char *lo = l.weights + g * a.pitch, *hi = lo + 8 * a.pitch;
    float acc[2][4] = {}, *sums = l.sums;
    x_regs<C> x;
    x.template load<T>(l.x);
#pragma unroll 1
    for (int i = 0; i < a.full; i++) {
        multiply_stage<T, C>(acc, lo, hi, x);
        leave_sums<S>(sums, acc);
        lo += ROWS * a.pitch;
        hi += ROWS * a.pitch;
        sums += SUMS;
    }
    if (a.each > 0) {
        const int2 rows = lane_rows<S>(a, a.full);
        const char *last = l.weights + a.full * ROWS * a.pitch;
        multiply_stage<T, C>(acc, last + rows.x, last + rows.y, x);
        leave_sums<S>(sums, acc);
    }
}

template <typename T, shape S>
__device__ __forceinline__ void multiply_pieces(const resident_args &a, const lane_part<T> &l)
{
    const char *at = l.weights;
    float acc[2][4] = {};
#pragma unroll 1
    for (int i = 0; i < tiles_of(a); i++) {
        const place p = place_of<S>(a, i);
        const int2 rows = lane_rows<S>(a, i);
        const int bytes = (p.lo + p.hi) * a.pitch;
#pragma unroll 1
        for (int k = 0; k < a.k; k += a.chunk, at += bytes) {
            const int width = min(a.chunk, a.k - k) - a.chunk + l.k;
            if (width > STEP) {
                x_regs<4> x;
                x.template load<T>(l.x + k);
                multiply_stage<T, 4>(acc, at + rows.x, at + rows.y, x);
            } else if (width > 0) {
                x_regs<2> x;
                x.template load<T>(l.x + k);
                multiply_stage<T, 2>(acc, at + rows.x, at + rows.y, x);
            }
        }
        leave_sums<S>(l.sums + i * SUMS, acc);
    }
}

/* The warps' sums of all tiles. */
template <typename T, shape S>
__device__ __forceinline__ void multiply_all(const resident_args &a, const char *weights,
                                             float *red, const T *xs)
{
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, k = (int)threadIdx.x / 32 * WARP_K;
    /* Every column is the token; with halves of K from 4 on its second half. */
    const T *x = xs + k + t * 8 + (S == HALVES && g >= 4 ? a.k : 0);
    const lane_part<T> l = {weights + (k + t * 8) * 2, x, red, a.chunk - k};
    if (a.pieces > 1 || l.k <= 0)
        multiply_pieces<T, S>(a, l);
    else if (l.k > STEP)
        multiply_tiles<T, S, 4>(a, l);
    else
        multiply_tiles<T, S, 2>(a, l);
}

/* ---- results ---- */

/* The result that a thread finishes: its sums, its place in the output, -1 for none, and its bias. */
struct result {
    const float *sums;
    int row, at;
    float bias;
};

template <shape S>
__device__ __forceinline__ result find_result(const resident_args &a, const float *red)
{
    constexpr int N = rows_of(S);
    static_assert(TOGETHER_MAX * N <= WORKERS, "a thread each");
    const int i = threadIdx.x;
    const place p = place_of<S>(a, i / N);
    result r = {red + i / N * SUMS, i % N, -1, 0.0f};
    if (i / N < tiles_of(a) && r.row < p.rows)
        r.at = p.row + r.row;
    if (a.s.bias && r.at >= 0)
        r.bias = a.s.bias[r.at];
    return r;
}

template <typename T, shape S>
__global__ void __maxnreg__(64) resident_kernel(const __grid_constant__ resident_args a)
{
    DYNAMIC_SHARED(line, smem);
    SHARED(uint64_t, there);
    char *weights = reinterpret_cast<char *>(smem);
    float *red = reinterpret_cast<float *>(weights + a.weights);
    T *xs = reinterpret_cast<T *>(red + a.sums * SUMS);
    if (threadIdx.x == 0) {
        barrier_init(&there, 1);
        barriers_made();
    }
    __syncthreads();
    if (threadIdx.x >= WORKERS - 32)
        fetch<S>(a, weights, &there);
    __syncthreads();
    start_next(); /* now: what the next kernel asks for comes behind this one's weights */
    const result r = find_result<S>(a, red);
    norm_weights n = {};
    if (a.s.norm_w)
        n = load_norm_weights(a.s);
    wait_previous();
    /* One warp waits for the weights, as long as asking takes beside the loads of the others: all meet when x is there. */
    if (threadIdx.x >= WORKERS - 32)
        barrier_wait(&there, 0);
    if (a.s.norm_w)
        load_normed<T>(a.s, n, xs);
    else
        load_x<T>(a.s, xs);
    multiply_all<T, S>(a, weights, red, xs);
    __syncthreads();
    if (r.at >= 0)
        write_out<T>(a.s, (size_t)r.at, tile_result<T, S>(a.s, r.sums, r.row) + r.bias);
}

#else

/* Not for this processor, and not started there. */
template <typename T, shape S>
__global__ void resident_kernel(const __grid_constant__ resident_args a)
{
    (void)a;
    __trap();
}

#endif

struct resident_plan {
    resident_args a;
    shape kind;
    unsigned blocks;
    size_t smem; /* 0: does not fit */
};

resident_plan plan(const skinny_args &s, bool gated, const tm_cuda_ctx *c)
{
    resident_plan p = {};
    resident_args *a = &p.a;
    p.kind = shape_of(s, gated, c);
    const int rows = rows_of(p.kind), whole = rows * c->sms, half = p.kind == PLAIN ? 1 : 2;
    a->s = s;
    a->k = p.kind == HALVES ? s.k / 2 : s.k;
    a->full = s.n / whole;
    a->each = (s.n - a->full * whole + c->sms - 1) / c->sms;
    a->chunk = chunk_of(a->k, WARP_K);
    a->pitch = a->chunk * 2 + 64;
    a->pieces = (a->k + a->chunk - 1) / a->chunk;
    a->sums = a->full + (a->each > 0);
    const size_t weights = (size_t)(a->full * ROWS + a->each * half) * a->pieces * a->pitch;
    const size_t smem = weights + a->sums * SUMS * sizeof(float) + (size_t)s.k * 2;
    a->weights = (int)weights;
    p.blocks = (unsigned)(a->full > 0 ? c->sms : (s.n + a->each - 1) / a->each);
    if (a->sums <= TOGETHER_MAX && smem <= SMEM_MAX)
        p.smem = smem;
    return p;
}

template <typename T> cudaError_t launch(const resident_plan &p, const tm_cuda_ctx *c)
{
    void (*kernel)(resident_args) = p.kind == GATED    ? resident_kernel<T, GATED>
                                    : p.kind == HALVES ? resident_kernel<T, HALVES>
                                                       : resident_kernel<T, PLAIN>;
    return launch_beside(kernel, dim3(p.blocks), WORKERS, p.smem, p.a, c);
}

} /* namespace */

bool tm_cuda_skinny_resident_fits(const skinny_args &a, bool gated, const tm_cuda_ctx *c)
{
    return !a.f32_out && hidden_of(a, gated) <= HIDDEN_MAX && plan(a, gated, c).smem > 0;
}

cudaError_t tm_cuda_skinny_resident_launch(const skinny_args &s, bool gated, const tm_cuda_ctx *c)
{
    const resident_plan p = plan(s, gated, c);
    return c->act == TM_DTYPE_BF16 ? launch<__nv_bfloat16>(p, c) : launch<__half>(p, c);
}
