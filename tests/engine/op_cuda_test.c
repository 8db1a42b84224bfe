/* The CUDA operators against the CPU reference, on a machine that has a GPU; skipped elsewhere.
 *
 * The reference gets the same bf16 inputs, widened. Copies and the residual add must be exact after
 * rounding; normalised values may differ by the last bit of a bf16. */
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

/* Rounding to bf16 alone costs up to 2^-8 of a value (8 significant bits): its mean square is 2^-16 / 3. */
#define NMSE_BF16 (1.0 / (3 << 16))

static const tm_backend *g_gpu;
static tm_device *g_dev, *g_ref;

static void *to_device(const void *host, size_t bytes)
{
    void *p = NULL;
    assert_int_equal(g_gpu->dev->alloc(g_dev, bytes, &p, NULL), TM_OK);
    assert_int_equal(g_gpu->dev->upload(g_dev, p, host, bytes), TM_OK);
    return p;
}

static void from_device(float *out, const void *p, size_t n)
{
    uint16_t *h = malloc(n * sizeof *h);
    assert_int_equal(g_gpu->dev->download(g_dev, h, p, n * sizeof *h), TM_OK);
    for (size_t i = 0; i < n; i++)
        out[i] = tm_bf16_to_f32(h[i]);
    free(h);
}

static float *widened(const uint16_t *x, size_t n)
{
    float *f = malloc(n * sizeof *f);
    for (size_t i = 0; i < n; i++)
        f[i] = tm_bf16_to_f32(x[i]);
    return f;
}

static float round_bf16(float v)
{
    return tm_bf16_to_f32(tm_bf16_from_f32(v));
}

typedef struct norm_shape {
    int tokens, h;
    tm_norm_kind kind;
    bool add_one, bias, delta, no_out;
} norm_shape;

static const norm_shape g_norm[] = {
    {1, 512, TM_NORM_RMS, false, false, true, false},
    {37, 4096, TM_NORM_RMS, false, false, true, false},
    {3, 5120, TM_NORM_RMS, true, false, false, false},
    {2, 16384, TM_NORM_RMS, false, false, true, false},
    {1, 32768, TM_NORM_RMS, false, false, true, false},
    {5, 7, TM_NORM_RMS, false, false, true, false},
    {4, 4095, TM_NORM_LAYER, false, true, true, false},
    {9, 1024, TM_NORM_LAYER, false, true, false, false},
    {6, 768, TM_NORM_LAYER, false, false, true, false},
    {11, 2048, TM_NORM_RMS, false, false, true, true},
};

static void norm_one(const norm_shape *s)
{
    size_t n = (size_t)s->tokens * (size_t)s->h, hb = (size_t)s->h * sizeof(float);
    uint16_t *x = op_random_array(n, TM_DTYPE_BF16, -2, 3);
    uint16_t *d = op_random_array(n, TM_DTYPE_BF16, -1, 1);
    float *w = op_random_array((size_t)s->h, TM_DTYPE_F32, 0.1f, 2);
    float *b = op_random_array((size_t)s->h, TM_DTYPE_F32, -1, 1);
    float *xf = widened(x, n), *df = widened(d, n), *want = calloc(n, sizeof *want);
    float *got = malloc(n * sizeof *got), *residual = malloc(n * sizeof *residual);
    for (size_t i = 0; s->delta && i < n; i++)
        xf[i] = round_bf16(xf[i] + df[i]); /* rounded before it is normalised */
    tm_norm_args a = {.out = s->no_out ? NULL : want,
                      .residual = xf,
                      .w = w,
                      .b = s->bias ? b : NULL,
                      .n_tokens = s->tokens,
                      .h = s->h,
                      .eps = 1e-5f,
                      .kind = s->kind,
                      .add_one = s->add_one};
    assert_int_equal(tm_backend_find("cpu")->ops->norm(g_ref, &a), TM_OK);
    void *gx = to_device(x, n * 2), *gd = to_device(d, n * 2), *go = to_device(x, n * 2);
    void *gw = to_device(w, hb), *gb = to_device(b, hb);
    a.out = s->no_out ? NULL : go, a.residual = gx, a.delta = s->delta ? gd : NULL;
    a.w = gw, a.b = s->bias ? gb : NULL;
    assert_int_equal(g_gpu->ops->norm(g_dev, &a), TM_OK);
    from_device(residual, gx, n);
    assert_memory_equal(residual, xf, n * sizeof *xf);
    from_device(got, go, n);
    if (!s->no_out)
        op_check(op_nmse(got, want, n), NMSE_BF16, "norm cuda T=%d h=%d", s->tokens, s->h);
    void *all[] = {gx, gd, go, gw, gb};
    for (size_t i = 0; i < TM_ARRAY_LEN(all); i++)
        g_gpu->dev->free(g_dev, all[i]);
    free(x), free(d), free(w), free(b), free(xf), free(df), free(want), free(got), free(residual);
}

static void norm_test(void **state)
{
    (void)state;
    for (size_t i = 0; i < TM_ARRAY_LEN(g_norm); i++)
        norm_one(&g_norm[i]);
}

static void embed_test(void **state)
{
    (void)state;
    static const struct {
        int tokens, rows, h, v0;
        float scale;
    } cases[] = {{1, 9, 5, 0, 1}, {70, 33, 512, 40, 22.5f}, {3, 8, 4096, 8, 1}, {5, 6, 1023, 2, 2}};
    for (size_t c = 0; c < TM_ARRAY_LEN(cases) * TM_DTYPE_COUNT; c++) {
        int tokens = cases[c / 3].tokens, rows = cases[c / 3].rows, h = cases[c / 3].h;
        tm_dtype t = (tm_dtype)(c % 3);
        size_t n = (size_t)tokens * (size_t)h;
        void *data = op_random_array((size_t)rows * (size_t)h, t, -1, 1);
        int32_t *ids = malloc((size_t)tokens * sizeof *ids);
        float *want = malloc(n * sizeof *want), *got = malloc(n * sizeof *got);
        for (int i = 0; i < tokens; i++)
            ids[i] =
                op_pick(cases[c / 3].v0 > 3 ? cases[c / 3].v0 - 3 : 0, cases[c / 3].v0 + rows + 2);
        tm_weight w = {.dtype = t, .n = rows, .k = h, .data = data};
        tm_embed_args a = {.out = want,
                           .ids = ids,
                           .table = &w,
                           .n_tokens = tokens,
                           .v0 = cases[c / 3].v0,
                           .scale = cases[c / 3].scale};
        assert_int_equal(tm_backend_find("cpu")->ops->embed(g_ref, &a), TM_OK);
        for (size_t i = 0; i < n; i++)
            want[i] = round_bf16(want[i]);
        void *gdata = to_device(data, (size_t)rows * (size_t)h * tm_dtype_size(t));
        void *gids = to_device(ids, (size_t)tokens * sizeof *ids), *gout = NULL;
        assert_int_equal(g_gpu->dev->alloc(g_dev, n * 2, &gout, NULL), TM_OK);
        w.data = gdata, a.ids = gids, a.out = gout;
        assert_int_equal(g_gpu->ops->embed(g_dev, &a), TM_OK);
        from_device(got, gout, n);
        assert_memory_equal(got, want, n * sizeof *got);
        g_gpu->dev->free(g_dev, gdata);
        g_gpu->dev->free(g_dev, gids);
        g_gpu->dev->free(g_dev, gout);
        free(data), free(ids), free(want), free(got);
    }
}

static void gather_rows_test(void **state)
{
    (void)state;
    static const int32_t rows[] = {0, 3, 4, 11};
    for (int h = 37; h <= 512; h += 475) {
        size_t n = 12 * (size_t)h, m = TM_ARRAY_LEN(rows) * (size_t)h;
        uint16_t *x = op_random_array(n, TM_DTYPE_BF16, -1, 1);
        float *got = malloc(m * sizeof *got);
        void *gx = to_device(x, n * 2), *grows = to_device(rows, sizeof rows),
             *gout = to_device(x, m * 2);
        tm_gather_rows_args a = {
            .out = gout, .x = gx, .rows = grows, .n_rows = (int)TM_ARRAY_LEN(rows), .h = h};
        assert_int_equal(g_gpu->ops->gather_rows(g_dev, &a), TM_OK);
        from_device(got, gout, m);
        for (size_t i = 0; i < m; i++)
            assert_true(got[i] ==
                        tm_bf16_to_f32(x[(size_t)rows[i / (size_t)h] * (size_t)h + i % (size_t)h]));
        g_gpu->dev->free(g_dev, gx);
        g_gpu->dev->free(g_dev, grows);
        g_gpu->dev->free(g_dev, gout);
        free(x), free(got);
    }
}

static void refused_test(void **state)
{
    (void)state;
    tm_device_opts o = {.index = 1000};
    tm_device *dev = NULL;
    tm_err err = TM_ERR_INIT;
    void *p = NULL;
    size_t left = 0;
    assert_int_equal(g_gpu->dev->open(&dev, &o, &err), TM_STATUS_CONFIG);
    assert_null(dev);
    assert_int_equal(g_gpu->dev->mem_free(g_dev, &left, &err), TM_OK);
    assert_int_equal(g_gpu->dev->alloc(g_dev, (size_t)1 << 60, &p, &err), TM_STATUS_NO_MEMORY);
    assert_null(p);
    assert_int_equal(g_gpu->dev->sync(g_dev), TM_OK); /* a refused allocation is not fatal */
}

int main(void)
{
    tm_err err = TM_ERR_INIT;
    tm_device_opts o = {.index = 0};
    op_seed();
    g_gpu = tm_backend_find("cuda");
    if (!g_gpu || g_gpu->dev->open(&g_dev, &o, &err) != TM_OK) {
        printf("skipped: %s\n", err.msg);
        return 0;
    }
    printf("%s\n", g_gpu->dev->describe(g_dev));
    g_ref = op_device_open("ref", 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(norm_test),
        cmocka_unit_test(embed_test),
        cmocka_unit_test(gather_rows_test),
        cmocka_unit_test(refused_test),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    op_device_close(g_ref);
    g_gpu->dev->close(g_dev);
    return failed;
}
