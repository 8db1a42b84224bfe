/* The field table and the walk over it.
 *
 * One row per field, so that validation, defaults and the test that tries every field at its edges read the
 * same numbers. Fields of the specification that have no effect here are rows too: their type is checked, or
 * they are refused by name when their meaning would be lost silently. */
#include "router/api/fields.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "common/fmt.h"
#include "common/hash.h"
#include "common/json.h"
#include "router/api/field_parse.h"
#include "router/api/tools.h"

#define INT32_TOP 2147483647.0
#define ANY_INT   -0x1p63, 0x1p63
#define OFF(f)    offsetof(tm_api_params, f)
#define NUM(name, routes, min, max, def, field)                                                    \
    {                                                                                              \
        name, routes, TM_API_NUM, min, max, def, OFF(field), NULL, NULL, false                     \
    }
#define INT(name, routes, min, max, def, field)                                                    \
    {                                                                                              \
        name, routes, TM_API_INT, min, max, def, OFF(field), NULL, NULL, false                     \
    }
#define BOOL(name, routes, def, field)                                                             \
    {                                                                                              \
        name, routes, TM_API_BOOL, 0, 0, def, OFF(field), NULL, NULL, false                        \
    }
#define STR(name, routes, max, field)                                                              \
    {                                                                                              \
        name, routes, TM_API_STR, 0, max, 0, OFF(field), NULL, NULL, false                         \
    }
#define CHECKED(name, routes, kind, max)                                                           \
    {                                                                                              \
        name, routes, kind, 0, max, 0, TM_API_NOWHERE, NULL, NULL, false                           \
    }
#define CUSTOM(name, routes, fn)                                                                   \
    {                                                                                              \
        name, routes, TM_API_CUSTOM, 0, 0, 0, TM_API_NOWHERE, NULL, fn, false                      \
    }

static const tm_api_field g_fields[] = {
    STR("model", TM_API_BOTH, 256, model),
    CUSTOM("messages", TM_API_CHAT, tm_api_parse_messages),
    CUSTOM("input_ids", TM_API_CHAT, tm_api_parse_input_ids),
    CUSTOM("prompt", TM_API_COMPLETION, tm_api_parse_prompt),
    /* sampling */
    NUM("temperature", TM_API_BOTH, 0, 2, NAN, temperature),
    {"top_p", TM_API_BOTH, TM_API_NUM, 0, 1, NAN, OFF(top_p), "must be in (0, 1].", NULL, false},
    INT("top_k", TM_API_BOTH, -1, INT32_TOP, -2, top_k),
    NUM("min_p", TM_API_BOTH, 0, 1, 0, min_p),
    NUM("frequency_penalty", TM_API_BOTH, -2, 2, 0, frequency_penalty),
    NUM("presence_penalty", TM_API_BOTH, -2, 2, 0, presence_penalty),
    {"repetition_penalty", TM_API_BOTH, TM_API_NUM, 0, 100, NAN, OFF(repetition_penalty),
     "must be in (0, 100].", NULL, true},
    CUSTOM("seed", TM_API_BOTH, tm_api_parse_seed),
    CUSTOM("logit_bias", TM_API_BOTH, tm_api_parse_logit_bias),
    /* length and stopping */
    INT("max_tokens", TM_API_CHAT, 1, INT32_TOP, -1, max_tokens),
    INT("max_tokens", TM_API_COMPLETION, 0, INT32_TOP, -1, max_tokens),
    INT("max_completion_tokens", TM_API_BOTH, 1, INT32_TOP, -1, max_completion_tokens),
    INT("min_tokens", TM_API_BOTH, 0, INT32_TOP, 0, min_tokens),
    INT("min_new_tokens", TM_API_BOTH, 0, INT32_TOP, 0, min_new_tokens),
    CUSTOM("stop", TM_API_BOTH, tm_api_parse_stop),
    CUSTOM("stop_token_ids", TM_API_BOTH, tm_api_parse_stop_ids),
    BOOL("ignore_eos", TM_API_BOTH, 0, ignore_eos),
    /* what comes back */
    {"n", TM_API_BOTH, TM_API_INT, 1, TM_API_N_MAX, 1, OFF(n), NULL, tm_api_check_n, false},
    INT("best_of", TM_API_COMPLETION, 0, 20, 0, best_of),
    BOOL("logprobs", TM_API_CHAT, 0, logprobs),
    INT("top_logprobs", TM_API_CHAT, 0, 20, -1, top_logprobs),
    INT("logprobs", TM_API_COMPLETION, 0, 5, -1, logprobs_count),
    BOOL("echo", TM_API_COMPLETION, 0, echo),
    BOOL("stream", TM_API_BOTH, 0, stream),
    CUSTOM("stream_options", TM_API_BOTH, tm_api_parse_stream_options),
    BOOL("skip_special_tokens", TM_API_BOTH, 1, skip_special_tokens),
    BOOL("include_stop_str_in_output", TM_API_BOTH, 0, include_stop),
    BOOL("return_token_ids", TM_API_BOTH, 0, return_token_ids),
    CHECKED("spaces_between_special_tokens", TM_API_BOTH, TM_API_BOOL, 0),
    /* placement */
    CUSTOM("session_id", TM_API_BOTH, tm_api_parse_session),
    STR("prompt_cache_key", TM_API_BOTH, 255, prompt_cache_key),
    STR("cache_salt", TM_API_BOTH, 255, cache_salt),
    STR("user", TM_API_BOTH, 64, user),
    INT("priority", TM_API_BOTH, -INT32_TOP, INT32_TOP, 0, priority),
    {"timeout", TM_API_BOTH, TM_API_NUM, 0, 86400, 0, OFF(timeout_s), "must be in (0, 86400].",
     NULL, true},
    /* the template */
    CUSTOM("add_generation_prompt", TM_API_CHAT, tm_api_parse_add_prompt),
    BOOL("continue_final_message", TM_API_CHAT, 0, continue_final_message),
    CUSTOM("chat_template_kwargs", TM_API_CHAT, tm_api_parse_kwargs),
    CUSTOM("enable_thinking", TM_API_CHAT, tm_api_parse_thinking),
    CUSTOM("reasoning_effort", TM_API_CHAT, tm_api_parse_effort),
    /* tools */
    CUSTOM("tools", TM_API_CHAT, tm_api_parse_tools),
    CUSTOM("functions", TM_API_CHAT, tm_api_parse_functions),
    CUSTOM("tool_choice", TM_API_CHAT, tm_api_parse_tool_choice),
    CUSTOM("function_call", TM_API_CHAT, tm_api_parse_function_call),
    BOOL("parallel_tool_calls", TM_API_CHAT, 1, parallel_tool_calls),
    CHECKED("parallel_tool_calls", TM_API_COMPLETION, TM_API_BOOL, 0),
    /* accepted, without effect on the answer */
    CHECKED("safety_identifier", TM_API_BOTH, TM_API_STR, 64),
    CUSTOM("metadata", TM_API_BOTH, tm_api_parse_metadata),
    CHECKED("store", TM_API_BOTH, TM_API_BOOL, 0),
    CHECKED("service_tier", TM_API_BOTH, TM_API_STR, 64),
    CHECKED("verbosity", TM_API_BOTH, TM_API_STR, 64),
    CHECKED("prompt_cache_retention", TM_API_BOTH, TM_API_STR, 64),
    CHECKED("user_id", TM_API_BOTH, TM_API_STR, 255),
    CHECKED("prediction", TM_API_CHAT, TM_API_ANY, 0),
    CHECKED("web_search_options", TM_API_CHAT, TM_API_ANY, 0),
    CHECKED("moderation", TM_API_BOTH, TM_API_ANY, 0),
    CUSTOM("modalities", TM_API_CHAT, tm_api_parse_modalities),
    CUSTOM("response_format", TM_API_BOTH, tm_api_parse_response_format),
    /* refused, because leaving them out would change what the client gets */
    CHECKED("audio", TM_API_CHAT, TM_API_REFUSE, 0),
    CHECKED("suffix", TM_API_COMPLETION, TM_API_REFUSE, 0),
    CHECKED("chat_template", TM_API_CHAT, TM_API_REFUSE, 0),
    CHECKED("bad_words", TM_API_BOTH, TM_API_REFUSE, 0),
    CHECKED("guided_json", TM_API_BOTH, TM_API_REFUSE, 0),
    CHECKED("guided_regex", TM_API_BOTH, TM_API_REFUSE, 0),
    CHECKED("guided_choice", TM_API_BOTH, TM_API_REFUSE, 0),
    CHECKED("guided_grammar", TM_API_BOTH, TM_API_REFUSE, 0),
    CHECKED("structured_outputs", TM_API_BOTH, TM_API_REFUSE, 0),
};

const tm_api_field *tm_api_fields(int *count)
{
    *count = (int)TM_ARRAY_LEN(g_fields);
    return g_fields;
}

tm_api_limits tm_api_limits_default(void)
{
    return (tm_api_limits){.stop_max = 4,
                           .messages_max = 4096,
                           .parts_max = 64,
                           .choices_max = 256,
                           .timeout_max_ms = 3600000};
}

bool tm_api_fail_type(tm_api_error *e, const char *param, const char *want, const json_t *got)
{
    return tm_api_fail(e, TM_API_INVALID_TYPE, param, "Invalid type for '%s': expected %s, got %s.",
                       param, want, tm_json_type_name(got));
}

static const tm_api_field *find_field(const char *name, int route)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(g_fields); i++)
        if ((g_fields[i].routes & route) && strcmp(g_fields[i].name, name) == 0)
            return &g_fields[i];
    return NULL;
}

static void store(tm_api_params *p, const tm_api_field *f, const void *v, size_t size)
{
    if (f->offset != TM_API_NOWHERE)
        memcpy((char *)p + f->offset, v, size);
}

static void set_default(tm_api_params *p, const tm_api_field *f)
{
    bool b = f->def != 0;
    int64_t i = f->kind == TM_API_INT ? (int64_t)f->def : 0;
    if (f->kind == TM_API_BOOL)
        store(p, f, &b, sizeof b);
    else if (f->kind == TM_API_INT)
        store(p, f, &i, sizeof i);
    else if (f->kind == TM_API_NUM)
        store(p, f, &f->def, sizeof f->def);
}

/* "The temperature `2.01` must be in [0, 2]." */
static bool fail_range(tm_api_error *e, const tm_api_field *f, double v)
{
    char got[TM_NUM_MAX], lo[TM_NUM_MAX], hi[TM_NUM_MAX];
    tm_num_format(got, v, false);
    tm_num_format(lo, f->min, false);
    tm_num_format(hi, f->max, false);
    if (f->says)
        return tm_api_fail(e, TM_API_INVALID_VALUE, f->name, "The %s `%s` %s", f->name, got,
                           f->says);
    return tm_api_fail(e, TM_API_INVALID_VALUE, f->name, "The %s `%s` must be in [%s, %s].",
                       f->name, got, lo, hi);
}

static bool in_range(const tm_api_field *f, double v)
{
    return (f->open_min ? v > f->min : v >= f->min) && v <= f->max;
}

static bool parse_number(tm_api_params *p, const tm_api_field *f, const json_t *v, tm_api_error *e)
{
    bool whole = f->kind == TM_API_INT;
    if (!json_is_number(v))
        return tm_api_fail_type(e, f->name, whole ? "an integer" : "a number", v);
    double d = json_number_value(v);
    /* 1.0 is accepted where an integer is wanted, 1.5 is not. */
    if (whole && d != floor(d))
        return tm_api_fail_type(e, f->name, "an integer", v);
    if (!in_range(f, d))
        return fail_range(e, f, d);
    int64_t i = (int64_t)d;
    if (whole)
        store(p, f, &i, sizeof i);
    else
        store(p, f, &d, sizeof d);
    return true;
}

bool tm_api_plain_string(const json_t *v)
{
    return json_is_string(v) && strlen(json_string_value(v)) == json_string_length(v);
}

static bool parse_string(tm_api_params *p, const tm_api_field *f, const json_t *v, tm_api_error *e)
{
    if (!json_is_string(v))
        return tm_api_fail_type(e, f->name, "a string", v);
    if (!tm_api_plain_string(v))
        return tm_api_fail(e, TM_API_INVALID_VALUE, f->name,
                           "'%s' must not contain NUL characters.", f->name);
    if ((double)json_string_length(v) > f->max)
        return tm_api_fail(e, TM_API_INVALID_VALUE, f->name,
                           "'%s' has %zu bytes, at most %.0f are allowed.", f->name,
                           json_string_length(v), f->max);
    const char *s = json_string_value(v);
    store(p, f, &s, sizeof s);
    return true;
}

/* Values that ask for nothing. */
static bool is_empty(const json_t *v)
{
    return json_is_false(v) || (json_is_string(v) && json_string_length(v) == 0) ||
           (json_is_array(v) && json_array_size(v) == 0) ||
           (json_is_object(v) && json_object_size(v) == 0);
}

static bool parse_field(tm_api_params *p, const tm_api_field *f, const json_t *v,
                        const tm_api_limits *limits, tm_api_error *e)
{
    bool b = json_is_true(v);
    switch (f->kind) {
    case TM_API_BOOL:
        if (!json_is_boolean(v))
            return tm_api_fail_type(e, f->name, "a boolean", v);
        store(p, f, &b, sizeof b);
        return true;
    case TM_API_INT:
    case TM_API_NUM:
        if (f->parse && !f->parse(p, f, v, limits, e))
            return false;
        return parse_number(p, f, v, e);
    case TM_API_STR:
        return parse_string(p, f, v, e);
    case TM_API_CUSTOM:
        return f->parse(p, f, v, limits, e);
    case TM_API_ANY:
        return true;
    case TM_API_REFUSE:
        if (is_empty(v))
            return true;
        return tm_api_fail(e, TM_API_UNSUPPORTED, f->name, "'%s' is not supported by this server.",
                           f->name);
    }
    return true;
}

/* Rules between fields. */
static bool check_together(const tm_api_params *p, int route, tm_api_error *e)
{
    if (p->has_stream_options && !p->stream)
        return tm_api_fail(e, TM_API_INVALID_VALUE, "stream_options",
                           "'stream_options' is only allowed when 'stream' is true.");
    if (p->top_logprobs >= 0 && !p->logprobs)
        return tm_api_fail(e, TM_API_INVALID_VALUE, "top_logprobs",
                           "'top_logprobs' is only allowed when 'logprobs' is true.");
    if (p->best_of > 0 && p->best_of < p->n)
        return tm_api_fail(e, TM_API_INVALID_VALUE, "best_of",
                           "The best_of `%d` must not be less than n `%d`.", (int)p->best_of,
                           (int)p->n);
    if (p->best_of > 0 && p->best_of != p->n)
        return tm_api_fail(e, TM_API_UNSUPPORTED, "best_of",
                           "'best_of' is only supported when it equals 'n'.");
    int64_t max = p->max_completion_tokens >= 0 ? p->max_completion_tokens : p->max_tokens;
    const char *max_name = p->max_completion_tokens >= 0 ? "max_completion_tokens" : "max_tokens";
    if (max == 0 && !p->echo)
        return tm_api_fail(e, TM_API_INVALID_VALUE, max_name,
                           "The %s `0` must be at least 1 unless echo is true.", max_name);
    if (max >= 0 && TM_MAX(p->min_tokens, p->min_new_tokens) > max)
        return tm_api_fail(
            e, TM_API_INVALID_VALUE, p->min_tokens > max ? "min_tokens" : "min_new_tokens",
            "The min_tokens `%lld` must not be more than %s `%lld`.",
            (long long)TM_MAX(p->min_tokens, p->min_new_tokens), max_name, (long long)max);
    if (p->continue_final_message && p->has_add_generation_prompt && p->add_generation_prompt)
        return tm_api_fail(
            e, TM_API_INVALID_VALUE, "continue_final_message",
            "'continue_final_message' and 'add_generation_prompt' exclude each other.");
    if (route == TM_API_CHAT && !tm_api_tools_check(p, e))
        return false;
    if (route == TM_API_CHAT && !p->messages && !p->input_ids)
        return tm_api_fail(e, TM_API_MISSING, "messages",
                           "Missing required parameter: 'messages'.");
    if (route == TM_API_COMPLETION && !p->prompt)
        return tm_api_fail(e, TM_API_MISSING, "prompt", "Missing required parameter: 'prompt'.");
    return true;
}

bool tm_api_params_parse(tm_api_params *p, const json_t *root, int route,
                         const tm_api_limits *limits, void (*unknown)(void *user, const char *key),
                         void *user, tm_api_error *e)
{
    *p = (tm_api_params){.add_generation_prompt = true};
    if (!json_is_object(root))
        return tm_api_fail(e, TM_API_INVALID_TYPE, NULL, "The body must be a JSON object, got %s.",
                           tm_json_type_name(root));
    for (size_t i = 0; i < TM_ARRAY_LEN(g_fields); i++)
        if (g_fields[i].routes & route)
            set_default(p, &g_fields[i]);
    /* What the route has no row for keeps its neutral value. */
    if (route == TM_API_CHAT)
        p->logprobs_count = -1;
    else
        p->top_logprobs = -1;
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)root, key, v)
    {
        const tm_api_field *f = find_field(key, route);
        if (!f && unknown)
            unknown(user, key);
        if (f && !json_is_null(v) && !parse_field(p, f, v, limits, e))
            return false;
    }
    if (!p->model)
        return tm_api_fail(e, TM_API_MISSING, "model", "Missing required parameter: 'model'.");
    if (p->continue_final_message && !p->has_add_generation_prompt)
        p->add_generation_prompt = false;
    return check_together(p, route, e);
}

static float or_default(double v, float def)
{
    return isnan(v) ? def : (float)v;
}

static bool add_bias(tm_logit_bias *bias, size_t *count, const json_t *map, int32_t vocab,
                     tm_api_error *e)
{
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)map, key, v)
    {
        int64_t id = -1;
        if (!tm_api_token_key(key, &id) || id >= vocab)
            return tm_api_fail(
                e, TM_API_INVALID_VALUE, "logit_bias",
                "'logit_bias' names a token that the vocabulary of %d tokens does not have.",
                vocab);
        bias[(*count)++] = (tm_logit_bias){(int32_t)id, (float)json_number_value(v)};
    }
    return true;
}

bool tm_api_params_sampling(const tm_api_params *p, const tm_served *served, tm_logit_bias *bias,
                            tm_sampling *out, tm_api_error *e)
{
    tm_sampling s = tm_sampling_default();
    s.temperature = or_default(p->temperature, served->temperature);
    s.top_p = or_default(p->top_p, served->top_p);
    s.repetition_penalty = or_default(p->repetition_penalty, served->repetition_penalty);
    s.top_k = p->top_k == -2 ? served->top_k : (int32_t)TM_MAX(p->top_k, 0);
    s.min_p = (float)p->min_p;
    s.frequency_penalty = (float)p->frequency_penalty;
    s.presence_penalty = (float)p->presence_penalty;
    s.min_tokens = (int32_t)TM_MAX(p->min_tokens, p->min_new_tokens);
    s.ignore_eos = p->ignore_eos;
    s.seed = (uint64_t)p->seed;
    if (!p->has_seed)
        tm_random_bytes(&s.seed, sizeof s.seed);
    if (p->logprobs)
        s.logprobs = (int32_t)TM_MAX(p->top_logprobs, 0);
    else if (p->logprobs_count >= 0)
        s.logprobs = (int32_t)p->logprobs_count;
    s.prompt_logprobs = p->echo ? s.logprobs : -1;
    for (int i = 0; i < p->stop_id_count; i++)
        if (p->stop_ids[i] >= served->vocab)
            return tm_api_fail(
                e, TM_API_INVALID_VALUE, "stop_token_ids",
                "'stop_token_ids' has a token that the vocabulary of %d tokens does not have.",
                served->vocab);
    size_t count = 0;
    if (p->logit_bias && !add_bias(bias, &count, p->logit_bias, served->vocab, e))
        return false;
    s.logit_bias = count ? bias : NULL;
    s.logit_bias_count = count;
    *out = s;
    return true;
}
