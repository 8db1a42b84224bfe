/* The seam between the model and the hardware: two tables of functions.
 *
 * `tm_device_ops` is coarse (memory, copies, synchronisation); `tm_op_table` is the operators of the
 * decoder, each with an argument struct. The CPU backend's plain reference (backend/cpu/ref_*.c) is the
 * specification: every other version, SIMD or CUDA, is compared with it by tests/engine/op_matrix.
 *
 * Activations are row-major in the backend's act_dtype (CPU: f32; CUDA: bf16 or fp16). Pointers in
 * arguments are device pointers of the backend unless marked host. Calls enqueue on the device's one
 * stream in order; device->sync waits. All calls come from the engine thread.
 *
 * A NULL operator is reported when a model that needs it is opened, never in the middle of a request.
 *
 * Letters: T tokens of the step, B sequences, H query heads, K kv heads (of this rank), d head dim,
 * h hidden, F feed-forward of this rank, N x Kdim a weight [out, in], V vocabulary rows of this rank. */
#ifndef TM_ENGINE_BACKEND_BACKEND_H
#define TM_ENGINE_BACKEND_BACKEND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum tm_dtype { TM_DTYPE_F32, TM_DTYPE_BF16, TM_DTYPE_F16, TM_DTYPE_COUNT } tm_dtype;
size_t tm_dtype_size(tm_dtype t);
const char *tm_dtype_name(tm_dtype t);

typedef struct tm_device tm_device; /* one per backend and process */

typedef struct tm_device_opts {
    int threads;    /* CPU: threads of this rank, 0 = cores / ranks on this host */
    int index;      /* CUDA: device ordinal */
    tm_dtype dtype; /* CUDA: of activations, weights and KV: bf16 or f16; f32 = the default, bf16 */
    const char *isa; /* CPU: "auto", "ref", "avx2", "avx512", "amx": the best allowed path */
    bool share; /* CUDA: several ranks may use one device; for tests, waiting ranks are slow then */
    /* CUDA: "auto" (or NULL), "peer" memory alone, "nccl" alone; or one way of peer memory: "push", "one", "two" */
    const char *collectives;
} tm_device_opts;

/* A linear layer's weight of this rank, [N, K] row-major in dtype, with an optional bias [N] f32 (host
 * values already copied to the device). `packed` belongs to the backend (linear_prepare). */
typedef struct tm_weight {
    tm_dtype dtype;
    int n, k;
    const void *data;
    const float *bias; /* or NULL */
    void *packed;
} tm_weight;

/* In tokens of a batch: what logits row `row` of the step before chose (tm_model_begin). A choice that failed is no
 * token: its row computes nothing of use. */
#define TM_TOKEN_PICKED(row) (-1 - (row))

/* The shape of one step, flat. Arrays are host memory on the CPU backend and device memory on CUDA.
 * Tokens of a sequence are contiguous and in order; sequences with exactly one new token come first
 * (rows 0..n_decode-1), then the prefill chunks. On a device with graphs a decode sequence with kv_len 0 is
 * padding: nothing is appended for its row, and what operators leave in it is undefined. */
typedef struct tm_batch {
    int n_tokens;             /* T */
    int n_seqs;               /* B */
    int n_decode;             /* sequences 0..n_decode-1 have one token each */
    const int32_t *tokens;    /* [T] ids, or TM_TOKEN_PICKED */
    const int32_t *positions; /* [T] position in the sequence, from 0 */
    const int32_t *seq_begin; /* [B+1] first row of each sequence */
    const int32_t *kv_len;    /* [B] tokens in the cache after this step */
    const int32_t
        *blocks; /* [B, max_blocks] block ids, position p is in blocks[p / block_tokens] */
    int max_blocks;
    int n_logits;              /* R rows whose logits are wanted */
    const int32_t *logit_rows; /* [R] ascending row numbers in 0..T-1 */
    /* [B] host memory on every backend: the length that a length-dependent rope is chosen by (tm_model_rope_len),
     * the same in all steps of a sequence. 0, and NULL for all: that of the trained length. */
    const int32_t *rope_len;
} tm_batch;

/* One layer's keys and values: k and v are each [n_blocks, K, block_tokens, d] in dtype. v == k: latent
 * attention, a key is its own value, and only keys are written. */
typedef struct tm_kv_layer {
    void *k, *v;
    tm_dtype dtype;
    int n_blocks, block_tokens, n_kv_heads, head_dim;
} tm_kv_layer;

typedef enum tm_norm_kind { TM_NORM_RMS, TM_NORM_LAYER } tm_norm_kind;
typedef enum tm_act_kind { TM_ACT_SILU, TM_ACT_GELU_ERF, TM_ACT_GELU_TANH } tm_act_kind;

/* out[T,h] = rows of table; ids outside [v0, v0 + rows) give zeros (vocabulary-split embedding). An id below 0 stands
 * for picked[-1 - id], where there is a `picked`. */
typedef struct tm_embed_args {
    void *out;
    const int32_t *ids;
    const int32_t *picked;  /* or NULL */
    const tm_weight *table; /* n = rows of this rank, k = h */
    int n_tokens, v0;
    float scale; /* 1 = none */
} tm_embed_args;

/* If delta: residual += delta (both [T,h]). Then out = norm(residual) * w (+ b). RMS: x / sqrt(mean(x^2) +
 * eps); with add_one the weight is (1 + w) (Gemma). w and b are f32[h]. out may be NULL: only the add. */
typedef struct tm_norm_args {
    void *out;
    void *residual;
    const void *delta; /* or NULL */
    const float *w, *b;
    void *residual_out; /* where the sum goes; NULL (and on the CPU): residual */
    int n_tokens, h;
    float eps;
    tm_norm_kind kind;
    bool add_one;
} tm_norm_args;

/* out[T,N] = x[T,K] * W^T + bias. ldx and ldo are row strides in elements. f32_out: out is f32 whatever the
 * activations are (the logits). */
typedef struct tm_linear_args {
    void *out;
    const void *x;
    const tm_weight *w;
    int n_tokens, ldx, ldo;
    bool f32_out;
} tm_linear_args;

/* out[T,F] = act(x W_gate^T) * (x W_up^T), w [2F, K] with the gate rows first. gate_up [T, 2F] is a workspace
 * whose contents are undefined afterwards. */
typedef struct tm_linear_gated_args {
    void *out, *gate_up;
    const void *x;
    const tm_weight *w;
    int n_tokens, ldx;
    tm_act_kind act;
} tm_linear_gated_args;

/* Rotates q and k in place by position, then writes k and v into the cache. qkv is [T, (H + 2K) * d]: the
 * H query heads, then K key heads, then K value heads of each token. inv_freq[rd / 2] f32 host-computed
 * (device copy); the first rd dims of a head are rotated, pairs (i, i + rd/2) or, if interleaved,
 * (2i, 2i + 1). mscale multiplies cos and sin (yarn, longrope; else 1). rd = 0: no rotation. seq_inv_freq
 * [B, rd / 2], if not NULL, holds each sequence's own frequencies. logn_len > 0: q at position p is multiplied by
 * max(1, ln(p + 1) / ln(logn_len)). */
typedef struct tm_rope_append_args {
    void *qkv;
    const float *inv_freq;
    const float *seq_inv_freq; /* TM_FEATURE_SEQ_ROPE */
    int logn_len;              /* TM_FEATURE_LOGN */
    const tm_batch *batch;
    const tm_kv_layer *kv;
    int n_heads, n_kv_heads, head_dim, rotary_dim;
    bool interleaved;
    float mscale;
} tm_rope_append_args;

/* Causal paged attention: for every token row of the batch its H heads attend to cache positions
 * j <= position (and j > position - window if window > 0); head i uses kv head i / (H / K).
 * out [T, H * d]; qkv as above (q is read from it). softcap > 0: s = cap * tanh(s / cap). alibi: [H]
 * slopes or NULL. Two entries with the same arguments: attention_prefill handles rows of sequences
 * n_decode..B-1, attention_decode rows of sequences 0..n_decode-1. */
typedef struct tm_attention_args {
    void *out;
    const void *qkv;
    const tm_batch *batch;
    const tm_kv_layer *kv;
    int n_heads, n_kv_heads, head_dim, window;
    float scale, softcap;
    const float *alibi;
} tm_attention_args;

/* out[T,F] = act(gate) * up with gate_up [T, 2F], gate first; if !gated: out = act(gate_up) with [T,F]. */
typedef struct tm_act_args {
    void *out;
    const void *gate_up;
    int n_tokens, f;
    tm_act_kind act;
    bool gated;
} tm_act_args;

/* Normalises every head in place: x / sqrt(mean(x^2) + eps) * w over d numbers, (1 + w) with add_one. Head g of
 * token t begins at x + t * ld + g * d. */
typedef struct tm_head_norm_args {
    void *x;
    const float *w; /* [d] */
    int n_tokens, ld, n_heads, d;
    float eps;
    bool add_one;
} tm_head_norm_args;

/* Bounds x [n_rows, n] in place: min(max(x, -limit), limit), or limit * tanh(x / limit) if smooth. f32: x is f32
 * whatever the activations are (the logits). */
typedef struct tm_bound_args {
    void *x;
    int n_rows, n;
    float limit;
    bool smooth, f32;
} tm_bound_args;

/* out[t * ldo + g * gdo + i] = x[t * ldx + g * gdx + i] for i < cols of each group of each token. */
typedef struct tm_copy_args {
    void *out;
    const void *x;
    int n_tokens, groups, cols;
    int ldo, gdo, ldx, gdx;
} tm_copy_args;

/* A product of each group's own: out[t * ldo + g * gdo + i] = sum over j of x[t * ldx + g * gdx + j] * W_g[i, j], W_g
 * rows g * n .. of w [groups * n, k]. No bias. */
typedef struct tm_linear_heads_args {
    void *out;
    const void *x;
    const tm_weight *w;
    int n_tokens, groups, n;
    int ldo, gdo, ldx, gdx;
} tm_linear_heads_args;

typedef enum tm_moe_score { TM_MOE_SOFTMAX, TM_MOE_SIGMOID } tm_moe_score;
typedef enum tm_group_score { TM_GROUP_MAX, TM_GROUP_TOP2 } tm_group_score;

/* The k experts of each token. Scores: softmax over the E logits, or their sigmoids. Choice: the best k by
 * score + bias; with groups (experts in n_groups equal runs) only inside the top_groups groups whose best
 * choice score, or sum of the best two, is largest. The lowest index wins ties. Weights: the scores without
 * bias, divided by their sum if normalise, times scale. All f32. */
typedef struct tm_moe_route_args {
    int32_t *ids;        /* [T, k] */
    float *weights;      /* [T, k] */
    const float *logits; /* [T, E] */
    const float *bias;   /* [E] or NULL */
    int n_tokens, n_experts, top_k;
    int n_groups, top_groups; /* n_groups 1: none */
    tm_moe_score score;
    tm_group_score group_score;
    bool normalise;
    float scale;
} tm_moe_route_args;

/* out[t] = sum over the k chosen experts e of weight * down_e(act(gate_e(x)) * up_e(x)), plus add[t], which is
 * multiplied by sigmoid(add_gate[t]) if there is a gate (a shared expert). Expert e has rows e * 2F .. (gate, then
 * up) of gate_up [E * 2F, h] and rows e * h .. of down [E * h, F]. These two weights are not given to
 * linear_prepare. work: as many bytes as moe_work_bytes says for these arguments. */
typedef struct tm_moe_experts_args {
    void *out;     /* [T, h] */
    const void *x; /* [T, h] */
    const int32_t *ids;
    const float *weights;
    const tm_weight *gate_up, *down;
    const void *add;       /* [T, h] or NULL */
    const float *add_gate; /* [T] or NULL */
    void *work;
    int n_tokens, h, f, n_experts, top_k;
    tm_act_kind act;
} tm_moe_experts_args;

/* out[R,h] = rows x[logit_rows[i]]. */
typedef struct tm_gather_rows_args {
    void *out;
    const void *x;
    const int32_t *rows;
    int n_rows, h;
} tm_gather_rows_args;

/* out[R] = the index of the largest number of each row of x [R, n] f32, the lowest one on ties; -1 when the
 * row has no finite maximum. argmax_ranks: of the rows of all ranks, side by side; this rank's first column is number
 * v0, and every rank gets the result. */
typedef struct tm_argmax_args {
    int32_t *out;
    const float *x;
    int n_rows, n;
    int ld; /* row stride of x; 0: n */
    int v0; /* argmax_ranks */
} tm_argmax_args;

/* A token whose logit is changed before sampling. */
typedef struct tm_sample_edit {
    int32_t token;
    float value; /* see tm_sample_row; afterwards undefined */
} tm_sample_edit;

/* How one row is sampled: engine/sample/sampler.h has the order of the filters, which is also the field order here.
 * Fractions are of 2^64. All zero: the largest logit. */
typedef struct tm_sample_row {
    /* edits[first_edit..]: n_seen distinct tokens of the sequence, value times generated; then n_bias distinct tokens
     * with an addend; then n_banned tokens that cannot be drawn. */
    int32_t first_edit, n_seen, n_bias, n_banned;
    float repetition, presence, frequency;
    float scale;      /* 1 / temperature; 0: the largest logit, what follows is not looked at */
    int32_t top_k;    /* 0: off */
    float min_p;      /* 0: off */
    uint64_t top_p;   /* a fraction; 0: off */
    uint64_t uniform; /* a fraction: where in the cumulative distribution the token is */
    /* 0: the row gets no detail; else one more than how many of the best logits it lists. */
    int32_t logprobs;
    int32_t pad;
} tm_sample_row;

/* Columns of a row at most. */
#define TM_SAMPLE_VOCAB_MAX (1 << 19)
/* Best logits of one row that the device lists at most; whoever wants more takes the row. */
#define TM_SAMPLE_TOP_MAX 20

/* Of the row before edits: what log-probabilities are computed from. */
typedef struct tm_sample_detail {
    uint64_t mass;     /* of exp(x - max), see engine/sample/mass.h */
    float max, logit;  /* the largest; the token's */
    int32_t top_count; /* fewer than asked for in a short row */
    int32_t top_ids[TM_SAMPLE_TOP_MAX];
    float top_logits[TM_SAMPLE_TOP_MAX];
    int32_t pad;
} tm_sample_detail;

/* out[R] = the token of each row of x [R, n] f32, the one that tm_sampler_draw chooses, bit for bit; -1 when the row has
 * no finite maximum. x and edits are undefined afterwards. */
typedef struct tm_sample_args {
    int32_t *out;
    tm_sample_detail *details; /* [R], written where rows want it; NULL: none does */
    float *x;
    const tm_sample_row *rows; /* [R] */
    tm_sample_edit *edits;
    int n_rows, n;
    int ld; /* row stride of x; 0: n */
} tm_sample_args;

/* x[n] of every rank = that of rank 0: tokens, or negative numbers for none. */
typedef struct tm_spread_args {
    int32_t *x;
    int n;
} tm_spread_args;

/* x[n] = its sum over the ranks, in the activations' dtype or f32. */
typedef struct tm_sum_args {
    void *x;
    size_t n;
    bool f32;
} tm_sum_args;

/* Rank 0's `gathered` (device->join) becomes [R, n]: the columns of all ranks side by side, from x [R, cols] of each;
 * what the last ranks have beyond n columns is left out. */
typedef struct tm_gather_cols_args {
    const float *x;
    int n_rows, cols, n;
} tm_gather_cols_args;
/* A recorded sequence of operators and copies, see graph_begin. */
typedef struct tm_graph tm_graph;
/* A place in the stream, see event_create. */
typedef struct tm_dev_event tm_dev_event;

/* What the ranks' devices will exchange at most. */
typedef struct tm_join_args {
    size_t gather_bytes;  /* R * ranks * cols f32 of a gather_cols; 0: none */
    size_t sum_bytes_max; /* of one sum */
} tm_join_args;

typedef struct tm_comm tm_comm;
/* What one kernel did while it was watched, see profile_begin. */
typedef struct tm_profile_row {
    char name[80];
    int64_t calls;
    double seconds;
} tm_profile_row;

typedef struct tm_device_ops {
    tm_status (*open)(tm_device **out, const tm_device_opts *opts, tm_err *err);
    void (*close)(tm_device *dev);
    tm_status (*mem_free)(tm_device *dev, size_t *bytes, tm_err *err); /* what is left for KV */
    tm_status (*alloc)(tm_device *dev, size_t bytes, void **out, tm_err *err); /* 64-byte aligned */
    void (*free)(tm_device *dev, void *p);
    tm_status (*upload)(tm_device *dev, void *dst, const void *host, size_t bytes);
    tm_status (*download)(tm_device *dev, void *host, const void *src, size_t bytes);
    tm_status (*sync)(tm_device *dev);
    const char *(*describe)(tm_device *dev); /* "cpu avx2, 2 threads" */
    /* The rest may be NULL: a device that has none works without. */
    tm_dtype (*act_dtype)(tm_device *dev); /* of this device; NULL: the backend's */
    /* Host memory that copies reach without a detour. Copies from and into it return before they are done. */
    tm_status (*alloc_host)(tm_device *dev, size_t bytes, void **out, tm_err *err);
    void (*free_host)(tm_device *dev, void *p);
    tm_status (*download_async)(tm_device *dev, void *host, const void *src, size_t bytes);
    /* An event is done once everything that was enqueued before its last record is; wait waits for that alone, and for
     * nothing where it was never recorded. */
    tm_status (*event_create)(tm_device *dev, tm_dev_event **out, tm_err *err);
    tm_status (*event_record)(tm_device *dev, tm_dev_event *event);
    tm_status (*event_wait)(tm_device *dev, tm_dev_event *event);
    void (*event_free)(tm_device *dev, tm_dev_event *event);
    /* Between begin and end calls are recorded, not run; every pointer and number in them is fixed. A recording
     * that fails is thrown away by graph_end with its status. */
    tm_status (*graph_begin)(tm_device *dev);
    tm_status (*graph_end)(tm_device *dev, tm_graph **out);
    tm_status (*graph_launch)(tm_device *dev, tm_graph *graph);
    void (*graph_free)(tm_device *dev, tm_graph *graph);
    /* Bytes per second of reading `bytes` of device memory once, the best of several passes. */
    tm_status (*read_rate)(tm_device *dev, size_t bytes, double *rate, tm_err *err);
    /* Joins the devices of a group's ranks, one each; all ranks call it together, once, after open. From then on the
     * operators over ranks work, and sync, event_wait and download end with UNAVAILABLE when a rank is gone. close is
     * then also for all ranks together. *gathered is what gather_cols fills on rank 0, NULL elsewhere. NULL: this
     * device computes in host memory, where the communicator sums. */
    tm_status (*join)(tm_device *dev, tm_comm *comm, const tm_join_args *args, float **gathered,
                      tm_err *err);
    /* From begin on every kernel is timed by itself; end gives the rows, the longest first, and stops. Recorded graphs
     * are not watched. begin: any thread; end: while the engine thread does nothing. */
    tm_status (*profile_begin)(tm_device *dev);
    tm_status (*profile_end)(tm_device *dev, tm_profile_row *rows, int max, int *count);
} tm_device_ops;

/* Arguments that an operator may not know; a model that needs one is refused when it is opened. */
typedef enum tm_feature {
    TM_FEATURE_SEQ_ROPE = 1,  /* tm_rope_append_args.seq_inv_freq */
    TM_FEATURE_LOGN = 2,      /* tm_rope_append_args.logn_len */
    TM_FEATURE_LATENT_KV = 4, /* tm_kv_layer with v == k */
} tm_feature;

typedef struct tm_op_table {
    unsigned features; /* of tm_feature */
    /* Called once per weight after loading; may repack into w->packed (or do nothing). */
    tm_status (*linear_prepare)(tm_device *dev, tm_weight *w, tm_err *err);
    void (*linear_release)(tm_device *dev, tm_weight *w);
    tm_status (*embed)(tm_device *dev, const tm_embed_args *a);
    tm_status (*norm)(tm_device *dev, const tm_norm_args *a);
    tm_status (*linear)(tm_device *dev, const tm_linear_args *a);
    tm_status (*rope_append)(tm_device *dev, const tm_rope_append_args *a);
    tm_status (*attention_prefill)(tm_device *dev, const tm_attention_args *a);
    tm_status (*attention_decode)(tm_device *dev, const tm_attention_args *a);
    tm_status (*act)(tm_device *dev, const tm_act_args *a);
    tm_status (*gather_rows)(tm_device *dev, const tm_gather_rows_args *a);
    /* Needed by some families only. */
    tm_status (*head_norm)(tm_device *dev, const tm_head_norm_args *a);
    tm_status (*bound)(tm_device *dev, const tm_bound_args *a);
    tm_status (*copy)(tm_device *dev, const tm_copy_args *a);
    tm_status (*moe_route)(tm_device *dev, const tm_moe_route_args *a);
    tm_status (*moe_experts)(tm_device *dev, const tm_moe_experts_args *a);
    size_t (*moe_work_bytes)(const tm_moe_experts_args *a);
    /* May be NULL: the caller does without; every attention shape fits. */
    bool (*attention_fits)(int head_dim, int block_tokens);
    tm_status (*linear_gated)(tm_device *dev, const tm_linear_gated_args *a);
    tm_status (*argmax)(tm_device *dev, const tm_argmax_args *a);
    /* Two operators in one: n->out is what a->x points to, and is undefined afterwards. Where n->delta is given,
     * n->residual_out is another buffer than n->residual. */
    tm_status (*norm_linear)(tm_device *dev, const tm_norm_args *n, const tm_linear_args *a);
    tm_status (*norm_linear_gated)(tm_device *dev, const tm_norm_args *n,
                                   const tm_linear_gated_args *a);
    /* For batches of decodes alone; qkv is undefined afterwards. */
    tm_status (*rope_attention_decode)(tm_device *dev, const tm_rope_append_args *r,
                                       const tm_attention_args *a);
    /* Over the ranks of joined devices; all ranks call them in the same order with the same sizes. */
    tm_status (*sum)(tm_device *dev, const tm_sum_args *a);
    /* The norm of residual + the ranks' sum of delta, which is undefined afterwards. */
    tm_status (*sum_norm)(tm_device *dev, const tm_norm_args *n);
    tm_status (*gather_cols)(tm_device *dev, const tm_gather_cols_args *a);
    tm_status (*argmax_ranks)(tm_device *dev, const tm_argmax_args *a);
    /* What `linear` does group by group, in one. */
    tm_status (*linear_heads)(tm_device *dev, const tm_linear_heads_args *a);
    tm_status (*sample)(tm_device *dev, const tm_sample_args *a);
    tm_status (*spread)(tm_device *dev, const tm_spread_args *a); /* over the ranks */
    /* Finds by trying how `linear` computes products of these sizes fastest, once for each; out is overwritten. Takes
     * milliseconds, waits for the device, and may not be recorded. Results may differ in their last bits then. */
    tm_status (*linear_tune)(tm_device *dev, const tm_linear_args *a);
} tm_op_table;

typedef struct tm_backend {
    const char *name; /* "cpu", "cuda" */
    tm_dtype
        act_dtype; /* the device's own choice stands in tm_device_ops.act_dtype where there is one */
    const tm_device_ops *dev;
    const tm_op_table *ops; /* CPU: valid after dev->open chose the instruction set */
} tm_backend;

/* Explicit array of the backends of this build; NULL when the name is unknown or not built. */
const tm_backend *tm_backend_find(const char *name);
const tm_backend *const *tm_backend_list(int *count);

#ifdef __cplusplus
}
#endif
#endif
