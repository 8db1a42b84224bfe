/* The scheduler against a fake model, under random schedules and property by property. Every sequence must give exactly
 * the tokens that its history alone determines, whatever was preempted, cached, shared or cancelled around it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "common/check.h"
#include "tests/engine/rng.h"
#include "tests/engine/sched_check.h"
#include "tests/engine/sched_world.h"

/* ---- random schedules */

static void random_client(world *w, rng *r, client *c, tm_seq_opts *o, int32_t *given)
{
    static const int32_t stops[] = {11, 12};
    memset(o, 0, sizeof(*o));
    int bt = w->o.block_tokens, family = rng_below(r, 3);
    int most = TM_MIN(w->limits.max_len - 1, 8 * bt);
    c->n_prompt = rng_between(r, 1, most);
    for (int i = 0; i < c->n_prompt; i++) /* families share prefixes of various lengths */
        c->prompt[i] = (int32_t)((family * 5 + i * 3) % VOCAB);
    if (rng_below(r, 3) == 0)
        c->prompt[rng_below(r, c->n_prompt)] = rng_below(r, VOCAB);
    c->max_tokens = rng_below(r, 10) == 0 ? 0 : rng_between(r, 1, 5 * bt);
    c->rows_from = c->rows_to = 0;
    if (rng_below(r, 4) == 0) {
        c->rows_from = rng_below(r, c->n_prompt);
        c->rows_to = rng_between(r, c->rows_from, c->n_prompt);
    }
    o->priority = rng_below(r, 5) == 0 ? rng_between(r, -1, 1) : 0;
    o->salt = (uint64_t)rng_below(r, 2);
    o->ignore_eos = rng_below(r, 4) == 0;
    o->min_tokens = rng_below(r, 4) == 0 ? rng_between(r, 1, 10) : 0;
    o->stop_ids = stops;
    o->stop_count = (size_t)rng_below(r, 3);
    if (rng_below(r, 4) == 0 && c->max_tokens > 1) { /* continuation: some of the answer is there */
        int32_t all[1024];
        memcpy(all, c->prompt, (size_t)c->n_prompt * sizeof(*all));
        int n = rng_below(r, TM_MIN(c->max_tokens, w->limits.max_len - c->n_prompt));
        for (int i = 0; i < n; i++) {
            all[c->n_prompt + i] = given[i] = world_next_token(all, c->n_prompt + i);
            if (given[i] == MODEL_STOP || given[i] == 11 || given[i] == 12)
                return;
        }
        o->generated = given;
        o->generated_len = (size_t)n;
    }
}

static void cancel_some(world *w, rng *r)
{
    client *c = &w->clients[rng_below(r, w->n_clients)];
    if (!c->seq)
        return;
    tm_sched_cancel(w->s, c->seq);
    tm_seq_destroy(c->seq);
    c->seq = NULL;
    c->cancelled = true;
}

static void one_schedule(uint64_t seed)
{
    enum { CLIENTS = 24 };
    rng r = {seed};
    int bt = 1 << rng_between(&r, 1, 4);
    tm_sched_opts o = {.max_seqs = rng_between(&r, 1, 8),
                       .max_step_tokens = rng_between(&r, 1, 40),
                       .max_prompt_rows = rng_between(&r, 1, 8),
                       .queue_max = rng_between(&r, 3, 30),
                       .n_blocks = rng_between(&r, 3, 40),
                       .block_tokens = bt};
    world w;
    world_open(&w, &o, rng_between(&r, bt + 2, 20 * bt), rng_below(&r, 4) != 0);
    w.clients = calloc(CLIENTS, sizeof(*w.clients));
    w.n_clients = CLIENTS;
    w.ahead = seed % 2 == 1;
    w.mood = seed % 4 == 1 ? &r : NULL;
    int next = 0;
    while (next < CLIENTS) {
        for (int n = rng_below(&r, 4); n > 0 && next < CLIENTS; n--, next++) {
            tm_seq_opts so;
            int32_t given[512];
            random_client(&w, &r, &w.clients[next], &so, given);
            tm_status st = world_submit(&w, &w.clients[next], &so);
            assert_true(st == TM_OK || st == TM_STATUS_BUSY);
        }
        if (rng_below(&r, 10) == 0)
            cancel_some(&w, &r);
        for (int n = rng_below(&r, 12); n > 0; n--)
            world_step(&w);
        sched_check(w.s);
    }
    world_drain(&w);
    for (int i = 0; i < CLIENTS; i++) {
        const client *c = &w.clients[i];
        assert_int_equal(c->submitted, c->finished || c->cancelled);
    }
    world_close(&w);
    free(w.clients);
}

static void test_random_schedules(void **state)
{
    (void)state;
    uint64_t seed = rng_seed("random_schedules", 1);
    for (uint64_t i = 0; i < 4000; i++)
        one_schedule(seed * 1000003 + i);
}

/* ---- single properties */

static client *add_client(world *w, int index, int n_prompt, int max_tokens, int first,
                          tm_seq_opts *o)
{
    client *c = &w->clients[index];
    c->n_prompt = n_prompt;
    c->max_tokens = max_tokens;
    for (int i = 0; i < n_prompt; i++)
        c->prompt[i] = (first + i) % VOCAB;
    assert_int_equal(world_submit(w, c, o), TM_OK);
    return c;
}

static const tm_sched_opts small = {.max_seqs = 8,
                                    .max_step_tokens = 32,
                                    .max_prompt_rows = 8,
                                    .queue_max = 64,
                                    .n_blocks = 64,
                                    .block_tokens = 8};

/* Six choices of one prompt of 70 tokens: one computes it, the others only what is behind its full blocks,
 * although the budget had room for all of them in the first step. */
static void test_siblings_share(void **state)
{
    (void)state;
    client clients[6] = {0};
    tm_sched_opts so = small;
    so.max_step_tokens = 512;
    world w;
    world_open(&w, &so, 256, true);
    w.clients = clients;
    tm_seq_opts o = {.ignore_eos = true};
    for (int i = 0; i < 6; i++)
        add_client(&w, i, 70, 4, 0, &o);
    int tokens = 0, n;
    while ((n = world_step(&w)) > 0)
        tokens += n;
    assert_int_equal(tokens, 70 + 5 * (70 - 64) + 6 * 3);
    world_close(&w);
}

static void test_full_hit_computes_last_block(void **state)
{
    (void)state;
    client clients[2] = {0};
    world w;
    world_open(&w, &small, 256, true);
    w.clients = clients;
    tm_seq_opts o = {.ignore_eos = true};
    add_client(&w, 0, 64, 1, 0, &o);
    world_drain(&w);
    add_client(&w, 1, 64, 1, 0, &o);
    assert_int_equal(world_step(&w), 8); /* every block is cached; the last one is computed again */
    assert_int_equal(world_step(&w), 0);
    world_close(&w);
}

/* Prompt scoring needs rows 40..: cached blocks may serve the positions before. */
static void test_scoring_bypasses_cache(void **state)
{
    (void)state;
    client clients[2] = {0};
    world w;
    world_open(&w, &small, 256, true);
    w.clients = clients;
    tm_seq_opts o = {0};
    add_client(&w, 0, 64, 0, 0, &o);
    world_drain(&w);
    clients[1].rows_from = 40;
    clients[1].rows_to = 64;
    add_client(&w, 1, 64, 0, 0, &o);
    int tokens = 0, n, steps = 0;
    for (; (n = world_step(&w)) > 0; steps++)
        tokens += n;
    assert_int_equal(tokens, 24);
    assert_int_equal(steps, 3); /* at most 8 prompt rows a step */
    assert_true(clients[1].finished);
    world_close(&w);
}

static void test_salt_separates(void **state)
{
    (void)state;
    client clients[4] = {0};
    world w;
    world_open(&w, &small, 256, true);
    w.clients = clients;
    tm_seq_opts o = {.ignore_eos = true, .salt = 1};
    add_client(&w, 0, 32, 1, 0, &o);
    world_drain(&w);
    o.salt = 2;
    add_client(&w, 1, 32, 1, 0, &o);
    assert_int_equal(world_step(&w), 32);
    world_drain(&w);
    o.rope_len = 100; /* keys rotated unlike those */
    add_client(&w, 2, 32, 1, 0, &o);
    assert_int_equal(world_step(&w), 32);
    world_drain(&w);
    add_client(&w, 3, 32, 1, 0, &o);
    assert_true(world_step(&w) < 32);
    world_drain(&w);
    world_close(&w);
}

static void test_queue_bound(void **state)
{
    (void)state;
    client clients[4] = {0};
    tm_sched_opts so = small;
    so.queue_max = 2;
    world w;
    world_open(&w, &so, 256, true);
    w.clients = clients;
    tm_seq_opts o = {0};
    add_client(&w, 0, 5, 5, 0, &o);
    add_client(&w, 1, 5, 5, 0, &o);
    clients[2].n_prompt = 5;
    clients[2].max_tokens = 5;
    assert_int_equal(world_submit(&w, &clients[2], &o), TM_STATUS_BUSY);
    world_step(&w); /* both run now */
    assert_int_equal(world_submit(&w, &clients[2], &o), TM_OK);
    world_drain(&w);
    world_close(&w);
}

static void test_refusals(void **state)
{
    (void)state;
    world w;
    world_open(&w, &small, 100, true);
    client c = {.n_prompt = 101, .max_tokens = 0};
    tm_seq_opts o = {0};
    assert_int_equal(world_submit(&w, &c, &o), TM_STATUS_INVALID);
    c.n_prompt = 100;
    c.max_tokens = 1; /* no room for one more */
    assert_int_equal(world_submit(&w, &c, &o), TM_STATUS_INVALID);
    c.n_prompt = 0;
    assert_int_equal(world_submit(&w, &c, &o), TM_STATUS_INVALID);
    c.n_prompt = 10;
    c.max_tokens = -1;
    assert_int_equal(world_submit(&w, &c, &o), TM_STATUS_INVALID);
    c.max_tokens = 5;
    o.generated = c.prompt;
    o.generated_len = 6;
    assert_int_equal(world_submit(&w, &c, &o), TM_STATUS_INVALID);
    o.generated_len = 0;
    c.n_prompt = 100;
    c.max_tokens = 0;
    assert_int_equal(world_submit(&w, &c, &o), TM_OK);
    w.clients = &c;
    world_drain(&w);
    assert_true(c.finished);
    world_close(&w);
}

/* The pool holds two long sequences, not four: some are preempted, and all answers stay what they are. */
static void test_preemption(void **state)
{
    (void)state;
    client clients[4] = {0};
    tm_sched_opts so = small;
    so.n_blocks = 20;
    world w;
    world_open(&w, &so, 160, true);
    w.clients = clients;
    tm_seq_opts o = {.ignore_eos = true};
    for (int i = 0; i < 4; i++)
        add_client(&w, i, 16, 60, i * 9, &o);
    world_drain(&w);
    tm_sched_stats st;
    tm_sched_stats_get(w.s, &st);
    assert_true(st.preemptions > 0);
    for (int i = 1; i < 4; i++) /* the oldest is never the victim */
        assert_true(clients[0].finish_step <= clients[i].finish_step);
    world_close(&w);
}

static void test_priority(void **state)
{
    (void)state;
    client clients[4] = {0};
    tm_sched_opts so = small;
    so.max_seqs = 1;
    world w;
    world_open(&w, &so, 160, true);
    w.clients = clients;
    tm_seq_opts low = {.ignore_eos = true}, high = {.ignore_eos = true, .priority = 5};
    add_client(&w, 0, 16, 40, 0, &low);
    add_client(&w, 1, 16, 10, 9, &low);
    world_step(&w);
    world_step(&w);
    add_client(&w, 2, 16, 10, 18, &high); /* takes the only place from a lower priority */
    world_drain(&w);
    assert_true(clients[2].finish_step < clients[0].finish_step);
    assert_true(clients[0].finish_step < clients[1].finish_step);
    world_close(&w);
}

/* A stream of higher-priority requests cannot keep a lower one out for ever. */
static void test_no_starvation(void **state)
{
    (void)state;
    enum { N = 6000 };
    client *clients = calloc(N, sizeof(*clients));
    tm_sched_opts so = small;
    so.max_seqs = 1;
    world w;
    world_open(&w, &so, 160, true);
    w.clients = clients;
    tm_seq_opts low = {.ignore_eos = true}, high = {.ignore_eos = true, .priority = 2};
    add_client(&w, 0, 4, 2, 0, &high);
    client *victim = add_client(&w, 1, 4, 2, 0, &low);
    int i = 2;
    for (; i < N && !victim->finished; i++) {
        add_client(&w, i, 4, 2, i, &high);
        world_step(&w);
        world_step(&w);
    }
    assert_true(victim->finished);
    assert_true(w.step > TM_SCHED_AGE_STEPS); /* and priority did count */
    world_drain(&w);
    world_close(&w);
    free(clients);
}

/* Damaged plan buffers are refused; nothing is read outside. */
static void test_plan_checks(void **state)
{
    (void)state;
    client clients[3] = {0};
    world w;
    world_open(&w, &small, 256, true);
    w.clients = clients;
    tm_seq_opts o = {.ignore_eos = true};
    for (int i = 0; i < 3; i++)
        add_client(&w, i, 9 + i, 3, i, &o);
    tm_step step;
    tm_sched_plan(w.s, 1, &w.buf, &step);
    tm_batch b;
    tm_plan_kind kind;
    uint64_t number;
    size_t len = w.buf.len, words = len / sizeof(int32_t);
    assert_int_equal(tm_plan_parse(&w.buf, len, &kind, &number, &b, NULL), TM_OK);
    assert_int_equal(kind, TM_PLAN_STEP);
    tm_plan_pick(&w.buf);
    assert_int_equal(tm_plan_parse(&w.buf, len, &kind, &number, &b, NULL), TM_OK);
    assert_int_equal(kind, TM_PLAN_PICK);
    assert_int_equal(number, 1);
    for (size_t cut = 0; cut < len; cut += 4)
        assert_int_equal(tm_plan_parse(&w.buf, cut, &kind, &number, &b, NULL), TM_STATUS_INTERNAL);
    assert_int_equal(tm_plan_parse(&w.buf, w.buf.cap + 4, &kind, &number, &b, NULL),
                     TM_STATUS_INTERNAL);
    rng r = {rng_seed("plan_checks", 5)};
    int refused = 0;
    for (int i = 0; i < 20000; i++) {
        size_t at = (size_t)rng_below(&r, (int)words);
        int32_t old = w.buf.data[at];
        w.buf.data[at] = rng_below(&r, 2) ? (int32_t)rng_u64(&r) : old + rng_between(&r, -3, 3);
        tm_status st = tm_plan_parse(&w.buf, len, &kind, &number, &b, NULL);
        if (st == TM_OK && kind != TM_PLAN_STOP && kind != TM_PLAN_DRAIN)
            world_forward(&w, &b); /* whatever is accepted is safe to run (address sanitizer) */
        refused += st != TM_OK;
        w.buf.data[at] = old;
    }
    assert_true(refused > 5000);
    size_t at_tokens = (size_t)(b.tokens - w.buf.data);
    w.buf.picks = 0; /* nothing to refer to */
    w.buf.data[at_tokens] = TM_TOKEN_PICKED(0);
    assert_int_equal(tm_plan_parse(&w.buf, len, &kind, &number, &b, NULL), TM_STATUS_INTERNAL);
    w.buf.picks = 1;
    assert_int_equal(tm_plan_parse(&w.buf, len, &kind, &number, &b, NULL), TM_OK);
    for (int i = 0; i < 3; i++) {
        tm_sched_cancel(w.s, clients[i].seq);
        tm_seq_destroy(clients[i].seq);
    }
    world_close(&w);
}

/* ---- running ahead */

/* A prompt whose answer ends with a stop id after 3 to 8 tokens. */
static client *add_stopping_client(world *w, int index, tm_seq_opts *o)
{
    for (int first = 0; first < 2000; first++) {
        client *c = &w->clients[index];
        c->n_prompt = 5;
        c->max_tokens = 40;
        for (int i = 0; i < 5; i++)
            c->prompt[i] = (first / (i + 1) + i) % VOCAB;
        assert_int_equal(world_submit(w, c, o), TM_OK);
        if (c->n_expected >= 3 && c->n_expected <= 8)
            return c;
        tm_sched_cancel(w->s, c->seq);
        tm_seq_destroy(c->seq);
        memset(c, 0, sizeof(*c));
    }
    fail_msg("no prompt gives a short answer");
    return NULL;
}

/* The step behind the one that gave the stop id computes a row more. It is dropped, its block is free again, and with
 * blocks of one token the prefix tree holds every token that was computed but that one. */
static void test_stop_in_flight(void **state)
{
    (void)state;
    client clients[2] = {0};
    tm_sched_opts so = small;
    so.block_tokens = 1;
    world w;
    world_open(&w, &so, 64, true);
    w.clients = clients;
    w.ahead = true;
    tm_seq_opts o = {0};
    client *c = add_stopping_client(&w, 0, &o);
    while (!c->finished)
        assert_true(world_step(&w) > 0);
    assert_int_equal(w.n_pend, 1); /* the row for nothing */
    assert_int_equal(w.pend[0].step.n_tokens, 1);
    assert_null(w.pend[0].step.seqs[0].seq);
    tm_sched_stats st;
    tm_sched_stats_get(w.s, &st);
    assert_int_equal(st.blocks_used, 0);
    assert_int_equal(st.blocks_cached, c->n_prompt + c->n_expected - 1);
    /* The same and one token more, in the blocks that are left, while that step is in flight. */
    o.ignore_eos = true;
    memcpy(clients[1].prompt, c->prompt, sizeof(c->prompt));
    memcpy(clients[1].prompt + 5, c->expected, (size_t)c->n_expected * sizeof(int32_t));
    clients[1].n_prompt = 5 + c->n_expected;
    clients[1].max_tokens = 20;
    assert_int_equal(world_submit(&w, &clients[1], &o), TM_OK);
    assert_int_equal(world_step(&w), 1);
    assert_int_equal(world_step(&w), 1); /* all but the stop id is cached */
    world_drain(&w);
    assert_true(clients[1].finished);
    world_close(&w);
}

/* An end by length is foreseen: no row is computed for nothing. */
static void test_length_in_flight(void **state)
{
    (void)state;
    client clients[3] = {0};
    world w;
    world_open(&w, &small, 256, true);
    w.clients = clients;
    w.ahead = true;
    tm_seq_opts o = {.ignore_eos = true};
    for (int i = 0; i < 3; i++)
        add_client(&w, i, 10 + i, 1 + 4 * i, 20 * i, &o);
    int tokens = 0;
    for (int n; (n = world_step(&w)) > 0; tokens += n)
        sched_check(w.s);
    assert_int_equal(tokens, 10 + 11 + 12 + 0 + 4 + 8);
    world_close(&w);
}

/* Cancelled while two steps know it, and one that failed. */
static void test_leaving_in_flight(void **state)
{
    (void)state;
    client clients[2] = {0};
    world w;
    world_open(&w, &small, 256, true);
    w.clients = clients;
    w.ahead = true;
    tm_seq_opts o = {.ignore_eos = true};
    for (int i = 0; i < 2; i++)
        add_client(&w, i, 10, 20, 20 * i, &o);
    world_step(&w);
    tm_sched_advance(w.s, &w.pend[0].step);
    assert_true(world_begin_step(&w));
    tm_sched_cancel(w.s, clients[0].seq);
    tm_seq_destroy(clients[0].seq);
    for (int f = 0; f < 2; f++)
        assert_null(w.pend[f].step.seqs[0].seq);
    sched_check(w.s);
    w.pend[0].sampled[1] = TM_SAMPLED_FAILED;
    w.pend[0].sampled[0] = TM_SAMPLED_NONE;
    tm_step failing = w.pend[0].step;
    tm_sched_retire(w.s, &failing, w.pend[0].sampled);
    assert_true(failing.seqs[1].failed && failing.seqs[1].seq == clients[1].seq);
    assert_null(w.pend[1].step.seqs[1].seq);
    tm_seq_destroy(clients[1].seq);
    assert_null(tm_sched_any(w.s));
    w.pend[0] = w.pend[1];
    w.n_pend--;
    assert_int_equal(world_step(&w), 2);
    assert_int_equal(world_step(&w), 0);
    world_close(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_siblings_share),
        cmocka_unit_test(test_full_hit_computes_last_block),
        cmocka_unit_test(test_scoring_bypasses_cache),
        cmocka_unit_test(test_salt_separates),
        cmocka_unit_test(test_queue_bound),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_preemption),
        cmocka_unit_test(test_priority),
        cmocka_unit_test(test_no_starvation),
        cmocka_unit_test(test_plan_checks),
        cmocka_unit_test(test_stop_in_flight),
        cmocka_unit_test(test_length_in_flight),
        cmocka_unit_test(test_leaving_in_flight),
        cmocka_unit_test(test_random_schedules),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
