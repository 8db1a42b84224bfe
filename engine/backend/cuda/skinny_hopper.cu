/* Linear layers of one token on Hopper: as skinny.cu, but weights come through a ring in shared memory.
 *
 * Three warps of a block do nothing but fetch its share of the weights, 16 rows of a stage, by asynchronous copies; eight
 * multiply, each its 64 or 128 k of every stage. Weights depend on nothing, so fetching begins long before x is there: these
 * kernels are eager (launch.cuh), and their blocks share a multiprocessor with those of the kernels in front: with
 * attention (and the registers it takes) and the product behind it, or with two products. While attention has little for
 * memory to do, most of the layer's weights come. All products of a step have to be of this kind for that, since a block
 * of skinny.cu leaves no room for one of these beside it.
 *
 * One token only: with two, the longest rows of a model leave no room for the ring.
 *
 * Bytes moved: N * K * 2 from memory, plus K * 2 per block from L2. */
#include "engine/backend/cuda/skinny_hopper.cuh"

namespace
{

constexpr int FETCHERS = 3, THREADS = WORKERS + 32 * FETCHERS;
constexpr int STAGES_MIN = FETCHERS, STAGES_MAX = 16;
constexpr int ROW_MAX = WARPS * 2 * STEP * 2; /* of a stage, bytes */
constexpr int HIDDEN_MAX = 2048; /* of models that gain: the others stream long enough without it */
/* Neighbours and what the driver takes of each fit a multiprocessor's 228 KiB: most for the one with most weights. */
constexpr size_t SMEM_MAX = 98 << 10, SMEM_GATED = 128 << 10;

struct ring_args {
    skinny_args s;
    int chunk, stages;   /* chunk: k of a stage, a multiple of STEP */
    int pitch;           /* of a row of a stage, bytes, an odd multiple of 64 */
    int warp_k;          /* k of a stage that a warp has, STEP or two of them */
    int k;               /* of a part of K */
    int together, slots; /* tiles that are finished together; tiles whose sums there is room for */
    bool eager;          /* the kernel behind may start at once (launch.cuh) */
};

__host__ __device__ __forceinline__ int stage_bytes(const ring_args &a)
{
    return ROWS * a.pitch;
}

#if defined(HOPPER)

/* ---- fetching ---- */

/* Where a fetching warp is: a tile and a piece of K. */
struct cursor {
    const char *lo, *hi; /* row 0 and row 8 of the tile */
    int tile, at, rows;  /* rows that there are of each half; 0: fetch row by row */

    template <shape S> __device__ __forceinline__ void seek(const ring_args &a)
    {
        const size_t pitch = (size_t)a.s.k * 2;
        const char *w = static_cast<const char *>(a.s.w);
        const int row = tile * rows_of(S), left = a.s.n - row;
        lo = w + (size_t)row * pitch;
        if (S == HALVES)
            hi = lo + (size_t)a.k * 2;
        else
            hi = lo + (size_t)(S == GATED ? a.s.n : left > 8 ? 8 : 0) * pitch;
        rows = left >= rows_of(S) ? 8 : 0;
        at = 0;
    }
    template <shape S> __device__ __forceinline__ void next(const ring_args &a)
    {
        at += a.chunk;
        if (at < a.k)
            return;
        tile += gridDim.x;
        seek<S>(a);
    }
};

/* A stage: the warp's lanes take 16 bytes each, 512 of a row at a time. Rows that are not there are others. */
template <shape S>
__device__ __forceinline__ void fetch_stage(const ring_args &a, const cursor &c, char *to)
{
    const int at = threadIdx.x % 32 * 16, bytes = min(a.chunk, a.k - c.at) * 2;
    const size_t pitch = (size_t)a.s.k * 2;
    const char *lo = c.lo + (size_t)c.at * 2 + at, *hi = c.hi + (size_t)c.at * 2 + at;
    to += at;
    if (c.rows == 8) {
#pragma unroll 2
        for (int r = 0; r < 8; r++, lo += pitch, hi += pitch, to += a.pitch)
#pragma unroll
            for (int i = 0; i < ROW_MAX; i += 512)
                if (at + i < bytes) {
                    copy_async(to + i, lo + i, true);
                    copy_async(to + 8 * a.pitch + i, hi + i, true);
                }
        return;
    }
    const int left = a.s.n - c.tile * rows_of(S), lo_rows = min(left, 8);
    const int hi_rows = S != PLAIN || left <= 8 ? lo_rows : min(left - 8, 8);
#pragma unroll 1
    for (int r = 0; r < 8; r++)
        for (int i = 0; i < bytes - at; i += 512) {
            copy_async(to + r * a.pitch + i, lo + min(r, lo_rows - 1) * pitch + i, true);
            copy_async(to + (r + 8) * a.pitch + i, hi + min(r, hi_rows - 1) * pitch + i, true);
        }
}

/* Every FETCHERS-th stage is this warp's. */
template <shape S>
__device__ void fetch(const ring_args &a, char *ring, uint64_t *full, uint64_t *empty)
{
    int stage = threadIdx.x / 32 - WARPS, parity = 1; /* the first round finds every stage empty */
    cursor c;
    c.tile = blockIdx.x;
    c.seek<S>(a);
    for (int i = 0; i < stage; i++)
        c.next<S>(a);
#pragma unroll 1
    while (c.tile < a.s.tiles) {
        barrier_wait(&empty[stage], parity);
        fetch_stage<S>(a, c, ring + stage * stage_bytes(a));
        arrive_copied(&full[stage]);
        for (int i = 0; i < FETCHERS; i++)
            c.next<S>(a);
        stage += FETCHERS;
        if (stage >= a.stages) {
            stage -= a.stages;
            parity ^= 1;
        }
    }
    wait_previous(); /* the rule for every thread; what was fetched needed none */
    start_next();
}

/* ---- products ---- */

template <typename T> __device__ void load_x(const skinny_args &a, T *xs)
{
    for (int i = threadIdx.x * 8; i < a.k; i += WORKERS * 8)
        copy_async(xs + i, static_cast<const T *>(a.x) + i, true);
    copy_commit();
    copy_wait<0>();
    workers_barrier();
}

/* The row of the first tile that this thread finishes has its bias before x is there. */
template <shape S> __device__ __forceinline__ float first_bias(const skinny_args &a)
{
    const int row = blockIdx.x * rows_of(S) + threadIdx.x;
    return a.bias && threadIdx.x < rows_of(S) && row < a.n ? a.bias[row] : 0.0f;
}

/* The results of `count` tiles of this block, the first one `tile`, from the warps' sums. */
template <typename T, shape S>
__device__ __forceinline__ void finish(const skinny_args &a, const float *red, int tile, int count,
                                       float bias)
{
    constexpr int N = rows_of(S);
#pragma unroll 1
    for (int i = threadIdx.x; i < count * N; i += WORKERS) {
        const float *sums = red + i / N * SUMS;
        const int at = tile + i / N * (int)gridDim.x, row = at * N + i % N;
        float v = tile_result<T, S>(a, sums, i % N);
        if (row >= a.n)
            continue;
        if (a.bias)
            v += at == blockIdx.x ? bias : a.bias[row];
        write_out<T>(a, (size_t)row, v);
    }
}

template <typename T, shape S>
__device__ __forceinline__ void work(const ring_args &a, const char *ring, uint64_t *full,
                                     uint64_t *empty, float *red, T *xs)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const float bias = first_bias<S>(a.s);
    if (a.s.norm_w) {
        const norm_weights n = load_norm_weights(a.s);
        wait_previous();
        start_next();
        load_normed<T>(a.s, n, xs);
    } else {
        wait_previous();
        start_next();
        load_x<T>(a.s, xs);
    }
    /* Column 0 is the token; with halves of K column 4 is its second half. */
    const bool token = g == 0 || (S == HALVES && g == 4);
    const int mine = warp * a.warp_k; /* of a stage's k */
    const T *x = xs + mine + t * 8 + (S == HALVES && g == 4 ? a.k : 0);
    const char *rows = ring + g * a.pitch + (mine + t * 8) * 2, *at = rows;
    float acc[2][4] = {};
    int stage = 0, parity = 0, slot = 0, begun = 0, first = blockIdx.x;
#pragma unroll 1
    for (int tile = first; tile < a.s.tiles; tile += gridDim.x) {
#pragma unroll 1
        for (int k = 0; k < a.k; k += a.chunk) {
            const int left = min(min(a.chunk, a.k - k) - mine, a.warp_k); /* of this warp */
            barrier_wait(&full[stage], parity);
            if (left >= STEP)
                multiply<T>(acc[0], at, at + 8 * a.pitch, x + k, token);
            if (left > STEP)
                multiply<T>(acc[1], at + STEP * 2, at + STEP * 2 + 8 * a.pitch, x + k + STEP,
                            token);
            __syncwarp();
            if (lane == 0)
                barrier_arrive(&empty[stage]);
            at += stage_bytes(a);
            if (++stage == a.stages) {
                stage = 0;
                parity ^= 1;
                at = rows;
            }
        }
        leave_sums<S>(red + slot * SUMS, acc);
        slot++;
        if (slot - begun < a.together && tile + (int)gridDim.x < a.s.tiles)
            continue;
        workers_barrier(); /* whoever writes these slots again has passed the next one */
        finish<T, S>(a.s, red + begun * SUMS, first, slot - begun, bias);
        slot = begun = slot == a.slots ? 0 : slot;
        first = tile + (int)gridDim.x;
    }
}

template <typename T, shape S>
__global__ void __maxnreg__(64) ring_kernel(const __grid_constant__ ring_args a)
{
    DYNAMIC_SHARED(uint4, smem);
    SHARED(uint64_t[STAGES_MAX], full);
    SHARED(uint64_t[STAGES_MAX], empty);
    char *ring = reinterpret_cast<char *>(smem);
    float *red = reinterpret_cast<float *>(ring + a.stages * stage_bytes(a));
    if (a.eager)
        start_next();
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.stages; i++) {
            barrier_init(&full[i], 32);
            barrier_init(&empty[i], WARPS);
        }
    }
    __syncthreads();
    if (threadIdx.x >= WORKERS)
        fetch<S>(a, ring, full, empty);
    else
        work<T, S>(a, ring, full, empty, red, reinterpret_cast<T *>(red + a.slots * SUMS));
}

#else

/* Not for this processor, and not started there. */
template <typename T, shape S> __global__ void ring_kernel(const __grid_constant__ ring_args a)
{
    (void)a;
    __trap();
}

#endif

/* Large stages cost less, small ones keep a stream of many flowing. */
void plan_stages(ring_args &a, size_t room, int tiles)
{
    for (a.warp_k = 2 * STEP; a.warp_k >= STEP; a.warp_k /= 2) {
        a.chunk = chunk_of(a.k, a.warp_k);
        a.pitch = a.chunk * 2 + 64;
        const int all = tiles * ((a.k + a.chunk - 1) / a.chunk);
        const int fit = min((int)(room / (size_t)stage_bytes(a)), STAGES_MAX);
        a.stages = min(fit, max(all, STAGES_MIN));
        if (fit >= STAGES_MIN && all <= fit)
            return;
    }
    a.warp_k = STEP;
}

/* Stages and what comes together: all of a block's, or as many as there is room for. */
ring_args plan(const skinny_args &s, bool gated, const tm_cuda_ctx *c, shape *kind)
{
    ring_args a = {};
    a.s = s;
    *kind = shape_of(s, gated, c);
    a.s.tiles = (s.n + rows_of(*kind) - 1) / rows_of(*kind);
    a.k = *kind == HALVES ? s.k / 2 : s.k;
    const int tiles = (a.s.tiles + c->sms - 1) / c->sms; /* of a block */
    a.together = tiles <= TOGETHER_MAX ? tiles : 2;
    a.slots = tiles <= TOGETHER_MAX ? tiles : 4;
    const size_t all = gated ? SMEM_GATED : SMEM_MAX;
    const size_t other = (size_t)a.slots * SUMS * sizeof(float) + (size_t)s.k * 2;
    plan_stages(a, other < all ? all - other : 0, tiles);
    a.eager = !s.f32_out;
    return a;
}

} /* namespace */

/* Every product of a model has its hidden size as n or k, so all of them are taken, or none. */
bool tm_cuda_skinny_ring_fits(const skinny_args &a, bool gated, const tm_cuda_ctx *c)
{
    shape kind;
    return c->tensor_map && a.tokens == 1 && a.k % STEP == 0 && hidden_of(a, gated) <= HIDDEN_MAX &&
           (!a.norm_w || a.k <= PACKS * WORKERS * 8) &&
           plan(a, gated, c, &kind).stages >= STAGES_MIN;
}

template <typename T>
static cudaError_t launch(shape s, dim3 grid, size_t smem, const ring_args &a, const tm_cuda_ctx *c)
{
    void (*kernel)(ring_args) = s == GATED    ? ring_kernel<T, GATED>
                                : s == HALVES ? ring_kernel<T, HALVES>
                                              : ring_kernel<T, PLAIN>;
    return launch_beside(kernel, grid, THREADS, smem, a, c);
}

cudaError_t tm_cuda_skinny_ring_launch(const skinny_args &s, bool gated, const tm_cuda_ctx *c)
{
    shape kind;
    const ring_args a = plan(s, gated, c, &kind);
    const size_t smem = (size_t)a.stages * stage_bytes(a) + (size_t)a.slots * SUMS * sizeof(float) +
                        (size_t)s.k * 2;
    const dim3 grid((unsigned)min(c->sms, a.s.tiles));
    return c->act == TM_DTYPE_BF16 ? launch<__nv_bfloat16>(kind, grid, smem, a, c)
                                   : launch<__half>(kind, grid, smem, a, c);
}
