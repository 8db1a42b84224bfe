/* Who goes where: candidates of a model for the policy, and the pump that empties the waiting queue.
 *
 * Two rounds: groups that have done nothing wrong to this generation and in general, and only when none of
 * those lives, the rest. A healthy group that is full is worth waiting for; a single group is used even
 * after it failed. */
#include "router/pool/state.h"

#include <stdlib.h>

#include "common/check.h"

#define SKIPS_MAX 8 /* generations that fit nowhere and are stepped over in one pump */

static bool fits(const tm_gen *g, const tm_group *group)
{
    return group->max_context <= 0 ||
           (int64_t)g->prompt_len + g->max_tokens <= (int64_t)group->max_context;
}

static bool preferred(const tm_gen *g, const tm_group *group, int64_t now)
{
    return group->link_id != g->avoid_link && now >= group->eject_until_ns;
}

static bool reserve_candidates(tm_pool *p, int count)
{
    if (count <= p->candidate_cap)
        return true;
    int cap = TM_MAX(64, count * 2);
    tm_candidate *c = realloc(p->candidates, (size_t)cap * sizeof(*c));
    if (c == NULL)
        return false;
    p->candidates = c;
    tm_group **groups = realloc(p->candidate_groups, (size_t)cap * sizeof(tm_group *));
    if (groups == NULL)
        return false;
    p->candidate_groups = groups;
    p->candidate_cap = cap;
    return true;
}

static tm_candidate candidate_of(const tm_group *g)
{
    return (tm_candidate){
        .key = g->key,
        .in_flight = g->in_flight,
        .capacity = tm_group_capacity(g),
        .known = g->known,
        .running = g->running,
        .waiting = g->waiting,
        .unacked = g->unacked_count,
        .waiting_tokens = (double)g->waiting_tokens,
        .unacked_tokens = (double)g->unacked_tokens,
        .prefill_tps = g->prefill_tps,
        .step_s = g->step_s,
        .kv_use = g->kv_use,
    };
}

/* Fills the candidate arrays; *alive: some group of this round lives, with or without room. */
static int collect(tm_pool *p, const tm_gen *g, bool want_preferred, int64_t now, bool *alive)
{
    const tm_model *m = g->model;
    int n = 0;
    *alive = false;
    for (int i = 0; i < m->group_count; i++) {
        tm_group *group = m->groups[i];
        if (!fits(g, group) || preferred(g, group, now) != want_preferred)
            continue;
        if (tm_group_alive(group))
            *alive = true;
        if (!tm_group_has_room(group, now))
            continue;
        p->candidates[n] = candidate_of(group);
        p->candidate_groups[n++] = group;
    }
    return n;
}

tm_group *tm_place_pick(tm_pool *p, const tm_gen *g)
{
    int64_t now = tm_pool_now(p);
    bool alive;
    if (g->model->group_count == 0 || !reserve_candidates(p, g->model->group_count))
        return NULL;
    int n = collect(p, g, true, now, &alive);
    if (n == 0 && !alive)
        n = collect(p, g, false, now, &alive);
    if (n == 0)
        return NULL;
    tm_pick_request r = {.prompt_tokens = (int64_t)g->prompt_len + g->out_len,
                         .max_tokens = (int64_t)g->max_tokens - g->out_len,
                         .session = g->session};
    tm_pick pick = tm_balancer_pick(&p->balancer, &r, p->candidates, n);
    tm_meter_pick(p, pick.reason);
    return p->candidate_groups[pick.index];
}

/* To a group, or back where it was. A send that failed marked the group, so the next pick differs. */
static bool try_place(tm_pool *p, tm_gen *g)
{
    tm_group *group;
    while ((group = tm_place_pick(p, g)) != NULL) {
        int64_t wait_until = g->wait_until_ns;
        tm_gen_leave(g);
        tm_status st = tm_gen_submit(g, group);
        if (st == TM_OK)
            return true;
        tm_gen_wait(g, 0);
        g->wait_until_ns = wait_until;
        if (st == TM_STATUS_NO_MEMORY)
            return false;
    }
    return false;
}

static bool any_room(const tm_model *m, int64_t now)
{
    for (int i = 0; i < m->group_count; i++)
        if (tm_group_has_room(m->groups[i], now))
            return true;
    return false;
}

void tm_place_pump(tm_pool *p, tm_model *m)
{
    tm_heap_node *skipped[SKIPS_MAX];
    int skips = 0;
    int64_t now = tm_pool_now(p);
    while (skips < SKIPS_MAX && m->queue.count > 0 && any_room(m, now)) {
        tm_gen *g = tm_heap_top(&m->queue)->owner;
        if (!try_place(p, g)) {
            tm_heap_remove(&m->queue, &g->node);
            skipped[skips++] = &g->node;
        }
    }
    for (int i = 0; i < skips; i++)
        tm_heap_push(&m->queue, skipped[i]);
}
