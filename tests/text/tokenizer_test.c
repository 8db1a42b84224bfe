/* Tokenizers against recorded answers of the libraries that own the formats, the embedded model, refusals of
 * bad files, and text that must not become control tokens. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/file.h"
#include "common/json.h"
#include "text/tok/files.h"
#include "text/tokenizer.h"

#define DEMO "models/demo-20m"

static json_t *load_json(const char *path)
{
    json_t *v = NULL;
    tm_err err = TM_ERR_INIT;
    if (tm_json_load_file(path, (size_t)64 << 20, &v, &err) != TM_OK)
        fail_msg("%s", err.msg);
    return v;
}

static tm_tokenizer *load(const char *dir)
{
    tm_tokenizer *t = NULL;
    tm_err err = TM_ERR_INIT;
    if (tm_tokenizer_load(&t, dir, &err) != TM_OK)
        fail_msg("%s", err.msg);
    return t;
}

/* ---- recorded cases ------------------------------------------------------------------------------------- */

typedef struct tally {
    const char *dir;
    int checks, wrong;
} tally;

static void note(tally *y, const json_t *c, const char *field, bool same)
{
    y->checks++;
    if (same)
        return;
    if (y->wrong++ < 10)
        print_error("%s: case \"%s\": %s differs\n", y->dir,
                    json_string_value(json_object_get(c, "name")), field);
}

static bool equal_ids(const json_t *want, const int32_t *ids, size_t n)
{
    if (json_array_size(want) != n)
        return false;
    for (size_t i = 0; i < n; i++)
        if (json_integer_value(json_array_get(want, i)) != ids[i])
            return false;
    return true;
}

static void check_encode(tally *y, const tm_tokenizer *t, const json_t *c, const char *field,
                         tm_encode_opts opts)
{
    const json_t *want = json_object_get(c, field), *text = json_object_get(c, "text");
    if (!want)
        want = json_object_get(c, "ids");
    int32_t *ids = NULL;
    size_t n = 0;
    tm_err err = TM_ERR_INIT;
    if (tm_tokenizer_encode(t, json_string_value(text), json_string_length(text), &opts, &ids, &n,
                            &err) != TM_OK)
        fail_msg("%s", err.msg);
    note(y, c, field, equal_ids(want, ids, n));
    free(ids);
}

static void check_decode(tally *y, const tm_tokenizer *t, const json_t *c, const char *ids_field,
                         bool skip, const json_t *want, const char *field)
{
    const json_t *list = json_object_get(c, ids_field);
    size_t n = json_array_size(list), len;
    int32_t *ids = malloc((n + 1) * sizeof(*ids));
    for (size_t i = 0; i < n; i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(list, i));
    char *text = NULL;
    assert_int_equal(tm_tokenizer_decode(t, ids, n, skip, &text, &len, NULL), TM_OK);
    note(y, c, field,
         json_string_length(want) == len && memcmp(json_string_value(want), text, len) == 0);
    free(text);
    free(ids);
}

static const json_t *first_of(const json_t *c, const char *a, const char *b, const char *d)
{
    const char *const keys[] = {a, b, d};
    for (int i = 0; i < 3; i++)
        if (json_object_get(c, keys[i]))
            return json_object_get(c, keys[i]);
    return NULL;
}

/* Folders without a tokenizer_config.json get one from what the case file says about the tokenizer. */
static tm_tokenizer *load_for_cases(const char *dir, const json_t *settings, bool legacy)
{
    tm_text_files files = {.count = 0};
    tm_tokenizer *t = NULL;
    tm_err err = TM_ERR_INIT;
    char config[200];
    assert_int_equal(tm_text_files_load(&files, dir, &err), TM_OK);
    tm_text_file all[TM_TEXT_FILES_MAX + 1];
    int n = files.count;
    bool has_config = false;
    for (int i = 0; i < n; i++) {
        all[i] = files.v[i];
        has_config |= strcmp(all[i].name, "tokenizer_config.json") == 0;
    }
    if (!has_config) {
        snprintf(config, sizeof(config),
                 "{\"add_bos_token\": %s, \"add_eos_token\": %s, \"legacy\": %s}",
                 json_is_true(json_object_get(settings, "add_bos")) ? "true" : "false",
                 json_is_true(json_object_get(settings, "add_eos")) ? "true" : "false",
                 legacy ? "true" : "false");
        all[n++] = (tm_text_file){"tokenizer_config.json", config, strlen(config)};
    }
    if (tm_tokenizer_create(&t, all, n, &err) != TM_OK)
        fail_msg("%s: %s", dir, err.msg);
    tm_text_files_deinit(&files);
    return t;
}

static void run_cases(const char *name)
{
    const char *shared = getenv("TM_SHARED");
    char dir[1024], path[1100];
    snprintf(dir, sizeof(dir), "%s/testdata/tokenizers/%s", shared ? shared : "", name);
    snprintf(path, sizeof(path), "%s/cases.json", dir);
    if (!shared || !tm_file_exists(path)) {
        print_message("TM_SHARED has no testdata/tokenizers/%s: skipped\n", name);
        skip();
    }
    json_t *file = load_json(path);
    const json_t *settings = json_object_get(file, "settings");
    tm_tokenizer *t = load_for_cases(dir, settings, false);
    tm_tokenizer *legacy = load_for_cases(dir, settings, true);
    tally y = {.dir = name};
    size_t i;
    json_t *c;
    json_array_foreach(json_object_get(file, "cases"), i, c)
    {
        check_encode(&y, t, c, "ids", (tm_encode_opts){0});
        check_encode(&y, t, c, "ids_special", (tm_encode_opts){.add_special = true});
        check_encode(&y, t, c, "ids_plain", (tm_encode_opts){.plain = true});
        check_encode(&y, legacy, c, "ids_legacy", (tm_encode_opts){0});
        check_decode(&y, t, c, "ids", false, json_object_get(c, "decoded"), "decoded");
        check_decode(&y, t, c, "ids_special", true, first_of(c, "decoded_skip", "decoded", ""),
                     "decoded_skip");
    }
    json_array_foreach(json_object_get(file, "decode_cases"), i, c)
    {
        check_decode(&y, t, c, "ids", false, first_of(c, "text_sentencepiece", "text", ""), "text");
        if (!json_object_get(c, "text_sentencepiece"))
            check_decode(&y, t, c, "ids", true, first_of(c, "text_skip", "text", ""), "text_skip");
    }
    print_message("%s: %d of %d checks right\n", name, y.checks - y.wrong, y.checks);
    assert_int_equal(y.wrong, 0);
    assert_true(y.checks > 1000);
    tm_tokenizer_destroy(t);
    tm_tokenizer_destroy(legacy);
    json_decref(file);
}

static void test_llama2(void **state)
{
    (void)state;
    run_cases("llama2");
}

static void test_internlm2(void **state)
{
    (void)state;
    run_cases("internlm2");
}

static void test_mistral_v3(void **state)
{
    (void)state;
    run_cases("mistral-v3");
}

static void test_unigram(void **state)
{
    (void)state;
    run_cases("unigram-bytefallback");
}

static void test_qwen(void **state)
{
    (void)state;
    run_cases("qwen");
}

static void test_qwen25(void **state)
{
    (void)state;
    run_cases("qwen2.5");
}

static void test_llama31(void **state)
{
    (void)state;
    run_cases("llama3.1");
}

static void test_falcon(void **state)
{
    (void)state;
    run_cases("falcon");
}

/* ---- the embedded model --------------------------------------------------------------------------------- */

static void test_demo_golden(void **state)
{
    (void)state;
    tm_tokenizer *t = load(DEMO);
    json_t *g = load_json(DEMO "/eval/golden.json"), *c;
    assert_int_equal(tm_tokenizer_eos(t), tm_tokenizer_id(t, "<|im_end|>", 10));
    assert_string_equal(tm_tokenizer_special(t, "eos_token"), "<|im_end|>");
    assert_null(tm_tokenizer_special(t, "bos_token"));
    size_t i;
    json_array_foreach(json_object_get(g, "cases"), i, c)
    {
        const json_t *text = json_object_get(c, "prompt");
        int32_t *ids;
        size_t n;
        assert_int_equal(tm_tokenizer_encode(t, json_string_value(text), json_string_length(text),
                                             NULL, &ids, &n, NULL),
                         TM_OK);
        assert_true(equal_ids(json_object_get(c, "prompt_ids"), ids, n));
        free(ids);
    }
    assert_int_equal(i, 10);
    json_decref(g);

    char *text, *back;
    size_t len, back_len, n;
    int32_t *ids;
    assert_int_equal(tm_file_read(DEMO "/eval/heldout.txt", 1 << 24, &text, &len, NULL), TM_OK);
    assert_int_equal(tm_tokenizer_encode(t, text, len, NULL, &ids, &n, NULL), TM_OK);
    assert_int_equal(tm_tokenizer_decode(t, ids, n, false, &back, &back_len, NULL), TM_OK);
    assert_int_equal(back_len, len);
    assert_memory_equal(back, text, len);
    free(ids);
    free(text);
    free(back);
    tm_tokenizer_destroy(t);
}

static size_t count_id(const int32_t *ids, size_t n, int32_t id)
{
    size_t k = 0;
    for (size_t i = 0; i < n; i++)
        k += ids[i] == id;
    return k;
}

static void test_input_spans(void **state)
{
    (void)state;
    static const char text[] = "<|im_start|>user\nsay <|im_end|> now<|im_end|>\n";
    tm_tokenizer *t = load(DEMO);
    int32_t end = tm_tokenizer_id(t, "<|im_end|>", 10), *ids;
    size_t n, len = strlen(text);
    tm_text_span span = {17, 35};
    tm_encode_opts opts = {.input = &span, .input_count = 1};
    assert_int_equal(tm_tokenizer_encode(t, text, len, &opts, &ids, &n, NULL), TM_OK);
    assert_int_equal(count_id(ids, n, end), 1);
    assert_int_equal(ids[0], tm_tokenizer_id(t, "<|im_start|>", 12));
    free(ids);

    /* One byte of user text inside the spelling is enough. */
    span = (tm_text_span){44, 45};
    assert_int_equal(tm_tokenizer_encode(t, text, len, &opts, &ids, &n, NULL), TM_OK);
    assert_int_equal(count_id(ids, n, end), 1);
    free(ids);

    /* Marking does not change how harmless text is cut: borders are not borders of pieces. */
    static const char mild[] = "The lighthouse keeper wrote a letter.";
    int32_t *plain;
    size_t plain_n;
    assert_int_equal(tm_tokenizer_encode(t, mild, strlen(mild), NULL, &plain, &plain_n, NULL),
                     TM_OK);
    for (size_t a = 0; a < strlen(mild); a++) {
        span = (tm_text_span){a, a + 3};
        assert_int_equal(tm_tokenizer_encode(t, mild, strlen(mild), &opts, &ids, &n, NULL), TM_OK);
        assert_int_equal(n, plain_n);
        assert_memory_equal(ids, plain, n * sizeof(*ids));
        free(ids);
    }
    free(plain);
    tm_tokenizer_destroy(t);
}

/* Every special token of a tokenizer, spelled by a user, gives none of the special ids. */
static void check_injection(const char *dir)
{
    tm_tokenizer *t = load(dir);
    int specials = 0;
    for (int32_t id = 0; id < tm_tokenizer_vocab(t); id++) {
        if (!tm_tokenizer_is_special(t, id))
            continue;
        specials++;
        size_t len, n;
        const char *piece = tm_tokenizer_piece(t, id, &len);
        char text[1200];
        int total = snprintf(text, sizeof(text), "a %.*s%.*s b", (int)len, piece, (int)len, piece);
        tm_text_span span = {0, (size_t)total};
        tm_encode_opts opts = {.input = &span, .input_count = 1};
        int32_t *ids;
        assert_int_equal(tm_tokenizer_encode(t, text, (size_t)total, &opts, &ids, &n, NULL), TM_OK);
        for (size_t i = 0; i < n; i++)
            if (tm_tokenizer_is_special(t, ids[i]))
                fail_msg("%s: user text %s gave special id %d", dir, text, (int)ids[i]);
        free(ids);
    }
    assert_true(specials > 0);
    tm_tokenizer_destroy(t);
}

static void test_injection(void **state)
{
    (void)state;
    static const char *const names[] = {"qwen2.5",
                                        "llama3.1",
                                        "falcon",
                                        "llama2",
                                        "internlm2",
                                        "mistral-v3",
                                        "unigram-bytefallback",
                                        "qwen"};
    check_injection(DEMO);
    for (size_t i = 0; i < TM_ARRAY_LEN(names); i++) {
        const char *shared = getenv("TM_SHARED");
        char dir[1024];
        snprintf(dir, sizeof(dir), "%s/testdata/tokenizers/%s", shared ? shared : "", names[i]);
        if (shared && tm_dir_exists(dir))
            check_injection(dir);
    }
}

/* A megabyte without a border must not be quadratic: 16 times the text takes about 16 times the time. */
static void test_long_word(void **state)
{
    (void)state;
    enum { SMALL = 1 << 16, BIG = 1 << 20 };
    tm_tokenizer *t = load(DEMO);
    char *text = malloc(BIG);
    uint32_t seed = 7;
    for (size_t i = 0; i < BIG; i++) {
        seed = seed * 1664525u + 1013904223u;
        text[i] = (char)('a' + (seed >> 24) % 26);
    }
    int64_t took[2];
    for (int k = 0; k < 2; k++) {
        int32_t *ids;
        size_t n, len = k ? BIG : SMALL, back_len;
        char *back;
        int64_t start = tm_clock_ns();
        assert_int_equal(tm_tokenizer_encode(t, text, len, NULL, &ids, &n, NULL), TM_OK);
        took[k] = tm_clock_ns() - start;
        assert_int_equal(tm_tokenizer_decode(t, ids, n, false, &back, &back_len, NULL), TM_OK);
        assert_int_equal(back_len, len);
        assert_memory_equal(back, text, len);
        free(back);
        free(ids);
    }
    print_message("one word: 64 KiB %.1f ms, 1 MiB %.1f ms\n", (double)took[0] / 1e6,
                  (double)took[1] / 1e6);
    assert_true(took[1] < took[0] * 100);
    free(text);
    tm_tokenizer_destroy(t);
}

static void test_bad_text(void **state)
{
    (void)state;
    tm_tokenizer *t = load(DEMO);
    int32_t *ids = NULL;
    size_t n = 0;
    assert_int_equal(tm_tokenizer_encode(t, "a\xFFz", 3, NULL, &ids, &n, NULL), TM_STATUS_INVALID);
    assert_null(ids);
    assert_int_equal(tm_tokenizer_encode(t, "", 0, NULL, &ids, &n, NULL), TM_OK);
    assert_int_equal(n, 0);
    free(ids);
    assert_int_equal(tm_tokenizer_encode(t, "a\0b", 3, NULL, &ids, &n, NULL), TM_OK);
    char *back;
    size_t len;
    assert_int_equal(tm_tokenizer_decode(t, ids, n, false, &back, &len, NULL), TM_OK);
    assert_int_equal(len, 3);
    assert_memory_equal(back, "a\0b", 3);
    free(back);
    free(ids);
    assert_null(tm_tokenizer_piece(t, -1, &len));
    assert_null(tm_tokenizer_piece(t, 1 << 30, &len));
    tm_tokenizer_destroy(t);
}

/* ---- files that must be refused ------------------------------------------------------------------------- */

#define HEAD                                                                                       \
    "{\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false}, \"decoder\": "    \
    "{\"type\": "                                                                                  \
    "\"ByteLevel\"}, \"model\": {\"type\": \"BPE\", "
#define VOCAB "\"vocab\": {\"a\": 0, \"b\": 1, \"ab\": 2}, "

static void test_refused(void **state)
{
    (void)state;
    static const struct {
        const char *json, *says;
    } rows[] = {
        {"", "tokenizer.json: not JSON"},
        {"{\"model\": ", "tokenizer.json: not JSON"},
        {"\xEF\xBB\xBF{}", "not JSON: it begins with a byte order mark"},
        {"[]", "expected an object"},
        {"{}", "\"model\""},
        {HEAD VOCAB "\"merges\": [\"a b\"]}} x", "not JSON"},
        {HEAD VOCAB "\"merges\": [\"a b\", \"a c\"]}}", "model.merges[1]: names \"c\""},
        {HEAD VOCAB "\"merges\": [[\"b\", \"a\"]]}}", "model.merges[0]: makes \"ba\""},
        {HEAD VOCAB "\"merges\": [\"ab\"]}}", "model.merges[0]"},
        {HEAD VOCAB "\"merges\": [[\"a\"]]}}", "model.merges[0]"},
        {HEAD VOCAB "\"merges\": {}}}", "model.merges"},
        {HEAD "\"vocab\": {\"a\": 0}}}", "model.merges: is missing"},
        {HEAD "\"vocab\": {\"a\": 0, \"b\": 0}, \"merges\": []}}", "two tokens have id 0"},
        {HEAD "\"vocab\": {\"a\": -1}, \"merges\": []}}", "model.vocab[0]"},
        {HEAD "\"vocab\": {\"a\": 99999999}, \"merges\": []}}", "model.vocab"},
        {HEAD "\"vocab\": {}, \"merges\": []}}", "model.vocab: is missing or empty"},
        {HEAD VOCAB "\"dropout\": 0.1, \"merges\": []}}", "model.dropout"},
        {HEAD VOCAB "\"merges\": []}, \"normalizer\": {\"type\": \"Magic\"}}",
         "normalizer: type: \"Magic\""},
        {"{\"decoder\": null, \"model\": {\"type\": \"BPE\"}}", "decoder"},
        {"{\"decoder\": {\"type\": \"ByteLevel\"}, \"pre_tokenizer\": {\"type\": \"Sequence\", "
         "\"pretokenizers\": [{\"type\": \"Nope\"}]}, \"model\": {}}",
         "pre_tokenizer: pretokenizers[0]: type: \"Nope\""},
        {"{\"decoder\": {\"type\": \"ByteLevel\"}, \"model\": {\"type\": \"WordPiece\", \"vocab\": "
         "{\"a\": "
         "0}}}",
         "model.type: \"WordPiece\""},
        {HEAD VOCAB "\"merges\": []}, \"post_processor\": {\"type\": \"X\"}}",
         "post_processor: type: \"X\""},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        tm_text_file file = {"tokenizer.json", rows[i].json, strlen(rows[i].json)};
        tm_tokenizer *t = NULL;
        tm_err err = TM_ERR_INIT;
        if (tm_tokenizer_create(&t, &file, 1, &err) == TM_OK)
            fail_msg("row %zu was accepted: %s", i, rows[i].json);
        assert_null(t);
        if (!strstr(err.msg, rows[i].says))
            fail_msg("row %zu: \"%s\" does not say \"%s\"", i, err.msg, rows[i].says);
        assert_null(strchr(err.msg, '\n'));
    }
    tm_err err = TM_ERR_INIT;
    tm_tokenizer *t = NULL;
    assert_int_equal(tm_tokenizer_create(&t, NULL, 0, &err), TM_STATUS_NOT_FOUND);
}

/* Added tokens: flags, longest match, config entries beside the tokenizer's own. */
static void test_added_flags(void **state)
{
    (void)state;
    static const char json[] = HEAD
        "\"vocab\": {\"a\": 0, \"b\": 1, \"ab\": 2, \"\xC4\xA0\": 3}, \"merges\": [\"a b\"]}, "
        "\"added_tokens\": ["
        "{\"id\": 10, \"content\": \"<x>\", \"special\": true, \"lstrip\": true, \"rstrip\": true},"
        "{\"id\": 11, \"content\": \"<x>y\", \"special\": true},"
        "{\"id\": 12, \"content\": \"ba\", \"special\": false, \"single_word\": true}]}";
    static const char config[] =
        "{\"model_max_length\": 1000000000000000019884624838656, \"eos_token\": "
        "{\"content\": \"<e>\"}, \"added_tokens_decoder\": {\"20\": {\"content\": "
        "\"<e>\", \"special\": true}}}";
    static const struct {
        const char *text;
        int n;
        int32_t ids[8];
    } rows[] = {
        {"a <x> b", 3, {0, 10, 1}}, {"<x>yb", 2, {11, 1}},           {"ba", 1, {12}},
        {"aba", 2, {2, 0}},         {"b ba b", 5, {1, 3, 12, 3, 1}}, {"<e>ab", 2, {20, 2}},
        {"<x><x>", 2, {10, 10}},
    };
    tm_text_file files[] = {{"tokenizer.json", json, strlen(json)},
                            {"tokenizer_config.json", config, strlen(config)}};
    tm_tokenizer *t = NULL;
    tm_err err = TM_ERR_INIT;
    if (tm_tokenizer_create(&t, files, 2, &err) != TM_OK)
        fail_msg("%s", err.msg);
    assert_int_equal(tm_tokenizer_eos(t), 20);
    assert_int_equal(tm_tokenizer_vocab(t), 21);
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        int32_t *ids;
        size_t n;
        assert_int_equal(
            tm_tokenizer_encode(t, rows[i].text, strlen(rows[i].text), NULL, &ids, &n, NULL),
            TM_OK);
        if ((int)n != rows[i].n || memcmp(ids, rows[i].ids, n * sizeof(*ids)) != 0)
            fail_msg("\"%s\": %zu ids, first %d", rows[i].text, n, n ? (int)ids[0] : -1);
        free(ids);
    }
    tm_tokenizer_destroy(t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_llama2),      cmocka_unit_test(test_internlm2),
        cmocka_unit_test(test_mistral_v3),  cmocka_unit_test(test_unigram),
        cmocka_unit_test(test_qwen),        cmocka_unit_test(test_qwen25),
        cmocka_unit_test(test_llama31),     cmocka_unit_test(test_falcon),
        cmocka_unit_test(test_demo_golden), cmocka_unit_test(test_input_spans),
        cmocka_unit_test(test_injection),   cmocka_unit_test(test_long_word),
        cmocka_unit_test(test_bad_text),    cmocka_unit_test(test_refused),
        cmocka_unit_test(test_added_flags),
    };
    return cmocka_run_group_tests_name("tokenizer", tests, NULL, NULL);
}
