/* RPC over loopback: unary, streams both ways, limits, every way a call can end, a network that is cut.
 * One service with a method per behaviour; the client side records what its callbacks were told. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/hash.h"
#include "net/rpc/rpc.h"

#define WAIT_MS 20000

/* ---- the service under test ---- */

typedef struct service {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    tm_rpc_call *last; /* of the methods that keep their call */
    int opened, closed, cancelled, half_closed, messages;
    int wrong; /* what must not have happened on the server's thread, where an assertion would end the program */
    bool meta_seen;
    char meta[64];
    int64_t deadline_ms;
} service;

typedef struct held { /* per call */
    service *sv;
    uint8_t *data;
    size_t len;
    bool unsent; /* the answer was refused */
} held;

static bool wait_for(pthread_mutex_t *lock, pthread_cond_t *cond, const int *value, int wanted)
{
    int64_t until = tm_clock_ms() + WAIT_MS;
    pthread_mutex_lock(lock);
    while (*value < wanted && tm_clock_ms() < until) {
        struct timespec ts;
        clock_gettime(CLOCK_REALTIME, &ts);
        ts.tv_nsec += 100000000;
        ts.tv_sec += ts.tv_nsec / 1000000000;
        ts.tv_nsec %= 1000000000;
        pthread_cond_timedwait(cond, lock, &ts);
    }
    bool ok = *value >= wanted;
    pthread_mutex_unlock(lock);
    return ok;
}

static void bump(service *sv, int *counter)
{
    pthread_mutex_lock(&sv->lock);
    (*counter)++;
    pthread_cond_broadcast(&sv->cond);
    pthread_mutex_unlock(&sv->lock);
}

static void *sv_open(void *service_, tm_rpc_call *call)
{
    service *sv = service_;
    held *h = calloc(1, sizeof(*h));
    if (!h)
        abort();
    h->sv = sv;
    const char *meta = tm_rpc_call_metadata(call, "x-test");
    pthread_mutex_lock(&sv->lock);
    sv->last = call;
    sv->meta_seen = meta != NULL;
    if (meta)
        snprintf(sv->meta, sizeof(sv->meta), "%s", meta);
    sv->deadline_ms = tm_rpc_call_deadline_ms(call);
    pthread_mutex_unlock(&sv->lock);
    bump(sv, &sv->opened);
    return h;
}

static void sv_close(void *user, tm_rpc_call *call, bool cancelled)
{
    held *h = user;
    if (tm_rpc_call_send(call, "late", 4) == TM_OK || (h->unsent && !cancelled))
        bump(h->sv, &h->sv->wrong);
    if (cancelled)
        bump(h->sv, &h->sv->cancelled);
    bump(h->sv, &h->sv->closed);
    free(h->data);
    free(h);
}

static void keep_message(void *user, tm_rpc_call *call, const void *data, size_t len)
{
    (void)call;
    held *h = user;
    free(h->data);
    h->data = malloc(len + 1);
    if (!h->data)
        abort();
    memcpy(h->data, data, len);
    h->len = len;
    bump(h->sv, &h->sv->messages);
}

static void unary_answer(void *user, tm_rpc_call *call)
{
    held *h = user;
    h->unsent = tm_rpc_call_send(call, h->data, h->len) != TM_OK;
    tm_rpc_call_finish(call, TM_OK, NULL);
    tm_rpc_call_finish(call, TM_STATUS_INTERNAL, "the first end wins");
    if (tm_rpc_call_send(call, "x", 1) != TM_STATUS_CLOSED)
        bump(h->sv, &h->sv->wrong);
}

static void echo_message(void *user, tm_rpc_call *call, const void *data, size_t len)
{
    held *h = user;
    tm_rpc_call_send(call, data, len);
    bump(h->sv, &h->sv->messages);
}

static void echo_end(void *user, tm_rpc_call *call)
{
    held *h = user;
    bump(h->sv, &h->sv->half_closed);
    tm_rpc_call_finish(call, TM_OK, NULL);
}

static void refuse(void *user, tm_rpc_call *call)
{
    (void)user;
    tm_rpc_call_finish(call, TM_STATUS_INVALID, "nope: 17 is not a colour");
}

static void note_half_close(void *user, tm_rpc_call *call)
{
    (void)call;
    held *h = user;
    bump(h->sv, &h->sv->half_closed);
}

static const tm_rpc_method METHODS[] = {
    {"/t.T/Unary", sv_open, keep_message, unary_answer, sv_close},
    {"/t.T/Echo", sv_open, echo_message, echo_end, sv_close},
    {"/t.T/Refuse", sv_open, keep_message, refuse, sv_close},
    {"/t.T/Hold", sv_open, keep_message, note_half_close, sv_close},
};

/* ---- the client's record ----
 * Static wherever a test keeps one: when an assertion leaves the test, the stream still ends into it. */

typedef struct record {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    int ready, messages, closed;
    size_t bytes;
    bool disorder; /* a message that is not the next number */
    bool stop_reading;
    uint8_t digest[32]; /* of the last message */
    tm_status st;
    char text[128];
} record;

static void record_init(record *r)
{
    memset(r, 0, sizeof(*r));
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->cond, NULL);
}

static void rec_ready(void *user)
{
    record *r = user;
    pthread_mutex_lock(&r->lock);
    r->ready++;
    pthread_cond_broadcast(&r->cond);
    pthread_mutex_unlock(&r->lock);
}

static void rec_message(void *user, const void *data, size_t len)
{
    record *r = user;
    pthread_mutex_lock(&r->lock);
    while (r->stop_reading)
        pthread_cond_wait(&r->cond, &r->lock);
    if (len == sizeof(int)) {
        int n;
        memcpy(&n, data, len);
        if (n != r->messages)
            r->disorder = true;
    } else {
        tm_sha256(data, len, r->digest);
    }
    r->messages++;
    r->bytes += len;
    pthread_cond_broadcast(&r->cond);
    pthread_mutex_unlock(&r->lock);
}

static void rec_close(void *user, tm_status st, const char *message)
{
    record *r = user;
    pthread_mutex_lock(&r->lock);
    r->st = st;
    snprintf(r->text, sizeof(r->text), "%s", message);
    r->closed++;
    pthread_cond_broadcast(&r->cond);
    pthread_mutex_unlock(&r->lock);
}

static const tm_rpc_stream_ops REC = {rec_ready, rec_message, rec_close};

#define REC_WAIT(r, field, n) assert_true(wait_for(&(r)->lock, &(r)->cond, &(r)->field, (n)))

/* ---- fixture ---- */

typedef struct fixture {
    service sv;
    tm_rpc_server *server;
    tm_rpc_channel *channel;
    char address[64];
} fixture;

static tm_rpc_server *start_server(service *sv, const char *address, size_t queue_max)
{
    tm_err err = TM_ERR_INIT;
    tm_rpc_server_opts o = {address, METHODS, (int)TM_ARRAY_LEN(METHODS), sv, queue_max};
    tm_rpc_server *s = NULL;
    if (tm_rpc_server_create(&s, &o, &err) != TM_OK)
        fail_msg("%s", err.msg);
    return s;
}

static tm_rpc_channel *connect_to(const char *address)
{
    tm_err err = TM_ERR_INIT;
    tm_rpc_channel *ch = NULL;
    if (tm_rpc_channel_create(&ch, address, &err) != TM_OK)
        fail_msg("%s", err.msg);
    return ch;
}

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof(*f));
    assert_non_null(f);
    pthread_mutex_init(&f->sv.lock, NULL);
    pthread_cond_init(&f->sv.cond, NULL);
    f->server = start_server(&f->sv, "127.0.0.1:0", 0);
    snprintf(f->address, sizeof(f->address), "127.0.0.1:%d", tm_rpc_server_port(f->server));
    f->channel = connect_to(f->address);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    tm_rpc_channel_destroy(f->channel);
    tm_rpc_server_destroy(f->server, 0);
    assert_int_equal(f->sv.opened, f->sv.closed); /* every call ends with exactly one on_close */
    assert_int_equal(f->sv.wrong, 0);
    free(f);
    return 0;
}

static tm_rpc_stream *open_stream(fixture *f, const char *path, int64_t deadline_ms, record *r)
{
    tm_err err = TM_ERR_INIT;
    tm_rpc_stream *s = NULL;
    record_init(r);
    if (tm_rpc_stream_open(&s, f->channel, path, NULL, deadline_ms, &REC, r, &err) != TM_OK)
        fail_msg("%s", err.msg);
    return s;
}

static tm_status unary(fixture *f, const char *path, const void *data, size_t len, void **reply,
                       size_t *reply_len, tm_err *err)
{
    return tm_rpc_unary(f->channel, path, data, len, 10000, reply, reply_len, err);
}

/* ---- tests ---- */

static void test_unary(void **state)
{
    fixture *f = *state;
    tm_err err = TM_ERR_INIT;
    void *reply = NULL;
    size_t len = 0;
    for (int i = 0; i < 100; i++) {
        assert_int_equal(unary(f, "/t.T/Unary", &i, sizeof(i), &reply, &len, &err), TM_OK);
        assert_int_equal(len, sizeof(i));
        assert_memory_equal(reply, &i, sizeof(i));
        free(reply);
    }
    assert_int_equal(unary(f, "/t.T/Unary", "", 0, &reply, &len, &err), TM_OK);
    assert_int_equal(len, 0);
    free(reply);
}

static void test_unary_errors(void **state)
{
    fixture *f = *state;
    tm_err err = TM_ERR_INIT;
    void *reply = NULL;
    size_t len = 0;
    assert_int_equal(unary(f, "/t.T/Refuse", "x", 1, &reply, &len, &err), TM_STATUS_INVALID);
    assert_non_null(strstr(err.msg, "nope: 17 is not a colour"));
    assert_int_equal(unary(f, "/t.T/Nothing", "x", 1, &reply, &len, &err), TM_STATUS_UNSUPPORTED);
    int64_t t = tm_clock_ms();
    assert_int_equal(tm_rpc_unary(f->channel, "/t.T/Hold", "x", 1, 200, &reply, &len, &err),
                     TM_STATUS_TIMEOUT);
    assert_true(tm_clock_ms() - t >= 150);
    assert_null(reply);
}

static void test_no_server(void **state)
{
    (void)state;
    tm_err err = TM_ERR_INIT;
    void *reply = NULL;
    size_t len = 0;
    tm_rpc_channel *ch = connect_to("127.0.0.1:1");
    assert_int_equal(tm_rpc_unary(ch, "/t.T/Unary", "x", 1, 10000, &reply, &len, &err),
                     TM_STATUS_UNAVAILABLE);
    tm_rpc_channel_destroy(ch);
    assert_int_equal(tm_rpc_channel_create(&ch, "", &err), TM_STATUS_INVALID);
}

static void test_address_in_use(void **state)
{
    fixture *f = *state;
    tm_err err = TM_ERR_INIT;
    tm_rpc_server *s = NULL;
    tm_rpc_server_opts o = {f->address, METHODS, (int)TM_ARRAY_LEN(METHODS), &f->sv, 0};
    assert_int_equal(tm_rpc_server_create(&s, &o, &err), TM_STATUS_IO);
    assert_non_null(strstr(err.msg, f->address));
    assert_null(s);
}

static void test_big_messages(void **state)
{
    fixture *f = *state;
    size_t len = (size_t)40 << 20, got = 0;
    uint8_t *data = malloc(len), want[32], have[32];
    assert_non_null(data);
    uint32_t x = 12345;
    for (size_t i = 0; i < len; i++) {
        x = x * 1664525u + 1013904223u;
        data[i] = (uint8_t)(x >> 24);
    }
    tm_err err = TM_ERR_INIT;
    void *reply = NULL;
    assert_int_equal(unary(f, "/t.T/Unary", data, len, &reply, &got, &err), TM_OK);
    assert_int_equal(got, len);
    tm_sha256(data, len, want);
    tm_sha256(reply, got, have);
    assert_memory_equal(want, have, 32);
    free(reply);
    free(data);
    data = calloc(1, ((size_t)64 << 20) + 1);
    assert_non_null(data);
    assert_int_equal(unary(f, "/t.T/Unary", data, ((size_t)64 << 20) + 1, &reply, &got, &err),
                     TM_STATUS_TOO_LARGE);
    free(data);
}

/* A message that is cut off looks to the server like an end without one, whose answer goes nowhere. */
static void test_cancel_before_message(void **state)
{
    enum { CALLS = 2000 };
    fixture *f = *state;
    static record r[CALLS];
    for (int i = 0; i < CALLS; i++) {
        tm_rpc_stream *s = open_stream(f, "/t.T/Unary", 0, &r[i]);
        if (i % 2)
            REC_WAIT(&r[i], ready, 1);
        tm_rpc_stream_cancel(s);
        tm_rpc_stream_release(s);
    }
    for (int i = 0; i < CALLS; i++)
        REC_WAIT(&r[i], closed, 1);
}

static void test_bidi_order(void **state)
{
    enum { N = 10000 };
    fixture *f = *state;
    static record r;
    tm_rpc_stream *s = open_stream(f, "/t.T/Echo", 0, &r);
    for (int i = 0; i < N; i++)
        assert_int_equal(tm_rpc_stream_send(s, &i, sizeof(i)), TM_OK);
    tm_rpc_stream_half_close(s);
    assert_int_equal(tm_rpc_stream_send(s, "x", 1), TM_STATUS_CLOSED);
    REC_WAIT(&r, closed, 1);
    assert_int_equal(r.st, TM_OK);
    assert_int_equal(r.ready, 1);
    assert_int_equal(r.messages, N);
    assert_false(r.disorder);
    assert_int_equal(f->sv.half_closed, 1);
    tm_rpc_stream_cancel(s); /* after the end: no effect */
    tm_rpc_stream_release(s);
}

static void test_many_streams(void **state)
{
    enum { STREAMS = 500, EACH = 20 };
    fixture *f = *state;
    record *r = calloc(STREAMS, sizeof(*r));
    tm_rpc_stream **s = calloc(STREAMS, sizeof(tm_rpc_stream *));
    assert_true(r && s);
    for (int i = 0; i < STREAMS; i++)
        s[i] = open_stream(f, "/t.T/Echo", 0, &r[i]);
    for (int k = 0; k < EACH; k++)
        for (int i = 0; i < STREAMS; i++)
            assert_int_equal(tm_rpc_stream_send(s[i], &k, sizeof(k)), TM_OK);
    for (int i = 0; i < STREAMS; i++)
        tm_rpc_stream_half_close(s[i]);
    for (int i = 0; i < STREAMS; i++) {
        REC_WAIT(&r[i], closed, 1);
        assert_int_equal(r[i].st, TM_OK);
        assert_int_equal(r[i].messages, EACH);
        assert_false(r[i].disorder);
        tm_rpc_stream_release(s[i]);
    }
    free(s);
    free(r);
}

static void test_metadata_and_deadline(void **state)
{
    fixture *f = *state;
    tm_err err = TM_ERR_INIT;
    const char *md[] = {"x-test", "value 1", "x-other", "2", NULL};
    static record r;
    record_init(&r);
    tm_rpc_stream *s = NULL;
    assert_int_equal(tm_rpc_stream_open(&s, f->channel, "/t.T/Echo", md, 5000, &REC, &r, &err),
                     TM_OK);
    REC_WAIT(&r, ready, 1);
    assert_true(wait_for(&f->sv.lock, &f->sv.cond, &f->sv.opened, 1));
    assert_true(f->sv.meta_seen);
    assert_string_equal(f->sv.meta, "value 1");
    assert_in_range(f->sv.deadline_ms, 1, 5200); /* gRPC rounds the time left up when it sends it */
    tm_rpc_stream_cancel(s);
    REC_WAIT(&r, closed, 1);
    tm_rpc_stream_release(s);
    const char *many[2 * 17 + 1] = {NULL};
    for (int i = 0; i < 34; i++)
        many[i] = "k";
    assert_int_equal(tm_rpc_stream_open(&s, f->channel, "/t.T/Echo", many, 0, &REC, &r, &err),
                     TM_STATUS_INVALID);
    s = open_stream(f, "/t.T/Echo", 0, &r);
    /* The headers of the answer leave before on_open runs: ready does not say that the service saw the call. */
    assert_true(wait_for(&f->sv.lock, &f->sv.cond, &f->sv.opened, 2));
    assert_false(f->sv.meta_seen);
    assert_true(f->sv.deadline_ms == INT64_MAX);
    tm_rpc_stream_half_close(s);
    REC_WAIT(&r, closed, 1);
    tm_rpc_stream_release(s);
}

static void test_client_cancel(void **state)
{
    fixture *f = *state;
    static record r;
    tm_rpc_stream *s = open_stream(f, "/t.T/Hold", 0, &r);
    tm_rpc_stream_send(s, "x", 1);
    assert_true(wait_for(&f->sv.lock, &f->sv.cond, &f->sv.messages, 1));
    tm_rpc_stream_cancel(s);
    REC_WAIT(&r, closed, 1);
    assert_int_equal(r.st, TM_STATUS_CANCELLED);
    assert_true(wait_for(&f->sv.lock, &f->sv.cond, &f->sv.closed, 1));
    assert_int_equal(f->sv.cancelled, 1);
    assert_int_equal(tm_rpc_stream_send(s, "x", 1), TM_STATUS_CLOSED);
    tm_rpc_stream_release(s);
}

static void test_server_abort(void **state)
{
    fixture *f = *state;
    static record r;
    tm_rpc_stream *s = open_stream(f, "/t.T/Hold", 0, &r);
    assert_true(wait_for(&f->sv.lock, &f->sv.cond, &f->sv.opened, 1));
    pthread_mutex_lock(&f->sv.lock);
    tm_rpc_call *call = f->sv.last;
    pthread_mutex_unlock(&f->sv.lock);
    tm_rpc_call_abort(call, TM_STATUS_BUSY, "too slow");
    REC_WAIT(&r, closed, 1);
    assert_int_equal(r.st, TM_STATUS_BUSY);
    assert_string_equal(r.text, "too slow");
    assert_true(wait_for(&f->sv.lock, &f->sv.cond, &f->sv.closed, 1));
    tm_rpc_stream_release(s);
}

/* The reader stops; the sender sees BUSY at the bound and nothing grows; an abort drops the queue. */
static void test_queue_bound(void **state)
{
    (void)state;
    enum { BOUND = 1 << 20, PIECE = 64 << 10 };
    fixture f = {0};
    pthread_mutex_init(&f.sv.lock, NULL);
    pthread_cond_init(&f.sv.cond, NULL);
    f.server = start_server(&f.sv, "127.0.0.1:0", BOUND);
    snprintf(f.address, sizeof(f.address), "127.0.0.1:%d", tm_rpc_server_port(f.server));
    f.channel = connect_to(f.address);
    static record r;
    tm_rpc_stream *s = open_stream(&f, "/t.T/Hold", 0, &r);
    REC_WAIT(&r, ready, 1);
    r.stop_reading = true;
    assert_true(wait_for(&f.sv.lock, &f.sv.cond, &f.sv.opened, 1));
    char *piece = calloc(1, PIECE);
    assert_non_null(piece);
    tm_status st = TM_OK;
    int sent = 0, busy = 0;
    /* Flow control and socket buffers take some megabytes before the queue backs up for good. */
    while (busy < 50 && sent < 4000) {
        st = tm_rpc_call_send(f.sv.last, piece, PIECE);
        assert_true(st == TM_OK || st == TM_STATUS_BUSY);
        assert_true(tm_rpc_call_queued(f.sv.last) <= BOUND);
        if (st == TM_OK) {
            sent++;
            busy = 0;
        } else {
            busy++;
            tm_sleep_ms(10);
        }
    }
    assert_int_equal(st, TM_STATUS_BUSY);
    tm_rpc_call_abort(f.sv.last, TM_STATUS_BUSY, "slow");
    pthread_mutex_lock(&r.lock);
    r.stop_reading = false;
    pthread_cond_broadcast(&r.cond);
    pthread_mutex_unlock(&r.lock);
    REC_WAIT(&r, closed, 1);
    assert_true(wait_for(&f.sv.lock, &f.sv.cond, &f.sv.closed, 1));
    tm_rpc_stream_release(s);
    free(piece);
    tm_rpc_channel_destroy(f.channel);
    tm_rpc_server_destroy(f.server, 0);
}

static void test_server_gone_and_back(void **state)
{
    fixture *f = *state;
    static record r;
    tm_rpc_stream *s = open_stream(f, "/t.T/Hold", 0, &r);
    REC_WAIT(&r, ready, 1);
    int64_t t = tm_clock_ms();
    tm_rpc_server_destroy(f->server, 100);
    assert_in_range(tm_clock_ms() - t, 90, 5000); /* the grace was given, then the call was cut */
    REC_WAIT(&r, closed, 1);
    assert_int_not_equal(r.st, TM_OK);
    tm_rpc_stream_release(s);

    f->server = start_server(&f->sv, f->address, 0);
    tm_status st = TM_STATUS_UNAVAILABLE;
    void *reply = NULL;
    size_t len = 0;
    for (int i = 0; i < 50 && st != TM_OK; i++) {
        tm_err err = TM_ERR_INIT;
        st = unary(f, "/t.T/Unary", "again", 5, &reply, &len, &err);
        if (st != TM_OK)
            tm_sleep_ms(100);
    }
    assert_int_equal(st, TM_OK);
    assert_memory_equal(reply, "again", 5);
    free(reply);
}

/* An orderly end: open calls get the grace and finish inside it. */
static void test_server_grace(void **state)
{
    fixture *f = *state;
    static record r;
    tm_rpc_stream *s = open_stream(f, "/t.T/Echo", 0, &r);
    REC_WAIT(&r, ready, 1);
    tm_rpc_stream_send(s, "last words", 10);
    tm_rpc_stream_half_close(s);
    tm_rpc_server_destroy(f->server, 10000);
    REC_WAIT(&r, closed, 1);
    assert_int_equal(r.st, TM_OK);
    assert_int_equal(r.messages, 1);
    tm_rpc_stream_release(s);
    f->server = start_server(&f->sv, f->address, 0);
}

static void test_channel_destroyed_with_streams(void **state)
{
    enum { STREAMS = 20 };
    fixture *f = *state;
    static record r[STREAMS];
    tm_rpc_stream *s[STREAMS];
    for (int i = 0; i < STREAMS; i++)
        s[i] = open_stream(f, "/t.T/Hold", 0, &r[i]);
    REC_WAIT(&r[STREAMS - 1], ready, 1);
    tm_rpc_channel_destroy(f->channel);
    for (int i = 0; i < STREAMS; i++) {
        assert_int_equal(r[i].closed, 1);
        assert_int_equal(r[i].st, TM_STATUS_CANCELLED);
        assert_int_equal(tm_rpc_stream_send(s[i], "x", 1), TM_STATUS_CLOSED);
        tm_rpc_stream_cancel(s[i]);
        tm_rpc_stream_release(s[i]);
    }
    f->channel = connect_to(f->address);
}

/* ---- a relay that can stop forwarding: the network is cut and nobody is told ---- */

typedef struct relay {
    int listener, port, target_port;
    volatile int cut, stop;
    pthread_t thread;
} relay;

static void forward(int from, int to)
{
    char buf[16384];
    ssize_t n = recv(from, buf, sizeof(buf), MSG_DONTWAIT);
    for (ssize_t at = 0; at < n;) {
        ssize_t w = send(to, buf + at, (size_t)(n - at), MSG_NOSIGNAL);
        if (w <= 0)
            return;
        at += w;
    }
}

static void *relay_run(void *arg)
{
    relay *y = arg;
    int a = -1, b = -1;
    while (!y->stop) {
        struct pollfd p[3] = {{y->listener, POLLIN, 0}, {a, POLLIN, 0}, {b, POLLIN, 0}};
        if (y->cut) {
            tm_sleep_ms(20);
            continue;
        }
        poll(p, 3, 20);
        if ((p[0].revents & POLLIN) && a < 0) {
            struct sockaddr_in to = {.sin_family = AF_INET,
                                     .sin_port = htons((uint16_t)y->target_port),
                                     .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
            a = accept(y->listener, NULL, NULL);
            b = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
            if (connect(b, (struct sockaddr *)&to, sizeof(to)) != 0)
                abort();
        }
        if (a >= 0 && p[1].fd >= 0 && (p[1].revents & POLLIN))
            forward(a, b);
        if (b >= 0 && p[2].fd >= 0 && (p[2].revents & POLLIN))
            forward(b, a);
    }
    close(a);
    close(b);
    return NULL;
}

static void relay_start(relay *y, int target_port)
{
    struct sockaddr_in me = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof(me);
    memset(y, 0, sizeof(*y));
    y->target_port = target_port;
    y->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(y->listener, (struct sockaddr *)&me, sizeof(me)), 0);
    assert_int_equal(listen(y->listener, 8), 0);
    getsockname(y->listener, (struct sockaddr *)&me, &len);
    y->port = ntohs(me.sin_port);
    assert_int_equal(pthread_create(&y->thread, NULL, relay_run, y), 0);
}

static void relay_stop(relay *y)
{
    y->stop = 1;
    pthread_join(y->thread, NULL);
    close(y->listener);
}

static void test_network_cut(void **state)
{
    fixture *f = *state;
    relay y;
    relay_start(&y, tm_rpc_server_port(f->server));
    tm_rpc_channel_destroy(f->channel);
    char address[64];
    snprintf(address, sizeof(address), "127.0.0.1:%d", y.port);
    f->channel = connect_to(address);
    static record r;
    tm_rpc_stream *s = open_stream(f, "/t.T/Echo", 0, &r);
    REC_WAIT(&r, ready, 1);
    /* Idle for several ping periods: the server must not answer too_many_pings. */
    tm_sleep_ms(3500);
    assert_int_equal(r.closed, 0);
    int n = 0;
    assert_int_equal(tm_rpc_stream_send(s, &n, sizeof(n)), TM_OK);
    REC_WAIT(&r, messages, 1);
    int64_t t = tm_clock_ms();
    y.cut = 1;
    REC_WAIT(&r, closed, 1);
    int64_t took = tm_clock_ms() - t;
    print_message("cut noticed by the client after %lld ms\n", (long long)took);
    assert_int_equal(r.st, TM_STATUS_UNAVAILABLE);
    assert_in_range(took, 0, 6000);
    assert_true(wait_for(&f->sv.lock, &f->sv.cond, &f->sv.cancelled, 1));
    print_message("cut noticed by the server after %lld ms\n", (long long)(tm_clock_ms() - t));
    tm_rpc_stream_release(s);
    relay_stop(&y);
}

/* Sends from several threads on one stream: all arrive, each thread's own in order. */
typedef struct sending {
    tm_rpc_stream *s;
    int count;
} sending;

static void *send_many(void *arg)
{
    sending *w = arg;
    for (int i = 0; i < w->count; i++)
        if (tm_rpc_stream_send(w->s, "from a thread", 13) != TM_OK)
            return arg;
    return NULL;
}

static void test_threads(void **state)
{
    enum { THREADS = 4, EACH = 2000 };
    fixture *f = *state;
    static record r;
    sending w = {open_stream(f, "/t.T/Echo", 0, &r), EACH};
    pthread_t t[THREADS];
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&t[i], NULL, send_many, &w), 0);
    for (int i = 0; i < THREADS; i++) {
        void *failed = NULL;
        pthread_join(t[i], &failed);
        assert_null(failed);
    }
    tm_rpc_stream_half_close(w.s);
    REC_WAIT(&r, closed, 1);
    assert_int_equal(r.messages, THREADS * EACH);
    tm_rpc_stream_release(w.s);
}

#define CASE(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(test_unary),
        CASE(test_unary_errors),
        cmocka_unit_test(test_no_server),
        CASE(test_address_in_use),
        CASE(test_big_messages),
        CASE(test_cancel_before_message),
        CASE(test_bidi_order),
        CASE(test_many_streams),
        CASE(test_metadata_and_deadline),
        CASE(test_client_cancel),
        CASE(test_server_abort),
        cmocka_unit_test(test_queue_bound),
        CASE(test_server_gone_and_back),
        CASE(test_server_grace),
        CASE(test_channel_destroyed_with_streams),
        CASE(test_network_cut),
        CASE(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
