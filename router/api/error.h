/* Errors of the HTTP API: one table of codes, one body for all clients.
 *
 * The body carries OpenAI's nested object and, behind it, LMDeploy's flat copy (whose `code` is the HTTP
 * status). Texts are our own: no library text, no paths, no addresses. */
#ifndef TM_ROUTER_API_ERROR_H
#define TM_ROUTER_API_ERROR_H

#include <stdbool.h>
#include <stdint.h>

#include "common/buf.h"
#include "common/status.h"

typedef enum tm_api_code {
    TM_API_INVALID_JSON,
    TM_API_INVALID_TYPE,
    TM_API_INVALID_VALUE,
    TM_API_MISSING,
    TM_API_UNSUPPORTED_PARAM,
    TM_API_UNSUPPORTED,
    TM_API_CONTEXT_LENGTH,
    TM_API_KEY_MISSING,
    TM_API_KEY_INVALID,
    TM_API_FORBIDDEN,
    TM_API_NO_MODEL,
    TM_API_NO_ROUTE,
    TM_API_METHOD,
    TM_API_TIMEOUT,
    TM_API_TOO_LARGE,
    TM_API_URI_LONG,
    TM_API_MEDIA_TYPE,
    TM_API_HEADERS_LARGE,
    TM_API_RATE_LIMIT,
    TM_API_QUEUE_FULL,
    TM_API_INTERNAL,
    TM_API_POISON,
    TM_API_OVERLOADED,
    TM_API_NO_WORKER,
    TM_API_DRAINING,
    TM_API_LOADING,
    TM_API_BAD_REQUEST, /* malformed HTTP, decided by the server below */
    TM_API_CODE_COUNT
} tm_api_code;

typedef struct tm_api_code_row {
    int http;
    const char *type;
    const char *code;  /* NULL writes null */
    const char *retry; /* x-should-retry, NULL = the client's own table */
    const char *text;  /* message when nothing better is known */
} tm_api_code_row;

const tm_api_code_row *tm_api_code_get(tm_api_code code);

typedef struct tm_api_error {
    tm_api_code code;
    int64_t retry_after_ms; /* 0 = no advice */
    char param[96];         /* "" = null */
    char message[480];
} tm_api_error;

/* Fills *e and returns false, so that `return tm_api_fail(...)` works. param NULL = none; fmt NULL = the
 * row's text. */
bool tm_api_fail(tm_api_error *e, tm_api_code code, const char *param, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* The code of an HTTP status that the server below decided. */
tm_api_code tm_api_code_of_http(int http);
void tm_api_error_body(const tm_api_error *e, tm_buf *out);

#endif
