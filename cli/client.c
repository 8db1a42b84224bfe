/* turbomesh client: a question to a running server over the OpenAI API, the answer as it arrives. libcurl
 * carries it, so it works with any server of that protocol. */
#include <curl/curl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cmd.h"
#include "cli/sse.h"
#include "common/check.h"
#include "common/json.h"

typedef struct client_opts {
    const char *prompt, *model, *system, *api_key_env;
    double temperature;
    int64_t max_tokens, timeout_ms;
} client_opts;

#define OFF(f) offsetof(client_opts, f)
static const tm_opt_row ROWS[] = {
    {"prompt", NULL, TM_OPT_STR, OFF(prompt), NULL, 0, 0, NULL,
     "The question; without it, each line of standard input is one."},
    {"model", NULL, TM_OPT_STR, OFF(model), NULL, 0, 0, NULL,
     "Model name; default: the first that the server lists."},
    {"system", NULL, TM_OPT_STR, OFF(system), NULL, 0, 0, NULL, "System message."},
    {"temperature", NULL, TM_OPT_NUM, OFF(temperature), "0.7", 0, 2, NULL, "0 is greedy."},
    {"max-tokens", NULL, TM_OPT_INT, OFF(max_tokens), "512", 1, 1 << 24, NULL,
     "Tokens of an answer at most."},
    {"timeout", NULL, TM_OPT_TIME, OFF(timeout_ms), "600s", 1, 1e9, NULL,
     "Longest time of one request."},
    {"api-key-env", NULL, TM_OPT_STR, OFF(api_key_env), "OPENAI_API_KEY", 0, 0, NULL,
     "Environment variable that holds the API key."},
};
const tm_opt_table TM_CLIENT_OPTIONS = {"turbomesh client",
                                        "turbomesh client URL [options]",
                                        "Ask a running server over the OpenAI API.",
                                        ROWS,
                                        TM_ARRAY_LEN(ROWS),
                                        1};

typedef struct exchange {
    tm_sse sse;
    tm_buf body; /* of an answer that is not a stream (an error) */
    tm_buf answer;
    bool stream, failed, done;
} exchange;

static void on_data(void *user, char *data, size_t len)
{
    exchange *x = user;
    tm_err err = TM_ERR_INIT;
    json_t *v;
    if (strcmp(data, "[DONE]") == 0) {
        x->done = true;
        return;
    }
    if (tm_json_parse(data, len, &v, &err) != TM_OK) {
        fprintf(stderr, "\nturbomesh client: the server sent an event that is not JSON: %s\n",
                err.msg);
        x->failed = true;
        return;
    }
    json_t *error = tm_json_get(v, "error");
    if (error) {
        const char *m = json_string_value(tm_json_get(error, "message"));
        fprintf(stderr, "\nturbomesh client: %s\n", m ? m : "the server reported an error");
        x->failed = true;
    }
    json_t *choice = json_array_get(tm_json_get(v, "choices"), 0);
    json_t *delta = tm_json_get(choice, "delta");
    json_t *content = tm_json_get(delta, "content");
    json_t *reasoning = tm_json_get(delta, "reasoning_content");
    if (json_is_string(reasoning)) /* to be read, not part of the answer */
        fputs(json_string_value(reasoning), stderr);
    if (json_is_string(content)) {
        fwrite(json_string_value(content), 1, json_string_length(content), stdout);
        fflush(stdout);
        tm_buf_append(&x->answer, json_string_value(content), json_string_length(content));
    }
    json_decref(v);
}

static size_t on_bytes(char *p, size_t size, size_t n, void *user)
{
    exchange *x = user;
    (void)size; /* always 1 */
    if (x->stream)
        return tm_sse_feed(&x->sse, p, n, on_data, x) ? n : 0;
    return tm_buf_append(&x->body, p, n) ? n : 0;
}

static size_t on_header(char *p, size_t size, size_t n, void *user)
{
    exchange *x = user;
    (void)size;
    if (n > 13 && strncasecmp(p, "content-type:", 13) == 0)
        x->stream = memmem(p, n, "text/event-stream", 17) != NULL;
    return n;
}

/* GET (body NULL) or POST; the HTTP status, or 0 with a message in err. */
static long request(CURL *c, const char *base, const char *path, const char *body,
                    const client_opts *o, exchange *x, tm_err *err)
{
    char url[2048], auth[512];
    long status = 0;
    struct curl_slist *headers = curl_slist_append(NULL, "content-type: application/json");
    const char *key = getenv(o->api_key_env);
    size_t n = strlen(base);
    while (n > 0 && base[n - 1] == '/')
        n--;
    snprintf(url, sizeof url, "%.*s%s", (int)n, base, path);
    if (key && *key) {
        snprintf(auth, sizeof auth, "authorization: Bearer %s", key);
        headers = curl_slist_append(headers, auth);
    }
    curl_easy_reset(c);
    curl_easy_setopt(c, CURLOPT_URL, url);
    curl_easy_setopt(c, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(c, CURLOPT_HTTPHEADER, headers);
    curl_easy_setopt(c, CURLOPT_TIMEOUT_MS, (long)o->timeout_ms);
    curl_easy_setopt(c, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(c, CURLOPT_HEADERFUNCTION, on_header);
    curl_easy_setopt(c, CURLOPT_HEADERDATA, x);
    curl_easy_setopt(c, CURLOPT_WRITEFUNCTION, on_bytes);
    curl_easy_setopt(c, CURLOPT_WRITEDATA, x);
    if (body)
        curl_easy_setopt(c, CURLOPT_POSTFIELDS, body);
    CURLcode rc = curl_easy_perform(c);
    curl_easy_getinfo(c, CURLINFO_RESPONSE_CODE, &status);
    curl_slist_free_all(headers);
    if (rc != CURLE_OK) {
        TM_FAIL(err, TM_STATUS_UNAVAILABLE, "%s: %s", url, curl_easy_strerror(rc));
        return 0;
    }
    return status;
}

static void exchange_init(exchange *x)
{
    *x = (exchange){0};
    tm_sse_init(&x->sse);
    tm_buf_init(&x->body, (size_t)64 << 20);
    tm_buf_init(&x->answer, (size_t)64 << 20);
}

static void exchange_deinit(exchange *x)
{
    tm_sse_deinit(&x->sse);
    tm_buf_deinit(&x->body);
    tm_buf_deinit(&x->answer);
}

static tm_status first_model(CURL *c, const char *base, const client_opts *o, char *name,
                             size_t size, tm_err *err)
{
    exchange x;
    json_t *v = NULL;
    exchange_init(&x);
    long http = request(c, base, "/v1/models", NULL, o, &x, err);
    tm_status st = http == 0 ? TM_STATUS_UNAVAILABLE : TM_OK;
    if (st == TM_OK)
        st = tm_json_parse(x.body.data ? x.body.data : "", x.body.len, &v, err);
    if (st == TM_OK) {
        const char *id =
            json_string_value(tm_json_get(json_array_get(tm_json_get(v, "data"), 0), "id"));
        if (id)
            snprintf(name, size, "%s", id);
        else
            st = TM_FAIL(err, TM_STATUS_UNAVAILABLE, "%s/v1/models: HTTP %ld, no model is served",
                         base, http);
    }
    json_decref(v);
    exchange_deinit(&x);
    return st;
}

static tm_status ask(CURL *c, const char *base, const client_opts *o, const char *model,
                     json_t *messages, tm_err *err)
{
    json_t *req = json_pack("{s:s, s:O, s:b, s:f, s:I}", "model", model, "messages", messages,
                            "stream", 1, "temperature", o->temperature, "max_completion_tokens",
                            (json_int_t)o->max_tokens);
    char *body = req ? json_dumps(req, JSON_COMPACT) : NULL;
    json_decref(req);
    if (!body)
        return TM_FAIL(err, TM_STATUS_INVALID, "the question is not valid UTF-8");
    exchange x;
    exchange_init(&x);
    long http = request(c, base, "/v1/chat/completions", body, o, &x, err);
    tm_status st = http == 0 ? TM_STATUS_UNAVAILABLE : TM_OK;
    if (http != 0 && http != 200) {
        json_t *v = NULL;
        const char *m = NULL;
        if (tm_json_parse(x.body.data ? x.body.data : "", x.body.len, &v, NULL) == TM_OK)
            m = json_string_value(tm_json_get(tm_json_get(v, "error"), "message"));
        st = TM_FAIL(err, TM_STATUS_UNAVAILABLE, "HTTP %ld: %s", http, m ? m : "no message");
        json_decref(v);
    } else if (st == TM_OK && (x.failed || !x.done)) {
        st = TM_FAIL(err, TM_STATUS_UNAVAILABLE, "the stream ended early");
    }
    if (st == TM_OK) {
        printf("\n");
        json_array_append_new(messages,
                              json_pack("{s:s, s:s%}", "role", "assistant", "content",
                                        x.answer.data ? x.answer.data : "", x.answer.len));
    }
    exchange_deinit(&x);
    free(body);
    return st;
}

int tm_cmd_client(int argc, char **argv)
{
    client_opts o = {0};
    const char *base;
    int n = 0, code;
    if (!tm_cmd_parse(&TM_CLIENT_OPTIONS, argc, argv, &o, &base, &n, &code))
        return code;
    tm_err err = TM_ERR_INIT;
    if (n != 1) {
        TM_FAIL(&err, TM_STATUS_INVALID, "give URL, such as http://127.0.0.1:23333");
        return tm_cmd_fail("client", &err);
    }
    curl_global_init(CURL_GLOBAL_DEFAULT);
    CURL *c = curl_easy_init();
    char name[256];
    json_t *messages = json_array();
    tm_status st = c && messages ? TM_OK : TM_FAIL(&err, TM_STATUS_NO_MEMORY, "out of memory");
    if (st == TM_OK && o.model)
        snprintf(name, sizeof name, "%s", o.model);
    else if (st == TM_OK)
        st = first_model(c, base, &o, name, sizeof name, &err);
    if (st == TM_OK && o.system)
        json_array_append_new(messages,
                              json_pack("{s:s, s:s}", "role", "system", "content", o.system));
    char *line = NULL;
    size_t cap = 0;
    while (st == TM_OK) {
        const char *q = o.prompt;
        if (!q) {
            ssize_t len = getline(&line, &cap, stdin);
            if (len < 0)
                break;
            line[strcspn(line, "\r\n")] = '\0';
            q = line;
        }
        json_array_append_new(messages, json_pack("{s:s, s:s}", "role", "user", "content", q));
        st = ask(c, base, &o, name, messages, &err);
        if (o.prompt)
            break;
    }
    free(line);
    json_decref(messages);
    curl_easy_cleanup(c);
    curl_global_cleanup();
    return st == TM_OK ? 0 : tm_cmd_fail("client", &err);
}
