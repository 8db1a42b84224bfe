/* The CUDA operators against the CPU reference, on a machine that has a GPU; skipped elsewhere.
 *
 * The reference gets the same inputs, widened. Copies and the residual add must be exact after
 * rounding; normalised values may differ by the last bit. */
#include "common/check.h"
#include "tests/engine/op_cuda.h"

/* Rounding alone costs up to 2^-p of a value with p significant bits: its mean square is 2^-2p / 3. A few values may all
 * come near the worst. */
static double rounding(size_t n)
{
    double worst = gpu_dtype == TM_DTYPE_F16 ? 0x1p-22 : 0x1p-16;
    return n < 1000 ? 1.01 * worst : worst / 3;
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
    uint16_t *x = op_random_array(n, gpu_dtype, -2, 3);
    uint16_t *d = op_random_array(n, gpu_dtype, -1, 1);
    float *w = op_random_array((size_t)s->h, TM_DTYPE_F32, 0.1f, 2);
    float *b = op_random_array((size_t)s->h, TM_DTYPE_F32, -1, 1);
    float *xf = gpu_widen(x, gpu_dtype, n), *df = gpu_widen(d, gpu_dtype, n),
          *want = calloc(n, sizeof *want);
    float *got = malloc(n * sizeof *got), *residual = malloc(n * sizeof *residual);
    for (size_t i = 0; s->delta && i < n; i++)
        xf[i] = gpu_round(xf[i] + df[i]); /* rounded before it is normalised */
    tm_norm_args a = {.out = s->no_out ? NULL : want,
                      .residual = xf,
                      .w = w,
                      .b = s->bias ? b : NULL,
                      .n_tokens = s->tokens,
                      .h = s->h,
                      .eps = 1e-5f,
                      .kind = s->kind,
                      .add_one = s->add_one};
    assert_int_equal(tm_backend_find("cpu")->ops->norm(gpu_ref, &a), TM_OK);
    void *gx = gpu_put(x, n * 2), *gd = gpu_put(d, n * 2), *go = gpu_put(x, n * 2);
    void *gw = gpu_put(w, hb), *gb = gpu_put(b, hb);
    a.out = s->no_out ? NULL : go, a.residual = gx, a.delta = s->delta ? gd : NULL;
    a.w = gw, a.b = s->bias ? gb : NULL;
    assert_int_equal(gpu->ops->norm(gpu_dev, &a), TM_OK);
    gpu_get(residual, gx, n);
    assert_memory_equal(residual, xf, n * sizeof *xf);
    gpu_get(got, go, n);
    if (!s->no_out)
        op_check(op_nmse(got, want, n), rounding(n), "norm cuda T=%d h=%d", s->tokens, s->h);
    void *all[] = {gx, gd, go, gw, gb};
    for (size_t i = 0; i < TM_ARRAY_LEN(all); i++)
        gpu_free(all[i]);
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
        int32_t *picked = malloc((size_t)tokens * sizeof *picked); /* by an earlier step */
        for (int i = 0; i < tokens; i++) {
            picked[tokens - 1 - i] = i == 4 ? -1 : ids[i];
            ids[i] = i % 3 == 1 ? -1 - (tokens - 1 - i) : ids[i];
        }
        tm_weight w = {.dtype = t, .n = rows, .k = h, .data = data};
        tm_embed_args a = {.out = want,
                           .ids = ids,
                           .picked = picked,
                           .table = &w,
                           .n_tokens = tokens,
                           .v0 = cases[c / 3].v0,
                           .scale = cases[c / 3].scale};
        assert_int_equal(tm_backend_find("cpu")->ops->embed(gpu_ref, &a), TM_OK);
        for (size_t i = 0; i < n; i++)
            want[i] = gpu_round(want[i]);
        void *gdata = gpu_put(data, (size_t)rows * (size_t)h * tm_dtype_size(t));
        void *gids = gpu_put(ids, (size_t)tokens * sizeof *ids), *gout = NULL;
        void *gpicked = gpu_put(picked, (size_t)tokens * sizeof *picked);
        assert_int_equal(gpu->dev->alloc(gpu_dev, n * 2, &gout, NULL), TM_OK);
        w.data = gdata, a.ids = gids, a.picked = gpicked, a.out = gout;
        assert_int_equal(gpu->ops->embed(gpu_dev, &a), TM_OK);
        gpu_get(got, gout, n);
        assert_memory_equal(got, want, n * sizeof *got);
        gpu_free(gdata);
        gpu_free(gids);
        gpu_free(gpicked);
        gpu_free(gout);
        free(data), free(ids), free(picked), free(want), free(got);
    }
}

static void gather_rows_test(void **state)
{
    (void)state;
    static const int32_t rows[] = {0, 3, 4, 11};
    for (int h = 37; h <= 512; h += 475) {
        size_t n = 12 * (size_t)h, m = TM_ARRAY_LEN(rows) * (size_t)h;
        uint16_t *x = op_random_array(n, gpu_dtype, -1, 1);
        float *got = malloc(m * sizeof *got);
        void *gx = gpu_put(x, n * 2), *grows = gpu_put(rows, sizeof rows),
             *gout = gpu_put(x, m * 2);
        tm_gather_rows_args a = {
            .out = gout, .x = gx, .rows = grows, .n_rows = (int)TM_ARRAY_LEN(rows), .h = h};
        assert_int_equal(gpu->ops->gather_rows(gpu_dev, &a), TM_OK);
        gpu_get(got, gout, m);
        for (size_t i = 0; i < m; i++)
            assert_true(
                got[i] ==
                tm_load_f32(x, (size_t)rows[i / (size_t)h] * (size_t)h + i % (size_t)h, gpu_dtype));
        gpu_free(gx);
        gpu_free(grows);
        gpu_free(gout);
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
    assert_int_equal(gpu->dev->open(&dev, &o, &err), TM_STATUS_CONFIG);
    assert_null(dev);
    assert_int_equal(gpu->dev->mem_free(gpu_dev, &left, &err), TM_OK);
    assert_int_equal(gpu->dev->alloc(gpu_dev, (size_t)1 << 60, &p, &err), TM_STATUS_NO_MEMORY);
    assert_null(p);
    assert_int_equal(gpu->dev->sync(gpu_dev), TM_OK); /* a refused allocation is not fatal */
}

/* A pinned buffer may be filled again once the event behind its copy is done. */
static void event_test(void **state)
{
    enum { N = 1 << 16, ROUNDS = 5 };
    (void)state;
    const tm_device_ops *ops = gpu->dev;
    tm_dev_event *ev = NULL;
    void *host = NULL;
    char *dev = gpu_take(N * ROUNDS), *got = malloc(N);
    assert_non_null(got);
    assert_int_equal(ops->alloc_host(gpu_dev, N, &host, NULL), TM_OK);
    assert_int_equal(ops->event_create(gpu_dev, &ev, NULL), TM_OK);
    assert_int_equal(ops->event_wait(gpu_dev, ev), TM_OK); /* never recorded */
    for (int i = 0; i < ROUNDS; i++) {
        memset(host, 'a' + i, N);
        assert_int_equal(ops->upload(gpu_dev, dev + i * N, host, N), TM_OK);
        assert_int_equal(ops->event_record(gpu_dev, ev), TM_OK);
        assert_int_equal(ops->event_wait(gpu_dev, ev), TM_OK);
    }
    for (int i = 0; i < ROUNDS; i++) {
        assert_int_equal(ops->download(gpu_dev, got, dev + i * N, N), TM_OK);
        for (int k = 0; k < N; k++)
            assert_true(got[k] == 'a' + i);
    }
    ops->event_free(gpu_dev, ev);
    ops->event_free(gpu_dev, NULL);
    ops->free_host(gpu_dev, host);
    gpu_free(dev);
    free(got);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(norm_test),        cmocka_unit_test(embed_test),
        cmocka_unit_test(gather_rows_test), cmocka_unit_test(refused_test),
        cmocka_unit_test(event_test),
    };
    return gpu_run(tests, TM_ARRAY_LEN(tests));
}
