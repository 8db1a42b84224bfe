/* A server on a port of its own and raw client sockets, all on one event loop of the test's thread. */
#ifndef TM_TESTS_NET_HTTP_FIXTURE_H
#define TM_TESTS_NET_HTTP_FIXTURE_H

#include <event2/event.h>

#include "common/buf.h"
#include "net/http/client.h"
#include "net/http/http.h"

typedef struct fixture {
    struct event_base *base;
    tm_http_server *server;
    tm_http_req *held[4096]; /* requests of /hold and /stream, in order of arrival */
    int held_count, gone_count, drain_count;
    int done_count, last_status, handled;
    char last_path[256];
    size_t last_sent;
} fixture;

/* Routes: GET /hello, POST /echo, GET /rest/<any>, GET /hold (answered by the test), GET /stream (begun),
 * GET /query, GET /peer, OPTIONS *. A request with "x-deny" is answered 401 by the authorise hook. */
tm_http_opts fixture_opts(fixture *f);
void fixture_start(fixture *f, const tm_http_opts *opts);
void fixture_stop(fixture *f);
void pump(fixture *f, int ms); /* runs the loop that long */
void pump_until(fixture *f, const int *counter, int at_least);

typedef struct raw {
    int fd;
    tm_buf in;
    bool closed, reset;
} raw;
void raw_open(raw *r, fixture *f, int recv_buffer);
void raw_close(raw *r);
void raw_send(raw *r, fixture *f, const void *data, size_t len);
void raw_puts(raw *r, fixture *f, const char *text);
bool raw_poll(raw *r); /* takes what has come; true when something did */
/* Runs the loop until the text came, or the server closed, or 5 s passed. */
bool raw_wait(raw *r, fixture *f, const char *text);
bool raw_wait_closed(raw *r, fixture *f, int ms);
int raw_status(const raw *r); /* of the first answer */

#endif
