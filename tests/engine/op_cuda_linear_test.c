/* Linear layers on the GPU against the CPU reference: every kernel that a shape can lead to, with the edges of
 * its tiles; the gated pair against linear and activation; activations; argmax. */
#include <math.h>

#include "common/check.h"
#include "tests/engine/op_cuda.h"

typedef struct linear_shape {
    int n, k, tokens, ldx_more, ldo_more;
    bool bias, f32_out;
} linear_shape;

static const linear_shape g_linear[] = {
    {16, 32, 1, 0, 0, false, false},
    {1, 32, 1, 0, 0, true, false},
    {17, 64, 3, 0, 0, true, false},
    {1024, 512, 1, 0, 0, false, false},
    {3072, 512, 8, 0, 0, false, true},
    {512, 1536, 5, 8, 3, true, false},
    {1152, 896, 1, 0, 0, true, false},
    {896, 4864, 7, 0, 0, false, false},
    {896, 4864, 1, 0, 0, false, false}, /* all of it in shared memory, as the next six */
    {896, 896, 1, 0, 0, true, false},
    {300, 512, 1, 0, 0, true, false},
    {30, 1472, 1, 0, 0, false, false},
    {101, 1472, 1, 0, 0, true, false},
    {7, 128, 1, 0, 0, true, false},
    {24, 4864, 1, 0, 0, false, false},
    {4101, 1056, 2, 0, 0, false, true},
    {4096, 4096, 1, 0, 0, false, false},
    {640, 14336, 8, 0, 0, true, false}, /* x does not fit: K is cut */
    {1000, 14336, 3, 0, 0, false, false},
    {320, 3200, 8, 0, 0, false, false}, /* tiles are taken by whoever is free */
    {150, 6272, 3, 0, 0, true, false},  /* and K has two parts */
    {4096, 14336, 2, 0, 0, false, false},
    {75, 12800, 8, 0, 4, true, false}, /* two slices of K */
    {4096, 14336, 8, 0, 0, false, true},
    {512, 4096, 16, 0, 0, false, false}, /* two and four pieces of tokens */
    {520, 2048, 11, 16, 0, true, true},
    {512, 4096, 32, 0, 0, true, false},
    {300, 1024, 25, 0, 5, false, false},
    {8192, 512, 32, 0, 0, false, true},
    {512, 512, 33, 0, 0, false, false}, /* cuBLASLt */
    {1536, 512, 100, 0, 0, true, false},
    {8192, 512, 64, 0, 0, false, true},
    {512, 1536, 257, 8, 8, true, false},
    {33, 40, 2, 0, 0, true, false}, /* K that no fast kernel takes */
    {20, 33, 40, 1, 1, true, true},
    {12, 100, 64, 0, 0, false, false},
};

/* The same numbers to both; got and want are [tokens, n]. */
static void run_linear(const linear_shape *s, float *got, float *want)
{
    size_t ldx = (size_t)(s->k + s->ldx_more), ldo = (size_t)(s->n + s->ldo_more);
    size_t nx = ldx * (size_t)s->tokens, nw = (size_t)s->n * (size_t)s->k;
    void *x = op_random_array(nx, gpu_dtype, -1, 1), *w = op_random_array(nw, gpu_dtype, -1, 1);
    float *b = op_random_array((size_t)s->n, TM_DTYPE_F32, -3, 3);
    float *xf = gpu_widen(x, gpu_dtype, nx);
    for (int i = 0; i < s->n; i++)
        b[i] = gpu_round(b[i]); /* as a checkpoint has it */
    tm_weight weight = {
        .dtype = gpu_dtype, .n = s->n, .k = s->k, .data = w, .bias = s->bias ? b : NULL};
    tm_linear_args a = {
        .out = want, .x = xf, .w = &weight, .n_tokens = s->tokens, .ldx = (int)ldx, .ldo = s->n};
    assert_int_equal(tm_backend_find("cpu")->ops->linear(gpu_ref, &a), TM_OK);
    size_t no = ldo * (size_t)s->tokens;
    float *all = malloc(no * sizeof *all);
    void *gx = gpu_put(x, nx * 2), *gw = gpu_put(w, nw * 2), *go = gpu_take(no * 4);
    void *gb = gpu_put(b, (size_t)s->n * sizeof *b);
    weight.data = gw, weight.bias = s->bias ? gb : NULL;
    a.x = gx, a.out = go, a.ldo = (int)ldo, a.f32_out = s->f32_out;
    assert_int_equal(gpu->ops->linear(gpu_dev, &a), TM_OK);
    if (s->f32_out)
        gpu_get_f32(all, go, no);
    else
        gpu_get(all, go, no);
    for (size_t t = 0; t < (size_t)s->tokens; t++) {
        memcpy(got + t * (size_t)s->n, all + t * ldo, (size_t)s->n * sizeof *got);
        for (size_t i = (size_t)s->n; i < ldo; i++)
            assert_true(isnan(all[t * ldo + i])); /* nothing behind a row is written */
    }
    gpu_free(gx), gpu_free(gw), gpu_free(go), gpu_free(gb);
    free(x), free(w), free(b), free(xf), free(all);
}

static void linear_test(void **state)
{
    (void)state;
    for (size_t i = 0; i < TM_ARRAY_LEN(g_linear); i++) {
        const linear_shape *s = &g_linear[i];
        if ((size_t)s->n * (size_t)s->k > 1 << 20 && !gpu_takes(4))
            continue;
        size_t n = (size_t)s->n * (size_t)s->tokens;
        float *got = malloc(n * sizeof *got), *want = malloc(n * sizeof *want);
        run_linear(s, got, want);
        op_check(op_nmse(got, want, n), gpu_bound(), "linear [%d, %d] x %d", s->n, s->k, s->tokens);
        free(got), free(want);
    }
}

/* After sizes were tried: what was chosen serves them, with a bias, too, and numbers of tokens below that it may or may not
 * be able to compute. */
static void tune_test(void **state)
{
    (void)state;
    static const int tried[] = {64, 16, 64, 300, 3}, tokens[] = {64, 50, 33, 32, 20, 16, 15, 9, 3};
    for (int f32 = 0; f32 < 2; f32++) {
        linear_shape s = {.n = 264, .k = 256, .f32_out = f32 != 0};
        size_t nw = (size_t)s.n * (size_t)s.k;
        void *w = gpu_take(nw * 2), *x = gpu_take((size_t)s.k * 300 * 2);
        void *out = gpu_take((size_t)s.n * 300 * 4);
        const tm_weight weight = {.dtype = gpu_dtype, .n = s.n, .k = s.k, .data = w};
        for (size_t i = 0; i < TM_ARRAY_LEN(tried); i++) {
            const tm_linear_args a = {.out = out,
                                      .x = x,
                                      .w = &weight,
                                      .n_tokens = tried[i],
                                      .ldx = s.k,
                                      .ldo = s.n,
                                      .f32_out = s.f32_out};
            assert_int_equal(gpu->ops->linear_tune(gpu_dev, &a), TM_OK);
        }
        gpu_free(w), gpu_free(x), gpu_free(out);
        for (size_t i = 0; i < 2 * TM_ARRAY_LEN(tokens); i++) {
            s.bias = i % 2 == 1;
            s.tokens = tokens[i / 2];
            size_t n = (size_t)s.n * (size_t)s.tokens;
            float *got = malloc(n * sizeof *got), *want = malloc(n * sizeof *want);
            run_linear(&s, got, want);
            op_check(op_nmse(got, want, n), gpu_bound(), "tried [%d, %d] x %d", s.n, s.k, s.tokens);
            free(got), free(want);
        }
    }
}

/* Twice the same call gives the same bits, also where partial sums of several blocks are added. */
static void repeat_test(void **state)
{
    (void)state;
    const int n = 640, k = 14336, tokens = 32;
    void *x = op_random_array((size_t)tokens * k, gpu_dtype, -1, 1);
    void *w = op_random_array((size_t)n * k, gpu_dtype, -1, 1);
    void *gx = gpu_put(x, (size_t)tokens * k * 2), *gw = gpu_put(w, (size_t)n * k * 2);
    void *go = gpu_take((size_t)tokens * n * 2);
    tm_weight weight = {.dtype = gpu_dtype, .n = n, .k = k, .data = gw};
    tm_linear_args a = {.out = go, .x = gx, .w = &weight, .n_tokens = tokens, .ldx = k, .ldo = n};
    float *first = malloc((size_t)tokens * n * sizeof *first);
    float *again = malloc((size_t)tokens * n * sizeof *again);
    for (int i = 0; i < 20; i++) {
        if (i > 1 && !gpu_takes(20))
            continue;
        assert_int_equal(gpu->ops->linear(gpu_dev, &a), TM_OK);
        gpu_get(i == 0 ? first : again, go, (size_t)tokens * n);
        if (i > 0)
            assert_memory_equal(first, again, (size_t)tokens * n * sizeof *first);
    }
    gpu_free(gx), gpu_free(gw), gpu_free(go);
    free(x), free(w), free(first), free(again);
}

typedef struct gated_shape {
    int f, k, tokens;
    tm_act_kind act;
} gated_shape;

static const gated_shape g_gated[] = {
    {1536, 512, 1, TM_ACT_SILU},       {4864, 896, 1, TM_ACT_SILU},  {513, 64, 8, TM_ACT_GELU_ERF},
    {1000, 1024, 4, TM_ACT_GELU_TANH}, {256, 4096, 13, TM_ACT_SILU}, {256, 4096, 30, TM_ACT_SILU},
    {1536, 512, 70, TM_ACT_SILU},      {33, 48, 3, TM_ACT_GELU_ERF}, {150, 512, 1, TM_ACT_SILU},
    {27, 960, 1, TM_ACT_GELU_TANH},    {5, 1024, 1, TM_ACT_SILU},
};

static void gated_one(const gated_shape *s)
{
    size_t nx = (size_t)s->tokens * (size_t)s->k, nw = 2 * (size_t)s->f * (size_t)s->k;
    size_t no = (size_t)s->tokens * (size_t)s->f;
    void *x = op_random_array(nx, gpu_dtype, -1, 1),
         *w = op_random_array(nw, gpu_dtype, -0.2f, 0.2f);
    float *xf = gpu_widen(x, gpu_dtype, nx), *gu = malloc(2 * no * sizeof *gu);
    float *want = malloc(no * sizeof *want), *got = malloc(no * sizeof *got);
    tm_weight weight = {.dtype = gpu_dtype, .n = 2 * s->f, .k = s->k, .data = w};
    tm_linear_args l = {
        .out = gu, .x = xf, .w = &weight, .n_tokens = s->tokens, .ldx = s->k, .ldo = 2 * s->f};
    tm_act_args c = {
        .out = want, .gate_up = gu, .n_tokens = s->tokens, .f = s->f, .act = s->act, .gated = true};
    assert_int_equal(tm_backend_find("cpu")->ops->linear(gpu_ref, &l), TM_OK);
    assert_int_equal(tm_backend_find("cpu")->ops->act(gpu_ref, &c), TM_OK);
    void *gx = gpu_put(x, nx * 2), *gw = gpu_put(w, nw * 2);
    void *gg = gpu_take(no * 4), *go = gpu_take(no * 2);
    weight.data = gw;
    tm_linear_gated_args a = {.out = go,
                              .gate_up = gg,
                              .x = gx,
                              .w = &weight,
                              .n_tokens = s->tokens,
                              .ldx = s->k,
                              .act = s->act};
    assert_int_equal(gpu->ops->linear_gated(gpu_dev, &a), TM_OK);
    gpu_get(got, go, no);
    op_check(op_nmse(got, want, no), gpu_bound(), "gated [%d, %d] x %d", s->f, s->k, s->tokens);
    gpu_free(gx), gpu_free(gw), gpu_free(gg), gpu_free(go);
    free(x), free(w), free(xf), free(gu), free(want), free(got);
}

static void gated_test(void **state)
{
    (void)state;
    for (size_t i = 0; i < TM_ARRAY_LEN(g_gated); i++)
        gated_one(&g_gated[i]);
}

/* The norm in front of a layer, as one operator: the sum in the other buffer and what the layer makes of it. */
static void normed_one(int tokens, int n, int k, bool delta, bool gated)
{
    const tm_op_table *cpu = tm_backend_find("cpu")->ops;
    size_t nx = (size_t)tokens * (size_t)k, nw = (size_t)n * (size_t)k;
    size_t no = (size_t)tokens * (size_t)(gated ? n / 2 : n), all = (size_t)tokens * (size_t)n;
    void *x = op_random_array(nx, gpu_dtype, -2, 3), *d = op_random_array(nx, gpu_dtype, -1, 1);
    void *w = op_random_array(nw, gpu_dtype, -0.1f, 0.1f);
    float *g = op_random_array((size_t)k, TM_DTYPE_F32, 0.1f, 2);
    float *xf = gpu_widen(x, gpu_dtype, nx), *df = gpu_widen(d, gpu_dtype, nx);
    float *normed = malloc(nx * sizeof(float)), *wide = malloc(all * sizeof(float));
    float *want = malloc(no * sizeof(float)), *got = malloc((nx + no) * sizeof(float));
    for (size_t i = 0; delta && i < nx; i++)
        xf[i] = gpu_round(xf[i] + df[i]);
    tm_weight weight = {.dtype = gpu_dtype, .n = n, .k = k, .data = w};
    tm_norm_args na = {
        .out = normed, .residual = xf, .w = g, .n_tokens = tokens, .h = k, .eps = 1e-5f};
    tm_linear_args la = {
        .out = wide, .x = normed, .w = &weight, .n_tokens = tokens, .ldx = k, .ldo = n};
    tm_act_args aa = {.out = want,
                      .gate_up = wide,
                      .n_tokens = tokens,
                      .f = n / 2,
                      .act = TM_ACT_SILU,
                      .gated = true};
    assert_int_equal(cpu->norm(gpu_ref, &na), TM_OK);
    assert_int_equal(cpu->linear(gpu_ref, &la), TM_OK);
    if (gated)
        assert_int_equal(cpu->act(gpu_ref, &aa), TM_OK);
    void *gx = gpu_put(x, nx * 2), *gd = gpu_put(d, nx * 2), *gr = gpu_take(nx * 2);
    void *gn = gpu_take(nx * 2), *gg = gpu_put(g, (size_t)k * 4), *gw = gpu_put(w, nw * 2);
    void *gu = gpu_take(all * 2), *go = gpu_take(no * 2);
    weight.data = gw;
    na.out = gn, na.residual = gx, na.delta = delta ? gd : NULL, na.w = gg;
    na.residual_out = delta ? gr : NULL;
    la.out = go, la.x = gn;
    tm_linear_gated_args ga = {.out = go,
                               .gate_up = gu,
                               .x = gn,
                               .w = &weight,
                               .n_tokens = tokens,
                               .ldx = k,
                               .act = TM_ACT_SILU};
    assert_int_equal(gated ? gpu->ops->norm_linear_gated(gpu_dev, &na, &ga)
                           : gpu->ops->norm_linear(gpu_dev, &na, &la),
                     TM_OK);
    gpu_get(got, delta ? gr : gx, nx);
    assert_memory_equal(got, xf, nx * sizeof(float));
    gpu_get(got, go, no);
    op_check(op_nmse(got, gated ? want : wide, no), gpu_bound(), "normed [%d, %d] x %d", n, k,
             tokens);
    void *device[] = {gx, gd, gr, gn, gg, gw, gu, go};
    for (size_t i = 0; i < TM_ARRAY_LEN(device); i++)
        gpu_free(device[i]);
    free(x), free(d), free(w), free(g), free(xf), free(df), free(normed), free(wide);
    free(want), free(got);
}

static void normed_test(void **state)
{
    (void)state;
    static const int tokens[] = {1, 2, 3, 9, 40}, widths[] = {512, 896, 4096};
    for (size_t t = 0; t < TM_ARRAY_LEN(tokens); t++)
        for (size_t k = 0; k < TM_ARRAY_LEN(widths); k++)
            for (int i = 0; i < 4; i++)
                if (gpu_takes(6))
                    normed_one(tokens[t], 1040, widths[k], i % 2, i / 2);
    for (int i = 0; i < 8; i++)
        normed_one(1, i / 4 ? 166 : 42, i / 4 ? 896 : 1024, i % 2, i / 2 % 2);
}

static void act_test(void **state)
{
    (void)state;
    static const int tokens[] = {1, 70}, widths[] = {1536, 37};
    for (int i = 0; i < 24; i++) {
        int t = tokens[i % 2], f = widths[i / 2 % 2];
        bool gated = i / 4 % 2;
        tm_act_kind kind = (tm_act_kind)(i / 8);
        size_t no = (size_t)t * (size_t)f, ni = gated ? 2 * no : no;
        void *x = op_random_array(ni, gpu_dtype, -8, 8);
        float *xf = gpu_widen(x, gpu_dtype, ni);
        float *want = malloc(no * sizeof *want), *got = malloc(no * sizeof *got);
        tm_act_args a = {
            .out = want, .gate_up = xf, .n_tokens = t, .f = f, .act = kind, .gated = gated};
        assert_int_equal(tm_backend_find("cpu")->ops->act(gpu_ref, &a), TM_OK);
        void *gx = gpu_put(x, ni * 2), *go = gpu_take(no * 2);
        a.out = go, a.gate_up = gx;
        assert_int_equal(gpu->ops->act(gpu_dev, &a), TM_OK);
        gpu_get(got, go, no);
        op_check(op_nmse(got, want, no), gpu_bound(), "act %d T=%d F=%d", (int)kind, t, f);
        gpu_free(gx), gpu_free(go);
        free(x), free(xf), free(want), free(got);
    }
}

static void argmax_test(void **state)
{
    (void)state;
    static const int sizes[] = {1, 31, 8192, 128256, 151936};
    for (size_t c = 0; c < TM_ARRAY_LEN(sizes); c++) {
        const int rows = 5, n = sizes[c];
        float *x = op_random_array((size_t)rows * (size_t)n, TM_DTYPE_F32, -9, 9);
        int32_t want[5], got[5];
        for (int r = 0; r < rows; r++) {
            float *row = x + (size_t)r * (size_t)n;
            want[r] = op_pick(0, n - 1);
            row[want[r]] = 10.0f;
            if (r == 1 && want[r] + 1 < n)
                row[op_pick(want[r] + 1, n - 1)] = 10.0f; /* a tie behind it */
        }
        for (int i = 0; i < n; i++)
            x[4 * (size_t)n + (size_t)i] = NAN;
        want[4] = -1;
        void *gx = gpu_put(x, (size_t)rows * (size_t)n * sizeof *x), *go = gpu_take(sizeof got);
        tm_argmax_args a = {.out = go, .x = gx, .n_rows = rows, .n = n};
        assert_int_equal(gpu->ops->argmax(gpu_dev, &a), TM_OK);
        assert_int_equal(gpu->dev->download(gpu_dev, got, go, sizeof got), TM_OK);
        for (int r = 0; r < rows; r++)
            assert_int_equal(got[r], want[r]);
        gpu_free(gx), gpu_free(go);
        free(x);
    }
}

/* A recorded call gives what the call gives, with the numbers that are in memory when it is launched. */
static void graph_test(void **state)
{
    (void)state;
    const int n = 96, k = 64;
    float w[64] = {0}, got[64];
    uint16_t x[64];
    void *gw = gpu_take((size_t)n * k * 2), *gx = gpu_take(sizeof x), *go = gpu_take(sizeof x);
    for (int i = 0; i < k; i++)
        w[i] = 1.0f;
    void *gn = gpu_put(w, sizeof w);
    tm_norm_args a = {.out = go, .residual = gx, .w = gn, .n_tokens = 1, .h = k, .eps = 1e-6f};
    tm_graph *graph = NULL;
    assert_int_equal(gpu->dev->graph_begin(gpu_dev), TM_OK);
    assert_int_equal(gpu->ops->norm(gpu_dev, &a), TM_OK);
    assert_int_equal(gpu->dev->graph_end(gpu_dev, &graph), TM_OK);
    for (int round = 1; round < 4; round++) {
        for (int i = 0; i < k; i++)
            tm_store_f32(x, (size_t)i, gpu_dtype, i % round == 0 ? 2.0f : -2.0f);
        assert_int_equal(gpu->dev->upload(gpu_dev, gx, x, sizeof x), TM_OK);
        assert_int_equal(gpu->dev->graph_launch(gpu_dev, graph), TM_OK);
        gpu_get(got, go, (size_t)k);
        for (int i = 0; i < k; i++)
            assert_true(fabsf(got[i] - (i % round == 0 ? 1.0f : -1.0f)) < 1e-3f);
    }
    gpu->dev->graph_free(gpu_dev, graph);
    gpu_free(gw), gpu_free(gx), gpu_free(go), gpu_free(gn);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(linear_test), cmocka_unit_test(repeat_test), cmocka_unit_test(gated_test),
        cmocka_unit_test(normed_test), cmocka_unit_test(act_test),    cmocka_unit_test(argmax_test),
        cmocka_unit_test(graph_test),  cmocka_unit_test(tune_test),
    };
    return gpu_run(tests, TM_ARRAY_LEN(tests));
}
