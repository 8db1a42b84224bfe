/* TLS 1.2 and newer over OpenSSL's memory BIOs. bufferevent_openssl was not taken: it keeps two buffers and a
 * write event per connection and reads through a socket BIO that raises SIGPIPE.
 *
 * OpenSSL releases its record buffers between records (SSL_MODE_RELEASE_BUFFERS): an open stream then
 * costs 17 KiB of heap (measured, tests/net/http_tls_test.c). Renegotiation and compression are off. */
#include "net/http/tls.h"

#include <event2/buffer.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"

enum { RECORD_MAX = 16384 };

struct tm_http_tls_ctx {
    SSL_CTX *ssl;
};

struct tm_http_tls {
    SSL *ssl;
    BIO *in, *out; /* owned by ssl */
};

static int choose_protocol(SSL *ssl, const unsigned char **out, unsigned char *out_len,
                           const unsigned char *in, unsigned int in_len, void *arg)
{
    static const unsigned char ours[] = "\x08http/1.1";
    unsigned char *chosen;
    (void)ssl, (void)arg;
    if (SSL_select_next_proto(&chosen, out_len, ours, sizeof(ours) - 1, in, in_len) !=
        OPENSSL_NPN_NEGOTIATED)
        return SSL_TLSEXT_ERR_ALERT_FATAL;
    *out = chosen;
    return SSL_TLSEXT_ERR_OK;
}

/* Encrypted keys are refused instead of asking on the terminal. */
static int no_passphrase(char *buf, int size, int rwflag, void *user)
{
    (void)buf, (void)size, (void)rwflag, (void)user;
    return -1;
}

static tm_status fail_with_reason(tm_err *err, const char *what, const char *file)
{
    char reason[160];
    ERR_error_string_n(ERR_peek_last_error(), reason, sizeof(reason));
    ERR_clear_error();
    return TM_FAIL(err, TM_STATUS_CONFIG, "tls: %s %s: %s", what, file, reason);
}

static tm_status load_files(SSL_CTX *ssl, const char *cert_file, const char *key_file, tm_err *err)
{
    if (SSL_CTX_use_certificate_chain_file(ssl, cert_file) != 1)
        return fail_with_reason(err, "certificate", cert_file);
    if (SSL_CTX_use_PrivateKey_file(ssl, key_file, SSL_FILETYPE_PEM) != 1)
        return fail_with_reason(err, "key", key_file);
    if (SSL_CTX_check_private_key(ssl) != 1)
        return fail_with_reason(err, "the key does not belong to certificate", cert_file);
    return TM_OK;
}

tm_status tm_http_tls_ctx_create(tm_http_tls_ctx **out, const char *cert_file, const char *key_file,
                                 tm_err *err)
{
    tm_status st;
    tm_http_tls_ctx *ctx = calloc(1, sizeof(*ctx));
    SSL_CTX *ssl = ctx ? SSL_CTX_new(TLS_server_method()) : NULL;
    if (!ssl) {
        free(ctx);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "tls: out of memory");
    }
    ctx->ssl = ssl;
    SSL_CTX_set_min_proto_version(ssl, TLS1_2_VERSION);
    SSL_CTX_set_options(ssl, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION |
                                 SSL_OP_CIPHER_SERVER_PREFERENCE | SSL_OP_IGNORE_UNEXPECTED_EOF);
    SSL_CTX_set_mode(ssl, SSL_MODE_RELEASE_BUFFERS | SSL_MODE_ENABLE_PARTIAL_WRITE);
    SSL_CTX_set_alpn_select_cb(ssl, choose_protocol, NULL);
    SSL_CTX_set_default_passwd_cb(ssl, no_passphrase);
    TM_TRY_GOTO(load_files(ssl, cert_file, key_file, err), err_destroy);
    *out = ctx;
    return TM_OK;

err_destroy:
    tm_http_tls_ctx_destroy(ctx);
    return st;
}

void tm_http_tls_ctx_destroy(tm_http_tls_ctx *ctx)
{
    if (!ctx)
        return;
    SSL_CTX_free(ctx->ssl);
    free(ctx);
}

tm_http_tls *tm_http_tls_open(tm_http_tls_ctx *ctx)
{
    tm_http_tls *t = calloc(1, sizeof(*t));
    if (!t)
        return NULL;
    t->ssl = SSL_new(ctx->ssl);
    t->in = BIO_new(BIO_s_mem());
    t->out = BIO_new(BIO_s_mem());
    if (!t->ssl || !t->in || !t->out) {
        BIO_free(t->in);
        BIO_free(t->out);
        SSL_free(t->ssl);
        free(t);
        ERR_clear_error();
        return NULL;
    }
    SSL_set_bio(t->ssl, t->in, t->out);
    SSL_set_accept_state(t->ssl);
    return t;
}

void tm_http_tls_free(tm_http_tls *t)
{
    if (!t)
        return;
    SSL_free(t->ssl);
    free(t);
}

bool tm_http_tls_take(tm_http_tls *t, const char *cipher, size_t len)
{
    return BIO_write(t->in, cipher, (int)len) == (int)len;
}

ssize_t tm_http_tls_read(tm_http_tls *t, char *plain, size_t size)
{
    int n = SSL_read(t->ssl, plain, (int)size);
    if (n > 0)
        return n;
    int why = SSL_get_error(t->ssl, n);
    ERR_clear_error();
    if (why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE)
        return TM_HTTP_TLS_MORE;
    return why == SSL_ERROR_ZERO_RETURN ? TM_HTTP_TLS_CLOSED : TM_HTTP_TLS_BROKEN;
}

static bool move_wire_bytes(tm_http_tls *t, struct evbuffer *wire)
{
    char *data;
    long n = BIO_get_mem_data(t->out, &data);
    if (n <= 0)
        return true;
    if (evbuffer_add(wire, data, (size_t)n) != 0)
        return false;
    return BIO_reset(t->out) == 1;
}

bool tm_http_tls_write(tm_http_tls *t, struct evbuffer *plain, struct evbuffer *wire,
                       size_t wire_max)
{
    if (!move_wire_bytes(t, wire))
        return false;
    size_t len;
    while ((len = evbuffer_get_length(plain)) > 0 && evbuffer_get_length(wire) < wire_max) {
        size_t part = TM_MIN(len, RECORD_MAX);
        const unsigned char *data = evbuffer_pullup(plain, (ev_ssize_t)part);
        /* Into memory a write is never partial and never waits, once the handshake is done. */
        int n = data ? SSL_write(t->ssl, data, (int)part) : -1;
        if (n <= 0) {
            ERR_clear_error();
            return false;
        }
        evbuffer_drain(plain, (size_t)n);
        if (!move_wire_bytes(t, wire))
            return false;
    }
    return true;
}

void tm_http_tls_close(tm_http_tls *t, struct evbuffer *wire)
{
    if (SSL_is_init_finished(t->ssl))
        SSL_shutdown(t->ssl);
    ERR_clear_error();
    move_wire_bytes(t, wire);
}
