/* A group as the router sees it: who it is, what it reported, what was sent to it since.
 *
 * Room is judged by what the group would hold once everything sent has arrived: its own numbers plus the
 * submits they do not include. A group gets a little more than its batch, so that a slot that comes free
 * is filled without a round trip; the rest waits in the router, where it can still choose. */
#include "router/pool/state.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/hash.h"
#include "common/log.h"

#define STEP_AGE_MIN_MS 5000
#define STEP_AGE_FACTOR 20.0

tm_status tm_group_create(tm_pool *p, const tm_member *m, tm_group **out)
{
    int slot = 0;
    while (slot < p->group_cap && p->groups[slot] != NULL)
        slot++;
    if (slot == p->group_cap) {
        int cap = TM_MAX(16, p->group_cap * 2);
        tm_group **groups = realloc(p->groups, (size_t)cap * sizeof(tm_group *));
        if (groups == NULL)
            return TM_STATUS_NO_MEMORY;
        memset(groups + p->group_cap, 0, (size_t)(cap - p->group_cap) * sizeof(tm_group *));
        p->groups = groups;
        p->group_cap = cap;
    }
    tm_group *g = calloc(1, sizeof(*g));
    if (g == NULL)
        return TM_STATUS_NO_MEMORY;
    g->slot = slot;
    g->member = *m;
    g->key = tm_hash64(m->name, strlen(m->name), 1);
    g->slot_free = -1;
    memcpy(g->label, m->name, sizeof(g->label));
    p->groups[slot] = g;
    tm_meter_group_add(p, g);
    *out = g;
    return TM_OK;
}

void tm_group_remove(tm_pool *p, tm_group *g)
{
    TM_ASSERT(g->link == NULL && g->in_flight == 0 && g->model == NULL);
    tm_log(TM_LOG_INFO, "group_left", "%s at %s", g->label, g->member.address);
    tm_meter_group_remove(p, g);
    p->groups[g->slot] = NULL;
    free(g->unacked);
    free(g->slots);
    free(g);
}

tm_group *tm_group_by_link(const tm_pool *p, uint64_t link_id)
{
    uint32_t slot = (uint32_t)link_id;
    if (slot >= (uint32_t)p->group_cap)
        return NULL;
    tm_group *g = p->groups[slot];
    return g != NULL && g->link != NULL && g->link_id == link_id ? g : NULL;
}

tm_group_state tm_group_state_of(const tm_group *g)
{
    if (g->link == NULL)
        return TM_GROUP_DOWN;
    if (!g->hello)
        return TM_GROUP_CONNECTING;
    if (g->draining || g->member.draining || (!g->listed && !g->doubted))
        return TM_GROUP_DRAINING;
    if (g->suspect || g->stuck)
        return TM_GROUP_SUSPECT;
    if (g->starting || g->model == NULL || g->model->served == NULL)
        return TM_GROUP_STARTING;
    return TM_GROUP_READY;
}

const char *tm_group_state_name(tm_group_state s)
{
    static const char *const NAMES[] = {"down",  "connecting", "starting",
                                        "ready", "suspect",    "draining"};
    return NAMES[s];
}

void tm_group_publish(tm_group *g)
{
    tm_series_set(g->series_state, (double)tm_group_state_of(g));
}

/* Work beyond the batch that the group should hold ready. */
static int group_slack(const tm_group *g)
{
    return TM_MIN(g->queue_max, TM_MAX(2, g->max_batch / 4));
}

int tm_group_capacity(const tm_group *g)
{
    return g->max_batch + group_slack(g);
}

bool tm_group_alive(const tm_group *g)
{
    tm_group_state s = tm_group_state_of(g);
    return s == TM_GROUP_READY || s == TM_GROUP_SUSPECT;
}

bool tm_group_has_room(const tm_group *g, int64_t now_ns)
{
    if (tm_group_state_of(g) != TM_GROUP_READY || g->broken || now_ns < g->busy_until_ns ||
        g->in_flight >= tm_group_capacity(g))
        return false;
    if (!g->known)
        return true;
    int open = TM_MAX(0, g->max_batch - g->running - g->waiting);
    int over = TM_MAX(0, g->unacked_count - open);
    if (g->waiting == 0 && over == 0 && g->unacked_count < open)
        return true;
    return g->waiting + over < group_slack(g);
}

static double positive(float v)
{
    return isfinite(v) && v > 0 ? (double)v : 0;
}

/* An engine that runs something and ended no step for long is not picked until it does. */
static bool step_stuck(const tm_group *g)
{
    double limit_ms = TM_MAX((double)STEP_AGE_MIN_MS, STEP_AGE_FACTOR * g->step_s * 1000.0);
    return g->running > 0 && (double)g->step_age_ms > limit_ms;
}

static int report_count(uint32_t v)
{
    return (int)TM_MIN(v, (uint32_t)1 << 24);
}

void tm_group_load(tm_group *g, const tm_wire_load *l, int64_t now_ns)
{
    g->known = true;
    g->busy_until_ns = 0;
    g->running = report_count(l->running);
    g->waiting = report_count(l->waiting);
    g->waiting_tokens = (int64_t)TM_MIN(l->waiting_tokens, (uint64_t)1 << 48);
    g->prefill_tps = positive(l->prefill_tps);
    g->step_s = positive(l->step_ms) / 1000.0;
    g->step_age_ms = (int64_t)l->step_age_ms;
    g->kv_use =
        l->blocks_total > 0 ? TM_MIN(1.0, (double)l->blocks_used / (double)l->blocks_total) : 0.0;
    tm_meter_group_load(g);
    bool draining = l->has_state && l->state == TURBOMESH__WORKER__V1__LOAD_REPORT__STATE__DRAINING;
    if (draining && !g->draining)
        tm_log(TM_LOG_INFO, "group_draining", "%s, %d generations here", g->label, g->in_flight);
    g->draining = draining;
    g->starting = l->has_state && l->state == TURBOMESH__WORKER__V1__LOAD_REPORT__STATE__STARTING;
    g->stuck = step_stuck(g);
    uint64_t seen = l->has_last_submit_seq ? l->last_submit_seq : g->submit_seq;
    while (g->unacked_count > 0 && g->unacked[g->unacked_head].seq <= seen) {
        g->unacked_tokens -= g->unacked[g->unacked_head].tokens;
        g->unacked_head = (g->unacked_head + 1) % TM_UNACKED_MAX;
        g->unacked_count--;
    }
    bool idle = g->running == 0 && g->waiting == 0 && g->unacked_count == 0 && g->in_flight > 0;
    g->idle_ns = !idle ? 0 : g->idle_ns != 0 ? g->idle_ns : now_ns;
    tm_group_publish(g);
}

void tm_group_sent(tm_group *g, int64_t tokens)
{
    g->submit_seq++;
    if (g->unacked == NULL)
        g->unacked = malloc(TM_UNACKED_MAX * sizeof(*g->unacked));
    if (g->unacked == NULL)
        return; /* an estimate the poorer */
    if (g->unacked_count == TM_UNACKED_MAX) {
        g->unacked_tokens -= g->unacked[g->unacked_head].tokens;
        g->unacked_head = (g->unacked_head + 1) % TM_UNACKED_MAX;
        g->unacked_count--;
    }
    int at = (g->unacked_head + g->unacked_count++) % TM_UNACKED_MAX;
    g->unacked[at] = (tm_unacked){g->submit_seq, tokens};
    g->unacked_tokens += tokens;
}

void tm_group_forget(tm_group *g)
{
    g->hello = false;
    g->known = false;
    g->suspect = g->stuck = g->starting = g->draining = g->broken = false;
    g->running = g->waiting = 0;
    g->waiting_tokens = 0;
    g->prefill_tps = g->step_s = g->kv_use = 0;
    g->step_age_ms = 0;
    g->submit_seq = 0;
    g->unacked_head = g->unacked_count = 0;
    g->unacked_tokens = 0;
    g->busy_until_ns = g->eject_until_ns = g->idle_ns = 0;
}
