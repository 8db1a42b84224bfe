/* A small HTTP/1.1 client on libevent: one connection, one request, the answer piece by piece. For load
 * generation and tests; no keep-alive, no redirects, no TLS.
 *
 * All calls and callbacks happen on the thread of the event base. No callback runs inside start. After on_end
 * returned, or after cancel, the handle is invalid. */
#ifndef TM_NET_HTTP_CLIENT_H
#define TM_NET_HTTP_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

struct event_base;
typedef struct tm_http_call tm_http_call;

typedef struct tm_http_call_opts {
    const char *host; /* an address; a name is resolved in start, which then may block */
    int port;
    const char *method;         /* "GET" */
    const char *target;         /* "/v1/models?x=1" */
    const char *const *headers; /* "Name: value", NULL-terminated, or NULL */
    const void *body;           /* copied; a Content-Length is written when it is not NULL */
    size_t body_len;
    int64_t connect_timeout_ms; /* 5 s */
    int64_t idle_timeout_ms;    /* longest time without progress, 300 s */
    int recv_buffer; /* SO_RCVBUF in bytes, 0 = the system's (a small one makes a slow reader) */
    void *user;
    void (*on_headers)(void *user, tm_http_call *call, int status);                /* may be NULL */
    void (*on_data)(void *user, tm_http_call *call, const char *data, size_t len); /* may be NULL */
    /* Exactly once unless cancelled: TM_OK after a complete answer; UNAVAILABLE could not connect, CLOSED
     * cut in the middle, TIMEOUT, INVALID not HTTP. err is valid during the call. */
    void (*on_end)(void *user, tm_http_call *call, tm_status st, const tm_err *err);
} tm_http_call_opts;
tm_http_call_opts tm_http_call_opts_default(void);

tm_status tm_http_call_start(tm_http_call **out, struct event_base *base,
                             const tm_http_call_opts *opts, tm_err *err);
/* Closes the connection; no callback follows. Allowed inside callbacks. */
void tm_http_call_cancel(tm_http_call *c);
/* Stops and resumes reading; the idle time does not run while paused. What one read (16 KiB) brought is
 * still delivered. */
void tm_http_call_pause(tm_http_call *c, bool paused);
int tm_http_call_status(const tm_http_call *c); /* 0 before on_headers */
const char *tm_http_call_header(const tm_http_call *c,
                                const char *name); /* case-insensitive, or NULL */

#endif
