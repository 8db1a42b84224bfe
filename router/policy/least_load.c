/* least_load: the smallest share of its capacity in flight from this router; ties are drawn. Needs no
 * telemetry. Groups of different size are compared by share, not by count. */
#include "router/policy/policy.h"

#include "common/check.h"

static double load_share(const tm_candidate *c)
{
    return (double)c->in_flight / (double)TM_MAX(c->capacity, 1);
}

static tm_pick pick_least_load(tm_balancer *b, const tm_pick_request *r, const tm_candidate *c,
                               int count)
{
    (void)r;
    int chosen = 0, ties = 0;
    double best = 0;
    for (int i = 0; i < count; i++) {
        double share = load_share(&c[i]);
        if (ties == 0 || share < best) {
            best = share;
            chosen = i;
            ties = 1;
        } else if (share <= best) {
            ties++;
            if (tm_balancer_random(b) % (uint64_t)ties == 0)
                chosen = i;
        }
    }
    return (tm_pick){chosen, ties > 1 ? "tie" : "best"};
}

const tm_policy TM_POLICY_LEAST_LOAD_ROW = {.name = "least_load", .pick = pick_least_load};
