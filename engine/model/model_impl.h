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
    void *logits;  /* [R, V of this rank] */
    /* the batch on the device; unused where the device reads host memory */
    int32_t *tokens, *positions, *seq_begin, *kv_len, *blocks, *logit_rows;
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

#endif
