/* The CUDA operators that only some families need against the CPU reference: norms of heads, bounds, strided copies,
 * routing of every kind, experts on each of their ways, linear layers in the middle of rows, and rope by sequence. */
#include <math.h>

#include "common/check.h"
#include "tests/engine/op_cuda.h"

static const tm_op_table *cpu(void)
{
    return tm_backend_find("cpu")->ops;
}

static void free_all(void **gpu_side, size_t n)
{
    for (size_t i = 0; i < n; i++)
        gpu_free(gpu_side[i]);
}

static void head_norm_test(void **state)
{
    (void)state;
    static const struct {
        int tokens, ld, at, heads, d;
        bool add_one;
    } cases[] = {{1, 128, 0, 1, 128, false},    {5, 200, 0, 3, 48, true},
                 {9, 1024, 512, 4, 128, false}, {3, 333, 7, 5, 33, false},
                 {17, 1536, 0, 1, 1536, true},  {2, 640, 64, 1, 512, false},
                 {33, 1088, 4, 2, 256, true},   {1, 8, 0, 1, 8, false}};
    for (size_t c = 0; c < TM_ARRAY_LEN(cases); c++) {
        int d = cases[c].d;
        size_t n = (size_t)cases[c].tokens * (size_t)cases[c].ld;
        uint16_t *x = op_random_array(n, gpu_dtype, -2, 2);
        float *w = op_random_array((size_t)d, TM_DTYPE_F32, -1, 1);
        float *want = gpu_widen(x, gpu_dtype, n), *got = malloc(n * sizeof *got);
        float *before = gpu_widen(x, gpu_dtype, n);
        void *gx = gpu_put(x, n * 2), *gw = gpu_put(w, (size_t)d * sizeof *w);
        tm_head_norm_args a = {.x = want + cases[c].at,
                               .w = w,
                               .n_tokens = cases[c].tokens,
                               .ld = cases[c].ld,
                               .n_heads = cases[c].heads,
                               .d = d,
                               .eps = 1e-6f,
                               .add_one = cases[c].add_one};
        assert_int_equal(cpu()->head_norm(gpu_ref, &a), TM_OK);
        a.x = (uint16_t *)gx + cases[c].at, a.w = gw;
        assert_int_equal(gpu->ops->head_norm(gpu_dev, &a), TM_OK);
        gpu_get(got, gx, n);
        op_check(op_nmse(got, want, n), gpu_bound() / 4, "head_norm d=%d", d);
        for (size_t i = 0; i < n; i++) { /* what lies around the heads is not touched */
            int col = (int)(i % (size_t)cases[c].ld) - cases[c].at;
            if (col < 0 || col >= cases[c].heads * d)
                assert_true(got[i] == before[i]);
        }
        free_all((void *[]){gx, gw}, 2);
        free(x), free(w), free(want), free(got), free(before);
    }
}

static void bound_test(void **state)
{
    (void)state;
    static const struct {
        int rows, n;
        bool smooth, f32;
    } cases[] = {{1, 8, false, false}, {7, 129, false, false}, {5, 4096, true, false},
                 {3, 257, true, true}, {4, 1000, false, true}, {1, 3, true, false}};
    for (size_t c = 0; c < TM_ARRAY_LEN(cases); c++) {
        size_t n = (size_t)cases[c].rows * (size_t)cases[c].n;
        tm_dtype t = cases[c].f32 ? TM_DTYPE_F32 : gpu_dtype;
        void *x = op_random_array(n, t, -40, 40);
        float *want = gpu_widen(x, t, n), *got = malloc(n * sizeof *got);
        void *gx = gpu_put(x, n * tm_dtype_size(t));
        tm_bound_args a = {.x = want,
                           .n_rows = cases[c].rows,
                           .n = cases[c].n,
                           .limit = 30,
                           .smooth = cases[c].smooth,
                           .f32 = true};
        assert_int_equal(cpu()->bound(gpu_ref, &a), TM_OK);
        a.x = gx, a.f32 = cases[c].f32;
        assert_int_equal(gpu->ops->bound(gpu_dev, &a), TM_OK);
        if (cases[c].f32)
            gpu_get_f32(got, gx, n);
        else
            gpu_get(got, gx, n);
        if (cases[c].smooth)
            op_check(op_nmse(got, want, n), cases[c].f32 ? 1e-12 : gpu_bound() / 4, "bound");
        else
            assert_memory_equal(got, want, n * sizeof *got);
        gpu_free(gx);
        free(x), free(want), free(got);
    }
}

static void copy_test(void **state)
{
    (void)state;
    static const tm_copy_args cases[] = {
        {.n_tokens = 1, .groups = 1, .cols = 8, .ldo = 8, .gdo = 8, .ldx = 8, .gdx = 8},
        {.n_tokens = 9, .groups = 4, .cols = 32, .ldo = 512, .gdo = 96, .ldx = 384, .gdx = 96},
        {.n_tokens = 5, .groups = 3, .cols = 7, .ldo = 40, .gdo = 11, .ldx = 30, .gdx = 9},
        {.n_tokens = 130, .groups = 2, .cols = 64, .ldo = 1200, .gdo = 576, .ldx = 400, .gdx = 192},
    };
    for (size_t c = 0; c < TM_ARRAY_LEN(cases); c++) {
        tm_copy_args a = cases[c];
        size_t n = (size_t)(a.n_tokens * a.ldx), m = (size_t)(a.n_tokens * a.ldo);
        uint16_t *x = op_random_array(n, gpu_dtype, -2, 2),
                 *o = op_random_array(m, gpu_dtype, -2, 2);
        float *xf = gpu_widen(x, gpu_dtype, n), *want = gpu_widen(o, gpu_dtype, m);
        float *got = malloc(m * sizeof *got);
        void *gx = gpu_put(x, n * 2), *go = gpu_put(o, m * 2);
        a.x = xf, a.out = want;
        assert_int_equal(cpu()->copy(gpu_ref, &a), TM_OK);
        a.x = gx, a.out = go;
        assert_int_equal(gpu->ops->copy(gpu_dev, &a), TM_OK);
        gpu_get(got, go, m);
        assert_memory_equal(got, want, m * sizeof *got);
        free_all((void *[]){gx, go}, 2);
        free(x), free(o), free(xf), free(want), free(got);
    }
}

/* ---- routing ---- */

typedef struct route_case {
    int experts, top_k, groups, top_groups;
    tm_moe_score score;
    tm_group_score group_score;
    bool bias, normalise;
    float scale;
} route_case;

static const route_case g_routes[] = {
    {4, 2, 1, 1, TM_MOE_SOFTMAX, TM_GROUP_MAX, false, true, 1},      /* Mixtral */
    {60, 4, 1, 1, TM_MOE_SOFTMAX, TM_GROUP_MAX, false, false, 1},    /* Qwen2-MoE */
    {128, 8, 1, 1, TM_MOE_SOFTMAX, TM_GROUP_MAX, false, true, 1},    /* Qwen3-MoE */
    {160, 6, 8, 3, TM_MOE_SOFTMAX, TM_GROUP_MAX, false, false, 16},  /* DeepSeek-V2 */
    {256, 8, 8, 4, TM_MOE_SIGMOID, TM_GROUP_TOP2, true, true, 2.5f}, /* DeepSeek-V3 */
    {512, 10, 1, 1, TM_MOE_SOFTMAX, TM_GROUP_MAX, false, true, 1},
    {1024, 32, 128, 5, TM_MOE_SIGMOID, TM_GROUP_MAX, true, false, 1},
    {7, 7, 1, 1, TM_MOE_SIGMOID, TM_GROUP_MAX, false, true, 1},
    {8, 1, 4, 1, TM_MOE_SOFTMAX, TM_GROUP_TOP2, true, false, 1},
    {100, 33, 2, 1, TM_MOE_SOFTMAX, TM_GROUP_MAX, false, true, 1},
};

/* The weight of each expert; the sum of what it was chosen by. */
static double spread_row(const tm_moe_route_args *a, const float *logits, const int32_t *ids,
                         const float *weights, double *out)
{
    double sum = 0, all = 0, max = -INFINITY;
    for (int e = 0; e < a->n_experts; e++) {
        max = fmax(max, (double)logits[e]);
        out[e] = 0;
    }
    for (int e = 0; e < a->n_experts; e++)
        all += exp((double)logits[e] - max);
    for (int i = 0; i < a->top_k; i++) {
        int e = ids[i];
        assert_in_range(e, 0, a->n_experts - 1);
        assert_true(out[e] == 0);
        out[e] = (double)weights[i];
        sum += a->score == TM_MOE_SIGMOID ? 1 / (1 + exp(-(double)logits[e]))
                                          : exp((double)logits[e] - max) / all;
        sum += a->bias ? (double)a->bias[e] : 0;
    }
    return sum;
}

static void route_one(const route_case *c, int tokens)
{
    size_t n = (size_t)tokens * (size_t)c->experts, m = (size_t)tokens * (size_t)c->top_k;
    float *logits = op_random_array(n, TM_DTYPE_F32, -4, 4);
    float *bias = op_random_array((size_t)c->experts, TM_DTYPE_F32, -0.5f, 0.5f);
    int32_t *ids = calloc(m, sizeof *ids), *got_ids = calloc(m, sizeof *got_ids);
    float *weights = calloc(m, sizeof *weights), *got = calloc(m, sizeof *got);
    double want_row[1024], got_row[1024];
    for (size_t i = 0; i < n; i++) /* many ties; all of token 0 */
        logits[i] = i < (size_t)c->experts ? 1.0f : rintf(logits[i] * 32) / 32;
    tm_moe_route_args a = {.ids = ids,
                           .weights = weights,
                           .logits = logits,
                           .bias = c->bias ? bias : NULL,
                           .n_tokens = tokens,
                           .n_experts = c->experts,
                           .top_k = c->top_k,
                           .n_groups = c->groups,
                           .top_groups = c->top_groups,
                           .score = c->score,
                           .group_score = c->group_score,
                           .normalise = c->normalise,
                           .scale = c->scale};
    assert_int_equal(cpu()->moe_route(gpu_ref, &a), TM_OK);
    tm_moe_route_args g = a;
    void *gl = gpu_put(logits, n * 4), *gb = gpu_put(bias, (size_t)c->experts * 4);
    void *gi = gpu_take(m * 4), *gw = gpu_take(m * 4);
    g.logits = gl, g.bias = c->bias ? gb : NULL, g.ids = gi, g.weights = gw;
    assert_int_equal(gpu->ops->moe_route(gpu_dev, &g), TM_OK);
    gpu_get_f32(got, gw, m);
    assert_int_equal(gpu->dev->download(gpu_dev, got_ids, gi, m * 4), TM_OK);
    for (int t = 0; t < tokens; t++) {
        size_t at = (size_t)t * (size_t)c->top_k;
        const float *row = logits + (size_t)t * (size_t)c->experts;
        double u = spread_row(&a, row, ids + at, weights + at, want_row);
        double v = spread_row(&a, row, got_ids + at, got + at, got_row);
        if (fabs(u - v) > 1e-5 * c->top_k)
            fail_msg("E=%d token %d: other experts", c->experts, t);
        for (int e = 0; e < c->experts; e++) /* two that differ by rounding may change places */
            if ((want_row[e] > 0) == (got_row[e] > 0) &&
                fabs(want_row[e] - got_row[e]) > 1e-5 * (double)c->scale)
                fail_msg("E=%d token %d expert %d: %g, expected %g", c->experts, t, e, got_row[e],
                         want_row[e]);
    }
    if (!c->bias) /* with equal numbers the lowest indices win */
        assert_memory_equal(ids, got_ids, (size_t)c->top_k * sizeof *ids);
    free_all((void *[]){gl, gb, gi, gw}, 4);
    free(logits), free(bias), free(ids), free(got_ids), free(weights), free(got);
}

static void route_test(void **state)
{
    (void)state;
    for (size_t c = 0; c < TM_ARRAY_LEN(g_routes); c++) {
        route_one(&g_routes[c], 1);
        route_one(&g_routes[c], 37);
    }
}

/* Logits that are no numbers (rows of padding) still give experts that exist, each once. */
static void route_nan_test(void **state)
{
    (void)state;
    enum { E = 48, K = 5, T = 3 };
    float logits[T * E];
    int32_t ids[T * K];
    for (int i = 0; i < T * E; i++)
        logits[i] = i < E ? NAN : i < 2 * E ? -INFINITY : i % 3 ? NAN : 1.0f;
    void *gl = gpu_put(logits, sizeof logits), *gi = gpu_take(sizeof ids),
         *gw = gpu_take(T * K * 4);
    const tm_moe_route_args a = {.ids = gi,
                                 .weights = gw,
                                 .logits = gl,
                                 .n_tokens = T,
                                 .n_experts = E,
                                 .top_k = K,
                                 .n_groups = 4,
                                 .top_groups = 2,
                                 .group_score = TM_GROUP_TOP2,
                                 .scale = 1};
    assert_int_equal(gpu->ops->moe_route(gpu_dev, &a), TM_OK);
    assert_int_equal(gpu->dev->download(gpu_dev, ids, gi, sizeof ids), TM_OK);
    for (int i = 0; i < T * K; i++) {
        assert_in_range(ids[i], 0, E - 1);
        for (int j = i / K * K; j < i; j++)
            assert_int_not_equal(ids[i], ids[j]);
    }
    free_all((void *[]){gl, gi, gw}, 3);
}

/* ---- experts ---- */

typedef struct experts_case {
    int tokens, h, f, experts, top_k;
    tm_act_kind act;
    int shared; /* none, added, gated */
    bool f32;   /* the weights */
} experts_case;

static const experts_case g_experts[] = {
    {1, 128, 64, 8, 2, TM_ACT_SILU, 0, false},
    {1, 256, 96, 60, 4, TM_ACT_SILU, 2, false},
    {3, 200, 72, 6, 3, TM_ACT_GELU_TANH, 1, false},
    {8, 128, 64, 4, 2, TM_ACT_SILU, 2, false},
    {12, 64, 136, 64, 6, TM_ACT_SILU, 0, false},
    {40, 128, 64, 4, 2, TM_ACT_SILU, 1, false},
    {70, 136, 200, 3, 2, TM_ACT_SILU, 2, false},
    {33, 72, 8, 2, 2, TM_ACT_GELU_ERF, 0, false},
    {300, 128, 64, 4, 3, TM_ACT_SILU, 1, false},
    {9, 40, 12, 6, 3, TM_ACT_SILU, 2, false},
    {5, 33, 7, 4, 2, TM_ACT_SILU, 0, false},
    {6, 64, 32, 4, 2, TM_ACT_SILU, 1, true},
    {20, 64, 64, 300, 8, TM_ACT_SILU, 0, false},
    {1100, 8, 8, 64, 32, TM_ACT_SILU, 2, false}, /* in two chunks */
};

static int32_t *draw_experts(const experts_case *c)
{
    int32_t *ids = calloc((size_t)(c->tokens * c->top_k), sizeof *ids);
    TM_ASSERT(ids);
    for (int t = 0; t < c->tokens; t++)
        for (int i = 0; i < c->top_k;) {
            /* Most tokens take the first expert, nobody the last but one where there is a choice. */
            int e = i == 0 && op_pick(0, 9) ? 0 : op_pick(0, c->experts - 1), before = 0;
            bool taken = e == c->experts - 2 && c->top_k < c->experts;
            for (; before < i; before++)
                taken = taken || ids[t * c->top_k + before] == e;
            if (!taken)
                ids[t * c->top_k + i++] = e;
        }
    return ids;
}

static void experts_one(const experts_case *c)
{
    tm_dtype t = c->f32 ? TM_DTYPE_F32 : gpu_dtype;
    size_t n = (size_t)c->tokens * (size_t)c->h, pairs = (size_t)(c->tokens * c->top_k);
    size_t up = (size_t)(c->experts * 2 * c->f) * (size_t)c->h;
    size_t down = (size_t)(c->experts * c->h) * (size_t)c->f;
    float spread = 1.7f / sqrtf((float)c->h);
    tm_weight wu = {.dtype = t,
                    .n = c->experts * 2 * c->f,
                    .k = c->h,
                    .data = op_random_array(up, t, -spread * 2, spread * 2)};
    tm_weight wd = {.dtype = t,
                    .n = c->experts * c->h,
                    .k = c->f,
                    .data = op_random_array(down, t, -spread, spread)};
    uint16_t *x = op_random_array(n, gpu_dtype, -1, 1), *add = op_random_array(n, gpu_dtype, -1, 1);
    float *gate = op_random_array((size_t)c->tokens, TM_DTYPE_F32, -2, 2);
    float *weights = op_random_array(pairs, TM_DTYPE_F32, 0, 1);
    int32_t *ids = draw_experts(c);
    float *xf = gpu_widen(x, gpu_dtype, n), *addf = gpu_widen(add, gpu_dtype, n);
    float *want = malloc(n * sizeof *want), *got = malloc(n * sizeof *got), *again;
    tm_moe_experts_args a = {.out = want,
                             .x = xf,
                             .ids = ids,
                             .weights = weights,
                             .gate_up = &wu,
                             .down = &wd,
                             .add = c->shared ? addf : NULL,
                             .add_gate = c->shared == 2 ? gate : NULL,
                             .n_tokens = c->tokens,
                             .h = c->h,
                             .f = c->f,
                             .n_experts = c->experts,
                             .top_k = c->top_k,
                             .act = c->act};
    a.work = malloc(cpu()->moe_work_bytes(&a));
    assert_int_equal(cpu()->moe_experts(gpu_ref, &a), TM_OK);
    free(a.work);

    tm_weight gu = wu, gd = wd;
    tm_moe_experts_args g = a;
    void *side[] = {gpu_put(wu.data, up * tm_dtype_size(t)),
                    gpu_put(wd.data, down * tm_dtype_size(t)),
                    gpu_put(x, n * 2),
                    gpu_put(add, n * 2),
                    gpu_put(gate, (size_t)c->tokens * 4),
                    gpu_put(weights, pairs * 4),
                    gpu_put(ids, pairs * 4),
                    gpu_take(n * 2),
                    gpu_take(gpu->ops->moe_work_bytes(&a))};
    gu.data = side[0], gd.data = side[1];
    g.gate_up = &gu, g.down = &gd, g.x = side[2], g.add = c->shared ? side[3] : NULL;
    g.add_gate = c->shared == 2 ? side[4] : NULL;
    g.weights = side[5], g.ids = side[6], g.out = side[7], g.work = side[8];
    assert_int_equal(gpu->ops->moe_experts(gpu_dev, &g), TM_OK);
    gpu_get(got, g.out, n);
    op_check(op_nmse(got, want, n), gpu_bound(), "experts T=%d h=%d F=%d E=%d k=%d", c->tokens,
             c->h, c->f, c->experts, c->top_k);
    assert_int_equal(gpu->ops->moe_experts(gpu_dev, &g), TM_OK); /* the same bits again */
    again = malloc(n * sizeof *again);
    gpu_get(again, g.out, n);
    assert_memory_equal(again, got, n * sizeof *got);
    free_all(side, TM_ARRAY_LEN(side));
    free((void *)(uintptr_t)wu.data), free((void *)(uintptr_t)wd.data);
    free(x), free(add), free(gate), free(weights), free(ids), free(xf), free(addf);
    free(want), free(got), free(again);
}

static void experts_test(void **state)
{
    (void)state;
    for (size_t c = 0; c < TM_ARRAY_LEN(g_experts); c++)
        experts_one(&g_experts[c]);
}

/* The workspace of the largest step serves every smaller one. */
static void experts_work_test(void **state)
{
    (void)state;
    tm_moe_experts_args a = {.h = 2048, .f = 768, .n_experts = 128, .top_k = 8};
    size_t before = 0;
    for (a.n_tokens = 1; a.n_tokens <= 16384; a.n_tokens++) {
        size_t bytes = gpu->ops->moe_work_bytes(&a);
        assert_true(bytes >= before);
        before = bytes;
    }
    assert_true(before < (size_t)256 << 20);
}

/* ---- linear layers of single heads ---- */

/* x and out begin in the middle of longer rows, anywhere. */
static void strided_linear_test(void **state)
{
    (void)state;
    static const struct {
        int tokens, n, k, ldx, at_x, ldo, at_o;
        bool f32; /* the weight */
    } cases[] = {
        {1, 64, 64, 192, 64, 256, 32, false},     {5, 96, 64, 300, 100, 512, 4, false},
        {3, 64, 32, 96, 3, 128, 0, false},        {9, 33, 40, 41, 1, 64, 31, false},
        {4, 512, 128, 384, 192, 1152, 64, false}, {1, 60, 256, 256, 0, 60, 0, true},
        {3, 9, 132, 140, 4, 12, 2, true},         {35, 128, 100, 100, 0, 128, 0, true},
        {17, 1, 64, 64, 0, 1, 0, true},           {4, 5, 33, 35, 1, 6, 0, true},
    };
    for (size_t c = 0; c < TM_ARRAY_LEN(cases); c++) {
        size_t nx = (size_t)(cases[c].tokens * cases[c].ldx + 8);
        size_t no = (size_t)(cases[c].tokens * cases[c].ldo + 8);
        size_t nw = (size_t)cases[c].n * (size_t)cases[c].k;
        uint16_t *x = op_random_array(nx, gpu_dtype, -1, 1),
                 *o = op_random_array(no, gpu_dtype, -1, 1);
        tm_dtype t = cases[c].f32 ? TM_DTYPE_F32 : gpu_dtype;
        tm_weight w = {.dtype = t, .n = cases[c].n, .k = cases[c].k};
        w.data = op_random_array(nw, t, -1, 1);
        void *host = (void *)(uintptr_t)w.data;
        float *xf = gpu_widen(x, gpu_dtype, nx), *want = gpu_widen(o, gpu_dtype, no);
        float *got = malloc(no * sizeof *got);
        tm_linear_args a = {.out = want + cases[c].at_o,
                            .x = xf + cases[c].at_x,
                            .w = &w,
                            .n_tokens = cases[c].tokens,
                            .ldx = cases[c].ldx,
                            .ldo = cases[c].ldo};
        assert_int_equal(cpu()->linear(gpu_ref, &a), TM_OK);
        void *gx = gpu_put(x, nx * 2), *go = gpu_put(o, no * 2),
             *gw = gpu_put(host, nw * tm_dtype_size(t));
        w.data = gw, a.x = (uint16_t *)gx + cases[c].at_x, a.out = (uint16_t *)go + cases[c].at_o;
        assert_int_equal(gpu->ops->linear(gpu_dev, &a), TM_OK);
        gpu_get(got, go, no);
        op_check(op_nmse(got, want, no), gpu_bound(), "linear in rows, case %zu", c);
        free_all((void *[]){gx, go, gw}, 3);
        free(x), free(o), free(host), free(xf), free(want), free(got);
    }
}

/* All heads at once against the reference's linear, head by head. */
static void linear_heads_test(void **state)
{
    (void)state;
    static const tm_linear_heads_args cases[] = {
        {.n_tokens = 1, .groups = 5, .n = 512, .ldo = 2880, .gdo = 576, .ldx = 960, .gdx = 192},
        {.n_tokens = 8, .groups = 2, .n = 24, .ldo = 64, .gdo = 24, .ldx = 192, .gdx = 96},
        {.n_tokens = 13, .groups = 3, .n = 128, .ldo = 384, .gdo = 128, .ldx = 1728, .gdx = 576},
        {.n_tokens = 64, .groups = 2, .n = 70, .ldo = 140, .gdo = 70, .ldx = 200, .gdx = 100},
        {.n_tokens = 67, .groups = 4, .n = 64, .ldo = 384, .gdo = 96, .ldx = 256, .gdx = 64},
    };
    static const int k[] = {128, 72, 512, 40, 64}, at = 32; /* x and out begin in their rows */
    for (size_t c = 0; c < TM_ARRAY_LEN(cases); c++) {
        tm_linear_heads_args a = cases[c];
        size_t nx = (size_t)(a.n_tokens * a.ldx + at), no = (size_t)(a.n_tokens * a.ldo + at);
        size_t rows = (size_t)(a.n * a.groups), nw = rows * (size_t)k[c];
        uint16_t *x = op_random_array(nx, gpu_dtype, -1, 1);
        uint16_t *o = op_random_array(no, gpu_dtype, -1, 1);
        uint16_t *w = op_random_array(nw, gpu_dtype, -1, 1);
        float *xf = gpu_widen(x, gpu_dtype, nx), *want = gpu_widen(o, gpu_dtype, no);
        float *got = malloc(no * sizeof *got);
        tm_weight one = {.dtype = gpu_dtype, .n = a.n, .k = k[c]}, all = one;
        for (int g = 0; g < a.groups; g++) {
            tm_linear_args l = {.out = want + at + g * a.gdo,
                                .x = xf + at + g * a.gdx,
                                .w = &one,
                                .n_tokens = a.n_tokens,
                                .ldx = a.ldx,
                                .ldo = a.ldo};
            one.data = w + (size_t)g * nw / (size_t)a.groups;
            assert_int_equal(cpu()->linear(gpu_ref, &l), TM_OK);
        }
        void *gx = gpu_put(x, nx * 2), *go = gpu_put(o, no * 2), *gw = gpu_put(w, nw * 2);
        all.n = (int)rows, all.data = gw;
        a.w = &all, a.x = (uint16_t *)gx + at, a.out = (uint16_t *)go + at;
        assert_int_equal(gpu->ops->linear_heads(gpu_dev, &a), TM_OK);
        gpu_get(got, go, no);
        op_check(op_nmse(got, want, no), gpu_bound(), "linear of heads, case %zu", c);
        free_all((void *[]){gx, go, gw}, 3);
        free(x), free(o), free(w), free(xf), free(want), free(got);
    }
}

/* ---- rope ---- */

/* Frequencies by sequence, logn scaling, a latent cache. */
static void rope_test(void **state)
{
    (void)state;
    enum { T = 4, H = 9, D = 40, RD = 16, ROW = (H + 2) * D, CACHE = 2 * 16 * D, LOGN = 8 };
    static const int32_t positions[T] = {3, 11, 0, 7}, begin[3] = {0, 2, 4}, kv_len[2] = {12, 8};
    static const int32_t blocks[2] = {1, 0};
    const tm_batch b = {.n_tokens = T,
                        .n_seqs = 2,
                        .positions = positions,
                        .seq_begin = begin,
                        .kv_len = kv_len,
                        .blocks = blocks,
                        .max_blocks = 1};
    float *freq = op_random_array(RD, TM_DTYPE_F32, 0, 1), want_cache[CACHE], got[T * ROW];
    for (int latent = 0; latent < 2; latent++) {
        uint16_t *x = op_random_array(T * ROW, gpu_dtype, -1, 1);
        uint16_t *cache = op_random_array(2 * CACHE, gpu_dtype, -1, 1);
        float *qkv = gpu_widen(x, gpu_dtype, T * ROW);
        void *gx = gpu_put(x, T * ROW * 2), *gc = gpu_put(cache, 2 * CACHE * 2);
        void *gf = gpu_put(freq, RD * sizeof *freq);
        tm_batch gb = b;
        gb.positions = gpu_put(positions, sizeof positions),
        gb.seq_begin = gpu_put(begin, sizeof begin);
        gb.kv_len = gpu_put(kv_len, sizeof kv_len), gb.blocks = gpu_put(blocks, sizeof blocks);
        tm_kv_layer kv = {.k = cache,
                          .v = latent ? cache : cache + CACHE,
                          .dtype = gpu_dtype,
                          .n_blocks = 2,
                          .block_tokens = 16,
                          .n_kv_heads = 1,
                          .head_dim = D};
        tm_rope_append_args a = {.qkv = qkv,
                                 .seq_inv_freq = freq,
                                 .logn_len = LOGN,
                                 .batch = &b,
                                 .kv = &kv,
                                 .n_heads = H,
                                 .n_kv_heads = 1,
                                 .head_dim = D,
                                 .rotary_dim = RD,
                                 .mscale = 1};
        assert_int_equal(cpu()->rope_append(gpu_ref, &a), TM_OK);
        kv.k = gc, kv.v = latent ? gc : (uint16_t *)gc + CACHE;
        a.qkv = gx, a.seq_inv_freq = gf, a.batch = &gb;
        assert_int_equal(gpu->ops->rope_append(gpu_dev, &a), TM_OK);
        gpu_get(got, gx, T * ROW);
        op_check(op_nmse(got, qkv, T * ROW), gpu_bound() / 4, "rope by sequence");
        for (int i = 0; i < 2; i++) {
            float *want = gpu_widen(cache + i * CACHE, gpu_dtype, CACHE);
            gpu_get(want_cache, (uint16_t *)gc + i * CACHE, CACHE);
            op_check(op_nmse(want_cache, want, CACHE), gpu_bound() / 4, "cache %d", i);
            free(want);
        }
        void *side[] = {gx,
                        gc,
                        gf,
                        (void *)(uintptr_t)gb.positions,
                        (void *)(uintptr_t)gb.seq_begin,
                        (void *)(uintptr_t)gb.kv_len,
                        (void *)(uintptr_t)gb.blocks};
        free_all(side, TM_ARRAY_LEN(side));
        free(x), free(cache), free(qkv);
    }
    free(freq);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(head_norm_test),    cmocka_unit_test(bound_test),
        cmocka_unit_test(copy_test),         cmocka_unit_test(route_test),
        cmocka_unit_test(route_nan_test),    cmocka_unit_test(experts_test),
        cmocka_unit_test(experts_work_test), cmocka_unit_test(strided_linear_test),
        cmocka_unit_test(rope_test),         cmocka_unit_test(linear_heads_test),
    };
    return gpu_run(tests, TM_ARRAY_LEN(tests));
}
