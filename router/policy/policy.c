/* The table of policies and what several of them need: a small random generator with a seed (picks are
 * repeatable in tests) and power of two choices, the answer that needs no telemetry at all. */
#include "router/policy/policy.h"

#include <stddef.h>

#include "common/check.h"
#include "router/dispatch.h"

static const tm_policy *const ROWS[] = {
    [TM_POLICY_COST] = &TM_POLICY_COST_ROW,
    [TM_POLICY_SESSION] = &TM_POLICY_SESSION_ROW,
    [TM_POLICY_LEAST_LOAD] = &TM_POLICY_LEAST_LOAD_ROW,
    [TM_POLICY_ROUND_ROBIN] = &TM_POLICY_ROUND_ROBIN_ROW,
};

/* Mean length assumed before the first generation ended. */
#define EXPECTED_OUT_FIRST 200.0

const tm_policy *tm_policy_at(int kind)
{
    if (kind < 0 || kind >= (int)TM_ARRAY_LEN(ROWS))
        return NULL;
    return ROWS[kind];
}

void tm_balancer_init(tm_balancer *b, const tm_policy *policy, uint64_t seed)
{
    *b = (tm_balancer){.policy = policy,
                       .rng = seed != 0 ? seed : 0x9e3779b97f4a7c15u,
                       .expected_out = EXPECTED_OUT_FIRST};
}

tm_pick tm_balancer_pick(tm_balancer *b, const tm_pick_request *r, const tm_candidate *c, int count)
{
    TM_ASSERT(count >= 1);
    if (count == 1)
        return (tm_pick){0, "only"};
    return b->policy->pick(b, r, c, count);
}

void tm_balancer_complete(tm_balancer *b, int64_t generated)
{
    if (b->policy->complete != NULL)
        b->policy->complete(b, generated);
}

/* xorshift64*: fast, seedable; nothing here is a secret. */
uint64_t tm_balancer_random(tm_balancer *b)
{
    uint64_t x = b->rng;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    b->rng = x;
    return x * 0x2545f4914f6cdd1du;
}

int tm_pick_power_of_two(tm_balancer *b, const tm_candidate *c, int count)
{
    int i = (int)(tm_balancer_random(b) % (uint64_t)count);
    int j = (int)(tm_balancer_random(b) % (uint64_t)(count - 1));
    if (j >= i)
        j++;
    return c[j].in_flight < c[i].in_flight ? j : i;
}
