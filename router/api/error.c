/* The table of error codes and the two-in-one error body. */
#include "router/api/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"

#define INVALID   "invalid_request_error"
#define SERVER    "server_error"
#define RATE      "rate_limit_error"
#define AUTH      "authentication_error"
#define NOT_FOUND "not_found_error"

static const tm_api_code_row g_rows[] = {
    [TM_API_INVALID_JSON] = {400, INVALID, "invalid_json", NULL, "The body is not valid JSON."},
    [TM_API_INVALID_TYPE] = {400, INVALID, "invalid_type", NULL, "A field has the wrong type."},
    [TM_API_INVALID_VALUE] = {400, INVALID, "invalid_value", NULL, "A field has a wrong value."},
    [TM_API_MISSING] = {400, INVALID, "missing_required_parameter", NULL, "A field is missing."},
    [TM_API_UNSUPPORTED_PARAM] = {400, INVALID, "unsupported_parameter", NULL,
                                  "A field is not supported."},
    [TM_API_UNSUPPORTED] = {400, INVALID, "unsupported_feature", NULL, "This is not supported."},
    [TM_API_CONTEXT_LENGTH] = {400, INVALID, "context_length_exceeded", NULL,
                               "The prompt is longer than the model's context."},
    [TM_API_KEY_MISSING] = {401, AUTH, "missing_api_key", NULL,
                            "No API key was given: send it as \"Authorization: Bearer KEY\"."},
    [TM_API_KEY_INVALID] = {401, AUTH, "invalid_api_key", NULL, "The API key is not known."},
    [TM_API_FORBIDDEN] = {403, "permission_error", "insufficient_role", NULL,
                          "This route needs a key with the admin role."},
    [TM_API_NO_MODEL] = {404, NOT_FOUND, "model_not_found", NULL, "The model does not exist."},
    [TM_API_NO_ROUTE] = {404, NOT_FOUND, "route_not_found", NULL, "There is no such route."},
    [TM_API_METHOD] = {405, INVALID, NULL, NULL, "The route does not have this method."},
    [TM_API_TIMEOUT] = {408, INVALID, "timeout", NULL, "The request took too long."},
    [TM_API_TOO_LARGE] = {413, INVALID, NULL, NULL, "The body is too large."},
    [TM_API_URI_LONG] = {414, INVALID, NULL, NULL, "The request line is too long."},
    [TM_API_MEDIA_TYPE] = {415, INVALID, NULL, NULL,
                           "The body must be application/json without a content encoding."},
    [TM_API_HEADERS_LARGE] = {431, INVALID, NULL, NULL, "The request headers are too large."},
    [TM_API_RATE_LIMIT] = {429, RATE, "rate_limit_exceeded", "true",
                           "The key's request limit is reached, try again later."},
    [TM_API_QUEUE_FULL] = {429, RATE, "queue_full", "true",
                           "All queues are full, try again later."},
    [TM_API_INTERNAL] = {500, SERVER, "internal_error", NULL, "Something failed in the server."},
    [TM_API_POISON] = {500, SERVER, "internal_error", "false",
                       "The request could not be served and should not be sent again."},
    [TM_API_OVERLOADED] = {503, SERVER, "engine_overloaded", "true",
                           "The server is overloaded, try again later."},
    [TM_API_NO_WORKER] = {503, SERVER, "no_worker", "true",
                          "No worker could take the request, try again later."},
    [TM_API_DRAINING] = {503, SERVER, "draining", "true",
                         "This server is shutting down, try again."},
    [TM_API_LOADING] = {503, SERVER, "model_loading", "true",
                        "No model is ready yet, try again later."},
    [TM_API_BAD_REQUEST] = {400, INVALID, NULL, NULL, "The request is not acceptable HTTP."},
};
_Static_assert(TM_ARRAY_LEN(g_rows) == TM_API_CODE_COUNT, "one row per code");

const tm_api_code_row *tm_api_code_get(tm_api_code code)
{
    TM_ASSERT((int)code >= 0 && code < TM_API_CODE_COUNT);
    return &g_rows[code];
}

bool tm_api_fail(tm_api_error *e, tm_api_code code, const char *param, const char *fmt, ...)
{
    e->code = code;
    e->retry_after_ms = 0;
    snprintf(e->param, sizeof e->param, "%s", param ? param : "");
    if (!fmt) {
        snprintf(e->message, sizeof e->message, "%s", g_rows[code].text);
        return false;
    }
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(e->message, sizeof e->message, fmt, ap);
    va_end(ap);
    if (n < 0)
        e->message[0] = '\0';
    return false;
}

tm_api_code tm_api_code_of_http(int http)
{
    static const tm_api_code codes[] = {TM_API_NO_ROUTE,      TM_API_METHOD,     TM_API_TIMEOUT,
                                        TM_API_TOO_LARGE,     TM_API_URI_LONG,   TM_API_MEDIA_TYPE,
                                        TM_API_HEADERS_LARGE, TM_API_OVERLOADED, TM_API_INTERNAL};
    for (size_t i = 0; i < TM_ARRAY_LEN(codes); i++)
        if (g_rows[codes[i]].http == http)
            return codes[i];
    return http >= 500 ? TM_API_INTERNAL : TM_API_BAD_REQUEST;
}

static void put_common(tm_jw *w, const tm_api_error *e)
{
    tm_jw_kstr(w, "message", e->message);
    tm_jw_kstr(w, "type", g_rows[e->code].type);
    tm_jw_kstr(w, "param", e->param[0] ? e->param : NULL);
}

void tm_api_error_body(const tm_api_error *e, tm_buf *out)
{
    const tm_api_code_row *row = tm_api_code_get(e->code);
    tm_jw w;
    tm_jw_init(&w, out);
    tm_jw_obj(&w);
    tm_jw_key(&w, "error");
    tm_jw_obj(&w);
    put_common(&w, e);
    tm_jw_kstr(&w, "code", row->code);
    tm_jw_obj_end(&w);
    tm_jw_kstr(&w, "object", "error");
    put_common(&w, e);
    tm_jw_kint(&w, "code", row->http);
    tm_jw_obj_end(&w);
}
