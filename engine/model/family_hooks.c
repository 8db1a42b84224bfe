/* See family_hooks.h. A hook reads keys that only its family has; it adds no arithmetic. */
#include "engine/model/family_hooks.h"

#include <string.h>

#include "common/check.h"
#include "common/json.h"

tm_status tm_family_qwen_shape(tm_arch *a, const json_t *root, tm_err *err)
{
    (void)root;
    (void)err;
    a->ffn /= 2; /* the key counts both branches */
    return TM_OK;
}

tm_status tm_family_qwen_adjust(tm_arch *a, const json_t *root, tm_err *err)
{
    bool ntk = false, logn = false;
    int trained = a->max_positions;
    TM_TRY(tm_config_flag(root, "use_dynamic_ntk", &ntk, err));
    TM_TRY(tm_config_flag(root, "use_logn_attn", &logn, err));
    TM_TRY(tm_config_int(root, "seq_length", 2, 1 << 28, &trained, err));
    a->rope.original = trained;
    if (ntk)
        a->rope.type = TM_ROPE_QWEN;
    a->logn_len = logn ? trained : 0;
    return TM_OK;
}

/* No rope keys at all: the 13B, which has ALiBi. The second generation's head has unit rows. */
tm_status tm_family_baichuan_adjust(tm_arch *a, const json_t *root, tm_err *err)
{
    a->head_norm = a->vocab == 125696;
    TM_TRY(tm_config_flag(root, "norm_head", &a->head_norm, err));
    if (!tm_config_get(root, "max_position_embeddings")) {
        a->alibi = true;
        a->alibi_scale = 1.0f;
        a->rope.dim = 0;
    }
    return TM_OK;
}

tm_status tm_family_chatglm_shape(tm_arch *a, const json_t *root, tm_err *err)
{
    bool multi_query = false;
    TM_TRY(tm_config_flag(root, "multi_query_attention", &multi_query, err));
    if (!multi_query)
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "multi_query_attention false: this order of query_key_value is not read");
    if (!tm_config_get(root, "multi_query_group_num"))
        a->kv_heads = 1;
    return TM_OK;
}

/* rope_ratio multiplies the base; in ChatGLM2-32k alone it stretches positions. */
tm_status tm_family_chatglm_adjust(tm_arch *a, const json_t *root, tm_err *err)
{
    double ratio = 1.0;
    const char *path = json_string_value(tm_json_get(root, "_name_or_path"));
    TM_TRY(tm_config_num(root, "rope_ratio", 1e-3, 1e6, &ratio, err));
    if (path && strstr(path, "chatglm2") && ratio > 1.0) {
        a->rope.type = TM_ROPE_LINEAR;
        a->rope.factor = ratio;
    } else {
        a->rope.base *= ratio;
    }
    return TM_OK;
}

/* The 40B's layout; its first configs say so by model_type alone. */
static tm_status falcon_grouped(const json_t *root, bool *out, tm_err *err)
{
    const char *type = json_string_value(tm_json_get(root, "model_type"));
    *out = type && strcmp(type, "RefinedWeb") == 0;
    return tm_config_flag(root, "new_decoder_architecture", out, err);
}

tm_status tm_family_falcon_shape(tm_arch *a, const json_t *root, tm_err *err)
{
    bool grouped = false, multi_query = true;
    TM_TRY(falcon_grouped(root, &grouped, err));
    TM_TRY(tm_config_flag(root, "multi_query", &multi_query, err));
    if (!grouped)
        a->kv_heads = multi_query ? 1 : a->heads;
    if (a->ffn == 0)
        a->ffn = 4 * a->hidden;
    return TM_OK;
}

tm_status tm_family_falcon_adjust(tm_arch *a, const json_t *root, tm_err *err)
{
    bool grouped = false, parallel = true;
    TM_TRY(falcon_grouped(root, &grouped, err));
    TM_TRY(tm_config_flag(root, "parallel_attn", &parallel, err));
    TM_TRY(tm_config_flag(root, "alibi", &a->alibi, err));
    int norms = grouped ? 2 : 1;
    TM_TRY(tm_config_int(root, "num_ln_in_parallel_attn", 1, 2, &norms, err));
    if (grouped || parallel)
        a->block = grouped && norms == 2 ? TM_BLOCK_PARALLEL2 : TM_BLOCK_PARALLEL1;
    if (a->alibi) {
        /* The bias is added before the scores are scaled. Twice, because the reference is the eager attention
         * of Transformers 5, which adds it with the mask and again with the scores; its sdpa attention and the
         * models' own code add it once: "alibi_times": 1 in config.json gives that. */
        double times = 2.0;
        TM_TRY(tm_config_num(root, "alibi_times", 0.0, 4.0, &times, err));
        a->alibi_scale = (float)times * a->attn_scale;
        a->rope.dim = 0;
    }
    return TM_OK;
}

/* The shared experts are one MLP of n_shared_experts times the width of an expert. */
tm_status tm_family_deepseek_adjust(tm_arch *a, const json_t *root, tm_err *err)
{
    int n = 0;
    TM_TRY(tm_config_int(root, "n_shared_experts", 0, 64, &n, err));
    a->moe.shared = n * a->moe.ffn;
    const char *score = json_string_value(tm_json_get(root, "scoring_func"));
    if (score && strcmp(score, "softmax") != 0 && strcmp(score, "sigmoid") != 0)
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED, "scoring_func '%.40s' is not supported", score);
    if (score)
        a->moe.score = score[1] == 'i' ? TM_MOE_SIGMOID : TM_MOE_SOFTMAX;
    return TM_OK;
}

tm_status tm_family_deepseek_mla_adjust(tm_arch *a, const json_t *root, tm_err *err)
{
    static const struct {
        const char *name;
        bool groups, bias;
        tm_group_score score;
    } methods[] = {{"greedy", false, false, TM_GROUP_MAX},
                   {"group_limited_greedy", true, false, TM_GROUP_MAX},
                   {"noaux_tc", true, true, TM_GROUP_TOP2}};
    bool v3 = strcmp(a->family->name, "deepseek3") == 0;
    if (a->mla.kv_rank == 0)
        return TM_FAIL(err, TM_STATUS_CONFIG, "kv_lora_rank: this key is missing");
    a->moe.score = v3 ? TM_MOE_SIGMOID : TM_MOE_SOFTMAX;
    TM_TRY(tm_family_deepseek_adjust(a, root, err));
    a->attn_scale *= (float)tm_rope_score_factor(&a->rope);
    const char *method = json_string_value(tm_json_get(root, "topk_method"));
    for (size_t i = 0; i < TM_ARRAY_LEN(methods); i++) {
        if (strcmp(methods[i].name, method ? method : v3 ? "noaux_tc" : "greedy") != 0)
            continue;
        a->moe.choice_bias = methods[i].bias;
        a->moe.group_score = methods[i].score;
        if (!methods[i].groups)
            a->moe.groups = a->moe.top_groups = 1;
        return TM_OK;
    }
    return TM_FAIL(err, TM_STATUS_UNSUPPORTED, "topk_method '%.40s' is not supported", method);
}

tm_status tm_family_dbrx_adjust(tm_arch *a, const json_t *root, tm_err *err)
{
    double clip = 0.0, p = 1.0;
    TM_TRY(tm_config_num(root, "attn_config.clip_qkv", 1e-6, 1e6, &clip, err));
    TM_TRY(tm_config_num(root, "ffn_config.moe_normalize_expert_weights", 0.0, 1e6, &p, err));
    if (p != 1.0)
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "ffn_config.moe_normalize_expert_weights %g: only 1 is supported", p);
    a->clip_qkv = (float)clip;
    return TM_OK;
}
