/* Live requests, found by engine id (events) and by (session, router's id) (cancel, duplicates). Two
 * chained hash tables of a fixed size over the same entries: the engine's queue bound limits their number,
 * so the tables never grow. */
#include <stdlib.h>

#include "common/check.h"
#include "worker/internal.h"

static size_t mix(uint64_t x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33;
    return (size_t)x;
}

static size_t id_bucket(const worker_table *t, const worker_session *s, uint64_t id)
{
    return mix(id ^ (uint64_t)(uintptr_t)s * 0x9e3779b97f4a7c15ull) & t->mask;
}

bool worker_table_init(worker_table *t, size_t entries_hint)
{
    size_t n = 256;
    while (n < entries_hint && n < (size_t)1 << 20)
        n *= 2;
    t->by_engine = calloc(n, sizeof(*t->by_engine));
    t->by_id = calloc(n, sizeof(*t->by_id));
    t->mask = n - 1;
    t->count = 0;
    if (t->by_engine && t->by_id)
        return true;
    free(t->by_engine);
    free(t->by_id);
    t->by_engine = t->by_id = NULL;
    return false;
}

void worker_table_deinit(worker_table *t)
{
    for (size_t i = 0; t->by_engine && i <= t->mask; i++)
        while (t->by_engine[i]) {
            worker_live *l = t->by_engine[i];
            t->by_engine[i] = l->engine_next;
            free(l);
        }
    free(t->by_engine);
    free(t->by_id);
}

void worker_table_add(worker_table *t, worker_live *l)
{
    worker_live **e = &t->by_engine[mix(l->engine_id) & t->mask];
    worker_live **i = &t->by_id[id_bucket(t, l->session, l->id)];
    l->engine_next = *e;
    *e = l;
    l->id_next = *i;
    *i = l;
    l->prev = NULL;
    l->next = l->session->lives;
    if (l->next)
        l->next->prev = l;
    l->session->lives = l;
    t->count++;
}

worker_live *worker_table_engine(const worker_table *t, uint64_t engine_id)
{
    worker_live *l = t->by_engine[mix(engine_id) & t->mask];
    while (l && l->engine_id != engine_id)
        l = l->engine_next;
    return l;
}

worker_live *worker_table_id(const worker_table *t, const worker_session *s, uint64_t id)
{
    worker_live *l = t->by_id[id_bucket(t, s, id)];
    while (l && (l->session != s || l->id != id))
        l = l->id_next;
    return l;
}

void worker_table_orphan(worker_table *t, worker_live *l)
{
    if (!l->session)
        return;
    worker_live **at = &t->by_id[id_bucket(t, l->session, l->id)];
    while (*at != l)
        at = &(*at)->id_next;
    *at = l->id_next;
    if (l->prev)
        l->prev->next = l->next;
    else
        l->session->lives = l->next;
    if (l->next)
        l->next->prev = l->prev;
    l->prev = l->next = NULL;
    l->session = NULL;
}

void worker_table_remove(worker_table *t, worker_live *l)
{
    worker_table_orphan(t, l);
    worker_live **at = &t->by_engine[mix(l->engine_id) & t->mask];
    while (*at != l)
        at = &(*at)->engine_next;
    *at = l->engine_next;
    t->count--;
    free(l);
}
