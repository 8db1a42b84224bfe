/* The server over real sockets: answers, errors before handlers, pipelining, deadlines, back-pressure, clients
 * that leave, caps, drain, streams. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "tests/net/http_fixture.h"

#define HOST "Host: t\r\n"

static int count(const raw *r, const char *text)
{
    int n = 0;
    const char *p = r->in.data, *end = p + r->in.len;
    while (p && (p = memmem(p, (size_t)(end - p), text, strlen(text))) != NULL)
        n++, p++;
    return n;
}

static bool has(const raw *r, const char *text)
{
    return count(r, text) > 0;
}

/* Sends one text on a fresh connection and waits for `until`. */
static void ask(fixture *f, raw *r, const char *text, const char *until)
{
    raw_open(r, f, 0);
    raw_puts(r, f, text);
    if (!raw_wait(r, f, until))
        fail_msg("no \"%s\" after \"%.200s\", got \"%s\"", until, text,
                 r->in.data ? r->in.data : "");
}

static void test_replies(void **state)
{
    (void)state;
    static const struct {
        const char *request, *until, *also, *absent;
    } rows[] = {
        {"GET /hello HTTP/1.1\r\n" HOST "\r\n", "\r\n\r\nhello", "x-test: one\r\n", "bad"},
        {"GET /hello?x HTTP/1.1\r\n" HOST "\r\n", "\r\n\r\nhello", "Connection: keep-alive\r\n",
         "chunked"},
        {"GET /hello HTTP/1.1\r\n" HOST "\r\n", "\r\n\r\nhello", "Server: test\r\n", "close"},
        {"GET /hello HTTP/1.1\r\n" HOST "\r\n", "\r\n\r\nhello", " GMT\r\n", "close"},
        {"GET /hello HTTP/1.1\r\nConnection: close\r\n" HOST "\r\n", "\r\n\r\nhello",
         "Connection: close\r\n", "keep-alive"},
        {"GET /hello HTTP/1.0\r\n\r\n", "\r\n\r\nhello", "Connection: close\r\n", "keep-alive"},
        {"HEAD /hello HTTP/1.1\r\n" HOST "\r\n", "\r\n\r\n", "Content-Length: 5\r\n", "hello"},
        {"POST /echo HTTP/1.1\r\nContent-Length: 3\r\n" HOST "\r\nabc", "\r\n\r\nabc", " 200 OK",
         "X"},
        {"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" HOST
         "\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
         "\r\n\r\nabc", "Content-Length: 3\r\n", "X"},
        {"GET /rest/a%2Fb%20c HTTP/1.1\r\n" HOST "\r\n", "\r\n\r\na/b c", " 200 ", "X"},
        {"GET /rest/ HTTP/1.1\r\n" HOST "\r\n", "Content-Length: 0\r\n", " 200 ", "X"},
        {"GET /rest/exact HTTP/1.1\r\n" HOST "\r\n", "\r\n\r\n127.0.0.1:", " 200 ", "X"},
        {"GET /query?a=%7Bb+c HTTP/1.1\r\n" HOST "\r\n", "\r\n\r\n{b c", " 200 ", "X"},
        {"OPTIONS /anything HTTP/1.1\r\n" HOST "\r\n", "\r\n\r\nhello", " 200 ", "bad"},
        {"GET http://t/hello HTTP/1.1\r\n" HOST "\r\n", "\r\n\r\nhello", " 200 ", "bad"},
        {"GET /nothing HTTP/1.1\r\n" HOST "\r\n", "{\"error\":{\"code\":404}}", " 404 Not Found",
         "Allow"},
        {"GET /rest%2Fexact HTTP/1.1\r\n" HOST "\r\n", "404}", " 404 ", "X"},
        {"GET //hello HTTP/1.1\r\n" HOST "\r\n", "404}", " 404 ", "X"},
        {"DELETE /hello HTTP/1.1\r\n" HOST "\r\n", "405}", "Allow: GET, HEAD, OPTIONS\r\n", "X"},
        {"DELETE /hold HTTP/1.1\r\n" HOST "\r\n", "405}", "Allow: GET, HEAD, POST, OPTIONS\r\n",
         "X"},
        {"get /hello HTTP/1.1\r\n" HOST "\r\n", "405}", " 405 ", "X"},
        {"GET /rest/a HTTP/1.1\r\nx-deny: 1\r\n" HOST "\r\n", "\r\n\r\nno", " 401 Unauthorized",
         "close"},
        {"GET /hello HTTP/1.1\r\nx-deny: 1\r\n" HOST "\r\n", "\r\n\r\nhello", " 200 ", "bad"},
    };
    fixture f;
    fixture_start(&f, NULL);
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        raw r;
        ask(&f, &r, rows[i].request, rows[i].until);
        pump(&f, 2);
        raw_poll(&r);
        if (!has(&r, rows[i].also) || has(&r, rows[i].absent) || count(&r, "HTTP/1.1 ") != 1)
            fail_msg("row %zu: %s", i, r.in.data);
        raw_close(&r);
    }
    pump(&f, 5);
    assert_int_equal(f.done_count, TM_ARRAY_LEN(rows));
    assert_int_equal(tm_http_server_active(f.server), 0);
    assert_int_equal(tm_http_server_connections(f.server), 0);
    fixture_stop(&f);
}

/* What is ambiguous or over a limit gets its status, a JSON body, and the connection is closed. */
static void test_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *request;
        int status;
    } rows[] = {
        {"GET / HTTP/1.1\r\n\r\n", 400},
        {"GET /hello HTTP/1.1\r\n" HOST "X: a\n\r\n", 400},
        {"POST /echo HTTP/1.1\r\n" HOST "Content-Length: 1\r\nContent-Length: 1\r\n\r\na", 400},
        {"POST /echo HTTP/1.1\r\n" HOST
         "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
         400},
        {"POST /echo HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400},
        {"POST /echo HTTP/1.1\r\n" HOST "Content-Encoding: gzip\r\nContent-Length: 1\r\n\r\na",
         415},
        {"POST /echo HTTP/1.1\r\n" HOST "Content-Length: 99999999999\r\n\r\n", 413},
        {"POST /echo HTTP/1.1\r\n" HOST "Expect: nothing\r\n\r\n", 417},
        {"GET /hello HTTP/3.0\r\n" HOST "\r\n", 505},
        {"\x16\x03\x01", 400},
    };
    fixture f;
    fixture_start(&f, NULL);
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        raw r;
        char body[64];
        snprintf(body, sizeof(body), "{\"error\":{\"code\":%d}}", rows[i].status);
        ask(&f, &r, rows[i].request, body);
        assert_int_equal(raw_status(&r), rows[i].status);
        assert_true(has(&r, "Connection: close\r\n"));
        assert_true(has(&r, "Content-Type: application/json\r\n"));
        /* A second request behind the refused one is never read as one. */
        raw_puts(&r, &f, "GET /hello HTTP/1.1\r\n" HOST "\r\n");
        assert_true(raw_wait_closed(&r, &f, 1000));
        assert_int_equal(count(&r, "HTTP/1.1 "), 1);
        raw_close(&r);
    }
    assert_int_equal(f.handled, 0);
    fixture_stop(&f);
}

static void test_long_lines(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    char *text = malloc(1 << 20);
    memset(text, 'a', 1 << 20);
    memcpy(text, "GET /", 5);
    raw r;
    raw_open(&r, &f, 0);
    raw_send(&r, &f, text, 1 << 20);
    assert_true(raw_wait(&r, &f, "414}"));
    raw_close(&r);
    static const char start[] = "GET /hello HTTP/1.1\r\n" HOST "X: ";
    memcpy(text, start, sizeof(start) - 1);
    raw_open(&r, &f, 0);
    raw_send(&r, &f, text, 1 << 20);
    assert_true(raw_wait(&r, &f, "431}"));
    raw_close(&r);
    free(text);
    fixture_stop(&f);
}

static void test_fragments(void **state)
{
    (void)state;
    static const char text[] = "POST /echo HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked\r\n\r\n"
                               "3\r\nabc\r\n0\r\n\r\n";
    fixture f;
    fixture_start(&f, NULL);
    raw r;
    raw_open(&r, &f, 0);
    for (int round = 1; round <= 3; round++) {
        for (size_t i = 0; i + 1 < sizeof(text); i++) {
            raw_send(&r, &f, text + i, 1);
            pump(&f, 0);
        }
        int64_t end = tm_clock_ms() + 2000;
        while (count(&r, "\r\n\r\nabc") < round && tm_clock_ms() < end) {
            pump(&f, 1);
            raw_poll(&r);
        }
        assert_int_equal(count(&r, "\r\n\r\nabc"), round);
    }
    raw_close(&r);
    fixture_stop(&f);
}

static void test_pipelining(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    tm_buf b;
    tm_buf_init(&b, 0);
    enum { N = 1000 };
    for (int i = 0; i < N; i++)
        tm_buf_printf(&b, "GET /rest/n%04d HTTP/1.1\r\n" HOST "\r\n", i);
    raw r;
    raw_open(&r, &f, 0);
    raw_send(&r, &f, b.data, b.len);
    assert_true(raw_wait(&r, &f, "n0999"));
    assert_int_equal(count(&r, "HTTP/1.1 200"), N);
    /* in order */
    const char *at = r.in.data;
    for (int i = 0; i < N; i++) {
        char tag[8];
        snprintf(tag, sizeof(tag), "n%04d", i);
        at = memmem(at, (size_t)(r.in.data + r.in.len - at), tag, 5);
        assert_non_null(at);
    }
    raw_close(&r);
    tm_buf_deinit(&b);
    fixture_stop(&f);
}

/* Serial: the second request waits for the first answer; its sender is still seen leaving. */
static void test_pipelined_behind_pending(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    raw r;
    raw_open(&r, &f, 0);
    raw_puts(&r, &f, "GET /hold HTTP/1.1\r\n" HOST "\r\nGET /hello HTTP/1.1\r\n" HOST "\r\n");
    pump_until(&f, &f.held_count, 1);
    pump(&f, 20);
    assert_int_equal(f.handled, 0);
    tm_http_reply(f.held[0], 200, "text/plain", "first", 5);
    assert_true(raw_wait(&r, &f, "hello"));
    assert_true(has(&r, "first"));
    raw_puts(&r, &f, "GET /hold HTTP/1.1\r\n" HOST "\r\nGET /hello HTTP/1.1\r\n" HOST "\r\n");
    pump_until(&f, &f.held_count, 2);
    raw_close(&r);
    pump_until(&f, &f.gone_count, 1);
    assert_int_equal(f.last_status, 499);
    fixture_stop(&f);
}

static void test_expect_continue(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    raw r;
    ask(&f, &r, "POST /echo HTTP/1.1\r\n" HOST "Expect: 100-continue\r\nContent-Length: 3\r\n\r\n",
        "HTTP/1.1 100 Continue\r\n\r\n");
    raw_puts(&r, &f, "abc");
    assert_true(raw_wait(&r, &f, "\r\n\r\nabc"));
    raw_close(&r);
    /* Refused before the body: no 100, and the connection ends because the body may or may not follow. */
    ask(&f, &r,
        "POST /echo HTTP/1.1\r\n" HOST
        "x-deny: 1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n",
        "\r\n\r\nno");
    assert_int_equal(raw_status(&r), 401);
    assert_true(has(&r, "Connection: close"));
    raw_close(&r);
    fixture_stop(&f);
}

/* An early answer with a short body on its way keeps the connection; with a long one it closes it. */
static void test_early_answer(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    raw r;
    ask(&f, &r, "POST /echo HTTP/1.1\r\n" HOST "x-deny: 1\r\nContent-Length: 10\r\n\r\n01234",
        "no");
    raw_puts(&r, &f, "56789GET /hello HTTP/1.1\r\n" HOST "\r\n");
    assert_true(raw_wait(&r, &f, "hello"));
    raw_close(&r);
    ask(&f, &r, "POST /echo HTTP/1.1\r\n" HOST "x-deny: 1\r\nContent-Length: 1000000\r\n\r\n01234",
        "no");
    assert_true(has(&r, "Connection: close"));
    char *rest = calloc(1, 999995);
    raw_send(&r, &f, rest, 999995);
    free(rest);
    assert_true(raw_wait_closed(&r, &f, 1000));
    assert_false(r.reset);
    raw_close(&r);
    assert_int_equal(f.handled, 1);
    fixture_stop(&f);
}

static void test_big_body(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    enum { SIZE = 8 << 20 };
    char *body = malloc(SIZE);
    for (size_t i = 0; i < SIZE; i++)
        body[i] = (char)(i * 2654435761u >> 13);
    raw r;
    raw_open(&r, &f, 0);
    char head[128];
    snprintf(head, sizeof(head), "POST /echo HTTP/1.1\r\n" HOST "Content-Length: %d\r\n\r\n", SIZE);
    raw_puts(&r, &f, head);
    raw_send(&r, &f, body, SIZE);
    assert_true(raw_wait(&r, &f, "\r\n\r\n"));
    size_t at = (size_t)((char *)memmem(r.in.data, r.in.len, "\r\n\r\n", 4) - r.in.data) + 4;
    int64_t end = tm_clock_ms() + 10000;
    while (r.in.len < at + SIZE && tm_clock_ms() < end) {
        pump(&f, 0);
        raw_poll(&r);
    }
    assert_int_equal(r.in.len, at + SIZE);
    assert_memory_equal(r.in.data + at, body, SIZE);
    pump(&f, 5);
    assert_int_equal(f.last_sent, at + SIZE);
    free(body);
    raw_close(&r);
    fixture_stop(&f);
}

/* ---- deadlines ---------------------------------------------------------------------------------------- */

static void start_hasty(fixture *f)
{
    tm_http_opts o = fixture_opts(f);
    o.header_timeout_ms = 150;
    o.idle_timeout_ms = 150;
    o.write_timeout_ms = 300;
    o.body_grace_ms = 150;
    fixture_start(f, &o);
}

static void test_deadlines(void **state)
{
    (void)state;
    static const struct {
        const char *bytes;
        int status; /* 0 = closed without a word */
    } rows[] = {
        {"", 0},
        {"GET /hello HT", 408},
        {"GET /hello HTTP/1.1\r\nHo", 408},
        {"POST /echo HTTP/1.1\r\n" HOST "Content-Length: 5\r\n\r\nab", 408},
        {"POST /echo HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked\r\n\r\n5\r\nab", 408},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        fixture f;
        start_hasty(&f);
        raw r;
        raw_open(&r, &f, 0);
        int64_t start = tm_clock_ms();
        raw_puts(&r, &f, rows[i].bytes);
        assert_true(raw_wait_closed(&r, &f, 3000));
        assert_int_equal(raw_status(&r), rows[i].status);
        assert_true(tm_clock_ms() - start >= 140);
        raw_close(&r);
        fixture_stop(&f);
    }
}

static void test_idle_close(void **state)
{
    (void)state;
    fixture f;
    start_hasty(&f);
    raw r;
    ask(&f, &r, "GET /hello HTTP/1.1\r\n" HOST "\r\n", "hello");
    assert_true(raw_wait_closed(&r, &f, 2000));
    assert_int_equal(count(&r, "HTTP/1.1 "), 1);
    raw_close(&r);
    /* A pending answer has no deadline of the connection's. */
    raw_open(&r, &f, 0);
    raw_puts(&r, &f, "GET /hold HTTP/1.1\r\n" HOST "\r\n");
    assert_false(raw_wait_closed(&r, &f, 600));
    tm_http_reply(f.held[0], 200, "text/plain", "done", 4);
    assert_true(raw_wait(&r, &f, "done"));
    raw_close(&r);
    fixture_stop(&f);
}

/* A slow drip that stays under the body rate is cut, one above it is not. */
static void test_body_rate(void **state)
{
    (void)state;
    for (int fast = 0; fast <= 1; fast++) {
        fixture f;
        tm_http_opts o = fixture_opts(&f);
        o.body_grace_ms = 100;
        o.body_rate_min = 1000;
        fixture_start(&f, &o);
        raw r;
        raw_open(&r, &f, 0);
        raw_puts(&r, &f, "POST /echo HTTP/1.1\r\n" HOST "Content-Length: 4000\r\n\r\n");
        char piece[200];
        memset(piece, 'p', sizeof(piece));
        size_t n = fast ? 200 : 4;
        for (size_t sent = 0; sent < 4000 && !r.closed && r.in.len == 0; sent += n) {
            raw_send(&r, &f, piece, n);
            pump(&f, 30);
            raw_poll(&r);
        }
        assert_true(raw_wait(&r, &f, "\r\n\r\n"));
        assert_int_equal(raw_status(&r), fast ? 200 : 408);
        raw_close(&r);
        fixture_stop(&f);
    }
}

/* ---- streams ------------------------------------------------------------------------------------------ */

static void test_stream(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    raw r;
    ask(&f, &r, "GET /stream HTTP/1.1\r\n" HOST "\r\n", "\r\n\r\n");
    assert_true(has(&r, "Transfer-Encoding: chunked\r\n"));
    assert_true(has(&r, "Content-Type: text/event-stream\r\n"));
    assert_true(has(&r, "Cache-Control: no-cache\r\n"));
    tm_buf_clear(&r.in);
    assert_int_equal(tm_http_stream_write(f.held[0], "data: a\n\n", 9), TM_OK);
    assert_int_equal(tm_http_stream_write(f.held[0], "data: bc\n\n", 10), TM_OK);
    assert_true(raw_wait(&r, &f, "bc\n\n\r\n"));
    assert_string_equal(r.in.data, "9\r\ndata: a\n\n\r\na\r\ndata: bc\n\n\r\n");
    assert_int_equal(tm_http_server_active(f.server), 1);
    tm_http_stream_end(f.held[0]);
    assert_true(raw_wait(&r, &f, "0\r\n\r\n"));
    pump(&f, 2);
    assert_int_equal(tm_http_server_active(f.server), 0);
    assert_int_equal(f.last_status, 200);
    assert_int_equal(f.gone_count, 0);
    /* and the connection goes on */
    raw_puts(&r, &f, "GET /hello HTTP/1.1\r\n" HOST "\r\n");
    assert_true(raw_wait(&r, &f, "hello"));
    raw_close(&r);
    fixture_stop(&f);
}

static void test_stream_other_clients(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    raw r;
    /* HTTP/1.0 cannot take chunks: raw bytes, ended by closing. */
    ask(&f, &r, "GET /stream HTTP/1.0\r\n\r\n", "\r\n\r\n");
    assert_false(has(&r, "chunked"));
    tm_http_stream_write(f.held[0], "abc", 3);
    tm_http_stream_end(f.held[0]);
    assert_true(raw_wait_closed(&r, &f, 1000));
    assert_true(has(&r, "\r\n\r\nabc") && !r.reset);
    raw_close(&r);
    /* HEAD: the head alone. */
    ask(&f, &r, "HEAD /stream HTTP/1.1\r\n" HOST "\r\n", "\r\n\r\n");
    tm_buf_clear(&r.in);
    assert_int_equal(tm_http_stream_write(f.held[1], "abc", 3), TM_OK);
    tm_http_stream_end(f.held[1]);
    raw_puts(&r, &f, "GET /hello HTTP/1.1\r\n" HOST "\r\n");
    assert_true(raw_wait(&r, &f, "hello"));
    assert_false(has(&r, "abc"));
    raw_close(&r);
    fixture_stop(&f);
}

static void test_stream_abort(void **state)
{
    (void)state;
    for (int minor = 0; minor <= 1; minor++) {
        fixture f;
        fixture_start(&f, NULL);
        raw r;
        char text[64];
        snprintf(text, sizeof(text), "GET /stream HTTP/1.%d\r\n" HOST "\r\n", minor);
        ask(&f, &r, text, "\r\n\r\n");
        tm_http_stream_write(f.held[0], "abc", 3);
        pump(&f, 5);
        tm_http_stream_abort(f.held[0]);
        assert_true(raw_wait_closed(&r, &f, 1000));
        assert_false(has(&r, "0\r\n\r\n"));
        /* An answer without framing must not look whole. */
        assert_int_equal(r.reset, minor == 0);
        assert_int_equal(f.gone_count, 0);
        assert_int_equal(f.done_count, 1);
        raw_close(&r);
        fixture_stop(&f);
    }
}

static void test_client_gone(void **state)
{
    (void)state;
    static const char *const requests[] = {
        "GET /hold HTTP/1.1\r\n" HOST "\r\n",
        "POST /hold HTTP/1.1\r\n" HOST "Content-Length: 3\r\n\r\nabc",
        "GET /stream HTTP/1.1\r\n" HOST "\r\n",
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(requests); i++) {
        for (int reset = 0; reset <= 1; reset++) {
            fixture f;
            fixture_start(&f, NULL);
            raw r;
            raw_open(&r, &f, 0);
            raw_puts(&r, &f, requests[i]);
            pump_until(&f, &f.held_count, 1);
            if (reset) {
                struct linger hard = {1, 0};
                setsockopt(r.fd, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
            }
            raw_close(&r);
            pump_until(&f, &f.done_count, 1);
            assert_int_equal(f.gone_count, 1);
            assert_int_equal(f.last_status, 499);
            assert_int_equal(tm_http_server_active(f.server), 0);
            assert_int_equal(tm_http_server_connections(f.server), 0);
            fixture_stop(&f);
        }
    }
}

/* A client that shuts down only its sending side after the request still gets an answer given at once. */
static void test_half_close(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    raw r;
    raw_open(&r, &f, 0);
    raw_puts(&r, &f, "GET /hello HTTP/1.1\r\n" HOST "\r\nGET /hello HTTP/1.1\r\n" HOST "\r\n");
    shutdown(r.fd, SHUT_WR);
    assert_true(raw_wait_closed(&r, &f, 1000));
    assert_int_equal(count(&r, "\r\n\r\nhello"), 2);
    raw_close(&r);
    fixture_stop(&f);
}

static size_t fill_stream(fixture *f, tm_http_req *req, tm_status stop_at)
{
    char event[1024];
    memset(event, 'e', sizeof(event));
    size_t wrote = 0;
    for (int i = 0; i < 100000; i++) {
        tm_status st = tm_http_stream_write(req, event, sizeof(event));
        if (st == stop_at)
            return wrote;
        wrote += sizeof(event);
        if (i % 16 == 0)
            pump(f, 0);
    }
    fail_msg("the stream never pushed back");
    return 0;
}

static void test_back_pressure(void **state)
{
    (void)state;
    fixture f;
    tm_http_opts o = fixture_opts(&f);
    o.stream_buffer_max = 64 << 10;
    fixture_start(&f, &o);
    raw r;
    raw_open(&r, &f, 4096);
    raw_puts(&r, &f, "GET /stream HTTP/1.1\r\n" HOST "\r\n");
    pump_until(&f, &f.held_count, 1);
    fill_stream(&f, f.held[0], TM_STATUS_BUSY);
    assert_true(tm_http_stream_queued(f.held[0]) > o.stream_buffer_max);
    assert_true(tm_http_stream_queued(f.held[0]) < 2 * o.stream_buffer_max);
    assert_int_equal(f.drain_count, 0);
    int64_t end = tm_clock_ms() + 10000;
    while (f.drain_count == 0 && tm_clock_ms() < end) {
        raw_poll(&r);
        pump(&f, 0);
    }
    assert_int_equal(f.drain_count, 1);
    assert_true(tm_http_stream_queued(f.held[0]) <= o.stream_buffer_max / 2);
    assert_int_equal(tm_http_stream_write(f.held[0], "x", 1), TM_OK);
    /* Whoever writes on in spite of BUSY is cut, and the client's leaving is reported. */
    fill_stream(&f, f.held[0], TM_STATUS_CLOSED);
    pump_until(&f, &f.gone_count, 1);
    raw_close(&r);
    fixture_stop(&f);
}

static void test_write_stall(void **state)
{
    (void)state;
    fixture f;
    start_hasty(&f);
    raw r;
    raw_open(&r, &f, 4096);
    raw_puts(&r, &f, "GET /stream HTTP/1.1\r\n" HOST "\r\n");
    pump_until(&f, &f.held_count, 1);
    fill_stream(&f, f.held[0], TM_STATUS_BUSY);
    int64_t start = tm_clock_ms();
    pump_until(&f, &f.gone_count, 1);
    assert_true(tm_clock_ms() - start < 20000);
    raw_close(&r);
    fixture_stop(&f);
}

/* ---- caps and drain ----------------------------------------------------------------------------------- */

static void test_connection_cap(void **state)
{
    (void)state;
    fixture f;
    tm_http_opts o = fixture_opts(&f);
    o.connections_max = 3;
    fixture_start(&f, &o);
    raw r[5];
    for (int i = 0; i < 5; i++) {
        raw_open(&r[i], &f, 0);
        raw_puts(&r[i], &f, "GET /hold HTTP/1.1\r\n" HOST "\r\n");
    }
    pump_until(&f, &f.held_count, 3);
    pump(&f, 50);
    assert_int_equal(tm_http_server_connections(f.server), 3);
    assert_int_equal(f.held_count, 3);
    /* A waiting one is served as soon as another leaves, or falls idle. */
    raw_close(&r[0]);
    pump_until(&f, &f.held_count, 4);
    tm_http_reply(f.held[1], 200, "text/plain", "done", 4);
    assert_true(raw_wait(&r[1], &f, "done"));
    raw idle;
    raw_open(&idle, &f, 0);
    pump_until(&f, &f.held_count, 5);
    assert_true(raw_wait_closed(&r[1], &f, 1000));
    assert_int_equal(tm_http_server_connections(f.server), 3);
    assert_int_equal(f.gone_count, 1);
    for (int i = 1; i < 5; i++)
        raw_close(&r[i]);
    raw_close(&idle);
    fixture_stop(&f);
}

/* Out of descriptors: nothing breaks, and accepting goes on when there are some again. */
static void test_descriptor_limit(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    raw waiting;
    raw_open(&waiting, &f, 0);
    raw_puts(&waiting, &f, "GET /hello HTTP/1.1\r\n" HOST "\r\n");
    struct rlimit before, tight;
    getrlimit(RLIMIT_NOFILE, &before);
    tight = before;
    tight.rlim_cur = (rlim_t)waiting.fd + 1;
    setrlimit(RLIMIT_NOFILE, &tight);
    pump(&f, 150);
    assert_int_equal(tm_http_server_connections(f.server), 0);
    setrlimit(RLIMIT_NOFILE, &before);
    assert_true(raw_wait(&waiting, &f, "hello"));
    raw_close(&waiting);
    fixture_stop(&f);
}

/* Two servers on one port, as loop threads share it. */
static void test_reuse_port(void **state)
{
    (void)state;
    fixture f, g;
    tm_http_opts o = fixture_opts(&f);
    o.reuse_port = true;
    fixture_start(&f, &o);
    o = fixture_opts(&g);
    o.reuse_port = true;
    o.port = tm_http_server_port(f.server);
    fixture_start(&g, &o);
    int served = 0;
    for (int i = 0; i < 64; i++) {
        raw r;
        raw_open(&r, &f, 0);
        raw_puts(&r, &f, "GET /hello HTTP/1.1\r\n" HOST "\r\n");
        int64_t end = tm_clock_ms() + 2000;
        while (!has(&r, "hello") && tm_clock_ms() < end) {
            pump(&f, 0);
            pump(&g, 0);
            raw_poll(&r);
        }
        served += has(&r, "hello");
        raw_close(&r);
    }
    assert_int_equal(served, 64);
    assert_true(f.handled > 0 && g.handled > 0);
    fixture_stop(&g);
    fixture_stop(&f);
}

static void test_drain(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    raw idle, held, stream, late;
    ask(&f, &idle, "GET /hello HTTP/1.1\r\n" HOST "\r\n", "hello");
    raw_open(&held, &f, 0);
    raw_puts(&held, &f, "GET /hold HTTP/1.1\r\n" HOST "\r\n");
    pump_until(&f, &f.held_count, 1);
    ask(&f, &stream, "GET /stream HTTP/1.1\r\n" HOST "\r\n", "\r\n\r\n");
    raw_open(&late, &f, 0);
    raw_puts(&late, &f, "GET /hello HT");
    pump(&f, 10);
    tm_http_server_drain(f.server);
    assert_true(raw_wait_closed(&idle, &f, 1000));
    assert_int_equal(tm_http_server_active(f.server), 3);
    /* What was begun is answered, and every answer ends its connection. */
    raw_puts(&late, &f, "TP/1.1\r\n" HOST "\r\n");
    assert_true(raw_wait(&late, &f, "hello") && has(&late, "Connection: close"));
    tm_http_reply(f.held[0], 200, "text/plain", "held", 4);
    assert_true(raw_wait(&held, &f, "held") && has(&held, "Connection: close"));
    tm_http_stream_write(f.held[1], "last", 4);
    tm_http_stream_end(f.held[1]);
    assert_true(raw_wait(&stream, &f, "0\r\n\r\n"));
    assert_true(raw_wait_closed(&stream, &f, 1000));
    raw_close(&stream), raw_close(&held), raw_close(&late), raw_close(&idle);
    pump(&f, 10);
    assert_int_equal(tm_http_server_active(f.server), 0);
    assert_int_equal(tm_http_server_connections(f.server), 0);
    assert_int_equal(f.gone_count, 0);
    fixture_stop(&f);
}

static void test_destroy_with_open_requests(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    raw a, b;
    raw_open(&a, &f, 0);
    raw_puts(&a, &f, "GET /hold HTTP/1.1\r\n" HOST "\r\n");
    raw_open(&b, &f, 0);
    raw_puts(&b, &f, "GET /stream HTTP/1.1\r\n" HOST "\r\n");
    pump_until(&f, &f.held_count, 2);
    fixture_stop(&f);
    assert_int_equal(f.gone_count, 2);
    assert_int_equal(f.done_count, 2);
    raw_close(&a), raw_close(&b);
}

static void test_create_errors(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    tm_http_server *s = NULL;
    tm_err err = TM_ERR_INIT;
    tm_http_opts o = fixture_opts(&f);
    o.port = tm_http_server_port(f.server);
    assert_int_equal(tm_http_server_create(&s, f.base, &o, &err), TM_STATUS_IO);
    assert_non_null(strstr(err.msg, "Address already in use"));
    o = fixture_opts(&f);
    o.host = "no such host";
    assert_int_equal(tm_http_server_create(&s, f.base, &o, &err), TM_STATUS_CONFIG);
    o = fixture_opts(&f);
    o.idle_timeout_ms = 0;
    assert_int_equal(tm_http_server_create(&s, f.base, &o, &err), TM_STATUS_INVALID);
    assert_null(s);
    fixture_stop(&f);
}

int main(void)
{
    tm_log_init("http_server_test", TM_LOG_ERROR, TM_LOG_TEXT);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_replies),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_long_lines),
        cmocka_unit_test(test_fragments),
        cmocka_unit_test(test_pipelining),
        cmocka_unit_test(test_pipelined_behind_pending),
        cmocka_unit_test(test_expect_continue),
        cmocka_unit_test(test_early_answer),
        cmocka_unit_test(test_big_body),
        cmocka_unit_test(test_deadlines),
        cmocka_unit_test(test_idle_close),
        cmocka_unit_test(test_body_rate),
        cmocka_unit_test(test_stream),
        cmocka_unit_test(test_stream_other_clients),
        cmocka_unit_test(test_stream_abort),
        cmocka_unit_test(test_client_gone),
        cmocka_unit_test(test_half_close),
        cmocka_unit_test(test_back_pressure),
        cmocka_unit_test(test_write_stall),
        cmocka_unit_test(test_connection_cap),
        cmocka_unit_test(test_descriptor_limit),
        cmocka_unit_test(test_reuse_port),
        cmocka_unit_test(test_drain),
        cmocka_unit_test(test_destroy_with_open_requests),
        cmocka_unit_test(test_create_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
