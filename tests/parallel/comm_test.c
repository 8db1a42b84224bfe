/* The communicator alone and as real groups under mpirun: results, idle cost, faults. */
#include <glob.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "common/clock.h"
#include "parallel/comm.h"
#include "tests/harness/rank_job.h"

static uint64_t g_seed;

static void test_local(void **state)
{
    (void)state;
    tm_comm *c = NULL;
    tm_err err = TM_ERR_INIT;
    assert_int_equal(tm_comm_create(&c, 1, NULL, &err), TM_OK);
    assert_string_equal(tm_comm_kind(c), "local");
    float x[3] = {1, 2, 3}, out[3] = {0};
    size_t len = 5;
    assert_int_equal(tm_comm_allreduce_f32(c, x, 3), TM_OK);
    assert_int_equal(tm_comm_gather_cols_f32(c, x, 1, 3, out), TM_OK);
    assert_memory_equal(x, out, sizeof(x));
    assert_int_equal(tm_comm_bcast(c, x, &len, sizeof(x)), TM_OK);
    assert_int_equal(len, 5);
    assert_int_equal(tm_comm_barrier(c), TM_OK);
    tm_status mine = TM_FAIL(&err, TM_STATUS_DATA, "bad");
    assert_int_equal(tm_comm_agree(c, mine, &err), TM_STATUS_DATA);
    assert_string_equal(err.msg, "bad");
    tm_comm_destroy(c);
}

static void test_bad_options(void **state)
{
    (void)state;
    tm_comm *c = NULL;
    tm_err err = TM_ERR_INIT;
    tm_comm_opts o = tm_comm_opts_default();
    assert_int_equal(tm_comm_create(&c, 2, &o, &err), TM_STATUS_CONFIG);
    assert_non_null(strstr(err.msg, "mpirun -n 2"));
    assert_int_equal(tm_comm_create(&c, 0, &o, &err), TM_STATUS_CONFIG);
    o.kind = "pigeon";
    assert_int_equal(tm_comm_create(&c, 1, &o, &err), TM_STATUS_CONFIG);
    assert_non_null(strstr(err.msg, "pigeon"));
    assert_null(c);
}

#ifdef TM_MPIRUN
static int group(const char *mode, const char *kind, int ranks, int tp, int64_t *ms)
{
    int64_t t0 = tm_clock_ms();
    int rc = rank_job(TM_MPIRUN, "comm_rank", ranks, 60, "%s %s %d %llu", mode, kind, tp,
                      (unsigned long long)g_seed);
    if (ms)
        *ms = tm_clock_ms() - t0;
    return rc;
}

static int leftovers(void)
{
    glob_t g;
    int rc = glob("/dev/shm/turbomesh-*", 0, NULL, &g);
    int n = rc == 0 ? (int)g.gl_pathc : 0;
    globfree(&g);
    return n;
}

static void test_collectives(void **state)
{
    (void)state;
    static const int sizes[] = {1, 2, 3, 4};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(group("collectives", "auto", sizes[i], sizes[i], NULL), 0);
        assert_int_equal(group("collectives", "mpi", sizes[i], sizes[i], NULL), 0);
    }
    assert_int_equal(leftovers(), 0);
}

static void test_mismatch(void **state)
{
    (void)state;
    assert_int_equal(group("mismatch", "auto", 2, 3, NULL), 0);
}

static void test_idle(void **state)
{
    (void)state;
    assert_int_equal(group("idle", "shm", 3, 3, NULL), 0);
    assert_int_equal(group("idle", "mpi", 3, 3, NULL), 0);
}

static void test_latency(void **state)
{
    (void)state;
    assert_int_equal(group("latency", "shm", 2, 2, NULL), 0);
    assert_int_equal(group("latency", "shm", 4, 4, NULL), 0);
    assert_int_equal(group("latency", "mpi", 2, 2, NULL), 0);
}

/* The exit code is that of the rank whose end mpirun saw first: the killed one or a survivor (69). */
static void test_kill(void **state)
{
    (void)state;
    static const char *const modes[] = {"kill", "kill_idle"};
    for (int i = 0; i < 2; i++) {
        int64_t ms = 0;
        int rc = group(modes[i], "shm", 3, 3, &ms);
        assert_true(rc == 69 || rc == 137);
        assert_true(ms < 30000); /* the ranks know in 50 ms; the rest is mpirun on a busy machine */
        assert_int_equal(leftovers(), 0);
    }
}

static void test_kill_mpi(void **state)
{
    (void)state;
    int64_t ms = 0;
    int rc = group("kill", "mpi", 2, 2, &ms);
    assert_true(rc == 69 || rc == 137);
    assert_true(ms < 30000);
}

static void test_stop(void **state)
{
    (void)state;
    assert_int_equal(group("stop", "shm", 3, 3, NULL), 69);
    assert_int_equal(group("stop", "mpi", 2, 2, NULL), 69);
}

static void test_abort(void **state)
{
    (void)state;
    assert_int_equal(group("abort", "shm", 2, 2, NULL), 7);
}
#endif

int main(void)
{
    const char *s = getenv("TM_SEED");
    g_seed = s ? strtoull(s, NULL, 10) : (uint64_t)tm_clock_ns();
    printf("seed %llu (TM_SEED repeats it)\n", (unsigned long long)g_seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_local),       cmocka_unit_test(test_bad_options),
#ifdef TM_MPIRUN
        cmocka_unit_test(test_collectives), cmocka_unit_test(test_mismatch),
        cmocka_unit_test(test_idle),        cmocka_unit_test(test_latency),
        cmocka_unit_test(test_kill),        cmocka_unit_test(test_kill_mpi),
        cmocka_unit_test(test_stop),        cmocka_unit_test(test_abort),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
