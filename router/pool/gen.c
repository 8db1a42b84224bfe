/* One generation: what it was asked, what was delivered, where it is. Every change of place goes through
 * tm_gen_enter, tm_gen_wait and tm_gen_orphan, and every exit through tm_gen_leave, so nothing is counted
 * twice or left behind.
 *
 * The owner's callbacks may cancel this or any other generation and start new ones. So nothing here keeps
 * a pointer to a generation across a callback without holding it: the struct goes when it has ended and
 * the last hold is released. */
#include "router/pool/state.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/log.h"

#define HANDBACKS_PER_MOVE 4  /* planned moves are cheap, but still bounded */
#define REJECTS_MAX        64 /* refusals by groups before somebody must be wrong */
#define RANK_MOVED         ((int64_t)1 << 40)

static bool copy_args(tm_gen *g, const tm_gen_args *a)
{
    size_t bias = a->sampling.logit_bias_count;
    size_t words = a->prompt_len + a->stop_count + 2 * bias;
    g->prompt = malloc(TM_MAX(words, (size_t)1) * sizeof(int32_t));
    if (g->prompt == NULL)
        return false;
    memcpy(g->prompt, a->prompt, a->prompt_len * sizeof(int32_t));
    int32_t *stop = g->prompt + a->prompt_len;
    if (a->stop_count > 0)
        memcpy(stop, a->stop_ids, a->stop_count * sizeof(int32_t));
    if (bias > 0) {
        tm_logit_bias *copy = (tm_logit_bias *)(void *)(stop + a->stop_count);
        memcpy(copy, a->sampling.logit_bias, bias * sizeof(*copy));
        g->sampling.logit_bias = copy;
    }
    g->stop_ids = stop;
    g->session = a->session != NULL ? strdup(a->session) : NULL;
    g->request_id = strdup(a->request_id != NULL ? a->request_id : "");
    return g->request_id != NULL && (a->session == NULL || g->session != NULL);
}

tm_status tm_gen_create(tm_gen **out, tm_pool *p, tm_model *m, const tm_gen_args *args,
                        const tm_gen_ops *ops, void *user)
{
    _Static_assert(sizeof(tm_logit_bias) == 2 * sizeof(int32_t), "packed behind the prompt");
    tm_gen *g = calloc(1, sizeof(*g));
    if (g == NULL || !tm_heap_reserve(&m->queue, m->gen_count + 1)) {
        free(g);
        return TM_STATUS_NO_MEMORY;
    }
    g->sampling = args->sampling;
    if (!copy_args(g, args)) {
        free(g->prompt);
        free(g->session);
        free(g->request_id);
        free(g);
        return TM_STATUS_NO_MEMORY;
    }
    g->pool = p;
    g->model = m;
    g->served = tm_served_acquire(args->served);
    g->ops = *ops;
    g->user = user;
    g->prompt_len = args->prompt_len;
    g->stop_count = args->stop_count;
    g->max_tokens = args->max_tokens;
    g->priority = args->priority;
    g->cache_salt = args->cache_salt;
    g->prompt_next = -1;
    g->node = (tm_heap_node){.index = -1, .owner = g};
    g->arrival = ++p->arrivals;
    int64_t now = tm_pool_now(p);
    g->start_ns = now;
    g->deadline_ns = args->deadline_ms > 0 ? now + args->deadline_ms * NS_PER_MS : INT64_MAX;
    g->next = p->gens;
    if (p->gens != NULL)
        p->gens->prev = g;
    p->gens = g;
    m->gen_count++;
    p->active++;
    tm_series_set(p->metrics.active, p->active);
    *out = g;
    return TM_OK;
}

/* Takes it off the books: it counts no more and no callback follows. */
static void end_gen(tm_gen *g)
{
    tm_pool *p = g->pool;
    TM_ASSERT(!g->ended);
    tm_gen_leave(g);
    g->ended = true;
    if (g->prev != NULL)
        g->prev->next = g->next;
    else
        p->gens = g->next;
    if (g->next != NULL)
        g->next->prev = g->prev;
    g->model->gen_count--;
    p->active--;
    tm_series_set(p->metrics.active, p->active);
}

void tm_gen_free(tm_gen *g)
{
    TM_ASSERT(g->ended && g->holds == 0);
    tm_served_release(g->served);
    free(g->prompt);
    free(g->session);
    free(g->request_id);
    free(g->out);
    free(g);
}

void tm_gen_hold(tm_gen *g)
{
    g->holds++;
}

void tm_gen_unhold(tm_gen *g)
{
    if (--g->holds == 0 && g->ended)
        tm_gen_free(g);
}

/* ---- places ---- */

void tm_gen_enter(tm_gen *g, tm_group *group, int32_t slot)
{
    TM_ASSERT(g->place == TM_GEN_NOWHERE);
    g->place = TM_GEN_ON_GROUP;
    g->group = group;
    g->slot = slot;
    g->admitted = false;
    g->last_token_ns = 0;
    if (g->sent_ns == 0) {
        g->sent_ns = tm_pool_now(g->pool);
        tm_series_observe(g->pool->metrics.queue_s,
                          (double)(g->sent_ns - g->start_ns) / (double)NS_PER_S);
    }
    group->slots[slot].gen = g;
    group->in_flight++;
    tm_series_set(group->series_in_flight, group->in_flight);
}

void tm_gen_wait(tm_gen *g, int64_t wait_ms)
{
    TM_ASSERT(g->place == TM_GEN_NOWHERE);
    tm_pool *p = g->pool;
    g->place = TM_GEN_QUEUED;
    g->wait_until_ns = tm_pool_now(p) + wait_ms * NS_PER_MS;
    g->node.rank = (int64_t)g->priority + (g->moved ? RANK_MOVED : 0);
    g->node.arrival = g->arrival;
    tm_heap_push(&g->model->queue, &g->node);
    p->waiting++;
    tm_series_set(p->metrics.queue_depth, p->waiting);
}

void tm_gen_orphan(tm_gen *g, tm_move_kind kind)
{
    TM_ASSERT(g->place == TM_GEN_NOWHERE);
    tm_pool *p = g->pool;
    g->place = TM_GEN_ORPHAN;
    g->move_kind = kind;
    g->orphan_next = NULL;
    g->orphan_prev = p->orphans_last;
    if (p->orphans_last != NULL)
        p->orphans_last->orphan_next = g;
    else
        p->orphans = g;
    p->orphans_last = g;
}

static void leave_group(tm_gen *g)
{
    tm_group *group = g->group;
    tm_slot *s = &group->slots[g->slot];
    TM_ASSERT(s->gen == g);
    s->gen = NULL;
    s->id += (uint64_t)1 << 32;
    s->next_free = group->slot_free;
    group->slot_free = g->slot;
    group->in_flight--;
    tm_series_set(group->series_in_flight, group->in_flight);
    g->group = NULL;
}

static void leave_orphans(tm_gen *g)
{
    tm_pool *p = g->pool;
    if (g->orphan_prev != NULL)
        g->orphan_prev->orphan_next = g->orphan_next;
    else
        p->orphans = g->orphan_next;
    if (g->orphan_next != NULL)
        g->orphan_next->orphan_prev = g->orphan_prev;
    else
        p->orphans_last = g->orphan_prev;
    g->orphan_prev = g->orphan_next = NULL;
}

void tm_gen_leave(tm_gen *g)
{
    if (g->place == TM_GEN_ON_GROUP) {
        leave_group(g);
    } else if (g->place == TM_GEN_QUEUED) {
        tm_heap_remove(&g->model->queue, &g->node);
        g->pool->waiting--;
        tm_series_set(g->pool->metrics.queue_depth, g->pool->waiting);
    } else if (g->place == TM_GEN_ORPHAN) {
        leave_orphans(g);
    }
    g->place = TM_GEN_NOWHERE;
}

/* ---- ends ---- */

void tm_gen_fail(tm_gen *g, tm_gen_error error, int64_t retry_after_ms)
{
    tm_gen_hold(g);
    if (g->place == TM_GEN_ON_GROUP)
        tm_gen_withdraw(g);
    end_gen(g);
    g->ops.on_error(g->user, error, retry_after_ms);
    tm_gen_unhold(g);
}

void tm_gen_finish_with(tm_gen *g, tm_gen_finish finish)
{
    tm_gen_hold(g);
    g->model->ended++;
    tm_balancer_complete(&g->pool->balancer, g->out_len);
    end_gen(g);
    g->ops.on_end(g->user, finish);
    tm_gen_unhold(g);
}

void tm_gen_cancel(tm_gen *g)
{
    TM_ASSERT(!g->ended);
    if (g->place == TM_GEN_ON_GROUP) {
        g->model->ended++;
        tm_gen_withdraw(g);
    }
    end_gen(g);
    if (g->holds == 0)
        tm_gen_free(g);
}

const char *tm_gen_group(const tm_gen *g)
{
    return g->group != NULL ? g->group->label : "";
}

/* ---- moves ---- */

static bool is_stop(int32_t token, const int32_t *ids, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (ids[i] == token)
            return true;
    return false;
}

/* Whether everything was delivered and only the finish went missing with the group. */
bool tm_gen_complete(const tm_gen *g, tm_gen_finish *finish)
{
    if (g->max_tokens == 0) {
        *finish = TM_GEN_LENGTH;
        return g->sampling.prompt_logprobs >= 0 && g->prompt_next == (int32_t)g->prompt_len;
    }
    if (g->out_len == 0)
        return false;
    int32_t last = g->out[g->out_len - 1];
    bool own = !g->sampling.ignore_eos &&
               is_stop(last, g->served->stop_ids, (size_t)g->served->stop_count);
    if (g->out_len > g->sampling.min_tokens && (own || is_stop(last, g->stop_ids, g->stop_count))) {
        *finish = TM_GEN_STOP;
        return true;
    }
    *finish = TM_GEN_LENGTH;
    return g->out_len >= g->max_tokens;
}

static bool move_allowed(tm_gen *g, tm_move_kind kind)
{
    int moves_max = g->pool->opts.moves_max;
    if (kind == TM_MOVE_REJECT)
        return ++g->rejects <= REJECTS_MAX;
    if (kind == TM_MOVE_HANDBACK)
        return ++g->handbacks <= moves_max * HANDBACKS_PER_MOVE;
    return ++g->moves <= moves_max;
}

void tm_gen_move(tm_gen *g, tm_move_kind kind)
{
    tm_pool *p = g->pool;
    tm_gen_finish finish;
    if (tm_gen_complete(g, &finish)) {
        tm_meter_move(p, kind, "finished");
        tm_gen_finish_with(g, finish);
        return;
    }
    if (g->death_count >= (int)TM_ARRAY_LEN(g->deaths)) {
        tm_log(TM_LOG_ERROR, "poison", "request %s was present at %d group deaths", g->request_id,
               g->death_count);
        tm_meter_move(p, kind, "poison");
        tm_gen_fail(g, TM_GEN_ERR_POISON, 0);
        return;
    }
    if (!move_allowed(g, kind)) {
        tm_meter_move(p, kind, "limit");
        bool internal = kind == TM_MOVE_ERROR || kind == TM_MOVE_GAP || kind == TM_MOVE_REJECT;
        tm_gen_fail(g, internal ? TM_GEN_ERR_INTERNAL : TM_GEN_ERR_NO_WORKER,
                    tm_model_retry_after(g->model, 0));
        return;
    }
    int64_t wait_ms = p->opts.queue_wait_ms;
    if (kind == TM_MOVE_REJECT) /* still the same wait */
        wait_ms = TM_MAX((int64_t)0, (g->wait_until_ns - tm_pool_now(p)) / NS_PER_MS);
    else
        tm_meter_move(p, kind, "moved");
    g->moved = g->moved || g->out_len > 0 || kind != TM_MOVE_REJECT;
    tm_gen_wait(g, wait_ms);
}

static void forgive(tm_gen *g, uint64_t key, uint64_t epoch)
{
    for (int i = g->death_count - 1; i >= 0; i--) {
        if (g->deaths[i].key != key || g->deaths[i].epoch != epoch)
            continue;
        for (int j = i + 1; j < g->death_count; j++)
            g->deaths[j - 1] = g->deaths[j];
        g->death_count--;
    }
}

void tm_gen_forgive(tm_pool *p, const tm_group *group)
{
    for (tm_gen *g = p->gens; g != NULL; g = g->next)
        forgive(g, group->key, group->epoch);
}
