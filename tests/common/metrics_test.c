/* Metrics: the exposition text byte for byte, bounds on series, concurrent updates. */
#include "tests/common/test.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "common/metrics.h"

static const double g_buckets[] = {0.5, 1, 10};
static const tm_metric_desc g_counter = {
    "turbomesh_c_total", "Line\nbreak \\ \"q\"", TM_METRIC_COUNTER, {"route", "code"}, NULL, 0, 3};
static const tm_metric_desc g_gauge = {"turbomesh_g", "G", TM_METRIC_GAUGE, {NULL}, NULL, 0, 0};
static const tm_metric_desc g_histogram = {
    "turbomesh_h_seconds", "H", TM_METRIC_HISTOGRAM, {"m"}, g_buckets, TM_ARRAY_LEN(g_buckets), 2};

static tm_series *counter(tm_metrics *m, const char *route, const char *code)
{
    return tm_metrics_series(m, &g_counter, (const char *const[]){route, code});
}

static void renders(void **state)
{
    (void)state;
    tm_metrics *m = tm_metrics_create();
    tm_series_add(counter(m, "/a\"\\\n", "200"), 2);
    tm_series_add(counter(m, "/b", NULL), 1.5);
    tm_series *g = tm_metrics_series(m, &g_gauge, NULL);
    tm_series_set(g, 3);
    tm_series_add(g, -4);
    tm_series *h = tm_metrics_series(m, &g_histogram, (const char *const[]){"x"});
    static const double seen[] = {0.25, 0.5, 0.75, 100};
    for (size_t i = 0; i < 4; i++)
        tm_series_observe(h, seen[i]);
    tm_buf b;
    tm_buf_init(&b, 0);
    tm_metrics_render(m, &b);
    assert_string_equal(b.data, "# HELP turbomesh_c_total Line\\nbreak \\\\ \"q\"\n"
                                "# TYPE turbomesh_c_total counter\n"
                                "turbomesh_c_total{route=\"/a\\\"\\\\\\n\",code=\"200\"} 2\n"
                                "turbomesh_c_total{route=\"/b\",code=\"\"} 1.5\n"
                                "# HELP turbomesh_g G\n"
                                "# TYPE turbomesh_g gauge\n"
                                "turbomesh_g -1\n"
                                "# HELP turbomesh_h_seconds H\n"
                                "# TYPE turbomesh_h_seconds histogram\n"
                                "turbomesh_h_seconds_bucket{m=\"x\",le=\"0.5\"} 2\n"
                                "turbomesh_h_seconds_bucket{m=\"x\",le=\"1\"} 3\n"
                                "turbomesh_h_seconds_bucket{m=\"x\",le=\"10\"} 3\n"
                                "turbomesh_h_seconds_bucket{m=\"x\",le=\"+Inf\"} 4\n"
                                "turbomesh_h_seconds_sum{m=\"x\"} 101.5\n"
                                "turbomesh_h_seconds_count{m=\"x\"} 4\n");
    assert_int_equal(tm_series_count(h), 4);
    assert_true(tm_series_value(h) == 101.5);
    tm_buf_deinit(&b);
    tm_metrics_destroy(m);
    tm_metrics_destroy(NULL);
}

static void series_are_shared_and_bounded(void **state)
{
    (void)state;
    tm_metrics *m = tm_metrics_create();
    tm_series *a = counter(m, "a", "1");
    assert_ptr_equal(a, counter(m, "a", "1"));
    assert_ptr_not_equal(a, counter(m, "a", "2"));
    assert_ptr_not_equal(a, counter(m, "b", "1"));
    tm_series *other = counter(m, "c", "1");
    assert_ptr_equal(other, counter(m, "d", "9"));
    assert_ptr_equal(a, counter(m, "a", "1"));
    tm_series_add(other, 7);
    tm_buf b;
    tm_buf_init(&b, 0);
    tm_metrics_render(m, &b);
    assert_non_null(strstr(b.data, "{route=\"other\",code=\"other\"} 7\n"));
    tm_buf_deinit(&b);
    tm_metrics_destroy(m);
}

static void removal_makes_room(void **state)
{
    (void)state;
    tm_metrics *m = tm_metrics_create();
    tm_metrics_remove(m, &g_counter, 0, "nothing");
    tm_series_add(counter(m, "a", "1"), 1);
    tm_series_add(counter(m, "b", "1"), 2);
    tm_series_add(counter(m, "a", "2"), 3);
    tm_metrics_remove(m, &g_counter, 0, "a");
    tm_buf b;
    tm_buf_init(&b, 0);
    tm_metrics_render(m, &b);
    assert_null(strstr(b.data, "route=\"a\""));
    assert_non_null(strstr(b.data, "route=\"b\""));
    /* Reused memory starts at zero, and the list goes on behind what was kept. */
    assert_true(tm_series_value(counter(m, "x", "1")) == 0);
    assert_true(tm_series_value(counter(m, "y", "1")) == 0);
    tm_buf_clear(&b);
    tm_metrics_render(m, &b);
    assert_non_null(strstr(b.data, "route=\"b\",code=\"1\"} 2\n"));
    assert_non_null(strstr(b.data, "route=\"x\",code=\"1\"} 0\n"));
    assert_non_null(strstr(b.data, "route=\"y\",code=\"1\"} 0\n"));
    assert_null(strstr(b.data, "other"));
    tm_metrics_remove(m, &g_counter, 1, "1");
    tm_series_add(counter(m, "z", "1"), 1);
    tm_buf_clear(&b);
    tm_metrics_render(m, &b);
    assert_non_null(strstr(b.data, "route=\"z\",code=\"1\"} 1\n"));
    tm_buf_deinit(&b);
    tm_metrics_destroy(m);
}

static void bad_values_do_not_stick(void **state)
{
    (void)state;
    tm_metrics *m = tm_metrics_create();
    tm_series *c = counter(m, "a", "1");
    tm_series_add(c, 2);
    tm_series_add(c, -1);
    tm_series_add(c, NAN);
    tm_series_add(c, INFINITY);
    assert_true(tm_series_value(c) == 2);
    tm_series *h = tm_metrics_series(m, &g_histogram, (const char *const[]){"x"});
    tm_series_observe(h, NAN);
    assert_int_equal(tm_series_count(h), 0);
    for (int i = 1; i < TM_BUCKETS_LATENCY_S_COUNT; i++)
        assert_true(TM_BUCKETS_LATENCY_S[i] > TM_BUCKETS_LATENCY_S[i - 1]);
    tm_metrics_destroy(m);
}

static void *update(void *arg)
{
    tm_metrics *m = arg;
    for (int i = 0; i < 10000; i++) {
        tm_series_add(counter(m, "a", "1"), 1);
        tm_series_observe(tm_metrics_series(m, &g_histogram, (const char *const[]){"x"}), 1);
    }
    return NULL;
}

static void threads_lose_nothing(void **state)
{
    (void)state;
    tm_metrics *m = tm_metrics_create();
    pthread_t t[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&t[i], NULL, update, m);
    tm_buf b;
    tm_buf_init(&b, 0);
    for (int i = 0; i < 50; i++) {
        tm_buf_clear(&b);
        tm_metrics_render(m, &b);
    }
    for (int i = 0; i < 4; i++)
        pthread_join(t[i], NULL);
    assert_true(tm_series_value(counter(m, "a", "1")) == 40000);
    tm_series *h = tm_metrics_series(m, &g_histogram, (const char *const[]){"x"});
    assert_int_equal(tm_series_count(h), 40000);
    assert_true(tm_series_value(h) == 40000);
    tm_buf_deinit(&b);
    tm_metrics_destroy(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(renders),
        cmocka_unit_test(series_are_shared_and_bounded),
        cmocka_unit_test(removal_makes_room),
        cmocka_unit_test(bad_values_do_not_stick),
        cmocka_unit_test(threads_lose_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
