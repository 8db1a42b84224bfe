/* Server and client of the API tests. */
#include "tests/router/api_harness.h"

#include <event2/event.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/file.h"
#include "common/log.h"

static const char *const RIG_HEADERS[] = {
    "content-type",
    "x-request-id",
    "openai-processing-ms",
    "openai-version",
    "retry-after",
    "retry-after-ms",
    "x-should-retry",
    "cache-control",
    "x-accel-buffering",
    "allow",
    "www-authenticate",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "connection",
    "transfer-encoding",
};

static tm_served_opts fake_served_opts; /* of the next rig_start, which resets them */

void fake_load_served(void)
{
    static const char *const names[] = {"tokenizer.json", "tokenizer_config.json", "config.json",
                                        "generation_config.json"};
    tm_text_file files[TM_ARRAY_LEN(names)];
    tm_err err = TM_ERR_INIT;
    for (size_t i = 0; i < TM_ARRAY_LEN(names); i++) {
        char path[200];
        char *data;
        tm_path_join(path, sizeof path, "models/demo-20m", names[i]);
        files[i].name = names[i];
        if (tm_file_read(path, 64 << 20, &data, &files[i].len, &err) != TM_OK)
            fail_msg("%s", err.msg);
        files[i].data = data;
    }
    if (tm_served_create(&fake_served, "demo", "0123456789abcdef0123", files, TM_ARRAY_LEN(names),
                         &fake_served_opts, &err) != TM_OK)
        fail_msg("%s", err.msg);
    fake_served_opts = (tm_served_opts){.chat_template = NULL};
    for (size_t i = 0; i < TM_ARRAY_LEN(names); i++)
        free((void *)(uintptr_t)files[i].data);
}

rig_opts rig_opts_default(void)
{
    return (rig_opts){.api = tm_api_opts_default(), .http = tm_http_opts_default()};
}

void rig_start(rig *r, const rig_opts *given)
{
    rig_opts o = given ? *given : rig_opts_default();
    tm_err err = TM_ERR_INIT;
    tm_log_init("api_test", getenv("TM_TEST_LOG") ? TM_LOG_DEBUG : TM_LOG_ERROR, TM_LOG_TEXT);
    *r = (rig){.base = event_base_new(), .metrics = tm_metrics_create()};
    fake_base = r->base;
    fake_load_served();
    fake_reset();
    if (tm_keys_create(&r->keys, o.key_file, &err) != TM_OK)
        fail_msg("%s", err.msg);
    o.api.base = r->base;
    o.api.metrics = r->metrics;
    o.api.keys = r->keys;
    if (tm_api_create(&r->api, &o.api, &err) != TM_OK)
        fail_msg("%s", err.msg);
    tm_api_serve(r->api, &o.http);
    if (tm_http_server_create(&r->http, r->base, &o.http, &err) != TM_OK)
        fail_msg("%s", err.msg);
    r->port = tm_http_server_port(r->http);
}

void rig_start_model(rig *r, const char *template, const char *tool_parser,
                     const char *reason_parser, const char *meta_instruction)
{
    fake_served_opts = (tm_served_opts){template, meta_instruction, tool_parser, reason_parser};
    rig_start(r, NULL);
}

void rig_stop(rig *r)
{
    tm_http_server_destroy(r->http);
    assert_int_equal(tm_api_active(r->api), 0);
    assert_int_equal(fake.active, 0);
    tm_api_destroy(r->api);
    tm_keys_destroy(r->keys);
    tm_metrics_destroy(r->metrics);
    fake_reset();
    assert_int_equal(fake_served->refs, 1);
    tm_served_release(fake_served);
    fake_served = NULL;
    event_base_free(r->base);
}

/* ---- client ---- */

static void on_headers(void *user, tm_http_call *call, int status)
{
    answer *a = user;
    a->status = status;
    for (size_t i = 0; i < TM_ARRAY_LEN(RIG_HEADERS); i++) {
        const char *v = tm_http_call_header(call, RIG_HEADERS[i]);
        snprintf(a->headers[i], sizeof a->headers[i], "%s", v ? v : "\n");
    }
}

static void on_data(void *user, tm_http_call *call, const char *data, size_t len)
{
    (void)call;
    answer *a = user;
    tm_buf_append(&a->body, data, len);
}

static void on_end(void *user, tm_http_call *call, tm_status st, const tm_err *err)
{
    (void)call;
    (void)err;
    answer *a = user;
    a->done = true;
    a->end = st;
    a->call = NULL;
}

void rig_send_raw(rig *r, answer *a, const char *method, const char *target, const char *body,
                  const char *const *headers)
{
    tm_http_call_opts o = tm_http_call_opts_default();
    *a = (answer){.rig = r};
    tm_buf_init(&a->body, 0);
    o.host = "127.0.0.1";
    o.port = r->port;
    o.method = method;
    o.target = target;
    o.headers = headers;
    o.body = body;
    o.body_len = body ? strlen(body) : 0;
    o.user = a;
    o.on_headers = on_headers;
    o.on_data = on_data;
    o.on_end = on_end;
    tm_err err = TM_ERR_INIT;
    if (tm_http_call_start(&a->call, r->base, &o, &err) != TM_OK)
        fail_msg("%s", err.msg);
}

void rig_send(rig *r, answer *a, const char *method, const char *target, const char *body,
              const char *const *extra)
{
    const char *headers[24] = {"Content-Type: application/json"};
    int n = body ? 1 : 0;
    for (; extra && *extra; extra++)
        headers[n++] = *extra;
    headers[n] = NULL;
    rig_send_raw(r, a, method, target, body, headers);
}

void rig_turn(rig *r)
{
    struct timeval tick = {0, 2000};
    event_base_loopexit(r->base, &tick);
    event_base_loop(r->base, EVLOOP_ONCE);
}

static int64_t deadline(void)
{
    return tm_clock_ms() + 20000;
}

void rig_wait(answer *a)
{
    for (int64_t end = deadline(); !a->done;) {
        rig_turn(a->rig);
        if (tm_clock_ms() > end)
            fail_msg("no answer");
    }
}

void rig_wait_gens(rig *r, int count)
{
    for (int64_t end = deadline(); fake.gen_count < count;) {
        rig_turn(r);
        if (tm_clock_ms() > end)
            fail_msg("%d generations, expected %d", fake.gen_count, count);
    }
}

void rig_wait_body(answer *a, size_t len)
{
    for (int64_t end = deadline(); a->body.len < len;) {
        rig_turn(a->rig);
        if (tm_clock_ms() > end)
            fail_msg("%zu bytes, expected %zu: %s", a->body.len, len, a->body.data);
    }
}

void rig_call(rig *r, answer *a, const char *method, const char *target, const char *body)
{
    rig_send(r, a, method, target, body, NULL);
    rig_wait(a);
}

void rig_post(rig *r, answer *a, const char *target, const char *body)
{
    rig_call(r, a, "POST", target, body);
}

const char *answer_header(const answer *a, const char *name)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(RIG_HEADERS); i++)
        if (strcasecmp(RIG_HEADERS[i], name) == 0)
            return a->headers[i][0] == '\n' ? NULL : a->headers[i];
    fail_msg("header %s is not kept", name);
    return NULL;
}

const json_t *answer_json(answer *a)
{
    tm_err err = TM_ERR_INIT;
    if (!a->json &&
        tm_json_parse(a->body.data ? a->body.data : "", a->body.len, &a->json, &err) != TM_OK)
        fail_msg("%s in: %s", err.msg, a->body.data ? a->body.data : "");
    return a->json;
}

void answer_free(answer *a)
{
    if (a->call)
        tm_http_call_cancel(a->call);
    json_decref(a->json);
    tm_buf_deinit(&a->body);
    *a = (answer){0};
}

/* ---- looking into answers ---- */

const json_t *at(const json_t *root, const char *path)
{
    char copy[200];
    snprintf(copy, sizeof copy, "%s", path);
    const json_t *v = root;
    for (char *save, *part = strtok_r(copy, ".", &save); part; part = strtok_r(NULL, ".", &save))
        v = json_is_array(v) ? json_array_get(v, (size_t)strtol(part, NULL, 10))
                             : json_object_get(v, part);
    if (!v)
        fail_msg("nothing at %s", path);
    return v;
}

const char *str_at(const json_t *root, const char *path)
{
    const json_t *v = at(root, path);
    if (!json_is_string(v))
        fail_msg("%s is %s", path, tm_json_type_name(v));
    return json_string_value(v);
}

int64_t int_at(const json_t *root, const char *path)
{
    const json_t *v = at(root, path);
    if (!json_is_integer(v))
        fail_msg("%s is %s", path, tm_json_type_name(v));
    return json_integer_value(v);
}

static void same_or_null(const json_t *root, const char *path, const char *want)
{
    const json_t *v = at(root, path);
    if (want && (!json_is_string(v) || strcmp(json_string_value(v), want) != 0))
        fail_msg("%s is %s, expected %s", path,
                 json_is_string(v) ? json_string_value(v) : tm_json_type_name(v), want);
    if (!want && !json_is_null(v))
        fail_msg("%s is not null", path);
}

void assert_error(answer *a, int status, const char *type, const char *code, const char *param)
{
    if (a->status != status)
        fail_msg("status %d, expected %d: %s", a->status, status, a->body.data);
    const json_t *o = answer_json(a);
    same_or_null(o, "error.type", type);
    same_or_null(o, "error.code", code);
    same_or_null(o, "error.param", param);
    same_or_null(o, "object", "error");
    same_or_null(o, "type", type);
    same_or_null(o, "param", param);
    assert_string_equal(str_at(o, "message"), str_at(o, "error.message"));
    assert_true(strlen(str_at(o, "message")) > 5);
    assert_int_equal(int_at(o, "code"), status);
    assert_string_equal(answer_header(a, "content-type"), "application/json");
}
