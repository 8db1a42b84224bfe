/* Every operator that is not attention: the reference against double precision computed here, and every
 * fast path against the reference, over a table of shapes. Rope and attention: op_attention_test.c.
 *
 * One more promise is checked bit for bit: a row of `linear` does not depend on the number of rows beside
 * it, nor on the number of threads. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/check.h"
#include "engine/backend/cpu/convert.h"
#include "tests/engine/op_test.h"

static const tm_op_table *ops(void)
{
    return tm_backend_find("cpu")->ops;
}

/* Runs `check(dev, name)` for each fast path that this processor has, with 1 and 3 threads. */
typedef void (*fast_fn)(tm_device *dev, const char *isa, void *arg);
static tm_device *g_fast[8];
static const char *g_fast_name[8];
static int g_fast_count;
static tm_device *g_ref;

static int open_devices(void **state)
{
    (void)state;
    op_seed();
    g_ref = op_device_open("ref", 1);
    for (int i = 0; i < op_fast_isa_count; i++) {
        for (int threads = 1; threads <= 3; threads += 2) {
            tm_device *d = op_device_open(op_fast_isas[i], threads);
            if (d) {
                g_fast[g_fast_count] = d;
                g_fast_name[g_fast_count++] = op_fast_isas[i];
            }
        }
    }
    return g_ref ? 0 : -1;
}

static int close_devices(void **state)
{
    (void)state;
    op_device_close(g_ref);
    for (int i = 0; i < g_fast_count; i++)
        op_device_close(g_fast[i]);
    return 0;
}

/* ---- linear ---- */

typedef struct linear_shape {
    int n, k, pad_x, pad_out;
    bool bias;
} linear_shape;

static const linear_shape g_linear[] = {
    {1, 1, 0, 0, false},     {7, 5, 3, 2, true},      {24, 32, 0, 0, false},
    {33, 37, 1, 5, true},    {50, 64, 0, 0, false},   {97, 129, 8, 0, true},
    {48, 512, 0, 0, false},  {121, 255, 0, 7, false}, {25, 1024, 0, 0, true},
    {31, 1025, 0, 0, false}, {40, 1536, 0, 0, true},  {26, 2100, 4, 4, true},
    {200, 96, 0, 0, false},  {208, 96, 4, 3, true},   {400, 1568, 0, 0, false},
};

static const int g_tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 31, 70};

static void linear_double(const tm_linear_args *a, double *out)
{
    const tm_weight *w = a->w;
    for (int t = 0; t < a->n_tokens; t++) {
        for (int n = 0; n < w->n; n++) {
            double s = w->bias ? (double)w->bias[n] : 0;
            for (int k = 0; k < w->k; k++)
                s += (double)((const float *)a->x)[t * a->ldx + k] *
                     (double)tm_load_f32(w->data, (size_t)n * (size_t)w->k + (size_t)k, w->dtype);
            out[(size_t)t * (size_t)w->n + (size_t)n] = s;
        }
    }
}

/* The rows of a strided output without the padding, which must be untouched. */
static void pack_rows(const float *out, int tokens, int n, int ldo, float *packed)
{
    for (int t = 0; t < tokens; t++) {
        memcpy(packed + (size_t)t * (size_t)n, out + (size_t)t * (size_t)ldo,
               (size_t)n * sizeof *packed);
        for (int i = n; i < ldo; i++)
            assert_true(op_untouched(out[(size_t)t * (size_t)ldo + (size_t)i]));
    }
}

static float *linear_run(tm_device *dev, const tm_linear_args *args)
{
    tm_linear_args a = *args;
    tm_weight w = *args->w; /* each device prepares its own */
    size_t size = (size_t)a.n_tokens * (size_t)a.ldo;
    float *out = op_guarded(size);
    float *packed = malloc((size_t)a.n_tokens * (size_t)a.w->n * sizeof *packed);
    a.out = out;
    a.w = &w;
    assert_int_equal(ops()->linear_prepare(dev, &w, NULL), TM_OK);
    assert_int_equal(ops()->linear(dev, &a), TM_OK);
    ops()->linear_release(dev, &w);
    op_guarded_check(out, size, "linear");
    pack_rows(out, a.n_tokens, a.w->n, a.ldo, packed);
    op_guarded_free(out);
    return packed;
}

static void linear_one(const linear_shape *s, tm_dtype t, int tokens)
{
    tm_weight w = {.dtype = t, .n = s->n, .k = s->k};
    size_t count = (size_t)tokens * (size_t)s->n;
    void *data = op_random_array((size_t)s->n * (size_t)s->k, t, -1, 1);
    float *bias = op_random_array((size_t)s->n, TM_DTYPE_F32, -1, 1);
    float *x = op_random_array((size_t)tokens * (size_t)(s->k + s->pad_x), TM_DTYPE_F32, -1, 1);
    double *want = malloc(count * sizeof *want);
    w.data = data;
    w.bias = s->bias ? bias : NULL;
    tm_linear_args a = {
        .x = x, .w = &w, .n_tokens = tokens, .ldx = s->k + s->pad_x, .ldo = s->n + s->pad_out};
    linear_double(&a, want);
    float *ref = linear_run(g_ref, &a), *first = NULL;
    const char *dt = tm_dtype_name(t);
    op_check(op_nmse_double(ref, want, count), OP_NMSE_REF, "linear ref %s T=%d N=%d K=%d", dt,
             tokens, s->n, s->k);
    for (int i = 0; i < g_fast_count; i++) {
        float *got = linear_run(g_fast[i], &a);
        op_check(op_nmse(got, ref, count), OP_NMSE_FAST, "linear %s %s T=%d N=%d K=%d",
                 g_fast_name[i], dt, tokens, s->n, s->k);
        if (i % 2 == 0) {
            first = got;
            continue;
        }
        if (memcmp(first, got, count * sizeof *got) != 0)
            fail_msg("linear %s %s T=%d N=%d K=%d: 1 and 3 threads differ", g_fast_name[i], dt,
                     tokens, s->n, s->k);
        free(first);
        free(got);
    }
    free(ref);
    free(want);
    free(x);
    free(bias);
    free(data);
}

static void linear_test(void **state)
{
    (void)state;
    for (size_t s = 0; s < TM_ARRAY_LEN(g_linear); s++)
        for (int t = 0; t < TM_DTYPE_COUNT; t++)
            for (size_t i = 0; i < TM_ARRAY_LEN(g_tokens); i++)
                linear_one(&g_linear[s], (tm_dtype)t, g_tokens[i]);
}

static void linear_batch_of(int n, int k)
{
    enum { T = 70 };
    for (int d = 0; d < g_fast_count; d++) {
        /* Fewer tokens take another path there, with sums in another order. */
        const int least = strcmp(g_fast_name[d], "amx") == 0 ? 16 : 1;
        for (int dt = 0; dt < TM_DTYPE_COUNT; dt++) {
            tm_weight w = {.dtype = (tm_dtype)dt, .n = n, .k = k};
            void *data = op_random_array((size_t)n * (size_t)k, w.dtype, -1, 1);
            float *x = op_random_array((size_t)T * (size_t)k, TM_DTYPE_F32, -1, 1);
            w.data = data;
            tm_linear_args a = {.x = x, .w = &w, .n_tokens = T, .ldx = k, .ldo = n};
            float *all = linear_run(g_fast[d], &a);
            for (int from = 0; from < T;) {
                int rows = op_pick(least, least + 13);
                a.n_tokens = T - from - rows < least ? T - from : rows;
                a.x = x + (size_t)from * (size_t)k;
                float *part = linear_run(g_fast[d], &a);
                if (memcmp(part, all + (size_t)from * (size_t)n,
                           (size_t)a.n_tokens * (size_t)n * sizeof *part) != 0)
                    fail_msg("linear %s %s: %d rows alone differ from the same rows of %d",
                             g_fast_name[d], tm_dtype_name(w.dtype), a.n_tokens, T);
                from += a.n_tokens;
                free(part);
            }
            free(all);
            free(x);
            free(data);
        }
    }
}

static void linear_batch_test(void **state)
{
    (void)state;
    linear_batch_of(101, 1543); /* fills no tiles */
    linear_batch_of(96, 1536);
}

/* ---- norm ---- */

typedef struct norm_shape {
    int tokens, h;
    tm_norm_kind kind;
    bool add_one, bias, delta, no_out;
} norm_shape;

static const norm_shape g_norm[] = {
    {1, 512, TM_NORM_RMS, false, false, true, false},
    {1, 7, TM_NORM_RMS, false, false, false, false},
    {5, 33, TM_NORM_RMS, true, false, true, false},
    {70, 515, TM_NORM_RMS, false, false, true, false},
    {3, 4096, TM_NORM_RMS, true, false, false, false},
    {1, 512, TM_NORM_LAYER, false, true, true, false},
    {9, 77, TM_NORM_LAYER, false, true, false, false},
    {64, 1000, TM_NORM_LAYER, false, false, true, false},
    {17, 63, TM_NORM_RMS, false, false, true, true},
};

static void norm_double(const norm_shape *s, float eps, const float *x, const float *d,
                        const float *w, const float *b, double *out)
{
    for (int t = 0; t < s->tokens; t++) {
        double mean = 0, sq = 0;
        size_t at = (size_t)t * (size_t)s->h;
        for (int i = 0; i < s->h; i++)
            out[at + (size_t)i] = (double)x[at + (size_t)i] + (d ? (double)d[at + (size_t)i] : 0);
        for (int i = 0; s->kind == TM_NORM_LAYER && i < s->h; i++)
            mean += out[at + (size_t)i] / s->h;
        for (int i = 0; i < s->h; i++)
            sq += (out[at + (size_t)i] - mean) * (out[at + (size_t)i] - mean) / s->h;
        for (int i = 0; i < s->h; i++)
            out[at + (size_t)i] = (out[at + (size_t)i] - mean) / sqrt(sq + (double)eps) *
                                      ((double)w[i] + (s->add_one ? 1 : 0)) +
                                  (b ? (double)b[i] : 0);
    }
}

static void norm_run(tm_device *dev, const norm_shape *s, tm_norm_args a, const float *x,
                     float **out, float **residual)
{
    size_t n = (size_t)s->tokens * (size_t)s->h;
    *out = op_guarded(n);
    *residual = op_guarded(n);
    memcpy(*residual, x, n * sizeof *x);
    a.residual = *residual;
    a.out = s->no_out ? NULL : *out;
    assert_int_equal(ops()->norm(dev, &a), TM_OK);
    op_guarded_check(*out, n, "norm out");
    op_guarded_check(*residual, n, "norm residual");
}

static void norm_test(void **state)
{
    (void)state;
    for (size_t c = 0; c < TM_ARRAY_LEN(g_norm); c++) {
        const norm_shape *s = &g_norm[c];
        size_t n = (size_t)s->tokens * (size_t)s->h;
        float *x = op_random_array(n, TM_DTYPE_F32, -2, 3);
        float *d = op_random_array(n, TM_DTYPE_F32, -1, 1);
        float *w = op_random_array((size_t)s->h, TM_DTYPE_F32, -1, 1);
        float *b = op_random_array((size_t)s->h, TM_DTYPE_F32, -1, 1);
        double *want = malloc(n * sizeof *want);
        tm_norm_args a = {.delta = s->delta ? d : NULL,
                          .w = w,
                          .b = s->bias ? b : NULL,
                          .n_tokens = s->tokens,
                          .h = s->h,
                          .eps = 1e-5f,
                          .kind = s->kind,
                          .add_one = s->add_one};
        norm_double(s, a.eps, x, a.delta, w, a.b, want);
        float *ref, *ref_res, *got, *got_res;
        norm_run(g_ref, s, a, x, &ref, &ref_res);
        if (!s->no_out)
            op_check(op_nmse_double(ref, want, n), OP_NMSE_REF, "norm ref, row %zu", c);
        for (size_t i = 0; i < n; i++)
            assert_true(ref_res[i] == x[i] + (s->delta ? d[i] : 0.0f));
        for (int i = 0; i < g_fast_count; i++) {
            norm_run(g_fast[i], s, a, x, &got, &got_res);
            if (!s->no_out)
                op_check(op_nmse(got, ref, n), OP_NMSE_FAST, "norm %s, row %zu", g_fast_name[i], c);
            else
                assert_true(op_untouched(got[0]));
            assert_memory_equal(got_res, ref_res, n * sizeof *got_res);
            op_guarded_free(got);
            op_guarded_free(got_res);
        }
        op_guarded_free(ref);
        op_guarded_free(ref_res);
        free(want), free(b), free(w), free(d), free(x);
    }
}

/* ---- embed and gather_rows ---- */

static void embed_test(void **state)
{
    (void)state;
    static const struct {
        int tokens, rows, h, v0;
        float scale;
    } cases[] = {{1, 9, 5, 0, 1}, {7, 20, 64, 0, 1}, {70, 33, 515, 40, 22.5f}, {3, 8, 1024, 8, 1}};
    for (size_t c = 0; c < TM_ARRAY_LEN(cases); c++) {
        for (int dt = 0; dt < TM_DTYPE_COUNT; dt++) {
            int h = cases[c].h, rows = cases[c].rows, tokens = cases[c].tokens;
            tm_weight w = {.dtype = (tm_dtype)dt, .n = rows, .k = h};
            void *data = op_random_array((size_t)rows * (size_t)h, w.dtype, -1, 1);
            int32_t *ids = malloc((size_t)tokens * sizeof *ids);
            for (int t = 0; t < tokens; t++) /* also ids of other ranks */
                ids[t] = op_pick(cases[c].v0 - 3 < 0 ? 0 : cases[c].v0 - 3, cases[c].v0 + rows + 2);
            /* Some of them are what an earlier step chose, in another order; one choice failed. */
            int32_t *given = malloc((size_t)tokens * sizeof *given);
            int32_t *picked = malloc((size_t)tokens * sizeof *picked);
            for (int t = 0; t < tokens; t++) {
                picked[tokens - 1 - t] = t == 4 ? -1 : ids[t];
                given[t] = t % 3 == 1 ? -1 - (tokens - 1 - t) : ids[t];
            }
            if (tokens > 4)
                ids[4] = -1;
            w.data = data;
            for (int i = -1; i < g_fast_count; i++) {
                size_t n = (size_t)tokens * (size_t)h;
                float *out = op_guarded(n);
                tm_embed_args a = {.out = out,
                                   .ids = given,
                                   .picked = picked,
                                   .table = &w,
                                   .n_tokens = tokens,
                                   .v0 = cases[c].v0,
                                   .scale = cases[c].scale};
                assert_int_equal(ops()->embed(i < 0 ? g_ref : g_fast[i], &a), TM_OK);
                op_guarded_check(out, n, "embed");
                for (size_t j = 0; j < n; j++) {
                    int row = ids[j / (size_t)h] - cases[c].v0;
                    size_t at = (size_t)row * (size_t)h + j % (size_t)h;
                    float want = row >= 0 && row < rows
                                     ? tm_load_f32(data, at, w.dtype) * cases[c].scale
                                     : 0.0f;
                    assert_true(out[j] == want);
                }
                op_guarded_free(out);
            }
            free(ids), free(given), free(picked), free(data);
        }
    }
}

static void gather_rows_test(void **state)
{
    (void)state;
    enum { T = 12, H = 37, R = 4 };
    static const int32_t rows[R] = {0, 3, 4, 11};
    float *x = op_random_array(T * H, TM_DTYPE_F32, -1, 1);
    for (int i = -1; i < g_fast_count; i++) {
        float *out = op_guarded(R * H);
        tm_gather_rows_args a = {.out = out, .x = x, .rows = rows, .n_rows = R, .h = H};
        assert_int_equal(ops()->gather_rows(i < 0 ? g_ref : g_fast[i], &a), TM_OK);
        op_guarded_check(out, R * H, "gather_rows");
        for (int r = 0; r < R; r++)
            assert_memory_equal(out + r * H, x + rows[r] * H, H * sizeof *x);
        op_guarded_free(out);
    }
    free(x);
}

/* ---- activation ---- */

static double act_double(tm_act_kind kind, double x)
{
    if (kind == TM_ACT_GELU_ERF)
        return 0.5 * x * erfc(-x / sqrt(2.0));
    if (kind == TM_ACT_GELU_TANH)
        return 0.5 * x * (1 + tanh(sqrt(2 / acos(-1.0)) * (x + 0.044715 * x * x * x)));
    return x / (1 + exp(-x));
}

static void act_test(void **state)
{
    (void)state;
    static const int shapes[][2] = {{1, 3}, {1, 1536}, {3, 35}, {70, 301}};
    for (size_t c = 0; c < TM_ARRAY_LEN(shapes) * 6; c++) {
        int tokens = shapes[c / 6][0], f = shapes[c / 6][1];
        tm_act_kind kind = (tm_act_kind)(c % 6 / 2);
        bool gated = c % 2;
        size_t n = (size_t)tokens * (size_t)f, width = (size_t)f * (gated ? 2 : 1);
        float *in = op_random_array((size_t)tokens * width, TM_DTYPE_F32, -12, 12);
        /* The far ends neither overflow nor wrap, and one value of size 1 keeps a row of nothing but
         * tails, which are far below the bound's absolute error, from setting the scale. */
        in[0] = op_pick(0, 1) ? 300.0f : -300.0f;
        in[1] = 1.0f;
        double *want = malloc(n * sizeof *want);
        float *ref = op_guarded(n);
        for (size_t i = 0; i < n; i++) {
            const float *row = in + i / (size_t)f * width + i % (size_t)f;
            want[i] = act_double(kind, (double)row[0]) * (gated ? (double)row[f] : 1);
        }
        tm_act_args a = {
            .out = ref, .gate_up = in, .n_tokens = tokens, .f = f, .act = kind, .gated = gated};
        assert_int_equal(ops()->act(g_ref, &a), TM_OK);
        op_check(op_nmse_double(ref, want, n), OP_NMSE_REF, "act ref, row %zu", c);
        for (int i = 0; i < g_fast_count; i++) {
            float *got = op_guarded(n);
            a.out = got;
            assert_int_equal(ops()->act(g_fast[i], &a), TM_OK);
            op_guarded_check(got, n, "act");
            op_check(op_nmse(got, ref, n), OP_NMSE_FAST, "act %s, row %zu", g_fast_name[i], c);
            op_guarded_free(got);
        }
        op_guarded_free(ref);
        free(want), free(in);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(linear_test), cmocka_unit_test(linear_batch_test),
        cmocka_unit_test(norm_test),   cmocka_unit_test(embed_test),
        cmocka_unit_test(act_test),    cmocka_unit_test(gather_rows_test),
    };
    return cmocka_run_group_tests(tests, open_devices, close_devices);
}
