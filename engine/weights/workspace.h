/* The weights of a TurboMind workspace as tensors in the order and with the names of a Hugging Face folder.
 *
 * A workspace holds headerless files, cut for tensor parallelism, turned ([in, out]) and with the rotated halves of
 * q and k interleaved. Here each of them is a view: a rule that finds element (row, column) of the tensor in the
 * parts. Reading a slice gathers it; nothing is converted beforehand, so any number of ranks reads any number of
 * parts. Opening looks at names and sizes of all files and touches no numbers. One thread, apart from
 * tm_ws_source_read. */
#ifndef TM_ENGINE_WEIGHTS_WORKSPACE_H
#define TM_ENGINE_WEIGHTS_WORKSPACE_H

#include "common/hash.h"
#include "engine/weights/safetensors.h"
#include "engine/weights/workspace_config.h"

/* The model to be read. Its numbers may be smaller than the workspace's, which pads the feed-forward part and repeats
 * key heads to fit its ranks. */
typedef struct tm_ws_model {
    int layers, hidden, heads, kv_heads, head_dim, ffn, vocab;
    bool pairs; /* q and k are stored with pairs (2i, 2i + 1), the model rotates (i, i + d / 2) */
    bool qkv_bias, o_bias, qk_norm;
    bool head;             /* else the embedding is the head */
    const bool *moe_layer; /* [layers], or NULL: none */
    int experts, moe_ffn, shared;
    bool shared_gate;
} tm_ws_model;

typedef struct tm_ws_source tm_ws_source;

#define TM_WS_READERS_MAX 16 /* threads that read at a time */

/* dir: the folder of weights. Refuses files that are missing, left over, or of another size than the config says;
 * the message names the file, what it has and what was expected. */
tm_status tm_ws_source_open(tm_ws_source **out, const char *dir, const tm_ws_config *config,
                            const tm_ws_model *model, tm_err *err);
void tm_ws_source_close(tm_ws_source *s);

/* Tensors, their `shard` counting them; the names belong to the source. */
const tm_st_tensor *tm_ws_source_tensors(const tm_ws_source *s, size_t *count);
const char *tm_ws_source_file(const tm_ws_source *s, int tensor); /* its first file's name */
void tm_ws_source_hash(const tm_ws_source *s, tm_sha256_ctx *h);

/* Rows row0.. and columns col0.. of a tensor, packed, in number format `to`. The slice lies inside. Any thread, at
 * most TM_WS_READERS_MAX at a time. */
tm_status tm_ws_source_read(tm_ws_source *s, int tensor, size_t row0, size_t rows, size_t col0,
                            size_t cols, void *dst, tm_dtype to, tm_err *err);

#endif
