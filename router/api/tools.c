/* Parsers of the four fields about tools, and what they mean together. */
#include "router/api/tools.h"

#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "router/api/field_parse.h"

#define NAME_MAX_BYTES 64
#define SCHEMA_MAX     ((size_t)256 << 10) /* bytes of one schema as JSON */

/* "tools[3].function.name" */
typedef struct place {
    char text[96];
} place;

static const char *at(place *out, const char *field, size_t i, const char *rest)
{
    snprintf(out->text, sizeof out->text, "%s[%zu]%s", field, i, rest);
    return out->text;
}

static bool fail_missing(tm_api_error *e, const char *param)
{
    return tm_api_fail(e, TM_API_MISSING, param, "Missing required parameter: '%s'.", param);
}

static bool is_name(const json_t *v)
{
    static const char set[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-";
    size_t len = json_string_length(v);
    return len >= 1 && len <= NAME_MAX_BYTES && strspn(json_string_value(v), set) == len;
}

static bool check_name(const char *param, const json_t *v, tm_api_error *e)
{
    if (!v)
        return fail_missing(e, param);
    if (!json_is_string(v))
        return tm_api_fail_type(e, param, "a string", v);
    return is_name(v) ||
           tm_api_fail(e, TM_API_INVALID_VALUE, param,
                       "'%s' has 1 to %d letters, digits, '_' and '-'.", param, NAME_MAX_BYTES);
}

/* inside: ".function" or "". */
static bool check_function(const char *field, size_t i, const char *inside, const json_t *fn,
                           tm_api_error *e)
{
    place p;
    char rest[40];
    const json_t *text = tm_json_get(fn, "description"), *schema = tm_json_get(fn, "parameters"),
                 *strict = tm_json_get(fn, "strict");
    snprintf(rest, sizeof rest, "%s.name", inside);
    if (!check_name(at(&p, field, i, rest), tm_json_get(fn, "name"), e))
        return false;
    snprintf(rest, sizeof rest, "%s.description", inside);
    if (text && !json_is_string(text))
        return tm_api_fail_type(e, at(&p, field, i, rest), "a string", text);
    snprintf(rest, sizeof rest, "%s.parameters", inside);
    if (schema && !json_is_object(schema))
        return tm_api_fail_type(e, at(&p, field, i, rest), "an object", schema);
    if (schema && json_dumpb(schema, NULL, 0, JSON_COMPACT) > SCHEMA_MAX)
        return tm_api_fail(e, TM_API_INVALID_VALUE, at(&p, field, i, rest),
                           "'%s' has more than %zu KiB.", at(&p, field, i, rest), SCHEMA_MAX >> 10);
    snprintf(rest, sizeof rest, "%s.strict", inside);
    if (strict && !json_is_boolean(strict))
        return tm_api_fail_type(e, at(&p, field, i, rest), "a boolean", strict);
    return true;
}

/* {type: "function", function: {...}} */
static bool check_tool(const char *field, size_t i, const json_t *item, tm_api_error *e)
{
    place p;
    const json_t *type = tm_json_get(item, "type"), *fn = tm_json_get(item, "function");
    if (!json_is_object(item))
        return tm_api_fail_type(e, at(&p, field, i, ""), "an object", item);
    if (!type)
        return fail_missing(e, at(&p, field, i, ".type"));
    if (!json_is_string(type))
        return tm_api_fail_type(e, at(&p, field, i, ".type"), "a string", type);
    if (strcmp(json_string_value(type), "function") != 0)
        return tm_api_fail(e, TM_API_INVALID_VALUE, at(&p, field, i, ".type"),
                           "Only tools of type \"function\" are supported.");
    if (!fn)
        return fail_missing(e, at(&p, field, i, ".function"));
    if (!json_is_object(fn))
        return tm_api_fail_type(e, at(&p, field, i, ".function"), "an object", fn);
    return check_function(field, i, ".function", fn, e);
}

static bool check_list(const tm_api_field *f, const json_t *v, tm_api_error *e)
{
    if (!json_is_array(v))
        return tm_api_fail_type(e, f->name, "an array", v);
    if (json_array_size(v) > TM_API_TOOLS_MAX)
        return tm_api_fail(e, TM_API_INVALID_VALUE, f->name, "%zu tools, at most %d are allowed.",
                           json_array_size(v), TM_API_TOOLS_MAX);
    return true;
}

TM_API_PARSER(tm_api_parse_tools)
{
    (void)limits;
    size_t i;
    json_t *item;
    if (!check_list(f, v, e))
        return false;
    json_array_foreach(v, i, item)
    {
        if (!check_tool(f->name, i, item, e))
            return false;
    }
    p->tools = json_array_size(v) > 0 ? v : NULL;
    return true;
}

TM_API_PARSER(tm_api_parse_functions)
{
    (void)limits;
    size_t i;
    json_t *item;
    place where;
    if (!check_list(f, v, e))
        return false;
    json_array_foreach(v, i, item)
    {
        if (!json_is_object(item))
            return tm_api_fail_type(e, at(&where, f->name, i, ""), "an object", item);
        if (!check_function(f->name, i, "", item, e))
            return false;
    }
    p->functions = json_array_size(v) > 0 ? v : NULL;
    return true;
}

/* ---- the choice ---- */

static const char *choice_type(const json_t *v)
{
    const char *type = json_string_value(json_object_get(v, "type"));
    return type ? type : "";
}

/* {type: allowed_tools, allowed_tools: {mode, tools: [...]}}; the members may also stand beside the type. */
static const json_t *allowed(const json_t *v)
{
    const json_t *inner = tm_json_get(v, "allowed_tools");
    return inner ? inner : v;
}

static bool check_allowed(const json_t *v, tm_api_error *e)
{
    const json_t *a = allowed(v);
    const json_t *mode = tm_json_get(a, "mode"), *list = tm_json_get(a, "tools");
    const char *name = json_string_value(mode);
    size_t i;
    json_t *item;
    if (!json_is_object(a))
        return tm_api_fail_type(e, "tool_choice.allowed_tools", "an object", a);
    if (mode && (!name || (strcmp(name, "auto") != 0 && strcmp(name, "required") != 0)))
        return tm_api_fail(e, TM_API_INVALID_VALUE, "tool_choice.allowed_tools.mode",
                           "'tool_choice.allowed_tools.mode' must be auto or required.");
    if (!json_is_array(list))
        return list ? tm_api_fail_type(e, "tool_choice.allowed_tools.tools", "an array", list)
                    : fail_missing(e, "tool_choice.allowed_tools.tools");
    json_array_foreach(list, i, item)
    {
        place where;
        if (!check_name(at(&where, "tool_choice.allowed_tools.tools", i, ".function.name"),
                        tm_json_get(tm_json_get(item, "function"), "name"), e))
            return false;
    }
    return true;
}

TM_API_PARSER(tm_api_parse_tool_choice)
{
    (void)limits;
    static const char *const words[] = {"none", "auto", "required"};
    if (!json_is_string(v) && !json_is_object(v))
        return tm_api_fail_type(e, f->name, "a string or an object", v);
    p->tool_choice = v;
    if (json_is_string(v)) {
        for (size_t i = 0; i < TM_ARRAY_LEN(words); i++)
            if (strcmp(words[i], json_string_value(v)) == 0)
                return true;
        return tm_api_fail(e, TM_API_INVALID_VALUE, f->name,
                           "'%s' must be none, auto, required or an object.", f->name);
    }
    if (strcmp(choice_type(v), "function") == 0)
        return check_name("tool_choice.function.name",
                          tm_json_get(tm_json_get(v, "function"), "name"), e);
    if (strcmp(choice_type(v), "allowed_tools") == 0)
        return check_allowed(v, e);
    return tm_api_fail(e, TM_API_INVALID_VALUE, "tool_choice.type",
                       "'tool_choice.type' must be function or allowed_tools.");
}

TM_API_PARSER(tm_api_parse_function_call)
{
    (void)limits;
    const char *s = json_string_value(v);
    if (!json_is_string(v) && !json_is_object(v))
        return tm_api_fail_type(e, f->name, "a string or an object", v);
    p->function_call = v;
    if (s)
        return strcmp(s, "none") == 0 || strcmp(s, "auto") == 0 ||
               tm_api_fail(e, TM_API_INVALID_VALUE, f->name,
                           "'%s' must be none, auto or an object.", f->name);
    return check_name("function_call.name", tm_json_get(v, "name"), e);
}

/* ---- together ---- */

static bool is_word(const json_t *v, const char *word)
{
    return json_is_string(v) && strcmp(json_string_value(v), word) == 0;
}

static const char *name_of(const json_t *tool, bool old)
{
    const json_t *fn = old ? tool : json_object_get(tool, "function");
    return json_string_value(json_object_get(fn, "name"));
}

/* Among the first `count`. */
static bool offers(const json_t *list, size_t count, bool old, const char *name)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(name_of(json_array_get(list, i), old), name) == 0)
            return true;
    return false;
}

/* The function that must be called; NULL = no particular one. */
static const char *chosen_name(const tm_api_params *p, bool old)
{
    if (old)
        return json_string_value(json_object_get(p->function_call, "name"));
    if (strcmp(choice_type(p->tool_choice), "function") != 0)
        return NULL;
    return name_of(p->tool_choice, false);
}

static bool check_allowed_names(const tm_api_params *p, tm_api_error *e)
{
    const json_t *list = json_object_get(allowed(p->tool_choice), "tools");
    for (size_t i = 0; i < json_array_size(list); i++)
        if (!offers(p->tools, json_array_size(p->tools), false,
                    name_of(json_array_get(list, i), false)))
            return tm_api_fail(e, TM_API_INVALID_VALUE, "tool_choice",
                               "'tool_choice' allows '%s', which is not in 'tools'.",
                               name_of(json_array_get(list, i), false));
    return json_array_size(list) > 0 || tm_api_fail(e, TM_API_INVALID_VALUE, "tool_choice",
                                                    "'tool_choice' allows no tool at all.");
}

bool tm_api_tools_check(const tm_api_params *p, tm_api_error *e)
{
    if (p->tools && p->functions)
        return tm_api_fail(e, TM_API_INVALID_VALUE, "functions",
                           "'functions' is the old form of 'tools': give one of them.");
    bool old = p->functions != NULL;
    const json_t *list = old ? p->functions : p->tools;
    const json_t *choice = old ? p->function_call : p->tool_choice;
    const char *field = old ? "function_call" : "tool_choice";
    if (!list) {
        choice = p->tool_choice ? p->tool_choice : p->function_call;
        field = p->tool_choice ? "tool_choice" : "function_call";
        return !choice || is_word(choice, "none") || is_word(choice, "auto") ||
               tm_api_fail(e, TM_API_INVALID_VALUE, field,
                           "'%s' is only allowed when tools are given.", field);
    }
    for (size_t i = 1; i < json_array_size(list); i++) {
        const char *again = name_of(json_array_get(list, i), old);
        if (offers(list, i, old, again))
            return tm_api_fail(e, TM_API_INVALID_VALUE, old ? "functions" : "tools",
                               "'%s' has two functions of the name '%s'.",
                               old ? "functions" : "tools", again);
    }
    const char *name = chosen_name(p, old);
    if (name && !offers(list, json_array_size(list), old, name))
        return tm_api_fail(e, TM_API_INVALID_VALUE, field,
                           "'%s' names '%s', which is not among the tools.", field, name);
    if (!old && strcmp(choice_type(choice), "allowed_tools") == 0)
        return check_allowed_names(p, e);
    return true;
}

/* The tools in full form; with an allowed list, only those on it. */
static json_t *full_list(const tm_api_params *p)
{
    bool old = p->functions != NULL;
    const json_t *from = old ? p->functions : p->tools, *only = NULL;
    json_t *list = json_array(), *item;
    size_t i;
    if (!old && strcmp(choice_type(p->tool_choice), "allowed_tools") == 0)
        only = json_object_get(allowed(p->tool_choice), "tools");
    json_array_foreach(from, i, item)
    {
        if (only && !offers(only, json_array_size(only), false, name_of(item, false)))
            continue;
        json_t *full =
            old ? json_pack("{s:s, s:O}", "type", "function", "function", item) : json_incref(item);
        if (json_array_append_new(list, full) != 0) {
            json_decref(list);
            return NULL;
        }
    }
    return list;
}

bool tm_api_tools_read(const tm_api_params *p, tm_api_tools *out, tm_api_error *e)
{
    tm_api_tools t = {.old = p->functions != NULL};
    const json_t *choice = t.old ? p->function_call : p->tool_choice;
    *out = t;
    if ((!p->tools && !p->functions) || is_word(choice, "none"))
        return true;
    t.name = chosen_name(p, t.old);
    bool required = is_word(choice, "required") ||
                    is_word(json_object_get(allowed(choice), "mode"), "required");
    t.mode = t.name ? TM_API_TOOLS_NAMED : required ? TM_API_TOOLS_REQUIRED : TM_API_TOOLS_AUTO;
    t.one = t.old || t.name || !p->parallel_tool_calls;
    t.list = full_list(p);
    if (!t.list)
        return tm_api_fail(e, TM_API_INTERNAL, NULL, NULL);
    /* Among one there is no choice: its name can be written into the prompt. */
    if (t.mode == TM_API_TOOLS_REQUIRED && json_array_size(t.list) == 1) {
        t.mode = TM_API_TOOLS_NAMED;
        t.name = name_of(json_array_get(t.list, 0), false);
    }
    *out = t;
    return true;
}

void tm_api_tools_deinit(tm_api_tools *t)
{
    json_decref(t->list);
    *t = (tm_api_tools){.list = NULL};
}
