/* The request handle: what a handler may ask of a request. */
#include "net/http/internal.h"

#include <stdlib.h>
#include <string.h>

#include "common/clock.h"

tm_http_req *tm_http_req_create(tm_http_conn *c)
{
    tm_http_req *r = calloc(1, sizeof(*r));
    if (!r)
        return NULL;
    r->conn = c;
    r->start_ns = tm_clock_ns();
    tm_http_parser_init(&r->parser, &c->server->limits, false);
    tm_buf_init(&r->headers, 64 << 10);
    return r;
}

void tm_http_req_destroy(tm_http_req *r)
{
    if (!r)
        return;
    tm_http_parser_deinit(&r->parser);
    tm_buf_deinit(&r->headers);
    free(r->query_flat);
    free(r);
}

const char *tm_http_req_method(const tm_http_req *r)
{
    return tm_http_parser_method(&r->parser);
}

const char *tm_http_req_path(const tm_http_req *r)
{
    return tm_http_parser_path((tm_http_parser *)&r->parser);
}

const char *tm_http_req_rest(const tm_http_req *r)
{
    return r->rest ? r->rest : "";
}

const char *tm_http_req_header(const tm_http_req *r, const char *name)
{
    return tm_http_parser_field(&r->parser, name);
}

const char *tm_http_req_query(const tm_http_req *r, const char *name)
{
    const char *raw = tm_http_parser_query(&r->parser);
    if (!raw)
        return NULL;
    if (!r->query_flat) {
        /* Decoded at the first question; every pair needs at most one byte more than its text. */
        tm_http_req *m = (tm_http_req *)r;
        m->query_flat = malloc(2 * strlen(raw) + 2);
        if (!m->query_flat)
            return NULL;
        m->query_len = tm_http_query_flatten(raw, m->query_flat);
    }
    return tm_http_query_find(r->query_flat, r->query_len, name);
}

const char *tm_http_req_body(const tm_http_req *r, size_t *len)
{
    if (len)
        *len = r->parser.body.len;
    return r->parser.body.data ? r->parser.body.data : "";
}

void tm_http_req_drop_body(tm_http_req *r)
{
    tm_http_parser_skip_body(&r->parser);
}

const char *tm_http_req_peer(const tm_http_req *r)
{
    return r->conn->peer;
}

int64_t tm_http_req_start_ns(const tm_http_req *r)
{
    return r->start_ns;
}

void tm_http_req_set_user(tm_http_req *r, void *user, void (*on_gone)(void *user, tm_http_req *req))
{
    r->user = user;
    r->on_gone = on_gone;
}

void *tm_http_req_user(const tm_http_req *r)
{
    return r->user;
}

int tm_http_req_status(const tm_http_req *r)
{
    return r->status;
}

size_t tm_http_req_sent_bytes(const tm_http_req *r)
{
    size_t waiting = evbuffer_get_length(r->conn->out);
    return r->queued_bytes > waiting ? r->queued_bytes - waiting : 0;
}
