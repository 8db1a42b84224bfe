/* Models: what the groups serve, by (name, digest). A model comes with the first group that says so in its
 * Hello, is offered once its text files are here, and goes some time after its last group went. The list is
 * kept in order of name. */
#include "router/pool/state.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/log.h"

#define FETCH_BACKOFF_MS     1000
#define FETCH_BACKOFF_MAX_MS 30000
#define LINGER_MS            300000 /* a model without groups stays listed this long */
#define RETRY_AFTER_MIN_MS   1000
#define RETRY_AFTER_MAX_MS   30000
#define RATE_GAIN            0.3
#define MODELS_MAX           256

static int compare_model(const tm_model *m, const char *name, const char *digest)
{
    int c = strcmp(m->name, name);
    return c != 0 ? c : strcmp(m->digest, digest);
}

static bool insert_model(tm_pool *p, tm_model *m)
{
    if (p->model_count == p->model_cap) {
        int cap = TM_MAX(8, p->model_cap * 2);
        tm_model **models = realloc(p->models, (size_t)cap * sizeof(tm_model *));
        if (models == NULL)
            return false;
        p->models = models;
        p->model_cap = cap;
    }
    int at = p->model_count++;
    while (at > 0 && compare_model(p->models[at - 1], m->name, m->digest) > 0) {
        p->models[at] = p->models[at - 1];
        at--;
    }
    p->models[at] = m;
    return true;
}

tm_model *tm_model_get(tm_pool *p, const char *name, const char *digest)
{
    for (int i = 0; i < p->model_count; i++)
        if (compare_model(p->models[i], name, digest) == 0)
            return p->models[i];
    if (p->model_count >= MODELS_MAX || strlen(name) >= sizeof(((tm_model *)0)->name) ||
        strlen(digest) >= sizeof(((tm_model *)0)->digest))
        return NULL;
    tm_model *m = calloc(1, sizeof(*m));
    if (m == NULL)
        return NULL;
    memcpy(m->name, name, strlen(name));
    memcpy(m->digest, digest, strlen(digest));
    m->fetch_backoff_ms = FETCH_BACKOFF_MS;
    if (!insert_model(p, m)) {
        free(m);
        return NULL;
    }
    return m;
}

bool tm_model_attach(tm_pool *p, tm_model *m, tm_group *g)
{
    if (g->model == m)
        return true;
    tm_model_detach(p, g);
    if (m->group_count == m->group_cap) {
        int cap = TM_MAX(8, m->group_cap * 2);
        tm_group **groups = realloc(m->groups, (size_t)cap * sizeof(tm_group *));
        if (groups == NULL)
            return false;
        m->groups = groups;
        m->group_cap = cap;
    }
    m->groups[m->group_count++] = g;
    g->model = m;
    return true;
}

void tm_model_detach(tm_pool *p, tm_group *g)
{
    tm_model *m = g->model;
    if (m == NULL)
        return;
    for (int i = 0; i < m->group_count; i++)
        if (m->groups[i] == g) {
            m->groups[i] = m->groups[--m->group_count];
            break;
        }
    g->model = NULL;
    m->lost_ns = tm_pool_now(p);
}

static void model_free(tm_model *m)
{
    if (m->served != NULL)
        tm_served_release(m->served);
    tm_heap_deinit(&m->queue);
    free(m->groups);
    free(m);
}

void tm_models_destroy(tm_pool *p)
{
    for (int i = 0; i < p->model_count; i++)
        model_free(p->models[i]);
    free(p->models);
    p->models = NULL;
    p->model_count = p->model_cap = 0;
}

/* Asks one of the groups for the text files, a different one at each try. */
static void fetch_assets(tm_pool *p, tm_model *m, int64_t now)
{
    const tm_transport *t = &p->opts.transport;
    const tm_group *from = m->groups[tm_balancer_random(&p->balancer) % (uint64_t)m->group_count];
    m->fetch_ns = now + m->fetch_backoff_ms * NS_PER_MS;
    m->fetch_backoff_ms = TM_MIN(m->fetch_backoff_ms * 2, (int64_t)FETCH_BACKOFF_MAX_MS);
    m->fetching = t->fetch(t->ctx, from->member.address, m->name, m->digest) == TM_OK;
}

static bool model_expired(const tm_model *m, int64_t now)
{
    return m->group_count == 0 && m->gen_count == 0 && !m->fetching &&
           now - m->lost_ns > LINGER_MS * NS_PER_MS;
}

void tm_models_tick(tm_pool *p, int64_t now_ns)
{
    int kept = 0;
    for (int i = 0; i < p->model_count; i++) {
        tm_model *m = p->models[i];
        if (m->served == NULL && !m->fetching && m->group_count > 0 && now_ns >= m->fetch_ns)
            fetch_assets(p, m, now_ns);
        if (model_expired(m, now_ns)) {
            tm_log(TM_LOG_INFO, "model_left", "%s", m->name);
            model_free(m);
            continue;
        }
        p->models[kept++] = m;
    }
    p->model_count = kept;
}

void tm_model_rates(tm_pool *p, double seconds)
{
    for (int i = 0; i < p->model_count; i++) {
        tm_model *m = p->models[i];
        double rate = (double)(m->ended - m->ended_seen) / seconds;
        m->ended_seen = m->ended;
        m->drain_rate += RATE_GAIN * (rate - m->drain_rate);
    }
}

/* When a place in the queue should be free, from how fast generations end. */
int64_t tm_model_retry_after(const tm_model *m, int ahead)
{
    if (m->drain_rate < 1e-3)
        return RETRY_AFTER_MIN_MS;
    double s = ceil((double)(ahead + 1) / m->drain_rate);
    return (int64_t)TM_MIN(TM_MAX(s * 1000.0, (double)RETRY_AFTER_MIN_MS),
                           (double)RETRY_AFTER_MAX_MS);
}
