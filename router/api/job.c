/* A generation request: from the body to running generations, and its end. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "router/api/args.h"
#include "router/api/internal.h"

/* ---- reading ---- */

static bool read_body(tm_api_call *c, tm_prep_kind kind, tm_prep **out, tm_api_error *e)
{
    size_t len;
    const char *body = tm_http_req_body(c->http, &len);
    tm_err err = TM_ERR_INIT;
    json_t *root;
    tm_status st = tm_json_parse(body ? body : "", len, &root, &err);
    if (st != TM_OK)
        return tm_api_fail(e, st == TM_STATUS_INVALID ? TM_API_INVALID_JSON : TM_API_INTERNAL, NULL,
                           "The body is %s.", err.msg);
    tm_http_req_drop_body(c->http);
    tm_prep *p = tm_prep_create(kind, root, &c->api->opts.limits);
    if (!p)
        return tm_api_fail(e, TM_API_INTERNAL, NULL, NULL);
    int route = kind == TM_PREP_CHAT ? TM_API_CHAT : TM_API_COMPLETION;
    if (!tm_api_params_parse(&p->params, root, route, &c->api->opts.limits, tm_api_unknown_field,
                             c->api, e)) {
        tm_prep_destroy(p);
        return false;
    }
    *out = p;
    return true;
}

static void finish_prep(tm_prep *p)
{
    tm_api_call *c = p->user;
    if (c) { /* else the client has left meanwhile */
        c->prep = NULL;
        tm_observe_text(c->api->opts.metrics, p->work_ns);
        if (p->ok)
            tm_api_job_start(c, p);
        else
            tm_api_reply_error(c, &p->error);
    }
    tm_prep_destroy(p);
}

static bool submit(tm_api_call *c, tm_prep *p, tm_api_error *e)
{
    tm_served *served;
    snprintf(c->seen.user, sizeof c->seen.user, "%s", p->params.user ? p->params.user : "");
    if (!tm_api_find_model(c->api, p->params.model, &served, e))
        return false;
    p->served = tm_served_acquire(served);
    snprintf(c->seen.model, sizeof c->seen.model, "%s", served->name);
    p->user = c;
    p->done = finish_prep;
    if (tm_prep_weight(p) <= c->api->opts.text_inline_bytes) {
        tm_prep_work(p);
        finish_prep(p);
        return true;
    }
    if (!tm_prep_pool_submit(c->api->pool, p)) {
        tm_observe_shed(c->api->opts.metrics, "text_queue");
        return tm_api_fail(e, TM_API_OVERLOADED, NULL, NULL);
    }
    c->prep = p;
    return true;
}

static void handle(tm_api_call *c, tm_prep_kind kind)
{
    tm_api_error e;
    tm_prep *p = NULL;
    if (read_body(c, kind, &p, &e) && submit(c, p, &e))
        return;
    tm_prep_destroy(p);
    tm_api_reply_error(c, &e);
}

void tm_api_handle_chat(tm_api_call *c)
{
    handle(c, TM_PREP_CHAT);
}

void tm_api_handle_completion(tm_api_call *c)
{
    handle(c, TM_PREP_COMPLETION);
}

/* ---- starting ---- */

static void make_head(tm_api_job *j)
{
    const char *object = !j->chat ? "text_completion" : "chat.completion.chunk";
    char fingerprint[32];
    tm_jw w;
    snprintf(fingerprint, sizeof fingerprint, "tm-%.12s", j->served->digest);
    tm_buf_init(&j->head, 4096);
    tm_buf_puts(&j->head, "data: ");
    tm_jw_init(&w, &j->head);
    tm_jw_obj(&w);
    tm_jw_kstr(&w, "id", j->id);
    tm_jw_kstr(&w, "object", object);
    tm_jw_kint(&w, "created", j->created);
    tm_jw_kstr(&w, "model", j->served->name);
    tm_jw_kstr(&w, "system_fingerprint", fingerprint);
    tm_jw_key(&w, "choices");
    tm_jw_arr(&w);
}

static tm_api_job *job_create(tm_api_call *c, tm_prep *p, int count)
{
    const tm_api_params *params = &p->params;
    tm_api_job *j = calloc(1, sizeof *j + (size_t)count * sizeof j->choices[0]);
    if (!j)
        return NULL;
    j->call = c;
    j->served = tm_served_acquire(p->served);
    j->chat = p->kind == TM_PREP_CHAT;
    j->stream = params->stream;
    j->include_usage = params->include_usage;
    j->include_stop = params->include_stop;
    j->skip_special = params->skip_special_tokens;
    j->return_ids = params->return_token_ids;
    j->echo = params->echo;
    j->ignore_eos = params->ignore_eos;
    j->n = (int)params->n;
    j->open = j->choice_count = count;
    j->created = tm_clock_wall_ms() / 1000;
    memcpy(j->stop_ids, params->stop_ids, sizeof j->stop_ids);
    j->stop_id_count = params->stop_id_count;
    snprintf(j->id, sizeof j->id, "%s%s%08llx", j->chat ? "chatcmpl-" : "cmpl-", c->api->salt,
             (unsigned long long)++c->api->ids & 0xffffffff);
    /* The prompts stay only where the answer shows them. */
    j->prompts = p->prompts;
    j->prompt_count = p->prompt_count;
    p->prompts = NULL;
    p->prompt_count = 0;
    j->tools = p->tools;
    p->tools = (tm_api_tools){.list = NULL};
    j->forced = p->forced;
    p->forced = NULL;
    j->inside = p->inside;
    j->tool_parser = j->tools.list ? j->served->tool_parser : NULL;
    j->reason_parser = j->chat ? j->served->reason_parser : NULL;
    j->keep_count = tm_parse_keep(j->tool_parser, j->reason_parser, j->served->tokenizer, j->keep);
    if (j->stream)
        make_head(j);
    for (int i = 0; i < count; i++) {
        tm_api_choice *ch = &j->choices[i];
        ch->job = j;
        ch->index = i;
        ch->prompt = i / j->n;
        tm_buf_init(&ch->text, 0);
    }
    return j;
}

static bool start_choice(tm_api_choice *ch, const tm_api_params *params, tm_gen_args *args,
                         tm_api_error *e)
{
    tm_api_job *j = ch->job;
    const tm_api_prompt *prompt = &j->prompts[ch->prompt];
    const tm_detok_opts detok = {
        .skip_special = j->skip_special,
        .stops = params->stops,
        .stop_count = params->stop_count,
        .include_stop = j->include_stop,
        .keep = j->keep,
        .keep_count = j->keep_count,
        .continues = (!j->chat || j->forced || params->continue_final_message) && prompt->len > 0 &&
                     !tm_tokenizer_is_special(j->served->tokenizer, prompt->ids[prompt->len - 1])};
    if (tm_detok_create(&ch->detok, j->served->tokenizer, &detok, NULL) != TM_OK ||
        !tm_api_answer_open(ch))
        return tm_api_fail(e, TM_API_INTERNAL, NULL, NULL);
    args->max_tokens = tm_api_max_tokens(params, j->served, j->chat, prompt->len);
    args->prompt = prompt->ids;
    args->prompt_len = prompt->len;
    args->sampling.choice = (uint32_t)(ch->index % j->n);
    int64_t retry_ms = 0;
    tm_status st = tm_dispatch_start(j->call->api->opts.dispatch, args, &tm_api_choice_ops, ch,
                                     &ch->gen, &retry_ms);
    if (st == TM_OK)
        return true;
    ch->gen = NULL;
    tm_api_fail_start(e, j->call->api->opts.metrics, st, retry_ms);
    return false;
}

static bool start_all(tm_api_job *j, const tm_api_params *params, tm_api_error *e)
{
    tm_logit_bias bias[TM_API_BIAS_MAX];
    tm_gen_args args;
    if (!tm_api_gen_args(params, j->served, &j->call->api->opts.limits, bias, &args, e))
        return false;
    args.request_id = j->call->seen.request_id;
    j->logprobs = args.sampling.logprobs;
    for (int i = 0; i < j->choice_count; i++)
        if (!start_choice(&j->choices[i], params, &args, e))
            return false;
    return true;
}

static void free_prompts(tm_api_job *j)
{
    for (int i = 0; i < j->prompt_count; i++) {
        free(j->prompts[i].ids);
        free(j->prompts[i].echo);
    }
    free(j->prompts);
    j->prompts = NULL;
    j->prompt_count = 0;
}

void tm_api_job_start(tm_api_call *c, tm_prep *p)
{
    tm_api_error e;
    int64_t count = p->prompt_count * p->params.n;
    tm_api_job *j = NULL;
    if (count > c->api->opts.limits.choices_max)
        tm_api_fail(&e, TM_API_INVALID_VALUE, "n",
                    "%lld answers, at most %lld in one request are allowed.", (long long)count,
                    (long long)c->api->opts.limits.choices_max);
    else if (!(j = job_create(c, p, (int)count)))
        tm_api_fail(&e, TM_API_INTERNAL, NULL, NULL);
    if (!j) {
        tm_api_reply_error(c, &e);
        return;
    }
    c->job = j;
    c->api->active++;
    for (int i = 0; i < j->prompt_count; i++)
        c->seen.prompt_tokens += (int64_t)j->prompts[i].len;
    if (!start_all(j, &p->params, &e)) {
        tm_api_job_fail(j, &e);
        return;
    }
    if (!j->echo && !j->return_ids)
        free_prompts(j);
    j->started = true;
    tm_observe_start(c->api->opts.metrics, &c->seen);
}

/* ---- ending ---- */

void tm_api_job_end(tm_api_job *j)
{
    if (j->over)
        return;
    j->over = true;
    if (!j->call->seen.finish)
        j->call->seen.finish = j->choices[0].finish;
    if (j->begun)
        TAILQ_REMOVE(&j->call->api->streams, j, link);
    for (int i = 0; i < j->choice_count; i++) {
        if (j->choices[i].gen)
            tm_gen_cancel(j->choices[i].gen);
        j->choices[i].gen = NULL;
    }
    j->call->api->active--;
}

void tm_api_job_fail(tm_api_job *j, const tm_api_error *e)
{
    if (j->over)
        return;
    j->call->seen.finish = "error";
    tm_api_job_end(j);
    if (j->begun)
        tm_api_stream_fail(j, e);
    else
        tm_api_reply_error(j->call, e);
}

void tm_api_job_destroy(tm_api_job *j)
{
    tm_api_job_end(j);
    for (int i = 0; i < j->choice_count; i++)
        tm_api_choice_deinit(&j->choices[i]);
    free_prompts(j);
    tm_api_tools_deinit(&j->tools);
    free(j->forced);
    tm_buf_deinit(&j->head);
    tm_served_release(j->served);
    free(j);
}
