/* The engine of a group of several ranks around a fake model: followers, messages that are damaged, a rank that cannot
 * open or is lost, limits that fit one rank alone. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <pthread.h>
#include <string.h>

#include <cmocka.h>

#include "tests/engine/drive.h"
#include "tests/engine/engine_rig.h"
#include "tests/engine/fake.h"
#include "tests/engine/rng.h"

enum { CROWD = 24 };
static answer alone[CROWD], crowded[CROWD];
static ask asks[CROWD];

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_followers),
        cmocka_unit_test(test_follower_refuses_damage),
        cmocka_unit_test(test_one_rank_cannot_open),
        cmocka_unit_test(test_session_needs_room),
        cmocka_unit_test(test_lost_follower),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
