/* The engine with the real model, models/demo-20m. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <math.h>
#include <string.h>

#include <cmocka.h>

#include "common/check.h"
#include "engine/backend/cpu/cpu.h"
#include "tests/engine/drive.h"
#include "tests/engine/rng.h"

static tm_comm *g_comm;
static tm_engine *g_engine;

/* "What is the capital of France?" in the model's chat template, and its greedy answer. */
static const int32_t france[] = {1,    320, 201, 367, 323, 271, 595, 281,
                                 2032, 33,  2,   201, 1,   321, 201};
static const int32_t paris[] = {480, 595, 281, 2032, 323, 3117, 16, 2};

/* The best path on which a sequence's results do not depend on what else is in the batch, to the last bit: with
 * matrix tiles few and many tokens are summed in different orders. */
static const char *bitwise_isa(void)
{
    return tm_cpu_isa_find("auto") == tm_cpu_isa_find("amx") ? "avx512" : "auto";
}

static int open_engine(void **state)
{
    (void)state;
    tm_err err = TM_ERR_INIT;
    tm_engine_opts o = tm_engine_opts_default();
    o.model.dir = "models/demo-20m";
    o.model.device.threads = 2;
    o.model.device.isa = bitwise_isa();
    o.max_batch_size = 20;
    o.max_prefill_token_num = 128;
    o.cache_bytes_max = (int64_t)64 << 20;
    if (tm_comm_create(&g_comm, 1, NULL, &err) != TM_OK ||
        tm_engine_open(&g_engine, &o, g_comm, &err) != TM_OK) {
        print_error("%s\n", err.msg);
        return -1;
    }
    return 0;
}

static int close_engine(void **state)
{
    (void)state;
    tm_engine_close(g_engine);
    tm_comm_destroy(g_comm);
    return 0;
}

static tm_request request(uint64_t id, const int32_t *prompt, size_t n, int max_tokens)
{
    tm_request r = {.id = id,
                    .prompt = prompt,
                    .prompt_len = n,
                    .max_tokens = max_tokens,
                    .sampling = tm_sampling_default()};
    r.sampling.temperature = 0.0f;
    return r;
}

static void run_one(tm_request *r, answer *a)
{
    tm_err err = TM_ERR_INIT;
    if (drive_submit(g_engine, r, a, &err) != TM_OK)
        fail_msg("%s", err.msg);
    drive_all(g_engine, &a, 1);
}

static void expect_paris(const answer *a)
{
    assert_int_equal(a->first_pos + a->n, TM_ARRAY_LEN(paris));
    assert_memory_equal(a->tokens, paris + a->first_pos, (size_t)a->n * sizeof(*paris));
    assert_int_equal(a->finish, TM_FINISH_STOP);
}

static void test_capital(void **state)
{
    (void)state;
    static answer a;
    tm_request r = request(1, france, TM_ARRAY_LEN(france), 50);
    r.sampling.logprobs = 3;
    run_one(&r, &a);
    expect_paris(&a);
    assert_int_equal(a.prompt_tokens, TM_ARRAY_LEN(france));
    assert_int_equal(a.tops, 3 * 8);
    assert_true(a.logprobs[5] > -0.02f && a.logprobs[5] < -0.002f); /* golden.json: -0.00936 */
    r.max_tokens = 3;
    run_one(&r, &a);
    assert_int_equal(a.n, 3);
    assert_int_equal(a.finish, TM_FINISH_LENGTH);
}

/* Sixteen requests of all kinds at once; the greedy one among them answers as if alone. */
static void test_mixed_batch(void **state)
{
    (void)state;
    enum { N = 16 };
    static answer a[N];
    answer *all[N];
    static int32_t prompts[N][300];
    rng r = {rng_seed("mixed_batch", 21)};
    for (int i = 0; i < N; i++) {
        int n = i % 4 == 0 ? (int)TM_ARRAY_LEN(france) : rng_between(&r, 1, 300);
        for (int k = 0; k < n; k++)
            prompts[i][k] = i % 4 == 0 ? france[k] : rng_below(&r, 8192);
        tm_request q = request((uint64_t)(100 + i), prompts[i], (size_t)n,
                               i % 4 == 0 ? 40 : rng_between(&r, 1, 40));
        if (i % 4) {
            q.sampling.temperature = 0.8f;
            q.sampling.top_k = i % 4 == 1 ? 40 : 0;
            q.sampling.top_p = i % 4 == 2 ? 0.9f : 1.0f;
            q.sampling.repetition_penalty = i % 4 == 3 ? 1.2f : 1.0f;
            q.sampling.seed = (uint64_t)i;
        }
        all[i] = &a[i];
        assert_int_equal(drive_submit(g_engine, &q, &a[i], NULL), TM_OK);
    }
    drive_all(g_engine, all, N);
    for (int i = 0; i < N; i += 4)
        expect_paris(&a[i]);
}

static void test_continuation(void **state)
{
    (void)state;
    static answer a;
    for (size_t split = 0; split <= TM_ARRAY_LEN(paris); split++) {
        tm_request r = request(200 + split, france, TM_ARRAY_LEN(france), 50);
        r.generated = paris;
        r.generated_len = split;
        run_one(&r, &a);
        expect_paris(&a);
    }
}

/* A sampled answer goes on with the same tokens wherever it was cut. */
static void test_sampled_continuation(void **state)
{
    (void)state;
    static answer whole, rest;
    tm_request r = request(300, france, TM_ARRAY_LEN(france), 40);
    r.sampling.temperature = 0.9f;
    r.sampling.top_p = 0.95f;
    r.sampling.presence_penalty = 0.3f;
    r.sampling.seed = 77;
    r.sampling.ignore_eos = true;
    run_one(&r, &whole);
    assert_int_equal(whole.n, 40);
    r.generated = whole.tokens;
    for (size_t split = 1; split < 40; split += 3) {
        r.id++;
        r.generated_len = split;
        run_one(&r, &rest);
        assert_int_equal(rest.n, 40 - (int)split);
        assert_memory_equal(rest.tokens, whole.tokens + split, (size_t)rest.n * sizeof(int32_t));
    }
}

/* Scoring a prompt in chunks gives what generating it gave, and is not disturbed by the cache. */
static void test_scoring(void **state)
{
    (void)state;
    static answer gen, score, last;
    static int32_t text[400];
    tm_request r = request(400, france, TM_ARRAY_LEN(france), 300);
    r.sampling.ignore_eos = true;
    r.sampling.logprobs = 0;
    run_one(&r, &gen);
    assert_int_equal(gen.n, 300);
    size_t n = TM_ARRAY_LEN(france);
    memcpy(text, france, sizeof(france));
    memcpy(text + n, gen.tokens, 300 * sizeof(*text));
    r = request(401, text, n + 300, 0);
    r.sampling.prompt_logprobs = 2;
    run_one(&r, &score);
    assert_int_equal(score.next_prompt_pos, n + 300);
    assert_int_equal(score.cached_tokens, 0);
    assert_int_equal(score.finish, TM_FINISH_LENGTH);
    for (int i = 0; i < 300; i++) /* a row's result does not depend on the rows beside it */
        if (score.prompt_logprobs[(int)n + i] != gen.logprobs[i])
            fail_msg("token %d: %.9g scored, %.9g generated", i,
                     (double)score.prompt_logprobs[(int)n + i], (double)gen.logprobs[i]);

    r = request(402, text, n + 300, 0);
    r.logits_last = 5;
    run_one(&r, &last);
    assert_int_equal(last.n_logits, 5);
    assert_int_equal(last.first_logits_pos, n + 295);
    assert_true(last.cached_tokens > 200); /* earlier positions may come from the cache */
}

static void test_prefix_cache(void **state)
{
    (void)state;
    static answer a, b;
    static int32_t prompt[200];
    for (int i = 0; i < 200; i++)
        prompt[i] = 300 + (i * 37) % 1000;
    tm_request r = request(500, prompt, 200, 5);
    run_one(&r, &a);
    assert_int_equal(a.cached_tokens, 0);
    r.id = 501;
    run_one(&r, &b);
    assert_int_equal(b.cached_tokens, 192);
    assert_int_equal(b.n, a.n);
    r.id = 502;
    r.cache_salt = 9;
    run_one(&r, &b);
    assert_int_equal(b.cached_tokens, 0);
}

enum { CROWD = 6, CROWD_TOKENS = 150 };

static tm_request crowd_request(int i, const int32_t *prompt)
{
    tm_request r = request((uint64_t)(600 + i), prompt, (size_t)(40 + 12 * i), CROWD_TOKENS);
    r.sampling.ignore_eos = true;
    r.sampling.logprobs = 0;
    if (i % 3 == 2) {
        r.sampling.temperature = 0.8f;
        r.sampling.top_p = 0.9f;
        r.sampling.seed = (uint64_t)i;
    }
    return r;
}

/* Six answers in a pool that holds three: sequences are thrown out and computed again, one is cancelled, and
 * the others are the same to the last bit of their log-probabilities. */
static void test_small_pool(void **state)
{
    (void)state;
    static answer roomy[CROWD], tight[CROWD];
    static int32_t prompt[CROWD][100];
    answer *all[CROWD];
    tm_engine *small;
    tm_engine_stats st;
    tm_err err = TM_ERR_INIT;
    tm_engine_opts o = tm_engine_opts_default();
    o.model.dir = "models/demo-20m";
    o.model.device.threads = 2;
    o.model.device.isa = bitwise_isa();
    o.cache_max_entry_count = 10;
    o.max_prefill_token_num = 96;
    if (tm_engine_open(&small, &o, g_comm, &err) != TM_OK)
        fail_msg("%s", err.msg);
    for (int i = 0; i < CROWD; i++) {
        for (int k = 0; k < 100; k++)
            prompt[i][k] = 300 + (i * 911 + k * 37) % 4000;
        tm_request r = crowd_request(i, prompt[i]);
        run_one(&r, &roomy[i]);
        all[i] = &tight[i];
    }
    for (int i = 0; i < CROWD; i++) {
        tm_request r = crowd_request(i, prompt[i]);
        assert_int_equal(drive_submit(small, &r, &tight[i], NULL), TM_OK);
    }
    tm_engine_cancel(small, 604);
    drive_all(small, all, CROWD);
    for (int i = 0; i < CROWD; i++) {
        size_t n = (size_t)tight[i].n;
        assert_int_equal(tight[i].finish, i == 4 ? TM_FINISH_CANCELLED : TM_FINISH_LENGTH);
        assert_true(i == 4 || n == CROWD_TOKENS);
        assert_memory_equal(tight[i].tokens, roomy[i].tokens, n * sizeof(int32_t));
        assert_memory_equal(tight[i].logprobs, roomy[i].logprobs, n * sizeof(float));
    }
    tm_engine_stats_get(small, &st);
    assert_true(st.preemptions > 0);
    assert_int_equal(st.blocks_used, 0);
    tm_engine_close(small);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_capital),      cmocka_unit_test(test_mixed_batch),
        cmocka_unit_test(test_continuation), cmocka_unit_test(test_sampled_continuation),
        cmocka_unit_test(test_scoring),      cmocka_unit_test(test_prefix_cache),
        cmocka_unit_test(test_small_pool),
    };
    return cmocka_run_group_tests(tests, open_engine, close_engine);
}
