/* Time. Timers use the monotonic clock only; wall time is for logs and `created` fields. */
#ifndef TM_COMMON_CLOCK_H
#define TM_COMMON_CLOCK_H

#include <stdint.h>

int64_t tm_clock_ns(void);      /* monotonic */
int64_t tm_clock_ms(void);      /* monotonic */
int64_t tm_clock_wall_ms(void); /* since 1970 */
void tm_sleep_ms(int64_t ms);

#endif
