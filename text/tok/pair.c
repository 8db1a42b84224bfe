/* vocab.json with merges.txt: byte-level BPE in two files, older than tokenizer.json. What they leave out
 * (pattern, normaliser) stands in the code of the tokenizer's class. The two are put together to the
 * tokenizer.json that the class would write, so there is one reader for both. */
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "text/tok/tok.h"

#define SPLIT_HEAD                                                                                 \
    "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\","             \
    "\"behavior\":\"Isolated\",\"pattern\":{\"Regex\":"
#define SPLIT_TAIL "}},{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}]},"

static const struct {
    const char *class_name;
    const char *normalizer;
    const char *pattern; /* NULL = that of GPT-2, with add_prefix_space */
} classes[] = {
    {"Qwen2Tokenizer", "{\"type\":\"NFC\"}",
     "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+"
     "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
    {"GPT2Tokenizer", "null", NULL},
};

static void put_merges(tm_jw *w, const tm_text_file *f)
{
    tm_jw_arr(w);
    for (size_t pos = 0; pos < f->len;) {
        const char *s = f->data + pos, *end = memchr(s, '\n', f->len - pos);
        size_t n = end ? (size_t)(end - s) : f->len - pos;
        bool comment = pos == 0 && n > 8 && memcmp(s, "#version", 8) == 0;
        pos += n + 1;
        if (n > 0 && s[n - 1] == '\r')
            n--;
        if (n > 0 && !comment)
            tm_jw_strn(w, s, n);
    }
    tm_jw_arr_end(w);
}

static void put_file(tm_buf *b, size_t row, bool prefix_space, const tm_text_file *vocab,
                     const tm_text_file *merges)
{
    tm_jw w;
    tm_jw_init(&w, b);
    tm_buf_printf(b, "{\"normalizer\":%s,\"decoder\":{\"type\":\"ByteLevel\"},",
                  classes[row].normalizer);
    if (classes[row].pattern) {
        tm_buf_puts(b, SPLIT_HEAD);
        tm_jw_str(&w, classes[row].pattern);
        tm_buf_puts(b, SPLIT_TAIL);
    } else {
        tm_buf_printf(b, "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":%s},",
                      prefix_space ? "true" : "false");
    }
    tm_buf_puts(b, "\"model\":{\"type\":\"BPE\",\"vocab\":");
    tm_buf_append(b, vocab->data, vocab->len);
    tm_buf_puts(b, ",\"merges\":");
    tm_jw_init(&w, b);
    put_merges(&w, merges);
    tm_buf_puts(b, "}}");
}

tm_status tm_tok_load_pair(tm_tokenizer *t, const tm_text_file *file, const tm_tok_config *c,
                           tm_err *err)
{
    const tm_text_file *merges = tm_text_file_find(c->files, c->file_count, "merges.txt");
    size_t row = 0;
    bool prefix_space = false;
    if (!merges)
        return TM_FAIL(err, TM_STATUS_DATA, "merges.txt is missing beside it");
    if (c->config)
        TM_TRY(tm_json_bool(c->config, "add_prefix_space", &prefix_space, err));
    while (row + 1 < TM_ARRAY_LEN(classes) && !tm_tok_config_class(c, classes[row].class_name))
        row++;
    tm_buf b;
    tm_buf_init(&b, 2 * TM_TOKENIZER_FILE_MAX);
    put_file(&b, row, prefix_space, file, merges);
    tm_status st =
        b.failed ? TM_FAIL(err, TM_STATUS_TOO_LARGE, "too large with its merges") : TM_OK;
    if (st == TM_OK)
        st = tm_tok_load_hf(t, &(tm_text_file){file->name, b.data, b.len}, c, err);
    tm_buf_deinit(&b);
    return st;
}
