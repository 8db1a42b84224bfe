/* Parsers of single fields: stop strings, bias maps, affinity keys and the small structured ones. */
#include "router/api/field_parse.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "common/fmt.h"
#include "common/json.h"

#define METADATA_MAX       16
#define METADATA_KEY_MAX   64
#define METADATA_VALUE_MAX 512

/* One value of an array, for messages: "stop[2]". */
static const char *indexed(char out[96], const char *name, size_t i)
{
    snprintf(out, 96, "%s[%zu]", name, i);
    return out;
}

TM_API_PARSER(tm_api_check_n)
{
    (void)p;
    (void)limits;
    double d = json_number_value(v);
    char got[TM_NUM_MAX];
    if (!json_is_number(v) || d != floor(d) || d >= f->min)
        return true;
    tm_num_format(got, d, false);
    return tm_api_fail(e, TM_API_INVALID_VALUE, f->name, "The %s `%s` must be a positive int.",
                       f->name, got);
}

TM_API_PARSER(tm_api_parse_messages)
{
    /* A bare string is LMDeploy's short form of one user message. */
    if (!json_is_array(v) && !json_is_string(v))
        return tm_api_fail_type(e, f->name, "an array", v);
    if (json_is_array(v) && (int64_t)json_array_size(v) > limits->messages_max)
        return tm_api_fail(e, TM_API_INVALID_VALUE, f->name,
                           "%zu messages, at most %lld are allowed.", json_array_size(v),
                           (long long)limits->messages_max);
    p->messages = v;
    return true;
}

TM_API_PARSER(tm_api_parse_input_ids)
{
    (void)limits;
    if (!json_is_array(v))
        return tm_api_fail_type(e, f->name, "an array of token ids", v);
    p->input_ids = json_array_size(v) > 0 ? v : NULL;
    return true;
}

TM_API_PARSER(tm_api_parse_prompt)
{
    (void)limits;
    if (!json_is_string(v) && !json_is_array(v))
        return tm_api_fail_type(e, f->name, "a string or an array", v);
    p->prompt = v;
    return true;
}

TM_API_PARSER(tm_api_parse_seed)
{
    (void)limits;
    double d = json_number_value(v);
    if (!json_is_integer(v) && !(json_is_real(v) && d == floor(d) && fabs(d) < 0x1p63))
        return tm_api_fail_type(e, f->name, "an integer", v);
    p->seed = json_is_integer(v) ? json_integer_value(v) : (int64_t)d;
    p->has_seed = true;
    return true;
}

bool tm_api_token_key(const char *key, int64_t *id)
{
    int64_t v = 0;
    if (!*key)
        return false;
    for (const char *c = key; *c; c++) {
        if (*c < '0' || *c > '9')
            return false;
        v = v * 10 + (*c - '0');
        if (v > INT32_MAX)
            return false;
    }
    *id = v;
    return true;
}

TM_API_PARSER(tm_api_parse_logit_bias)
{
    (void)limits;
    if (!json_is_object(v))
        return tm_api_fail_type(e, f->name, "an object", v);
    if (json_object_size(v) > TM_API_BIAS_MAX)
        return tm_api_fail(e, TM_API_INVALID_VALUE, f->name, "%zu entries, at most %d are allowed.",
                           json_object_size(v), TM_API_BIAS_MAX);
    const char *key;
    json_t *item;
    json_object_foreach((json_t *)(uintptr_t)v, key, item)
    {
        int64_t id;
        if (!tm_api_token_key(key, &id))
            return tm_api_fail(e, TM_API_INVALID_VALUE, f->name,
                               "The keys of '%s' must be token ids.", f->name);
        if (!json_is_number(item))
            return tm_api_fail_type(e, f->name, "numbers as values", item);
        if (!(fabs(json_number_value(item)) <= 100))
            return tm_api_fail(e, TM_API_INVALID_VALUE, f->name,
                               "The logit_bias `%g` must be in [-100, 100].",
                               json_number_value(item));
    }
    p->logit_bias = v;
    return true;
}

static bool add_stop(tm_api_params *p, const char *name, const json_t *v, tm_api_error *e)
{
    if (!json_is_string(v))
        return tm_api_fail_type(e, name, "a string", v);
    size_t len = json_string_length(v);
    if (len == 0 || len > TM_API_STOP_BYTES_MAX || !tm_api_plain_string(v))
        return tm_api_fail(e, TM_API_INVALID_VALUE, name,
                           "A stop string has 1 to %d bytes and no NUL characters.",
                           TM_API_STOP_BYTES_MAX);
    p->stops[p->stop_count++] = json_string_value(v);
    return true;
}

TM_API_PARSER(tm_api_parse_stop)
{
    char name[96];
    size_t i;
    json_t *item;
    int64_t max = TM_MIN(limits->stop_max, TM_API_STOPS_MAX);
    if (json_is_string(v))
        return add_stop(p, f->name, v, e);
    if (!json_is_array(v))
        return tm_api_fail_type(e, f->name, "a string or an array of strings", v);
    if ((int64_t)json_array_size(v) > max)
        return tm_api_fail(e, TM_API_INVALID_VALUE, f->name,
                           "%zu stop strings, at most %lld are allowed.", json_array_size(v),
                           (long long)max);
    json_array_foreach(v, i, item)
    {
        if (!add_stop(p, indexed(name, f->name, i), item, e))
            return false;
    }
    return true;
}

TM_API_PARSER(tm_api_parse_stop_ids)
{
    (void)limits;
    char name[96];
    size_t i;
    json_t *item;
    if (!json_is_array(v))
        return tm_api_fail_type(e, f->name, "an array of token ids", v);
    if (json_array_size(v) > TM_API_STOP_IDS_MAX)
        return tm_api_fail(e, TM_API_INVALID_VALUE, f->name, "%zu ids, at most %d are allowed.",
                           json_array_size(v), TM_API_STOP_IDS_MAX);
    json_array_foreach(v, i, item)
    {
        if (!json_is_integer(item))
            return tm_api_fail_type(e, indexed(name, f->name, i), "a token id", item);
        if (json_integer_value(item) < 0 || json_integer_value(item) > INT32_MAX)
            return tm_api_fail(e, TM_API_INVALID_VALUE, indexed(name, f->name, i),
                               "'%s' is not a token id.", indexed(name, f->name, i));
        p->stop_ids[p->stop_id_count++] = (int32_t)json_integer_value(item);
    }
    return true;
}

TM_API_PARSER(tm_api_parse_stream_options)
{
    (void)limits;
    static const char *const names[] = {"include_usage", "include_obfuscation",
                                        "continuous_usage_stats"};
    if (!json_is_object(v))
        return tm_api_fail_type(e, f->name, "an object", v);
    for (size_t i = 0; i < TM_ARRAY_LEN(names); i++) {
        const json_t *item = tm_json_get(v, names[i]);
        char name[96];
        snprintf(name, sizeof name, "%s.%s", f->name, names[i]);
        if (item && !json_is_boolean(item))
            return tm_api_fail_type(e, name, "a boolean", item);
    }
    p->has_stream_options = true;
    p->include_usage = json_is_true(json_object_get(v, "include_usage"));
    return true;
}

/* LMDeploy's number or a text; -1 and "" mean none. */
TM_API_PARSER(tm_api_parse_session)
{
    (void)limits;
    if (json_is_integer(v)) {
        if (json_integer_value(v) < -1)
            return tm_api_fail(e, TM_API_INVALID_VALUE, f->name,
                               "The %s `%lld` must be -1 or a number from 0.", f->name,
                               (long long)json_integer_value(v));
        if (json_integer_value(v) >= 0)
            snprintf(p->session, sizeof p->session, "%lld", (long long)json_integer_value(v));
        return true;
    }
    if (!json_is_string(v))
        return tm_api_fail_type(e, f->name, "an integer or a string", v);
    if (json_string_length(v) >= sizeof p->session || !tm_api_plain_string(v))
        return tm_api_fail(e, TM_API_INVALID_VALUE, f->name, "'%s' has at most %zu bytes.", f->name,
                           sizeof p->session - 1);
    memcpy(p->session, json_string_value(v), json_string_length(v) + 1);
    return true;
}

TM_API_PARSER(tm_api_parse_add_prompt)
{
    (void)limits;
    if (!json_is_boolean(v))
        return tm_api_fail_type(e, f->name, "a boolean", v);
    p->add_generation_prompt = json_is_true(v);
    p->has_add_generation_prompt = true;
    return true;
}

TM_API_PARSER(tm_api_parse_kwargs)
{
    (void)limits;
    if (!json_is_object(v))
        return tm_api_fail_type(e, f->name, "an object", v);
    p->template_kwargs = v;
    return true;
}

TM_API_PARSER(tm_api_parse_thinking)
{
    (void)limits;
    if (!json_is_boolean(v))
        return tm_api_fail_type(e, f->name, "a boolean", v);
    p->enable_thinking = v;
    return true;
}

static bool one_of(const json_t *v, const char *const *names, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(json_string_value(v), names[i]) == 0)
            return true;
    return false;
}

TM_API_PARSER(tm_api_parse_effort)
{
    (void)limits;
    static const char *const names[] = {"none", "minimal", "low", "medium", "high", "xhigh", "max"};
    if (!json_is_string(v))
        return tm_api_fail_type(e, f->name, "a string", v);
    if (!one_of(v, names, TM_ARRAY_LEN(names)))
        return tm_api_fail(e, TM_API_INVALID_VALUE, f->name,
                           "'%s' must be one of none, minimal, low, medium, high, xhigh, max.",
                           f->name);
    p->reasoning_effort = json_string_value(v);
    return true;
}

TM_API_PARSER(tm_api_parse_metadata)
{
    (void)p;
    (void)limits;
    if (!json_is_object(v))
        return tm_api_fail_type(e, f->name, "an object", v);
    if (json_object_size(v) > METADATA_MAX)
        return tm_api_fail(e, TM_API_INVALID_VALUE, f->name, "%zu entries, at most %d are allowed.",
                           json_object_size(v), METADATA_MAX);
    const char *key;
    json_t *item;
    json_object_foreach((json_t *)(uintptr_t)v, key, item)
    {
        if (!json_is_string(item))
            return tm_api_fail_type(e, f->name, "strings as values", item);
        if (strlen(key) > METADATA_KEY_MAX || json_string_length(item) > METADATA_VALUE_MAX)
            return tm_api_fail(e, TM_API_INVALID_VALUE, f->name,
                               "Keys of '%s' have at most %d bytes, values at most %d.", f->name,
                               METADATA_KEY_MAX, METADATA_VALUE_MAX);
    }
    return true;
}

TM_API_PARSER(tm_api_parse_modalities)
{
    (void)p;
    (void)limits;
    size_t i;
    json_t *item;
    if (!json_is_array(v))
        return tm_api_fail_type(e, f->name, "an array", v);
    json_array_foreach(v, i, item)
    {
        if (!json_is_string(item))
            return tm_api_fail_type(e, f->name, "an array of strings", item);
        if (strcmp(json_string_value(item), "text") != 0)
            return tm_api_fail(e, TM_API_UNSUPPORTED, f->name,
                               "Only the modality \"text\" is supported.");
    }
    return true;
}

TM_API_PARSER(tm_api_parse_response_format)
{
    (void)p;
    (void)limits;
    if (!json_is_object(v))
        return tm_api_fail_type(e, f->name, "an object", v);
    const json_t *type = tm_json_get(v, "type");
    if (!type)
        return tm_api_fail(e, TM_API_MISSING, "response_format.type",
                           "Missing required parameter: 'response_format.type'.");
    if (!json_is_string(type))
        return tm_api_fail_type(e, "response_format.type", "a string", type);
    static const char *const known[] = {"json_object", "json_schema", "regex_schema", "grammar",
                                        "structural_tag"};
    if (strcmp(json_string_value(type), "text") == 0)
        return true;
    if (one_of(type, known, TM_ARRAY_LEN(known)))
        return tm_api_fail(e, TM_API_UNSUPPORTED, f->name,
                           "Only the response format \"text\" is supported by this server.");
    return tm_api_fail(e, TM_API_INVALID_VALUE, "response_format.type",
                       "'response_format.type' must be one of text, json_object, json_schema.");
}
