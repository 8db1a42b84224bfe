/* round_robin: one after the other. The turn counts picks, not groups, so a group that comes or goes
 * shifts the order once and nothing more. */
#include "router/policy/policy.h"

static tm_pick pick_round_robin(tm_balancer *b, const tm_pick_request *r, const tm_candidate *c,
                                int count)
{
    (void)r;
    (void)c;
    return (tm_pick){(int)(b->turn++ % (uint64_t)count), "turn"};
}

const tm_policy TM_POLICY_ROUND_ROBIN_ROW = {.name = "round_robin", .pick = pick_round_robin};
