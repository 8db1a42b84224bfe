/* tokenizer_config.json, special_tokens_map.json and added_tokens.json: which tokens exist besides the
 * model's and what they are called. Publishers put the same facts into one, two or all of these files, so
 * they are merged: the tokenizer's own file first, then these (InternLM2 has its chat tokens only here). */
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "text/tok/jread.h"
#include "text/tok/tok.h"

const tm_text_file *tm_text_file_find(const tm_text_file *files, int count, const char *name)
{
    for (int i = 0; i < count; i++)
        if (strcmp(files[i].name, name) == 0)
            return &files[i];
    return NULL;
}

static tm_status read_optional(const tm_text_file *files, int count, const char *name, json_t **out,
                               tm_err *err)
{
    const tm_text_file *f = tm_text_file_find(files, count, name);
    if (!f)
        return TM_OK;
    tm_status st = tm_jread_tree(f->data, f->len, out, err);
    if (st == TM_OK && !json_is_object(*out))
        st = TM_FAIL(err, TM_STATUS_DATA, "expected an object, got %s", tm_json_type_name(*out));
    if (st != TM_OK)
        tm_err_prefix(err, "%s", name);
    return st;
}

tm_status tm_tok_config_read(tm_tok_config *out, const tm_text_file *files, int count, tm_err *err)
{
    tm_tok_config c = {.files = files, .file_count = count};
    tm_status st = read_optional(files, count, "tokenizer_config.json", &c.config, err);
    if (st == TM_OK)
        st = read_optional(files, count, "special_tokens_map.json", &c.specials, err);
    if (st == TM_OK)
        st = read_optional(files, count, "added_tokens.json", &c.added, err);
    if (st != TM_OK) {
        tm_tok_config_deinit(&c);
        return st;
    }
    *out = c;
    return TM_OK;
}

void tm_tok_config_deinit(tm_tok_config *c)
{
    json_decref(c->config);
    json_decref(c->specials);
    json_decref(c->added);
    *c = (tm_tok_config){0};
}

/* A token is written as a string or as {"content": ...}. */
static const json_t *token_text(const json_t *v)
{
    if (json_is_object(v))
        v = json_object_get(v, "content");
    return json_is_string(v) ? v : NULL;
}

tm_status tm_tok_name(tm_tokenizer *t, const char *name, const char *value, tm_err *err)
{
    if (t->name_count == TM_SPECIAL_NAMES_MAX || tm_tokenizer_special(t, name))
        return TM_OK;
    tm_special_name n = {strdup(name), strdup(value)};
    if (!n.name || !n.value) {
        free(n.name);
        free(n.value);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    }
    t->names[t->name_count++] = n;
    return TM_OK;
}

/* A token that a config calls special is one, even when no list of added tokens mentions it. */
static tm_status add_special_text(tm_tokenizer *t, const json_t *text, tm_err *err)
{
    const char *s = json_string_value(text);
    size_t len = json_string_length(text);
    for (int i = 0; i < 2; i++)
        if (tm_added_find(&t->added[i], s, len))
            return TM_OK;
    int32_t id = tm_tok_lookup(t, s, len);
    if (id < 0 || (t->vocab.tokens[id].flags & TM_TOKEN_ADDED))
        return TM_OK;
    return tm_tok_add(t, &(tm_added_spec){.text = s, .len = len, .id = id, .special = true}, err);
}

static tm_status apply_name(tm_tokenizer *t, const char *name, const json_t *value, tm_err *err)
{
    const json_t *text = token_text(value);
    if (!text)
        return TM_OK;
    TM_TRY(tm_tok_name(t, name, json_string_value(text), err));
    return add_special_text(t, text, err);
}

/* Every key that ends in "_token" names one; templates use bos_token, eos_token and more by these names. The
 * further ones are a list, or an object of named ones. */
static tm_status apply_names(tm_tokenizer *t, json_t *from, tm_err *err)
{
    static const char *const lists[] = {"additional_special_tokens", "extra_special_tokens"};
    const char *key;
    json_t *v;
    json_object_foreach(from, key, v)
    {
        size_t n = strlen(key);
        if (n > 6 && strcmp(key + n - 6, "_token") == 0)
            TM_TRY(apply_name(t, key, v, err));
    }
    for (size_t k = 0; from && k < TM_ARRAY_LEN(lists); k++) {
        json_t *list = json_object_get(from, lists[k]);
        json_object_foreach(list, key, v)
        {
            TM_TRY(apply_name(t, key, v, err));
        }
        for (size_t i = 0; i < json_array_size(list); i++) {
            const json_t *text = token_text(json_array_get(list, i));
            if (text)
                TM_TRY(add_special_text(t, text, err));
        }
    }
    return TM_OK;
}

static tm_status parse_id(const char *s, int32_t *id, tm_err *err)
{
    char *end;
    long v = strtol(s, &end, 10);
    if (end == s || *end || v < 0 || v >= TM_VOCAB_IDS_MAX)
        return TM_FAIL(err, TM_STATUS_DATA, "\"%.40s\" is not a token id", s);
    *id = (int32_t)v;
    return TM_OK;
}

static tm_status apply_decoder_entry(tm_tokenizer *t, const char *key, const json_t *v, tm_err *err)
{
    tm_added_spec a = {0};
    TM_TRY(parse_id(key, &a.id, err));
    const json_t *text = token_text(v);
    if (!text)
        return TM_FAIL(err, TM_STATUS_DATA, "%s.content: expected a string", key);
    a.text = json_string_value(text);
    a.len = json_string_length(text);
    TM_TRY(tm_json_bool(v, "special", &a.special, err));
    TM_TRY(tm_json_bool(v, "normalized", &a.normalized, err));
    TM_TRY(tm_json_bool(v, "lstrip", &a.lstrip, err));
    TM_TRY(tm_json_bool(v, "rstrip", &a.rstrip, err));
    TM_TRY(tm_json_bool(v, "single_word", &a.single_word, err));
    return tm_tok_add(t, &a, err);
}

static tm_status apply_decoder(tm_tokenizer *t, json_t *list, tm_err *err)
{
    const char *key;
    json_t *v;
    json_object_foreach(list, key, v)
    {
        tm_status st = apply_decoder_entry(t, key, v, err);
        if (st != TM_OK) {
            tm_err_prefix(err, "tokenizer_config.json: added_tokens_decoder");
            return st;
        }
    }
    return TM_OK;
}

static tm_status apply_added(tm_tokenizer *t, json_t *list, tm_err *err)
{
    const char *key;
    json_t *v;
    json_object_foreach(list, key, v)
    {
        size_t len = strlen(key);
        if (!json_is_integer(v) || json_integer_value(v) < 0 ||
            json_integer_value(v) >= TM_VOCAB_IDS_MAX)
            return TM_FAIL(err, TM_STATUS_DATA, "added_tokens.json: \"%.40s\": expected an id",
                           key);
        int32_t id = (int32_t)json_integer_value(v);
        if (tm_vocab_has(&t->vocab, id) && (t->vocab.tokens[id].flags & TM_TOKEN_ADDED))
            continue;
        TM_TRY(tm_tok_add(t, &(tm_added_spec){.text = key, .len = len, .id = id}, err));
    }
    return TM_OK;
}

tm_status tm_tok_config_apply(const tm_tok_config *c, tm_tokenizer *t, tm_err *err)
{
    json_t *decoder = c->config ? tm_json_get(c->config, "added_tokens_decoder") : NULL;
    if (decoder && !json_is_object(decoder))
        return TM_FAIL(err, TM_STATUS_DATA,
                       "tokenizer_config.json: added_tokens_decoder: expected an object, got %s",
                       tm_json_type_name(decoder));
    TM_TRY(apply_decoder(t, decoder, err));
    TM_TRY(apply_added(t, c->added, err));
    tm_added_build(&t->added[0]);
    tm_added_build(&t->added[1]);
    TM_TRY(apply_names(t, c->config, err));
    TM_TRY(apply_names(t, c->specials, err));
    tm_added_build(&t->added[0]);
    tm_added_build(&t->added[1]);
    const char *eos = tm_tokenizer_special(t, "eos_token");
    t->eos = eos ? tm_tok_lookup(t, eos, strlen(eos)) : -1;
    return TM_OK;
}

bool tm_tok_config_class(const tm_tok_config *c, const char *name)
{
    const char *is = NULL;
    size_t n = strlen(name);
    if (!c->config || tm_json_str(c->config, "tokenizer_class", &is, NULL) != TM_OK || !is)
        return false;
    return strncmp(is, name, n) == 0 && (!is[n] || strcmp(is + n, "Fast") == 0);
}

/* Only these classes build their own post-processor from the two flags; the generic fast class keeps what
 * the tokenizer's file says. */
static bool class_obeys_flags(const tm_tok_config *c)
{
    static const char *const classes[] = {
        "LlamaTokenizer",     "CodeLlamaTokenizer", "GemmaTokenizer",   "CohereTokenizer",
        "InternLM2Tokenizer", "InternLMTokenizer",  "BaichuanTokenizer"};
    for (size_t i = 0; i < TM_ARRAY_LEN(classes); i++)
        if (tm_tok_config_class(c, classes[i]))
            return true;
    return false;
}

static tm_status set_end(tm_tokenizer *t, const json_t *config, const char *flag, const char *name,
                         tm_ids *ids, tm_err *err)
{
    if (!json_is_boolean(tm_json_get(config, flag)))
        return TM_OK;
    ids->n = 0;
    if (!json_is_true(tm_json_get(config, flag)))
        return TM_OK;
    const char *text = tm_tokenizer_special(t, name);
    int32_t id = text ? tm_tok_lookup(t, text, strlen(text)) : -1;
    if (id < 0)
        return TM_FAIL(err, TM_STATUS_DATA,
                       "tokenizer_config.json: %s is true, but %s is not a known token", flag,
                       name);
    return tm_ids_push(ids, id) ? TM_OK : TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
}

tm_status tm_tok_config_ends(const tm_tok_config *c, tm_tokenizer *t, bool always, tm_err *err)
{
    if (!c->config || !(always || class_obeys_flags(c)))
        return TM_OK;
    TM_TRY(set_end(t, c->config, "add_bos_token", "bos_token", &t->prefix, err));
    return set_end(t, c->config, "add_eos_token", "eos_token", &t->suffix, err);
}
