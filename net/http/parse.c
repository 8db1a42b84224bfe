/* The HTTP/1.1 parser: a line collector for heads and trailers, a byte machine for chunk framing.
 *
 * evhttp was not taken: it repairs what it should refuse (bare LF, folded lines, lengths given twice), has no
 * bound on the number of fields, and stops reading while an answer is pending, so that a client's leaving is
 * not seen. A parser without a socket is testable from memory at every fragmentation and can be fuzzed.
 *
 * Every rule that protects framing answers 400 and the caller closes: two lengths (even equal ones), length
 * and chunked together, any coding but plain "chunked", white space around field names, folded lines, bare
 * CR or LF, control bytes. */
#include "net/http/parse.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "common/check.h"

enum {
    ST_START_LINE,
    ST_FIELDS,
    ST_FIXED,
    ST_UNTIL_EOF,
    ST_CHUNK_SIZE,
    ST_CHUNK_EXT,
    ST_CHUNK_SIZE_LF,
    ST_CHUNK_DATA,
    ST_CHUNK_DATA_CR,
    ST_CHUNK_DATA_LF,
    ST_TRAILER,
    ST_DONE,
    ST_BAD
};

tm_http_event tm_http_refuse(tm_http_parser *p, int status, const char *why)
{
    p->state = ST_BAD;
    p->bad_status = status;
    p->bad_why = why;
    return TM_HTTP_EV_BAD;
}

void tm_http_parser_init(tm_http_parser *p, const tm_http_limits *limits, bool response)
{
    memset(p, 0, sizeof(*p));
    p->limits = limits;
    p->response = response;
    p->query = UINT32_MAX;
    /* A line may overshoot its limit by its CRLF and one byte before it is refused. */
    tm_buf_init(&p->head, 2 * limits->line_max + limits->header_bytes_max + 16);
    tm_buf_init(&p->trailer, limits->line_max + 16);
    tm_buf_init(&p->body, limits->body_max + 1);
}

void tm_http_parser_deinit(tm_http_parser *p)
{
    tm_buf_deinit(&p->head);
    tm_buf_deinit(&p->trailer);
    tm_buf_deinit(&p->body);
    free(p->fields);
    p->fields = NULL;
}

/* ---- start lines -------------------------------------------------------------------------------------- */

/* "HTTP/1.0" and "HTTP/1.1"; other well-formed versions are 505. */
static int parse_version(tm_http_parser *p, const char *v)
{
    if (strncmp(v, "HTTP/", 5) != 0 || v[5] < '0' || v[5] > '9' || v[6] != '.' || v[7] < '0' ||
        v[7] > '9')
        return 400;
    if (v[5] != '1' || v[7] > '1')
        return 505;
    p->minor = (uint8_t)(v[7] - '0');
    p->keep_alive = p->minor == 1;
    return 0;
}

static tm_http_event take_request_line(tm_http_parser *p, char *line, size_t len)
{
    char *sp1 = memchr(line, ' ', len);
    char *sp2 = sp1 ? memchr(sp1 + 1, ' ', len - (size_t)(sp1 + 1 - line)) : NULL;
    if (!sp2 || strlen(line) != len || strlen(sp2 + 1) != 8 ||
        !tm_http_is_token(line, (size_t)(sp1 - line)))
        return tm_http_refuse(p, 400, "malformed request line");
    *sp1 = '\0';
    *sp2 = '\0';
    int status = parse_version(p, sp2 + 1);
    if (status)
        return tm_http_refuse(p, status, "unsupported HTTP version");
    char *path, *query;
    if (!tm_http_target_split(sp1 + 1, &path, &query))
        return tm_http_refuse(p, 400, "malformed request target");
    p->method = (uint32_t)(line - p->head.data);
    p->path = (uint32_t)(path - p->head.data);
    p->query = query ? (uint32_t)(query - p->head.data) : UINT32_MAX;
    p->state = ST_FIELDS;
    return TM_HTTP_EV_MORE;
}

static tm_http_event take_status_line(tm_http_parser *p, char *line, size_t len)
{
    if (strlen(line) != len || len < 12 || line[8] != ' ' || (len > 12 && line[12] != ' '))
        return tm_http_refuse(p, 400, "malformed status line");
    if (parse_version(p, line))
        return tm_http_refuse(p, 400, "unsupported HTTP version");
    int status = 0;
    for (int i = 9; i < 12; i++) {
        if (line[i] < '0' || line[i] > '9')
            return tm_http_refuse(p, 400, "malformed status line");
        status = status * 10 + (line[i] - '0');
    }
    if (status < 100)
        return tm_http_refuse(p, 400, "malformed status line");
    p->status = status;
    p->state = ST_FIELDS;
    return TM_HTTP_EV_MORE;
}

/* ---- end of the head ---------------------------------------------------------------------------------- */

static tm_http_event finish_response_head(tm_http_parser *p)
{
    if (p->status < 200) {
        /* An interim answer: the real head follows. */
        tm_http_parser fresh;
        tm_http_parser_init(&fresh, p->limits, true);
        fresh.sink = p->sink;
        fresh.sink_user = p->sink_user;
        fresh.head_only = p->head_only;
        fresh.started = true;
        tm_http_parser_deinit(p);
        *p = fresh;
        return TM_HTTP_EV_MORE;
    }
    if (p->head_only || p->status == 204 || p->status == 304)
        p->state = ST_FIXED;
    else if (p->chunked)
        p->state = ST_CHUNK_SIZE;
    else if (p->has_length)
        p->state = ST_FIXED, p->remaining = p->length;
    else
        p->state = ST_UNTIL_EOF;
    return TM_HTTP_EV_HEAD;
}

static tm_http_event finish_head(tm_http_parser *p)
{
    if (p->chunked && (p->has_length || p->minor == 0))
        return tm_http_refuse(p, 400, "ambiguous message length");
    if (p->response)
        return finish_response_head(p);
    if (p->minor == 1 && !p->has_host)
        return tm_http_refuse(p, 400, "missing Host field");
    if (p->has_length && p->length > p->limits->body_max)
        return tm_http_refuse(p, 413, "request body too large");
    p->remaining = p->has_length ? p->length : 0;
    p->state = p->chunked ? ST_CHUNK_SIZE : ST_FIXED;
    return TM_HTTP_EV_HEAD;
}

/* One complete line without its CRLF, NUL-terminated in head. */
static tm_http_event take_line(tm_http_parser *p, char *line, size_t len)
{
    if (p->state == ST_FIELDS)
        return len ? tm_http_take_field(p, line, len) : finish_head(p);
    if (len == 0) {
        /* RFC 9112 2.2: one empty line before a request is the tail of an older client's body. */
        p->head.len = p->line_start;
        return p->response || ++p->blank_lines > 1
                   ? tm_http_refuse(p, 400, "empty line in place of a head")
                   : TM_HTTP_EV_MORE;
    }
    return p->response ? take_status_line(p, line, len) : take_request_line(p, line, len);
}

static tm_http_event refuse_long_line(tm_http_parser *p)
{
    return p->state == ST_START_LINE ? tm_http_refuse(p, 414, "request line too long")
                                     : tm_http_refuse(p, 431, "header line too long");
}

static tm_http_event step_line(tm_http_parser *p, const char *data, size_t len, size_t *used)
{
    if (len == 0)
        return TM_HTTP_EV_MORE;
    if (!p->started) {
        p->started = true;
        if (*data != '\r' && !tm_http_is_token(data, 1))
            return tm_http_refuse(p, 400, "not an HTTP request");
    }
    const char *nl = memchr(data, '\n', len);
    size_t take = nl ? (size_t)(nl - data) + 1 : len;
    size_t total = p->head.len - p->line_start + take; /* with CR, LF when complete */
    *used = take;
    if (total > p->limits->line_max + (nl ? 2 : 1))
        return refuse_long_line(p);
    if (p->state == ST_FIELDS) {
        p->header_bytes += take;
        if (p->header_bytes > p->limits->header_bytes_max)
            return tm_http_refuse(p, 431, "header fields too large");
    }
    if (!tm_buf_append(&p->head, data, take))
        return tm_http_refuse(p, 503, "out of memory");
    if (!nl)
        return TM_HTTP_EV_MORE;
    if (total < 2 || p->head.data[p->head.len - 2] != '\r')
        return tm_http_refuse(p, 400, "bare line feed");
    char *line = p->head.data + p->line_start;
    p->head.data[p->head.len - 2] = '\0';
    p->head.len -= 1; /* keeps the NUL that ends the line's last string */
    tm_http_event ev = take_line(p, line, total - 2);
    p->line_start = p->head.len;
    return ev;
}

/* ---- bodies ------------------------------------------------------------------------------------------- */

static bool give_body(tm_http_parser *p, const char *data, size_t len)
{
    p->body_bytes += len;
    if (p->sink)
        return p->sink(p->sink_user, data, len);
    return tm_buf_append(&p->body, data, len);
}

static tm_http_event step_fixed(tm_http_parser *p, const char *data, size_t len, size_t *used)
{
    size_t take = len < p->remaining ? len : (size_t)p->remaining;
    if (take && !give_body(p, data, take))
        return tm_http_refuse(p, 503, "out of memory");
    *used = take;
    p->remaining -= take;
    if (p->remaining)
        return TM_HTTP_EV_MORE;
    if (p->state == ST_CHUNK_DATA) {
        p->state = ST_CHUNK_DATA_CR;
        return TM_HTTP_EV_MORE;
    }
    p->state = ST_DONE;
    return TM_HTTP_EV_DONE;
}

static tm_http_event step_until_eof(tm_http_parser *p, const char *data, size_t len, size_t *used)
{
    *used = len;
    if (len && !give_body(p, data, len))
        return tm_http_refuse(p, 503, "out of memory");
    return TM_HTTP_EV_MORE;
}

static tm_http_event take_size_digit(tm_http_parser *p, char c)
{
    int lower = c | 32;
    int digit = c >= '0' && c <= '9'           ? c - '0'
                : lower >= 'a' && lower <= 'f' ? lower - 'a' + 10
                                               : -1;
    if (digit >= 0) {
        if (++p->chunk_digits > TM_HTTP_CHUNK_DIGITS_MAX)
            return tm_http_refuse(p, 400, "chunk size too long");
        p->remaining = p->remaining * 16 + (uint64_t)digit;
        return TM_HTTP_EV_MORE;
    }
    if (p->chunk_digits == 0 || (c != ';' && c != '\r'))
        return tm_http_refuse(p, 400, "malformed chunk size");
    p->state = c == ';' ? ST_CHUNK_EXT : ST_CHUNK_SIZE_LF;
    return TM_HTTP_EV_MORE;
}

static tm_http_event take_ext_byte(tm_http_parser *p, char c)
{
    if (c == '\r') {
        p->state = ST_CHUNK_SIZE_LF;
        return TM_HTTP_EV_MORE;
    }
    if (((unsigned char)c < 0x20 && c != '\t') || c == 0x7f)
        return tm_http_refuse(p, 400, "malformed chunk extension");
    if (++p->ext_bytes > TM_HTTP_CHUNK_EXT_MAX)
        return tm_http_refuse(p, 400, "chunk extensions too long");
    return TM_HTTP_EV_MORE;
}

static tm_http_event begin_chunk(tm_http_parser *p)
{
    p->chunk_digits = 0;
    if (!p->sink && p->body_bytes + p->remaining > p->limits->body_max)
        return tm_http_refuse(p, 413, "request body too large");
    p->state = p->remaining ? ST_CHUNK_DATA : ST_TRAILER;
    return TM_HTTP_EV_MORE;
}

static tm_http_event step_chunk_byte(tm_http_parser *p, const char *data, size_t len, size_t *used)
{
    if (len == 0)
        return TM_HTTP_EV_MORE;
    *used = 1;
    switch (p->state) {
    case ST_CHUNK_SIZE:
        return take_size_digit(p, *data);
    case ST_CHUNK_EXT:
        return take_ext_byte(p, *data);
    case ST_CHUNK_SIZE_LF:
        return *data == '\n' ? begin_chunk(p) : tm_http_refuse(p, 400, "malformed chunk line");
    case ST_CHUNK_DATA_CR:
        p->state = ST_CHUNK_DATA_LF;
        return *data == '\r' ? TM_HTTP_EV_MORE
                             : tm_http_refuse(p, 400, "chunk longer than its size");
    default:
        p->state = ST_CHUNK_SIZE;
        return *data == '\n' ? TM_HTTP_EV_MORE : tm_http_refuse(p, 400, "malformed chunk end");
    }
}

static tm_http_event take_trailer(tm_http_parser *p, char *line, size_t len)
{
    if (len == 0) {
        tm_buf_deinit(&p->trailer);
        p->state = ST_DONE;
        return TM_HTTP_EV_DONE;
    }
    if (++p->trailer_lines > TM_HTTP_TRAILER_LINES_MAX)
        return tm_http_refuse(p, 400, "too many trailer lines");
    if (tm_http_check_trailer(p, line, len) == TM_HTTP_EV_BAD)
        return TM_HTTP_EV_BAD;
    tm_buf_clear(&p->trailer);
    return TM_HTTP_EV_MORE;
}

static tm_http_event step_trailer(tm_http_parser *p, const char *data, size_t len, size_t *used)
{
    if (len == 0)
        return TM_HTTP_EV_MORE;
    const char *nl = memchr(data, '\n', len);
    size_t take = nl ? (size_t)(nl - data) + 1 : len;
    *used = take;
    if (p->trailer.len + take > p->limits->line_max + (nl ? 2 : 1))
        return tm_http_refuse(p, 400, "trailer line too long");
    if (!tm_buf_append(&p->trailer, data, take))
        return tm_http_refuse(p, 503, "out of memory");
    if (!nl)
        return TM_HTTP_EV_MORE;
    size_t total = p->trailer.len;
    if (total < 2 || p->trailer.data[total - 2] != '\r')
        return tm_http_refuse(p, 400, "bare line feed");
    p->trailer.data[total - 2] = '\0';
    return take_trailer(p, p->trailer.data, total - 2);
}

/* ---- the machine -------------------------------------------------------------------------------------- */

typedef tm_http_event (*step_fn)(tm_http_parser *p, const char *data, size_t len, size_t *used);

static const step_fn steps[] = {
    [ST_START_LINE] = step_line,
    [ST_FIELDS] = step_line,
    [ST_FIXED] = step_fixed,
    [ST_UNTIL_EOF] = step_until_eof,
    [ST_CHUNK_SIZE] = step_chunk_byte,
    [ST_CHUNK_EXT] = step_chunk_byte,
    [ST_CHUNK_SIZE_LF] = step_chunk_byte,
    [ST_CHUNK_DATA] = step_fixed,
    [ST_CHUNK_DATA_CR] = step_chunk_byte,
    [ST_CHUNK_DATA_LF] = step_chunk_byte,
    [ST_TRAILER] = step_trailer,
};

tm_http_event tm_http_parser_feed(tm_http_parser *p, const char *data, size_t len, size_t *used)
{
    size_t at = 0;
    tm_http_event ev = TM_HTTP_EV_MORE;
    /* A step that returns MORE took all bytes or changed the state, so this ends. */
    for (;;) {
        size_t n = 0;
        uint8_t before = p->state;
        if (p->state >= ST_DONE) {
            ev = p->state == ST_DONE ? TM_HTTP_EV_DONE : TM_HTTP_EV_BAD;
            break;
        }
        ev = steps[p->state](p, data + at, len - at, &n);
        at += n;
        if (ev != TM_HTTP_EV_MORE || (at == len && p->state == before))
            break;
    }
    *used = at;
    return ev;
}

tm_http_event tm_http_parser_eof(tm_http_parser *p)
{
    if (p->state == ST_UNTIL_EOF || p->state == ST_DONE) {
        p->state = ST_DONE;
        return TM_HTTP_EV_DONE;
    }
    return tm_http_refuse(p, 400, "connection closed inside a message");
}

static bool drop_bytes(void *user, const char *data, size_t len)
{
    (void)user, (void)data, (void)len;
    return true;
}

void tm_http_parser_skip_body(tm_http_parser *p)
{
    p->sink = drop_bytes;
    tm_buf_deinit(&p->body);
}

const char *tm_http_parser_field(const tm_http_parser *p, const char *name)
{
    for (int i = 0; i < p->field_count; i++)
        if (strcasecmp(p->head.data + p->fields[i].name, name) == 0)
            return p->head.data + p->fields[i].value;
    return NULL;
}

static bool has_request_line(const tm_http_parser *p)
{
    return p->path != 0;
}

const char *tm_http_parser_method(const tm_http_parser *p)
{
    return has_request_line(p) ? p->head.data + p->method : "";
}

char *tm_http_parser_path(tm_http_parser *p)
{
    static char none[1];
    return has_request_line(p) ? p->head.data + p->path : none;
}

const char *tm_http_parser_query(const tm_http_parser *p)
{
    return p->query == UINT32_MAX ? NULL : p->head.data + p->query;
}
