/* Rotary positions out of config.json: base, share of the head, scaling in the dialects of Transformers 4 and 5. */
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "engine/model/config_impl.h"

static tm_status read_rope_type(const json_t *scaling, tm_rope_type *out, tm_err *err)
{
    static const struct {
        const char *name;
        tm_rope_type type;
    } types[] = {{"default", TM_ROPE_DEFAULT}, {"origin", TM_ROPE_DEFAULT}, /* InternLM 1 */
                 {"linear", TM_ROPE_LINEAR},   {"dynamic", TM_ROPE_DYNAMIC},
                 {"llama3", TM_ROPE_LLAMA3},   {"yarn", TM_ROPE_YARN},
                 {"longrope", TM_ROPE_LONG},   {"su", TM_ROPE_LONG}}; /* Phi-3's old name */
    static const char *const names[TM_CONFIG_NAMES] = {"rope_type", "type"};
    const char *key = names[0];
    json_t *v = tm_config_any(scaling, names, &key);
    if (!v && tm_json_get(scaling, "factor")) /* of what? */
        return TM_FAIL(err, TM_STATUS_CONFIG, "rope_scaling.rope_type: this key is missing");
    const char *text = v ? json_string_value(v) : "default";
    for (size_t i = 0; text && i < TM_ARRAY_LEN(types); i++)
        if (strcmp(types[i].name, text) == 0) {
            /* An old Phi-3 config calls its lists yarn. */
            bool lists = tm_json_get(scaling, "long_factor") != NULL;
            *out = types[i].type == TM_ROPE_YARN && lists ? TM_ROPE_LONG : types[i].type;
            return TM_OK;
        }
    return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                   "rope_scaling.%s: '%.40s' is not supported; known are default, linear, dynamic, "
                   "llama3, yarn, longrope",
                   key, text ? text : tm_json_type_name(v));
}

/* A scaled rope needs its factor; a missing one must not silently mean 1. */
static tm_status need_key(const json_t *scaling, const char *key, tm_err *err)
{
    if (!tm_json_get(scaling, key))
        return TM_FAIL(err, TM_STATUS_CONFIG, "rope_scaling.%s: this key is missing", key);
    return TM_OK;
}

typedef struct rope_num {
    const char *key;
    double min, max;
    size_t offset; /* of a double in tm_rope */
} rope_num;

static const rope_num rope_nums[] = {
    {"factor", 1.0, 1e6, offsetof(tm_rope, factor)},
    {"scaling_factor", 1.0, 1e6, offsetof(tm_rope, factor)}, /* InternLM 1 */
    {"original_max_position_embeddings", 1.0, 1e9, offsetof(tm_rope, original)},
    {"low_freq_factor", 1e-6, 1e6, offsetof(tm_rope, low_freq_factor)},
    {"high_freq_factor", 1e-6, 1e6, offsetof(tm_rope, high_freq_factor)},
    {"beta_fast", 1e-6, 1e6, offsetof(tm_rope, beta_fast)},
    {"beta_slow", 1e-6, 1e6, offsetof(tm_rope, beta_slow)},
    {"mscale", 0.0, 1e6, offsetof(tm_rope, mscale)},
    {"mscale_all_dim", 0.0, 1e6, offsetof(tm_rope, mscale_all_dim)},
    {"attention_factor", 1e-6, 1e6, offsetof(tm_rope, attention_factor)},
};

static tm_status read_list(const json_t *scaling, const char *key, int n, float *out, tm_err *err)
{
    const json_t *list = tm_json_get(scaling, key);
    if (!json_is_array(list) || json_array_size(list) != (size_t)n || n > TM_LONGROPE_MAX)
        return TM_FAIL(err, TM_STATUS_CONFIG, "rope_scaling.%s: expected an array of %d numbers",
                       key, n);
    for (int i = 0; i < n; i++) {
        const json_t *v = json_array_get(list, (size_t)i);
        double num = json_number_value(v);
        if (!json_is_number(v) || !(num > 1e-6 && num < 1e6))
            return TM_FAIL(err, TM_STATUS_CONFIG, "rope_scaling.%s[%d]: expected a number above 0",
                           key, i);
        out[i] = (float)num;
    }
    return TM_OK;
}

static tm_status read_scaling(tm_rope *r, const json_t *scaling, tm_err *err)
{
    TM_TRY(read_rope_type(scaling, &r->type, err));
    for (size_t i = 0; i < TM_ARRAY_LEN(rope_nums); i++) {
        const rope_num *n = &rope_nums[i];
        const char *const names[TM_CONFIG_NAMES] = {n->key};
        double *out = (double *)(void *)((char *)r + n->offset);
        tm_status st = tm_config_any_num(scaling, names, n->min, n->max, out, err);
        if (st != TM_OK) {
            tm_err_prefix(err, "rope_scaling");
            return st;
        }
    }
    TM_TRY(tm_config_rule(scaling, (tm_flag_rule){"truncate", true}, &r->truncate, err));
    if (r->type == TM_ROPE_LINEAR || r->type == TM_ROPE_LLAMA3)
        TM_TRY(need_key(scaling, "factor", err));
    if (r->type == TM_ROPE_LONG) {
        TM_TRY(read_list(scaling, "short_factor", r->dim / 2, r->short_factor, err));
        TM_TRY(read_list(scaling, "long_factor", r->dim / 2, r->long_factor, err));
    }
    if (r->type == TM_ROPE_DYNAMIC && r->dim < 4)
        return TM_FAIL(err, TM_STATUS_CONFIG, "rope_scaling: dynamic needs 4 rotated dimensions");
    if (r->type == TM_ROPE_LLAMA3) {
        TM_TRY(need_key(scaling, "low_freq_factor", err));
        TM_TRY(need_key(scaling, "high_freq_factor", err));
        if (r->high_freq_factor <= r->low_freq_factor)
            return TM_FAIL(err, TM_STATUS_CONFIG,
                           "rope_scaling.high_freq_factor %g is not above low_freq_factor %g",
                           r->high_freq_factor, r->low_freq_factor);
    }
    return TM_OK;
}

/* A config that Transformers 5 wrote, to which somebody added the key of version 4: which of them is meant is not
 * known, unless they say the same. */
static tm_status check_dialects(const json_t *chosen, const json_t *root, tm_err *err)
{
    const json_t *old = tm_json_get(root, "rope_scaling");
    static const char *const names[TM_CONFIG_NAMES] = {"rope_type", "type"};
    const char *key = names[0];
    if (!json_is_object(old) || json_object_size(old) == 0 || old == chosen)
        return TM_OK;
    const json_t *type = tm_config_any(old, names, &key), *other;
    other = tm_config_any(chosen, names, &key);
    const json_t *factor = tm_json_get(old, "factor"), *with = tm_json_get(chosen, "factor");
    if ((!type || (other && json_equal(type, other))) &&
        json_number_value(factor) == json_number_value(with))
        return TM_OK;
    return TM_FAIL(err, TM_STATUS_CONFIG,
                   "rope_scaling: rope_parameters is there, too, and says something else; the "
                   "scaling belongs in rope_parameters alone");
}

/* The scaling of the global rope; its object may be nested by layer kind. */
static tm_status read_scaled(tm_arch *a, const json_t *root, tm_err *err)
{
    static const char *const scaling_names[TM_CONFIG_NAMES] = {
        "rope_parameters.full_attention", "rope_parameters", "rope_scaling", "rotary"};
    tm_rope *r = &a->rope;
    const char *key = scaling_names[0];
    json_t *scaling = tm_config_any(root, scaling_names, &key);
    if (!scaling)
        return TM_OK;
    if (!json_is_object(scaling))
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: expected an object, got %s", key,
                       tm_json_type_name(scaling));
    TM_TRY(check_dialects(scaling, root, err));
    bool has_factor = tm_json_get(scaling, "factor") != NULL;
    double top = r->original;
    TM_TRY(read_scaling(r, scaling, err));
    if (r->type == TM_ROPE_LONG && tm_config_get(root, "original_max_position_embeddings"))
        r->original = top;
    if (r->type == TM_ROPE_LONG || (r->type == TM_ROPE_YARN && !has_factor))
        r->factor = TM_MAX(1.0, (double)a->max_positions / r->original);
    return TM_OK;
}

tm_status tm_config_rope(tm_arch *a, const json_t *root, tm_err *err)
{
    static const char *const base_names[TM_CONFIG_NAMES] = {
        "rope_parameters.full_attention.rope_theta",
        "rope_parameters.rope_theta",
        "rope_theta",
        "rotary_emb_base",
        "attn_config.rope_theta",
        "rotary.base"};
    static const char *const local_names[TM_CONFIG_NAMES] = {
        "rope_parameters.sliding_attention.rope_theta", "rope_local_base_freq"};
    static const char *const share_names[TM_CONFIG_NAMES] = {
        "rope_parameters.partial_rotary_factor", "partial_rotary_factor", "rotary_pct",
        "rotary_percent"};
    static const char *const original_names[TM_CONFIG_NAMES] = {"original_max_position_embeddings"};
    const tm_family *f = a->family;
    tm_rope *r = &a->rope;
    *r = (tm_rope){.interleaved = f->rope_interleaved,
                   .base = f->rope_base,
                   .factor = 1.0,
                   .original = a->max_positions,
                   .beta_fast = 32.0,
                   .beta_slow = 1.0,
                   .truncate = true};
    double share = f->rotary_share > 0.0 ? f->rotary_share : 1.0;
    TM_TRY(tm_config_any_num(root, base_names, 1e-3, 1e12, &r->base, err));
    TM_TRY(tm_config_any_num(root, share_names, 0.01, 1.0, &share, err));
    TM_TRY(tm_config_any_num(root, original_names, 1.0, 1e9, &r->original, err));
    r->dim = a->mla.kv_rank > 0 ? a->mla.rope : (int)((double)a->head_dim * share) & ~1;
    a->rope_local = *r; /* without scaling */
    a->rope_local.base = 10000.0;
    TM_TRY(tm_config_any_num(root, local_names, 1e-3, 1e12, &a->rope_local.base, err));
    return read_scaled(a, root, err);
}
