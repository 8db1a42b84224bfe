/* The pool against scripted groups: one promise per test. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/log.h"
#include "tests/router/dispatch_sim.h"

#define SEC INT64_C(1000000000)

static sim S;

static void begin(int groups, void (*tune)(tm_pool_opts *o))
{
    static const char *const NAMES[] = {"g0", "g1", "g2", "g3", "g4", "g5", "g6", "g7"};
    sim_init(&S, 1);
    for (int i = 0; i < groups; i++)
        sim_add(&S, NAMES[i]);
    tm_pool_opts o = sim_pool_opts(&S);
    if (tune != NULL)
        tune(&o);
    assert_int_equal(tm_pool_create(&S.pool, &o, NULL), TM_OK);
    sim_list(&S);
    sim_run(&S, 300);
    assert_int_equal(tm_pool_groups_ready(S.pool, NULL), groups);
}

static void end(void)
{
    assert_int_equal(tm_pool_in_flight(S.pool), 0);
    sim_deinit(&S);
}

static sim_owner owner(uint32_t key, int max_tokens)
{
    return (sim_owner){.key = key, .max_tokens = max_tokens};
}

static double metric(const char *line)
{
    tm_buf b;
    tm_buf_init(&b, 0);
    tm_metrics_render(S.metrics, &b);
    const char *at = strstr(b.data, line);
    double v = at != NULL ? strtod(at + strlen(line), NULL) : -1;
    tm_buf_deinit(&b);
    return v;
}

static void test_plain(void **state)
{
    (void)state;
    begin(2, NULL);
    sim_owner o[20];
    for (uint32_t i = 0; i < 20; i++) {
        o[i] = owner(i + 1, 30);
        o[i].prompt_logprobs = i % 3 == 0;
        assert_int_equal(sim_start(&S, &o[i]), TM_OK);
    }
    sim_run_until_idle(&S, 20000);
    for (int i = 0; i < 20; i++)
        sim_check_done(&o[i]);
    assert_int_equal(S.fetches, 1); /* two groups of one digest share the text files */
    assert_true(S.groups[0].submits > 5 && S.groups[1].submits > 5);
    end();
}

static void test_death_moves(void **state)
{
    (void)state;
    begin(2, NULL);
    sim_owner o[8];
    for (uint32_t i = 0; i < 8; i++) {
        o[i] = owner(i + 1, 60);
        o[i].prompt_logprobs = i % 2 == 0;
        assert_int_equal(sim_start(&S, &o[i]), TM_OK);
    }
    sim_run(&S, 150);
    sim_kill(&S, &S.groups[0]);
    sim_run_until_idle(&S, 20000);
    for (int i = 0; i < 8; i++)
        sim_check_done(&o[i]);
    assert_true(metric("turbomesh_migrations_total{kind=\"death\",result=\"moved\"} ") > 0);
    end();
}

/* The only group goes down and comes back: its streams wait and go on. */
static void test_restart_survived(void **state)
{
    (void)state;
    begin(1, NULL);
    sim_owner o = owner(3, 60);
    assert_int_equal(sim_start(&S, &o), TM_OK);
    sim_run(&S, 200);
    int before = o.got;
    assert_true(before > 0);
    sim_kill(&S, &S.groups[0]);
    sim_run(&S, 3000);
    assert_int_equal(o.got, before);
    sim_restart(&S, &S.groups[0]);
    sim_run_until_idle(&S, 20000);
    sim_check_done(&o);
    end();
}

static void test_frozen_group(void **state)
{
    (void)state;
    begin(2, NULL);
    sim_owner o = owner(39, 80);
    assert_int_equal(sim_start(&S, &o), TM_OK);
    sim_run(&S, 150);
    sim_group *g = NULL;
    assert_non_null(sim_seq_of(&S, &o, &g));
    g->frozen = true;
    sim_run(&S, 800);
    assert_int_equal(tm_pool_groups_ready(S.pool, NULL), 1); /* suspect */
    int64_t froze = S.now_ns;
    int before = o.got;
    while (o.got == before && S.now_ns < froze + 5 * SEC)
        sim_run(&S, 10);
    assert_true(S.now_ns < froze + 2 * SEC); /* dead after 2 s of silence in all */
    sim_run_until_idle(&S, 20000);
    sim_check_done(&o);
    end();
}

/* One stream stops although its group talks: it moves, the group's others stay. */
static void test_stalled_stream(void **state)
{
    (void)state;
    begin(2, NULL);
    sim_owner a = owner(11, 2000), b = owner(12, 60);
    assert_int_equal(sim_start(&S, &a), TM_OK);
    assert_int_equal(sim_start(&S, &b), TM_OK);
    sim_run(&S, 150);
    sim_group *g = NULL;
    sim_seq *q = sim_seq_of(&S, &b, &g);
    assert_non_null(q);
    q->held = true;
    sim_run(&S, 1500);
    assert_false(b.ended);
    sim_run(&S, 2500);
    sim_check_done(&b);
    assert_true(metric("turbomesh_migrations_total{kind=\"stall\",result=\"moved\"} ") == 1);
    if (a.gen != NULL)
        tm_gen_cancel(a.gen);
    end();
}

static void test_drain_hands_back(void **state)
{
    (void)state;
    begin(2, NULL);
    sim_owner o[8];
    for (uint32_t i = 0; i < 8; i++) {
        o[i] = owner(i + 21, 60);
        assert_int_equal(sim_start(&S, &o[i]), TM_OK);
    }
    sim_run(&S, 150);
    sim_drain(&S, &S.groups[1]);
    sim_run(&S, 50);
    assert_int_equal(tm_pool_groups_ready(S.pool, NULL), 1);
    int submits = S.groups[1].submits;
    sim_run_until_idle(&S, 20000);
    for (int i = 0; i < 8; i++)
        sim_check_done(&o[i]);
    assert_int_equal(S.groups[1].submits, submits);
    assert_true(metric("turbomesh_migrations_total{kind=\"handback\",result=\"moved\"} ") > 0);
    end();
}

static void tune_small_queue(tm_pool_opts *o)
{
    o->queue_max = 4;
}

static void test_queue_bound(void **state)
{
    (void)state;
    begin(1, tune_small_queue);
    sim_owner o[32];
    int accepted = 0, busy = 0;
    for (uint32_t i = 0; i < 32; i++) {
        o[i] = owner(i + 1, 20);
        tm_status st = sim_start(&S, &o[i]);
        if (st == TM_STATUS_BUSY) {
            busy++;
            assert_in_range(o[i].retry_after_ms, 1000, 30000);
        } else {
            assert_int_equal(st, TM_OK);
            accepted++;
        }
    }
    assert_int_equal(accepted, 8 + 2 + 4); /* batch, slack, queue */
    assert_int_equal(busy, 18);
    assert_int_equal(tm_pool_waiting(S.pool), 4);
    sim_run_until_idle(&S, 30000);
    for (int i = 0; i < accepted; i++)
        sim_check_done(&o[i]);
    end();
}

static void tune_short_wait(tm_pool_opts *o)
{
    o->queue_wait_ms = 1000;
}

static void test_wait_bound(void **state)
{
    (void)state;
    begin(1, tune_short_wait);
    S.groups[0].reject_busy = true;
    sim_owner o = owner(1, 20);
    assert_int_equal(sim_start(&S, &o), TM_OK);
    sim_run(&S, 1500);
    assert_true(o.failed);
    assert_int_equal(o.error, TM_GEN_ERR_BUSY);
    assert_in_range(o.retry_after_ms, 1000, 30000);
    sim_kill(&S, &S.groups[0]);
    sim_run(&S, 100);
    sim_owner p = owner(2, 20);
    assert_int_equal(sim_start(&S, &p), TM_OK);
    sim_run(&S, 1500);
    assert_true(p.failed);
    assert_int_equal(p.error, TM_GEN_ERR_NO_WORKER);
    end();
}

static void test_no_member_left(void **state)
{
    (void)state;
    begin(2, tune_short_wait);
    tm_served *served = tm_served_acquire(tm_pool_served_find(S.pool, "m"));
    sim_kill(&S, &S.groups[0]);
    sim_kill(&S, &S.groups[1]);
    sim_run(&S, 100);
    sim_list_only(&S, 0);
    sim_run(&S, 1500);
    sim_owner o = owner(1, 20);
    o.served = served;
    assert_int_equal(sim_start(&S, &o), TM_STATUS_UNAVAILABLE);
    assert_true(o.retry_after_ms > 0);
    assert_int_equal(tm_pool_served_count(S.pool), 1); /* still listed: it may come back */
    assert_true(metric("turbomesh_group_state{group=\"g0\"} ") < 0);
    assert_true(metric("turbomesh_group_in_flight{group=\"g1\"} ") < 0);
    tm_served_release(served);
    end();
}

static void test_deadline(void **state)
{
    (void)state;
    begin(1, NULL);
    S.groups[0].step_ns = SEC;
    sim_owner o = owner(1, 200);
    o.deadline_ms = 2500;
    assert_int_equal(sim_start(&S, &o), TM_OK);
    sim_run(&S, 4000);
    assert_true(o.failed);
    assert_int_equal(o.error, TM_GEN_ERR_TIMEOUT);
    assert_null(sim_seq_of(&S, &o, NULL)); /* the engine was told */
    end();
}

static void test_poison(void **state)
{
    (void)state;
    begin(4, NULL);
    sim_owner o = owner(9, 900);
    assert_int_equal(sim_start(&S, &o), TM_OK);
    for (int k = 0; k < 2; k++) {
        sim_run(&S, 100);
        sim_group *g = NULL;
        assert_non_null(sim_seq_of(&S, &o, &g));
        assert_false(o.failed);
        sim_kill(&S, g);
    }
    sim_run(&S, 100);
    assert_true(o.failed);
    assert_int_equal(o.error, TM_GEN_ERR_POISON);
    int submits = 0;
    for (int i = 0; i < 4; i++)
        submits += S.groups[i].submits;
    assert_int_equal(submits, 2);
    end();
}

/* A cut link is no death when the same life of the group answers again. */
static void test_cut_links_forgiven(void **state)
{
    (void)state;
    begin(2, NULL);
    S.groups[0].step_ns = S.groups[1].step_ns = SEC / 10;
    sim_owner o = owner(33, 900);
    assert_int_equal(sim_start(&S, &o), TM_OK);
    for (int k = 0; k < 3; k++) {
        sim_run(&S, 100);
        sim_group *g = NULL;
        sim_seq *q = sim_seq_of(&S, &o, &g);
        assert_non_null(q);
        tm_pool_on_closed(S.pool, q->link_id, "cut");
        sim_run(&S, 1500);
    }
    sim_run_until_idle(&S, 30000);
    sim_check_done(&o);
    end();
}

static void test_cancel(void **state)
{
    (void)state;
    begin(1, NULL);
    sim_owner a = owner(1, 100), b = owner(2, 100), c = owner(3, 100);
    a.cancel_at = 5;
    assert_int_equal(sim_start(&S, &a), TM_OK);
    assert_int_equal(sim_start(&S, &b), TM_OK);
    assert_int_equal(sim_start(&S, &c), TM_OK);
    tm_gen_cancel(c.gen); /* before anything happened */
    c.cancelled = true;
    sim_run(&S, 300);
    assert_true(a.cancelled && a.got >= 5);
    assert_null(sim_seq_of(&S, &a, NULL));
    assert_null(sim_seq_of(&S, &c, NULL));
    assert_int_equal(S.groups[0].cancels, 2);
    sim_run_until_idle(&S, 20000);
    sim_check_done(&b);
    end();
}

/* The group dies when everything was said but the finish: the end comes all the same. */
static void test_death_at_the_end(void **state)
{
    (void)state;
    begin(1, NULL);
    sim_owner o = owner(4, 40);
    tm_gen_finish finish;
    int n = sim_expected(4, 40, &finish);
    assert_int_equal(sim_start(&S, &o), TM_OK);
    while (o.got == 0)
        sim_run(&S, 1);
    /* A last message by hand: all tokens, no finish. */
    sim_seq *q = sim_seq_of(&S, &o, NULL);
    assert_non_null(q);
    Turbomesh__Worker__V1__RequestEvent e = TURBOMESH__WORKER__V1__REQUEST_EVENT__INIT;
    Turbomesh__Worker__V1__RequestEvent *list[] = {&e};
    Turbomesh__Worker__V1__StepEvents st = TURBOMESH__WORKER__V1__STEP_EVENTS__INIT;
    tm_wire_worker_message m = TURBOMESH__WORKER__V1__WORKER_MESSAGE__INIT;
    int32_t token[40];
    e.id = q->id;
    e.has_first_pos = 1;
    e.n_token = (size_t)n;
    e.token = token;
    for (int i = 0; i < n; i++)
        token[i] = sim_token(4, i);
    st.n_event = 1;
    st.event = list;
    m.epoch = S.groups[0].epoch;
    m.m_case = TURBOMESH__WORKER__V1__WORKER_MESSAGE__M_STEP;
    m.step = &st;
    tm_pool_on_message(S.pool, q->link_id, &m, S.now_ns);
    assert_false(o.ended);
    sim_kill(&S, &S.groups[0]);
    sim_run(&S, 50);
    sim_check_done(&o);
    assert_true(metric("turbomesh_migrations_total{kind=\"death\",result=\"finished\"} ") == 1);
    end();
}

static void test_gap_and_doubling(void **state)
{
    (void)state;
    begin(2, NULL);
    S.groups[0].doubling = S.groups[1].doubling = true;
    S.groups[0].bad_position = true;
    sim_owner o[6];
    for (uint32_t i = 0; i < 6; i++) {
        o[i] = owner(i + 31, 50);
        assert_int_equal(sim_start(&S, &o[i]), TM_OK);
    }
    sim_run_until_idle(&S, 20000);
    for (int i = 0; i < 6; i++)
        sim_check_done(&o[i]);
    assert_true(metric("turbomesh_migrations_total{kind=\"gap\",result=\"moved\"} ") == 1);
    end();
}

static void test_busy_goes_elsewhere(void **state)
{
    (void)state;
    begin(2, NULL);
    S.groups[0].reject_busy = true;
    sim_owner o[6];
    for (uint32_t i = 0; i < 6; i++) {
        o[i] = owner(i + 41, 30);
        assert_int_equal(sim_start(&S, &o[i]), TM_OK);
    }
    sim_run_until_idle(&S, 20000);
    for (int i = 0; i < 6; i++)
        sim_check_done(&o[i]);
    end();
}

static void test_member_burst(void **state)
{
    (void)state;
    begin(4, NULL);
    sim_owner o = owner(7, 100);
    assert_int_equal(sim_start(&S, &o), TM_OK);
    sim_run(&S, 100);
    sim_list_only(&S, 1); /* three of four vanish: not believed */
    sim_run(&S, 200);
    assert_int_equal(tm_pool_groups_ready(S.pool, NULL), 4);
    sim_kill(&S, &S.groups[3]); /* but its link is */
    sim_run(&S, 200);
    assert_int_equal(tm_pool_groups_ready(S.pool, NULL), 3);
    assert_true(metric("turbomesh_group_state{group=\"g3\"} ") < 0);
    sim_list_only(&S, 7);
    sim_run(&S, 100);
    sim_list_only(&S, 3); /* one of three: believed, its streams end in peace */
    sim_run(&S, 200);
    assert_int_equal(tm_pool_groups_ready(S.pool, NULL), 2);
    sim_run_until_idle(&S, 20000);
    sim_check_done(&o);
    end();
}

/* A process of an earlier life answers at the address: it is not let in. */
static void test_old_epoch_fenced(void **state)
{
    (void)state;
    begin(2, NULL);
    S.groups[0].hello_old = true;
    sim_run(&S, 3000); /* its messages are refused, so it falls silent */
    assert_int_equal(tm_pool_groups_ready(S.pool, NULL), 1);
    sim_run(&S, 3000);
    assert_int_equal(tm_pool_groups_ready(S.pool, NULL), 1);
    assert_true(metric("turbomesh_links_total{event=\"fenced\"} ") > 0);
    S.groups[0].hello_old = false;
    sim_run(&S, 8000);
    assert_int_equal(tm_pool_groups_ready(S.pool, NULL), 2);
    end();
}

static void test_priority_order(void **state)
{
    (void)state;
    begin(1, NULL);
    S.groups[0].max_batch = 1;
    S.groups[0].queue_max = 0;
    sim_restart(&S, &S.groups[0]); /* with the new capacity */
    sim_list(&S);
    sim_run(&S, 1000);
    assert_int_equal(tm_pool_groups_ready(S.pool, NULL), 1);
    sim_owner o[4];
    for (uint32_t i = 0; i < 4; i++) {
        o[i] = owner(i + 51, 20);
        o[i].priority = i == 3 ? 5 : 0;
        assert_int_equal(sim_start(&S, &o[i]), TM_OK);
    }
    sim_run_until_idle(&S, 20000);
    for (int i = 0; i < 4; i++)
        sim_check_done(&o[i]);
    assert_true(o[3].first_ns < o[1].first_ns && o[1].first_ns < o[2].first_ns);
    end();
}

/* The router itself was stopped for a while: nobody is declared dead for that. */
static void test_own_pause(void **state)
{
    (void)state;
    begin(2, NULL);
    sim_owner o = owner(7, 300);
    assert_int_equal(sim_start(&S, &o), TM_OK);
    sim_run(&S, 100);
    S.now_ns += 10 * SEC;
    tm_pool_tick(S.pool);
    assert_int_equal(tm_pool_groups_ready(S.pool, NULL), 2);
    sim_run_until_idle(&S, 20000);
    sim_check_done(&o);
    assert_true(metric("turbomesh_migrations_total{kind=\"death\",result=\"moved\"} ") < 0);
    end();
}

static void test_destroy_ends_all(void **state)
{
    (void)state;
    begin(1, NULL);
    sim_owner o[20];
    for (uint32_t i = 0; i < 20; i++) {
        o[i] = owner(i + 1, 100);
        assert_int_equal(sim_start(&S, &o[i]), TM_OK);
    }
    sim_run(&S, 100);
    tm_pool_destroy(S.pool);
    S.pool = NULL;
    for (int i = 0; i < 20; i++)
        assert_true(o[i].ended || (o[i].failed && o[i].error == TM_GEN_ERR_NO_WORKER));
    sim_deinit(&S);
}

static void test_assets_retry(void **state)
{
    (void)state;
    sim_init(&S, 1);
    sim_add(&S, "g0");
    tm_pool_opts o = sim_pool_opts(&S);
    assert_int_equal(tm_pool_create(&S.pool, &o, NULL), TM_OK);
    S.fetch_fails = true;
    sim_list(&S);
    sim_run(&S, 5000);
    assert_int_equal(tm_pool_served_count(S.pool), 0);
    assert_in_range(S.fetches, 2, 4);
    S.fetch_fails = false;
    sim_run(&S, 10000);
    assert_int_equal(tm_pool_served_count(S.pool), 1);
    assert_string_equal(tm_pool_served_at(S.pool, 0)->name, "m");
    assert_null(tm_pool_served_find(S.pool, "other"));
    assert_int_equal(tm_pool_groups_ready(S.pool, "m"), 1);
    tm_buf b;
    tm_buf_init(&b, 0);
    tm_pool_describe(S.pool, &b);
    assert_non_null(strstr(b.data, "\"state\":\"ready\""));
    tm_buf_deinit(&b);
    end();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plain),
        cmocka_unit_test(test_death_moves),
        cmocka_unit_test(test_restart_survived),
        cmocka_unit_test(test_frozen_group),
        cmocka_unit_test(test_stalled_stream),
        cmocka_unit_test(test_drain_hands_back),
        cmocka_unit_test(test_queue_bound),
        cmocka_unit_test(test_wait_bound),
        cmocka_unit_test(test_no_member_left),
        cmocka_unit_test(test_deadline),
        cmocka_unit_test(test_poison),
        cmocka_unit_test(test_cut_links_forgiven),
        cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_death_at_the_end),
        cmocka_unit_test(test_gap_and_doubling),
        cmocka_unit_test(test_busy_goes_elsewhere),
        cmocka_unit_test(test_member_burst),
        cmocka_unit_test(test_old_epoch_fenced),
        cmocka_unit_test(test_priority_order),
        cmocka_unit_test(test_own_pause),
        cmocka_unit_test(test_destroy_ends_all),
        cmocka_unit_test(test_assets_retry),
    };
    tm_log_init("dispatch_pool_test", TM_LOG_ERROR, TM_LOG_TEXT);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
