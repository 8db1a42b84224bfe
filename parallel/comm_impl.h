/* Inside of the communicator: the table that each kind fills, and what MPI offers for the bootstrap.
 *
 * A kind's open function is called after rank and size are known; it fills c->ops and c->impl. All
 * functions of the table run on the owner thread. `lost` is sticky: after the first failure of a
 * collective the group is gone and comm.c answers UNAVAILABLE without calling the kind. */
#ifndef TM_PARALLEL_COMM_IMPL_H
#define TM_PARALLEL_COMM_IMPL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "parallel/comm.h"

/* Loading time differs between ranks (cold disks): agreement waits longer than a step, yet not for ever. */
#define TM_COMM_LOAD_TIMEOUT_MS (10 * 60 * 1000)

/* What one rank tells the others in tm_comm_agree. */
typedef struct tm_comm_vote {
    int32_t status;
    char msg[476];
} tm_comm_vote;

typedef struct tm_comm_ops {
    const char *name;
    void (*destroy)(tm_comm *c, bool orderly);
    tm_status (*allreduce)(tm_comm *c, float *x, size_t n);
    tm_status (*gather_cols)(tm_comm *c, const float *x, size_t rows, size_t cols, float *out);
    tm_status (*bcast)(tm_comm *c, void *data, size_t *len, size_t cap);
    tm_status (*barrier)(tm_comm *c);
    tm_status (*allgather)(tm_comm *c, const void *mine, size_t bytes, void *all);
    tm_status (*check)(tm_comm *c); /* NULL: the launcher ends the job when a rank dies */
    /* Tells the other ranks that this one ends; async-signal-safe. NULL: nothing to tell. */
    void (*raise_alarm)(tm_comm *c);
} tm_comm_ops;

struct tm_comm {
    const tm_comm_ops *ops;
    void *impl;
    int rank, size, host_rank;
    int64_t step_timeout_ms;
    bool lost;
    bool mpi_open;
};

tm_status tm_comm_local_open(tm_comm *c, tm_err *err);

/* mpi.c */
/* host_ranks: how many ranks share this host; host_rank: this one's number among them. */
tm_status tm_mpi_init(int *rank, int *size, int *host_ranks, int *host_rank, tm_err *err);
void tm_mpi_finalize(void);
tm_status tm_mpi_boot_bcast(void *data, size_t len); /* rank 0's bytes to all, blocking */
int tm_mpi_boot_all(int ok);                         /* 1 when ok is non-zero on every rank */
tm_status tm_comm_mpi_open(tm_comm *c, tm_err *err);

/* shm.c */
tm_status tm_comm_shm_open(tm_comm *c, tm_err *err);

/* x[i] = ((slot 0 + slot 1) + slot 2) + ... : the one place that fixes the order of the sum. */
void tm_comm_sum_ranks(float *out, const float *const *parts, int size, size_t n);

#endif
