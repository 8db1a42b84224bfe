/* Putting the parts together, and taking them apart in the right order: the two faces go first, because their
 * requests hold generations of dispatch. */
#include "router/router.h"

#include <event2/event.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "router/access.h"
#include "router/api/api.h"
#include "router/grpc/public.h"
#include "router/process.h"

#define DRAIN_CHECK_MS 20
#define GAUGES_MS      1000
#define GRPC_GRACE_MS  500 /* for the last statuses to go out */

struct tm_router {
    tm_router_opts opts;
    char id[96];
    struct event_base *base;
    tm_metrics *metrics;
    tm_keys *keys;
    tm_dispatch *dispatch;
    tm_api *api;
    tm_http_server *http;
    tm_access access;
    tm_public *grpc; /* NULL: off */
    struct event *signals[3];
    struct event *ev_drain, *ev_gauges;
    tm_process process;
    tm_series *connections, *in_flight, *draining_seen;
    bool draining;
    int64_t drain_until_ms;
};

static const tm_metric_desc g_connections = {.name = "turbomesh_http_connections",
                                             .help = "Open HTTP connections.",
                                             .kind = TM_METRIC_GAUGE};
static const tm_metric_desc g_draining = {.name = "turbomesh_draining",
                                          .help = "1 while open requests are being finished.",
                                          .kind = TM_METRIC_GAUGE};
static const tm_metric_desc g_in_flight = {.name = "turbomesh_in_flight",
                                           .help = "Generation requests not yet answered.",
                                           .kind = TM_METRIC_GAUGE};

static tm_status create_dispatch(tm_router *r, tm_err *err)
{
    const tm_router_opts *o = &r->opts;
    char host[64] = "router";
    gethostname(host, sizeof host - 1);
    snprintf(r->id, sizeof r->id, "%s-%d", host, (int)getpid());
    const tm_dispatch_opts d = {.base = r->base,
                                .metrics = r->metrics,
                                .etcd = o->etcd,
                                .prefix = o->etcd_prefix,
                                .workers = o->workers,
                                .served = tm_router_served_opts(o),
                                .policy = o->policy,
                                .queue_max = (int)o->queue_max,
                                .queue_wait_ms = o->queue_wait_ms,
                                .dead_ms = o->dead_ms,
                                .suspect_ms = o->suspect_ms,
                                .moves_max = (int)o->moves_max,
                                .router_id = o->router_id ? o->router_id : r->id};
    return tm_dispatch_create(&r->dispatch, &d, err);
}

static tm_api_limits request_limits(const tm_router_opts *o)
{
    return (tm_api_limits){.stop_max = o->stop_max,
                           .messages_max = o->messages_max,
                           .parts_max = o->parts_max,
                           .choices_max = o->choices_max,
                           .timeout_max_ms = o->timeout_max_ms};
}

static tm_limit_opts key_limits(const tm_router_opts *o)
{
    return (tm_limit_opts){o->key_requests_per_minute, o->key_concurrency};
}

static tm_status create_api(tm_router *r, tm_err *err)
{
    const tm_router_opts *o = &r->opts;
    const tm_api_opts a = {.base = r->base,
                           .dispatch = r->dispatch,
                           .metrics = r->metrics,
                           .keys = r->keys,
                           .limit = key_limits(o),
                           .limits = request_limits(o),
                           .text_threads = (int)o->text_threads,
                           .text_queue = (int)o->text_queue,
                           .text_inline_bytes = (size_t)o->text_inline_bytes,
                           .ping_ms = o->ping_ms};
    return tm_api_create(&r->api, &a, err);
}

static tm_status create_http(tm_router *r, tm_err *err)
{
    const tm_router_opts *o = &r->opts;
    tm_http_opts h = tm_http_opts_default();
    h.host = o->host;
    h.port = (int)o->port;
    h.body_max = (size_t)o->body_max;
    h.header_bytes_max = (size_t)o->header_bytes_max;
    h.header_line_max = (size_t)o->header_line_max;
    h.header_count_max = (int)o->header_count_max;
    h.connections_max = (int)o->connections_max;
    h.stream_buffer_max = (size_t)o->stream_buffer_max;
    h.header_timeout_ms = o->header_timeout_ms;
    h.idle_timeout_ms = o->idle_timeout_ms;
    h.write_timeout_ms = o->write_timeout_ms;
    h.body_grace_ms = o->body_grace_ms;
    h.body_rate_min = (size_t)o->body_rate_min;
    h.server_name = "turbomesh";
    h.tls_cert_file = o->tls_cert;
    h.tls_key_file = o->tls_key;
    tm_api_serve(r->api, &h);
    return tm_http_server_create(&r->http, r->base, &h, err);
}

static tm_status create_grpc(tm_router *r, tm_err *err)
{
    const tm_router_opts *o = &r->opts;
    char address[280];
    if (o->grpc_port == 0)
        return TM_OK;
    bool v6 = strchr(o->grpc_host, ':') != NULL;
    snprintf(address, sizeof address, v6 ? "[%.255s]:%d" : "%.255s:%d", o->grpc_host,
             (int)o->grpc_port);
    r->access = (tm_access){r->keys, key_limits(o), r->metrics};
    const tm_public_opts p = {.base = r->base,
                              .dispatch = r->dispatch,
                              .metrics = r->metrics,
                              .address = address,
                              .access = tm_access_for_grpc(&r->access),
                              .limits = request_limits(o),
                              .message_max = (size_t)o->body_max,
                              .calls_max = (int)o->grpc_calls_max,
                              .write_timeout_ms = o->write_timeout_ms,
                              .text_threads = (int)o->text_threads,
                              .text_queue = (int)o->text_queue,
                              .text_inline_bytes = (size_t)o->text_inline_bytes};
    return tm_public_create(&r->grpc, &p, err);
}

/* ---- signals and timers ---- */

/* On a failure the old keys and the old certificate stay in force. */
static void reload(tm_router *r)
{
    tm_err err = TM_ERR_INIT;
    if (tm_keys_reload(r->keys, &err) == TM_OK)
        tm_log(TM_LOG_INFO, "keys_reloaded", "%d keys", tm_keys_count(r->keys));
    else
        tm_log(TM_LOG_ERROR, "keys_kept", "%s", err.msg);
    if (!r->opts.tls_cert)
        return;
    if (tm_http_server_reload_tls(r->http, &err) == TM_OK)
        tm_log(TM_LOG_INFO, "certificate_reloaded", "%s", r->opts.tls_cert);
    else
        tm_log(TM_LOG_ERROR, "certificate_kept", "%s", err.msg);
}

static void on_signal(evutil_socket_t number, short what, void *user)
{
    (void)what;
    tm_router *r = user;
    if (number != SIGHUP) {
        if (r->draining)
            tm_router_stop(r);
        else
            tm_router_drain(r);
        return;
    }
    reload(r);
}

static int grpc_active(const tm_router *r)
{
    return r->grpc ? tm_public_active(r->grpc) : 0;
}

static void on_gauges(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    (void)what;
    tm_router *r = user;
    tm_process_sample(&r->process);
    tm_series_set(r->draining_seen, r->draining);
    tm_series_set(r->connections, tm_http_server_connections(r->http));
    tm_series_set(r->in_flight, tm_api_active(r->api) + grpc_active(r));
}

static void on_drain_check(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    (void)what;
    tm_router *r = user;
    int requests = tm_http_server_active(r->http) + grpc_active(r);
    int gens = tm_dispatch_active(r->dispatch);
    if (requests == 0 && gens == 0) {
        tm_log(TM_LOG_INFO, "drained", "all requests are answered");
        tm_router_stop(r);
    } else if (tm_clock_ms() >= r->drain_until_ms) {
        tm_log(TM_LOG_WARN, "drain_timeout", "%d requests and %d generations are cut", requests,
               gens);
        tm_router_stop(r);
    }
}

static struct event *add_event(tm_router *r, evutil_socket_t fd, short what, event_callback_fn fn,
                               int64_t ms)
{
    const struct timeval tv = {.tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000};
    struct event *ev = event_new(r->base, fd, what, fn, r);
    if (ev && event_add(ev, ms > 0 ? &tv : NULL) != 0) {
        event_free(ev);
        ev = NULL;
    }
    return ev;
}

static tm_status add_events(tm_router *r, tm_err *err)
{
    static const int numbers[] = {SIGTERM, SIGINT, SIGHUP};
    for (size_t i = 0; i < TM_ARRAY_LEN(numbers); i++) {
        r->signals[i] = add_event(r, numbers[i], EV_SIGNAL | EV_PERSIST, on_signal, 0);
        if (!r->signals[i])
            return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    }
    tm_process_init(&r->process, r->metrics);
    r->draining_seen = tm_metrics_series(r->metrics, &g_draining, NULL);
    r->connections = tm_metrics_series(r->metrics, &g_connections, NULL);
    r->in_flight = tm_metrics_series(r->metrics, &g_in_flight, NULL);
    r->ev_gauges = add_event(r, -1, EV_PERSIST, on_gauges, GAUGES_MS);
    return r->ev_gauges ? TM_OK : TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
}

/* ---- life ---- */

tm_status tm_router_create(tm_router **out, const tm_router_opts *opts, tm_err *err)
{
    tm_status st = TM_OK;
    TM_TRY(tm_router_opts_check(opts, err));
    tm_router *r = calloc(1, sizeof *r);
    if (!r)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    r->opts = *opts;
    r->metrics = tm_metrics_create();
    r->base = event_base_new();
    if (!r->base)
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    TM_TRY_GOTO(st, fail);
    TM_TRY_GOTO(tm_keys_create(&r->keys, opts->api_key_file, err), fail);
    TM_TRY_GOTO(tm_etcd_set_access(&opts->etcd_access, err), fail);
    TM_TRY_GOTO(create_dispatch(r, err), fail);
    TM_TRY_GOTO(create_api(r, err), fail);
    TM_TRY_GOTO(create_http(r, err), fail);
    TM_TRY_GOTO(create_grpc(r, err), fail);
    TM_TRY_GOTO(add_events(r, err), fail);
    *out = r;
    return TM_OK;
fail:
    tm_router_destroy(r);
    return st;
}

int tm_router_port(const tm_router *r)
{
    return tm_http_server_port(r->http);
}

int tm_router_grpc_port(const tm_router *r)
{
    return r->grpc ? tm_public_port(r->grpc) : 0;
}

tm_status tm_router_run(tm_router *r, tm_err *err)
{
    if (event_base_dispatch(r->base) < 0)
        return TM_FAIL(err, TM_STATUS_INTERNAL, "the event loop failed");
    return TM_OK;
}

void tm_router_drain(tm_router *r)
{
    if (r->draining)
        return;
    r->draining = true;
    r->drain_until_ms = tm_clock_ms() + r->opts.drain_ms;
    tm_log(TM_LOG_INFO, "draining", "%d requests are open, up to %lld ms",
           tm_http_server_active(r->http) + grpc_active(r), (long long)r->opts.drain_ms);
    if (r->grpc)
        tm_public_set_serving(r->grpc, false);
    tm_api_drain(r->api);
    tm_http_server_drain(r->http);
    r->ev_drain = add_event(r, -1, EV_PERSIST, on_drain_check, DRAIN_CHECK_MS);
    if (!r->ev_drain)
        tm_router_stop(r);
}

void tm_router_stop(tm_router *r)
{
    event_base_loopbreak(r->base);
}

void tm_router_destroy(tm_router *r)
{
    if (!r)
        return;
    tm_public_destroy(r->grpc, GRPC_GRACE_MS);
    tm_http_server_destroy(r->http);
    tm_api_destroy(r->api);
    tm_dispatch_destroy(r->dispatch);
    tm_keys_destroy(r->keys);
    for (size_t i = 0; i < TM_ARRAY_LEN(r->signals); i++)
        if (r->signals[i])
            event_free(r->signals[i]);
    if (r->ev_drain)
        event_free(r->ev_drain);
    if (r->ev_gauges)
        event_free(r->ev_gauges);
    if (r->base)
        event_base_free(r->base);
    tm_metrics_destroy(r->metrics);
    free(r);
}
