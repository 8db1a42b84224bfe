/* From a checked body to token ids. */
#include "router/api/prep.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/json.h"
#include "router/api/messages.h"
#include "router/api/render.h"

tm_prep *tm_prep_create(tm_prep_kind kind, json_t *root, const tm_api_limits *limits)
{
    tm_prep *p = calloc(1, sizeof *p);
    if (!p) {
        json_decref(root);
        return NULL;
    }
    p->kind = kind;
    p->root = root;
    p->limits = limits;
    return p;
}

static void free_prompts(tm_prep *p)
{
    for (int i = 0; i < p->prompt_count; i++) {
        free(p->prompts[i].ids);
        free(p->prompts[i].echo);
    }
    free(p->prompts);
    p->prompts = NULL;
    p->prompt_count = 0;
}

void tm_prep_destroy(tm_prep *p)
{
    if (!p)
        return;
    free_prompts(p);
    tm_served_release(p->served);
    tm_api_tools_deinit(&p->tools);
    free(p->forced);
    json_decref(p->root);
    free(p);
}

static size_t text_weight(const json_t *v)
{
    if (json_is_string(v))
        return json_string_length(v);
    size_t sum = 0, i;
    json_t *item;
    if (json_is_array(v))
        json_array_foreach(v, i, item)
        {
            sum += json_is_object(item) ? text_weight(json_object_get(item, "content"))
                                        : text_weight(item);
            sum += json_is_object(item) ? text_weight(json_object_get(item, "text")) : 0;
        }
    return sum;
}

/* Every text of the schemas, which all go into the prompt. */
static size_t tools_weight(const json_t *v)
{
    size_t sum = json_string_length(v), i;
    const char *key;
    json_t *item;
    json_array_foreach(v, i, item)
    {
        sum += tools_weight(item);
    }
    json_object_foreach((json_t *)(uintptr_t)v, key, item)
    {
        sum += strlen(key) + tools_weight(item);
    }
    return sum;
}

size_t tm_prep_weight(const tm_prep *p)
{
    return text_weight(p->params.messages) + text_weight(p->params.prompt) +
           tools_weight(p->params.tools) + tools_weight(p->params.functions);
}

static bool alloc_prompts(tm_prep *p, size_t count)
{
    p->prompts = calloc(count, sizeof *p->prompts);
    if (!p->prompts)
        return tm_api_fail(&p->error, TM_API_INTERNAL, NULL, NULL);
    p->prompt_count = (int)count;
    return true;
}

/* An array of token ids, each in the vocabulary. */
static bool read_ids(tm_prep *p, const json_t *v, const char *param, tm_api_prompt *out)
{
    size_t n = json_array_size(v), i;
    json_t *item;
    out->ids = malloc(TM_MAX(n, (size_t)1) * sizeof *out->ids);
    if (!out->ids)
        return tm_api_fail(&p->error, TM_API_INTERNAL, NULL, NULL);
    json_array_foreach(v, i, item)
    {
        if (!json_is_integer(item))
            return tm_api_fail_type(&p->error, param, "token ids", item);
        json_int_t id = json_integer_value(item);
        if (id < 0 || id >= p->served->vocab)
            return tm_api_fail(
                &p->error, TM_API_INVALID_VALUE, param,
                "'%s' has the token id %lld, which the vocabulary of %d tokens does not have.",
                param, (long long)id, p->served->vocab);
        out->ids[i] = (int32_t)id;
    }
    out->len = n;
    return true;
}

/* One entry of a prompt list: a text or a list of ids. */
static bool read_entry(tm_prep *p, const json_t *v, const char *param, tm_api_prompt *out)
{
    if (json_is_string(v)) {
        out->text = json_string_value(v);
        out->text_len = json_string_length(v);
        return true;
    }
    if (json_is_array(v))
        return read_ids(p, v, param, out);
    return tm_api_fail_type(&p->error, param, "a string or an array of token ids", v);
}

static bool read_prompts(tm_prep *p)
{
    const json_t *v = p->params.prompt;
    const json_t *first = json_array_get(v, 0);
    if (json_is_string(v) || json_is_number(first))
        return alloc_prompts(p, 1) && read_entry(p, v, "prompt", &p->prompts[0]);
    size_t n = json_array_size(v);
    if (n == 0)
        return tm_api_fail(&p->error, TM_API_INVALID_VALUE, "prompt",
                           "'prompt' must not be empty.");
    if ((int64_t)n * p->params.n > p->limits->choices_max)
        return tm_api_fail(
            &p->error, TM_API_INVALID_VALUE, "prompt",
            "%zu prompts with n %lld, at most %lld answers in one request are allowed.", n,
            (long long)p->params.n, (long long)p->limits->choices_max);
    if (!alloc_prompts(p, n))
        return false;
    for (size_t i = 0; i < n; i++) {
        char param[96];
        snprintf(param, sizeof param, "prompt[%zu]", i);
        const json_t *item = json_array_get(v, i);
        /* Strings and id lists are not mixed by any client; a number here is a list of ids gone wrong. */
        if (json_typeof(item) != json_typeof(first))
            return tm_api_fail_type(&p->error, param, tm_json_type_name(first), item);
        if (!read_entry(p, item, param, &p->prompts[i]))
            return false;
    }
    return true;
}

static bool encode(tm_prep *p, tm_api_prompt *prompt, const char *text, size_t len,
                   const tm_encode_opts *opts)
{
    tm_err err = TM_ERR_INIT;
    tm_status st = tm_tokenizer_encode(p->served->tokenizer, text, len, opts, &prompt->ids,
                                       &prompt->len, &err);
    if (st == TM_OK)
        return true;
    if (st == TM_STATUS_INVALID || st == TM_STATUS_TOO_LARGE)
        return tm_api_fail(&p->error, TM_API_INVALID_VALUE,
                           p->params.messages ? "messages" : "prompt",
                           "The text cannot be tokenized: %s", err.msg);
    return tm_api_fail(&p->error, TM_API_INTERNAL, NULL, NULL);
}

/* The template's variables: chat_template_kwargs and the fields that have names of their own. */
static json_t *template_kwargs(const tm_api_params *p)
{
    json_t *o =
        p->template_kwargs ? json_copy((json_t *)(uintptr_t)p->template_kwargs) : json_object();
    if (!o)
        return NULL;
    if (p->enable_thinking) {
        json_object_set_new(o, "enable_thinking", json_boolean(json_is_true(p->enable_thinking)));
        if (!json_object_get(o, "thinking")) /* DeepSeek's name for it */
            json_object_set_new(o, "thinking", json_boolean(json_is_true(p->enable_thinking)));
    }
    if (p->reasoning_effort) {
        json_object_set_new(o, "reasoning_effort", json_string(p->reasoning_effort));
        if (!p->enable_thinking && strcmp(p->reasoning_effort, "none") == 0)
            json_object_set_new(o, "enable_thinking", json_false());
    }
    return o;
}

/* ---- how the answer begins ---- */

static const char *last_text(const json_t *messages, size_t *len)
{
    const json_t *v =
        json_object_get(json_array_get(messages, json_array_size(messages) - 1), "content");
    *len = json_string_length(v);
    return json_is_string(v) ? json_string_value(v) : "";
}

/* A prompt that ends inside of a message tells by that message's text, else by its own end. */
static bool begins_inside(const tm_prep *p, const json_t *messages, const tm_rendered *r)
{
    const tm_reason_parser *parser = p->served->reason_parser;
    size_t len;
    if (!parser)
        return false;
    if (!p->params.continue_final_message)
        return tm_reason_parser_inside(parser, r->text.data ? r->text.data : "", r->text.len);
    const char *text = last_text(messages, &len);
    return tm_reason_parser_open(parser, text, len);
}

static bool fail_choice(tm_prep *p, const char *why)
{
    return tm_api_fail(&p->error, TM_API_UNSUPPORTED,
                       p->tools.old ? "function_call" : "tool_choice", "%s", why);
}

/* Without constrained decoding a call is forced by writing its beginning into the prompt. */
static bool force_call(tm_prep *p, tm_rendered *r)
{
    const tm_tool_parser *parser = p->served->tool_parser;
    tm_buf begin;
    bool ok = true;
    if (p->tools.mode != TM_API_TOOLS_REQUIRED && p->tools.mode != TM_API_TOOLS_NAMED)
        return true;
    if (!parser)
        return fail_choice(p, "The model's tool calls are not understood by this server, so that "
                              "none can be required; see --tool-call-parser.");
    if (!p->params.add_generation_prompt)
        return fail_choice(p, "A call can only be required at the beginning of an answer.");
    tm_buf_init(&begin, 0);
    if (!tm_tool_parser_begin(parser, p->tools.name, &begin))
        ok = fail_choice(p, "This model's calls can only be required by the function's name.");
    if (ok && p->inside)
        tm_buf_printf(&r->text, "\n%s\n\n", tm_reason_parser_close(p->served->reason_parser));
    if (ok)
        tm_buf_append(&r->text, begin.data, begin.len);
    if (ok && (begin.failed || r->text.failed))
        ok = tm_api_fail(&p->error, TM_API_INTERNAL, NULL, NULL);
    if (ok) {
        p->inside = false;
        p->forced = tm_buf_steal(&begin, NULL);
    }
    tm_buf_deinit(&begin);
    return ok;
}

static bool render_chat(tm_prep *p, const json_t *messages, const json_t *kwargs)
{
    tm_rendered r = {0};
    tm_err err = TM_ERR_INIT;
    tm_status st = tm_api_render(p, messages, kwargs, &r, &err);
    if (st == TM_STATUS_NO_MEMORY)
        return tm_api_fail(&p->error, TM_API_INTERNAL, NULL, NULL);
    if (st != TM_OK)
        return tm_api_fail(&p->error, TM_API_INVALID_VALUE, "messages",
                           "The chat template refused the messages: %s", err.msg);
    p->inside = begins_inside(p, messages, &r);
    bool ok = force_call(p, &r);
    /* The template writes BOS itself, and text of the request is never read as a control token. */
    const tm_encode_opts opts = {.input = r.input, .input_count = r.input_count};
    ok = ok && encode(p, &p->prompts[0], r.text.data ? r.text.data : "", r.text.len, &opts);
    tm_rendered_deinit(&r);
    return ok;
}

/* What else ends an answer: texts of the template and of the way calls are written. A special token is not
 * text, so it ends the answer by its id. */
static void add_stop(tm_prep *p, const char *text)
{
    tm_api_params *q = &p->params;
    const tm_tokenizer *t = p->served->tokenizer;
    int32_t id = tm_tokenizer_id(t, text, strlen(text));
    bool special = id >= 0 && tm_tokenizer_is_special(t, id);
    if (special && q->stop_id_count < (int)TM_ARRAY_LEN(q->stop_ids))
        q->stop_ids[q->stop_id_count++] = id;
    else if (!special && q->stop_count < (int)TM_ARRAY_LEN(q->stops))
        q->stops[q->stop_count++] = text;
}

static void add_stops(tm_prep *p)
{
    const tm_template *t = p->served->template;
    if (p->params.ignore_eos)
        return;
    for (int i = 0; tm_template_stop(t, i); i++)
        add_stop(p, tm_template_stop(t, i));
    const tm_tool_parser *parser = p->tools.list ? p->served->tool_parser : NULL;
    if (parser && tm_tool_parser_stop(parser))
        add_stop(p, tm_tool_parser_stop(parser));
}

static bool read_tools(tm_prep *p)
{
    if (!tm_api_tools_read(&p->params, &p->tools, &p->error))
        return false;
    if (!p->tools.list || tm_template_takes_tools(p->served->template))
        return true;
    return tm_api_fail(&p->error, TM_API_UNSUPPORTED, p->tools.old ? "functions" : "tools",
                       "The model's chat template has no place for tools.");
}

static bool prepare_chat(tm_prep *p)
{
    if (!alloc_prompts(p, 1))
        return false;
    if (p->params.input_ids && (!p->params.messages || json_array_size(p->params.messages) == 0))
        return read_ids(p, p->params.input_ids, "input_ids", &p->prompts[0]);
    if (!p->served->template)
        return tm_api_fail(&p->error, TM_API_UNSUPPORTED, "messages",
                           "The model has no chat template; use /v1/completions.");
    json_t *messages;
    if (!read_tools(p) || !tm_api_messages(p->params.messages, p->limits, &messages, &p->error))
        return false;
    json_t *kwargs = template_kwargs(&p->params);
    bool ok = kwargs ? render_chat(p, messages, kwargs)
                     : tm_api_fail(&p->error, TM_API_INTERNAL, NULL, NULL);
    json_decref(kwargs);
    json_decref(messages);
    if (ok && p->kind == TM_PREP_CHAT)
        add_stops(p);
    return ok;
}

/* The prompt's own text, for echo; ids are decoded with their special tokens. */
static bool keep_echo(tm_prep *p, tm_api_prompt *prompt)
{
    if (prompt->text) {
        prompt->echo = malloc(prompt->text_len + 1);
        if (prompt->echo)
            memcpy(prompt->echo, prompt->text, prompt->text_len + 1);
        prompt->echo_len = prompt->text_len;
    } else if (tm_tokenizer_decode(p->served->tokenizer, prompt->ids, prompt->len, false,
                                   &prompt->echo, &prompt->echo_len, NULL) != TM_OK) {
        prompt->echo = NULL;
    }
    return prompt->echo || tm_api_fail(&p->error, TM_API_INTERNAL, NULL, NULL);
}

static bool prepare_completion(tm_prep *p)
{
    const tm_encode_opts opts = {.add_special = p->kind == TM_PREP_COMPLETION || p->add_special};
    if (!read_prompts(p))
        return false;
    for (int i = 0; i < p->prompt_count; i++) {
        tm_api_prompt *prompt = &p->prompts[i];
        if (prompt->text && !encode(p, prompt, prompt->text, prompt->text_len, &opts))
            return false;
        if (p->params.echo && !keep_echo(p, prompt))
            return false;
    }
    return true;
}

/* The engine needs one token to start from and one place to put the next one. */
static bool check_lengths(tm_prep *p)
{
    const char *param = p->params.messages ? "messages" : p->params.prompt ? "prompt" : "input_ids";
    int64_t context = p->served->max_context;
    bool none = p->params.max_tokens == 0 && p->params.max_completion_tokens < 0;
    for (int i = 0; i < p->prompt_count; i++) {
        int64_t len = (int64_t)p->prompts[i].len;
        if (len == 0)
            return tm_api_fail(&p->error, TM_API_INVALID_VALUE, param, "'%s' must not be empty.",
                               param);
        if (len + (none ? 0 : 1) > context)
            return tm_api_fail(
                &p->error, TM_API_CONTEXT_LENGTH, param,
                "This model's maximum context length is %lld tokens. However, your %s "
                "resulted in %lld tokens. Please reduce the length of the %s.",
                (long long)context, param, (long long)len, param);
    }
    return true;
}

/* A tokenizer may have tokens that were added without an embedding for them. */
static bool check_vocabulary(tm_prep *p)
{
    const tm_served *s = p->served;
    for (int i = 0; tm_tokenizer_vocab(s->tokenizer) > s->vocab && i < p->prompt_count; i++)
        for (size_t k = 0; k < p->prompts[i].len; k++) {
            int32_t id = p->prompts[i].ids[k];
            if (id < s->vocab)
                continue;
            const char *param = p->params.messages ? "messages" : "prompt";
            return tm_api_fail(&p->error, TM_API_INVALID_VALUE, param,
                               "The tokenizer makes token %d of '%s', which the model's vocabulary "
                               "of %d tokens does not have.",
                               (int)id, param, (int)s->vocab);
        }
    return true;
}

void tm_prep_work(tm_prep *p)
{
    int64_t start_ns = tm_clock_ns();
    bool chat = p->kind == TM_PREP_CHAT || (p->kind == TM_PREP_TOKENIZE && p->params.messages);
    p->ok = chat ? prepare_chat(p) : prepare_completion(p);
    if (p->ok && p->kind != TM_PREP_TOKENIZE)
        p->ok = check_lengths(p) && check_vocabulary(p);
    if (!p->ok)
        free_prompts(p);
    p->work_ns = tm_clock_ns() - start_ns;
}
