/* A role's rows are put together in the engine's own order (all of q, of k, of v; gate; up) by the rules that loading
 * uses, so every family that fits comes out right; then each part is written turned, its rows chosen by a list. */
#include "engine/model/workspace_write.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/file.h"
#include "engine/model/workspace_writer.h"

/* ---- attention ---- */

/* Row i of a head as the engine has it, for place i of the stored one. */
static int row_at(const tm_ws_writer *w, int place)
{
    int half = w->a->head_dim / 2;
    if (w->a->rope.interleaved)
        return place;
    return place % 2 == 0 ? place / 2 : half + place / 2;
}

/* Rows of q, k and v that part `rank` holds, side by side. */
static size_t qkv_rows(const tm_ws_writer *w, int rank, int *src)
{
    const tm_arch *a = w->a;
    int d = a->head_dim, repeat = w->z.kv_heads / a->kv_heads;
    int heads = a->heads / w->o->tp, kv = w->z.kv_heads / w->o->tp;
    size_t n = 0;
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < d; i++)
            src[n++] = (rank * heads + h) * d + row_at(w, i);
    for (int part = 0; part < 2; part++)
        for (int h = 0; h < kv; h++) {
            int head = a->heads + part * a->kv_heads + (rank * kv + h) / repeat;
            for (int i = 0; i < d; i++)
                src[n++] = head * d + (part == 0 ? row_at(w, i) : i);
        }
    return n;
}

static tm_status write_qkv(tm_ws_writer *w, tm_role role, int layer, const char *ext)
{
    int rows, cols;
    uint16_t *x;
    tm_role_size(w->a, &w->whole, role, &rows, &cols);
    int *src =
        malloc((size_t)(w->a->heads + 2 * w->z.kv_heads) * (size_t)w->a->head_dim * sizeof(*src));
    if (!src)
        return TM_FAIL(w->err, TM_STATUS_NO_MEMORY, "out of memory");
    tm_status st = tm_ws_take(w, (size_t)rows, (size_t)cols, &x);
    if (st == TM_OK)
        st = tm_ws_read_rows(w, role, layer, 0, 0, rows, x);
    for (int r = 0; st == TM_OK && r < w->o->tp; r++) {
        tm_ws_out o;
        size_t n = qkv_rows(w, r, src);
        st = tm_ws_out_open(&o, w, "layers.%d.attention.w_qkv.%d.%s", layer, r, ext);
        if (st == TM_OK)
            st = tm_ws_out_close(&o, tm_ws_out_turned(&o, x, (size_t)cols, src, n));
    }
    free(src);
    free(x);
    return st;
}

/* A bias of the output for each part: a copy, or zeros where q, k and v alone have one. */
static tm_status write_o_bias(tm_ws_writer *w, int layer)
{
    size_t n = (size_t)w->a->hidden;
    uint16_t *x;
    TM_TRY(tm_ws_take(w, n, 1, &x));
    tm_status st = TM_OK;
    if (w->a->o_bias)
        st = tm_ws_read_rows(w, TM_ROLE_O_BIAS, layer, 0, 0, (int)n, x);
    for (int r = 0; st == TM_OK && r < w->o->tp; r++) {
        tm_ws_out o;
        st = tm_ws_out_open(&o, w, "layers.%d.attention.wo.%d.bias", layer, r);
        if (st == TM_OK)
            st = tm_ws_out_close(&o, tm_ws_out_put(&o, x, n));
    }
    free(x);
    return st;
}

/* A vector of one file; pairs: in the order of a rotated head. */
static tm_status write_vector(tm_ws_writer *w, tm_role role, int layer, bool pairs,
                              const char *name)
{
    int n, one;
    uint16_t *x, *y = NULL;
    tm_ws_out o;
    tm_role_size(w->a, &w->whole, role, &n, &one);
    tm_status st = tm_ws_take(w, 2 * (size_t)n, 1, &x);
    if (st != TM_OK)
        return st;
    y = x + n;
    st = tm_ws_read_rows(w, role, layer, 0, 0, n, x);
    for (int i = 0; i < n; i++)
        y[i] = x[pairs ? row_at(w, i) : i];
    if (st == TM_OK)
        st = tm_ws_out_open(&o, w, "%s", name);
    if (st == TM_OK)
        st = tm_ws_out_close(&o, tm_ws_out_put(&o, y, (size_t)n));
    free(x);
    return st;
}

/* A matrix whose input is split: rows hidden, columns `cols` padded to `padded`. */
static tm_status write_in_split(tm_ws_writer *w, tm_role role, int layer, int expert, int cols,
                                int padded, const char *prefix)
{
    size_t h = (size_t)w->a->hidden, per = (size_t)(padded / w->o->tp);
    uint16_t *x;
    TM_TRY(tm_ws_take(w, h, (size_t)cols, &x));
    int lo = expert * (int)h;
    tm_status st = tm_ws_read_rows(w, role, layer, expert, lo, lo + (int)h, x);
    for (int r = 0; st == TM_OK && r < w->o->tp; r++) {
        tm_ws_out o;
        st = tm_ws_out_open(&o, w, "%s.%d.weight", prefix, r);
        if (st == TM_OK)
            st = tm_ws_out_close(&o,
                                 tm_ws_out_columns(&o, x, h, (size_t)cols, (size_t)r * per, per));
    }
    free(x);
    return st;
}

static tm_status write_attention(tm_ws_writer *w, int layer)
{
    const tm_arch *a = w->a;
    char name[TM_WS_NAME_MAX];
    int q = a->heads * a->head_dim;
    TM_TRY(write_qkv(w, TM_ROLE_QKV, layer, "weight"));
    if (a->qkv_bias) {
        TM_TRY(write_qkv(w, TM_ROLE_QKV_BIAS, layer, "bias"));
        TM_TRY(write_o_bias(w, layer));
    }
    snprintf(name, sizeof(name), "layers.%d.attention.wo", layer);
    TM_TRY(write_in_split(w, TM_ROLE_O, layer, 0, q, q, name));
    if (!tm_family_has(a->family, TM_ROLE_Q_NORM))
        return TM_OK;
    snprintf(name, sizeof(name), "layers.%d.attention.q_norm", layer);
    TM_TRY(write_vector(w, TM_ROLE_Q_NORM, layer, true, name));
    snprintf(name, sizeof(name), "layers.%d.attention.k_norm", layer);
    return write_vector(w, TM_ROLE_K_NORM, layer, true, name);
}

/* ---- feed-forward ---- */

/* rows of x [rows, hidden] as parts of the outputs, padded with zeros to `padded`. */
static tm_status write_out_split(tm_ws_writer *w, const uint16_t *x, int rows, int padded,
                                 const char *prefix)
{
    int per = padded / w->o->tp;
    int *src = malloc((size_t)per * sizeof(*src));
    tm_status st = src ? TM_OK : TM_FAIL(w->err, TM_STATUS_NO_MEMORY, "out of memory");
    for (int r = 0; st == TM_OK && r < w->o->tp; r++) {
        tm_ws_out o;
        for (int i = 0; i < per; i++)
            src[i] = r * per + i < rows ? r * per + i : -1;
        st = tm_ws_out_open(&o, w, "%s.%d.weight", prefix, r);
        if (st == TM_OK)
            st = tm_ws_out_close(&o,
                                 tm_ws_out_turned(&o, x, (size_t)w->a->hidden, src, (size_t)per));
    }
    free(src);
    return st;
}

/* Gate, up and down of one width. */
static tm_status write_mlp(tm_ws_writer *w, tm_role gate_up, tm_role down, int layer, int expert,
                           int width, int padded, const char *prefix)
{
    char name[TM_WS_NAME_MAX];
    size_t h = (size_t)w->a->hidden;
    uint16_t *x;
    TM_TRY(tm_ws_take(w, 2 * (size_t)width, h, &x));
    int lo = expert * 2 * width;
    tm_status st = tm_ws_read_rows(w, gate_up, layer, expert, lo, lo + 2 * width, x);
    snprintf(name, sizeof(name), "%.200s.w1", prefix);
    if (st == TM_OK)
        st = write_out_split(w, x, width, padded, name);
    snprintf(name, sizeof(name), "%.200s.w3", prefix);
    if (st == TM_OK)
        st = write_out_split(w, x + (size_t)width * h, width, padded, name);
    free(x);
    snprintf(name, sizeof(name), "%.200s.w2", prefix);
    return st == TM_OK ? write_in_split(w, down, layer, expert, width, padded, name) : st;
}

/* A small matrix [rows, hidden] in one turned file. */
static tm_status write_gate(tm_ws_writer *w, tm_role role, int layer, int rows, const char *name)
{
    uint16_t *x;
    tm_ws_out o;
    int *src = malloc((size_t)rows * sizeof(*src));
    if (!src)
        return TM_FAIL(w->err, TM_STATUS_NO_MEMORY, "out of memory");
    for (int i = 0; i < rows; i++)
        src[i] = i;
    tm_status st = tm_ws_take(w, (size_t)rows, (size_t)w->a->hidden, &x);
    if (st == TM_OK)
        st = tm_ws_read_rows(w, role, layer, 0, 0, rows, x);
    if (st == TM_OK)
        st = tm_ws_out_open(&o, w, "layers.%d.moe_ffn.%s.weight", layer, name);
    if (st == TM_OK)
        st = tm_ws_out_close(&o, tm_ws_out_turned(&o, x, (size_t)w->a->hidden, src, (size_t)rows));
    free(src);
    free(x);
    return st;
}

static tm_status write_experts(tm_ws_writer *w, int layer)
{
    const tm_moe_arch *m = &w->a->moe;
    char name[TM_WS_NAME_MAX];
    TM_TRY(write_gate(w, TM_ROLE_ROUTER, layer, m->experts, "gate"));
    for (int e = 0; e < m->experts; e++) {
        snprintf(name, sizeof(name), "layers.%d.moe_ffn.experts.%d", layer, e);
        TM_TRY(write_mlp(w, TM_ROLE_EXPERTS_GATE_UP, TM_ROLE_EXPERTS_DOWN, layer, e, m->ffn,
                         w->z.expert_ffn, name));
    }
    if (m->shared == 0)
        return TM_OK;
    snprintf(name, sizeof(name), "layers.%d.feed_forward", layer);
    TM_TRY(write_mlp(w, TM_ROLE_SHARED_GATE_UP, TM_ROLE_SHARED_DOWN, layer, 0, m->shared,
                     w->z.shared, name));
    return m->shared_gate ? write_gate(w, TM_ROLE_SHARED_GATE, layer, 1, "shared_gate") : TM_OK;
}

static tm_status write_layer(tm_ws_writer *w, int layer)
{
    char name[TM_WS_NAME_MAX];
    snprintf(name, sizeof(name), "layers.%d.attention_norm.weight", layer);
    TM_TRY(write_vector(w, TM_ROLE_ATTN_NORM, layer, false, name));
    snprintf(name, sizeof(name), "layers.%d.ffn_norm.weight", layer);
    TM_TRY(write_vector(w, TM_ROLE_FFN_NORM, layer, false, name));
    TM_TRY(write_attention(w, layer));
    if (w->a->layer[layer].moe)
        return write_experts(w, layer);
    snprintf(name, sizeof(name), "layers.%d.feed_forward", layer);
    return write_mlp(w, TM_ROLE_GATE_UP, TM_ROLE_DOWN, layer, 0, w->a->ffn, w->z.ffn, name);
}

/* ---- embedding and head ---- */

/* All rows of the embedding or the head, padded with zeros. */
static tm_status read_vocabulary(const tm_ws_writer *w, tm_role role, uint16_t **out)
{
    uint16_t *x;
    TM_TRY(tm_ws_take(w, (size_t)w->z.vocab_padded, (size_t)w->a->hidden, &x));
    tm_status st = tm_ws_read_rows(w, role, 0, 0, 0, w->a->vocab, x);
    if (st == TM_OK)
        *out = x;
    else
        free(x);
    return st;
}

static tm_status write_rows_whole(tm_ws_writer *w, const uint16_t *x, const char *name)
{
    tm_ws_out o;
    TM_TRY(tm_ws_out_open(&o, w, "%s.weight", name));
    return tm_ws_out_close(&o,
                           tm_ws_out_put(&o, x, (size_t)w->z.vocab_padded * (size_t)w->a->hidden));
}

/* The embedding, split by the hidden size. */
static tm_status write_hidden_split(tm_ws_writer *w, const uint16_t *x)
{
    size_t h = (size_t)w->a->hidden, per = h / (size_t)w->o->tp;
    tm_status st = TM_OK;
    for (int r = 0; st == TM_OK && r < w->o->tp; r++) {
        tm_ws_out o;
        st = tm_ws_out_open(&o, w, "tok_embeddings.%d.weight", r);
        if (st != TM_OK)
            break;
        for (size_t i = 0; st == TM_OK && i < (size_t)w->z.vocab_padded; i++)
            st = tm_ws_out_put(&o, x + i * h + (size_t)r * per, per);
        st = tm_ws_out_close(&o, st);
    }
    return st;
}

static tm_status write_ends(tm_ws_writer *w)
{
    uint16_t *x = NULL;
    TM_TRY(write_vector(w, TM_ROLE_FINAL_NORM, 0, false, "norm.weight"));
    TM_TRY(read_vocabulary(w, TM_ROLE_EMBED, &x));
    tm_status st = w->o->yaml ? write_hidden_split(w, x) : write_rows_whole(w, x, "tok_embeddings");
    if (st == TM_OK && !w->a->tie) {
        free(x);
        x = NULL;
        st = read_vocabulary(w, TM_ROLE_HEAD, &x);
    }
    if (st == TM_OK)
        st = w->o->yaml ? write_out_split(w, x, w->z.vocab_padded, w->z.vocab_padded, "output")
                        : write_rows_whole(w, x, "output");
    free(x);
    return st;
}

/* ---- the whole ---- */

static int up_to(int n, int multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

/* Sizes as they are stored; what cannot be cut into tp parts is refused with its name. */
static tm_status settle_sizes(tm_ws_writer *w)
{
    const tm_arch *a = w->a;
    int tp = w->o->tp;
    bool pad = w->o->yaml;
    w->z = (tm_workspace_sizes){.kv_heads = a->kv_heads,
                                .ffn = pad ? up_to(a->ffn, tp) : a->ffn,
                                .expert_ffn = up_to(a->moe.ffn, tp),
                                .shared = up_to(a->moe.shared, tp),
                                .vocab_padded = up_to(a->vocab, tp)};
    if (a->kv_heads < tp && tp % a->kv_heads == 0)
        w->z.kv_heads = tp;
    const struct {
        const char *key;
        int size;
    } cuts[] = {{"num_attention_heads", a->heads},
                {"num_key_value_heads", w->z.kv_heads},
                {"intermediate_size", w->z.ffn},
                {"hidden_size", pad ? a->hidden : 0}};
    for (size_t i = 0; i < TM_ARRAY_LEN(cuts); i++)
        if (cuts[i].size % tp != 0)
            return TM_FAIL(w->err, TM_STATUS_CONFIG, "%s %d is not divisible by tp %d", cuts[i].key,
                           cuts[i].size, tp);
    return TM_OK;
}

/* The number format of the first layer's q decides for all. */
static void settle_dtype(tm_ws_writer *w)
{
    tm_dtype dtype = TM_DTYPE_F16;
    for (int i = 0; i < w->a->family->row_count; i++) {
        const tm_tensor_row *row = &w->a->family->rows[i];
        char name[TM_TENSOR_NAME_MAX];
        tm_load_tensor_name(name, w->a, row, 0, 0);
        if (row->role == TM_ROLE_QKV && tm_need_met(w->a, row->need, 0)) {
            tm_checkpoint_is_float(tm_checkpoint_find(w->c, name), &dtype);
            break;
        }
    }
    w->report->rounded = dtype == TM_DTYPE_F32;
    w->dtype = dtype == TM_DTYPE_BF16 ? TM_DTYPE_BF16 : TM_DTYPE_F16;
    w->report->weight_type = w->dtype == TM_DTYPE_BF16 ? "bf16" : "fp16";
}

static tm_status write_config(tm_ws_writer *w)
{
    tm_buf b;
    char path[4096];
    const char *name = w->o->yaml ? "config.yaml" : "config.ini";
    tm_buf_init(&b, 0);
    tm_workspace_config_text(&b, w->a, &w->z, w->o, w->report->weight_type);
    FILE *f = tm_path_join(path, sizeof(path), w->dir, name) ? fopen(path, "wbx") : NULL;
    bool ok = f && !b.failed && fwrite(b.data, 1, b.len, f) == b.len;
    ok = (!f || fclose(f) == 0) && ok;
    tm_buf_deinit(&b);
    return ok ? TM_OK : TM_FAIL(w->err, TM_STATUS_IO, "%s/%s: %m", w->dir, name);
}

static tm_status write_all(tm_ws_writer *w)
{
    settle_dtype(w);
    TM_TRY(settle_sizes(w));
    TM_TRY(write_config(w));
    TM_TRY(write_ends(w));
    for (int i = 0; i < w->a->layers; i++)
        TM_TRY(write_layer(w, i));
    return TM_OK;
}

tm_status tm_workspace_write(const char *model, const char *weights, const tm_workspace_opts *opts,
                             tm_workspace_report *report, tm_err *err)
{
    tm_folder folder = {.config = NULL};
    tm_checkpoint *c = NULL;
    int64_t parameters;
    tm_workspace_report r = {.files = 0};
    tm_arch *a = calloc(1, sizeof(*a));
    tm_ws_writer w = {.dir = weights, .o = opts, .a = a, .report = &r, .err = err};
    w.block = malloc(TM_WS_BLOCK_BYTES + TM_WS_ROW_MAX * sizeof(uint16_t));
    tm_status st = a && w.block ? tm_folder_open(&folder, model, a, err)
                                : TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    if (st == TM_OK)
        st = tm_workspace_can_hold(a, opts->yaml, err);
    if (st == TM_OK)
        st = tm_folder_checkpoint(&folder, a, &c, err);
    if (st == TM_OK)
        st = tm_load_check(a, c, &parameters, err);
    if (st == TM_OK)
        st = tm_shard_make(&w.whole, a, 1, 0, err);
    w.c = c;
    if (st == TM_OK)
        st = write_all(&w);
    if (st == TM_OK) {
        snprintf(r.arch, sizeof(r.arch), "%s", a->arch);
        snprintf(r.family, sizeof(r.family), "%s", a->family->name);
        r.scaled_rope = a->rope.type != TM_ROPE_DEFAULT && a->rope.type != TM_ROPE_DYNAMIC;
        *report = r;
    }
    tm_checkpoint_close(c);
    tm_folder_close(&folder);
    free(w.block);
    free(a);
    return st;
}
