/* Templates disagree on what a request may look like: most want arguments as an object and no content as none,
 * some put the JSON text into a string, some want every content to be a string or every function to be
 * described. The request is rendered as it came, and again in another form when the template refuses that. */
#include "router/api/render.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"

/* Another form of the request. */
typedef struct variant {
    bool text_arguments, empty_content, full_tools;
} variant;

static bool has_calls(const json_t *messages)
{
    for (size_t i = 0; i < json_array_size(messages); i++)
        if (json_object_get(json_array_get(messages, i), "tool_calls"))
            return true;
    return false;
}

static bool arguments_to_text(json_t *message)
{
    json_t *calls = json_object_get(message, "tool_calls"), *call;
    size_t i;
    json_array_foreach(calls, i, call)
    {
        json_t *fn = json_object_get(call, "function"), *args = json_object_get(fn, "arguments");
        char *text = json_is_object(args) ? json_dumps(args, JSON_ENCODE_ANY) : NULL;
        bool ok = !json_is_object(args) ||
                  (text && json_object_set_new(fn, "arguments", json_string(text)) == 0);
        free(text);
        if (!ok)
            return false;
    }
    return true;
}

/* A copy of the messages in that form; NULL without memory. */
static json_t *vary_messages(const json_t *messages, variant how)
{
    json_t *list = json_deep_copy(messages), *m;
    size_t i;
    json_array_foreach(list, i, m)
    {
        bool ok = !how.text_arguments || arguments_to_text(m);
        if (ok && how.empty_content && json_is_null(json_object_get(m, "content")))
            ok = json_object_set_new(m, "content", json_string("")) == 0;
        if (!ok) {
            json_decref(list);
            return NULL;
        }
    }
    return list;
}

/* A copy of the tools in which every function has a description and parameters; NULL without memory. */
static json_t *vary_tools(const json_t *tools)
{
    json_t *list = json_deep_copy(tools), *item;
    size_t i;
    json_array_foreach(list, i, item)
    {
        json_t *fn = json_object_get(item, "function");
        bool ok = true;
        if (!tm_json_get(fn, "description"))
            ok = json_object_set_new(fn, "description", json_string("")) == 0;
        if (ok && !tm_json_get(fn, "parameters"))
            ok = json_object_set_new(fn, "parameters",
                                     json_pack("{s:s, s:{}}", "type", "object", "properties")) == 0;
        if (!ok) {
            json_decref(list);
            return NULL;
        }
    }
    return list;
}

static tm_status render_as(const tm_prep *p, const json_t *messages, const json_t *kwargs,
                           variant how, tm_rendered *r, tm_err *err)
{
    json_t *tools = how.full_tools && p->tools.list ? vary_tools(p->tools.list) : NULL;
    json_t *varied = vary_messages(messages, how);
    const tm_render_args args = {.messages = varied,
                                 .tools = tools ? tools : p->tools.list,
                                 .kwargs = kwargs,
                                 .add_generation_prompt = p->params.add_generation_prompt,
                                 .continue_final_message = p->params.continue_final_message};
    tm_status st = TM_STATUS_NO_MEMORY;
    if (varied && (tools || !how.full_tools || !p->tools.list))
        st = tm_template_render(p->served->template, &args, r, err);
    json_decref(varied);
    json_decref(tools);
    return st;
}

static int count_none(const tm_rendered *r)
{
    static const char word[] = "None";
    const char *at = r->text.data, *end = at + r->text.len;
    int n = 0;
    while (at && (at = memmem(at, (size_t)(end - at), word, 4)) != NULL) {
        n++;
        at += 4;
    }
    return n;
}

/* A template that knows nothing of missing content prints Python's name for it. */
static void mend_none(const tm_prep *p, const json_t *messages, const json_t *kwargs,
                      tm_rendered *r)
{
    static const variant empty = {.empty_content = true};
    tm_rendered other = {0};
    tm_err err = TM_ERR_INIT;
    int n = count_none(r);
    if (n == 0 || render_as(p, messages, kwargs, empty, &other, &err) != TM_OK)
        return;
    if (count_none(&other) < n) {
        tm_rendered keep = *r;
        *r = other;
        other = keep;
    }
    tm_rendered_deinit(&other);
}

/* The first reason is the one to tell. */
tm_status tm_api_render(const tm_prep *p, const json_t *messages, const json_t *kwargs,
                        tm_rendered *r, tm_err *err)
{
    static const variant others[] = {{.full_tools = true},
                                     {.text_arguments = true, .full_tools = true},
                                     {.empty_content = true, .full_tools = true},
                                     {true, true, true}};
    const tm_render_args args = {.messages = messages,
                                 .tools = p->tools.list,
                                 .kwargs = kwargs,
                                 .add_generation_prompt = p->params.add_generation_prompt,
                                 .continue_final_message = p->params.continue_final_message};
    bool calls = has_calls(messages);
    tm_status st = tm_template_render(p->served->template, &args, r, err);
    if (st == TM_OK && calls)
        mend_none(p, messages, kwargs, r);
    if (st != TM_STATUS_INVALID || (!calls && !p->tools.list))
        return st;
    for (size_t i = 0; i < TM_ARRAY_LEN(others) && st == TM_STATUS_INVALID; i++) {
        tm_err again = TM_ERR_INIT;
        tm_status other = render_as(p, messages, kwargs, others[i], r, &again);
        if (other != TM_STATUS_INVALID)
            st = other;
    }
    return st;
}
