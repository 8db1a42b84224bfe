/* Copies of a checkpoint's numbers into the device's memory, read by several threads ahead of the copies. */
#ifndef TM_ENGINE_MODEL_LOADER_H
#define TM_ENGINE_MODEL_LOADER_H

#include "engine/backend/backend.h"
#include "engine/weights/checkpoint.h"

#define TM_LOAD_CHUNK_BYTES ((size_t)4 << 20) /* of one job, where a row is not larger */

/* A part of one tensor: what is read, what is done to it, and where it ends. A number that is infinite, or none, in float16
 * fails the job, unless the checkpoint itself is float16. */
typedef struct tm_load_job {
    const tm_st_tensor *tensor; /* NULL: zeros */
    size_t cols_all;            /* see tm_checkpoint_read */
    tm_slice slice;
    bool turned;    /* its columns become rows */
    bool unit_rows; /* its rows are divided by their lengths */
    bool adjusted;  /* its numbers are multiplied, and something is added: tm_adjust */
    float factor, addend;
    tm_dtype dtype; /* of the numbers in device memory */
    char *dst;      /* `bytes` bytes of device memory */
    size_t bytes;
} tm_load_job;

typedef struct tm_loader_opts {
    const tm_backend *backend;
    tm_device *dev;
    bool host_memory; /* dst is ordinary memory */
    const tm_checkpoint *checkpoint;
    size_t
        buffer_bytes; /* no job is larger, nor its slice in f32 where it is turned or has unit rows */
    int readers;
    size_t total;  /* bytes of all jobs, for the progress */
    bool progress; /* shown on stderr */
} tm_loader_opts;

typedef struct tm_loader tm_loader;

tm_status tm_loader_create(tm_loader **out, const tm_loader_opts *opts, tm_err *err);
/* Takes a job; may wait for the ones before it, and then fails with their failure: always that of the first job that
 * failed, in the order in which they were added. After a failure nothing is added any more. */
tm_status tm_loader_add(tm_loader *l, const tm_load_job *job, tm_err *err);
/* Waits for all jobs; then everything is in the device's memory. Repeats a failure of a job. */
tm_status tm_loader_finish(tm_loader *l, tm_err *err);
void tm_loader_destroy(tm_loader *l);

/* Divides a row by its length. */
void tm_load_unit_row(float *x, size_t n);

#endif
