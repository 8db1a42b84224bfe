/* The API object: what all requests share, its timer and its hooks. */
#include <event2/event.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/hash.h"
#include "router/api/internal.h"

#define PING_CHECK_MS 1000
#define OUT_KEEP      ((size_t)1 << 20) /* a buffer that one large answer grew is given back */

tm_api_opts tm_api_opts_default(void)
{
    return (tm_api_opts){.limits = tm_api_limits_default(),
                         .text_threads = 2,
                         .text_queue = 256,
                         .text_inline_bytes = 8192,
                         .ping_ms = 15000};
}

static void on_ping(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    (void)what;
    tm_api *a = user;
    tm_api_stream_ping(a, tm_clock_ms());
    if (a->out.cap > OUT_KEEP) {
        tm_buf_deinit(&a->out);
        tm_buf_init(&a->out, 0);
    }
}

static tm_status start(tm_api *a, tm_err *err)
{
    uint8_t salt[8];
    int64_t every_ms = TM_MAX(TM_MIN(a->opts.ping_ms / 2, (int64_t)PING_CHECK_MS), (int64_t)1);
    const struct timeval every = {.tv_sec = every_ms / 1000, .tv_usec = every_ms % 1000 * 1000};
    tm_random_bytes(salt, sizeof salt);
    tm_hex(salt, sizeof salt, a->salt);
    a->ev_ping = event_new(a->opts.base, -1, EV_PERSIST, on_ping, a);
    if (!a->ev_ping || event_add(a->ev_ping, &every) != 0)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    return tm_prep_pool_create(&a->pool, a->opts.base, a->opts.text_threads, a->opts.text_queue,
                               err);
}

tm_status tm_api_create(tm_api **out, const tm_api_opts *opts, tm_err *err)
{
    tm_api *a = calloc(1, sizeof *a);
    if (!a)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    a->opts = *opts;
    tm_buf_init(&a->out, 0);
    TAILQ_INIT(&a->streams);
    tm_status st = start(a, err);
    if (st != TM_OK) {
        tm_api_destroy(a);
        return st;
    }
    *out = a;
    return TM_OK;
}

void tm_api_destroy(tm_api *a)
{
    if (!a)
        return;
    TM_ASSERT(a->active == 0);
    tm_prep_pool_destroy(a->pool);
    if (a->ev_ping)
        event_free(a->ev_ping);
    for (int i = 0; i < a->unknown_count; i++)
        free(a->unknown[i]);
    tm_buf_deinit(&a->out);
    free(a);
}

void tm_api_serve(tm_api *a, tm_http_opts *http)
{
    http->routes = tm_api_http_routes(&http->route_count);
    http->user = a;
    http->authorise = tm_api_on_authorise;
    http->error_body = tm_api_on_error_body;
    http->on_error = tm_api_on_error;
    http->on_done = tm_api_on_done;
}

void tm_api_drain(tm_api *a)
{
    a->draining = true;
}

int tm_api_active(const tm_api *a)
{
    return a->active;
}
