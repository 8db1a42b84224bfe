/* What is counted and logged about requests. The model label comes from served models only, so that a client
 * cannot make series. */
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "router/api/internal.h"

#define NS_PER_S 1e9

static const tm_metric_desc g_requests = {.name = "turbomesh_requests_total",
                                          .help = "HTTP requests by route, status and model.",
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
static const tm_metric_desc g_added = {
    .name = "turbomesh_added_latency_seconds",
    .help = "From the first byte of a request to its hand-over to dispatch.",
    .kind = TM_METRIC_HISTOGRAM,
    .labels = {"model"},
    .buckets = TM_BUCKETS_LATENCY_S,
    .bucket_count = TM_BUCKETS_LATENCY_S_LEN};
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

static tm_series *of_model(tm_api_call *c, const tm_metric_desc *desc)
{
    return tm_metrics_series(c->api->opts.metrics, desc, (const char *const[]){c->model});
}

static double seconds_since(const tm_http_req *req, int64_t now_ns)
{
    return (double)(now_ns - tm_http_req_start_ns(req)) / NS_PER_S;
}

void tm_api_observe_shed(tm_api *a, const char *reason)
{
    tm_series_add(tm_metrics_series(a->opts.metrics, &g_shed, (const char *const[]){reason}), 1);
}

void tm_api_observe_start(tm_api_call *c)
{
    tm_series_observe(of_model(c, &g_added), seconds_since(c->http, tm_clock_ns()));
}

void tm_api_observe_tokens(tm_api_call *c, int count, int64_t now_ns)
{
    if (c->output_tokens == 0) {
        c->first_token_ns = now_ns;
        tm_series_observe(of_model(c, &g_ttft), seconds_since(c->http, now_ns));
    }
    c->output_tokens += count;
    c->last_token_ns = now_ns;
}

static void count_generation(tm_api_call *c, tm_http_req *req, int64_t now_ns)
{
    tm_series_observe(of_model(c, &g_e2e), seconds_since(req, now_ns));
    tm_series_add(of_model(c, &g_prompt_tokens), (double)c->prompt_tokens);
    tm_series_add(of_model(c, &g_cached_tokens), (double)c->cached_tokens);
    tm_series_add(of_model(c, &g_output_tokens), (double)c->output_tokens);
    if (c->output_tokens > 1)
        tm_series_observe(of_model(c, &g_tpot), (double)(c->last_token_ns - c->first_token_ns) /
                                                    NS_PER_S / (double)(c->output_tokens - 1));
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

static void log_call(const tm_api_call *c, tm_http_req *req, int64_t now_ns)
{
    double ttft_ms =
        c->first_token_ns ? (double)(c->first_token_ns - tm_http_req_start_ns(req)) / 1e6 : -1;
    const tm_log_field fields[] = {
        TM_LOG_F_STR("id", c->request_id),
        TM_LOG_F_STR("key", c->owner ? c->owner->name : NULL),
        TM_LOG_F_STR("route", c->route->label),
        TM_LOG_F_INT("status", tm_http_req_status(req)),
        TM_LOG_F_NUM("ms", (double)(now_ns - tm_http_req_start_ns(req)) / 1e6),
        TM_LOG_F_STR("error", c->error),
        TM_LOG_F_STR(c->model[0] ? "model" : NULL, c->model),
        TM_LOG_F_STR("group", c->group),
        TM_LOG_F_INT("tokens_in", c->prompt_tokens),
        TM_LOG_F_INT("tokens_cached", c->cached_tokens),
        TM_LOG_F_INT("tokens_out", c->output_tokens),
        TM_LOG_F_NUM("ttft_ms", ttft_ms),
        TM_LOG_F_STR("finish", c->finish),
        TM_LOG_F_INT("moves", c->moves),
        TM_LOG_F_STR(c->user[0] ? "user" : NULL, c->user),
        {NULL, TM_LOG_STR, NULL, 0, 0},
    };
    tm_log_fields(c->route->quiet ? TM_LOG_DEBUG : TM_LOG_INFO, "request", fields,
                  TM_ARRAY_LEN(fields));
}

void tm_api_observe_done(tm_api_call *c, tm_http_req *req)
{
    char code[8];
    int64_t now_ns = tm_clock_ns();
    int status = tm_http_req_status(req);
    tm_series_add(tm_metrics_series(
                      c->api->opts.metrics, &g_requests,
                      (const char *const[]){c->route->label, code_text(status, code), c->model}),
                  1);
    if (!c->http)
        tm_series_add(tm_metrics_series(c->api->opts.metrics, &g_gone, NULL), 1);
    if (c->job)
        count_generation(c, req, now_ns);
    log_call(c, req, now_ns);
}
