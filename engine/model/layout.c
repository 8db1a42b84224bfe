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
    DIM_HEAD,
    DIM_QKV, /* (heads + 2 kv_heads) x head_dim */
    DIM_OUT, /* heads x v_dim */
    DIM_FFN,
    DIM_GATE_UP, /* 2 ffn, or ffn without a gate */
    DIM_VOCAB,
    DIM_Q_RANK,
    DIM_Q_B_IN, /* q_rank or hidden */
    DIM_Q_B,    /* heads x (rope + nope) */
    DIM_KV_A,   /* rope + kv_rank */
    DIM_KV_RANK,
    DIM_KV_B_K, /* heads x kv_rank */
    DIM_NOPE,
    DIM_EXPERTS,
    DIM_EXPERTS_GATE_UP, /* experts x 2 moe_ffn */
    DIM_EXPERTS_DOWN,    /* experts x hidden */
    DIM_MOE_FFN,
    DIM_SHARED_GATE_UP,
    DIM_SHARED
} dim;

typedef struct role_row {
    tm_role_info info;
    dim rows, cols;
} role_row;

#define WEIGHT(n, kind, split, layer)                                                              \
    {                                                                                              \
        n, kind, split, layer, false                                                               \
    }
#define MATRIX(n, split) WEIGHT(n, TM_ROLE_MATRIX, split, true)
#define ENDS(n)          WEIGHT(n, TM_ROLE_MATRIX, TM_SPLIT_ROWS, false)
#define VECTOR(n, layer) WEIGHT(n, TM_ROLE_VECTOR, TM_SPLIT_NONE, layer)
#define BIAS(n, split, summed)                                                                     \
    {                                                                                              \
        n, TM_ROLE_BIAS, split, true, summed                                                       \
    }

static const role_row roles[TM_ROLE_COUNT] = {
    [TM_ROLE_EMBED] = {ENDS("embedding"), DIM_VOCAB, DIM_HIDDEN},
    [TM_ROLE_FINAL_NORM] = {VECTOR("final norm", false), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_FINAL_NORM_BIAS] = {VECTOR("final norm bias", false), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_HEAD] = {ENDS("head"), DIM_VOCAB, DIM_HIDDEN},
    [TM_ROLE_ATTN_NORM] = {VECTOR("attention norm", true), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_ATTN_NORM_BIAS] = {VECTOR("attention norm bias", true), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_POST_ATTN_NORM] = {VECTOR("post-attention norm", true), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_QKV] = {MATRIX("qkv", TM_SPLIT_ROWS), DIM_QKV, DIM_HIDDEN},
    [TM_ROLE_QKV_BIAS] = {BIAS("qkv bias", TM_SPLIT_ROWS, false), DIM_QKV, DIM_ONE},
    [TM_ROLE_Q_NORM] = {VECTOR("q norm", true), DIM_HEAD, DIM_ONE},
    [TM_ROLE_K_NORM] = {VECTOR("k norm", true), DIM_HEAD, DIM_ONE},
    [TM_ROLE_Q_A] = {MATRIX("q_a", TM_SPLIT_NONE), DIM_Q_RANK, DIM_HIDDEN},
    [TM_ROLE_Q_A_NORM] = {VECTOR("q_a norm", true), DIM_Q_RANK, DIM_ONE},
    [TM_ROLE_Q_B] = {MATRIX("q_b", TM_SPLIT_ROWS), DIM_Q_B, DIM_Q_B_IN},
    [TM_ROLE_KV_A] = {MATRIX("kv_a", TM_SPLIT_NONE), DIM_KV_A, DIM_HIDDEN},
    [TM_ROLE_KV_A_NORM] = {VECTOR("kv_a norm", true), DIM_KV_RANK, DIM_ONE},
    [TM_ROLE_KV_B_K] = {MATRIX("kv_b of keys", TM_SPLIT_ROWS), DIM_KV_B_K, DIM_NOPE},
    [TM_ROLE_KV_B_V] = {MATRIX("kv_b of values", TM_SPLIT_ROWS), DIM_OUT, DIM_KV_RANK},
    [TM_ROLE_O] = {MATRIX("o", TM_SPLIT_COLS), DIM_HIDDEN, DIM_OUT},
    [TM_ROLE_O_BIAS] = {BIAS("o bias", TM_SPLIT_NONE, true), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_FFN_NORM] = {VECTOR("ffn norm", true), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_FFN_NORM_BIAS] = {VECTOR("ffn norm bias", true), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_POST_FFN_NORM] = {VECTOR("post-ffn norm", true), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_GATE_UP] = {MATRIX("gate_up", TM_SPLIT_ROWS), DIM_GATE_UP, DIM_HIDDEN},
    [TM_ROLE_GATE_UP_BIAS] = {BIAS("gate_up bias", TM_SPLIT_ROWS, false), DIM_GATE_UP, DIM_ONE},
    [TM_ROLE_DOWN] = {MATRIX("down", TM_SPLIT_COLS), DIM_HIDDEN, DIM_FFN},
    [TM_ROLE_DOWN_BIAS] = {BIAS("down bias", TM_SPLIT_NONE, true), DIM_HIDDEN, DIM_ONE},
    [TM_ROLE_ROUTER] = {WEIGHT("router", TM_ROLE_MATRIX_F32, TM_SPLIT_NONE, true), DIM_EXPERTS,
                        DIM_HIDDEN},
    [TM_ROLE_CHOICE_BIAS] = {VECTOR("router's choice bias", true), DIM_EXPERTS, DIM_ONE},
    [TM_ROLE_EXPERTS_GATE_UP] = {MATRIX("gate_up of the experts", TM_SPLIT_ROWS),
                                 DIM_EXPERTS_GATE_UP, DIM_HIDDEN},
    [TM_ROLE_EXPERTS_DOWN] = {MATRIX("down of the experts", TM_SPLIT_COLS), DIM_EXPERTS_DOWN,
                              DIM_MOE_FFN},
    [TM_ROLE_SHARED_GATE_UP] = {MATRIX("gate_up of the shared expert", TM_SPLIT_ROWS),
                                DIM_SHARED_GATE_UP, DIM_HIDDEN},
    [TM_ROLE_SHARED_DOWN] = {MATRIX("down of the shared expert", TM_SPLIT_COLS), DIM_HIDDEN,
                             DIM_SHARED},
    [TM_ROLE_SHARED_GATE] = {WEIGHT("shared expert's gate", TM_ROLE_MATRIX_F32, TM_SPLIT_NONE,
                                    true),
                             DIM_ONE, DIM_HIDDEN},
};

const tm_role_info *tm_role_info_get(tm_role role)
{
    return &roles[role].info;
}

static tm_status cut(const char *key, int size, int tp, int rank, int *part, int *first,
                     tm_err *err)
{
    if (size % tp != 0)
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s %d is not divisible by tp %d", key, size, tp);
    *part = size / tp;
    *first = rank * *part;
    return TM_OK;
}

/* Is there a layer with (or without) experts? */
static bool has_layer(const tm_arch *a, bool moe)
{
    for (int i = 0; i < a->layers; i++)
        if (a->layer[i].moe == moe)
            return true;
    return false;
}

tm_status tm_shard_make(tm_shard *out, const tm_arch *a, int tp, int rank, tm_err *err)
{
    tm_shard s = {.tp = tp, .rank = rank};
    TM_TRY(cut("num_attention_heads", a->heads, tp, rank, &s.heads, &s.head0, err));
    if (a->kv_heads % tp != 0 && tp % a->kv_heads != 0)
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "num_key_value_heads %d and tp %d do not divide one another", a->kv_heads,
                       tp);
    if (has_layer(a, false))
        TM_TRY(cut("intermediate_size", a->ffn, tp, rank, &s.ffn, &s.ffn0, err));
    if (has_layer(a, true)) {
        TM_TRY(cut("moe_intermediate_size", a->moe.ffn, tp, rank, &s.moe_ffn, &s.moe_ffn0, err));
        TM_TRY(
            cut("width of the shared expert", a->moe.shared, tp, rank, &s.shared, &s.shared0, err));
    }
    s.kv_heads = TM_MAX(a->kv_heads / tp, 1);
    s.kv0 = (int)((int64_t)rank * a->kv_heads / tp);
    s.vocab = (a->vocab + tp - 1) / tp;
    s.vocab0 = rank * s.vocab;
    *out = s;
    return TM_OK;
}

/* The whole model as one share. */
static tm_shard whole(const tm_arch *a)
{
    return (tm_shard){.tp = 1,
                      .heads = a->heads,
                      .kv_heads = a->kv_heads,
                      .ffn = a->ffn,
                      .moe_ffn = a->moe.ffn,
                      .shared = a->moe.shared,
                      .vocab = a->vocab};
}

static int dim_size(const tm_arch *a, const tm_shard *s, dim d)
{
    const tm_mla_arch *m = &a->mla;
    const int sizes[] = {
        [DIM_ONE] = 1,
        [DIM_HIDDEN] = a->hidden,
        [DIM_HEAD] = a->head_dim,
        [DIM_QKV] = (s->heads + 2 * s->kv_heads) * a->head_dim,
        [DIM_OUT] = s->heads * a->v_dim,
        [DIM_FFN] = s->ffn,
        [DIM_GATE_UP] = a->gated ? 2 * s->ffn : s->ffn,
        [DIM_VOCAB] = s->vocab,
        [DIM_Q_RANK] = m->q_rank,
        [DIM_Q_B_IN] = m->q_rank > 0 ? m->q_rank : a->hidden,
        [DIM_Q_B] = s->heads * (m->rope + m->nope),
        [DIM_KV_A] = m->rope + m->kv_rank,
        [DIM_KV_RANK] = m->kv_rank,
        [DIM_KV_B_K] = s->heads * m->kv_rank,
        [DIM_NOPE] = m->nope,
        [DIM_EXPERTS] = a->moe.experts,
        [DIM_EXPERTS_GATE_UP] = a->moe.experts * 2 * s->moe_ffn,
        [DIM_EXPERTS_DOWN] = a->moe.experts * a->hidden,
        [DIM_MOE_FFN] = s->moe_ffn,
        [DIM_SHARED_GATE_UP] = 2 * s->shared,
        [DIM_SHARED] = s->shared,
    };
    return sizes[d];
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
        *rows /= 2;
        break;
    case TM_PART_MLA_KV_B:
        *rows = a->heads * (a->mla.nope + a->mla.v);
        *cols = a->mla.kv_rank;
        break;
    case TM_PART_EXPERT_GATE:
    case TM_PART_EXPERT_UP:
        *rows = a->moe.ffn;
        break;
    case TM_PART_EXPERT_DOWN:
        *rows = a->hidden;
        break;
    case TM_PART_EXPERTS_GATE:
    case TM_PART_EXPERTS_UP:
    case TM_PART_EXPERTS_DOWN_T:
        *rows = a->moe.experts * a->moe.ffn;
        *cols = a->hidden;
        break;
    case TM_PART_WHOLE:
    case TM_PART_QKV_GROUPED:
    case TM_PART_MLA_Q:
    case TM_PART_MLA_KV_A:
    case TM_PART_EXPERTS_GATE_UP:
    case TM_PART_EXPERTS_DOWN:
        break;
    }
}

int tm_tensor_experts(const tm_arch *a, const tm_tensor_row *row)
{
    bool each = row->part == TM_PART_EXPERT_GATE || row->part == TM_PART_EXPERT_UP ||
                row->part == TM_PART_EXPERT_DOWN;
    return each ? a->moe.experts : 1;
}

void tm_tensor_cols(const tm_arch *a, const tm_shard *s, const tm_tensor_row *row, int *col0,
                    int *cols)
{
    int rows;
    *col0 = 0;
    if (roles[row->role].info.split != TM_SPLIT_COLS || row->part == TM_PART_EXPERTS_DOWN_T) {
        tm_tensor_size(a, row, &rows, cols);
        return;
    }
    tm_role_size(a, s, row->role, &rows, cols);
    *col0 = s->rank * *cols;
}

#define RUN(s, d, n) ((tm_row_run){s, d, n, false})

/* Runs of q, k and v from a tensor that holds all q rows, then all k rows, then all v rows. */
static tm_status runs_qkv(const tm_arch *a, const tm_shard *s, tm_row_run_fn fn, void *arg)
{
    int d = a->head_dim, q = s->heads * d, kv = s->kv_heads * d;
    TM_TRY(fn(arg, RUN(s->head0 * d, 0, q)));
    TM_TRY(fn(arg, RUN((a->heads + s->kv0) * d, q, kv)));
    return fn(arg, RUN((a->heads + a->kv_heads + s->kv0) * d, q + kv, kv));
}

/* Per kv head: its query heads, its key, its value. Query heads go one by one, because a rank may hold a
 * part of a group when key heads are replicated. */
static tm_status runs_grouped(const tm_arch *a, const tm_shard *s, tm_row_run_fn fn, void *arg)
{
    int d = a->head_dim, per = a->heads / a->kv_heads, q = s->heads * d, kv = s->kv_heads * d;
    for (int i = 0; i < s->heads; i++) {
        int head = s->head0 + i;
        int src = (head / per) * (per + 2) + head % per;
        TM_TRY(fn(arg, RUN(src * d, i * d, d)));
    }
    for (int i = 0; i < s->kv_heads; i++) {
        int key = (s->kv0 + i) * (per + 2) + per;
        TM_TRY(fn(arg, RUN(key * d, q + i * d, d)));
        TM_TRY(fn(arg, RUN((key + 1) * d, q + kv + i * d, d)));
    }
    return TM_OK;
}

/* Per head: the nope rows of a query before the rotated ones; ours are the other way round. */
static tm_status runs_mla_q(const tm_arch *a, const tm_shard *s, tm_row_run_fn fn, void *arg)
{
    int nope = a->mla.nope, rope = a->mla.rope, d = nope + rope;
    for (int i = 0; i < s->heads; i++) {
        int src = (s->head0 + i) * d, dst = i * d;
        TM_TRY(fn(arg, RUN(src + nope, dst, rope)));
        TM_TRY(fn(arg, RUN(src, dst + rope, nope)));
    }
    return TM_OK;
}

/* Per head: nope rows that make keys, here turned, and v rows that make values. */
static tm_status runs_mla_kv_b(const tm_arch *a, const tm_shard *s, tm_role role, tm_row_run_fn fn,
                               void *arg)
{
    int nope = a->mla.nope, v = a->mla.v;
    for (int i = 0; i < s->heads; i++) {
        int src = (s->head0 + i) * (nope + v);
        if (role == TM_ROLE_KV_B_K)
            TM_TRY(fn(arg, (tm_row_run){src, i * a->mla.kv_rank, nope, true}));
        else
            TM_TRY(fn(arg, RUN(src + nope, i * v, v)));
    }
    return TM_OK;
}

/* The experts of a tensor that holds all of them; on this rank each has its own share of the width. */
static tm_status runs_experts(const tm_arch *a, const tm_shard *s, tm_part part, tm_row_run_fn fn,
                              void *arg)
{
    int f = s->moe_ffn;
    for (int e = 0; e < a->moe.experts; e++) {
        int src = e * a->moe.ffn + s->moe_ffn0;
        if (part == TM_PART_EXPERTS_DOWN_T)
            TM_TRY(fn(arg, (tm_row_run){src, e * a->hidden, f, true}));
        else
            TM_TRY(fn(arg, RUN(src, e * 2 * f + (part == TM_PART_EXPERTS_UP ? f : 0), f)));
    }
    return TM_OK;
}

/* Each expert's gate rows, then its up rows. */
static tm_status runs_stacked(const tm_arch *a, const tm_shard *s, tm_row_run_fn fn, void *arg)
{
    int f = s->moe_ffn, all = a->moe.ffn;
    for (int e = 0; e < a->moe.experts; e++) {
        TM_TRY(fn(arg, RUN(e * 2 * all + s->moe_ffn0, e * 2 * f, f)));
        TM_TRY(fn(arg, RUN(e * 2 * all + all + s->moe_ffn0, e * 2 * f + f, f)));
    }
    return TM_OK;
}

/* Rows of a gate and an up part of `all`, this rank's share at `first`. */
static tm_status runs_gate_up(int all, int first, int share, tm_row_run_fn fn, void *arg)
{
    TM_TRY(fn(arg, RUN(first, 0, share)));
    return fn(arg, RUN(all + first, share, share));
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
        return a->gated ? runs_gate_up(a->ffn, s->ffn0, s->ffn, fn, arg)
                        : fn(arg, RUN(s->ffn0, 0, s->ffn));
    case DIM_SHARED_GATE_UP:
        return runs_gate_up(a->moe.shared, s->shared0, s->shared, fn, arg);
    case DIM_VOCAB:
        rows = TM_MAX(TM_MIN(s->vocab, a->vocab - s->vocab0), 0); /* the rest is padding */
        return fn(arg, RUN(TM_MIN(s->vocab0, a->vocab), 0, rows));
    default:
        return fn(arg, RUN(0, 0, rows));
    }
}

tm_status tm_tensor_runs(const tm_arch *a, const tm_shard *s, const tm_tensor_row *row, int expert,
                         tm_row_run_fn fn, void *arg)
{
    int d = a->head_dim, q = s->heads * d, kv = s->kv_heads * d, f = s->moe_ffn;
    bool shared = row->role == TM_ROLE_SHARED_GATE_UP;
    int ffn = shared ? s->shared : s->ffn, ffn0 = shared ? s->shared0 : s->ffn0;
    switch (row->part) {
    case TM_PART_WHOLE:
        return runs_whole(a, s, row->role, fn, arg);
    case TM_PART_Q:
        return fn(arg, RUN(s->head0 * d, 0, q));
    case TM_PART_K:
        return fn(arg, RUN(s->kv0 * d, q, kv));
    case TM_PART_V:
        return fn(arg, RUN(s->kv0 * d, q + kv, kv));
    case TM_PART_QKV_GROUPED:
        return runs_grouped(a, s, fn, arg);
    case TM_PART_GATE:
        return fn(arg, RUN(ffn0, 0, ffn));
    case TM_PART_UP:
        return fn(arg, RUN(ffn0, ffn, ffn));
    case TM_PART_MLA_Q:
        return runs_mla_q(a, s, fn, arg);
    case TM_PART_MLA_KV_A:
        TM_TRY(fn(arg, RUN(a->mla.kv_rank, 0, a->mla.rope)));
        return fn(arg, RUN(0, a->mla.rope, a->mla.kv_rank));
    case TM_PART_MLA_KV_B:
        return runs_mla_kv_b(a, s, row->role, fn, arg);
    case TM_PART_EXPERT_GATE:
        return fn(arg, RUN(s->moe_ffn0, expert * 2 * f, f));
    case TM_PART_EXPERT_UP:
        return fn(arg, RUN(s->moe_ffn0, expert * 2 * f + f, f));
    case TM_PART_EXPERT_DOWN:
        return fn(arg, RUN(0, expert * a->hidden, a->hidden));
    case TM_PART_EXPERTS_GATE_UP:
        return runs_stacked(a, s, fn, arg);
    case TM_PART_EXPERTS_DOWN:
        return fn(arg, RUN(0, 0, a->moe.experts * a->hidden));
    case TM_PART_EXPERTS_GATE:
    case TM_PART_EXPERTS_UP:
    case TM_PART_EXPERTS_DOWN_T:
        return runs_experts(a, s, row->part, fn, arg);
    }
    TM_ASSERT(!"unknown part");
    return TM_STATUS_INTERNAL;
}

bool tm_need_met(const tm_arch *a, tm_need need, int layer)
{
    bool moe = a->layer[layer].moe;
    switch (need) {
    case TM_NEED_ALWAYS:
        return true;
    case TM_NEED_HEAD:
        return !a->tie;
    case TM_NEED_QKV_BIAS:
        return a->qkv_bias;
    case TM_NEED_O_BIAS:
        return a->o_bias;
    case TM_NEED_DENSE:
        return !moe;
    case TM_NEED_MLP_BIAS:
        return a->mlp_bias && !moe;
    case TM_NEED_MOE:
        return moe;
    case TM_NEED_MOE_EACH:
        return moe && !a->moe.stacked;
    case TM_NEED_MOE_STACKED:
        return moe && a->moe.stacked;
    case TM_NEED_CHOICE_BIAS:
        return moe && a->moe.choice_bias;
    case TM_NEED_SHARED:
        return moe && a->moe.shared > 0;
    case TM_NEED_SHARED_GATE:
        return moe && a->moe.shared_gate;
    case TM_NEED_Q_LORA:
        return a->mla.q_rank > 0;
    case TM_NEED_Q_PLAIN:
        return a->mla.q_rank == 0;
    case TM_NEED_SEQUENTIAL:
        return a->block == TM_BLOCK_SEQUENTIAL;
    case TM_NEED_PARALLEL2:
        return a->block == TM_BLOCK_PARALLEL2;
    case TM_NEED_NOT_PARALLEL2:
        return a->block != TM_BLOCK_PARALLEL2;
    }
    TM_ASSERT(!"unknown need");
    return false;
}
