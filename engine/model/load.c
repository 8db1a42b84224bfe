/* Loading: first everything is checked, then this rank's share is copied.
 *
 * Both passes walk the family's tensor rows. Copies go through a small staging buffer in the device's number
 * format, a few rows at a time, so that loading needs no second copy of a weight. Tensors that no row
 * names are reported once, apart from leftovers that every engine ignores. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/log.h"
#include "engine/model/model_impl.h"

#define STAGING_BYTES ((size_t)4 << 20)
#define NAME_MAX_LEN  256

static void tensor_name(char *out, const tm_tensor_row *row, int layer)
{
    /* The pattern's only conversion is the layer's %d; it is written out by hand to keep the format checked. */
    const char *at = strstr(row->pattern, "%d");
    if (at)
        snprintf(out, NAME_MAX_LEN, "%.*s%d%s", (int)(at - row->pattern), row->pattern, layer,
                 at + 2);
    else
        snprintf(out, NAME_MAX_LEN, "%s", row->pattern);
}

static int layers_of(const tm_arch *a, const tm_tensor_row *row)
{
    return tm_role_info_get(row->role)->of_layer ? a->layers : 1;
}

static const tm_tensor_row *row_of(const tm_arch *a, tm_role role)
{
    for (int i = 0; i < a->family->row_count; i++)
        if (a->family->rows[i].role == role)
            return &a->family->rows[i];
    return NULL;
}

/* The embedding's rows decide the vocabulary; a head that is not stored is the embedding. */
static tm_status settle_ends(tm_arch *a, const tm_checkpoint *c, tm_err *err)
{
    const tm_tensor_row *embed = row_of(a, TM_ROLE_EMBED), *head = row_of(a, TM_ROLE_HEAD);
    const tm_st_tensor *t = tm_checkpoint_find(c, embed->pattern);
    if (!head || !tm_checkpoint_find(c, head->pattern))
        a->tie = true;
    if (!t)
        return TM_FAIL(err, TM_STATUS_DATA, "tensor %s is missing", embed->pattern);
    if (t->ndim == 2 && t->dims[0] > a->vocab && t->dims[0] <= 1 << 24)
        a->vocab = (int)t->dims[0];
    return TM_OK;
}

static tm_status check_tensor(const tm_arch *a, const tm_checkpoint *c, const tm_tensor_row *row,
                              const char *name, int64_t *numbers, tm_err *err)
{
    const tm_st_tensor *t = tm_checkpoint_find(c, name);
    if (!t)
        return TM_FAIL(err, TM_STATUS_DATA, "tensor %s is missing", name);
    const char *file = tm_checkpoint_file(c, t);
    tm_dtype dtype;
    if (!tm_checkpoint_is_float(t, &dtype))
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED, "%s: tensor %s is %s, expected F32, BF16 or F16",
                       file, name, tm_st_dtype_name(t->dtype));
    int rows, cols;
    tm_tensor_size(a, row, &rows, &cols);
    bool matrix = tm_role_info_get(row->role)->kind == TM_ROLE_MATRIX;
    int64_t want[2] = {rows, cols};
    int ndim = matrix ? 2 : 1;
    if (t->ndim != ndim || t->dims[0] != want[0] || (matrix && t->dims[1] != want[1])) {
        char is[128], should[64];
        tm_st_shape_text(is, sizeof(is), t->dims, t->ndim);
        tm_st_shape_text(should, sizeof(should), want, ndim);
        return TM_FAIL(err, TM_STATUS_DATA, "%s: tensor %s is %s, expected %s", file, name, is,
                       should);
    }
    *numbers += (int64_t)rows * cols;
    return TM_OK;
}

static bool ignored(const char *name)
{
    static const char *const ends[] = {".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq",
                                       ".attention.masked_bias"};
    size_t n = strlen(name);
    for (size_t i = 0; i < TM_ARRAY_LEN(ends); i++) {
        size_t m = strlen(ends[i]);
        if (n >= m && strcmp(name + n - m, ends[i]) == 0)
            return true;
    }
    return false;
}

/* Does a needed row of some layer name this tensor? */
static bool wanted(const tm_arch *a, const char *tensor)
{
    char name[NAME_MAX_LEN];
    for (int i = 0; i < a->family->row_count; i++) {
        const tm_tensor_row *row = &a->family->rows[i];
        const char *at = strstr(row->pattern, "%d");
        long layer = 0;
        if (!tm_need_met(a, row->need))
            continue;
        if (at) {
            size_t n = (size_t)(at - row->pattern);
            if (strncmp(tensor, row->pattern, n) != 0)
                continue;
            layer = strtol(tensor + n, NULL, 10);
            if (layer < 0 || layer >= a->layers)
                continue;
        }
        tensor_name(name, row, (int)layer);
        if (strcmp(name, tensor) == 0)
            return true;
    }
    return false;
}

static void report_unread(const tm_arch *a, const tm_checkpoint *c)
{
    size_t count = 0;
    const char *first = NULL;
    for (size_t i = 0; i < tm_checkpoint_count(c); i++) {
        const tm_st_tensor *t = tm_checkpoint_at(c, i);
        if (ignored(t->name) || wanted(a, t->name))
            continue;
        first = first ? first : t->name;
        count++;
    }
    if (count > 0)
        tm_log(TM_LOG_WARN, "model", "%zu tensors of the checkpoint are not used, such as %s",
               count, first);
}

tm_status tm_load_check(tm_arch *a, const tm_checkpoint *c, int64_t *parameters, tm_err *err)
{
    int64_t numbers = 0;
    char name[NAME_MAX_LEN];
    TM_TRY(settle_ends(a, c, err));
    for (int i = 0; i < a->family->row_count; i++) {
        const tm_tensor_row *row = &a->family->rows[i];
        if (!tm_need_met(a, row->need))
            continue;
        for (int layer = 0; layer < layers_of(a, row); layer++) {
            tensor_name(name, row, layer);
            TM_TRY(check_tensor(a, c, row, name, &numbers, err));
        }
    }
    report_unread(a, c);
    *parameters = numbers;
    return TM_OK;
}

/* Where a role's numbers go. */
typedef struct target {
    tm_weight *weight;    /* MATRIX and BIAS */
    const float **vector; /* VECTOR */
} target;

static target target_of(tm_model *m, tm_role role, int layer)
{
    tm_layer *l = &m->layers[layer];
    switch (role) {
    case TM_ROLE_EMBED:
        return (target){&m->embed, NULL};
    case TM_ROLE_HEAD:
        return (target){&m->head, NULL};
    case TM_ROLE_FINAL_NORM:
        return (target){NULL, &m->final_norm};
    case TM_ROLE_FINAL_NORM_BIAS:
        return (target){NULL, &m->final_norm_b};
    case TM_ROLE_ATTN_NORM:
        return (target){NULL, &l->attn_norm};
    case TM_ROLE_ATTN_NORM_BIAS:
        return (target){NULL, &l->attn_norm_b};
    case TM_ROLE_FFN_NORM:
        return (target){NULL, &l->ffn_norm};
    case TM_ROLE_FFN_NORM_BIAS:
        return (target){NULL, &l->ffn_norm_b};
    case TM_ROLE_QKV:
    case TM_ROLE_QKV_BIAS:
        return (target){&l->qkv, NULL};
    case TM_ROLE_O:
    case TM_ROLE_O_BIAS:
        return (target){&l->o, NULL};
    case TM_ROLE_GATE_UP:
    case TM_ROLE_GATE_UP_BIAS:
        return (target){&l->gate_up, NULL};
    case TM_ROLE_DOWN:
    case TM_ROLE_DOWN_BIAS:
        return (target){&l->down, NULL};
    case TM_ROLE_COUNT:
        break;
    }
    TM_ASSERT(!"unknown role");
    return (target){NULL, NULL};
}

/* The first tensor of a role takes its memory (q before k and v). */
tm_status tm_load_role_memory(tm_model *m, tm_role role, int layer, char **base, tm_err *err)
{
    const tm_role_info *info = tm_role_info_get(role);
    target t = target_of(m, role, layer);
    const void *have = info->kind == TM_ROLE_VECTOR ? (const void *)*t.vector
                       : info->kind == TM_ROLE_BIAS ? (const void *)t.weight->bias
                                                    : t.weight->data;
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
            *t.vector = p;
        else if (info->kind == TM_ROLE_BIAS)
            t.weight->bias = p;
        else
            *t.weight = (tm_weight){.dtype = dtype, .n = rows, .k = cols, .data = p};
    }
    *base = p;
    return TM_OK;
}

/* What copying one tensor needs. */
typedef struct copy {
    tm_model *m;
    const tm_checkpoint *c;
    const tm_st_tensor *tensor;
    char *base, *staging;
    size_t cols_all, col0, cols;
    tm_dtype dtype;
    tm_err *err;
} copy;

static tm_status copy_run(void *arg, tm_row_run run)
{
    copy *k = arg;
    size_t row_bytes = k->cols * tm_dtype_size(k->dtype);
    size_t per = TM_MAX(STAGING_BYTES / row_bytes, (size_t)1);
    for (size_t i = 0; i < (size_t)run.n; i += per) {
        tm_slice s = {(size_t)run.src + i, TM_MIN(per, (size_t)run.n - i), k->col0, k->cols};
        char *dst = k->base + ((size_t)run.dst + i) * row_bytes;
        TM_TRY(tm_checkpoint_read(k->c, k->tensor, k->cols_all, s, k->staging, k->dtype, k->err));
        if (k->m->backend->dev->upload(k->m->dev, dst, k->staging, s.rows * row_bytes) != TM_OK)
            return TM_FAIL(k->err, TM_STATUS_IO, "tensor %s: the copy to the device failed",
                           k->tensor->name);
    }
    return TM_OK;
}

/* Rows that pad the vocabulary of the last ranks. */
static tm_status zero_padding(tm_model *m, char *base, size_t row_bytes, tm_err *err)
{
    int real = TM_MAX(TM_MIN(m->shard.vocab, m->arch.vocab - m->shard.vocab0), 0);
    char *zeros = calloc(1, row_bytes);
    if (!zeros)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "padding of the vocabulary: out of memory");
    tm_status st = TM_OK;
    for (int i = real; st == TM_OK && i < m->shard.vocab; i++)
        st = m->backend->dev->upload(m->dev, base + (size_t)i * row_bytes, zeros, row_bytes);
    free(zeros);
    return st == TM_OK ? TM_OK : TM_FAIL(err, st, "padding of the vocabulary: the copy failed");
}

static tm_status load_tensor(tm_model *m, const tm_checkpoint *c, const tm_tensor_row *row,
                             int layer, char *staging, tm_err *err)
{
    char name[NAME_MAX_LEN];
    int rows, cols_all, col0, cols;
    tensor_name(name, row, layer);
    tm_tensor_size(&m->arch, row, &rows, &cols_all);
    tm_tensor_cols(&m->arch, &m->shard, row, &col0, &cols);
    copy k = {.m = m,
              .c = c,
              .tensor = tm_checkpoint_find(c, name),
              .staging = staging,
              .cols_all = (size_t)cols_all,
              .col0 = (size_t)col0,
              .cols = (size_t)cols,
              .dtype =
                  tm_role_info_get(row->role)->kind == TM_ROLE_MATRIX ? m->dtype : TM_DTYPE_F32,
              .err = err};
    TM_ASSERT(k.tensor); /* tm_load_check saw it */
    TM_TRY(tm_load_role_memory(m, row->role, layer, &k.base, err));
    TM_TRY(tm_tensor_runs(&m->arch, &m->shard, row, copy_run, &k));
    if (row->role == TM_ROLE_EMBED || row->role == TM_ROLE_HEAD)
        return zero_padding(m, k.base, k.cols * tm_dtype_size(k.dtype), err);
    return TM_OK;
}

static tm_status prepare(tm_model *m, tm_weight *w, tm_err *err)
{
    TM_TRY(m->backend->ops->linear_prepare(m->dev, w, err));
    m->info.step_read_bytes += (size_t)w->n * (size_t)w->k * tm_dtype_size(w->dtype);
    return TM_OK;
}

tm_status tm_load_prepare(tm_model *m, tm_err *err)
{
    if (m->arch.tie)
        m->head = m->embed;
    TM_TRY(prepare(m, &m->head, err));
    for (int i = 0; i < m->arch.layers; i++) {
        TM_TRY(prepare(m, &m->layers[i].qkv, err));
        TM_TRY(prepare(m, &m->layers[i].o, err));
        TM_TRY(prepare(m, &m->layers[i].gate_up, err));
        TM_TRY(prepare(m, &m->layers[i].down, err));
    }
    return TM_OK;
}

tm_status tm_load_weights(tm_model *m, const tm_checkpoint *c, tm_err *err)
{
    const tm_family *f = m->arch.family;
    /* One row of the widest tensor always fits. */
    size_t widest = (size_t)TM_MAX(m->arch.hidden, m->arch.ffn) * sizeof(float);
    size_t q_bytes = (size_t)m->arch.heads * (size_t)m->arch.head_dim * sizeof(float);
    char *staging = malloc(TM_MAX(STAGING_BYTES, TM_MAX(widest, q_bytes)));
    if (!staging)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "loading: out of memory");
    tm_status st = TM_OK;
    for (int i = 0; st == TM_OK && i < f->row_count; i++) {
        const tm_tensor_row *row = &f->rows[i];
        const tm_role_info *info = tm_role_info_get(row->role);
        if (!tm_need_met(&m->arch, row->need) || (info->summed && m->shard.rank > 0))
            continue;
        for (int layer = 0; st == TM_OK && layer < layers_of(&m->arch, row); layer++)
            st = load_tensor(m, c, row, layer, staging, err);
    }
    free(staging);
    return st == TM_OK ? tm_load_prepare(m, err) : st;
}

void tm_load_release(tm_model *m)
{
    const tm_op_table *ops = m->backend->ops;
    if (!m->layers) /* refused before anything was loaded */
        return;
    ops->linear_release(m->dev, &m->head);
    for (int i = 0; i < m->arch.layers; i++) {
        ops->linear_release(m->dev, &m->layers[i].qkv);
        ops->linear_release(m->dev, &m->layers[i].o);
        ops->linear_release(m->dev, &m->layers[i].gate_up);
        ops->linear_release(m->dev, &m->layers[i].down);
    }
}
