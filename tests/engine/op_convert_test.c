/* bf16 and fp16 conversions: all 65536 patterns to f32 against their definition, and back against the
 * nearest value found by search. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "engine/backend/cpu/convert.h"

/* sign, exponent field and fraction by the IEEE 754 definition. */
static double by_definition(uint32_t h, int exp_bits, int man_bits)
{
    int bias = (1 << (exp_bits - 1)) - 1;
    int e = (int)(h >> man_bits) & ((1 << exp_bits) - 1);
    int m = (int)h & ((1 << man_bits) - 1);
    double sign = h >> (exp_bits + man_bits) ? -1.0 : 1.0;
    if (e == (1 << exp_bits) - 1)
        return m ? (double)NAN : sign * (double)INFINITY;
    return e ? sign * ldexp(m + (1 << man_bits), e - bias - man_bits)
             : sign * ldexp(m, 1 - bias - man_bits);
}

static void widen_test(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x10000; h++) {
        double b = by_definition(h, 8, 7), f = by_definition(h, 5, 10);
        float gb = tm_bf16_to_f32((uint16_t)h), gf = tm_f16_to_f32((uint16_t)h);
        assert_true(isnan(b) ? isnan(gb) : (double)gb == b);
        assert_true(isnan(f) ? isnan(gf) : (double)gf == f);
        assert_int_equal(signbit(gf) != 0, h >> 15);
    }
}

/* Every value, and the points halfway to the next one and beside it, must round to nearest, ties to even. */
static void round_type(uint16_t (*narrow)(float), int exp_bits, int man_bits)
{
    uint32_t infinity = ((1u << exp_bits) - 1) << man_bits;
    for (uint32_t h = 0; h < infinity; h++) {
        double a = by_definition(h, exp_bits, man_bits);
        double b = h + 1 == infinity ? 2 * a - by_definition(h - 1, exp_bits, man_bits)
                                     : by_definition(h + 1, exp_bits, man_bits);
        float mid = (float)(a + (b - a) / 2);
        assert_int_equal(narrow((float)a), h);
        assert_int_equal(narrow(-(float)a), h | 0x8000u);
        assert_int_equal(narrow(mid), h % 2 ? h + 1 : h);
        assert_int_equal(narrow(nextafterf(mid, 0.0f)), h);
        assert_int_equal(narrow(nextafterf(mid, INFINITY)), h + 1);
    }
    assert_int_equal(narrow(INFINITY), infinity);
    assert_int_equal(narrow(3.4e38f), infinity);
    assert_true(narrow(NAN) > infinity);
    assert_true(narrow(tm_f32_from_bits(0x7f800001u)) > infinity);
}

static void narrow_test(void **state)
{
    (void)state;
    round_type(tm_bf16_from_f32, 8, 7);
    round_type(tm_f16_from_f32, 5, 10);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(widen_test), cmocka_unit_test(narrow_test)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
