/* cost: the group where the generation is expected to be served soonest, in seconds.
 *
 *   score = wait + prefill + w_d * decode + penalty
 *   wait    = (waiting_tokens + unacked_tokens) / prefill_tps     unacked: sent by us, not yet reported
 *   prefill = prompt_tokens / prefill_tps
 *   decode  = expected_out * itl(running + unacked + 1)
 *   penalty = lambda * k / (1 - k)                                k: share of the cache in use
 *
 * itl(n) scales the measured step time by (n + B) / (running + B): a step costs something even when it
 * is empty, as much as B sequences do. Scores within 2 % of the best are equal and one is drawn, else a
 * cold cluster sends everything to its first group. When a candidate's rates are unknown there is nothing
 * to compare, and the pick falls back to power of two choices on what this router itself has in flight. */
#include "router/policy/policy.h"

#include "common/check.h"

#define DECODE_WEIGHT     0.25
#define KV_LAMBDA_S       0.15
#define KV_USE_MAX        0.99
#define STEP_BASE_SEQS    8.0
#define TIE_SHARE         0.02
#define TIE_FLOOR_S       1e-4 /* differences below this are noise */
#define EXPECTED_OUT_GAIN 0.02 /* weight of one ended generation in the moving mean */
#define SCORE_CANDIDATES  4096 /* a pool has fewer groups than this */

double tm_policy_cost_score(const tm_balancer *b, const tm_pick_request *r, const tm_candidate *c)
{
    double wait = (c->waiting_tokens + c->unacked_tokens) / c->prefill_tps;
    double prefill = (double)r->prompt_tokens / c->prefill_tps;
    double reported = (double)c->running + (double)c->waiting;
    double after = reported + (double)c->unacked + 1.0;
    double itl = c->step_s * (after + STEP_BASE_SEQS) / (reported + STEP_BASE_SEQS);
    double out = TM_MIN(b->expected_out, (double)r->max_tokens);
    double k = TM_MIN(c->kv_use, KV_USE_MAX);
    return wait + prefill + DECODE_WEIGHT * out * itl + KV_LAMBDA_S * k / (1.0 - k);
}

static tm_pick pick_cost(tm_balancer *b, const tm_pick_request *r, const tm_candidate *c, int count)
{
    double score[SCORE_CANDIDATES];
    double best = 0;
    int n = TM_MIN(count, SCORE_CANDIDATES);
    for (int i = 0; i < n; i++) {
        if (!c[i].known || !(c[i].prefill_tps > 0) || !(c[i].step_s > 0))
            return (tm_pick){tm_pick_power_of_two(b, c, count), "unknown"};
        score[i] = tm_policy_cost_score(b, r, &c[i]);
        if (i == 0 || score[i] < best)
            best = score[i];
    }
    double limit = best + TM_MAX(best * TIE_SHARE, TIE_FLOOR_S);
    int ties = 0, chosen = 0;
    for (int i = 0; i < n; i++) {
        if (score[i] > limit)
            continue;
        ties++;
        if (tm_balancer_random(b) % (uint64_t)ties == 0)
            chosen = i;
    }
    return (tm_pick){chosen, ties > 1 ? "tie" : "best"};
}

/* The mean length of what was generated here is the guess for the next. */
static void complete_cost(tm_balancer *b, int64_t generated)
{
    b->expected_out += EXPECTED_OUT_GAIN * ((double)generated - b->expected_out);
}

const tm_policy TM_POLICY_COST_ROW = {.name = "cost", .pick = pick_cost, .complete = complete_cost};
