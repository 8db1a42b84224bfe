/* The second pass of loading: this rank's share of each tensor is cut into jobs of a few rows, which loader.c reads and
 * copies, so that loading needs no second copy of a weight.
 *
 * Each weight has an allocation of its own. One large one would save some hundred calls, but they overlap with reading,
 * and what is beyond a weight's end stays memory that nobody may touch. */
#include <sched.h>
#include <stddef.h>

#include "common/check.h"
#include "engine/model/loader.h"
#include "engine/model/model_impl.h"

#define READERS_MIN 4 /* a disk wants several reads at a time, even where there are few cores */
#define READERS_MAX 8

/* Where a role's numbers go: a tm_weight (for a bias, the weight that has it) or a vector, in tm_layer, or in
 * tm_model for roles that are not of a layer. */
#define IN_LAYER(f) offsetof(tm_layer, f)
#define IN_MODEL(f) offsetof(tm_model, f)
static const size_t places[TM_ROLE_COUNT] = {
    [TM_ROLE_EMBED] = IN_MODEL(embed),
    [TM_ROLE_FINAL_NORM] = IN_MODEL(final_norm),
    [TM_ROLE_FINAL_NORM_BIAS] = IN_MODEL(final_norm_b),
    [TM_ROLE_HEAD] = IN_MODEL(head),
    [TM_ROLE_ATTN_NORM] = IN_LAYER(attn_norm),
    [TM_ROLE_ATTN_NORM_BIAS] = IN_LAYER(attn_norm_b),
    [TM_ROLE_POST_ATTN_NORM] = IN_LAYER(post_attn_norm),
    [TM_ROLE_QKV] = IN_LAYER(qkv),
    [TM_ROLE_QKV_BIAS] = IN_LAYER(qkv),
    [TM_ROLE_Q_NORM] = IN_LAYER(q_norm),
    [TM_ROLE_K_NORM] = IN_LAYER(k_norm),
    [TM_ROLE_Q_A] = IN_LAYER(q_a),
    [TM_ROLE_Q_A_NORM] = IN_LAYER(q_a_norm),
    [TM_ROLE_Q_B] = IN_LAYER(q_b),
    [TM_ROLE_KV_A] = IN_LAYER(kv_a),
    [TM_ROLE_KV_A_NORM] = IN_LAYER(kv_a_norm),
    [TM_ROLE_KV_B_K] = IN_LAYER(kv_b_k),
    [TM_ROLE_KV_B_V] = IN_LAYER(kv_b_v),
    [TM_ROLE_O] = IN_LAYER(o),
    [TM_ROLE_O_BIAS] = IN_LAYER(o),
    [TM_ROLE_FFN_NORM] = IN_LAYER(ffn_norm),
    [TM_ROLE_FFN_NORM_BIAS] = IN_LAYER(ffn_norm_b),
    [TM_ROLE_POST_FFN_NORM] = IN_LAYER(post_ffn_norm),
    [TM_ROLE_GATE_UP] = IN_LAYER(gate_up),
    [TM_ROLE_GATE_UP_BIAS] = IN_LAYER(gate_up),
    [TM_ROLE_DOWN] = IN_LAYER(down),
    [TM_ROLE_DOWN_BIAS] = IN_LAYER(down),
    [TM_ROLE_ROUTER] = IN_LAYER(router),
    [TM_ROLE_CHOICE_BIAS] = IN_LAYER(choice_bias),
    [TM_ROLE_EXPERTS_GATE_UP] = IN_LAYER(experts_gate_up),
    [TM_ROLE_EXPERTS_DOWN] = IN_LAYER(experts_down),
    [TM_ROLE_SHARED_GATE_UP] = IN_LAYER(shared_gate_up),
    [TM_ROLE_SHARED_DOWN] = IN_LAYER(shared_down),
    [TM_ROLE_SHARED_GATE] = IN_LAYER(shared_gate),
};

static void *place_of(tm_model *m, tm_role role, int layer)
{
    bool in_layer = tm_role_info_get(role)->of_layer;
    return (in_layer ? (char *)&m->layers[layer] : (char *)m) + places[role];
}

/* The first tensor of a role takes its memory (q before k and v). */
tm_status tm_load_role_memory(tm_model *m, tm_role role, int layer, char **base, tm_err *err)
{
    const tm_role_info *info = tm_role_info_get(role);
    tm_weight *weight = place_of(m, role, layer);
    const float **vector = place_of(m, role, layer);
    const void *have = info->kind == TM_ROLE_VECTOR ? (const void *)*vector
                       : info->kind == TM_ROLE_BIAS ? (const void *)weight->bias
                                                    : weight->data;
    void *p = (void *)(uintptr_t)have;
    if (!p) {
        int rows, cols;
        tm_role_size(&m->arch, &m->shard, role, &rows, &cols);
        tm_dtype dtype = info->kind == TM_ROLE_MATRIX ? m->dtype : TM_DTYPE_F32;
        size_t bytes = (size_t)rows * (size_t)cols * tm_dtype_size(dtype);
        tm_status st = tm_model_take(m, bytes, &p, err);
        if (st != TM_OK) {
            tm_err_prefix(err, "%s of layer %d", info->name, layer);
            return st;
        }
        m->info.weight_bytes += bytes;
        if (info->kind == TM_ROLE_VECTOR)
            *vector = p;
        else if (info->kind == TM_ROLE_BIAS)
            weight->bias = p;
        else
            *weight = (tm_weight){.dtype = dtype, .n = rows, .k = cols, .data = p};
    }
    *base = p;
    return TM_OK;
}

/* What cutting one tensor into jobs needs. */
typedef struct cutting {
    tm_model *m;
    const tm_checkpoint *c;
    tm_loader *loader;
    tm_role role;
    char *base;      /* of the role's memory */
    tm_load_job job; /* what all of the tensor's jobs have in common */
    size_t col0, cols;
    tm_err *err;
} cutting;

static tm_status add_job(const cutting *k, tm_slice s, size_t dst_row, size_t row_numbers)
{
    size_t size = tm_dtype_size(k->job.dtype);
    tm_load_job j = k->job;
    j.slice = s;
    j.dst = k->base + dst_row * row_numbers * size;
    j.bytes = s.rows * s.cols * size;
    const tm_scaling by = tm_scale_of(k->m, k->role, (int)dst_row);
    j.adjusted = by.factor != 1.0f;
    j.factor = by.factor;
    j.addend = by.addend;
    return tm_loader_add(k->loader, &j, k->err);
}

/* A block of n rows becomes n columns: a few of its columns at a time, each a whole row of the weight. */
static tm_status cut_turned(cutting *k, tm_row_run run)
{
    size_t n = (size_t)run.n, size = tm_dtype_size(k->job.dtype);
    size_t per = TM_MAX(TM_LOAD_CHUNK_BYTES / (n * size), (size_t)1);
    k->job.turned = true;
    for (size_t i = 0; i < k->cols; i += per) {
        tm_slice s = {(size_t)run.src, n, k->col0 + i, TM_MIN(per, k->cols - i)};
        TM_TRY(add_job(k, s, (size_t)run.dst + i, n));
    }
    return TM_OK;
}

static tm_status cut_run(void *arg, tm_row_run run)
{
    cutting *k = arg;
    size_t size = tm_dtype_size(k->job.unit_rows ? TM_DTYPE_F32 : k->job.dtype);
    size_t per = TM_MAX(TM_LOAD_CHUNK_BYTES / (k->cols * size), (size_t)1);
    if (run.turned)
        return cut_turned(k, run);
    k->job.turned = false;
    for (size_t i = 0; i < (size_t)run.n; i += per) {
        tm_slice s = {(size_t)run.src + i, TM_MIN(per, (size_t)run.n - i), k->col0, k->cols};
        TM_TRY(add_job(k, s, (size_t)run.dst + i, k->cols));
    }
    return TM_OK;
}

/* Rows that pad the vocabulary of the last ranks. */
static tm_status zero_padding(const cutting *k)
{
    const tm_model *m = k->m;
    size_t row = k->cols * tm_dtype_size(k->job.dtype);
    int real = TM_MAX(TM_MIN(m->shard.vocab, m->arch.vocab - m->shard.vocab0), 0);
    size_t left = (size_t)(m->shard.vocab - real) * row;
    tm_load_job j = {.dst = k->base + (size_t)real * row};
    for (; left > 0; left -= j.bytes) {
        j.bytes = TM_MIN(left, TM_LOAD_CHUNK_BYTES);
        TM_TRY(tm_loader_add(k->loader, &j, k->err));
        j.dst += j.bytes;
    }
    return TM_OK;
}

static tm_status load_tensor(cutting *k, const tm_tensor_row *row, int layer, int expert)
{
    char name[TM_TENSOR_NAME_MAX];
    int rows, cols_all, col0, cols;
    tm_model *m = k->m;
    tm_load_tensor_name(name, &m->arch, row, layer, expert);
    tm_tensor_size(&m->arch, row, &rows, &cols_all);
    tm_tensor_cols(&m->arch, &m->shard, row, &col0, &cols);
    k->job = (tm_load_job){
        .tensor = tm_checkpoint_find(k->c, name),
        .cols_all = (size_t)cols_all,
        .unit_rows = row->role == TM_ROLE_HEAD && m->arch.head_norm,
        .dtype = tm_role_info_get(row->role)->kind == TM_ROLE_MATRIX ? m->dtype : TM_DTYPE_F32,
    };
    k->role = row->role;
    k->col0 = (size_t)col0;
    k->cols = (size_t)cols;
    TM_ASSERT(k->job.tensor); /* tm_load_check saw it */
    TM_TRY(tm_load_role_memory(m, row->role, layer, &k->base, k->err));
    TM_TRY(tm_tensor_runs(&m->arch, &m->shard, row, expert, cut_run, k));
    if (row->role == TM_ROLE_EMBED || row->role == TM_ROLE_HEAD)
        return zero_padding(k);
    return TM_OK;
}

static tm_status load_row(cutting *k, const tm_tensor_row *row)
{
    const tm_arch *a = &k->m->arch;
    if (tm_role_info_get(row->role)->summed && k->m->shard.rank > 0)
        return TM_OK;
    for (int layer = 0; layer < tm_load_layers(a, row); layer++) {
        if (!tm_need_met(a, row->need, layer))
            continue;
        for (int e = 0; e < tm_tensor_experts(a, row); e++)
            TM_TRY(load_tensor(k, row, layer, e));
    }
    return TM_OK;
}

/* Roles that linear works on as a whole. Experts and the halves of kv_b are used in parts. */
static bool is_prepared(tm_role role)
{
    tm_role_kind kind = tm_role_info_get(role)->kind;
    return (kind == TM_ROLE_MATRIX || kind == TM_ROLE_MATRIX_F32) && role != TM_ROLE_EMBED &&
           role != TM_ROLE_EXPERTS_GATE_UP && role != TM_ROLE_EXPERTS_DOWN &&
           role != TM_ROLE_KV_B_K && role != TM_ROLE_KV_B_V;
}

/* Bytes that a decode step of one sequence reads of a weight: of the experts the chosen ones alone. */
static size_t step_bytes(const tm_model *m, tm_role role, const tm_weight *w)
{
    size_t bytes = (size_t)w->n * (size_t)w->k * tm_dtype_size(w->dtype);
    if (role == TM_ROLE_EMBED)
        return 0;
    if (role == TM_ROLE_EXPERTS_GATE_UP || role == TM_ROLE_EXPERTS_DOWN)
        return bytes / (size_t)m->arch.moe.experts * (size_t)m->arch.moe.top_k;
    return bytes;
}

typedef tm_status (*weight_fn)(tm_model *m, tm_role role, tm_weight *w, tm_err *err);

/* Calls fn for each matrix that was loaded. */
static tm_status each_weight(tm_model *m, weight_fn fn, tm_err *err)
{
    for (int role = 0; role < TM_ROLE_COUNT; role++) {
        const tm_role_info *info = tm_role_info_get((tm_role)role);
        if (info->kind == TM_ROLE_VECTOR || info->kind == TM_ROLE_BIAS)
            continue;
        for (int i = 0; i < (info->of_layer ? m->arch.layers : 1); i++) {
            tm_weight *w = place_of(m, (tm_role)role, i);
            if (w->data)
                TM_TRY(fn(m, (tm_role)role, w, err));
        }
    }
    return TM_OK;
}

static tm_status prepare(tm_model *m, tm_role role, tm_weight *w, tm_err *err)
{
    if (is_prepared(role))
        TM_TRY(m->backend->ops->linear_prepare(m->dev, w, err));
    m->info.step_read_bytes += step_bytes(m, role, w);
    return TM_OK;
}

static tm_status release(tm_model *m, tm_role role, tm_weight *w, tm_err *err)
{
    (void)err;
    if (is_prepared(role))
        m->backend->ops->linear_release(m->dev, w);
    return TM_OK;
}

tm_status tm_load_prepare(tm_model *m, tm_err *err)
{
    if (m->arch.tie)
        m->head = m->embed;
    return each_weight(m, prepare, err);
}

size_t tm_load_bytes(const tm_model *m)
{
    const tm_arch *a = &m->arch;
    const tm_family *f = a->family;
    size_t all = 0;
    for (int role = 0; role < TM_ROLE_COUNT; role++) {
        const tm_role_info *info = tm_role_info_get((tm_role)role);
        int rows, cols, layers = 0;
        if (info->summed && m->shard.rank > 0)
            continue;
        for (int layer = 0; layer < (info->of_layer ? a->layers : 1); layer++) {
            int i = 0;
            while (i < f->row_count &&
                   !((int)f->rows[i].role == role && tm_need_met(a, f->rows[i].need, layer)))
                i++;
            layers += i < f->row_count;
        }
        tm_role_size(a, &m->shard, (tm_role)role, &rows, &cols);
        tm_dtype dtype = info->kind == TM_ROLE_MATRIX ? m->dtype : TM_DTYPE_F32;
        all += (size_t)layers * (size_t)rows * (size_t)cols * tm_dtype_size(dtype);
    }
    return all;
}

/* One row of the widest tensor always fits, and one column of the tallest that is turned. No job of a small model is
 * larger than all weights, in f32. */
static size_t buffer_bytes(const tm_model *m)
{
    const tm_family *f = m->arch.family;
    size_t widest = TM_LOAD_CHUNK_BYTES / sizeof(float);
    for (int i = 0; i < f->row_count; i++) {
        int rows, cols;
        tm_tensor_size(&m->arch, &f->rows[i], &rows, &cols);
        widest = TM_MAX(widest, (size_t)cols);
    }
    widest = TM_MAX(widest, (size_t)TM_MAX(m->arch.moe.ffn, m->arch.mla.nope));
    return TM_MIN(widest * sizeof(float), 2 * tm_load_bytes(m));
}

static int reader_count(const tm_model *m)
{
    cpu_set_t mine;
    int n = m->opts.device.threads;
    if (n == 0 && sched_getaffinity(0, sizeof(mine), &mine) == 0)
        n = CPU_COUNT(&mine) / m->shard.tp;
    return TM_MAX(TM_MIN(n, READERS_MAX), READERS_MIN);
}

tm_status tm_load_weights(tm_model *m, const tm_checkpoint *c, tm_err *err)
{
    const tm_family *f = m->arch.family;
    tm_err earlier = TM_ERR_INIT;
    const tm_loader_opts o = {.backend = m->backend,
                              .dev = m->dev,
                              .host_memory = m->host_memory,
                              .checkpoint = c,
                              .buffer_bytes = buffer_bytes(m),
                              .readers = reader_count(m),
                              .total = tm_load_bytes(m),
                              .progress = m->shard.rank == 0};
    cutting k = {.m = m, .c = c, .err = err};
    TM_TRY(tm_loader_create(&k.loader, &o, err));
    tm_status st = TM_OK;
    for (int i = 0; st == TM_OK && i < f->row_count; i++)
        st = load_row(&k, &f->rows[i]);
    /* When cutting failed, a job that was added before may have failed, too. */
    tm_status ended = tm_loader_finish(k.loader, &earlier);
    if (ended != TM_OK) {
        st = ended;
        if (err)
            *err = earlier;
    }
    tm_loader_destroy(k.loader);
    TM_ASSERT(st != TM_OK || m->info.weight_bytes == o.total);
    return st;
}

void tm_load_release(tm_model *m)
{
    if (m->layers) /* else refused before anything was loaded */
        each_weight(m, release, NULL);
}
