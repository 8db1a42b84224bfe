/* Probes, models, metrics, the group table, /tokenize and /detokenize. */
#include "tests/router/api_harness.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"

static rig g_rig;

static int start(void **state)
{
    (void)state;
    rig_start(&g_rig, NULL);
    return 0;
}

static int stop(void **state)
{
    (void)state;
    rig_stop(&g_rig);
    return 0;
}

static const json_t *get(answer *a, const char *target, int status)
{
    rig_call(&g_rig, a, "GET", target, NULL);
    if (a->status != status)
        fail_msg("%s: %d: %s", target, a->status, a->body.data);
    return answer_json(a);
}

static void probes(void **state)
{
    (void)state;
    static const struct {
        int groups, models, status;
        bool draining;
        const char *says;
    } rows[] = {{2, 1, 200, false, "healthy"},
                {0, 1, 503, false, "unhealthy"},
                {0, 0, 503, false, "loading"},
                {2, 1, 503, true, "draining"}};
    answer a;
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        fake.groups_ready = rows[i].groups;
        fake.served_count = rows[i].models;
        if (rows[i].draining)
            tm_api_drain(g_rig.api);
        static const char *const targets[] = {"/health", "/readyz"};
        for (size_t t = 0; t < TM_ARRAY_LEN(targets); t++) {
            const json_t *o = get(&a, targets[t], rows[i].status);
            assert_string_equal(str_at(o, "status"), rows[i].says);
            assert_int_equal(int_at(o, "groups_ready"), rows[i].groups);
            assert_int_equal(int_at(o, "models"), rows[i].models);
            assert_int_equal(int_at(o, "active"), 0);
            assert_int_equal(int_at(o, "waiting"), 0);
            assert_true(json_is_false(at(o, "members_stale")));
            assert_int_equal(json_array_size(at(o, "groups")), rows[i].groups);
            if (rows[i].groups > 0) {
                assert_string_equal(str_at(o, "groups.0.name"), "group-a");
                assert_string_equal(str_at(o, "groups.0.state"), "ready");
                assert_string_equal(str_at(o, "groups.0.address"), "127.0.0.1:1");
            }
            answer_free(&a);
        }
        /* A liveness probe must not fail because of what is elsewhere. */
        assert_string_equal(str_at(get(&a, "/livez", 200), "status"), "alive");
        answer_free(&a);
    }
    rig_call(&g_rig, &a, "HEAD", "/health", NULL);
    assert_int_equal(a.status, 503);
    assert_int_equal(a.body.len, 0);
    answer_free(&a);
}

static void models(void **state)
{
    (void)state;
    answer a;
    const json_t *o = get(&a, "/v1/models", 200);
    assert_string_equal(str_at(o, "object"), "list");
    assert_int_equal(json_array_size(at(o, "data")), 1);
    assert_string_equal(str_at(o, "data.0.id"), "demo");
    assert_string_equal(str_at(o, "data.0.object"), "model");
    assert_string_equal(str_at(o, "data.0.owned_by"), "turbomesh");
    assert_int_equal(int_at(o, "data.0.max_model_len"), fake_served->max_context);
    assert_int_equal(int_at(o, "data.0.created"), fake_served->created);
    answer_free(&a);
    assert_string_equal(str_at(get(&a, "/v1/models/demo", 200), "id"), "demo");
    answer_free(&a);
    rig_call(&g_rig, &a, "GET", "/v1/models/other", NULL);
    assert_error(&a, 404, "not_found_error", "model_not_found", "model");
    answer_free(&a);
    fake.served_count = 0;
    assert_int_equal(json_array_size(at(get(&a, "/v1/models", 200), "data")), 0);
    answer_free(&a);
    rig_call(&g_rig, &a, "GET", "/v1/models/demo", NULL);
    assert_error(&a, 404, "not_found_error", "model_not_found", "model");
    answer_free(&a);
}

/* ---- metrics ---- */

static bool metric_name(const char *s, size_t n)
{
    bool ok = n > 0 && (isalpha((unsigned char)s[0]) || s[0] == '_');
    for (size_t i = 0; ok && i < n; i++)
        ok = islower((unsigned char)s[i]) || isdigit((unsigned char)s[i]) || s[i] == '_';
    return ok;
}

static bool ends_with(const char *s, size_t n, const char *end)
{
    size_t k = strlen(end);
    return n >= k && memcmp(s + n - k, end, k) == 0;
}

/* What `promtool check metrics` looks at: every sample has a HELP and a TYPE before it, counters end in _total,
 * names are plain. */
static void check_text(char *text)
{
    char name[128] = "", type[32] = "";
    int help = 0;
    for (char *save, *line = strtok_r(text, "\n", &save); line;
         line = strtok_r(NULL, "\n", &save)) {
        if (strncmp(line, "# HELP ", 7) == 0) {
            size_t n = strcspn(line + 7, " ");
            assert_true(metric_name(line + 7, n));
            assert_true(strlen(line + 7 + n) > 8);
            snprintf(name, sizeof name, "%.*s", (int)n, line + 7);
            help++;
        } else if (strncmp(line, "# TYPE ", 7) == 0) {
            assert_int_equal(sscanf(line + 7 + strlen(name), "%31s", type), 1);
            assert_memory_equal(line + 7, name, strlen(name));
            assert_int_equal(strcmp(type, "counter") == 0, ends_with(name, strlen(name), "_total"));
        } else {
            size_t n = strcspn(line, "{ ");
            assert_memory_equal(line, name, strlen(name));
            const char *rest = line + strlen(name);
            if (strcmp(type, "histogram") != 0)
                assert_int_equal(n, strlen(name));
            else
                assert_true(strncmp(rest, "_bucket{", 8) == 0 || strncmp(rest, "_sum", 4) == 0 ||
                            strncmp(rest, "_count", 6) == 0);
        }
    }
    assert_true(help > 10);
}

static void metrics(void **state)
{
    (void)state;
    static const char *const wanted[] = {
        "turbomesh_requests_total{route=\"completions\",code=\"200\",model=\"demo\"} 1\n",
        "turbomesh_requests_total{route=\"completions\",code=\"404\",model=\"\"} 1\n",
        "turbomesh_requests_total{route=\"none\",code=\"404\",model=\"\"} 1\n",
        "turbomesh_prompt_tokens_total{model=\"demo\"} ",
        "turbomesh_cached_prompt_tokens_total{model=\"demo\"} 1\n",
        "turbomesh_time_to_first_token_seconds_count{model=\"demo\"} 1\n",
        "turbomesh_time_per_output_token_seconds_count{model=\"demo\"} 1\n",
        "turbomesh_e2e_request_latency_seconds_count{model=\"demo\"} 2\n",
        "turbomesh_added_latency_seconds_count{model=\"demo\"} 2\n",
        "turbomesh_stage_duration_seconds_count{stage=\"text\"} 3\n",
        "turbomesh_client_disconnects_total 1\n",
        "turbomesh_shed_total{reason=\"queue_full\"} 1\n",
    };
    answer a;
    fake_answer("one two three", true);
    fake.cached = 1;
    rig_post(&g_rig, &a, "/v1/completions", "{\"model\":\"demo\",\"prompt\":\"hi\"}");
    answer_free(&a);
    /* A name that a client invents makes no series. */
    rig_post(&g_rig, &a, "/v1/completions", "{\"model\":\"evil\\\"} 1\",\"prompt\":\"hi\"}");
    answer_free(&a);
    rig_call(&g_rig, &a, "GET", "/no/such/route", NULL);
    answer_free(&a);
    fake.start_status = TM_STATUS_BUSY;
    fake.start_fail_at = 0;
    rig_post(&g_rig, &a, "/v1/completions", "{\"model\":\"demo\",\"prompt\":\"hi\"}");
    answer_free(&a);
    fake.start_status = TM_OK;
    fake.manual = true;
    rig_send(&g_rig, &a, "POST", "/tokenize", "{\"prompt\":\"x\"}", NULL);
    rig_wait(&a);
    answer_free(&a);
    rig_send(&g_rig, &a, "POST", "/v1/chat/completions",
             "{\"model\":\"demo\",\"messages\":\"hi\",\"stream\":true}", NULL);
    rig_wait_gens(&g_rig, 2);
    answer_free(&a);
    while (fake.cancels == 0)
        rig_turn(&g_rig);
    rig_turn(&g_rig);
    rig_call(&g_rig, &a, "GET", "/metrics", NULL);
    assert_int_equal(a.status, 200);
    assert_memory_equal(answer_header(&a, "content-type"), "text/plain; version=0.0.4", 25);
    for (size_t i = 0; i < TM_ARRAY_LEN(wanted); i++)
        if (strstr(a.body.data, wanted[i]) == NULL)
            fail_msg("no %s in:\n%s", wanted[i], a.body.data);
    assert_null(strstr(a.body.data, "evil"));
    check_text(a.body.data);
    answer_free(&a);
}

/* ---- tokens ---- */

static void tokenize(void **state)
{
    (void)state;
    answer a;
    int32_t ids[100];
    int n = fake_encode("Hello, w\xc3\xb6rld", ids, 100);
    rig_post(&g_rig, &a, "/tokenize",
             "{\"prompt\":\"Hello, w\xc3\xb6rld\",\"add_special_tokens\":false,"
             "\"return_token_strs\":true}");
    const json_t *o = answer_json(&a);
    assert_int_equal(a.status, 200);
    assert_int_equal(int_at(o, "count"), n);
    assert_int_equal(int_at(o, "max_model_len"), fake_served->max_context);
    assert_int_equal(json_array_size(at(o, "token_strs")), n);
    tm_buf body;
    tm_buf_init(&body, 0);
    tm_buf_puts(&body, "{\"tokens\":[");
    for (int i = 0; i < n; i++) {
        assert_int_equal(json_integer_value(json_array_get(at(o, "tokens"), (size_t)i)), ids[i]);
        tm_buf_printf(&body, "%s%d", i ? "," : "", ids[i]);
    }
    tm_buf_puts(&body, "]}");
    answer_free(&a);
    rig_post(&g_rig, &a, "/detokenize", body.data);
    assert_string_equal(str_at(answer_json(&a), "prompt"), "Hello, w\xc3\xb6rld");
    answer_free(&a);
    tm_buf_deinit(&body);
    rig_post(&g_rig, &a, "/tokenize",
             "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"model\":\"demo\"}");
    assert_true(int_at(answer_json(&a), "count") > 3);
    answer_free(&a);
    static const struct {
        const char *target, *body, *code, *param;
    } bad[] = {{"/tokenize", "{}", "missing_required_parameter", "prompt"},
               {"/tokenize", "{\"prompt\":5}", "invalid_type", "prompt"},
               {"/tokenize", "[]", "invalid_type", NULL},
               {"/tokenize", "{", "invalid_json", NULL},
               {"/tokenize", "{\"prompt\":\"x\",\"add_special_tokens\":1}", "invalid_type",
                "add_special_tokens"},
               {"/detokenize", "{}", "missing_required_parameter", "tokens"},
               {"/detokenize", "{\"tokens\":[-1]}", "invalid_value", "tokens"},
               {"/detokenize", "{\"tokens\":[1.5]}", "invalid_type", "tokens"},
               {"/detokenize", "{\"tokens\":\"x\"}", "invalid_type", "tokens"}};
    for (size_t i = 0; i < TM_ARRAY_LEN(bad); i++) {
        rig_post(&g_rig, &a, bad[i].target, bad[i].body);
        assert_error(&a, 400, "invalid_request_error", bad[i].code, bad[i].param);
        answer_free(&a);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(probes, start, stop),
        cmocka_unit_test_setup_teardown(models, start, stop),
        cmocka_unit_test_setup_teardown(metrics, start, stop),
        cmocka_unit_test_setup_teardown(tokenize, start, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
