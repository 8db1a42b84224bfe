/* Generate and Chat: one request, one generation, a stream of chunks.
 *
 * A stream lives from its request message to its end or the client's leaving, whichever is first; the call
 * under it may live a little longer. As in the HTTP API a token that could be a stop id is held until the next
 * token or the end tells whether it was one. A client that does not read is cut when its bounded queue is full. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "router/api/args.h"
#include "router/grpc/call.h"

struct tm_pstream {
    tm_pcall *call;
    tm_prep *prep; /* being worked on by a thread; it finds user == NULL when the stream is gone */
    tm_served *served;
    tm_gen *gen; /* NULL: not started or over */
    tm_detok *detok;
    int32_t stop_ids[TM_API_STOP_IDS_ROOM];
    int stop_id_count;
    bool ignore_eos, logprobs;
    bool admitted, id_sent, begun;
    bool holds; /* a token that may be a stop id */
    int32_t held;
    tm_observed seen;
};

static tm_metrics *metrics_of(const tm_pstream *s)
{
    return s->call->owner->opts.metrics;
}

/* ---- the end ---- */

/* The status that says over gRPC what an HTTP status says. */
static tm_status status_of(tm_api_code code)
{
    static const tm_status statuses[] = {
        TM_STATUS_INVALID, TM_STATUS_DENIED,    TM_STATUS_NOT_FOUND,  TM_STATUS_TIMEOUT,
        TM_STATUS_BUSY,    TM_STATUS_TOO_LARGE, TM_STATUS_UNAVAILABLE};
    int http = tm_api_code_get(code)->http;
    for (size_t i = 0; i < TM_ARRAY_LEN(statuses); i++)
        if (tm_status_http(statuses[i]) == http)
            return statuses[i];
    return http < 500 ? TM_STATUS_INVALID : TM_STATUS_INTERNAL;
}

static void destroy(tm_pstream *s)
{
    if (s->gen != NULL)
        tm_gen_cancel(s->gen);
    if (s->prep != NULL)
        s->prep->user = NULL;
    tm_detok_destroy(s->detok);
    tm_served_release(s->served);
    s->call->stream = NULL;
    free(s);
}

/* Counts, logs, frees. */
static void over(tm_pstream *s, int http, bool gone)
{
    const tm_observe_end end = {.route = s->call->method->label,
                                .key = s->call->key,
                                .status = http,
                                .generated = s->begun,
                                .gone = gone};
    tm_observe_done(metrics_of(s), &s->seen, &end);
    destroy(s);
}

static void fail(tm_pstream *s, const tm_api_error *e)
{
    const tm_api_code_row *row = tm_api_code_get(e->code);
    s->seen.finish = "error";
    s->seen.error = row->code != NULL ? row->code : row->type;
    if (e->retry_after_ms > 0)
        tm_pcall_finish(s->call, status_of(e->code), "%s; retry after %" PRId64 " ms", e->message,
                        e->retry_after_ms);
    else
        tm_pcall_finish(s->call, status_of(e->code), "%s", e->message);
    over(s, row->http, false);
}

void tm_pstream_drop(tm_pcall *c, tm_status why)
{
    bool gone = why == TM_STATUS_CANCELLED;
    if (c->stream == NULL)
        return;
    c->stream->seen.finish = gone ? "gone" : "cut";
    over(c->stream, tm_status_http(why), gone);
}

/* ---- chunks ---- */

static void chunk_clear(tm_public *p)
{
    tm_buf_clear(&p->text);
    tm_buf_clear(&p->ids_out);
    tm_buf_clear(&p->lps);
    tm_buf_clear(&p->tops);
    tm_buf_clear(&p->top_at);
}

/* The best tokens lie one behind the other in `tops`; the messages that refer to them are made last, when
 * nothing moves any more. */
static bool put_tops(tm_public *p, PUB(GenerateChunk) * chunk)
{
    static const PUB(TopLogprobs) EMPTY = TURBOMESH__V1__TOP_LOGPROBS__INIT;
    size_t n = p->top_at.len / sizeof(int);
    const int *counts = (const int *)(const void *)p->top_at.data;
    const tm_top *top = (const tm_top *)(const void *)p->tops.data;
    size_t total = p->tops.len / sizeof(*top), used = 0;
    size_t rows_bytes = n * sizeof(PUB(TopLogprobs)), list_bytes = n * sizeof(void *);
    tm_buf_clear(&p->top_rows);
    if (!tm_buf_reserve(&p->top_rows, rows_bytes + list_bytes + total * 2 * sizeof(int32_t)))
        return false;
    PUB(TopLogprobs) *rows = (PUB(TopLogprobs) *)(void *)p->top_rows.data;
    PUB(TopLogprobs) **list = (PUB(TopLogprobs) **)(void *)(p->top_rows.data + rows_bytes);
    int32_t *ids = (int32_t *)(void *)(p->top_rows.data + rows_bytes + list_bytes);
    float *lps = (float *)(void *)(ids + total);
    for (size_t i = 0; i < total; i++) {
        ids[i] = top[i].token;
        lps[i] = top[i].logprob;
    }
    for (size_t i = 0; i < n; i++) {
        rows[i] = EMPTY;
        rows[i].n_token_id = rows[i].n_logprob = (size_t)counts[i];
        rows[i].token_id = ids + used;
        rows[i].logprob = lps + used;
        used += (size_t)counts[i];
        list[i] = &rows[i];
    }
    chunk->n_top_logprobs = n;
    chunk->top_logprobs = list;
    return true;
}

/* Sends what gathered, with the finish on the last chunk. False when the stream is over by that. */
static bool send_chunk(tm_pstream *s, const char *finish)
{
    tm_public *p = s->call->owner;
    PUB(GenerateChunk) chunk = TURBOMESH__V1__GENERATE_CHUNK__INIT;
    PUB(Usage) usage = TURBOMESH__V1__USAGE__INIT;
    bool ok = !p->text.failed && !p->ids_out.failed && !p->lps.failed && !p->tops.failed &&
              !p->top_at.failed && (p->top_at.len == 0 || put_tops(p, &chunk));
    if (!s->id_sent)
        chunk.request_id = s->seen.request_id;
    s->id_sent = true;
    chunk.has_text = p->text.len > 0;
    chunk.text = (ProtobufCBinaryData){p->text.len, (uint8_t *)p->text.data};
    chunk.n_token_id = p->ids_out.len / sizeof(int32_t);
    chunk.token_id = (int32_t *)(void *)p->ids_out.data;
    chunk.n_logprob = p->lps.len / sizeof(float);
    chunk.logprob = (float *)(void *)p->lps.data;
    if (finish != NULL) {
        chunk.finish_reason = (char *)(uintptr_t)finish;
        usage.has_prompt_tokens = usage.has_completion_tokens = usage.has_cached_tokens = 1;
        usage.prompt_tokens = (int32_t)s->seen.prompt_tokens;
        usage.completion_tokens = (int32_t)s->seen.output_tokens;
        usage.cached_tokens = (int32_t)s->seen.cached_tokens;
        chunk.usage = &usage;
    }
    tm_status st = ok ? tm_pcall_send(s->call, &chunk.base) : TM_STATUS_NO_MEMORY;
    if (st == TM_OK)
        return true;
    s->seen.error = tm_status_name(st);
    s->seen.finish = "cut";
    tm_pcall_abort(s->call, st, st == TM_STATUS_BUSY ? "the client does not read" : "cut");
    over(s, tm_status_http(st), st == TM_STATUS_CLOSED);
    return false;
}

static void finish(tm_pstream *s, const char *reason)
{
    s->seen.finish = reason;
    if (!send_chunk(s, reason))
        return;
    tm_pcall_finish(s->call, TM_OK, "%s", "");
    over(s, 200, false);
}

/* ---- callbacks of dispatch ---- */

static bool is_stop_id(const tm_pstream *s, int32_t token)
{
    for (int i = 0; i < s->stop_id_count; i++)
        if (s->stop_ids[i] == token)
            return true;
    return !s->ignore_eos && tm_served_stops_at(s->served, token);
}

static bool release_held(tm_pstream *s)
{
    bool held = s->holds;
    s->holds = false;
    return held && tm_detok_push(s->detok, s->held, &s->call->owner->text);
}

static void put_logprobs(tm_pstream *s, const tm_gen_token *t)
{
    tm_public *p = s->call->owner;
    if (!s->logprobs)
        return;
    tm_buf_append(&p->lps, &t->logprob, sizeof(t->logprob));
    tm_buf_append(&p->tops, t->top, (size_t)t->top_count * sizeof(*t->top));
    tm_buf_append(&p->top_at, &t->top_count, sizeof(t->top_count));
}

/* One token. True when a stop string is complete. */
static bool add_token(tm_pstream *s, const tm_gen_token *t)
{
    tm_public *p = s->call->owner;
    if (release_held(s))
        return true;
    tm_buf_append(&p->ids_out, &t->token, sizeof(t->token));
    put_logprobs(s, t);
    if (!is_stop_id(s, t->token))
        return tm_detok_push(s->detok, t->token, &p->text);
    s->holds = true;
    s->held = t->token;
    return false;
}

static void on_admitted(void *user, int32_t prompt_tokens, int32_t cached_tokens)
{
    (void)prompt_tokens;
    tm_pstream *s = user;
    snprintf(s->seen.group, sizeof(s->seen.group), "%s", tm_gen_group(s->gen));
    s->seen.moves += s->admitted;
    if (!s->admitted)
        s->seen.cached_tokens = cached_tokens;
    s->admitted = true;
}

static void on_tokens(void *user, int32_t first_pos, const tm_gen_token *tokens, int count)
{
    (void)first_pos; /* dispatch delivers in order and once */
    tm_pstream *s = user;
    tm_public *p = s->call->owner;
    bool stopped = false;
    chunk_clear(p);
    for (int i = 0; i < count && !stopped; i++)
        stopped = add_token(s, &tokens[i]);
    tm_observe_tokens(metrics_of(s), &s->seen, (int)(p->ids_out.len / sizeof(int32_t)));
    if (stopped)
        finish(s, "stop");
    else
        send_chunk(s, NULL);
}

static void on_end(void *user, tm_gen_finish how)
{
    tm_pstream *s = user;
    tm_public *p = s->call->owner;
    bool stopped = false;
    s->gen = NULL;
    chunk_clear(p);
    if (how == TM_GEN_STOP)
        s->holds = false;
    else
        stopped = release_held(s);
    if (!stopped)
        tm_detok_finish(s->detok, &p->text);
    finish(s, how == TM_GEN_STOP || stopped ? "stop" : "length");
}

static void on_error(void *user, tm_gen_error error, int64_t retry_after_ms)
{
    tm_pstream *s = user;
    tm_api_error e;
    s->gen = NULL;
    tm_api_fail_gen(&e, metrics_of(s), error, retry_after_ms);
    fail(s, &e);
}

static const tm_gen_ops GEN_OPS = {on_admitted, NULL, on_tokens, on_end, on_error};

/* ---- the beginning ---- */

static bool start(tm_pstream *s, const tm_prep *prep, tm_api_error *e)
{
    tm_logit_bias bias[TM_API_BIAS_MAX];
    const tm_public *p = s->call->owner;
    const tm_api_params *params = &prep->params;
    const tm_api_prompt *prompt = &prep->prompts[0];
    bool after_text = prep->kind != TM_PREP_CHAT && prompt->len > 0 &&
                      !tm_tokenizer_is_special(s->served->tokenizer, prompt->ids[prompt->len - 1]);
    const tm_detok_opts detok = {.skip_special = true,
                                 .stops = params->stops,
                                 .stop_count = params->stop_count,
                                 .continues = after_text};
    tm_gen_args args;
    if (!tm_api_gen_args(params, s->served, &p->opts.limits, bias, &args, e))
        return false;
    if (tm_detok_create(&s->detok, s->served->tokenizer, &detok, NULL) != TM_OK)
        return tm_api_fail(e, TM_API_INTERNAL, NULL, NULL);
    memcpy(s->stop_ids, params->stop_ids, sizeof(s->stop_ids));
    s->stop_id_count = params->stop_id_count;
    s->ignore_eos = params->ignore_eos;
    s->logprobs = args.sampling.logprobs >= 0;
    s->seen.prompt_tokens = (int64_t)prep->prompts[0].len;
    args.prompt = prep->prompts[0].ids;
    args.prompt_len = prep->prompts[0].len;
    args.max_tokens =
        tm_api_max_tokens(params, s->served, prep->kind == TM_PREP_CHAT, args.prompt_len);
    args.request_id = s->seen.request_id;
    int64_t retry_ms = 0;
    tm_status st = tm_dispatch_start(p->opts.dispatch, &args, &GEN_OPS, s, &s->gen, &retry_ms);
    s->begun = st == TM_OK;
    if (st == TM_OK) {
        tm_observe_start(p->opts.metrics, &s->seen);
        return true;
    }
    s->gen = NULL;
    tm_api_fail_start(e, p->opts.metrics, st, retry_ms);
    return false;
}

static void finish_prep(tm_prep *prep)
{
    tm_pstream *s = prep->user;
    if (s != NULL) { /* else the client has left meanwhile */
        tm_api_error e;
        s->prep = NULL;
        tm_observe_text(metrics_of(s), prep->work_ns);
        if (!prep->ok)
            fail(s, &prep->error);
        else if (!start(s, prep, &e))
            fail(s, &e);
    }
    tm_prep_destroy(prep);
}

static bool find_model(tm_pstream *s, const char *name, tm_api_error *e)
{
    const tm_dispatch *d = s->call->owner->opts.dispatch;
    tm_served *served = tm_dispatch_served_find(d, name);
    if (served == NULL)
        return tm_dispatch_served_count(d) == 0
                   ? tm_api_fail(e, TM_API_LOADING, NULL, NULL)
                   : tm_api_fail(e, TM_API_NO_MODEL, "model", "The model `%.200s` does not exist.",
                                 name);
    s->served = tm_served_acquire(served);
    snprintf(s->seen.model, sizeof(s->seen.model), "%s", served->name);
    return true;
}

static bool begin(tm_pstream *s, tm_public_ask *ask, tm_api_error *e)
{
    tm_public *p = s->call->owner;
    if (!find_model(s, ask->model, e))
        return false;
    ask->model = s->served->name;
    tm_prep *prep = tm_public_prep(ask, &p->opts.limits, e);
    if (prep == NULL)
        return false;
    int64_t left_ms = s->call->deadline_ms;
    if (left_ms != INT64_MAX)
        prep->params.timeout_s = (double)TM_MAX(left_ms, (int64_t)1) / 1000;
    prep->served = tm_served_acquire(s->served);
    prep->user = s;
    prep->done = finish_prep;
    if (tm_prep_weight(prep) <= p->opts.text_inline_bytes) {
        tm_prep_work(prep);
        finish_prep(prep);
        return true;
    }
    s->prep = prep;
    if (tm_prep_pool_submit(p->pool, prep))
        return true;
    s->prep = NULL;
    tm_prep_destroy(prep);
    tm_observe_shed(p->opts.metrics, "text_queue");
    return tm_api_fail(e, TM_API_OVERLOADED, NULL, NULL);
}

static void open_stream(tm_pcall *c, tm_public_ask *ask, const char *request_id)
{
    tm_pstream *s = calloc(1, sizeof(*s));
    if (s == NULL) {
        tm_pcall_finish(c, TM_STATUS_NO_MEMORY, "out of memory");
        return;
    }
    s->call = c;
    c->stream = s;
    s->seen.start_ns = c->start_ns;
    if (tm_observe_id_ok(request_id))
        snprintf(s->seen.request_id, sizeof(s->seen.request_id), "%s", request_id);
    else
        snprintf(s->seen.request_id, sizeof(s->seen.request_id), "req-%s%012" PRIx64,
                 c->owner->salt, ++c->owner->ids);
    tm_api_error e;
    if (!begin(s, ask, &e))
        fail(s, &e);
}

void tm_public_generate(tm_pcall *c, ProtobufCMessage **m)
{
    const PUB(GenerateRequest) *r = (const PUB(GenerateRequest) *)*m;
    tm_public_ask ask = {
        .model = r->model, .session = r->session_id, .sampling = r->sampling, .generate = r};
    open_stream(c, &ask, r->request_id);
}

void tm_public_chat(tm_pcall *c, ProtobufCMessage **m)
{
    const PUB(ChatRequest) *r = (const PUB(ChatRequest) *)*m;
    tm_public_ask ask = {
        .model = r->model, .session = r->session_id, .sampling = r->sampling, .chat = r};
    open_stream(c, &ask, r->request_id);
}
