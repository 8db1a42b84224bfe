/* The HTTP client: a non-blocking connect, one write of head and body, then the shared parser in response mode
 * with its body sink wired to on_data. One event, re-armed per phase, whose timeout is the phase's limit. */
#include "net/http/client.h"

#include <errno.h>
#include <event2/event.h>
#include <event2/event_struct.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/check.h"
#include "net/http/parse.h"

enum { RECV_BYTES = 16384, REQUEST_HEAD_MAX = 64 << 10 };

typedef enum call_phase { PHASE_CONNECT, PHASE_SEND, PHASE_RECEIVE } call_phase;

struct tm_http_call {
    tm_http_call_opts opts; /* strings are gone after start, but for host */
    char host[256];
    struct event ev;
    int fd;
    call_phase phase;
    tm_buf request;
    size_t sent;
    tm_http_parser parser;
    bool has_head, paused, in_callback, cancelled;
};

static const tm_http_limits call_limits = {64 << 10, 256 << 10, SIZE_MAX / 2, 1000};

tm_http_call_opts tm_http_call_opts_default(void)
{
    return (tm_http_call_opts){
        .method = "GET", .target = "/", .connect_timeout_ms = 5000, .idle_timeout_ms = 300000};
}

static void free_call(tm_http_call *c)
{
    if (event_initialized(&c->ev))
        event_del(&c->ev);
    if (c->fd >= 0)
        close(c->fd);
    tm_http_parser_deinit(&c->parser);
    tm_buf_deinit(&c->request);
    free(c);
}

static void end_call(tm_http_call *c, tm_status st, const char *why)
{
    tm_err err = TM_ERR_INIT;
    if (st != TM_OK)
        TM_FAIL(&err, st, "%s port %d: %s", c->opts.host, c->opts.port, why);
    event_del(&c->ev);
    c->in_callback = true;
    if (!c->cancelled)
        c->opts.on_end(c->opts.user, c, st, &err);
    free_call(c);
}

static void arm(tm_http_call *c, short what, int64_t timeout_ms, event_callback_fn fn)
{
    struct event_base *base = event_get_base(&c->ev);
    struct timeval tv = {.tv_sec = timeout_ms / 1000, .tv_usec = timeout_ms % 1000 * 1000};
    event_del(&c->ev);
    event_assign(&c->ev, base, c->fd, (short)(what | EV_PERSIST), fn, c);
    event_add(&c->ev, &tv);
}

/* ---- answer ------------------------------------------------------------------------------------------- */

static bool give_data(void *user, const char *data, size_t len)
{
    tm_http_call *c = user;
    if (c->opts.on_data)
        c->opts.on_data(c->opts.user, c, data, len);
    return !c->cancelled;
}

static void give_headers(tm_http_call *c)
{
    c->has_head = true;
    if (c->opts.on_headers)
        c->opts.on_headers(c->opts.user, c, c->parser.status);
}

/* May end and free the call. */
static void feed(tm_http_call *c, const char *data, size_t len)
{
    size_t at = 0;
    tm_http_event ev;
    c->in_callback = true;
    do {
        size_t used = 0;
        ev = tm_http_parser_feed(&c->parser, data + at, len - at, &used);
        at += used;
        if (ev == TM_HTTP_EV_HEAD)
            give_headers(c);
    } while (ev == TM_HTTP_EV_HEAD && !c->cancelled);
    c->in_callback = false;
    if (c->cancelled)
        free_call(c);
    else if (ev == TM_HTTP_EV_DONE)
        end_call(c, TM_OK, NULL);
    else if (ev == TM_HTTP_EV_BAD)
        end_call(c, TM_STATUS_INVALID, c->parser.bad_why);
}

static void on_answer(evutil_socket_t fd, short what, void *arg)
{
    tm_http_call *c = arg;
    char data[RECV_BYTES];
    if (what & EV_TIMEOUT) {
        end_call(c, TM_STATUS_TIMEOUT, "no answer in time");
        return;
    }
    ssize_t n = recv(fd, data, sizeof(data), 0);
    if (n > 0)
        feed(c, data, (size_t)n);
    else if (n == 0 && tm_http_parser_eof(&c->parser) == TM_HTTP_EV_DONE)
        end_call(c, TM_OK, NULL);
    else if (n == 0 || (errno != EAGAIN && errno != EINTR))
        end_call(c, TM_STATUS_CLOSED,
                 n == 0 ? "closed in the middle of the answer" : strerror(errno));
}

/* ---- request ------------------------------------------------------------------------------------------ */

static void on_sendable(evutil_socket_t fd, short what, void *arg)
{
    tm_http_call *c = arg;
    if (what & EV_TIMEOUT) {
        end_call(c, TM_STATUS_TIMEOUT, "the request could not be sent in time");
        return;
    }
    ssize_t n = send(fd, c->request.data + c->sent, c->request.len - c->sent, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN && errno != EINTR) {
        /* The server may have answered and closed without reading all: its words come first. */
        c->sent = c->request.len;
    } else if (n > 0) {
        c->sent += (size_t)n;
    }
    if (c->sent < c->request.len)
        return;
    tm_buf_deinit(&c->request);
    c->phase = PHASE_RECEIVE;
    if (!c->paused)
        arm(c, EV_READ, c->opts.idle_timeout_ms, on_answer);
    else
        event_del(&c->ev);
}

static void on_connected(evutil_socket_t fd, short what, void *arg)
{
    tm_http_call *c = arg;
    int error = 0;
    socklen_t len = sizeof(error);
    if (what & EV_TIMEOUT) {
        end_call(c, TM_STATUS_UNAVAILABLE, "no connection in time");
        return;
    }
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len);
    if (error) {
        end_call(c, TM_STATUS_UNAVAILABLE, strerror(error));
        return;
    }
    c->phase = PHASE_SEND;
    arm(c, EV_WRITE, c->opts.idle_timeout_ms, on_sendable);
}

static bool build_request(tm_http_call *c, const tm_http_call_opts *o)
{
    tm_buf *b = &c->request;
    tm_buf_init(b, o->body_len + REQUEST_HEAD_MAX);
    bool v6 = strchr(o->host, ':') != NULL;
    tm_buf_printf(b, "%s %s HTTP/1.1\r\nHost: %s%s%s:%d\r\nConnection: close\r\n", o->method,
                  o->target, v6 ? "[" : "", o->host, v6 ? "]" : "", o->port);
    for (const char *const *h = o->headers; h && *h; h++)
        tm_buf_printf(b, "%s\r\n", *h);
    if (o->body)
        tm_buf_printf(b, "Content-Length: %zu\r\n", o->body_len);
    tm_buf_puts(b, "\r\n");
    if (o->body)
        tm_buf_append(b, o->body, o->body_len);
    return !b->failed;
}

static tm_status connect_to(tm_http_call *c, tm_err *err)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
    struct addrinfo *list = NULL;
    char port[16];
    int on = 1;
    snprintf(port, sizeof(port), "%d", c->opts.port);
    int rc = getaddrinfo(c->opts.host, port, &hints, &list);
    if (rc)
        return TM_FAIL(err, TM_STATUS_UNAVAILABLE, "%s: %s", c->opts.host, gai_strerror(rc));
    c->fd = socket(list->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd >= 0 && c->opts.recv_buffer)
        setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &c->opts.recv_buffer, sizeof(c->opts.recv_buffer));
    if (c->fd >= 0)
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    rc = c->fd < 0 ? -1 : connect(c->fd, list->ai_addr, list->ai_addrlen);
    int error = errno;
    freeaddrinfo(list);
    /* A refusal that comes at once is reported through the event, like one that comes later. */
    if (c->fd < 0)
        return TM_FAIL(err, TM_STATUS_IO, "socket: %s", strerror(error));
    if (rc < 0 && error != EINPROGRESS && error != ECONNREFUSED)
        return TM_FAIL(err, TM_STATUS_UNAVAILABLE, "%s port %d: %s", c->opts.host, c->opts.port,
                       strerror(error));
    return TM_OK;
}

tm_status tm_http_call_start(tm_http_call **out, struct event_base *base,
                             const tm_http_call_opts *opts, tm_err *err)
{
    tm_status st;
    tm_http_call *c = calloc(1, sizeof(*c));
    if (!c)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "http client: out of memory");
    c->opts = *opts;
    c->fd = -1;
    tm_http_parser_init(&c->parser, &call_limits, true);
    c->parser.sink = give_data;
    c->parser.sink_user = c;
    c->parser.head_only = strcmp(opts->method, "HEAD") == 0;
    if (!build_request(c, opts)) {
        st = TM_FAIL(err, TM_STATUS_TOO_LARGE, "http client: request headers too large");
        goto err_free;
    }
    snprintf(c->host, sizeof(c->host), "%s", opts->host);
    c->opts.host = c->host;
    c->opts.headers = NULL;
    c->opts.body = NULL;
    c->opts.method = c->opts.target = NULL;
    TM_TRY_GOTO(connect_to(c, err), err_free);
    event_assign(&c->ev, base, c->fd, EV_WRITE, on_connected, c);
    arm(c, EV_WRITE, opts->connect_timeout_ms, on_connected);
    *out = c;
    return TM_OK;

err_free:
    free_call(c);
    return st;
}

void tm_http_call_cancel(tm_http_call *c)
{
    c->cancelled = true;
    if (!c->in_callback)
        free_call(c);
}

void tm_http_call_pause(tm_http_call *c, bool paused)
{
    if (c->paused == paused)
        return;
    c->paused = paused;
    if (c->phase != PHASE_RECEIVE)
        return;
    if (paused)
        event_del(&c->ev);
    else
        arm(c, EV_READ, c->opts.idle_timeout_ms, on_answer);
}

int tm_http_call_status(const tm_http_call *c)
{
    return c->has_head ? c->parser.status : 0;
}

const char *tm_http_call_header(const tm_http_call *c, const char *name)
{
    return c->has_head ? tm_http_parser_field(&c->parser, name) : NULL;
}
