/* What a model folder holds, without loading it: the config as the engine understands it, its tensors, the memory
 * that it takes when it is split, and what nobody reads. For `turbomesh inspect` and `turbomesh list`. */
#ifndef TM_ENGINE_MODEL_INSPECT_H
#define TM_ENGINE_MODEL_INSPECT_H

#include "engine/model/folder.h"

#define TM_INSPECT_SPLITS 4

typedef struct tm_inspect_split {
    int tp;
    char refused[160];   /* why it cannot be split so; "" = it can */
    size_t weight_bytes; /* of a rank, in 16 bits (small vectors and the router in float32) */
    size_t kv_bytes;     /* of a token on a rank, in 16 bits */
} tm_inspect_split;

typedef struct tm_inspect {
    tm_arch arch;
    tm_checkpoint *ckpt; /* NULL when there is none */
    /* What is wrong with the tensors, "" = they are complete. Numbers that need them are then 0. */
    char problem[512];
    int64_t parameters;
    size_t file_bytes; /* of all tensors */
    int32_t stop_ids[16];
    int stop_count;
    tm_inspect_split split[TM_INSPECT_SPLITS];
    tm_folder folder;
    json_t *config; /* of the folder */
} tm_inspect;

/* Fails when config.json is missing or not understood; troubles with tensors are `problem`. */
tm_status tm_inspect_open(tm_inspect **out, const char *dir, tm_err *err);
void tm_inspect_close(tm_inspect *i);

/* Is the tensor read, or a leftover that is ignored on purpose? */
bool tm_inspect_knows_tensor(const tm_inspect *i, const tm_st_tensor *t);
/* Is the key of config.json read, or one that says nothing about the arithmetic? */
bool tm_inspect_knows_key(const char *key);
/* The first operator that the backend lacks for the family; NULL = it has all. */
const char *tm_inspect_lacks(const tm_family *f, const tm_backend *b);

const char *tm_rope_type_name(tm_rope_type type);
const char *tm_act_name(tm_act_kind act);

#endif
