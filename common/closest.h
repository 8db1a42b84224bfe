/* The names of a table that are closest to a name that is not in it, for messages. */
#ifndef TM_COMMON_CLOSEST_H
#define TM_COMMON_CLOSEST_H

#include <stddef.h>

/* "A, B, C" into out: the three of count names (at most 128) that take the fewest letters to insert, remove or
 * exchange, the closest first. */
void tm_closest(const char *word, const char *(*name)(size_t i), size_t count, char *out,
                size_t size);

#endif
