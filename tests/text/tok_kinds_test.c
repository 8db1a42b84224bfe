/* Every kind of tokenizer file in small, made here: what each part of a format means, and what is refused. The
 * published files are tried in tokenizer_test.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "common/buf.h"
#include "common/check.h"
#include "common/json.h"
#include "text/tok/charsmap.h"
#include "text/tokenizer.h"

#define MARK "\xE2\x96\x81"

/* ---- tokenizers and expectations ------------------------------------------------------------------------ */

static tm_tokenizer *make(const tm_text_file *files, int n)
{
    tm_tokenizer *t = NULL;
    tm_err err = TM_ERR_INIT;
    if (tm_tokenizer_create(&t, files, n, &err) != TM_OK)
        fail_msg("%s", err.msg);
    return t;
}

/* want: ids with a space behind each, "2 5 ". */
static void expect_opts(const tm_tokenizer *t, const char *text, const tm_encode_opts *o,
                        const char *want)
{
    int32_t *ids;
    size_t n;
    tm_buf b;
    tm_err err = TM_ERR_INIT;
    tm_buf_init(&b, 0);
    if (tm_tokenizer_encode(t, text, strlen(text), o, &ids, &n, &err) != TM_OK)
        fail_msg("%s", err.msg);
    tm_buf_puts(&b, "");
    for (size_t i = 0; i < n; i++)
        tm_buf_printf(&b, "%d ", (int)ids[i]);
    if (strcmp(b.data, want) != 0)
        fail_msg("\"%s\": %s, expected %s", text, b.data, want);
    tm_buf_deinit(&b);
    free(ids);
}

static void expect(const tm_tokenizer *t, const char *text, const char *want)
{
    expect_opts(t, text, NULL, want);
}

static void expect_text(const tm_tokenizer *t, const int32_t *ids, size_t n, const char *want)
{
    char *text;
    size_t len;
    assert_int_equal(tm_tokenizer_decode(t, ids, n, false, &text, &len, NULL), TM_OK);
    assert_string_equal(text, want);
    free(text);
}

static void refuse(const tm_text_file *files, int n, const char *says)
{
    tm_tokenizer *t = NULL;
    tm_err err = TM_ERR_INIT;
    if (tm_tokenizer_create(&t, files, n, &err) == TM_OK)
        fail_msg("accepted, although: %s", says);
    if (!strstr(err.msg, says))
        fail_msg("\"%s\" does not say \"%s\"", err.msg, says);
}

/* ---- SentencePiece models ------------------------------------------------------------------------------- */

enum { NORMAL = 1, UNKNOWN, CONTROL, USER, UNUSED, BYTE };

static void put_varint(tm_buf *b, uint64_t v)
{
    for (; v >= 128; v >>= 7)
        tm_buf_putc(b, (char)(v | 128));
    tm_buf_putc(b, (char)v);
}

static void put_bytes(tm_buf *b, int field, const void *s, size_t len)
{
    put_varint(b, (uint64_t)field << 3 | 2);
    put_varint(b, len);
    tm_buf_append(b, s, len);
}

static void put_int(tm_buf *b, int field, uint64_t v)
{
    put_varint(b, (uint64_t)field << 3);
    put_varint(b, v);
}

static void put_piece(tm_buf *model, const char *text, float score, int type)
{
    tm_buf b;
    tm_buf_init(&b, 0);
    put_bytes(&b, 1, text, strlen(text));
    put_varint(&b, 2 << 3 | 5);
    tm_buf_append(&b, &score, 4); /* little-endian, as this machine */
    put_int(&b, 3, (uint64_t)type);
    put_bytes(model, 1, b.data, b.len);
    tm_buf_deinit(&b);
}

typedef struct sp_spec {
    int model; /* 1 unigram, 2 BPE */
    bool fallback, prefix, trim, suffix;
    const char *charsmap;
    size_t charsmap_len;
} sp_spec;

static void put_specs(tm_buf *model, const sp_spec *s)
{
    tm_buf b;
    tm_buf_init(&b, 0);
    put_int(&b, 3, (uint64_t)s->model);
    put_int(&b, 24, s->suffix);
    put_int(&b, 35, s->fallback);
    put_bytes(model, 2, b.data, b.len);
    tm_buf_clear(&b);
    if (s->charsmap)
        put_bytes(&b, 2, s->charsmap, s->charsmap_len);
    put_int(&b, 3, s->prefix);
    put_int(&b, 4, s->trim);
    put_bytes(model, 3, b.data, b.len);
    tm_buf_deinit(&b);
}

static void put_controls(tm_buf *b)
{
    tm_buf_init(b, 0);
    put_piece(b, "<unk>", 0, UNKNOWN);
    put_piece(b, "<s>", 0, CONTROL);
    put_piece(b, "</s>", 0, CONTROL);
}

/* Ids from 3: mark a b c | ab mark-a mark-ab bc abc | <u> [UNUSED_1] | unused "ca" cac */
static void put_bpe(tm_buf *b, const sp_spec *s)
{
    static const struct {
        const char *text;
        float score;
        int type;
    } rows[] = {{MARK, -100, NORMAL},    {"a", -101, NORMAL},     {"b", -102, NORMAL},
                {"c", -103, NORMAL},     {"ab", -1, NORMAL},      {MARK "a", -2, NORMAL},
                {MARK "ab", -3, NORMAL}, {"bc", -1, NORMAL},      {"abc", -4, NORMAL},
                {"<u>", 0, USER},        {"[UNUSED_1]", 0, USER}, {"ca", -5, UNUSED},
                {"cac", -6, NORMAL}};
    put_controls(b);
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++)
        put_piece(b, rows[i].text, rows[i].score, rows[i].type);
    for (int i = 0; s->fallback && i < 256; i++) {
        char text[8];
        snprintf(text, sizeof(text), "<0x%02X>", i);
        put_piece(b, text, 0, BYTE);
    }
    put_specs(b, s);
}

static tm_tokenizer *make_sp(const tm_buf *model, const char *config)
{
    const tm_text_file files[] = {{"tokenizer.model", model->data, model->len},
                                  {"tokenizer_config.json", config, config ? strlen(config) : 0}};
    return make(files, config ? 2 : 1);
}

static void test_sp_bpe(void **state)
{
    (void)state;
    tm_buf b;
    put_bpe(&b, &(sp_spec){.model = 2, .fallback = true, .prefix = true});
    tm_tokenizer *t = make_sp(&b, NULL);
    const tm_encode_opts special = {.add_special = true}, plain = {.plain = true};
    expect(t, "", "");
    expect(t, "ab", "9 ");    /* mark, ab: the better score first, then mark-ab */
    expect(t, "a", "8 ");     /* mark-a */
    expect(t, "abc", "9 6 "); /* ab and bc are equal: the left one wins */
    expect(t, " ab", "3 9 "); /* the prefix is one more space */
    expect(t, "b abc", "3 5 9 6 ");
    expect(t, "bca", "3 10 4 ");
    /* An unused piece is written as its parts, but leads on to larger ones. */
    expect(t, "<s>ca", "1 6 4 ");
    expect(t, "<s>cacb", "1 15 5 ");
    /* What has no piece becomes bytes. */
    expect(t, "<s>\xC3\xA9", "1 211 185 ");
    expect(t, "<s>a</s>", "1 4 2 ");
    expect_opts(t, "a", &special, "1 8 ");
    expect_opts(t, "<s>", &plain, "3 76 131 78 ");
    expect(t, "a<u>b", "8 12 5 ");
    const int32_t ids[] = {8, 12, 3, 9, 211, 185, 211, 2};
    expect_text(t, ids, TM_ARRAY_LEN(ids), "a<u>  ab\xC3\xA9\xEF\xBF\xBD</s>");
    assert_int_equal(tm_tokenizer_eos(t), 2);
    assert_string_equal(tm_tokenizer_special(t, "bos_token"), "<s>");
    assert_int_equal(tm_tokenizer_vocab(t), 272);
    tm_tokenizer_destroy(t);

    /* The old way: a space behind every special token. No BOS when the config says so. */
    t = make_sp(&b, "{\"legacy\": true, \"add_bos_token\": false, \"add_eos_token\": true}");
    expect_opts(t, "<s>ab", &special, "1 9 2 ");
    tm_tokenizer_destroy(t);
    tm_buf_deinit(&b);

    /* Without bytes, a run of unknown characters is one unknown token. */
    put_bpe(&b, &(sp_spec){.model = 2, .prefix = true, .suffix = true});
    t = make_sp(&b, NULL);
    expect(t, "xyab", "0 7 3 ");
    tm_tokenizer_destroy(t);
    tm_buf_deinit(&b);
}

/* Placeholders of the vocabulary can be written by templates, not by users. */
static void test_sp_placeholders(void **state)
{
    (void)state;
    static const char config[] =
        "{\"added_tokens_decoder\": {\"13\": {\"content\": \"<|end|>\", \"special\": true}}}";
    tm_buf b;
    put_bpe(&b, &(sp_spec){.model = 2, .fallback = true});
    tm_tokenizer *t = make_sp(&b, config);
    const tm_text_span span = {0, 10};
    const tm_encode_opts input = {.input = &span, .input_count = 1};
    expect(t, "[UNUSED_1]a", "13 4 ");
    expect(t, "<|end|>", "13 ");
    expect_opts(t, "[UNUSED_1]a", &input, "107 101 94 101 99 85 84 111 65 109 4 ");
    expect_opts(t, "<|end|>a", &input, "76 140 117 126 116 140 78 4 ");
    const int32_t end = 13;
    expect_text(t, &end, 1, "<|end|>");
    assert_true(tm_tokenizer_is_special(t, 13));
    tm_tokenizer_destroy(t);
    tm_buf_deinit(&b);
}

static void test_sp_chatglm(void **state)
{
    (void)state;
    tm_buf b;
    put_bpe(&b, &(sp_spec){.model = 2, .prefix = true});
    tm_tokenizer *t = make_sp(&b, "{\"tokenizer_class\": \"ChatGLMTokenizer\"}");
    const tm_encode_opts special = {.add_special = true};
    expect_opts(t, "ab", &special, "17 19 9 ");
    expect(t, "[gMASK]sop<|user|>ab", "17 19 22 9 ");
    expect(t, "asopb", "8 0 5 "); /* inside a word it is no token */
    tm_tokenizer_destroy(t);
    tm_buf_deinit(&b);
}

/* A map in the file's form: "A" to "b", "AB" to "c", two spaces wide U+3000 to " ". */
static size_t make_charsmap(char *out, size_t room)
{
    enum { UNITS = 2400 };
    static const char text[] = "b\0c\0 "; /* its NUL ends the last one */
    static uint32_t u[UNITS];
    memset(u, 0, sizeof(u));
    const uint32_t leaf = 1 << 8, value = 1u << 31;
    u[0] = 256 << 10;
    u[256 ^ 'A'] = 'A' | leaf | (uint32_t)((256 ^ 'A') ^ 512) << 10;
    u[512] = value | 0;
    u[512 ^ 'B'] = 'B' | leaf | (uint32_t)((512 ^ 'B') ^ 1024) << 10;
    u[1024] = value | 2;
    u[256 ^ 0xE3] = 0xE3 | (uint32_t)((256 ^ 0xE3) ^ 1280) << 10;
    u[1280 ^ 0x80] = 0x80 | (uint32_t)((1280 ^ 0x80) ^ 1536) << 10;
    u[1536 ^ 0x80] = 0x80 | leaf | (uint32_t)((1536 ^ 0x80) ^ 2048) << 10;
    u[2048] = value | 4;
    const uint32_t bytes = sizeof(u);
    size_t len = 4 + sizeof(u) + sizeof(text);
    assert_true(len <= room);
    memcpy(out, &bytes, 4);
    memcpy(out + 4, u, sizeof(u));
    memcpy(out + 4 + sizeof(u), text, sizeof(text));
    return len;
}

static void test_charsmap(void **state)
{
    (void)state;
    static char blob[16384];
    size_t len = make_charsmap(blob, sizeof(blob));
    tm_charsmap m;
    tm_buf b;
    tm_buf_init(&b, 0);
    assert_int_equal(tm_charsmap_read(&m, blob, len, NULL), TM_OK);
    assert_true(tm_charsmap_apply(&m, "xAABy\xE3\x80\x80", 8, &b));
    assert_string_equal(b.data, "xbcy ");
    tm_buf_clear(&b);
    assert_true(tm_charsmap_apply_clusters(&m, "xAABy", 5, &b));
    assert_string_equal(b.data, "xbbBy"); /* each cluster by itself */
    tm_charsmap_deinit(&m);
    /* Damaged maps are refused, or at worst give other text: never a step outside the array. */
    for (size_t i = 0; i < len; i++) {
        char kept = blob[i];
        blob[i] = (char)(kept ^ 0xFF);
        if (tm_charsmap_read(&m, blob, len, NULL) == TM_OK) {
            tm_buf_clear(&b);
            tm_charsmap_apply(&m, "AB\xE3\x80\x80", 5, &b);
            tm_charsmap_deinit(&m);
        }
        blob[i] = kept;
    }
    for (size_t i = 1; i < len; i += 97)
        if (tm_charsmap_read(&m, blob, i, NULL) == TM_OK)
            tm_charsmap_deinit(&m);
    tm_buf_deinit(&b);
}

/* Ids from 3: mark a b ab mark-ab, user-defined xyz!. */
static void put_unigram(tm_buf *b, const sp_spec *s)
{
    put_controls(b);
    put_piece(b, MARK, -3, NORMAL);
    put_piece(b, "a", -2, NORMAL);
    put_piece(b, "b", -2, NORMAL);
    put_piece(b, "ab", -3, NORMAL);
    put_piece(b, MARK "ab", -7, NORMAL);
    put_piece(b, "xyz!", -1, USER);
    put_specs(b, s);
}

static void test_sp_unigram(void **state)
{
    (void)state;
    static char blob[16384];
    tm_buf b;
    sp_spec s = {.model = 1, .prefix = true, .trim = true};
    s.charsmap = blob;
    s.charsmap_len = make_charsmap(blob, sizeof(blob));
    put_unigram(&b, &s);
    tm_tokenizer *t = make_sp(&b, NULL);
    expect(t, "ab", "3 6 "); /* -3-3 beats -7 and -3-2-2 */
    expect(t, "  ab   a ", "3 6 3 4 ");
    expect(t, "   ", "");
    expect(t, "aA", "3 6 "); /* A becomes b */
    expect(t,
           "a\xE3\x80\x80"
           "a",
           "3 4 3 4 ");
    expect(t, "xyz!b", "3 8 5 ");   /* a user-defined piece, although its score is poor */
    expect(t, "axyzb", "3 4 0 5 "); /* unknown characters together */
    expect(t, "<s>ab", "1 3 6 ");
    const int32_t ids[] = {3, 3, 6, 3, 4};
    expect_text(t, ids, 5, "ab a");
    tm_tokenizer_destroy(t);
    tm_buf_deinit(&b);
}

static void test_sp_refused(void **state)
{
    (void)state;
    tm_buf b;
    put_bpe(&b, &(sp_spec){.model = 2});
    tm_text_file f = {"tokenizer.model", b.data, b.len};
    for (size_t n = 1; n < b.len; n++) { /* cut anywhere */
        tm_tokenizer *t = NULL;
        f.len = n;
        if (tm_tokenizer_create(&t, &f, 1, NULL) == TM_OK)
            tm_tokenizer_destroy(t);
    }
    f.len = b.len - 1;
    refuse(&f, 1, "not a SentencePiece model");
    tm_buf_deinit(&b);
    f = (tm_text_file){"tokenizer.model", "", 0};
    refuse(&f, 1, "no pieces");

    static const struct {
        const char *text;
        float score;
        int type, model;
        const char *says;
    } rows[] = {
        {"x", 0, 9, 2, "unknown type 9"},    {"", 0, NORMAL, 2, "empty"},
        {"x", 1e38f, NORMAL, 2, "score"},    {"<s>", 0, NORMAL, 2, "two ids"},
        {"\xFF", 0, NORMAL, 2, "not UTF-8"}, {"<0xzz>", 0, BYTE, 2, "type byte"},
        {"x", 0, NORMAL, 3, "(word)"},       {"x", 0, NORMAL, 77, "77"},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        put_controls(&b);
        put_piece(&b, "<s>", 0, i == 3 ? NORMAL : CONTROL);
        put_piece(&b, rows[i].text, rows[i].score, rows[i].type);
        put_specs(&b, &(sp_spec){.model = rows[i].model});
        f = (tm_text_file){"tokenizer.model", b.data, b.len};
        refuse(&f, 1, rows[i].says);
        tm_buf_deinit(&b);
    }
}

/* ---- unigram in tokenizer.json -------------------------------------------------------------------------- */

#define UNIGRAM(model)                                                                             \
    "{\"added_tokens\": [{\"id\": 1, \"content\": \"</s>\", \"special\": true}], \"normalizer\": " \
    "{\"type\": \"Precompiled\", \"precompiled_charsmap\": \"%s\"}, \"pre_tokenizer\": "           \
    "{\"type\": "                                                                                  \
    "\"Metaspace\", \"replacement\": \"" MARK "\", \"prepend_scheme\": \"always\", \"split\": "    \
    "true}, \"decoder\": {\"type\": \"Metaspace\", \"replacement\": \"" MARK "\", "                \
    "\"prepend_scheme\": \"always\"}, \"model\": {\"type\": \"Unigram\", " model "}}"

static const char base64_digits[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

static void put_base64(tm_buf *b, const void *data, size_t len)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < len; i += 3) {
        uint32_t v = (uint32_t)p[i] << 16 | (i + 1 < len ? (uint32_t)p[i + 1] << 8 : 0) |
                     (i + 2 < len ? p[i + 2] : 0);
        tm_buf_putc(b, base64_digits[v >> 18]);
        tm_buf_putc(b, base64_digits[v >> 12 & 63]);
        tm_buf_putc(b, i + 1 < len ? base64_digits[v >> 6 & 63] : '=');
        tm_buf_putc(b, i + 2 < len ? base64_digits[v & 63] : '=');
    }
}

static void test_json_unigram(void **state)
{
    (void)state;
    static char blob[16384];
    tm_buf map, b;
    tm_buf_init(&map, 0);
    tm_buf_init(&b, 0);
    put_base64(&map, blob, make_charsmap(blob, sizeof(blob)));
    tm_buf_printf(&b,
                  UNIGRAM("\"unk_id\": 0, \"vocab\": [[\"<unk>\", 0], [\"</s>\", 0], [\"" MARK
                          "\", -3], [\"a\", -2], [\"b\", -2], [\"ab\", -3], [\"" MARK "ab\", -7]]"),
                  map.data);
    tm_text_file f = {"tokenizer.json", b.data, b.len};
    tm_tokenizer *t = make(&f, 1);
    expect(t, "ab", "2 5 ");
    expect(t, "aA b", "2 5 2 4 ");
    expect(t, "axxb</s>", "2 3 0 4 1 ");
    const int32_t ids[] = {2, 5, 2, 4};
    expect_text(t, ids, 4, "ab b");
    tm_tokenizer_destroy(t);
    static const struct {
        const char *map, *says;
    } rows[] = {{"abc", "base64"}, {"AAAA", "trie"}};
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        tm_buf_clear(&b);
        tm_buf_printf(&b, UNIGRAM("\"vocab\": [[\"a\", 0]]"), rows[i].map);
        f = (tm_text_file){"tokenizer.json", b.data, b.len};
        refuse(&f, 1, rows[i].says);
    }
    tm_buf_clear(&b);
    tm_buf_printf(&b, UNIGRAM("\"unk_id\": 5, \"vocab\": [[\"a\", 0]]"), map.data);
    f = (tm_text_file){"tokenizer.json", b.data, b.len};
    refuse(&f, 1, "unk_id");
    tm_buf_deinit(&map);
    tm_buf_deinit(&b);
}

/* ---- ranks ---------------------------------------------------------------------------------------------- */

static void test_tiktoken_refused(void **state)
{
    (void)state;
    static const struct {
        const char *text, *says;
    } rows[] = {
        {"YQ== 0\nYg== 1\n", "2 ranks"},
        {"YQ== 0\nYg=\n", "line 2: expected a token"},
        {"YQ== x\n", "line 1: expected a token"},
        {"Y!== 0\n", "line 1: expected a token"},
        {"YQ== 0\r\nYg== 0\r\n", "two tokens have id 0"},
        {"YQ== 99999999\n", "line 1"},
        {"\n\n", "has no tokens"},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        const tm_text_file f = {"x.tiktoken", rows[i].text, strlen(rows[i].text)};
        refuse(&f, 1, rows[i].says);
        const tm_text_file g = {"tokenizer.model", rows[i].text, strlen(rows[i].text)};
        if (i > 0 && i < 6)
            refuse(&g, 1, rows[i].says);
    }
}

static void test_tekken(void **state)
{
    (void)state;
    tm_buf b;
    tm_buf_init(&b, 0);
    tm_buf_puts(&b, "{\"config\": {\"pattern\": \"[a-z]+|[^a-z]\", \"default_vocab_size\": 270, "
                    "\"default_num_special_tokens\": 12}, \"vocab\": [");
    for (int i = 0; i < 260; i++) {
        static const char *const more[] = {"ab", "abc", "bc", "left out"};
        const char c = (char)i;
        tm_buf_printf(&b, "%s{\"rank\": %d, \"token_bytes\": \"", i ? "," : "", i);
        put_base64(&b, i < 256 ? &c : more[i - 256], i < 256 ? 1 : strlen(more[i - 256]));
        tm_buf_puts(&b, "\", \"token_str\": null}");
    }
    tm_buf_puts(&b, "]}");
    tm_text_file f = {"tekken.json", b.data, b.len};
    tm_tokenizer *t = make(&f, 1);
    const tm_encode_opts special = {.add_special = true};
    expect_opts(t, "abc ab", &special, "1 269 44 268 ");
    expect(t, "[INST]abb<SPECIAL_11>", "3 268 110 11 ");
    assert_int_equal(tm_tokenizer_eos(t), 2);
    assert_int_equal(tm_tokenizer_vocab(t), 270);
    tm_tokenizer_destroy(t);
    f.data = "{\"config\": {}}";
    f.len = strlen(f.data);
    refuse(&f, 1, "config: pattern");
    f.data = "[]";
    f.len = 2;
    refuse(&f, 1, "expected an object");
    tm_buf_deinit(&b);
}

static void test_pair(void **state)
{
    (void)state;
    static const char vocab[] = "{\"a\": 0, \"b\": 1, \"ab\": 2, \"\xC4\xA0\": 3, \"1\": 4, "
                                "\"11\": 5, \"\xC4\xA0"
                                "ab\": 6}";
    static const char merges[] = "#version: 0.2\r\na b\r\n1 1\r\n\xC4\xA0 ab\r\n";
    static const char qwen[] = "{\"tokenizer_class\": \"Qwen2Tokenizer\"}";
    static const char prefix[] = "{\"add_prefix_space\": true}";
    const tm_text_file files[] = {{"vocab.json", vocab, strlen(vocab)},
                                  {"merges.txt", merges, strlen(merges)},
                                  {"tokenizer_config.json", qwen, strlen(qwen)},
                                  {"tokenizer_config.json", prefix, strlen(prefix)}};
    tm_tokenizer *t = make(files, 2);
    expect(t, "ab ab11", "2 6 5 "); /* GPT-2's pattern keeps digits together */
    tm_tokenizer_destroy(t);
    t = make(files, 3);
    expect(t, "ab11", "2 4 4 "); /* Qwen's does not */
    tm_tokenizer_destroy(t);
    const tm_text_file prefixed[] = {files[0], files[1], files[3]};
    t = make(prefixed, 3);
    expect(t, "ab", "6 ");
    tm_tokenizer_destroy(t);
    refuse(files, 1, "merges.txt is missing");
    const tm_text_file bad[] = {files[0], {"merges.txt", "a c\n", 4}};
    refuse(bad, 2, "vocab.json: model.merges[0]");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sp_bpe),       cmocka_unit_test(test_sp_placeholders),
        cmocka_unit_test(test_sp_chatglm),   cmocka_unit_test(test_charsmap),
        cmocka_unit_test(test_sp_unigram),   cmocka_unit_test(test_sp_refused),
        cmocka_unit_test(test_json_unigram), cmocka_unit_test(test_tiktoken_refused),
        cmocka_unit_test(test_tekken),       cmocka_unit_test(test_pair),
    };
    return cmocka_run_group_tests_name("tok_kinds", tests, NULL, NULL);
}
