/* The metrics of requests and their log line: see observe.h. */
#include "router/observe.h"

#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"

#define NS_PER_S  1e9
#define NS_PER_MS 1e6

static const tm_metric_desc g_requests = {.name = "turbomesh_requests_total",
                                          .help = "Requests by route, status and model.",
                                          .kind = TM_METRIC_COUNTER,
                                          .labels = {"route", "code", "model"},
                                          .max_series = 512};
static const tm_metric_desc g_ttft = {.name = "turbomesh_time_to_first_token_seconds",
                                      .help =
                                          "From the first byte of a request to its first token.",
                                      .kind = TM_METRIC_HISTOGRAM,
                                      .labels = {"model"},
                                      .buckets = TM_BUCKETS_LATENCY_S,
                                      .bucket_count = TM_BUCKETS_LATENCY_S_LEN};
static const double g_token_buckets[] = {0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03,
                                         0.05,  0.075,  0.1,   0.15, 0.25,  0.5,  1};
static const tm_metric_desc g_tpot = {.name = "turbomesh_time_per_output_token_seconds",
                                      .help =
                                          "Mean time between tokens of a request after the first.",
                                      .kind = TM_METRIC_HISTOGRAM,
                                      .labels = {"model"},
                                      .buckets = g_token_buckets,
                                      .bucket_count = TM_ARRAY_LEN(g_token_buckets)};
static const tm_metric_desc g_e2e = {.name = "turbomesh_e2e_request_latency_seconds",
                                     .help =
                                         "From the first byte of a generation request to its end.",
                                     .kind = TM_METRIC_HISTOGRAM,
                                     .labels = {"model"},
                                     .buckets = TM_BUCKETS_LATENCY_S,
                                     .bucket_count = TM_BUCKETS_LATENCY_S_LEN};
static const double g_added_buckets[] = {0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005,
                                         0.01,    0.02,   0.05,   0.1,    0.25,  1,     5};
static const tm_metric_desc g_added = {
    .name = "turbomesh_added_latency_seconds",
    .help = "From the first byte of a request to its hand-over to dispatch.",
    .kind = TM_METRIC_HISTOGRAM,
    .labels = {"model"},
    .buckets = g_added_buckets,
    .bucket_count = TM_ARRAY_LEN(g_added_buckets)};
static const tm_metric_desc g_prompt_tokens = {.name = "turbomesh_prompt_tokens_total",
                                               .help = "Prompt tokens of answered requests.",
                                               .kind = TM_METRIC_COUNTER,
                                               .labels = {"model"}};
static const tm_metric_desc g_cached_tokens = {.name = "turbomesh_cached_prompt_tokens_total",
                                               .help =
                                                   "Prompt tokens that came from a prefix cache.",
                                               .kind = TM_METRIC_COUNTER,
                                               .labels = {"model"}};
static const tm_metric_desc g_output_tokens = {.name = "turbomesh_generation_tokens_total",
                                               .help = "Tokens generated for clients.",
                                               .kind = TM_METRIC_COUNTER,
                                               .labels = {"model"}};
static const tm_metric_desc g_shed = {.name = "turbomesh_shed_total",
                                      .help = "Requests refused because of load, by reason.",
                                      .kind = TM_METRIC_COUNTER,
                                      .labels = {"reason"}};
static const tm_metric_desc g_gone = {.name = "turbomesh_client_disconnects_total",
                                      .help = "Clients that left before their answer was complete.",
                                      .kind = TM_METRIC_COUNTER};

const tm_metric_desc TM_METRIC_STAGE = {
    .name = "turbomesh_stage_duration_seconds",
    .help =
        "Stages of a generation: text (template and tokenizer), queue (waiting in the router for a "
        "group), prefill (from the group's getting it to its first token).",
    .kind = TM_METRIC_HISTOGRAM,
    .labels = {"stage"},
    .buckets = TM_BUCKETS_LATENCY_S,
    .bucket_count = TM_BUCKETS_LATENCY_S_LEN};

static tm_series *of_model(tm_metrics *m, const tm_observed *o, const tm_metric_desc *desc)
{
    return tm_metrics_series(m, desc, (const char *const[]){o->model});
}

static double seconds_since(int64_t then_ns, int64_t now_ns)
{
    return (double)(now_ns - then_ns) / NS_PER_S;
}

static bool id_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
}

bool tm_observe_id_ok(const char *id)
{
    size_t len = id ? strlen(id) : 0;
    if (len == 0 || len >= TM_REQUEST_ID_MAX)
        return false;
    for (size_t i = 0; i < len; i++)
        if (!id_char(id[i]))
            return false;
    return true;
}

void tm_observe_text(tm_metrics *m, int64_t ns)
{
    tm_series_observe(tm_metrics_series(m, &TM_METRIC_STAGE, (const char *const[]){"text"}),
                      (double)ns / NS_PER_S);
}

void tm_observe_shed(tm_metrics *m, const char *reason)
{
    tm_series_add(tm_metrics_series(m, &g_shed, (const char *const[]){reason}), 1);
}

void tm_observe_start(tm_metrics *m, const tm_observed *o)
{
    tm_series_observe(of_model(m, o, &g_added), seconds_since(o->start_ns, tm_clock_ns()));
}

void tm_observe_tokens(tm_metrics *m, tm_observed *o, int count)
{
    int64_t now_ns = tm_clock_ns();
    if (o->output_tokens == 0) {
        o->first_token_ns = now_ns;
        tm_series_observe(of_model(m, o, &g_ttft), seconds_since(o->start_ns, now_ns));
    }
    o->output_tokens += count;
    o->last_token_ns = now_ns;
}

static void count_generation(tm_metrics *m, const tm_observed *o, int64_t now_ns)
{
    tm_series_observe(of_model(m, o, &g_e2e), seconds_since(o->start_ns, now_ns));
    tm_series_add(of_model(m, o, &g_prompt_tokens), (double)o->prompt_tokens);
    tm_series_add(of_model(m, o, &g_cached_tokens), (double)o->cached_tokens);
    tm_series_add(of_model(m, o, &g_output_tokens), (double)o->output_tokens);
    if (o->output_tokens > 1)
        tm_series_observe(of_model(m, o, &g_tpot),
                          seconds_since(o->first_token_ns, o->last_token_ns) /
                              (double)(o->output_tokens - 1));
}

static const char *code_text(int status, char out[8])
{
    status = TM_MIN(TM_MAX(status, 0), 999);
    out[0] = (char)('0' + status / 100);
    out[1] = (char)('0' + status / 10 % 10);
    out[2] = (char)('0' + status % 10);
    out[3] = '\0';
    return out;
}

static void log_request(const tm_observed *o, const tm_observe_end *end, int64_t now_ns)
{
    double ttft_ms = o->first_token_ns ? (double)(o->first_token_ns - o->start_ns) / NS_PER_MS : -1;
    const tm_log_field fields[] = {
        TM_LOG_F_STR("id", o->request_id),
        TM_LOG_F_STR("key", end->key),
        TM_LOG_F_STR("route", end->route),
        TM_LOG_F_INT("status", end->status),
        TM_LOG_F_NUM("ms", (double)(now_ns - o->start_ns) / NS_PER_MS),
        TM_LOG_F_STR("error", o->error),
        TM_LOG_F_STR(o->model[0] ? "model" : NULL, o->model),
        TM_LOG_F_STR("group", o->group),
        TM_LOG_F_INT("tokens_in", o->prompt_tokens),
        TM_LOG_F_INT("tokens_cached", o->cached_tokens),
        TM_LOG_F_INT("tokens_out", o->output_tokens),
        TM_LOG_F_NUM("ttft_ms", ttft_ms),
        TM_LOG_F_STR("finish", o->finish),
        TM_LOG_F_INT("moves", o->moves),
        TM_LOG_F_STR(o->user[0] ? "user" : NULL, o->user),
        {NULL, TM_LOG_STR, NULL, 0, 0},
    };
    tm_log_fields(end->quiet ? TM_LOG_DEBUG : TM_LOG_INFO, "request", fields, TM_ARRAY_LEN(fields));
}

void tm_observe_done(tm_metrics *m, const tm_observed *o, const tm_observe_end *end)
{
    char code[8];
    int64_t now_ns = tm_clock_ns();
    const char *const values[] = {end->route, code_text(end->status, code), o->model};
    tm_series_add(tm_metrics_series(m, &g_requests, values), 1);
    if (end->gone)
        tm_series_add(tm_metrics_series(m, &g_gone, NULL), 1);
    if (end->generated)
        count_generation(m, o, now_ns);
    log_request(o, end, now_ns);
}
