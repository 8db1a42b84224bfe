/* Inside of a workspace's source: the files that are there, and the views on them. */
#ifndef TM_ENGINE_WEIGHTS_WORKSPACE_IMPL_H
#define TM_ENGINE_WEIGHTS_WORKSPACE_IMPL_H

#include <pthread.h>

#include "common/file.h"
#include "engine/weights/workspace.h"

#define TM_WS_FILES_MAX ((size_t)1 << 20)
#define TM_WS_PARTS_MAX 64
/* Files mapped at a time: enough for all parts of the slices that are read at once. */
#define TM_WS_MAPS_MAX (TM_WS_PARTS_MAX * TM_WS_READERS_MAX)

typedef struct tm_ws_file {
    char *name;
    size_t size;
    bool used;
} tm_ws_file;

/* Element (r, c) of the tensor: part (by_row ? r : c) / per, and in it number base + r' rs + c' cs, where the
 * coordinate that is split counts from the part's begin. */
typedef struct tm_ws_view {
    int file[TM_WS_PARTS_MAX]; /* of each part */
    int parts;
    bool by_row;
    size_t rows, cols, per, rs, cs, base;
    /* Rows of heads: row i of head h is stored as row `place of i` of head h * head_step. head_dim 0: as they are. */
    int head_dim, head_step;
    bool pairs; /* row i of the first half stands at 2i, of the second half behind it */
    tm_dtype dtype;
} tm_ws_view;

typedef struct tm_ws_slot {
    int file;  /* -1: empty */
    int users; /* slices that are read from it now: it stays */
    tm_map map;
} tm_ws_slot;

struct tm_ws_source {
    char *dir;
    tm_ws_file *files; /* in order of names */
    size_t file_count;
    tm_ws_view *views;
    tm_st_tensor *tensors; /* [view_count] */
    size_t view_count, view_cap;
    pthread_mutex_t lock; /* of the slots */
    tm_ws_slot slots[TM_WS_MAPS_MAX];
    int next_slot;
};

/* Reads the folder: names and sizes. */
tm_status tm_ws_files_list(tm_ws_source *s, tm_err *err);
int tm_ws_file_find(const tm_ws_source *s, const char *name); /* -1: is not there */

#endif
