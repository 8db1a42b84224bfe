/* The closest names: by the letters that differ, the closest first, cut where the room ends. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/closest.h"

static const char *const names[] = {"vicuna", "qwen", "llama2", "llama3", "internlm2", "yi"};

static const char *name_of(size_t i)
{
    return names[i];
}

static void expect(const char *word, size_t size, const char *want)
{
    char out[64];
    tm_closest(word, name_of, TM_ARRAY_LEN(names), out, size);
    assert_string_equal(out, want);
}

static void closest(void **state)
{
    (void)state;
    expect("lama3", 64, "llama3, llama2, qwen");
    expect("qwen2d5", 64, "qwen, vicuna, llama2"); /* of equals the first */
    expect("", 64, "yi, qwen, vicuna");
    expect("yi", 1, "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(closest)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
