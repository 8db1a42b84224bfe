/* Inside of writing a workspace: rows of roles, and files. */
#ifndef TM_ENGINE_MODEL_WORKSPACE_WRITER_H
#define TM_ENGINE_MODEL_WORKSPACE_WRITER_H

#include <stdio.h>

#include "engine/model/model_impl.h"
#include "engine/model/workspace_config.h"

#define TM_WS_BLOCK_BYTES ((size_t)4 << 20)
#define TM_WS_ROW_MAX     ((size_t)1 << 24) /* of a file: the largest vocabulary */
#define TM_WS_NAME_MAX    256

/* What writing needs. Numbers are 2 bytes each (bf16 or f16). */
typedef struct tm_ws_writer {
    const char *dir;
    const tm_workspace_opts *o;
    const tm_arch *a;
    const tm_checkpoint *c;
    tm_shard whole;
    tm_dtype dtype;
    tm_workspace_sizes z;
    tm_workspace_report *report;
    uint16_t *block; /* [TM_WS_BLOCK_BYTES / 2 + TM_WS_ROW_MAX] on its way to a file */
    tm_err *err;
} tm_ws_writer;

/* Rows lo..hi of the role's weight in dst, in the engine's own order; of a role of experts, those of one expert. */
tm_status tm_ws_read_rows(const tm_ws_writer *w, tm_role role, int layer, int expert, int lo,
                          int hi, uint16_t *dst);
/* Memory of zeros for a tensor. */
tm_status tm_ws_take(const tm_ws_writer *w, size_t rows, size_t cols, uint16_t **out);

/* An open file that counts. */
typedef struct tm_ws_out {
    tm_ws_writer *w;
    FILE *f;
    char name[TM_WS_NAME_MAX];
} tm_ws_out;

tm_status tm_ws_out_open(tm_ws_out *o, tm_ws_writer *w, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
tm_status tm_ws_out_put(tm_ws_out *o, const uint16_t *x, size_t n);
/* Writes [cols, n]: column j holds row src[j] of x [*, cols], zeros where that is -1. */
tm_status tm_ws_out_turned(tm_ws_out *o, const uint16_t *x, size_t cols, const int *src, size_t n);
/* Writes [n, rows]: row i holds column col0 + i of x [rows, cols], zeros past the last. */
tm_status tm_ws_out_columns(tm_ws_out *o, const uint16_t *x, size_t rows, size_t cols, size_t col0,
                            size_t n);
/* Closes; passes on an earlier failure. */
tm_status tm_ws_out_close(tm_ws_out *o, tm_status st);

#endif
