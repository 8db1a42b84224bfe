/* The communicator's handle: chooses a kind once, then forwards to its table.
 *
 * The kinds are an explicit choice, not a registry: `local` for one rank, `shm` when all ranks share a
 * host, `mpi` otherwise. The sticky `lost` flag lives here so that no kind has to think about calls
 * after a failure: a group that lost a rank cannot be repaired (its KV shards are gone), so every later
 * call fails at once and the process ends. */
#include "parallel/comm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/check.h"
#include "parallel/comm_impl.h"

tm_comm_opts tm_comm_opts_default(void)
{
    return (tm_comm_opts){.kind = "auto", .step_timeout_ms = 5000};
}

/* Number of ranks that a launcher's environment names; 0 without a launcher. */
static int launched_ranks(void)
{
    static const char *const names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"};
    for (size_t i = 0; i < TM_ARRAY_LEN(names); i++) {
        const char *v = getenv(names[i]);
        long n = v ? strtol(v, NULL, 10) : 0;
        if (n > 0 && n < 65536)
            return (int)n;
    }
    return 0;
}

int tm_comm_launched(void)
{
    return launched_ranks() > 0;
}

static tm_status open_local(tm_comm *c, int tp, int ranks, tm_err *err)
{
    if (tp != 1)
        return TM_FAIL(
            err, TM_STATUS_CONFIG,
            "tp %d needs %d ranks, but this process is alone: start it with mpirun -n %d", tp, tp,
            tp);
    if (ranks > 1)
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "mpirun started %d ranks, but the communicator 'local' has one", ranks);
    c->rank = 0;
    c->size = 1;
    return tm_comm_local_open(c, err);
}

#ifdef TM_HAVE_MPI
static tm_status open_ranks(tm_comm *c, int tp, const char *kind, tm_err *err)
{
    int host_ranks = 0;
    TM_TRY(tm_mpi_init(&c->rank, &c->size, &host_ranks, &c->host_rank, err));
    c->mpi_open = true;
    if (c->size != tp)
        return TM_FAIL(err, TM_STATUS_CONFIG, "tp is %d, but mpirun started %d ranks", tp, c->size);
    bool one_host = tm_mpi_boot_all(host_ranks == c->size) != 0;
    if (strcmp(kind, "shm") == 0 && !one_host)
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "communicator 'shm': the %d ranks are not all on one host", c->size);
    if (strcmp(kind, "mpi") != 0 && one_host)
        return tm_comm_shm_open(c, err);
    return tm_comm_mpi_open(c, err);
}
#else
static tm_status open_ranks(tm_comm *c, int tp, const char *kind, tm_err *err)
{
    (void)c;
    return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                   "tp %d with communicator '%s': this build has no MPI", tp, kind);
}

void tm_mpi_finalize(void)
{
}
#endif

tm_status tm_comm_create(tm_comm **out, int tp, const tm_comm_opts *opts, tm_err *err)
{
    tm_comm_opts def = tm_comm_opts_default();
    if (!opts)
        opts = &def;
    const char *kind = opts->kind ? opts->kind : "auto";
    static const char *const kinds[] = {"auto", "local", "shm", "mpi"};
    size_t k = 0;
    while (k < TM_ARRAY_LEN(kinds) && strcmp(kinds[k], kind) != 0)
        k++;
    if (k == TM_ARRAY_LEN(kinds))
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "communicator '%s' is unknown: use auto, local, shm or mpi", kind);
    if (tp < 1)
        return TM_FAIL(err, TM_STATUS_CONFIG, "tp is %d: expected at least 1", tp);

    tm_comm *c = calloc(1, sizeof(*c));
    if (!c)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "communicator: out of memory");
    c->step_timeout_ms = opts->step_timeout_ms > 0 ? opts->step_timeout_ms : def.step_timeout_ms;
    int ranks = launched_ranks();
    bool many = strcmp(kind, "local") != 0 && (ranks > 1 || (ranks == 1 && k > 1));
    tm_status st = many ? open_ranks(c, tp, kind, err) : open_local(c, tp, ranks, err);
    if (st != TM_OK) {
        if (c->mpi_open)
            tm_mpi_finalize();
        free(c);
        return st;
    }
    *out = c;
    return TM_OK;
}

void tm_comm_destroy(tm_comm *c)
{
    if (!c)
        return;
    bool orderly = !c->lost && c->ops->barrier(c) == TM_OK;
    c->ops->destroy(c, orderly);
    /* Finalising waits for every rank; with one of them gone it would never return. */
    if (c->mpi_open && orderly)
        tm_mpi_finalize();
    free(c);
}

int tm_comm_rank(const tm_comm *c)
{
    return c->rank;
}

int tm_comm_size(const tm_comm *c)
{
    return c->size;
}

int tm_comm_host_rank(const tm_comm *c)
{
    return c->host_rank;
}

int64_t tm_comm_step_timeout_ms(const tm_comm *c)
{
    return c->step_timeout_ms;
}

const char *tm_comm_kind(const tm_comm *c)
{
    return c->ops->name;
}

/* Remembers that the group is lost. TOO_LARGE is a message over the reader's cap: nobody died. */
static tm_status note(tm_comm *c, tm_status st)
{
    if (st != TM_OK && st != TM_STATUS_TOO_LARGE)
        c->lost = true;
    return st;
}

tm_status tm_comm_allreduce_f32(tm_comm *c, float *x, size_t n)
{
    return c->lost ? TM_STATUS_UNAVAILABLE : note(c, c->ops->allreduce(c, x, n));
}

tm_status tm_comm_gather_cols_f32(tm_comm *c, const float *x, size_t rows, size_t cols, float *out)
{
    return c->lost ? TM_STATUS_UNAVAILABLE : note(c, c->ops->gather_cols(c, x, rows, cols, out));
}

tm_status tm_comm_bcast(tm_comm *c, void *data, size_t *len, size_t cap)
{
    return c->lost ? TM_STATUS_UNAVAILABLE : note(c, c->ops->bcast(c, data, len, cap));
}

tm_status tm_comm_barrier(tm_comm *c)
{
    return c->lost ? TM_STATUS_UNAVAILABLE : note(c, c->ops->barrier(c));
}

tm_status tm_comm_allgather(tm_comm *c, const void *mine, size_t bytes, void *all)
{
    if (bytes == 0 || bytes > TM_COMM_CARD_MAX)
        return TM_STATUS_INVALID;
    return c->lost ? TM_STATUS_UNAVAILABLE : note(c, c->ops->allgather(c, mine, bytes, all));
}

tm_status tm_comm_check(tm_comm *c)
{
    if (c->lost)
        return TM_STATUS_UNAVAILABLE;
    return c->ops->check ? note(c, c->ops->check(c)) : TM_OK;
}

tm_status tm_comm_agree(tm_comm *c, tm_status mine, tm_err *err)
{
    if (c->lost)
        return TM_FAIL(err, TM_STATUS_UNAVAILABLE, "the group is lost: a rank ended or hangs");
    tm_comm_vote vote = {.status = (int32_t)mine};
    if (mine != TM_OK && err)
        snprintf(vote.msg, sizeof(vote.msg), "%.*s", (int)sizeof(vote.msg) - 1, err->msg);
    tm_comm_vote *votes = calloc((size_t)c->size, sizeof(*votes));
    if (!votes)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "agreement of ranks: out of memory");
    tm_status st = note(c, c->ops->allgather(c, &vote, sizeof(vote), votes));
    if (st != TM_OK) {
        free(votes);
        return mine != TM_OK
                   ? mine
                   : TM_FAIL(err, st, "rank %d: another rank ended or hangs while loading",
                             c->rank);
    }
    int worst = 0;
    for (int r = 1; r < c->size; r++)
        if (votes[r].status > votes[worst].status)
            worst = r;
    st = (tm_status)votes[worst].status;
    if (st != TM_OK && (worst != c->rank || c->size > 1))
        TM_FAIL(err, st, "rank %d: %s", worst,
                votes[worst].msg[0] ? votes[worst].msg : tm_status_name(st));
    free(votes);
    return st;
}

void tm_comm_abort(tm_comm *c, int exit_code)
{
    if (c && c->ops->raise_alarm)
        c->ops->raise_alarm(c);
    /* _exit is safe in any thread and in a signal handler (MPI_Abort is not); mpirun sees a rank that
     * ended without finalising and ends the job. */
    _exit(exit_code ? exit_code : 1);
}

void tm_comm_sum_ranks(float *out, const float *const *parts, int size, size_t n)
{
    const float *a = parts[0];
    if (size == 2) {
        const float *b = parts[1];
        for (size_t i = 0; i < n; i++)
            out[i] = a[i] + b[i];
        return;
    }
    /* Blocks stay in the first-level cache while the ranks are added one after the other. */
    for (size_t i0 = 0; i0 < n; i0 += 1024) {
        size_t m = TM_MIN(n - i0, (size_t)1024);
        float acc[1024];
        memcpy(acc, a + i0, m * sizeof(float));
        for (int r = 1; r < size; r++) {
            const float *b = parts[r] + i0;
            for (size_t i = 0; i < m; i++)
                acc[i] += b[i];
        }
        memcpy(out + i0, acc, m * sizeof(float));
    }
}
