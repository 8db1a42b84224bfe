/* The growable byte buffer. Growth doubles, so appending is amortised constant; the maximum turns a
 * runaway writer into a failed buffer instead of an exhausted machine. One byte beyond len is always
 * kept for the NUL, which does not count against max. */
#include "common/buf.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"

bool tm_size_mul(size_t a, size_t b, size_t *out)
{
    size_t r;
    if (__builtin_mul_overflow(a, b, &r))
        return false;
    *out = r;
    return true;
}

bool tm_size_add(size_t a, size_t b, size_t *out)
{
    size_t r;
    if (__builtin_add_overflow(a, b, &r))
        return false;
    *out = r;
    return true;
}

void tm_buf_init(tm_buf *b, size_t max)
{
    *b = (tm_buf){.max = max ? max : TM_BUF_MAX_DEFAULT};
}

void tm_buf_deinit(tm_buf *b)
{
    free(b->data);
    *b = (tm_buf){.max = b->max};
}

void tm_buf_clear(tm_buf *b)
{
    b->len = 0;
    b->failed = false;
    if (b->data)
        b->data[0] = '\0';
}

bool tm_buf_reserve(tm_buf *b, size_t extra)
{
    if (b->failed)
        return false;
    if (b->data && extra <= b->cap - b->len)
        return true;
    size_t max = b->max ? b->max : TM_BUF_MAX_DEFAULT;
    if (b->len > max || extra > max - b->len) {
        b->failed = true;
        return false;
    }
    size_t cap = b->cap > max / 2 ? max : b->cap * 2;
    cap = TM_MAX(cap, TM_MIN((size_t)64, max));
    cap = TM_MAX(cap, b->len + extra);
    char *data = cap < SIZE_MAX ? realloc(b->data, cap + 1) : NULL;
    if (!data) {
        b->failed = true;
        return false;
    }
    b->data = data;
    b->data[b->len] = '\0';
    b->cap = cap;
    return true;
}

bool tm_buf_append(tm_buf *b, const void *data, size_t len)
{
    if (!tm_buf_reserve(b, len))
        return false;
    if (len)
        memcpy(b->data + b->len, data, len);
    b->len += len;
    b->data[b->len] = '\0';
    return true;
}

bool tm_buf_puts(tm_buf *b, const char *s)
{
    return tm_buf_append(b, s, strlen(s));
}

bool tm_buf_putc(tm_buf *b, char c)
{
    if (!tm_buf_reserve(b, 1))
        return false;
    b->data[b->len++] = c;
    b->data[b->len] = '\0';
    return true;
}

bool tm_buf_printf(tm_buf *b, const char *fmt, ...)
{
    if (b->failed)
        return false;
    va_list ap;
    va_start(ap, fmt);
    char small[256];
    va_list again;
    va_copy(again, ap);
    int n = vsnprintf(small, sizeof small, fmt, ap);
    va_end(ap);
    bool ok = false;
    if (n < 0) {
        b->failed = true;
    } else if ((size_t)n < sizeof small) {
        ok = tm_buf_append(b, small, (size_t)n);
    } else if (tm_buf_reserve(b, (size_t)n)) {
        vsnprintf(b->data + b->len, (size_t)n + 1, fmt, again);
        b->len += (size_t)n;
        ok = true;
    }
    va_end(again);
    return ok;
}

char *tm_buf_steal(tm_buf *b, size_t *len)
{
    /* An empty or failed buffer still gives a string, unless memory is out. */
    if (!b->data && !b->failed)
        tm_buf_reserve(b, 0);
    char *data = b->data;
    if (len)
        *len = b->len;
    *b = (tm_buf){.max = b->max};
    return data;
}
