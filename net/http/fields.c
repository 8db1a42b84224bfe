/* Header fields: one line cut into name and value, and what the few fields with a meaning for framing and
 * connection do to the message. A known field that may stand once is refused when it comes again, also the
 * ones that carry keys: two of them would let a proxy and this server see two different clients. */
#include "net/http/parse.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "common/check.h"

static bool apply_host(tm_http_parser *p, const char *v)
{
    size_t n = strlen(v);
    if (p->response)
        return true;
    p->has_host = true;
    if (n == 0 || n > TM_HTTP_HOST_MAX || *v == ':')
        return false;
    /* Registered names, IPv4, [IPv6], a port; never user information, a path or a query. */
    static const char others[] = "-._~%!$&'()*+,;=[]:";
    for (size_t i = 0; i < n; i++) {
        bool alnum = (v[i] >= '0' && v[i] <= '9') || ((v[i] | 32) >= 'a' && (v[i] | 32) <= 'z');
        if (!alnum && !strchr(others, v[i]))
            return false;
    }
    return true;
}

static bool apply_length(tm_http_parser *p, const char *v)
{
    size_t n = strlen(v);
    if (n == 0 || (n > 1 && *v == '0'))
        return false;
    uint64_t length = 0;
    for (size_t i = 0; i < n; i++) {
        if (v[i] < '0' || v[i] > '9')
            return false;
        /* Saturates: anything this long is over every limit, and is refused as such. */
        length =
            length > UINT64_MAX / 10 - 1 ? UINT64_MAX / 2 : length * 10 + (uint64_t)(v[i] - '0');
    }
    p->has_length = true;
    p->length = length;
    return true;
}

static bool apply_coding(tm_http_parser *p, const char *v)
{
    p->chunked = strcasecmp(v, "chunked") == 0;
    return p->chunked;
}

static bool apply_connection(tm_http_parser *p, const char *v)
{
    while (*v) {
        size_t n = strcspn(v, ", \t");
        if (n == 5 && strncasecmp(v, "close", n) == 0)
            p->keep_alive = false;
        v += n;
        v += strspn(v, ", \t");
    }
    return true;
}

static bool apply_expect(tm_http_parser *p, const char *v)
{
    if (strcasecmp(v, "100-continue") != 0)
        return false;
    p->expect_continue = p->minor >= 1;
    return true;
}

static bool apply_content_encoding(tm_http_parser *p, const char *v)
{
    return p->response || *v == '\0' || strcasecmp(v, "identity") == 0;
}

/* Fields that may stand once, and what reads them. A row's place is its bit in `seen`. */
static const struct known_field {
    const char *name;
    bool (*apply)(tm_http_parser *p, const char *value);
    int bad_status;
    const char *bad_why;
    bool repeatable;
    bool refused_in_trailer;
} known_fields[] = {
    {"host", apply_host, 400, "bad Host field", false, true},
    {"content-length", apply_length, 400, "bad Content-Length", false, true},
    {"transfer-encoding", apply_coding, 400, "unsupported Transfer-Encoding", false, true},
    {"connection", apply_connection, 400, "bad Connection field", true, true},
    {"expect", apply_expect, 417, "unsupported expectation", false, true},
    {"content-encoding", apply_content_encoding, 415, "request bodies must not be encoded", false,
     true},
    {"authorization", NULL, 400, "", false, true},
    {"x-api-key", NULL, 400, "", false, true},
    {"content-type", NULL, 400, "", false, true},
};

static const struct known_field *find_known(const char *name)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(known_fields); i++)
        if (strcasecmp(known_fields[i].name, name) == 0)
            return &known_fields[i];
    return NULL;
}

/* Cuts "Name: value" (len bytes, then NUL) in place. */
static bool split_field(char *line, size_t len, char **name, char **value)
{
    char *colon = memchr(line, ':', len);
    if (!colon || !tm_http_is_token(line, (size_t)(colon - line)))
        return false;
    char *v = colon + 1;
    char *end = line + len;
    while (v < end && (*v == ' ' || *v == '\t'))
        v++;
    while (end > v && (end[-1] == ' ' || end[-1] == '\t'))
        end--;
    for (const char *c = v; c < end; c++)
        if (((unsigned char)*c < 0x20 && *c != '\t') || *c == 0x7f)
            return false;
    *colon = '\0';
    *end = '\0';
    *name = line;
    *value = v;
    return true;
}

static bool push_field(tm_http_parser *p, const char *name, const char *value)
{
    if (p->field_count == p->field_cap) {
        int cap = p->field_cap ? p->field_cap * 2 : 12;
        tm_http_field *grown = realloc(p->fields, (size_t)cap * sizeof(*grown));
        if (!grown)
            return false;
        p->fields = grown;
        p->field_cap = cap;
    }
    p->fields[p->field_count++] =
        (tm_http_field){(uint32_t)(name - p->head.data), (uint32_t)(value - p->head.data)};
    return true;
}

tm_http_event tm_http_take_field(tm_http_parser *p, char *line, size_t len)
{
    char *name, *value;
    if (*line == ' ' || *line == '\t')
        return tm_http_refuse(p, 400, "folded header lines are not accepted");
    if (!split_field(line, len, &name, &value))
        return tm_http_refuse(p, 400, "malformed header field");
    if (p->field_count >= p->limits->header_count_max)
        return tm_http_refuse(p, 431, "too many header fields");
    const struct known_field *known = find_known(name);
    if (known) {
        uint16_t bit = (uint16_t)(1u << (known - known_fields));
        if ((p->seen & bit) && !known->repeatable)
            return tm_http_refuse(p, 400, "a header field that may stand once was repeated");
        p->seen |= bit;
        if (known->apply && !known->apply(p, value))
            return tm_http_refuse(p, known->bad_status, known->bad_why);
    }
    if (!push_field(p, name, value))
        return tm_http_refuse(p, 503, "out of memory");
    return TM_HTTP_EV_MORE;
}

tm_http_event tm_http_check_trailer(tm_http_parser *p, char *line, size_t len)
{
    char *name, *value;
    if (!split_field(line, len, &name, &value))
        return tm_http_refuse(p, 400, "malformed trailer field");
    const struct known_field *known = find_known(name);
    if (known && known->refused_in_trailer)
        return tm_http_refuse(p, 400, "field not allowed in a trailer");
    return TM_HTTP_EV_MORE;
}
