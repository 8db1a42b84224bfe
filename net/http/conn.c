/* One connection: bytes in, requests out, answers flushed, deadlines kept.
 *
 * libevent's loop with plain socket events and one evbuffer for output, not bufferevents: a bufferevent would
 * keep an input buffer per connection, read 4 KiB at a time, and add and delete a write event (two system
 * calls) for every flush. Here all connections read through one scratch block of the server, a write is tried
 * at once and only a full socket costs an event, and an idle stream holds no buffer at all.
 *
 * A connection is destroyed only from its own events, the flush pass, the tick or the server's end; never
 * inside a call that a handler makes. */
#include "net/http/internal.h"

#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "common/check.h"
#include "common/clock.h"

static void on_readable(evutil_socket_t fd, short what, void *arg);
static void on_writable(evutil_socket_t fd, short what, void *arg);

/* ---- life --------------------------------------------------------------------------------------------- */

static bool make_buffers(tm_http_server *s, tm_http_conn *c)
{
    c->out = evbuffer_new();
    c->wire = s->tls_ctx ? evbuffer_new() : c->out;
    c->tls = s->tls_ctx ? tm_http_tls_open(s->tls_ctx) : NULL;
    return c->out && c->wire && (c->tls || !s->tls_ctx);
}

static void free_buffers(tm_http_conn *c)
{
    tm_http_tls_free(c->tls);
    if (c->wire && c->wire != c->out)
        evbuffer_free(c->wire);
    if (c->out)
        evbuffer_free(c->out);
}

/* A client whose machine vanished sends no FIN: while its answer is computed, probes find out within half a
 * minute; while bytes are on their way, the write timeout applies to the kernel's retries too. */
static void set_up_socket(const tm_http_server *s, int fd)
{
    unsigned timeout_ms = (unsigned)TM_MIN(s->opts.write_timeout_ms, (int64_t)INT_MAX);
    const struct {
        int level, name, value;
    } options[] = {
        {IPPROTO_TCP, TCP_NODELAY, 1},   {SOL_SOCKET, SO_KEEPALIVE, 1},
        {IPPROTO_TCP, TCP_KEEPIDLE, 15}, {IPPROTO_TCP, TCP_KEEPINTVL, 5},
        {IPPROTO_TCP, TCP_KEEPCNT, 3},   {IPPROTO_TCP, TCP_USER_TIMEOUT, (int)timeout_ms},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(options); i++)
        setsockopt(fd, options[i].level, options[i].name, &options[i].value, sizeof(int));
}

void tm_http_conn_open(tm_http_server *s, int fd, const char *peer)
{
    tm_http_conn *c = calloc(1, sizeof(*c));
    if (!c || !make_buffers(s, c)) {
        if (c)
            free_buffers(c);
        free(c);
        close(fd);
        return;
    }
    set_up_socket(s, fd);
    c->server = s;
    c->fd = fd;
    c->state = TM_CONN_IDLE;
    c->idle_since_ms = tm_clock_ms();
    c->deadline_ms = c->idle_since_ms + s->opts.header_timeout_ms;
    tm_buf_init(&c->pending, TM_HTTP_SCRATCH_BYTES);
    snprintf(c->peer, sizeof(c->peer), "%s", peer);
    event_assign(&c->ev_in, s->base, fd, EV_READ | EV_PERSIST, on_readable, c);
    event_assign(&c->ev_out, s->base, fd, EV_WRITE | EV_PERSIST, on_writable, c);
    event_add(&c->ev_in, NULL);
    TAILQ_INSERT_TAIL(&s->conns, c, all);
    s->conn_count++;
}

static void end_request(tm_http_conn *c)
{
    tm_http_server *s = c->server;
    tm_http_req *r = c->req;
    c->req = NULL;
    s->active--;
    if (s->opts.on_done)
        s->opts.on_done(s->opts.user, r);
    tm_http_req_destroy(r);
}

void tm_http_conn_destroy(tm_http_conn *c)
{
    tm_http_server *s = c->server;
    tm_http_req *r = c->req;
    if (r) {
        bool told = r->complete;
        if (!told)
            r->status = 499;
        r->gone = true;
        if (!told && r->on_gone)
            r->on_gone(r->user, r);
        end_request(c);
    }
    event_del(&c->ev_in);
    event_del(&c->ev_out);
    if (c->dirty)
        TAILQ_REMOVE(&s->dirty, c, dirty_link);
    TAILQ_REMOVE(&s->conns, c, all);
    free_buffers(c);
    tm_buf_deinit(&c->pending);
    close(c->fd);
    free(c);
    s->conn_count--;
    tm_http_server_look_for_more(s);
}

/* Without this, close() after an unframed answer would look like its proper end. */
static void reset_and_destroy(tm_http_conn *c)
{
    struct linger hard = {1, 0};
    setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
    tm_http_conn_destroy(c);
}

/* Writes what the socket takes; false when the connection is broken. */
static bool write_wire(tm_http_conn *c, bool *progress)
{
    for (;;) {
        struct evbuffer_iovec v[64];
        int n = evbuffer_peek(c->wire, -1, NULL, v, 64);
        if (n <= 0)
            return true;
        struct msghdr msg = {.msg_iov = (struct iovec *)v, .msg_iovlen = (size_t)(n < 64 ? n : 64)};
        ssize_t sent = sendmsg(c->fd, &msg, MSG_NOSIGNAL);
        if (sent < 0)
            return errno == EAGAIN || errno == EINTR;
        *progress = true;
        evbuffer_drain(c->wire, (size_t)sent);
    }
}

/* Encrypts and writes in turn until all is out or the socket is full. */
static bool write_out(tm_http_conn *c, bool *progress)
{
    if (!c->tls)
        return write_wire(c, progress);
    do {
        if (!tm_http_tls_write(c->tls, c->out, c->wire, TM_HTTP_WIRE_MAX) ||
            !write_wire(c, progress))
            return false;
    } while (evbuffer_get_length(c->wire) == 0 && evbuffer_get_length(c->out) > 0);
    return true;
}

static size_t unwritten(const tm_http_conn *c)
{
    return evbuffer_get_length(c->out) + (c->tls ? evbuffer_get_length(c->wire) : 0);
}

/* TLS says that it ends; plain TCP's FIN needs no words. */
static void send_farewell(tm_http_conn *c)
{
    bool progress;
    if (!c->tls)
        return;
    tm_http_tls_close(c->tls, c->wire);
    write_wire(c, &progress);
}

/* Closing with unread input would reset the connection and could cost the client our last bytes. */
static void begin_linger(tm_http_conn *c)
{
    if (c->eof) {
        tm_http_conn_destroy(c);
        return;
    }
    send_farewell(c);
    shutdown(c->fd, SHUT_WR);
    c->state = TM_CONN_LINGER;
    c->deadline_ms = tm_clock_ms() + TM_HTTP_LINGER_MS;
    tm_buf_deinit(&c->pending);
}

/* ---- input -------------------------------------------------------------------------------------------- */

/* While pipelined bytes wait, the socket is not read and the tick looks whether the client has left.
 * (EV_CLOSED is no help: after a reset epoll reports an error, which libevent gives to readers and
 * writers only, and the loop would spin.) */
static void pause_input(tm_http_conn *c, bool paused)
{
    if (c->input_paused == paused)
        return;
    c->input_paused = paused;
    if (paused)
        event_del(&c->ev_in);
    else
        event_add(&c->ev_in, NULL);
}

/* The head is in: everything that can be refused without the body is refused now. */
static void take_head(tm_http_conn *c)
{
    tm_http_req *r = c->req;
    tm_http_opts *o = &c->server->opts;
    c->state = TM_CONN_BODY;
    c->body_start_ms = tm_clock_ms();
    c->deadline_ms = c->body_start_ms + o->body_grace_ms;
    int status = tm_http_route_choose(r);
    if (status) {
        tm_http_reply_error(r, status);
        return;
    }
    if (o->authorise && !o->authorise(o->user, r, r->route)) {
        if (!r->status)
            tm_http_reply_error(r, 500);
        return;
    }
    if (r->parser.expect_continue && (r->parser.chunked || r->parser.remaining)) {
        evbuffer_add_printf(c->out, "HTTP/1.1 100 Continue\r\n\r\n");
        tm_http_conn_mark_dirty(c);
    }
}

static void take_request(tm_http_conn *c)
{
    tm_http_req *r = c->req;
    r->body_in = true;
    c->state = TM_CONN_ANSWER;
    c->deadline_ms = 0;
    if (r->status)
        tm_http_conn_mark_dirty(c); /* answered early; the flush pass finishes it */
    else
        r->route->handler(c->server->opts.user, r);
}

static void refuse_request(tm_http_conn *c, int status)
{
    tm_http_req *r = c->req;
    c->state = TM_CONN_ANSWER;
    c->deadline_ms = tm_clock_ms() + TM_HTTP_LINGER_MS;
    c->close_after = true;
    tm_http_route_show_slashes(r);
    if (r->status) {
        /* Answered early, and then the body turned out bad: an answer under way cannot be completed. */
        c->broken = c->broken || !r->complete;
        tm_http_conn_mark_dirty(c);
        return;
    }
    tm_http_reply_error(r, status);
}

static bool begin_request(tm_http_conn *c)
{
    c->req = tm_http_req_create(c);
    if (!c->req)
        return false;
    c->server->active++;
    c->state = TM_CONN_HEAD;
    c->deadline_ms = tm_clock_ms() + c->server->opts.header_timeout_ms;
    return true;
}

/* Feeds bytes to the parser until the request is in; returns how many were taken. */
static size_t consume(tm_http_conn *c, const char *data, size_t len)
{
    size_t at = 0;
    if (c->state == TM_CONN_IDLE && len && !begin_request(c)) {
        c->broken = true;
        tm_http_conn_mark_dirty(c);
        return len;
    }
    while (c->state == TM_CONN_HEAD || c->state == TM_CONN_BODY) {
        size_t used = 0;
        tm_http_event ev = tm_http_parser_feed(&c->req->parser, data + at, len - at, &used);
        at += used;
        if (ev == TM_HTTP_EV_MORE)
            break;
        if (ev == TM_HTTP_EV_HEAD)
            take_head(c);
        else if (ev == TM_HTTP_EV_DONE)
            take_request(c);
        else
            refuse_request(c, c->req->parser.bad_status);
    }
    return at;
}

static void take_input(tm_http_conn *c, const char *data, size_t len)
{
    if (c->state == TM_CONN_LINGER || c->close_after)
        return; /* nothing after the last answer is of interest */
    size_t used = c->state == TM_CONN_ANSWER ? 0 : consume(c, data, len);
    if (used == len || c->close_after)
        return;
    if (!tm_buf_append(&c->pending, data + used, len - used)) {
        c->broken = true;
        tm_http_conn_mark_dirty(c);
    }
    pause_input(c, true);
}

/* The next pipelined request, after an answer has left. */
static void resume_input(tm_http_conn *c)
{
    tm_buf waiting = c->pending;
    tm_buf_init(&c->pending, TM_HTTP_SCRATCH_BYTES);
    size_t used = consume(c, waiting.data, waiting.len);
    if (used < waiting.len && !c->close_after)
        tm_buf_append(&c->pending, waiting.data + used, waiting.len - used);
    tm_buf_deinit(&waiting);
    if (c->pending.len == 0)
        pause_input(c, false);
}

static void take_eof(tm_http_conn *c)
{
    c->eof = true;
    event_del(&c->ev_in);
    /* A complete answer still flushes to a client that only shut down its sending side. */
    if (c->req && c->req->complete && unwritten(c))
        c->close_after = true;
    else
        tm_http_conn_destroy(c);
}

static void take_cipher(tm_http_conn *c, size_t len)
{
    tm_http_server *s = c->server;
    ssize_t n = TM_HTTP_TLS_BROKEN;
    if (tm_http_tls_take(c->tls, s->scratch, len))
        while ((n = tm_http_tls_read(c->tls, s->plain_scratch, TM_HTTP_SCRATCH_BYTES)) > 0)
            take_input(c, s->plain_scratch, (size_t)n);
    if (n == TM_HTTP_TLS_MORE) {
        tm_http_conn_mark_dirty(c); /* the handshake may have something to send */
        return;
    }
    if (n == TM_HTTP_TLS_BROKEN)
        send_farewell(c); /* the alert that says why */
    take_eof(c);
}

static void on_readable(evutil_socket_t fd, short what, void *arg)
{
    tm_http_conn *c = arg;
    (void)what;
    ssize_t n = recv(fd, c->server->scratch, TM_HTTP_SCRATCH_BYTES, 0);
    if (n > 0 && c->tls)
        take_cipher(c, (size_t)n);
    else if (n > 0)
        take_input(c, c->server->scratch, (size_t)n);
    else if (n == 0)
        take_eof(c);
    else if (errno != EAGAIN && errno != EINTR)
        tm_http_conn_destroy(c);
}

/* ---- output ------------------------------------------------------------------------------------------- */

void tm_http_conn_mark_dirty(tm_http_conn *c)
{
    if (c->dirty)
        return;
    c->dirty = true;
    TAILQ_INSERT_TAIL(&c->server->dirty, c, dirty_link);
    event_active(c->server->ev_flush, EV_TIMEOUT, 0);
}

static void watch_output(tm_http_conn *c, bool on)
{
    if (c->writing == on)
        return;
    c->writing = on;
    if (on)
        event_add(&c->ev_out, NULL);
    else
        event_del(&c->ev_out);
}

/* All of a complete answer has left. */
static void finish_answer(tm_http_conn *c)
{
    if (!c->close_after && !c->req->body_in)
        return; /* the rest of a short body is still being skipped */
    end_request(c);
    if (c->close_after || c->server->draining || c->eof) {
        begin_linger(c);
        return;
    }
    c->state = TM_CONN_IDLE;
    c->served = true;
    c->idle_since_ms = tm_clock_ms();
    c->deadline_ms = c->idle_since_ms + c->server->opts.idle_timeout_ms;
    if (c->pending.len)
        resume_input(c);
    else
        tm_http_server_look_for_more(c->server);
}

void tm_http_conn_flush(tm_http_conn *c)
{
    bool progress = false;
    if (c->broken) {
        reset_and_destroy(c);
        return;
    }
    if (!write_out(c, &progress)) {
        tm_http_conn_destroy(c);
        return;
    }
    size_t left = unwritten(c);
    watch_output(c, left > 0);
    if (left == 0)
        c->write_deadline_ms = 0;
    else if (progress || c->write_deadline_ms == 0)
        c->write_deadline_ms = tm_clock_ms() + c->server->opts.write_timeout_ms;
    tm_http_req *r = c->req;
    if (!r)
        return;
    if (r->complete) {
        if (left == 0)
            finish_answer(c);
    } else if (r->over_mark && left <= c->server->opts.stream_buffer_max / 2) {
        r->over_mark = false;
        if (r->on_drain)
            r->on_drain(r->user, r);
    }
}

static void on_writable(evutil_socket_t fd, short what, void *arg)
{
    (void)fd, (void)what;
    tm_http_conn_flush(arg);
}

/* ---- time --------------------------------------------------------------------------------------------- */

/* After the grace time a body must have come at body_rate_min bytes per second on average. */
static bool body_too_slow(const tm_http_conn *c, int64_t now_ms)
{
    const tm_http_opts *o = &c->server->opts;
    int64_t counted = now_ms - c->body_start_ms - o->body_grace_ms;
    return (double)c->req->parser.body_bytes < (double)counted / 1000 * (double)o->body_rate_min;
}

void tm_http_conn_check(tm_http_conn *c, int64_t now_ms)
{
    struct pollfd left = {.fd = c->fd, .events = POLLRDHUP};
    if (c->input_paused && poll(&left, 1, 0) > 0) {
        take_eof(c);
        return;
    }
    if (c->write_deadline_ms && now_ms >= c->write_deadline_ms) {
        reset_and_destroy(c);
        return;
    }
    if (!c->deadline_ms || now_ms < c->deadline_ms)
        return;
    switch (c->state) {
    case TM_CONN_HEAD:
        refuse_request(c, 408);
        break;
    case TM_CONN_BODY:
        if (body_too_slow(c, now_ms))
            refuse_request(c, 408);
        break;
    case TM_CONN_IDLE:
    case TM_CONN_ANSWER:
    case TM_CONN_LINGER:
        tm_http_conn_destroy(c);
        break;
    }
}
