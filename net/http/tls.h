/* TLS of one connection, between memory buffers: ciphertext in, plaintext out and back. The socket stays with
 * conn.c, so that one read and one write path (bounded, without SIGPIPE) serve both kinds of connection. */
#ifndef TM_NET_HTTP_TLS_H
#define TM_NET_HTTP_TLS_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "common/status.h"

struct evbuffer;
typedef struct tm_http_tls_ctx tm_http_tls_ctx; /* certificate and settings of a server */
typedef struct tm_http_tls tm_http_tls;         /* one connection */

tm_status tm_http_tls_ctx_create(tm_http_tls_ctx **out, const char *cert_file, const char *key_file,
                                 tm_err *err);
void tm_http_tls_ctx_destroy(tm_http_tls_ctx *ctx); /* open connections keep what they need */

tm_http_tls *tm_http_tls_open(tm_http_tls_ctx *ctx); /* NULL when out of memory */
void tm_http_tls_free(tm_http_tls *t);
/* Bytes from the socket; false when out of memory. Then read until it returns <= 0. */
bool tm_http_tls_take(tm_http_tls *t, const char *cipher, size_t len);
enum { TM_HTTP_TLS_CLOSED = 0, TM_HTTP_TLS_MORE = -1, TM_HTTP_TLS_BROKEN = -2 };
ssize_t tm_http_tls_read(tm_http_tls *t, char *plain, size_t size);
/* Encrypts what lies in plain until the wire buffer holds wire_max bytes; false when broken. Also moves
 * bytes of the handshake and alerts. */
bool tm_http_tls_write(tm_http_tls *t, struct evbuffer *plain, struct evbuffer *wire,
                       size_t wire_max);
/* Adds the closing alert. */
void tm_http_tls_close(tm_http_tls *t, struct evbuffer *wire);

#endif
