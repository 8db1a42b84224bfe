/* The parser alone, from memory: every case whole, byte by byte, and cut in two at every place, always with the
 * same verdict; every limit at -1, 0 and +1. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"
#include "net/http/parse.h"

static const tm_http_limits limits = {
    .line_max = 8192, .header_bytes_max = 32768, .body_max = 4096, .header_count_max = 100};

/* Feeds data in two pieces (or single bytes when cut is 0); the bad status, 0 = complete, -1 = incomplete. */
static int run(tm_http_parser *p, const tm_http_limits *lim, bool response, const char *data,
               size_t len, size_t cut, size_t *taken)
{
    tm_http_event ev = TM_HTTP_EV_MORE;
    size_t at = 0;
    tm_http_parser_init(p, lim, response);
    while (ev != TM_HTTP_EV_DONE && ev != TM_HTTP_EV_BAD) {
        size_t end = cut == 0 ? TM_MIN(at + 1, len) : at < cut ? TM_MIN(cut, len) : len;
        size_t used = 0;
        /* A private copy of exactly these bytes lets the address sanitizer see every overread. */
        char *piece = malloc(end - at + 1);
        memcpy(piece, data + at, end - at);
        ev = tm_http_parser_feed(p, piece, end - at, &used);
        free(piece);
        assert_true(used <= end - at);
        if (ev == TM_HTTP_EV_MORE)
            assert_int_equal(used, end - at);
        at += used;
        if (ev == TM_HTTP_EV_MORE && at == len)
            break;
    }
    if (taken)
        *taken = at;
    return ev == TM_HTTP_EV_DONE ? 0 : ev == TM_HTTP_EV_BAD ? p->bad_status : -1;
}

static void check_all_cuts(const char *name, const char *data, size_t len, int expect)
{
    for (size_t cut = 0; cut <= len; cut++) {
        tm_http_parser p;
        int got = run(&p, &limits, false, data, len, cut, NULL);
        if (got != expect)
            fail_msg("%s, cut at %zu: got %d (%s), expected %d", name, cut, got,
                     p.bad_why ? p.bad_why : "", expect);
        tm_http_parser_deinit(&p);
    }
}

#define H  "Host: a\r\n"
#define G  "GET / HTTP/1.1\r\n" H
#define P  "POST /x HTTP/1.1\r\n" H
#define TE "Transfer-Encoding: chunked\r\n"

/* status: 0 = accepted, -1 = more is needed, else the refusal. Bytes may hold NUL, so they carry a size. */
static const struct byte_case {
    const char *name;
    int status;
    const char *bytes;
    size_t len;
} cases[] = {
#define CASE(status, name, bytes)                                                                  \
    {                                                                                              \
        name, status, bytes, sizeof(bytes) - 1                                                     \
    }
    CASE(0, "plain", G "\r\n"),
    CASE(0, "one empty line before", "\r\n" G "\r\n"),
    CASE(400, "two empty lines before", "\r\n\r\n" G "\r\n"),
    CASE(-1, "no end", G),
    CASE(0, "HTTP/1.0 without Host", "GET / HTTP/1.0\r\n\r\n"),
    CASE(400, "no version", "GET /\r\n\r\n"),
    CASE(400, "HTTP/0.9 style", "GET / \r\n\r\n"),
    CASE(505, "HTTP/2.0", "GET / HTTP/2.0\r\n" H "\r\n"),
    CASE(505, "HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    CASE(505, "HTTP/1.2", "GET / HTTP/1.2\r\n" H "\r\n"),
    CASE(400, "HTTP/1.10", "GET / HTTP/1.10\r\n" H "\r\n"),
    CASE(400, "lower-case version", "GET / http/1.1\r\n" H "\r\n"),
    CASE(400, "two spaces", "GET  / HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "tab in request line", "GET\t/ HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "leading space", " GET / HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "trailing space", "GET / HTTP/1.1 \r\n" H "\r\n"),
    CASE(400, "space in target", "GET /a b HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "bad method", "G(T / HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "TLS hello", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    CASE(400, "NUL in request line", "GET /\0 HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "bare LF after request line", "GET / HTTP/1.1\n" H "\r\n"),
    CASE(400, "bare LF after field", "GET / HTTP/1.1\r\nHost: a\n\r\n"),
    CASE(400, "bare LF at the end", G "\n"),
    CASE(400, "bare CR in field", "GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n"),
    CASE(400, "bare CR in request line", "GET /\r HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "CR CR LF", "GET / HTTP/1.1\r\r\n" H "\r\n"),
    /* targets */
    CASE(0, "absolute form", "GET http://a/b?c HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "absolute form without path", "GET http://a HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "authority form", "CONNECT a:80 HTTP/1.1\r\n" H "\r\n"),
    CASE(0, "asterisk form", "OPTIONS * HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "relative target", "GET a HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "fragment", "GET /a#b HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "percent NUL", "GET /a%00 HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "percent control", "GET /a%0d%0a HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "bad escape", "GET /a%2 HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "bad escape letter", "GET /a%zz HTTP/1.1\r\n" H "\r\n"),
    CASE(0, "escaped UTF-8", "GET /%C3%A9 HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "overlong UTF-8", "GET /%C0%AF HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "raw high byte", "GET /\xc3\xa9 HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "dot dot", "GET /a/../b HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "dot dot at the end", "GET /a/.. HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "escaped dot dot", "GET /a/%2e%2E/b HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "dot dot between escaped slashes", "GET /a%2f..%2fb HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "single dot", "GET /./a HTTP/1.1\r\n" H "\r\n"),
    CASE(0, "dots in a name", "GET /a/..b/.c/... HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "bad escape in query", "GET /a?b=%g HTTP/1.1\r\n" H "\r\n"),
    CASE(400, "NUL in query", "GET /a?b=%00 HTTP/1.1\r\n" H "\r\n"),
    /* Host */
    CASE(400, "no Host", "GET / HTTP/1.1\r\n\r\n"),
    CASE(400, "two Hosts", G H "\r\n"),
    CASE(400, "empty Host", "GET / HTTP/1.1\r\nHost:\r\n\r\n"),
    CASE(400, "Host with path", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    CASE(400, "Host with user", "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n"),
    CASE(400, "Host with query", "GET / HTTP/1.1\r\nHost: a?b\r\n\r\n"),
    CASE(400, "Host with space", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
    CASE(0, "Host IPv6", "GET / HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n"),
    /* fields */
    CASE(0, "empty value", G "X:\r\n\r\n"),
    CASE(0, "no space after colon", G "X:y\r\n\r\n"),
    CASE(0, "high bytes in value", G "X: \xc3\xa9\r\n\r\n"),
    CASE(400, "space before colon", G "X : y\r\n\r\n"),
    CASE(400, "tab before colon", G "X\t: y\r\n\r\n"),
    CASE(400, "no colon", G "X\r\n\r\n"),
    CASE(400, "empty name", G ": y\r\n\r\n"),
    CASE(400, "folded line", G "X: y\r\n z\r\n\r\n"),
    CASE(400, "folded with tab", G "X: y\r\n\tz\r\n\r\n"),
    CASE(400, "space before the first field", "GET / HTTP/1.1\r\n " H "\r\n"),
    CASE(400, "NUL in value", G "X: a\0b\r\n\r\n"),
    CASE(400, "control in value", G "X: a\x01z\r\n\r\n"),
    CASE(400, "DEL in value", G "X: a\x7fz\r\n\r\n"),
    CASE(400, "NUL in name", G "X\0Y: a\r\n\r\n"),
    CASE(400, "high byte in name", G "X\xc3: a\r\n\r\n"),
    CASE(400, "two Authorizations", G "Authorization: a\r\nauthorization: b\r\n\r\n"),
    /* lengths */
    CASE(0, "body", P "Content-Length: 3\r\n\r\nabc"),
    CASE(-1, "short body", P "Content-Length: 4\r\n\r\nabc"),
    CASE(0, "length 0", P "Content-Length: 0\r\n\r\n"),
    CASE(0, "body on GET", G "Content-Length: 1\r\n\r\na"),
    CASE(400, "negative", P "Content-Length: -1\r\n\r\n"),
    CASE(400, "plus", P "Content-Length: +5\r\n\r\nabcde"),
    CASE(400, "hex", P "Content-Length: 0x5\r\n\r\nabcde"),
    CASE(400, "leading zero", P "Content-Length: 05\r\n\r\nabcde"),
    CASE(400, "list", P "Content-Length: 5,5\r\n\r\nabcde"),
    CASE(400, "inner space", P "Content-Length: 5 5\r\n\r\nabcde"),
    CASE(400, "empty length", P "Content-Length:\r\n\r\n"),
    CASE(400, "twice equal", P "Content-Length: 5\r\nContent-Length: 5\r\n\r\nabcde"),
    CASE(400, "twice different", P "Content-Length: 5\r\ncontent-length: 6\r\n\r\nabcde"),
    CASE(413, "10 GB", P "Content-Length: 10000000000\r\n\r\n"),
    CASE(413, "2^64", P "Content-Length: 18446744073709551616\r\n\r\n"),
    CASE(413, "40 digits", P "Content-Length: 1234567890123456789012345678901234567890\r\n\r\n"),
    CASE(400, "length and chunked", P "Content-Length: 5\r\n" TE "\r\n0\r\n\r\n"),
    CASE(400, "chunked and length", P TE "Content-Length: 5\r\n\r\n0\r\n\r\n"),
    CASE(400, "chunked in HTTP/1.0", "POST / HTTP/1.0\r\n" TE "\r\n0\r\n\r\n"),
    CASE(400, "xchunked", P "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    CASE(400, "chunked, identity", P "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
    CASE(400, "gzip, chunked", P "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    CASE(400, "identity", P "Transfer-Encoding: identity\r\n\r\n"),
    CASE(400, "two codings", P TE TE "\r\n0\r\n\r\n"),
    CASE(400, "coding with vertical tab",
         P "Transfer-Encoding: \x0b"
           "chunked\r\n\r\n0\r\n\r\n"),
    CASE(0, "coding after tab, upper case", P "Transfer-Encoding:\tChunkED\r\n\r\n0\r\n\r\n"),
    CASE(415, "gzip body", P "Content-Encoding: gzip\r\nContent-Length: 1\r\n\r\na"),
    CASE(0, "identity body", P "Content-Encoding: identity\r\nContent-Length: 1\r\n\r\na"),
    CASE(0, "expect", P "Expect: 100-Continue\r\nContent-Length: 1\r\n\r\na"),
    CASE(417, "other expectation", P "Expect: 200-ok\r\n\r\n"),
    /* chunks */
    CASE(0, "chunks", P TE "\r\n3\r\nabc\r\n1;x=y\r\nd\r\n0\r\n\r\n"),
    CASE(0, "upper hex, zeros", P TE "\r\n0A\r\n0123456789\r\n000\r\n\r\n"),
    CASE(0, "trailer", P TE "\r\n1\r\na\r\n0\r\nX: y\r\n\r\n"),
    CASE(-1, "no last chunk", P TE "\r\n1\r\na\r\n"),
    CASE(400, "empty size", P TE "\r\n\r\n"),
    CASE(400, "negative size", P TE "\r\n-1\r\n\r\n"),
    CASE(400, "0x size", P TE "\r\n0x5\r\nabcde\r\n0\r\n\r\n"),
    CASE(400, "space before size", P TE "\r\n 5\r\nabcde\r\n0\r\n\r\n"),
    CASE(400, "space after size", P TE "\r\n5 \r\nabcde\r\n0\r\n\r\n"),
    CASE(400, "nine digits", P TE "\r\n000000001\r\na\r\n0\r\n\r\n"),
    CASE(0, "eight digits", P TE "\r\n00000001\r\na\r\n0\r\n\r\n"),
    CASE(413, "huge chunk", P TE "\r\nffffffff\r\n"),
    CASE(400, "seventeen digits", P TE "\r\n10000000000000001\r\n"),
    CASE(400, "bare LF after size", P TE "\r\n1\na\r\n0\r\n\r\n"),
    CASE(400, "missing CRLF after data", P TE "\r\n1\r\nab\r\n0\r\n\r\n"),
    CASE(400, "bare LF after data", P TE "\r\n1\r\na\n0\r\n\r\n"),
    CASE(400, "bare LF in extension", P TE "\r\n1;a\nb\r\na\r\n0\r\n\r\n"),
    CASE(400, "control in extension", P TE "\r\n1;a\x01\r\na\r\n0\r\n\r\n"),
    CASE(400, "length in trailer", P TE "\r\n0\r\nContent-Length: 5\r\n\r\n"),
    CASE(400, "coding in trailer", P TE "\r\n0\r\n" TE "\r\n"),
    CASE(400, "Host in trailer", P TE "\r\n0\r\n" H "\r\n"),
    CASE(400, "folded trailer", P TE "\r\n0\r\nX: y\r\n z\r\n\r\n"),
    CASE(400, "bare LF in trailer", P TE "\r\n0\r\nX: y\n\r\n"),
#undef CASE
};

static void test_byte_table(void **state)
{
    (void)state;
    for (size_t i = 0; i < TM_ARRAY_LEN(cases); i++)
        check_all_cuts(cases[i].name, cases[i].bytes, cases[i].len, cases[i].status);
}

static void test_values(void **state)
{
    (void)state;
    static const char bytes[] = "POST /v1/m%2Fx%20y?a=1&b=%41+c&flag&=e HTTP/1.1\r\nHost: h\r\n"
                                "X-One:  padded value \t\r\nx-one: second\r\n" TE "\r\n"
                                "3\r\nabc\r\n2;e\r\nde\r\n0\r\nT: t\r\n\r\nGET /next";
    size_t len = sizeof(bytes) - 1, end = len - strlen("GET /next");
    for (size_t cut = 0; cut <= len; cut++) {
        tm_http_parser p;
        size_t taken;
        assert_int_equal(run(&p, &limits, false, bytes, len, cut, &taken), 0);
        assert_int_equal(taken, end);
        assert_string_equal(tm_http_parser_method(&p), "POST");
        assert_string_equal(tm_http_parser_path(&p), "/v1/m\x01x y");
        assert_string_equal(tm_http_parser_field(&p, "X-ONE"), "padded value");
        assert_null(tm_http_parser_field(&p, "x-on"));
        assert_int_equal(p.body.len, 5);
        assert_memory_equal(p.body.data, "abcde", 5);
        char flat[128];
        size_t n = tm_http_query_flatten(tm_http_parser_query(&p), flat);
        assert_string_equal(tm_http_query_find(flat, n, "a"), "1");
        assert_string_equal(tm_http_query_find(flat, n, "b"), "A c");
        assert_string_equal(tm_http_query_find(flat, n, "flag"), "");
        assert_string_equal(tm_http_query_find(flat, n, ""), "e");
        assert_null(tm_http_query_find(flat, n, "c"));
        tm_http_parser_deinit(&p);
    }
}

static void test_connection_tokens(void **state)
{
    (void)state;
    static const struct {
        const char *head;
        bool keep_alive;
    } rows[] = {
        {G "\r\n", true},
        {G "Connection: close\r\n\r\n", false},
        {G "Connection: x, CLOSE\r\n\r\n", false},
        {G "Connection: keep-alive\r\nConnection: close\r\n\r\n", false},
        {G "Connection: closed\r\n\r\n", true},
        {"GET / HTTP/1.0\r\n\r\n", false},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        tm_http_parser p;
        assert_int_equal(run(&p, &limits, false, rows[i].head, strlen(rows[i].head), 1, NULL), 0);
        assert_int_equal(p.keep_alive, rows[i].keep_alive);
        tm_http_parser_deinit(&p);
    }
}

/* ---- limits at -1, 0, +1 ------------------------------------------------------------------------------ */

static int verdict(const tm_http_limits *lim, const tm_buf *b, size_t cut)
{
    tm_http_parser p;
    int got = run(&p, lim, false, b->data, b->len, cut, NULL);
    tm_http_parser_deinit(&p);
    return got;
}

static void fill(tm_buf *b, char c, size_t n)
{
    for (size_t i = 0; i < n; i++)
        tm_buf_putc(b, c);
}

/* Builds a request that has `n` of something; the verdict must be `bad` only beyond the limit. */
static void check_edge(const char *name, void (*build)(tm_buf *b, size_t n), size_t limit, int bad)
{
    static const tm_http_limits lim = {
        .line_max = 200, .header_bytes_max = 600, .body_max = 300, .header_count_max = 10};
    for (size_t n = limit - 1; n <= limit + 1; n++) {
        tm_buf b;
        tm_buf_init(&b, 0);
        build(&b, n);
        for (size_t cut = 0; cut <= b.len; cut++) {
            int got = verdict(&lim, &b, cut);
            if (got != (n > limit ? bad : 0))
                fail_msg("%s: %zu of %zu, cut %zu: %d", name, n, limit, cut, got);
        }
        tm_buf_deinit(&b);
    }
}

static void build_request_line(tm_buf *b, size_t n)
{
    tm_buf_puts(b, "GET /");
    fill(b, 'a', n - strlen("GET / HTTP/1.1"));
    tm_buf_puts(b, " HTTP/1.1\r\n" H "\r\n");
}

static void build_header_line(tm_buf *b, size_t n)
{
    tm_buf_puts(b, G "X: ");
    fill(b, 'a', n - 3);
    tm_buf_puts(b, "\r\n\r\n");
}

static void build_header_bytes(tm_buf *b, size_t n)
{
    size_t left = n - strlen(H) - 2;
    tm_buf_puts(b, G);
    while (left) {
        size_t line = left > 200 ? 100 : left; /* the rest stays long enough for a field */
        tm_buf_puts(b, "X: ");
        fill(b, 'a', line - 5);
        tm_buf_puts(b, "\r\n");
        left -= line;
    }
    tm_buf_puts(b, "\r\n");
}

static void build_header_count(tm_buf *b, size_t n)
{
    tm_buf_puts(b, G);
    for (size_t i = 1; i < n; i++)
        tm_buf_puts(b, "X: y\r\n");
    tm_buf_puts(b, "\r\n");
}

static void build_body(tm_buf *b, size_t n)
{
    tm_buf_printf(b, P "Content-Length: %zu\r\n\r\n", n);
    fill(b, 'b', n);
}

static void build_chunked_body(tm_buf *b, size_t n)
{
    tm_buf_puts(b, P TE "\r\n");
    while (n) {
        size_t part = n > 97 ? 97 : n;
        tm_buf_printf(b, "%zx\r\n", part);
        fill(b, 'b', part);
        tm_buf_puts(b, "\r\n");
        n -= part;
    }
    tm_buf_puts(b, "0\r\n\r\n");
}

static void build_extension(tm_buf *b, size_t n)
{
    tm_buf_puts(b, P TE "\r\n1;");
    fill(b, 'e', n);
    tm_buf_puts(b, "\r\na\r\n0\r\n\r\n");
}

static void build_trailers(tm_buf *b, size_t n)
{
    tm_buf_puts(b, P TE "\r\n0\r\n");
    for (size_t i = 0; i < n; i++)
        tm_buf_puts(b, "T: t\r\n");
    tm_buf_puts(b, "\r\n");
}

static void build_trailer_line(tm_buf *b, size_t n)
{
    tm_buf_puts(b, P TE "\r\n0\r\nT: ");
    fill(b, 't', n - 3);
    tm_buf_puts(b, "\r\n\r\n");
}

static void build_host(tm_buf *b, size_t n)
{
    tm_buf_puts(b, "GET / HTTP/1.1\r\nHost: ");
    fill(b, 'h', n);
    tm_buf_puts(b, "\r\n\r\n");
}

static void test_limits(void **state)
{
    (void)state;
    check_edge("request line", build_request_line, 200, 414);
    check_edge("header line", build_header_line, 200, 431);
    check_edge("header bytes", build_header_bytes, 600, 431);
    check_edge("header count", build_header_count, 10, 431);
    check_edge("body", build_body, 300, 413);
    check_edge("chunked body", build_chunked_body, 300, 413);
    check_edge("chunk extension", build_extension, TM_HTTP_CHUNK_EXT_MAX, 400);
    check_edge("trailer lines", build_trailers, TM_HTTP_TRAILER_LINES_MAX, 400);
    check_edge("trailer line", build_trailer_line, 200, 400);
    static const tm_http_limits wide = {1000, 4000, 100, 10};
    for (size_t n = TM_HTTP_HOST_MAX - 1; n <= TM_HTTP_HOST_MAX + 1; n++) {
        tm_buf b;
        tm_buf_init(&b, 0);
        build_host(&b, n);
        assert_int_equal(verdict(&wide, &b, 1), n > TM_HTTP_HOST_MAX ? 400 : 0);
        tm_buf_deinit(&b);
    }
}

static void test_ten_thousand_headers(void **state)
{
    (void)state;
    tm_buf b;
    tm_buf_init(&b, 0);
    build_header_count(&b, 10000);
    assert_int_equal(verdict(&limits, &b, b.len), 431);
    tm_buf_clear(&b);
    tm_buf_puts(&b, G "X: ");
    fill(&b, 'a', 1 << 20);
    assert_int_equal(verdict(&limits, &b, b.len), 431);
    assert_int_equal(verdict(&limits, &b, 5000), 431);
    tm_buf_deinit(&b);
}

/* ---- responses ---------------------------------------------------------------------------------------- */

static void test_responses(void **state)
{
    (void)state;
    static const struct {
        const char *bytes;
        int verdict; /* before the end of input */
        int eof;     /* 0 = complete at the end of input */
        const char *body;
    } rows[] = {
        {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", 0, 0, "hi"},
        {"HTTP/1.1 200 OK\r\n" TE "\r\n2\r\nhi\r\n0\r\n\r\n", 0, 0, "hi"},
        {"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", 0, 0, "hi"},
        {"HTTP/1.1 204 No Content\r\n\r\n", 0, 0, ""},
        {"HTTP/1.0 200 OK\r\n\r\nhi", -1, 0, "hi"},
        {"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", 0, 0, ""},
        {"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi", -1, 400, "hi"},
        {"HTTP/1.1 200 OK\r\n" TE "\r\n2\r\nhi\r\n", -1, 400, "hi"},
        {"HTTP/1.1 20 OK\r\n\r\n", 400, 400, ""},
        {"ICY 200 OK\r\n\r\n", 400, 400, ""},
        {"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi", 400, 400, ""},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        size_t len = strlen(rows[i].bytes);
        for (size_t cut = 0; cut <= len; cut++) {
            tm_http_parser p;
            int got = run(&p, &limits, true, rows[i].bytes, len, cut, NULL);
            if (got != rows[i].verdict)
                fail_msg("response %zu, cut %zu: %d %s", i, cut, got, p.bad_why ? p.bad_why : "");
            assert_string_equal(p.body.data ? p.body.data : "", rows[i].body);
            bool whole = tm_http_parser_eof(&p) == TM_HTTP_EV_DONE;
            assert_int_equal(whole, rows[i].eof == 0);
            tm_http_parser_deinit(&p);
        }
    }
}

/* Random damage to valid requests: any verdict, but the same one for any fragmentation, and no crash. */
static void test_mutations(void **state)
{
    (void)state;
    unsigned seed = (unsigned)tm_clock_ns();
    const char *given = getenv("TM_SEED");
    if (given)
        seed = (unsigned)strtoul(given, NULL, 10);
    print_message("seed %u\n", seed);
    for (int round = 0; round < 20000; round++) {
        const struct byte_case *c = &cases[(size_t)rand_r(&seed) % TM_ARRAY_LEN(cases)];
        char bytes[512];
        size_t len = TM_MIN(c->len, sizeof(bytes));
        memcpy(bytes, c->bytes, len);
        for (int hits = 1 + rand_r(&seed) % 3; hits > 0; hits--) {
            static const char nasty[] = "\r\n\0 \t:;%0fx,\x7f\xff";
            bytes[(size_t)rand_r(&seed) % len] = nasty[(size_t)rand_r(&seed) % sizeof(nasty)];
        }
        tm_http_parser whole, bitwise, cut;
        int a = run(&whole, &limits, false, bytes, len, len, NULL);
        int b = run(&bitwise, &limits, false, bytes, len, 0, NULL);
        int d = run(&cut, &limits, false, bytes, len, 1 + (size_t)rand_r(&seed) % len, NULL);
        assert_int_equal(a, b);
        assert_int_equal(a, d);
        tm_http_parser_deinit(&whole);
        tm_http_parser_deinit(&bitwise);
        tm_http_parser_deinit(&cut);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_byte_table),
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_connection_tokens),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_ten_thousand_headers),
        cmocka_unit_test(test_responses),
        cmocka_unit_test(test_mutations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
