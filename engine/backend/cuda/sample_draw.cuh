/* The draw from the weights of one row that stay: by mass, in the order of the row.
 *
 * Masses and ties are summed by chunks, from a list of all that stays or after one more look at the row; the chunk where the
 * running mass passes the target is walked. */
#ifndef TM_ENGINE_BACKEND_CUDA_SAMPLE_DRAW_CUH
#define TM_ENGINE_BACKEND_CUDA_SAMPLE_DRAW_CUH

#include "engine/backend/cuda/sample_cut.cuh"

namespace
{

/* Mass above and number of ties of every chunk, in the places of its mass and its largest weight. */
__device__ void weigh_stay(const weights &v, const team &t, const stay &s)
{
    each_chunk(
        t.rank * WARPS + warp_id(), t.size * WARPS, v.chunks,
        [&](int c) {
            if (v.tops[c] >= s.least)
                return true;
            v.masses[c] = v.tops[c] = 0;
            return false;
        },
        [&](const int(&c)[AHEAD]) {
            unsigned bits[AHEAD][EACH];
#pragma unroll
            for (int q = 0; q < AHEAD; q++)
                load_bits(bits[q], v, c[q]);
#pragma unroll
            for (int q = 0; q < AHEAD; q++) {
                u64 mass = 0;
                unsigned ties = 0;
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    mass += bits[q][j] > s.least ? mass_of_bits(bits[q][j]) : 0;
                    ties += bits[q][j] == s.least;
                }
                mass = warp_sum(mass);
                ties = __reduce_add_sync(ALL, ties);
                if (lane_id() == 0 && c[q] >= 0) {
                    v.masses[c[q]] = mass;
                    v.tops[c[q]] = ties;
                }
            }
        });
    meet();
}

/* How many of a part's ties stay when `before` ties lie in front of it. */
__device__ u64 ties_of(const stay &s, u64 ties, u64 before)
{
    const u64 left = s.ties > before ? s.ties - before : 0;
    return left < ties ? left : ties;
}

/* The part of the row, of those that mass_at and ties_at know, in which the running mass passes u of the whole; what is
 * left to pass inside it, and ties that stay there. Each thread has a run of parts. */
template <typename M, typename T>
__device__ void find_part(board &b, int parts, M mass_at, T ties_at, const stay &s, u64 u)
{
    const int run = (parts + THREADS - 1) / THREADS, from = (int)threadIdx.x * run;
    const int to = min(from + run, parts);
    const u64 each = s.ties ? mass_of_bits(s.least) : 0;
    u64 ties = 0, own = 0, all;
    for (int i = from; i < to && s.ties; i++)
        ties += ties_at(i);
    if (s.ties)
        ties = block_scan(b.slots, ties, &all);
    u64 tie = ties;
    for (int i = from; i < to; i++) {
        const u64 here = s.ties ? ties_at(i) : 0;
        own += mass_at(i) + ties_of(s, here, tie) * each;
        tie += here;
    }
    u64 passed = block_scan(b.slots, own, &all);
    const u64 target = __umul64hi(all, u);
    if (passed <= target && target < passed + own)
        for (int i = from; i < to; i++) {
            const u64 here = s.ties ? ties_at(i) : 0, kept = ties_of(s, here, ties);
            const u64 mass = mass_at(i) + kept * each;
            if (target < passed + mass) {
                b.bin = i;
                b.ties = (int)kept;
                b.rest = target - passed;
                break;
            }
            passed += mass;
            ties += here;
        }
    __syncthreads();
}

/* The first index of the chunk where the running mass is more than rest, or -1, and then what is left; by one warp. */
__device__ int walk(const weights &v, const stay &s, int c, int *ties, u64 *rest)
{
    const unsigned before = (1u << lane_id()) - 1;
    weights plain = v;
    unsigned all[EACH];
    plain.packed = false; /* so lanes are in order */
    load_bits(all, plain, c);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const unsigned bits = all[j], equal = __ballot_sync(ALL, bits == s.least);
        const bool stays =
            bits > s.least || (equal >> lane_id() & 1 && __popc(equal & before) < *ties);
        const u64 passed = warp_scan(stays ? mass_of_bits(bits) : 0);
        const unsigned over = __ballot_sync(ALL, passed > *rest);
        if (over)
            return place_of(c, j, false) - lane_id() + __ffs((int)over) - 1;
        *ties -= __popc(equal);
        *rest -= __shfl_sync(ALL, passed, 31);
    }
    return -1;
}

/* The draw over chunks whose masses are known, and over a list of everything that stays; the first warp has the token. */
__device__ int draw_of_chunks(board &b, const weights &v, const stay &s, u64 u)
{
    find_part(
        b, v.chunks, [&](int c) { return __ldcg(&v.masses[c]); },
        [&](int c) { return __ldcg(&v.tops[c]); }, s, u);
    int ties = b.ties;
    u64 rest = b.rest;
    return warp_id() == 0 ? walk(v, s, b.bin, &ties, &rest) : -1;
}
__device__ int draw_of_list(board &b, const weights &v, const owned &o, const stay &s, u64 u)
{
    const int part = (v.chunks + BINS - 1) / BINS; /* chunks */
    clear(b.t);
    b.ties_of[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const unsigned bits = bits_of(o.entry[i]), bin = (unsigned)o.entry[i] / CHUNK / part;
        if (bits > s.least)
            add64(b.t, bin, mass_of_bits(bits));
        else if (bits == s.least)
            atomicAdd(&b.ties_of[bin], 1u);
    }
    __syncthreads();
    find_part(
        b, BINS, [&](int i) { return sum64(b.t, i); }, [&](int i) { return b.ties_of[i]; }, s, u);
    int ties = b.ties, token = -1;
    u64 rest = b.rest;
    const int end = min((b.bin + 1) * part, v.chunks);
    for (int c = b.bin * part; c < end && token < 0 && warp_id() == 0; c++)
        if (v.tops[c] >= s.least)
            token = walk(v, s, c, &ties, &rest);
    return token;
}

} /* namespace */

#endif
