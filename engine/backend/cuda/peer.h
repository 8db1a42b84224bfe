/* Sums over the ranks of one host through peer memory: every rank's device reads and writes a segment of every
 * other's. The kernels are in peer.cu (sums) and peer_pick.cu; who opens the segments and chooses a way by size is ranks.c.
 *
 * A segment, the same layout on every rank:
 *   flags    [2][BLOCKS][RANKS] u64   a writer's last call that reached this meeting point, by block
 *   packets  [2][RANKS][PACKET_BYTES] what each rank picked; by the parity of the call
 *   inbox    [2][INBOX_BYTES]         the numbers each other rank pushed here, in places of tm_peer_place bytes; 0
 *                                     between calls, which is how a word says that it has not come
 *   stage    [2][STAGE_BYTES]         this rank's numbers, for the others to read; by the parity of the call
 * All of it is zero when the first call begins. Calls are numbered in device memory, so a recorded call is a new one
 * each time it is replayed; all ranks make the same calls in the same order.
 *
 * Why two halves are enough: in call e each rank hears from every other one. A rank that hears of a peer's call e
 * knows that the peer's call e - 1 is over (kernels of a stream follow each other), so the half that call e + 1
 * writes, which is that of call e - 1, has no reader left. */
#ifndef TM_ENGINE_BACKEND_CUDA_PEER_H
#define TM_ENGINE_BACKEND_CUDA_PEER_H

#include "engine/backend/cuda/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TM_PEER_RANKS        8
#define TM_PEER_BLOCKS       128
#define TM_PEER_PACKET_BYTES ((size_t)512 << 10)
#define TM_PEER_INBOX_BYTES  ((size_t)8 << 20)
#define TM_PEER_STAGE_BYTES  ((size_t)8 << 20)
#define TM_PEER_FLAG_BYTES   ((size_t)2 * TM_PEER_BLOCKS * TM_PEER_RANKS * 8)
#define TM_PEER_SEGMENT_BYTES                                                                      \
    (TM_PEER_FLAG_BYTES + 2 * TM_PEER_RANKS * TM_PEER_PACKET_BYTES + 2 * TM_PEER_INBOX_BYTES +     \
     2 * TM_PEER_STAGE_BYTES)

/* Words of pinned host memory. */
enum {
    TM_PEER_WORD_LATE, /* 1 + the rank that did not come in time */
    TM_PEER_WORD_CALL, /* a large call that is over: the device makes progress */
    TM_PEER_WORD_END,  /* set by the host: stop waiting */
    TM_PEER_WORDS
};

/* In device memory. */
typedef struct tm_peer_state {
    uint64_t call;   /* the last one that has begun */
    uint32_t ticket; /* blocks of this call that know its number */
    uint32_t failed; /* a peer did not come: no call waits any more */
} tm_peer_state;

/* What a kernel needs to know; passed by value. */
typedef struct tm_peers {
    int rank, size;
    size_t place;                 /* of a rank in the inboxes of the others, bytes */
    char *segment[TM_PEER_RANKS]; /* by rank, as this process sees them */
    tm_peer_state *state;
    uint32_t *words; /* [TM_PEER_WORDS] */
    uint64_t patience_ns;
} tm_peers;

/* How the numbers travel. */
typedef enum tm_peer_way {
    TM_PEER_PUSH, /* every rank sends all its numbers to every other one; no meeting */
    TM_PEER_ONE,  /* every rank reads all numbers of the others; one meeting */
    TM_PEER_TWO,  /* every rank adds its share and reads the others' sums; two meetings */
    TM_PEER_WAYS
} tm_peer_way;

/* Plain: x[n] of dtype becomes the sum. With norm: norm->delta is summed, then the norm is taken, see tm_norm_args.
 * The sum is taken in f32 in the order of the ranks and rounded once, so all ranks get the same bits by every way.
 * At most tm_peer_capacity numbers; x and rows of the norm begin at multiples of 16 bytes. */
typedef struct tm_peer_sum {
    void *x;
    size_t n;
    tm_dtype dtype;
    const tm_norm_args *norm;
} tm_peer_sum;

size_t tm_peer_place(int ranks);
size_t tm_peer_capacity(const tm_peers *p, tm_peer_way way, tm_dtype dtype);
/* Rows that a norm can be joined to. */
bool tm_peer_norm_fits(int h, tm_dtype dtype);
cudaError_t tm_peer_sum_launch(const tm_peers *p, const tm_peer_sum *s, tm_peer_way way,
                               const tm_cuda_ctx *c);

/* Returns when every rank's stream has come here. */
cudaError_t tm_peer_meet_launch(const tm_peers *p, const tm_cuda_ctx *c);
/* out[i * ldo + j] = x[i * ldx + j], rows x cols f32; out may be another device's memory. */
typedef struct tm_peer_copy {
    float *out;
    const float *x;
    int rows, cols, ldo, ldx;
} tm_peer_copy;
cudaError_t tm_peer_copy_launch(const tm_peer_copy *a, const tm_cuda_ctx *c);

/* a->out holds each row's best column of this rank; afterwards that of all ranks, see argmax_ranks. x NULL: that of rank
 * 0, v0 being the rank. */
cudaError_t tm_peer_pick_launch(const tm_peers *p, const tm_argmax_args *a, const tm_cuda_ctx *c);
/* The same in two steps with a sum (a maximum) of keys between them that others take. */
cudaError_t tm_peer_keys_launch(uint64_t *keys, const tm_argmax_args *a, const tm_cuda_ctx *c);
cudaError_t tm_peer_unkey_launch(const uint64_t *keys, const tm_argmax_args *a,
                                 const tm_cuda_ctx *c);

#ifdef __cplusplus
}
#endif
#endif
