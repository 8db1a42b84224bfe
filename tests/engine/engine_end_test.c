/* How an engine's requests and steps end early: stop, close, slow readers, broken logits, a lost group, the watchdog. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <pthread.h>
#include <string.h>
#include <sys/resource.h>

#include <cmocka.h>

#include "common/clock.h"
#include "engine/events.h"
#include "engine/watchdog.h"
#include "tests/engine/drive.h"
#include "tests/engine/engine_rig.h"
#include "tests/engine/fake.h"
#include "tests/engine/rng.h"

enum { CROWD = 24 };
static answer alone[CROWD], crowded[CROWD];
static ask asks[CROWD];

/* ---- stopping */

typedef struct reader {
    tm_engine *e;
    answer **answers;
    int n;
    tm_status end;
} reader;

static void *read_all(void *arg)
{
    reader *r = arg;
    tm_step_events *ev;
    while ((r->end = tm_engine_wait(r->e, -1, &ev)) == TM_OK) {
        drive_apply(ev, r->answers, r->n, FAKE_VOCAB);
        tm_engine_events_free(ev);
    }
    return NULL;
}

static void stop_with_running(bool pick)
{
    tm_engine_opts o = small_opts();
    fake_opts f = roomy;
    f.pick = pick;
    rig g = rig_open(&f, &o);
    answer *all[CROWD];
    pthread_t thread;
    fake_hold(true);
    for (int i = 0; i < CROWD; i++) {
        make_ask(&asks[i], (uint64_t)i + 1, 20, i, 300);
        all[i] = &crowded[i];
        assert_int_equal(drive_submit(g.e, &asks[i].r, all[i], NULL), TM_OK);
    }
    fake_wait_held();
    fake_let_one_step();
    reader r = {g.e, all, CROWD, TM_OK};
    assert_int_equal(pthread_create(&thread, NULL, read_all, &r), 0);
    fake_hold(false);
    tm_engine_stop(g.e);
    assert_int_equal(tm_engine_submit(g.e, &asks[0].r, NULL), TM_STATUS_CLOSED);
    pthread_join(thread, NULL);
    assert_int_equal(r.end, TM_STATUS_CLOSED);
    for (int i = 0; i < CROWD; i++) {
        assert_true(crowded[i].finished);
        assert_int_equal(crowded[i].finish, TM_FINISH_CANCELLED);
    }
    rig_close(&g);
}

static void test_stop_with_running(void **state)
{
    (void)state;
    stop_with_running(false);
    stop_with_running(true);
}

/* close alone, with a thread inside wait and with nobody who ever reads. */
static void test_close_without_stop(void **state)
{
    (void)state;
    tm_engine_opts o = small_opts();
    rig g = rig_open(&roomy, &o);
    for (int i = 0; i < 4; i++) {
        make_ask(&asks[i], (uint64_t)i + 1, 20, i, 300);
        assert_int_equal(tm_engine_submit(g.e, &asks[i].r, NULL), TM_OK);
    }
    rig_close(&g);
    g = rig_open(&roomy, &o);
    pthread_t thread;
    reader r = {g.e, NULL, 0, TM_OK};
    assert_int_equal(pthread_create(&thread, NULL, read_all, &r), 0);
    tm_sleep_ms(20);
    rig_close(&g);
    pthread_join(thread, NULL);
    assert_int_equal(r.end, TM_STATUS_CLOSED);
}

/* The engine pauses when nobody reads, and nothing is lost. */
static void slow_reader(bool pick)
{
    tm_engine_opts o = small_opts();
    o.watchdog_ms = 400; /* a step that is not waited for is not late */
    fake_opts f = roomy;
    f.pick = pick;
    rig g = rig_open(&f, &o);
    ask a;
    make_ask(&a, 1, 5, 0, 300);
    answer *one = &alone[0];
    assert_int_equal(drive_submit(g.e, &a.r, one, NULL), TM_OK);
    int steps = -1;
    for (int now; (now = fake_steps(0)) != steps || now == 0;) {
        steps = now;
        tm_sleep_ms(50);
    }
    assert_int_equal(steps, TM_OUTBOX_BATCHES_MAX + 1 + pick);
    tm_sleep_ms(700);
    assert_false(fake_comm_aborted());
    drive_all(g.e, &one, 1);
    assert_int_equal(one->n, 300);
    rig_close(&g);
}

static void test_slow_reader(void **state)
{
    (void)state;
    slow_reader(false);
    slow_reader(true);
}

static void test_wake_and_timeout(void **state)
{
    (void)state;
    tm_engine_opts o = small_opts();
    rig g = rig_open(&roomy, &o);
    tm_step_events *ev;
    assert_int_equal(tm_engine_wait(g.e, 0, &ev), TM_STATUS_TIMEOUT);
    assert_int_equal(tm_engine_wait(g.e, 10, &ev), TM_STATUS_TIMEOUT);
    int64_t begin = tm_clock_ms();
    tm_engine_wake(g.e);
    assert_int_equal(tm_engine_wait(g.e, 30000, &ev), TM_STATUS_TIMEOUT);
    assert_true(tm_clock_ms() - begin < 10000);
    rig_close(&g);
}

static void test_idle_sleeps(void **state)
{
    (void)state;
    tm_engine_opts o = small_opts();
    rig g = rig_open(&roomy, &o);
    ask a;
    make_ask(&a, 1, 5, 0, 30);
    run_alone(&g, &a.r, &alone[0]);
    tm_sleep_ms(20);
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    tm_sleep_ms(300);
    getrusage(RUSAGE_SELF, &after);
    assert_true(after.ru_nvcsw - before.ru_nvcsw < 5); /* this thread's sleep and little else */
    tm_engine_stats st;
    tm_engine_stats_get(g.e, &st);
    assert_int_equal(st.step_age_ms, 0);
    rig_close(&g);
}

/* ---- failures */

static void broken_logits(bool pick)
{
    tm_engine_opts o = small_opts();
    fake_opts f = roomy;
    f.pick = pick;
    rig g = rig_open(&f, &o);
    static ask a[2];
    answer *all[2] = {&crowded[0], &crowded[1]};
    make_ask(&a[0], 1, 5, 0, 20);
    make_ask(&a[1], 2, 5, 0, 20);
    a[1].prompt[4] = FAKE_POISON;
    run_alone(&g, &a[0].r, &alone[0]);
    for (int i = 0; i < 2; i++)
        assert_int_equal(drive_submit(g.e, &a[i].r, all[i], NULL), TM_OK);
    drive_all(g.e, all, 2);
    expect_same(&crowded[0], &alone[0]);
    assert_int_equal(crowded[1].finish, TM_FINISH_ERROR);
    assert_int_equal(crowded[1].status, TM_STATUS_INTERNAL);
    assert_int_equal(crowded[1].n, 0);
    rig_close(&g);
}

static void test_broken_logits_end_one_request(void **state)
{
    (void)state;
    broken_logits(false);
    broken_logits(true);
}

static void lost_group(bool pick, int at_step, int at_end)
{
    tm_engine_opts o = small_opts();
    o.max_batch_size = 2;
    fake_opts f = roomy;
    f.pick = pick;
    f.fail_at_step = at_step;
    f.fail_at_end = at_end;
    rig g = rig_open(&f, &o);
    answer *all[5];
    fake_hold(true);
    for (int i = 0; i < 5; i++) {
        make_ask(&asks[i], (uint64_t)i + 1, 20, i, 300);
        all[i] = &crowded[i];
        assert_int_equal(drive_submit(g.e, &asks[i].r, all[i], NULL), TM_OK);
    }
    fake_hold(false);
    drive_all(g.e, all, 5);
    for (int i = 0; i < 5; i++) {
        assert_int_equal(crowded[i].finish, TM_FINISH_ERROR);
        assert_int_equal(crowded[i].status, TM_STATUS_UNAVAILABLE);
    }
    tm_step_events *ev;
    assert_int_equal(tm_engine_wait(g.e, -1, &ev), TM_STATUS_UNAVAILABLE);
    assert_int_equal(tm_engine_submit(g.e, &asks[0].r, NULL), TM_STATUS_UNAVAILABLE);
    rig_close(&g);
}

static void test_lost_group(void **state)
{
    (void)state;
    lost_group(false, 4, 0);
    lost_group(true, 4, 0); /* at its begin, with one in flight */
    lost_group(true, 0, 4); /* at its end, with one behind it */
}

static void test_watchdog_limit(void **state)
{
    (void)state;
    tm_watchdog_step h[64];
    for (int i = 0; i < 64; i++)
        h[i] = (tm_watchdog_step){i % 4 ? 10 : 1000, i % 4 ? 1 : 500};
    assert_int_equal(tm_watchdog_limit_ms(h, 7, 1), 10 * 60 * 1000);
    assert_int_equal(tm_watchdog_limit_ms(h, 64, 1), 5000);
    assert_int_equal(tm_watchdog_limit_ms(h, 64, 500), 20 * 10 * 500);
    for (int i = 0; i < 64; i++)
        h[i].ms = 700;
    assert_int_equal(tm_watchdog_limit_ms(h, 64, 1), 14000);
}

static void watchdog_ends_group(bool pick)
{
    tm_engine_opts o = small_opts();
    o.watchdog_ms = 200;
    fake_opts f = roomy;
    f.pick = pick;
    rig g = rig_open(&f, &o);
    ask a;
    make_ask(&a, 1, 5, 0, 30);
    run_alone(&g, &a.r, &alone[0]);
    tm_sleep_ms(400); /* idle is not a stall */
    assert_false(fake_comm_aborted());
    fake_hold(true);
    a.r.id = 2;
    assert_int_equal(tm_engine_submit(g.e, &a.r, NULL), TM_OK);
    fake_wait_held();
    for (int i = 0; i < 200 && !fake_comm_aborted(); i++)
        tm_sleep_ms(50);
    assert_true(fake_comm_aborted());
    rig_close(&g);
}

static void test_watchdog_ends_group(void **state)
{
    (void)state;
    watchdog_ends_group(false);
    watchdog_ends_group(true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stop_with_running),
        cmocka_unit_test(test_close_without_stop),
        cmocka_unit_test(test_slow_reader),
        cmocka_unit_test(test_wake_and_timeout),
        cmocka_unit_test(test_idle_sleeps),
        cmocka_unit_test(test_broken_logits_end_one_request),
        cmocka_unit_test(test_lost_group),
        cmocka_unit_test(test_watchdog_limit),
        cmocka_unit_test(test_watchdog_ends_group),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
