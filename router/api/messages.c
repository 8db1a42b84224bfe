/* Validation and normalisation of chat messages.
 *
 * Templates of checkpoints expect plain strings as content and objects as tool arguments, while clients send
 * parts and JSON texts; the translation happens here, once, so that no template has to know both forms. */
#include "router/api/messages.h"

#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"

typedef enum role { ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL } role;

static const struct {
    const char *name, *template_name;
    role who;
} g_roles[] = {
    {"system", "system", ROLE_SYSTEM}, {"developer", "system", ROLE_SYSTEM},
    {"user", "user", ROLE_USER},       {"assistant", "assistant", ROLE_ASSISTANT},
    {"tool", "tool", ROLE_TOOL},       {"function", "tool", ROLE_TOOL},
};

/* One message being read. */
typedef struct message {
    const json_t *in, *all;
    size_t index;
    const tm_api_limits *limits;
    tm_api_error *e;
    json_t *out;
    char param[96]; /* the last place made by at() */
} message;

/* "messages[3].role"; an empty field gives "messages[3]". */
static const char *at(message *m, const char *field)
{
    snprintf(m->param, sizeof m->param, "messages[%zu]%s%.70s", m->index, *field ? "." : "", field);
    return m->param;
}

static bool put_text(message *m, const char *key, const char *s, size_t len)
{
    if (json_object_set_new(m->out, key, json_stringn_nocheck(s, len)) != 0)
        return tm_api_fail(m->e, TM_API_INTERNAL, NULL, NULL);
    return true;
}

static bool copy_text(message *m, const char *key, const json_t *v)
{
    if (!json_is_string(v))
        return tm_api_fail_type(m->e, at(m, key), "a string", v);
    return put_text(m, key, json_string_value(v), json_string_length(v));
}

/* The text of one content part. */
static bool read_part(message *m, size_t i, const json_t *part, role who, const json_t **text)
{
    static const char *const media[] = {"image_url", "input_audio", "file",
                                        "video_url", "image",       "audio_url"};
    char field[64];
    snprintf(field, sizeof field, "content[%zu]", i);
    if (!json_is_object(part))
        return tm_api_fail_type(m->e, at(m, field), "an object", part);
    const json_t *type = tm_json_get(part, "type");
    snprintf(field, sizeof field, "content[%zu].type", i);
    if (!type)
        return tm_api_fail(m->e, TM_API_MISSING, at(m, field), "Missing required parameter: '%s'.",
                           at(m, field));
    if (!json_is_string(type))
        return tm_api_fail_type(m->e, at(m, field), "a string", type);
    const char *name = json_string_value(type);
    bool refusal = strcmp(name, "refusal") == 0 && who == ROLE_ASSISTANT;
    for (size_t k = 0; k < TM_ARRAY_LEN(media); k++)
        if (strcmp(name, media[k]) == 0)
            return tm_api_fail(m->e, TM_API_UNSUPPORTED, at(m, field),
                               "Content parts of type '%s' are not supported by this model.",
                               media[k]);
    if (!refusal && strcmp(name, "text") != 0)
        return tm_api_fail(m->e, TM_API_INVALID_VALUE, at(m, field),
                           "'%s' is not a content part type of this role.", at(m, field));
    snprintf(field, sizeof field, "content[%zu].%s", i, refusal ? "refusal" : "text");
    *text = tm_json_get(part, refusal ? "refusal" : "text");
    if (!*text)
        return tm_api_fail(m->e, TM_API_MISSING, at(m, field), "Missing required parameter: '%s'.",
                           at(m, field));
    if (!json_is_string(*text))
        return tm_api_fail_type(m->e, at(m, field), "a string", *text);
    return true;
}

static bool read_parts(message *m, const json_t *parts, role who)
{
    if ((int64_t)json_array_size(parts) > m->limits->parts_max)
        return tm_api_fail(m->e, TM_API_INVALID_VALUE, at(m, "content"),
                           "%zu content parts, at most %lld are allowed.", json_array_size(parts),
                           (long long)m->limits->parts_max);
    if (json_array_size(parts) == 0)
        return tm_api_fail(m->e, TM_API_INVALID_VALUE, at(m, "content"),
                           "'%s' must not be an empty array.", at(m, "content"));
    tm_buf joined;
    tm_buf_init(&joined, 0);
    size_t i;
    json_t *part;
    bool ok = true;
    json_array_foreach(parts, i, part)
    {
        const json_t *text = NULL;
        ok = read_part(m, i, part, who, &text);
        if (!ok)
            break;
        if (i > 0)
            tm_buf_putc(&joined, '\n');
        tm_buf_append(&joined, json_string_value(text), json_string_length(text));
    }
    if (ok && joined.failed)
        ok = tm_api_fail(m->e, TM_API_INTERNAL, NULL, NULL);
    if (ok)
        ok = put_text(m, "content", joined.data ? joined.data : "", joined.len);
    tm_buf_deinit(&joined);
    return ok;
}

static bool read_content(message *m, role who)
{
    const json_t *v = tm_json_get(m->in, "content");
    bool calls = who == ROLE_ASSISTANT && (json_array_size(tm_json_get(m->in, "tool_calls")) > 0 ||
                                           tm_json_get(m->in, "function_call"));
    if (!v && calls) /* templates tell such a message by its missing content */
        return json_object_set_new(m->out, "content", json_null()) == 0 ||
               tm_api_fail(m->e, TM_API_INTERNAL, NULL, NULL);
    if (!v && who == ROLE_ASSISTANT && tm_json_get(m->in, "refusal"))
        return put_text(m, "content", "", 0);
    if (!v)
        return tm_api_fail(m->e, TM_API_MISSING, at(m, "content"),
                           "Missing required parameter: '%s'.", at(m, "content"));
    if (json_is_array(v))
        return read_parts(m, v, who);
    if (!json_is_string(v))
        return tm_api_fail_type(m->e, at(m, "content"), "a string or an array", v);
    return copy_text(m, "content", v);
}

/* Arguments come as JSON text; templates want the object. Text that is none (an earlier call that was cut) stays
 * as it is. */
static bool read_arguments(message *m, const char *field, const json_t *v, json_t **out)
{
    if (json_is_object(v)) {
        *out = json_deep_copy(v);
        return *out != NULL || tm_api_fail(m->e, TM_API_INTERNAL, NULL, NULL);
    }
    if (!json_is_string(v))
        return tm_api_fail_type(m->e, at(m, field), "a string", v);
    json_t *parsed = NULL;
    if (json_string_length(v) == 0)
        parsed = json_object();
    else if (tm_json_parse(json_string_value(v), json_string_length(v), &parsed, NULL) != TM_OK)
        parsed = NULL;
    if (!json_is_object(parsed)) {
        json_decref(parsed);
        parsed = json_incref((json_t *)(uintptr_t)v);
    }
    *out = parsed;
    return true;
}

static bool required_string(message *m, const char *field, const json_t *obj, const char *key,
                            const char **out)
{
    const json_t *v = tm_json_get(obj, key);
    if (!v)
        return tm_api_fail(m->e, TM_API_MISSING, at(m, field), "Missing required parameter: '%s'.",
                           at(m, field));
    if (!json_is_string(v))
        return tm_api_fail_type(m->e, at(m, field), "a string", v);
    *out = json_string_value(v);
    return true;
}

static bool read_call(message *m, size_t i, const json_t *call, json_t *list)
{
    char field[64];
    const char *id, *name;
    json_t *args = NULL;
    snprintf(field, sizeof field, "tool_calls[%zu]", i);
    if (!json_is_object(call))
        return tm_api_fail_type(m->e, at(m, field), "an object", call);
    snprintf(field, sizeof field, "tool_calls[%zu].id", i);
    if (!required_string(m, field, call, "id", &id))
        return false;
    const json_t *fn = tm_json_get(call, "function");
    snprintf(field, sizeof field, "tool_calls[%zu].function", i);
    if (!json_is_object(fn))
        return tm_api_fail_type(m->e, at(m, field), "an object", fn);
    snprintf(field, sizeof field, "tool_calls[%zu].function.name", i);
    if (!required_string(m, field, fn, "name", &name))
        return false;
    snprintf(field, sizeof field, "tool_calls[%zu].function.arguments", i);
    const json_t *v = tm_json_get(fn, "arguments");
    if (!v)
        return tm_api_fail(m->e, TM_API_MISSING, at(m, field), "Missing required parameter: '%s'.",
                           at(m, field));
    if (!read_arguments(m, field, v, &args))
        return false;
    json_t *copy = json_pack("{s:s, s:s, s:{s:s, s:o}}", "id", id, "type", "function", "function",
                             "name", name, "arguments", args);
    if (json_array_append_new(list, copy) != 0)
        return tm_api_fail(m->e, TM_API_INTERNAL, NULL, NULL);
    return true;
}

/* The old form of one call, without an id. */
static bool read_function_call(message *m, const json_t *fn)
{
    const char *name;
    json_t *args = NULL;
    const json_t *v = tm_json_get(fn, "arguments");
    if (!json_is_object(fn))
        return tm_api_fail_type(m->e, at(m, "function_call"), "an object", fn);
    if (!required_string(m, "function_call.name", fn, "name", &name))
        return false;
    if (!v)
        return tm_api_fail(m->e, TM_API_MISSING, at(m, "function_call.arguments"),
                           "Missing required parameter: '%s'.", at(m, "function_call.arguments"));
    if (!read_arguments(m, "function_call.arguments", v, &args))
        return false;
    json_t *list = json_pack("[{s:s, s:{s:s, s:o}}]", "type", "function", "function", "name", name,
                             "arguments", args);
    if (json_object_set_new(m->out, "tool_calls", list) != 0)
        return tm_api_fail(m->e, TM_API_INTERNAL, NULL, NULL);
    return true;
}

static bool read_assistant(message *m)
{
    const json_t *calls = tm_json_get(m->in, "tool_calls");
    const json_t *reasoning = tm_json_get(m->in, "reasoning_content");
    if (!reasoning)
        reasoning = tm_json_get(m->in, "reasoning");
    if (reasoning && !json_is_string(reasoning))
        return tm_api_fail_type(m->e, at(m, "reasoning_content"), "a string", reasoning);
    if (reasoning && !copy_text(m, "reasoning_content", reasoning))
        return false;
    if (calls && !json_is_array(calls))
        return tm_api_fail_type(m->e, at(m, "tool_calls"), "an array", calls);
    const json_t *old = tm_json_get(m->in, "function_call");
    if (json_array_size(calls) == 0)
        return !old || read_function_call(m, old);
    json_t *list = json_array();
    size_t i;
    json_t *call;
    bool ok = true;
    json_array_foreach(calls, i, call)
    {
        ok = ok && read_call(m, i, call, list);
    }
    if (ok && json_object_set(m->out, "tool_calls", list) != 0)
        ok = tm_api_fail(m->e, TM_API_INTERNAL, NULL, NULL);
    json_decref(list);
    return ok;
}

/* Whether an earlier assistant message made the call. */
static bool call_exists(const message *m, const char *id)
{
    for (size_t i = 0; i < m->index; i++) {
        size_t k;
        json_t *call;
        json_array_foreach(json_object_get(json_array_get(m->all, i), "tool_calls"), k, call)
        {
            const char *other = json_string_value(json_object_get(call, "id"));
            if (other && strcmp(other, id) == 0)
                return true;
        }
    }
    return false;
}

/* `function` is the old form: it has a name instead of an id. */
static bool read_tool(message *m, bool old)
{
    const char *id;
    const json_t *name = tm_json_get(m->in, "name");
    if (name && !copy_text(m, "name", name))
        return false;
    if (old)
        return name || tm_api_fail(m->e, TM_API_MISSING, at(m, "name"),
                                   "Missing required parameter: '%s'.", at(m, "name"));
    if (!required_string(m, "tool_call_id", m->in, "tool_call_id", &id))
        return false;
    if (!call_exists(m, id))
        return tm_api_fail(m->e, TM_API_INVALID_VALUE, at(m, "tool_call_id"),
                           "'%s' does not name a tool call of an earlier message.",
                           at(m, "tool_call_id"));
    return copy_text(m, "tool_call_id", tm_json_get(m->in, "tool_call_id"));
}

static bool read_message(message *m)
{
    if (!json_is_object(m->in))
        return tm_api_fail_type(m->e, at(m, ""), "an object", m->in);
    const char *name;
    if (!required_string(m, "role", m->in, "role", &name))
        return false;
    size_t r = 0;
    while (r < TM_ARRAY_LEN(g_roles) && strcmp(g_roles[r].name, name) != 0)
        r++;
    if (r == TM_ARRAY_LEN(g_roles))
        return tm_api_fail(m->e, TM_API_INVALID_VALUE, at(m, "role"),
                           "'%s' must be one of system, developer, user, assistant, tool.",
                           at(m, "role"));
    role who = g_roles[r].who;
    if (!put_text(m, "role", g_roles[r].template_name, strlen(g_roles[r].template_name)) ||
        !read_content(m, who))
        return false;
    if (who == ROLE_TOOL)
        return read_tool(m, strcmp(name, "function") == 0);
    const json_t *speaker = tm_json_get(m->in, "name");
    if (speaker && !copy_text(m, "name", speaker))
        return false;
    return who != ROLE_ASSISTANT || read_assistant(m);
}

static bool read_all(const json_t *messages, const tm_api_limits *limits, json_t *list,
                     tm_api_error *e)
{
    size_t i;
    json_t *item;
    json_array_foreach(messages, i, item)
    {
        message m = {.in = item, .all = messages, .index = i, .limits = limits, .e = e};
        m.out = json_object();
        if (!m.out || json_array_append_new(list, m.out) != 0)
            return tm_api_fail(e, TM_API_INTERNAL, NULL, NULL);
        if (!read_message(&m))
            return false;
    }
    return true;
}

bool tm_api_messages(const json_t *messages, const tm_api_limits *limits, json_t **out,
                     tm_api_error *e)
{
    json_t *list;
    if (json_is_string(messages)) {
        list = json_pack("[{s:s, s:O}]", "role", "user", "content", messages);
        if (!list)
            return tm_api_fail(e, TM_API_INTERNAL, NULL, NULL);
        *out = list;
        return true;
    }
    if (json_array_size(messages) == 0)
        return tm_api_fail(e, TM_API_INVALID_VALUE, "messages", "'messages' must not be empty.");
    list = json_array();
    if (!list || !read_all(messages, limits, list, e)) {
        json_decref(list);
        return false;
    }
    *out = list;
    return true;
}
