/* The clock's view of generations: deadlines, waits that took too long, and streams that stopped although
 * their group talks. No owner is called while the list is walked: whoever is affected becomes an orphan,
 * and tm_pool_settle ends or moves it afterwards. */
#include "router/pool/state.h"

#include "common/check.h"
#include "common/log.h"

#define STALL_FACTOR 20.0
#define EJECT_MS     5000

static bool elsewhere_has_room(const tm_gen *g, int64_t now_ns)
{
    const tm_model *m = g->model;
    for (int i = 0; i < m->group_count; i++)
        if (m->groups[i] != g->group && now_ns >= m->groups[i]->eject_until_ns &&
            tm_group_has_room(m->groups[i], now_ns))
            return true;
    return false;
}

/* Only a stream that had tokens can stall: before the first one it waits for its turn and its prefill, and
 * the engine's own watchdog speaks for those. Without a better place it stays where it is. */
static bool stalled(const tm_gen *g, int64_t now_ns)
{
    if (g->place != TM_GEN_ON_GROUP || g->last_token_ns == 0)
        return false;
    double pace = TM_MAX(g->itl_s, g->group->step_s) * STALL_FACTOR;
    double limit = TM_MAX((double)g->pool->opts.dead_ms / 1000.0, pace);
    return (double)(now_ns - g->last_token_ns) / (double)NS_PER_S > limit &&
           elsewhere_has_room(g, now_ns);
}

/* The group took the submit and says that it has nothing to do: it lost the request. */
static bool abandoned(const tm_gen *g, int64_t now_ns)
{
    const tm_group *group = g->group;
    return g->place == TM_GEN_ON_GROUP && group->idle_ns != 0 && group->unacked_count == 0 &&
           now_ns - group->idle_ns > g->pool->opts.dead_ms * NS_PER_MS;
}

static void take_away(tm_gen *g, tm_move_kind kind)
{
    if (g->place == TM_GEN_ON_GROUP)
        tm_gen_withdraw(g);
    tm_gen_leave(g);
    tm_gen_orphan(g, kind);
}

static void watch_one(tm_gen *g, int64_t now_ns)
{
    if (g->place == TM_GEN_ORPHAN)
        return;
    if (now_ns >= g->deadline_ns) {
        take_away(g, TM_MOVE_DEADLINE);
    } else if (g->place == TM_GEN_QUEUED && now_ns >= g->wait_until_ns) {
        take_away(g, TM_MOVE_WAITED);
    } else if (stalled(g, now_ns) || abandoned(g, now_ns)) {
        tm_log(TM_LOG_WARN, "stall", "%s gave request %s no token after position %d",
               g->group->label, g->request_id, g->out_len);
        g->avoid_link = g->group->link_id;
        g->group->eject_until_ns = now_ns + EJECT_MS * NS_PER_MS;
        take_away(g, TM_MOVE_STALL);
    }
}

void tm_gens_watch(tm_pool *p, int64_t now_ns)
{
    for (tm_gen *g = p->gens; g != NULL; g = g->next)
        watch_one(g, now_ns);
}
