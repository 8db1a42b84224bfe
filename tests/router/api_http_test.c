/* Requests that are refused, and what every answer carries: keys and limits, request ids, sizes, malformed JSON,
 * statuses with their Retry-After, and the log line. */
#include "tests/router/api_harness.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/buf.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/file.h"
#include "common/hash.h"
#include "common/log.h"

#define COMPLETIONS "/v1/completions"
#define CHAT        "/v1/chat/completions"
#define HI          "{\"model\":\"demo\",\"prompt\":\"hi\"}"

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

static double metric(const char *line)
{
    tm_buf b;
    tm_buf_init(&b, 0);
    tm_metrics_render(g_rig.metrics, &b);
    const char *at_line = strstr(b.data, line);
    double v = at_line ? strtod(at_line + strlen(line), NULL) : -1;
    tm_buf_deinit(&b);
    return v;
}

/* ---- request ids ---- */

static void request_ids(void **state)
{
    (void)state;
    static const struct {
        const char *given;
        bool kept;
    } rows[] = {{"abc-DEF_0.9", true}, {"", false},     {"has space", false}, {"a/b", false},
                {"\xc3\xa9", false},   {"a\tb", false}, {"<x>", false}};
    char long_id[200], header[300];
    answer a;
    for (size_t i = 0; i < TM_ARRAY_LEN(rows) + 2; i++) {
        const char *given = i < TM_ARRAY_LEN(rows) ? rows[i].given : long_id;
        bool kept = i < TM_ARRAY_LEN(rows) ? rows[i].kept : i == TM_ARRAY_LEN(rows);
        memset(long_id, 'x', sizeof long_id);
        long_id[i == TM_ARRAY_LEN(rows) ? 128 : 129] = '\0';
        snprintf(header, sizeof header, "X-Request-ID: %s", given);
        rig_send(&g_rig, &a, "GET", "/livez", NULL, (const char *const[]){header, NULL});
        rig_wait(&a);
        assert_int_equal(a.status, 200);
        if (kept)
            assert_string_equal(answer_header(&a, "x-request-id"), given);
        else
            assert_memory_equal(answer_header(&a, "x-request-id"), "req-", 4);
        answer_free(&a);
    }
    /* Ours differ, and errors carry one too. */
    answer b;
    rig_post(&g_rig, &a, COMPLETIONS, "{}");
    rig_post(&g_rig, &b, COMPLETIONS, HI);
    assert_string_not_equal(answer_header(&a, "x-request-id"), answer_header(&b, "x-request-id"));
    assert_non_null(answer_header(&a, "openai-version"));
    assert_non_null(answer_header(&a, "openai-processing-ms"));
    answer_free(&a);
    answer_free(&b);
}

/* ---- keys ---- */

static char g_keys[] = "/tmp/tm_api_http_XXXXXX";

static void start_with_keys(tm_limit_opts limit)
{
    char hex[2][65];
    uint8_t hash[32];
    static const char *const keys[] = {"user-key", "admin-key"};
    rig_opts o = rig_opts_default();
    for (int i = 0; i < 2; i++) {
        tm_sha256(keys[i], strlen(keys[i]), hash);
        tm_hex(hash, 32, hex[i]);
    }
    memcpy(g_keys + strlen(g_keys) - 6, "XXXXXX", 6);
    int fd = mkstemp(g_keys);
    assert_true(dprintf(fd, "u:%s\na:%s:admin\n", hex[0], hex[1]) > 0);
    close(fd);
    o.key_file = g_keys;
    o.api.limit = limit;
    rig_start(&g_rig, &o);
    unlink(g_keys);
}

static int status_with(const char *method, const char *target, const char *body, const char *header)
{
    answer a;
    rig_send(&g_rig, &a, method, target, body, (const char *const[]){header, NULL});
    rig_wait(&a);
    int status = a.status;
    if (status == 401) {
        assert_string_equal(answer_header(&a, "www-authenticate"), "Bearer");
        assert_error(&a, 401, "authentication_error",
                     header && strstr(header, "wrong") ? "invalid_api_key" : "missing_api_key",
                     NULL);
    }
    answer_free(&a);
    return status;
}

static void keys(void **state)
{
    (void)state;
    static const char *const open[] = {"/health", "/livez", "/readyz"};
    static const struct {
        const char *method, *target, *body;
    } guarded[] = {{"POST", CHAT, "{}"},        {"POST", COMPLETIONS, "{}"},
                   {"GET", "/v1/models", NULL}, {"GET", "/v1/models/demo", NULL},
                   {"POST", "/tokenize", "{}"}, {"POST", "/detokenize", "{}"},
                   {"GET", "/metrics", NULL},   {"GET", "/nodes/status", NULL},
                   {"HEAD", "/v1/models", NULL}};
    start_with_keys((tm_limit_opts){0});
    for (size_t i = 0; i < TM_ARRAY_LEN(open); i++)
        assert_int_equal(status_with("GET", open[i], NULL, NULL), 200);
    for (size_t i = 0; i < TM_ARRAY_LEN(guarded); i++) {
        const char *m = guarded[i].method, *t = guarded[i].target, *b = guarded[i].body;
        bool head = strcmp(m, "HEAD") == 0; /* has no body to look at */
        if (!head) {
            assert_int_equal(status_with(m, t, b, NULL), 401);
            assert_int_equal(status_with(m, t, b, "Authorization: Basic user-key"), 401);
            assert_int_equal(status_with(m, t, b, "Authorization: Bearer wrong"), 401);
            assert_int_equal(status_with(m, t, b, "Authorization: Bearer user-key-wrong"), 401);
            assert_int_equal(status_with(m, t, b, "x-api-key: wrong"), 401);
        }
        bool admin = strcmp(t, "/nodes/status") == 0;
        int user = status_with(m, t, b, "Authorization: bearer  user-key");
        assert_int_equal(user, admin ? 403 : b ? 400 : 200);
        assert_int_equal(status_with(m, t, b, "x-api-key: admin-key"), b ? 400 : 200);
    }
    /* A route that does not exist says nothing about keys, whatever its path looks like. */
    assert_int_equal(status_with("GET", "/health/../v1/models", NULL, NULL), 400);
    assert_int_equal(status_with("GET", "//v1/models", NULL, NULL), 404);
    rig_stop(&g_rig);
}

static void rates(void **state)
{
    (void)state;
    answer a;
    const char *const key[] = {"Authorization: Bearer user-key", NULL};
    const char *const other[] = {"Authorization: Bearer admin-key", NULL};
    start_with_keys((tm_limit_opts){.requests_per_minute = 2});
    fake_answer("ok", true);
    for (int i = 0; i < 2; i++) {
        rig_send(&g_rig, &a, "POST", COMPLETIONS, HI, key);
        rig_wait(&a);
        assert_int_equal(a.status, 200);
        assert_string_equal(answer_header(&a, "x-ratelimit-limit-requests"), "2");
        assert_int_equal(strtol(answer_header(&a, "x-ratelimit-remaining-requests"), NULL, 10),
                         1 - i);
        assert_non_null(answer_header(&a, "x-ratelimit-reset-requests"));
        answer_free(&a);
    }
    rig_send(&g_rig, &a, "POST", COMPLETIONS, HI, key);
    rig_wait(&a);
    assert_error(&a, 429, "rate_limit_error", "rate_limit_exceeded", NULL);
    assert_in_range(strtol(answer_header(&a, "retry-after"), NULL, 10), 1, 31);
    assert_in_range(strtol(answer_header(&a, "retry-after-ms"), NULL, 10), 1, 30000);
    assert_string_equal(answer_header(&a, "x-should-retry"), "true");
    assert_true(metric("turbomesh_shed_total{reason=\"key_rate\"} ") == 1);
    answer_free(&a);
    /* Other keys and other routes are not touched by it. */
    rig_send(&g_rig, &a, "POST", COMPLETIONS, HI, other);
    rig_wait(&a);
    assert_int_equal(a.status, 200);
    answer_free(&a);
    assert_int_equal(status_with("GET", "/v1/models", NULL, key[0]), 200);
    rig_stop(&g_rig);
}

static void concurrency(void **state)
{
    (void)state;
    answer a[3];
    const char *const key[] = {"Authorization: Bearer user-key", NULL};
    start_with_keys((tm_limit_opts){.concurrent = 2});
    fake.manual = true;
    for (int i = 0; i < 2; i++)
        rig_send(&g_rig, &a[i], "POST", COMPLETIONS, HI, key);
    rig_wait_gens(&g_rig, 2);
    rig_send(&g_rig, &a[2], "POST", COMPLETIONS, HI, key);
    rig_wait(&a[2]);
    assert_error(&a[2], 429, "rate_limit_error", "rate_limit_exceeded", NULL);
    answer_free(&a[2]);
    /* One that ends makes room, one whose client leaves too. */
    fake_admit(fake.gens[0]);
    fake_end(fake.gens[0], TM_GEN_STOP);
    rig_wait(&a[0]);
    assert_int_equal(a[0].status, 200);
    answer_free(&a[1]);
    while (fake.cancels == 0)
        rig_turn(&g_rig);
    answer_free(&a[0]);
    for (int i = 0; i < 2; i++)
        rig_send(&g_rig, &a[i], "POST", COMPLETIONS, HI, key);
    rig_wait_gens(&g_rig, 4);
    answer_free(&a[0]);
    answer_free(&a[1]);
    while (fake.active > 0)
        rig_turn(&g_rig);
    rig_stop(&g_rig);
}

/* ---- bodies ---- */

static void assert_still_serves(void)
{
    answer a;
    fake_answer("ok", true);
    rig_post(&g_rig, &a, COMPLETIONS, HI);
    assert_int_equal(a.status, 200);
    answer_free(&a);
}

/* The client of the harness sends C strings, so a NUL in a file cuts it: the rest is then refused as well. */
static void one_of_the_suite(const char *dir, const char *name)
{
    char path[500], *data;
    size_t len;
    answer a;
    tm_path_join(path, sizeof path, dir, name);
    if (tm_file_read(path, 1 << 24, &data, &len, NULL) != TM_OK)
        fail_msg("%s", path);
    rig_post(&g_rig, &a, CHAT, data);
    if (a.status != 400)
        fail_msg("%s: %d", name, a.status);
    const char *code = str_at(answer_json(&a), "error.code");
    bool json_error = strcmp(code, "invalid_json") == 0;
    bool cut = memchr(data, 0, len) != NULL;
    if (name[0] == 'n' && !json_error && !cut)
        fail_msg("%s was taken for JSON: %s", name, code);
    /* A name that JSON allows and jansson does not: NUL in a key. */
    if (name[0] == 'y' && json_error && !cut && strstr(name, "null") == NULL)
        fail_msg("%s was refused as JSON: %s", name, str_at(answer_json(&a), "error.message"));
    answer_free(&a);
    free(data);
}

static void json_suite(void **state)
{
    (void)state;
    char dir[400];
    const char *shared = getenv("TM_SHARED");
    snprintf(dir, sizeof dir, "%s/testdata/jsontestsuite/test_parsing", shared ? shared : "");
    DIR *d = opendir(dir);
    if (!d) {
        printf("the full test data is not here: %s\n", dir);
        skip();
        return;
    }
    int n = 0;
    for (struct dirent *e; (e = readdir(d));)
        if (strstr(e->d_name, ".json")) {
            one_of_the_suite(dir, e->d_name);
            n++;
        }
    closedir(d);
    assert_true(n > 300);
    assert_still_serves();
}

static void refuse(const char *target, const char *body, const char *code, const char *param)
{
    answer a;
    rig_post(&g_rig, &a, target, body);
    assert_error(&a, 400, "invalid_request_error", code, param);
    answer_free(&a);
}

static void bad_bodies(void **state)
{
    (void)state;
    static const char *const not_json[] = {
        "",
        "{",
        "{} x",
        "{\"model\":\"demo\",\"prompt\":\"a\",\"temperature\":NaN}",
        "{\"model\":\"demo\",\"prompt\":\"a\",\"temperature\":-Infinity}",
        "{\"model\":\"demo\",\"prompt\":\"a\",\"temperature\":1e999}",
        "{\"model\":\"demo\",\"prompt\":\"\xff\xfe\"}",
        "{\"model\":\"demo\",\"prompt\":\"\xed\xa0\x80\"}",
        "{\"model\":\"demo\",\"prompt\":\"\\ud800\"}",
        "\xef\xbb\xbf{}",
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(not_json); i++)
        refuse(COMPLETIONS, not_json[i], "invalid_json", NULL);
    static const char *const no_object[] = {"null", "[]", "5", "\"x\"", "true"};
    for (size_t i = 0; i < TM_ARRAY_LEN(no_object); i++)
        refuse(CHAT, no_object[i], "invalid_type", NULL);
    /* Depth is bounded before it becomes a matter of the stack. */
    char *deep = malloc(200001);
    memset(deep, '[', 200000);
    deep[200000] = '\0';
    refuse(CHAT, deep, "invalid_json", NULL);
    free(deep);
    refuse(CHAT, "{\"model\":\"demo\",\"messages\":[]}", "invalid_value", "messages");
    refuse(CHAT, "{\"model\":\"demo\"}", "missing_required_parameter", "messages");
    refuse(CHAT, "{\"messages\":[]}", "missing_required_parameter", "model");
    refuse(COMPLETIONS, "{\"model\":\"demo\",\"prompt\":[]}", "invalid_value", "prompt");
    refuse(COMPLETIONS, "{\"model\":\"demo\",\"prompt\":[[1],\"x\"]}", "invalid_type", "prompt[1]");
    refuse(COMPLETIONS, "{\"model\":\"demo\",\"prompt\":[99999999]}", "invalid_value", "prompt");
    refuse(COMPLETIONS, "{\"model\":\"demo\",\"prompt\":\"\"}", "invalid_value", "prompt");
    assert_int_equal(fake.gen_count, 0);
    assert_still_serves();
}

static void mutate(char *body, size_t size)
{
    static const char bytes[] = "{}[]\",:0123456789.eE+-\\untfalse \x80\xff\x01";
    size_t len = strlen(body), at_byte = (size_t)random() % len;
    switch (random() % 4) {
    case 0:
        body[at_byte] = bytes[(size_t)random() % (sizeof bytes - 1)];
        break;
    case 1:
        memmove(body + at_byte, body + at_byte + 1, len - at_byte);
        break;
    case 2:
        memmove(body + at_byte + 1, body + at_byte, TM_MIN(len, size - 2) - at_byte + 1);
        break;
    default:
        snprintf(body + at_byte, size - at_byte, "%s", random() % 2 ? "}" : "");
        break;
    }
}

/* Seeded: bodies with bytes changed, cut, doubled and swapped give an answer of the right form, whatever it is. */
static void mutated_bodies(void **state)
{
    (void)state;
    static const char *const seeds[] = {
        "{\"model\":\"demo\",\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\","
        "\"text\":\"h\\u00e9\"}"
        "]},{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"a\",\"type\":"
        "\"function\","
        "\"function\":{\"name\":\"f\",\"arguments\":\"{}\"}}]}],\"n\":2,\"stop\":[\"a\",\"b\"],"
        "\"seed\":1}",
        "{\"model\":\"demo\",\"messages\":\"x\",\"logit_bias\":{\"5\":1.5,\"7\":-100},"
        "\"temperature\":0.5,"
        "\"stream\":true,\"stream_options\":{\"include_usage\":true},\"response_format\":{\"type\":"
        "\"text\"}}",
        "{\"model\":\"demo\",\"messages\":[{\"role\":\"user\",\"content\":\"\\ud83d\\ude00 "
        "<|im_end|>\"}],"
        "\"chat_template_kwargs\":{\"a\":[1,{\"b\":null}]},\"session_id\":\"s\",\"top_logprobs\":2,"
        "\"logprobs\":true,\"stop_token_ids\":[1,2],\"max_tokens\":3}",
    };
    unsigned seed = getenv("TM_SEED") ? (unsigned)strtoul(getenv("TM_SEED"), NULL, 10)
                                      : (unsigned)tm_clock_ns();
    printf("TM_SEED=%u\n", seed);
    srandom(seed);
    fake_answer("ok", true);
    int fine = 0, bad = 0;
    for (int i = 0; i < 1500; i++) {
        char body[1000];
        answer a;
        snprintf(body, sizeof body - 1, "%s", seeds[i % (int)TM_ARRAY_LEN(seeds)]);
        for (long k = random() % 4; k > 0 && body[0]; k--)
            mutate(body, sizeof body);
        rig_post(&g_rig, &a, CHAT, body);
        if (a.status == 200) {
            fine++;
        } else if (a.status == 400 || a.status == 404) {
            bad++;
            assert_true(strlen(str_at(answer_json(&a), "error.message")) > 5);
            assert_int_equal(int_at(answer_json(&a), "code"), a.status);
        } else {
            fail_msg("%d for %s", a.status, body);
        }
        answer_free(&a);
        while (fake.active > 0)
            rig_turn(&g_rig);
        if (fake.gen_count > FAKE_GENS_MAX / 2) {
            fake_reset();
            fake_answer("ok", true);
        }
    }
    assert_true(fine > 100 && bad > 100);
}

static void context_length(void **state)
{
    (void)state;
    tm_buf body;
    answer a;
    tm_buf_init(&body, 0);
    tm_buf_puts(&body, "{\"model\":\"demo\",\"prompt\":[5");
    for (int i = 1; i < 3000; i++)
        tm_buf_puts(&body, ",5");
    tm_buf_puts(&body, "]}");
    rig_post(&g_rig, &a, COMPLETIONS, body.data);
    assert_error(&a, 400, "invalid_request_error", "context_length_exceeded", "prompt");
    assert_non_null(strstr(str_at(answer_json(&a), "error.message"), "3000"));
    char context[16];
    snprintf(context, sizeof context, "%d", (int)fake_served->max_context);
    assert_non_null(strstr(str_at(answer_json(&a), "error.message"), context));
    answer_free(&a);
    /* A long text takes the way over the threads and ends at the same place. */
    tm_buf_clear(&body);
    tm_buf_puts(&body, "{\"model\":\"demo\",\"messages\":[{\"role\":\"user\",\"content\":\"");
    for (int i = 0; i < 20000; i++)
        tm_buf_puts(&body, "word ");
    tm_buf_puts(&body, "\"}]}");
    rig_post(&g_rig, &a, CHAT, body.data);
    assert_error(&a, 400, "invalid_request_error", "context_length_exceeded", "messages");
    answer_free(&a);
    tm_buf_deinit(&body);
    assert_int_equal(fake.gen_count, 0);
}

/* A tokenizer with more tokens than the model has rows. */
static void beyond_the_vocabulary(void **state)
{
    (void)state;
    answer a;
    int32_t vocab = fake_served->vocab;
    fake_served->vocab = 300;
    fake_answer("ok", true);
    rig_post(&g_rig, &a, COMPLETIONS, "{\"model\":\"demo\",\"prompt\":\"Hello, world\"}");
    assert_error(&a, 400, "invalid_request_error", "invalid_value", "prompt");
    assert_non_null(strstr(str_at(answer_json(&a), "error.message"), "vocabulary of 300 tokens"));
    answer_free(&a);
    assert_int_equal(fake.gen_count, 0);
    rig_post(&g_rig, &a, COMPLETIONS, "{\"model\":\"demo\",\"prompt\":\"a\"}");
    assert_int_equal(a.status, 200);
    answer_free(&a);
    fake_served->vocab = vocab;
}

static void sizes(void **state)
{
    (void)state;
    answer a;
    char *big = malloc((10 << 20) + 1);
    memset(big, ' ', 10 << 20);
    big[10 << 20] = '\0';
    rig_post(&g_rig, &a, CHAT, big);
    assert_error(&a, 413, "invalid_request_error", NULL, NULL);
    assert_memory_equal(answer_header(&a, "x-request-id"), "req-", 4);
    answer_free(&a);
    free(big);
    char target[10000];
    memset(target, 'a', sizeof target - 1);
    target[0] = '/';
    target[sizeof target - 1] = '\0';
    rig_call(&g_rig, &a, "GET", target, NULL);
    assert_error(&a, 414, "invalid_request_error", NULL, NULL);
    answer_free(&a);
    char *line = malloc(20000);
    memset(line, 'b', 19999);
    memcpy(line, "X-Big: ", 7);
    line[19999] = '\0';
    rig_send(&g_rig, &a, "GET", "/livez", NULL, (const char *const[]){line, NULL});
    rig_wait(&a);
    assert_error(&a, 431, "invalid_request_error", NULL, NULL);
    assert_memory_equal(answer_header(&a, "x-request-id"), "req-", 4);
    answer_free(&a);
    free(line);
    assert_true(metric("turbomesh_requests_total{route=\"none\",code=\"431\",model=\"\"} ") == 1);
    assert_still_serves();
}

static void routes(void **state)
{
    (void)state;
    answer a;
    rig_send(&g_rig, &a, "GET", "/nothing", NULL, (const char *const[]){"X-Request-Id: r-1", NULL});
    rig_wait(&a);
    assert_error(&a, 404, "not_found_error", "route_not_found", NULL);
    assert_string_equal(answer_header(&a, "x-request-id"), "r-1");
    assert_non_null(answer_header(&a, "openai-version"));
    answer_free(&a);
    rig_call(&g_rig, &a, "GET", CHAT, NULL);
    assert_error(&a, 405, "invalid_request_error", NULL, NULL);
    assert_string_equal(answer_header(&a, "allow"), "POST");
    answer_free(&a);
    rig_post(&g_rig, &a, "/health", "{}");
    assert_error(&a, 405, "invalid_request_error", NULL, NULL);
    answer_free(&a);
    static const struct {
        const char *type;
        int status;
    } types[] = {{"application/json", 200},
                 {"application/json; charset=utf-8", 200},
                 {"APPLICATION/JSON;charset=\"UTF-8\"", 200},
                 {"application/json;", 200},
                 {"application/json; charset=latin1", 415},
                 {"application/jsonx", 415},
                 {"text/plain", 415},
                 {"", 415}};
    fake_answer("ok", true);
    for (size_t i = 0; i < TM_ARRAY_LEN(types); i++) {
        char header[100];
        snprintf(header, sizeof header, "Content-Type: %s", types[i].type);
        rig_send_raw(&g_rig, &a, "POST", COMPLETIONS, HI, (const char *const[]){header, NULL});
        rig_wait(&a);
        if (a.status != types[i].status)
            fail_msg("%s: %d", types[i].type, a.status);
        answer_free(&a);
    }
}

/* ---- what dispatch refuses ---- */

static void dispatch_refusals(void **state)
{
    (void)state;
    static const struct {
        tm_status st;
        int status;
        const char *type, *code;
    } rows[] = {{TM_STATUS_BUSY, 429, "rate_limit_error", "queue_full"},
                {TM_STATUS_UNAVAILABLE, 503, "server_error", "no_worker"}};
    answer a;
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        fake.start_status = rows[i].st;
        fake.retry_after_ms = 1500;
        rig_post(&g_rig, &a, COMPLETIONS, HI);
        assert_error(&a, rows[i].status, rows[i].type, rows[i].code, NULL);
        assert_string_equal(answer_header(&a, "retry-after"), "2");
        assert_string_equal(answer_header(&a, "retry-after-ms"), "1500");
        assert_string_equal(answer_header(&a, "x-should-retry"), "true");
        answer_free(&a);
    }
    /* The third answer of three is refused: the first two are withdrawn, the client gets one error. */
    fake.start_status = TM_STATUS_BUSY;
    fake.start_fail_at = fake.gen_count + 2;
    fake.manual = true;
    rig_post(&g_rig, &a, COMPLETIONS, "{\"model\":\"demo\",\"prompt\":\"hi\",\"n\":3}");
    assert_error(&a, 429, "rate_limit_error", "queue_full", NULL);
    assert_int_equal(fake.cancels, 2);
    assert_int_equal(fake.active, 0);
    answer_free(&a);
    fake.start_status = TM_OK;
    fake.manual = false;
    fake.served_count = 0;
    rig_post(&g_rig, &a, COMPLETIONS, HI);
    assert_error(&a, 503, "server_error", "model_loading", NULL);
    answer_free(&a);
    fake.served_count = 1;
    rig_post(&g_rig, &a, COMPLETIONS, "{\"model\":\"other\",\"prompt\":\"hi\"}");
    assert_error(&a, 404, "not_found_error", "model_not_found", "model");
    answer_free(&a);
}

static void drained(void **state)
{
    (void)state;
    answer a, b;
    fake.manual = true;
    rig_send(&g_rig, &a, "POST", COMPLETIONS, HI, NULL);
    rig_wait_gens(&g_rig, 1);
    tm_api_drain(g_rig.api);
    rig_post(&g_rig, &b, COMPLETIONS, HI);
    assert_error(&b, 503, "server_error", "draining", NULL);
    assert_non_null(answer_header(&b, "retry-after"));
    answer_free(&b);
    rig_call(&g_rig, &b, "GET", "/readyz", NULL);
    assert_int_equal(b.status, 503);
    answer_free(&b);
    rig_call(&g_rig, &b, "GET", "/livez", NULL);
    assert_int_equal(b.status, 200);
    answer_free(&b);
    fake_admit(fake.gens[0]);
    fake_end(fake.gens[0], TM_GEN_LENGTH);
    rig_wait(&a);
    assert_int_equal(a.status, 200);
    answer_free(&a);
}

/* ---- the log ---- */

/* One line of JSON for a request, with what the operator needs and nothing of the prompt. */
static void log_lines(void **state)
{
    (void)state;
    char path[] = "/tmp/tm_api_http_log_XXXXXX", *text;
    size_t len;
    answer a;
    int fd = mkstemp(path), saved = dup(2);
    fake_answer("secret answer", true);
    fake.cached = 1;
    tm_log_init("turbomesh-router", TM_LOG_INFO, TM_LOG_JSON);
    fflush(stderr);
    dup2(fd, 2);
    rig_send(&g_rig, &a, "POST", COMPLETIONS,
             "{\"model\":\"demo\",\"prompt\":\"secret prompt\",\"user\":\"x\\\"y\\n\"}",
             (const char *const[]){"X-Request-Id: log-1", NULL});
    rig_wait(&a);
    rig_turn(&g_rig);
    fflush(stderr);
    dup2(saved, 2);
    close(saved);
    close(fd);
    tm_log_init("api_http_test", TM_LOG_ERROR, TM_LOG_TEXT);
    assert_int_equal(tm_file_read(path, 1 << 20, &text, &len, NULL), TM_OK);
    unlink(path);
    assert_null(strstr(text, "secret"));
    const char *line = strstr(text, "{\"ts\"");
    assert_non_null(line);
    json_t *root;
    tm_err err = TM_ERR_INIT;
    if (tm_json_parse(line, strcspn(line, "\n"), &root, &err) != TM_OK)
        fail_msg("%s: %s", err.msg, line);
    assert_string_equal(str_at(root, "event"), "request");
    assert_string_equal(str_at(root, "id"), "log-1");
    assert_string_equal(str_at(root, "key"), "anonymous");
    assert_string_equal(str_at(root, "route"), "completions");
    assert_string_equal(str_at(root, "model"), "demo");
    assert_string_equal(str_at(root, "group"), "group-a");
    assert_string_equal(str_at(root, "finish"), "stop");
    assert_string_equal(str_at(root, "user"), "x\"y\n");
    assert_int_equal(int_at(root, "status"), 200);
    assert_int_equal(int_at(root, "tokens_out"), fake.count);
    assert_int_equal(int_at(root, "tokens_in"), fake.gens[0]->prompt_len);
    assert_int_equal(int_at(root, "tokens_cached"), 1);
    assert_int_equal(int_at(root, "moves"), 0);
    assert_true(json_is_number(at(root, "ms")) && json_is_number(at(root, "ttft_ms")));
    json_decref(root);
    free(text);
    answer_free(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(request_ids, start, stop),
        cmocka_unit_test(keys),
        cmocka_unit_test(rates),
        cmocka_unit_test(concurrency),
        cmocka_unit_test_setup_teardown(json_suite, start, stop),
        cmocka_unit_test_setup_teardown(bad_bodies, start, stop),
        cmocka_unit_test_setup_teardown(mutated_bodies, start, stop),
        cmocka_unit_test_setup_teardown(context_length, start, stop),
        cmocka_unit_test_setup_teardown(beyond_the_vocabulary, start, stop),
        cmocka_unit_test_setup_teardown(sizes, start, stop),
        cmocka_unit_test_setup_teardown(routes, start, stop),
        cmocka_unit_test_setup_teardown(dispatch_refusals, start, stop),
        cmocka_unit_test_setup_teardown(drained, start, stop),
        cmocka_unit_test_setup_teardown(log_lines, start, stop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
