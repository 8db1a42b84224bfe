/* Sums over the ranks through peer memory: see peer.h for the segment and why it needs no clearing.
 *
 * Work is cut into rows (of the norm, or of ROW packs); block b takes rows b, b + grid, ... on every rank, so blocks
 * meet their namesakes only and nothing waits for a whole grid. All rows of a block travel before it waits.
 *
 * PUSH: a number crosses the link once, with its mark beside it, and the receiver polls its own memory: the latency
 * of one store. Twice the bytes, so it is for small messages. ONE and TWO: numbers are copied to this rank's stage, a
 * flag says so, the others read. Bytes into a rank, n numbers' bytes: PUSH 2 (R - 1) n, ONE (R - 1) n, TWO
 * 2 (R - 1) / R n. In TWO the sums take the place of this rank's own share in its stage, which no other rank reads
 * before the second meeting.
 *
 * A wait ends when its time is over or the host asks for it: the call then leaves rubbish, marks the state as failed
 * (later calls do not wait) and tells the host through a word of its memory. Marks have 31 bits of the call's number:
 * a packet's place could be taken for filled if it was last used exactly 2^31 calls ago. */
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/peer.h"
#include "engine/backend/cuda/ptx.cuh"
#include "engine/backend/cuda/system.cuh"
#include "engine/backend/cuda/vec.cuh"

namespace
{

constexpr int THREADS = 512;
constexpr int ROW = THREADS; /* packs of a row where there is no norm */
constexpr int PACKS = 4;     /* of a norm's row per thread */
constexpr size_t LARGE = (size_t)256 << 10;

template <typename T> constexpr int lanes = 16 / (int)sizeof(T);
template <typename T> using pack16 = pack<T, lanes<T>>;

template <typename T> union bits {
    pack16<T> p;
    uint4 u;
};

struct job {
    tm_norm_args norm; /* its delta is x */
    void *x;
    size_t n;        /* numbers */
    size_t total;    /* packs, the last one perhaps in part */
    int rows, packs; /* packs of a row; the last row may be shorter */
    bool large;
};

/* What a thread knows of the call. */
struct call {
    uint64_t number, begin;
    uint32_t looks, mark;
    int half;
    bool dead;
};

__device__ call begin_call(const tm_peers &p)
{
    call c = {};
    c.number = p.state->call + 1;
    c.mark = (uint32_t)c.number * 2 + 1;
    c.half = (int)(c.number & 1);
    c.dead = p.state->failed != 0;
    return c;
}

/* All threads of the block know the call's number: after a barrier. The last block to say so counts the call; this is
 * not the end of the kernel but its middle, where the trip to memory costs nothing. */
__device__ void count_call(const tm_peers &p, const call &c, bool tell)
{
    if (threadIdx.x != blockDim.x - 1)
        return;
    if (gridDim.x > 1 && atomicAdd(&p.state->ticket, 1u) != gridDim.x - 1)
        return;
    p.state->ticket = 0;
    p.state->call = c.number;
    if (tell)
        store_word(&p.words[TM_PEER_WORD_CALL], (uint32_t)c.number);
}

/* True when waiting for this rank has to end. The clock, and the host's word, are looked at now and then. */
__device__ bool too_late(const tm_peers &p, call &c, int rank)
{
    if (c.dead)
        return true;
    spin_pause();
    if (++c.looks % 1024 != 0)
        return false;
    const uint64_t now = timer_ns();
    c.begin = c.begin ? c.begin : now;
    bool end = now - c.begin >= p.patience_ns || load_word(&p.state->failed) != 0;
    if (!end && c.looks % 16384 == 0)
        end = load_word(&p.words[TM_PEER_WORD_END]) != 0;
    if (!end)
        return false;
    c.dead = true;
    store_word(&p.state->failed, 1);
    store_word(&p.words[TM_PEER_WORD_LATE], 1 + (uint32_t)rank);
    return true;
}

__device__ uint64_t *flag_of(const tm_peers &p, int at, int point, int from)
{
    uint64_t *flags = reinterpret_cast<uint64_t *>(p.segment[at]);
    return flags + ((size_t)point * TM_PEER_BLOCKS + blockIdx.x) * TM_PEER_RANKS + from;
}

__device__ char *packets_of(const tm_peers &p, int at, int half, int from)
{
    return p.segment[at] + TM_PEER_FLAG_BYTES +
           ((size_t)half * TM_PEER_RANKS + from) * TM_PEER_PACKET_BYTES;
}

__device__ char *stage_of(const tm_peers &p, int at, int half)
{
    return p.segment[at] + TM_PEER_FLAG_BYTES + 2 * TM_PEER_RANKS * TM_PEER_PACKET_BYTES +
           (size_t)half * TM_PEER_STAGE_BYTES;
}

/* This block and its namesakes on the other ranks have come to the point; what each wrote before, all see after. The
 * first meeting of a call counts it. */
__device__ void meet(const tm_peers &p, call &c, int point, bool tell)
{
    __syncthreads();
    const int r = (int)threadIdx.x;
    if (point == 0)
        count_call(p, c, tell);
    if (r < p.size && r != p.rank) {
        store_release_system(flag_of(p, r, point, p.rank), c.number);
        while (load_acquire_system(flag_of(p, p.rank, point, r)) < c.number)
            if (too_late(p, c, r))
                break;
    }
    __syncthreads();
}

/* Pack i of x[n]; zeros behind the end. */
template <typename T> __device__ pack16<T> load_numbers(const void *x, size_t i, size_t n)
{
    constexpr int V = lanes<T>;
    if ((i + 1) * V <= n)
        return load_pack<T, V>(x, i);
    pack16<T> o;
    for (int j = 0; j < V; j++)
        o.e[j] = i * V + j < n ? static_cast<const T *>(x)[i * V + j] : from_f32<T>(0.0f);
    return o;
}

template <typename T> __device__ void store_numbers(void *x, size_t i, size_t n, pack16<T> v)
{
    constexpr int V = lanes<T>;
    if ((i + 1) * V <= n) {
        store_pack<T, V>(x, i, v);
        return;
    }
    for (int j = 0; j < V && i * V + j < n; j++)
        static_cast<T *>(x)[i * V + j] = v.e[j];
}

template <typename T> __device__ void add_pack(float *sum, uint4 u)
{
    bits<T> b;
    b.u = u;
#pragma unroll
    for (int j = 0; j < lanes<T>; j++)
        sum[j] += to_f32(b.p.e[j]);
}

template <typename T> __device__ pack16<T> rounded(const float *sum)
{
    pack16<T> o;
#pragma unroll
    for (int j = 0; j < lanes<T>; j++)
        o.e[j] = from_f32<T>(sum[j]);
    return o;
}

/* The sum over the block, in every thread. */
__device__ float block_sum(float v, float *slots)
{
    for (int i = 16; i > 0; i >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, i);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0)
        slots[warp] = v;
    __syncthreads();
    v = lane < THREADS / 32 ? slots[lane] : 0.0f;
    for (int i = 16; i > 0; i >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, i);
    __syncthreads(); /* the slots may be written again */
    return v;
}

/* The norm's weights on their way to this device's cache: they never change, so this may come before the wait. */
__device__ void prefetch_norm(const tm_norm_args &a)
{
    for (int i = (int)threadIdx.x * 8; i < a.h; i += THREADS * 8) {
        prefetch_l2(a.w + i);
        if (a.b)
            prefetch_l2(a.b + i);
    }
}

/* One row: residual + get(pack) is rounded, kept and normalised; the same arithmetic as norm.cu. */
template <typename T, typename GET>
__device__ void norm_row(const tm_norm_args &a, int row, float *slots, GET get)
{
    constexpr int V = lanes<T>;
    const int packs = a.h / V;
    const size_t at = (size_t)row * packs;
    void *residual_out = a.residual_out ? a.residual_out : a.residual;
    float x[PACKS][V], sum = 0.0f, sq = 0.0f;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int i = k * THREADS + (int)threadIdx.x;
        if (i >= packs)
            break;
        pack16<T> r = load_pack<T, V>(a.residual, at + i);
        const pack16<T> d = get(i);
#pragma unroll
        for (int j = 0; j < V; j++) {
            r.e[j] = from_f32<T>(to_f32(r.e[j]) + to_f32(d.e[j]));
            x[k][j] = to_f32(r.e[j]);
            sum += x[k][j];
        }
        store_pack<T, V>(residual_out, at + i, r);
    }
    if (!a.out)
        return;
    const float mean = a.kind == TM_NORM_LAYER ? block_sum(sum, slots) / a.h : 0.0f;
#pragma unroll
    for (int k = 0; k < PACKS; k++)
        if (k * THREADS + (int)threadIdx.x < packs)
#pragma unroll
            for (int j = 0; j < V; j++)
                sq += (x[k][j] - mean) * (x[k][j] - mean);
    const float inv = rsqrtf(block_sum(sq, slots) / a.h + a.eps), one = a.add_one ? 1.0f : 0.0f;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const int i = k * THREADS + (int)threadIdx.x;
        if (i >= packs)
            break;
        pack16<T> o;
#pragma unroll
        for (int j = 0; j < V; j++) {
            const float v = (x[k][j] - mean) * inv * (one + a.w[i * V + j]);
            o.e[j] = from_f32<T>(a.b ? v + a.b[i * V + j] : v);
        }
        store_pack<T, V>(a.out, at + i, o);
    }
}

/* What becomes of a row's sums, which get(pack of the row) hands out. */
template <typename T, bool NORM, typename GET>
__device__ void finish_row(const job &j, int row, float *slots, GET get)
{
    if (NORM) {
        norm_row<T>(j.norm, row, slots, get);
        return;
    }
    const size_t at = (size_t)row * j.packs;
    for (int i = (int)threadIdx.x; i < j.packs && at + i < j.total; i += THREADS)
        store_numbers<T>(j.x, at + i, j.n, get(i));
}

/* Pack `at` of all ranks, as packets in this rank's segment and from its own x. All ranks' packets are asked for at
 * once: one trip to memory, not one a rank. */
template <typename T, int R>
__device__ pack16<T> receive(const tm_peers &p, call &c, size_t at, pack16<T> own)
{
    uint4 w[R][2];
    for (;;) {
        int missing = -1;
#pragma unroll
        for (int r = 0; r < R; r++)
            if (r < p.size && r != p.rank) {
                const char *from = packets_of(p, p.rank, c.half, r) + at * 32;
                w[r][0] = load_packet(from);
                w[r][1] = load_packet(from + 16);
            }
#pragma unroll
        for (int r = 0; r < R; r++)
            if (r < p.size && r != p.rank &&
                (w[r][0].y != c.mark || w[r][0].w != c.mark || w[r][1].y != c.mark ||
                 w[r][1].w != c.mark))
                missing = r;
        if (missing < 0 || too_late(p, c, missing))
            break;
    }
    float sum[lanes<T>] = {};
    bits<T> mine;
    mine.p = own;
#pragma unroll
    for (int r = 0; r < R; r++)
        if (r == p.rank)
            add_pack<T>(sum, mine.u);
        else if (r < p.size)
            add_pack<T>(sum, uint4{w[r][0].x, w[r][0].z, w[r][1].x, w[r][1].z});
    return rounded<T>(sum);
}

template <typename T, int R, bool NORM>
__global__ void __launch_bounds__(THREADS) push_kernel(tm_peers p, job j)
{
    SHARED(float[32], slots);
    start_next();
    if (NORM)
        prefetch_norm(j.norm);
    wait_previous();
    call c = begin_call(p);
    for (int row = blockIdx.x; row < j.rows; row += gridDim.x)
        for (int i = (int)threadIdx.x; i < j.packs; i += THREADS) {
            const size_t at = (size_t)row * j.packs + i;
            if (at >= j.total)
                break;
            bits<T> b;
            b.p = load_numbers<T>(j.x, at, j.n);
#pragma unroll
            for (int k = 1; k < R; k++)
                if (k < p.size) {
                    const int to = p.rank + k < p.size ? p.rank + k : p.rank + k - p.size;
                    char *place = packets_of(p, to, c.half, p.rank) + at * 32;
                    store_packet(place, b.u.x, b.u.y, c.mark);
                    store_packet(place + 16, b.u.z, b.u.w, c.mark);
                }
        }
    __syncthreads();
    count_call(p, c, j.large);
    for (int row = blockIdx.x; row < j.rows; row += gridDim.x) {
        const size_t at = (size_t)row * j.packs;
        finish_row<T, NORM>(j, row, slots, [&](int i) {
            return receive<T, R>(p, c, at + i, load_numbers<T>(j.x, at + i, j.n));
        });
    }
}

/* Pack `at` of all ranks' stages. */
template <typename T, int R>
__device__ pack16<T> sum_stages(const tm_peers &p, const call &c, size_t at)
{
    uint4 w[R];
#pragma unroll
    for (int r = 0; r < R; r++)
        if (r < p.size)
            w[r] = load_peer(stage_of(p, r, c.half) + at * 16);
    float sum[lanes<T>] = {};
#pragma unroll
    for (int r = 0; r < R; r++)
        if (r < p.size)
            add_pack<T>(sum, w[r]);
    return rounded<T>(sum);
}

/* Of a row's packs, rank s adds first_of(s) .. first_of(s + 1). */
__device__ int first_of(const tm_peers &p, int packs, int s)
{
    return (int)((int64_t)packs * s / p.size);
}

__device__ int owner_of(const tm_peers &p, int packs, int i)
{
    const int s = (int)((int64_t)i * p.size / packs);
    return i >= first_of(p, packs, s + 1) ? s + 1 : s;
}

template <typename T, int R>
__device__ void sum_share(const tm_peers &p, const call &c, const job &j)
{
    const int first = first_of(p, j.packs, p.rank);
    const int share = first_of(p, j.packs, p.rank + 1) - first;
    const int rows = (j.rows - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    char *own = stage_of(p, p.rank, c.half);
    for (int k = (int)threadIdx.x; k < rows * share; k += THREADS) {
        const int row = (int)blockIdx.x + k / share * (int)gridDim.x;
        const size_t at = (size_t)row * j.packs + first + k % share;
        if (at < j.total)
            store_pack<T, lanes<T>>(own, at, sum_stages<T, R>(p, c, at));
    }
}

template <typename T, int R, bool NORM, bool TWO>
__global__ void __launch_bounds__(THREADS) pull_kernel(tm_peers p, job j)
{
    SHARED(float[32], slots);
    start_next();
    if (NORM)
        prefetch_norm(j.norm);
    wait_previous();
    call c = begin_call(p);
    char *own = stage_of(p, p.rank, c.half);
    for (int row = blockIdx.x; row < j.rows; row += gridDim.x)
        for (int i = (int)threadIdx.x; i < j.packs; i += THREADS) {
            const size_t at = (size_t)row * j.packs + i;
            if (at < j.total)
                store_pack<T, lanes<T>>(own, at, load_numbers<T>(j.x, at, j.n));
        }
    meet(p, c, 0, j.large);
    if (TWO) {
        sum_share<T, R>(p, c, j);
        meet(p, c, 1, j.large);
    }
    for (int row = blockIdx.x; row < j.rows; row += gridDim.x) {
        const size_t at = (size_t)row * j.packs;
        finish_row<T, NORM>(j, row, slots, [&](int i) {
            if (!TWO)
                return sum_stages<T, R>(p, c, at + i);
            bits<T> b;
            b.u = load_peer(stage_of(p, owner_of(p, j.packs, i), c.half) + (at + i) * 16);
            return b.p;
        });
    }
}

template <typename T, int R, bool NORM>
cudaError_t launch(const tm_peers *p, const job &j, tm_peer_way way, const tm_cuda_ctx *c)
{
    const dim3 grid((unsigned)(j.rows < TM_PEER_BLOCKS ? j.rows : TM_PEER_BLOCKS));
    switch (way) {
    case TM_PEER_PUSH:
        return launch_kernel(c, push_kernel<T, R, NORM>, grid, THREADS, 0, *p, j);
    case TM_PEER_ONE:
        return launch_kernel(c, pull_kernel<T, R, NORM, false>, grid, THREADS, 0, *p, j);
    case TM_PEER_TWO:
        return launch_kernel(c, pull_kernel<T, R, NORM, true>, grid, THREADS, 0, *p, j);
    default:
        return cudaErrorInvalidValue;
    }
}

template <typename T, bool NORM>
cudaError_t launch_ranks(const tm_peers *p, const job &j, tm_peer_way way, const tm_cuda_ctx *c)
{
    if (p->size <= 2)
        return launch<T, 2, NORM>(p, j, way, c);
    return p->size <= 4 ? launch<T, 4, NORM>(p, j, way, c) : launch<T, 8, NORM>(p, j, way, c);
}

/* ---- meeting, columns, picks ---- */

__global__ void __launch_bounds__(32) meet_kernel(tm_peers p)
{
    start_next();
    wait_previous();
    call c = begin_call(p);
    meet(p, c, 0, true);
}

__global__ void __launch_bounds__(256) copy_kernel(tm_peer_copy a)
{
    start_next();
    wait_previous();
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

__global__ void __launch_bounds__(PICKS) pick_kernel(tm_peers p, tm_argmax_args a)
{
    start_next();
    wait_previous();
    call c = begin_call(p);
    __syncthreads();
    count_call(p, c, false);
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
    start_next();
    wait_previous();
    const int row = (int)(blockIdx.x * PICKS + threadIdx.x);
    if (row < a.n_rows)
        keys[row] = key_of(a, row);
}

__global__ void __launch_bounds__(PICKS) unkey_kernel(const uint64_t *keys, tm_argmax_args a)
{
    start_next();
    wait_previous();
    const int row = (int)(blockIdx.x * PICKS + threadIdx.x);
    if (row < a.n_rows)
        a.out[row] = column_of(keys[row]);
}

dim3 pick_grid(const tm_argmax_args *a)
{
    return dim3((unsigned)((a->n_rows + PICKS - 1) / PICKS));
}

} /* namespace */

extern "C" size_t tm_peer_capacity(tm_peer_way way, tm_dtype dtype)
{
    const size_t bytes = way == TM_PEER_PUSH ? TM_PEER_PACKET_BYTES / 2 : TM_PEER_STAGE_BYTES;
    return bytes / (dtype == TM_DTYPE_F32 ? 4 : 2);
}

extern "C" bool tm_peer_norm_fits(int h, tm_dtype dtype)
{
    return dtype != TM_DTYPE_F32 && h % 8 == 0 && h / 8 <= THREADS * PACKS;
}

extern "C" cudaError_t tm_peer_sum_launch(const tm_peers *p, const tm_peer_sum *s, tm_peer_way way,
                                          const tm_cuda_ctx *c)
{
    const size_t per_pack = s->dtype == TM_DTYPE_F32 ? 4 : 8;
    const size_t n = s->norm ? (size_t)s->norm->n_tokens * (size_t)s->norm->h : s->n;
    const bool fits = !s->norm || tm_peer_norm_fits(s->norm->h, s->dtype);
    job j = {};
    if (n == 0)
        return cudaSuccess;
    if (n > tm_peer_capacity(way, s->dtype) || !fits || (uintptr_t)s->x % 16 != 0)
        return cudaErrorInvalidValue;
    if (s->norm)
        j.norm = *s->norm;
    j.x = s->x;
    j.n = n;
    j.total = (n + per_pack - 1) / per_pack;
    j.packs = s->norm ? s->norm->h / (int)per_pack : ROW;
    j.rows = (int)((j.total + (size_t)j.packs - 1) / (size_t)j.packs);
    j.large = n * 16 / per_pack >= LARGE;
    switch (s->dtype) {
    case TM_DTYPE_BF16:
        return s->norm ? launch_ranks<__nv_bfloat16, true>(p, j, way, c)
                       : launch_ranks<__nv_bfloat16, false>(p, j, way, c);
    case TM_DTYPE_F16:
        return s->norm ? launch_ranks<__half, true>(p, j, way, c)
                       : launch_ranks<__half, false>(p, j, way, c);
    case TM_DTYPE_F32:
        return launch_ranks<float, false>(p, j, way, c);
    default:
        return cudaErrorInvalidValue;
    }
}

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
