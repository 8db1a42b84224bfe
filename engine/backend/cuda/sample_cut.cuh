/* Cuts over the weights of one row, by the blocks of one cluster; all of them go the same way.
 *
 * Every filter keeps a leading part of the weights in order, so one pair says what stays: the least weight, and how many
 * of those equal to it. The row's histogram (sample.cu) tells the bin in which a cut lies. Where few weights lie in it and
 * above, these are listed and everything else, the draw too, comes from the list. Else only the bin is listed, after it was
 * divided again while it holds too many. Blocks read the list and
 * find the cut each for itself, which costs no more than to tell. */
#ifndef TM_ENGINE_BACKEND_CUDA_SAMPLE_CUT_CUH
#define TM_ENGINE_BACKEND_CUDA_SAMPLE_CUT_CUH

#include "engine/backend/cuda/sample.cuh"

namespace
{

constexpr int OWN = 4; /* listed weights of each thread */
constexpr int LIST = OWN * THREADS;
constexpr int FEW = 32; /* as many need no histogram */

/* Weights of least .. least + 2^width - 1, among which a cut lies. */
typedef struct bracket {
    unsigned least;
    int width;
    u64 count;       /* of them */
    u64 more, above; /* how many lie above them, and how much mass */
    bool found;      /* else there is less than was wanted */
} bracket;

__device__ __forceinline__ bool inside(const bracket &k, unsigned bits)
{
    return bits >= k.least && bits - k.least < 1u << k.width;
}

typedef struct board {
    slots_t slots;
    tally t; /* here as 64-bit sums: the hardware adds 32 bits at once */
    unsigned ties_of[BINS], few[FEW];
    bracket found;
    u64 above, rest;
    unsigned least;
    int bin, ties;
} board;

/* One row of weights. tops: the largest weight of each chunk; 0: all of them are without mass, and nothing is kept. */
typedef struct weights {
    const float *x;
    unsigned *tops;
    u64 *masses;
    int n, chunks;
    float max, scale;
    bool kept, packed;
} weights;

/* What a row has in the device's memory besides: two histograms, of the whole row and of a part, and two counters for
 * the list. Counters and the first histogram are zero. */
typedef struct listing {
    histogram all, part;
    u64 *list; /* [LIST] weight, index */
    unsigned *listed;
} listing;

/* The blocks of a row. */
typedef struct team {
    int rank, size;
} team;

/* What each block wrote before, all of them see after, if they read with __ldcg. */
__device__ __forceinline__ void meet()
{
    cluster_arrive();
    cluster_wait();
}

__device__ __forceinline__ void load_bits(unsigned (&bits)[EACH], const weights &v, int c)
{
    float x[EACH];
    load_chunk(x, v.x, c < 0 ? 0 : v.n, c < 0 ? 0 : c, v.packed, v.kept ? 0.0f : NAN);
#pragma unroll
    for (int j = 0; j < EACH; j++)
        bits[j] = __float_as_uint(v.kept ? x[j] : weight_of(x[j], v.max, v.scale));
}

/* The team's chunks with a weight of at least `least`: f(chunks, bits), AHEAD at a time. */
template <typename F>
__device__ __forceinline__ void each_weights(const weights &v, const team &t, unsigned least, F f)
{
    each_chunk(
        t.rank * WARPS + warp_id(), t.size * WARPS, v.chunks,
        [&](int c) { return v.tops[c] >= least; },
        [&](const int(&c)[AHEAD]) {
            unsigned bits[AHEAD][EACH];
#pragma unroll
            for (int q = 0; q < AHEAD; q++)
                load_bits(bits[q], v, c[q]);
            f(c, bits);
        });
}

__device__ __forceinline__ void add64(tally &t, unsigned bin, u64 value)
{
    const unsigned low = (unsigned)value, old = atomicAdd(&t.sums[bin], low);
    const unsigned high = (unsigned)(value >> 32) + (old + low < old);
    if (high)
        atomicAdd(&t.counts[bin], high);
}
__device__ __forceinline__ u64 sum64(const tally &t, int bin)
{
    return (u64)t.counts[bin] << 32 | t.sums[bin];
}

/* The bin of a histogram in which `want` is reached, from the largest weight on: as much mass, or as many. from: what
 * lies above the histogram. */
template <bool BY_MASS>
__device__ bracket find_bin(board &b, const histogram &h, const range &r, const bracket &from,
                            u64 want)
{
    const int bin = BINS - 1 - (int)threadIdx.x;
    const u64 count = __ldcg(&h.counts[bin]), mass = __ldcg(&h.masses[bin]);
    u64 all;
    if (threadIdx.x == 0)
        b.found.found = false;
    const u64 more = from.more + block_scan(b.slots, count, &all);
    const u64 above = from.above + block_scan(b.slots, mass, &all);
    const u64 before = BY_MASS ? above : more, own = BY_MASS ? mass : count;
    if (before < want && want <= before + own)
        b.found = {r.least + ((unsigned)bin << r.shift), r.shift, count, more, above, true};
    __syncthreads();
    const bracket found = b.found;
    __syncthreads();
    return found;
}

/* The same inside a bracket, for which the row is read again. */
template <bool BY_MASS>
__device__ bracket divide(board &b, const team &t, const weights &v, const histogram &h,
                          const bracket &k, u64 want)
{
    const range r = {k.least, max(k.width - RADIX, 0)};
    meet(); /* nobody reads the last part's */
    for (int i = t.rank * THREADS + (int)threadIdx.x; i < BINS; i += t.size * THREADS) {
        h.masses[i] = 0;
        h.counts[i] = 0;
    }
    clear(b.t);
    meet();
    each_weights(v, t, k.least, [&](const int(&)[AHEAD], const unsigned(&bits)[AHEAD][EACH]) {
#pragma unroll
        for (int i = 0; i < AHEAD * EACH; i++) {
            const unsigned own = bits[i / EACH][i % EACH];
            add_weight(b.t, r, inside(k, own) ? own : 0);
        }
    });
    __syncthreads();
    give(b.t, r, h);
    meet();
    return find_bin<BY_MASS>(b, h, r, k, want);
}

/* Weights of least .. most. `next` counts them from zero. */
__device__ void gather(const team &t, const weights &v, unsigned least, unsigned most, u64 *list,
                       unsigned *next)
{
    const unsigned before = (1u << lane_id()) - 1;
    each_weights(v, t, least, [&](const int(&c)[AHEAD], const unsigned(&bits)[AHEAD][EACH]) {
        const auto there = [&](int i) {
            const unsigned own = bits[i / EACH][i % EACH];
            return own >= least && own <= most;
        };
        unsigned count = 0;
#pragma unroll
        for (int i = 0; i < AHEAD * EACH; i++)
            count += (unsigned)__popc(__ballot_sync(ALL, there(i)));
        if (!count)
            return;
        unsigned at = lane_id() == 0 ? atomicAdd(next, count) : 0;
        at = __shfl_sync(ALL, at, 0);
#pragma unroll
        for (int i = 0; i < AHEAD * EACH; i++) {
            const unsigned lanes = __ballot_sync(ALL, there(i));
            if (there(i))
                list[at + (unsigned)__popc(lanes & before)] =
                    (u64)bits[i / EACH][i % EACH] << 32 |
                    (unsigned)place_of(c[i / EACH], i % EACH, v.packed);
            at += (unsigned)__popc(lanes);
        }
    });
}

/* Of a list, what a thread has; all: of everything that can still stay. */
typedef struct owned {
    u64 entry[OWN];
    int gathers;
    bool all;
} owned;

__device__ __forceinline__ unsigned bits_of(u64 entry)
{
    return (unsigned)(entry >> 32);
}

__device__ void list_weights(const team &t, const weights &v, const listing &l, unsigned least,
                             unsigned most, u64 count, owned &o)
{
    unsigned *next = &l.listed[o.gathers];
    if (o.gathers++)
        meet(); /* nobody reads the last list */
    gather(t, v, least, most, l.list, next);
    meet();
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const unsigned at = (unsigned)i * THREADS + threadIdx.x;
        o.entry[i] = at < count ? __ldcg(&l.list[at]) : 0;
    }
}

/* The weight with which what was wanted is reached is `least`, and `above` lies above it. */
typedef struct cut {
    bracket in;
    unsigned least;
    u64 above;
} cut;

/* At most FEW weights, by the first warp. */
template <bool BY_MASS> __device__ void cut_few(board &b, const bracket &k, u64 want)
{
    const unsigned own = lane_id() < (int)k.count ? b.few[lane_id()] : 0;
    const u64 mass = BY_MASS ? mass_of_bits(own) : 1;
    u64 more = BY_MASS ? k.above : k.more, same = 0;
    for (int i = 0; i < (int)k.count; i++) {
        const unsigned other = __shfl_sync(ALL, own, i);
        const u64 others = __shfl_sync(ALL, mass, i);
        more += other > own ? others : 0;
        same += other == own ? others : 0;
    }
    const unsigned reach = __ballot_sync(ALL, own && more < want && want <= more + same);
    if (lane_id() == __ffs((int)reach) - 1) {
        b.least = own;
        b.above = more;
    }
}

/* In a bracket whose weights are listed. */
template <bool BY_MASS>
__device__ cut cut_list(board &b, const bracket &k, const owned &o, u64 want)
{
    cut c = {k, k.least, BY_MASS ? k.above : k.more};
    int width = k.width;
    if (k.count <= FEW) {
        if (threadIdx.x == 0)
            b.bin = 0;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < OWN; i++)
            if (inside(k, bits_of(o.entry[i])))
                b.few[atomicAdd(&b.bin, 1)] = bits_of(o.entry[i]);
        __syncthreads();
        if (warp_id() == 0)
            cut_few<BY_MASS>(b, k, want);
        __syncthreads();
        c.least = b.least;
        c.above = b.above;
        width = 0;
    }
    while (width > 0) {
        const bracket r = {c.least, width, 0, 0, 0, true};
        const int shift = max(width - RADIX, 0), bin = BINS - 1 - (int)threadIdx.x;
        u64 all;
        clear(b.t);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const unsigned bits = bits_of(o.entry[i]);
            if (inside(r, bits))
                add64(b.t, (bits - r.least) >> shift, BY_MASS ? mass_of_bits(bits) : 1);
        }
        __syncthreads();
        const u64 own = sum64(b.t, bin), above = c.above + block_scan(b.slots, own, &all);
        if (above < want && want <= above + own) {
            b.bin = bin;
            b.above = above;
        }
        __syncthreads();
        c.least += (unsigned)b.bin << shift;
        c.above = b.above;
        width = shift;
    }
    __syncthreads();
    return c;
}

/* Where `want` is reached, from the largest weight on: as much mass, or as many. */
template <bool BY_MASS>
__device__ cut find_cut(board &b, const team &t, const weights &v, const listing &l, const range &r,
                        owned &o, u64 want)
{
    bracket k = find_bin<BY_MASS>(b, l.all, r, bracket{}, want);
    if (!k.found)
        return {k, 0, 0};
    if (!o.all && k.more + k.count <= LIST) {
        list_weights(t, v, l, k.least, ~0u, k.more + k.count, o);
        o.all = true;
    } else if (!o.all) {
        while (k.count > LIST && k.width > 0)
            k = divide<BY_MASS>(b, t, v, l.part, k, want);
        if (k.width == 0)
            return {k, k.least, BY_MASS ? k.above : k.more};
        list_weights(t, v, l, k.least, k.least + ((1u << k.width) - 1), k.count, o);
    }
    return cut_list<BY_MASS>(b, k, o, want);
}

/* What stays: the weights above `least`, and the first `ties` of those equal to it. */
typedef struct stay {
    unsigned least;
    u64 ties;
} stay;

/* Of the weights that stay after a cut by number. */
__device__ u64 mass_staying(board &b, const cut &c, const owned &o, const stay &s)
{
    u64 mass = 0;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const unsigned bits = bits_of(o.entry[i]);
        mass += inside(c.in, bits) && bits > s.least ? mass_of_bits(bits) : 0;
    }
    return c.in.above + block_sum(b.slots, mass) + s.ties * mass_of_bits(s.least);
}

__device__ u64 mass_of_all(board &b, const histogram &h)
{
    return block_sum(b.slots, __ldcg(&h.masses[threadIdx.x]));
}

/* total: the mass of the row, needed where top_p comes first. Weights below r have no mass, or cannot stay. */
__device__ stay filter(board &b, const team &t, const tm_sample_row &p, const weights &v,
                       const listing &l, const range &r, u64 total, owned &o)
{
    stay s = {r.least - 1, 0};
    if (cuts_by_number(p, v.n)) {
        const cut c = find_cut<false>(b, t, v, l, r, o, (u64)p.top_k);
        if (c.in.found)
            s = {c.least, (u64)p.top_k - c.above};
        if (p.top_p)
            total = c.in.found ? mass_staying(b, c, o, s) : mass_of_all(b, l.all);
    }
    if (p.top_p) {
        u64 want = __umul64hi(total, p.top_p);
        want += total * p.top_p != 0;
        want = want ? want : 1;
        const cut c = find_cut<true>(b, t, v, l, r, o, want);
        const u64 each = mass_of_bits(c.least);
        if (c.in.found)
            s = {c.least, (want - c.above + each - 1) / each};
    }
    if (__float_as_uint(p.min_p) > s.least) /* the largest weight is 1 */
        s = {__float_as_uint(p.min_p) - 1, 0};
    return s;
}

} /* namespace */

#endif
