/* The pool's own work: starting generations, member lists, messages by kind, the tick, and settling what
 * lost its place. */
#include "router/pool/state.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/log.h"

#define WATCH_MS       100
#define RATE_MS        1000
#define RETRY_NO_GROUP 5000
#define SEND_BYTES_MAX ((size_t)64 << 20)

int64_t tm_pool_now(const tm_pool *p)
{
    return p->opts.transport.now_ns(p->opts.transport.ctx);
}

tm_status tm_pool_create(tm_pool **out, const tm_pool_opts *opts, tm_err *err)
{
    const tm_policy *policy = tm_policy_at(opts->policy);
    if (policy == NULL)
        return TM_FAIL(err, TM_STATUS_CONFIG, "policy %d is unknown", opts->policy);
    tm_pool *p = calloc(1, sizeof(*p));
    if (p == NULL)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for the pool");
    p->opts = *opts;
    const char *id = opts->router_id != NULL ? opts->router_id : "router";
    memcpy(p->router_id, id, TM_MIN(strlen(id), sizeof(p->router_id) - 1));
    p->opts.router_id = p->router_id;
    tm_balancer_init(&p->balancer, policy, opts->seed);
    tm_pool_metrics_init(&p->metrics, opts->metrics);
    tm_buf_init(&p->out, SEND_BYTES_MAX);
    p->tick_ns = p->rate_ns = tm_pool_now(p);
    *out = p;
    return TM_OK;
}

void tm_pool_destroy(tm_pool *p)
{
    if (p == NULL)
        return;
    p->closing = true;
    while (p->gens != NULL)
        tm_gen_fail(p->gens, TM_GEN_ERR_NO_WORKER, 0);
    TM_ASSERT(p->active == 0 && p->waiting == 0 && tm_pool_in_flight(p) == 0);
    for (int i = 0; i < p->group_cap; i++) {
        tm_group *g = p->groups[i];
        if (g == NULL)
            continue;
        tm_group_lost(p, g, TM_MOVE_HANDBACK, "the router stops");
        tm_group_remove(p, g);
    }
    tm_models_destroy(p);
    tm_buf_deinit(&p->out);
    free(p->groups);
    free(p->tokens);
    free(p->tops);
    free(p->candidates);
    free(p->candidate_groups);
    free(p);
}

/* ---- starting ---- */

static tm_model *model_of(const tm_pool *p, const tm_served *s)
{
    for (int i = 0; i < p->model_count; i++)
        if (p->models[i]->served == s)
            return p->models[i];
    return NULL;
}

/* Whether waiting makes sense: a group is there, or one is listed and may come (back). */
static bool model_expected(const tm_pool *p, const tm_model *m, int64_t now)
{
    if (m->group_count > 0 || now - m->lost_ns < p->opts.queue_wait_ms * NS_PER_MS)
        return true;
    for (int i = 0; i < p->group_cap; i++) {
        const tm_group *g = p->groups[i];
        if (g != NULL && g->listed && !g->hello)
            return true;
    }
    return false;
}

/* How many wait before this one. */
static int ahead_of(const tm_model *m, int32_t priority)
{
    int n = 0;
    for (int i = 0; i < m->queue.count; i++)
        n += m->queue.items[i]->rank >= priority;
    return n;
}

static bool queue_full(const tm_pool *p, const tm_model *m, int ahead)
{
    double wait_s = (double)p->opts.queue_wait_ms / 1000.0;
    return p->waiting >= p->opts.queue_max ||
           (m->drain_rate > 1.0 && (double)ahead / m->drain_rate > wait_s);
}

static bool args_valid(const tm_gen_args *a)
{
    return a->prompt_len >= 1 && a->prompt_len <= INT32_MAX && a->max_tokens >= 0 &&
           a->stop_count <= 4096 && a->sampling.logit_bias_count <= 65536;
}

tm_status tm_pool_start(tm_pool *p, const tm_gen_args *args, const tm_gen_ops *ops, void *user,
                        tm_gen **out, int64_t *retry_after_ms)
{
    tm_model *m = model_of(p, args->served);
    *retry_after_ms = 0;
    if (!args_valid(args))
        return TM_STATUS_INVALID;
    if (m == NULL || p->closing || !model_expected(p, m, tm_pool_now(p))) {
        *retry_after_ms = RETRY_NO_GROUP;
        return TM_STATUS_UNAVAILABLE;
    }
    tm_gen *g;
    TM_TRY(tm_gen_create(&g, p, m, args, ops, user));
    int ahead = ahead_of(m, args->priority);
    tm_group *group = ahead == 0 ? tm_place_pick(p, g) : NULL;
    g->wait_until_ns = tm_pool_now(p) + p->opts.queue_wait_ms * NS_PER_MS;
    if (group == NULL || tm_gen_submit(g, group) != TM_OK) {
        if (queue_full(p, m, ahead)) {
            *retry_after_ms = tm_model_retry_after(m, ahead);
            tm_gen_cancel(g);
            return TM_STATUS_BUSY;
        }
        tm_gen_wait(g, p->opts.queue_wait_ms);
    }
    *out = g;
    return TM_OK;
}

/* ---- settling ---- */

static void settle_waited(tm_gen *g)
{
    const tm_model *m = g->model;
    for (int i = 0; i < m->group_count; i++)
        if (tm_group_alive(m->groups[i])) {
            tm_gen_fail(g, TM_GEN_ERR_BUSY, tm_model_retry_after(m, m->queue.count));
            return;
        }
    tm_gen_fail(g, TM_GEN_ERR_NO_WORKER, RETRY_NO_GROUP);
}

static void settle_one(tm_gen *g)
{
    tm_move_kind kind = g->move_kind;
    tm_gen_leave(g);
    if (kind == TM_MOVE_DEADLINE)
        tm_gen_fail(g, TM_GEN_ERR_TIMEOUT, 0);
    else if (kind == TM_MOVE_WAITED)
        settle_waited(g);
    else
        tm_gen_move(g, kind);
}

void tm_pool_settle(tm_pool *p)
{
    while (p->orphans != NULL)
        settle_one(p->orphans);
    for (int i = 0; i < p->model_count; i++)
        if (p->models[i]->queue.count > 0)
            tm_place_pump(p, p->models[i]);
}

/* ---- messages ---- */

static void take_step(tm_pool *p, tm_group *g, const Turbomesh__Worker__V1__StepEvents *step,
                      int64_t received_ns)
{
    g->idle_ns = 0;
    for (size_t i = 0; i < step->n_event; i++)
        tm_gen_event(p, g, step->event[i]);
    double delay_s = (double)(tm_pool_now(p) - received_ns) / (double)NS_PER_S;
    tm_series_observe(p->metrics.forward_s, TM_MAX(delay_s, 0.0));
}

void tm_pool_on_message(tm_pool *p, uint64_t link_id, const tm_wire_worker_message *m,
                        int64_t received_ns)
{
    tm_group *g = tm_group_by_link(p, link_id);
    if (g == NULL)
        return;
    if (g->hello && m->epoch < g->epoch) {
        tm_meter_link(p, "fenced");
        return;
    }
    g->last_rx_ns = TM_MAX(g->last_rx_ns, received_ns);
    if (g->suspect) {
        g->suspect = false;
        tm_group_publish(g);
    }
    if (m->m_case == TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_HELLO) {
        tm_group_hello(p, g, m->hello);
    } else if (!g->hello) {
        tm_group_lost(p, g, TM_MOVE_DEATH, "spoke before Hello");
    } else {
        g->epoch = m->epoch;
        if (m->m_case == TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_LOAD)
            tm_group_load(g, m->load, tm_pool_now(p));
        if (m->m_case == TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_STEP)
            take_step(p, g, m->step, received_ns);
    }
    tm_pool_settle(p);
}

void tm_pool_on_closed(tm_pool *p, uint64_t link_id, const char *why)
{
    tm_group *g = tm_group_by_link(p, link_id);
    if (g == NULL)
        return;
    tm_group_lost(p, g, TM_MOVE_DEATH, why);
    tm_pool_settle(p);
}

/* The groups know better than config.json, whose context is that before a scaled rope and before --session-len, and
 * whose vocabulary may be smaller than the embedding. */
static void adopt_limits(tm_served *s, const tm_model *m)
{
    int32_t widest = 0, vocab = 0;
    for (int i = 0; i < m->group_count; i++) {
        widest = TM_MAX(widest, m->groups[i]->max_context);
        vocab = TM_MAX(vocab, m->groups[i]->vocab);
    }
    s->max_context = widest > 0 ? widest : s->max_context;
    s->vocab = vocab > 0 ? vocab : s->vocab;
}

void tm_pool_on_served(tm_pool *p, const char *model, const char *digest, tm_served *served)
{
    tm_model *m = tm_model_get(p, model, digest);
    if (m == NULL || m->served != NULL) {
        if (served != NULL)
            tm_served_release(served);
        return;
    }
    m->fetching = false;
    if (served == NULL)
        return;
    m->served = served;
    adopt_limits(served, m);
    tm_log(TM_LOG_INFO, "model_served", "%s, context %d", m->name, served->max_context);
    for (int i = 0; i < m->group_count; i++)
        tm_group_publish(m->groups[i]);
}

/* ---- the clock ---- */

/* Time in which this thread did not run says nothing about the groups: their messages may still wait. */
static void forgive_own_pause(tm_pool *p, int64_t now)
{
    int64_t pause = now - p->tick_ns - TM_POOL_TICK_MS * NS_PER_MS;
    p->tick_ns = now;
    if (pause < p->opts.suspect_ms * NS_PER_MS / 2)
        return;
    for (int i = 0; i < p->group_cap; i++) {
        tm_group *g = p->groups[i];
        if (g != NULL)
            g->last_rx_ns = TM_MIN(now, g->last_rx_ns + pause);
    }
    for (tm_gen *g = p->gens; g != NULL; g = g->next)
        if (g->last_token_ns != 0)
            g->last_token_ns = TM_MIN(now, g->last_token_ns + pause);
}

void tm_pool_tick(tm_pool *p)
{
    int64_t now = tm_pool_now(p);
    forgive_own_pause(p, now);
    for (int i = 0; i < p->group_cap; i++)
        if (p->groups[i] != NULL)
            tm_group_tick(p, p->groups[i], now);
    tm_models_tick(p, now);
    if (now - p->scan_ns >= WATCH_MS * NS_PER_MS) {
        p->scan_ns = now;
        tm_gens_watch(p, now);
    }
    if (now - p->rate_ns >= RATE_MS * NS_PER_MS) {
        tm_model_rates(p, (double)(now - p->rate_ns) / (double)NS_PER_S);
        p->rate_ns = now;
    }
    tm_pool_settle(p);
}
