/* config.json of both dialects, stop ids, rope frequencies, shards; and every refusal names its key. Bad model
 * folders through tm_model_open: one line that names file, key or tensor. */
#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/file.h"
#include "common/json.h"
#include "engine/model/arch.h"
#include "engine/model/layout.h"
#include "engine/model/model.h"

#define BASE                                                                                       \
    "\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":64,\"num_hidden_layers\":2,"         \
    "\"num_attention_heads\":4,\"intermediate_size\":96,\"vocab_size\":100,"                       \
    "\"max_position_embeddings\":128"

static tm_arch g_arch;

/* Later keys win, so a test overrides the base by adding. */
static tm_status read_arch(const char *base, const char *more, tm_err *err)
{
    char text[4096];
    json_t *root = NULL;
    snprintf(text, sizeof(text), "{%s%s%s}", base, more[0] && base[0] ? "," : "", more);
    assert_int_equal(tm_json_parse(text, strlen(text), &root, err), TM_OK);
    tm_status st = tm_arch_read(&g_arch, root, err);
    json_decref(root);
    return st;
}

static void expect_ok(const char *more)
{
    tm_err err = TM_ERR_INIT;
    if (read_arch(BASE, more, &err) != TM_OK)
        fail_msg("%s: %s", more, err.msg);
}

/* Gemma 3 from 4B on is released with a text_config of five keys: everything else is the class default. */
static void test_released_gemma3(void **state)
{
    (void)state;
    static const char head[] = "\"architectures\":[\"Gemma3ForConditionalGeneration\"],"
                               "\"model_type\":\"gemma3\",\"text_config\":{"
                               "\"model_type\":\"gemma3_text\",\"sliding_window\":1024,"
                               "\"rope_scaling\":{\"factor\":8.0,\"rope_type\":\"linear\"}";
    tm_err err = TM_ERR_INIT;
    if (read_arch(head,
                  "\"hidden_size\":2560,\"intermediate_size\":10240,\"num_hidden_layers\":34}",
                  &err) != TM_OK)
        fail_msg("4B: %s", err.msg);
    assert_true(g_arch.heads == 8 && g_arch.kv_heads == 4 && g_arch.head_dim == 256);
    assert_true(g_arch.vocab == 262208 && g_arch.max_positions == 131072 && g_arch.tie);
    assert_true(g_arch.attn_scale == 1.0f / 16.0f && g_arch.rope.type == TM_ROPE_LINEAR);
    if (read_arch(head,
                  "\"hidden_size\":5376,\"intermediate_size\":21504,\"num_hidden_layers\":62,"
                  "\"num_attention_heads\":32,\"num_key_value_heads\":16,\"head_dim\":128,"
                  "\"query_pre_attn_scalar\":168}",
                  &err) != TM_OK)
        fail_msg("27B: %s", err.msg);
    assert_true(g_arch.heads == 32 && g_arch.kv_heads == 16 && g_arch.head_dim == 128);
}

static void test_defaults(void **state)
{
    (void)state;
    expect_ok("");
    assert_string_equal(g_arch.family->name, "llama");
    assert_int_equal(g_arch.kv_heads, 4);
    assert_int_equal(g_arch.head_dim, 16);
    assert_true(g_arch.rope.base == 10000.0 && g_arch.rope.dim == 16);
    assert_false(g_arch.tie || g_arch.qkv_bias || g_arch.o_bias || g_arch.mlp_bias);
    assert_true(fabsf(g_arch.eps - 1e-6f) < 1e-12f);
    assert_int_equal(g_arch.layer[0].window, 0);
    expect_ok("\"head_dim\":null,\"num_key_value_heads\":null,\"rope_scaling\":null");
    assert_int_equal(g_arch.head_dim, 16);
    expect_ok("\"head_dim\":32,\"num_key_value_heads\":2,\"tie_word_embeddings\":true");
    assert_int_equal(g_arch.head_dim, 32);
    assert_int_equal(g_arch.kv_heads, 2);
    assert_true(g_arch.tie);
    assert_true(fabsf(g_arch.attn_scale - 1.0f / sqrtf(32.0f)) < 1e-7f);
}

/* The same rope in the old and the new dialect. */
static void test_dialects(void **state)
{
    (void)state;
    expect_ok("\"rope_theta\":5e5,\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8.0,"
              "\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"
              "\"original_max_position_embeddings\":64}");
    tm_rope old = g_arch.rope;
    expect_ok("\"rope_parameters\":{\"rope_theta\":5e5,\"rope_type\":\"llama3\",\"factor\":8.0,"
              "\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"
              "\"original_max_position_embeddings\":64}");
    assert_memory_equal(&old, &g_arch.rope, sizeof(old));
    assert_int_equal(old.type, TM_ROPE_LLAMA3);
    assert_true(old.original == 64 && old.base == 5e5);
    expect_ok("\"rope_scaling\":{\"type\":\"linear\",\"factor\":4}");
    assert_int_equal(g_arch.rope.type, TM_ROPE_LINEAR);
    expect_ok("\"rope_parameters\":{\"rope_theta\":1e6}");
    assert_int_equal(g_arch.rope.type, TM_ROPE_DEFAULT);
    assert_true(g_arch.rope.base == 1e6);
}

static void test_biases_windows(void **state)
{
    (void)state;
    expect_ok("\"architectures\":[\"Qwen2ForCausalLM\"],\"sliding_window\":16");
    assert_true(g_arch.qkv_bias && !g_arch.o_bias);
    assert_int_equal(g_arch.layer[1].window, 0);
    expect_ok("\"architectures\":[\"Qwen2ForCausalLM\"],\"sliding_window\":16,"
              "\"use_sliding_window\":true,\"max_window_layers\":1");
    assert_int_equal(g_arch.layer[0].window, 0);
    assert_int_equal(g_arch.layer[1].window, 16);
    expect_ok("\"architectures\":[\"MistralForCausalLM\"],\"sliding_window\":16");
    assert_int_equal(g_arch.layer[0].window, 16);
    expect_ok("\"architectures\":[\"MistralForCausalLM\"],\"sliding_window\":null");
    assert_int_equal(g_arch.layer[0].window, 0);
    expect_ok("\"architectures\":[\"InternLMForCausalLM\"]");
    assert_true(g_arch.qkv_bias && g_arch.o_bias && !g_arch.mlp_bias);
    expect_ok("\"attention_bias\":true,\"mlp_bias\":true");
    assert_true(g_arch.qkv_bias && g_arch.o_bias && g_arch.mlp_bias);
}

#define ARCH(name) "\"architectures\":[\"" name "\"]"

/* What each family reads out of the same few keys. */
static void test_families(void **state)
{
    (void)state;
    expect_ok(ARCH("Gemma2ForCausalLM") ",\"num_hidden_layers\":3");
    assert_true(g_arch.tie && g_arch.norm_add_one && g_arch.act == TM_ACT_GELU_TANH);
    assert_true(g_arch.attn_softcap == 50.0f && g_arch.head_softcap == 30.0f);
    assert_true(g_arch.embed_scale == 8.0f && g_arch.attn_scale == 1.0f / 16.0f);
    assert_true(g_arch.layer[0].window == 4096 && g_arch.layer[1].window == 0);
    expect_ok(ARCH("Gemma2ForCausalLM") ",\"attn_logit_softcapping\":null");
    assert_true(g_arch.attn_softcap == 0.0f && g_arch.head_softcap == 30.0f);
    expect_ok(ARCH("Gemma3ForCausalLM") ",\"num_hidden_layers\":6,\"num_attention_heads\":8");
    assert_true(g_arch.kv_heads == 4 && g_arch.head_dim == 256 && g_arch.rope.base == 1e6);
    assert_true(g_arch.layer[4].local_rope && g_arch.layer[4].window == 4096);
    assert_true(!g_arch.layer[5].local_rope && g_arch.layer[5].window == 0);
    expect_ok(
        ARCH("Gemma3ForCausalLM") ",\"num_attention_heads\":4,\"rope_parameters\":{"
                                  "\"full_attention\":{\"rope_type\":\"linear\",\"factor\":8,"
                                  "\"rope_theta\":2e6},"
                                  "\"sliding_attention\":{\"rope_type\":\"default\",\"rope_theta\":"
                                  "3e4}},"
                                  "\"layer_types\":[\"full_attention\",\"sliding_attention\"]");
    assert_true(g_arch.rope.type == TM_ROPE_LINEAR && g_arch.rope.base == 2e6);
    assert_true(g_arch.rope_local.type == TM_ROPE_DEFAULT && g_arch.rope_local.base == 3e4);
    assert_true(!g_arch.layer[0].local_rope && g_arch.layer[1].local_rope);
    expect_ok("\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4,"
              "\"original_max_position_embeddings\":128}");
    assert_true(g_arch.max_positions == 512 && g_arch.context_max == 512);
    expect_ok(ARCH("RWForCausalLM") ",\"model_type\":\"RefinedWeb\",\"n_head_kv\":2");
    assert_true(g_arch.block == TM_BLOCK_PARALLEL2 && g_arch.kv_heads == 2 && g_arch.tie);
    expect_ok(ARCH("FalconForCausalLM"));
    assert_true(g_arch.block == TM_BLOCK_PARALLEL1 && g_arch.kv_heads == 1 && !g_arch.gated);
    expect_ok(ARCH("FalconForCausalLM") ",\"new_decoder_architecture\":true,\"num_kv_heads\":2");
    assert_true(g_arch.block == TM_BLOCK_PARALLEL2 && g_arch.kv_heads == 2);
    expect_ok(ARCH("BaichuanForCausalLM") ",\"vocab_size\":125696");
    assert_true(g_arch.head_norm && !g_arch.alibi);
    expect_ok(
        ARCH("BaichuanForCausalLM") ",\"max_position_embeddings\":null,\"model_max_length\":4096");
    assert_true(g_arch.alibi && g_arch.rope.dim == 0 && !g_arch.head_norm);
    expect_ok(ARCH("QWenLMHeadModel") ",\"seq_length\":32,\"use_dynamic_ntk\":true,"
                                      "\"use_logn_attn\":true");
    assert_true(g_arch.ffn == 48 && g_arch.logn_len == 32 && g_arch.rope.type == TM_ROPE_QWEN);
    assert_int_equal(g_arch.max_positions, 128);
}

#define MLA ",\"kv_lora_rank\":32,\"qk_nope_head_dim\":16,\"qk_rope_head_dim\":8,\"v_head_dim\":16"
#define MOE ",\"n_routed_experts\":8,\"num_experts_per_tok\":2,\"moe_intermediate_size\":24"

static void test_experts(void **state)
{
    (void)state;
    expect_ok(ARCH("MixtralForCausalLM") ",\"num_local_experts\":8,\"num_experts_per_tok\":2");
    assert_true(g_arch.moe.ffn == 96 && g_arch.moe.normalise && g_arch.layer[0].moe);
    expect_ok(ARCH("Qwen3MoeForCausalLM") MOE ",\"num_hidden_layers\":4,\"decoder_sparse_step\":2,"
                                              "\"mlp_only_layers\":[3]");
    assert_true(!g_arch.layer[0].moe && g_arch.layer[1].moe && !g_arch.layer[3].moe);
    expect_ok(ARCH("DeepseekForCausalLM") MOE
              ",\"first_k_dense_replace\":1,\"n_shared_experts\":2");
    assert_true(!g_arch.layer[0].moe && g_arch.layer[1].moe && g_arch.moe.shared == 48);
    expect_ok(ARCH("DeepseekV3ForCausalLM") MOE MLA ",\"n_group\":4,\"topk_group\":2");
    assert_true(g_arch.kv_heads == 1 && g_arch.head_dim == 40 && g_arch.v_dim == 16);
    assert_true(g_arch.moe.choice_bias && g_arch.moe.score == TM_MOE_SIGMOID);
    assert_true(g_arch.moe.group_score == TM_GROUP_TOP2 && g_arch.moe.groups == 4);
    expect_ok(ARCH("DeepseekV2ForCausalLM") MOE MLA ",\"topk_method\":\"greedy\",\"n_group\":4");
    assert_true(g_arch.moe.groups == 1 && !g_arch.moe.choice_bias);
}

/* Which lengths have frequencies of their own. */
static void test_rope_lengths(void **state)
{
    (void)state;
    float a[8], b[8], m;
    expect_ok("\"rope_scaling\":{\"type\":\"dynamic\",\"factor\":2.0}");
    assert_int_equal(g_arch.max_positions, 512);
    assert_int_equal(g_arch.context_max, 1 << 24);
    assert_int_equal(tm_rope_class(&g_arch.rope, 128), 0);
    assert_int_equal(tm_rope_class(&g_arch.rope, 200), 200);
    tm_rope_freqs_at(&g_arch.rope, 256, a, &m);
    double base = 10000.0 * pow(3.0, 16.0 / 14.0); /* 2 * 256 / 128 - 1 */
    assert_true(fabs((double)a[7] / pow(base, -14.0 / 16.0) - 1.0) < 1e-6);
    expect_ok(ARCH("QWenLMHeadModel") ",\"seq_length\":32,\"use_dynamic_ntk\":true");
    assert_int_equal(tm_rope_class(&g_arch.rope, 33), tm_rope_class(&g_arch.rope, 64));
    assert_int_equal(tm_rope_class(&g_arch.rope, 65), 128);
    tm_rope_freqs_at(&g_arch.rope, 100, a, &m);
    tm_rope_freqs_at(&g_arch.rope, tm_rope_class(&g_arch.rope, 100), b, &m);
    assert_memory_equal(a, b, sizeof(a));
    expect_ok("\"original_max_position_embeddings\":64,\"rope_scaling\":{\"type\":\"su\","
              "\"short_factor\":[1,1,1,1,1,1,1,1],\"long_factor\":[2,2,2,2,2,2,2,2]}");
    assert_int_equal(tm_rope_class(&g_arch.rope, 64), 0);
    assert_int_equal(tm_rope_class(&g_arch.rope, 128), 65);
    tm_rope_freqs_at(&g_arch.rope, 0, a, &m);
    tm_rope_freqs_at(&g_arch.rope, 65, b, &m);
    assert_true(a[3] == 2 * b[3] && fabsf(m - sqrtf(1.0f + logf(2.0f) / logf(64.0f))) < 1e-6f);
}

static void test_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *more, *says;
    } cases[] = {
        {"\"architectures\":[\"NoSuchForCausalLM\"]", "the closest known ones are "},
        {"\"architectures\":[\"Qwen3MoEForCausalLM\"]", "are Qwen3MoeForCausalLM, Qwen"},
        {"\"hidden_size\":null", "hidden_size: this key is missing"},
        {"\"num_hidden_layers\":null", "num_hidden_layers: this key is missing"},
        {"\"num_attention_heads\":null", "num_attention_heads: this key is missing"},
        {"\"intermediate_size\":null", "intermediate_size: this key is missing"},
        {"\"vocab_size\":null", "vocab_size: this key is missing"},
        {"\"max_position_embeddings\":null", "max_position_embeddings: this key is missing"},
        {"\"hidden_size\":0", "hidden_size: expected an integer from 1"},
        {"\"hidden_size\":-64", "hidden_size: expected an integer from 1"},
        {"\"hidden_size\":64.5", "hidden_size: expected an integer from 1"},
        {"\"hidden_size\":\"64\"", "hidden_size: expected an integer from 1"},
        {"\"num_attention_heads\":1000000000000", "num_attention_heads: expected"},
        {"\"num_attention_heads\":5", "hidden_size 64 is not divisible"},
        {"\"num_key_value_heads\":3", "num_key_value_heads 3 does not divide"},
        {"\"num_hidden_layers\":100000", "num_hidden_layers: expected"},
        {"\"head_dim\":7", "head_dim 7 is odd"},
        {"\"rope_theta\":0", "rope_theta: expected a number"},
        {"\"rope_theta\":\"big\"", "rope_theta: expected a number"},
        {"\"rope_scaling\":[]", "rope_scaling: expected an object"},
        {"\"rope_scaling\":{\"type\":\"spiral\",\"factor\":2}", "'spiral' is not supported"},
        {"\"rope_scaling\":{\"type\":\"linear\"}", "rope_scaling.factor: this key is missing"},
        {"\"rope_scaling\":{\"factor\":4}", "rope_scaling.rope_type: this key is missing"},
        {"\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":1e4},"
         "\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4}",
         "rope_scaling: rope_parameters is there, too"},
        {"\"rope_scaling\":{\"type\":\"linear\",\"factor\":0}", "factor: expected a number"},
        {"\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,"
         "\"high_freq_factor\":1}",
         "not above low_freq_factor"},
        {"\"rms_norm_eps\":-1", "rms_norm_eps: expected a number"},
        {"\"hidden_act\":\"spline\"", "activation 'spline' is not supported"},
        {"\"tie_word_embeddings\":1", "tie_word_embeddings: expected true or false"},
        {"\"attention_bias\":\"no\"", "attention_bias: expected true or false"},
        {ARCH("DeepseekV3ForCausalLM") MOE, "kv_lora_rank: this key is missing"},
        {ARCH("DeepseekV3ForCausalLM") MOE ",\"kv_lora_rank\":32", "qk_nope_head_dim"},
        {ARCH("DeepseekV3ForCausalLM") MOE MLA ",\"n_group\":3", "n_group 3, topk_group 1"},
        {ARCH("DeepseekV2ForCausalLM") MOE MLA ",\"topk_method\":\"dice\"", "topk_method 'dice'"},
        {ARCH("DeepseekForCausalLM") MOE ",\"scoring_func\":\"x\"", "scoring_func 'x'"},
        {ARCH("MixtralForCausalLM") ",\"num_local_experts\":8", "num_experts_per_tok 0"},
        {ARCH("MixtralForCausalLM") MOE ",\"num_experts_per_tok\":9", "num_experts_per_tok 9"},
        {ARCH("MixtralForCausalLM"), "num_experts: layer 0 has none"},
        {"\"num_experts\":4,\"num_experts_per_tok\":2",
         "num_experts 4: LlamaForCausalLM has no experts"},
        {"\"kv_lora_rank\":32", "kv_lora_rank 32: LlamaForCausalLM has no latent attention"},
        {"\"head_dim\":4098", "head_dim"},
        {"\"hidden_size\":65536,\"num_attention_heads\":1",
         "head_dim 65536: expected at most 4096"},
        {ARCH("ChatGLMModel"), "multi_query_attention false"},
        {"\"rope_scaling\":{\"type\":\"longrope\",\"long_factor\":[1]}", "short_factor: expected"},
        {"\"layer_types\":[\"x\"],\"sliding_window\":4," ARCH("MistralForCausalLM"),
         "layer_types: expected an array of 2"},
        {"\"quantization_config\":{\"quant_method\":\"awq\"}", "quant_method 'awq'"},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(cases); i++) {
        tm_err err = TM_ERR_INIT;
        tm_status st = read_arch(BASE, cases[i].more, &err);
        if (st == TM_OK || !strstr(err.msg, cases[i].says))
            fail_msg("%s: status %s, message '%s', expected '%s'", cases[i].more,
                     tm_status_name(st), err.msg, cases[i].says);
    }
    tm_err err = TM_ERR_INIT;
    assert_int_equal(read_arch("", "", &err), TM_STATUS_CONFIG);
    assert_non_null(strstr(err.msg, "architectures"));
}

static void test_rope(void **state)
{
    (void)state;
    float f[8], m = 0;
    tm_rope r = {.type = TM_ROPE_DEFAULT, .dim = 16, .base = 10000.0, .factor = 1, .original = 64};
    tm_rope_freqs(&r, f, &m);
    assert_true(f[0] == 1.0f && fabsf(f[4] - 0.01f) < 1e-8f && m == 1.0f);
    r.type = TM_ROPE_LINEAR;
    r.factor = 4;
    tm_rope_freqs(&r, f, &m);
    assert_true(f[0] == 0.25f);
    r = (tm_rope){.type = TM_ROPE_LLAMA3,
                  .dim = 16,
                  .base = 10000.0,
                  .factor = 8,
                  .original = 64,
                  .low_freq_factor = 1,
                  .high_freq_factor = 4};
    tm_rope_freqs(&r, f, &m);
    assert_true(f[0] == 1.0f);                                         /* short waves stay */
    assert_true(fabsf(f[7] * 8.0f - powf(10000.0f, -0.875f)) < 1e-9f); /* long ones are stretched */
    r = (tm_rope){.type = TM_ROPE_YARN,
                  .dim = 16,
                  .base = 10000.0,
                  .factor = 4,
                  .original = 64,
                  .beta_fast = 32,
                  .beta_slow = 1,
                  .truncate = true};
    tm_rope_freqs(&r, f, &m);
    assert_true(fabsf(m - (0.1f * logf(4.0f) + 1.0f)) < 1e-6f);
    assert_true(f[0] == 1.0f && fabsf(f[7] * 4.0f - powf(10000.0f, -0.875f)) < 1e-9f);
}

static tm_status keep_run(void *arg, tm_row_run run)
{
    *(tm_row_run *)arg = run;
    return TM_OK;
}

/* A vocabulary of 10 among 8 ranks: 2 each, and nothing but padding for the last three. */
static void test_tiny_vocabulary(void **state)
{
    (void)state;
    static const tm_tensor_row row = {.role = TM_ROLE_EMBED, .part = TM_PART_WHOLE};
    tm_err err = TM_ERR_INIT;
    expect_ok("\"vocab_size\":10,\"num_attention_heads\":8,\"num_key_value_heads\":8");
    for (int rank = 0; rank < 8; rank++) {
        tm_shard s;
        tm_row_run run = {-1, -1, -1, true};
        assert_int_equal(tm_shard_make(&s, &g_arch, 8, rank, &err), TM_OK);
        assert_int_equal(tm_tensor_runs(&g_arch, &s, &row, 0, keep_run, &run), TM_OK);
        assert_int_equal(run.src, TM_MIN(2 * rank, 10));
        assert_int_equal(run.dst, 0);
        assert_int_equal(run.n, rank < 5 ? 2 : 0);
    }
}

static void test_shards(void **state)
{
    (void)state;
    tm_shard s;
    tm_err err = TM_ERR_INIT;
    expect_ok("\"num_key_value_heads\":2,\"vocab_size\":101");
    assert_int_equal(tm_shard_make(&s, &g_arch, 4, 3, &err), TM_OK);
    assert_int_equal(s.heads, 1);
    assert_int_equal(s.kv_heads, 1);
    assert_int_equal(s.kv0, 1); /* heads 2 and 3 use key head 1 */
    assert_int_equal(s.vocab, 26);
    assert_int_equal(s.vocab0, 78);
    assert_int_equal(tm_shard_make(&s, &g_arch, 3, 0, &err), TM_STATUS_CONFIG);
    assert_non_null(strstr(err.msg, "num_attention_heads 4 is not divisible by tp 3"));
    expect_ok("\"intermediate_size\":97");
    assert_int_equal(tm_shard_make(&s, &g_arch, 2, 0, &err), TM_STATUS_CONFIG);
    assert_non_null(strstr(err.msg, "intermediate_size 97 is not divisible by tp 2"));
    expect_ok("\"num_attention_heads\":24,\"num_key_value_heads\":3,\"hidden_size\":48");
    assert_int_equal(tm_shard_make(&s, &g_arch, 2, 0, &err), TM_STATUS_CONFIG);
    assert_non_null(strstr(err.msg, "num_key_value_heads 3 and tp 2"));
}

/* ---- folders ---- */

static char g_dir[64];

static void write_bytes(const char *name, const void *data, size_t len)
{
    char path[512];
    assert_true(tm_path_join(path, sizeof(path), g_dir, name));
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, len, f), len);
    assert_int_equal(fclose(f), 0);
}

static void write_text(const char *name, const char *text)
{
    write_bytes(name, text, strlen(text));
}

static void clear_dir(void)
{
    DIR *d = opendir(g_dir);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        char path[512];
        if (e->d_name[0] != '.' && tm_path_join(path, sizeof(path), g_dir, e->d_name))
            unlink(path);
    }
    closedir(d);
}

static void test_stop_ids(void **state)
{
    (void)state;
    int32_t ids[4];
    int n = 0;
    tm_err err = TM_ERR_INIT;
    json_t *config = json_pack("{s:[i,i]}", "eos_token_id", 9, 2);
    assert_non_null(config);
    clear_dir();
    assert_int_equal(tm_stop_ids_read(g_dir, config, 100, ids, 4, &n, &err), TM_OK);
    assert_int_equal(n, 2);
    write_text("generation_config.json", "{\"eos_token_id\":[2,50]}");
    write_text("tokenizer_config.json",
               "{\"eos_token\":{\"content\":\"<end>\"},"
               "\"added_tokens_decoder\":{\"7\":{\"content\":\"<end>\"}}}");
    assert_int_equal(tm_stop_ids_read(g_dir, config, 100, ids, 4, &n, &err), TM_OK);
    static const int32_t want[] = {2, 7, 9, 50};
    assert_int_equal(n, 4);
    assert_memory_equal(ids, want, sizeof(want));
    /* the text's id from tokenizer.json */
    write_text("tokenizer_config.json", "{\"eos_token\":\"<fin>\"}");
    write_text("tokenizer.json", "{\"added_tokens\":[{\"id\":8,\"content\":\"<fin>\"}]}");
    assert_int_equal(tm_stop_ids_read(g_dir, config, 100, ids, 4, &n, &err), TM_OK);
    assert_int_equal(ids[1], 8);
    assert_int_equal(tm_stop_ids_read(g_dir, config, 100, ids, 3, &n, &err), TM_STATUS_CONFIG);
    assert_int_equal(tm_stop_ids_read(g_dir, config, 40, ids, 4, &n, &err), TM_STATUS_CONFIG);
    assert_non_null(strstr(err.msg, "50 is outside the vocabulary"));
    write_text("generation_config.json", "{\"eos_token_id\":\"x\"}");
    assert_int_equal(tm_stop_ids_read(g_dir, config, 100, ids, 4, &n, &err), TM_STATUS_CONFIG);
    assert_non_null(strstr(err.msg, "generation_config.json: eos_token_id"));
    json_decref(config);
}

static tm_status open_model(const char *dir, const char *dtype, tm_err *err)
{
    tm_comm *comm = NULL;
    tm_model *m = NULL;
    tm_model_opts o = {.dir = dir,
                       .dtype = dtype,
                       .backend = "cpu",
                       .block_tokens = 16,
                       .max_step_tokens = 16,
                       .max_seqs = 2};
    assert_int_equal(tm_comm_create(&comm, 1, NULL, err), TM_OK);
    tm_status st = tm_model_open(&m, &o, comm, err);
    tm_model_close(m);
    tm_comm_destroy(comm);
    return st;
}

static void expect_refused(const char *says)
{
    tm_err err = TM_ERR_INIT;
    tm_status st = open_model(g_dir, "auto", &err);
    if (st == TM_OK || !strstr(err.msg, says) || strchr(err.msg, '\n'))
        fail_msg("status %s, message '%s', expected '%s'", tm_status_name(st), err.msg, says);
}

/* A folder with one bf16 file of the tensors of a one-layer model; `skip` is left out, `odd` gets one row
 * too many. */
static void write_model(const char *skip, const char *odd)
{
    static const struct {
        const char *name;
        int rows, cols;
    } tensors[] = {
        {"model.embed_tokens.weight", 100, 64},
        {"lm_head.weight", 100, 64},
        {"model.norm.weight", 64, 0},
        {"model.layers.0.input_layernorm.weight", 64, 0},
        {"model.layers.0.self_attn.q_proj.weight", 64, 64},
        {"model.layers.0.self_attn.k_proj.weight", 64, 64},
        {"model.layers.0.self_attn.v_proj.weight", 64, 64},
        {"model.layers.0.self_attn.o_proj.weight", 64, 64},
        {"model.layers.0.post_attention_layernorm.weight", 64, 0},
        {"model.layers.0.mlp.gate_proj.weight", 96, 64},
        {"model.layers.0.mlp.up_proj.weight", 96, 64},
        {"model.layers.0.mlp.down_proj.weight", 64, 96},
    };
    tm_buf h, f;
    size_t at = 0;
    tm_buf_init(&h, 0);
    tm_buf_init(&f, 0);
    for (size_t i = 0; i < TM_ARRAY_LEN(tensors); i++) {
        int rows = tensors[i].rows, cols = tensors[i].cols;
        if (skip && strcmp(skip, tensors[i].name) == 0)
            continue;
        if (odd && strcmp(odd, tensors[i].name) == 0)
            rows++;
        size_t bytes = (size_t)rows * (size_t)(cols ? cols : 1) * 2;
        tm_buf_printf(&h, "%s\"%s\":{\"dtype\":\"BF16\",\"shape\":[%d", h.len ? "," : "{",
                      tensors[i].name, rows);
        if (cols)
            tm_buf_printf(&h, ",%d", cols);
        tm_buf_printf(&h, "],\"data_offsets\":[%zu,%zu]}", at, at + bytes);
        at += bytes;
    }
    tm_buf_puts(&h, "}");
    for (int i = 0; i < 8; i++)
        tm_buf_putc(&f, (char)((uint64_t)h.len >> (8 * i)));
    tm_buf_append(&f, h.data, h.len);
    for (size_t i = 0; i < at; i++)
        tm_buf_putc(&f, 0);
    write_bytes("model.safetensors", f.data, f.len);
    tm_buf_deinit(&f);
    tm_buf_deinit(&h);
}

static void test_folders(void **state)
{
    (void)state;
    tm_err err = TM_ERR_INIT;
    assert_int_equal(open_model("/no/such/folder", "auto", &err), TM_STATUS_NOT_FOUND);
    assert_non_null(strstr(err.msg, "/no/such/folder"));
    assert_int_equal(open_model("/proc/version", "auto", &err), TM_STATUS_NOT_FOUND);
    assert_non_null(strstr(err.msg, "/proc/version is a file"));
    clear_dir();
    expect_refused("no config.json");
    char snapshots[512];
    assert_true(tm_path_join(snapshots, sizeof(snapshots), g_dir, "snapshots"));
    assert_int_equal(mkdir(snapshots, 0700), 0);
    expect_refused("the model is in a folder under snapshots");
    assert_int_equal(rmdir(snapshots), 0);
    write_text("config.json", "{");
    expect_refused("config.json");
    write_text("config.json", "{" BASE ",\"num_hidden_layers\":1,\"num_attention_heads\":null}");
    expect_refused("config.json: num_attention_heads: this key is missing");
    write_text("config.json", "{" BASE ",\"num_hidden_layers\":1}");
    expect_refused("neither model.safetensors nor");
    write_text("weights.gguf", "GGUF");
    expect_refused("weights.gguf: GGUF files are not read");
    write_text("pytorch_model.bin", "x");
    expect_refused("pytorch_model.bin is a pickle, which can run code when it is opened");
    expect_refused("convert it to safetensors");
    write_model(NULL, NULL);
    if (open_model(g_dir, "auto", &err) != TM_OK)
        fail_msg("%s", err.msg);
    assert_int_equal(open_model(g_dir, "float32", &err), TM_OK);
    assert_int_equal(open_model(g_dir, "int3", &err), TM_STATUS_CONFIG);
    assert_non_null(strstr(err.msg, "'int3'"));
    write_model("model.layers.0.mlp.up_proj.weight", NULL);
    expect_refused("tensor model.layers.0.mlp.up_proj.weight is missing");
    write_text("config.json", "{" BASE ",\"num_hidden_layers\":2}");
    expect_refused("tensor model.layers.1.input_layernorm.weight is missing (and 9 more)");
    write_text("config.json", "{" BASE ",\"num_hidden_layers\":1}");
    write_model(NULL, "model.layers.0.self_attn.k_proj.weight");
    expect_refused("model.safetensors: tensor model.layers.0.self_attn.k_proj.weight is [65, 64], "
                   "expected [64, 64]");
    write_model(NULL, "model.norm.weight");
    expect_refused("tensor model.norm.weight is [65], expected [64]");
    write_model("model.embed_tokens.weight", NULL);
    expect_refused("tensor model.embed_tokens.weight is missing");
    write_model("lm_head.weight", NULL); /* then the embedding is the head */
    assert_int_equal(open_model(g_dir, "auto", &err), TM_OK);
    write_text("config.json", "{" BASE ",\"num_hidden_layers\":1,\"tie_word_embeddings\":false}");
    expect_refused("tensor lm_head.weight is missing, and the config does not tie it");
    char path[512];
    assert_true(tm_path_join(path, sizeof(path), g_dir, "model.safetensors"));
    assert_int_equal(truncate(path, 50000), 0);
    expect_refused("truncated");
    clear_dir();
}

int main(void)
{
    snprintf(g_dir, sizeof(g_dir), "/tmp/tm-config-XXXXXX");
    if (!mkdtemp(g_dir))
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),        cmocka_unit_test(test_dialects),
        cmocka_unit_test(test_biases_windows),  cmocka_unit_test(test_families),
        cmocka_unit_test(test_experts),         cmocka_unit_test(test_rope_lengths),
        cmocka_unit_test(test_refusals),        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_shards),          cmocka_unit_test(test_stop_ids),
        cmocka_unit_test(test_tiny_vocabulary), cmocka_unit_test(test_folders),
        cmocka_unit_test(test_released_gemma3),
    };
    int rc = cmocka_run_group_tests(tests, NULL, NULL);
    rmdir(g_dir);
    return rc;
}
