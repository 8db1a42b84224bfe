#include "tests/net/http_fixture.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"

static void on_hello(void *user, tm_http_req *req)
{
    ((fixture *)user)->handled++;
    tm_http_set_header(req, "X-Test", "bad\r\nvalue");
    tm_http_set_header(req, "x-test", "on\r\ne");
    tm_http_reply(req, 200, "text/plain", "hello", 5);
}

static void on_echo(void *user, tm_http_req *req)
{
    size_t len;
    const char *body = tm_http_req_body(req, &len);
    ((fixture *)user)->handled++;
    tm_http_reply(req, 200, "application/octet-stream", body, len);
}

static void on_rest(void *user, tm_http_req *req)
{
    const char *rest = tm_http_req_rest(req);
    (void)user;
    tm_http_reply(req, 200, "text/plain", rest, strlen(rest));
}

static void on_query(void *user, tm_http_req *req)
{
    const char *a = tm_http_req_query(req, "a"), *none = tm_http_req_query(req, "none");
    (void)user;
    tm_http_reply(req, none ? 500 : 200, "text/plain", a, strlen(a));
}

static void on_peer(void *user, tm_http_req *req)
{
    (void)user;
    tm_http_reply(req, 200, "text/plain", tm_http_req_peer(req), strlen(tm_http_req_peer(req)));
}

static void on_gone(void *user, tm_http_req *req)
{
    fixture *f = user;
    f->gone_count++;
    for (int i = 0; i < f->held_count; i++)
        if (f->held[i] == req)
            f->held[i] = NULL;
    /* All of this comes too late and must be harmless. */
    assert_int_equal(tm_http_stream_write(req, "x", 1), TM_STATUS_CLOSED);
    tm_http_set_header(req, "X", "y");
    tm_http_reply(req, 200, "text/plain", "late", 4);
    tm_http_stream_end(req);
    tm_http_stream_abort(req);
}

static void on_drain(void *user, tm_http_req *req)
{
    (void)req;
    ((fixture *)user)->drain_count++;
}

static void on_hold(void *user, tm_http_req *req)
{
    fixture *f = user;
    assert_true(f->held_count < (int)TM_ARRAY_LEN(f->held));
    tm_http_req_set_user(req, f, on_gone);
    f->held[f->held_count++] = req;
}

static void on_stream(void *user, tm_http_req *req)
{
    tm_http_set_header(req, "Cache-Control", "no-cache");
    tm_http_stream_begin(req, 200, "text/event-stream");
    tm_http_stream_on_drain(req, on_drain);
    on_hold(user, req);
}

static const tm_http_route routes[] = {
    {"GET", "/hello", true, on_hello},  {"POST", "/echo", false, on_echo},
    {"GET", "/rest/*", false, on_rest}, {"GET", "/hold", false, on_hold},
    {"POST", "/hold", false, on_hold},  {"GET", "/stream", false, on_stream},
    {"GET", "/query", false, on_query}, {"GET", "/rest/exact", false, on_peer},
    {"OPTIONS", "*", true, on_hello},
};

static bool authorise(void *user, tm_http_req *req, const tm_http_route *route)
{
    (void)user;
    if (route->open || !tm_http_req_header(req, "x-deny"))
        return true;
    tm_http_reply(req, 401, "text/plain", "no", 2);
    return false;
}

static void error_body(void *user, int status, tm_buf *out)
{
    (void)user;
    tm_buf_printf(out, "{\"error\":{\"code\":%d}}", status);
}

static void on_done(void *user, tm_http_req *req)
{
    fixture *f = user;
    f->done_count++;
    f->last_status = tm_http_req_status(req);
    f->last_sent = tm_http_req_sent_bytes(req);
    snprintf(f->last_path, sizeof(f->last_path), "%s", tm_http_req_path(req));
}

tm_http_opts fixture_opts(fixture *f)
{
    tm_http_opts o = tm_http_opts_default();
    o.routes = routes;
    o.route_count = (int)TM_ARRAY_LEN(routes);
    o.user = f;
    o.authorise = authorise;
    o.error_body = error_body;
    o.on_done = on_done;
    o.server_name = "test";
    return o;
}

void fixture_start(fixture *f, const tm_http_opts *opts)
{
    tm_err err = TM_ERR_INIT;
    memset(f, 0, sizeof(*f));
    f->base = event_base_new();
    tm_http_opts defaults = fixture_opts(f);
    if (tm_http_server_create(&f->server, f->base, opts ? opts : &defaults, &err) != TM_OK)
        fail_msg("%s", err.msg);
}

void fixture_stop(fixture *f)
{
    tm_http_server_destroy(f->server);
    event_base_free(f->base);
}

void pump(fixture *f, int ms)
{
    struct timeval tv = {ms / 1000, ms % 1000 * 1000};
    event_base_loopexit(f->base, &tv);
    event_base_loop(f->base, EVLOOP_NO_EXIT_ON_EMPTY);
}

void pump_until(fixture *f, const int *counter, int at_least)
{
    int64_t end = tm_clock_ms() + 10000;
    while (*counter < at_least && tm_clock_ms() < end)
        pump(f, 2);
    assert_true(*counter >= at_least);
}

void raw_open(raw *r, fixture *f, int recv_buffer)
{
    struct sockaddr_in addr = {.sin_family = AF_INET,
                               .sin_port = htons((uint16_t)tm_http_server_port(f->server)),
                               .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    memset(r, 0, sizeof(*r));
    tm_buf_init(&r->in, 0);
    r->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (recv_buffer)
        setsockopt(r->fd, SOL_SOCKET, SO_RCVBUF, &recv_buffer, sizeof(recv_buffer));
    assert_int_equal(connect(r->fd, (struct sockaddr *)&addr, sizeof(addr)), 0);
    fcntl(r->fd, F_SETFL, O_NONBLOCK);
}

void raw_close(raw *r)
{
    if (r->fd >= 0)
        close(r->fd);
    r->fd = -1;
    tm_buf_deinit(&r->in);
}

void raw_send(raw *r, fixture *f, const void *data, size_t len)
{
    size_t at = 0;
    int64_t end = tm_clock_ms() + 10000;
    while (at < len && tm_clock_ms() < end) {
        ssize_t n = send(r->fd, (const char *)data + at, len - at, MSG_NOSIGNAL);
        if (n > 0)
            at += (size_t)n;
        else if (errno != EAGAIN)
            return; /* refused early and closed: the answer tells */
        if (at < len)
            pump(f, 1);
    }
}

void raw_puts(raw *r, fixture *f, const char *text)
{
    raw_send(r, f, text, strlen(text));
}

bool raw_poll(raw *r)
{
    char data[16384];
    ssize_t n = recv(r->fd, data, sizeof(data), 0);
    if (n > 0)
        tm_buf_append(&r->in, data, (size_t)n);
    else if (n == 0)
        r->closed = true;
    else if (errno != EAGAIN)
        r->closed = r->reset = true;
    return n > 0;
}

bool raw_wait(raw *r, fixture *f, const char *text)
{
    int64_t end = tm_clock_ms() + 5000;
    for (;;) {
        while (raw_poll(r))
            ;
        if (r->in.data && memmem(r->in.data, r->in.len, text, strlen(text)))
            return true;
        if (r->closed || tm_clock_ms() >= end)
            return false;
        pump(f, 1);
    }
}

bool raw_wait_closed(raw *r, fixture *f, int ms)
{
    int64_t end = tm_clock_ms() + ms;
    while (!r->closed && tm_clock_ms() < end) {
        if (!raw_poll(r) && !r->closed)
            pump(f, 1);
    }
    return r->closed;
}

int raw_status(const raw *r)
{
    return r->in.len > 12 && strncmp(r->in.data, "HTTP/1.1 ", 9) == 0
               ? (int)strtol(r->in.data + 9, NULL, 10)
               : 0;
}
