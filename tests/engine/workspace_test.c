/* The config of a workspace in both notations: what is understood, and every refusal with its line or key. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "common/check.h"
#include "engine/weights/workspace_config.h"
#include "engine/weights/workspace_text.h"

static json_t *parse(const char *text, bool yaml)
{
    json_t *root = NULL;
    tm_err err = TM_ERR_INIT;
    if (tm_ws_text_parse(&root, text, strlen(text), yaml, &err) != TM_OK)
        fail_msg("%s", err.msg);
    return root;
}

static void expect(json_t *root, const char *key, const char *value)
{
    const char *got = json_string_value(json_object_get(root, key));
    if (!got)
        fail_msg("%s is not there", key);
    assert_string_equal(got, value);
}

static void refuse(const char *text, bool yaml, const char *words)
{
    json_t *root = NULL;
    tm_err err = TM_ERR_INIT;
    assert_int_equal(tm_ws_text_parse(&root, text, strlen(text), yaml, &err), TM_STATUS_DATA);
    if (!strstr(err.msg, words))
        fail_msg("'%s' does not say '%s'", err.msg, words);
}

static void test_ini(void **state)
{
    (void)state;
    json_t *r = parse("[llama]\n# comment\n; another\nmodel_name = a b = c\nHead_Num: 4\r\n\n"
                      "empty =\nrope_theta=1e6   \n",
                      false);
    expect(r, "model_name", "a b = c");
    expect(r, "head_num", "4");
    expect(r, "empty", "");
    expect(r, "rope_theta", "1e6");
    json_decref(r);
    refuse("[llama]\na = 1\na = 2\n", false, "line 3: a is there twice");
    refuse("[llama\n", false, "line 1: a section's name is not closed");
    refuse("a = 1\n  more\n", false, "line 2: values of several lines");
    refuse("nothing\n", false, "line 1: expected 'key = value'");
    refuse("= 1\n", false, "line 1: expected 'key = value'");
    refuse("a = \xff\n", false, "line 1: the value is not valid UTF-8");
}

static void test_yaml(void **state)
{
    (void)state;
    json_t *r =
        parse("---\nmodel_config:\n  name: 'it''s # text' # comment\n  other: \"q\\\"\"\n"
              "  none: null\n  list:\n  - 1\n  - 2\n  deep:\n    - 3\n  flow: [4, 5]\n"
              "  empty: []\n  left:\nattention_config:\n    rope_param:\n        base: 1.0\n"
              "        type: ''\n    after: x\n",
              true);
    expect(r, "name", "it's # text");
    expect(r, "other", "q\"");
    expect(r, "none", "null");
    expect(r, "rope_param.base", "1.0");
    expect(r, "rope_param.type", "");
    expect(r, "after", "x");
    assert_int_equal(json_array_size(json_object_get(r, "list")), 2);
    assert_int_equal(json_array_size(json_object_get(r, "deep")), 1);
    assert_int_equal(json_array_size(json_object_get(r, "flow")), 2);
    assert_true(json_is_array(json_object_get(r, "empty")));
    assert_null(json_object_get(r, "left"));
    json_decref(r);
    refuse("a:\n  b: &x 1\n", true, "line 2: values that begin with '&'");
    refuse("a: 'b\n", true, "line 1: a quote is not closed");
    refuse("a: [1\n", true, "line 1: a list is not closed");
    refuse("- 1\n", true, "line 1: a list item without a key");
    refuse("a: 1\n   b: 2\n", true, "line 2: this indentation fits no map");
    refuse("a:\n\tb: 1\n", true, "line 2: a tab");
    refuse("a:b\n", true, "line 1: expected 'key: value'");
    refuse("a:\n b:\n  c:\n   d:\n    e: 1\n", true, "line 5: nested deeper");
}

#define INI                                                                                        \
    "[llama]\nhead_num = 4\nsize_per_head = 8\nnum_layer = 2\nvocab_size = 50\ninter_size = 24\n"  \
    "norm_eps = 1e-06\n"
#define YAML                                                                                       \
    "model_config:\n  head_num: 4\n  size_per_head: 8\n  num_layer: 2\n  vocab_size: 50\n"         \
    "  norm_eps: 1.0e-06\n  hidden_units: 40\n  weight_type: bfloat16\n"

static void read_config(tm_ws_config *c, const char *text)
{
    tm_err err = TM_ERR_INIT;
    if (tm_ws_config_parse(c, text, strlen(text), text[0] != '[', &err) != TM_OK)
        fail_msg("%s", err.msg);
}

static void test_numbers(void **state)
{
    (void)state;
    static tm_ws_config c;
    read_config(&c,
                INI "weight_type = fp16\ntensor_para_size = 2\nattn_bias = 1\nrope_theta = 5e5\n"
                    "rope_scaling_factor = 2.0\nsession_len = 2056\nend_id = 2\n");
    assert_int_equal(c.hidden, 32);
    assert_int_equal(c.kv_heads, 4);
    assert_int_equal(c.ffn[1], 24);
    assert_int_equal(c.dtype, TM_DTYPE_F16);
    assert_int_equal(c.head, TM_WS_HEAD_ROWS);
    assert_int_equal(c.start_id, -1);
    assert_int_equal(c.end_id, 2);
    assert_true(c.attn_bias && c.tp == 2 && c.rope_base == 5e5 && c.rope_factor == 2.0);
    read_config(&c,
                YAML "  inter_size: [24, 48]\n  expert_num: []\n  attn_tp_size: 4\n"
                     "attention_config:\n  rope_param:\n    base: 1000000.0\n    factor: null\n");
    assert_int_equal(c.hidden, 40);
    assert_int_equal(c.ffn[1], 48);
    assert_int_equal(c.tp, 4);
    assert_int_equal(c.head, TM_WS_HEAD_ROWS);
    assert_true(c.rope_base == 1e6 && c.rope_factor == 0);
    read_config(&c, YAML "  inter_size: 24\n  tokenizer_size: 50\n");
    assert_int_equal(c.head, TM_WS_HEAD_COLUMNS);
    read_config(&c, YAML "  inter_size: 24\n  output_layout: columns\n");
    assert_int_equal(c.head, TM_WS_HEAD_COLUMNS);
}

static void test_wrong_numbers(void **state)
{
    (void)state;
    static const struct {
        const char *text, *words;
    } wrong[] = {
        {INI, "config.ini: weight_type: this key is missing"},
        {INI "weight_type = int4\n", "config.ini: weight_type 'int4'"},
        {INI "weight_type = fp16\nkv_head_num = 3\n", "kv_head_num 3 does not divide head_num 4"},
        {INI "weight_type = fp16\nkv_head_num = 0x2\n", "kv_head_num: expected a number"},
        {INI "weight_type = fp16\nkv_head_num = 1.5\n", "kv_head_num: expected an integer"},
        {INI "weight_type = fp16\nkv_head_num = nan\n", "kv_head_num: expected a number"},
        {INI "weight_type = fp16\nrope_theta = 1e999\n", "rope_theta: expected a number"},
        {INI "weight_type = fp16\nattn_bias = maybe\n", "attn_bias: expected 0 or 1"},
        {INI "weight_type = fp16\nrotary_embedding = 16\n", "rotary_embedding 16 is more than"},
        {"[llama]\nweight_type = fp16\n", "head_num: this key is missing"},
        {YAML "  inter_size: [24]\n", "inter_size: none for layer 1"},
        {YAML "  inter_size: [24, x]\n", "inter_size: expected a number"},
        {YAML "  inter_size: 24\n  kv_head_num: [1]\n", "kv_head_num: expected one value"},
        {YAML "  inter_size: 24\n  output_layout: sideways\n", "output_layout: expected rows"},
    };
    static tm_ws_config c;
    for (size_t i = 0; i < TM_ARRAY_LEN(wrong); i++) {
        tm_err err = TM_ERR_INIT;
        const char *text = wrong[i].text;
        assert_int_not_equal(tm_ws_config_parse(&c, text, strlen(text), text[0] != '[', &err),
                             TM_OK);
        if (!strstr(err.msg, wrong[i].words))
            fail_msg("'%s' does not say '%s'", err.msg, wrong[i].words);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ini),
        cmocka_unit_test(test_yaml),
        cmocka_unit_test(test_numbers),
        cmocka_unit_test(test_wrong_numbers),
    };
    return cmocka_run_group_tests_name("workspace", tests, NULL, NULL);
}
