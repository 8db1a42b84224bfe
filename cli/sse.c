/* Only `data:` lines matter to us: events of the OpenAI protocol are single lines, comments are pings. */
#include "cli/sse.h"

#include <string.h>

#define LINE_MAX_BYTES ((size_t)1 << 20)

void tm_sse_init(tm_sse *s)
{
    tm_buf_init(&s->line, LINE_MAX_BYTES);
}

void tm_sse_deinit(tm_sse *s)
{
    tm_buf_deinit(&s->line);
}

static void end_of_line(tm_sse *s, void (*on_data)(void *, char *, size_t), void *user)
{
    char *p = s->line.data;
    size_t len = s->line.len;
    if (len > 0 && p[len - 1] == '\r')
        p[--len] = '\0';
    if (len >= 5 && memcmp(p, "data:", 5) == 0) {
        size_t skip = len > 5 && p[5] == ' ' ? 6 : 5;
        on_data(user, p + skip, len - skip);
    }
    tm_buf_clear(&s->line);
}

bool tm_sse_feed(tm_sse *s, const char *bytes, size_t len, void (*on_data)(void *, char *, size_t),
                 void *user)
{
    while (len > 0) {
        const char *nl = memchr(bytes, '\n', len);
        size_t n = nl ? (size_t)(nl - bytes) : len;
        if (!tm_buf_append(&s->line, bytes, n))
            return false;
        if (!nl)
            return true;
        end_of_line(s, on_data, user);
        bytes += n + 1;
        len -= n + 1;
    }
    return true;
}
