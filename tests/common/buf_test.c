/* The byte buffer: contents, the maximum, the failed state, overflow. */
#include "tests/common/test.h"

#include <stdlib.h>
#include <string.h>

#include "common/buf.h"

static void appends_and_terminates(void **state)
{
    (void)state;
    tm_buf b;
    tm_buf_init(&b, 0);
    assert_null(b.data);
    assert_true(tm_buf_append(&b, NULL, 0));
    assert_string_equal(b.data, "");
    assert_true(tm_buf_puts(&b, "ab"));
    assert_true(tm_buf_putc(&b, 'c'));
    assert_true(tm_buf_printf(&b, "%d%s", 12, "x"));
    assert_true(tm_buf_append(&b, "\0z", 2));
    assert_int_equal(b.len, 8);
    assert_memory_equal(b.data, "abc12x\0z", 9);
    size_t cap = b.cap;
    tm_buf_clear(&b);
    assert_int_equal(b.len, 0);
    assert_int_equal(b.cap, cap);
    assert_string_equal(b.data, "");
    tm_buf_deinit(&b);
    assert_null(b.data);
    tm_buf_deinit(&b);
}

static void printf_of_any_length(void **state)
{
    (void)state;
    tm_buf b;
    tm_buf_init(&b, 0);
    char big[1000];
    for (size_t n = 200; n < 300; n++) {
        memset(big, 'q', n);
        big[n] = '\0';
        tm_buf_clear(&b);
        assert_true(tm_buf_printf(&b, "%s!", big));
        assert_int_equal(b.len, n + 1);
        assert_int_equal(strlen(b.data), n + 1);
        assert_int_equal(b.data[n], '!');
    }
    tm_buf_deinit(&b);
}

static void maximum_holds(void **state)
{
    (void)state;
    for (size_t max = 1; max < 200; max++) {
        tm_buf b;
        tm_buf_init(&b, max);
        for (size_t i = 0; i < max; i++)
            assert_true(tm_buf_putc(&b, 'x'));
        assert_int_equal(b.len, max);
        assert_false(tm_buf_putc(&b, 'y'));
        assert_true(b.failed);
        /* Failed stays failed, and the contents stay. */
        assert_false(tm_buf_append(&b, NULL, 0));
        assert_false(tm_buf_printf(&b, "z"));
        assert_int_equal(b.len, max);
        assert_int_equal(strlen(b.data), max);
        tm_buf_clear(&b);
        assert_true(tm_buf_putc(&b, 'y'));
        tm_buf_deinit(&b);
    }
}

static void too_much_at_once(void **state)
{
    (void)state;
    tm_buf b;
    tm_buf_init(&b, 100);
    tm_buf_puts(&b, "abc");
    assert_false(tm_buf_reserve(&b, SIZE_MAX));
    assert_true(b.failed);
    assert_int_equal(b.len, 3);
    tm_buf_clear(&b);
    char text[301];
    memset(text, 'x', 300);
    text[300] = '\0';
    assert_false(tm_buf_printf(&b, "%s", text));
    tm_buf_deinit(&b);
}

static void stealing(void **state)
{
    (void)state;
    tm_buf b;
    tm_buf_init(&b, 50);
    size_t len = 9;
    char *p = tm_buf_steal(&b, &len);
    assert_string_equal(p, "");
    assert_int_equal(len, 0);
    free(p);
    tm_buf_puts(&b, "hello");
    p = tm_buf_steal(&b, NULL);
    assert_string_equal(p, "hello");
    free(p);
    assert_int_equal(b.len, 0);
    assert_int_equal(b.max, 50);
    assert_true(tm_buf_puts(&b, "again"));
    tm_buf_deinit(&b);
}

static void size_arithmetic(void **state)
{
    (void)state;
    size_t r = 7;
    assert_true(tm_size_mul(SIZE_MAX / 2, 2, &r));
    assert_true(r == SIZE_MAX - 1);
    assert_false(tm_size_mul(SIZE_MAX / 2 + 1, 2, &r));
    assert_true(tm_size_mul(0, SIZE_MAX, &r));
    assert_int_equal(r, 0);
    assert_true(tm_size_add(SIZE_MAX - 1, 1, &r));
    r = 7;
    assert_false(tm_size_add(SIZE_MAX, 1, &r));
    assert_int_equal(r, 7);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(appends_and_terminates),
        cmocka_unit_test(printf_of_any_length),
        cmocka_unit_test(maximum_holds),
        cmocka_unit_test(too_much_at_once),
        cmocka_unit_test(stealing),
        cmocka_unit_test(size_arithmetic),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
