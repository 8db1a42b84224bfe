/* The server: options, listener, connection cap, flush pass, tick, drain.
 *
 * One tick for all connections checks deadlines: a loop over some thousand integers a few times a second is
 * cheaper than a timer per connection that moves with every request. The flush event is made active by the
 * first dirty connection of a turn and runs after the callbacks that are already due. */
#include "net/http/internal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"

enum {
    ACCEPTS_PER_TURN = 64,
    ACCEPT_RETRY_MS = 100, /* after running out of descriptors */
    FRESH_MS = 1000,
    WARN_EVERY_MS = 10000,
    TICK_MS_MAX = 500,
    TICK_MS_MIN = 10
};

tm_http_opts tm_http_opts_default(void)
{
    return (tm_http_opts){
        .host = "127.0.0.1",
        .body_max = 8u << 20,
        .header_bytes_max = 32u << 10,
        .header_line_max = 8u << 10,
        .header_count_max = 100,
        .stream_buffer_max = 256u << 10,
        .connections_max = 16384,
        .header_timeout_ms = 10000,
        .idle_timeout_ms = 75000,
        .write_timeout_ms = 60000,
        .body_grace_ms = 5000,
        .body_rate_min = 1024,
        .backlog = 1024,
    };
}

const char *tm_http_server_date(tm_http_server *s)
{
    int64_t now = tm_clock_wall_ms() / 1000;
    if (now != s->date_s) {
        time_t t = (time_t)now;
        struct tm parts;
        gmtime_r(&t, &parts);
        strftime(s->date, sizeof(s->date), "%a, %d %b %Y %H:%M:%S GMT", &parts);
        s->date_s = now;
    }
    return s->date;
}

/* ---- accepting ---------------------------------------------------------------------------------------- */

static void start_tick(tm_http_server *s)
{
    if (s->tick_on)
        return;
    int64_t ms = TICK_MS_MAX;
    const int64_t timeouts[] = {s->opts.header_timeout_ms, s->opts.idle_timeout_ms,
                                s->opts.write_timeout_ms, s->opts.body_grace_ms};
    for (size_t i = 0; i < TM_ARRAY_LEN(timeouts); i++)
        ms = TM_MIN(ms, TM_MAX(timeouts[i] / 4, TICK_MS_MIN));
    struct timeval tv = {.tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000};
    s->tick_on = event_add(s->ev_tick, &tv) == 0;
}

static void pause_accept(tm_http_server *s)
{
    if (s->accept_paused || !s->ev_listen)
        return;
    event_del(s->ev_listen);
    s->accept_paused = true;
}

void tm_http_server_look_for_more(tm_http_server *s)
{
    if (s->accept_paused && s->ev_listen && !s->accept_retry_ms)
        s->accept_paused = event_add(s->ev_listen, NULL) != 0;
}

static void name_peer(const struct sockaddr_storage *addr, char *out, size_t size)
{
    char host[INET6_ADDRSTRLEN] = "";
    if (addr->ss_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)addr;
        inet_ntop(AF_INET6, &in6->sin6_addr, host, sizeof(host));
        snprintf(out, size, "[%s]:%d", host, ntohs(in6->sin6_port));
    } else {
        const struct sockaddr_in *in = (const struct sockaddr_in *)addr;
        inet_ntop(AF_INET, &in->sin_addr, host, sizeof(host));
        snprintf(out, size, "%s:%d", host, ntohs(in->sin_port));
    }
}

static bool out_of_resources(int error)
{
    return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

/* At the cap, a connection that waits between requests gives way to one that has something to say. A new one
 * that has not spoken yet is left a moment to do so. */
static bool evict_idle(tm_http_server *s)
{
    int64_t now = tm_clock_ms();
    tm_http_conn *c, *oldest = NULL;
    TAILQ_FOREACH(c, &s->conns, all)
    {
        bool may_go = c->state == TM_CONN_IDLE && (c->served || now - c->idle_since_ms >= FRESH_MS);
        if (may_go && (!oldest || c->idle_since_ms < oldest->idle_since_ms))
            oldest = c;
    }
    if (oldest)
        tm_http_conn_destroy(oldest);
    return oldest != NULL;
}

static void warn_accept(tm_http_server *s, int error)
{
    int64_t now = tm_clock_ms();
    if (s->accept_warned_ms && now - s->accept_warned_ms < WARN_EVERY_MS)
        return;
    s->accept_warned_ms = now;
    tm_log(TM_LOG_WARN, "http_accept", "port %d: %s; trying again every %d ms", s->port,
           strerror(error), ACCEPT_RETRY_MS);
}

static void on_accept(evutil_socket_t fd, short what, void *arg)
{
    tm_http_server *s = arg;
    (void)what;
    for (int i = 0; i < ACCEPTS_PER_TURN; i++) {
        if (s->conn_count >= s->opts.connections_max && !evict_idle(s)) {
            pause_accept(s);
            return;
        }
        struct sockaddr_storage addr;
        socklen_t addr_len = sizeof(addr);
        int conn = accept4(fd, (struct sockaddr *)&addr, &addr_len, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (conn < 0) {
            if (out_of_resources(errno)) {
                warn_accept(s, errno);
                pause_accept(s);
                evict_idle(s);
                s->accept_retry_ms = tm_clock_ms() + ACCEPT_RETRY_MS;
                start_tick(s);
            }
            return; /* EAGAIN, or a client that left before it was accepted: the event comes again */
        }
        char peer[64];
        name_peer(&addr, peer, sizeof(peer));
        tm_http_conn_open(s, conn, peer);
        start_tick(s);
    }
}

/* ---- turns and ticks ---------------------------------------------------------------------------------- */

static void on_flush(evutil_socket_t fd, short what, void *arg)
{
    tm_http_server *s = arg;
    (void)fd, (void)what;
    /* Connections that become dirty meanwhile wait for the next pass: one bounded round. */
    struct tm_http_conn_list round;
    TAILQ_INIT(&round);
    TAILQ_CONCAT(&round, &s->dirty, dirty_link);
    tm_http_conn *c;
    while ((c = TAILQ_FIRST(&round))) {
        TAILQ_REMOVE(&round, c, dirty_link);
        c->dirty = false;
        tm_http_conn_flush(c);
    }
}

static void on_tick(evutil_socket_t fd, short what, void *arg)
{
    tm_http_server *s = arg;
    int64_t now = tm_clock_ms();
    (void)fd, (void)what;
    tm_http_conn *c, *next;
    for (c = TAILQ_FIRST(&s->conns); c; c = next) {
        next = TAILQ_NEXT(c, all);
        tm_http_conn_check(c, now);
    }
    if (s->accept_retry_ms && now >= s->accept_retry_ms)
        s->accept_retry_ms = 0;
    /* Also at the cap: a connection may have become old enough to give way. */
    tm_http_server_look_for_more(s);
    if (s->conn_count == 0 && !s->accept_retry_ms) {
        event_del(s->ev_tick);
        s->tick_on = false;
    }
}

/* ---- life --------------------------------------------------------------------------------------------- */

static int open_listener(const struct addrinfo *ai, const tm_http_opts *o)
{
    int on = 1, off = 0;
    int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (o->reuse_port)
        setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on));
    if (ai->ai_family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
    if (bind(fd, ai->ai_addr, ai->ai_addrlen) == 0 && listen(fd, o->backlog) == 0)
        return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

static tm_status listen_on(tm_http_server *s, tm_err *err)
{
    const tm_http_opts *o = &s->opts;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *list = NULL;
    char port[16];
    snprintf(port, sizeof(port), "%d", o->port);
    int rc = getaddrinfo(o->host && *o->host ? o->host : NULL, port, &hints, &list);
    if (rc)
        return TM_FAIL(err, TM_STATUS_CONFIG, "cannot listen on host %s: %s", o->host,
                       gai_strerror(rc));
    int fd = -1;
    for (const struct addrinfo *ai = list; ai && fd < 0; ai = ai->ai_next)
        fd = open_listener(ai, o);
    int error = errno;
    freeaddrinfo(list);
    if (fd < 0)
        return TM_FAIL(err, TM_STATUS_IO, "cannot listen on %s port %d: %s",
                       o->host ? o->host : "*", o->port, strerror(error));
    struct sockaddr_storage addr;
    socklen_t len = sizeof(addr);
    getsockname(fd, (struct sockaddr *)&addr, &len);
    s->port = ntohs(addr.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&addr)->sin6_port
                                               : ((struct sockaddr_in *)&addr)->sin_port);
    s->listen_fd = fd;
    return TM_OK;
}

static tm_status check_opts(const tm_http_opts *o, tm_err *err)
{
    if (o->route_count < 0 || (o->route_count && !o->routes))
        return TM_FAIL(err, TM_STATUS_INVALID, "http: routes are missing");
    for (int i = 0; i < o->route_count; i++) {
        const tm_http_route *r = &o->routes[i];
        const char *star = r->path ? strchr(r->path, '*') : NULL;
        if (!r->method || !r->path || !*r->path || !r->handler || (star && star[1]))
            return TM_FAIL(err, TM_STATUS_INVALID, "http: route %d is malformed", i);
    }
    if (!o->header_line_max || !o->header_bytes_max || o->header_count_max < 1 ||
        o->connections_max < 1 || !o->stream_buffer_max || o->header_timeout_ms < 1 ||
        o->idle_timeout_ms < 1 || o->write_timeout_ms < 1 || o->body_grace_ms < 1)
        return TM_FAIL(err, TM_STATUS_INVALID, "http: a limit or timeout is not positive");
    if (!o->tls_cert_file != !o->tls_key_file)
        return TM_FAIL(err, TM_STATUS_CONFIG, "http: a TLS certificate and its key go together");
    return TM_OK;
}

static tm_status set_up_tls(tm_http_server *s, tm_err *err)
{
    const tm_http_opts *o = &s->opts;
    if (!o->tls_cert_file)
        return TM_OK;
    s->tls_cert_file = strdup(o->tls_cert_file);
    s->tls_key_file = strdup(o->tls_key_file);
    s->plain_scratch = malloc(TM_HTTP_SCRATCH_BYTES);
    if (!s->tls_cert_file || !s->tls_key_file || !s->plain_scratch)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "http: out of memory");
    return tm_http_server_reload_tls(s, err);
}

tm_status tm_http_server_reload_tls(tm_http_server *s, tm_err *err)
{
    tm_http_tls_ctx *fresh = NULL;
    if (!s->tls_cert_file)
        return TM_OK;
    TM_TRY(tm_http_tls_ctx_create(&fresh, s->tls_cert_file, s->tls_key_file, err));
    tm_http_tls_ctx_destroy(s->tls_ctx);
    s->tls_ctx = fresh;
    return TM_OK;
}

tm_status tm_http_server_create(tm_http_server **out, struct event_base *base,
                                const tm_http_opts *opts, tm_err *err)
{
    TM_TRY(check_opts(opts, err));
    tm_status st;
    tm_http_server *s = calloc(1, sizeof(*s));
    if (!s)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "http: out of memory");
    s->base = base;
    s->opts = *opts;
    s->limits = (tm_http_limits){opts->header_line_max, opts->header_bytes_max, opts->body_max,
                                 opts->header_count_max};
    s->listen_fd = -1;
    TAILQ_INIT(&s->conns);
    TAILQ_INIT(&s->dirty);
    s->server_name = opts->server_name ? strdup(opts->server_name) : NULL;
    s->scratch = malloc(TM_HTTP_SCRATCH_BYTES);
    TM_TRY_GOTO(set_up_tls(s, err), err_destroy);
    TM_TRY_GOTO(listen_on(s, err), err_destroy);
    s->ev_listen = event_new(base, s->listen_fd, EV_READ | EV_PERSIST, on_accept, s);
    s->ev_tick = event_new(base, -1, EV_PERSIST, on_tick, s);
    s->ev_flush = event_new(base, -1, 0, on_flush, s);
    if (!s->scratch || !s->ev_listen || !s->ev_tick || !s->ev_flush ||
        (opts->server_name && !s->server_name) || event_add(s->ev_listen, NULL) != 0) {
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "http: out of memory");
        goto err_destroy;
    }
    *out = s;
    return TM_OK;

err_destroy:
    tm_http_server_destroy(s);
    return st;
}

int tm_http_server_port(const tm_http_server *s)
{
    return s->port;
}

static void close_listener(tm_http_server *s)
{
    if (s->ev_listen)
        event_free(s->ev_listen);
    s->ev_listen = NULL;
    if (s->listen_fd >= 0)
        close(s->listen_fd);
    s->listen_fd = -1;
}

void tm_http_server_drain(tm_http_server *s)
{
    if (s->draining)
        return;
    s->draining = true;
    close_listener(s);
    tm_http_conn *c, *next;
    for (c = TAILQ_FIRST(&s->conns); c; c = next) {
        next = TAILQ_NEXT(c, all);
        if (c->state == TM_CONN_IDLE)
            tm_http_conn_destroy(c);
    }
}

int tm_http_server_active(const tm_http_server *s)
{
    return s->active;
}

int tm_http_server_connections(const tm_http_server *s)
{
    return s->conn_count;
}

void tm_http_server_destroy(tm_http_server *s)
{
    if (!s)
        return;
    close_listener(s);
    tm_http_conn *c;
    while ((c = TAILQ_FIRST(&s->conns)))
        tm_http_conn_destroy(c);
    if (s->ev_tick)
        event_free(s->ev_tick);
    if (s->ev_flush)
        event_free(s->ev_flush);
    tm_http_tls_ctx_destroy(s->tls_ctx);
    free(s->tls_cert_file);
    free(s->tls_key_file);
    free(s->plain_scratch);
    free(s->server_name);
    free(s->scratch);
    free(s);
}
