/* The watchdog: a thread that notices a step that makes no progress.
 *
 * The limit of a step is fixed, or max(5 s, 20 x the median of recent steps), where the median is also taken per
 * token so that a long prompt after short decodes has its time. Until some steps are known the limit is ten
 * minutes: the first ones touch cold memory. Between steps and while idle it sleeps without waking up. */
#ifndef TM_ENGINE_WATCHDOG_H
#define TM_ENGINE_WATCHDOG_H

#include <stdint.h>

#include "common/status.h"

typedef struct tm_watchdog tm_watchdog;

typedef struct tm_watchdog_opts {
    int64_t fixed_ms; /* > 0: the limit of every step */
    /* Called once on the watchdog's thread, which ends afterwards. */
    void (*stalled)(void *user, int64_t after_ms);
    void *user;
} tm_watchdog_opts;

tm_status tm_watchdog_create(tm_watchdog **out, const tm_watchdog_opts *opts, tm_err *err);
void tm_watchdog_destroy(tm_watchdog *w);
/* Around each step, by the engine thread. */
void tm_watchdog_begin(tm_watchdog *w, int tokens);
void tm_watchdog_end(tm_watchdog *w);

/* The limit for a step of this many tokens, given the last n steps; exposed for its test. */
typedef struct tm_watchdog_step {
    int64_t ms;
    int tokens;
} tm_watchdog_step;
int64_t tm_watchdog_limit_ms(const tm_watchdog_step *steps, int n, int tokens);

#endif
