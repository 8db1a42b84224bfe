/* The two clocks of the project: monotonic for every timer, wall time for logs and `created`.
 *
 * clock_gettime cannot fail for these two clocks on Linux, so the functions return values. */
#include "common/clock.h"

#include <errno.h>
#include <time.h>

static int64_t read_ns(clockid_t id)
{
    struct timespec ts = {0};
    clock_gettime(id, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

int64_t tm_clock_ns(void)
{
    return read_ns(CLOCK_MONOTONIC);
}

int64_t tm_clock_ms(void)
{
    return read_ns(CLOCK_MONOTONIC) / 1000000;
}

int64_t tm_clock_wall_ms(void)
{
    return read_ns(CLOCK_REALTIME) / 1000000;
}

void tm_sleep_ms(int64_t ms)
{
    if (ms <= 0)
        return;
    struct timespec ts = {.tv_sec = ms / 1000, .tv_nsec = (ms % 1000) * 1000000};
    /* clock_nanosleep returns the error number and leaves the rest of the time in ts. */
    while (clock_nanosleep(CLOCK_MONOTONIC, 0, &ts, &ts) == EINTR)
        continue;
}
