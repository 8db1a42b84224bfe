/* The one place that knows how weights are cut and how fused tensors are ordered.
 *
 * Rows of q, k, v, gate, up and the vocabulary are split between ranks; o and down are split by columns,
 * so that each rank's output is a partial sum. A fused tensor is only another order of the same rows: each
 * part lists runs of rows, and the loader copies runs without knowing what they mean. */
#include "engine/model/layout.h"

#include "common/check.h"

/* Sizes that roles are made of. */
typedef enum dim {
    DIM_ONE,
    DIM_HIDDEN,
    DIM_Q,   /* heads x head_dim */
    DIM_QKV, /* (heads + 2 kv_heads) x head_dim */
    DIM_FFN,
    DIM_GATE_UP, /* 2 ffn, or ffn without a gate */
    DIM_VOCAB
} dim;

typedef struct role_row {
    tm_role_info info;
    dim rows, cols;
} role_row;

#define MATRIX(n, split, layer)                                                                    \
    {                                                                                              \
        n, TM_ROLE_MATRIX, split, layer, false                                                     \
    }
#define VECTOR(n, layer)                                                                           \
    {                                                                                              \
        n, TM_ROLE_VECTOR, TM_SPLIT_NONE, layer, false                                             \
    }
#define BIAS(n, split, summed)                                                                     \
    {                                                                                              \
        n, TM_ROLE_BIAS, split, true, summed                                                       \
    }

static const role_row roles[TM_ROLE_COUNT] = {
    [TM_ROLE_EMBED] = {MATRIX("embedding", TM_SPLIT_ROWS, false), DIM_VOCAB, DIM_HIDDEN},
    [TM_ROLE_FINAL_NORM] = {VECTOR("final norm", false), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_FINAL_NORM_BIAS] = {VECTOR("final norm bias", false), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_HEAD] = {MATRIX("head", TM_SPLIT_ROWS, false), DIM_VOCAB, DIM_HIDDEN},
    [TM_ROLE_ATTN_NORM] = {VECTOR("attention norm", true), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_ATTN_NORM_BIAS] = {VECTOR("attention norm bias", true), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_QKV] = {MATRIX("qkv", TM_SPLIT_ROWS, true), DIM_QKV, DIM_HIDDEN},
    [TM_ROLE_QKV_BIAS] = {BIAS("qkv bias", TM_SPLIT_ROWS, false), DIM_QKV, DIM_ONE},
    [TM_ROLE_O] = {MATRIX("o", TM_SPLIT_COLS, true), DIM_HIDDEN, DIM_Q},
    [TM_ROLE_O_BIAS] = {BIAS("o bias", TM_SPLIT_NONE, true), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_FFN_NORM] = {VECTOR("ffn norm", true), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_FFN_NORM_BIAS] = {VECTOR("ffn norm bias", true), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_GATE_UP] = {MATRIX("gate_up", TM_SPLIT_ROWS, true), DIM_GATE_UP, DIM_HIDDEN},
    [TM_ROLE_GATE_UP_BIAS] = {BIAS("gate_up bias", TM_SPLIT_ROWS, false), DIM_GATE_UP, DIM_ONE},
    [TM_ROLE_DOWN] = {MATRIX("down", TM_SPLIT_COLS, true), DIM_HIDDEN, DIM_FFN},
    [TM_ROLE_DOWN_BIAS] = {BIAS("down bias", TM_SPLIT_NONE, true), DIM_HIDDEN, DIM_ONE},
};

const tm_role_info *tm_role_info_get(tm_role role)
{
    return &roles[role].info;
}

tm_status tm_shard_make(tm_shard *out, const tm_arch *a, int tp, int rank, tm_err *err)
{
    if (a->heads % tp != 0)
        return TM_FAIL(err, TM_STATUS_CONFIG, "num_attention_heads %d is not divisible by tp %d",
                       a->heads, tp);
    if (a->kv_heads % tp != 0 && tp % a->kv_heads != 0)
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "num_key_value_heads %d and tp %d do not divide one another", a->kv_heads,
                       tp);
    if (a->ffn % tp != 0)
        return TM_FAIL(err, TM_STATUS_CONFIG, "intermediate_size %d is not divisible by tp %d",
                       a->ffn, tp);
    tm_shard s = {.tp = tp, .rank = rank};
    s.heads = a->heads / tp;
    s.head0 = rank * s.heads;
    s.kv_heads = TM_MAX(a->kv_heads / tp, 1);
    s.kv0 = (int)((int64_t)rank * a->kv_heads / tp);
    s.ffn = a->ffn / tp;
    s.ffn0 = rank * s.ffn;
    s.vocab = (a->vocab + tp - 1) / tp;
    s.vocab0 = rank * s.vocab;
    *out = s;
    return TM_OK;
}

/* The whole model as one share. */
static tm_shard whole(const tm_arch *a)
{
    return (tm_shard){
        .tp = 1, .heads = a->heads, .kv_heads = a->kv_heads, .ffn = a->ffn, .vocab = a->vocab};
}

static int dim_size(const tm_arch *a, const tm_shard *s, dim d)
{
    switch (d) {
    case DIM_ONE:
        return 1;
    case DIM_HIDDEN:
        return a->hidden;
    case DIM_Q:
        return s->heads * a->head_dim;
    case DIM_QKV:
        return (s->heads + 2 * s->kv_heads) * a->head_dim;
    case DIM_FFN:
        return s->ffn;
    case DIM_GATE_UP:
        return a->gated ? 2 * s->ffn : s->ffn;
    case DIM_VOCAB:
        return s->vocab;
    }
    TM_ASSERT(!"unknown dimension");
    return 0;
}

void tm_role_size(const tm_arch *a, const tm_shard *s, tm_role role, int *rows, int *cols)
{
    *rows = dim_size(a, s, roles[role].rows);
    *cols = dim_size(a, s, roles[role].cols);
}

void tm_tensor_size(const tm_arch *a, const tm_tensor_row *row, int *rows, int *cols)
{
    const tm_shard all = whole(a);
    tm_role_size(a, &all, row->role, rows, cols);
    switch (row->part) {
    case TM_PART_Q:
        *rows = a->heads * a->head_dim;
        break;
    case TM_PART_K:
    case TM_PART_V:
        *rows = a->kv_heads * a->head_dim;
        break;
    case TM_PART_GATE:
    case TM_PART_UP:
        *rows = a->ffn;
        break;
    case TM_PART_WHOLE:
    case TM_PART_QKV_GROUPED:
        break;
    }
}

void tm_tensor_cols(const tm_arch *a, const tm_shard *s, const tm_tensor_row *row, int *col0,
                    int *cols)
{
    int rows;
    tm_role_size(a, s, row->role, &rows, cols);
    *col0 = roles[row->role].info.split == TM_SPLIT_COLS ? s->rank * *cols : 0;
}

/* Runs of q, k and v from a tensor that holds all q rows, then all k rows, then all v rows. */
static tm_status runs_qkv(const tm_arch *a, const tm_shard *s, tm_row_run_fn fn, void *arg)
{
    int d = a->head_dim, q = s->heads * d, kv = s->kv_heads * d;
    TM_TRY(fn(arg, (tm_row_run){s->head0 * d, 0, q}));
    TM_TRY(fn(arg, (tm_row_run){(a->heads + s->kv0) * d, q, kv}));
    return fn(arg, (tm_row_run){(a->heads + a->kv_heads + s->kv0) * d, q + kv, kv});
}

/* Per kv head: its query heads, its key, its value. Query heads go one by one, because a rank may hold a
 * part of a group when key heads are replicated. */
static tm_status runs_grouped(const tm_arch *a, const tm_shard *s, tm_row_run_fn fn, void *arg)
{
    int d = a->head_dim, per = a->heads / a->kv_heads, q = s->heads * d, kv = s->kv_heads * d;
    for (int i = 0; i < s->heads; i++) {
        int head = s->head0 + i;
        int src = (head / per) * (per + 2) + head % per;
        TM_TRY(fn(arg, (tm_row_run){src * d, i * d, d}));
    }
    for (int i = 0; i < s->kv_heads; i++) {
        int key = (s->kv0 + i) * (per + 2) + per;
        TM_TRY(fn(arg, (tm_row_run){key * d, q + i * d, d}));
        TM_TRY(fn(arg, (tm_row_run){(key + 1) * d, q + kv + i * d, d}));
    }
    return TM_OK;
}

static tm_status runs_whole(const tm_arch *a, const tm_shard *s, tm_role role, tm_row_run_fn fn,
                            void *arg)
{
    int rows, cols;
    tm_role_size(a, s, role, &rows, &cols);
    switch (roles[role].rows) {
    case DIM_QKV:
        return runs_qkv(a, s, fn, arg);
    case DIM_GATE_UP:
        TM_TRY(fn(arg, (tm_row_run){s->ffn0, 0, s->ffn}));
        return a->gated ? fn(arg, (tm_row_run){a->ffn + s->ffn0, s->ffn, s->ffn}) : TM_OK;
    case DIM_VOCAB:
        rows = TM_MAX(TM_MIN(s->vocab, a->vocab - s->vocab0), 0); /* the rest is padding */
        return fn(arg, (tm_row_run){s->vocab0, 0, rows});
    default:
        return fn(arg, (tm_row_run){0, 0, rows});
    }
}

tm_status tm_tensor_runs(const tm_arch *a, const tm_shard *s, const tm_tensor_row *row,
                         tm_row_run_fn fn, void *arg)
{
    int d = a->head_dim, q = s->heads * d, kv = s->kv_heads * d;
    switch (row->part) {
    case TM_PART_WHOLE:
        return runs_whole(a, s, row->role, fn, arg);
    case TM_PART_Q:
        return fn(arg, (tm_row_run){s->head0 * d, 0, q});
    case TM_PART_K:
        return fn(arg, (tm_row_run){s->kv0 * d, q, kv});
    case TM_PART_V:
        return fn(arg, (tm_row_run){s->kv0 * d, q + kv, kv});
    case TM_PART_QKV_GROUPED:
        return runs_grouped(a, s, fn, arg);
    case TM_PART_GATE:
        return fn(arg, (tm_row_run){s->ffn0, 0, s->ffn});
    case TM_PART_UP:
        return fn(arg, (tm_row_run){s->ffn0, s->ffn, s->ffn});
    }
    TM_ASSERT(!"unknown part");
    return TM_STATUS_INTERNAL;
}

bool tm_need_met(const tm_arch *a, tm_need need)
{
    switch (need) {
    case TM_NEED_ALWAYS:
        return true;
    case TM_NEED_HEAD:
        return !a->tie;
    case TM_NEED_QKV_BIAS:
        return a->qkv_bias;
    case TM_NEED_O_BIAS:
        return a->o_bias;
    case TM_NEED_MLP_BIAS:
        return a->mlp_bias;
    }
    TM_ASSERT(!"unknown need");
    return false;
}
