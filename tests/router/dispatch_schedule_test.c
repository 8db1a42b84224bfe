/* Random schedules: clusters of two to five groups in which things go wrong all the time, under a virtual
 * clock. Whatever happens, every generation ends exactly once; one that ends well has exactly the tokens of
 * an undisturbed run; an error is only ever one that the schedule explains.
 *
 * A failing seed is printed; TM_SEED=n runs that one alone, TM_SCHEDULES=n changes how many. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/check.h"
#include "common/log.h"
#include "tests/router/dispatch_sim.h"

#define OWNERS        40
#define RUN_MS        20000
#define SCHEDULES     1000
#define QUEUE_WAIT_MS 8000

static struct {
    int ended, moved, cancelled, poison, no_worker, busy, timeout, refused, internal;
} total;

static bool flip(sim *s, int one_in)
{
    return sim_random(s) % (uint64_t)one_in == 0;
}

static sim_group *some_group(sim *s)
{
    return &s->groups[sim_random(s) % (uint64_t)s->group_count];
}

static sim_owner owners[OWNERS];

static void count_losses(sim *s, const sim_group *g)
{
    (void)s;
    for (int i = 0; i < OWNERS; i++)
        if (owners[i].gen != NULL && strcmp(tm_gen_group(owners[i].gen), g->name) == 0)
            owners[i].losses++;
}

static void cut_link(sim *s)
{
    sim_group *g = some_group(s);
    for (int i = s->link_count - 1; i >= 0; i--) {
        struct sim_link *l = &s->links[i];
        if (l->open && l->up && &s->groups[l->group] == g) {
            l->up = false;
            tm_pool_on_closed(s->pool, l->id, "cut");
            return;
        }
    }
}

static void disturb(sim *s)
{
    sim_group *g = some_group(s);
    switch (sim_random(s) % 12) {
    case 0:
    case 1:
        if (g->alive)
            sim_kill(s, g);
        break;
    case 2:
    case 3:
    case 4:
        if (!g->alive || g->draining || g->frozen)
            sim_restart(s, g);
        break;
    case 5:
        if (g->alive)
            g->frozen = true;
        break;
    case 6:
        g->frozen = false;
        break;
    case 7:
        if (g->alive && !g->frozen)
            sim_drain(s, g);
        break;
    case 8:
        g->bad_position = true;
        break;
    case 9:
        g->reject_busy = !g->reject_busy && flip(s, 2);
        break;
    case 10:
        cut_link(s);
        break;
    default:
        sim_list_only(s, (unsigned)sim_random(s)); /* whatever etcd says, it is one list in many */
        sim_run(s, (int64_t)(sim_random(s) % 200));
        sim_list(s);
        break;
    }
}

static void heal(sim *s)
{
    for (int i = 0; i < s->group_count; i++) {
        sim_group *g = &s->groups[i];
        g->reject_busy = g->bad_position = false;
        if (!g->alive || g->draining || g->frozen)
            sim_restart(s, g);
    }
    sim_list(s);
}

static void start_some(sim *s, sim_owner *o, int i)
{
    o[i] = (sim_owner){.key = (uint32_t)(1 + sim_random(s) % 1000000),
                       .max_tokens = 1 + (int)(sim_random(s) % 200)};
    for (int k = 0; k < i; k++)
        if (o[k].key == o[i].key)
            o[i].key += 1000000; /* keys name sequences in this test */
    if (flip(s, 5))
        o[i].cancel_at = 1 + (int)(sim_random(s) % 60);
    o[i].prompt_logprobs = flip(s, 4);
    o[i].priority = (int32_t)(sim_random(s) % 3);
    if (flip(s, 10))
        o[i].deadline_ms = 500 + (int64_t)(sim_random(s) % 3000);
    if (tm_pool_served_find(s->pool, NULL) == NULL)
        return; /* before the first Hello nobody can ask */
    tm_status st = sim_start(s, &o[i]);
    if (st != TM_OK) {
        assert_true(st == TM_STATUS_BUSY || st == TM_STATUS_UNAVAILABLE);
        assert_true(o[i].retry_after_ms > 0);
        o[i].gen = NULL;
        total.refused++;
    }
}

static void check_owner(const sim_owner *o)
{
    int ends = o->ended + o->failed + o->cancelled;
    if (o->s == NULL || ends == 0)
        return; /* was refused at the start */
    assert_int_equal(ends, 1);
    if (o->ended) {
        total.ended++;
        total.moved += o->losses > 0;
        sim_check_done(o);
    } else if (o->cancelled) {
        total.cancelled++;
    } else if (o->error == TM_GEN_ERR_POISON) {
        total.poison++;
        assert_true(o->losses >= 2);
    } else if (o->error == TM_GEN_ERR_TIMEOUT) {
        total.timeout++;
        assert_true(o->deadline_ms > 0);
        assert_true(o->ended_ns - o->started_ns >= o->deadline_ms * 1000000);
    } else if (o->error == TM_GEN_ERR_NO_WORKER || o->error == TM_GEN_ERR_BUSY) {
        total.no_worker += o->error == TM_GEN_ERR_NO_WORKER;
        total.busy += o->error == TM_GEN_ERR_BUSY;
    } else {
        total.internal++;
        assert_int_equal(o->error, TM_GEN_ERR_INTERNAL); /* too many bad streams */
    }
}

static void run_schedule(uint64_t seed)
{
    static sim s;
    sim_owner *o = owners;
    sim_init(&s, seed);
    memset(owners, 0, sizeof(owners));
    s.on_close = count_losses;
    static const char *const NAMES[] = {"a", "b", "c", "d", "e"};
    int groups = 2 + (int)(sim_random(&s) % 4);
    for (int i = 0; i < groups; i++) {
        sim_group *g = sim_add(&s, NAMES[i]);
        g->max_batch = 1 + (int)(sim_random(&s) % 12);
        g->queue_max = (int)(sim_random(&s) % 8);
        g->step_ns = (5 + (int64_t)(sim_random(&s) % 60)) * 1000000;
        g->doubling = flip(&s, 4);
    }
    tm_pool_opts po = sim_pool_opts(&s);
    po.policy = (int)(sim_random(&s) % 4);
    po.queue_max = 5 + (int)(sim_random(&s) % 40);
    po.queue_wait_ms = QUEUE_WAIT_MS;
    assert_int_equal(tm_pool_create(&s.pool, &po, NULL), TM_OK);
    sim_list(&s);
    int calm = 1 + (int)(sim_random(&s) % 60); /* tens of ms between disturbances, about */
    int started = 0;
    int64_t until = s.now_ns + RUN_MS / 4 * INT64_C(1000000);
    while (s.now_ns < until) {
        sim_run(&s, 10);
        if (started < OWNERS && flip(&s, 8)) {
            start_some(&s, o, started);
            started++;
        }
        if (flip(&s, 4 * calm))
            disturb(&s);
        if (started > 0 && flip(&s, 100)) {
            sim_owner *v = &o[sim_random(&s) % (uint64_t)started];
            if (v->gen != NULL && !v->ended && !v->failed && !v->cancelled) {
                v->cancelled = true;
                tm_gen_cancel(v->gen);
                v->gen = NULL;
            }
        }
    }
    heal(&s);
    sim_run_until_idle(&s, 120000);
    for (int i = 0; i < started; i++)
        check_owner(&o[i]);
    sim_deinit(&s);
}

static uint64_t seed_now;

static void test_schedules(void **state)
{
    (void)state;
    const char *one = getenv("TM_SEED"), *many = getenv("TM_SCHEDULES");
    uint64_t count = many != NULL ? strtoull(many, NULL, 10) : SCHEDULES;
    uint64_t first = one != NULL ? strtoull(one, NULL, 10) : 1;
    if (one != NULL)
        count = 1;
    for (uint64_t i = 0; i < count; i++) {
        seed_now = first + i;
        run_schedule(seed_now);
    }
    print_message("%d ended (%d after losing a group), %d cancelled, refused %d; poison %d, no "
                  "worker %d, busy %d, timeout %d, "
                  "internal %d\n",
                  total.ended, total.moved, total.cancelled, total.refused, total.poison,
                  total.no_worker, total.busy, total.timeout, total.internal);
    if (one == NULL) {
        assert_true(total.ended > (int)count * 5);
        assert_true(total.moved > (int)count);
        assert_true(total.internal < total.ended / 100 + 1);
    }
}

static int print_seed(void **state)
{
    (void)state;
    print_message("last seed: %llu (TM_SEED runs it alone)\n", (unsigned long long)seed_now);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test_teardown(test_schedules, print_seed)};
    /* Poison and bad streams are the point here: their lines would hide the result. */
    tm_log_init("dispatch_schedule_test",
                getenv("TM_SEED") != NULL ? TM_LOG_TRACE : (tm_log_level)(TM_LOG_ERROR + 1),
                TM_LOG_TEXT);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
