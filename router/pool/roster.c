/* The roster: which groups the pool knows, from one member list to the next.
 *
 * A list is believed, with two exceptions. When etcd is away the last one stays (nobody calls then). And
 * when more than half of the members vanish at once, which is what a wiped or restored etcd looks like,
 * those whose links are healthy stay in service until their link says otherwise or they are listed again. */
#include "router/pool/state.h"

#include <string.h>

#include "common/log.h"

static bool link_healthy(const tm_group *g)
{
    return g->hello && !g->suspect && !g->broken && !g->draining && !g->member.draining;
}

static void unlist(tm_group *g, bool burst)
{
    g->listed = false;
    g->doubted = g->doubted || (burst && link_healthy(g));
    tm_group_publish(g);
}

static void update_member(tm_pool *p, tm_group *g, const tm_member *m)
{
    g->listed = true;
    g->doubted = false;
    if (m->epoch < g->member.epoch && link_healthy(g))
        return; /* a registration of an earlier life, read from an etcd that went back */
    bool moved = strcmp(g->member.address, m->address) != 0;
    /* A group that lost its lease registers again with a new epoch while its stream goes on: at the same
     * address that is no reason to disturb the stream. */
    bool newer = m->epoch != g->member.epoch;
    if (moved)
        tm_group_lost(p, g, TM_MOVE_HANDBACK, "it has a new address");
    g->member = *m;
    if (moved || newer) {
        g->backoff_ms = 0;
        g->retry_ns = 0;
    }
    tm_group_publish(g);
}

static tm_group *group_by_name(const tm_pool *p, const char *name)
{
    for (int i = 0; i < p->group_cap; i++)
        if (p->groups[i] != NULL && strcmp(p->groups[i]->member.name, name) == 0)
            return p->groups[i];
    return NULL;
}

static void add_member(tm_pool *p, const tm_member *m)
{
    tm_group *g;
    if (tm_group_create(p, m, &g) != TM_OK) {
        tm_log(TM_LOG_ERROR, "members", "no memory for group %s", m->name);
        return;
    }
    g->listed = true;
    tm_log(TM_LOG_INFO, "group_joined", "%s at %s", m->name, m->address);
}

void tm_pool_on_members(tm_pool *p, const tm_member_list *list)
{
    int known = 0, gone = 0;
    for (int i = 0; i < p->group_cap; i++) {
        const tm_group *g = p->groups[i];
        if (g == NULL || !g->listed)
            continue;
        known++;
        gone += tm_member_find(list, g->member.name) == NULL;
    }
    bool burst = gone * 2 > known;
    if (burst && gone > 0)
        tm_log(TM_LOG_WARN, "members", "%d of %d members vanished at once: healthy links stay",
               gone, known);
    for (int i = 0; i < p->group_cap; i++)
        if (p->groups[i] != NULL && tm_member_find(list, p->groups[i]->member.name) == NULL)
            unlist(p->groups[i], burst);
    for (int i = 0; i < list->count; i++) {
        tm_group *g = group_by_name(p, list->items[i].name);
        if (g != NULL)
            update_member(p, g, &list->items[i]);
        else
            add_member(p, &list->items[i]);
    }
    tm_pool_settle(p);
}

void tm_pool_on_etcd(tm_pool *p, bool connected)
{
    if (p->stale == !connected)
        return;
    p->stale = !connected;
    tm_series_set(p->metrics.stale, p->stale ? 1 : 0);
    tm_log(connected ? TM_LOG_INFO : TM_LOG_WARN, "etcd", "%s",
           connected ? "reachable" : "away: the last known members stay");
}

bool tm_pool_members_stale(const tm_pool *p)
{
    return p->stale;
}
