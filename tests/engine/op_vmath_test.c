/* The stated error bounds of the vector math, over dense samples against double precision. Built once per
 * instruction set around op_vmath_kernels.c; skipped on a processor without it. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include "engine/backend/cpu/convert.h"
#include "tests/engine/op_vmath.h"
#include "tests/engine/op_test.h"

static const struct {
    const char *name;
    const op_vector_fn *fn;
    double (*want)(double);
    double lo, hi, abs_bound, rel_bound; /* 0: no such bound */
} g_cases[] = {
    {"exp", &op_vmath.exp, exp, -87.29, 88.29, 0, 1.5e-7},
    {"tanh", &op_vmath.tanh, tanh, -12, 12, 2e-7, 4e-7},
    {"erfc", &op_vmath.erfc, erfc, 0, 9, 6e-7, 0},
    {"sin", &op_vmath.sin, sin, -1000, 1000, 2e-7, 0},
    {"cos", &op_vmath.cos, cos, -1000, 1000, 2e-7, 0},
    {"sin far", &op_vmath.sin, sin, 0, 1e6, 2e-7, 0},
    {"cos far", &op_vmath.cos, cos, 0, 1e6, 2e-7, 0},
};

static void bounds_test(void **state)
{
    (void)state;
    enum { STEPS = 1 << 18 };
    for (size_t c = 0; c < sizeof g_cases / sizeof g_cases[0]; c++) {
        double worst_abs = 0, worst_rel = 0;
        for (int i = 0; i < STEPS; i++) {
            float x[16], y[16];
            for (int j = 0; j < op_vmath.lanes; j++)
                x[j] = (float)(g_cases[c].lo + (g_cases[c].hi - g_cases[c].lo) *
                                                   ((double)i * op_vmath.lanes + j) /
                                                   ((double)STEPS * op_vmath.lanes));
            (*g_cases[c].fn)(x, y);
            for (int j = 0; j < op_vmath.lanes; j++) {
                double want = g_cases[c].want((double)x[j]), e = fabs((double)y[j] - want);
                worst_abs = fmax(worst_abs, isnan(e) ? INFINITY : e);
                worst_rel = fmax(worst_rel, want != 0 ? e / fabs(want) : 0);
            }
        }
        printf("%s %-8s worst absolute %.3g, relative %.3g\n", op_vmath.isa, g_cases[c].name,
               worst_abs, worst_rel);
        if (g_cases[c].abs_bound > 0 && worst_abs > g_cases[c].abs_bound)
            fail_msg("%s: absolute error %.3g", g_cases[c].name, worst_abs);
        if (g_cases[c].rel_bound > 0 && worst_rel > g_cases[c].rel_bound)
            fail_msg("%s: relative error %.3g", g_cases[c].name, worst_rel);
    }
}

static void edges_test(void **state)
{
    (void)state;
    float x[16] = {0}, y[16];
    x[0] = -INFINITY, x[1] = NAN, x[2] = -1000.0f, x[3] = 1000.0f;
    op_vmath.exp(x, y);
    assert_true(y[0] == 0.0f);
    assert_true(isnan(y[1]));
    assert_true(y[2] == 0.0f);
    assert_true(y[3] > 1e38f && isfinite(y[3]));
    assert_true(y[4] == 1.0f);
    op_vmath.tanh(x, y);
    assert_true(y[0] == -1.0f && isnan(y[1]) && y[3] == 1.0f && y[4] == 0.0f);
}

/* Rounding to bf16 and fp16 on store equals the portable conversion, for every upper half. */
static void store_test(void **state)
{
    (void)state;
    for (uint32_t hi = 0; hi < 0x10000; hi += (uint32_t)op_vmath.lanes) {
        for (int low = 0; low < 4; low++) {
            static const uint32_t lows[4] = {0, 0x7fff, 0x8000, 0x8001};
            float x[16];
            uint16_t b[16], h[16];
            for (uint32_t j = 0; j < (uint32_t)op_vmath.lanes; j++)
                x[j] = tm_f32_from_bits((hi + j) << 16 | lows[low]);
            op_vmath.store_bf16(b, x);
            op_vmath.store_f16(h, x);
            for (int j = 0; j < op_vmath.lanes; j++) {
                assert_int_equal(isnan(tm_bf16_to_f32(b[j])), isnan(x[j]));
                assert_int_equal(isnan(tm_f16_to_f32(h[j])), isnan(x[j]));
                if (!isnan(x[j])) {
                    assert_int_equal(b[j], tm_bf16_from_f32(x[j]));
                    assert_int_equal(h[j], tm_f16_from_f32(x[j]));
                }
            }
        }
    }
}

int main(void)
{
    tm_device *dev = op_device_open(op_vmath.isa, 1);
    if (!dev)
        return 0;
    op_device_close(dev);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bounds_test),
        cmocka_unit_test(edges_test),
        cmocka_unit_test(store_test),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
