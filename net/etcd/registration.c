/* A key that lives as long as its lease, and a lease that is renewed for ever.
 *
 * The key is put only where none is (transaction on version 0): another owner's key is waited for, never
 * overwritten, so two processes with one name cannot both believe to be registered. The owner is told by the
 * lease id, which also settles a transaction whose answer was lost. Every renewal reads the key back: a key that
 * somebody deleted by hand is put again. Losing etcd loses nothing by itself; only etcd's word that the lease is
 * gone makes a new registration. */
#include "net/etcd/etcd.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/json.h"
#include "common/log.h"
#include "net/etcd/link.h"

enum { LEASE_ID_MAX = 24, CLAIM_RETRY_MS = 500 };

struct tm_etcd_reg {
    tm_etcd_reg_opts opts;
    char *key;
    tm_etcd_link *link;
    pthread_t thread;
    char *value;                 /* TM_ETCD_VALUE_MAX + 1 bytes */
    atomic_bool active;          /* written by the thread, read by anyone */
    atomic_bool update_wanted;   /* set by anyone, taken by the thread */
    _Atomic int64_t farewell_ms; /* set before stop, read after it */
    char lease[LEASE_ID_MAX];    /* decimal, beyond 2^53; "" = none */
    bool claimed;                /* the key was put under this lease */
    uint64_t attempt;
    int64_t ttl_ms;     /* as granted */
    int64_t renewed_ms; /* start of the last successful renewal */
    int64_t next_renewal_ms, next_claim_ms;
    bool told; /* on_state was called at least once */
};

/* on_state only when something changed. */
static void report(tm_etcd_reg *r, bool active, const char *why)
{
    if (r->told && atomic_load(&r->active) == active)
        return;
    r->told = true;
    atomic_store(&r->active, active);
    tm_log(active ? TM_LOG_INFO : TM_LOG_WARN, active ? "etcd_registered" : "etcd_not_registered",
           "%s (registration %llu)%s%s", r->key, (unsigned long long)r->attempt, *why ? ": " : "",
           why);
    if (r->opts.on_state)
        r->opts.on_state(r->opts.user, active, why);
}

/* The key is gone or another's: the next one is a new registration. */
static void lose_key(tm_etcd_reg *r, const char *why)
{
    if (r->claimed)
        r->attempt++;
    r->claimed = false;
    r->next_claim_ms = 0;
    report(r, false, why);
}

static void lose_lease(tm_etcd_reg *r, const char *why)
{
    r->lease[0] = '\0';
    lose_key(r, why);
}

static tm_status ask(tm_etcd_reg *r, const char *path, tm_buf *body, json_t **reply, tm_err *err)
{
    tm_status st = tm_etcd_link_ask(r->link, path, body, TM_ETCD_CALL_MS, reply, err);
    tm_buf_deinit(body);
    return st;
}

static void schedule_renewal(tm_etcd_reg *r, int64_t start_ms)
{
    r->renewed_ms = start_ms;
    r->next_renewal_ms = start_ms + tm_etcd_link_jitter(r->link, r->ttl_ms / 3);
}

static tm_status grant_lease(tm_etcd_reg *r, tm_err *err)
{
    json_t *reply = NULL;
    tm_buf body;
    int64_t start = tm_clock_ms();
    tm_buf_init(&body, 0);
    tm_buf_printf(&body, "{\"TTL\":\"%lld\"}", (long long)((r->opts.ttl_ms + 999) / 1000));
    TM_TRY(ask(r, "/v3/lease/grant", &body, &reply, err));
    const char *id = json_string_value(tm_json_get(reply, "ID"));
    int64_t ttl_s = tm_etcd_int(reply, "TTL");
    tm_status st = TM_OK;
    if (!id || strlen(id) >= LEASE_ID_MAX || strspn(id, "0123456789-") != strlen(id) || ttl_s < 1) {
        st = TM_FAIL(err, TM_STATUS_DATA, "etcd: a lease was granted without id or TTL");
    } else {
        snprintf(r->lease, sizeof(r->lease), "%s", id);
        r->ttl_ms = ttl_s * 1000;
        schedule_renewal(r, start);
    }
    json_decref(reply);
    return st;
}

static bool reply_kv_is_ours(const tm_etcd_reg *r, const json_t *range)
{
    const json_t *kv = json_array_get(tm_json_get(range, "kvs"), 0);
    const char *lease = json_string_value(tm_json_get(kv, "lease"));
    return lease && strcmp(lease, r->lease) == 0;
}

static void write_put(const tm_etcd_reg *r, tm_buf *body)
{
    tm_buf_puts(body, "{\"request_put\":{");
    tm_etcd_put_b64(body, "key", r->key);
    tm_buf_putc(body, ',');
    tm_etcd_put_b64(body, "value", r->value);
    tm_buf_printf(body, ",\"lease\":\"%s\"}}", r->lease);
}

static void write_key_range(const tm_etcd_reg *r, tm_buf *body)
{
    tm_buf_puts(body, "{\"request_range\":{");
    tm_etcd_put_b64(body, "key", r->key);
    tm_buf_puts(body, "}}");
}

static void fetch_value(tm_etcd_reg *r)
{
    r->value[0] = '\0';
    r->opts.value(r->opts.user, r->attempt, r->value, TM_ETCD_VALUE_MAX + 1);
    r->value[TM_ETCD_VALUE_MAX] = '\0';
}

/* Puts the value if the key satisfies `compare`, else reads the key. *ours: the key is ours now. */
static tm_status transact(tm_etcd_reg *r, const char *target, const char *operand, bool *succeeded,
                          bool *ours, tm_err *err)
{
    json_t *reply = NULL;
    tm_buf body;
    tm_buf_init(&body, 0);
    tm_buf_printf(&body, "{\"compare\":[{\"target\":\"%s\",\"result\":\"EQUAL\",%s,", target,
                  operand);
    tm_etcd_put_b64(&body, "key", r->key);
    tm_buf_puts(&body, "}],\"success\":[");
    write_put(r, &body);
    tm_buf_puts(&body, "],\"failure\":[");
    write_key_range(r, &body);
    tm_buf_puts(&body, "]}");
    TM_TRY(ask(r, "/v3/kv/txn", &body, &reply, err));
    *succeeded = json_is_true(tm_json_get(reply, "succeeded"));
    const json_t *first = json_array_get(tm_json_get(reply, "responses"), 0);
    *ours = *succeeded || reply_kv_is_ours(r, tm_json_get(first, "response_range"));
    json_decref(reply);
    return TM_OK;
}

static tm_status claim_key(tm_etcd_reg *r, tm_err *err)
{
    bool succeeded, ours;
    /* An update asked for so far is in the value that is fetched now. */
    atomic_store(&r->update_wanted, false);
    fetch_value(r);
    TM_TRY(transact(r, "VERSION", "\"version\":\"0\"", &succeeded, &ours, err));
    if (!ours) {
        r->next_claim_ms = tm_clock_ms() + tm_etcd_link_jitter(r->link, CLAIM_RETRY_MS);
        report(r, false, "the key belongs to another lease; waiting for it to end");
        return TM_OK;
    }
    if (!succeeded)
        atomic_store(&r->update_wanted,
                     true); /* an earlier try went through, with its older value */
    r->claimed = true;
    report(r, true, "");
    return TM_OK;
}

static tm_status put_update(tm_etcd_reg *r, tm_err *err)
{
    bool succeeded, ours;
    char operand[LEASE_ID_MAX + 16];
    fetch_value(r);
    snprintf(operand, sizeof(operand), "\"lease\":\"%s\"", r->lease);
    TM_TRY(transact(r, "LEASE", operand, &succeeded, &ours, err));
    if (!ours)
        lose_key(r, "the key was deleted or taken");
    return TM_OK;
}

static tm_status verify_key(tm_etcd_reg *r, tm_err *err)
{
    json_t *reply = NULL;
    tm_buf body;
    tm_buf_init(&body, 0);
    tm_buf_putc(&body, '{');
    tm_etcd_put_b64(&body, "key", r->key);
    tm_buf_putc(&body, '}');
    TM_TRY(ask(r, "/v3/kv/range", &body, &reply, err));
    if (!reply_kv_is_ours(r, reply))
        lose_key(r, "the key was deleted or taken");
    json_decref(reply);
    return TM_OK;
}

/* A dead lease is answered with 200 and without a TTL. */
static tm_status renew_lease(tm_etcd_reg *r, tm_err *err)
{
    json_t *reply = NULL;
    tm_buf body;
    int64_t start = tm_clock_ms();
    tm_buf_init(&body, 0);
    tm_buf_printf(&body, "{\"ID\":\"%s\"}", r->lease);
    TM_TRY(ask(r, "/v3/lease/keepalive", &body, &reply, err));
    int64_t ttl_s = tm_etcd_int(tm_json_get(reply, "result"), "TTL");
    json_decref(reply);
    if (ttl_s < 1) {
        lose_lease(r, "the lease is gone");
        return TM_OK;
    }
    schedule_renewal(r, start);
    if (!r->claimed)
        return TM_OK;
    TM_TRY(verify_key(r, err));
    if (r->claimed)
        report(r, true, "");
    return TM_OK;
}

/* Does the most urgent thing, or sleeps until something is due. */
static tm_status step(tm_etcd_reg *r, tm_err *err)
{
    int64_t now = tm_clock_ms();
    if (!r->lease[0])
        return grant_lease(r, err);
    if (now >= r->next_renewal_ms)
        return renew_lease(r, err);
    if (!r->claimed && now >= r->next_claim_ms)
        return claim_key(r, err);
    if (r->claimed && atomic_exchange(&r->update_wanted, false)) {
        tm_status st = put_update(r, err);
        if (st != TM_OK)
            atomic_store(&r->update_wanted, true);
        return st;
    }
    int64_t due = r->claimed ? r->next_renewal_ms : TM_MIN(r->next_renewal_ms, r->next_claim_ms);
    tm_etcd_link_sleep(r->link, due - now);
    return TM_OK;
}

static void take_failure(tm_etcd_reg *r, tm_status st, const tm_err *err)
{
    if (st == TM_STATUS_CANCELLED)
        return;
    /* The lease outlives short outages; only a whole TTL without renewal makes it doubtful. */
    if (st == TM_STATUS_NOT_FOUND && r->lease[0])
        lose_lease(r, "the lease is gone");
    else if (!atomic_load(&r->active) || tm_clock_ms() - r->renewed_ms > r->ttl_ms)
        report(r, false, err->msg);
    tm_etcd_link_backoff(r->link);
}

static void revoke_lease(tm_etcd_reg *r)
{
    int64_t end = tm_clock_ms() + atomic_load(&r->farewell_ms);
    tm_etcd_link_allow_last(r->link);
    for (int i = 0; i < tm_etcd_link_endpoints(r->link) && r->lease[0]; i++) {
        int64_t left = TM_MIN(end - tm_clock_ms(), TM_ETCD_CALL_MS);
        json_t *reply = NULL;
        tm_buf body;
        if (left <= 0)
            break;
        tm_buf_init(&body, 0);
        tm_buf_printf(&body, "{\"ID\":\"%s\"}", r->lease);
        tm_status st = tm_etcd_link_ask(r->link, "/v3/lease/revoke", &body, left, &reply, NULL);
        tm_buf_deinit(&body);
        json_decref(reply);
        if (st == TM_OK || st == TM_STATUS_NOT_FOUND)
            r->lease[0] = '\0';
    }
    if (r->lease[0])
        tm_log(TM_LOG_WARN, "etcd_revoke", "%s: not revoked in time; the lease will expire",
               r->key);
}

static void *run_registration(void *arg)
{
    tm_etcd_reg *r = arg;
    pthread_setname_np(pthread_self(), "tm-etcd-reg");
    while (!tm_etcd_link_stopped(r->link)) {
        tm_err err = TM_ERR_INIT;
        tm_status st = step(r, &err);
        if (st == TM_OK)
            tm_etcd_link_reset_backoff(r->link);
        else
            take_failure(r, st, &err);
    }
    if (r->lease[0])
        revoke_lease(r);
    return NULL;
}

static void free_registration(tm_etcd_reg *r)
{
    tm_etcd_link_destroy(r->link);
    free(r->value);
    free(r->key);
    free(r);
}

tm_status tm_etcd_reg_create(tm_etcd_reg **out, const tm_etcd_reg_opts *opts, tm_err *err)
{
    tm_status st;
    if (!opts->key || !*opts->key || !opts->value || opts->ttl_ms < 1000)
        return TM_FAIL(err, TM_STATUS_INVALID,
                       "etcd: a registration needs a key, a value and a TTL of a second or more");
    tm_etcd_reg *r = calloc(1, sizeof(*r));
    if (!r)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "etcd: out of memory");
    r->opts = *opts;
    r->ttl_ms = opts->ttl_ms;
    r->key = strdup(opts->key);
    r->value = malloc(TM_ETCD_VALUE_MAX + 1);
    TM_TRY_GOTO(tm_etcd_link_create(&r->link, opts->endpoints, err), err_free);
    if (!r->key || !r->value) {
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "etcd: out of memory");
        goto err_free;
    }
    r->opts.key = r->key;
    r->opts.endpoints = NULL;
    TM_TRY_GOTO(tm_etcd_thread_start(&r->thread, run_registration, r, err), err_free);
    *out = r;
    return TM_OK;

err_free:
    free_registration(r);
    return st;
}

void tm_etcd_reg_update(tm_etcd_reg *r)
{
    atomic_store(&r->update_wanted, true);
    tm_etcd_link_wake(r->link);
}

bool tm_etcd_reg_active(const tm_etcd_reg *r)
{
    return atomic_load(&r->active);
}

void tm_etcd_reg_destroy(tm_etcd_reg *r, int64_t timeout_ms)
{
    if (!r)
        return;
    atomic_store(&r->farewell_ms, timeout_ms);
    tm_etcd_link_stop(r->link);
    pthread_join(r->thread, NULL);
    free_registration(r);
}
