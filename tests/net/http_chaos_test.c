/* Many clients that do anything at any moment, and handlers that answer, stream, abort or drop at any moment:
 * nothing leaks, nothing is used after it is gone, every request is over exactly once. Meant for the address
 * sanitizer. The order of actions follows from the printed seed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"
#include "tests/net/http_fixture.h"

enum { CLIENTS = 40, STEPS = 20000 };

static const char *const phrases[] = {
    "GET /hello HTTP/1.1\r\nHost: t\r\n\r\n",
    "GET /hold HTTP/1.1\r\nHost: t\r\n\r\n",
    "GET /stream HTTP/1.1\r\nHost: t\r\n\r\n",
    "GET /stream HTTP/1.0\r\n\r\n",
    "HEAD /stream HTTP/1.1\r\nHost: t\r\n\r\n",
    "POST /hold HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nabcde",
    "POST /echo HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "POST /echo HTTP/1.1\r\nHost: t\r\nx-deny: 1\r\nContent-Length: 9\r\n\r\nabcde",
    "POST /echo HTTP/1.1\r\nHost: t\r\nx-deny: 1\r\nContent-Length: 99999\r\n\r\n",
    "POST /echo HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n",
    "abcdefghijk",
    "\r\n",
    "GET /nothing HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n",
    "GET /rest/a HTTP/1.1\r\nHost: t\r\n",
    "X: y\r\n\r\n",
};

static unsigned g_seed;

static int pick(int n)
{
    return rand_r(&g_seed) % n;
}

static void client_acts(raw *r, fixture *f)
{
    char junk[600];
    if (r->fd < 0) {
        raw_open(r, f, pick(4) ? 0 : 2048);
        return;
    }
    switch (pick(10)) {
    case 0:
        raw_close(r);
        return;
    case 1: {
        struct linger hard = {1, 0};
        setsockopt(r->fd, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
        raw_close(r);
        return;
    }
    case 2:
        if (pick(4) == 0)
            shutdown(r->fd, SHUT_WR);
        return;
    case 3:
        memset(junk, "aA0 \r\n"[pick(6)], sizeof(junk));
        (void)!send(r->fd, junk, (size_t)pick(sizeof(junk)), MSG_NOSIGNAL);
        return;
    case 4:
    case 5:
        raw_poll(r);
        tm_buf_clear(&r->in);
        if (r->closed)
            raw_close(r);
        return;
    default: {
        const char *text = phrases[pick((int)TM_ARRAY_LEN(phrases))];
        size_t len = strlen(text);
        size_t from = pick(4) ? 0 : (size_t)pick((int)len);
        size_t n = pick(4) ? len - from : (size_t)pick((int)(len - from) + 1);
        (void)!send(r->fd, text + from, n, MSG_NOSIGNAL);
    }
    }
}

static void handler_acts(fixture *f)
{
    static char data[20000];
    /* Handles of finished requests are forgotten; gone ones were set to NULL by on_gone. */
    int live = 0;
    for (int i = 0; i < f->held_count; i++)
        if (f->held[i])
            f->held[live++] = f->held[i];
    f->held_count = live;
    if (live == 0)
        return;
    int k = pick(live);
    tm_http_req *req = f->held[k];
    bool streaming = tm_http_req_status(req) != 0;
    switch (pick(6)) {
    case 0:
        f->held[k] = NULL;
        tm_http_stream_abort(req);
        return;
    case 1:
        f->held[k] = NULL;
        if (streaming)
            tm_http_stream_end(req);
        else
            tm_http_reply(req, 200, "text/plain", data, (size_t)pick(sizeof(data)));
        return;
    case 2:
        if (!streaming) {
            tm_http_stream_begin(req, 200, "text/plain");
            tm_http_req_drop_body(req);
        }
        return;
    default:
        if (streaming)
            tm_http_stream_write(req, data, (size_t)pick(sizeof(data)));
    }
}

static void test_chaos(void **state)
{
    (void)state;
    fixture *f = malloc(sizeof(*f));
    tm_http_opts o = fixture_opts(f);
    o.stream_buffer_max = 64 << 10;
    o.connections_max = CLIENTS - 8;
    o.header_timeout_ms = 60;
    o.idle_timeout_ms = 80;
    o.body_grace_ms = 60;
    o.write_timeout_ms = 100;
    fixture_start(f, &o);
    raw clients[CLIENTS];
    for (int i = 0; i < CLIENTS; i++) {
        clients[i] = (raw){.fd = -1};
        tm_buf_init(&clients[i].in, 0);
    }
    for (int i = 0; i < STEPS; i++) {
        client_acts(&clients[pick(CLIENTS)], f);
        if (pick(8) == 0)
            handler_acts(f);
        if (pick(3) == 0)
            event_base_loop(f->base, EVLOOP_NONBLOCK);
        if (i % 500 == 0)
            pump(f, 30);
    }
    assert_true(f->done_count > 500);
    print_message("%d requests over, %d clients gone\n", f->done_count, f->gone_count);
    /* Half of the runs end by drain, half by destroying everything as it is. */
    bool drained = pick(2);
    if (drained) {
        tm_http_server_drain(f->server);
        for (int i = 0; i < CLIENTS; i++)
            if (clients[i].fd >= 0)
                raw_close(&clients[i]);
        int64_t end = tm_clock_ms() + 5000;
        while (tm_http_server_connections(f->server) && tm_clock_ms() < end)
            pump(f, 10);
        assert_int_equal(tm_http_server_connections(f->server), 0);
        assert_int_equal(tm_http_server_active(f->server), 0);
    }
    fixture_stop(f);
    for (int i = 0; i < f->held_count; i++)
        assert_null(f->held[i]);
    for (int i = 0; i < CLIENTS; i++)
        if (clients[i].fd >= 0)
            raw_close(&clients[i]);
    free(f);
}

static void test_chaos_1(void **state)
{
    const char *given = getenv("TM_SEED");
    g_seed = given ? (unsigned)strtoul(given, NULL, 10) : (unsigned)tm_clock_ns();
    print_message("seed %u\n", g_seed);
    test_chaos(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_chaos_1),
        cmocka_unit_test(test_chaos),
        cmocka_unit_test(test_chaos),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
