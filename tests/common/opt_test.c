/* Option tables: every type at its edges, precedence, names, help. */
#include "tests/common/test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/opt.h"

typedef struct opts {
    bool fast, slow;
    int64_t batch, size, wait;
    double share;
    const char *name, *nothing;
    int policy;
} opts;

static const tm_opt_row g_rows[] = {
    {"fast", NULL, TM_OPT_BOOL, offsetof(opts, fast), NULL, 0, 0, NULL, "Goes fast."},
    {"slow", NULL, TM_OPT_BOOL, offsetof(opts, slow), "true", 0, 0, NULL, "Goes slowly."},
    {"max-batch-size", "max-num-seqs,batch", TM_OPT_INT, offsetof(opts, batch), "8", 1, 4096, NULL,
     "Sequences at once."},
    {"cache-size", NULL, TM_OPT_SIZE, offsetof(opts, size), "1MiB", 0, 0, NULL, "Bytes."},
    {"wait", NULL, TM_OPT_TIME, offsetof(opts, wait), "2s", 0, 60000, NULL, "Longest wait."},
    {"share", NULL, TM_OPT_NUM, offsetof(opts, share), "0.5", 0, 1, NULL, "Part | whole."},
    {"name", NULL, TM_OPT_STR, offsetof(opts, name), "demo", 0, 0, NULL, "Its name."},
    {"nothing", NULL, TM_OPT_STR, offsetof(opts, nothing), NULL, 0, 0, NULL, "No default."},
    {"policy", NULL, TM_OPT_ENUM, offsetof(opts, policy), "least-load", 0, 0, "cost,least-load,rr",
     "How to choose."},
};
static const tm_opt_table g_table = {"prog", "prog [options]",     "About it.",
                                     g_rows, TM_ARRAY_LEN(g_rows), 2};

static tm_err g_err;
static const char *g_words[2];
static int g_word_count;
static bool g_help;

static tm_status parse(opts *o, int argc, const char *const *args)
{
    char *argv[20] = {(char *)(uintptr_t) "prog"};
    for (int i = 0; i < argc; i++)
        argv[i + 1] = (char *)(uintptr_t)args[i];
    g_err = (tm_err)TM_ERR_INIT;
    g_word_count = -1;
    return tm_opt_parse(&g_table, argc + 1, argv, o, g_words, &g_word_count, &g_help, &g_err);
}

#define PARSE(o, ...)                                                                              \
    parse((o), (int)TM_ARRAY_LEN(((const char *const[]){__VA_ARGS__})),                            \
          (const char *const[]){__VA_ARGS__})

static void defaults(void **state)
{
    (void)state;
    opts o;
    memset(&o, 0x5a, sizeof o);
    assert_int_equal(parse(&o, 0, NULL), TM_OK);
    assert_false(o.fast);
    assert_true(o.slow);
    assert_int_equal(o.batch, 8);
    assert_int_equal(o.size, 1 << 20);
    assert_int_equal(o.wait, 2000);
    assert_true(o.share == 0.5);
    assert_string_equal(o.name, "demo");
    assert_null(o.nothing);
    assert_int_equal(o.policy, 1);
    assert_int_equal(g_word_count, 0);
    assert_false(g_help);
    memset(&o, 0, sizeof o);
    assert_int_equal(tm_opt_defaults(&g_table, &o, NULL), TM_OK);
    assert_int_equal(o.batch, 8);
}

static void flags(void **state)
{
    (void)state;
    opts o;
    assert_int_equal(PARSE(&o, "--fast", "--no-slow", "--max_batch_size=12", "model", "--wait",
                           "500ms", "--policy", "least_load", "--name", "-x", "--", "--rest"),
                     TM_OK);
    assert_true(o.fast);
    assert_false(o.slow);
    assert_int_equal(o.batch, 12);
    assert_int_equal(o.wait, 500);
    assert_int_equal(o.policy, 1);
    assert_string_equal(o.name, "-x");
    assert_int_equal(g_word_count, 2);
    assert_string_equal(g_words[0], "model");
    assert_string_equal(g_words[1], "--rest");
    assert_int_equal(PARSE(&o, "--batch", "3", "--max-num-seqs=4"), TM_OK);
    assert_int_equal(o.batch, 4); /* the last one wins */
    assert_int_equal(PARSE(&o, "--fast=False", "--slow=TRUE"), TM_OK);
    assert_false(o.fast);
    assert_true(o.slow);
    assert_int_equal(PARSE(&o, "--name=", "-"), TM_OK);
    assert_string_equal(o.name, "");
    assert_string_equal(g_words[0], "-");
}

static void refusals(void **state)
{
    (void)state;
    opts o;
    static const char *const rows[][3] = {
        {"--max-bach-size=3", NULL, "did you mean --max-batch-size"},
        {"--zzzzzzzz", NULL, "unknown option --zzzzzzzz, see --help"},
        {"-q", NULL, "unknown option -q"},
        {"--wait", NULL, "--wait needs a value"},
        {"--wait", "--fast", "--wait needs a value"},
        {"--no-wait", NULL, "unknown option --no-wait"},
        {"--no-fast=true", NULL, "takes no value"},
        {"--fast=maybe", NULL, "expected true or false"},
        {"--policy=best", NULL, "expected one of cost,least-load,rr"},
        {"--policy=", NULL, "expected one of"},
        {"--policy=cost,rr", NULL, "expected one of"},
        {"--max-batch-size=0", NULL, "must be from 1 to 4096"},
        {"--max-batch-size=4097", NULL, "must be from 1 to 4096"},
        {"--max-batch-size=-1", NULL, "must be from 1 to 4096"},
        {"--wait=61s", NULL, "60000 milliseconds"},
        {"--share=1.01", NULL, "must be from 0 to 1"},
        {"--=3", NULL, "unknown option --"},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        tm_status st = parse(&o, rows[i][1] ? 2 : 1, rows[i]);
        if (st != TM_STATUS_INVALID || !strstr(g_err.msg, rows[i][2]))
            fail_msg("%s: %d %s", rows[i][0], st, g_err.msg);
    }
    assert_int_equal(PARSE(&o, "a", "b", "c"), TM_STATUS_INVALID);
    assert_non_null(strstr(g_err.msg, "unexpected argument \"c\""));
}

static void numbers(void **state)
{
    (void)state;
    opts o;
    static const struct {
        const char *arg;
        int64_t size; /* -1 = refused */
    } rows[] = {
        {"--cache-size=0", 0},
        {"--cache-size=8k", 8000},
        {"--cache-size=32K", 32000},
        {"--cache-size=2GiB", INT64_C(2) << 30},
        {"--cache-size=2Gi", INT64_C(2) << 30},
        {"--cache-size=1.5KiB", 1536},
        {"--cache-size=3MB", 3000000},
        {"--cache-size=7B", 7},
        {"--cache-size=9223372036854775807", INT64_MAX},
        {"--cache-size=9223372036854775808", -1},
        {"--cache-size=8388608TiB", -1},
        {"--cache-size=0.3", -1},
        {"--cache-size=1.5", -1},
        {"--cache-size=0x10", -1},
        {"--cache-size= 1", -1},
        {"--cache-size=1 ", -1},
        {"--cache-size=1 k", -1},
        {"--cache-size=k", -1},
        {"--cache-size=", -1},
        {"--cache-size=1.k", -1},
        {"--cache-size=.5k", -1},
        {"--cache-size=inf", -1},
        {"--cache-size=nan", -1},
        {"--cache-size=1e3", -1},
        {"--cache-size=1kk", -1},
        {"--cache-size=1gib", -1},
        {"--cache-size=+5", 5},
        {"--cache-size=1,5", -1},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        tm_status st = PARSE(&o, rows[i].arg);
        if (st != (rows[i].size < 0 ? TM_STATUS_INVALID : TM_OK))
            fail_msg("%s: %d %s", rows[i].arg, st, g_err.msg);
        if (st == TM_OK)
            assert_true(o.size == rows[i].size);
    }
    assert_int_equal(PARSE(&o, "--batch=2k"), TM_OK);
    assert_int_equal(o.batch, 2000);
    assert_int_equal(PARSE(&o, "--batch=2Ki"), TM_OK);
    assert_int_equal(o.batch, 2048);
    assert_int_equal(PARSE(&o, "--batch=2KiB"), TM_STATUS_INVALID);
}

static void times_and_reals(void **state)
{
    (void)state;
    opts o;
    static const struct {
        const char *arg;
        int64_t ms;
    } rows[] = {
        {"--wait=0", 0},        {"--wait=5", 5000},    {"--wait=0.5", 500},   {"--wait=1m", 60000},
        {"--wait=1min", 60000}, {"--wait=250ms", 250}, {"--wait=1.5s", 1500}, {"--wait=0.5ms", -1},
        {"--wait=1M", -1},      {"--wait=1sec", -1},   {"--wait=-1", -1},     {"--wait=1h", -1},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        tm_status st = PARSE(&o, rows[i].arg);
        if (st != (rows[i].ms < 0 ? TM_STATUS_INVALID : TM_OK))
            fail_msg("%s: %d %s", rows[i].arg, st, g_err.msg);
        if (st == TM_OK)
            assert_int_equal(o.wait, rows[i].ms);
    }
    assert_int_equal(PARSE(&o, "--share=0.25"), TM_OK);
    assert_true(o.share == 0.25);
    assert_int_equal(PARSE(&o, "--share=25e-2"), TM_OK);
    assert_true(fabs(o.share - 0.25) < 1e-15);
    static const char *const bad[] = {"--share=nan", "--share=inf", "--share=0.5x",
                                      "--share=1e",  "--share=e1",  "--share=1e999",
                                      "--share=0,5", "--share=-0.1"};
    for (size_t i = 0; i < TM_ARRAY_LEN(bad); i++)
        assert_int_equal(PARSE(&o, bad[i]), TM_STATUS_INVALID);
}

static void environment(void **state)
{
    (void)state;
    opts o;
    setenv("TURBOMESH_MAX_BATCH_SIZE", "77", 1);
    setenv("TURBOMESH_SLOW", "", 1);
    setenv("TURBOMESH_FAST", "on", 1);
    assert_int_equal(parse(&o, 0, NULL), TM_OK);
    assert_int_equal(o.batch, 77);
    assert_true(o.slow);
    assert_true(o.fast);
    assert_int_equal(PARSE(&o, "--batch=5", "--no-fast"), TM_OK);
    assert_int_equal(o.batch, 5);
    assert_false(o.fast);
    setenv("TURBOMESH_MAX_BATCH_SIZE", "many", 1);
    assert_int_equal(parse(&o, 0, NULL), TM_STATUS_CONFIG);
    assert_non_null(strstr(g_err.msg, "TURBOMESH_MAX_BATCH_SIZE"));
    /* Help works even then. */
    assert_int_equal(PARSE(&o, "--help"), TM_OK);
    assert_true(g_help);
    assert_int_equal(PARSE(&o, "--nonsense", "-h"), TM_OK);
    assert_true(g_help);
    unsetenv("TURBOMESH_MAX_BATCH_SIZE");
    unsetenv("TURBOMESH_SLOW");
    unsetenv("TURBOMESH_FAST");
    assert_int_equal(PARSE(&o, "--", "-h"), TM_OK);
    assert_false(g_help);
}

static void texts_name_every_row(void **state)
{
    (void)state;
    tm_buf b;
    tm_buf_init(&b, 0);
    tm_opt_help(&g_table, &b);
    for (size_t i = 0; i < TM_ARRAY_LEN(g_rows); i++) {
        char flag[80];
        snprintf(flag, sizeof flag, "--%s", g_rows[i].name);
        assert_non_null(strstr(b.data, flag));
    }
    assert_non_null(strstr(b.data, "Sequences at once. Default: 8."));
    for (char *save, *l = strtok_r(b.data, "\n", &save); l; l = strtok_r(NULL, "\n", &save))
        assert_true(strlen(l) <= 80);
    tm_buf_clear(&b);
    tm_opt_markdown(&g_table, &b);
    assert_non_null(strstr(b.data, "| `--max-batch-size`, `--max-num-seqs`, `--batch` | "
                                   "`TURBOMESH_MAX_BATCH_SIZE` | N, 1 to 4096 | `8` | Sequences at "
                                   "once. |\n"));
    assert_non_null(strstr(b.data, "Part \\| whole."));
    tm_buf_deinit(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults),
        cmocka_unit_test(flags),
        cmocka_unit_test(refusals),
        cmocka_unit_test(numbers),
        cmocka_unit_test(times_and_reals),
        cmocka_unit_test(environment),
        cmocka_unit_test(texts_name_every_row),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
