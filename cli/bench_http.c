/* turbomesh bench http: load on a running server over the OpenAI API with streaming answers, through libcurl's
 * multi interface on one thread. Open loop when a rate is given: requests start at their time whether or not
 * earlier ones have ended, so that queueing shows. Counts content events, which are tokens when the server
 * sends one token each; the usage chunk gives the exact number. */
#include <curl/curl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/bench.h"
#include "cli/bench_record.h"
#include "cli/cmd.h"
#include "cli/sse.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/file.h"
#include "common/json.h"

typedef struct load load;

typedef struct stream {
    load *owner;
    CURL *easy;
    tm_sse sse;
    tm_bench_answer answer;
    int prompt;
    int64_t begin_ns, first_byte_ns, first_token_ns, last_token_ns;
    int64_t tokens;
    bool busy, finished, failed;
} stream;

struct load {
    const tm_bench_opts *o;
    CURLM *multi;
    tm_bench_record *record; /* NULL: nothing is recorded */
    struct curl_slist *headers;
    char url[1024];
    char *prompts;
    char **prompt;
    int prompt_count;
    stream *streams;
    int started, ended, active, active_max, ok, failed;
    int64_t begin_ns;
    int64_t tokens, chunks;
    double *ttfb_ms, *ttft_ms, *itl_ms;
    int n_ttfb, n_ttft, n_itl;
    char first_error[256];
};

static void on_event(void *user, char *data, size_t len)
{
    stream *s = user;
    if (len == 6 && memcmp(data, "[DONE]", 6) == 0) {
        s->finished = true;
        return;
    }
    const char *usage = strstr(data, "\"completion_tokens\":");
    if (usage) {
        s->tokens = strtoll(usage + 20, NULL, 10);
        return;
    }
    if (strstr(data, "\"error\":")) {
        s->failed = true;
        if (!s->owner->first_error[0])
            snprintf(s->owner->first_error, sizeof s->owner->first_error, "%.200s", data);
        return;
    }
    int64_t now = tm_clock_ns();
    tm_bench_record_event(s->owner->record, &s->answer, data, now);
    if (strstr(data, "\"content\":\"\"")) /* the role chunk and the last chunk */
        return;
    s->last_token_ns = now;
    if (!s->first_token_ns)
        s->first_token_ns = s->last_token_ns;
    s->owner->chunks++;
}

static size_t on_body(char *p, size_t size, size_t n, void *user)
{
    stream *s = user;
    (void)size;
    if (!s->first_byte_ns)
        s->first_byte_ns = tm_clock_ns();
    return tm_sse_feed(&s->sse, p, n, on_event, s) ? n : 0;
}

static char *make_body(const load *l, int prompt)
{
    json_t *r = json_pack("{s:s, s:[{s:s, s:s}], s:b, s:{s:b}, s:I, s:f, s:b, s:b}", "model",
                          l->o->model, "messages", "role", "user", "content", l->prompt[prompt],
                          "stream", 1, "stream_options", "include_usage", 1,
                          "max_completion_tokens", (json_int_t)l->o->max_tokens, "temperature", 0.0,
                          "ignore_eos", 1, "return_token_ids", l->record != NULL);
    char *body = r ? json_dumps(r, JSON_COMPACT) : NULL;
    json_decref(r);
    return body;
}

static bool start_one(load *l)
{
    stream *s = NULL;
    for (int64_t i = 0; i < l->o->streams && !s; i++)
        if (!l->streams[i].busy)
            s = &l->streams[i];
    int prompt = l->started % l->prompt_count;
    char *body = s ? make_body(l, prompt) : NULL;
    if (!body)
        return false;
    CURL *e = s->easy ? s->easy : curl_easy_init();
    tm_sse sse = s->sse;
    tm_bench_answer answer = s->answer;
    tm_buf_clear(&sse.line);
    tm_bench_answer_clear(&answer);
    *s = (stream){.owner = l,
                  .easy = e,
                  .sse = sse,
                  .answer = answer,
                  .prompt = prompt,
                  .busy = true,
                  .begin_ns = tm_clock_ns()};
    curl_easy_reset(e);
    curl_easy_setopt(e, CURLOPT_URL, l->url);
    curl_easy_setopt(e, CURLOPT_HTTPHEADER, l->headers);
    curl_easy_setopt(e, CURLOPT_COPYPOSTFIELDS, body);
    curl_easy_setopt(e, CURLOPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(e, CURLOPT_WRITEDATA, s);
    curl_easy_setopt(e, CURLOPT_PRIVATE, s);
    curl_easy_setopt(e, CURLOPT_NOSIGNAL, 1L);
    free(body);
    curl_multi_add_handle(l->multi, e);
    l->started++;
    l->active++;
    l->active_max = TM_MAX(l->active_max, l->active);
    return true;
}

static void record_answer(const stream *s, bool ok)
{
    tm_bench_outcome o = {.prompt = s->prompt,
                          .begin_ns = s->begin_ns,
                          .first_ns = s->first_token_ns,
                          .end_ns = tm_clock_ns(),
                          .ok = ok};
    tm_bench_record_answer(s->owner->record, &s->answer, &o);
}

static void end_one(load *l, CURL *e, CURLcode rc)
{
    stream *s;
    long status = 0;
    curl_easy_getinfo(e, CURLINFO_PRIVATE, (char **)&s);
    curl_easy_getinfo(e, CURLINFO_RESPONSE_CODE, &status);
    curl_multi_remove_handle(l->multi, e);
    bool ok = rc == CURLE_OK && status == 200 && s->finished && !s->failed;
    if (!ok && !l->first_error[0])
        snprintf(l->first_error, sizeof l->first_error, "HTTP %ld, %s%s", status,
                 curl_easy_strerror(rc), s->finished ? "" : ", stream without [DONE]");
    l->ok += ok;
    l->failed += !ok;
    l->ended++;
    l->active--;
    l->tokens += s->tokens;
    if (ok) {
        l->ttfb_ms[l->n_ttfb++] = (double)(s->first_byte_ns - s->begin_ns) * 1e-6;
        if (s->first_token_ns)
            l->ttft_ms[l->n_ttft++] = (double)(s->first_token_ns - s->begin_ns) * 1e-6;
        if (s->tokens > 1 && s->last_token_ns > s->first_token_ns)
            l->itl_ms[l->n_itl++] =
                (double)(s->last_token_ns - s->first_token_ns) * 1e-6 / (double)(s->tokens - 1);
    }
    record_answer(s, ok);
    s->busy = false;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double quantile(double *v, int n, double q)
{
    if (n == 0)
        return 0;
    qsort(v, (size_t)n, sizeof *v, by_value);
    return v[(int)(q * (n - 1) + 0.5)];
}

static tm_status load_prompts(load *l, tm_err *err)
{
    size_t len = 0;
    if (l->o->prompt_file) {
        TM_TRY(tm_file_read(l->o->prompt_file, (size_t)256 << 20, &l->prompts, &len, err));
    } else {
        l->prompts = strdup("What is the capital of France?");
    }
    int n = 1;
    for (char *p = l->prompts; p && *p; p++)
        n += *p == '\n';
    l->prompt = calloc((size_t)n, sizeof *l->prompt);
    if (!l->prompts || !l->prompt)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    char *save = NULL;
    for (char *line = strtok_r(l->prompts, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
        l->prompt[l->prompt_count++] = line;
    return l->prompt_count > 0
               ? TM_OK
               : TM_FAIL(err, TM_STATUS_INVALID, "%s holds no prompt", l->o->prompt_file);
}

static void drive(load *l)
{
    const tm_bench_opts *o = l->o;
    l->begin_ns = tm_clock_ns();
    int64_t deadline = l->begin_ns + o->duration_ms * 1000000;
    int64_t last_start = o->start_ms ? l->begin_ns + o->start_ms * 1000000 : INT64_MAX;
    bool more = true; /* requests to start */
    while (l->ended < l->started || more) {
        int64_t now = tm_clock_ns();
        more = more && l->started < o->requests && now < last_start;
        tm_bench_record_tick(l->record, now);
        if (now > deadline)
            break;
        int64_t due =
            o->rate > 0 ? (int64_t)((double)(now - l->begin_ns) * 1e-9 * o->rate) + 1 : o->requests;
        while (more && l->started < o->requests && l->started < due && l->active < o->streams &&
               start_one(l))
            ;
        int running, left;
        curl_multi_perform(l->multi, &running);
        CURLMsg *m;
        while ((m = curl_multi_info_read(l->multi, &left)))
            if (m->msg == CURLMSG_DONE)
                end_one(l, m->easy_handle, m->data.result);
        curl_multi_poll(l->multi, NULL, 0, o->rate > 0 ? 1 : 100, NULL);
    }
}

static void report(load *l)
{
    double secs = (double)(tm_clock_ns() - l->begin_ns) * 1e-9;
    const struct {
        const char *name;
        double value;
    } rows[] = {
        {"requests_ok", l->ok},
        {"requests_failed", l->failed + l->active},
        {"seconds", secs},
        {"requests_per_s", l->ok / secs},
        {"streams_max", l->active_max},
        {"tokens", (double)l->tokens},
        {"tokens_per_s", (double)l->tokens / secs},
        {"content_events", (double)l->chunks},
        {"ttfb_ms_p50", quantile(l->ttfb_ms, l->n_ttfb, 0.5)},
        {"ttfb_ms_p99", quantile(l->ttfb_ms, l->n_ttfb, 0.99)},
        {"ttft_ms_p50", quantile(l->ttft_ms, l->n_ttft, 0.5)},
        {"ttft_ms_p99", quantile(l->ttft_ms, l->n_ttft, 0.99)},
        {"itl_ms_p50", quantile(l->itl_ms, l->n_itl, 0.5)},
        {"itl_ms_p99", quantile(l->itl_ms, l->n_itl, 0.99)},
    };
    if (l->first_error[0])
        fprintf(stderr, "first failure: %s\n", l->first_error);
    if (l->o->json)
        printf("{");
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++)
        printf(l->o->json ? "%s\"%s\": %.6g" : "%s  %-16s %.6g\n", l->o->json && i ? ", " : "",
               rows[i].name, rows[i].value);
    if (l->o->json)
        printf("}\n");
}

int tm_bench_http(const char *url, const tm_bench_opts *o)
{
    tm_err err = TM_ERR_INIT;
    load l = {.o = o};
    curl_global_init(CURL_GLOBAL_DEFAULT);
    snprintf(l.url, sizeof l.url, "%s/v1/chat/completions", url);
    l.multi = curl_multi_init();
    l.headers = curl_slist_append(NULL, "content-type: application/json");
    l.streams = calloc((size_t)o->streams, sizeof *l.streams);
    l.ttfb_ms = calloc((size_t)o->requests, sizeof(double));
    l.ttft_ms = calloc((size_t)o->requests, sizeof(double));
    l.itl_ms = calloc((size_t)o->requests, sizeof(double));
    tm_status st = !l.multi || !l.streams || !l.ttfb_ms || !l.ttft_ms || !l.itl_ms
                       ? TM_FAIL(&err, TM_STATUS_NO_MEMORY, "out of memory")
                       : load_prompts(&l, &err);
    if (st == TM_OK)
        st = tm_bench_record_open(o->record, &l.record, &err);
    for (int64_t i = 0; st == TM_OK && i < o->streams; i++) {
        tm_sse_init(&l.streams[i].sse);
        tm_bench_answer_init(&l.streams[i].answer);
    }
    if (st == TM_OK) {
        curl_multi_setopt(l.multi, CURLMOPT_MAXCONNECTS, (long)o->streams);
        drive(&l);
        report(&l);
    }
    for (int64_t i = 0; st == TM_OK && i < o->streams; i++) {
        if (l.streams[i].easy) {
            curl_multi_remove_handle(l.multi, l.streams[i].easy);
            curl_easy_cleanup(l.streams[i].easy);
        }
        if (l.streams[i].busy)
            record_answer(&l.streams[i], false);
        tm_sse_deinit(&l.streams[i].sse);
        tm_bench_answer_deinit(&l.streams[i].answer);
    }
    if (!tm_bench_record_close(l.record))
        st = TM_FAIL(&err, TM_STATUS_IO, "%s: not all could be written", o->record);
    curl_multi_cleanup(l.multi);
    curl_slist_free_all(l.headers);
    free(l.streams);
    free(l.ttfb_ms);
    free(l.ttft_ms);
    free(l.itl_ms);
    free(l.prompt);
    free(l.prompts);
    curl_global_cleanup();
    if (st != TM_OK)
        return tm_cmd_fail("bench", &err);
    return l.failed + l.active == 0 ? 0 : 1;
}
