/* One call over peer memory, as the threads of its kernels see it: its number, the places of a segment (peer.h has their
 * order), waiting with an end, meetings. Every kernel calls begin_call first and counts the call once.
 *
 * A wait ends when its time is over or the host asks for it: the call then leaves rubbish, marks the state as failed
 * (later calls do not wait) and tells the host through a word of its memory. */
#ifndef TM_ENGINE_BACKEND_CUDA_PEER_CUH
#define TM_ENGINE_BACKEND_CUDA_PEER_CUH

#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/peer.h"
#include "engine/backend/cuda/ptx.cuh"
#include "engine/backend/cuda/system.cuh"

namespace
{

/* What a thread knows of the call. */
struct call {
    uint64_t number, begin;
    uint32_t looks, mark;
    int half;
    bool dead;
};

__device__ inline call begin_call(const tm_peers &p)
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
__device__ inline unsigned take_ticket(const tm_peers &p)
{
    return threadIdx.x == blockDim.x - 1 && gridDim.x > 1 ? atomicAdd(&p.state->ticket, 1u) : 0;
}

/* The last block to take a ticket counts the call. */
__device__ inline void count_call(const tm_peers &p, const call &c, unsigned ticket, bool tell)
{
    if (threadIdx.x != blockDim.x - 1 || ticket != gridDim.x - 1)
        return;
    p.state->ticket = 0;
    p.state->call = c.number;
    if (tell)
        store_word(&p.words[TM_PEER_WORD_CALL], (uint32_t)c.number);
}

/* True when waiting for this rank has to end. The clock, and the host's word, are looked at now and then. */
__device__ inline bool too_late(const tm_peers &p, call &c, int rank)
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

__device__ inline uint64_t *flag_of(const tm_peers &p, int at, int point, int from)
{
    uint64_t *flags = reinterpret_cast<uint64_t *>(p.segment[at]);
    return flags + ((size_t)point * TM_PEER_BLOCKS + blockIdx.x) * TM_PEER_RANKS + from;
}

__device__ inline char *packets_of(const tm_peers &p, int at, int half, int from)
{
    return p.segment[at] + TM_PEER_FLAG_BYTES +
           ((size_t)half * TM_PEER_RANKS + from) * TM_PEER_PACKET_BYTES;
}

/* A rank has no place for itself. */
__device__ inline char *inbox_of(const tm_peers &p, int at, int half, int from)
{
    return p.segment[at] + TM_PEER_FLAG_BYTES + 2 * TM_PEER_RANKS * TM_PEER_PACKET_BYTES +
           (size_t)half * TM_PEER_INBOX_BYTES + (size_t)(from < at ? from : from - 1) * p.place;
}

__device__ inline char *stage_of(const tm_peers &p, int at, int half)
{
    return p.segment[at] + TM_PEER_FLAG_BYTES + 2 * TM_PEER_RANKS * TM_PEER_PACKET_BYTES +
           2 * TM_PEER_INBOX_BYTES + (size_t)half * TM_PEER_STAGE_BYTES;
}

/* This block and its namesakes on the other ranks have come to the point; what each wrote before, all see after. The
 * first meeting of a call counts it. */
__device__ inline void meet(const tm_peers &p, call &c, int point, bool tell)
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

} /* namespace */

#endif
