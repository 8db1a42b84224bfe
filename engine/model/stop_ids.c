/* The ids that end a text: the union over the files that may name them.
 *
 * One file alone is not enough: Llama 3 lists <|eot_id|> only in generation_config.json, Qwen's chat end
 * stands only in tokenizer_config.json, as text. The text is looked up among the added tokens of
 * tokenizer_config.json, then of tokenizer.json. */
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/file.h"
#include "common/json.h"
#include "common/log.h"
#include "engine/model/arch.h"

#define TOKENIZER_BYTES_MAX ((size_t)256 << 20)

typedef struct id_set {
    int32_t *ids;
    int count, max, vocab;
} id_set;

static tm_status add_id(id_set *s, const char *file, const json_t *v, tm_err *err)
{
    if (!json_is_integer(v))
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: eos_token_id: expected integers, got %s", file,
                       tm_json_type_name(v));
    json_int_t id = json_integer_value(v);
    if (id < 0)
        return TM_OK; /* -1 is how some configs say "none" */
    if (id >= s->vocab)
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "%s: eos_token_id: %lld is outside the vocabulary of %d", file,
                       (long long)id, s->vocab);
    for (int i = 0; i < s->count; i++)
        if (s->ids[i] == (int32_t)id)
            return TM_OK;
    if (s->count == s->max)
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: eos_token_id: more than %d stop ids in all",
                       file, s->max);
    s->ids[s->count++] = (int32_t)id;
    return TM_OK;
}

/* eos_token_id: an integer, a list, or nothing. */
static tm_status add_ids(id_set *s, const char *file, const json_t *root, tm_err *err)
{
    const json_t *v = tm_json_get(root, "eos_token_id");
    if (!v)
        return TM_OK;
    if (!json_is_array(v))
        return add_id(s, file, v, err);
    for (size_t i = 0; i < json_array_size(v); i++)
        TM_TRY(add_id(s, file, json_array_get(v, i), err));
    return TM_OK;
}

/* Absent is fine: *root stays NULL. */
static tm_status load_optional(const char *dir, const char *name, json_t **root, tm_err *err)
{
    char path[4096];
    if (!tm_path_join(path, sizeof(path), dir, name) || !tm_file_exists(path))
        return TM_OK;
    return tm_json_load_file(path, TOKENIZER_BYTES_MAX, root, err);
}

/* added_tokens_decoder of tokenizer_config.json: {"2": {"content": "</s>"}}. -1: not there. */
static json_int_t id_in_decoder(const json_t *config, const char *text)
{
    const char *key;
    json_t *v;
    json_object_foreach(tm_json_get(config, "added_tokens_decoder"), key, v)
    {
        const char *content = json_string_value(tm_json_get(v, "content"));
        if (content && strcmp(content, text) == 0)
            return strtoll(key, NULL, 10);
    }
    return -1;
}

/* added_tokens of tokenizer.json: [{"id": 2, "content": "</s>"}], then its vocabulary. */
static json_int_t id_in_tokenizer(const json_t *root, const char *text)
{
    const json_t *list = tm_json_get(root, "added_tokens");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *t = json_array_get(list, i);
        const char *content = json_string_value(tm_json_get(t, "content"));
        if (content && strcmp(content, text) == 0)
            return json_integer_value(tm_json_get(t, "id"));
    }
    const json_t *id = tm_json_get(tm_json_get(tm_json_get(root, "model"), "vocab"), text);
    return json_is_integer(id) ? json_integer_value(id) : -1;
}

/* The id of tokenizer_config.json's eos_token, which is a text or {"content": text}. */
static tm_status add_eos_token(id_set *s, const char *dir, tm_err *err)
{
    json_t *config = NULL, *tok = NULL;
    TM_TRY(load_optional(dir, "tokenizer_config.json", &config, err));
    const json_t *v = tm_json_get(config, "eos_token");
    const char *text = json_string_value(json_is_object(v) ? tm_json_get(v, "content") : v);
    json_int_t id = text ? id_in_decoder(config, text) : -1;
    tm_err why = TM_ERR_INIT;
    if (text && id < 0 && load_optional(dir, "tokenizer.json", &tok, &why) == TM_OK)
        id = id_in_tokenizer(tok, text);
    if (text && id < 0)
        tm_log(TM_LOG_WARN, "model",
               "the id of eos_token '%s' of tokenizer_config.json is not found", text);
    tm_status st = TM_OK;
    if (id >= 0) {
        json_t *boxed = json_integer(id);
        st = add_id(s, "tokenizer_config.json", boxed, err);
        json_decref(boxed);
    }
    json_decref(tok);
    json_decref(config);
    return st;
}

static int ascending(const void *a, const void *b)
{
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return x < y ? -1 : x > y;
}

tm_status tm_stop_ids_read(const char *dir, const json_t *config, int vocab, int32_t *ids, int max,
                           int *count, tm_err *err)
{
    id_set s = {.ids = ids, .max = max, .vocab = vocab};
    json_t *gen = NULL;
    TM_TRY(add_ids(&s, "config.json", config, err));
    TM_TRY(load_optional(dir, "generation_config.json", &gen, err));
    tm_status st = add_ids(&s, "generation_config.json", gen, err);
    json_decref(gen);
    if (st != TM_OK)
        return st;
    TM_TRY(add_eos_token(&s, dir, err));
    qsort(ids, (size_t)s.count, sizeof(ids[0]), ascending);
    *count = s.count;
    return TM_OK;
}
