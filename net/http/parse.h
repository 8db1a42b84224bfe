/* HTTP/1.1 messages from bytes, without a socket: request heads, response heads, fixed and chunked bodies.
 *
 * The parser takes any fragment and stops at each event; bytes after the message are left to the caller.
 * It is strict on purpose: what two parsers could read differently is refused (400) instead of repaired.
 * All strings live in one head buffer of the message and stay put once the head event was given. */
#ifndef TM_NET_HTTP_PARSE_H
#define TM_NET_HTTP_PARSE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/buf.h"

typedef enum tm_http_event {
    TM_HTTP_EV_MORE, /* all bytes were taken, the message is not complete */
    TM_HTTP_EV_HEAD, /* head complete and consistent; call again for the body, even without bytes */
    TM_HTTP_EV_DONE, /* message complete; nothing more is taken */
    TM_HTTP_EV_BAD   /* refused: bad_status and bad_why say how; the connection must be closed */
} tm_http_event;

typedef struct tm_http_limits {
    size_t line_max;         /* request, status and header line, without CRLF */
    size_t header_bytes_max; /* all header lines and the empty one, with their CRLF */
    size_t body_max;         /* after chunk decoding; ignored when a sink takes the body */
    int header_count_max;
} tm_http_limits;

typedef struct tm_http_field {
    uint32_t name, value; /* offsets in head */
} tm_http_field;

enum {
    TM_HTTP_CHUNK_DIGITS_MAX = 8,
    TM_HTTP_CHUNK_EXT_MAX = 256, /* bytes of extensions of one message */
    TM_HTTP_TRAILER_LINES_MAX = 16,
    TM_HTTP_HOST_MAX = 261 /* a DNS name of 255 bytes and a port */
};

typedef struct tm_http_parser {
    const tm_http_limits *limits; /* borrowed */
    /* When set, body bytes go here instead of into body; false refuses the message (400). */
    bool (*sink)(void *user, const char *data, size_t len);
    void *sink_user;

    bool response;  /* parses a response */
    bool head_only; /* response to HEAD: no body follows */
    uint8_t state;
    bool started; /* a first byte came */
    uint8_t blank_lines;
    uint8_t minor; /* HTTP/1.minor */
    bool keep_alive, chunked, expect_continue, has_length, has_host;
    uint16_t seen; /* bit per known field */
    int status;    /* response */
    int bad_status;
    const char *bad_why; /* static */

    tm_buf head;
    size_t line_start, header_bytes;
    uint32_t method, path, query; /* offsets in head; query is UINT32_MAX when absent */
    tm_http_field *fields;
    int field_count, field_cap;

    uint64_t length; /* Content-Length */
    uint64_t remaining;
    int chunk_digits, trailer_lines;
    size_t ext_bytes;
    tm_buf trailer;
    tm_buf body;
    uint64_t body_bytes;
} tm_http_parser;

void tm_http_parser_init(tm_http_parser *p, const tm_http_limits *limits, bool response);
void tm_http_parser_deinit(tm_http_parser *p);
/* *used <= len bytes were taken. After BAD and DONE no more calls. */
tm_http_event tm_http_parser_feed(tm_http_parser *p, const char *data, size_t len, size_t *used);
/* End of input: DONE when the message ends with the connection, BAD otherwise. */
tm_http_event tm_http_parser_eof(tm_http_parser *p);
/* Drops the body bytes that come, for a request that was answered early. */
void tm_http_parser_skip_body(tm_http_parser *p);

/* First field of that name, or NULL. Case-insensitive. */
const char *tm_http_parser_field(const tm_http_parser *p, const char *name);
/* "" before the request line is in. In the path, an escaped slash is kept as TM_HTTP_SLASH, so that it
 * cannot match a separator of a route; all else is decoded, is UTF-8 and has no dot segments. */
#define TM_HTTP_SLASH '\x01'
const char *tm_http_parser_method(const tm_http_parser *p);
char *tm_http_parser_path(tm_http_parser *p);
const char *tm_http_parser_query(const tm_http_parser *p); /* raw, well-formed escapes; or NULL */

/* fields.c, for the parser: one line without its CRLF, NUL-terminated in the head or trailer buffer. */
tm_http_event tm_http_take_field(tm_http_parser *p, char *line, size_t len);
tm_http_event tm_http_check_trailer(tm_http_parser *p, char *line, size_t len);
tm_http_event tm_http_refuse(tm_http_parser *p, int status, const char *why);

/* target.c */
/* Splits a request target in place into decoded path and raw query; false when it is not acceptable. */
bool tm_http_target_split(char *target, char **path, char **query);
/* Decodes "a=b&c=d" in place into "a\0b\0c\0d\0"; returns the bytes used. out may equal query. */
size_t tm_http_query_flatten(const char *query, char *out);
const char *tm_http_query_find(const char *flat, size_t len, const char *name);
bool tm_http_is_token(const char *s, size_t len);

#endif
