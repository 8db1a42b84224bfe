/* The routes. A known route with another method is 405 and an unknown one 404; net/http decides that from this
 * table, and the authorise hook reads the row that matched, never the path. */
#include "router/api/internal.h"

#include "common/check.h"

#define ROUTE(method, path, open, label, fn, ...)                                                  \
    {                                                                                              \
        {method, path, open, tm_api_on_request}, label, .handle = fn, __VA_ARGS__                  \
    }

static const tm_api_route g_routes[] = {
    ROUTE("POST", "/v1/chat/completions", false, "chat_completions", tm_api_handle_chat,
          .generates = true, .json = true),
    ROUTE("POST", "/v1/completions", false, "completions", tm_api_handle_completion,
          .generates = true, .json = true),
    ROUTE("GET", "/v1/models", false, "models", tm_api_handle_models, .quiet = true),
    ROUTE("GET", "/v1/models/*", false, "models", tm_api_handle_model, .quiet = true),
    ROUTE("POST", "/tokenize", false, "tokenize", tm_api_handle_tokenize, .json = true),
    ROUTE("POST", "/detokenize", false, "detokenize", tm_api_handle_detokenize, .json = true),
    ROUTE("GET", "/health", true, "health", tm_api_handle_health, .quiet = true),
    ROUTE("GET", "/livez", true, "livez", tm_api_handle_live, .quiet = true),
    ROUTE("GET", "/readyz", true, "readyz", tm_api_handle_ready, .quiet = true),
    ROUTE("GET", "/metrics", false, "metrics", tm_api_handle_metrics, .quiet = true),
    ROUTE("GET", "/nodes/status", false, "nodes", tm_api_handle_groups, .admin = true),
};

static tm_http_route g_http[TM_ARRAY_LEN(g_routes)];

const tm_api_route *tm_api_routes(int *count)
{
    *count = (int)TM_ARRAY_LEN(g_routes);
    return g_routes;
}

const tm_http_route *tm_api_http_routes(int *count)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(g_routes); i++)
        g_http[i] = g_routes[i].http;
    *count = (int)TM_ARRAY_LEN(g_routes);
    return g_http;
}

const tm_api_route *tm_api_route_of(const tm_http_route *http)
{
    return &g_routes[http - g_http];
}
