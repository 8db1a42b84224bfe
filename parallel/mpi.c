/* Ranks of several hosts: collectives over MPI, and the bootstrap of every kind.
 *
 * MPI promises neither an order of summation nor equal bits on all ranks, so an all-reduce is an exchange
 * of shares, a sum in rank order and a gather of the sums: the bytes of a ring all-reduce with a fixed
 * order. Every operation is non-blocking and polled with a growing sleep, because Open MPI's blocking
 * calls spin at full load and never give up on a peer that hangs. Dead peers are mpirun's business here:
 * it ends the job within about a second; a stopped one is caught by step_timeout. */
#include <mpi.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/check.h"
#include "common/clock.h"
#include "parallel/comm_impl.h"

#define MPI_CHUNK     65536u /* numbers of one all-reduce exchange */
#define MPI_RING      16     /* broadcasts that rank 0 may be ahead */
#define MPI_TAG_PLAN  77
#define MPI_TAG_COLS  78
#define POLL_SPINS    1000 /* tests before the first sleep */
#define SLEEP_MIN_NS  (5 * 1000L)
#define SLEEP_STEP_NS (100 * 1000L)  /* longest sleep inside a step */
#define SLEEP_IDLE_NS (1000 * 1000L) /* longest sleep of a follower between steps */
#define SLEEP_LONG_NS                                                                              \
    (4000 * 1000L) /* the same after IDLE_LONG_MS without a step: one look costs 30 us */
#define IDLE_LONG_MS 100

/* One broadcast under way on rank 0: the bytes stay until every follower has taken them. */
typedef struct outgoing {
    char *data;
    size_t cap;
    MPI_Request *req; /* [size - 1] */
    bool busy;
} outgoing;

typedef struct mpi_impl {
    MPI_Comm world;
    float *work;         /* [size * share] received shares */
    float *sum;          /* [share] */
    float *chunk;        /* [size * share] padded chunk */
    size_t share;        /* numbers of one rank's share of a full chunk */
    const float **parts; /* [size] */
    outgoing ring[MPI_RING];
    unsigned next;
} mpi_impl;

tm_status tm_mpi_init(int *rank, int *size, int *host_ranks, int *host_rank, tm_err *err)
{
    int open = 0, ended = 0, got = 0;
    MPI_Finalized(&ended);
    if (ended)
        return TM_FAIL(err, TM_STATUS_CONFIG, "MPI was ended before: it starts once per process");
    MPI_Initialized(&open);
    if (!open && MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &got) != MPI_SUCCESS)
        return TM_FAIL(err, TM_STATUS_UNAVAILABLE, "MPI cannot start");
    MPI_Query_thread(&got);
    if (got < MPI_THREAD_SERIALIZED)
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED, "MPI offers thread level %d, %d is needed", got,
                       MPI_THREAD_SERIALIZED);
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm host;
    if (MPI_Comm_rank(MPI_COMM_WORLD, rank) != MPI_SUCCESS ||
        MPI_Comm_size(MPI_COMM_WORLD, size) != MPI_SUCCESS ||
        MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, *rank, MPI_INFO_NULL, &host) !=
            MPI_SUCCESS)
        return TM_FAIL(err, TM_STATUS_UNAVAILABLE, "MPI cannot tell the ranks of this group");
    MPI_Comm_size(host, host_ranks);
    MPI_Comm_rank(host, host_rank);
    MPI_Comm_free(&host);
    return TM_OK;
}

void tm_mpi_finalize(void)
{
    MPI_Finalize();
}

tm_status tm_mpi_boot_bcast(void *data, size_t len)
{
    return MPI_Bcast(data, (int)len, MPI_BYTE, 0, MPI_COMM_WORLD) == MPI_SUCCESS
               ? TM_OK
               : TM_STATUS_UNAVAILABLE;
}

int tm_mpi_boot_all(int ok)
{
    int mine = ok ? 1 : 0, all = 0;
    if (MPI_Allreduce(&mine, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD) != MPI_SUCCESS)
        return 0;
    return all;
}

static void sleep_ns(long ns)
{
    struct timespec ts = {.tv_sec = 0, .tv_nsec = ns};
    nanosleep(&ts, NULL);
}

/* Polls until all requests are done; timeout_ms 0: none. */
static tm_status finish(MPI_Request *reqs, int n, int64_t timeout_ms)
{
    int64_t begin = tm_clock_ms();
    long pause = SLEEP_MIN_NS;
    for (unsigned i = 0;; i++) {
        int done = 0;
        if (MPI_Testall(n, reqs, &done, MPI_STATUSES_IGNORE) != MPI_SUCCESS)
            return TM_STATUS_UNAVAILABLE;
        if (done)
            return TM_OK;
        if (i < POLL_SPINS)
            continue;
        if (timeout_ms > 0 && tm_clock_ms() - begin >= timeout_ms)
            return TM_STATUS_UNAVAILABLE;
        sleep_ns(pause);
        pause = TM_MIN(pause * 2, SLEEP_STEP_NS);
    }
}

static tm_status started(int rc)
{
    return rc == MPI_SUCCESS ? TM_OK : TM_STATUS_UNAVAILABLE;
}

/* n <= MPI_CHUNK numbers. The chunk is padded with zeros to equal shares. */
static tm_status reduce_chunk(tm_comm *c, float *x, size_t n)
{
    mpi_impl *m = c->impl;
    MPI_Request req;
    size_t share = (n + (size_t)c->size - 1) / (size_t)c->size;
    memcpy(m->chunk, x, n * sizeof(float));
    memset(m->chunk + n, 0, (share * (size_t)c->size - n) * sizeof(float));
    TM_TRY(started(MPI_Ialltoall(m->chunk, (int)share, MPI_FLOAT, m->work, (int)share, MPI_FLOAT,
                                 m->world, &req)));
    TM_TRY(finish(&req, 1, c->step_timeout_ms));
    for (int r = 0; r < c->size; r++)
        m->parts[r] = m->work + (size_t)r * share;
    tm_comm_sum_ranks(m->sum, m->parts, c->size, share);
    TM_TRY(started(MPI_Iallgather(m->sum, (int)share, MPI_FLOAT, m->work, (int)share, MPI_FLOAT,
                                  m->world, &req)));
    TM_TRY(finish(&req, 1, c->step_timeout_ms));
    memcpy(x, m->work, n * sizeof(float));
    return TM_OK;
}

static tm_status mpi_allreduce(tm_comm *c, float *x, size_t n)
{
    for (size_t i = 0; i < n; i += MPI_CHUNK)
        TM_TRY(reduce_chunk(c, x + i, TM_MIN(n - i, (size_t)MPI_CHUNK)));
    return TM_OK;
}

static tm_status gather_row(tm_comm *c, const float *x, size_t cols, float *out)
{
    mpi_impl *m = c->impl;
    MPI_Request req;
    if (c->rank > 0) {
        TM_TRY(started(MPI_Isend(x, (int)cols, MPI_FLOAT, 0, MPI_TAG_COLS, m->world, &req)));
        return finish(&req, 1, c->step_timeout_ms);
    }
    memcpy(out, x, cols * sizeof(float));
    for (int r = 1; r < c->size; r++) {
        TM_TRY(started(MPI_Irecv(out + (size_t)r * cols, (int)cols, MPI_FLOAT, r, MPI_TAG_COLS,
                                 m->world, &req)));
        TM_TRY(finish(&req, 1, c->step_timeout_ms));
    }
    return TM_OK;
}

static tm_status mpi_gather_cols(tm_comm *c, const float *x, size_t rows, size_t cols, float *out)
{
    for (size_t i = 0; cols > 0 && i < rows; i++)
        TM_TRY(gather_row(c, x + i * cols, cols, out ? out + i * cols * (size_t)c->size : NULL));
    return TM_OK;
}

/* Synchronous sends complete only when the follower has begun to receive: the ring is the bound. */
static tm_status bcast_send(tm_comm *c, const void *data, size_t len)
{
    mpi_impl *m = c->impl;
    outgoing *o = &m->ring[m->next % MPI_RING];
    if (o->busy)
        TM_TRY(finish(o->req, c->size - 1, c->step_timeout_ms));
    o->busy = false;
    if (len > o->cap) {
        char *grown = realloc(o->data, len);
        if (!grown)
            return TM_STATUS_NO_MEMORY;
        o->data = grown;
        o->cap = len;
    }
    if (len > 0)
        memcpy(o->data, data, len);
    for (int r = 1; r < c->size; r++)
        TM_TRY(started(
            MPI_Issend(o->data, (int)len, MPI_BYTE, r, MPI_TAG_PLAN, m->world, &o->req[r - 1])));
    o->busy = true;
    m->next++;
    return TM_OK;
}

static tm_status bcast_receive(tm_comm *c, void *data, size_t *len, size_t cap)
{
    mpi_impl *m = c->impl;
    long pause = SLEEP_MIN_NS;
    int64_t begin = tm_clock_ms();
    for (unsigned i = 0;; i++) {
        int found = 0, n = 0;
        MPI_Message msg;
        MPI_Status status;
        TM_TRY(started(MPI_Improbe(0, MPI_TAG_PLAN, m->world, &found, &msg, &status)));
        if (!found) {
            if (i >= POLL_SPINS) {
                sleep_ns(pause);
                bool idle = pause >= SLEEP_IDLE_NS && tm_clock_ms() - begin >= IDLE_LONG_MS;
                pause = TM_MIN(pause * 2, idle ? SLEEP_LONG_NS : SLEEP_IDLE_NS);
            }
            continue;
        }
        MPI_Get_count(&status, MPI_BYTE, &n);
        size_t size = (size_t)n;
        char *spill = size > cap ? malloc(size) : NULL;
        if (size > cap && !spill)
            return TM_STATUS_NO_MEMORY;
        MPI_Request req;
        tm_status st = started(MPI_Imrecv(spill ? spill : data, n, MPI_BYTE, &msg, &req));
        if (st == TM_OK)
            st = finish(&req, 1, c->step_timeout_ms);
        free(spill);
        if (st == TM_OK && size > cap)
            st = TM_STATUS_TOO_LARGE;
        if (st == TM_OK)
            *len = size;
        return st;
    }
}

static tm_status mpi_bcast(tm_comm *c, void *data, size_t *len, size_t cap)
{
    if (c->rank > 0)
        return bcast_receive(c, data, len, cap);
    return *len > INT32_MAX ? TM_STATUS_TOO_LARGE : bcast_send(c, data, *len);
}

static tm_status mpi_barrier(tm_comm *c)
{
    mpi_impl *m = c->impl;
    MPI_Request req;
    TM_TRY(started(MPI_Ibarrier(m->world, &req)));
    return finish(&req, 1, c->step_timeout_ms);
}

static tm_status mpi_allgather(tm_comm *c, const void *mine, size_t bytes, void *all)
{
    mpi_impl *m = c->impl;
    MPI_Request req;
    TM_TRY(started(
        MPI_Iallgather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, m->world, &req)));
    return finish(&req, 1, TM_COMM_LOAD_TIMEOUT_MS);
}

static void release(mpi_impl *m)
{
    for (int i = 0; i < MPI_RING; i++) {
        free(m->ring[i].data);
        free(m->ring[i].req);
    }
    free(m->parts);
    free(m->chunk);
    free(m->sum);
    free(m->work);
    free(m);
}

/* After a failure MPI may still be reading the buffers: the process ends, they are left to it. */
static void mpi_destroy(tm_comm *c, bool orderly)
{
    mpi_impl *m = c->impl;
    if (!orderly)
        return;
    for (int i = 0; i < MPI_RING; i++)
        if (m->ring[i].busy && finish(m->ring[i].req, c->size - 1, c->step_timeout_ms) != TM_OK)
            return;
    MPI_Comm_free(&m->world);
    release(m);
    c->impl = NULL;
}

static const tm_comm_ops mpi_ops = {
    .name = "mpi",
    .destroy = mpi_destroy,
    .allreduce = mpi_allreduce,
    .gather_cols = mpi_gather_cols,
    .bcast = mpi_bcast,
    .barrier = mpi_barrier,
    .allgather = mpi_allgather,
};

static mpi_impl *allocate(int size)
{
    mpi_impl *m = calloc(1, sizeof(*m));
    if (!m)
        return NULL;
    size_t n = (size_t)size;
    bool ok = true;
    m->share = (MPI_CHUNK + n - 1) / n;
    m->work = malloc(n * m->share * sizeof(float));
    m->chunk = malloc(n * m->share * sizeof(float));
    m->sum = malloc(m->share * sizeof(float));
    m->parts = calloc(n, sizeof(*m->parts));
    for (int i = 0; i < MPI_RING; i++) {
        m->ring[i].req = calloc(n, sizeof(MPI_Request));
        ok = ok && m->ring[i].req;
    }
    if (ok && m->work && m->chunk && m->sum && m->parts)
        return m;
    release(m);
    return NULL;
}

tm_status tm_comm_mpi_open(tm_comm *c, tm_err *err)
{
    mpi_impl *m = allocate(c->size);
    if (!tm_mpi_boot_all(m != NULL)) {
        if (m)
            release(m);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "communicator: out of memory");
    }
    /* An own communicator: tags of this module never meet those of a library. */
    if (MPI_Comm_dup(MPI_COMM_WORLD, &m->world) != MPI_SUCCESS) {
        release(m);
        return TM_FAIL(err, TM_STATUS_UNAVAILABLE, "MPI cannot duplicate its communicator");
    }
    MPI_Comm_set_errhandler(m->world, MPI_ERRORS_RETURN);
    c->impl = m;
    c->ops = &mpi_ops;
    return TM_OK;
}
