/* The communicator of one worker group: tensor-parallel ranks that sum, gather and follow rank 0.
 *
 * One rank is the same code with the `local` table: every call is then a no-op or a copy. Several
 * ranks on one host exchange through shared memory and sleep on futexes; MPI launches them, tells
 * rank and size, and is the fallback between hosts (table `mpi`). Ranks that wait sleep: an idle group
 * uses no measurable processor time.
 *
 * Ownership: one handle per process, used by one thread (the engine thread) only, apart from
 * tm_comm_abort. Collectives are called by all ranks in the same order with the same sizes.
 *
 * Faults: a peer that died, or that did not arrive within step_timeout_ms, makes the call return
 * TM_STATUS_UNAVAILABLE; the group is then lost as a whole and the process must end (design: autonomy).
 * tm_comm_bcast has no timeout on ranks > 0 (that is where idle ranks sleep) but notices dead peers. */
#ifndef TM_PARALLEL_COMM_H
#define TM_PARALLEL_COMM_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

typedef struct tm_comm tm_comm;

typedef struct tm_comm_opts {
    const char *kind;        /* "auto", "local", "shm", "mpi" */
    int64_t step_timeout_ms; /* a collective inside a step; default 5000 */
} tm_comm_opts;
tm_comm_opts tm_comm_opts_default(void);

/* True when this process was started by mpirun (environment of the launcher). */
int tm_comm_launched(void);

/* Joins the group: initialises MPI when launched by mpirun with more than one rank, else local.
 * argc/argv may be NULL. tp is the number of ranks the caller expects; another number is CONFIG. */
tm_status tm_comm_create(tm_comm **out, int tp, const tm_comm_opts *opts, tm_err *err);
void tm_comm_destroy(tm_comm *c); /* orderly end: all ranks call it */

int tm_comm_rank(const tm_comm *c);
int tm_comm_size(const tm_comm *c);
/* The number of this rank among those of its host: which of the host's devices is its own. */
int tm_comm_host_rank(const tm_comm *c);
int64_t tm_comm_step_timeout_ms(const tm_comm *c);
const char *tm_comm_kind(const tm_comm *c);

/* x[i] = sum over ranks, in rank order (so that the result is the same bits on every rank). */
tm_status tm_comm_allreduce_f32(tm_comm *c, float *x, size_t n);
/* Rank r contributes rows x cols; rank 0 gets out[rows][size*cols] with rank r's columns at r*cols.
 * out is ignored (may be NULL) on ranks > 0. */
tm_status tm_comm_gather_cols_f32(tm_comm *c, const float *x, size_t rows, size_t cols, float *out);
/* Rank 0's bytes to all: *len is set by rank 0; on other ranks data must hold cap bytes. Rank 0 may go
 * ahead before the others have read, by a bounded number of messages. */
tm_status tm_comm_bcast(tm_comm *c, void *data, size_t *len, size_t cap);
tm_status tm_comm_barrier(tm_comm *c);
/* all[r * bytes ...] on every rank = rank r's bytes, at most TM_COMM_CARD_MAX. For opening: it waits as long as
 * loading may take. */
#define TM_COMM_CARD_MAX ((size_t)4096)
tm_status tm_comm_allgather(tm_comm *c, const void *mine, size_t bytes, void *all);
/* UNAVAILABLE when the group is known to be lost: a peer died or raised the alarm. Waits for nothing, and costs a few
 * nanoseconds most of the time: for loops that wait for something else, such as a device. */
tm_status tm_comm_check(tm_comm *c);
/* Agreement: *st becomes the worst status of all ranks (and rank 0 gets a text that names the rank). For
 * loading: a group starts only when every rank could. */
tm_status tm_comm_agree(tm_comm *c, tm_status mine, tm_err *err);
/* From any thread or signal context of a failing rank: ends the whole group promptly (does not return). */
void tm_comm_abort(tm_comm *c, int exit_code) __attribute__((noreturn));

#endif
