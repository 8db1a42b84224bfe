/* Cuts and draw over the weights of one row, by one block.
 *
 * Every filter keeps a leading part of the weights in order, so one pair says what stays: the least weight, and how many
 * of those equal to it. A cut is found by radix selection over the bits of the weights, 10 at a time, from histograms of
 * counts or masses; only chunks that may hold it are looked at. */
#ifndef TM_ENGINE_BACKEND_CUDA_SAMPLE_CHOOSE_CUH
#define TM_ENGINE_BACKEND_CUDA_SAMPLE_CHOOSE_CUH

#include "engine/backend/cuda/sample.cuh"

namespace
{

/* No cut by top_p lies below: what weighs less weighs, all together, less than is left out. */
__device__ float top_p_floor(u64 top_p, float part, int n)
{
    return part * 0x1p-64f * (float)(0ull - top_p) / (float)n;
}

constexpr int RADIX = 10;
constexpr int BINS = 1 << RADIX; /* one for each thread */
static_assert(BINS == THREADS, "");

typedef struct board {
    slots_t slots;
    unsigned low[BINS], high[BINS]; /* 64-bit sums: the hardware adds 32 bits at once */
    u64 above;
    int bin, chunk, ties;
    u64 rest;
} board;

/* One row of weights. tops: the largest weight of each chunk; 0: all of them are without mass, and nothing is kept. */
typedef struct weights {
    const float *x;
    unsigned *tops;
    u64 *masses;
    int n, chunks;
    float max, scale;
    bool kept;
} weights;

/* Bits of the weight at j * 32 + lane of chunk c; false behind the end. */
__device__ __forceinline__ bool weight_at(const weights &v, int c, int j, unsigned *bits)
{
    const int i = c * CHUNK + j * 32 + lane_id();
    *bits = 0;
    if (i >= v.n)
        return false;
    *bits = __float_as_uint(v.kept ? v.x[i] : weight_of(v.x[i], v.max, v.scale));
    return true;
}

/* Every lane looks whether one chunk has a weight of at least `floor`; yes(c) is then called by the whole warp, and
 * no(c) by a single lane. */
template <typename Y, typename N>
__device__ void each_chunk(const weights &v, unsigned floor, Y yes, N no)
{
    for (int first = warp_id(); first < v.chunks; first += WARPS * 32) {
        const int mine = first + lane_id() * WARPS;
        const unsigned top = mine < v.chunks ? v.tops[mine] : 0;
        unsigned left = __ballot_sync(ALL, top && top >= floor);
        if (mine < v.chunks && !(left >> lane_id() & 1))
            no(mine);
        for (; left; left &= left - 1)
            yes(first + (__ffs((int)left) - 1) * WARPS);
    }
}

/* f(bits, there) by whole warps: of the weights in chunks with one of at least `floor`, or of the chunks' largest. */
template <typename F> __device__ void each_weight(const weights &v, unsigned floor, F f)
{
    const auto yes = [&](int c) {
        unsigned bits[EACH];
        bool there[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++)
            there[j] = weight_at(v, c, j, &bits[j]);
#pragma unroll
        for (int j = 0; j < EACH; j++)
            f(bits[j], there[j]);
    };
    each_chunk(v, floor, yes, [](int) {});
}
template <typename F> __device__ void each_top(const weights &v, F f)
{
    for (int c = warp_id() * 32; c < v.chunks; c += THREADS) {
        const bool there = c + lane_id() < v.chunks;
        f(there ? v.tops[c + lane_id()] : 0, there);
    }
}

__device__ void add64(board &b, unsigned bin, u64 value)
{
    const unsigned low = (unsigned)value, old = atomicAdd(&b.low[bin], low);
    const unsigned high = (unsigned)(value >> 32) + (old + low < old);
    if (high)
        atomicAdd(&b.high[bin], high);
}

/* Where all lanes have the same bin, as in rows of equal logits, one adds for them. */
__device__ void tally(board &b, unsigned bin, u64 value, bool there)
{
    const unsigned lanes = __ballot_sync(ALL, there);
    if (!lanes)
        return;
    const unsigned first = __shfl_sync(ALL, bin, __ffs((int)lanes) - 1);
    if (__all_sync(ALL, !there || bin == first)) {
        value = warp_sum(there ? value : 0);
        if (lane_id() == 0)
            add64(b, first, value);
    } else if (there) {
        add64(b, bin, value);
    }
}

typedef struct cut {
    unsigned least; /* what is above stays */
    u64 above;      /* how much that is, less than was wanted */
    bool found;     /* else there is less than was wanted */
} cut;

/* The weight at which `want` is reached, from the largest on: as many, or as much mass. */
template <bool BY_MASS, bool OF_TOPS>
__device__ cut select(board &b, const weights &v, unsigned floor, u64 want)
{
    cut c = {0, 0, true};
    for (int shift = 2 * RADIX; shift >= 0; shift -= RADIX) {
        u64 all;
        __syncthreads();
        b.low[threadIdx.x] = b.high[threadIdx.x] = 0;
        if (threadIdx.x == 0)
            b.bin = -1;
        __syncthreads();
        const auto add = [&](unsigned bits, bool there) {
            there = there && bits >> RADIX >> shift == c.least;
            tally(b, bits >> shift & (BINS - 1), BY_MASS ? mass_of_bits(bits) : 1, there);
        };
        if (OF_TOPS)
            each_top(v, add);
        else
            each_weight(v, floor, add);
        __syncthreads();
        const int bin = BINS - 1 - (int)threadIdx.x;
        const u64 own = (u64)b.high[bin] << 32 | b.low[bin];
        const u64 above = c.above + block_scan(b.slots, own, &all);
        if (above < want && want <= above + own) {
            b.bin = bin;
            b.above = above;
        }
        __syncthreads();
        if (b.bin < 0)
            return {0, 0, false};
        c.least = c.least << RADIX | (unsigned)b.bin;
        c.above = b.above;
    }
    return c;
}

/* What stays: the weights above `least`, and the first `ties` of those equal to it. */
typedef struct stay {
    unsigned least;
    u64 ties;
} stay;

__device__ u64 mass_staying(board &b, const weights &v, const stay &s)
{
    u64 mass = 0;
    each_weight(v, s.least,
                [&](unsigned bits, bool) { mass += bits > s.least ? mass_of_bits(bits) : 0; });
    const u64 each = mass_of_bits(s.least);
    return block_sum(b.slots, mass) + (each ? s.ties * each : 0);
}

__device__ stay top_k_stays(board &b, const weights &v, int k)
{
    unsigned floor = 0;
    if (k <= v.chunks) /* as many chunks have a weight of at least this */
        floor = select<false, true>(b, v, 0, (u64)k).least;
    const cut c = select<false, false>(b, v, floor, (u64)k);
    return {c.least, c.found ? (u64)k - c.above : (u64)v.n};
}

__device__ stay top_p_stays(board &b, const weights &v, u64 top_p, u64 total, unsigned floor)
{
    u64 want = __umul64hi(total, top_p);
    want += total * top_p != 0;
    want = want ? want : 1;
    const cut c = select<true, false>(b, v, floor, want);
    const u64 each = mass_of_bits(c.least);
    return {c.least, each ? (want - c.above + each - 1) / each : (u64)v.n};
}

__device__ stay filter(board &b, const tm_sample_row &p, const weights &v)
{
    stay s = {0, (u64)v.n};
    const bool top_k = p.top_k > 0 && p.top_k < v.n;
    if (top_k)
        s = top_k_stays(b, v, p.top_k);
    if (p.top_p) {
        u64 total = 0;
        for (int c = (int)threadIdx.x; c < v.chunks && !top_k; c += THREADS)
            total += v.masses[c];
        total = top_k ? mass_staying(b, v, s) : block_sum(b.slots, total);
        const float floor = top_p_floor(p.top_p, 0.5f, v.n) * ((float)total * 0x1p-44f);
        s = top_p_stays(b, v, p.top_p, total, p.top_k ? s.least : __float_as_uint(floor));
    }
    if (__float_as_uint(p.min_p) > s.least) /* the largest weight is 1 */
        s = {__float_as_uint(p.min_p) - 1, 0};
    return s;
}

/* Mass above and number of ties of every chunk, in the places of its mass and its largest weight. */
__device__ void weigh_stay(const weights &v, const stay &s)
{
    const auto put = [&](int c, u64 mass, unsigned ties) {
        v.masses[c] = mass;
        v.tops[c] = ties;
    };
    const auto weigh = [&](int c) {
        u64 mass = 0;
        unsigned ties = 0;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            unsigned bits;
            const bool there = weight_at(v, c, j, &bits);
            mass += bits > s.least ? mass_of_bits(bits) : 0;
            ties += there && bits == s.least;
        }
        mass = warp_sum(mass);
        ties = __reduce_add_sync(ALL, ties);
        if (lane_id() == 0)
            put(c, mass, ties);
    };
    each_chunk(v, s.least, weigh, [&](int c) { put(c, 0, 0); });
    __syncthreads();
}

/* How many of a chunk's ties stay when `before` ties lie in front of it. */
__device__ u64 ties_of(const weights &v, const stay &s, int c, u64 before)
{
    const u64 left = s.ties > before ? s.ties - before : 0;
    return left < v.tops[c] ? left : v.tops[c];
}

/* The chunk in which the running mass passes u of the whole, and what is left to pass inside it. Each thread has a
 * run of chunks. */
__device__ void find_chunk(board &b, const weights &v, const stay *s, u64 u)
{
    const int run = (v.chunks + THREADS - 1) / THREADS, from = (int)threadIdx.x * run;
    const int to = min(from + run, v.chunks);
    const u64 each = s ? mass_of_bits(s->least) : 0;
    u64 ties = 0, own = 0, all;
    for (int c = from; c < to && s; c++)
        ties += v.tops[c];
    if (s)
        ties = block_scan(b.slots, ties, &all);
    u64 tie = ties;
    for (int c = from; c < to; c++) {
        own += v.masses[c] + (s ? ties_of(v, *s, c, tie) * each : 0);
        tie += s ? v.tops[c] : 0;
    }
    u64 passed = block_scan(b.slots, own, &all);
    const u64 target = __umul64hi(all, u);
    if (passed > target || target >= passed + own)
        return;
    for (int c = from; c < to; c++) {
        const u64 kept = s ? ties_of(v, *s, c, ties) : 0, mass = v.masses[c] + kept * each;
        if (target < passed + mass) {
            b.chunk = c;
            b.ties = (int)kept;
            b.rest = target - passed;
            return;
        }
        passed += mass;
        ties += s ? v.tops[c] : 0;
    }
}

/* The first index of the chunk where the running mass is more than rest; by the first warp. */
__device__ int walk(const weights &v, const stay *s, int c, int ties, u64 rest)
{
    const unsigned before = (1u << lane_id()) - 1;
    for (int j = 0; j < EACH; j++) {
        unsigned bits;
        const bool there = weight_at(v, c, j, &bits);
        const unsigned equal = __ballot_sync(ALL, s && there && bits == s->least);
        const bool stays =
            !s || bits > s->least || (equal >> lane_id() & 1 && __popc(equal & before) < ties);
        const u64 passed = warp_scan(stays ? mass_of_bits(bits) : 0);
        const unsigned over = __ballot_sync(ALL, passed > rest);
        if (over)
            return c * CHUNK + j * 32 + __ffs((int)over) - 1;
        ties -= __popc(equal);
        rest -= __shfl_sync(ALL, passed, 31);
    }
    return -1;
}

} /* namespace */

#endif
