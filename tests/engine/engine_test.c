/* The engine around a fake model: event order, answers that nothing around them changes, refusals, queue bound, cancel,
 * pool sizes, many threads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <math.h>
#include <pthread.h>
#include <string.h>

#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"
#include "tests/engine/drive.h"
#include "tests/engine/engine_rig.h"
#include "tests/engine/fake.h"
#include "tests/engine/rng.h"

enum { CROWD = 24 };
static answer alone[CROWD], crowded[CROWD];
static ask asks[CROWD];

static void ask_alone(uint64_t seed)
{
    rng r = {seed};
    tm_engine_opts o = small_opts();
    o.enable_prefix_caching = false;
    rig g = rig_open(&roomy, &o);
    for (int i = 0; i < CROWD; i++) {
        random_ask(&asks[i], &r, (uint64_t)i + 1);
        run_alone(&g, &asks[i].r, &alone[i]);
    }
    rig_close(&g);
}

/* One that ran ahead for nothing may still be in flight when everybody has been told. */
static void expect_all_steps_ended(rig *g)
{
    tm_engine_stats st;
    for (int i = 0; i < 1000; i++) {
        tm_engine_stats_get(g->e, &st);
        if (st.steps == (uint64_t)fake_steps(0) && st.step_age_ms == 0)
            return;
        tm_sleep_ms(5);
    }
    fail_msg("%d steps were begun, %d ended", fake_steps(0), (int)st.steps);
}

/* Everything at once in a pool that holds a few of them: the same answers to the last bit. */
static void test_crowd(void **state)
{
    (void)state;
    uint64_t seed = rng_seed("crowd", 1), preemptions = 0, cached = 0;
    for (uint64_t round = 0; round < 12; round++) {
        ask_alone(seed * 100 + round);
        /* Every second time greedy rows are chosen by the device where nothing else is asked for. */
        fake_opts f = {.max_positions = 512, .blocks = 18 + 2 * (int)round, .pick = round % 2 == 1};
        tm_engine_opts o = small_opts();
        rig g = rig_open(&f, &o);
        answer *all[CROWD];
        for (int i = 0; i < CROWD; i++) {
            all[i] = &crowded[i];
            assert_int_equal(drive_submit(g.e, &asks[i].r, &crowded[i], NULL), TM_OK);
        }
        drive_all(g.e, all, CROWD);
        for (int i = 0; i < CROWD; i++)
            expect_same(&crowded[i], &alone[i]);
        tm_engine_stats st;
        tm_engine_stats_get(g.e, &st);
        assert_int_equal(st.running + st.waiting, 0);
        assert_int_equal(st.blocks_used, 0);
        assert_int_equal(st.finished, CROWD);
        expect_all_steps_ended(&g);
        preemptions += st.preemptions;
        cached += st.cached_tokens;
        rig_close(&g);
    }
    assert_true(preemptions > 0 && cached > 0);
}

static void expect_beginning(const answer *got, const answer *want)
{
    assert_true(got->n <= want->n);
    assert_memory_equal(got->tokens, want->tokens, (size_t)got->n * sizeof(int32_t));
}

/* Answers of an engine in which the device chooses and steps run ahead, against those of one in which every step is
 * waited for: a pool of few blocks, prefixes from the cache, and some requests cancelled on the way. */
static void ahead_round(rng *r, int blocks, uint64_t *preemptions, uint64_t *cached, int *ahead)
{
    tm_engine_opts o = small_opts();
    tm_engine_stats st;
    answer *all[CROWD];
    rig g = rig_open(&roomy, &o);
    for (int i = 0; i < CROWD; i++) {
        random_greedy_ask(&asks[i], r, (uint64_t)i + 1);
        run_alone(&g, &asks[i].r, &alone[i]);
    }
    assert_int_equal(fake_ahead(0), 0);
    rig_close(&g);
    fake_opts f = {.max_positions = 512, .blocks = blocks, .pick = true};
    g = rig_open(&f, &o);
    for (int i = 0; i < CROWD; i++) {
        all[i] = &crowded[i];
        assert_int_equal(drive_submit(g.e, &asks[i].r, &crowded[i], NULL), TM_OK);
        if (i % 6 == 5) /* soon, or in the middle of things */
            tm_engine_cancel(g.e, (uint64_t)rng_between(r, 1, i + 1));
        if (i % 8 == 7)
            tm_sleep_ms(rng_below(r, 3));
    }
    drive_all(g.e, all, CROWD);
    for (int i = 0; i < CROWD; i++) {
        expect_beginning(&crowded[i], &alone[i]);
        if (crowded[i].finish != TM_FINISH_CANCELLED)
            expect_same(&crowded[i], &alone[i]);
    }
    expect_all_steps_ended(&g);
    tm_engine_stats_get(g.e, &st);
    assert_int_equal(st.running + st.waiting + st.blocks_used, 0);
    assert_int_equal(st.finished, CROWD);
    *preemptions += st.preemptions;
    *cached += st.cached_tokens;
    *ahead += fake_ahead(0);
    rig_close(&g);
}

static void test_ahead(void **state)
{
    (void)state;
    rng r = {rng_seed("ahead", 11)};
    uint64_t preemptions = 0, cached = 0;
    int ahead = 0;
    for (int round = 0; round < 12; round++)
        ahead_round(&r, 14 + 2 * round, &preemptions, &cached, &ahead);
    assert_true(preemptions > 0 && cached > 0 && ahead > 500);
}

/* Whatever was generated before comes along: the rest is the same at every split. */
static void test_continuation(void **state)
{
    (void)state;
    rng r = {rng_seed("continuation", 5)};
    tm_engine_opts o = small_opts();
    rig g = rig_open(&roomy, &o);
    for (int round = 0; round < 12; round++) {
        ask a;
        random_ask(&a, &r, 1);
        a.r.sampling.prompt_logprobs = -1;
        a.r.logits_last = 0;
        run_alone(&g, &a.r, &alone[0]);
        a.r.generated = alone[0].tokens;
        for (int split = 1; split <= alone[0].n; split++) {
            answer *b = &crowded[0];
            a.r.id++;
            a.r.generated_len = (size_t)split;
            run_alone(&g, &a.r, b);
            assert_int_equal(b->n, alone[0].n - split);
            assert_int_equal(b->finish, alone[0].finish);
            assert_memory_equal(b->tokens, alone[0].tokens + split, (size_t)b->n * sizeof(int32_t));
        }
    }
    rig_close(&g);
}

static void test_refusals(void **state)
{
    (void)state;
    tm_engine_opts o = small_opts();
    fake_opts f = {.max_positions = 100, .blocks = 1000};
    rig g = rig_open(&f, &o);
    tm_err err = TM_ERR_INIT;
    ask a;
    make_ask(&a, 1, 100, 0, 5);
    assert_int_equal(tm_engine_submit(g.e, &a.r, &err), TM_STATUS_INVALID);
    assert_non_null(strstr(err.msg, "100 tokens"));
    assert_non_null(strstr(err.msg, "at most 99"));
    make_ask(&a, 1, 10, 0, 5);
    a.prompt[3] = FAKE_VOCAB;
    assert_int_equal(tm_engine_submit(g.e, &a.r, &err), TM_STATUS_INVALID);
    a.prompt[3] = -1;
    assert_int_equal(tm_engine_submit(g.e, &a.r, &err), TM_STATUS_INVALID);
    make_ask(&a, 1, 10, 0, 5);
    a.r.sampling.top_p = 1.5f;
    assert_int_equal(tm_engine_submit(g.e, &a.r, &err), TM_STATUS_INVALID);
    make_ask(&a, 1, 10, 0, 5);
    a.r.prompt_len = 0;
    assert_int_equal(tm_engine_submit(g.e, &a.r, &err), TM_STATUS_INVALID);
    a.r.prompt_len = SIZE_MAX / 2;
    assert_int_equal(tm_engine_submit(g.e, &a.r, &err), TM_STATUS_INVALID);
    tm_engine_cancel(g.e, 12345); /* unknown: nothing happens */
    make_ask(&a, 1, 99, 0, 50);   /* ends at the context limit */
    run_alone(&g, &a.r, &alone[0]);
    assert_int_equal(alone[0].n, 1);
    assert_int_equal(alone[0].finish, TM_FINISH_LENGTH);
    rig_close(&g);
}

static void test_queue_bound(void **state)
{
    (void)state;
    tm_engine_opts o = small_opts();
    o.max_batch_size = 1;
    o.queue_max = 3;
    rig g = rig_open(&roomy, &o);
    static ask a[6];
    answer *all[6];
    fake_hold(true);
    for (int i = 0; i < 6; i++) {
        make_ask(&a[i], (uint64_t)i + 1, 5, i, 3);
        all[i] = &crowded[i];
    }
    assert_int_equal(drive_submit(g.e, &a[0].r, all[0], NULL), TM_OK);
    fake_wait_held(); /* the first one runs */
    assert_int_equal(tm_engine_submit(g.e, &a[0].r, NULL), TM_STATUS_INVALID); /* id in use */
    for (int i = 1; i < 4; i++)
        assert_int_equal(drive_submit(g.e, &a[i].r, all[i], NULL), TM_OK);
    assert_int_equal(tm_engine_submit(g.e, &a[4].r, NULL), TM_STATUS_BUSY);
    fake_let_one_step(); /* they are in the scheduler's queue now, and still count */
    assert_int_equal(tm_engine_submit(g.e, &a[4].r, NULL), TM_STATUS_BUSY);
    tm_engine_stats st;
    tm_engine_stats_get(g.e, &st);
    assert_int_equal(st.waiting, 3);
    assert_int_equal(st.running, 1);
    fake_hold(false);
    drive_all(g.e, all, 4);
    assert_int_equal(drive_submit(g.e, &a[4].r, all[4], NULL), TM_OK);
    drive_all(g.e, all + 4, 1);
    rig_close(&g);
}

/* Ids come back into use, and requests that end at once do not use up the queue. */
static void test_complete_at_arrival(void **state)
{
    (void)state;
    tm_engine_opts o = small_opts();
    o.queue_max = 4;
    rig g = rig_open(&roomy, &o);
    ask a;
    int32_t given[3] = {1, 2, FAKE_STOP};
    for (int i = 0; i < 40; i++) {
        make_ask(&a, 1, 5, 0, 3);
        a.r.generated = given;
        a.r.generated_len = 3;
        a.r.sampling.ignore_eos = i % 2;
        run_alone(&g, &a.r, &alone[0]);
        assert_int_equal(alone[0].n, 0);
        assert_int_equal(alone[0].finish, i % 2 ? TM_FINISH_LENGTH : TM_FINISH_STOP);
    }
    assert_int_equal(fake_steps(0), 0);
    rig_close(&g);
}

static void cancel_with(bool pick)
{
    tm_engine_opts o = small_opts();
    o.max_batch_size = 1;
    fake_opts f = roomy;
    f.pick = pick;
    rig g = rig_open(&f, &o);
    static ask a[2];
    answer *all[2] = {&crowded[0], &crowded[1]};
    fake_hold(true);
    make_ask(&a[0], 1, 5, 0, 400);
    make_ask(&a[1], 2, 5, 1, 400);
    assert_int_equal(drive_submit(g.e, &a[0].r, all[0], NULL), TM_OK);
    fake_wait_held();
    assert_int_equal(drive_submit(g.e, &a[1].r, all[1], NULL), TM_OK);
    fake_let_one_step();
    fake_let_one_step();
    tm_engine_cancel(g.e, 1); /* running, in the middle of its third step */
    tm_engine_cancel(g.e, 1);
    tm_engine_cancel(g.e, 2); /* waiting */
    fake_hold(false);
    drive_all(g.e, all, 2);
    /* Not one step more; the third step of those that run ahead begins when the first one's token is out. */
    assert_int_equal(crowded[0].n, pick ? 2 : 3);
    assert_int_equal(crowded[0].finish, TM_FINISH_CANCELLED);
    assert_int_equal(crowded[1].n, 0);
    assert_int_equal(crowded[1].finish, TM_FINISH_CANCELLED);
    tm_engine_stats st;
    tm_engine_stats_get(g.e, &st);
    assert_int_equal(st.running + st.waiting + st.blocks_used, 0);
    rig_close(&g);
}

static void test_cancel(void **state)
{
    (void)state;
    cancel_with(false);
    cancel_with(true);
}

/* ---- pool sizes */

static void test_pool_options(void **state)
{
    (void)state;
    const struct {
        double entry;
        int64_t cap;
        int blocks; /* 0: refused */
    } cases[] = {{0.5, 0, 500},   {0.5, 100000, 100}, {200, 100000, 200},
                 {1000, 0, 1000}, {1001, 0, 0},       {0.0001, 0, 0},
                 {1.0, 0, 1000},  {0.0, 0, 0},        {(double)NAN, 0, 0}};
    for (size_t i = 0; i < TM_ARRAY_LEN(cases); i++) {
        tm_engine_opts o = small_opts();
        tm_comm *comm;
        tm_engine *e;
        o.cache_max_entry_count = cases[i].entry;
        o.cache_bytes_max = cases[i].cap;
        fake_reset(&roomy);
        fake_comm_group(1, &comm);
        tm_status st = tm_engine_open(&e, &o, comm, NULL);
        assert_int_equal(st, cases[i].blocks ? TM_OK : TM_STATUS_CONFIG);
        if (st == TM_OK) {
            assert_int_equal(tm_engine_info_get(e)->blocks_total, cases[i].blocks);
            tm_engine_close(e);
        }
        tm_comm_destroy(comm);
    }
}

/* ---- many threads */

typedef struct submitter {
    tm_engine *e;
    ask *asks;
    int n;
    int busy;
} submitter;

static void *submit_some(void *arg)
{
    submitter *s = arg;
    for (int i = 0; i < s->n; i++) {
        tm_status st;
        while ((st = tm_engine_submit(s->e, &s->asks[i].r, NULL)) == TM_STATUS_BUSY) {
            s->busy++;
            tm_sleep_ms(1);
        }
        assert_int_equal(st, TM_OK);
        if (i % 3 == 0)
            tm_engine_cancel(s->e, s->asks[i].r.id);
        tm_engine_stats st2;
        tm_engine_stats_get(s->e, &st2);
    }
    return NULL;
}

static void test_threads(void **state)
{
    (void)state;
    enum { THREADS = 3, EACH = 60 };
    static ask many[THREADS][EACH];
    static answer answers[THREADS * EACH];
    static answer *all[THREADS * EACH];
    tm_engine_opts o = small_opts();
    o.queue_max = 4;
    rig g = rig_open(&roomy, &o);
    submitter s[THREADS];
    pthread_t threads[THREADS];
    for (int t = 0; t < THREADS; t++) {
        for (int i = 0; i < EACH; i++) {
            int k = t * EACH + i;
            make_ask(&many[t][i], (uint64_t)k + 1, 10 + i, t, 5);
            answers[k].id = (uint64_t)k + 1;
            answers[k].next_prompt_pos = 1;
            all[k] = &answers[k];
        }
        s[t] = (submitter){g.e, many[t], EACH, 0};
        assert_int_equal(pthread_create(&threads[t], NULL, submit_some, &s[t]), 0);
    }
    drive_all(g.e, all, THREADS * EACH);
    for (int t = 0; t < THREADS; t++)
        pthread_join(threads[t], NULL);
    for (int k = 0; k < THREADS * EACH; k++)
        assert_true(answers[k].finish == TM_FINISH_LENGTH ||
                    (k % EACH % 3 == 0 && answers[k].finish == TM_FINISH_CANCELLED));
    rig_close(&g);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_crowd),        cmocka_unit_test(test_ahead),
        cmocka_unit_test(test_continuation), cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_queue_bound),  cmocka_unit_test(test_complete_at_arrival),
        cmocka_unit_test(test_cancel),       cmocka_unit_test(test_pool_options),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
