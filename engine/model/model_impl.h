/* Inside of the model: its weights, workspaces and KV storage. */
#ifndef TM_ENGINE_MODEL_MODEL_IMPL_H
#define TM_ENGINE_MODEL_MODEL_IMPL_H

#include "engine/model/layout.h"
#include "engine/model/model.h"
#include "engine/weights/checkpoint.h"

typedef struct tm_layer {
    tm_weight qkv, o, gate_up, down;
    const float *attn_norm, *attn_norm_b, *ffn_norm, *ffn_norm_b;
} tm_layer;

/* A recorded decode step: `rows` sequences with one token each, block tables of `stride` entries. The first step of
 * a size runs unrecorded, so that kernels are loaded and matrix products planned. */
typedef struct tm_decode_graph {
    int rows, stride;
    tm_graph *graph; /* NULL: seen once */
} tm_decode_graph;

#define TM_DECODE_GRAPHS_MAX 96

/* Device buffers of one step; T = max_step_tokens, R = logit rows of one pass through the head. */
typedef struct tm_workspace {
    void *x;       /* [T, h] the residual stream */
    void *normed;  /* [T, h] */
    void *qkv;     /* [T, (H + 2K) d] */
    void *attn;    /* [T, H d] */
    void *delta;   /* [T, h] what a block adds to x */
    void *gate_up; /* [T, 2F] */
    void *act;     /* [T, F] */
    void *rows;    /* [R, h] */
    float *logits; /* [R, V of this rank] */
    /* The batch on a device with memory of its own: one flat copy of its arrays. */
    int32_t *batch, *batch_host;
    int32_t *picked, *picked_host; /* [R] */
    int blocks_max;                /* of one sequence */
    tm_decode_graph graphs[TM_DECODE_GRAPHS_MAX];
    int graph_count;
    float *gathered; /* host, [R, tp * V of a rank], rank 0 with a padded vocabulary */
    int rows_max;
} tm_workspace;

struct tm_model {
    tm_model_opts opts;
    tm_model_info info;
    tm_arch arch;
    tm_shard shard;
    tm_comm *comm;
    const tm_backend *backend;
    tm_device *dev;
    bool host_memory; /* the device computes in host memory (CPU): nothing needs copying */
    tm_dtype dtype;   /* of weights and KV */
    tm_dtype act;     /* of activations */
    bool f16;         /* config.json says that the checkpoint is float16 */

    tm_weight embed, head; /* head shares embed's data when tied */
    const float *final_norm, *final_norm_b;
    tm_layer *layers;
    tm_kv_layer *kv; /* [layers]; k and v NULL before tm_model_kv_alloc */
    const float *inv_freq;
    float rope_mscale;
    tm_workspace ws;

    void **blocks; /* every device allocation, freed at close */
    size_t block_count, block_cap;
};

/* Takes device memory that lives as long as the model. */
tm_status tm_model_take(tm_model *m, size_t bytes, void **out, tm_err *err);

/* Finds every tensor and checks names, shapes and number formats; settles arch.vocab and arch.tie. No
 * memory of the device is taken. *parameters counts the whole model. */
tm_status tm_load_check(tm_arch *a, const tm_checkpoint *c, int64_t *parameters, tm_err *err);
/* Takes memory and copies this rank's share. After tm_load_check. */
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
/* n wanted rows, at most ws.rows_max, of ws.x after its last add, into out. */
tm_status tm_forward_head(tm_model *m, const int32_t *rows, int n, void *out);

/* device_step.c: steps on a device with memory of its own. */
tm_status tm_device_step_open(tm_model *m, tm_err *err);
void tm_device_step_close(tm_model *m);
bool tm_device_step_is_decode(const tm_model *m, const tm_batch *b);
/* Leaves logits and picks of all rows on their way; dev->sync waits. */
tm_status tm_device_step_decode(tm_model *m, const tm_batch *b);
tm_status tm_device_step_upload(tm_model *m, const tm_batch *b, tm_batch *out);

#endif
