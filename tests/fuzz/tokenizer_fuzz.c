/* Fuzz entry of the tokenizer loaders. The first byte chooses which file the rest is; "~~~~" parts two files.
 * What loads must encode every text to ids that it knows, the same ids again, and its streaming decoder
 * must give what the whole decoder gives. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "text/detok.h"
#include "text/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const struct {
    const char *file, *beside;
} kinds[] = {
    {"tokenizer.json", "tokenizer_config.json"},
    {"tokenizer.model", "tokenizer_config.json"},
    {"x.tiktoken", "tokenizer_config.json"},
    {"tekken.json", "special_tokens_map.json"},
    {"vocab.json", "merges.txt"},
    {"tokenizer.json", "added_tokens.json"},
};

static const char *const texts[] = {
    "",
    " ",
    "Hello, world!  It's 1234 o'clock.\n\n",
    "<s>[INST] <|im_start|>user</s> \xE2\x96\x81<unk>",
    "\xE4\xB8\xAD\xE6\x96\x87 \xD8\xB9 e\xCC\x81 \xF0\x9F\x98\x80\xE2\x80\x8D\xEF\xAC\x81",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaabc",
};

static void check_decode(const tm_tokenizer *t, const int32_t *ids, size_t n)
{
    char *text;
    size_t len;
    tm_detok *d;
    tm_buf b;
    const tm_detok_opts opts = {.skip_special = false};
    if (tm_tokenizer_decode(t, ids, n, false, &text, &len, NULL) != TM_OK)
        return;
    TM_ASSERT(tm_detok_create(&d, t, &opts, NULL) == TM_OK);
    tm_buf_init(&b, 0);
    for (size_t i = 0; i < n; i++)
        tm_detok_push(d, ids[i], &b);
    tm_detok_finish(d, &b);
    TM_ASSERT(b.len == len && (len == 0 || memcmp(b.data, text, len) == 0));
    tm_buf_deinit(&b);
    tm_detok_destroy(d);
    free(text);
}

static void check_text(const tm_tokenizer *t, const char *text)
{
    int32_t *ids, *again;
    size_t n, again_n, len = strlen(text);
    const tm_text_span span = {len / 3, len};
    const tm_encode_opts input = {.input = &span, .input_count = len > 0, .add_special = true};
    if (tm_tokenizer_encode(t, text, len, &input, &again, &again_n, NULL) == TM_OK)
        free(again);
    if (tm_tokenizer_encode(t, text, len, NULL, &ids, &n, NULL) != TM_OK)
        return;
    for (size_t i = 0; i < n; i++)
        TM_ASSERT(ids[i] >= 0 && ids[i] < tm_tokenizer_vocab(t));
    TM_ASSERT(tm_tokenizer_encode(t, text, len, NULL, &again, &again_n, NULL) == TM_OK);
    TM_ASSERT(again_n == n && memcmp(again, ids, n * sizeof(*ids)) == 0);
    check_decode(t, ids, n);
    free(ids);
    free(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    tm_tokenizer *t = NULL;
    tm_err err = TM_ERR_INIT;
    if (size < 1)
        return 0;
    size_t k = (size_t)data[0] % TM_ARRAY_LEN(kinds), rest = size - 1;
    const char *first = (const char *)data + 1, *part = memmem(first, rest, "~~~~", 4);
    tm_text_file files[2] = {{kinds[k].file, first, part ? (size_t)(part - first) : rest}};
    if (part)
        files[1] = (tm_text_file){kinds[k].beside, part + 4, rest - files[0].len - 4};
    tm_status st = tm_tokenizer_create(&t, files, part ? 2 : 1, &err);
    TM_ASSERT((st == TM_OK) == (t != NULL));
    if (st != TM_OK) {
        TM_ASSERT(err.msg[0] && !strchr(err.msg, '\n'));
        return 0;
    }
    for (size_t i = 0; i < TM_ARRAY_LEN(texts); i++)
        check_text(t, texts[i]);
    tm_tokenizer_destroy(t);
    return 0;
}
