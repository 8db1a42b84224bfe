/* The arena: alignment, zeroing, no overlap, the bound. */
#include "tests/common/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/arena.h"

static void pieces_do_not_overlap(void **state)
{
    (void)state;
    unsigned seed = 12345;
    print_message("seed %u\n", seed);
    tm_arena *a = tm_arena_create(0);
    static unsigned char *piece[2000];
    static size_t size[2000];
    for (size_t i = 0; i < 2000; i++) {
        size[i] = (size_t)rand_r(&seed) % (i % 50 == 0 ? 20000 : 200);
        piece[i] = tm_arena_alloc(a, size[i]);
        assert_non_null(piece[i]);
        assert_int_equal((uintptr_t)piece[i] % 16, 0);
        for (size_t j = 0; j < size[i]; j++)
            assert_int_equal(piece[i][j], 0);
        memset(piece[i], (int)(i % 251) + 1, size[i]);
    }
    for (size_t i = 0; i < 2000; i++)
        for (size_t j = 0; j < size[i]; j++)
            assert_int_equal(piece[i][j], i % 251 + 1);
    tm_arena_destroy(a);
}

static void bound_holds(void **state)
{
    (void)state;
    tm_arena *a = tm_arena_create(1024);
    assert_int_equal(tm_arena_used(a), 0);
    assert_non_null(tm_arena_alloc(a, 1000)); /* rounded to 1008 */
    assert_int_equal(tm_arena_used(a), 1008);
    assert_null(tm_arena_alloc(a, 17));
    assert_int_equal(tm_arena_used(a), 1008);
    assert_non_null(tm_arena_alloc(a, 16));
    assert_null(tm_arena_alloc(a, 0)); /* even nothing needs an address of its own */
    assert_null(tm_arena_alloc(a, SIZE_MAX));
    assert_null(tm_arena_alloc(a, SIZE_MAX - 8));
    tm_arena_destroy(a);
    a = tm_arena_create(0);
    assert_null(tm_arena_alloc(a, SIZE_MAX - 64));
    tm_arena_destroy(a);
    tm_arena_destroy(NULL);
}

static void copies(void **state)
{
    (void)state;
    tm_arena *a = tm_arena_create(4096);
    assert_memory_equal(tm_arena_memdup(a, "a\0b", 3), "a\0b", 3);
    assert_non_null(tm_arena_memdup(a, NULL, 0));
    char *s = tm_arena_strndup(a, "hello world", 5);
    assert_string_equal(s, "hello");
    assert_string_equal(tm_arena_strndup(a, NULL, 0), "");
    assert_null(tm_arena_strndup(a, "x", SIZE_MAX));
    /* A string that fills its rounded piece exactly still has its NUL. */
    assert_string_equal(tm_arena_strndup(a, "123456789012345", 15), "123456789012345");
    assert_string_equal(tm_arena_strndup(a, "1234567890123456", 16), "1234567890123456");
    tm_arena_destroy(a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pieces_do_not_overlap),
        cmocka_unit_test(bound_holds),
        cmocka_unit_test(copies),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
