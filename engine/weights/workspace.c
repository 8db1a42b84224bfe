/* The list of views: which files make up which tensor.
 *
 * The number of parts is what is there, checked against what the config says of attention. Everything is checked by
 * file names and sizes before the first number is read: the files have no headers, so a wrong size is the only sign
 * of a wrong file. */
#include "engine/weights/workspace.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/log.h"
#include "engine/weights/workspace_impl.h"

#define NAME_MAX_LEN 256

/* What building the list needs. */
typedef struct build {
    tm_ws_source *s;
    const tm_ws_config *c;
    const tm_ws_model *m;
    int attn_parts, ffn_parts;
    size_t missing;
    char first_missing[NAME_MAX_LEN];
    tm_err *err;
} build;

/* A group of files, the parts of one stored matrix. */
typedef struct group {
    int file[TM_WS_PARTS_MAX];
    int parts;
    tm_dtype dtype;
    bool whole; /* all parts are there */
} group;

static void __attribute__((format(printf, 2, 3))) text_of(char *out, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(out, NAME_MAX_LEN, fmt, ap);
    va_end(ap);
}

/* "prefix.0.ext"; part -1: "prefix.ext". */
static void part_name(char *out, const char *prefix, int part, const char *ext)
{
    char number[16] = "";
    if (part >= 0)
        snprintf(number, sizeof(number), ".%d", part);
    text_of(out, "%.200s%s%s", prefix, number, ext);
}

static int find_part(const build *b, const char *prefix, int part, const char *ext)
{
    char name[NAME_MAX_LEN];
    part_name(name, prefix, part, ext);
    return tm_ws_file_find(b->s, name);
}

static int count_parts(const build *b, const char *prefix, const char *ext)
{
    int n = 0;
    while (n < TM_WS_PARTS_MAX && find_part(b, prefix, n, ext) >= 0)
        n++;
    return n;
}

/* Sizes of float32 workspaces tell the format: converters write them as float16. */
static tm_status check_size(const build *b, int file, size_t rows, size_t cols, tm_dtype *dtype)
{
    tm_ws_file *f = &b->s->files[file];
    size_t numbers = rows * cols;
    *dtype = b->c->dtype;
    if (*dtype == TM_DTYPE_F32 && f->size == numbers * tm_dtype_size(TM_DTYPE_F16))
        *dtype = TM_DTYPE_F16;
    if (f->size != numbers * tm_dtype_size(*dtype))
        return TM_FAIL(b->err, TM_STATUS_DATA, "%s has %zu bytes, expected %zu: %zu x %zu of %s",
                       f->name, f->size, numbers * tm_dtype_size(*dtype), rows, cols,
                       tm_dtype_name(*dtype));
    f->used = true;
    return TM_OK;
}

static void note_missing(build *b, const char *prefix, int part, const char *ext)
{
    if (b->missing++ == 0)
        part_name(b->first_missing, prefix, part, ext);
}

/* Finds `parts` files (0: one without a number) of rows x cols numbers each. */
static tm_status find_group(build *b, group *g, const char *prefix, const char *ext, int parts,
                            size_t rows, size_t cols)
{
    *g = (group){.parts = TM_MAX(parts, 1), .whole = true};
    for (int i = 0; i < g->parts; i++) {
        int number = parts == 0 ? -1 : i;
        tm_dtype dtype = TM_DTYPE_F16;
        g->file[i] = find_part(b, prefix, number, ext);
        if (g->file[i] < 0) {
            note_missing(b, prefix, number, ext);
            g->whole = false;
            continue;
        }
        TM_TRY(check_size(b, g->file[i], rows, cols, &dtype));
        if (i > 0 && dtype != g->dtype)
            return TM_FAIL(b->err, TM_STATUS_DATA, "%s: its parts have different number formats",
                           prefix);
        g->dtype = dtype;
    }
    return TM_OK;
}

/* Adds a tensor; a group that is not whole was noted and has none. */
static tm_status add(build *b, const group *g, const char *name, tm_ws_view v, bool vector)
{
    tm_ws_source *s = b->s;
    if (!g->whole)
        return TM_OK;
    if (s->view_count == s->view_cap) {
        size_t cap = s->view_cap ? 2 * s->view_cap : 256;
        tm_ws_view *views = realloc(s->views, cap * sizeof(*views));
        s->views = views ? views : s->views;
        tm_st_tensor *tensors = realloc(s->tensors, cap * sizeof(*tensors));
        s->tensors = tensors ? tensors : s->tensors;
        if (!views || !tensors)
            return TM_FAIL(b->err, TM_STATUS_NO_MEMORY, "workspace: out of memory");
        s->view_cap = cap;
    }
    static const tm_st_dtype of[] = {
        [TM_DTYPE_F32] = TM_ST_F32, [TM_DTYPE_BF16] = TM_ST_BF16, [TM_DTYPE_F16] = TM_ST_F16};
    memcpy(v.file, g->file, sizeof(v.file));
    v.parts = g->parts;
    v.dtype = g->dtype;
    tm_st_tensor *t = &s->tensors[s->view_count];
    *t = (tm_st_tensor){.name = strdup(name),
                        .dtype = of[g->dtype],
                        .ndim = vector ? 1 : 2,
                        .dims = {(int64_t)v.rows, (int64_t)v.cols},
                        .bytes = v.rows * v.cols * tm_dtype_size(g->dtype),
                        .shard = (int)s->view_count};
    if (!t->name)
        return TM_FAIL(b->err, TM_STATUS_NO_MEMORY, "workspace: out of memory");
    s->views[s->view_count++] = v;
    return TM_OK;
}

/* A matrix [in, out] whose columns are split between `parts`: the tensor's rows. `keep` of them are taken. */
static tm_status add_out_split(build *b, const char *file, const char *name, int parts, size_t in,
                               size_t out, size_t keep)
{
    group g;
    size_t per = out / (size_t)TM_MAX(parts, 1);
    TM_TRY(find_group(b, &g, file, ".weight", parts, in, per));
    tm_ws_view v = {.by_row = true, .rows = keep, .cols = in, .per = per, .rs = 1, .cs = per};
    return add(b, &g, name, v, false);
}

/* A matrix [in, out] whose rows are split: the tensor's columns. */
static tm_status add_in_split(build *b, const char *file, const char *name, int parts, size_t in,
                              size_t out, size_t keep)
{
    group g;
    size_t per = in / (size_t)TM_MAX(parts, 1);
    TM_TRY(find_group(b, &g, file, ".weight", parts, per, out));
    tm_ws_view v = {.rows = out, .cols = keep, .per = per, .rs = 1, .cs = out};
    return add(b, &g, name, v, false);
}

/* One file of n numbers, or of copies of them the first. */
static tm_status add_vector(build *b, const char *file, const char *ext, const char *name,
                            int parts, size_t n, bool pairs)
{
    group g;
    TM_TRY(find_group(b, &g, file, ext, parts, 1, n));
    tm_ws_view v = {.by_row = true, .rows = n, .cols = 1, .per = n, .rs = 1, .head_step = 1};
    v.head_dim = pairs ? (int)n : 0;
    v.pairs = pairs;
    return add(b, &g, name, v, true);
}

/* q, k and v stand side by side in each part: `cols` numbers of weights (the hidden size) or 1 of a bias. */
static tm_status add_qkv(build *b, int layer, const char *ext, size_t cols)
{
    static const char *const names[] = {"q", "k", "v"};
    const tm_ws_config *c = b->c;
    const tm_ws_model *m = b->m;
    group g;
    char file[NAME_MAX_LEN], name[NAME_MAX_LEN];
    size_t d = (size_t)c->head_dim, parts = (size_t)b->attn_parts;
    size_t q = (size_t)c->heads * d / parts, kv = (size_t)c->kv_heads * d / parts, n = q + 2 * kv;
    text_of(file, "layers.%d.attention.w_qkv", layer);
    TM_TRY(find_group(b, &g, file, ext, b->attn_parts, cols, n));
    for (int i = 0; i < 3; i++) {
        int heads = i == 0 ? m->heads : m->kv_heads;
        tm_ws_view v = {.by_row = true,
                        .rows = (size_t)heads * d,
                        .cols = cols,
                        .per = i == 0 ? q : kv,
                        .rs = 1,
                        .cs = n,
                        .base = i == 0 ? 0 : q + (size_t)(i - 1) * kv,
                        .head_dim = c->head_dim,
                        .head_step = i == 0 ? 1 : c->kv_heads / m->kv_heads,
                        .pairs = m->pairs && i < 2};
        text_of(name, "model.layers.%d.self_attn.%s_proj%s", layer, names[i], ext);
        TM_TRY(add(b, &g, name, v, strcmp(ext, ".bias") == 0));
    }
    return TM_OK;
}

/* The bias of the output is a copy in each part; where the model has none it is zero and left aside. */
static tm_status add_o_bias(build *b, int layer)
{
    char file[NAME_MAX_LEN], name[NAME_MAX_LEN];
    text_of(file, "layers.%d.attention.wo", layer);
    text_of(name, "model.layers.%d.self_attn.o_proj.bias", layer);
    if (b->m->o_bias)
        return add_vector(b, file, ".bias", name, b->attn_parts, (size_t)b->m->hidden, false);
    group g;
    if (count_parts(b, file, ".bias") == 0)
        return TM_OK;
    return find_group(b, &g, file, ".bias", b->attn_parts, 1, (size_t)b->m->hidden);
}

static tm_status add_attention(build *b, int layer)
{
    const tm_ws_model *m = b->m;
    char file[NAME_MAX_LEN], name[NAME_MAX_LEN];
    size_t q = (size_t)b->c->heads * (size_t)b->c->head_dim, h = (size_t)m->hidden;
    TM_TRY(add_qkv(b, layer, ".weight", h));
    if (m->qkv_bias) {
        TM_TRY(add_qkv(b, layer, ".bias", 1));
        TM_TRY(add_o_bias(b, layer));
    }
    text_of(file, "layers.%d.attention.wo", layer);
    text_of(name, "model.layers.%d.self_attn.o_proj.weight", layer);
    TM_TRY(add_in_split(b, file, name, b->attn_parts, q, h, q));
    static const char *const norms[] = {"q_norm", "k_norm"};
    for (int i = 0; m->qk_norm && i < 2; i++) {
        text_of(file, "layers.%d.attention.%s", layer, norms[i]);
        text_of(name, "model.layers.%d.self_attn.%s.weight", layer, norms[i]);
        TM_TRY(add_vector(b, file, "", name, 0, (size_t)m->head_dim, m->pairs));
    }
    return TM_OK;
}

/* Gate, up and down of a width; the model's may be less than what is stored. */
static tm_status add_mlp(build *b, const char *file, const char *name, int stored, int width)
{
    char f[NAME_MAX_LEN], n[NAME_MAX_LEN];
    size_t h = (size_t)b->m->hidden, s = (size_t)stored, w = (size_t)width;
    if (stored % b->ffn_parts != 0)
        return TM_FAIL(b->err, TM_STATUS_DATA, "%s: the width %d is not divisible by %d parts",
                       file, stored, b->ffn_parts);
    text_of(f, "%.180s.w1", file);
    text_of(n, "%.180s.gate_proj.weight", name);
    TM_TRY(add_out_split(b, f, n, b->ffn_parts, h, s, w));
    text_of(f, "%.180s.w3", file);
    text_of(n, "%.180s.up_proj.weight", name);
    TM_TRY(add_out_split(b, f, n, b->ffn_parts, h, s, w));
    text_of(f, "%.180s.w2", file);
    text_of(n, "%.180s.down_proj.weight", name);
    return add_in_split(b, f, n, b->ffn_parts, s, h, w);
}

static tm_status add_experts(build *b, int layer)
{
    const tm_ws_model *m = b->m;
    char file[NAME_MAX_LEN], name[NAME_MAX_LEN];
    size_t h = (size_t)m->hidden, e = (size_t)m->experts;
    text_of(file, "layers.%d.moe_ffn.gate", layer);
    text_of(name, "model.layers.%d.mlp.gate.weight", layer);
    TM_TRY(add_out_split(b, file, name, 0, h, e, e));
    for (int i = 0; i < m->experts; i++) {
        text_of(file, "layers.%d.moe_ffn.experts.%d", layer, i);
        text_of(name, "model.layers.%d.mlp.experts.%d", layer, i);
        TM_TRY(add_mlp(b, file, name, b->c->expert_ffn, m->moe_ffn));
    }
    if (m->shared == 0)
        return TM_OK;
    text_of(file, "layers.%d.feed_forward", layer);
    text_of(name, "model.layers.%d.mlp.shared_expert", layer);
    TM_TRY(add_mlp(b, file, name, b->c->ffn[layer], m->shared));
    text_of(file, "layers.%d.moe_ffn.shared_gate", layer);
    text_of(name, "model.layers.%d.mlp.shared_expert_gate.weight", layer);
    return m->shared_gate ? add_out_split(b, file, name, 0, h, 1, 1) : TM_OK;
}

static tm_status add_layer(build *b, int layer)
{
    const tm_ws_model *m = b->m;
    char file[NAME_MAX_LEN], name[NAME_MAX_LEN];
    size_t h = (size_t)m->hidden;
    text_of(file, "layers.%d.attention_norm", layer);
    text_of(name, "model.layers.%d.input_layernorm.weight", layer);
    TM_TRY(add_vector(b, file, ".weight", name, 0, h, false));
    text_of(file, "layers.%d.ffn_norm", layer);
    text_of(name, "model.layers.%d.post_attention_layernorm.weight", layer);
    TM_TRY(add_vector(b, file, ".weight", name, 0, h, false));
    TM_TRY(add_attention(b, layer));
    if (m->moe_layer && m->moe_layer[layer])
        return add_experts(b, layer);
    text_of(file, "layers.%d.feed_forward", layer);
    text_of(name, "model.layers.%d.mlp", layer);
    return add_mlp(b, file, name, b->c->ffn[layer], m->ffn);
}

/* Whole, or split by the hidden size (from 0.6 on). The vocabulary is padded for the ranks. */
static tm_status add_embedding(build *b, size_t padded)
{
    size_t h = (size_t)b->m->hidden, v = (size_t)b->m->vocab;
    const char *name = "model.embed_tokens.weight";
    int parts = count_parts(b, "tok_embeddings", ".weight");
    group g;
    tm_ws_view whole = {.by_row = true, .rows = v, .cols = h, .per = padded, .rs = h, .cs = 1};
    if (parts == 0) {
        TM_TRY(find_group(b, &g, "tok_embeddings", ".weight", 0, padded, h));
        return add(b, &g, name, whole, false);
    }
    size_t per = h / (size_t)parts;
    if (per * (size_t)parts != h)
        return TM_FAIL(b->err, TM_STATUS_DATA, "tok_embeddings: %zu is not divisible by %d parts",
                       h, parts);
    TM_TRY(find_group(b, &g, "tok_embeddings", ".weight", parts, padded, per));
    tm_ws_view split = {.rows = v, .cols = h, .per = per, .rs = per, .cs = 1};
    return add(b, &g, name, split, false);
}

static tm_status add_head(build *b, size_t padded)
{
    size_t h = (size_t)b->m->hidden, v = (size_t)b->m->vocab;
    int parts = count_parts(b, "output", ".weight");
    size_t per = padded / (size_t)TM_MAX(parts, 1);
    bool turned = parts > 0 && b->c->head == TM_WS_HEAD_COLUMNS;
    group g;
    if (parts == 0 && tm_ws_file_find(b->s, "output.weight") < 0)
        return TM_OK; /* the embedding is the head, or the loader says that it is missing */
    if (per * (size_t)TM_MAX(parts, 1) != padded)
        return TM_FAIL(b->err, TM_STATUS_DATA, "output: %zu rows are not divisible by %d parts",
                       padded, parts);
    TM_TRY(find_group(b, &g, "output", ".weight", parts, turned ? h : per, turned ? per : h));
    tm_ws_view w = {.by_row = true, .rows = v, .cols = h, .per = per};
    w.rs = turned ? 1 : h;
    w.cs = turned ? per : 1;
    return b->m->head ? add(b, &g, "lm_head.weight", w, false) : TM_OK;
}

/* How many parts attention and feed-forward are cut into. */
static tm_status settle_parts(build *b)
{
    const tm_ws_config *c = b->c;
    b->attn_parts = count_parts(b, "layers.0.attention.w_qkv", ".weight");
    if (c->tp > 0 && b->attn_parts != c->tp && b->attn_parts > 0)
        return TM_FAIL(b->err, TM_STATUS_DATA,
                       "layers.0.attention.w_qkv: %d parts are there, %s says %d", b->attn_parts,
                       c->file, c->tp);
    if (b->attn_parts == 0)
        b->attn_parts = TM_MAX(c->tp, 1);
    bool moe = b->m->moe_layer && b->m->moe_layer[0];
    b->ffn_parts = count_parts(
        b, moe ? "layers.0.moe_ffn.experts.0.w1" : "layers.0.feed_forward.w1", ".weight");
    if (b->ffn_parts == 0)
        b->ffn_parts = b->attn_parts;
    if (c->heads % b->attn_parts != 0 || c->kv_heads % b->attn_parts != 0)
        return TM_FAIL(b->err, TM_STATUS_DATA,
                       "%s: head_num %d and kv_head_num %d are not divisible by %d parts", c->file,
                       c->heads, c->kv_heads, b->attn_parts);
    return TM_OK;
}

static bool ends_with(const char *name, const char *end)
{
    size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}

/* Files that nothing asked for: weights are refused (a wrong config, or two models in one folder), scales of an
 * offline int8 cache and other things are left aside. */
static tm_status check_left_over(const build *b)
{
    static const char *const weights[] = {".weight", ".bias",         ".qweight", ".scales",
                                          ".zeros",  ".scales_zeros", "_norm"};
    size_t scales = 0;
    for (size_t i = 0; i < b->s->file_count; i++) {
        const tm_ws_file *f = &b->s->files[i];
        if (f->used)
            continue;
        if (strstr(f->name, ".past_kv_scale.")) {
            scales++;
            continue;
        }
        for (size_t k = 0; k < TM_ARRAY_LEN(weights); k++)
            if (ends_with(f->name, weights[k]))
                return TM_FAIL(b->err, TM_STATUS_DATA,
                               "%s (%zu bytes) is not a file of the model that %s describes",
                               f->name, f->size, b->c->file);
    }
    if (scales > 0)
        tm_log(TM_LOG_WARN, "model", "%zu files of int8 KV cache scales are not used", scales);
    return TM_OK;
}

static tm_status add_all(build *b)
{
    const tm_ws_model *m = b->m;
    TM_TRY(settle_parts(b));
    size_t parts = (size_t)b->attn_parts, v = (size_t)b->c->vocab;
    size_t padded = (v + parts - 1) / parts * parts;
    TM_TRY(add_embedding(b, padded));
    TM_TRY(add_vector(b, "norm", ".weight", "model.norm.weight", 0, (size_t)m->hidden, false));
    TM_TRY(add_head(b, padded));
    for (int i = 0; i < m->layers; i++)
        TM_TRY(add_layer(b, i));
    if (b->missing > 1)
        return TM_FAIL(b->err, TM_STATUS_DATA, "%s is missing (and %zu more files)",
                       b->first_missing, b->missing - 1);
    if (b->missing == 1)
        return TM_FAIL(b->err, TM_STATUS_DATA, "%s is missing", b->first_missing);
    return check_left_over(b);
}

tm_status tm_ws_source_open(tm_ws_source **out, const char *dir, const tm_ws_config *config,
                            const tm_ws_model *model, tm_err *err)
{
    tm_ws_source *s = calloc(1, sizeof(*s));
    if (!s)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "workspace: out of memory");
    pthread_mutex_init(&s->lock, NULL);
    for (int i = 0; i < TM_WS_MAPS_MAX; i++)
        s->slots[i].file = -1;
    s->dir = strdup(dir);
    tm_status st = s->dir ? tm_ws_files_list(s, err)
                          : TM_FAIL(err, TM_STATUS_NO_MEMORY, "workspace: out of memory");
    build b = {.s = s, .c = config, .m = model, .err = err};
    if (st == TM_OK)
        st = add_all(&b);
    if (st != TM_OK) {
        tm_err_prefix(err, "%s", dir);
        tm_ws_source_close(s);
        return st;
    }
    *out = s;
    return TM_OK;
}

const tm_st_tensor *tm_ws_source_tensors(const tm_ws_source *s, size_t *count)
{
    *count = s->view_count;
    return s->tensors;
}
