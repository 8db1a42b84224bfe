/* Request targets and query strings.
 *
 * A path is decoded exactly once, here, and whatever would let two readers see two paths is refused: bad
 * escapes, NUL and control bytes, invalid UTF-8, dot segments. An escaped slash stays apart from a real one
 * until the route is chosen (model names hold slashes, routes must not be reached through them). */
#include "net/http/parse.h"

#include <string.h>
#include <strings.h>

#include "common/json.h"

static int hex_value(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

/* The byte of "%XX", or -1. */
static int escape_value(const char *s)
{
    int hi = hex_value(s[1]);
    int lo = hi < 0 ? -1 : hex_value(s[2]);
    return lo < 0 ? -1 : hi * 16 + lo;
}

bool tm_http_is_token(const char *s, size_t len)
{
    static const char others[] = "!#$%&'*+-.^_`|~";
    for (size_t i = 0; i < len; i++) {
        char c = s[i];
        bool alnum = (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z');
        if (!alnum && (c == '\0' || !strchr(others, c)))
            return false;
    }
    return len > 0;
}

static bool decode_path(char *path)
{
    char *out = path;
    for (const char *in = path; *in; in++) {
        int c = (unsigned char)*in;
        if (c == '%') {
            c = escape_value(in);
            if (c < 0x20 || c == 0x7f)
                return false;
            in += 2;
            *out++ = c == '/' ? TM_HTTP_SLASH : (char)c;
        } else {
            *out++ = (char)c;
        }
    }
    *out = '\0';
    return tm_utf8_valid(path, (size_t)(out - path));
}

static bool is_slash(char c)
{
    return c == '/' || c == TM_HTTP_SLASH;
}

static bool has_dot_segment(const char *path)
{
    for (const char *p = path; *p; p++) {
        if (!is_slash(*p) || p[1] != '.')
            continue;
        const char *end = p[2] == '.' ? p + 3 : p + 2;
        if (*end == '\0' || is_slash(*end))
            return true;
    }
    return false;
}

static bool query_well_formed(const char *query)
{
    for (const char *p = query; *p; p++)
        if (*p == '%' && escape_value(p) <= 0)
            return false;
    return true;
}

bool tm_http_target_split(char *target, char **path, char **query)
{
    for (const char *p = target; *p; p++)
        if ((unsigned char)*p <= 0x20 || (unsigned char)*p >= 0x7f || *p == '#')
            return false;
    /* The absolute form comes from clients that take us for a proxy; its authority says nothing new. */
    static const char *const schemes[] = {"http://", "https://"};
    for (size_t i = 0; i < 2; i++) {
        size_t n = strlen(schemes[i]);
        if (strncasecmp(target, schemes[i], n) == 0) {
            if (target[n] == '/' || target[n] == '\0')
                return false;
            target = strchr(target + n, '/');
            if (!target)
                return false;
            break;
        }
    }
    if (*target != '/' && strcmp(target, "*") != 0)
        return false;
    char *mark = strchr(target, '?');
    if (mark)
        *mark++ = '\0';
    if (!decode_path(target) || has_dot_segment(target) || (mark && !query_well_formed(mark)))
        return false;
    *path = target;
    *query = mark;
    return true;
}

size_t tm_http_query_flatten(const char *query, char *out)
{
    char *to = out;
    bool in_value = false;
    for (const char *p = query;; p++) {
        if (*p == '&' || *p == '\0') {
            /* "flag" without '=' has an empty value. */
            *to++ = '\0';
            if (!in_value)
                *to++ = '\0';
            in_value = false;
            if (*p == '\0')
                break;
        } else if (*p == '=' && !in_value) {
            *to++ = '\0';
            in_value = true;
        } else if (*p == '%') {
            *to++ = (char)escape_value(p);
            p += 2;
        } else {
            *to++ = *p == '+' ? ' ' : *p;
        }
    }
    return (size_t)(to - out);
}

const char *tm_http_query_find(const char *flat, size_t len, const char *name)
{
    const char *end = flat + len;
    while (flat < end) {
        const char *value = flat + strlen(flat) + 1;
        if (strcmp(flat, name) == 0)
            return value;
        flat = value + strlen(value) + 1;
    }
    return NULL;
}
