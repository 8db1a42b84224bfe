/* A public request as the body that the HTTP API would get for it.
 *
 * The fields then go through the same table of bounds, the same messages and the same tokenizing, so that
 * the two faces cannot drift apart; the price is one small JSON document per request. */
#include <jansson.h>
#include <math.h>
#include <string.h>

#include "common/check.h"
#include "router/grpc/call.h"

#define LOGPROBS_MAX 20

typedef PUB(SamplingParams) sampling_params;

static const struct {
    const char *key;
    enum { FLOAT, INT32, INT64, FLAG } kind;
    size_t has, at;
} g_rows[] = {
#define ROW(field, kind)                                                                           \
    {                                                                                              \
#field, kind, offsetof(sampling_params, has_##field), offsetof(sampling_params, field)     \
    }
    ROW(temperature, FLOAT),
    ROW(top_p, FLOAT),
    ROW(top_k, INT32),
    ROW(min_p, FLOAT),
    ROW(repetition_penalty, FLOAT),
    ROW(presence_penalty, FLOAT),
    ROW(frequency_penalty, FLOAT),
    ROW(seed, INT64),
    ROW(max_tokens, INT32),
    ROW(min_tokens, INT32),
    ROW(ignore_eos, FLAG),
#undef ROW
};

/* NULL without memory; a number that JSON does not have is refused before. */
static json_t *value_at(const sampling_params *s, size_t row)
{
    const char *at = (const char *)s + g_rows[row].at;
    switch (g_rows[row].kind) {
    case FLOAT:
        return json_real((double)*(const float *)(const void *)at);
    case INT32:
        return json_integer(*(const int32_t *)(const void *)at);
    case INT64:
        return json_integer(*(const int64_t *)(const void *)at);
    case FLAG:
        return json_boolean(*(const protobuf_c_boolean *)(const void *)at);
    }
    return NULL;
}

static bool no_memory(tm_api_error *e)
{
    return tm_api_fail(e, TM_API_INTERNAL, NULL, NULL);
}

static bool set(json_t *root, const char *key, json_t *v, tm_api_error *e)
{
    return json_object_set_new(root, key, v) == 0 || no_memory(e);
}

/* The only way that jansson refuses a string, beside want of memory, is bad UTF-8. */
static bool make_text(json_t **out, const char *name, const void *data, size_t len, tm_api_error *e)
{
    *out = json_stringn(data != NULL ? data : "", len);
    return *out != NULL ||
           tm_api_fail(e, TM_API_INVALID_VALUE, name, "'%s' must be valid UTF-8.", name);
}

static bool set_text(json_t *root, const char *key, const char *text, tm_api_error *e)
{
    json_t *v;
    if (text == NULL)
        return true;
    return make_text(&v, key, text, strlen(text), e) && set(root, key, v, e);
}

static bool set_ids(json_t *root, const char *key, const int32_t *ids, size_t n, tm_api_error *e)
{
    json_t *list = json_array();
    for (size_t i = 0; i < n && list != NULL; i++)
        if (json_array_append_new(list, json_integer(ids[i])) != 0) {
            json_decref(list);
            list = NULL;
        }
    return set(root, key, list, e);
}

static bool set_stops(json_t *root, const sampling_params *s, tm_api_error *e)
{
    json_t *list = json_array(), *v;
    if (!set(root, "stop", list, e)) /* the root owns it from here on */
        return false;
    for (size_t i = 0; i < s->n_stop; i++) {
        if (!make_text(&v, "stop", s->stop[i], strlen(s->stop[i]), e))
            return false;
        if (json_array_append_new(list, v) != 0)
            return no_memory(e);
    }
    return true;
}

static bool set_sampling(json_t *root, const sampling_params *s, tm_api_error *e)
{
    if (s == NULL)
        return true;
    for (size_t i = 0; i < TM_ARRAY_LEN(g_rows); i++) {
        const char *base = (const char *)s;
        if (!*(const protobuf_c_boolean *)(const void *)(base + g_rows[i].has))
            continue;
        if (g_rows[i].kind == FLOAT &&
            !isfinite(*(const float *)(const void *)(base + g_rows[i].at)))
            return tm_api_fail(e, TM_API_INVALID_VALUE, g_rows[i].key,
                               "'%s' must be a finite number.", g_rows[i].key);
        if (!set(root, g_rows[i].key, value_at(s, i), e))
            return false;
    }
    if (s->has_logprobs && (s->logprobs < 0 || s->logprobs > LOGPROBS_MAX))
        return tm_api_fail(e, TM_API_INVALID_VALUE, "logprobs",
                           "The logprobs `%d` must be in [0, %d].", s->logprobs, LOGPROBS_MAX);
    return (s->n_stop == 0 || set_stops(root, s, e)) &&
           (s->n_stop_token_id == 0 ||
            set_ids(root, "stop_token_ids", s->stop_token_id, s->n_stop_token_id, e));
}

static bool set_prompt(json_t *root, const PUB(GenerateRequest) * r, tm_api_error *e)
{
    json_t *v;
    switch (r->prompt_case) {
    case TURBOMESH__V1__GENERATE_REQUEST__PROMPT_TEXT:
        return make_text(&v, "prompt", r->text.data, r->text.len, e) && set(root, "prompt", v, e);
    case TURBOMESH__V1__GENERATE_REQUEST__PROMPT_TOKENS:
        return set_ids(root, "prompt", r->tokens->id, r->tokens->n_id, e);
    default:
        return true; /* the check of required fields names it */
    }
}

static bool set_messages(json_t *root, const PUB(ChatRequest) * r, tm_api_error *e)
{
    json_t *list = json_array(), *content;
    if (!set(root, "messages", list, e))
        return false;
    for (size_t i = 0; i < r->n_message; i++) {
        const PUB(ChatMessage) *m = r->message[i];
        json_t *row = json_object();
        if (row == NULL || json_array_append_new(list, row) != 0)
            return no_memory(e);
        if (!set_text(row, "role", m->role, e) ||
            !make_text(&content, "messages", m->content.data, m->content.len, e) ||
            !set(row, "content", content, e))
            return false;
    }
    return true;
}

static void take_logprobs(tm_api_params *p, const sampling_params *s)
{
    if (s == NULL || !s->has_logprobs)
        return;
    p->logprobs = true;
    p->top_logprobs = s->logprobs;
}

static bool fill(json_t *root, const tm_public_ask *ask, tm_api_error *e)
{
    return set_text(root, "model", ask->model, e) &&
           set_text(root, "session_id", ask->session, e) && set_sampling(root, ask->sampling, e) &&
           (ask->chat != NULL ? set_messages(root, ask->chat, e)
                              : set_prompt(root, ask->generate, e));
}

tm_prep *tm_public_prep(const tm_public_ask *ask, const tm_api_limits *limits, tm_api_error *e)
{
    json_t *root = json_object();
    if (root == NULL || !fill(root, ask, e)) {
        if (root == NULL)
            no_memory(e);
        json_decref(root);
        return NULL;
    }
    bool chat = ask->chat != NULL;
    tm_prep *p = tm_prep_create(chat ? TM_PREP_CHAT : TM_PREP_COMPLETION, root, limits);
    if (p == NULL) {
        no_memory(e);
        return NULL;
    }
    if (!tm_api_params_parse(&p->params, root, chat ? TM_API_CHAT : TM_API_COMPLETION, limits, NULL,
                             NULL, e)) {
        tm_prep_destroy(p);
        return NULL;
    }
    take_logprobs(&p->params, ask->sampling);
    return p;
}
