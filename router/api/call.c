/* One HTTP request from its head to its log line: request id, key, limits, content type, errors. */
#include <event2/event.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/hash.h"
#include "common/log.h"
#include "router/api/internal.h"

#define NS_PER_MS        1000000
#define RETRY_DEFAULT_MS 1000

/* ---- request id ---- */

/* The client's id if it is harmless in logs and headers, else one of ours. */
static void choose_id(tm_api_call *c)
{
    const char *given = tm_http_req_header(c->http, "x-request-id");
    if (tm_observe_id_ok(given))
        snprintf(c->seen.request_id, sizeof c->seen.request_id, "%s", given);
    else
        snprintf(c->seen.request_id, sizeof c->seen.request_id, "req-%s%012llx", c->api->salt,
                 (unsigned long long)++c->api->ids);
}

/* ---- answers ---- */

void tm_api_headers(tm_api_call *c)
{
    char ms[32];
    int64_t ns = tm_clock_ns() - tm_http_req_start_ns(c->http);
    snprintf(ms, sizeof ms, "%lld", (long long)(ns / NS_PER_MS));
    tm_http_set_header(c->http, "x-request-id", c->seen.request_id);
    tm_http_set_header(c->http, "openai-processing-ms", ms);
    tm_http_set_header(c->http, "openai-version", "2020-10-01");
}

void tm_api_reply(tm_api_call *c, int status)
{
    tm_buf *out = &c->api->out;
    if (out->failed) {
        tm_api_error e;
        tm_api_fail(&e, TM_API_INTERNAL, NULL, NULL);
        tm_api_reply_error(c, &e);
        return;
    }
    tm_api_headers(c);
    tm_http_reply(c->http, status, "application/json", out->data, out->len);
}

void tm_api_reply_error(tm_api_call *c, const tm_api_error *e)
{
    const tm_api_code_row *row = tm_api_code_get(e->code);
    tm_buf *out = &c->api->out;
    c->seen.error = row->code ? row->code : row->type;
    if (row->http == 429 || row->http == 503) {
        int64_t ms = e->retry_after_ms > 0 ? e->retry_after_ms : RETRY_DEFAULT_MS;
        char text[32];
        snprintf(text, sizeof text, "%lld", (long long)((ms + 999) / 1000));
        tm_http_set_header(c->http, "retry-after", text);
        snprintf(text, sizeof text, "%lld", (long long)ms);
        tm_http_set_header(c->http, "retry-after-ms", text);
    }
    if (row->http == 401)
        tm_http_set_header(c->http, "www-authenticate", "Bearer");
    tm_http_set_header(c->http, "x-should-retry", row->retry);
    tm_buf_clear(out);
    tm_api_error_body(e, out);
    tm_api_headers(c);
    tm_http_reply(c->http, row->http, "application/json", out->data, out->len);
}

void tm_api_on_error_body(void *user, int http_status, tm_buf *out)
{
    (void)user;
    tm_api_error e;
    tm_api_fail(&e, tm_api_code_of_http(http_status), NULL, NULL);
    tm_api_error_body(&e, out);
}

/* ---- authorisation ---- */

/* The key that the request shows, or NULL. An x-api-key counts only without an Authorization header. */
static const char *shown_key(const tm_http_req *req, size_t *len)
{
    const char *v = tm_http_req_header(req, "authorization");
    v = v ? tm_keys_bearer(v) : tm_http_req_header(req, "x-api-key");
    *len = v ? strlen(v) : 0;
    return *len > 0 ? v : NULL;
}

static bool find_owner(tm_api_call *c, tm_api_error *e)
{
    tm_keys *keys = c->api->opts.keys;
    size_t len;
    const char *key = shown_key(c->http, &len);
    tm_key_owner *o = NULL;
    if (!tm_keys_required(keys) || c->route->http.open)
        o = tm_keys_anonymous(keys);
    else if (!key)
        return tm_api_fail(e, TM_API_KEY_MISSING, NULL, NULL);
    else
        o = tm_keys_find(keys, key, len);
    if (!o)
        return tm_api_fail(e, TM_API_KEY_INVALID, NULL, NULL);
    if (c->route->admin && !o->admin)
        return tm_api_fail(e, TM_API_FORBIDDEN, NULL, NULL);
    c->owner = tm_key_owner_acquire(o);
    return true;
}

/* "6m0s", "1s", "250ms", as OpenAI writes it. */
static void format_reset(char *out, size_t size, int64_t ms)
{
    if (ms < 1000)
        snprintf(out, size, "%lldms", (long long)ms);
    else if (ms < 60000)
        snprintf(out, size, "%llds", (long long)((ms + 999) / 1000));
    else
        snprintf(out, size, "%lldm%llds", (long long)(ms / 60000), (long long)(ms % 60000 / 1000));
}

static void limit_headers(tm_api_call *c)
{
    const tm_limit_opts *o = &c->api->opts.limit;
    char text[48];
    if (o->requests_per_minute == 0)
        return;
    snprintf(text, sizeof text, "%lld", (long long)o->requests_per_minute);
    tm_http_set_header(c->http, "x-ratelimit-limit-requests", text);
    snprintf(text, sizeof text, "%lld", (long long)tm_limit_remaining(&c->owner->limit));
    tm_http_set_header(c->http, "x-ratelimit-remaining-requests", text);
    format_reset(text, sizeof text, tm_limit_full_in_ms(&c->owner->limit, o));
    tm_http_set_header(c->http, "x-ratelimit-reset-requests", text);
}

static bool enter_limit(tm_api_call *c, tm_api_error *e)
{
    int64_t retry_ms = 0;
    tm_limit_verdict v =
        tm_limit_enter(&c->owner->limit, &c->api->opts.limit, tm_clock_ms(), &retry_ms);
    limit_headers(c);
    if (v == TM_LIMIT_OK) {
        c->limited = true;
        return true;
    }
    tm_observe_shed(c->api->opts.metrics, v == TM_LIMIT_RATE ? "key_rate" : "key_concurrency");
    tm_api_fail(e, TM_API_RATE_LIMIT, NULL,
                v == TM_LIMIT_RATE ? "The key's request rate is reached, try again later."
                                   : "Too many requests of this key are open, try again later.");
    e->retry_after_ms = retry_ms;
    return false;
}

static bool may_pass(tm_api_call *c, tm_api_error *e)
{
    if (!find_owner(c, e))
        return false;
    if (!c->route->generates)
        return true;
    if (c->api->draining)
        return tm_api_fail(e, TM_API_DRAINING, NULL, NULL);
    return enter_limit(c, e);
}

/* NULL without memory: the server then answers 500. */
static tm_api_call *open_call(tm_api *a, tm_http_req *req, const tm_api_route *route)
{
    tm_api_call *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->api = a;
    c->http = req;
    c->route = route;
    c->seen.start_ns = tm_http_req_start_ns(req);
    choose_id(c);
    tm_http_req_set_user(req, c, NULL);
    return c;
}

bool tm_api_on_authorise(void *user, tm_http_req *req, const tm_http_route *route)
{
    tm_api_call *c = open_call(user, req, tm_api_route_of(route));
    tm_api_error e;
    if (c && may_pass(c, &e))
        return true;
    if (c)
        tm_api_reply_error(c, &e);
    return false;
}

/* What the server below refuses has an id, headers and a log line like everything else. */
void tm_api_on_error(void *user, tm_http_req *req, int http_status)
{
    static const tm_api_route none = {.label = "none", .quiet = true};
    tm_api_call *c = tm_http_req_user(req);
    if (!c)
        c = open_call(user, req, &none);
    if (!c)
        return;
    const tm_api_code_row *row = tm_api_code_get(tm_api_code_of_http(http_status));
    c->seen.error = row->code ? row->code : row->type;
    tm_api_headers(c);
}

/* ---- handling ---- */

/* application/json, with no parameter but a charset of UTF-8. */
static bool is_json_type(const char *v)
{
    static const char name[] = "application/json";
    if (!v || strncasecmp(v, name, sizeof name - 1) != 0)
        return false;
    v += sizeof name - 1;
    v += strspn(v, " \t");
    if (!*v)
        return true;
    if (*v++ != ';')
        return false;
    v += strspn(v, " \t");
    return strcasecmp(v, "charset=utf-8") == 0 || strcasecmp(v, "charset=\"utf-8\"") == 0 || !*v;
}

static void on_gone(void *user, tm_http_req *req)
{
    (void)req;
    tm_api_call *c = user;
    c->seen.finish = "gone";
    if (c->prep)
        c->prep->user = NULL;
    c->prep = NULL;
    if (c->job)
        tm_api_job_end(c->job);
    c->http = NULL;
}

void tm_api_on_request(void *user, tm_http_req *req)
{
    (void)user;
    tm_api_call *c = tm_http_req_user(req);
    tm_http_req_set_user(req, c, on_gone);
    tm_buf_clear(&c->api->out);
    if (c->route->json && !is_json_type(tm_http_req_header(req, "content-type"))) {
        tm_api_error e;
        tm_api_fail(&e, TM_API_MEDIA_TYPE, NULL, NULL);
        tm_api_reply_error(c, &e);
        return;
    }
    c->route->handle(c);
}

void tm_api_on_done(void *user, tm_http_req *req)
{
    (void)user;
    tm_api_call *c = tm_http_req_user(req);
    if (!c)
        return; /* there was no memory for it */
    const tm_observe_end end = {.route = c->route->label,
                                .key = c->owner ? c->owner->name : NULL,
                                .status = tm_http_req_status(req),
                                .generated = c->job && c->job->started,
                                .gone = c->http == NULL,
                                .quiet = c->route->quiet};
    tm_observe_done(c->api->opts.metrics, &c->seen, &end);
    if (c->job)
        tm_api_job_destroy(c->job);
    if (c->limited)
        tm_limit_leave(&c->owner->limit);
    tm_key_owner_release(c->owner);
    free(c);
}

bool tm_api_find_model(tm_api *a, const char *name, tm_served **out, tm_api_error *e)
{
    tm_served *s = tm_dispatch_served_find(a->opts.dispatch, name);
    if (s) {
        *out = s;
        return true;
    }
    if (tm_dispatch_served_count(a->opts.dispatch) == 0)
        return tm_api_fail(e, TM_API_LOADING, NULL, NULL);
    return tm_api_fail(e, TM_API_NO_MODEL, "model", "The model `%.200s` does not exist.", name);
}

/* Each name is logged once, and only so many: a client must not fill the log. */
void tm_api_unknown_field(void *user, const char *key)
{
    tm_api *a = user;
    for (int i = 0; i < a->unknown_count; i++)
        if (strcmp(a->unknown[i], key) == 0)
            return;
    if (a->unknown_count == (int)TM_ARRAY_LEN(a->unknown) || strlen(key) > 64)
        return;
    char *copy = strdup(key);
    if (!copy)
        return;
    a->unknown[a->unknown_count++] = copy;
    tm_log(TM_LOG_INFO, "unknown_field", "ignored field \"%s\" in requests", key);
}
