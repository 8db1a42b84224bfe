/* Which route takes a request. The table has some tens of rows, read once per request: a loop is enough. */
#include <string.h>

#include "net/http/internal.h"

static size_t route_prefix_len(const tm_http_route *route)
{
    size_t n = strlen(route->path);
    return n && route->path[n - 1] == '*' ? n - 1 : 0;
}

static bool route_takes_path(const tm_http_route *route, const char *path)
{
    size_t n = strlen(route->path);
    if (n && route->path[n - 1] == '*')
        return strncmp(route->path, path, n - 1) == 0;
    return strcmp(route->path, path) == 0;
}

static bool route_takes_method(const tm_http_route *route, const char *method)
{
    return strcmp(route->method, method) == 0 ||
           (strcmp(method, "HEAD") == 0 && strcmp(route->method, "GET") == 0);
}

/* Exact paths win over prefixes, long prefixes over short ones. */
static bool route_beats(const tm_http_route *a, const tm_http_route *b)
{
    if (!b)
        return true;
    size_t la = route_prefix_len(a), lb = route_prefix_len(b);
    bool exact_a = a->path[strlen(a->path) - 1] != '*',
         exact_b = b->path[strlen(b->path) - 1] != '*';
    return exact_a != exact_b ? exact_a : la > lb;
}

static void list_allowed(const tm_http_opts *o, const char *path, tm_buf *allow)
{
    for (int i = 0; i < o->route_count; i++) {
        const tm_http_route *route = &o->routes[i];
        if (!route_takes_path(route, path) || strstr(allow->data ? allow->data : "", route->method))
            continue;
        tm_buf_printf(allow, "%s%s%s", allow->len ? ", " : "", route->method,
                      strcmp(route->method, "GET") == 0 ? ", HEAD" : "");
    }
}

void tm_http_route_show_slashes(tm_http_req *r)
{
    for (char *p = tm_http_parser_path(&r->parser); *p; p++)
        if (*p == TM_HTTP_SLASH)
            *p = '/';
}

int tm_http_route_choose(tm_http_req *r)
{
    const tm_http_opts *o = &r->conn->server->opts;
    char *path = tm_http_parser_path(&r->parser);
    const char *method = tm_http_req_method(r);
    bool known_path = false;
    for (int i = 0; i < o->route_count; i++) {
        const tm_http_route *route = &o->routes[i];
        if (!route_takes_path(route, path))
            continue;
        /* A catch-all ("*", for preflights) says nothing about which paths exist. */
        known_path = known_path || strcmp(route->path, "*") != 0;
        if (route_takes_method(route, method) && route_beats(route, r->route))
            r->route = route;
    }
    if (!r->route && known_path) {
        tm_buf allow;
        tm_buf_init(&allow, 4096);
        list_allowed(o, path, &allow);
        tm_http_set_header(r, "Allow", allow.data);
        tm_buf_deinit(&allow);
    }
    if (r->route && strchr(r->route->path, '*'))
        r->rest = path + strlen(r->route->path) - 1;
    tm_http_route_show_slashes(r);
    return r->route ? 0 : known_path ? 405 : 404;
}
