/* Sums over the ranks through peer memory: see peer.h for the segment and why two halves are enough.
 *
 * PUSH: a number crosses the link once and is its own mark. The receiver polls its own memory, where 0 says that nothing
 * has come, and writes the 0 again once it has read: the latency of one store, no meeting, no fence. A word that is 0
 * goes as 0x80000000, which is one or two zeros too, and the sign of a zero is nothing to a sum that begins with +0.
 * With a norm, a row belongs to a team (a cluster) of blocks, so that the row's bytes pass through several
 * multiprocessors; the sum of its squares is put together in shared memory with one barrier of the team. Weights are in
 * registers before the kernel in front ends, the residual before the numbers come.
 *
 * ONE and TWO: numbers are copied to this rank's stage, a flag says so, the others read. Here work is cut into rows (of
 * the norm, or of ROW packs); block b takes rows b, b + grid, ... on every rank, so blocks meet their namesakes only and
 * nothing waits for a whole grid. In TWO the sums take the place of this rank's own share in its stage, which no other
 * rank reads before the second meeting.
 *
 * Bytes into a rank, n numbers' bytes: PUSH and ONE (R - 1) n, TWO 2 (R - 1) / R n. */
#include "engine/backend/cuda/peer_norm.cuh"

namespace
{

constexpr int THREADS = 512; /* of a block at most */
constexpr int ROW = THREADS; /* packs of a row where there is no norm */
constexpr int PACKS = 4;     /* of a norm's row per thread, at most */
constexpr int PUSH_RESIDENT =
    65536; /* threads that wait at a time: fewer than run at a time on any device with a link */
constexpr int PUSH_THREADS = 128; /* of a block of these, except where it has a row to itself */
constexpr int PUSH_PACKS = TM_PEER_INBOX_BYTES / 16 / PUSH_RESIDENT; /* per thread, at most */
constexpr int TEAM = 8; /* blocks of a cluster, at most */
constexpr size_t LARGE = (size_t)256 << 10;

struct job {
    tm_norm_args norm; /* its delta is x */
    void *x;
    size_t n;        /* numbers */
    size_t total;    /* packs, the last one perhaps in part */
    int rows, packs; /* packs of a row; the last row may be shorter */
    bool large;
};
/* ---- push ---- */

__device__ uint32_t never_zero(uint32_t w)
{
    return w ? w : 0x80000000u;
}

template <int R> __device__ void send(const tm_peers &p, const call &c, size_t at, uint4 u)
{
    u = uint4{never_zero(u.x), never_zero(u.y), never_zero(u.z), never_zero(u.w)};
#pragma unroll
    for (int k = 1; k < R; k++)
        if (k < p.size) {
            const int to = p.rank + k < p.size ? p.rank + k : p.rank + k - p.size;
            store_peer(inbox_of(p, to, c.half, p.rank) + at * 16, u);
        }
}

/* Packs at, at + step, ... before end: x[k], which is this rank's own, becomes the sum. The packs of all ranks are asked
 * for at once: one trip to memory, not one a rank. */
template <typename T, int R, int M>
__device__ void receive_some(const tm_peers &p, call &c, size_t at, size_t step, size_t end,
                             bits<T> *x)
{
    uint4 w[M][R];
    for (;;) {
        int missing = -1;
#pragma unroll
        for (int k = 0; k < M; k++)
#pragma unroll
            for (int r = 0; r < R; r++)
                if (r < p.size && r != p.rank && at + k * step < end)
                    w[k][r] = load_peer(inbox_of(p, p.rank, c.half, r) + (at + k * step) * 16);
#pragma unroll
        for (int k = 0; k < M; k++)
#pragma unroll
            for (int r = 0; r < R; r++)
                if (r < p.size && r != p.rank && at + k * step < end &&
                    (w[k][r].x == 0 || w[k][r].y == 0 || w[k][r].z == 0 || w[k][r].w == 0))
                    missing = r;
        if (missing < 0 || too_late(p, c, missing))
            break;
    }
#pragma unroll
    for (int k = 0; k < M; k++) {
        if (at + k * step >= end)
            break;
        float sum[lanes<T>] = {};
#pragma unroll
        for (int r = 0; r < R; r++)
            if (r == p.rank) {
                add_pack<T>(sum, x[k].u);
            } else if (r < p.size) {
                add_pack<T>(sum, w[k][r]);
                store_peer(inbox_of(p, p.rank, c.half, r) + (at + k * step) * 16,
                           uint4{0, 0, 0, 0});
            }
        x[k].p = rounded<T>(sum);
    }
}

template <typename T, int R, int N>
__device__ void receive(const tm_peers &p, call &c, size_t at, size_t step, size_t end, bits<T> *x)
{
    constexpr int M = N < 8 / R ? N : 8 / R; /* as many as registers can hold */
#pragma unroll
    for (int k = 0; k < N; k += M)
        if (at + k * step < end)
            receive_some<T, R, M>(p, c, at + k * step, step, end, x + k);
}

template <typename T, int R, int N>
__global__ void __launch_bounds__(PUSH_THREADS)
    push_kernel(const __grid_constant__ tm_peers p, const __grid_constant__ job j)
{
    start_next();
    wait_previous();
    call c = begin_call(p);
    const size_t first = (size_t)blockIdx.x * PUSH_THREADS + threadIdx.x;
    const size_t step = (size_t)gridDim.x * PUSH_THREADS;
    bits<T> x[N];
#pragma unroll
    for (int k = 0; k < N; k++)
        if (first + k * step < j.total)
            x[k].p = load_numbers<T>(j.x, first + k * step, j.n);
#pragma unroll
    for (int k = 0; k < N; k++)
        if (first + k * step < j.total)
            send<R>(p, c, first + k * step, x[k].u);
    __syncthreads();
    const unsigned ticket = take_ticket(p);
    receive<T, R, N>(p, c, first, step, j.total, x);
#pragma unroll
    for (int k = 0; k < N; k++)
        if (first + k * step < j.total)
            store_numbers<T>(j.x, first + k * step, j.n, x[k].p);
    count_call(p, c, ticket, j.large);
}

template <typename T, int R, int N>
__global__ void __launch_bounds__(THREADS)
    push_norm_kernel(const __grid_constant__ tm_peers p, const __grid_constant__ job j)
{
    SHARED(float[2][32], slots);
    const team t = this_team();
    const int teams = (int)gridDim.x / t.size, first = (int)blockIdx.x / t.size;
    normer<T, N> norm(j.norm, t, slots);
    start_next();
    cluster_arrive();
    norm.load_weights_early();
    wait_previous();
    call c = begin_call(p);
    for (int row = first; row < j.rows; row += teams) {
        const size_t base = (size_t)row * j.packs + t.thread;
        bits<T> x[N];
#pragma unroll
        for (int k = 0; k < N; k++)
            if (norm.has(k))
                x[k].p = load_pack<T, 8>(j.x, base + k * t.width);
#pragma unroll
        for (int k = 0; k < N; k++)
            if (norm.has(k))
                send<R>(p, c, base + k * t.width, x[k].u);
    }
    __syncthreads();
    const unsigned ticket = take_ticket(p);
    cluster_wait(); /* all of the team have begun, so their shared memory is there */
    for (int row = first; row < j.rows; row += teams)
        norm.row(row, [&](size_t base, bits<T> *d) {
#pragma unroll
            for (int k = 0; k < N; k++)
                if (norm.has(k))
                    d[k].p = load_pack<T, 8>(j.x, base + k * t.width);
            receive<T, R, N>(p, c, base, t.width, (size_t)(row + 1) * j.packs, d);
        });
    count_call(p, c, ticket, j.large);
}

/* ---- pull ---- */

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

/* Pack at + i of the sums, i of the row. */
template <typename T, int R, bool TWO>
__device__ pack16<T> pull(const tm_peers &p, const call &c, const job &j, size_t at, int i)
{
    if (!TWO)
        return sum_stages<T, R>(p, c, at + i);
    bits<T> b;
    b.u = load_peer(stage_of(p, owner_of(p, j.packs, i), c.half) + (at + i) * 16);
    return b.p;
}

template <typename T, int R, bool TWO>
__device__ void pull_norms(const tm_peers &p, call &c, const job &j)
{
    SHARED(float[2][32], slots);
    normer<T, PACKS> norm(j.norm, this_team(), slots);
    norm.load_weights_early();
    for (int row = blockIdx.x; row < j.rows; row += gridDim.x)
        norm.row(row, [&](size_t base, bits<T> *d) {
#pragma unroll
            for (int k = 0; k < PACKS; k++)
                if (norm.has(k))
                    d[k].p = pull<T, R, TWO>(p, c, j, base - threadIdx.x,
                                             k * THREADS + (int)threadIdx.x);
        });
}

template <typename T, int R, bool TWO>
__device__ void pull_plain(const tm_peers &p, call &c, const job &j)
{
    for (int row = blockIdx.x; row < j.rows; row += gridDim.x) {
        const size_t at = (size_t)row * j.packs;
        for (int i = (int)threadIdx.x; i < j.packs && at + i < j.total; i += THREADS)
            store_numbers<T>(j.x, at + i, j.n, pull<T, R, TWO>(p, c, j, at, i));
    }
}

template <typename T, int R, bool NORM, bool TWO>
__global__ void __launch_bounds__(THREADS)
    pull_kernel(const __grid_constant__ tm_peers p, const __grid_constant__ job j)
{
    start_next();
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
    if constexpr (NORM)
        pull_norms<T, R, TWO>(p, c, j);
    else
        pull_plain<T, R, TWO>(p, c, j);
}

/* ---- launches ---- */

template <typename T, int R, int N>
cudaError_t launch_push(const tm_peers *p, const job &j, const tm_cuda_ctx *c)
{
    const size_t all = j.total < PUSH_RESIDENT ? j.total : PUSH_RESIDENT;
    const dim3 grid((unsigned)((all + PUSH_THREADS - 1) / PUSH_THREADS));
    return launch_kernel(c, push_kernel<T, R, N>, grid, PUSH_THREADS, 0, *p, j);
}

/* A team is as large as the row, up to TEAM blocks; without clusters a block has the row to itself. */
template <typename T, int R>
cudaError_t launch_push_norm(const tm_peers *p, const job &j, const tm_cuda_ctx *c)
{
    int team = 1, threads = PUSH_THREADS;
    while (c->dependent_launch && team < TEAM && team * threads < j.packs)
        team *= 2;
    while (team == 1 && threads < THREADS && threads < j.packs)
        threads += 32;
    const int most = PUSH_RESIDENT / (team * threads), teams = j.rows < most ? j.rows : most;
    const dim3 grid((unsigned)(teams * team));
    return team * threads >= j.packs
               ? launch_clusters(c, push_norm_kernel<T, R, 1>, grid, threads, team, *p, j)
               : launch_clusters(c, push_norm_kernel<T, R, PACKS>, grid, threads, team, *p, j);
}

template <typename T, int R, bool NORM>
cudaError_t launch(const tm_peers *p, const job &j, tm_peer_way way, const tm_cuda_ctx *c)
{
    const dim3 grid((unsigned)(j.rows < TM_PEER_BLOCKS ? j.rows : TM_PEER_BLOCKS));
    switch (way) {
    case TM_PEER_PUSH:
        if constexpr (NORM)
            return launch_push_norm<T, R>(p, j, c);
        else
            return j.total <= PUSH_RESIDENT ? launch_push<T, R, 1>(p, j, c)
                                            : launch_push<T, R, PUSH_PACKS>(p, j, c);
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
} /* namespace */

extern "C" size_t tm_peer_place(int ranks)
{
    return TM_PEER_INBOX_BYTES / (size_t)(ranks > 1 ? ranks - 1 : 1) / 128 * 128;
}

extern "C" size_t tm_peer_capacity(const tm_peers *p, tm_peer_way way, tm_dtype dtype)
{
    const size_t bytes = way == TM_PEER_PUSH ? p->place : TM_PEER_STAGE_BYTES;
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
    if (n > tm_peer_capacity(p, way, s->dtype) || !fits || (uintptr_t)s->x % 16 != 0)
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
