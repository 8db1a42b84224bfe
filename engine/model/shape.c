/* Known shapes without a checkpoint: random weights, for benchmarks of models that are not at hand.
 *
 * A shape is the config.json of the model, so it goes through the same reader and the same tensor rows as a
 * checkpoint. Weights are cut from one pool of random numbers at random places: filling is then bound by the copy
 * to the device, and no two rows are alike. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "engine/model/model_impl.h"
#include "engine/weights/convert.h"

#define POOL_NUMBERS ((size_t)8 << 20)

typedef struct shape_row {
    const char *name, *config;
} shape_row;

#define LLAMA3(h, l, n, f, tie)                                                                    \
    "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":" #h ",\"num_hidden_layers\":" #l   \
    ",\"num_attention_heads\":" #n ",\"num_key_value_heads\":8,\"intermediate_size\":" #f          \
    ",\"vocab_size\":128256,\"max_position_embeddings\":131072,\"rms_norm_eps\":1e-5,"             \
    "\"rope_theta\":500000.0,\"tie_word_embeddings\":" #tie "}"
#define QWEN2(h, l, n, k, f, v, tie)                                                               \
    "{\"architectures\":[\"Qwen2ForCausalLM\"],\"hidden_size\":" #h ",\"num_hidden_layers\":" #l   \
    ",\"num_attention_heads\":" #n ",\"num_key_value_heads\":" #k ",\"intermediate_size\":" #f     \
    ",\"vocab_size\":" #v ",\"max_position_embeddings\":32768,\"rms_norm_eps\":1e-6,"              \
    "\"rope_theta\":1000000.0,\"tie_word_embeddings\":" #tie "}"

static const shape_row shapes[] = {
    {"llama3-8b", LLAMA3(4096, 32, 32, 14336, false)},
    {"llama3-70b", LLAMA3(8192, 80, 64, 28672, false)},
    {"llama2-7b",
     "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":4096,\"num_hidden_layers\":32,"
     "\"num_attention_heads\":32,\"num_key_value_heads\":32,\"intermediate_size\":11008,"
     "\"vocab_size\":32000,\"max_position_embeddings\":4096,\"rms_norm_eps\":1e-5,"
     "\"rope_theta\":10000.0,\"tie_word_embeddings\":false,\"torch_dtype\":\"float16\"}"},
    {"qwen2.5-0.5b", QWEN2(896, 24, 14, 2, 4864, 151936, true)},
    {"qwen2.5-1.5b", QWEN2(1536, 28, 12, 2, 8960, 151936, true)},
    {"qwen2.5-7b", QWEN2(3584, 28, 28, 4, 18944, 152064, false)},
};

void tm_model_shape_list(char *out, size_t size)
{
    size_t at = 0;
    for (size_t i = 0; i < TM_ARRAY_LEN(shapes) && at < size; i++)
        at += (size_t)snprintf(out + at, size - at, "%s%s", i ? ", " : "", shapes[i].name);
}

tm_status tm_shape_config(const char *name, json_t **out, tm_err *err)
{
    char list[200];
    for (size_t i = 0; i < TM_ARRAY_LEN(shapes); i++) {
        if (strcmp(shapes[i].name, name) != 0)
            continue;
        *out = json_loads(shapes[i].config, 0, NULL);
        return *out ? TM_OK : TM_FAIL(err, TM_STATUS_INTERNAL, "shape %s does not parse", name);
    }
    tm_model_shape_list(list, sizeof(list));
    return TM_FAIL(err, TM_STATUS_CONFIG, "shape '%.40s' is unknown: expected %s", name, list);
}

/* Random numbers in the weights' format, and where the next piece is cut. */
typedef struct pool {
    tm_model *m;
    char *matrix; /* [POOL_NUMBERS] in m->dtype, +-0.035: the spread of a trained model's weights */
    float *vector; /* [POOL_NUMBERS / 64] +-1 */
    uint64_t random;
} pool;

static uint32_t next_random(pool *p)
{
    p->random = p->random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(p->random >> 32);
}

static float next_float(pool *p)
{
    return (float)(next_random(p) >> 8) * 0x1p-23f - 1.0f;
}

/* As a checkpoint of this model has it: digits that are always 0 draw no power, which decides how fast products run. */
static float as_stored(const tm_model *m, float x)
{
    return m->f16 ? x : tm_bf16_to_f32(tm_f32_to_bf16(x));
}

static tm_status fill_matrix(pool *p, char *to, size_t n)
{
    size_t size = tm_dtype_size(p->m->dtype);
    while (n > 0) {
        size_t from = next_random(p) % (POOL_NUMBERS / 2) / 8 * 8;
        size_t take = TM_MIN(n, POOL_NUMBERS - from);
        TM_TRY(p->m->backend->dev->upload(p->m->dev, to, p->matrix + from * size, take * size));
        to += take * size;
        n -= take;
    }
    return TM_OK;
}

/* Norms around 1, biases and f32 matrices around 0. */
static tm_status fill_vector(pool *p, char *to, size_t n, float middle, float spread)
{
    for (size_t at = 0; at < n; at += POOL_NUMBERS / 64) {
        size_t take = TM_MIN(n - at, POOL_NUMBERS / 64);
        for (size_t i = 0; i < take; i++)
            p->vector[i] = middle + spread * next_float(p);
        TM_TRY(p->m->backend->dev->upload(p->m->dev, to + at * sizeof(float), p->vector,
                                          take * sizeof(float)));
        TM_TRY(p->m->backend->dev->sync(p->m->dev));
    }
    return TM_OK;
}

static tm_status fill_role(pool *p, tm_role role, int layer, tm_err *err)
{
    tm_model *m = p->m;
    tm_role_kind kind = tm_role_info_get(role)->kind;
    int rows, cols;
    char *base;
    TM_TRY(tm_load_role_memory(m, role, layer, &base, err));
    tm_role_size(&m->arch, &m->shard, role, &rows, &cols);
    size_t n = (size_t)rows * (size_t)cols;
    tm_status st = kind == TM_ROLE_MATRIX       ? fill_matrix(p, base, n)
                   : kind == TM_ROLE_MATRIX_F32 ? fill_vector(p, base, n, 0.0f, 0.035f)
                   : kind == TM_ROLE_BIAS       ? fill_vector(p, base, n, 0.0f, 0.1f)
                                                : fill_vector(p, base, n, 1.0f, 0.1f);
    if (st == TM_OK)
        m->info.parameters += (int64_t)n;
    return st == TM_OK ? TM_OK : TM_FAIL(err, st, "random weights: the copy to the device failed");
}

static tm_status fill_all(pool *p, tm_err *err)
{
    const tm_arch *a = &p->m->arch;
    bool done[TM_ROLE_COUNT] = {false};
    for (int i = 0; i < a->family->row_count; i++) {
        const tm_tensor_row *row = &a->family->rows[i];
        const tm_role_info *info = tm_role_info_get(row->role);
        if (done[row->role] || (info->summed && p->m->shard.rank > 0))
            continue;
        for (int layer = 0; layer < (info->of_layer ? a->layers : 1); layer++) {
            if (!tm_need_met(a, row->need, layer))
                continue;
            done[row->role] = true;
            TM_TRY(fill_role(p, row->role, layer, err));
        }
    }
    return TM_OK;
}

/* The pool is copied from again and again: from pinned memory at the speed of the bus. */
static char *take_pool(tm_model *m, size_t bytes)
{
    const tm_device_ops *dev = m->backend->dev;
    void *p = NULL;
    if (!dev->alloc_host)
        return malloc(bytes);
    return dev->alloc_host(m->dev, bytes, &p, NULL) == TM_OK ? p : NULL;
}

static void free_pool(tm_model *m, char *p)
{
    if (p && m->backend->dev->free_host)
        m->backend->dev->free_host(m->dev, p);
    else
        free(p);
}

tm_status tm_shape_load(tm_model *m, tm_err *err)
{
    pool p = {.m = m, .random = 0x9e3779b97f4a7c15u + (uint64_t)m->shard.rank};
    float *numbers = malloc(POOL_NUMBERS * sizeof(float));
    p.matrix = take_pool(m, POOL_NUMBERS * tm_dtype_size(m->dtype));
    p.vector = malloc(POOL_NUMBERS / 64 * sizeof(float));
    tm_status st = numbers && p.matrix && p.vector
                       ? TM_OK
                       : TM_FAIL(err, TM_STATUS_NO_MEMORY, "random weights: out of memory");
    if (st == TM_OK) {
        for (size_t i = 0; i < POOL_NUMBERS; i++)
            numbers[i] = as_stored(m, 0.035f * next_float(&p));
        tm_convert(p.matrix, m->dtype, numbers, TM_DTYPE_F32, POOL_NUMBERS);
        st = fill_all(&p, err);
    }
    /* Copies may still read the pool. */
    if (st == TM_OK)
        st = m->backend->dev->sync(m->dev);
    free(numbers);
    free_pool(m, p.matrix);
    free(p.vector);
    return st;
}
