/* The engine on a device that chooses tokens itself, the largest or drawn ones, with steps that run ahead, by one rank and
 * by TM_RANKS (2): the same tokens and ends as when the host chooses them and every step is waited for, alone and in a
 * crowd that shares prefixes, is thrown out of a small pool, and loses requests on the way. A model of
 * TM_SHARED/testdata/families where it is there, for it is small; else demo-20m, on the emulator with less of everything. Then
 * demo-20m with all of 64 requests in one batch. TM_DTYPE: another one than float16.
 *
 * Run as `engine_device_test rank TP FULL` under mpirun it is one rank; its exit status says what came out. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/file.h"
#include "tests/engine/drive.h"
#include "tests/engine/rng.h"
#include "tests/harness/rank_job.h"

#define NO_DEVICE  77
#define CROWD_MAX  64
#define PROMPT_MAX 64

#ifdef TM_MPIRUN

typedef struct ask {
    int32_t prompt[PROMPT_MAX];
    tm_request r;
} ask;

static ask g_asks[CROWD_MAX];
static answer g_alone[CROWD_MAX], g_got[CROWD_MAX];
static int g_crowd, g_tokens;

/* FULL: a batch with all of the crowd in it, of a trained model; else a batch and a pool that are too small for them. */
static void choose_model(char *dir, size_t size, bool full)
{
    const char *root = getenv("TM_SHARED");
    char config[1100];
    snprintf(dir, size, "%s/testdata/families/llama3.1-rope", root ? root : "");
    snprintf(config, sizeof(config), "%s/config.json", dir);
    bool small = !full && root && tm_file_exists(config);
    if (!small)
        snprintf(dir, size, "models/demo-20m");
#ifdef TM_TEST_FEW
    bool few = !small;
#else
    bool few = false;
#endif
    g_crowd = few ? 3 : full ? CROWD_MAX : 10;
    g_tokens = few ? 6 : 32;
}

static const char *model_dtype(void)
{
    return getenv("TM_DTYPE") ? getenv("TM_DTYPE") : "auto";
}

/* Rounds to 8 digits, not to 11. */
static bool rough(void)
{
    return strcmp(model_dtype(), "bfloat16") == 0;
}

static tm_status open_engine(tm_engine **e, tm_comm *comm, bool full, tm_err *err)
{
    char dir[1024];
    tm_engine_opts o = tm_engine_opts_default();
    choose_model(dir, sizeof(dir), full);
    o.model.dir = dir;
    o.model.backend = "cuda";
    o.model.dtype = model_dtype();
    o.model.device.share = getenv("TM_SHARE_GPU") != NULL;
    o.model.block_tokens = 8;
    o.model.session_len = 96; /* as much as the pool holds */
    o.max_batch_size = full ? g_crowd : 4;
    o.max_prefill_token_num = full ? 512 : 32;
    o.cache_max_entry_count = 12 * (full ? g_crowd : 1); /* the largest request and little more */
    return tm_engine_open(e, &o, comm, err);
}

/* Every other request is greedy; the rest draw, one of two of them with penalties. */
static void draw_by(tm_sampling *p, int i)
{
    static const tm_logit_bias bias = {11, 1.5f};
    p->temperature = i % 2 ? 0.9f : 0.0f;
    p->seed = (uint64_t)i * 7919;
    if (i % 4 == 1) {
        p->top_p = 0.9f;
        p->min_tokens = 4;
    } else if (i % 4 == 3) {
        p->top_k = 30;
        p->repetition_penalty = 1.1f;
        p->presence_penalty = 0.3f;
        p->logit_bias = &bias;
        p->logit_bias_count = 1;
    }
}

static void make_asks(rng *r, int vocab)
{
    for (int i = 0; i < g_crowd; i++) {
        ask *a = &g_asks[i];
        int n = rng_between(r, 3, 50), family = rng_below(r, 2);
        for (int k = 0; k < n; k++)
            a->prompt[k] = (family * 911 + k * 37 + 5) % vocab;
        a->prompt[n - 1] = rng_below(r, vocab);
        a->r = (tm_request){.id = (uint64_t)i + 1,
                            .prompt = a->prompt,
                            .prompt_len = (size_t)n,
                            .max_tokens = rng_between(r, g_tokens / 2, g_tokens),
                            .sampling = tm_sampling_default()};
        a->r.sampling.ignore_eos = true;
        draw_by(&a->r.sampling, i);
    }
}

static void run_alone(tm_engine *e, tm_request r, answer *a)
{
    tm_err err = TM_ERR_INIT;
    if (drive_submit(e, &r, a, &err) != TM_OK)
        fail_msg("%s", err.msg);
    drive_all(e, &a, 1);
}

static void expect_same(const tm_request *r, const answer *got, const answer *want)
{
    for (int i = 0; i < want->n && i < got->n; i++)
        if (got->tokens[i] != want->tokens[i])
            fail_msg("request %d, token %d of %d: %d, expected %d", (int)r->id, i, want->n,
                     got->tokens[i], want->tokens[i]);
    assert_int_equal(got->n, want->n);
    assert_int_equal(got->finish, want->finish);
}

/* With more log-probabilities asked for than the device lists the host chooses, and every step is waited for. */
static void list_logprobs(tm_engine *e, tm_request r, const answer *host)
{
    enum { LISTED = 5 };
    static answer a;
    r.sampling.logprobs = LISTED;
    r.id = 101;
    run_alone(e, r, &a);
    assert_int_equal(a.n, host->n);
    assert_int_equal(a.tops, a.n * LISTED);
    assert_memory_equal(a.tokens, host->tokens, (size_t)a.n * sizeof(int32_t));
    for (int i = 0; i < a.n; i++)
        assert_true(a.logprobs[i] - host->logprobs[i] < 0.1f &&
                    host->logprobs[i] - a.logprobs[i] < 0.1f);
}

/* Some answers get a stop id in the middle; not where a minimum of tokens would keep it from being drawn before that. */
static void alone(tm_engine *e)
{
    static int32_t stops[CROWD_MAX];
    for (int i = 0; i < g_crowd; i++) {
        tm_request r = g_asks[i].r;
        r.sampling.logprobs = TM_SAMPLE_TOP_MAX + 1;
        r.id = 100;
        for (int k = 0; k < 2; k++) /* the second time with what the cache has of it, as later */
            run_alone(e, r, &g_alone[i]);
        assert_int_equal(g_alone[i].n, r.max_tokens);
        if (i < 4)
            list_logprobs(e, r, &g_alone[i]);
        if (i % 3 == 0 && r.sampling.min_tokens == 0) {
            answer *a = &g_alone[i];
            stops[i] = a->tokens[a->n / 2];
            g_asks[i].r.stop_ids = &stops[i];
            g_asks[i].r.stop_count = 1;
            for (a->n = 1; a->tokens[a->n - 1] != stops[i];)
                a->n++;
            a->finish = TM_FINISH_STOP;
        }
        run_alone(e, g_asks[i].r, &g_got[i]);
        expect_same(&g_asks[i].r, &g_got[i], &g_alone[i]);
    }
}

/* In nats. In a run of a cluster 750 of 110,032 answers parted by float16's rounding, at tokens up to 0.03 worse; by
 * bfloat16's 11 of 100, up to 0.44 (bench/results/h200.csv). A wrong token is worse by several. */
static float near_tie(void)
{
    return rough() ? 0.2f : 0.05f;
}

/* In a crowd a row is computed among others, and its last bits differ: where an answer leaves the path that it took
 * alone, the token must have been as good as the one it replaces, by the log-probabilities of the prompt that ends
 * there. */
static bool expect_as_good(tm_engine *e, const ask *a, const answer *got, const answer *want)
{
    static int32_t text[PROMPT_MAX + 64];
    static answer score[2];
    int at = 0, n = (int)a->r.prompt_len;
    while (at < got->n && at < want->n && got->tokens[at] == want->tokens[at])
        at++;
    if (at == got->n && (at == want->n || got->finish == TM_FINISH_CANCELLED))
        return true;
    assert_true(at < got->n && at < want->n);
    for (int k = 0; k < 2; k++) {
        memcpy(text, a->prompt, (size_t)n * sizeof(*text));
        memcpy(text + n, k ? want->tokens : got->tokens, (size_t)(at + 1) * sizeof(*text));
        tm_request r = {.id = 200,
                        .prompt = text,
                        .prompt_len = (size_t)(n + at + 1),
                        .sampling = tm_sampling_default()};
        r.sampling.prompt_logprobs = 0;
        run_alone(e, r, &score[k]);
    }
    float d = score[1].prompt_logprobs[n + at] - score[0].prompt_logprobs[n + at];
    printf("request %d leaves at token %d: %g\n", (int)a->r.id, at, (double)d);
    assert_true(d < near_tie());
    return false;
}

static void crowd(tm_engine *e, rng *r)
{
    answer *all[CROWD_MAX];
    tm_engine_stats st;
    for (int i = 0; i < g_crowd; i++) {
        all[i] = &g_got[i];
        assert_int_equal(drive_submit(e, &g_asks[i].r, &g_got[i], NULL), TM_OK);
        if (i % 4 == 3)
            tm_engine_cancel(e, (uint64_t)rng_between(r, 1, i + 1));
    }
    drive_all(e, all, g_crowd);
    int same = 0;
    for (int i = 0; i < g_crowd; i += 2) /* what is drawn may be anything then */
        same += expect_as_good(e, &g_asks[i], &g_got[i], &g_alone[i]);
    assert_true(same >= (g_crowd + 1) / 2 * (rough() ? 12 : 15) / 16);
    do
        tm_engine_stats_get(e, &st);
    while (st.step_age_ms > 0); /* what ran ahead is collected */
    assert_int_equal(st.running + st.waiting + st.blocks_used, 0);
    printf("%d requests: %d of %d greedy answers as alone, the others as good; %d steps, %d "
           "preemptions, %d tokens from the cache\n",
           g_crowd, same, (g_crowd + 1) / 2, (int)st.steps, (int)st.preemptions,
           (int)st.cached_tokens);
}

static struct {
    tm_engine *e;
    rng r;
} g;

/* What rank 0 does, as a test of its own: so a failure says where. */
static void test_rank0(void **state)
{
    (void)state;
    make_asks(&g.r, tm_engine_info_get(g.e)->model.vocab);
    alone(g.e);
    crowd(g.e, &g.r);
}

static int rank_main(int tp, bool full)
{
    tm_comm *comm = NULL;
    tm_err err = TM_ERR_INIT;
    tm_comm_opts co = tm_comm_opts_default();
    const struct CMUnitTest rank0[] = {cmocka_unit_test(test_rank0)};
    g.r.state = rng_seed("engine_device", 3);
    const tm_backend *b = tm_backend_find("cuda");
    tm_device *dev = NULL;
    const tm_device_opts last = {.index = tp - 1}; /* one device a rank */
    co.step_timeout_ms = 60000;
    if (!b || b->dev->open(&dev, &last, &err) != TM_OK)
        return NO_DEVICE;
    b->dev->close(dev);
    if (tm_comm_create(&comm, tp, &co, &err) != TM_OK)
        return 9;
    bool ok = open_engine(&g.e, comm, full, &err) == TM_OK;
    if (!ok)
        fprintf(stderr, "%s\n", err.msg);
    if (ok && tm_comm_rank(comm) > 0)
        ok = tm_engine_follow(g.e, &err) == TM_OK;
    else if (ok)
        ok = cmocka_run_group_tests(rank0, NULL, NULL) == 0;
    tm_engine_close(g.e);
    tm_comm_destroy(comm);
    return ok ? 0 : 9;
}

/* ---- the test ---- */

static void run_group(int tp, bool full)
{
    int rc = rank_job(TM_MPIRUN, NULL, tp, 500, "rank %d %d", tp, full);
    if (rc == NO_DEVICE) {
        printf("skipped: no device for each of %d ranks\n", tp);
        return;
    }
    assert_int_equal(rc, 0);
}

static void test_one_rank(void **state)
{
    (void)state;
    run_group(1, false);
}

static int ranks(void)
{
    const char *s = getenv("TM_RANKS");
    return s ? (int)strtol(s, NULL, 10) : 2;
}

static void test_ranks(void **state)
{
    (void)state;
    run_group(ranks(), false);
}

#ifndef TM_TEST_FEW /* 64 requests are too many for the emulator */
static void test_one_rank_full(void **state)
{
    (void)state;
    run_group(1, true);
}

static void test_ranks_full(void **state)
{
    (void)state;
    run_group(ranks(), true);
}
#endif
#else
static void test_one_rank(void **state)
{
    (void)state;
    printf("skipped: this build has no MPI\n");
}
#endif

int main(int argc, char **argv)
{
#ifdef TM_MPIRUN
    if (argc == 4 && strcmp(argv[1], "rank") == 0)
        return rank_main((int)strtol(argv[2], NULL, 10), argv[3][0] == '1');
#endif
    (void)argc;
    (void)argv;
    setenv("TM_EMU_SHARE", "1",
           0); /* the emulator's memory can then be opened by other processes */
    if (getenv("TM_TEST"))
        cmocka_set_test_filter(getenv("TM_TEST"));
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_rank),
#ifdef TM_MPIRUN
        cmocka_unit_test(test_ranks),
#ifndef TM_TEST_FEW
        cmocka_unit_test(test_one_rank_full),
        cmocka_unit_test(test_ranks_full),
#endif
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
