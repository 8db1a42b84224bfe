/* Ranks of one host: collectives through a shared segment.
 *
 * All-reduce of a chunk: every rank publishes its numbers in its own slot, waits for the others and adds
 * all slots in rank order, so each rank computes the same bits without a second exchange. From three ranks
 * on and above SPLIT_MIN numbers each rank adds only its share and publishes that as a second chunk, which
 * halves the bytes read. MPI's own shared-memory transport is not used because it spins: an idle group
 * would burn its cores, and two groups on one host would take turns by the time slice.
 *
 * The segment's name exists only between creation and the moment that all ranks have mapped it. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/check.h"
#include "common/hash.h"
#include "parallel/shm_impl.h"

#define SPLIT_MIN   4096u /* numbers; below it a second exchange costs more than it saves */
#define SPIN_LOOKS  500   /* about 20 us of pause instructions */
#define SLOT_FLOATS (TM_SHM_SLOT_BYTES / sizeof(float))

static float *slot_of(const tm_shm *s, int rank, uint32_t chunk)
{
    return (float *)(void *)(s->slots + ((size_t)rank * 2 + (chunk & 1)) * TM_SHM_SLOT_BYTES);
}

static tm_status wait_all(tm_comm *c, uint32_t chunk, int64_t timeout_ms)
{
    tm_shm *s = c->impl;
    for (int r = 0; r < c->size; r++)
        if (r != c->rank)
            TM_TRY(tm_shm_wait(c, &s->seg->ranks[r].arrived, chunk, r, timeout_ms));
    return TM_OK;
}

/* The next chunk's own slot, once nobody reads its old content any more. */
static tm_status open_chunk(tm_comm *c, int64_t timeout_ms, float **slot)
{
    tm_shm *s = c->impl;
    TM_TRY(wait_all(c, s->chunk, timeout_ms));
    *slot = slot_of(s, c->rank, s->chunk + 1);
    return TM_OK;
}

static void publish_chunk(tm_comm *c)
{
    tm_shm *s = c->impl;
    s->chunk++;
    tm_shm_counter_set(&s->seg->ranks[c->rank].arrived, s->chunk);
}

/* Numbers first..end of a chunk of n that rank r adds up. */
static void share_of(size_t n, int size, int r, size_t *first, size_t *end)
{
    size_t per = ((n + (size_t)size - 1) / (size_t)size + 15) & ~(size_t)15;
    *first = TM_MIN(n, per * (size_t)r);
    *end = TM_MIN(n, per * (size_t)(r + 1));
}

static tm_status reduce_split(tm_comm *c, float *x, size_t n)
{
    tm_shm *s = c->impl;
    size_t first, end;
    float *slot;
    share_of(n, c->size, c->rank, &first, &end);
    for (int r = 0; r < c->size; r++)
        s->parts[r] = slot_of(s, r, s->chunk) + first;
    TM_TRY(open_chunk(c, c->step_timeout_ms, &slot));
    tm_comm_sum_ranks(slot + first, s->parts, c->size, end - first);
    publish_chunk(c);
    TM_TRY(wait_all(c, s->chunk, c->step_timeout_ms));
    for (int r = 0; r < c->size; r++) {
        share_of(n, c->size, r, &first, &end);
        memcpy(x + first, slot_of(s, r, s->chunk) + first, (end - first) * sizeof(float));
    }
    return TM_OK;
}

static tm_status reduce_chunk(tm_comm *c, float *x, size_t n)
{
    tm_shm *s = c->impl;
    float *slot;
    TM_TRY(open_chunk(c, c->step_timeout_ms, &slot));
    memcpy(slot, x, n * sizeof(float));
    publish_chunk(c);
    if (c->size > 2 && n >= SPLIT_MIN) {
        TM_TRY(wait_all(c, s->chunk, c->step_timeout_ms));
        return reduce_split(c, x, n);
    }
    TM_TRY(wait_all(c, s->chunk, c->step_timeout_ms));
    for (int r = 0; r < c->size; r++)
        s->parts[r] = slot_of(s, r, s->chunk);
    s->parts[c->rank] = x;
    tm_comm_sum_ranks(x, s->parts, c->size, n);
    return TM_OK;
}

static tm_status shm_allreduce(tm_comm *c, float *x, size_t n)
{
    for (size_t i = 0; i < n; i += SLOT_FLOATS)
        TM_TRY(reduce_chunk(c, x + i, TM_MIN(n - i, SLOT_FLOATS)));
    return TM_OK;
}

/* One piece: rows [r0, r0 + nr) and columns [c0, c0 + nc) of every rank's x[rows][cols]. */
typedef struct piece {
    size_t r0, nr, c0, nc;
} piece;

static tm_status gather_piece(tm_comm *c, const float *x, size_t cols, float *out, piece p)
{
    tm_shm *s = c->impl;
    size_t out_cols = cols * (size_t)c->size;
    float *slot;
    TM_TRY(open_chunk(c, c->step_timeout_ms, &slot));
    if (c->rank > 0)
        for (size_t i = 0; i < p.nr; i++)
            memcpy(slot + i * p.nc, x + (p.r0 + i) * cols + p.c0, p.nc * sizeof(float));
    publish_chunk(c);
    if (c->rank > 0)
        return TM_OK;
    for (int r = 0; r < c->size; r++) {
        const float *from = x + p.r0 * cols + p.c0;
        size_t stride = cols;
        if (r > 0) {
            TM_TRY(tm_shm_wait(c, &s->seg->ranks[r].arrived, s->chunk, r, c->step_timeout_ms));
            from = slot_of(s, r, s->chunk);
            stride = p.nc;
        }
        for (size_t i = 0; i < p.nr; i++)
            memcpy(out + (p.r0 + i) * out_cols + (size_t)r * cols + p.c0, from + i * stride,
                   p.nc * sizeof(float));
    }
    return TM_OK;
}

static tm_status shm_gather_cols(tm_comm *c, const float *x, size_t rows, size_t cols, float *out)
{
    if (cols == 0)
        return TM_OK;
    size_t nc = TM_MIN(cols, SLOT_FLOATS), nr = SLOT_FLOATS / nc;
    for (size_t r0 = 0; r0 < rows; r0 += nr)
        for (size_t c0 = 0; c0 < cols; c0 += nc)
            TM_TRY(gather_piece(c, x, cols, out,
                                (piece){r0, TM_MIN(nr, rows - r0), c0, TM_MIN(nc, cols - c0)}));
    return TM_OK;
}

static tm_status bcast_send(tm_comm *c, const char *data, size_t len)
{
    tm_shm *s = c->impl;
    size_t at = 0;
    do {
        for (int r = 1; r < c->size; r++)
            TM_TRY(tm_shm_wait(c, &s->seg->ranks[r].eaten, s->ring + 1 - TM_SHM_RING_SLOTS, r,
                               c->step_timeout_ms));
        tm_shm_ring_slot *slot = &s->seg->ring[s->ring % TM_SHM_RING_SLOTS];
        slot->total = (uint32_t)len;
        slot->bytes = (uint32_t)TM_MIN(len - at, TM_SHM_RING_BYTES);
        memcpy(slot->data, data + at, slot->bytes);
        at += slot->bytes;
        s->ring++;
        tm_shm_counter_set(&s->seg->head, s->ring);
    } while (at < len);
    return TM_OK;
}

static tm_status bcast_receive(tm_comm *c, char *data, size_t *len, size_t cap)
{
    tm_shm *s = c->impl;
    size_t at = 0, total = 0;
    do {
        /* Between messages a follower may sleep for hours; inside one the rest comes at once. */
        TM_TRY(tm_shm_wait(c, &s->seg->head, s->ring + 1, -1, at ? c->step_timeout_ms : 0));
        const tm_shm_ring_slot *slot = &s->seg->ring[s->ring % TM_SHM_RING_SLOTS];
        size_t n = slot->bytes;
        total = slot->total;
        TM_ASSERT(n <= TM_SHM_RING_BYTES && at + n <= total);
        if (total <= cap)
            memcpy(data + at, slot->data, n);
        at += n;
        s->ring++;
        tm_shm_counter_set(&s->seg->ranks[c->rank].eaten, s->ring);
    } while (at < total);
    if (total > cap)
        return TM_STATUS_TOO_LARGE;
    *len = total;
    return TM_OK;
}

static tm_status shm_bcast(tm_comm *c, void *data, size_t *len, size_t cap)
{
    if (c->rank > 0)
        return bcast_receive(c, data, len, cap);
    return *len > UINT32_MAX ? TM_STATUS_TOO_LARGE : bcast_send(c, data, *len);
}

static tm_status shm_barrier(tm_comm *c)
{
    tm_shm *s = c->impl;
    publish_chunk(c);
    return wait_all(c, s->chunk, c->step_timeout_ms);
}

static tm_status shm_allgather(tm_comm *c, const void *mine, size_t bytes, void *all)
{
    tm_shm *s = c->impl;
    float *slot;
    TM_TRY(open_chunk(c, TM_COMM_LOAD_TIMEOUT_MS, &slot));
    memcpy(slot, mine, bytes);
    publish_chunk(c);
    TM_TRY(wait_all(c, s->chunk, TM_COMM_LOAD_TIMEOUT_MS));
    for (int r = 0; r < c->size; r++)
        memcpy((char *)all + (size_t)r * bytes, slot_of(s, r, s->chunk), bytes);
    return TM_OK;
}

static void shm_destroy(tm_comm *c, bool orderly)
{
    tm_shm *s = c->impl;
    if (!orderly)
        tm_shm_raise_alarm(c);
    munmap(s->seg, s->bytes);
    free(s->parts);
    free(s);
    c->impl = NULL;
}

static const tm_comm_ops shm_ops = {
    .name = "shm",
    .destroy = shm_destroy,
    .allreduce = shm_allreduce,
    .gather_cols = shm_gather_cols,
    .bcast = shm_bcast,
    .barrier = shm_barrier,
    .allgather = shm_allgather,
    .check = tm_shm_check,
    .raise_alarm = tm_shm_raise_alarm,
};

/* Rank 0 creates the object and takes its memory, so that a full /dev/shm is an error here and not a bus
 * error in the middle of a step. */
static int segment_create(const char *name, size_t bytes, tm_err *err)
{
    int fd = shm_open(name, O_CREAT | O_EXCL | O_RDWR, 0600);
    if (fd < 0) {
        TM_FAIL(err, TM_STATUS_IO, "shared memory %s: cannot create: %s", name, strerror(errno));
        return -1;
    }
    int e = posix_fallocate(fd, 0, (off_t)bytes);
    if (e != 0) {
        TM_FAIL(err, TM_STATUS_NO_MEMORY, "shared memory: cannot take %zu bytes in /dev/shm: %s",
                bytes, strerror(e));
        close(fd);
        shm_unlink(name);
        return -1;
    }
    return fd;
}

/* Every rank takes part in every exchange here, whatever happened to itself. */
static tm_status segment_map(tm_comm *c, tm_shm *s, tm_err *err)
{
    char name[64] = "";
    int fd = -1;
    if (c->rank == 0) {
        uint8_t bits[8];
        char hex[17];
        tm_random_bytes(bits, sizeof(bits));
        tm_hex(bits, sizeof(bits), hex);
        snprintf(name, sizeof(name), "/turbomesh-%s", hex);
        fd = segment_create(name, s->bytes, err);
        if (fd < 0)
            name[0] = '\0';
    }
    TM_TRY(tm_mpi_boot_bcast(name, sizeof(name)));
    bool created = name[0] != '\0';
    if (created && c->rank > 0) {
        fd = shm_open(name, O_RDWR, 0);
        if (fd < 0)
            TM_FAIL(err, TM_STATUS_IO, "shared memory %s: cannot open: %s", name, strerror(errno));
    }
    void *p = MAP_FAILED;
    if (fd >= 0) {
        p = mmap(NULL, s->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED)
            TM_FAIL(err, TM_STATUS_IO, "shared memory %s: cannot map: %s", name, strerror(errno));
        close(fd);
    }
    int all = tm_mpi_boot_all(p != MAP_FAILED);
    if (created && c->rank == 0)
        shm_unlink(name);
    if (!all) {
        if (p == MAP_FAILED)
            return err ? err->status : TM_STATUS_IO;
        munmap(p, s->bytes);
        return TM_FAIL(err, TM_STATUS_IO, "shared memory: another rank could not map the segment");
    }
    s->seg = p;
    return TM_OK;
}

/* True when the host has a core for every rank, judged by where the ranks may run. */
static bool cores_suffice(const tm_comm *c)
{
    const tm_shm *s = c->impl;
    cpu_set_t all;
    CPU_ZERO(&all);
    for (int r = 0; r < c->size; r++)
        CPU_OR(&all, &all, &s->seg->ranks[r].cpus);
    return CPU_COUNT(&all) >= c->size;
}

tm_status tm_comm_shm_open(tm_comm *c, tm_err *err)
{
    tm_err local = TM_ERR_INIT;
    if (!err)
        err = &local;
    tm_shm *s = calloc(1, sizeof(*s));
    const float **parts = calloc((size_t)c->size, sizeof(*parts));
    if (!tm_mpi_boot_all(s && parts)) {
        free(s);
        free(parts);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "communicator: out of memory");
    }
    s->parts = parts;
    size_t head = sizeof(tm_shm_seg) + (size_t)c->size * sizeof(tm_shm_rank);
    head = (head + 4095) & ~(size_t)4095;
    s->bytes = head + (size_t)c->size * 2 * TM_SHM_SLOT_BYTES;
    tm_status st = segment_map(c, s, err);
    if (st != TM_OK) {
        free(parts);
        free(s);
        return st;
    }
    s->slots = (char *)s->seg + head;
    tm_shm_identify(&s->seg->ranks[c->rank]);
    if (c->rank == 0)
        s->seg->magic = TM_SHM_MAGIC;
    c->impl = s;
    c->ops = &shm_ops;
    tm_mpi_boot_all(1); /* nobody looks at a line that is not written yet */
    TM_ASSERT(s->seg->magic == TM_SHM_MAGIC);
    s->spins = cores_suffice(c) ? SPIN_LOOKS : 0;
    return TM_OK;
}
