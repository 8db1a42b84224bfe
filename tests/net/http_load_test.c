/* Many streams at once through the client: every byte arrives in order, memory per open stream stays small,
 * and the client's own ways to end are reported as promised. */
#include <malloc.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"
#include "tests/net/http_fixture.h"

enum { STREAMS_MAX = 2000, EVENTS = 20 };

typedef struct reader {
    tm_http_call *call;
    int status, ended;
    tm_status end_status;
    size_t bytes;
    uint32_t sum;
    int *headers_seen;
    int *ends_seen;
    bool cancel_on_data;
} reader;

static void on_headers(void *user, tm_http_call *call, int status)
{
    reader *r = user;
    r->status = status;
    assert_non_null(tm_http_call_header(call, "CONTENT-TYPE"));
    if (r->headers_seen)
        ++*r->headers_seen;
}

static void on_data(void *user, tm_http_call *call, const char *data, size_t len)
{
    reader *r = user;
    for (size_t i = 0; i < len; i++)
        r->sum = r->sum * 31 + (unsigned char)data[i];
    r->bytes += len;
    if (r->cancel_on_data) {
        r->call = NULL;
        tm_http_call_cancel(call);
    }
}

static void on_end(void *user, tm_http_call *call, tm_status st, const tm_err *err)
{
    reader *r = user;
    (void)call, (void)err;
    r->ended++;
    r->end_status = st;
    r->call = NULL;
    if (r->ends_seen)
        ++*r->ends_seen;
}

static void start_call(reader *r, fixture *f, const char *target, int port)
{
    tm_http_call_opts o = tm_http_call_opts_default();
    tm_err err = TM_ERR_INIT;
    o.host = "127.0.0.1";
    o.port = port ? port : tm_http_server_port(f->server);
    o.target = target;
    o.user = r;
    o.on_headers = on_headers;
    o.on_data = on_data;
    o.on_end = on_end;
    assert_int_equal(tm_http_call_start(&r->call, f->base, &o, &err), TM_OK);
}

static size_t heap_bytes(void)
{
    return mallinfo2().uordblks;
}

/* Two sockets per stream and some for the rest. */
static int stream_count(void)
{
    struct rlimit lim;
    getrlimit(RLIMIT_NOFILE, &lim);
    lim.rlim_cur = lim.rlim_max;
    setrlimit(RLIMIT_NOFILE, &lim);
    int n = lim.rlim_cur == RLIM_INFINITY ? STREAMS_MAX
                                          : (int)TM_MIN((lim.rlim_cur - 100) / 2, STREAMS_MAX);
    if (n < STREAMS_MAX)
        print_message("only %d streams: the limit of open files is %ld\n", n, (long)lim.rlim_cur);
    return n;
}

static void test_many_streams(void **state)
{
    (void)state;
    int n = stream_count();
    fixture *f = malloc(sizeof(*f));
    fixture_start(f, NULL);
    reader *readers = calloc((size_t)n, sizeof(*readers));
    int headers_seen = 0, ends_seen = 0;
    size_t before = heap_bytes();
    for (int i = 0; i < n; i++) {
        readers[i].headers_seen = &headers_seen;
        readers[i].ends_seen = &ends_seen;
        start_call(&readers[i], f, "/stream", 0);
        if (i % 100 == 99)
            pump(f, 1);
    }
    pump_until(f, &headers_seen, n);
    assert_int_equal(f->held_count, n);
    size_t per_stream = (heap_bytes() - before) / (size_t)n;
    print_message("%d open streams: %zu bytes each, server and client side together\n", n,
                  per_stream);
    assert_true(per_stream < 20000);

    uint32_t sum = 0;
    size_t bytes = 0;
    int64_t start = tm_clock_ns();
    for (int e = 0; e < EVENTS; e++) {
        char event[64];
        int len = snprintf(event, sizeof(event), "data: {\"token\": %d}\n\n", e);
        for (int i = 0; i < len; i++)
            sum = sum * 31 + (unsigned char)event[i];
        bytes += (size_t)len;
        for (int i = 0; i < n; i++)
            assert_int_equal(tm_http_stream_write(f->held[i], event, (size_t)len), TM_OK);
        pump(f, 0);
    }
    for (int i = 0; i < n; i++)
        tm_http_stream_end(f->held[i]);
    pump_until(f, &ends_seen, n);
    print_message("%d events in %.1f ms\n", n * EVENTS, (double)(tm_clock_ns() - start) / 1e6);
    for (int i = 0; i < n; i++) {
        assert_int_equal(readers[i].end_status, TM_OK);
        assert_int_equal(readers[i].ended, 1);
        assert_int_equal(readers[i].bytes, bytes);
        assert_int_equal(readers[i].sum, sum);
    }
    pump(f, 20);
    assert_int_equal(tm_http_server_connections(f->server), 0);
    assert_int_equal(f->gone_count, 0);
    fixture_stop(f);
    free(f);
    free(readers);
}

static void test_client_endings(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    int ends = 0;
    reader r = {.ends_seen = &ends};
    start_call(&r, &f, "/hello", 0);
    pump_until(&f, &ends, 1);
    assert_int_equal(r.end_status, TM_OK);
    assert_int_equal(r.status, 200);
    assert_int_equal(r.bytes, 5);

    /* cut in the middle */
    r = (reader){.ends_seen = &ends};
    start_call(&r, &f, "/stream", 0);
    pump_until(&f, &f.held_count, 1);
    tm_http_stream_write(f.held[0], "abc", 3);
    pump(&f, 5);
    tm_http_stream_abort(f.held[0]);
    pump_until(&f, &ends, 2);
    assert_int_equal(r.end_status, TM_STATUS_CLOSED);
    assert_int_equal(r.bytes, 3);

    /* cancelled inside a callback: no end is reported, the server sees the client leave */
    r = (reader){.ends_seen = &ends, .cancel_on_data = true};
    start_call(&r, &f, "/stream", 0);
    pump_until(&f, &f.held_count, 2);
    tm_http_stream_write(f.held[1], "abc", 3);
    pump_until(&f, &f.gone_count, 1);
    assert_int_equal(ends, 2);
    assert_null(r.call);

    /* nobody listens */
    tm_http_server *other;
    tm_http_opts o = fixture_opts(&f);
    assert_int_equal(tm_http_server_create(&other, f.base, &o, NULL), TM_OK);
    int port = tm_http_server_port(other);
    tm_http_server_destroy(other);
    r = (reader){.ends_seen = &ends};
    start_call(&r, &f, "/hello", port);
    pump_until(&f, &ends, 3);
    assert_int_equal(r.end_status, TM_STATUS_UNAVAILABLE);
    fixture_stop(&f);
}

/* A paused client makes the server's queue grow; resuming empties it. */
static void test_client_pause(void **state)
{
    (void)state;
    fixture f;
    fixture_start(&f, NULL);
    int ends = 0;
    reader r = {.ends_seen = &ends};
    start_call(&r, &f, "/stream", 0);
    pump_until(&f, &f.held_count, 1);
    pump(&f, 5);
    tm_http_call_pause(r.call, true);
    size_t bytes = 0;
    char *event = calloc(1, 65536);
    while (tm_http_stream_write(f.held[0], event, 65536) == TM_OK) {
        bytes += 65536;
        assert_true(bytes < 100u << 20);
        pump(&f, 0);
    }
    bytes += 65536;
    free(event);
    size_t seen = r.bytes;
    pump(&f, 20);
    assert_int_equal(r.bytes, seen);
    tm_http_call_pause(r.call, false);
    pump_until(&f, &f.drain_count, 1);
    tm_http_stream_end(f.held[0]);
    pump_until(&f, &ends, 1);
    assert_int_equal(r.bytes, bytes);
    fixture_stop(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_many_streams),
        cmocka_unit_test(test_client_endings),
        cmocka_unit_test(test_client_pause),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
