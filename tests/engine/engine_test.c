/* The engine around a fake model: event order, answers that nothing around them changes, queue bound, cancel, stop,
 * slow readers, failures, followers, watchdog. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <math.h>
#include <pthread.h>
#include <string.h>
#include <sys/resource.h>

#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"
#include "engine/events.h"
#include "engine/watchdog.h"
#include "tests/engine/drive.h"
#include "tests/engine/fake.h"
#include "tests/engine/rng.h"

static const fake_opts roomy = {.max_positions = 512, .blocks = 1000};

typedef struct rig {
    tm_engine *e;
    tm_comm *comm;
} rig;

static tm_engine_opts small_opts(void)
{
    tm_engine_opts o = tm_engine_opts_default();
    o.model.block_tokens = 8;
    o.max_batch_size = 8;
    o.max_prefill_token_num = 32;
    o.cache_max_entry_count = 1.0;
    o.queue_max = 64;
    return o;
}

static rig rig_open(const fake_opts *f, const tm_engine_opts *o)
{
    rig r;
    tm_err err = TM_ERR_INIT;
    fake_reset(f);
    fake_comm_group(1, &r.comm);
    if (tm_engine_open(&r.e, o, r.comm, &err) != TM_OK)
        fail_msg("%s", err.msg);
    return r;
}

static void rig_close(rig *r)
{
    fake_hold(false);
    tm_engine_close(r->e);
    tm_comm_destroy(r->comm);
    assert_int_equal(fake_errors(), 0);
}

typedef struct ask {
    int32_t prompt[256];
    tm_request r;
} ask;

static void make_ask(ask *a, uint64_t id, int n, int first, int max_tokens)
{
    for (int i = 0; i < n; i++)
        a->prompt[i] = (first + i * 5) % (FAKE_VOCAB - 1);
    a->r = (tm_request){.id = id,
                        .prompt = a->prompt,
                        .prompt_len = (size_t)n,
                        .max_tokens = max_tokens,
                        .sampling = tm_sampling_default()};
    a->r.sampling.temperature = 0.0f;
    a->r.sampling.ignore_eos = true;
}

static void random_ask(ask *a, rng *r, uint64_t id)
{
    make_ask(a, id, rng_between(r, 1, 60), rng_below(r, 3), rng_between(r, 1, 50));
    tm_sampling *s = &a->r.sampling;
    s->ignore_eos = rng_below(r, 3) > 0;
    s->min_tokens = rng_below(r, 3) ? 0 : rng_between(r, 1, 20);
    s->seed = rng_u64(r);
    s->choice = (uint32_t)rng_below(r, 3);
    if (rng_below(r, 3))
        s->temperature = 1.0f;
    if (rng_below(r, 2))
        s->top_k = rng_between(r, 2, 30);
    if (rng_below(r, 2))
        s->top_p = 0.8f;
    if (rng_below(r, 2)) {
        s->repetition_penalty = 1.3f;
        s->presence_penalty = 0.5f;
        s->frequency_penalty = 0.2f;
    }
    if (rng_below(r, 2))
        s->logprobs = rng_below(r, 4);
    if (rng_below(r, 4) == 0)
        s->prompt_logprobs = rng_below(r, 3);
    if (rng_below(r, 4) == 0)
        a->r.logits_last = rng_between(r, 1, 12);
}

static void run_alone(rig *g, const tm_request *r, answer *a)
{
    tm_request copy = *r;
    tm_err err = TM_ERR_INIT;
    if (drive_submit(g->e, &copy, a, &err) != TM_OK)
        fail_msg("%s", err.msg);
    drive_all(g->e, &a, 1);
}

static void expect_same(const answer *got, const answer *want)
{
    assert_int_equal(got->n, want->n);
    assert_int_equal(got->finish, want->finish);
    assert_memory_equal(got->tokens, want->tokens, (size_t)want->n * sizeof(int32_t));
    assert_memory_equal(got->logprobs, want->logprobs, (size_t)want->n * sizeof(float));
    assert_int_equal(got->next_prompt_pos, want->next_prompt_pos);
    assert_memory_equal(got->prompt_logprobs, want->prompt_logprobs,
                        (size_t)want->next_prompt_pos * sizeof(float));
    assert_int_equal(got->first_logits_pos, want->first_logits_pos);
    assert_int_equal(got->n_logits, want->n_logits);
    assert_int_equal(got->tops, want->tops);
}

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

/* Greedy for the most part, so that steps run ahead; answers end by stop ids and by length. */
static void random_greedy_ask(ask *a, rng *r, uint64_t id)
{
    if (rng_below(r, 12) == 0) {
        random_ask(a, r, id); /* the host's answer is waited for while it takes part */
        return;
    }
    make_ask(a, id, rng_between(r, 1, 60), rng_below(r, 3), rng_between(r, 1, 50));
    a->r.sampling.ignore_eos = rng_below(r, 4) == 0;
    a->r.sampling.min_tokens = rng_below(r, 3) ? 0 : rng_between(r, 1, 20);
    a->r.priority = rng_below(r, 6) == 0;
    if (rng_below(r, 8) == 0)
        a->r.max_tokens = 0;
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

/* ---- several ranks */

typedef struct follower {
    tm_comm *comm;
    tm_engine_opts o;
    tm_status opened, ended;
    int blocks;
} follower;

static void *follow(void *arg)
{
    follower *f = arg;
    tm_engine *e;
    f->ended = TM_OK;
    f->opened = tm_engine_open(&e, &f->o, f->comm, NULL);
    if (f->opened == TM_OK) {
        f->blocks = tm_engine_info_get(e)->blocks_total;
        f->ended = tm_engine_follow(e, NULL);
        tm_engine_close(e);
    }
    tm_comm_destroy(f->comm);
    return NULL;
}

static void test_followers(void **state)
{
    (void)state;
    enum { N = 3 };
    tm_comm *ranks[N];
    follower f[N];
    pthread_t threads[N];
    fake_opts fo = {.max_positions = 512, .blocks = 100, .blocks_rank1 = 40, .pick = true};
    fake_reset(&fo);
    fake_comm_group(N, ranks);
    for (int i = 1; i < N; i++) {
        f[i] = (follower){.comm = ranks[i], .o = small_opts()};
        assert_int_equal(pthread_create(&threads[i], NULL, follow, &f[i]), 0);
    }
    tm_engine_opts o = small_opts();
    rig g = {.comm = ranks[0]};
    assert_int_equal(tm_engine_open(&g.e, &o, ranks[0], NULL), TM_OK);
    assert_int_equal(tm_engine_info_get(g.e)->blocks_total, 40); /* the poorest rank's */
    assert_int_equal(tm_engine_info_get(g.e)->model.max_positions, 320);
    answer *all[CROWD];
    rng r = {4};
    for (int i = 0; i < CROWD; i++) {
        random_greedy_ask(&asks[i], &r, (uint64_t)i + 1);
        all[i] = &crowded[i];
        assert_int_equal(drive_submit(g.e, &asks[i].r, all[i], NULL), TM_OK);
    }
    drive_all(g.e, all, CROWD);
    ask greedy;
    make_ask(&greedy, CROWD + 1, 5, 0, 4);
    run_alone(&g, &greedy.r, &alone[0]);
    assert_true(fake_picks(0) >= 4 && fake_ahead(0) > 20);
    rig_close(&g);
    for (int i = 1; i < N; i++) {
        pthread_join(threads[i], NULL);
        assert_int_equal(f[i].opened, TM_OK);
        assert_int_equal(f[i].ended, TM_OK);
        assert_int_equal(f[i].blocks, 40);
        assert_int_equal(fake_steps(i), fake_steps(0));
        assert_int_equal(fake_tokens(i), fake_tokens(0));
        assert_int_equal(fake_picks(i), fake_picks(0)); /* every rank takes part in the same way */
        assert_int_equal(fake_ahead(i), fake_ahead(0));
    }
}

static void test_follower_refuses_damage(void **state)
{
    (void)state;
    tm_comm *ranks[2];
    pthread_t thread;
    fake_reset(&roomy);
    fake_comm_group(2, ranks);
    follower f = {.comm = ranks[1], .o = small_opts()};
    assert_int_equal(pthread_create(&thread, NULL, follow, &f), 0);
    tm_engine_opts o = small_opts();
    rig g = {.comm = ranks[0]};
    assert_int_equal(tm_engine_open(&g.e, &o, ranks[0], NULL), TM_OK);
    fake_comm_damage_next();
    ask a;
    make_ask(&a, 1, 5, 0, 1);
    run_alone(&g, &a.r, &alone[0]);
    pthread_join(thread, NULL);
    assert_int_equal(f.opened, TM_OK);
    assert_int_equal(f.ended, TM_STATUS_INTERNAL);
    rig_close(&g);
}

static void test_one_rank_cannot_open(void **state)
{
    (void)state;
    tm_comm *ranks[2];
    pthread_t thread;
    fake_opts fo = roomy;
    fo.fail_open_rank1 = true;
    fake_reset(&fo);
    fake_comm_group(2, ranks);
    follower f = {.comm = ranks[1], .o = small_opts()};
    assert_int_equal(pthread_create(&thread, NULL, follow, &f), 0);
    tm_engine_opts o = small_opts();
    tm_engine *e;
    tm_err err = TM_ERR_INIT;
    assert_int_equal(tm_engine_open(&e, &o, ranks[0], &err), TM_STATUS_DATA);
    assert_non_null(strstr(err.msg, "another rank"));
    pthread_join(thread, NULL);
    assert_int_equal(f.opened, TM_STATUS_DATA);
    tm_comm_destroy(ranks[0]);
}

/* Without a length the context becomes what the pool holds; one that was asked for is refused, with numbers. */
static void test_session_needs_room(void **state)
{
    (void)state;
    const fake_opts small = {.max_positions = 200, .blocks = 20}; /* of 8 tokens */
    tm_engine_opts o = small_opts();
    rig r = rig_open(&small, &o);
    assert_int_equal(tm_engine_info_get(r.e)->model.max_positions, 160);
    rig_close(&r);
    o.model.session_len = 200;
    tm_comm *comm;
    tm_engine *e = NULL;
    tm_err err = TM_ERR_INIT;
    fake_reset(&small);
    fake_comm_group(1, &comm);
    assert_int_equal(tm_engine_open(&e, &o, comm, &err), TM_STATUS_CONFIG);
    assert_non_null(strstr(err.msg, "session_len 200 needs 25 blocks of 8 tokens"));
    assert_non_null(strstr(err.msg, "the KV pool has 20"));
    assert_null(e);
    tm_comm_destroy(comm);
    const fake_opts enough = {.max_positions = 200, .blocks = 25};
    r = rig_open(&enough, &o);
    assert_int_equal(tm_engine_info_get(r.e)->model.max_positions, 200);
    rig_close(&r);
}

static void test_lost_follower(void **state)
{
    (void)state;
    tm_comm *ranks[2];
    pthread_t thread;
    fake_reset(&roomy);
    fake_comm_group(2, ranks);
    follower f = {.comm = ranks[1], .o = small_opts()};
    assert_int_equal(pthread_create(&thread, NULL, follow, &f), 0);
    tm_engine_opts o = small_opts();
    rig g = {.comm = ranks[0]};
    assert_int_equal(tm_engine_open(&g.e, &o, ranks[0], NULL), TM_OK);
    fake_comm_lose(ranks[0]);
    ask a;
    make_ask(&a, 1, 5, 0, 10);
    run_alone(&g, &a.r, &alone[0]);
    assert_int_equal(alone[0].finish, TM_FINISH_ERROR);
    assert_int_equal(alone[0].status, TM_STATUS_UNAVAILABLE);
    pthread_join(thread, NULL);
    assert_int_equal(f.ended, TM_STATUS_UNAVAILABLE);
    rig_close(&g);
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
        cmocka_unit_test(test_crowd),
        cmocka_unit_test(test_ahead),
        cmocka_unit_test(test_continuation),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_queue_bound),
        cmocka_unit_test(test_complete_at_arrival),
        cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_stop_with_running),
        cmocka_unit_test(test_close_without_stop),
        cmocka_unit_test(test_slow_reader),
        cmocka_unit_test(test_wake_and_timeout),
        cmocka_unit_test(test_idle_sleeps),
        cmocka_unit_test(test_broken_logits_end_one_request),
        cmocka_unit_test(test_lost_group),
        cmocka_unit_test(test_watchdog_limit),
        cmocka_unit_test(test_watchdog_ends_group),
        cmocka_unit_test(test_followers),
        cmocka_unit_test(test_follower_refuses_damage),
        cmocka_unit_test(test_one_rank_cannot_open),
        cmocka_unit_test(test_session_needs_room),
        cmocka_unit_test(test_lost_follower),
        cmocka_unit_test(test_pool_options),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
