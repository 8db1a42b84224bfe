/* How often each token occurred: a hash table from token to counts, for penalties.
 *
 * A dense array of V counts per sequence would be simpler and cost 600 kB for a vocabulary of 150k; a
 * sequence sees some hundreds of different tokens. */
#ifndef TM_ENGINE_SAMPLE_SEEN_H
#define TM_ENGINE_SAMPLE_SEEN_H

#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"

typedef struct tm_seen_token {
    int32_t token;
    int32_t generated; /* occurrences among generated tokens; 0 = in the prompt only */
} tm_seen_token;

typedef struct tm_seen {
    tm_seen_token *list; /* [count] in the order of first occurrence */
    int32_t *slots;      /* [mask + 1]: index into list + 1, 0 = empty */
    int count, cap;
    uint32_t mask;
} tm_seen;

void tm_seen_init(tm_seen *s);
void tm_seen_deinit(tm_seen *s);
tm_status tm_seen_add(tm_seen *s, int32_t token, bool generated);

#endif
