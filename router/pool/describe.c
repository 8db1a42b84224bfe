/* Questions about the pool: served models, counts, the group table as JSON. */
#include "router/pool/state.h"

#include <string.h>

#include "common/json.h"

static int ready_groups(const tm_model *m)
{
    int n = 0;
    for (int i = 0; i < m->group_count; i++)
        n += tm_group_state_of(m->groups[i]) == TM_GROUP_READY;
    return n;
}

/* Models of one name stand together (a rolling change of the weights): the one with most ready groups
 * speaks for the name. *next is where the following name begins. */
static const tm_model *best_of_name(const tm_pool *p, int begin, int *next)
{
    const tm_model *best = NULL;
    int i = begin;
    for (; i < p->model_count && strcmp(p->models[i]->name, p->models[begin]->name) == 0; i++) {
        const tm_model *m = p->models[i];
        if (m->served != NULL && (best == NULL || ready_groups(m) > ready_groups(best)))
            best = m;
    }
    *next = i;
    return best;
}

int tm_pool_served_count(const tm_pool *p)
{
    int n = 0;
    for (int i = 0; i < p->model_count;)
        n += best_of_name(p, i, &i) != NULL;
    return n;
}

tm_served *tm_pool_served_at(const tm_pool *p, int index)
{
    for (int i = 0; i < p->model_count;) {
        const tm_model *m = best_of_name(p, i, &i);
        if (m != NULL && index-- == 0)
            return m->served;
    }
    return NULL;
}

tm_served *tm_pool_served_find(const tm_pool *p, const char *name)
{
    if (name == NULL)
        return tm_pool_served_at(p, 0);
    for (int i = 0; i < p->model_count;) {
        const tm_model *m = best_of_name(p, i, &i);
        if (m != NULL && strcmp(m->name, name) == 0)
            return m->served;
    }
    return NULL;
}

int tm_pool_groups_ready(const tm_pool *p, const char *model)
{
    int n = 0;
    for (int i = 0; i < p->model_count; i++)
        if (model == NULL || strcmp(p->models[i]->name, model) == 0)
            n += ready_groups(p->models[i]);
    return n;
}

int tm_pool_active(const tm_pool *p)
{
    return p->active;
}

int tm_pool_waiting(const tm_pool *p)
{
    return p->waiting;
}

int tm_pool_in_flight(const tm_pool *p)
{
    int n = 0;
    for (int i = 0; i < p->group_cap; i++)
        n += p->groups[i] != NULL ? p->groups[i]->in_flight : 0;
    return n;
}

static void describe_group(tm_jw *w, const tm_group *g, bool addresses)
{
    tm_jw_obj(w);
    tm_jw_kstr(w, "name", g->label);
    if (addresses)
        tm_jw_kstr(w, "address", g->member.address);
    tm_jw_kstr(w, "state", tm_group_state_name(tm_group_state_of(g)));
    tm_jw_kint(w, "epoch", (int64_t)g->epoch);
    tm_jw_kbool(w, "listed", g->listed);
    tm_jw_kstr(w, "model", g->model != NULL ? g->model->name : NULL);
    tm_jw_kint(w, "in_flight", g->in_flight);
    tm_jw_kint(w, "capacity", g->hello ? tm_group_capacity(g) : 0);
    if (g->known) {
        tm_jw_kint(w, "running", g->running);
        tm_jw_kint(w, "waiting", g->waiting);
        tm_jw_kint(w, "waiting_tokens", g->waiting_tokens);
        tm_jw_knum(w, "prefill_tps", g->prefill_tps);
        tm_jw_knum(w, "step_ms", g->step_s * 1000.0);
        tm_jw_knum(w, "kv_use", g->kv_use);
    }
    tm_jw_obj_end(w);
}

static void describe_model(tm_jw *w, const tm_model *m)
{
    tm_jw_obj(w);
    tm_jw_kstr(w, "name", m->name);
    tm_jw_kstr(w, "digest", m->digest);
    tm_jw_kbool(w, "served", m->served != NULL);
    tm_jw_kint(w, "groups", m->group_count);
    tm_jw_kint(w, "groups_ready", ready_groups(m));
    tm_jw_kint(w, "waiting", m->queue.count);
    tm_jw_knum(w, "drain_rate", m->drain_rate);
    tm_jw_obj_end(w);
}

void tm_pool_describe_groups(const tm_pool *p, tm_jw *w, bool addresses)
{
    tm_jw_arr(w);
    for (int i = 0; i < p->group_cap; i++)
        if (p->groups[i] != NULL)
            describe_group(w, p->groups[i], addresses);
    tm_jw_arr_end(w);
}

void tm_pool_describe(const tm_pool *p, tm_buf *json)
{
    tm_jw w;
    tm_jw_init(&w, json);
    tm_jw_obj(&w);
    tm_jw_kbool(&w, "members_stale", p->stale);
    tm_jw_kstr(&w, "policy", p->balancer.policy->name);
    tm_jw_kint(&w, "active", p->active);
    tm_jw_kint(&w, "waiting", p->waiting);
    tm_jw_key(&w, "models");
    tm_jw_arr(&w);
    for (int i = 0; i < p->model_count; i++)
        describe_model(&w, p->models[i]);
    tm_jw_arr_end(&w);
    tm_jw_key(&w, "groups");
    tm_pool_describe_groups(p, &w, true);
    tm_jw_obj_end(&w);
}
