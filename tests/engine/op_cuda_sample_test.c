/* The operator `sample` against the engine's sampler: the same rows and parameters, the same tokens and
 * log-probabilities, bit for bit.
 *
 * Rows are peaked, flat, of few values (ties everywhere), all equal, nearly so but for one far above, with minus
 * infinities, or broken. */
#include <math.h>

#include "common/check.h"
#include "engine/sample/sampler.h"
#include "tests/engine/op_cuda.h"
#include "tests/engine/rng.h"

enum { ROWS_MAX = 6, TOKENS = 50, PROMPT = 30, EDITS_MAX = 4096 };

typedef enum row_kind {
    PEAKED,
    FLAT,
    STEPS,
    EQUAL,
    FAR,
    CROWD,
    HOLES,
    NANS,
    BROKEN,
    KINDS
} row_kind;

static void fill_row(rng *r, row_kind kind, float *x, int n)
{
    double width = kind == PEAKED ? 40.0 : 5.0 * rng_unit(r);
    int steps = rng_between(r, 1, 9);
    for (int i = 0; i < n; i++) {
        double a = rng_unit(r) + rng_unit(r) + rng_unit(r) - 1.5;
        x[i] = (float)(width * a);
        if (kind == STEPS)
            x[i] = (float)rng_between(r, -steps, steps);
        else if (kind == EQUAL)
            x[i] = i % 2 ? 0.0f : -0.0f;
        else if (kind == FAR || kind == CROWD)
            x[i] = (float)((kind == FAR ? -15.0 : -3.0) + 0.01 * a);
        else if (kind == BROKEN)
            x[i] = NAN;
        else if ((kind == HOLES || kind == NANS) && rng_below(r, 3))
            x[i] = kind == HOLES ? -INFINITY : NAN;
    }
    if (kind == HOLES || kind == NANS)
        x[rng_below(r, n)] = 1.0f;
    if (kind == FAR || kind == CROWD)
        x[rng_below(r, n)] = 0.0f;
    if (kind == BROKEN && rng_below(r, 2))
        x[rng_below(r, n)] = rng_below(r, 2) ? INFINITY : -INFINITY;
}

static tm_sampling random_params(rng *r, int n, tm_logit_bias *bias)
{
    static const float temperatures[] = {0.0f, 0.1f, 0.7f, 1.0f, 1.0f, 5.0f};
    static const float top_ps[] = {0.0f, 1e-6f, 0.1f, 0.5f, 0.9f, 0.99f};
    static const float min_ps[] = {1e-12f, 0.01f, 0.2f, 1.0f};
    tm_sampling p = tm_sampling_default();
    p.temperature = temperatures[rng_below(r, 6)];
    p.seed = rng_u64(r);
    p.choice = (uint32_t)rng_below(r, 4);
    if (rng_below(r, 2))
        p.top_k = rng_below(r, 4) ? rng_between(r, 1, 60) : rng_between(r, 1, n + 5);
    if (rng_below(r, 2))
        p.top_p = top_ps[rng_below(r, 6)];
    if (rng_below(r, 3) == 0)
        p.min_p = min_ps[rng_below(r, 4)];
    if (rng_below(r, 3) == 0) {
        p.repetition_penalty = (float)(0.8 + 0.6 * rng_unit(r));
        p.presence_penalty = (float)(rng_unit(r) - 0.5);
        p.frequency_penalty = (float)(rng_unit(r) - 0.5);
    }
    if (rng_below(r, 3) == 0) {
        p.logit_bias_count = (size_t)rng_between(r, 1, TM_MIN(n, 20));
        for (size_t i = 0; i < p.logit_bias_count; i++)
            bias[i] = (tm_logit_bias){rng_below(r, n), (float)(12.0 * rng_unit(r) - 6.0)};
        p.logit_bias = bias;
    }
    if (rng_below(r, 3) == 0)
        p.logprobs = rng_below(r, 2) ? 0 : rng_between(r, 1, TM_SAMPLE_TOP_MAX);
    p.min_tokens = rng_below(r, 3) ? 0 : 100;
    return p;
}

/* A step: rows of one vocabulary with parameters of their own. */
typedef struct step {
    int rows, n, ld, edit_count;
    float *x;
    tm_sampler *samplers[ROWS_MAX];
    int positions[ROWS_MAX];
    bool details;
    tm_sample_row row[ROWS_MAX];
    tm_sample_edit edits[EDITS_MAX];
    int32_t tokens[ROWS_MAX];
    tm_sample_detail detail[ROWS_MAX];
} step;

static void add_row(step *s, rng *r, const tm_sampling *p)
{
    int32_t tokens[TOKENS], stops[] = {rng_below(r, s->n), rng_below(r, s->n), s->n, -1};
    for (int i = 0; i < TOKENS; i++)
        tokens[i] = rng_below(r, s->n);
    tm_sampler_opts o = {.params = p,
                         .vocab = s->n,
                         .stop_ids = stops,
                         .stop_count = 4,
                         .tokens = tokens,
                         .n_prompt = PROMPT,
                         .n_tokens = TOKENS};
    int i = s->rows++;
    assert_int_equal(tm_sampling_check(p, s->n, NULL), TM_OK);
    assert_int_equal(tm_sampler_create(&s->samplers[i], &o, NULL), TM_OK);
    s->positions[i] = rng_between(r, 0, 99);
    assert_true(tm_sampler_device_row(s->samplers[i], s->positions[i], &s->row[i], s->edits,
                                      EDITS_MAX, &s->edit_count));
    s->details |= p->logprobs >= 0;
}

static void run_device(step *s)
{
    size_t rows = (size_t)s->rows;
    float *x = gpu_put(s->x, rows * (size_t)s->ld * sizeof *x);
    tm_sample_row *row = gpu_put(s->row, rows * sizeof *row);
    tm_sample_edit *edits = gpu_put(s->edits, (size_t)(s->edit_count + 1) * sizeof *edits);
    int32_t *out = gpu_take(rows * sizeof *out);
    tm_sample_detail *detail = gpu_take(rows * sizeof *detail);
    const tm_sample_args a = {.out = out,
                              .details = s->details ? detail : NULL,
                              .x = x,
                              .rows = row,
                              .edits = edits,
                              .n_rows = s->rows,
                              .n = s->n,
                              .ld = s->ld};
    assert_int_equal(gpu->ops->sample(gpu_dev, &a), TM_OK);
    assert_int_equal(gpu->dev->download(gpu_dev, s->tokens, out, rows * sizeof *out), TM_OK);
    assert_int_equal(gpu->dev->download(gpu_dev, s->detail, detail, rows * sizeof *detail), TM_OK);
    gpu_free(x), gpu_free(row), gpu_free(edits), gpu_free(out), gpu_free(detail);
}

static void check_logprobs(const tm_logprobs *got, const tm_logprobs *want)
{
    assert_memory_equal(&got->logprob, &want->logprob, sizeof(float));
    assert_int_equal(got->top_count, want->top_count);
    size_t n = (size_t)want->top_count;
    if (n == 0)
        return;
    assert_memory_equal(got->top_ids, want->top_ids, n * sizeof *want->top_ids);
    for (size_t i = 0; i < n; i++)
        assert_true(got->top_logprobs[i] == want->top_logprobs[i]);
}

/* s->x is changed. */
static void check_host(step *s, const tm_sampling *params, const char *what)
{
    tm_sample_space *sp, *sd;
    assert_int_equal(tm_sample_space_create(&sp, s->n, NULL), TM_OK);
    assert_int_equal(tm_sample_space_create(&sd, s->n, NULL), TM_OK);
    for (int i = 0; i < s->rows; i++) {
        int32_t want = -1;
        tm_logprobs lp = {0}, got;
        const tm_sampling *p = &params[i];
        tm_status st = tm_sampler_draw(s->samplers[i], sp, s->x + (size_t)i * (size_t)s->ld,
                                       s->positions[i], &want, &lp);
        assert_true(st == TM_OK || (st == TM_STATUS_INTERNAL && want < 0));
        if (s->tokens[i] != want)
            fail_msg("%s row %d of %d values: %d, not %d: T %g k %d p %g m %g edits %d %d %d", what,
                     i, s->n, s->tokens[i], want, (double)p->temperature, p->top_k,
                     (double)p->top_p, (double)p->min_p, s->row[i].n_seen, s->row[i].n_bias,
                     s->row[i].n_banned);
        if (want < 0 || p->logprobs < 0)
            continue;
        tm_logprobs_of_detail(sd, &s->detail[i], &got);
        check_logprobs(&got, &lp);
    }
    tm_sample_space_destroy(sp);
    tm_sample_space_destroy(sd);
}

/* kind KINDS: one of each row's own. */
static void one_step(rng *r, int rows, int n, row_kind kind, const tm_sampling *fixed)
{
    static step s;
    tm_sampling params[ROWS_MAX];
    tm_logit_bias bias[20];
    char what[32];
    s = (step){.n = n, .ld = n + rng_below(r, 3)};
    s.x = calloc((size_t)rows * (size_t)s.ld, sizeof *s.x);
    TM_ASSERT(s.x);
    for (int i = 0; i < rows; i++) {
        row_kind k = kind == KINDS ? (row_kind)rng_below(r, KINDS) : kind;
        fill_row(r, k, s.x + (size_t)i * (size_t)s.ld, n);
        params[i] = fixed ? *fixed : random_params(r, n, bias);
        add_row(&s, r, &params[i]);
    }
    snprintf(what, sizeof what, "kind %d", (int)kind);
    run_device(&s);
    check_host(&s, params, what);
    for (int i = 0; i < rows; i++)
        tm_sampler_destroy(s.samplers[i]);
    free(s.x);
}

static void random_test(void **state)
{
    (void)state;
    rng r = {rng_seed("sample", 11)};
    for (int i = 0; i < gpu_count(600, 60); i++)
        one_step(&r, rng_between(&r, 1, ROWS_MAX),
                 i % 3 ? rng_between(&r, 1, 700) : rng_between(&r, 700, 5000), KINDS, NULL);
    for (int i = 0; i < KINDS; i++)
        one_step(&r, 2, 1 + i, (row_kind)i, NULL);
}

/* Every filter alone and with the next, on rows of every kind. */
static void filters_test(void **state)
{
    (void)state;
    rng r = {rng_seed("sample_filters", 12)};
    for (int kind = 0; kind < BROKEN; kind++)
        for (int f = 0; f < 8; f++) {
            tm_sampling p = tm_sampling_default();
            if (rng_below(&r, 64) >= gpu_count(64, 64))
                continue;
            p.seed = rng_u64(&r);
            p.top_k = f & 1 ? rng_between(&r, 2, 200) : 0;
            p.top_p = f & 2 ? 0.8f : 1.0f;
            p.min_p = f & 4 ? 0.02f : 0.0f;
            one_step(&r, 1, rng_between(&r, 300, 1200), (row_kind)kind, &p);
        }
}

/* Cuts with thousands of weights above them, near them, or equal to them. */
static void crowds_test(void **state)
{
    (void)state;
    static const row_kind kinds[] = {PEAKED, FLAT, STEPS, EQUAL, FAR, CROWD, HOLES};
    static const float shares[] = {0.6f, 0.97f, 0.995f, 0.998f};
    rng r = {rng_seed("sample_crowds", 14)};
    for (int i = 0; i < gpu_count(400, 48); i++) {
        tm_sampling p = tm_sampling_default();
        int n = rng_between(&r, 6000, 24000);
        p.seed = rng_u64(&r);
        p.temperature = rng_below(&r, 3) ? 8.0f : 1.0f;
        if (i % 3 != 1)
            p.top_k = rng_between(&r, 4000, n);
        if (i % 3)
            p.top_p = shares[rng_below(&r, 4)];
        if (i % 4 == 0)
            p.min_p = rng_below(&r, 2) ? 0.9f : 0.1f;
        if (i % 5 == 0)
            p.logprobs = 3;
        const row_kind kind = kinds[rng_below(&r, 7)];
        if (kind == FAR)
            p.temperature = 1.0f;
        one_step(&r, rng_between(&r, 1, 2), n, kind, &p);
    }
}

/* A row as long as a large vocabulary, not a multiple of anything. */
static void large_test(void **state)
{
    (void)state;
    rng r = {rng_seed("sample_large", 13)};
    tm_sampling p = tm_sampling_default();
    p.top_p = 0.9f;
    p.seed = 5;
    one_step(&r, 1, gpu_count(151937, 151937), PEAKED, &p);
    p.top_k = 60000;
    p.top_p = 0.6f;
    one_step(&r, 4, gpu_count(100000, 100000), CROWD, &p);
    if (gpu_slow())
        return;
    for (int i = 0; i < 40; i++)
        one_step(&r, ROWS_MAX, rng_between(&r, 100000, 262208), KINDS, NULL);
}

/* What the device does not do stays with the host; entries for one token are added up. */
static void refused_test(void **state)
{
    (void)state;
    tm_sampling p = tm_sampling_default();
    tm_logit_bias bias[] = {{3, 1.0f}, {2, 1.0f}, {3, 0.5f}};
    tm_sampler_opts o = {.params = &p, .vocab = 10};
    tm_sample_row row;
    tm_sample_edit edits[2];
    tm_sampler *s;
    int count = 0;
    p.logprobs = TM_SAMPLE_TOP_MAX + 1;
    assert_int_equal(tm_sampler_create(&s, &o, NULL), TM_OK);
    assert_false(tm_sampler_device_row(s, 0, &row, edits, 2, &count));
    tm_sampler_destroy(s);
    p.logprobs = -1;
    p.logit_bias = bias;
    p.logit_bias_count = 3;
    assert_int_equal(tm_sampler_create(&s, &o, NULL), TM_OK);
    assert_false(tm_sampler_device_row(s, 0, &row, edits, 1, &count));
    assert_int_equal(count, 0);
    assert_true(tm_sampler_device_row(s, 0, &row, edits, 2, &count));
    assert_int_equal(count, 2);
    assert_int_equal(row.n_bias, 2);
    assert_true(edits[1].token == 3 && edits[1].value == 1.5f);
    tm_sampler_destroy(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(filters_test), cmocka_unit_test(random_test),
        cmocka_unit_test(crowds_test),  cmocka_unit_test(large_test),
        cmocka_unit_test(refused_test),
    };
    return gpu_run(tests, TM_ARRAY_LEN(tests));
}
