/* A folder of safetensors files: model.safetensors, or shards named by model.safetensors.index.json; or a TurboMind
 * workspace that looks like one (workspace.h).
 *
 * The ranks of a host share the files through the page cache; every rank reads only its slice. Opening checks all
 * headers; no tensor data is touched. One thread, apart from tm_checkpoint_read. */
#ifndef TM_ENGINE_WEIGHTS_CHECKPOINT_H
#define TM_ENGINE_WEIGHTS_CHECKPOINT_H

#include "common/hash.h"
#include "engine/backend/backend.h"
#include "engine/weights/safetensors.h"
#include "engine/weights/workspace.h"

typedef struct tm_checkpoint tm_checkpoint;

tm_status tm_checkpoint_open(tm_checkpoint **out, const char *dir, tm_err *err);
tm_status tm_checkpoint_open_workspace(tm_checkpoint **out, const char *dir,
                                       const tm_ws_config *config, const tm_ws_model *model,
                                       tm_err *err);
void tm_checkpoint_close(tm_checkpoint *c);

size_t tm_checkpoint_count(const tm_checkpoint *c);
const tm_st_tensor *tm_checkpoint_at(const tm_checkpoint *c, size_t i); /* in order of names */
const tm_st_tensor *tm_checkpoint_find(const tm_checkpoint *c, const char *name); /* or NULL */
const char *tm_checkpoint_file(const tm_checkpoint *c, const tm_st_tensor *t); /* its file's name */

/* Adds names, shapes and places of everything (the shards' headers) to a digest. */
void tm_checkpoint_hash(const tm_checkpoint *c, tm_sha256_ctx *h);

/* A rectangle of a tensor that is read as [rows, cols]. */
typedef struct tm_slice {
    size_t row0, rows, col0, cols;
} tm_slice;

/* Copies the slice to dst, packed, in number format `to`. The tensor must be f32, bf16 or f16 and cols_all its
 * last dimension (1 for a vector read as a column). Refuses a file that shrank since it was opened. Any thread, at most
 * TM_WS_READERS_MAX at a time. */
tm_status tm_checkpoint_read(const tm_checkpoint *c, const tm_st_tensor *t, size_t cols_all,
                             tm_slice s, void *dst, tm_dtype to, tm_err *err);

/* Same number format, shape and bytes? */
bool tm_checkpoint_equal(const tm_checkpoint *c, const tm_st_tensor *a, const tm_st_tensor *b);

/* f32, bf16 or f16? */
bool tm_checkpoint_is_float(const tm_st_tensor *t, tm_dtype *out);

#endif
