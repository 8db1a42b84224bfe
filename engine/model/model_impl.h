/* Inside of the model: its weights, workspaces and KV storage. */
#ifndef TM_ENGINE_MODEL_MODEL_IMPL_H
#define TM_ENGINE_MODEL_MODEL_IMPL_H

#include "engine/model/folder.h"
#include "engine/model/layout.h"
#include "engine/model/model.h"
#include "engine/weights/checkpoint.h"

typedef struct tm_layer {
    tm_weight qkv, o, gate_up, down;
    tm_weight q_a, q_b, kv_a, kv_b_k, kv_b_v; /* latent attention, instead of qkv */
    tm_weight router, experts_gate_up, experts_down, shared_gate_up, shared_down, shared_gate;
    const float *attn_norm, *attn_norm_b, *ffn_norm, *ffn_norm_b;
    const float *post_attn_norm, *post_ffn_norm; /* NULL: none */
    const float *q_norm, *k_norm, *q_a_norm, *kv_a_norm, *choice_bias;
} tm_layer;

/* A recorded decode step: `rows` sequences with one token each, block tables of `stride` entries. The first step of
 * a size runs unrecorded, so that kernels are loaded and matrix products planned. */
typedef struct tm_decode_graph {
    int rows, stride;
    bool samples;    /* the tokens by parameters, not the largest logits */
    tm_graph *graph; /* NULL: seen once */
} tm_decode_graph;

#define TM_DECODE_GRAPHS_MAX 192

/* A product of a step with its place in the workspace: one of each shape. */
typedef struct tm_product {
    const tm_weight *w;
    const void *x;
    void *out;
    int ldo;
    bool f32_out;
} tm_product;

#define TM_PRODUCTS_MAX   16
#define TM_TUNED_ROWS_MAX 256 /* decode steps beyond that leave the choice to the device */

/* Pinned host memory of a step in flight, and the place behind it in the device's stream. */
typedef struct tm_flight {
    int32_t *batch;             /* the flat batch */
    int32_t *picked;            /* [T] */
    tm_sample_row *sample_rows; /* [B]; this and the next two where the device samples */
    tm_sample_edit *edits;
    tm_sample_detail *details; /* [B] */
    tm_dev_event *done;
    int n_picks;
} tm_flight;

/* Device buffers of one step; T = max_step_tokens, R = logit rows of one pass through the head. */
typedef struct tm_workspace {
    void *x;           /* [T, h] the residual stream */
    void *x_other;     /* its next place, on backends that join norm and product */
    tm_norm_args norm; /* of the block that begins; norm_waits: its first product computes it */
    bool norm_waits;
    bool sum_waits;      /* delta is this rank's part still: the next norm sums it over the ranks */
    void *normed;        /* [T, h] */
    void *qkv;           /* [T, (H + 2K) d] */
    void *attn;          /* [T, H d] */
    void *delta;         /* [T, h] what a block adds to x */
    void *gate_up;       /* [T, 2F] */
    void *act;           /* [T, F] */
    void *q_a;           /* [T, q_rank] */
    void *q;             /* [T, H (rope + nope)] latent attention: queries, then values */
    void *side;          /* [T, h] of a parallel block: what the feed-forward part adds */
    void *shared;        /* [T, h] of the shared expert */
    float *router;       /* [T, E] */
    float *gate;         /* [T] of the shared expert */
    void *experts;       /* what moe_experts works in */
    int32_t *expert_ids; /* [T, k] */
    float *expert_weights; /* [T, k] */
    float *seq_freq;       /* [B, rd / 2] on the device */
    float *seq_freq_host;  /* the same on the host */
    int32_t *seq_freq_len; /* [B] the lengths that they are for */
    void *rows;            /* [R, h] */
    float *logits;         /* [R, V of this rank] */
    /* The batch on a device with memory of its own: one flat copy of its arrays. */
    int32_t *batch;
    int32_t *picked; /* [T] what the step before chose; its first n_picks are valid */
    int n_picks;
    tm_sample_row *sample_rows; /* [B] */
    tm_sample_edit *edits;      /* [edits_max] */
    tm_sample_detail *details;  /* [B] */
    int edits_max;
    const tm_sample_detail *details_ended;
    tm_flight flights[TM_MODEL_FLIGHTS]; /* a ring */
    int flight_next, in_flight;          /* the place of the next step; steps begun and not ended */
    int blocks_max;                      /* of one sequence */
    tm_decode_graph graphs[TM_DECODE_GRAPHS_MAX];
    int graph_count;
    tm_product products[TM_PRODUCTS_MAX];
    int product_count;
    bool tuned[TM_TUNED_ROWS_MAX + 1]; /* products of so many rows were tried */
    float *gathered; /* host, [R, tp * V of a rank], rank 0 with a padded vocabulary */
    float *joined;   /* [R, vocabulary] of joined devices, rank 0; else NULL */
    int rows_max;
} tm_workspace;

struct tm_model {
    tm_model_opts opts;
    tm_model_info info;
    tm_folder folder; /* while the model is opened */
    tm_arch arch;
    tm_shard shard;
    tm_comm *comm;
    const tm_backend *backend;
    tm_device *dev;
    bool host_memory; /* the device computes in host memory (CPU): nothing needs copying */
    tm_dtype dtype;   /* of weights and KV */
    tm_dtype act;     /* of activations */
    bool f16;         /* config.json says that the checkpoint is float16 */
    float scale;      /* the residual stream is so many times the model's own: scale.c */

    tm_weight embed, head; /* head shares embed's data when tied */
    const float *final_norm, *final_norm_b;
    tm_layer *layers;
    tm_kv_layer *kv; /* [layers]; k and v NULL before tm_model_kv_alloc */
    const float *inv_freq, *inv_freq_local;
    float rope_mscale;
    const float *alibi; /* [H] of this rank, or NULL */
    bool seq_rope;      /* this step has frequencies for each sequence */
    tm_workspace ws;

    void **blocks; /* every device allocation, freed at close */
    size_t block_count, block_cap;
    size_t taken; /* bytes of them */
};

/* Size of an activation, and a place among them. */
static inline size_t tm_act_size(const tm_model *m)
{
    return tm_dtype_size(m->act);
}

static inline void *tm_act_at(const tm_model *m, void *p, int n)
{
    return (char *)p + (size_t)n * tm_act_size(m);
}

/* Takes device memory that lives as long as the model. */
tm_status tm_model_take(tm_model *m, size_t bytes, void **out, tm_err *err);

/* scale.c: what a number of the checkpoint is multiplied with, and what is added. */
typedef struct tm_scaling {
    float factor, addend;
} tm_scaling;
float tm_scale_choose(const tm_model *m); /* tm_model.scale, once the device is open */
/* Of a role's weight, from row `row` of this rank's on. */
tm_scaling tm_scale_of(const tm_model *m, tm_role role, int row);

#define TM_TENSOR_NAME_MAX 256
/* A row's tensor name in a layer (and of an expert); the layers that the row is for. */
void tm_load_tensor_name(char *out, const tm_arch *a, const tm_tensor_row *row, int layer,
                         int expert);
int tm_load_layers(const tm_arch *a, const tm_tensor_row *row);

/* Finds every tensor and checks names, shapes and number formats; settles arch.vocab and arch.tie. No
 * memory of the device is taken. *parameters counts the whole model. */
tm_status tm_load_check(tm_arch *a, const tm_checkpoint *c, int64_t *parameters, tm_err *err);
/* Is a tensor of this name read, or left aside on purpose? */
bool tm_load_knows(const tm_arch *a, const char *tensor);
void tm_load_report_unread(const tm_arch *a, const tm_checkpoint *c); /* a warning in the log */
size_t tm_load_bytes(const tm_model *m); /* of all weights of this rank */
/* Takes memory and copies this rank's share; tm_load_prepare is next. After tm_load_check. */
tm_status tm_load_weights(tm_model *m, const tm_checkpoint *c, tm_err *err);
void tm_load_release(tm_model *m); /* gives prepared weights back to the backend */
/* Memory of a role's weight, taken on the first call for it. */
tm_status tm_load_role_memory(tm_model *m, tm_role role, int layer, char **base, tm_err *err);
tm_status tm_load_prepare(tm_model *m, tm_err *err); /* once all weights are there */

/* shape.c: a known shape without a checkpoint. */
tm_status tm_shape_config(const char *name, json_t **out, tm_err *err);
tm_status tm_shape_load(tm_model *m, tm_err *err);

/* forward.c: the parts of a step, on a batch that the device can read. */
tm_status tm_forward_layers(tm_model *m, const tm_batch *b);
/* Last add, final norm, head: ws.logits for all rows of a decode batch. */
tm_status tm_forward_decode_head(tm_model *m, int rows);
/* ws.picked from `first` on: the largest of each of the first rows of ws.logits. */
tm_status tm_forward_pick(tm_model *m, int first, int rows);
/* The same, by a pick or, where the step samples, by the parameters of the rows. The logits are undefined then. */
tm_status tm_forward_choose(tm_model *m, int first, int rows, bool samples);
/* The first rows of ws.logits to rank 0's host memory. */
tm_status tm_forward_download(tm_model *m, int rows, float *logits);
/* n wanted rows, at most ws.rows_max, of ws.x after its last add, into out. */
tm_status tm_forward_head(tm_model *m, const int32_t *rows, int n, void *out);

/* device_step.c: steps on a device with memory of its own. */
tm_status tm_device_step_open(tm_model *m, tm_err *err);
void tm_device_step_close(tm_model *m);
bool tm_device_step_is_decode(const tm_model *m, const tm_batch *b);
/* Enqueues the step: ws.logits and, where the device can choose, ws.picked of all rows. `host` is pinned, and free
 * until the step is done. */
tm_status tm_device_step_decode(tm_model *m, const tm_batch *b, int32_t *host, bool samples);
tm_status tm_device_step_upload(tm_model *m, const tm_batch *b, int32_t *host, tm_batch *out);

/* sample_step.c: parameters and results of sampling on the device. */
tm_status tm_sample_step_open(tm_model *m, tm_err *err);
void tm_sample_step_close(tm_model *m);
/* The parameters of a step to the device. */
tm_status tm_sample_step_upload(tm_model *m, const tm_flight *f, const tm_sample_set *set, int n);
tm_status tm_forward_sample(tm_model *m, int first, int rows);

/* warm.c: the device tries how it computes the products of a step with so many rows fastest, once, as far as it gets by the
 * deadline (tm_clock_ns). Workspaces other than the batch are overwritten. Nothing before tm_model_warm. */
tm_status tm_warm_rows(tm_model *m, int rows, int64_t deadline_ns);

/* layer.c: steps that blocks are made of. */
tm_status tm_run_sum(tm_model *m, void *x, size_t n); /* over the ranks */
/* With ws.delta, which may be unsummed (ws.sum_waits), as delta it is summed on the way. */
tm_status tm_run_norm(tm_model *m, void *out, void *x, const void *delta, const float *w,
                      const float *b, int rows);
/* The first product of a block, of ws.normed, which nothing else reads where ws.norm_waits. */
tm_status tm_run_normed_linear(tm_model *m, void *out, const tm_weight *w, int rows);
tm_status tm_run_linear(tm_model *m, void *out, const void *x, const tm_weight *w, int rows);
tm_status tm_run_linear_f32(tm_model *m, float *out, const void *x, const tm_weight *w, int rows);
/* One layer. delta is what the layer before still has to add to x, or NULL; the layer's own ends in ws.delta. */
tm_status tm_layer_forward(tm_model *m, const tm_batch *b, int layer, const void *delta);

/* attention.c, ffn.c: from ws.normed to this rank's part of the block's output, not yet summed. */
tm_status tm_attention_forward(tm_model *m, const tm_batch *b, int layer, void *out);
tm_status tm_ffn_forward(tm_model *m, int layer, int rows, void *out);

/* extras.c: what only some families need: workspaces, slopes, frequencies by length, missing operators. */
tm_status tm_extras_check(const tm_model *m, tm_err *err);
/* What the backend lacks of length-dependent rope shortens the context. Before the info is filled. */
void tm_extras_limit_context(tm_model *m);
tm_status tm_extras_take(tm_model *m, tm_err *err);
void tm_extras_release(tm_model *m);
/* Frequencies of the step's sequences, where they depend on lengths. */
tm_status tm_extras_begin_step(tm_model *m, const tm_batch *b);

#endif
