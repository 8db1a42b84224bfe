/* Registration and watch against a real etcd: leases lost, keys deleted or taken, etcd stopped, killed,
 * emptied, unreachable, compacted, cut off. Skipped with a message where etcd is not installed. */
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/json.h"
#include "common/log.h"
#include "net/etcd/etcd.h"
#include "net/etcd/link.h"
#include "tests/net/etcd_fixture.h"

#define PREFIX "/turbomesh/v1/groups/"
#define KEY    PREFIX "pool/g1"

/* What the callbacks told, under one lock. */
typedef struct witness {
    pthread_mutex_t lock;
    char list[4096]; /* "key=value@create " ... */
    int count, lists, empty_lists;
    int64_t revision;
    int ups, downs;
    bool up;
    uint64_t last_attempt;
    int values;
    bool draining;
} witness;

static void witness_init(witness *w)
{
    memset(w, 0, sizeof(*w));
    pthread_mutex_init(&w->lock, NULL);
}

static void on_value(void *user, uint64_t attempt, char *buf, size_t size)
{
    witness *w = user;
    pthread_mutex_lock(&w->lock);
    w->last_attempt = attempt;
    w->values++;
    snprintf(buf, size, "a%llu%s", (unsigned long long)attempt, w->draining ? "-draining" : "");
    pthread_mutex_unlock(&w->lock);
}

static void on_state(void *user, bool up, const char *why)
{
    witness *w = user;
    assert_non_null(why);
    pthread_mutex_lock(&w->lock);
    w->up = up;
    if (up)
        w->ups++;
    else
        w->downs++;
    pthread_mutex_unlock(&w->lock);
}

static void on_list(void *user, const tm_etcd_kv *kvs, int count, int64_t revision)
{
    witness *w = user;
    size_t at = 0;
    pthread_mutex_lock(&w->lock);
    w->count = count;
    w->revision = revision;
    w->lists++;
    w->empty_lists += count == 0;
    w->list[0] = '\0';
    for (int i = 0; i < count && at < sizeof(w->list) - 1; i++)
        at += (size_t)snprintf(w->list + at, sizeof(w->list) - at, "%s=%s ",
                               kvs[i].key + strlen(PREFIX), kvs[i].value);
    pthread_mutex_unlock(&w->lock);
}

static bool list_is(witness *w, const char *text)
{
    pthread_mutex_lock(&w->lock);
    bool same = strcmp(w->list, text) == 0 && w->lists > 0;
    pthread_mutex_unlock(&w->lock);
    return same;
}

static int get_int(witness *w, const int *field)
{
    pthread_mutex_lock(&w->lock);
    int v = *field;
    pthread_mutex_unlock(&w->lock);
    return v;
}

#define WAIT(cond, ms)                                                                             \
    do {                                                                                           \
        int64_t wait_end_ = tm_clock_ms() + (ms);                                                  \
        while (!(cond) && tm_clock_ms() < wait_end_)                                               \
            tm_sleep_ms(5);                                                                        \
        assert_true(cond);                                                                         \
    } while (0)

static tm_etcd_reg *start_reg(witness *w, const char *endpoints, const char *key, int64_t ttl_ms)
{
    tm_etcd_reg *r = NULL;
    tm_etcd_reg_opts o = {.endpoints = endpoints,
                          .key = key,
                          .ttl_ms = ttl_ms,
                          .value = on_value,
                          .on_state = on_state,
                          .user = w};
    assert_int_equal(tm_etcd_reg_create(&r, &o, NULL), TM_OK);
    return r;
}

static tm_etcd_watch *start_watch(witness *w, const char *endpoints, int64_t reconcile_ms)
{
    tm_etcd_watch *r = NULL;
    tm_etcd_watch_opts o = {.endpoints = endpoints,
                            .prefix = PREFIX,
                            .on_list = on_list,
                            .on_state = on_state,
                            .user = w,
                            .reconcile_ms = reconcile_ms};
    assert_int_equal(tm_etcd_watch_create(&r, &o, NULL), TM_OK);
    return r;
}

static void revoke_all_leases(const etcd_proc *e)
{
    json_t *leases = etcd_raw_ask(e, "/v3/lease/leases", "{}");
    size_t i;
    json_t *lease;
    json_array_foreach(tm_json_get(leases, "leases"), i, lease)
    {
        char body[64];
        snprintf(body, sizeof(body), "{\"ID\":\"%s\"}",
                 json_string_value(tm_json_get(lease, "ID")));
        json_decref(etcd_raw_ask(e, "/v3/lease/revoke", body));
    }
    json_decref(leases);
}

static bool key_is(const etcd_proc *e, const char *key, const char *value)
{
    char *got = NULL;
    tm_status st = tm_etcd_get(e->url, key, &got, NULL);
    bool same = value ? st == TM_OK && strcmp(got, value) == 0 : st == TM_STATUS_NOT_FOUND;
    free(got);
    return same;
}

static void test_one_shot(void **state)
{
    etcd_proc *e = *state;
    tm_err err = TM_ERR_INIT;
    char *value = NULL;
    assert_int_equal(tm_etcd_health(e->url, &err), TM_OK);
    assert_int_equal(tm_etcd_put(e->url, "/one", "a \"value\"\n", &err), TM_OK);
    assert_int_equal(tm_etcd_get(e->url, "/one", &value, &err), TM_OK);
    assert_string_equal(value, "a \"value\"\n");
    free(value);
    assert_int_equal(tm_etcd_put(e->url, "/empty", "", &err), TM_OK);
    assert_int_equal(tm_etcd_get(e->url, "/empty", &value, &err), TM_OK);
    assert_string_equal(value, "");
    free(value);
    assert_int_equal(tm_etcd_delete(e->url, "/one", &err), TM_OK);
    assert_int_equal(tm_etcd_get(e->url, "/one", &value, &err), TM_STATUS_NOT_FOUND);
    /* The first endpoint that answers is enough, whichever stands first. */
    char both[160];
    for (int i = 0; i < 4; i++) {
        snprintf(both, sizeof(both), "http://127.0.0.1:1,%s", e->url);
        assert_int_equal(tm_etcd_health(both, &err), TM_OK);
    }
    assert_int_equal(tm_etcd_health("http://127.0.0.1:1", &err), TM_STATUS_UNAVAILABLE);
    assert_non_null(strstr(err.msg, "127.0.0.1:1"));
}

static void test_register_update_destroy(void **state)
{
    etcd_proc *e = *state;
    witness w;
    witness_init(&w);
    tm_etcd_reg *r = start_reg(&w, e->url, KEY, 2000);
    WAIT(tm_etcd_reg_active(r), 5000);
    assert_true(key_is(e, KEY, "a0"));
    /* Renewed well past its TTL, and never registered anew. */
    tm_sleep_ms(4500);
    assert_true(tm_etcd_reg_active(r) && key_is(e, KEY, "a0"));
    assert_int_equal(get_int(&w, &w.values), 1);
    pthread_mutex_lock(&w.lock);
    w.draining = true;
    pthread_mutex_unlock(&w.lock);
    tm_etcd_reg_update(r);
    WAIT(key_is(e, KEY, "a0-draining"), 2000);
    assert_int_equal(get_int(&w, &w.ups), 1);
    tm_etcd_reg_destroy(r, 2000);
    assert_true(key_is(e, KEY, NULL));
}

static void test_lease_lost(void **state)
{
    etcd_proc *e = *state;
    witness w;
    witness_init(&w);
    tm_etcd_reg *r = start_reg(&w, e->url, KEY, 2000);
    WAIT(tm_etcd_reg_active(r), 5000);
    for (int i = 1; i <= 2; i++) {
        char expect[8];
        snprintf(expect, sizeof(expect), "a%d", i);
        revoke_all_leases(e);
        WAIT(key_is(e, KEY, expect), 5000);
        WAIT(get_int(&w, &w.ups) == i + 1, 1000);
        assert_int_equal(get_int(&w, &w.downs), i);
    }
    tm_etcd_reg_destroy(r, 2000);
}

static void test_key_deleted_by_hand(void **state)
{
    etcd_proc *e = *state;
    witness w;
    witness_init(&w);
    tm_etcd_reg *r = start_reg(&w, e->url, KEY, 2000);
    WAIT(tm_etcd_reg_active(r), 5000);
    assert_int_equal(tm_etcd_delete(e->url, KEY, NULL), TM_OK);
    WAIT(key_is(e, KEY, "a1"), 3000);
    WAIT(tm_etcd_reg_active(r), 1000);
    /* An update of a key that is gone is a new registration, not a write on nothing. */
    assert_int_equal(tm_etcd_delete(e->url, KEY, NULL), TM_OK);
    tm_etcd_reg_update(r);
    WAIT(key_is(e, KEY, "a2"), 3000);
    tm_etcd_reg_destroy(r, 2000);
}

static void test_key_of_another(void **state)
{
    etcd_proc *e = *state;
    witness w, other;
    witness_init(&w);
    witness_init(&other);
    assert_int_equal(tm_etcd_put(e->url, KEY, "theirs", NULL), TM_OK);
    tm_etcd_reg *r = start_reg(&w, e->url, KEY, 2000);
    WAIT(get_int(&w, &w.downs) == 1, 3000);
    tm_sleep_ms(1500);
    assert_false(tm_etcd_reg_active(r));
    assert_true(key_is(e, KEY, "theirs"));
    assert_int_equal(tm_etcd_delete(e->url, KEY, NULL), TM_OK);
    WAIT(tm_etcd_reg_active(r) && key_is(e, KEY, "a0"), 3000);
    /* Of two processes with one name, the second waits for the first. */
    tm_etcd_reg *second = start_reg(&other, e->url, KEY, 2000);
    tm_sleep_ms(1000);
    assert_false(tm_etcd_reg_active(second));
    tm_etcd_reg_destroy(r, 2000);
    WAIT(tm_etcd_reg_active(second), 3000);
    tm_etcd_reg_destroy(second, 2000);
    assert_true(key_is(e, KEY, NULL));
}

static void test_watch_follows(void **state)
{
    etcd_proc *e = *state;
    witness w;
    witness_init(&w);
    assert_int_equal(tm_etcd_put(e->url, PREFIX "b", "1", NULL), TM_OK);
    tm_etcd_watch *watch = start_watch(&w, e->url, 60000);
    WAIT(list_is(&w, "b=1 "), 5000);
    assert_true(w.up);
    assert_int_equal(tm_etcd_put(e->url, PREFIX "a", "2", NULL), TM_OK);
    WAIT(list_is(&w, "a=2 b=1 "), 2000);
    assert_int_equal(tm_etcd_put(e->url, PREFIX "b", "3", NULL), TM_OK);
    WAIT(list_is(&w, "a=2 b=3 "), 2000);
    assert_int_equal(tm_etcd_put(e->url, "/turbomesh/v1/groupsX", "no", NULL), TM_OK);
    assert_int_equal(tm_etcd_delete(e->url, PREFIX "a", NULL), TM_OK);
    WAIT(list_is(&w, "b=3 "), 2000);
    assert_int_equal(tm_etcd_delete(e->url, PREFIX "b", NULL), TM_OK);
    WAIT(list_is(&w, ""), 2000);
    assert_int_equal(tm_etcd_watch_relists(watch), 0);
    assert_int_equal(get_int(&w, &w.downs), 0);
    tm_etcd_watch_destroy(watch);
}

static void test_watch_pages_and_reconciles(void **state)
{
    etcd_proc *e = *state;
    witness w;
    witness_init(&w);
    enum { N = 600 };
    for (int i = 0; i < N; i++) {
        char key[64];
        snprintf(key, sizeof(key), PREFIX "k%04d", i);
        assert_int_equal(tm_etcd_put(e->url, key, "v", NULL), TM_OK);
    }
    tm_etcd_watch *watch = start_watch(&w, e->url, 300);
    WAIT(get_int(&w, &w.count) == N, 5000);
    WAIT(tm_etcd_watch_relists(watch) >= 3, 5000);
    assert_int_equal(get_int(&w, &w.count), N);
    assert_int_equal(get_int(&w, &w.downs), 0);
    assert_int_equal(get_int(&w, &w.empty_lists), 0);
    tm_etcd_watch_destroy(watch);
    json_decref(
        etcd_raw_ask(e, "/v3/kv/deleterange",
                     "{\"key\":\"L3R1cmJvbWVzaC92MS8=\",\"range_end\":\"L3R1cmJvbWVzaC92MTA=\"}"));
}

/* The watch starts behind a compaction: etcd cancels it and leaves the stream open. */
static void test_compaction(void **state)
{
    etcd_proc *e = *state;
    witness w;
    witness_init(&w);
    relay *r = relay_start(e->port);
    char url[64], body[64];
    snprintf(url, sizeof(url), "http://127.0.0.1:%d", relay_port(r));
    assert_int_equal(tm_etcd_put(e->url, PREFIX "gone", "1", NULL), TM_OK);
    relay_set(r, RELAY_HOLD_WATCH);
    tm_etcd_watch *watch = start_watch(&w, url, 60000);
    WAIT(list_is(&w, "gone=1 "), 5000);
    WAIT(relay_held(r) == 1, 2000);
    assert_int_equal(tm_etcd_delete(e->url, PREFIX "gone", NULL), TM_OK);
    assert_int_equal(tm_etcd_put(e->url, PREFIX "new", "2", NULL), TM_OK);
    json_t *reply = etcd_raw_ask(e, "/v3/kv/range", "{\"key\":\"YQ==\"}");
    snprintf(body, sizeof(body), "{\"revision\":\"%lld\",\"physical\":true}",
             (long long)tm_etcd_int(tm_json_get(reply, "header"), "revision"));
    json_decref(reply);
    json_decref(etcd_raw_ask(e, "/v3/kv/compaction", body));
    assert_int_equal(tm_etcd_watch_relists(watch), 0);
    relay_set(r, RELAY_PASS);
    WAIT(list_is(&w, "new=2 "), 3000);
    assert_int_equal(tm_etcd_watch_relists(watch), 1);
    assert_int_equal(get_int(&w, &w.downs), 0);
    /* and the new watch is a live one */
    assert_int_equal(tm_etcd_delete(e->url, PREFIX "new", NULL), TM_OK);
    WAIT(list_is(&w, ""), 2000);
    tm_etcd_watch_destroy(watch);
    relay_stop(r);
}

/* A dead link keeps every connection open: the probe notices, the last list stays, the registration holds. */
static void test_cut_off(void **state)
{
    etcd_proc *e = *state;
    witness w, reg;
    witness_init(&w);
    witness_init(&reg);
    relay *r = relay_start(e->port);
    char url[64];
    snprintf(url, sizeof(url), "http://127.0.0.1:%d", relay_port(r));
    tm_etcd_watch *watch = start_watch(&w, url, 60000);
    tm_etcd_reg *registration = start_reg(&reg, url, KEY, 10000);
    WAIT(list_is(&w, "pool/g1=a0 ") && tm_etcd_reg_active(registration), 5000);
    relay_set(r, RELAY_SWALLOW);
    assert_int_equal(tm_etcd_put(e->url, PREFIX "unseen", "1", NULL), TM_OK);
    WAIT(get_int(&w, &w.downs) == 1, 12000);
    assert_true(list_is(&w, "pool/g1=a0 "));
    assert_true(tm_etcd_reg_active(registration));
    relay_set(r, RELAY_PASS);
    WAIT(list_is(&w, "pool/g1=a0 unseen=1 "), 12000);
    assert_int_equal(get_int(&w, &w.ups), 2);
    assert_int_equal(get_int(&reg, &reg.values), 1);
    assert_int_equal(tm_etcd_delete(e->url, PREFIX "unseen", NULL), TM_OK);
    tm_etcd_watch_destroy(watch);
    /* The farewell is bounded also when nothing answers. */
    relay_set(r, RELAY_SWALLOW);
    int64_t start = tm_clock_ms();
    tm_etcd_reg_destroy(registration, 300);
    assert_true(tm_clock_ms() - start < 10000);
    relay_stop(r);
    revoke_all_leases(e);
}

static void test_stopped_process(void **state)
{
    etcd_proc *e = *state;
    witness w;
    witness_init(&w);
    tm_etcd_reg *r = start_reg(&w, e->url, KEY, 2000);
    WAIT(tm_etcd_reg_active(r), 5000);
    kill(e->pid, SIGSTOP);
    WAIT(!tm_etcd_reg_active(r), 8000);
    kill(e->pid, SIGCONT);
    WAIT(tm_etcd_reg_active(r), 12000);
    WAIT(key_is(e, KEY, "a0") || key_is(e, KEY, "a1"), 2000);
    tm_etcd_reg_destroy(r, 2000);
    assert_true(key_is(e, KEY, NULL));
}

static void test_killed_and_restarted(void **state)
{
    etcd_proc *e = *state;
    witness w, reg;
    witness_init(&w);
    witness_init(&reg);
    tm_etcd_watch *watch = start_watch(&w, e->url, 60000);
    tm_etcd_reg *r = start_reg(&reg, e->url, KEY, 30000);
    WAIT(list_is(&w, "pool/g1=a0 ") && tm_etcd_reg_active(r), 5000);
    int empty_before = get_int(&w, &w.empty_lists);
    etcd_kill(e);
    WAIT(get_int(&w, &w.downs) == 1, 5000);
    assert_true(list_is(&w, "pool/g1=a0 "));
    assert_true(tm_etcd_reg_active(r)); /* the lease has not run out */
    etcd_start(e);
    WAIT(get_int(&w, &w.ups) == 2, 12000);
    assert_true(list_is(&w, "pool/g1=a0 "));
    assert_true(tm_etcd_watch_relists(watch) >= 1);
    assert_int_equal(get_int(&reg, &reg.values), 1);
    assert_int_equal(get_int(&w, &w.empty_lists), empty_before);
    tm_etcd_reg_destroy(r, 2000);
    WAIT(list_is(&w, ""), 2000);
    tm_etcd_watch_destroy(watch);
}

/* Everything is forgotten: the watcher believes the empty list because etcd says so, registrations come back. */
static void test_emptied(void **state)
{
    etcd_proc *e = *state;
    witness w, reg;
    witness_init(&w);
    witness_init(&reg);
    tm_etcd_watch *watch = start_watch(&w, e->url, 60000);
    tm_etcd_reg *r = start_reg(&reg, e->url, KEY, 3000);
    assert_int_equal(tm_etcd_put(e->url, PREFIX "lost", "1", NULL), TM_OK);
    WAIT(list_is(&w, "lost=1 pool/g1=a0 "), 5000);
    etcd_kill(e);
    etcd_empty(e);
    WAIT(get_int(&w, &w.downs) == 1, 5000);
    tm_sleep_ms(300);
    assert_true(list_is(&w, "lost=1 pool/g1=a0 "));
    etcd_start(e);
    WAIT(list_is(&w, "pool/g1=a1 "), 15000);
    WAIT(tm_etcd_reg_active(r), 1000);
    assert_true(key_is(e, KEY, "a1"));
    tm_etcd_reg_destroy(r, 2000);
    tm_etcd_watch_destroy(watch);
}

static void test_unreachable_at_start(void **state)
{
    etcd_proc *e = *state;
    witness w, reg;
    witness_init(&w);
    witness_init(&reg);
    etcd_kill(e);
    tm_etcd_watch *watch = start_watch(&w, e->url, 60000);
    tm_etcd_reg *r = start_reg(&reg, e->url, KEY, 3000);
    WAIT(get_int(&w, &w.downs) == 1 && get_int(&reg, &reg.downs) == 1, 3000);
    tm_sleep_ms(500);
    assert_int_equal(get_int(&w, &w.lists), 0);
    assert_false(tm_etcd_reg_active(r));
    etcd_start(e);
    WAIT(list_is(&w, "pool/g1=a0 "), 12000);
    WAIT(tm_etcd_reg_active(r),
         2000); /* the watch may hear of the key before the registrar has its answer */
    assert_int_equal(get_int(&w, &w.downs), 1);
    tm_etcd_reg_destroy(r, 2000);
    tm_etcd_watch_destroy(watch);
    /* Without etcd nothing hangs either. */
    etcd_kill(e);
    watch = start_watch(&w, e->url, 60000);
    r = start_reg(&reg, e->url, KEY, 3000);
    tm_sleep_ms(50);
    int64_t start = tm_clock_ms();
    tm_etcd_reg_destroy(r, 2000);
    tm_etcd_watch_destroy(watch);
    assert_true(tm_clock_ms() - start < 10000);
    etcd_start(e);
}

static void test_bad_options(void **state)
{
    tm_etcd_reg *r = NULL;
    tm_etcd_watch *w = NULL;
    tm_err err = TM_ERR_INIT;
    (void)state;
    tm_etcd_reg_opts ro = {.endpoints = "", .key = KEY, .ttl_ms = 5000, .value = on_value};
    assert_int_equal(tm_etcd_reg_create(&r, &ro, &err), TM_STATUS_CONFIG);
    ro.endpoints = "http://127.0.0.1:1";
    ro.ttl_ms = 10;
    assert_int_equal(tm_etcd_reg_create(&r, &ro, &err), TM_STATUS_INVALID);
    tm_etcd_watch_opts wo = {.endpoints = "http://127.0.0.1:1", .prefix = "", .on_list = on_list};
    assert_int_equal(tm_etcd_watch_create(&w, &wo, &err), TM_STATUS_INVALID);
    assert_null(r);
    assert_null(w);
}

static int set_up(void **state)
{
    static etcd_proc e;
    etcd_prepare(&e);
    etcd_start(&e);
    *state = &e;
    return 0;
}

static int tear_down(void **state)
{
    etcd_remove(*state);
    return 0;
}

int main(void)
{
    tm_log_init("etcd_test", TM_LOG_ERROR, TM_LOG_TEXT);
    if (!etcd_available()) {
        printf("skipped: /usr/bin/etcd (package etcd-server) is not installed\n");
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_shot),
        cmocka_unit_test(test_bad_options),
        cmocka_unit_test(test_register_update_destroy),
        cmocka_unit_test(test_lease_lost),
        cmocka_unit_test(test_key_deleted_by_hand),
        cmocka_unit_test(test_key_of_another),
        cmocka_unit_test(test_watch_follows),
        cmocka_unit_test(test_watch_pages_and_reconciles),
        cmocka_unit_test(test_compaction),
        cmocka_unit_test(test_cut_off),
        cmocka_unit_test(test_stopped_process),
        cmocka_unit_test(test_killed_and_restarted),
        cmocka_unit_test(test_emptied),
        cmocka_unit_test(test_unreachable_at_start),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
