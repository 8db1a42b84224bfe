/* The server over TLS, with OpenSSL's client side in memory: fragments, big bodies, streams, pressure, wrong
 * clients, reload. Certificates are made on the spot. */
#include <malloc.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "tests/net/http_fixture.h"

#define HOST "Host: t\r\n"

static char g_dir[64], g_cert[96], g_key[96];

static void write_pair(long serial, const char *cert_file, const char *key_file)
{
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *x = X509_new();
    assert_non_null(key);
    ASN1_INTEGER_set(X509_get_serialNumber(x), serial);
    X509_gmtime_adj(X509_getm_notBefore(x), -60);
    X509_gmtime_adj(X509_getm_notAfter(x), 86400);
    X509_set_pubkey(x, key);
    X509_NAME *name = X509_get_subject_name(x);
    X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const unsigned char *)"test", -1, -1, 0);
    X509_set_issuer_name(x, name);
    assert_true(X509_sign(x, key, EVP_sha256()) > 0);
    FILE *f = fopen(cert_file, "w");
    PEM_write_X509(f, x);
    fclose(f);
    f = fopen(key_file, "w");
    PEM_write_PrivateKey(f, key, NULL, NULL, 0, NULL, NULL);
    fclose(f);
    X509_free(x);
    EVP_PKEY_free(key);
}

static int make_files(void **state)
{
    (void)state;
    snprintf(g_dir, sizeof(g_dir), "/tmp/tm-tls-test-XXXXXX");
    if (!mkdtemp(g_dir))
        return -1;
    snprintf(g_cert, sizeof(g_cert), "%s/cert.pem", g_dir);
    snprintf(g_key, sizeof(g_key), "%s/key.pem", g_dir);
    write_pair(1, g_cert, g_key);
    return 0;
}

static int remove_files(void **state)
{
    (void)state;
    unlink(g_cert);
    unlink(g_key);
    return rmdir(g_dir);
}

/* ---- the client --------------------------------------------------------------------------------------- */

typedef struct tls_client {
    raw sock;
    SSL_CTX *ctx;
    SSL *ssl;
    BIO *in, *out;
    tm_buf text; /* decrypted */
    size_t taken;
    bool ended, failed, bytewise;
} tls_client;

static void tls_open(tls_client *c, fixture *f, int max_version, const char *alpn, int recv_buffer)
{
    memset(c, 0, sizeof(*c));
    raw_open(&c->sock, f, recv_buffer);
    tm_buf_init(&c->text, 0);
    c->ctx = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_security_level(c->ctx, 0);
    if (max_version)
        SSL_CTX_set_max_proto_version(c->ctx, max_version);
    SSL_CTX_set_min_proto_version(c->ctx, TLS1_VERSION);
    c->ssl = SSL_new(c->ctx);
    c->in = BIO_new(BIO_s_mem());
    c->out = BIO_new(BIO_s_mem());
    SSL_set_bio(c->ssl, c->in, c->out);
    SSL_set_connect_state(c->ssl);
    if (alpn)
        SSL_set_alpn_protos(c->ssl, (const unsigned char *)alpn, (unsigned)strlen(alpn));
}

static void tls_close(tls_client *c)
{
    SSL_free(c->ssl);
    SSL_CTX_free(c->ctx);
    raw_close(&c->sock);
    tm_buf_deinit(&c->text);
}

static void tls_send_wire(tls_client *c, fixture *f)
{
    char *data;
    long n = BIO_get_mem_data(c->out, &data);
    size_t piece = c->bytewise ? 1 : (size_t)n;
    for (size_t at = 0; at < (size_t)n; at += piece) {
        raw_send(&c->sock, f, data + at, piece);
        if (c->bytewise)
            pump(f, 0);
    }
    (void)BIO_reset(c->out);
}

/* One round: what came is decrypted, what is to be sent is sent. */
static void tls_step(tls_client *c, fixture *f)
{
    char plain[16384];
    while (raw_poll(&c->sock))
        ;
    if (c->sock.in.len > c->taken)
        BIO_write(c->in, c->sock.in.data + c->taken, (int)(c->sock.in.len - c->taken));
    tm_buf_clear(&c->sock.in);
    c->taken = 0;
    int n;
    while ((n = SSL_read(c->ssl, plain, sizeof(plain))) > 0)
        tm_buf_append(&c->text, plain, (size_t)n);
    int why = SSL_get_error(c->ssl, n);
    c->ended = c->ended || why == SSL_ERROR_ZERO_RETURN;
    c->failed = c->failed || why == SSL_ERROR_SSL;
    tls_send_wire(c, f);
    pump(f, 1);
}

static void tls_puts(tls_client *c, fixture *f, const void *data, size_t len)
{
    int64_t end = tm_clock_ms() + 5000;
    while (!SSL_is_init_finished(c->ssl) && !c->failed && tm_clock_ms() < end)
        tls_step(c, f);
    for (size_t at = 0; at < len;) {
        int n = SSL_write(c->ssl, (const char *)data + at, (int)TM_MIN(len - at, (size_t)16384));
        assert_true(n > 0);
        at += (size_t)n;
        tls_send_wire(c, f);
    }
}

static bool tls_wait(tls_client *c, fixture *f, const char *text)
{
    int64_t end = tm_clock_ms() + 5000;
    while (tm_clock_ms() < end && !c->failed) {
        tls_step(c, f);
        if (c->text.data && memmem(c->text.data, c->text.len, text, strlen(text)))
            return true;
        if (c->ended || c->sock.closed)
            return false;
    }
    return false;
}

static void start_tls(fixture *f)
{
    tm_http_opts o = fixture_opts(f);
    o.tls_cert_file = g_cert;
    o.tls_key_file = g_key;
    o.stream_buffer_max = 64 << 10;
    fixture_start(f, &o);
}

/* ---- tests -------------------------------------------------------------------------------------------- */

static void test_requests(void **state)
{
    static const char get[] = "GET /hello HTTP/1.1\r\n" HOST "\r\n";
    (void)state;
    for (int bytewise = 0; bytewise <= 1; bytewise++) {
        for (int version = TLS1_2_VERSION; version <= TLS1_3_VERSION; version++) {
            fixture f;
            tls_client c;
            start_tls(&f);
            tls_open(&c, &f, version, NULL, 0);
            c.bytewise = bytewise;
            tls_puts(&c, &f, get, sizeof(get) - 1);
            assert_true(tls_wait(&c, &f, "\r\n\r\nhello"));
            assert_int_equal(SSL_version(c.ssl), version);
            /* keep-alive, then a proper end */
            tm_buf_clear(&c.text);
            static const char last[] = "GET /hello HTTP/1.1\r\nConnection: close\r\n" HOST "\r\n";
            tls_puts(&c, &f, last, sizeof(last) - 1);
            assert_true(tls_wait(&c, &f, "\r\n\r\nhello"));
            int64_t end = tm_clock_ms() + 2000;
            while (!c.ended && tm_clock_ms() < end)
                tls_step(&c, &f);
            assert_true(c.ended);
            tls_close(&c);
            fixture_stop(&f);
        }
    }
}

static void test_big_echo(void **state)
{
    (void)state;
    enum { SIZE = 4 << 20 };
    fixture f;
    tls_client c;
    start_tls(&f);
    char *body = malloc(SIZE);
    for (size_t i = 0; i < SIZE; i++)
        body[i] = (char)(i * 2654435761u >> 11);
    char head[128];
    int n = snprintf(head, sizeof(head),
                     "POST /echo HTTP/1.1\r\n" HOST "Content-Length: %d\r\n\r\n", SIZE);
    tls_open(&c, &f, 0, NULL, 0);
    tls_puts(&c, &f, head, (size_t)n);
    tls_puts(&c, &f, body, SIZE);
    assert_true(tls_wait(&c, &f, "\r\n\r\n"));
    size_t at = (size_t)((char *)memmem(c.text.data, c.text.len, "\r\n\r\n", 4) - c.text.data) + 4;
    int64_t end = tm_clock_ms() + 10000;
    while (c.text.len < at + SIZE && tm_clock_ms() < end)
        tls_step(&c, &f);
    assert_int_equal(c.text.len, at + SIZE);
    assert_memory_equal(c.text.data + at, body, SIZE);
    free(body);
    tls_close(&c);
    fixture_stop(&f);
}

static void test_stream_and_leaving(void **state)
{
    static const char get[] = "GET /stream HTTP/1.1\r\n" HOST "\r\n";
    (void)state;
    for (int polite = 0; polite <= 1; polite++) {
        fixture f;
        tls_client c;
        start_tls(&f);
        tls_open(&c, &f, 0, NULL, 0);
        tls_puts(&c, &f, get, sizeof(get) - 1);
        assert_true(tls_wait(&c, &f, "\r\n\r\n"));
        for (int i = 0; i < 100; i++) {
            char event[32];
            int n = snprintf(event, sizeof(event), "data: %d\n\n", i);
            assert_int_equal(tm_http_stream_write(f.held[0], event, (size_t)n), TM_OK);
        }
        assert_true(tls_wait(&c, &f, "data: 99\n\n"));
        if (polite) {
            SSL_shutdown(c.ssl);
            tls_send_wire(&c, &f);
        } else {
            raw_close(&c.sock);
        }
        pump_until(&f, &f.gone_count, 1);
        assert_int_equal(f.last_status, 499);
        tls_close(&c);
        fixture_stop(&f);
    }
}

static void test_back_pressure(void **state)
{
    static const char get[] = "GET /stream HTTP/1.1\r\n" HOST "\r\n";
    (void)state;
    fixture f;
    tls_client c;
    start_tls(&f);
    tls_open(&c, &f, 0, NULL, 4096);
    tls_puts(&c, &f, get, sizeof(get) - 1);
    assert_true(tls_wait(&c, &f, "\r\n\r\n"));
    size_t wrote = 0;
    char event[1000];
    memset(event, 'Q', sizeof(event));
    tm_status st = TM_OK;
    for (int i = 0; i < 20000 && st == TM_OK; i++) {
        st = tm_http_stream_write(f.held[0], event, sizeof(event));
        wrote += sizeof(event);
        pump(&f, 0);
    }
    assert_int_equal(st, TM_STATUS_BUSY);
    int64_t end = tm_clock_ms() + 10000;
    while (f.drain_count == 0 && tm_clock_ms() < end)
        tls_step(&c, &f);
    assert_int_equal(f.drain_count, 1);
    tm_http_stream_end(f.held[0]);
    assert_true(tls_wait(&c, &f, "\r\n0\r\n\r\n"));
    size_t seen = 0;
    for (size_t i = 0; i < c.text.len; i++)
        seen += c.text.data[i] == 'Q';
    assert_int_equal(seen, wrote);
    tls_close(&c);
    fixture_stop(&f);
}

static void test_wrong_clients(void **state)
{
    (void)state;
    fixture f;
    start_tls(&f);
    raw r;
    raw_open(&r, &f, 0);
    raw_puts(&r, &f, "GET /hello HTTP/1.1\r\n" HOST "\r\n");
    assert_true(raw_wait_closed(&r, &f, 2000));
    assert_null(r.in.data ? memmem(r.in.data, r.in.len, "HTTP", 4) : NULL);
    raw_close(&r);
    static const struct {
        int version;
        const char *alpn;
        bool accepted;
    } rows[] = {
        {TLS1_1_VERSION, NULL, false},
        {0, "\x02h2", false},
        {0, "\x02h2\x08http/1.1", true},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        tls_client c;
        tls_open(&c, &f, rows[i].version, rows[i].alpn, 0);
        int64_t end = tm_clock_ms() + 2000;
        while (!c.failed && !c.sock.closed && !SSL_is_init_finished(c.ssl) && tm_clock_ms() < end)
            tls_step(&c, &f);
        for (int k = 0; k < 5; k++)
            tls_step(&c, &f);
        assert_int_equal(!c.failed && SSL_is_init_finished(c.ssl), rows[i].accepted);
        tls_close(&c);
    }
    pump(&f, 20);
    assert_int_equal(f.handled, 0);
    assert_int_equal(tm_http_server_connections(f.server), 0);
    fixture_stop(&f);
}

static long serial_of(fixture *f)
{
    tls_client c;
    static const char get[] = "GET /hello HTTP/1.1\r\n" HOST "\r\n";
    tls_open(&c, f, 0, NULL, 0);
    tls_puts(&c, f, get, sizeof(get) - 1);
    assert_true(tls_wait(&c, f, "hello"));
    X509 *x = SSL_get1_peer_certificate(c.ssl);
    long serial = ASN1_INTEGER_get(X509_get0_serialNumber(x));
    X509_free(x);
    tls_close(&c);
    return serial;
}

static void test_reload(void **state)
{
    (void)state;
    fixture f;
    tls_client open;
    tm_err err = TM_ERR_INIT;
    static const char get[] = "GET /hello HTTP/1.1\r\n" HOST "\r\n";
    start_tls(&f);
    tls_open(&open, &f, 0, NULL, 0);
    tls_puts(&open, &f, get, sizeof(get) - 1);
    assert_true(tls_wait(&open, &f, "hello"));
    assert_int_equal(serial_of(&f), 1);
    write_pair(2, g_cert, g_key);
    assert_int_equal(serial_of(&f), 1);
    assert_int_equal(tm_http_server_reload_tls(f.server, &err), TM_OK);
    assert_int_equal(serial_of(&f), 2);
    /* A connection from before goes on. */
    tm_buf_clear(&open.text);
    tls_puts(&open, &f, get, sizeof(get) - 1);
    assert_true(tls_wait(&open, &f, "hello"));
    tls_close(&open);
    /* A bad pair changes nothing. */
    char other[128];
    snprintf(other, sizeof(other), "%s/other.pem", g_dir);
    write_pair(3, g_cert, other);
    assert_int_equal(tm_http_server_reload_tls(f.server, &err), TM_STATUS_CONFIG);
    assert_non_null(strstr(err.msg, g_key));
    assert_int_equal(serial_of(&f), 2);
    unlink(other);
    write_pair(1, g_cert, g_key);
    fixture_stop(&f);
}

static void test_bad_files(void **state)
{
    (void)state;
    fixture f;
    tm_http_server *s = NULL;
    tm_err err = TM_ERR_INIT;
    start_tls(&f);
    tm_http_opts o = fixture_opts(&f);
    o.tls_cert_file = g_cert;
    assert_int_equal(tm_http_server_create(&s, f.base, &o, &err), TM_STATUS_CONFIG);
    o.tls_key_file = "/no/such/key";
    assert_int_equal(tm_http_server_create(&s, f.base, &o, &err), TM_STATUS_CONFIG);
    assert_non_null(strstr(err.msg, "/no/such/key"));
    o.tls_key_file = g_cert; /* no key in it */
    assert_int_equal(tm_http_server_create(&s, f.base, &o, &err), TM_STATUS_CONFIG);
    assert_null(s);
    fixture_stop(&f);
}

static void test_memory(void **state)
{
    static const char get[] = "GET /stream HTTP/1.1\r\n" HOST "\r\n";
    enum { N = 50 };
    (void)state;
    fixture f;
    tls_client c[N];
    start_tls(&f);
    for (int i = 0; i < N; i++)
        tls_open(&c[i], &f, 0, NULL, 0);
    for (int i = 0; i < N; i++) {
        tls_puts(&c[i], &f, get, sizeof(get) - 1);
        assert_true(tls_wait(&c[i], &f, "\r\n\r\n"));
    }
    size_t before = mallinfo2().uordblks;
    for (int i = 0; i < N; i++)
        tm_http_stream_abort(f.held[i]);
    int64_t end = tm_clock_ms() + 5000;
    while (tm_http_server_active(f.server) && tm_clock_ms() < end)
        pump(&f, 1);
    for (int i = 0; i < N; i++)
        shutdown(c[i].sock.fd, 2);
    while (tm_http_server_connections(f.server) && tm_clock_ms() < end)
        pump(&f, 1);
    assert_int_equal(tm_http_server_connections(f.server), 0);
    print_message("%zu bytes for an open TLS stream\n", (before - mallinfo2().uordblks) / N);
    for (int i = 0; i < N; i++)
        tls_close(&c[i]);
    fixture_stop(&f);
}

int main(void)
{
    tm_log_init("http_tls_test", TM_LOG_ERROR, TM_LOG_TEXT);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_requests),           cmocka_unit_test(test_big_echo),
        cmocka_unit_test(test_stream_and_leaving), cmocka_unit_test(test_back_pressure),
        cmocka_unit_test(test_wrong_clients),      cmocka_unit_test(test_reload),
        cmocka_unit_test(test_bad_files),          cmocka_unit_test(test_memory),
    };
    return cmocka_run_group_tests(tests, make_files, remove_files);
}
