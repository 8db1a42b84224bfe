/* Geometry: how large each weight is, which share of it a rank holds, and which rows of a file's tensor
 * land where. Pure arithmetic over tm_arch; the same functions check shapes, size memory and drive copies. */
#ifndef TM_ENGINE_MODEL_LAYOUT_H
#define TM_ENGINE_MODEL_LAYOUT_H

#include "engine/model/arch.h"

/* One rank's share. Key heads are replicated when there are fewer of them than ranks; the vocabulary is
 * padded to a multiple of tp, and the last ranks' surplus rows are zeros (all of a rank's, where a tiny
 * vocabulary is cut into many parts). */
typedef struct tm_shard {
    int tp, rank;
    int heads, head0;
    int kv_heads, kv0;
    int ffn, ffn0;
    int moe_ffn, moe_ffn0; /* of each expert: ranks share every expert */
    int shared, shared0;
    int vocab, vocab0; /* padded rows of this rank */
} tm_shard;

/* CONFIG when the model cannot be cut into tp parts: names what does not divide. */
tm_status tm_shard_make(tm_shard *out, const tm_arch *a, int tp, int rank, tm_err *err);

typedef enum tm_role_kind {
    TM_ROLE_MATRIX,     /* a tm_weight */
    TM_ROLE_MATRIX_F32, /* a tm_weight that stays f32 (the router) */
    TM_ROLE_VECTOR,     /* f32 array */
    TM_ROLE_BIAS        /* the bias of a tm_weight, f32 array */
} tm_role_kind;

typedef enum tm_split { TM_SPLIT_NONE, TM_SPLIT_ROWS, TM_SPLIT_COLS } tm_split;

typedef struct tm_role_info {
    const char *name;
    tm_role_kind kind;
    tm_split split;
    bool of_layer;
    bool summed; /* added after the ranks' sum: only rank 0 holds it */
} tm_role_info;
const tm_role_info *tm_role_info_get(tm_role role);

/* Rows and columns of the role's weight on this rank (a vector is one column). */
void tm_role_size(const tm_arch *a, const tm_shard *s, tm_role role, int *rows, int *cols);
/* Rows and columns that a file's tensor of this row must have. The embedding and the head may have more
 * rows than config.json says; arch.vocab is settled before. */
void tm_tensor_size(const tm_arch *a, const tm_tensor_row *row, int *rows, int *cols);
/* Columns of the file's tensor that this rank reads. */
void tm_tensor_cols(const tm_arch *a, const tm_shard *s, const tm_tensor_row *row, int *col0,
                    int *cols);

/* Rows src..src+n of the file's tensor are rows dst..dst+n of this rank's weight. Turned: they are columns
 * 0..n of its rows dst..dst+(columns of the tensor). */
typedef struct tm_row_run {
    int src, dst, n;
    bool turned;
} tm_row_run;
typedef tm_status (*tm_row_run_fn)(void *arg, tm_row_run run);
/* Calls fn for each run of this rank, in a fixed order; stops at the first failure. expert: for a tensor
 * of one expert, else 0. */
tm_status tm_tensor_runs(const tm_arch *a, const tm_shard *s, const tm_tensor_row *row, int expert,
                         tm_row_run_fn fn, void *arg);

/* Is the tensor there in this layer? For tensors that are not of a layer any number does. */
bool tm_need_met(const tm_arch *a, tm_need need, int layer);
/* Tensors of this row in a layer: 1, or one for each expert. */
int tm_tensor_experts(const tm_arch *a, const tm_tensor_row *row);

#endif
