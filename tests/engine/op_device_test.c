/* The CPU device: options that are refused, memory and its limits, backends by name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/check.h"
#include "engine/backend/cpu/cpu.h"
#include "tests/engine/op_test.h"

static void backend_test(void **state)
{
    (void)state;
    int n = 0;
    const tm_backend *const *list = tm_backend_list(&n);
    assert_true(n >= 1);
    for (int i = 0; i < n; i++)
        assert_ptr_equal(tm_backend_find(list[i]->name), list[i]);
    assert_null(tm_backend_find("tpu"));
    assert_int_equal(tm_backend_find("cpu")->act_dtype, TM_DTYPE_F32);
    assert_int_equal(tm_dtype_size(TM_DTYPE_BF16), 2);
    assert_string_equal(tm_dtype_name(TM_DTYPE_F32), "float32");
}

static void open_refused_test(void **state)
{
    (void)state;
    static const tm_device_opts bad[] = {
        {.isa = "mmx"}, {.threads = -1, .isa = "ref"}, {.threads = 100000, .isa = "ref"}};
    for (size_t i = 0; i < TM_ARRAY_LEN(bad); i++) {
        tm_device *dev = (tm_device *)&bad; /* must stay as it is */
        tm_err err = TM_ERR_INIT;
        assert_int_equal(tm_backend_cpu.dev->open(&dev, &bad[i], &err), TM_STATUS_CONFIG);
        assert_ptr_equal(dev, &bad);
        assert_true(err.msg[0] != '\0');
    }
}

static void alloc_test(void **state)
{
    (void)state;
    static const size_t sizes[] = {0, 1, 63, 64, 4097, 3 << 20};
    tm_device *dev = op_device_open("auto", 0);
    assert_non_null(dev);
    assert_non_null(strstr(tm_backend_cpu.dev->describe(dev), "thread"));
    for (size_t i = 0; i < TM_ARRAY_LEN(sizes); i++) {
        void *p = NULL;
        assert_int_equal(tm_backend_cpu.dev->alloc(dev, sizes[i], &p, NULL), TM_OK);
        assert_int_equal((uintptr_t)p % 64, 0);
        char *copy = calloc(1, sizes[i] + 1);
        memset(copy, 7, sizes[i]);
        assert_int_equal(tm_backend_cpu.dev->upload(dev, p, copy, sizes[i]), TM_OK);
        memset(copy, 0, sizes[i]);
        assert_int_equal(tm_backend_cpu.dev->download(dev, copy, p, sizes[i]), TM_OK);
        for (size_t j = 0; j < sizes[i]; j++)
            assert_int_equal(copy[j], 7);
        free(copy);
        tm_backend_cpu.dev->free(dev, p);
    }
    tm_err err = TM_ERR_INIT;
    void *p = NULL;
    assert_int_equal(tm_backend_cpu.dev->alloc(dev, SIZE_MAX - 5, &p, &err), TM_STATUS_NO_MEMORY);
    assert_null(p);
    size_t left = 0;
    assert_int_equal(tm_backend_cpu.dev->mem_free(dev, &left, &err), TM_OK);
    assert_true(left > 0);
    assert_int_equal(tm_backend_cpu.dev->sync(dev), TM_OK);
    op_device_close(dev);
}

static void put(const char *root, const char *path, const char *text)
{
    char full[512];
    snprintf(full, sizeof full, "%s/%s", root, path);
    for (char *s = full + 1; (s = strchr(s, '/')) != NULL; s++) {
        *s = '\0';
        mkdir(full, 0700);
        *s = '/';
    }
    FILE *f = fopen(full, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* Rows build on one another: each writes a file and says what is free then. */
static const struct {
    const char *path, *text;
    size_t want_kib;
} g_limits[] = {
    {"proc/meminfo", "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    5000 kB\n", 5000},
    {"proc/self/cgroup", "0::/a/b\n", 5000},
    /* v2: no limit, then a limit above, then one below */
    {"cg/a/b/memory.max", "max\n", 5000},
    {"cg/a/memory.max", "4096000\n", 5000},
    {"cg/a/memory.current", "1024000\n", 3000},
    {"cg/a/memory.stat", "anon 5\ninactive_file 512000\n", 3500},
    {"cg/a/b/memory.max", "1024000\n", 3500},
    {"cg/a/b/memory.current", "2048000\n", 0}, /* over its limit */
    {"cg/a/b/memory.max", "3072000\n", 1000},
    {"cg/memory.max", "2048000\n", 1000}, /* a container's own root */
    {"cg/memory.current", "1536000\n", 500},
    /* v1 beside it */
    {"proc/self/cgroup", "3:cpu,memory:/x\n2:pids:/\n", 5000},
    {"cg/memory/x/memory.limit_in_bytes", "1024000\n", 5000},
    {"cg/memory/x/memory.usage_in_bytes", "204800\n", 800},
    {"cg/memory/memory.limit_in_bytes", "9223372036854771712\n", 800},
    {"cg/memory/memory.usage_in_bytes", "1\n", 800},
    {"cg/memory/x/memory.stat", "total_inactive_file 102400\n", 900},
};

static void limits_test(void **state)
{
    (void)state;
    char root[] = "/tmp/tm_device_test_XXXXXX", proc[64], cg[64], rm[64];
    assert_non_null(mkdtemp(root));
    snprintf(proc, sizeof proc, "%s/proc", root);
    snprintf(cg, sizeof cg, "%s/cg", root);
    size_t got = 77;
    tm_err err = TM_ERR_INIT;
    assert_int_equal(tm_cpu_mem_free(proc, cg, &got, &err), TM_STATUS_IO);
    assert_int_equal(got, 77);
    for (size_t i = 0; i < TM_ARRAY_LEN(g_limits); i++) {
        put(root, g_limits[i].path, g_limits[i].text);
        assert_int_equal(tm_cpu_mem_free(proc, cg, &got, &err), TM_OK);
        if (got != g_limits[i].want_kib * 1024)
            fail_msg("row %zu: %zu KiB free, expected %zu", i, got / 1024, g_limits[i].want_kib);
    }
    snprintf(rm, sizeof rm, "rm -r %s", root);
    assert_int_equal(system(rm), 0);
}

static void threads_test(void **state)
{
    (void)state;
    assert_true(tm_cpu_default_threads(1) >= 1);
    assert_int_equal(tm_cpu_default_threads(100000), 1);
    setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "3", 1);
    assert_int_equal(tm_cpu_local_ranks(), 3);
    setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "0", 1);
    assert_int_equal(tm_cpu_local_ranks(), 1);
    unsetenv("OMPI_COMM_WORLD_LOCAL_SIZE");
}

/* Buffers of all sizes live side by side, none overlaps, and freeing in another order is fine. */
static void regions_test(void **state)
{
    (void)state;
    enum { N = 40 };
    static const size_t sizes[] = {40 << 10, 100001, 1 << 20, 5000, (3 << 20) + 64, 40 << 20};
    tm_device *dev = op_device_open("ref", 1);
    char *p[N];
    for (int i = 0; i < N; i++) {
        void *q = NULL;
        size_t size = sizes[i % (int)TM_ARRAY_LEN(sizes)];
        assert_int_equal(tm_backend_cpu.dev->alloc(dev, size, &q, NULL), TM_OK);
        assert_int_equal((uintptr_t)q % 64, 0);
        p[i] = q;
        p[i][0] = p[i][size - 1] = (char)i;
    }
    for (int k = 0; k < N; k++) {
        int i = k * 7 % N;
        size_t size = sizes[i % (int)TM_ARRAY_LEN(sizes)];
        assert_int_equal(p[i][0], i);
        assert_int_equal(p[i][size - 1], i);
        tm_backend_cpu.dev->free(dev, p[i]);
    }
    tm_backend_cpu.dev->free(dev, NULL);
    assert_null(dev->regions);
    op_device_close(dev);
}

typedef struct loop {
    int threads, busy[8];
    atomic_int done[200];
    atomic_int wrong;
    int naps;
} loop;

static void loop_unit(void *arg, int thread, int unit)
{
    loop *l = arg;
    if (thread < 0 || thread >= l->threads || l->busy[thread]++ != 0)
        atomic_fetch_add(&l->wrong, 1);
    atomic_fetch_add(&l->done[unit], 1);
    if (l->naps && unit % 5 == 0)
        usleep(300);
    l->busy[thread]--;
}

/* Each unit runs once, on any thread, in thousands of loops with and without sleep between them. */
static void pool_test(void **state)
{
    (void)state;
    static const int threads[] = {1, 2, 3, 8};
    for (size_t i = 0; i < TM_ARRAY_LEN(threads); i++) {
        tm_device *dev = op_device_open("ref", threads[i]);
        static loop l;
        l = (loop){.threads = threads[i]};
        for (int round = 0; round < 2000; round++) {
            int units = round * 37 % 200;
            l.naps = round % 400 == 0;
            for (int u = 0; u < 200; u++)
                atomic_store(&l.done[u], 0);
            tm_cpu_run(dev, units, loop_unit, &l);
            for (int u = 0; u < 200; u++)
                assert_int_equal(atomic_load(&l.done[u]), u < units);
            if (round % 500 == 0)
                usleep(1000); /* longer than the workers watch */
        }
        assert_int_equal(atomic_load(&l.wrong), 0);
        op_device_close(dev);
    }
}

/* Processor time of an idle device: its workers sleep. */
static void pool_idle_test(void **state)
{
    (void)state;
    struct timespec a, b;
    static loop l = {.threads = 4};
    tm_device *dev = op_device_open("ref", 4);
    tm_cpu_run(dev, 100, loop_unit, &l);
    usleep(20000);
    assert_int_equal(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &a), 0);
    usleep(300000);
    assert_int_equal(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &b), 0);
    double used = (double)(b.tv_sec - a.tv_sec) + (double)(b.tv_nsec - a.tv_nsec) * 1e-9;
    assert_true(used < 0.02);
    op_device_close(dev);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(backend_test), cmocka_unit_test(open_refused_test),
        cmocka_unit_test(alloc_test),   cmocka_unit_test(limits_test),
        cmocka_unit_test(threads_test), cmocka_unit_test(regions_test),
        cmocka_unit_test(pool_test),    cmocka_unit_test(pool_idle_test),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
