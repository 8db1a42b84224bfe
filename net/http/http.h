/* HTTP/1.1 server on libevent: requests in, replies or event streams out.
 *
 * One server = one loop thread, which runs the caller's event_base;
 * every function here is called on that thread. A request is handed to its route's handler when the whole
 * body is in. The handler answers now or later with exactly one of: tm_http_reply, or
 * tm_http_stream_begin ... tm_http_stream_end. Until the answer is complete the connection is watched for
 * the client leaving: on_gone runs once, and the request handle is invalid after it returns.
 *
 * Limits (rows of the option table of the caller): request line and header line 8 KiB, 32 KiB and 100
 * fields of headers (431), body (413), header time 10 s, idle 75 s, write stall 60 s, stream buffer 256
 * KiB. Ambiguous framing (two lengths, length and chunked) is 400 and close. Bodies with a
 * Content-Encoding are refused (415). Errors that happen before a handler runs are answered through the
 * error writer of the options, so that every body has the API's form. */
#ifndef TM_NET_HTTP_HTTP_H
#define TM_NET_HTTP_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/buf.h"
#include "common/status.h"

struct event_base;
typedef struct tm_http_server tm_http_server;
typedef struct tm_http_req tm_http_req;

typedef void (*tm_http_handler)(void *user, tm_http_req *req);

typedef struct tm_http_route {
    const char *method; /* "GET" (HEAD follows), "POST" */
    const char *path;   /* exact, or ending in '*': the rest is tm_http_req_rest */
    bool open;          /* needs no key: read by the caller's authorise hook */
    tm_http_handler handler;
} tm_http_route;

typedef struct tm_http_opts {
    const char *host; /* "127.0.0.1" */
    int port;         /* 0 = pick one */
    const tm_http_route *routes;
    int route_count;
    void *user; /* passed to handlers and hooks */
    /* Called for every matched request when its head is in, before the body is read; false = it has
     * answered. May be NULL. */
    bool (*authorise)(void *user, tm_http_req *req, const tm_http_route *route);
    /* Writes a JSON error body for a status the server itself decided (400, 404, 405, 408, 413, 414, 415,
     * 431, 503). */
    void (*error_body)(void *user, int http_status, tm_buf *out);
    /* Just before such an error is written: may set headers and the user pointer. May be NULL. */
    void (*on_error)(void *user, tm_http_req *req, int http_status);
    /* After a request is over (all bytes handed to the kernel, or gone), for the log line and for freeing
     * what belongs to it. Comes from the loop, never inside another call of this header; req is valid until
     * it returns, its body is not kept. Also called for requests that the server refused (path may be
     * ""). May be NULL. */
    void (*on_done)(void *user, tm_http_req *req);
    size_t body_max, header_bytes_max, header_line_max, stream_buffer_max;
    /* At connections_max the longest idle connection gives way; without one, accepting pauses. */
    int header_count_max, connections_max;
    int64_t header_timeout_ms, idle_timeout_ms, write_timeout_ms;
    const char *server_name; /* Server: header, or NULL */
    /* After body_grace_ms a body must come at body_rate_min bytes per second (408). */
    int64_t body_grace_ms;
    size_t body_rate_min;
    /* PEM files; both set = the server speaks TLS 1.2 and newer, and nothing else. */
    const char *tls_cert_file, *tls_key_file;
    int backlog;
    bool reuse_port; /* several servers (one per loop thread) share host and port */
} tm_http_opts;
tm_http_opts tm_http_opts_default(void);

tm_status tm_http_server_create(tm_http_server **out, struct event_base *base,
                                const tm_http_opts *opts, tm_err *err);
int tm_http_server_port(const tm_http_server *s);
/* Reads the TLS files again, for connections from now on. On a failure the old ones stay in force. */
tm_status tm_http_server_reload_tls(tm_http_server *s, tm_err *err);
/* Stops accepting; open requests go on, their connections close after the answer. */
void tm_http_server_drain(tm_http_server *s);
int tm_http_server_active(const tm_http_server *s); /* requests not yet answered completely */
int tm_http_server_connections(const tm_http_server *s);
void tm_http_server_destroy(tm_http_server *s); /* open requests get on_gone */

/* The request. Strings are valid until the answer is complete or on_gone returned. */
const char *tm_http_req_method(const tm_http_req *r);
const char *tm_http_req_path(const tm_http_req *r);
const char *tm_http_req_rest(const tm_http_req *r);
const char *tm_http_req_header(const tm_http_req *r,
                               const char *name); /* case-insensitive, or NULL */
const char *tm_http_req_query(const tm_http_req *r, const char *name); /* decoded, or NULL */
const char *tm_http_req_body(const tm_http_req *r, size_t *len);
/* Frees the body early: a long stream need not hold its prompt. */
void tm_http_req_drop_body(tm_http_req *r);
const char *tm_http_req_peer(const tm_http_req *r); /* "127.0.0.1:5120", "[::1]:5120" */
int64_t tm_http_req_start_ns(const tm_http_req *r); /* monotonic: first byte of the request */
/* The handler's own pointer, and what to do when the client leaves before the answer is complete (never
 * called inside another call of this header; an answer given in it is ignored). */
void tm_http_req_set_user(tm_http_req *r, void *user,
                          void (*on_gone)(void *user, tm_http_req *req));
void *tm_http_req_user(const tm_http_req *r);

/* Answer. Header values must not contain CR or LF (they are dropped); setting a name again replaces it. The
 * server itself writes Date, Content-Length, Transfer-Encoding and Connection ("close" may be set). Bytes leave
 * at the end of the loop turn, all writes of a turn together. */
void tm_http_set_header(tm_http_req *r, const char *name, const char *value);
void tm_http_reply(tm_http_req *r, int status, const char *content_type, const void *body,
                   size_t len);
/* Chunked body, flushed as it is written (TCP_NODELAY). */
void tm_http_stream_begin(tm_http_req *r, int status, const char *content_type);
/* TM_OK; BUSY when more than stream_buffer_max bytes wait for a slow client (the data was still queued:
 * the caller pauses or cancels); CLOSED when the client has left. */
tm_status tm_http_stream_write(tm_http_req *r, const void *data, size_t len);
size_t tm_http_stream_queued(const tm_http_req *r);
/* After BUSY: called once when the queue has fallen to half of stream_buffer_max. A writer that goes on in
 * spite of BUSY is cut at four times stream_buffer_max. */
void tm_http_stream_on_drain(tm_http_req *r, void (*on_drain)(void *user, tm_http_req *req));
void tm_http_stream_end(tm_http_req *r); /* the handle is invalid afterwards */
/* Cuts the connection without a proper end (an error after the first byte). */
void tm_http_stream_abort(tm_http_req *r);
int tm_http_req_status(const tm_http_req *r); /* status sent, 0 = none, 499 = client gone */
size_t tm_http_req_sent_bytes(const tm_http_req *r);

#endif
