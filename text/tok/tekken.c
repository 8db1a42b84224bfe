/* tekken.json of Mistral: ranks of byte strings behind a block of special tokens, the pattern in the file. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/hash.h"
#include "common/json.h"
#include "text/tok/jread.h"
#include "text/tok/tok.h"

#define TOKEN_MAX 1024

/* The names of the first tokens in files that do not list them. */
static const char *const first_specials[] = {"<unk>",
                                             "<s>",
                                             "</s>",
                                             "[INST]",
                                             "[/INST]",
                                             "[AVAILABLE_TOOLS]",
                                             "[/AVAILABLE_TOOLS]",
                                             "[TOOL_RESULTS]",
                                             "[/TOOL_RESULTS]",
                                             "[TOOL_CALLS]"};

typedef struct loader {
    tm_tokenizer *t;
    const json_t *root;
    const char *pattern;
    int64_t vocab_size, special_count;
    tm_err *err;
} loader;

static tm_status read_config(loader *l)
{
    const json_t *c = tm_json_get(l->root, "config");
    if (!json_is_object(c))
        return TM_FAIL(l->err, TM_STATUS_DATA, "config: expected an object, got %s",
                       tm_json_type_name(c));
    TM_TRY(tm_json_str(c, "pattern", &l->pattern, l->err));
    TM_TRY(tm_json_int(c, "default_vocab_size", 1, TM_VOCAB_IDS_MAX, &l->vocab_size, l->err));
    TM_TRY(
        tm_json_int(c, "default_num_special_tokens", 0, TM_ADDED_MAX, &l->special_count, l->err));
    if (!l->pattern || l->vocab_size <= l->special_count)
        return TM_FAIL(l->err, TM_STATUS_DATA,
                       "config: pattern, default_vocab_size or default_num_special_tokens is "
                       "missing or wrong");
    return TM_OK;
}

static tm_status add_ranks(loader *l)
{
    const json_t *list = tm_json_get(l->root, "vocab");
    size_t want = (size_t)(l->vocab_size - l->special_count);
    if (json_array_size(list) < want)
        return TM_FAIL(l->err, TM_STATUS_DATA, "vocab: has %zu entries, config says %zu",
                       json_array_size(list), want);
    for (size_t i = 0; i < want; i++) {
        const json_t *text = tm_json_get(json_array_get(list, i), "token_bytes");
        char bytes[TOKEN_MAX + 3];
        size_t len = json_string_length(text), n = 0;
        if (!json_is_string(text) || len > TOKEN_MAX / 3 * 4 ||
            !tm_base64_bytes(bytes, &n, json_string_value(text), len) || n == 0)
            return TM_FAIL(l->err, TM_STATUS_DATA,
                           "vocab[%zu].token_bytes: expected 1 to %d bytes in base64", i,
                           TOKEN_MAX);
        TM_TRY(tm_vocab_add(&l->t->vocab, (int32_t)(l->special_count + (int64_t)i), bytes, n, NULL,
                            0, 0, l->err));
    }
    return tm_vocab_index(&l->t->vocab, l->err);
}

static tm_status add_special(loader *l, int32_t id, const char *text, bool control)
{
    return tm_tok_add(
        l->t, &(tm_added_spec){.text = text, .len = strlen(text), .id = id, .special = control},
        l->err);
}

static tm_status add_listed(loader *l, const json_t *list, bool *named)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *v = json_array_get(list, i);
        const char *text = NULL;
        int64_t id = -1;
        bool control = true;
        tm_status st = tm_json_int(v, "rank", 0, l->special_count - 1, &id, l->err);
        if (st == TM_OK)
            st = tm_json_str(v, "token_str", &text, l->err);
        if (st == TM_OK)
            st = tm_json_bool(v, "is_control", &control, l->err);
        if (st == TM_OK && (!text || id < 0))
            st = TM_FAIL(l->err, TM_STATUS_DATA, "has no rank or no token_str");
        if (st == TM_OK)
            st = add_special(l, (int32_t)id, text, control);
        if (st != TM_OK) {
            tm_err_prefix(l->err, "special_tokens[%zu]", i);
            return st;
        }
        named[id] = true;
    }
    return TM_OK;
}

static tm_status add_specials(loader *l)
{
    bool *named = calloc((size_t)l->special_count + 1, sizeof(*named));
    if (!named)
        return TM_FAIL(l->err, TM_STATUS_NO_MEMORY, "out of memory");
    const json_t *list = tm_json_get(l->root, "special_tokens");
    tm_status st = add_listed(l, list, named);
    for (int32_t id = 0; id < l->special_count && st == TM_OK; id++) {
        char text[32];
        bool first = !list && id < (int32_t)TM_ARRAY_LEN(first_specials);
        snprintf(text, sizeof(text), "<SPECIAL_%d>", (int)id);
        if (!named[id])
            st = add_special(l, id, first ? first_specials[id] : text, true);
    }
    free(named);
    return st;
}

static tm_status load_all(loader *l, const tm_tok_config *c)
{
    tm_tokenizer *t = l->t;
    t->bpe.bytes = true;
    TM_TRY(read_config(l));
    TM_TRY(tm_norm_create(&t->norm, NULL, l->err));
    TM_TRY(tm_pretok_create_split(&t->pretok, l->pattern, l->err));
    TM_TRY(add_ranks(l));
    TM_TRY(add_specials(l));
    TM_TRY(tm_tok_config_apply(c, t, l->err));
    TM_TRY(tm_tok_name(t, "bos_token", "<s>", l->err));
    TM_TRY(tm_tok_name(t, "eos_token", "</s>", l->err));
    TM_TRY(tm_tok_name(t, "unk_token", "<unk>", l->err));
    const char *eos = tm_tokenizer_special(t, "eos_token");
    const char *bos = tm_tokenizer_special(t, "bos_token");
    int32_t id = tm_tok_lookup(t, bos, strlen(bos));
    t->eos = tm_tok_lookup(t, eos, strlen(eos));
    if (id >= 0 && !tm_ids_push(&t->prefix, id))
        return TM_FAIL(l->err, TM_STATUS_NO_MEMORY, "out of memory");
    TM_TRY(tm_tok_config_ends(c, t, true, l->err));
    return tm_tok_rank_model(t, (int32_t)l->special_count, (int32_t)l->vocab_size, l->err);
}

tm_status tm_tok_load_tekken(tm_tokenizer *t, const tm_text_file *file, const tm_tok_config *c,
                             tm_err *err)
{
    json_t *root;
    TM_TRY(tm_jread_tree(file->data, file->len, &root, err));
    loader l = {.t = t, .root = root, .err = err};
    tm_status st = json_is_object(root) ? load_all(&l, c)
                                        : TM_FAIL(err, TM_STATUS_DATA, "expected an object, got %s",
                                                  tm_json_type_name(root));
    json_decref(root);
    return st;
}
