/* The keys of both generations in one table: a number that has two names is two rows, and the later row wins. */
#include "engine/weights/workspace_config.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/file.h"
#include "engine/weights/workspace_text.h"

typedef enum kind { INT, NUM, FLAG, TEXT, LIST } kind;

typedef struct row {
    const char *key;
    kind kind;
    size_t offset;
    double min, max; /* of a text: its room */
    bool required;
} row;

#define AT(f)      offsetof(tm_ws_config, f)
#define TEXT_AT(f) TEXT, AT(f), 0, sizeof(((tm_ws_config *)0)->f)
static const row rows[] = {
    {"model_name", TEXT_AT(model_name), false},
    {"model_arch", TEXT_AT(model_arch), false},
    {"head_num", INT, AT(heads), 1, 4096, true},
    {"kv_head_num", INT, AT(kv_heads), 0, 4096, false},
    {"size_per_head", INT, AT(head_dim), 2, 4096, true},
    {"hidden_units", INT, AT(hidden), 1, 1 << 17, false},
    {"num_layer", INT, AT(layers), 1, TM_WS_LAYERS_MAX, true},
    {"vocab_size", INT, AT(vocab), 1, 1 << 24, true},
    {"embedding_size", INT, AT(embedding), 0, 1 << 24, false},
    {"inter_size", LIST, AT(ffn), 0, 1 << 21, true},
    {"expert_num", LIST, AT(experts), 0, 1024, false},
    {"expert_inter_size", INT, AT(expert_ffn), 0, 1 << 21, false},
    {"experts_per_token", INT, AT(top_k), 0, 1024, false},
    {"moe_shared_gate", FLAG, AT(shared_gate), 0, 0, false},
    {"attn_bias", FLAG, AT(attn_bias), 0, 0, false},
    {"qk_norm", FLAG, AT(qk_norm), 0, 0, false},
    {"norm_eps", NUM, AT(eps), 0, 1, true},
    {"tensor_para_size", INT, AT(tp), 1, 64, false},
    {"tp", INT, AT(tp), 1, 64, false},
    {"attn_tp_size", INT, AT(tp), 1, 64, false},
    {"start_id", INT, AT(start_id), -1, 1 << 24, false},
    {"end_id", INT, AT(end_id), -1, 1 << 24, false},
    {"session_len", INT, AT(session_len), 0, 1 << 28, false},
    {"max_position_embeddings", INT, AT(max_positions), 0, 1 << 28, false},
    {"rope_param.max_position_embeddings", INT, AT(max_positions), 0, 1 << 28, false},
    {"original_max_position_embeddings", INT, AT(original_positions), 0, 1 << 28, false},
    {"rope_param.original_max_position_embeddings", INT, AT(original_positions), 0, 1 << 28, false},
    {"rope_theta", NUM, AT(rope_base), 0, 1e12, false},
    {"rope_param.base", NUM, AT(rope_base), 0, 1e12, false},
    {"rope_scaling_factor", NUM, AT(rope_factor), 0, 1e6, false},
    {"rope_param.factor", NUM, AT(rope_factor), 0, 1e6, false},
    {"rotary_embedding", INT, AT(rope_dim), 0, 4096, false},
    {"rope_param.dim", INT, AT(rope_dim), 0, 4096, false},
    {"rope_scaling_type", TEXT_AT(rope_type), false},
    {"rope_param.type", TEXT_AT(rope_type), false},
    {"use_dynamic_ntk", FLAG, AT(dynamic_ntk), 0, 0, false},
    {"use_logn_attn", FLAG, AT(logn), 0, 0, false},
    {"quant_policy", INT, AT(quant_policy), 0, 64, false},
};
#undef AT
#undef TEXT_AT

static bool says_nothing(const char *text)
{
    return !*text || strcmp(text, "None") == 0 || strcmp(text, "null") == 0 ||
           strcmp(text, "~") == 0;
}

static tm_status read_num(const row *r, const char *text, double *out, tm_err *err)
{
    char *end;
    errno = 0;
    double v = strtod(text, &end);
    if (end == text || *end || errno == ERANGE || !isfinite(v) || strpbrk(text, "xXnN"))
        return TM_FAIL(err, TM_STATUS_DATA, "%s: expected a number, got '%.40s'", r->key, text);
    if (v < r->min || v > r->max || (r->kind != NUM && v != floor(v)))
        return TM_FAIL(err, TM_STATUS_DATA, "%s: expected %s from %g to %g, got %.40s", r->key,
                       r->kind == NUM ? "a number" : "an integer", r->min, r->max, text);
    *out = v;
    return TM_OK;
}

static tm_status read_flag(const row *r, const char *text, bool *out, tm_err *err)
{
    static const char *const yes[] = {"1", "True", "true"}, *const no[] = {"0", "False", "false"};
    for (size_t i = 0; i < TM_ARRAY_LEN(yes); i++)
        if (strcmp(text, yes[i]) == 0 || strcmp(text, no[i]) == 0) {
            *out = strcmp(text, yes[i]) == 0;
            return TM_OK;
        }
    return TM_FAIL(err, TM_STATUS_DATA, "%s: expected 0 or 1, got '%.40s'", r->key, text);
}

/* One number for all layers, or one for each. */
static tm_status read_list(const row *r, const json_t *v, int *out, tm_err *err)
{
    size_t n = json_array_size(v);
    double num;
    if (n > TM_WS_LAYERS_MAX)
        return TM_FAIL(err, TM_STATUS_DATA, "%s: more than %d numbers", r->key, TM_WS_LAYERS_MAX);
    for (size_t i = 0; i < n; i++) {
        TM_TRY(read_num(r, json_string_value(json_array_get(v, i)), &num, err));
        out[i] = (int)num;
    }
    if (json_is_string(v)) {
        TM_TRY(read_num(r, json_string_value(v), &num, err));
        for (int i = 0; i < TM_WS_LAYERS_MAX; i++)
            out[i] = (int)num;
    }
    return TM_OK;
}

static tm_status read_row(tm_ws_config *c, const row *r, const json_t *v, tm_err *err)
{
    char *at = (char *)c + r->offset;
    const char *text = json_string_value(v);
    double num = 0;
    if (r->kind == LIST)
        return read_list(r, v, (int *)(void *)at, err);
    if (!text)
        return TM_FAIL(err, TM_STATUS_DATA, "%s: expected one value, got a list", r->key);
    if (r->kind == FLAG)
        return read_flag(r, text, (bool *)(void *)at, err);
    if (r->kind == TEXT) {
        snprintf(at, (size_t)r->max, "%s", text);
        return TM_OK;
    }
    TM_TRY(read_num(r, text, &num, err));
    if (r->kind == INT)
        *(int *)(void *)at = (int)num;
    else
        *(double *)(void *)at = num;
    return TM_OK;
}

static tm_status read_dtype(tm_ws_config *c, const json_t *root, tm_err *err)
{
    static const struct {
        const char *name;
        tm_dtype dtype;
    } types[] = {{"fp16", TM_DTYPE_F16},      {"float16", TM_DTYPE_F16}, {"bf16", TM_DTYPE_BF16},
                 {"bfloat16", TM_DTYPE_BF16}, {"fp32", TM_DTYPE_F32},    {"float32", TM_DTYPE_F32}};
    const char *name = json_string_value(json_object_get(root, "weight_type"));
    for (size_t i = 0; name && i < TM_ARRAY_LEN(types); i++)
        if (strcmp(types[i].name, name) == 0) {
            c->dtype = types[i].dtype;
            return TM_OK;
        }
    if (!name)
        return TM_FAIL(err, TM_STATUS_DATA, "weight_type: this key is missing");
    return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                   "weight_type '%.20s': workspaces of quantised weights are not read; fp16, bf16 "
                   "and fp32 are",
                   name);
}

static bool has(const json_t *root, const char *key)
{
    return json_object_get(root, key) != NULL;
}

/* Until 0.7 the head's rows were split; from 0.8 on it is turned and its columns are. Sizes are the same, so keys tell
 * that only the later releases write. `output_layout` (rows or columns) may be added where none is there. */
static tm_status read_head(tm_ws_config *c, const json_t *root, tm_err *err)
{
    static const char *const later[] = {"tokenizer_size", "window_size",        "mlp_bias",
                                        "attn_sink",      "expert_weight_type", "data_type"};
    const char *said = json_string_value(json_object_get(root, "output_layout"));
    c->head = TM_WS_HEAD_ROWS;
    for (size_t i = 0; c->yaml && i < TM_ARRAY_LEN(later); i++)
        if (has(root, later[i]))
            c->head = TM_WS_HEAD_COLUMNS;
    if (said && strcmp(said, "rows") != 0 && strcmp(said, "columns") != 0)
        return TM_FAIL(err, TM_STATUS_DATA, "output_layout: expected rows or columns, got '%.40s'",
                       said);
    if (said)
        c->head = said[0] == 'r' ? TM_WS_HEAD_ROWS : TM_WS_HEAD_COLUMNS;
    return TM_OK;
}

/* What follows from other numbers, and what must fit together. */
static tm_status settle(tm_ws_config *c, tm_err *err)
{
    if (c->kv_heads == 0)
        c->kv_heads = c->heads;
    if (c->heads % c->kv_heads != 0)
        return TM_FAIL(err, TM_STATUS_DATA, "kv_head_num %d does not divide head_num %d",
                       c->kv_heads, c->heads);
    if (c->head_dim % 2 != 0)
        return TM_FAIL(err, TM_STATUS_DATA, "size_per_head %d is odd", c->head_dim);
    if (c->hidden == 0)
        c->hidden = c->heads * c->head_dim;
    if (c->embedding == 0)
        c->embedding = c->vocab;
    if (c->rope_dim == 0)
        c->rope_dim = c->head_dim;
    if (c->rope_dim > c->head_dim)
        return TM_FAIL(err, TM_STATUS_DATA, "rotary_embedding %d is more than size_per_head %d",
                       c->rope_dim, c->head_dim);
    for (int i = 0; i < c->layers; i++)
        if (c->ffn[i] == 0 && c->experts[i] == 0)
            return TM_FAIL(err, TM_STATUS_DATA, "inter_size: none for layer %d", i);
    return TM_OK;
}

tm_status tm_ws_config_parse(tm_ws_config *out, const char *text, size_t len, bool yaml,
                             tm_err *err)
{
    tm_ws_config c = {.yaml = yaml, .start_id = -1, .end_id = -1};
    json_t *root = NULL;
    c.file = yaml ? "config.yaml" : "config.ini";
    tm_status st = tm_ws_text_parse(&root, text, len, yaml, err);
    for (size_t i = 0; st == TM_OK && i < TM_ARRAY_LEN(rows); i++) {
        const json_t *v = json_object_get(root, rows[i].key);
        bool none = !v || (json_is_string(v) && says_nothing(json_string_value(v)));
        if (!none)
            st = read_row(&c, &rows[i], v, err);
        else if (rows[i].required)
            st = TM_FAIL(err, TM_STATUS_DATA, "%s: this key is missing", rows[i].key);
    }
    if (st == TM_OK)
        st = read_dtype(&c, root, err);
    if (st == TM_OK)
        st = read_head(&c, root, err);
    if (st == TM_OK)
        st = settle(&c, err);
    json_decref(root);
    if (st == TM_OK)
        *out = c;
    else
        tm_err_prefix(err, "%s", c.file);
    return st;
}

tm_status tm_ws_config_read(tm_ws_config *out, const char *dir, tm_err *err)
{
    char path[4096], *text;
    size_t len;
    bool yaml = true;
    if (!tm_path_join(path, sizeof(path), dir, "config.yaml"))
        return TM_FAIL(err, TM_STATUS_CONFIG, "the workspace's path is too long");
    if (!tm_file_exists(path)) {
        yaml = false;
        tm_path_join(path, sizeof(path), dir, "config.ini");
    }
    if (!tm_file_exists(path))
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: neither config.yaml nor config.ini is there",
                       dir);
    TM_TRY(tm_file_read(path, TM_WS_TEXT_MAX, &text, &len, err));
    tm_status st = tm_ws_config_parse(out, text, len, yaml, err);
    free(text);
    if (st != TM_OK)
        tm_err_prefix(err, "%s", dir);
    return st;
}
