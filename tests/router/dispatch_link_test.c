/* Dispatch over real gRPC links to workers in this process: streams, a crash, a frozen group, a drain, a
 * cancel, and how many tokens a second one loop thread forwards. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <string.h>

#include <cmocka.h>

#include <event2/event.h>

#include "common/clock.h"
#include "common/log.h"
#include "router/dispatch.h"
#include "tests/router/dispatch_worker.h"

#define VOCAB 500

static struct event_base *base;
static tm_metrics *metrics;
static tm_dispatch *dispatch;
static fake_worker *workers[2];

typedef struct owner {
    tm_gen *gen;
    int32_t first;
    int max_tokens, got;
    bool ended, failed;
    tm_gen_error error;
} owner;

static void turn(int64_t ms)
{
    struct timeval tv = {ms / 1000, (ms % 1000) * 1000};
    event_base_loopexit(base, &tv);
    event_base_dispatch(base);
}

/* Waits bound only what hangs: the machine may be busy with other things. */
#define WAIT_FOR(what)                                                                             \
    for (int64_t end_ = tm_clock_ms() + 30000; !(what);) {                                         \
        turn(20);                                                                                  \
        if (tm_clock_ms() > end_)                                                                  \
            fail_msg("not within 30 s: %s", #what);                                                \
    }

static fake_worker *worker(int port, uint64_t epoch, int step_us, int batch)
{
    fake_worker_opts o = {.group = port % 2 != 0 ? "odd" : "even",
                          .model = "demo",
                          .model_dir = "models/demo-20m",
                          .port = port,
                          .epoch = epoch,
                          .step_us = step_us,
                          .max_batch = batch,
                          .vocab = VOCAB,
                          .stop_id = -1};
    return fake_worker_start(&o);
}

static void begin(int count, int step_us, int batch)
{
    char list[128] = "";
    size_t at = 0;
    base = event_base_new();
    metrics = tm_metrics_create();
    for (int i = 0; i < count; i++) {
        workers[i] = worker(0, 1, step_us, batch);
        at += (size_t)snprintf(list + at, sizeof(list) - at, "127.0.0.1:%d,",
                               fake_worker_port(workers[i]));
    }
    tm_dispatch_opts o = {.base = base,
                          .metrics = metrics,
                          .workers = list,
                          .policy = TM_POLICY_LEAST_LOAD,
                          .queue_max = 1000,
                          .queue_wait_ms = 10000,
                          .dead_ms = 2000,
                          .suspect_ms = 500,
                          .moves_max = 3,
                          .router_id = "test"};
    tm_err err = TM_ERR_INIT;
    if (tm_dispatch_create(&dispatch, &o, &err) != TM_OK)
        fail_msg("%s", err.msg);
    WAIT_FOR(tm_dispatch_groups_ready(dispatch, NULL) == count);
}

static void end(void)
{
    tm_dispatch_destroy(dispatch);
    for (int i = 0; i < 2; i++) {
        if (workers[i] != NULL)
            fake_worker_stop(workers[i]);
        workers[i] = NULL;
    }
    tm_metrics_destroy(metrics);
    event_base_free(base);
}

static void on_admitted(void *user, int32_t prompt_tokens, int32_t cached_tokens)
{
    (void)user;
    (void)prompt_tokens;
    (void)cached_tokens;
}

static void on_tokens(void *user, int32_t first_pos, const tm_gen_token *tokens, int count)
{
    owner *o = user;
    assert_int_equal(first_pos, o->got);
    for (int i = 0; i < count; i++)
        assert_int_equal(tokens[i].token, fake_worker_token(VOCAB, o->first, o->got + i));
    o->got += count;
}

static void on_end(void *user, tm_gen_finish finish)
{
    owner *o = user;
    assert_false(o->ended || o->failed);
    assert_int_equal(finish, TM_GEN_LENGTH);
    o->ended = true;
}

static void on_error(void *user, tm_gen_error error, int64_t retry_after_ms)
{
    owner *o = user;
    (void)retry_after_ms;
    assert_false(o->ended || o->failed);
    o->failed = true;
    o->error = error;
}

static void start(owner *o, int32_t first, int max_tokens)
{
    static const tm_gen_ops OPS = {on_admitted, NULL, on_tokens, on_end, on_error};
    int32_t prompt[8] = {first, 1, 2, 3, 4, 5, 6, 7};
    tm_gen_args a = {.served = tm_dispatch_served_find(dispatch, "demo"),
                     .prompt = prompt,
                     .prompt_len = 8,
                     .max_tokens = max_tokens,
                     .sampling = tm_sampling_default(),
                     .request_id = "t"};
    int64_t retry;
    *o = (owner){.first = first, .max_tokens = max_tokens};
    a.sampling.ignore_eos = true;
    assert_non_null(a.served);
    assert_int_equal(tm_dispatch_start(dispatch, &a, &OPS, o, &o->gen, &retry), TM_OK);
}

static void run_all(int64_t ms_max)
{
    int64_t until = tm_clock_ms() + ms_max;
    while (tm_dispatch_active(dispatch) > 0 && tm_clock_ms() < until)
        turn(20);
    assert_int_equal(tm_dispatch_active(dispatch), 0);
}

static void check_done(const owner *o, int n)
{
    for (int i = 0; i < n; i++) {
        assert_true(o[i].ended);
        assert_int_equal(o[i].got, o[i].max_tokens);
    }
}

static void test_streams(void **state)
{
    (void)state;
    begin(2, 1000, 32);
    owner o[40];
    for (int i = 0; i < 40; i++)
        start(&o[i], i + 1, 50);
    run_all(60000);
    check_done(o, 40);
    end();
}

static void test_crash_and_return(void **state)
{
    (void)state;
    begin(2, 2000, 32);
    owner o[20];
    for (int i = 0; i < 20; i++)
        start(&o[i], i + 1, 300);
    turn(100);
    int port = fake_worker_port(workers[0]);
    fake_worker_stop(workers[0]);
    workers[0] = NULL;
    WAIT_FOR(tm_dispatch_groups_ready(dispatch, NULL) == 1);
    workers[0] = worker(port, 2, 2000, 32);
    run_all(60000);
    check_done(o, 20);
    WAIT_FOR(tm_dispatch_groups_ready(dispatch, NULL) == 2);
    end();
}

static void test_frozen(void **state)
{
    (void)state;
    begin(2, 2000, 32);
    owner o[10];
    for (int i = 0; i < 10; i++)
        start(&o[i], i + 1, 1000);
    turn(100);
    fake_worker_freeze(workers[1], true);
    int64_t t0 = tm_clock_ms();
    run_all(60000);
    check_done(o, 10);
    assert_true(tm_clock_ms() - t0 >= 1500); /* silence was waited out */
    fake_worker_freeze(workers[1], false);
    end();
}

static void test_drain(void **state)
{
    (void)state;
    begin(2, 2000, 32);
    owner o[10];
    for (int i = 0; i < 10; i++)
        start(&o[i], i + 1, 1000);
    turn(100);
    fake_worker_drain(workers[1]);
    WAIT_FOR(tm_dispatch_groups_ready(dispatch, NULL) == 1);
    run_all(60000);
    check_done(o, 10);
    end();
}

static void test_cancel(void **state)
{
    (void)state;
    begin(1, 1000, 32);
    owner o[4];
    for (int i = 0; i < 4; i++)
        start(&o[i], i + 1, 100000);
    WAIT_FOR(fake_worker_running(workers[0]) == 4);
    assert_true(strncmp(tm_gen_group(o[0].gen), "even", 4) == 0);
    for (int i = 0; i < 4; i++)
        tm_gen_cancel(o[i].gen);
    assert_int_equal(tm_dispatch_active(dispatch), 0);
    WAIT_FOR(fake_worker_running(workers[0]) == 0);
    assert_int_equal(fake_worker_cancels(workers[0]), 4);
    end();
}

/* Not a timed test: the rate is printed, and only an order of magnitude is asked for. */
static void test_rate(void **state)
{
    (void)state;
    begin(1, 0, 256);
    static owner o[256];
    for (int i = 0; i < 256; i++)
        start(&o[i], i + 1, 2000);
    int64_t t0 = tm_clock_ns(), cpu0 = (int64_t)clock();
    run_all(60000);
    double s = (double)(tm_clock_ns() - t0) / 1e9;
    double cpu = (double)((int64_t)clock() - cpu0) / CLOCKS_PER_SEC;
    check_done(o, 256);
    print_message("%d tokens forwarded in %.2f s (%.0f/s; %.2f s of CPU with worker and gRPC)\n",
                  256 * 2000, s, 256 * 2000 / s, cpu);
    assert_true(256 * 2000 / s > 10000);
    end();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_streams), cmocka_unit_test(test_crash_and_return),
        cmocka_unit_test(test_frozen),  cmocka_unit_test(test_drain),
        cmocka_unit_test(test_cancel),  cmocka_unit_test(test_rate),
    };
    tm_log_init("dispatch_link_test", TM_LOG_ERROR, TM_LOG_TEXT);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
