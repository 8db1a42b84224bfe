/* The devices of a group's ranks together: how they meet (ranks.c), what they do then (ranks_ops.c).
 *
 * One rank has one device. Sums go through peer memory (peer.h) where every rank's device can reach every other's,
 * and through NCCL where that is faster or the only way. All ranks decide the same, from what all have told all. */
#ifndef TM_ENGINE_BACKEND_CUDA_RANKS_H
#define TM_ENGINE_BACKEND_CUDA_RANKS_H

#include "engine/backend/cuda/nccl.h"
#include "engine/backend/cuda/peer.h"

/* Up to so many bytes a message goes this way, and above all three through NCCL, or by the last way in pieces. */
typedef struct tm_ranks_rule {
    int ranks; /* at most */
    size_t most[TM_PEER_WAYS], fused[TM_PEER_WAYS]; /* fused with a norm */
} tm_ranks_rule;

typedef struct tm_ranks {
    tm_comm *comm;
    int rank, size;
    bool joined;
    bool peer; /* every device reaches every other one */
    bool lost; /* a rank ended or hangs: nothing works any more */
    bool opened[TM_PEER_RANKS];
    tm_peers peers;
    const tm_ranks_rule *rule;
    tm_peer_way forced; /* TM_PEER_WAYS: by the rule */
    tm_nccl *nccl;      /* NULL: not needed, or not there */
    float *gathered,
        *inbox; /* columns of all ranks on rank 0; elsewhere rank 0's, as seen from here */
    bool gathered_foreign;
    size_t gather_bytes;
    uint64_t *keys; /* of picks that go through NCCL */
    int64_t patience_ms;
} tm_ranks;

/* See tm_device_ops.join. */
tm_status tm_ranks_join(tm_device *dev, tm_comm *comm, const tm_join_args *args, float **gathered,
                        tm_err *err);
/* All ranks call it, or the group is lost. */
void tm_ranks_leave(tm_device *dev);
/* Waits for an event, or with NULL for all of the device's stream, with an eye on the peers: UNAVAILABLE when one is gone
 * or the device makes no progress for the time of a step. */
tm_status tm_ranks_wait(tm_device *dev, cudaEvent_t event);

/* The way of a message, or TM_PEER_WAYS for NCCL. */
tm_peer_way tm_ranks_way(const tm_ranks *r, size_t bytes, bool fused);

tm_status tm_cuda_op_sum(tm_device *dev, const tm_sum_args *a);
tm_status tm_cuda_op_sum_norm(tm_device *dev, const tm_norm_args *a);
tm_status tm_cuda_op_gather_cols(tm_device *dev, const tm_gather_cols_args *a);
tm_status tm_cuda_op_argmax_ranks(tm_device *dev, const tm_argmax_args *a);
tm_status tm_cuda_op_spread(tm_device *dev, const tm_spread_args *a);

#endif
