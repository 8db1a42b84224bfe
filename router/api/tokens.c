/* POST /tokenize and /detokenize, in vLLM's shape. `model` may be left out: the first served one answers. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "router/api/field_parse.h"
#include "router/api/internal.h"

#define DETOKENIZE_MAX 1048576

static bool read_body(tm_api_call *c, json_t **root, tm_api_error *e)
{
    size_t len;
    const char *body = tm_http_req_body(c->http, &len);
    tm_err err = TM_ERR_INIT;
    tm_status st = tm_json_parse(body ? body : "", len, root, &err);
    if (st != TM_OK)
        return tm_api_fail(e, st == TM_STATUS_INVALID ? TM_API_INVALID_JSON : TM_API_INTERNAL, NULL,
                           "The body is %s.", err.msg);
    if (json_is_object(*root))
        return true;
    tm_api_fail(e, TM_API_INVALID_TYPE, NULL, "The body must be a JSON object, got %s.",
                tm_json_type_name(*root));
    json_decref(*root);
    return false;
}

static bool find_served(tm_api_call *c, const json_t *root, tm_served **out, tm_api_error *e)
{
    const json_t *model = tm_json_get(root, "model");
    if (model && !json_is_string(model))
        return tm_api_fail_type(e, "model", "a string", model);
    if (!tm_api_find_model(c->api, model ? json_string_value(model) : NULL, out, e))
        return false;
    snprintf(c->seen.model, sizeof c->seen.model, "%s", (*out)->name);
    return true;
}

static bool read_flag(const json_t *root, const char *key, bool *out, tm_api_error *e)
{
    const json_t *v = tm_json_get(root, key);
    if (v && !json_is_boolean(v))
        return tm_api_fail_type(e, key, "a boolean", v);
    if (v)
        *out = json_is_true(v);
    return true;
}

/* ---- tokenize ---- */

static void put_strings(tm_jw *w, const tm_prep *p)
{
    tm_jw_key(w, "token_strs");
    tm_jw_arr(w);
    for (size_t i = 0; i < p->prompts[0].len; i++) {
        size_t len = 0;
        const char *piece = tm_tokenizer_piece(p->served->tokenizer, p->prompts[0].ids[i], &len);
        tm_jw_strn(w, piece ? piece : "", len);
    }
    tm_jw_arr_end(w);
}

static void finish_tokenize(tm_prep *p)
{
    tm_api_call *c = p->user;
    if (c) {
        c->prep = NULL;
        if (p->ok) {
            tm_jw w;
            tm_buf_clear(&c->api->out);
            tm_jw_init(&w, &c->api->out);
            tm_jw_obj(&w);
            tm_jw_kint(&w, "count", (int64_t)p->prompts[0].len);
            tm_jw_kint(&w, "max_model_len", p->served->max_context);
            tm_api_put_ids(&w, "tokens", p->prompts[0].ids, p->prompts[0].len);
            if (json_is_true(json_object_get(p->root, "return_token_strs")))
                put_strings(&w, p);
            tm_jw_obj_end(&w);
            tm_api_reply(c, 200);
        } else {
            tm_api_reply_error(c, &p->error);
        }
    }
    tm_prep_destroy(p);
}

/* What the template sees beside the messages, by the parsers of chat. */
static bool read_template_fields(tm_prep *p, tm_api_error *e)
{
    static const struct {
        const char *name;
        tm_api_field_fn parse;
    } rows[] = {{"tools", tm_api_parse_tools},
                {"tool_choice", tm_api_parse_tool_choice},
                {"chat_template_kwargs", tm_api_parse_kwargs},
                {"enable_thinking", tm_api_parse_thinking}};
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        const tm_api_field f = {.name = rows[i].name};
        const json_t *v = tm_json_get(p->root, f.name);
        if (v && !rows[i].parse(&p->params, &f, v, p->limits, e))
            return false;
    }
    return tm_api_tools_check(&p->params, e);
}

static bool read_tokenize(tm_prep *p, tm_api_error *e)
{
    tm_api_params *params = &p->params;
    bool strings = false;
    p->add_special = true;
    params->n = 1;
    params->add_generation_prompt = true;
    params->prompt = tm_json_get(p->root, "prompt");
    params->messages = tm_json_get(p->root, "messages");
    if (!params->prompt && !params->messages)
        return tm_api_fail(e, TM_API_MISSING, "prompt",
                           "Missing required parameter: 'prompt' or 'messages'.");
    if (params->messages && !json_is_array(params->messages))
        return tm_api_fail_type(e, "messages", "an array", params->messages);
    if (!params->messages && !json_is_string(params->prompt))
        return tm_api_fail_type(e, "prompt", "a string", params->prompt);
    if (json_array_size(params->messages) > (size_t)p->limits->messages_max)
        return tm_api_fail(e, TM_API_INVALID_VALUE, "messages", "Too many messages.");
    return read_template_fields(p, e) &&
           read_flag(p->root, "add_special_tokens", &p->add_special, e) &&
           read_flag(p->root, "add_generation_prompt", &params->add_generation_prompt, e) &&
           read_flag(p->root, "continue_final_message", &params->continue_final_message, e) &&
           read_flag(p->root, "return_token_strs", &strings, e);
}

static bool start_tokenize(tm_api_call *c, tm_prep *p, tm_api_error *e)
{
    tm_served *served;
    if (!read_tokenize(p, e) || !find_served(c, p->root, &served, e))
        return false;
    p->served = tm_served_acquire(served);
    p->user = c;
    p->done = finish_tokenize;
    if (tm_prep_weight(p) <= c->api->opts.text_inline_bytes) {
        tm_prep_work(p);
        finish_tokenize(p);
        return true;
    }
    if (!tm_prep_pool_submit(c->api->pool, p))
        return tm_api_fail(e, TM_API_OVERLOADED, NULL, NULL);
    c->prep = p;
    return true;
}

void tm_api_handle_tokenize(tm_api_call *c)
{
    tm_api_error e;
    json_t *root;
    tm_prep *p = NULL;
    if (read_body(c, &root, &e)) {
        p = tm_prep_create(TM_PREP_TOKENIZE, root, &c->api->opts.limits);
        if (!p)
            tm_api_fail(&e, TM_API_INTERNAL, NULL, NULL);
        else if (start_tokenize(c, p, &e))
            return;
    }
    tm_prep_destroy(p);
    tm_api_reply_error(c, &e);
}

/* ---- detokenize ---- */

static bool read_tokens(const json_t *root, const tm_served *served, int32_t **ids, size_t *count,
                        tm_api_error *e)
{
    const json_t *v = tm_json_get(root, "tokens");
    if (!v)
        return tm_api_fail(e, TM_API_MISSING, "tokens", "Missing required parameter: 'tokens'.");
    if (!json_is_array(v))
        return tm_api_fail_type(e, "tokens", "an array of token ids", v);
    size_t n = json_array_size(v), i;
    if (n > DETOKENIZE_MAX)
        return tm_api_fail(e, TM_API_INVALID_VALUE, "tokens", "%zu tokens, at most %d are allowed.",
                           n, DETOKENIZE_MAX);
    int32_t *list = malloc(TM_MAX(n, (size_t)1) * sizeof *list);
    if (!list)
        return tm_api_fail(e, TM_API_INTERNAL, NULL, NULL);
    json_t *item;
    json_array_foreach(v, i, item)
    {
        json_int_t id = json_integer_value(item);
        if (!json_is_integer(item) || id < 0 || id >= served->vocab) {
            free(list);
            if (!json_is_integer(item))
                return tm_api_fail_type(e, "tokens", "an array of token ids", item);
            return tm_api_fail(
                e, TM_API_INVALID_VALUE, "tokens",
                "'tokens' has the id %lld, which the vocabulary of %d tokens does not have.",
                (long long)id, served->vocab);
        }
        list[i] = (int32_t)id;
    }
    *ids = list;
    *count = n;
    return true;
}

static bool detokenize(tm_api_call *c, const json_t *root, tm_api_error *e)
{
    tm_served *served;
    int32_t *ids = NULL;
    size_t count = 0, len;
    char *text;
    bool skip = false;
    if (!find_served(c, root, &served, e) || !read_flag(root, "skip_special_tokens", &skip, e) ||
        !read_tokens(root, served, &ids, &count, e))
        return false;
    tm_status st = tm_tokenizer_decode(served->tokenizer, ids, count, skip, &text, &len, NULL);
    free(ids);
    if (st != TM_OK)
        return tm_api_fail(e, TM_API_INTERNAL, NULL, NULL);
    tm_jw w;
    tm_buf_clear(&c->api->out);
    tm_jw_init(&w, &c->api->out);
    tm_jw_obj(&w);
    tm_jw_key(&w, "prompt");
    tm_jw_strn(&w, text, len);
    tm_jw_obj_end(&w);
    free(text);
    tm_api_reply(c, 200);
    return true;
}

void tm_api_handle_detokenize(tm_api_call *c)
{
    tm_api_error e;
    json_t *root;
    if (read_body(c, &root, &e)) {
        bool ok = detokenize(c, root, &e);
        json_decref(root);
        if (ok)
            return;
    }
    tm_api_reply_error(c, &e);
}
