/* The sampler against a double-precision reference that sorts, and against expected frequencies. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <math.h>
#include <string.h>

#include <cmocka.h>

#include "common/check.h"
#include "engine/sample/mass.h"
#include "engine/sample/philox.h"
#include "engine/sample/row.h"
#include "engine/sample/sampler.h"
#include "tests/engine/rng.h"

/* Known answers of Random123's kat_vectors. */
static void test_philox(void **state)
{
    (void)state;
    static const struct {
        uint32_t counter[4], key[2], out[4];
    } kat[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(kat); i++) {
        uint32_t out[4];
        tm_philox4x32(kat[i].counter, kat[i].key, out);
        assert_memory_equal(out, kat[i].out, sizeof(out));
    }
}

static void test_exp(void **state)
{
    (void)state;
    double worst = 0.0;
    for (double x = 0.0; x > -87.0; x -= 0.00137) {
        double want = exp((double)(float)x);
        worst = fmax(worst, fabs((double)tm_row_exp((float)x) - want) / want);
    }
    assert_true(worst < 3e-7);
    assert_true(tm_row_exp(0.0f) == 1.0f);
    assert_true(tm_row_exp(-88.0f) == 0.0f && tm_row_exp(-INFINITY) == 0.0f);
    assert_true(tm_row_exp(NAN) == 0.0f);
}

#if defined(__x86_64__)
#define TM_SAMPLE_AVX2
#endif
#include "engine/sample/row_ops.h"

/* Every register width gives the same bits. */
static void test_widths(void **state)
{
    (void)state;
#ifdef TM_SAMPLE_AVX2
    if (!__builtin_cpu_supports("avx2"))
        skip();
    rng r = {rng_seed("widths", 8)};
    enum { N = 1000 };
    float x[N], wa[N], wb[N], ma[N], mb[N];
    uint64_t sa[N], sb[N];
    for (int round = 0; round < 300; round++) {
        int n = rng_between(&r, 1, N);
        size_t bytes = (size_t)n * sizeof(*x);
        size_t blocks = ((size_t)n + TM_ROW_BLOCK - 1) / TM_ROW_BLOCK;
        for (int i = 0; i < n; i++)
            x[i] = (float)(60.0 * rng_unit(&r) - 30.0);
        x[rng_below(&r, n)] = round % 2 ? -INFINITY : NAN;
        float max = tm_row_base.max(x, n);
        assert_true(max == tm_row_avx2.max(x, n) || n == 1);
        float scale = (float)(0.2 + 2.0 * rng_unit(&r));
        uint64_t ta = tm_row_base.weights(x, n, max, scale, wa, sa, ma), sum = 0;
        for (int i = 0; i < n; i++)
            sum += tm_mass_of(wa[i]);
        assert_true(sum == ta);
        uint64_t tb = tm_row_avx2.weights(x, n, max, scale, wb, sb, mb);
        assert_true(ta == tb);
        assert_memory_equal(wa, wb, bytes);
        assert_memory_equal(sa, sb, blocks * sizeof(*sa));
        assert_memory_equal(ma, mb, blocks * sizeof(*ma));
        assert_true(tm_row_base.mass_exp(x, n, max) == tm_row_avx2.mass_exp(x, n, max));
    }
#else
    skip();
#endif
}

static void test_argmax(void **state)
{
    (void)state;
    rng r = {rng_seed("argmax", 3)};
    float x[3000], max;
    for (int round = 0; round < 2000; round++) {
        int n = rng_between(&r, 1, 3000), best = 0;
        for (int i = 0; i < n; i++)
            x[i] = (float)rng_between(&r, -20, 20); /* many ties */
        if (round % 5 == 0)
            x[rng_below(&r, n)] = -INFINITY;
        for (int i = 0; i < n; i++)
            if (x[i] > x[best])
                best = i;
        float want = x[best];
        assert_int_equal(tm_row_argmax(x, n, &max), best);
        assert_true(max == want && tm_row_max(x, n) == want);
        x[(best + 1) % n] = n > 1 ? NAN : x[0]; /* NaNs are passed over */
        assert_int_equal(tm_row_argmax(x, n, &max), best);
    }
    for (int i = 0; i < 40; i++)
        x[i] = NAN;
    assert_int_equal(tm_row_argmax(x, 40, &max), -1);
    assert_true(max == -INFINITY);
}

static void test_top(void **state)
{
    (void)state;
    rng r = {rng_seed("top", 4)};
    for (int round = 0; round < 500; round++) {
        float x[700], values[40];
        int32_t ids[40];
        bool taken[700] = {false};
        int n = rng_between(&r, 1, 700), k = rng_between(&r, 0, 40);
        for (int i = 0; i < n; i++)
            x[i] = (float)rng_between(&r, -50, 50);
        int have = tm_row_top(x, n, k, ids, values);
        assert_int_equal(have, TM_MIN(n, k));
        for (int j = 0; j < have; j++) {
            int best = -1;
            for (int i = 0; i < n; i++)
                if (!taken[i] && (best < 0 || x[i] > x[best]))
                    best = i;
            taken[best] = true;
            assert_int_equal(ids[j], best);
            assert_true(values[j] == x[best]);
        }
    }
}

/* ---- reference: sorts everything, in double precision */

typedef struct ranked {
    double p;
    int32_t id;
} ranked;

static int by_rank(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    if (x->p != y->p)
        return x->p < y->p ? 1 : -1;
    return x->id - y->id;
}

/* Probability of every id after the whole pipeline. counts: occurrences among generated tokens, -1 for a token that
 * never occurred. margin: how near the top-p cut was to falling elsewhere. */
static void reference(const float *logits, int n, const tm_sampling *p, const int *counts,
                      double *prob, double *margin)
{
    double *x = malloc((size_t)n * sizeof(*x)), max = -INFINITY, total = 0.0;
    ranked *order = malloc((size_t)n * sizeof(*order));
    for (int i = 0; i < n; i++) {
        x[i] = (double)logits[i];
        if (counts[i] >= 0)
            x[i] = x[i] > 0 ? x[i] / (double)p->repetition_penalty
                            : x[i] * (double)p->repetition_penalty;
        if (counts[i] > 0)
            x[i] -= (double)p->frequency_penalty * counts[i] + (double)p->presence_penalty;
    }
    for (size_t i = 0; i < p->logit_bias_count; i++)
        x[p->logit_bias[i].token] += (double)p->logit_bias[i].bias;
    for (int i = 0; i < n; i++)
        max = fmax(max, x[i]);
    for (int i = 0; i < n; i++)
        order[i] = (ranked){exp((x[i] - max) / (double)p->temperature), i};
    qsort(order, (size_t)n, sizeof(*order), by_rank);
    int kept = p->top_k > 0 ? TM_MIN(p->top_k, n) : n;
    for (int i = 0; i < kept; i++)
        total += order[i].p;
    *margin = 1.0;
    if (p->top_p < 1.0f) {
        double mass = 0.0, target = (double)p->top_p * total;
        int i = 0;
        while (i < kept && (i == 0 || mass < target)) {
            mass += order[i++].p;
            *margin = fmin(*margin, fabs(mass - target) / total);
        }
        kept = i;
    }
    for (int i = 0; i < kept; i++)
        if (i > 0 && order[i].p < (double)p->min_p)
            kept = i;
    total = 0.0;
    for (int i = 0; i < kept; i++)
        total += order[i].p;
    memset(prob, 0, (size_t)n * sizeof(*prob));
    for (int i = 0; i < kept; i++)
        prob[order[i].id] = order[i].p / total;
    free(order);
    free(x);
}

static tm_sampling random_params(rng *r, int n, tm_logit_bias *bias)
{
    tm_sampling p = tm_sampling_default();
    static const float temperatures[] = {0.3f, 0.7f, 1.0f, 1.0f, 1.5f};
    p.temperature = temperatures[rng_below(r, 5)];
    p.seed = rng_u64(r);
    p.choice = (uint32_t)rng_below(r, 4);
    if (rng_below(r, 2))
        p.top_k = rng_between(r, 2, rng_below(r, 2) ? 60 : n);
    if (rng_below(r, 2))
        p.top_p = (float)(0.05 + 0.94 * rng_unit(r));
    if (rng_below(r, 3) == 0)
        p.min_p = (float)(0.3 * rng_unit(r));
    if (rng_below(r, 3) == 0) {
        p.repetition_penalty = (float)(0.8 + 0.6 * rng_unit(r));
        p.presence_penalty = (float)(rng_unit(r) - 0.5);
        p.frequency_penalty = (float)(rng_unit(r) - 0.5);
    }
    if (rng_below(r, 3) == 0) {
        for (int i = 0; i < 5; i++)
            bias[i] = (tm_logit_bias){rng_below(r, n), (float)(6.0 * rng_unit(r) - 3.0)};
        p.logit_bias = bias;
        p.logit_bias_count = 5;
    }
    return p;
}

/* The token where the cumulative probability passes u; *near is set when u is so close to a boundary that
 * rounding may choose the neighbour. */
static int invert(const double *prob, int n, double u, bool *near)
{
    double sum = 0.0;
    int token = -1;
    *near = false;
    for (int i = 0; i < n; i++) {
        if (prob[i] <= 0.0)
            continue;
        sum += prob[i];
        *near |= fabs(sum - u) < 3e-6;
        if (token < 0 && sum > u)
            token = i;
    }
    return token;
}

static void test_against_reference(void **state)
{
    (void)state;
    rng r = {rng_seed("against_reference", 9)};
    enum { VMAX = 5000 };
    float *row = malloc(VMAX * sizeof(*row)), *copy = malloc(VMAX * sizeof(*copy));
    double *prob = malloc(VMAX * sizeof(*prob));
    int *counts = malloc(VMAX * sizeof(*counts));
    int compared = 0;
    for (int round = 0; round < 1500; round++) {
        int n = rng_below(&r, 3) ? rng_between(&r, 8, 300) : rng_between(&r, 300, VMAX);
        int32_t tokens[60];
        tm_logit_bias bias[5];
        tm_sampling p = random_params(&r, n, bias);
        assert_int_equal(tm_sampling_check(&p, n, NULL), TM_OK);
        double width = round % 4 == 0 ? 0.0 : 12.0 * rng_unit(&r);
        for (int i = 0; i < n; i++) { /* every fourth row is flat: all ties */
            row[i] = (float)(width * (rng_unit(&r) + rng_unit(&r) - 1.0));
            if (round % 4 == 1)
                row[i] = (float)rng_between(&r, -3, 3);
            counts[i] = -1;
        }
        for (int i = 0; i < 60; i++) {
            tokens[i] = rng_below(&r, n);
            counts[tokens[i]] = TM_MAX(counts[tokens[i]], 0) + (i >= 30);
        }
        tm_sampler_opts o = {
            .params = &p, .vocab = n, .tokens = tokens, .n_prompt = 30, .n_tokens = 45};
        tm_sampler *s;
        tm_sample_space *sp;
        assert_int_equal(tm_sampler_create(&s, &o, NULL), TM_OK);
        assert_int_equal(tm_sample_space_create(&sp, n, NULL), TM_OK);
        for (int i = 45; i < 60; i++)
            assert_int_equal(tm_sampler_accept(s, tokens[i]), TM_OK);
        double margin;
        reference(row, n, &p, counts, prob, &margin);
        for (int pos = 0; pos < 10; pos++) {
            int32_t token;
            bool near;
            int want = invert(prob, n, tm_philox_uniform(p.seed, p.choice, (uint32_t)pos), &near);
            memcpy(copy, row, (size_t)n * sizeof(*row));
            assert_int_equal(tm_sampler_draw(s, sp, copy, pos, &token, NULL), TM_OK);
            if (near || margin < 1e-5)
                continue;
            if (token != want)
                fail_msg("round %d: drew %d, expected %d (V %d T %g k %d p %g m %g)", round, token,
                         want, n, (double)p.temperature, p.top_k, (double)p.top_p, (double)p.min_p);
            compared++;
        }
        tm_sampler_destroy(s);
        tm_sample_space_destroy(sp);
    }
    assert_true(compared > 10000);
    free(row);
    free(copy);
    free(prob);
    free(counts);
}

/* Frequencies of many positions of one seed, chi-square against the exact distribution. */
static void chi_square(const tm_sampling *p)
{
    enum { N = 200, DRAWS = 40000 };
    float row[N], copy[N];
    double prob[N], margin, chi = 0.0;
    int seen[N] = {0}, counts[N], bins = 0;
    rng r = {17};
    for (int i = 0; i < N; i++) {
        row[i] = (float)(3.0 * rng_unit(&r));
        counts[i] = -1;
    }
    reference(row, N, p, counts, prob, &margin);
    tm_sampler_opts o = {.params = p, .vocab = N};
    tm_sampler *s;
    tm_sample_space *sp;
    assert_int_equal(tm_sampler_create(&s, &o, NULL), TM_OK);
    assert_int_equal(tm_sample_space_create(&sp, N, NULL), TM_OK);
    for (int pos = 0; pos < DRAWS; pos++) {
        int32_t token;
        memcpy(copy, row, sizeof(row));
        assert_int_equal(tm_sampler_draw(s, sp, copy, pos, &token, NULL), TM_OK);
        seen[token]++;
    }
    for (int i = 0; i < N; i++) {
        if (prob[i] == 0.0) {
            assert_int_equal(seen[i], 0);
            continue;
        }
        double expected = prob[i] * DRAWS;
        chi += (seen[i] - expected) * (seen[i] - expected) / expected;
        bins++;
    }
    double freedom = bins - 1;
    assert_true(bins > 5);
    if (chi > freedom + 4.0 * sqrt(2.0 * freedom))
        fail_msg("chi-square %g with %g degrees of freedom", chi, freedom);
    tm_sampler_destroy(s);
    tm_sample_space_destroy(sp);
}

static void test_frequencies(void **state)
{
    (void)state;
    tm_sampling p = tm_sampling_default();
    p.seed = 20240607;
    chi_square(&p);
    p.top_k = 20;
    chi_square(&p);
    p.top_k = 0;
    p.top_p = 0.6f;
    chi_square(&p);
    p.min_p = 0.4f;
    p.choice = 3;
    chi_square(&p);
    p.temperature = 0.5f;
    p.top_p = 1.0f;
    chi_square(&p);
}

static int32_t draw_once(const tm_sampling *p, const float *row, int n, const int32_t *stops,
                         int stop_count, int pos, tm_logprobs *lp, tm_status want)
{
    float copy[512];
    int32_t token = -1;
    static tm_sample_space *sp; /* lp points into it */
    static tm_sampler *s;
    tm_sample_space_destroy(sp);
    tm_sampler_destroy(s);
    tm_sampler_opts o = {.params = p, .vocab = n, .stop_ids = stops, .stop_count = stop_count};
    assert_int_equal(tm_sampler_create(&s, &o, NULL), TM_OK);
    assert_int_equal(tm_sample_space_create(&sp, n, NULL), TM_OK);
    memcpy(copy, row, (size_t)n * sizeof(*row));
    assert_int_equal(tm_sampler_draw(s, sp, copy, pos, &token, lp), want);
    return token;
}

static void test_greedy_and_stops(void **state)
{
    (void)state;
    float row[300];
    for (int i = 0; i < 300; i++)
        row[i] = (float)(i % 50);
    tm_sampling p = tm_sampling_default();
    int32_t stops[] = {49, 99, 400, -1};
    p.temperature = 0.0f;
    p.min_tokens = 3;
    assert_int_equal(draw_once(&p, row, 300, stops, 4, 3, NULL, TM_OK), 49);
    assert_int_equal(draw_once(&p, row, 300, stops, 4, 2, NULL, TM_OK), 149);
    p.temperature = 0.7f;
    p.top_k = 1;
    assert_int_equal(draw_once(&p, row, 300, NULL, 0, 0, NULL, TM_OK), 49);
    p.top_k = 0;
    p.top_p = 0.0f;
    assert_int_equal(draw_once(&p, row, 300, NULL, 0, 0, NULL, TM_OK), 49);
    tm_logit_bias bias = {123, 1000.0f};
    p.logit_bias = &bias;
    p.logit_bias_count = 1;
    assert_int_equal(draw_once(&p, row, 300, NULL, 0, 0, NULL, TM_OK), 123);
}

static void test_logprobs(void **state)
{
    (void)state;
    float row[300];
    double sum = 0.0;
    rng r = {5};
    for (int i = 0; i < 300; i++)
        row[i] = (float)(8.0 * rng_unit(&r) - 30.0);
    for (int i = 0; i < 300; i++)
        sum += exp((double)row[i]);
    tm_sampling p = tm_sampling_default();
    tm_logit_bias bias = {123, 1000.0f};
    p.logit_bias = &bias;
    p.logit_bias_count = 1;
    p.logprobs = 5;
    p.temperature = 0.3f;
    tm_logprobs lp;
    int32_t token = draw_once(&p, row, 300, NULL, 0, 0, &lp, TM_OK);
    assert_int_equal(token, 123); /* chosen by its bias, reported without it */
    assert_true(fabs((double)lp.logprob - ((double)row[123] - log(sum))) < 1e-5);
    assert_int_equal(lp.top_count, 5);
    for (int i = 0; i < 5; i++) {
        assert_true(fabs((double)lp.top_logprobs[i] - ((double)row[lp.top_ids[i]] - log(sum))) <
                    1e-5);
        int better = 0;
        for (int j = 0; j < 300; j++)
            better += row[j] > row[lp.top_ids[i]];
        assert_int_equal(better, i);
    }
}

static void test_broken_rows(void **state)
{
    (void)state;
    float row[100];
    tm_sampling p = tm_sampling_default();
    for (int i = 0; i < 100; i++)
        row[i] = NAN;
    draw_once(&p, row, 100, NULL, 0, 0, NULL, TM_STATUS_INTERNAL);
    row[3] = INFINITY;
    draw_once(&p, row, 100, NULL, 0, 0, NULL, TM_STATUS_INTERNAL);
    row[3] = 1.0f;
    assert_int_equal(draw_once(&p, row, 100, NULL, 0, 0, NULL, TM_OK), 3);
    p.top_p = 0.5f;
    assert_int_equal(draw_once(&p, row, 100, NULL, 0, 0, NULL, TM_OK), 3);
}

static void test_parameter_checks(void **state)
{
    (void)state;
    tm_sampling ok = tm_sampling_default(), p;
    tm_err err = TM_ERR_INIT;
    assert_int_equal(tm_sampling_check(&ok, 10, &err), TM_OK);
#define REFUSED(field, v)                                                                          \
    p = ok;                                                                                        \
    p.field = v;                                                                                   \
    assert_int_equal(tm_sampling_check(&p, 10, &err), TM_STATUS_INVALID);                          \
    assert_non_null(strstr(err.msg, #field))
    REFUSED(temperature, -0.1f);
    REFUSED(temperature, NAN);
    REFUSED(temperature, INFINITY);
    REFUSED(top_k, -1);
    REFUSED(top_p, 1.01f);
    REFUSED(top_p, NAN);
    REFUSED(min_p, -0.5f);
    REFUSED(repetition_penalty, 0.0f);
    REFUSED(presence_penalty, NAN);
    REFUSED(frequency_penalty, -INFINITY);
    REFUSED(logprobs, TM_LOGPROBS_MAX + 1);
    REFUSED(prompt_logprobs, -2);
    REFUSED(min_tokens, -1);
    tm_logit_bias bias = {10, 1.0f};
    p = ok;
    p.logit_bias = &bias;
    p.logit_bias_count = 1;
    assert_int_equal(tm_sampling_check(&p, 10, &err), TM_STATUS_INVALID);
    bias = (tm_logit_bias){9, NAN};
    assert_int_equal(tm_sampling_check(&p, 10, &err), TM_STATUS_INVALID);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_philox),
        cmocka_unit_test(test_exp),
        cmocka_unit_test(test_widths),
        cmocka_unit_test(test_argmax),
        cmocka_unit_test(test_top),
        cmocka_unit_test(test_against_reference),
        cmocka_unit_test(test_frequencies),
        cmocka_unit_test(test_greedy_and_stops),
        cmocka_unit_test(test_logprobs),
        cmocka_unit_test(test_broken_rows),
        cmocka_unit_test(test_parameter_checks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
