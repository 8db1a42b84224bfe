/* The operators that only some families need, against double precision computed here by other means: norms of
 * heads, bounds, strided copies, routing of every kind, experts with a shared one, and rope with frequencies by
 * sequence, logn scaling and a latent cache. */
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

static tm_device *g_devices[3];
static int g_device_count;

static int open_devices(void **state)
{
    (void)state;
    op_seed();
    g_devices[g_device_count++] = op_device_open("ref", 1);
    for (int i = 0; i < op_fast_isa_count && g_device_count < 3; i++) {
        tm_device *d = op_device_open(op_fast_isas[i], 2);
        if (d)
            g_devices[g_device_count++] = d;
    }
    return g_devices[0] ? 0 : -1;
}

static int close_devices(void **state)
{
    (void)state;
    for (int i = 0; i < g_device_count; i++)
        op_device_close(g_devices[i]);
    return 0;
}

static void test_head_norm(void **state)
{
    (void)state;
    enum { T = 5, H = 3, D = 48, LD = 200 };
    for (int one = 0; one < 2; one++) {
        float *x = op_random_array(T * LD, TM_DTYPE_F32, -2, 2), *w;
        float got[T * LD];
        double want[T * LD];
        w = op_random_array(D, TM_DTYPE_F32, -1, 1);
        memcpy(got, x, sizeof(got));
        for (int i = 0; i < T * LD; i++)
            want[i] = (double)x[i];
        for (int t = 0; t < T; t++)
            for (int h = 0; h < H; h++) {
                double sq = 0, *y = want + t * LD + h * D;
                for (int i = 0; i < D; i++)
                    sq += y[i] * y[i];
                for (int i = 0; i < D; i++)
                    y[i] = y[i] / sqrt(sq / D + 1e-6) * ((double)w[i] + one);
            }
        const tm_head_norm_args a = {.x = got,
                                     .w = w,
                                     .n_tokens = T,
                                     .ld = LD,
                                     .n_heads = H,
                                     .d = D,
                                     .eps = 1e-6f,
                                     .add_one = one};
        assert_int_equal(ops()->head_norm(g_devices[0], &a), TM_OK);
        op_check(op_nmse_double(got, want, T * LD), OP_NMSE_REF, "head_norm %d", one);
        for (int t = 0; t < T; t++) /* what lies behind the heads is not touched */
            assert_memory_equal(got + t * LD + H * D, x + t * LD + H * D,
                                (LD - H * D) * sizeof(float));
        free(x);
        free(w);
    }
}

static void test_bound_copy(void **state)
{
    (void)state;
    float x[] = {-9, -1, 0, 0.5f, 3, 100}, y[6], z[20];
    memcpy(y, x, sizeof(x));
    tm_bound_args a = {.x = y, .n_rows = 2, .n = 3, .limit = 2};
    assert_int_equal(ops()->bound(g_devices[0], &a), TM_OK);
    static const float clipped[] = {-2, -1, 0, 0.5f, 2, 2};
    assert_memory_equal(y, clipped, sizeof(y));
    memcpy(y, x, sizeof(x));
    a.smooth = true;
    assert_int_equal(ops()->bound(g_devices[0], &a), TM_OK);
    for (int i = 0; i < 6; i++)
        assert_true(fabs((double)y[i] - 2.0 * tanh((double)x[i] / 2.0)) < 1e-6);
    for (int i = 0; i < 20; i++)
        z[i] = -1;
    const tm_copy_args c = {.out = z,
                            .x = x,
                            .n_tokens = 2,
                            .groups = 2,
                            .cols = 1,
                            .ldo = 10,
                            .gdo = 4,
                            .ldx = 3,
                            .gdx = 2};
    assert_int_equal(ops()->copy(g_devices[0], &c), TM_OK);
    static const float want[] = {-9,   -1, -1, -1, 0,   -1, -1, -1, -1, -1,
                                 0.5f, -1, -1, -1, 100, -1, -1, -1, -1, -1};
    assert_memory_equal(z, want, sizeof(z));
}

/* ---- routing ---- */

enum { E_MAX = 64 };

/* Is expert e among the best n by value, lowest index first on ties? Counts those that come before it. */
static bool among(const double *value, const bool *open, int count, int e, int n)
{
    int before = 0;
    for (int i = 0; i < count; i++)
        before += open[i] && (value[i] > value[e] || (value[i] == value[e] && i < e));
    return open[e] && before < n;
}

static double group_of(const tm_moe_route_args *a, const double *choice, int g)
{
    int per = a->n_experts / a->n_groups;
    double best = -INFINITY, second = -INFINITY;
    for (int i = g * per; i < (g + 1) * per; i++) {
        if (choice[i] > best) {
            second = best;
            best = choice[i];
        } else if (choice[i] > second) {
            second = choice[i];
        }
    }
    return a->group_score == TM_GROUP_TOP2 ? best + second : best;
}

/* The weight of every expert, 0 for those not chosen. */
static void route_double(const tm_moe_route_args *a, const float *logits, double *weight)
{
    double score[E_MAX], choice[E_MAX], group[E_MAX], sum = 0, max = -INFINITY;
    bool open[E_MAX], all[E_MAX];
    int per = a->n_experts / a->n_groups;
    for (int e = 0; e < a->n_experts; e++)
        max = fmax(max, (double)logits[e]);
    for (int e = 0; e < a->n_experts; e++)
        sum += exp((double)logits[e] - max);
    for (int e = 0; e < a->n_experts; e++) {
        score[e] = a->score == TM_MOE_SIGMOID ? 1 / (1 + exp(-(double)logits[e]))
                                              : exp((double)logits[e] - max) / sum;
        choice[e] = score[e] + (a->bias ? (double)a->bias[e] : 0);
        all[e] = true;
    }
    for (int g = 0; g < a->n_groups; g++)
        group[g] = group_of(a, choice, g);
    for (int e = 0; e < a->n_experts; e++)
        open[e] = a->n_groups == 1 || among(group, all, a->n_groups, e / per, a->top_groups);
    sum = 0;
    for (int e = 0; e < a->n_experts; e++) {
        weight[e] = among(choice, open, a->n_experts, e, a->top_k) ? score[e] : 0;
        sum += weight[e];
    }
    for (int e = 0; e < a->n_experts; e++)
        weight[e] *= (double)a->scale / (a->normalise ? sum : 1);
}

static void test_route(void **state)
{
    (void)state;
    static const struct {
        int experts, top_k, groups, top_groups;
        tm_moe_score score;
        tm_group_score group_score;
        bool bias, normalise;
        float scale;
    } cases[] = {
        {4, 2, 1, 1, TM_MOE_SOFTMAX, TM_GROUP_MAX, false, true, 1},     /* Mixtral */
        {60, 4, 1, 1, TM_MOE_SOFTMAX, TM_GROUP_MAX, false, false, 1},   /* Qwen2-MoE */
        {64, 6, 8, 3, TM_MOE_SOFTMAX, TM_GROUP_MAX, false, false, 16},  /* DeepSeek-V2 */
        {64, 8, 8, 4, TM_MOE_SIGMOID, TM_GROUP_TOP2, true, true, 2.5f}, /* DeepSeek-V3 */
        {7, 7, 1, 1, TM_MOE_SIGMOID, TM_GROUP_MAX, false, true, 1},
        {8, 1, 4, 1, TM_MOE_SOFTMAX, TM_GROUP_TOP2, true, false, 1},
    };
    enum { T = 40 };
    for (size_t c = 0; c < TM_ARRAY_LEN(cases); c++) {
        int n = cases[c].experts, k = cases[c].top_k;
        float *logits = op_random_array((size_t)(T * n), TM_DTYPE_F32, -4, 4);
        float *bias = op_random_array((size_t)n, TM_DTYPE_F32, -0.5f, 0.5f);
        int32_t ids[T * 8];
        float weights[T * 8];
        tm_moe_route_args a = {.ids = ids,
                               .weights = weights,
                               .logits = logits,
                               .bias = cases[c].bias ? bias : NULL,
                               .n_tokens = T,
                               .n_experts = n,
                               .top_k = k,
                               .n_groups = cases[c].groups,
                               .top_groups = cases[c].top_groups,
                               .score = cases[c].score,
                               .group_score = cases[c].group_score,
                               .normalise = cases[c].normalise,
                               .scale = cases[c].scale};
        for (int e = 0; e < n; e++)
            logits[e] = 1; /* token 0: all equal, the lowest numbers win */
        assert_int_equal(ops()->moe_route(g_devices[0], &a), TM_OK);
        for (int t = 0; t < T; t++) {
            double want[E_MAX], got[E_MAX] = {0};
            route_double(&a, logits + t * n, want);
            for (int i = 0; i < k; i++) {
                assert_in_range(ids[t * k + i], 0, n - 1);
                assert_true(got[ids[t * k + i]] == 0.0);
                got[ids[t * k + i]] = (double)weights[t * k + i];
            }
            for (int e = 0; e < n; e++)
                if (fabs(got[e] - want[e]) > 1e-5 * (double)a.scale)
                    fail_msg("case %zu token %d expert %d: %g, expected %g", c, t, e, got[e],
                             want[e]);
        }
        free(logits);
        free(bias);
    }
}

/* ---- experts ---- */

static double dot(const tm_weight *w, int row, const double *x)
{
    double s = 0;
    for (int i = 0; i < w->k; i++)
        s += x[i] * (double)tm_load_f32(w->data, (size_t)row * (size_t)w->k + (size_t)i, w->dtype);
    return s;
}

static void experts_double(const tm_moe_experts_args *a, double *out)
{
    for (int t = 0; t < a->n_tokens; t++) {
        double x[64], act[64], *y = out + t * a->h;
        for (int i = 0; i < a->h; i++) {
            double gate = a->add_gate ? 1 / (1 + exp(-(double)a->add_gate[t])) : 1;
            x[i] = (double)((const float *)a->x)[t * a->h + i];
            y[i] = a->add ? gate * (double)((const float *)a->add)[t * a->h + i] : 0;
        }
        for (int i = 0; i < a->top_k; i++) {
            int e = a->ids[t * a->top_k + i];
            for (int j = 0; j < a->f; j++) {
                double g = dot(a->gate_up, e * 2 * a->f + j, x);
                act[j] = g / (1 + exp(-g)) * dot(a->gate_up, e * 2 * a->f + a->f + j, x);
            }
            for (int j = 0; j < a->h; j++)
                y[j] += (double)a->weights[t * a->top_k + i] * dot(a->down, e * a->h + j, act);
        }
    }
}

static void test_experts(void **state)
{
    (void)state;
    enum { T = 9, H = 40, F = 24, E = 6, K = 3 };
    static const tm_dtype dtypes[] = {TM_DTYPE_F32, TM_DTYPE_BF16};
    for (int c = 0; c < 2 * 3 * g_device_count; c++) {
        tm_dtype dtype = dtypes[c % 2];
        int shared = c / 2 % 3; /* none, added, gated */
        tm_device *dev = g_devices[c / 6];
        const tm_weight gate_up = {.dtype = dtype,
                                   .n = E * 2 * F,
                                   .k = H,
                                   .data = op_random_array(E * 2 * F * H, dtype, -1, 1)};
        const tm_weight down = {
            .dtype = dtype, .n = E * H, .k = F, .data = op_random_array(E * H * F, dtype, -1, 1)};
        float *x = op_random_array(T * H, TM_DTYPE_F32, -1, 1);
        float *add = op_random_array(T * H, TM_DTYPE_F32, -9, 9);
        float *gate = op_random_array(T, TM_DTYPE_F32, -2, 2);
        float *weights = op_random_array(T * K, TM_DTYPE_F32, 0, 1);
        int32_t ids[T * K];
        double want[T * H];
        for (int t = 0; t < T; t++) /* expert 5 is never chosen, expert 0 by nearly all */
            for (int i = 0; i < K; i++)
                ids[t * K + i] = i == 0 ? (t ? 0 : 4) : 1 + (t + i) % 3;
        tm_moe_experts_args a = {.x = x,
                                 .ids = ids,
                                 .weights = weights,
                                 .gate_up = &gate_up,
                                 .down = &down,
                                 .add = shared ? add : NULL,
                                 .add_gate = shared == 2 ? gate : NULL,
                                 .n_tokens = T,
                                 .h = H,
                                 .f = F,
                                 .n_experts = E,
                                 .top_k = K,
                                 .act = TM_ACT_SILU};
        size_t bytes = ops()->moe_work_bytes(&a);
        float *out = op_guarded(T * H), *work = op_guarded((bytes + 3) / 4);
        a.out = out;
        a.work = work;
        experts_double(&a, want);
        assert_int_equal(ops()->moe_experts(dev, &a), TM_OK);
        op_guarded_check(out, T * H, "experts");
        op_guarded_check(work, (bytes + 3) / 4, "experts' workspace");
        op_check(op_nmse_double(out, want, T * H), OP_NMSE_REF, "experts, case %d", c);
        op_guarded_free(out);
        op_guarded_free(work);
        free((void *)(uintptr_t)gate_up.data);
        free((void *)(uintptr_t)down.data);
        free(x);
        free(add);
        free(gate);
        free(weights);
    }
}

/* ---- rope ---- */

static void test_rope(void **state)
{
    (void)state;
    enum { T = 4, H = 2, D = 32, RD = 16, ROW = (H + 2) * D, LOGN = 8 };
    static const int32_t positions[T] = {3, 11, 0, 7}, begin[3] = {0, 2, 4}, kv_len[2] = {12, 8};
    static const int32_t blocks[2] = {1, 0};
    const tm_batch b = {.n_tokens = T,
                        .n_seqs = 2,
                        .positions = positions,
                        .seq_begin = begin,
                        .kv_len = kv_len,
                        .blocks = blocks,
                        .max_blocks = 1};
    float freq[2][RD / 2], *x = op_random_array(T * ROW, TM_DTYPE_F32, -1, 1);
    double want[T * ROW];
    for (int i = 0; i < RD; i++)
        freq[i / (RD / 2)][i % (RD / 2)] = op_uniform(0, 1);
    for (int t = 0; t < T; t++)
        for (int i = 0; i < ROW; i++) {
            int head = i / D, at = i % D, half = RD / 2, p = positions[t];
            const float *row = x + t * ROW + head * D;
            double angle = (double)p * (double)freq[t / 2][at % half];
            double v = (double)row[at];
            if (head < H + 1 && at < RD)
                v = at < half ? v * cos(angle) - (double)row[at + half] * sin(angle)
                              : v * cos(angle) + (double)row[at - half] * sin(angle);
            if (head < H && p >= LOGN)
                v *= log(p + 1.0) / log(LOGN);
            want[t * ROW + i] = v;
        }
    for (int d = 0; d < g_device_count; d++) {
        float *qkv = op_guarded(T * ROW), *cache = op_guarded(2 * 16 * D);
        memcpy(qkv, x, T * ROW * sizeof(float));
        const tm_kv_layer kv = {.k = cache,
                                .v = cache,
                                .dtype = TM_DTYPE_F32,
                                .n_blocks = 2,
                                .block_tokens = 16,
                                .n_kv_heads = 1,
                                .head_dim = D};
        const tm_rope_append_args a = {.qkv = qkv,
                                       .seq_inv_freq = freq[0],
                                       .logn_len = LOGN,
                                       .batch = &b,
                                       .kv = &kv,
                                       .n_heads = H,
                                       .n_kv_heads = 1,
                                       .head_dim = D,
                                       .rotary_dim = RD,
                                       .mscale = 1};
        assert_int_equal(ops()->rope_append(g_devices[d], &a), TM_OK);
        op_guarded_check(qkv, T * ROW, "rope");
        op_guarded_check(cache, 2 * 16 * D, "cache");
        op_check(op_nmse_double(qkv, want, T * ROW), OP_NMSE_REF, "rope, device %d", d);
        for (int t = 0; t < T; t++) /* the key alone is in the cache, not the value behind it */
            assert_memory_equal(cache + (blocks[t / 2] * 16 + positions[t]) * D,
                                qkv + t * ROW + H * D, D * sizeof(float));
        op_guarded_free(qkv);
        op_guarded_free(cache);
    }
    free(x);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_head_norm), cmocka_unit_test(test_bound_copy),
        cmocka_unit_test(test_route),     cmocka_unit_test(test_experts),
        cmocka_unit_test(test_rope),
    };
    return cmocka_run_group_tests(tests, open_devices, close_devices);
}
