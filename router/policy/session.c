/* session: the same session goes to the same group, because its cache is there.
 *
 * Rendezvous hashing: every group gets a hash of (session, group), the highest wins. When a group leaves,
 * only its own sessions move; every router comes to the same answer without talking to the others. Bounded
 * load: a group that already holds 1.25 times the mean is passed over for the next highest, so one busy
 * session key cannot pile onto one group. Without a session the pick is least_load. */
#include "router/policy/policy.h"

#include <math.h>
#include <string.h>

#include "common/hash.h"

#define LOAD_FACTOR 1.25

static uint64_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdu;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53u;
    return x ^ (x >> 33);
}

static tm_pick pick_session(tm_balancer *b, const tm_pick_request *r, const tm_candidate *c,
                            int count)
{
    if (r->session == NULL || r->session[0] == '\0')
        return TM_POLICY_LEAST_LOAD_ROW.pick(b, r, c, count);
    int64_t total = 1;
    for (int i = 0; i < count; i++)
        total += c[i].in_flight;
    double bound = ceil(LOAD_FACTOR * (double)total / (double)count);
    uint64_t h = tm_hash64(r->session, strlen(r->session), 0);
    int home = 0, chosen = -1;
    uint64_t home_w = 0, chosen_w = 0;
    for (int i = 0; i < count; i++) {
        uint64_t w = mix(h ^ c[i].key);
        if (i == 0 || w > home_w) {
            home = i;
            home_w = w;
        }
        if ((double)c[i].in_flight < bound && (chosen < 0 || w > chosen_w)) {
            chosen = i;
            chosen_w = w;
        }
    }
    /* The mean is below the bound, so somebody always is. */
    return chosen == home || chosen < 0 ? (tm_pick){home, "home"} : (tm_pick){chosen, "overflow"};
}

const tm_policy TM_POLICY_SESSION_ROW = {.name = "session", .pick = pick_session};
