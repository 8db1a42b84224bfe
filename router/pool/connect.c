/* A group's link from open to loss: Hello, epochs, silence, reconnecting.
 *
 * The stream decides health: a group that sent nothing for suspect_ms is not picked, for dead_ms is lost.
 * etcd only says where to look. An epoch names one life of a group: messages of an older life than the one
 * known are refused, so that a process thought dead cannot add tokens to streams that went on elsewhere. */
#include "router/pool/state.h"

#include <string.h>

#include "common/check.h"
#include "common/log.h"

#define BACKOFF_MIN_MS  100
#define BACKOFF_MAX_MS  5000
#define HELLO_WAIT_MS   5000
#define MAX_BATCH_GUESS 64 /* taken when Hello names no batch size */

static void plan_retry(tm_pool *p, tm_group *g)
{
    g->backoff_ms =
        g->backoff_ms == 0 ? BACKOFF_MIN_MS : TM_MIN(g->backoff_ms * 2, (int64_t)BACKOFF_MAX_MS);
    /* Jitter of +-25 %: many routers lose a group in the same moment. */
    int64_t spread = g->backoff_ms / 2 + 1;
    int64_t jitter = (int64_t)(tm_balancer_random(&p->balancer) % (uint64_t)spread);
    g->retry_ns = tm_pool_now(p) + (g->backoff_ms * 3 / 4 + jitter) * NS_PER_MS;
}

void tm_group_connect(tm_pool *p, tm_group *g)
{
    const tm_transport *t = &p->opts.transport;
    uint64_t id = ((uint64_t)++p->attempts << 32) | (uint32_t)g->slot;
    void *link;
    if (t->open(t->ctx, id, g->member.address, &link) != TM_OK) {
        plan_retry(p, g);
        return;
    }
    g->link = link;
    g->link_id = id;
    g->opened_ns = tm_pool_now(p);
    g->last_rx_ns = g->opened_ns;
    if (tm_group_greet(p, g) != TM_OK)
        g->broken = true;
    tm_group_publish(g);
}

static void record_death(tm_gen *gen, const tm_group *g)
{
    int n = gen->death_count;
    if (n >= (int)TM_ARRAY_LEN(gen->deaths))
        return;
    gen->deaths[n].key = g->key;
    gen->deaths[n].epoch = g->epoch;
    gen->death_count++;
}

static void orphan_all(tm_group *g, tm_move_kind kind)
{
    for (int i = 0; i < g->slot_count && g->in_flight > 0; i++) {
        tm_gen *gen = g->slots[i].gen;
        if (gen == NULL)
            continue;
        if (kind == TM_MOVE_DEATH)
            record_death(gen, g);
        tm_gen_leave(gen);
        tm_gen_orphan(gen, kind);
    }
    TM_ASSERT(g->in_flight == 0);
}

void tm_group_lost(tm_pool *p, tm_group *g, tm_move_kind kind, const char *why)
{
    if (g->link == NULL)
        return;
    /* A group that said it was leaving may go: no generation is blamed for that. */
    if (kind == TM_MOVE_DEATH && (g->draining || g->member.draining))
        kind = TM_MOVE_HANDBACK;
    tm_log(g->hello ? TM_LOG_WARN : TM_LOG_DEBUG, "group_lost",
           "%s at %s, epoch %llu: %s; %d generations move", g->label, g->member.address,
           (unsigned long long)g->epoch, why, g->in_flight);
    tm_meter_link(p, g->hello ? "lost" : "refused");
    const tm_transport *t = &p->opts.transport;
    t->close(t->ctx, g->link);
    g->link = NULL;
    orphan_all(g, kind);
    tm_model_detach(p, g);
    tm_group_forget(g);
    g->doubted = false;
    plan_retry(p, g);
    tm_group_publish(g);
}

static bool label_taken(const tm_pool *p, const tm_group *self, const char *label)
{
    for (int i = 0; i < p->group_cap; i++) {
        const tm_group *g = p->groups[i];
        if (g != NULL && g != self && strcmp(g->label, label) == 0)
            return true;
    }
    return false;
}

/* Static members are known by address until they say their name. */
static void take_label(tm_pool *p, tm_group *g, const char *name)
{
    size_t len = strlen(name);
    if (strcmp(g->label, name) == 0 || len == 0 || len >= sizeof(g->label) ||
        label_taken(p, g, name))
        return;
    tm_meter_group_remove(p, g);
    memcpy(g->label, name, len + 1);
    tm_meter_group_add(p, g);
}

static int clamp_count(bool has, uint32_t v, int absent)
{
    return has ? (int)TM_MIN(v, (uint32_t)1 << 20) : absent;
}

void tm_group_hello(tm_pool *p, tm_group *g, const tm_wire_hello *h)
{
    if (h->epoch < g->member.epoch) {
        tm_meter_link(p, "fenced");
        tm_group_lost(p, g, TM_MOVE_HANDBACK, "an older epoch than the registered one");
        return;
    }
    tm_model *m = tm_model_get(p, h->model, h->digest);
    if (m == NULL || !tm_model_attach(p, m, g)) {
        tm_group_lost(p, g, TM_MOVE_HANDBACK, "its model cannot be taken");
        return;
    }
    bool first = !g->hello;
    g->hello = true;
    g->epoch = h->epoch;
    g->backoff_ms = 0;
    g->max_batch =
        TM_MAX(1, clamp_count(h->has_max_batch_size, h->max_batch_size, MAX_BATCH_GUESS));
    g->queue_max = clamp_count(h->has_queue_max, h->queue_max, 0);
    g->max_context = h->has_max_context ? (int32_t)TM_MIN(h->max_context, (uint32_t)INT32_MAX) : 0;
    g->vocab = h->has_vocab ? (int32_t)TM_MIN(h->vocab, (uint32_t)INT32_MAX) : 0;
    take_label(p, g, g->member.epoch != 0 ? g->member.name : h->group);
    tm_gen_forgive(p, g);
    tm_group_publish(g);
    if (!first)
        return;
    tm_meter_link(p, "up");
    tm_log(TM_LOG_INFO, "group_up", "%s at %s, epoch %llu, model %s", g->label, g->member.address,
           (unsigned long long)g->epoch, m->name);
}

static void check_link(tm_pool *p, tm_group *g, int64_t now_ns)
{
    int64_t silent_ms = (now_ns - g->last_rx_ns) / NS_PER_MS;
    if (g->broken)
        tm_group_lost(p, g, TM_MOVE_DEATH, "its link takes no more messages");
    else if (!g->hello && now_ns - g->opened_ns > HELLO_WAIT_MS * NS_PER_MS)
        tm_group_lost(p, g, TM_MOVE_DEATH, "no Hello");
    else if (g->hello && silent_ms >= p->opts.dead_ms)
        tm_group_lost(p, g, TM_MOVE_DEATH, "silent");
    else if (g->hello && !g->suspect && silent_ms >= p->opts.suspect_ms) {
        g->suspect = true;
        tm_group_publish(g);
    }
}

void tm_group_tick(tm_pool *p, tm_group *g, int64_t now_ns)
{
    if (g->link != NULL)
        check_link(p, g, now_ns);
    bool wanted = g->listed || g->doubted;
    if (!wanted && g->link != NULL && g->in_flight == 0)
        tm_group_lost(p, g, TM_MOVE_HANDBACK, "left the member list");
    if (!wanted && g->link == NULL)
        tm_group_remove(p, g);
    else if (wanted && g->link == NULL && now_ns >= g->retry_ns)
        tm_group_connect(p, g);
}
