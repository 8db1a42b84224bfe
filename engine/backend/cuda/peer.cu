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
 * Bytes into a rank, n numbers' bytes: PUSH and ONE (R - 1) n, TWO 2 (R - 1) / R n.
 *
 * A wait ends when its time is over or the host asks for it: the call then leaves rubbish, marks the state as failed
 * (later calls do not wait) and tells the host through a word of its memory. Packets of picks have a mark of 31 bits of
 * the call's number: a packet's place could be taken for filled if it was last used exactly 2^31 calls ago. */

#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/peer.h"
#include "engine/backend/cuda/ptx.cuh"
#include "engine/backend/cuda/system.cuh"
#include "engine/backend/cuda/vec.cuh"

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

/* All threads of the block know the call's number: after a barrier. The ticket is for count_call; it is taken in the
 * middle of the kernel and used later, so that nothing waits for the trip to memory. */
__device__ unsigned take_ticket(const tm_peers &p)
{
    return threadIdx.x == blockDim.x - 1 && gridDim.x > 1 ? atomicAdd(&p.state->ticket, 1u) : 0;
}

/* The last block to take a ticket counts the call. */
__device__ void count_call(const tm_peers &p, const call &c, unsigned ticket, bool tell)
{
    if (threadIdx.x != blockDim.x - 1 || ticket != gridDim.x - 1)
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

/* A rank has no place for itself. */
__device__ char *inbox_of(const tm_peers &p, int at, int half, int from)
{
    return p.segment[at] + TM_PEER_FLAG_BYTES + 2 * TM_PEER_RANKS * TM_PEER_PACKET_BYTES +
           (size_t)half * TM_PEER_INBOX_BYTES + (size_t)(from < at ? from : from - 1) * p.place;
}

__device__ char *stage_of(const tm_peers &p, int at, int half)
{
    return p.segment[at] + TM_PEER_FLAG_BYTES + 2 * TM_PEER_RANKS * TM_PEER_PACKET_BYTES +
           2 * TM_PEER_INBOX_BYTES + (size_t)half * TM_PEER_STAGE_BYTES;
}

/* This block and its namesakes on the other ranks have come to the point; what each wrote before, all see after. The
 * first meeting of a call counts it. */
__device__ void meet(const tm_peers &p, call &c, int point, bool tell)
{
    __syncthreads();
    const int r = (int)threadIdx.x;
    if (point == 0)
        count_call(p, c, take_ticket(p), tell);
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

/* The blocks that share a row, and which threads these are. */
struct team {
    int size, member, width, thread;
};

__device__ team this_team()
{
    team t;
    t.size = cluster_size();
    t.member = cluster_rank();
    t.width = t.size * (int)blockDim.x;
    t.thread = t.member * (int)blockDim.x + (int)threadIdx.x;
    return t;
}

/* The sum over the team, in every thread; one slot for each of its warps, at most 32. */
__device__ float team_sum(const team &t, float v, float *slots)
{
    for (int i = 16; i > 0; i >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, i);
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32,
              warps = (int)blockDim.x / 32;
    if (t.size > 1) {
        if (lane < t.size)
            store_cluster(slots + t.member * warps + warp, lane, v);
        cluster_arrive();
        cluster_wait();
    } else {
        if (lane == 0)
            slots[warp] = v;
        __syncthreads();
    }
    v = lane < t.size * warps ? slots[lane] : 0.0f;
    for (int i = 16; i > 0; i >>= 1)
        v += __shfl_xor_sync(0xffffffffu, v, i);
    return v;
}

/* Eight of a norm's weights. */
__device__ void load_eight(float *o, const float *w, bool aligned)
{
    if (aligned) {
        const float4 a = reinterpret_cast<const float4 *>(w)[0],
                     b = reinterpret_cast<const float4 *>(w)[1];
        o[0] = a.x, o[1] = a.y, o[2] = a.z, o[3] = a.w;
        o[4] = b.x, o[5] = b.y, o[6] = b.z, o[7] = b.w;
        return;
    }
    for (int j = 0; j < 8; j++)
        o[j] = w[j];
}

/* The norm's rows for one thread: packs thread, thread + width, ... of each. The slots of a sum are free again after the
 * next one: all have read them when they come to its barrier. */
template <typename T, int N> struct normer {
    const tm_norm_args &a;
    const team t;
    float (&slots)[2][32];
    const int packs;
    int turn;
    float w[N][8];

    __device__ normer(const tm_norm_args &args, const team &t0, float (&s)[2][32])
        : a(args), t(t0), slots(s), packs(args.h / 8), turn(0)
    {
    }

    __device__ bool has(int k) const
    {
        return k * t.width + t.thread < packs;
    }

    /* Weights never change, so this may come before the kernel in front has ended. */
    __device__ void load_weights_early()
    {
        const bool aligned = (uintptr_t)a.w % 16 == 0;
        const float one = a.add_one ? 1.0f : 0.0f;
#pragma unroll
        for (int k = 0; k < N; k++)
            if (a.out && has(k)) {
                const int i = (k * t.width + t.thread) * 8;
                load_eight(w[k], a.w + i, aligned);
#pragma unroll
                for (int j = 0; j < 8; j++)
                    w[k][j] = one + w[k][j];
                if (a.b)
                    prefetch_l2(a.b + i);
            }
    }

    __device__ float sum(float v)
    {
        return team_sum(t, v, slots[turn++ & 1]);
    }

    /* residual + get's packs is rounded, kept and normalised; the same arithmetic as norm.cu. get(base, d) sets d[k] to
     * pack base + k * width of the ranks' sum, for those that the thread has. */
    template <typename GET> __device__ void row(int row, GET get)
    {
        const size_t base = (size_t)row * packs + t.thread;
        void *residual_out = a.residual_out ? a.residual_out : a.residual;
        bits<T> r[N], d[N];
        float s = 0.0f, sq = 0.0f;
#pragma unroll
        for (int k = 0; k < N; k++)
            if (has(k))
                r[k].p = load_pack<T, 8>(a.residual, base + k * t.width);
        get(base, d);
#pragma unroll
        for (int k = 0; k < N; k++)
            if (has(k)) {
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    r[k].p.e[j] = from_f32<T>(to_f32(r[k].p.e[j]) + to_f32(d[k].p.e[j]));
                    s += to_f32(r[k].p.e[j]);
                }
                store_pack<T, 8>(residual_out, base + k * t.width, r[k].p);
            }
        if (!a.out)
            return;
        const float mean = a.kind == TM_NORM_LAYER ? sum(s) / a.h : 0.0f;
#pragma unroll
        for (int k = 0; k < N; k++)
            if (has(k))
#pragma unroll
                for (int j = 0; j < 8; j++)
                    sq += (to_f32(r[k].p.e[j]) - mean) * (to_f32(r[k].p.e[j]) - mean);
        const float inv = rsqrtf(sum(sq) / a.h + a.eps);
#pragma unroll
        for (int k = 0; k < N; k++)
            if (has(k)) {
                const float *b = a.b ? a.b + (k * t.width + t.thread) * 8 : NULL;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float v = (to_f32(r[k].p.e[j]) - mean) * inv * w[k][j];
                    r[k].p.e[j] = from_f32<T>(b ? v + b[j] : v);
                }
                store_pack<T, 8>(a.out, base + k * t.width, r[k].p);
            }
    }
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

/* ---- meeting, columns, picks ---- */

__global__ void __launch_bounds__(32) meet_kernel(const __grid_constant__ tm_peers p)
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

__global__ void __launch_bounds__(PICKS)
    pick_kernel(const __grid_constant__ tm_peers p, const __grid_constant__ tm_argmax_args a)
{
    start_next();
    wait_previous();
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
