/* The loading pipeline: readers fill buffers, the engine's thread sends them to the device.
 *
 * Jobs go through a ring of slots in the order in which they were added. A reader takes the next one and fills the
 * slot's buffer, in pinned memory where the device has it; the engine's thread hands the buffers in order to the
 * device's stream and takes a slot back when the event behind its copy is done. So disk or page cache, conversion and
 * copies overlap, and memory is bounded by the ring. Where the device computes in host memory readers write the numbers
 * to their place, and nothing is copied.
 *
 * The engine's thread adds jobs while readers work already: taking memory for the weights overlaps with reading, too.
 * Results are looked at in order, so the failure that is reported is the same in every run. */
#include "engine/model/loader.h"

#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "engine/model/load_progress.h"
#include "engine/weights/convert.h"

enum {
    SLOTS = 16,    /* 64 MB of pinned memory with chunks of 4 MB */
    COPIES = 4,    /* on their way at once: the device never waits for the next one */
    TURN_TILE = 32 /* numbers: both sides of a tile stay in L1 */
};

typedef struct slot {
    tm_load_job job;
    char *buffer;        /* NULL: not needed yet, or host memory */
    tm_dev_event *event; /* behind its copy; NULL: copies are done on return */
    bool ready;          /* lock: read, or failed */
    tm_status st;
    tm_err err;
} slot;

typedef struct reader {
    tm_loader *l;
    pthread_t id;
    void *scratch; /* numbers before they are turned or divided; taken when needed */
} reader;

struct tm_loader {
    tm_loader_opts o;
    bool async; /* buffers are pinned, copies have events */
    tm_load_progress progress;
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    /* Counts of jobs, freed <= copied <= added and taken <= added; `added` and `taken` under the lock. */
    size_t added, taken, copied, freed;
    bool stop; /* lock */
    slot slots[SLOTS];
    int reader_count;
    reader readers[TM_WS_READERS_MAX];
};

/* ---- readers ---- */

/* out[cols, rows] = the transpose of in[rows, cols], numbers of 2 or 4 bytes. */
static void turn(void *out, const void *in, size_t rows, size_t cols, size_t size)
{
    for (size_t r0 = 0; r0 < rows; r0 += TURN_TILE)
        for (size_t c0 = 0; c0 < cols; c0 += TURN_TILE) {
            size_t r1 = TM_MIN(r0 + TURN_TILE, rows), c1 = TM_MIN(c0 + TURN_TILE, cols);
            for (size_t r = r0; r < r1; r++)
                for (size_t c = c0; c < c1; c++)
                    if (size == sizeof(uint16_t))
                        ((uint16_t *)out)[c * rows + r] = ((const uint16_t *)in)[r * cols + c];
                    else
                        ((uint32_t *)out)[c * rows + r] = ((const uint32_t *)in)[r * cols + c];
        }
}

void tm_load_unit_row(float *x, size_t n)
{
    double sq = 0;
    for (size_t i = 0; i < n; i++)
        sq += (double)x[i] * (double)x[i];
    float inv = (float)(1.0 / TM_MAX(sqrt(sq), 1e-7));
    for (size_t i = 0; i < n; i++)
        x[i] *= inv;
}

/* The numbers of the job, unscaled. */
static tm_status read_numbers(reader *r, const tm_load_job *j, void *to, tm_err *err)
{
    const tm_checkpoint *c = r->l->o.checkpoint;
    const tm_slice s = j->slice;
    if (!j->turned && !j->unit_rows)
        return tm_checkpoint_read(c, j->tensor, j->cols_all, s, to, j->dtype, err);
    if (!r->scratch)
        r->scratch = malloc(r->l->o.buffer_bytes);
    if (!r->scratch)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "loading: out of memory");
    tm_dtype as = j->unit_rows ? TM_DTYPE_F32 : j->dtype;
    TM_TRY(tm_checkpoint_read(c, j->tensor, j->cols_all, s, r->scratch, as, err));
    if (j->turned) {
        turn(to, r->scratch, s.rows, s.cols, tm_dtype_size(j->dtype));
        return TM_OK;
    }
    float *x = r->scratch;
    for (size_t i = 0; i < s.rows; i++)
        tm_load_unit_row(x + i * s.cols, s.cols);
    tm_convert(to, j->dtype, x, TM_DTYPE_F32, s.rows * s.cols);
    return TM_OK;
}

static tm_status read_job(reader *r, const tm_load_job *j, void *to, tm_err *err)
{
    size_t n = j->slice.rows * j->slice.cols;
    if (!j->tensor) {
        memset(to, 0, j->bytes);
        return TM_OK;
    }
    TM_TRY(read_numbers(r, j, to, err));
    if (j->dtype == TM_DTYPE_F16 && j->tensor->dtype != TM_ST_F16 && !tm_f16_all_finite(to, n))
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "tensor %s: a number is infinite, or none, in float16; dtype bfloat16 "
                       "reaches further",
                       j->tensor->name);
    if (j->adjusted)
        tm_adjust(to, j->dtype, n, j->factor, j->addend);
    return TM_OK;
}

static void *read_jobs(void *arg)
{
    reader *r = arg;
    tm_loader *l = r->l;
    pthread_mutex_lock(&l->lock);
    for (;;) {
        while (!l->stop && l->taken == l->added)
            pthread_cond_wait(&l->work, &l->lock);
        if (l->stop)
            break;
        slot *s = &l->slots[l->taken++ % SLOTS];
        pthread_mutex_unlock(&l->lock);
        s->st = read_job(r, &s->job, s->buffer ? s->buffer : s->job.dst, &s->err);
        pthread_mutex_lock(&l->lock);
        s->ready = true;
        pthread_cond_signal(&l->done); /* only the engine's thread waits for it */
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

static tm_status start_readers(tm_loader *l, tm_err *err)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* signals are for the program's own threads */
    while (l->reader_count < l->o.readers) {
        reader *r = &l->readers[l->reader_count];
        r->l = l;
        if (pthread_create(&r->id, NULL, read_jobs, r) != 0)
            break;
        pthread_setname_np(r->id, "tm-load");
        l->reader_count++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return l->reader_count > 0 ? TM_OK /* fewer are slower */
                               : TM_FAIL(err, TM_STATUS_NO_MEMORY, "cannot start a loading thread");
}

/* ---- the engine's thread ---- */

tm_status tm_loader_create(tm_loader **out, const tm_loader_opts *opts, tm_err *err)
{
    const tm_device_ops *dev = opts->backend->dev;
    TM_ASSERT(opts->readers >= 1 && opts->readers <= TM_WS_READERS_MAX);
    tm_loader *l = calloc(1, sizeof(*l));
    if (!l)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "loading: out of memory");
    l->o = *opts;
    l->async = !opts->host_memory && dev->alloc_host && dev->event_create;
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->work, NULL);
    pthread_cond_init(&l->done, NULL);
    tm_load_progress_begin(&l->progress, opts->total, opts->progress);
    tm_status st = start_readers(l, err);
    if (st != TM_OK) {
        tm_loader_destroy(l);
        return st;
    }
    *out = l;
    return TM_OK;
}

static tm_status take_buffer(tm_loader *l, slot *s, tm_err *err)
{
    const tm_device_ops *dev = l->o.backend->dev;
    void *p = NULL;
    if (s->buffer || l->o.host_memory)
        return TM_OK;
    if (!l->async) {
        s->buffer = malloc(l->o.buffer_bytes);
        return s->buffer ? TM_OK : TM_FAIL(err, TM_STATUS_NO_MEMORY, "loading: out of memory");
    }
    if (!s->event)
        TM_TRY(dev->event_create(l->o.dev, &s->event, err));
    TM_TRY(dev->alloc_host(l->o.dev, l->o.buffer_bytes, &p, err));
    s->buffer = p;
    return TM_OK;
}

static tm_status copy_failed(const tm_load_job *j, tm_err *err)
{
    if (!j->tensor)
        return TM_FAIL(err, TM_STATUS_IO, "padding of the vocabulary: the copy failed");
    return TM_FAIL(err, TM_STATUS_IO, "tensor %s: the copy to the device failed", j->tensor->name);
}

/* Sends the buffer of the oldest job that is not on its way, once it is read. */
static tm_status send_next(tm_loader *l, tm_err *err)
{
    const tm_device_ops *dev = l->o.backend->dev;
    slot *s = &l->slots[l->copied % SLOTS];
    pthread_mutex_lock(&l->lock);
    while (!s->ready)
        pthread_cond_wait(&l->done, &l->lock);
    pthread_mutex_unlock(&l->lock);
    if (s->st != TM_OK) {
        if (err)
            *err = s->err;
        return s->st;
    }
    if (!l->o.host_memory && dev->upload(l->o.dev, s->job.dst, s->buffer, s->job.bytes) != TM_OK)
        return copy_failed(&s->job, err);
    if (l->async && dev->event_record(l->o.dev, s->event) != TM_OK)
        return copy_failed(&s->job, err);
    l->copied++;
    tm_load_progress_add(&l->progress, s->job.bytes);
    return TM_OK;
}

/* One step of the oldest jobs: a copy is begun, or one is waited for and its slot is free. */
static tm_status advance(tm_loader *l, tm_err *err)
{
    size_t most = l->async ? COPIES : 1;
    if (l->copied - l->freed < most && l->copied < l->added)
        return send_next(l, err);
    slot *s = &l->slots[l->freed % SLOTS];
    if (l->async && l->o.backend->dev->event_wait(l->o.dev, s->event) != TM_OK)
        return copy_failed(&s->job, err);
    l->freed++;
    return TM_OK;
}

tm_status tm_loader_add(tm_loader *l, const tm_load_job *job, tm_err *err)
{
    TM_ASSERT(job->bytes <= l->o.buffer_bytes);
    if (job->bytes == 0)
        return TM_OK;
    while (l->added - l->freed == SLOTS)
        TM_TRY(advance(l, err));
    slot *s = &l->slots[l->added % SLOTS];
    TM_TRY(take_buffer(l, s, err));
    s->job = *job;
    s->ready = false;
    pthread_mutex_lock(&l->lock);
    l->added++;
    pthread_cond_signal(&l->work);
    pthread_mutex_unlock(&l->lock);
    return TM_OK;
}

tm_status tm_loader_finish(tm_loader *l, tm_err *err)
{
    while (l->freed < l->added)
        TM_TRY(advance(l, err));
    return TM_OK;
}

void tm_loader_destroy(tm_loader *l)
{
    if (!l)
        return;
    const tm_device_ops *dev = l->o.backend->dev;
    pthread_mutex_lock(&l->lock);
    l->stop = true;
    pthread_cond_broadcast(&l->work);
    pthread_mutex_unlock(&l->lock);
    for (int i = 0; i < l->reader_count; i++) {
        pthread_join(l->readers[i].id, NULL);
        free(l->readers[i].scratch);
    }
    /* After a failure copies may still read the buffers. */
    for (; l->async && l->freed < l->copied; l->freed++)
        (void)dev->event_wait(l->o.dev, l->slots[l->freed % SLOTS].event);
    for (int i = 0; i < SLOTS; i++) {
        if (l->async && l->slots[i].buffer)
            dev->free_host(l->o.dev, l->slots[i].buffer);
        else
            free(l->slots[i].buffer);
        if (l->slots[i].event)
            dev->event_free(l->o.dev, l->slots[i].event);
    }
    tm_load_progress_end(&l->progress);
    pthread_cond_destroy(&l->done);
    pthread_cond_destroy(&l->work);
    pthread_mutex_destroy(&l->lock);
    free(l);
}
