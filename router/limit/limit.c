/* A token bucket that holds one minute's worth of requests, and a counter of open ones.
 *
 * A full minute as the bucket's size lets a client send its whole allowance in one burst, which is what
 * "N requests per minute" promises; after that requests come at the steady rate. */
#include "router/limit/limit.h"

#include <math.h>

#include "common/check.h"

#define MINUTE_MS           60000.0
#define CONCURRENT_RETRY_MS 1000 /* nobody knows when an open request ends: ask again soon */

static double filled(const tm_limit *l, const tm_limit_opts *o, int64_t now_ms)
{
    double cap = (double)o->requests_per_minute;
    if (l->seen_ms == 0)
        return cap;
    double gained = (double)(now_ms - l->seen_ms) * cap / MINUTE_MS;
    return TM_MIN(cap, l->spare + TM_MAX(gained, 0.0));
}

tm_limit_verdict tm_limit_enter(tm_limit *l, const tm_limit_opts *o, int64_t now_ms,
                                int64_t *retry_after_ms)
{
    if (o->concurrent > 0 && l->active >= o->concurrent) {
        *retry_after_ms = CONCURRENT_RETRY_MS;
        return TM_LIMIT_CONCURRENT;
    }
    if (o->requests_per_minute > 0) {
        double spare = filled(l, o, now_ms);
        if (spare < 1) {
            *retry_after_ms =
                (int64_t)ceil((1 - spare) * MINUTE_MS / (double)o->requests_per_minute);
            return TM_LIMIT_RATE;
        }
        l->spare = spare - 1;
        l->seen_ms = now_ms;
    }
    l->active++;
    return TM_LIMIT_OK;
}

void tm_limit_leave(tm_limit *l)
{
    TM_ASSERT(l->active > 0);
    l->active--;
}

int64_t tm_limit_remaining(const tm_limit *l)
{
    return (int64_t)l->spare;
}

int64_t tm_limit_full_in_ms(const tm_limit *l, const tm_limit_opts *o)
{
    if (o->requests_per_minute <= 0)
        return 0;
    double missing = (double)o->requests_per_minute - l->spare;
    return (int64_t)ceil(TM_MAX(missing, 0.0) * MINUTE_MS / (double)o->requests_per_minute);
}
