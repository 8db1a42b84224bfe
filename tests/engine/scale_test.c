/* The factors that keep float16 in its range (engine/model/scale.c): own-llama with all that enters the residual stream, and
 * gates' products, 2^14 times as large, which is beyond float16, and 2^-5 times, where epsilons and small numbers count. In
 * float16 on the CUDA backend, real or emulated, its logits are those of float32 still; a weight that does not fit is
 * refused by name. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/check.h"
#include "common/file.h"
#include "tests/engine/golden_run.h"

#define FAMILY "tests/fixtures/families/own-llama"

enum { MEMORY_MAX = 1 << 20, LARGER = 14, SMALLER = -5 /* as exponents of 2 */ };

static char g_dir[64];

static void path_of(char *out, size_t size, const char *dir, const char *file)
{
    snprintf(out, size, "%s/%s", dir, file);
}

static void write_file(const char *file, const char *data, size_t len)
{
    char path[256];
    path_of(path, sizeof(path), g_dir, file);
    FILE *f = fopen(path, "wb");
    TM_ASSERT(f && fwrite(data, 1, len, f) == len && fclose(f) == 0);
}

static void read_file(const char *file, char **data, size_t *len)
{
    char path[256];
    tm_err err = TM_ERR_INIT;
    path_of(path, sizeof(path), FAMILY, file);
    if (tm_file_read(path, MEMORY_MAX, data, len, &err) != TM_OK)
        fail_msg("%s", err.msg);
}

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);
    return n >= m && strcmp(s + n - m, end) == 0;
}

/* Multiplies a bf16 tensor of the file by 2^by. */
static void enlarge(char *numbers, json_t *tensor, int by)
{
    const json_t *offsets = json_object_get(tensor, "data_offsets");
    size_t at = (size_t)json_integer_value(json_array_get(offsets, 0));
    size_t end = (size_t)json_integer_value(json_array_get(offsets, 1));
    assert_string_equal(json_string_value(json_object_get(tensor, "dtype")), "BF16");
    for (; at < end; at += sizeof(uint16_t)) {
        uint16_t x;
        memcpy(&x, numbers + at, sizeof(x));
        if (x & 0x7f80)
            x = (uint16_t)(x + by * (1 << 7));
        memcpy(numbers + at, &x, sizeof(x));
    }
}

/* The checkpoint in g_dir, tensors with these ends enlarged; `by` as an exponent of 2. */
static void make_checkpoint(const char *const *ends, size_t count, int by)
{
    char *data, *config;
    size_t len, config_len;
    uint64_t head;
    const char *name;
    json_t *tensor;
    int enlarged = 0;
    read_file("config.json", &config, &config_len);
    write_file("config.json", config, config_len);
    free(config);
    read_file("model.safetensors", &data, &len);
    memcpy(&head, data, sizeof(head));
    json_t *root = json_loadb(data + sizeof(head), (size_t)head, 0, NULL);
    TM_ASSERT(root);
    json_object_foreach(root, name, tensor)
    {
        for (size_t i = 0; i < count; i++)
            if (ends_with(name, ends[i])) {
                enlarge(data + sizeof(head) + head, tensor, by);
                enlarged++;
            }
    }
    assert_true(enlarged >= (int)count);
    write_file("model.safetensors", data, len);
    json_decref(root);
    free(data);
}

/* Logits of the golden's sequences; false where the backend has no device here. */
static bool feed(golden *g, const char *backend, const char *dtype, float *out)
{
    run r;
    if (!run_open_on(&r, backend, g_dir, dtype, 16))
        return false;
    golden_feed_whole(&r, g, out);
    golden_reset(g, &r);
    run_close(&r);
    return true;
}

static void check(int by)
{
    static const char *const ends[] = {"embed_tokens.weight", "o_proj.weight", "up_proj.weight"};
    golden g;
    assert_true(golden_load(&g, FAMILY, 1));
    size_t n = (size_t)g.count * GOLDEN_TAIL * (size_t)g.vocab;
    float *want = calloc(n, sizeof(float)), *got = calloc(n, sizeof(float));
    TM_ASSERT(want && got);
    make_checkpoint(ends, TM_ARRAY_LEN(ends), by);
    assert_true(feed(&g, "cpu", "float32", want));
    if (feed(&g, "cuda", "auto", got)) {
        double off = run_nmse(got, want, n);
        printf("float16 against float32, 2^%d times as large: NMSE %.2g\n", by, off);
        assert_true(off < 5e-6);
    }
    free(want);
    free(got);
    golden_free(&g);
}

static void test_large(void **state)
{
    (void)state;
    check(LARGER);
}

static void test_small(void **state)
{
    (void)state;
    check(SMALLER);
}

/* A weight that float16 itself does not hold; bfloat16 does. */
static void test_refused(void **state)
{
    (void)state;
    static const char *const ends[] = {"q_proj.weight"};
    tm_err err = TM_ERR_INIT;
    tm_comm *comm = NULL;
    run r;
    make_checkpoint(ends, TM_ARRAY_LEN(ends), 3 * LARGER);
    if (!run_open_on(&r, "cuda", g_dir, "bfloat16", 16))
        return;
    run_close(&r);
    assert_int_equal(tm_comm_create(&comm, 1, NULL, &err), TM_OK);
    assert_int_equal(run_open_at(&r, comm, "cuda", g_dir, "auto", NULL, 0, 16, &err),
                     TM_STATUS_UNSUPPORTED);
    tm_comm_destroy(comm);
    assert_non_null(strstr(err.msg, "q_proj.weight"));
    assert_non_null(strstr(err.msg, "dtype bfloat16"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_large), cmocka_unit_test(test_small),
                                       cmocka_unit_test(test_refused)};
    snprintf(g_dir, sizeof(g_dir), "/tmp/tm-scale-XXXXXX");
    if (!mkdtemp(g_dir))
        return 1;
    if (getenv("TM_TEST"))
        cmocka_set_test_filter(getenv("TM_TEST"));
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    char path[256];
    static const char *const files[] = {"config.json", "model.safetensors"};
    for (size_t i = 0; i < TM_ARRAY_LEN(files); i++) {
        path_of(path, sizeof(path), g_dir, files[i]);
        unlink(path);
    }
    rmdir(g_dir);
    return failed;
}
