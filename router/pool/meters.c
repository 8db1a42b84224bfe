/* Metrics of the pool. Series of a group vanish with it. */
#include "common/check.h"
#include "router/observe.h"
#include "router/pool/state.h"

#define GROUPS_MAX 4096

static const tm_metric_desc GROUP_STATE = {
    .name = "turbomesh_group_state",
    .help = "State of a group: 0 down, 1 connecting, 2 starting, 3 ready, 4 suspect, 5 draining.",
    .kind = TM_METRIC_GAUGE,
    .labels = {"group"},
    .max_series = GROUPS_MAX};
static const tm_metric_desc GROUP_IN_FLIGHT = {.name = "turbomesh_group_in_flight",
                                               .help =
                                                   "Generations that this router has on a group.",
                                               .kind = TM_METRIC_GAUGE,
                                               .labels = {"group"},
                                               .max_series = GROUPS_MAX};
static const tm_metric_desc GROUP_RUNNING = {
    .name = "turbomesh_group_running",
    .help = "Sequences that a group runs, for all routers, by its last report.",
    .kind = TM_METRIC_GAUGE,
    .labels = {"group"},
    .max_series = GROUPS_MAX};
static const tm_metric_desc GROUP_WAITING = {
    .name = "turbomesh_group_waiting",
    .help = "Sequences that wait in a group, for all routers, by its last report.",
    .kind = TM_METRIC_GAUGE,
    .labels = {"group"},
    .max_series = GROUPS_MAX};
static const tm_metric_desc GROUP_KV = {.name = "turbomesh_group_kv_use_ratio",
                                        .help = "Share of a group's KV blocks in use.",
                                        .kind = TM_METRIC_GAUGE,
                                        .labels = {"group"},
                                        .max_series = GROUPS_MAX};
static const tm_metric_desc QUEUE_DEPTH = {.name = "turbomesh_queue_depth",
                                           .help = "Generations waiting in the router for a group.",
                                           .kind = TM_METRIC_GAUGE};
static const tm_metric_desc ACTIVE = {.name = "turbomesh_generations_active",
                                      .help = "Generations not yet ended.",
                                      .kind = TM_METRIC_GAUGE};
static const tm_metric_desc STALE = {
    .name = "turbomesh_members_stale",
    .help = "1 while etcd is away and the last known members are in use.",
    .kind = TM_METRIC_GAUGE};
static const tm_metric_desc TOKENS = {.name = "turbomesh_tokens_forwarded_total",
                                      .help = "Generated tokens handed to their owners.",
                                      .kind = TM_METRIC_COUNTER};
static const tm_metric_desc PICKS = {.name = "turbomesh_pick_total",
                                     .help = "Groups picked, by policy and by what decided.",
                                     .kind = TM_METRIC_COUNTER,
                                     .labels = {"policy", "reason"}};
static const tm_metric_desc MOVES = {
    .name = "turbomesh_migrations_total",
    .help = "Generations that left their group early, by cause and by what became of them.",
    .kind = TM_METRIC_COUNTER,
    .labels = {"kind", "result"}};
static const tm_metric_desc LINKS = {.name = "turbomesh_links_total",
                                     .help = "Events of links to groups.",
                                     .kind = TM_METRIC_COUNTER,
                                     .labels = {"event"}};
static const double FORWARD_BUCKETS_S[] = {2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3,
                                           2e-3, 5e-3, 1e-2, 5e-2, 0.2,  1.0};
static const tm_metric_desc FORWARD = {
    .name = "turbomesh_token_forward_seconds",
    .help = "From a step message off the wire to its last token handed to its owner.",
    .kind = TM_METRIC_HISTOGRAM,
    .buckets = FORWARD_BUCKETS_S,
    .bucket_count = (int)TM_ARRAY_LEN(FORWARD_BUCKETS_S)};

void tm_pool_metrics_init(tm_pool_metrics *pm, tm_metrics *m)
{
    pm->m = m;
    pm->queue_s = tm_metrics_series(m, &TM_METRIC_STAGE, (const char *const[]){"queue"});
    pm->prefill_s = tm_metrics_series(m, &TM_METRIC_STAGE, (const char *const[]){"prefill"});
    pm->queue_depth = tm_metrics_series(m, &QUEUE_DEPTH, NULL);
    pm->active = tm_metrics_series(m, &ACTIVE, NULL);
    pm->stale = tm_metrics_series(m, &STALE, NULL);
    pm->tokens = tm_metrics_series(m, &TOKENS, NULL);
    pm->forward_s = tm_metrics_series(m, &FORWARD, NULL);
}

void tm_meter_pick(const tm_pool *p, const char *reason)
{
    const char *values[] = {p->balancer.policy->name, reason};
    tm_series_add(tm_metrics_series(p->metrics.m, &PICKS, values), 1);
}

void tm_meter_move(const tm_pool *p, tm_move_kind kind, const char *result)
{
    static const char *const KINDS[] = {"death", "stall", "error", "gap", "handback", "reject"};
    const char *values[] = {KINDS[kind], result};
    tm_series_add(tm_metrics_series(p->metrics.m, &MOVES, values), 1);
}

void tm_meter_link(const tm_pool *p, const char *event)
{
    tm_series_add(tm_metrics_series(p->metrics.m, &LINKS, &event), 1);
}

void tm_meter_group_load(tm_group *g)
{
    tm_series_set(g->series_running, g->running);
    tm_series_set(g->series_waiting, g->waiting);
    tm_series_set(g->series_kv, g->kv_use);
}

void tm_meter_group_add(const tm_pool *p, tm_group *g)
{
    const char *value = g->label;
    g->series_state = tm_metrics_series(p->metrics.m, &GROUP_STATE, &value);
    g->series_in_flight = tm_metrics_series(p->metrics.m, &GROUP_IN_FLIGHT, &value);
    g->series_running = tm_metrics_series(p->metrics.m, &GROUP_RUNNING, &value);
    g->series_waiting = tm_metrics_series(p->metrics.m, &GROUP_WAITING, &value);
    g->series_kv = tm_metrics_series(p->metrics.m, &GROUP_KV, &value);
    tm_group_publish(g);
    tm_meter_group_load(g);
    tm_series_set(g->series_in_flight, g->in_flight);
}

void tm_meter_group_remove(const tm_pool *p, tm_group *g)
{
    static const tm_metric_desc *const ROWS[] = {&GROUP_STATE, &GROUP_IN_FLIGHT, &GROUP_RUNNING,
                                                 &GROUP_WAITING, &GROUP_KV};
    for (size_t i = 0; i < TM_ARRAY_LEN(ROWS); i++)
        tm_metrics_remove(p->metrics.m, ROWS[i], 0, g->label);
    g->series_state = g->series_in_flight = g->series_running = g->series_waiting = g->series_kv =
        NULL;
}
