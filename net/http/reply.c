/* Answers: head, fixed body, chunked stream.
 *
 * Nothing here touches the socket: bytes go to the connection's buffer and the connection joins the list that
 * is flushed once at the end of the loop turn. Many small writes of one turn leave as one system call, and no
 * callback of the caller can run inside a call of the caller. */
#include "net/http/internal.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "common/check.h"

static const struct reason {
    int status;
    const char *text;
} reasons[] = {
    {200, "OK"},
    {201, "Created"},
    {202, "Accepted"},
    {204, "No Content"},
    {301, "Moved Permanently"},
    {302, "Found"},
    {304, "Not Modified"},
    {307, "Temporary Redirect"},
    {308, "Permanent Redirect"},
    {400, "Bad Request"},
    {401, "Unauthorized"},
    {403, "Forbidden"},
    {404, "Not Found"},
    {405, "Method Not Allowed"},
    {406, "Not Acceptable"},
    {408, "Request Timeout"},
    {409, "Conflict"},
    {410, "Gone"},
    {411, "Length Required"},
    {412, "Precondition Failed"},
    {413, "Content Too Large"},
    {414, "URI Too Long"},
    {415, "Unsupported Media Type"},
    {417, "Expectation Failed"},
    {422, "Unprocessable Content"},
    {424, "Failed Dependency"},
    {429, "Too Many Requests"},
    {431, "Request Header Fields Too Large"},
    {499, "Client Closed Request"},
    {500, "Internal Server Error"},
    {501, "Not Implemented"},
    {502, "Bad Gateway"},
    {503, "Service Unavailable"},
    {504, "Gateway Timeout"},
    {505, "HTTP Version Not Supported"},
    {529, "Overloaded"},
};

const char *tm_http_reason(int status)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(reasons); i++)
        if (reasons[i].status == status)
            return reasons[i].text;
    return "Status";
}

/* ---- header fields ------------------------------------------------------------------------------------ */

/* Removes the line of that name, so that a second set replaces the first. */
static void remove_header(tm_buf *headers, const char *name, size_t name_len)
{
    char *line = headers->data;
    char *end = line + headers->len;
    while (line < end) {
        char *next = (char *)memchr(line, '\n', (size_t)(end - line)) + 1;
        if (strncasecmp(line, name, name_len) == 0 && line[name_len] == ':') {
            memmove(line, next, (size_t)(end - next));
            headers->len -= (size_t)(next - line);
            return;
        }
        line = next;
    }
}

void tm_http_set_header(tm_http_req *r, const char *name, const char *value)
{
    /* Framing and time belong to the server. */
    static const char *const own[] = {"content-length", "transfer-encoding", "date",
                                      "content-type"};
    size_t name_len = strlen(name);
    if (r->status || !value || !tm_http_is_token(name, name_len))
        return;
    for (size_t i = 0; i < TM_ARRAY_LEN(own); i++)
        if (strcasecmp(name, own[i]) == 0)
            return;
    if (strcasecmp(name, "connection") == 0) {
        if (strcasecmp(value, "close") == 0)
            r->conn->close_after = true;
        return;
    }
    if (r->headers.len)
        remove_header(&r->headers, name, name_len);
    tm_buf_append(&r->headers, name, name_len);
    tm_buf_append(&r->headers, ": ", 2);
    for (const char *v = value; *v; v++)
        if ((unsigned char)*v >= 0x20 && *v != 0x7f)
            tm_buf_putc(&r->headers, *v);
    tm_buf_append(&r->headers, "\r\n", 2);
}

/* ---- head --------------------------------------------------------------------------------------------- */

/* Whether the connection can serve another request after this answer. */
static bool decide_keep_alive(tm_http_req *r)
{
    tm_http_conn *c = r->conn;
    const tm_http_parser *p = &r->parser;
    if (c->close_after || c->server->draining || !p->keep_alive || p->bad_status)
        return false;
    if (r->body_in)
        return true;
    /* Answered early: worth reading on only when little is left and the client is sending it anyway. */
    return c->state == TM_CONN_BODY && !p->chunked && !p->expect_continue &&
           p->remaining <= TM_HTTP_SKIP_BODY_MAX;
}

/* length < 0: the body is a stream. */
static void write_head(tm_http_req *r, int status, const char *content_type, int64_t length)
{
    tm_http_conn *c = r->conn;
    tm_http_server *s = c->server;
    bool bodiless = status == 204 || status == 304;
    r->status = status;
    r->head_only = strcmp(tm_http_req_method(r), "HEAD") == 0 || bodiless;
    if (!decide_keep_alive(r))
        c->close_after = true;
    if (length < 0 && r->parser.minor == 0 && !r->head_only)
        c->close_after = true;
    if (!r->body_in)
        tm_http_parser_skip_body(&r->parser);

    evbuffer_add_printf(c->out, "HTTP/1.1 %d %s\r\nDate: %s\r\n", status, tm_http_reason(status),
                        tm_http_server_date(s));
    if (s->server_name)
        evbuffer_add_printf(c->out, "Server: %s\r\n", s->server_name);
    if (content_type && !bodiless)
        evbuffer_add_printf(c->out, "Content-Type: %s\r\n", content_type);
    if (length >= 0 && status != 204)
        evbuffer_add_printf(c->out, "Content-Length: %lld\r\n", (long long)length);
    r->chunked = length < 0 && r->parser.minor == 1 && !bodiless;
    if (r->chunked)
        evbuffer_add_printf(c->out, "Transfer-Encoding: chunked\r\n");
    if (c->close_after)
        evbuffer_add_printf(c->out, "Connection: close\r\n");
    else
        evbuffer_add_printf(c->out, "Connection: keep-alive\r\nKeep-Alive: timeout=%lld\r\n",
                            (long long)(s->opts.idle_timeout_ms / 1000));
    if (r->headers.len)
        evbuffer_add(c->out, r->headers.data, r->headers.len);
    evbuffer_add(c->out, "\r\n", 2);
    tm_buf_deinit(&r->headers);
}

static void count_queued(tm_http_req *r, size_t before)
{
    r->queued_bytes += evbuffer_get_length(r->conn->out) - before;
    tm_http_conn_mark_dirty(r->conn);
}

/* The handle is the server's from here on: on_done and freeing follow when the bytes have left. */
static void complete(tm_http_req *r)
{
    r->complete = true;
    r->on_gone = NULL;
    r->on_drain = NULL;
    tm_http_conn_mark_dirty(r->conn);
}

/* ---- fixed answers ------------------------------------------------------------------------------------ */

void tm_http_reply(tm_http_req *r, int status, const char *content_type, const void *body,
                   size_t len)
{
    if (r->status)
        return; /* answered already, or the client has left */
    size_t before = evbuffer_get_length(r->conn->out);
    write_head(r, status, content_type, (int64_t)len);
    if (!r->head_only && len)
        evbuffer_add(r->conn->out, body, len);
    count_queued(r, before);
    complete(r);
}

void tm_http_reply_error(tm_http_req *r, int status)
{
    tm_http_opts *o = &r->conn->server->opts;
    tm_buf body;
    tm_buf_init(&body, 64 << 10);
    if (o->on_error && r->status == 0)
        o->on_error(o->user, r, status);
    if (o->error_body)
        o->error_body(o->user, status, &body);
    if (body.failed || body.len == 0) {
        tm_buf_clear(&body);
        tm_buf_printf(&body, "{\"error\":{\"message\":\"%s\"}}", tm_http_reason(status));
    }
    tm_http_reply(r, status, "application/json", body.data, body.len);
    tm_buf_deinit(&body);
}

/* ---- streams ------------------------------------------------------------------------------------------ */

void tm_http_stream_begin(tm_http_req *r, int status, const char *content_type)
{
    if (r->status)
        return;
    size_t before = evbuffer_get_length(r->conn->out);
    write_head(r, status, content_type, -1);
    r->streaming = true;
    count_queued(r, before);
}

/* One reservation, so that chunk head, data and end lie together: a small event is one piece. */
static bool add_chunk(struct evbuffer *out, const void *data, size_t len, bool chunked)
{
    char head[20];
    int head_len = chunked ? snprintf(head, sizeof(head), "%zx\r\n", len) : 0;
    size_t total = (size_t)head_len + len + (chunked ? 2 : 0);
    struct evbuffer_iovec v;
    if (evbuffer_reserve_space(out, (ev_ssize_t)total, &v, 1) != 1)
        return false;
    char *to = v.iov_base;
    memcpy(to, head, (size_t)head_len);
    memcpy(to + head_len, data, len);
    if (chunked)
        memcpy(to + head_len + len, "\r\n", 2);
    v.iov_len = total;
    return evbuffer_commit_space(out, &v, 1) == 0;
}

tm_status tm_http_stream_write(tm_http_req *r, const void *data, size_t len)
{
    tm_http_conn *c = r->conn;
    size_t max = c->server->opts.stream_buffer_max;
    if (!r->streaming || r->complete || r->gone || c->broken)
        return TM_STATUS_CLOSED;
    if (len == 0 || r->head_only)
        return TM_OK;
    size_t before = evbuffer_get_length(c->out);
    if (before > max * TM_HTTP_STREAM_HARD_FACTOR || !add_chunk(c->out, data, len, r->chunked)) {
        c->broken = true;
        tm_http_conn_mark_dirty(c);
        return TM_STATUS_CLOSED;
    }
    count_queued(r, before);
    if (evbuffer_get_length(c->out) <= max)
        return TM_OK;
    r->over_mark = true;
    return TM_STATUS_BUSY;
}

size_t tm_http_stream_queued(const tm_http_req *r)
{
    return evbuffer_get_length(r->conn->out);
}

void tm_http_stream_on_drain(tm_http_req *r, void (*on_drain)(void *user, tm_http_req *req))
{
    r->on_drain = on_drain;
}

void tm_http_stream_end(tm_http_req *r)
{
    if (!r->streaming || r->complete || r->gone)
        return;
    size_t before = evbuffer_get_length(r->conn->out);
    if (r->chunked && !r->head_only)
        evbuffer_add(r->conn->out, "0\r\n\r\n", 5);
    count_queued(r, before);
    complete(r);
}

void tm_http_stream_abort(tm_http_req *r)
{
    if (r->complete || r->gone)
        return;
    /* What was queued still leaves; without the last chunk the client sees that the answer is cut. An
     * answer without framing would look whole after an orderly close, so that one is reset. */
    r->conn->close_after = true;
    if (!r->chunked)
        r->conn->broken = true;
    complete(r);
}
