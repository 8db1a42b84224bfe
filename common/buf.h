/* A growable byte buffer with a maximum, and overflow-checked size arithmetic.
 *
 * After a failed append the buffer is `failed` and every later append is a no-op returning false, so
 * a writer may check once at the end. data is always NUL-terminated when not NULL (the NUL is not
 * counted in len). */
#ifndef TM_COMMON_BUF_H
#define TM_COMMON_BUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct tm_buf {
    char *data;
    size_t len, cap, max;
    bool failed;
} tm_buf;

#define TM_BUF_MAX_DEFAULT ((size_t)1 << 30)

void tm_buf_init(tm_buf *b, size_t max); /* max 0 = TM_BUF_MAX_DEFAULT */
void tm_buf_deinit(tm_buf *b);
void tm_buf_clear(tm_buf *b); /* keeps the memory */
bool tm_buf_reserve(tm_buf *b, size_t extra);
bool tm_buf_append(tm_buf *b, const void *data, size_t len);
bool tm_buf_puts(tm_buf *b, const char *s);
bool tm_buf_putc(tm_buf *b, char c);
bool tm_buf_printf(tm_buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
char *tm_buf_steal(tm_buf *b, size_t *len); /* caller frees; buffer is empty afterwards */

bool tm_size_mul(size_t a, size_t b, size_t *out); /* false on overflow */
bool tm_size_add(size_t a, size_t b, size_t *out);

#endif
