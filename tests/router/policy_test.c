/* Balancing policies on invented clusters: what each promises, seeded where it draws. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/hash.h"
#include "router/dispatch.h"
#include "router/policy/policy.h"

#define GROUPS_MAX 16

static uint64_t g_seed;

static int seed(void **state)
{
    (void)state;
    g_seed = getenv("TM_SEED") ? strtoull(getenv("TM_SEED"), NULL, 10) : (uint64_t)tm_clock_ns();
    printf("TM_SEED=%llu\n", (unsigned long long)g_seed);
    return 0;
}

static void cluster(tm_candidate *c, int n)
{
    memset(c, 0, (size_t)n * sizeof *c);
    for (int i = 0; i < n; i++) {
        char name[16];
        snprintf(name, sizeof name, "group-%d", i);
        c[i] = (tm_candidate){.key = tm_hash64(name, strlen(name), 1),
                              .capacity = 64,
                              .known = true,
                              .prefill_tps = 10000,
                              .step_s = 0.02};
    }
}

static tm_balancer balancer(int kind)
{
    tm_balancer b;
    tm_balancer_init(&b, tm_policy_at(kind), g_seed);
    return b;
}

static const tm_pick_request g_plain = {.prompt_tokens = 500, .max_tokens = 200};

static void table(void **state)
{
    (void)state;
    static const char *const names[] = {
        [TM_POLICY_COST] = "cost",
        [TM_POLICY_SESSION] = "session",
        [TM_POLICY_LEAST_LOAD] = "least_load",
        [TM_POLICY_ROUND_ROBIN] = "round_robin",
    };
    for (int i = 0; i < (int)TM_ARRAY_LEN(names); i++)
        assert_string_equal(tm_policy_at(i)->name, names[i]);
    assert_null(tm_policy_at(-1));
    assert_null(tm_policy_at(TM_ARRAY_LEN(names)));
    tm_candidate c[1];
    cluster(c, 1);
    for (int i = 0; i < (int)TM_ARRAY_LEN(names); i++) {
        tm_balancer b = balancer(i);
        tm_pick p = tm_balancer_pick(&b, &g_plain, c, 1);
        assert_int_equal(p.index, 0);
        assert_string_equal(p.reason, "only");
    }
}

static void round_robin(void **state)
{
    (void)state;
    tm_candidate c[3];
    cluster(c, 3);
    tm_balancer b = balancer(TM_POLICY_ROUND_ROBIN);
    int first = tm_balancer_pick(&b, &g_plain, c, 3).index;
    for (int i = 1; i < 30; i++)
        assert_int_equal(tm_balancer_pick(&b, &g_plain, c, 3).index, (first + i) % 3);
}

static void least_load(void **state)
{
    (void)state;
    tm_candidate c[4];
    cluster(c, 4);
    tm_balancer b = balancer(TM_POLICY_LEAST_LOAD);
    c[0].in_flight = 5;
    c[1].in_flight = 30;
    c[1].capacity = 640; /* larger: the smallest share */
    c[2].in_flight = 6;
    c[3].in_flight = 7;
    assert_int_equal(tm_balancer_pick(&b, &g_plain, c, 4).index, 1);
    /* Filling up stays level. */
    cluster(c, 4);
    for (int i = 0; i < 400; i++)
        c[tm_balancer_pick(&b, &g_plain, c, 4).index].in_flight++;
    for (int i = 0; i < 4; i++)
        assert_int_equal(c[i].in_flight, 100);
    /* Equal ones are drawn: nobody is always first. */
    int first[4] = {0};
    cluster(c, 4);
    for (int i = 0; i < 4000; i++)
        first[tm_balancer_pick(&b, &g_plain, c, 4).index]++;
    for (int i = 0; i < 4; i++)
        assert_in_range(first[i], 800, 1200);
}

/* ---- session ---- */

static int home_of(tm_balancer *b, const tm_candidate *c, int n, const char *session)
{
    tm_pick_request r = g_plain;
    r.session = session;
    tm_pick p = tm_balancer_pick(b, &r, c, n);
    assert_string_equal(p.reason, "home");
    return p.index;
}

static void session(void **state)
{
    (void)state;
    tm_candidate c[GROUPS_MAX], fewer[GROUPS_MAX];
    int homes[1000], count[8] = {0};
    char name[32];
    tm_balancer b = balancer(TM_POLICY_SESSION), other = balancer(TM_POLICY_SESSION);
    other.rng += 12345; /* another router */
    cluster(c, 8);
    for (int i = 0; i < 1000; i++) {
        snprintf(name, sizeof name, "session-%d", i);
        homes[i] = home_of(&b, c, 8, name);
        count[homes[i]]++;
        assert_int_equal(home_of(&other, c, 8, name), homes[i]);
        assert_int_equal(home_of(&b, c, 8, name), homes[i]);
    }
    for (int i = 0; i < 8; i++)
        assert_in_range(count[i], 85, 170);
    /* A group leaves: only its own sessions move. */
    memcpy(fewer, c, 3 * sizeof *c);
    memcpy(fewer + 3, c + 4, 4 * sizeof *c);
    for (int i = 0; i < 1000; i++) {
        snprintf(name, sizeof name, "session-%d", i);
        int now = home_of(&b, fewer, 7, name);
        if (homes[i] != 3)
            assert_true(fewer[now].key == c[homes[i]].key);
    }
}

static void session_bounded(void **state)
{
    (void)state;
    tm_candidate c[4];
    cluster(c, 4);
    tm_balancer b = balancer(TM_POLICY_SESSION);
    tm_pick_request r = g_plain;
    r.session = "the only customer";
    int home = home_of(&b, c, 4, r.session), overflow = 0;
    for (int i = 0; i < 200; i++) {
        tm_pick p = tm_balancer_pick(&b, &r, c, 4);
        c[p.index].in_flight++;
        overflow += strcmp(p.reason, "overflow") == 0;
    }
    /* 1.25 times the mean and the one that comes. */
    assert_in_range(c[home].in_flight, 60, 64);
    assert_true(overflow > 100);
    for (int i = 0; i < 4; i++)
        assert_true(c[i].in_flight <= 64);
    /* Without a session it is the load that counts. */
    r.session = NULL;
    int least = 0;
    for (int i = 1; i < 4; i++)
        if (c[i].in_flight < c[least].in_flight)
            least = i;
    assert_int_equal(c[tm_balancer_pick(&b, &r, c, 4).index].in_flight, c[least].in_flight);
}

/* ---- cost ---- */

static void cost_terms(void **state)
{
    (void)state;
    static const struct {
        const char *what;
        tm_candidate worse;
    } rows[] = {
        {"tokens wait", {.waiting_tokens = 20000}},
        {"tokens sent and not yet reported", {.unacked_tokens = 20000}},
        {"runs more", {.running = 60}},
        {"sent more", {.unacked = 60}},
        {"a full cache", {.kv_use = 0.9}},
    };
    tm_candidate c[2];
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++)
        for (int bad = 0; bad < 2; bad++) {
            cluster(c, 2);
            tm_balancer b = balancer(TM_POLICY_COST);
            const tm_candidate *w = &rows[i].worse;
            c[bad].waiting_tokens = w->waiting_tokens;
            c[bad].unacked_tokens = w->unacked_tokens;
            c[bad].running = w->running;
            c[bad].step_s *= w->running > 0 ? 2 : 1;
            c[bad].unacked = w->unacked;
            c[bad].kv_use = w->kv_use;
            tm_pick p = tm_balancer_pick(&b, &g_plain, c, 2);
            if (p.index == bad)
                fail_msg("%s, and was picked", rows[i].what);
            assert_string_equal(p.reason, "best");
        }
    /* The faster of two idle ones. */
    cluster(c, 2);
    c[1].prefill_tps = 40000;
    tm_balancer b = balancer(TM_POLICY_COST);
    const tm_pick_request big = {.prompt_tokens = 20000, .max_tokens = 10};
    assert_int_equal(tm_balancer_pick(&b, &big, c, 2).index, 1);
}

static void cost_ties_and_unknown(void **state)
{
    (void)state;
    tm_candidate c[4];
    int first[4] = {0};
    tm_balancer b = balancer(TM_POLICY_COST);
    cluster(c, 4);
    for (int i = 0; i < 4000; i++) {
        tm_pick p = tm_balancer_pick(&b, &g_plain, c, 4);
        assert_string_equal(p.reason, "tie");
        first[p.index]++;
    }
    for (int i = 0; i < 4; i++)
        assert_in_range(first[i], 800, 1200);
    /* What is not known is not taken for zero: the new group does not get everything. */
    for (int i = 0; i < 4; i++)
        first[i] = c[i].in_flight = 0;
    c[2].known = false;
    c[2].prefill_tps = 0;
    for (int i = 0; i < 400; i++) {
        tm_pick p = tm_balancer_pick(&b, &g_plain, c, 4);
        assert_string_equal(p.reason, "unknown");
        c[p.index].in_flight++;
    }
    for (int i = 0; i < 4; i++)
        assert_in_range(c[i].in_flight, 85, 115);
}

/* A burst between two reports does not pile up on the group that was best when it began. */
static void cost_burst(void **state)
{
    (void)state;
    tm_candidate c[4];
    tm_balancer b = balancer(TM_POLICY_COST);
    cluster(c, 4);
    for (int i = 0; i < 200; i++) {
        int k = tm_balancer_pick(&b, &g_plain, c, 4).index;
        c[k].unacked++;
        c[k].unacked_tokens += (double)g_plain.prompt_tokens;
    }
    for (int i = 0; i < 4; i++)
        assert_in_range(c[i].unacked, 45, 55);
}

static void cost_learns_lengths(void **state)
{
    (void)state;
    tm_balancer b = balancer(TM_POLICY_COST);
    for (int i = 0; i < 1000; i++)
        tm_balancer_complete(&b, 40);
    assert_true(b.expected_out > 39 && b.expected_out < 41);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(table),
        cmocka_unit_test(round_robin),
        cmocka_unit_test(least_load),
        cmocka_unit_test(session),
        cmocka_unit_test(session_bounded),
        cmocka_unit_test(cost_terms),
        cmocka_unit_test(cost_ties_and_unknown),
        cmocka_unit_test(cost_burst),
        cmocka_unit_test(cost_learns_lengths),
    };
    return cmocka_run_group_tests(tests, seed, NULL);
}
