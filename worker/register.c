/* See register.h. etcd's helper thread asks for the value at every attempt; a new attempt means a new epoch,
 * so that routers can tell a group that came back from one that never left. */
#include "worker/register.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/json.h"
#include "common/log.h"
#include "net/etcd/etcd.h"

#define LEASE_TTL_MS 10000

struct tm_worker_reg {
    tm_etcd_reg *etcd;
    tm_worker_service *service;
    const tm_engine_info *info;
    char key[512], address[256], model[128];
    pthread_mutex_t lock; /* guards what follows */
    uint64_t epoch, attempt;
    bool draining;
};

static void write_value(tm_worker_reg *r, uint64_t epoch, bool draining, tm_buf *b)
{
    const tm_engine_info *i = r->info;
    tm_jw w;
    tm_jw_init(&w, b);
    tm_jw_obj(&w);
    tm_jw_kint(&w, "epoch", (int64_t)epoch);
    tm_jw_kstr(&w, "address", r->address);
    tm_jw_kstr(&w, "model", r->model);
    tm_jw_kstr(&w, "digest", i->model.digest);
    tm_jw_kint(&w, "tp", i->model.tp);
    tm_jw_kint(&w, "max_batch_size", i->max_batch_size);
    tm_jw_kint(&w, "max_context", i->model.max_positions);
    tm_jw_kint(&w, "blocks_total", i->blocks_total);
    tm_jw_kstr(&w, "version", TM_VERSION);
    tm_jw_kstr(&w, "state", draining ? "DRAINING" : "READY");
    tm_jw_obj_end(&w);
}

static void value(void *user, uint64_t attempt, char *buf, size_t size)
{
    tm_worker_reg *r = user;
    pthread_mutex_lock(&r->lock);
    if (attempt != r->attempt) {
        uint64_t now = (uint64_t)tm_clock_wall_ms();
        r->epoch = TM_MAX(r->epoch + 1, now);
        r->attempt = attempt;
    }
    uint64_t epoch = r->epoch;
    bool draining = r->draining;
    pthread_mutex_unlock(&r->lock);
    tm_worker_service_set_epoch(r->service, epoch);
    tm_buf b;
    tm_buf_init(&b, size - 1);
    write_value(r, epoch, draining, &b);
    TM_ASSERT(!b.failed && b.len < size); /* every field is bounded well below etcd's value size */
    memcpy(buf, b.data, b.len + 1);
    tm_buf_deinit(&b);
}

static void on_state(void *user, bool registered, const char *why)
{
    tm_worker_reg *r = user;
    if (registered)
        tm_log(TM_LOG_INFO, "registered", "%s at %s", r->key, r->address);
    else
        tm_log(TM_LOG_WARN, "unregistered", "%s: %s; serving goes on, trying again", r->key,
               why ? why : "lease lost");
}

tm_status tm_worker_reg_create(tm_worker_reg **out, const tm_worker_reg_opts *o, tm_err *err)
{
    tm_worker_reg *r = calloc(1, sizeof(*r));
    if (!r)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    pthread_mutex_init(&r->lock, NULL);
    r->service = o->service;
    r->info = o->info;
    r->epoch = o->epoch;
    snprintf(r->address, sizeof(r->address), "%s", o->address);
    snprintf(r->model, sizeof(r->model), "%s", o->model);
    int n = snprintf(r->key, sizeof(r->key), "/turbomesh/v1/groups/%s/%s", o->pool, o->group);
    tm_etcd_reg_opts eo = {.endpoints = o->etcd,
                           .key = r->key,
                           .ttl_ms = LEASE_TTL_MS,
                           .value = value,
                           .on_state = on_state,
                           .user = r};
    tm_status st = TM_OK;
    if (strchr(o->pool, '/') || strchr(o->group, '/') || n >= (int)sizeof(r->key))
        st = TM_FAIL(err, TM_STATUS_CONFIG, "pool '%s' or group '%s': too long, or with a '/'",
                     o->pool, o->group);
    if (st == TM_OK)
        st = tm_etcd_reg_create(&r->etcd, &eo, err);
    if (st != TM_OK) {
        pthread_mutex_destroy(&r->lock);
        free(r);
        return st;
    }
    *out = r;
    return TM_OK;
}

void tm_worker_reg_drain(tm_worker_reg *r)
{
    if (!r)
        return;
    pthread_mutex_lock(&r->lock);
    r->draining = true;
    pthread_mutex_unlock(&r->lock);
    tm_etcd_reg_update(r->etcd);
}

void tm_worker_reg_destroy(tm_worker_reg *r, int64_t timeout_ms)
{
    if (!r)
        return;
    tm_etcd_reg_destroy(r->etcd, timeout_ms);
    pthread_mutex_destroy(&r->lock);
    free(r);
}
