/* Limits of one key: requests per minute and requests at once. A value type without a clock: the caller
 * passes the time, so tests need no sleeping. Loop thread only. */
#ifndef TM_ROUTER_LIMIT_LIMIT_H
#define TM_ROUTER_LIMIT_LIMIT_H

#include <stdbool.h>
#include <stdint.h>

typedef struct tm_limit_opts {
    int64_t requests_per_minute; /* 0 = off */
    int64_t concurrent;          /* 0 = off */
} tm_limit_opts;

/* Zeroed = new: the bucket is full at the first request. */
typedef struct tm_limit {
    double spare;    /* requests that may come now */
    int64_t seen_ms; /* when spare was last brought up to date; 0 = never */
    int64_t active;
} tm_limit;

typedef enum tm_limit_verdict { TM_LIMIT_OK, TM_LIMIT_RATE, TM_LIMIT_CONCURRENT } tm_limit_verdict;

/* OK: the request counts until tm_limit_leave. Otherwise nothing changed and *retry_after_ms says when to
 * come again. now_ms > 0. */
tm_limit_verdict tm_limit_enter(tm_limit *l, const tm_limit_opts *o, int64_t now_ms,
                                int64_t *retry_after_ms);
void tm_limit_leave(tm_limit *l);
/* For the x-ratelimit headers: whole requests left, and when the bucket is full again. */
int64_t tm_limit_remaining(const tm_limit *l);
int64_t tm_limit_full_in_ms(const tm_limit *l, const tm_limit_opts *o);

#endif
