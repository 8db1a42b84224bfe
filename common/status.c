/* Status names and the one table that maps a status to HTTP, gRPC and exit codes.
 *
 * A table because four protocols meet here: adding a status means adding one row, and the compiler
 * checks through the row count that none was forgotten. */
#include "common/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"

typedef struct status_row {
    const char *name;
    int http;
    int grpc; /* grpc_status_code: 1 cancelled .. 16 unauthenticated */
    int exit; /* 2 usage, 69 EX_UNAVAILABLE, 78 EX_CONFIG */
} status_row;

static const status_row g_rows[] = {
    [TM_OK] = {"ok", 200, 0, 0},
    [TM_STATUS_INVALID] = {"invalid", 400, 3, 2},
    [TM_STATUS_NOT_FOUND] = {"not_found", 404, 5, 78},
    [TM_STATUS_TOO_LARGE] = {"too_large", 413, 8, 1},
    [TM_STATUS_BUSY] = {"busy", 429, 8, 1},
    [TM_STATUS_CANCELLED] = {"cancelled", 499, 1, 1},
    [TM_STATUS_TIMEOUT] = {"timeout", 408, 4, 1},
    [TM_STATUS_UNSUPPORTED] = {"unsupported", 400, 12, 78},
    [TM_STATUS_DENIED] = {"denied", 401, 16, 1},
    [TM_STATUS_UNAVAILABLE] = {"unavailable", 503, 14, 69},
    [TM_STATUS_CLOSED] = {"closed", 503, 14, 1},
    [TM_STATUS_STALE] = {"stale", 503, 9, 1},
    [TM_STATUS_IO] = {"io", 500, 13, 1},
    [TM_STATUS_NO_MEMORY] = {"no_memory", 500, 13, 1},
    [TM_STATUS_CONFIG] = {"config", 500, 13, 78},
    [TM_STATUS_DATA] = {"data", 500, 13, 78},
    [TM_STATUS_INTERNAL] = {"internal", 500, 13, 1},
};
_Static_assert(TM_ARRAY_LEN(g_rows) == TM_STATUS_COUNT, "one row per status");

static const status_row *row_of(tm_status st)
{
    if ((int)st < 0 || st >= TM_STATUS_COUNT)
        st = TM_STATUS_INTERNAL;
    return &g_rows[st];
}

/* A message is one line whatever it quotes: a name from a file may hold any character. */
static void put_msg(tm_err *err, char *msg)
{
    for (char *c = msg; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7f)
            *c = ' ';
    memcpy(err->msg, msg, sizeof err->msg);
}

tm_status tm_err_set(tm_err *err, tm_status st, const char *file, int line, const char *fmt, ...)
{
    if (!err)
        return st;
    va_list ap;
    va_start(ap, fmt);
    char msg[sizeof err->msg]; /* the arguments may point into err->msg itself */
    int n = vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    if (n < 0)
        msg[0] = '\0';
    err->status = st;
    err->file = file;
    err->line = line;
    put_msg(err, msg);
    return st;
}

void tm_err_prefix(tm_err *err, const char *fmt, ...)
{
    if (!err)
        return;
    char msg[sizeof err->msg];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    if (n < 0)
        return;
    size_t len = TM_MIN((size_t)n, sizeof msg - 1);
    const char *const parts[] = {": ", err->msg};
    for (size_t i = 0; i < TM_ARRAY_LEN(parts); i++) {
        size_t part = TM_MIN(strlen(parts[i]), sizeof msg - 1 - len);
        memcpy(msg + len, parts[i], part);
        len += part;
    }
    msg[len] = '\0';
    put_msg(err, msg);
}

tm_status tm_err_of_file(tm_err *err, tm_status st)
{
    if (st != TM_STATUS_INVALID)
        return st;
    if (err)
        err->status = TM_STATUS_DATA;
    return TM_STATUS_DATA;
}

const char *tm_status_name(tm_status st)
{
    return row_of(st)->name;
}

int tm_status_http(tm_status st)
{
    return row_of(st)->http;
}

int tm_status_grpc(tm_status st)
{
    return row_of(st)->grpc;
}

int tm_status_exit(tm_status st)
{
    return row_of(st)->exit;
}

void tm_assert_fail(const char *expr, const char *file, int line)
{
    fprintf(stderr, "assertion failed: %s (%s:%d)\n", expr, file, line);
    fflush(stderr);
    abort();
}
