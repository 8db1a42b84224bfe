/* A loaded model: this rank's shard of the weights, the KV storage and the forward pass.
 *
 * One generic decoder serves every family; a family is a table row (family.c): names of tensors, config
 * keys, flags. Opening checks config, every tensor's name, shape, dtype and file offsets before memory is
 * taken, and refuses with one line that names file, key or tensor and what was expected.
 *
 * Thread: the engine thread. Ranks call open, kv_alloc and forward together with the same arguments. */
#ifndef TM_ENGINE_MODEL_MODEL_H
#define TM_ENGINE_MODEL_MODEL_H

#include "common/status.h"
#include "engine/backend/backend.h"
#include "parallel/comm.h"

typedef struct tm_model tm_model;

typedef struct tm_model_opts {
    const char *dir; /* Hugging Face folder */
    const char
        *shape; /* instead of dir: a known model's shape with random weights, for benchmarks */
    /* Weights and KV cache: "bfloat16", "float16", "float32" (CPU only), or "auto": float16 on CUDA, whatever the checkpoint
     * has (scale.c says why it fits), else bfloat16. */
    const char *dtype;
    const char *backend; /* "cpu", "cuda" */
    tm_device_opts device;
    int block_tokens;    /* KV block, 64 */
    int max_step_tokens; /* T at most in one forward (prefill budget + batch) */
    int max_seqs;        /* B at most */
    int session_len;     /* context limit; 0 = the model's */
    bool no_graphs;      /* no decode step is recorded; for measurements */
} tm_model_opts;

/* Seconds of what opening a model consists of. */
typedef struct tm_model_times {
    double check;    /* config, tensors, the device, and where there are several their meeting */
    double weights;  /* reading and copying */
    double prepare;  /* the backend's own work on weights */
    double work;     /* workspaces */
    double products; /* tm_model_warm: trying products */
    double steps;    /* tm_model_warm: the first steps */
} tm_model_times;

typedef struct tm_model_info {
    char name[128];  /* last path component of dir */
    char family[32]; /* "llama" */
    char arch[64];   /* "LlamaForCausalLM" */
    char digest[65]; /* hex SHA-256 over config, tokenizer files and the shards' headers */
    int vocab, hidden, layers, heads, kv_heads, head_dim, ffn;
    int max_positions; /* context limit in force: min(session_len, model) */
    int tp;
    int32_t stop_ids[16]; /* union of config, generation_config and tokenizer_config */
    int stop_count;
    size_t weight_bytes;   /* of this rank */
    size_t work_bytes;     /* workspaces of this rank */
    size_t kv_block_bytes; /* one block, all layers, this rank */
    size_t
        step_read_bytes; /* weights streamed by one decode step of this rank, for bandwidth figures */
    int64_t parameters; /* of the whole model */
    char dtype[16];
    char device[64]; /* backend's description */
    tm_model_times times;
} tm_model_info;

tm_status tm_model_open(tm_model **out, const tm_model_opts *opts, tm_comm *comm, tm_err *err);
void tm_model_close(tm_model *m);
const tm_model_info *tm_model_info_get(const tm_model *m);

/* Memory left for KV on this rank, after the weights and workspaces. */
tm_status tm_model_mem_free(tm_model *m, size_t *bytes, tm_err *err);
/* Takes the KV storage, once. */
tm_status tm_model_kv_alloc(tm_model *m, int n_blocks, tm_err *err);

/* Does what the first requests would otherwise wait for: products are tried and kernels loaded, in a bounded time. After
 * tm_model_kv_alloc and before the first step, on all ranks together, which agree on the result. Keys and values of
 * block 0 are undefined afterwards. */
tm_status tm_model_warm(tm_model *m, tm_err *err);

/* One step. batch arrays are host memory. logits: rank 0 receives [n_logits, vocab] f32 host memory
 * (ignored elsewhere). No step may be in flight. After a failure the group is lost (see parallel/comm.h). */
tm_status tm_model_forward(tm_model *m, const tm_batch *batch, float *logits);

/* The length that the model's rope is chosen by for a request with this prompt, the same for all prompts that get
 * the same frequencies; 0: those of the trained length, and always for a rope that does not depend on it. A
 * function of the prompt alone, so that a continued request gets the same. Any thread. */
int32_t tm_model_rope_len(const tm_model *m, size_t prompt_len);

/* Times single kernels of the device, where it can; see tm_device_ops. rows NULL begins. Between steps. */
tm_status tm_model_profile(tm_model *m, tm_profile_row *rows, int max, int *count);

/* True when the device can choose the largest logit itself; then no row of logits has to leave it, and steps may be
 * begun before the one in front has ended. */
bool tm_model_can_pick(const tm_model *m);

/* Steps that may be in flight. */
#define TM_MODEL_FLIGHTS 2

/* A step of whose logits only the choice of each row is wanted. begin enqueues it and returns at once; batch is free
 * again. Tokens may be TM_TOKEN_PICKED of the step begun just before, whether that one has ended or not. end waits for
 * the oldest step that was begun and not ended: picked[n_logits], or NULL, receives the index of each row's largest
 * logit (the lowest one on ties; -1 when the row has no finite maximum). INVALID when TM_MODEL_FLIGHTS are in flight,
 * or none. Keys and values are written in the order of the steps: a block may be given to another sequence in a step
 * begun later. All ranks begin the same steps in the same order; which of them end when is each one's own. */
tm_status tm_model_begin(tm_model *m, const tm_batch *batch);
tm_status tm_model_end(tm_model *m, int32_t *picked);

/* The same with tokens that are drawn, by the parameters of each row. */
typedef struct tm_sample_set {
    const tm_sample_row *rows; /* [n_logits] */
    const tm_sample_edit *edits;
    int n_edits;  /* at most tm_model_edits_max */
    bool details; /* some row wants one */
} tm_sample_set;
/* True when the device can; then it can also pick. */
bool tm_model_can_sample(const tm_model *m);
int tm_model_edits_max(const tm_model *m);
/* One logits row a sequence at most. set: of rank 0, ignored elsewhere. Ended by tm_model_end, as the others are. */
tm_status tm_model_begin_sample(tm_model *m, const tm_batch *batch, const tm_sample_set *set);
/* [n_logits] of the step that ended last, valid until the next begins; those of rows that wanted none are undefined. */
const tm_sample_detail *tm_model_details(const tm_model *m);
int tm_model_in_flight(const tm_model *m);

/* "llama3-8b, ...": values of tm_model_opts.shape. */
void tm_model_shape_list(char *out, size_t size);

#endif
