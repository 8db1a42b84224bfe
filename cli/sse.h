/* Server-sent events from a byte stream: bytes in, one callback per `data:` line out. */
#ifndef TM_CLI_SSE_H
#define TM_CLI_SSE_H

#include <stdbool.h>
#include <stddef.h>

#include "common/buf.h"

typedef struct tm_sse {
    tm_buf line; /* an unfinished line, at most 1 MiB */
} tm_sse;

void tm_sse_init(tm_sse *s);
void tm_sse_deinit(tm_sse *s);
/* False when a line is over the bound or memory ran out. data is NUL-terminated and writable. */
bool tm_sse_feed(tm_sse *s, const char *bytes, size_t len,
                 void (*on_data)(void *user, char *data, size_t len), void *user);

#endif
