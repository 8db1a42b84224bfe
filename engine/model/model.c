/* Opening and closing a model, and its KV storage.
 *
 * Opening has two halves with an agreement of the ranks after each: all checks (config, tensors, backend), then
 * memory and copies; in between the ranks' devices meet. So a bad folder is refused by every rank before any has
 * taken memory, and a rank that fails alone does not leave the others waiting in their first step. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/file.h"
#include "common/json.h"
#include "common/log.h"
#include "engine/model/load_progress.h"
#include "engine/model/model_impl.h"

#define LOGIT_ROWS_MIN 64 /* one pass through the head reads all of it: not fewer rows than this */

tm_status tm_model_take(tm_model *m, size_t bytes, void **out, tm_err *err)
{
    if (m->block_count == m->block_cap) {
        size_t cap = m->block_cap ? m->block_cap * 2 : 64;
        void **grown = realloc(m->blocks, cap * sizeof(*grown));
        if (!grown)
            return TM_FAIL(err, TM_STATUS_NO_MEMORY, "model: out of memory");
        m->blocks = grown;
        m->block_cap = cap;
    }
    TM_TRY(m->backend->dev->alloc(m->dev, bytes, out, err));
    m->blocks[m->block_count++] = *out;
    m->taken += bytes;
    return TM_OK;
}

/* SHA-256 over config, tokenizer files and the shards' headers: equal for equal models in any folder. */
static void digest_of(const char *dir, const tm_checkpoint *c, char out[65])
{
    static const char *const files[] = {"config.json", "tokenizer.json", "tokenizer.model",
                                        "tokenizer_config.json", "qwen.tiktoken"};
    tm_sha256_ctx *h = tm_sha256_begin();
    for (size_t i = 0; i < TM_ARRAY_LEN(files); i++) {
        char path[4096];
        tm_map map;
        if (!tm_path_join(path, sizeof(path), dir, files[i]) || !tm_file_exists(path) ||
            tm_map_open(&map, path, NULL) != TM_OK)
            continue;
        uint64_t len = map.len; /* so that bytes cannot move from one file to the next */
        tm_sha256_add(h, files[i], strlen(files[i]) + 1);
        tm_sha256_add(h, &len, sizeof(len));
        tm_sha256_add(h, map.data, map.len);
        tm_map_close(&map);
    }
    tm_checkpoint_hash(c, h);
    uint8_t sum[32];
    tm_sha256_end(h, sum);
    tm_hex(sum, sizeof(sum), out);
}

static bool says_float16(const json_t *root)
{
    const char *name = json_string_value(json_object_get(root, "dtype"));
    if (!name)
        name = json_string_value(json_object_get(root, "torch_dtype"));
    return name && strcmp(name, "float16") == 0;
}

static tm_status read_shape(tm_model *m, tm_err *err)
{
    json_t *root = NULL;
    TM_TRY(tm_shape_config(m->opts.shape, &root, err));
    tm_status st = tm_arch_read(&m->arch, root, err);
    m->f16 = says_float16(root);
    json_decref(root);
    return st;
}

static tm_status read_config(tm_model *m, tm_err *err)
{
    int count = 0;
    tm_folder *f = &m->folder;
    if (m->opts.shape)
        return read_shape(m, err);
    TM_TRY(tm_folder_open(f, m->opts.dir, &m->arch, err));
    m->f16 = says_float16(f->config);
    tm_status st = tm_stop_ids_read(f->text_dir, f->config, m->arch.vocab, m->info.stop_ids,
                                    (int)TM_ARRAY_LEN(m->info.stop_ids), &count, err);
    m->info.stop_count = count;
    if (st != TM_OK)
        tm_err_prefix(err, "%s", m->opts.dir);
    return st;
}

static tm_status choose_dtype(tm_model *m, tm_err *err)
{
    static const struct {
        const char *name;
        tm_dtype dtype;
    } dtypes[] = {{"auto", TM_DTYPE_BF16},
                  {"bfloat16", TM_DTYPE_BF16},
                  {"float16", TM_DTYPE_F16},
                  {"float32", TM_DTYPE_F32}};
    const char *name = m->opts.dtype ? m->opts.dtype : "auto";
    size_t i = 0;
    while (i < TM_ARRAY_LEN(dtypes) && strcmp(dtypes[i].name, name) != 0)
        i++;
    if (i == TM_ARRAY_LEN(dtypes))
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "dtype '%.40s': expected auto, bfloat16, float16 or float32", name);
    m->dtype = dtypes[i].dtype;
    if (i == 0 && !m->host_memory)
        m->dtype = TM_DTYPE_F16; /* whatever the checkpoint has: scale.c says why it fits */
    if (m->dtype == TM_DTYPE_F32 && !m->host_memory)
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "dtype float32: backend '%s' computes in bfloat16 or float16",
                       m->backend->name);
    return TM_OK;
}

static tm_status check_options(tm_model *m, tm_err *err)
{
    const tm_model_opts *o = &m->opts;
    if (o->block_tokens < 1 || o->max_step_tokens < 1 || o->max_seqs < 1 || o->session_len < 0)
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "block_tokens %d, max_step_tokens %d, max_seqs %d: expected at least 1; "
                       "session_len %d: at least 0",
                       o->block_tokens, o->max_step_tokens, o->max_seqs, o->session_len);
    m->backend = tm_backend_find(o->backend ? o->backend : "cpu");
    if (!m->backend)
        return TM_FAIL(err, TM_STATUS_CONFIG, "backend '%.40s' is unknown or not in this build",
                       o->backend);
    m->host_memory = strcmp(m->backend->name, "cpu") == 0;
    if (!m->host_memory && tm_comm_size(m->comm) > 1 && !m->backend->dev->join)
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "backend '%s' runs on one rank: its devices cannot sum among themselves",
                       m->backend->name);
    /* The ranks of a host have its devices in turn. */
    if (!m->host_memory && !m->opts.device.share)
        m->opts.device.index += tm_comm_host_rank(m->comm);
    return choose_dtype(m, err);
}

/* Does the model run on devices that sum among themselves? */
static bool joins(const tm_model *m)
{
    return !m->host_memory && m->shard.tp > 1;
}

/* A missing operator is a message now, not a crash in a request. */
static tm_status check_operators(const tm_model *m, tm_err *err)
{
    const tm_op_table *o = m->backend->ops;
    const struct {
        const char *name;
        bool there;
    } ops[] = {
        {"linear_prepare", o->linear_prepare != NULL},
        {"linear_release", o->linear_release != NULL},
        {"embed", o->embed != NULL},
        {"norm", o->norm != NULL},
        {"linear", o->linear != NULL},
        {"rope_append", o->rope_append != NULL},
        {"attention_prefill", o->attention_prefill != NULL},
        {"attention_decode", o->attention_decode != NULL},
        {"act", o->act != NULL},
        {"gather_rows", o->gather_rows != NULL},
        {"sum", o->sum != NULL || !joins(m)},
        {"sum_norm", o->sum_norm != NULL || !joins(m)},
        {"gather_cols", o->gather_cols != NULL || !joins(m)},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(ops); i++)
        if (!ops[i].there)
            return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                           "backend '%s' has no operator '%s', which %s needs", m->backend->name,
                           ops[i].name, m->arch.arch);
    if (o->attention_fits && !o->attention_fits(m->arch.head_dim, m->opts.block_tokens))
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "backend '%s' has no attention for heads of %d in KV blocks of %d tokens",
                       m->backend->name, m->arch.head_dim, m->opts.block_tokens);
    return tm_extras_check(m, err);
}

/* Keys and values, or in latent attention keys that are both. */
static size_t kv_arrays(const tm_model *m)
{
    return m->arch.mla.kv_rank > 0 ? 1 : 2;
}

static void fill_info(tm_model *m)
{
    const tm_arch *a = &m->arch;
    tm_model_info *i = &m->info;
    if (m->opts.shape)
        snprintf(i->name, sizeof(i->name), "%s", m->opts.shape);
    else
        snprintf(i->name, sizeof(i->name), "%s", m->folder.name);
    snprintf(i->family, sizeof(i->family), "%s", a->family->name);
    snprintf(i->arch, sizeof(i->arch), "%s", a->arch);
    i->vocab = a->vocab;
    i->hidden = a->hidden;
    i->layers = a->layers;
    i->heads = a->heads;
    i->kv_heads = a->kv_heads;
    i->head_dim = a->head_dim;
    i->ffn = a->ffn;
    i->max_positions = a->max_positions;
    if (m->opts.session_len > 0)
        i->max_positions = TM_MIN(a->context_max, m->opts.session_len);
    i->tp = m->shard.tp;
    i->kv_block_bytes = kv_arrays(m) * (size_t)a->layers * (size_t)m->shard.kv_heads *
                        (size_t)m->opts.block_tokens * (size_t)a->head_dim *
                        tm_dtype_size(m->dtype);
    snprintf(i->dtype, sizeof(i->dtype), "%s", tm_dtype_name(m->dtype));
}

static tm_status check_checkpoint(tm_model *m, tm_checkpoint **ckpt, tm_err *err)
{
    TM_TRY(tm_folder_checkpoint(&m->folder, &m->arch, ckpt, err));
    tm_status st = tm_load_check(&m->arch, *ckpt, &m->info.parameters, err);
    if (st != TM_OK)
        tm_err_prefix(err, "%s", m->opts.dir);
    else if (m->shard.rank == 0)
        tm_load_report_unread(&m->arch, *ckpt);
    return st;
}

/* First half: everything that can be refused without taking memory. */
static tm_status check_all(tm_model *m, tm_checkpoint **ckpt, tm_err *err)
{
    const tm_device_ops *dev;
    TM_TRY(read_config(m, err));
    TM_TRY(check_options(m, err));
    TM_TRY(tm_shard_make(&m->shard, &m->arch, tm_comm_size(m->comm), tm_comm_rank(m->comm), err));
    if (!m->opts.shape)
        TM_TRY(check_checkpoint(m, ckpt, err));
    /* Again: the embedding may have more rows than config.json says. */
    TM_TRY(tm_shard_make(&m->shard, &m->arch, m->shard.tp, m->shard.rank, err));
    dev = m->backend->dev;
    m->opts.device.dtype = m->dtype;
    TM_TRY(dev->open(&m->dev, &m->opts.device, err));
    m->act = dev->act_dtype ? dev->act_dtype(m->dev) : m->backend->act_dtype;
    m->scale = tm_scale_choose(m);
    TM_TRY(check_operators(m, err));
    tm_extras_limit_context(m);
    if (*ckpt)
        digest_of(m->folder.text_dir, *ckpt, m->info.digest);
    fill_info(m);
    snprintf(m->info.device, sizeof(m->info.device), "%s", dev->describe(m->dev));
    return TM_OK;
}

/* Rows of one pass through the head. */
static size_t head_rows(const tm_model *m)
{
    size_t t = (size_t)m->opts.max_step_tokens, b = (size_t)m->opts.max_seqs;
    return TM_MIN(t, TM_MAX(b, (size_t)LOGIT_ROWS_MIN));
}

/* Between the halves: all ranks have opened their devices, none has taken much memory. */
static tm_status join_devices(tm_model *m, tm_err *err)
{
    size_t cols = (size_t)m->shard.vocab * (size_t)m->shard.tp;
    size_t row = (size_t)m->arch.hidden * tm_act_size(m);
    const tm_join_args a = {.gather_bytes = head_rows(m) * cols * sizeof(float),
                            .sum_bytes_max = (size_t)m->opts.max_step_tokens * row};
    return m->backend->dev->join(m->dev, m->comm, &a, &m->ws.joined, err);
}

typedef struct want {
    void **out;
    size_t rows, cols, size;
} want;

static tm_status take_workspace(tm_model *m, tm_err *err)
{
    tm_workspace *ws = &m->ws;
    const tm_arch *a = &m->arch;
    const tm_shard *s = &m->shard;
    size_t t = (size_t)m->opts.max_step_tokens;
    size_t d = (size_t)a->head_dim, h = (size_t)a->hidden;
    size_t f = (size_t)TM_MAX(s->ffn, s->shared);
    size_t act = tm_act_size(m);
    size_t r = head_rows(m);
    ws->rows_max = (int)r;
    const want wants[] = {
        {&ws->x, t, h, act},
        {&ws->x_other, m->backend->ops->norm_linear ? t : 0, h, act},
        {&ws->normed, t, h, act},
        {&ws->qkv, t, (size_t)(s->heads + 2 * s->kv_heads) * d, act},
        {&ws->attn, t, (size_t)s->heads * d, act},
        {&ws->delta, t, h, act},
        {&ws->gate_up, t, a->gated ? 2 * f : f, act},
        {&ws->act, t, f, act},
        {&ws->rows, r, h, act},
        {(void **)&ws->logits, r, (size_t)s->vocab,
         m->host_memory && s->tp == 1 ? 0 : sizeof(float)},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(wants); i++) {
        size_t n = wants[i].rows * wants[i].cols * wants[i].size;
        if (n > 0)
            TM_TRY(tm_model_take(m, n, wants[i].out, err));
    }
    if (m->host_memory && s->rank == 0 && s->vocab * s->tp != a->vocab) {
        ws->gathered = malloc(r * (size_t)s->vocab * (size_t)s->tp * sizeof(float));
        if (!ws->gathered)
            return TM_FAIL(err, TM_STATUS_NO_MEMORY, "logits of all ranks: out of memory");
    }
    return m->host_memory ? TM_OK : tm_device_step_open(m, err);
}

/* A device says how much it has; what a process may take of the host's memory is an estimate, and not worth a refusal. */
static tm_status check_room(tm_model *m, tm_err *err)
{
    size_t left = 0, bytes = tm_load_bytes(m);
    if (m->host_memory)
        return TM_OK;
    TM_TRY(m->backend->dev->mem_free(m->dev, &left, err));
    if (bytes > left)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY,
                       "the weights of rank %d take %.2f GB, but %.2f GB of the device are free",
                       m->shard.rank, (double)bytes / 1e9, (double)left / 1e9);
    return TM_OK;
}

/* Seconds since *from, which becomes now. */
static double lap(int64_t *from)
{
    int64_t now = tm_clock_ns();
    double seconds = (double)(now - *from) * 1e-9;
    *from = now;
    return seconds;
}

/* Second half: memory and copies. */
static tm_status load_all(tm_model *m, const tm_checkpoint *ckpt, tm_err *err)
{
    tm_model_times *t = &m->info.times;
    int64_t from = tm_clock_ns();
    char rate[80];
    m->layers = calloc((size_t)m->arch.layers, sizeof(*m->layers));
    m->kv = calloc((size_t)m->arch.layers, sizeof(*m->kv));
    if (!m->layers || !m->kv)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "model: out of memory");
    TM_TRY(check_room(m, err));
    TM_TRY(ckpt ? tm_load_weights(m, ckpt, err) : tm_shape_load(m, err));
    t->weights = lap(&from);
    tm_load_rate_text(rate, sizeof(rate), m->info.weight_bytes, t->weights);
    if (m->shard.rank == 0)
        tm_log(TM_LOG_INFO, "weights", "%s", rate);
    TM_TRY(tm_load_prepare(m, err));
    t->prepare = lap(&from);
    TM_TRY(tm_extras_take(m, err));
    TM_TRY(take_workspace(m, err));
    m->info.work_bytes = m->taken - m->info.weight_bytes;
    t->work = lap(&from);
    return TM_OK;
}

tm_status tm_model_open(tm_model **out, const tm_model_opts *opts, tm_comm *comm, tm_err *err)
{
    tm_checkpoint *ckpt = NULL;
    int64_t from = tm_clock_ns();
    tm_model *m = calloc(1, sizeof(*m));
    tm_err local = TM_ERR_INIT;
    if (!err)
        err = &local;
    tm_status st = m ? TM_OK : TM_FAIL(err, TM_STATUS_NO_MEMORY, "model: out of memory");
    if (m) {
        m->opts = *opts;
        m->comm = comm;
        st = check_all(m, &ckpt, err);
    }
    st = tm_comm_agree(comm, st, err);
    if (st == TM_OK && joins(m))
        st = tm_comm_agree(comm, join_devices(m, err), err);
    if (m)
        m->info.times.check = lap(&from);
    if (st == TM_OK)
        st = tm_comm_agree(comm, load_all(m, ckpt, err), err);
    tm_checkpoint_close(ckpt);
    if (m)
        tm_folder_close(&m->folder);
    if (st != TM_OK) {
        tm_model_close(m);
        return st;
    }
    *out = m;
    return TM_OK;
}

void tm_model_close(tm_model *m)
{
    if (!m)
        return;
    if (m->dev) {
        tm_device_step_close(m);
        tm_load_release(m);
        for (size_t i = 0; i < m->block_count; i++)
            m->backend->dev->free(m->dev, m->blocks[i]);
        m->backend->dev->close(m->dev);
    }
    tm_extras_release(m);
    free(m->ws.gathered);
    free(m->blocks);
    free(m->kv);
    free(m->layers);
    free(m);
}

const tm_model_info *tm_model_info_get(const tm_model *m)
{
    return &m->info;
}

int32_t tm_model_rope_len(const tm_model *m, size_t prompt_len)
{
    int length = (int)TM_MIN(prompt_len, (size_t)m->arch.context_max);
    return (int32_t)tm_rope_class(&m->arch.rope, length);
}

tm_status tm_model_mem_free(tm_model *m, size_t *bytes, tm_err *err)
{
    return m->backend->dev->mem_free(m->dev, bytes, err);
}

tm_status tm_model_kv_alloc(tm_model *m, int n_blocks, tm_err *err)
{
    if (n_blocks < 1)
        return TM_FAIL(err, TM_STATUS_CONFIG, "KV cache of %d blocks: expected at least 1",
                       n_blocks);
    if (m->kv[0].k)
        return TM_FAIL(err, TM_STATUS_INTERNAL, "the KV cache was taken before");
    size_t bytes = m->info.kv_block_bytes / (kv_arrays(m) * (size_t)m->arch.layers), all;
    if (!tm_size_mul(bytes, (size_t)n_blocks, &all))
        return TM_FAIL(err, TM_STATUS_CONFIG, "KV cache of %d blocks is too large", n_blocks);
    for (int i = 0; i < m->arch.layers; i++) {
        tm_kv_layer kv = {.dtype = m->dtype,
                          .n_blocks = n_blocks,
                          .block_tokens = m->opts.block_tokens,
                          .n_kv_heads = m->shard.kv_heads,
                          .head_dim = m->arch.head_dim};
        TM_TRY(tm_model_take(m, all, &kv.k, err));
        kv.v = kv.k;
        if (kv_arrays(m) == 2)
            TM_TRY(tm_model_take(m, all, &kv.v, err));
        m->kv[i] = kv;
    }
    return TM_OK;
}
