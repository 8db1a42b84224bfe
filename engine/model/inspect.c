/* See inspect.h. Sizes come from the same arithmetic that loading uses (layout.c). */
#include "engine/model/inspect.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/file.h"
#include "common/json.h"
#include "engine/model/model_impl.h"

bool tm_inspect_knows_key(const char *key)
{
    /* Read by config*.c and the hooks; top level only. */
    static const char *const read[] = {"activation",
                                       "add_bias_linear",
                                       "add_qkv_bias",
                                       "alibi",
                                       "alibi_times",
                                       "architectures",
                                       "attention_bias",
                                       "attn_config",
                                       "attn_logit_softcapping",
                                       "bias",
                                       "d_model",
                                       "decoder_sparse_step",
                                       "eos_token_id",
                                       "ffn_config",
                                       "ffn_hidden_size",
                                       "final_logit_softcapping",
                                       "first_k_dense_replace",
                                       "head_dim",
                                       "hidden_act",
                                       "hidden_activation",
                                       "hidden_size",
                                       "intermediate_size",
                                       "kv_channels",
                                       "kv_lora_rank",
                                       "layer_norm_eps",
                                       "layer_norm_epsilon",
                                       "layer_types",
                                       "layernorm_epsilon",
                                       "max_position_embeddings",
                                       "max_seq_len",
                                       "max_window_layers",
                                       "mlp_bias",
                                       "mlp_layer_types",
                                       "mlp_only_layers",
                                       "model_max_length",
                                       "model_type",
                                       "moe_intermediate_size",
                                       "moe_layer_freq",
                                       "multi_query",
                                       "multi_query_attention",
                                       "multi_query_group_num",
                                       "n_embd",
                                       "n_group",
                                       "n_head",
                                       "n_head_kv",
                                       "n_heads",
                                       "n_layer",
                                       "n_layers",
                                       "n_routed_experts",
                                       "n_shared_experts",
                                       "new_decoder_architecture",
                                       "norm_head",
                                       "norm_topk_prob",
                                       "num_attention_heads",
                                       "num_experts",
                                       "num_experts_per_tok",
                                       "num_hidden_layers",
                                       "num_key_value_heads",
                                       "num_kv_heads",
                                       "num_layers",
                                       "num_ln_in_parallel_attn",
                                       "num_local_experts",
                                       "original_max_position_embeddings",
                                       "padded_vocab_size",
                                       "parallel_attn",
                                       "partial_rotary_factor",
                                       "q_lora_rank",
                                       "qk_nope_head_dim",
                                       "qk_rope_head_dim",
                                       "qkv_bias",
                                       "query_pre_attn_scalar",
                                       "quantization_config",
                                       "rms_norm_eps",
                                       "rope_local_base_freq",
                                       "rope_parameters",
                                       "rope_ratio",
                                       "rope_scaling",
                                       "rope_theta",
                                       "rotary",
                                       "rotary_emb_base",
                                       "rotary_pct",
                                       "rotary_percent",
                                       "routed_scaling_factor",
                                       "scoring_func",
                                       "seq_length",
                                       "shared_expert_intermediate_size",
                                       "sliding_window",
                                       "sliding_window_pattern",
                                       "text_config",
                                       "tie_word_embeddings",
                                       "topk_group",
                                       "topk_method",
                                       "use_dynamic_ntk",
                                       "use_logn_attn",
                                       "use_sliding_window",
                                       "v_head_dim",
                                       "vocab_size"};
    /* About training, other programs, or what the family has anyway. */
    static const char *const harmless[] = {"_from_model_config",
                                           "_name_or_path",
                                           "apply_query_key_layer_scaling",
                                           "apply_residual_connection_post_layernorm",
                                           "attention_dropout",
                                           "attention_softmax_in_fp32",
                                           "attn_dropout_prob",
                                           "attn_implementation",
                                           "auto_map",
                                           "aux_loss_alpha",
                                           "bf16",
                                           "bias_dropout_fusion",
                                           "bos_token_id",
                                           "cache_implementation",
                                           "dtype",
                                           "emb_dropout_prob",
                                           "emb_pdrop",
                                           "embd_pdrop",
                                           "ep_size",
                                           "fp16",
                                           "fp32",
                                           "fp32_residual_connection",
                                           "gradient_checkpointing",
                                           "hidden_dropout",
                                           "initializer_range",
                                           "no_bias",
                                           "num_nextn_predict_layers",
                                           "onnx_safe",
                                           "original_rope",
                                           "output_router_logits",
                                           "pad_token_id",
                                           "post_layer_norm",
                                           "pretraining_tp",
                                           "resid_pdrop",
                                           "rmsnorm",
                                           "router_aux_loss_coef",
                                           "scale_attn_weights",
                                           "seq_aux",
                                           "tokenizer_class",
                                           "torch_dtype",
                                           "transformers_version",
                                           "unk_token_id",
                                           "use_cache",
                                           "use_flash_attn",
                                           "use_bfloat16",
                                           "z_loss_weight",
                                           "vision_config",
                                           "image_token_index",
                                           "boi_token_index",
                                           "eoi_token_index",
                                           "mm_tokens_per_image"};
    for (size_t i = 0; i < TM_ARRAY_LEN(read); i++)
        if (strcmp(read[i], key) == 0)
            return true;
    for (size_t i = 0; i < TM_ARRAY_LEN(harmless); i++)
        if (strcmp(harmless[i], key) == 0)
            return true;
    return false;
}

const char *tm_rope_type_name(tm_rope_type type)
{
    static const char *const names[] = {[TM_ROPE_DEFAULT] = "default",
                                        [TM_ROPE_LINEAR] = "linear",
                                        [TM_ROPE_DYNAMIC] = "dynamic NTK",
                                        [TM_ROPE_LONG] = "longrope",
                                        [TM_ROPE_QWEN] = "dynamic NTK, Qwen",
                                        [TM_ROPE_LLAMA3] = "llama3",
                                        [TM_ROPE_YARN] = "yarn"};
    return names[type];
}

const char *tm_act_name(tm_act_kind act)
{
    static const char *const names[] = {
        [TM_ACT_SILU] = "silu", [TM_ACT_GELU_ERF] = "gelu", [TM_ACT_GELU_TANH] = "gelu (tanh)"};
    return names[act];
}

const char *tm_inspect_lacks(const tm_family *f, const tm_backend *b)
{
    const tm_op_table *o = b->ops;
    bool mla = tm_family_has(f, TM_ROLE_KV_A), moe = tm_family_has(f, TM_ROLE_ROUTER);
    bool norm = mla || tm_family_has(f, TM_ROLE_Q_NORM);
    if (norm && !o->head_norm)
        return "norms of heads";
    if (f->head_softcap > 0.0 && !o->bound)
        return "soft caps";
    if (mla && (!o->copy || !(o->features & TM_FEATURE_LATENT_KV)))
        return "latent attention";
    if (moe && (!o->moe_route || !o->moe_experts))
        return "experts";
    return NULL;
}

bool tm_inspect_knows_tensor(const tm_inspect *i, const tm_st_tensor *t)
{
    return tm_load_knows(&i->arch, t->name);
}

/* Bytes of a rank's weights. */
static size_t weight_bytes(const tm_arch *a, const tm_shard *s)
{
    size_t bytes = 0;
    bool done[TM_ROLE_COUNT];
    int layers = a->layers;
    for (int layer = 0; layer < layers; layer++) {
        memset(done, 0, sizeof(done));
        for (int i = 0; i < a->family->row_count; i++) {
            const tm_tensor_row *row = &a->family->rows[i];
            const tm_role_info *info = tm_role_info_get(row->role);
            int rows, cols;
            if (done[row->role] || (!info->of_layer && layer > 0) ||
                !tm_need_met(a, row->need, layer))
                continue;
            done[row->role] = true;
            tm_role_size(a, s, row->role, &rows, &cols);
            bytes += (size_t)rows * (size_t)cols * (info->kind == TM_ROLE_MATRIX ? 2 : 4);
        }
    }
    return bytes;
}

static void fill_splits(tm_inspect *i)
{
    const tm_arch *a = &i->arch;
    size_t arrays = a->mla.kv_rank > 0 ? 1 : 2;
    for (int k = 0; k < TM_INSPECT_SPLITS; k++) {
        tm_inspect_split *p = &i->split[k];
        tm_err err = TM_ERR_INIT;
        tm_shard s;
        p->tp = 1 << k;
        if (tm_shard_make(&s, a, p->tp, 0, &err) != TM_OK) {
            snprintf(p->refused, sizeof(p->refused), "%.159s", err.msg);
            continue;
        }
        p->weight_bytes = weight_bytes(a, &s);
        p->kv_bytes = arrays * (size_t)a->layers * (size_t)s.kv_heads * (size_t)a->head_dim *
                      sizeof(uint16_t);
    }
}

static tm_status read_config(tm_inspect *i, const char *dir, tm_err *err)
{
    TM_TRY(tm_folder_open(&i->folder, dir, &i->arch, err));
    i->config = i->folder.config;
    return tm_stop_ids_read(i->folder.text_dir, i->config, i->arch.vocab, i->stop_ids,
                            (int)TM_ARRAY_LEN(i->stop_ids), &i->stop_count, err);
}

tm_status tm_inspect_open(tm_inspect **out, const char *dir, tm_err *err)
{
    tm_err why = TM_ERR_INIT;
    tm_inspect *i = calloc(1, sizeof(*i));
    if (!i)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "inspect: out of memory");
    tm_status st = read_config(i, dir, err);
    if (st != TM_OK) {
        tm_inspect_close(i);
        return st;
    }
    if (tm_folder_checkpoint(&i->folder, &i->arch, &i->ckpt, &why) != TM_OK ||
        tm_load_check(&i->arch, i->ckpt, &i->parameters, &why) != TM_OK)
        snprintf(i->problem, sizeof(i->problem), "%.511s", why.msg);
    for (size_t k = 0; i->ckpt && k < tm_checkpoint_count(i->ckpt); k++)
        i->file_bytes += tm_checkpoint_at(i->ckpt, k)->bytes;
    fill_splits(i);
    *out = i;
    return TM_OK;
}

void tm_inspect_close(tm_inspect *i)
{
    if (!i)
        return;
    tm_checkpoint_close(i->ckpt);
    tm_folder_close(&i->folder);
    free(i);
}
