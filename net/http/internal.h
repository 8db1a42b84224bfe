/* Inside the HTTP server: connection and request as server.c, conn.c, request.c and reply.c share them. */
#ifndef TM_NET_HTTP_INTERNAL_H
#define TM_NET_HTTP_INTERNAL_H

#include <event2/buffer.h>
#include <event2/event.h>
#include <event2/event_struct.h>
#include <sys/queue.h>

#include "net/http/http.h"
#include "net/http/parse.h"
#include "net/http/tls.h"

typedef enum tm_http_conn_state {
    TM_CONN_IDLE,   /* between requests */
    TM_CONN_HEAD,   /* head bytes are coming */
    TM_CONN_BODY,   /* body bytes are coming */
    TM_CONN_ANSWER, /* the request is in; its answer is awaited or being written */
    TM_CONN_LINGER  /* all is written and shut down; input is dropped until the client closes */
} tm_http_conn_state;

typedef struct tm_http_conn tm_http_conn;

struct tm_http_req {
    tm_http_conn *conn;
    const tm_http_route *route;
    tm_http_parser parser;
    char *rest; /* in the path, or NULL */
    char *query_flat;
    size_t query_len;
    void *user;
    void (*on_gone)(void *user, tm_http_req *req);
    void (*on_drain)(void *user, tm_http_req *req);
    int64_t start_ns;
    tm_buf headers; /* "Name: value\r\n"... */
    size_t queued_bytes;
    int status;
    bool head_only; /* HEAD: the body is counted, not sent */
    bool body_in;   /* the whole request was received */
    bool chunked;   /* the answer is */
    bool streaming;
    bool complete;  /* the answer is wholly queued; the handle is the server's again */
    bool gone;      /* on_gone ran or will not run any more */
    bool over_mark; /* BUSY was reported; on_drain is owed */
};

struct tm_http_conn {
    tm_http_server *server;
    TAILQ_ENTRY(tm_http_conn) all;
    TAILQ_ENTRY(tm_http_conn) dirty_link;
    int fd;
    tm_http_conn_state state;
    struct event ev_in, ev_out;
    struct evbuffer *out;
    struct evbuffer *wire; /* what the socket gets: out itself, or its ciphertext */
    tm_http_tls *tls;      /* NULL = plain */
    tm_http_req *req;
    tm_buf pending;            /* bytes of pipelined requests, at most one read's worth */
    int64_t deadline_ms;       /* of the state; 0 = none */
    int64_t write_deadline_ms; /* progress must come before; 0 = nothing waits */
    int64_t body_start_ms, idle_since_ms;
    bool dirty, close_after, eof, input_paused, writing, broken, served;
    char peer[48];
};

TAILQ_HEAD(tm_http_conn_list, tm_http_conn);

struct tm_http_server {
    struct event_base *base;
    tm_http_opts opts;
    tm_http_limits limits;
    char *server_name;
    int listen_fd, port;
    struct event *ev_listen, *ev_tick, *ev_flush;
    struct tm_http_conn_list conns;
    struct tm_http_conn_list dirty;
    int conn_count, active;
    bool accept_paused, draining, tick_on;
    int64_t accept_retry_ms, accept_warned_ms;
    int64_t date_s;
    char date[32];
    char *scratch;       /* every read of every connection lands here first */
    char *plain_scratch; /* and is decrypted to here */
    char *tls_cert_file, *tls_key_file;
    tm_http_tls_ctx *tls_ctx; /* NULL = plain */
};

enum {
    TM_HTTP_SCRATCH_BYTES = 65536,
    TM_HTTP_WIRE_MAX = 65536, /* ciphertext that is made ahead of the socket */
    TM_HTTP_LINGER_MS = 2000,
    /* A body this short is read to its end after an early answer, to keep the connection. */
    TM_HTTP_SKIP_BODY_MAX = 65536,
    /* A stream whose writer ignores BUSY is cut at this many times stream_buffer_max. */
    TM_HTTP_STREAM_HARD_FACTOR = 4
};

/* conn.c */
void tm_http_conn_open(tm_http_server *s, int fd, const char *peer);
void tm_http_conn_destroy(tm_http_conn *c); /* a pending request gets on_gone, then on_done */
void tm_http_conn_flush(tm_http_conn *c);
void tm_http_conn_mark_dirty(tm_http_conn *c);
/* Deadlines and, while input is paused, the client's leaving. May destroy c. */
void tm_http_conn_check(tm_http_conn *c, int64_t now_ms);

/* route.c */
int tm_http_route_choose(
    tm_http_req *r); /* 0 with route and rest set, 404, or 405 with Allow set */
void tm_http_route_show_slashes(tm_http_req *r); /* escaped slashes of the path become plain ones */

/* request.c */
tm_http_req *tm_http_req_create(tm_http_conn *c);
void tm_http_req_destroy(tm_http_req *r);

/* reply.c */
void tm_http_reply_error(tm_http_req *r, int status);
const char *tm_http_reason(int status);

/* server.c */
/* Accepts again after a pause; called when a connection closed or fell idle. */
void tm_http_server_look_for_more(tm_http_server *s);
const char *tm_http_server_date(tm_http_server *s);

#endif
