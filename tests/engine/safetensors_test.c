/* Safetensors files good and bad, sharded folders, number conversion, slices. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#include "common/buf.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/file.h"
#include "engine/weights/checkpoint.h"
#include "engine/weights/convert.h"

static uint64_t g_seed;

static uint32_t random_below(uint32_t n)
{
    g_seed = g_seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(g_seed >> 33) % n;
}

static void put_len(tm_buf *b, uint64_t n)
{
    for (int i = 0; i < 8; i++)
        tm_buf_putc(b, (char)(n >> (8 * i)));
}

/* A file with this header and data_len bytes 0, 1, 2 ... */
static void make_file(tm_buf *b, const char *header, size_t data_len)
{
    tm_buf_init(b, 0);
    put_len(b, strlen(header));
    tm_buf_puts(b, header);
    for (size_t i = 0; i < data_len; i++)
        tm_buf_putc(b, (char)i);
    assert_false(b->failed);
}

static tm_status parse(const tm_buf *b, tm_st_list *l, tm_err *err)
{
    /* An exact copy on the heap: reading past the end shows under the sanitizer. */
    unsigned char *copy = malloc(b->len ? b->len : 1);
    assert_non_null(copy);
    memcpy(copy, b->data, b->len);
    tm_status st = tm_st_parse(l, copy, b->len, "x.safetensors", err);
    free(copy);
    return st;
}

#define GOOD                                                                                       \
    "{\"__metadata__\":{\"format\":\"pt\"},"                                                       \
    "\"b\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[16,28]},"                         \
    "\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}   "

static void test_good(void **state)
{
    (void)state;
    tm_buf b;
    tm_st_list l;
    tm_err err = TM_ERR_INIT;
    make_file(&b, GOOD, 28);
    assert_int_equal(parse(&b, &l, &err), TM_OK);
    assert_int_equal(l.count, 2);
    assert_string_equal(l.tensors[0].name, "a");
    assert_int_equal(l.tensors[1].dtype, TM_ST_BF16);
    assert_int_equal(l.tensors[1].dims[1], 3);
    assert_int_equal(l.tensors[1].offset, 8 + strlen(GOOD) + 16);
    assert_int_equal(l.tensors[1].bytes, 12);
    tm_st_list_deinit(&l);
    tm_buf_deinit(&b);
}

typedef struct bad {
    const char *header;
    size_t data;
    const char *says; /* must stand in the message */
} bad;

#define T(body) "{\"w\":{" body "}}"
#define F16_2   "\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,4]"

static const bad bads[] = {
    {"", 0, "begin with"},
    {"1", 0, "begin with"},
    {"[]", 0, "begin with"},
    {" {}", 0, "begin with"},
    {"{", 0, "begin with"},
    {"{\"w\":", 0, "not valid JSON"},
    {"{}x", 0, "not valid JSON"},
    {"{\"\xff\":1}", 0, "not valid JSON"},
    {"{\"a\\u0000b\":1}", 0, "not valid JSON"},
    {"{\"w\":{" F16_2 "},\"w\":{" F16_2 "}}", 4, "not valid JSON: duplicate"},
    {"{\"w\":1}", 0, "tensor w: expected an object"},
    {"{\"w\\n\":1}", 0, "tensor w : expected an object"},
    {"{\"\":{" F16_2 "}}", 4, "name is 0 bytes"},
    {"{\"__metadata__\":[]}", 0, "__metadata__: expected an object"},
    {"{\"__metadata__\":{\"k\":1}}", 0, "__metadata__: k: expected a string"},
    {T("\"shape\":[2],\"data_offsets\":[0,4]"), 4, "dtype: expected a string"},
    {T("\"dtype\":5,\"shape\":[2],\"data_offsets\":[0,4]"), 4, "dtype: expected a string"},
    {T("\"dtype\":\"F12\",\"shape\":[2],\"data_offsets\":[0,4]"), 4, "'F12' is unknown"},
    {T("\"dtype\":\"F16\",\"data_offsets\":[0,4]"), 4, "shape: expected an array"},
    {T("\"dtype\":\"F16\",\"shape\":2,\"data_offsets\":[0,4]"), 4, "shape: expected an array"},
    {T("\"dtype\":\"F16\",\"shape\":[-2],\"data_offsets\":[0,4]"), 4, "shape[0]"},
    {T("\"dtype\":\"F16\",\"shape\":[2.0],\"data_offsets\":[0,4]"), 4, "shape[0]"},
    {T("\"dtype\":\"F16\",\"shape\":[2,0],\"data_offsets\":[0,4]"), 4, "shape[1]"},
    {T("\"dtype\":\"F16\",\"shape\":[\"2\"],\"data_offsets\":[0,4]"), 4, "shape[0]"},
    {T("\"dtype\":\"F16\",\"shape\":[1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,4]"), 4,
     "9 dimensions"},
    {T("\"dtype\":\"F16\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,4]"), 4,
     "larger than memory"},
    {T("\"dtype\":\"F16\",\"shape\":[9223372036854775807],\"data_offsets\":[0,4]"), 4,
     "needs 18446744073709551614 bytes"},
    {T("\"dtype\":\"F16\",\"shape\":[99999999999999999999],\"data_offsets\":[0,4]"), 4,
     "not valid JSON"},
    {T("\"dtype\":\"F16\",\"shape\":[2]"), 4, "data_offsets: expected two"},
    {T("\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0]"), 4, "data_offsets: expected two"},
    {T("\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,4,8]"), 4,
     "data_offsets: expected two"},
    {T("\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,4.0]"), 4,
     "data_offsets: expected two"},
    {T("\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[4,0]"), 4, "reversed"},
    {T("\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[-4,0]"), 4, "negative"},
    {T("\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,5]"), 4, "truncated"},
    {T("\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,9223372036854775807]"), 4, "truncated"},
    {T("\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":[0,4]"), 4,
     "[3] F16 needs 6 bytes, data_offsets give 4"},
    {T(F16_2), 5, "1 bytes at the end"},
    {T("\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[2,6]"), 6, "2 bytes before tensor w"},
    {"{\"v\":{" F16_2 "},\"w\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[2,6]}}", 6,
     "tensors v and w overlap"},
    {"{\"v\":{" F16_2 "},\"w\":{" F16_2 "}}", 4, "overlap"},
};

static void test_bad(void **state)
{
    (void)state;
    for (size_t i = 0; i < TM_ARRAY_LEN(bads); i++) {
        tm_buf b;
        tm_st_list l = {0};
        tm_err err = TM_ERR_INIT;
        make_file(&b, bads[i].header, bads[i].data);
        tm_status st = parse(&b, &l, &err);
        if (st != TM_STATUS_DATA || !strstr(err.msg, bads[i].says) ||
            strncmp(err.msg, "x.safetensors: ", 15) != 0)
            fail_msg("header %s: status %s, message '%s', expected '%s'", bads[i].header,
                     tm_status_name(st), err.msg, bads[i].says);
        assert_null(l.tensors);
        tm_buf_deinit(&b);
    }
}

static void test_bad_length(void **state)
{
    (void)state;
    static const struct {
        uint64_t header;
        size_t len; /* of the file after the length */
        const char *says;
    } cases[] = {
        {0, 0, "begin with"},
        {1, 1, "begin with"},
        {100, 10, "truncated"},
        {100000001, 10, "at most"},
        {UINT64_C(1) << 63, 10, "at most"},
        {UINT64_MAX, 10, "at most"},
    };
    tm_err err = TM_ERR_INIT;
    tm_st_list l;
    tm_buf b;
    for (size_t i = 0; i < TM_ARRAY_LEN(cases); i++) {
        tm_buf_init(&b, 0);
        put_len(&b, cases[i].header);
        for (size_t k = 0; k < cases[i].len; k++)
            tm_buf_putc(&b, '{');
        assert_int_equal(parse(&b, &l, &err), TM_STATUS_DATA);
        assert_non_null(strstr(err.msg, cases[i].says));
        tm_buf_deinit(&b);
    }
    for (size_t n = 0; n < 8; n++) {
        unsigned char zero[8] = {0};
        assert_int_equal(tm_st_parse(&l, zero, n, "x", &err), TM_STATUS_DATA);
    }
}

static void test_long_name(void **state)
{
    (void)state;
    tm_buf h, b;
    tm_st_list l;
    tm_err err = TM_ERR_INIT;
    tm_buf_init(&h, 0);
    tm_buf_puts(&h, "{\"");
    for (int i = 0; i < 1000000; i++)
        tm_buf_putc(&h, 'n');
    tm_buf_puts(&h, "\":{" F16_2 "}}");
    make_file(&b, h.data, 4);
    assert_int_equal(parse(&b, &l, &err), TM_STATUS_DATA);
    assert_non_null(strstr(err.msg, "1000000 bytes long"));
    tm_buf_deinit(&b);
    tm_buf_deinit(&h);
}

/* Every truncation of a good file is refused, and random damage never crashes nor reads outside. */
static void test_damage(void **state)
{
    (void)state;
    tm_buf b;
    tm_st_list l;
    make_file(&b, GOOD, 28);
    size_t full = b.len;
    for (b.len = 0; b.len < full; b.len++)
        assert_int_equal(parse(&b, &l, NULL), TM_STATUS_DATA);
    b.len = full;
    int accepted = 0;
    for (int i = 0; i < 20000; i++) {
        tm_buf m;
        tm_buf_init(&m, 0);
        tm_buf_append(&m, b.data, b.len);
        for (uint32_t k = random_below(4) + 1; k > 0; k--)
            m.data[random_below((uint32_t)m.len)] = (char)random_below(256);
        if (parse(&m, &l, NULL) == TM_OK) {
            accepted++;
            for (size_t k = 0; k < l.count; k++)
                assert_true(l.tensors[k].offset + l.tensors[k].bytes <= m.len);
            tm_st_list_deinit(&l);
        }
        tm_buf_deinit(&m);
    }
    printf("%d of 20000 damaged files were still valid\n", accepted);
    tm_buf_deinit(&b);
}

/* ---- folders ---- */

static char g_dir[64];

static void write_file(const char *name, const void *data, size_t len)
{
    char path[512];
    assert_true(tm_path_join(path, sizeof(path), g_dir, name));
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, len, f), len);
    assert_int_equal(fclose(f), 0);
}

static void write_tensors(const char *name, const char *header, size_t data)
{
    tm_buf b;
    make_file(&b, header, data);
    write_file(name, b.data, b.len);
    tm_buf_deinit(&b);
}

static void drop(const char *name)
{
    char path[512];
    assert_true(tm_path_join(path, sizeof(path), g_dir, name));
    unlink(path);
}

static void expect_refused(const char *says)
{
    tm_checkpoint *c = NULL;
    tm_err err = TM_ERR_INIT;
    tm_status st = tm_checkpoint_open(&c, g_dir, &err);
    if (st == TM_OK || !strstr(err.msg, says))
        fail_msg("status %s, message '%s', expected '%s'", tm_status_name(st), err.msg, says);
    assert_null(c);
}

static void write_index(const char *text)
{
    write_file("model.safetensors.index.json", text, strlen(text));
}

static void test_index(void **state)
{
    (void)state;
    expect_refused("neither model.safetensors nor");
    write_tensors("s1.safetensors", GOOD, 28);
    write_tensors("s2.safetensors", T(F16_2), 4);
    write_index("{\"weight_map\":{\"a\":\"s1.safetensors\",\"w\":\"s2.safetensors\"}}");
    tm_checkpoint *c = NULL;
    tm_err err = TM_ERR_INIT;
    assert_int_equal(tm_checkpoint_open(&c, g_dir, &err), TM_OK);
    assert_int_equal(tm_checkpoint_count(c), 2);
    assert_string_equal(tm_checkpoint_file(c, tm_checkpoint_find(c, "w")), "s2.safetensors");
    assert_null(tm_checkpoint_find(c, "b")); /* in a shard, but not in the index */
    tm_checkpoint_close(c);

    static const struct {
        const char *index, *says;
    } cases[] = {
        {"[]", "weight_map"},
        {"{\"weight_map\":[]}", "weight_map"},
        {"{\"weight_map\":{}}", "weight_map"},
        {"{\"weight_map\":{\"a\":7}}", "weight_map: a: expected a file name"},
        {"{\"weight_map\":{\"a\":\"../s1.safetensors\"}}", "not a plain file name"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "not a plain file name"},
        {"{\"weight_map\":{\"a\":\"\"}}", "not a plain file name"},
        {"{\"weight_map\":{\"a\":\".\"}}", "not a plain file name"},
        {"{\"weight_map\":{\"a\":\"s3.safetensors\"}}", "shard s3.safetensors that"},
        {"{\"weight_map\":{\"zz\":\"s1.safetensors\"}}", "s1.safetensors: tensor zz is not in it"},
        {"{\"weight_map\":{\"a\":\"model.safetensors.index.json\"}}", "index.json: header"},
        {"{\"weight_map\":", "index.json"},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(cases); i++) {
        write_index(cases[i].index);
        expect_refused(cases[i].says);
    }
    drop("model.safetensors.index.json");
    write_file("model.safetensors", "", 0);
    expect_refused("model.safetensors");
    drop("model.safetensors");
    drop("s1.safetensors");
    drop("s2.safetensors");
}

static void test_slices(void **state)
{
    (void)state;
    tm_buf b;
    make_file(&b,
              "{\"v\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[24,28]},"
              "\"m\":{\"dtype\":\"BF16\",\"shape\":[3,4],\"data_offsets\":[0,24]}}",
              0);
    float m[12];
    for (int i = 0; i < 12; i++) {
        m[i] = (float)(i * i) - 20.0f;
        uint16_t h = tm_f32_to_bf16(m[i]);
        tm_buf_append(&b, &h, sizeof(h));
    }
    tm_buf_append(&b, "abcd", 4);
    write_file("model.safetensors", b.data, b.len);
    tm_buf_deinit(&b);

    tm_checkpoint *c = NULL;
    tm_err err = TM_ERR_INIT;
    assert_int_equal(tm_checkpoint_open(&c, g_dir, &err), TM_OK);
    const tm_st_tensor *t = tm_checkpoint_find(c, "m");
    float out[12];
    assert_int_equal(tm_checkpoint_read(c, t, 4, (tm_slice){1, 2, 0, 4}, out, TM_DTYPE_F32, &err),
                     TM_OK);
    assert_memory_equal(out, m + 4, 8 * sizeof(float));
    assert_int_equal(tm_checkpoint_read(c, t, 4, (tm_slice){0, 3, 1, 2}, out, TM_DTYPE_F32, &err),
                     TM_OK);
    for (int i = 0; i < 3; i++)
        assert_memory_equal(out + i * 2, m + i * 4 + 1, 2 * sizeof(float));
    const tm_st_tensor *v = tm_checkpoint_find(c, "v");
    assert_int_equal(tm_checkpoint_read(c, v, 1, (tm_slice){0, 1, 0, 1}, out, TM_DTYPE_F32, &err),
                     TM_STATUS_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "tensor v is I32"));

    /* Cut after mapping: an error, not a bus error. */
    char path[512];
    assert_true(tm_path_join(path, sizeof(path), g_dir, "model.safetensors"));
    assert_int_equal(truncate(path, 20), 0);
    assert_int_equal(tm_checkpoint_read(c, t, 4, (tm_slice){0, 3, 0, 4}, out, TM_DTYPE_F32, &err),
                     TM_STATUS_DATA);
    assert_non_null(strstr(err.msg, "shrank"));
    tm_checkpoint_close(c);
    drop("model.safetensors");
}

/* ---- numbers ---- */

static void test_convert_exact(void **state)
{
    (void)state;
    for (uint32_t u = 0; u < 65536; u++) {
        uint16_t h = (uint16_t)u;
        float f = tm_f16_to_f32(h),
              want = (float)ldexp(1.0 + (h & 0x3ff) / 1024.0, ((h >> 10) & 31) - 15);
        if (((h >> 10) & 31) == 0)
            want = (float)ldexp((h & 0x3ff) / 1024.0, -14);
        if (((h >> 10) & 31) == 31) {
            assert_int_equal(isnan(f) != 0, (h & 0x3ff) != 0);
            assert_int_equal(isinf(f) != 0, (h & 0x3ff) == 0);
        } else {
            assert_true(fabsf(f) == want && (signbit(f) != 0) == (h >> 15 != 0));
        }
        if (!isnan(f))
            assert_int_equal(tm_f32_to_f16(f), h);
        else
            assert_true(isnan(tm_f16_to_f32(tm_f32_to_f16(f))));
        f = tm_bf16_to_f32(h);
        if (!isnan(f))
            assert_int_equal(tm_f32_to_bf16(f), h);
        else
            assert_true(isnan(tm_bf16_to_f32(tm_f32_to_bf16(f))));
    }
}

/* The result is the nearest representable number, the even one on a tie. */
static void test_convert_rounding(void **state)
{
    (void)state;
    for (int i = 0; i < 200000; i++) {
        uint32_t u = random_below(65536) << 16 | random_below(65536);
        float f;
        memcpy(&f, &u, sizeof(f));
        if (!isfinite(f))
            continue;
        uint16_t h = tm_f32_to_f16(f);
        if (fabsf(f) >= 65520.0f) {
            assert_int_equal(h & 0x7fff, 0x7c00);
        } else {
            double e = fabs((double)tm_f16_to_f32(h) - f);
            uint16_t up = (uint16_t)(h + 1), down = (uint16_t)(h - 1);
            if ((up & 0x7fff) < 0x7c00 && (up & 0x7fff) != 0)
                assert_true(e <= fabs((double)tm_f16_to_f32(up) - f));
            if ((h & 0x7fff) != 0)
                assert_true(e <= fabs((double)tm_f16_to_f32(down) - f));
        }
        h = tm_f32_to_bf16(f);
        double e = fabs((double)tm_bf16_to_f32(h) - f);
        if ((h & 0x7fff) != 0 && (h & 0x7fff) < 0x7f80)
            assert_true(e <= fabs((double)tm_bf16_to_f32((uint16_t)(h - 1)) - f));
    }
    assert_int_equal(tm_f32_to_bf16(1.0f + 0x1p-8f), 0x3f80); /* ties to even */
    assert_int_equal(tm_f32_to_bf16(1.0f + 0x3p-8f), 0x3f82);
    assert_int_equal(tm_f32_to_f16(1.0f + 0x1p-11f), 0x3c00);
    assert_int_equal(tm_f32_to_f16(1.0f + 0x3p-11f), 0x3c02);
}

static void test_convert_arrays(void **state)
{
    (void)state;
    static const tm_dtype types[] = {TM_DTYPE_F32, TM_DTYPE_BF16, TM_DTYPE_F16};
    enum { N = 1300 };
    float src[N], back[N];
    for (int i = 0; i < N; i++)
        src[i] = (float)((int)random_below(200) - 100); /* exact in all three */
    for (size_t a = 0; a < 3; a++)
        for (size_t b = 0; b < 3; b++) {
            static char x[N * 4 + 1], y[N * 4];
            tm_convert(y, types[a], src, TM_DTYPE_F32, N);
            memcpy(x + 1, y, N * 4); /* unaligned source */
            tm_convert(y, types[b], x + 1, types[a], N);
            tm_convert(back, TM_DTYPE_F32, y, types[b], N);
            assert_memory_equal(src, back, sizeof(src));
        }
}

/* Every pattern of bf16 and f16, by arrays as one by one, at places that are no multiple of 8. */
static void test_convert_patterns(void **state)
{
    (void)state;
    enum { N = 65536 + 5 };
    static uint16_t from[N], to[N], want[N];
    const float factor = 0x1p-6f, addend = 0.25f;
    for (size_t i = 0; i < N; i++)
        from[i] = (uint16_t)(i * 40503u + 7);
    tm_convert(to, TM_DTYPE_F16, from, TM_DTYPE_BF16, N);
    for (size_t i = 0; i < N; i++)
        want[i] = tm_f32_to_f16(tm_bf16_to_f32(from[i]));
    assert_memory_equal(to, want, sizeof(to));
    memcpy(to, from, sizeof(to));
    tm_adjust(to, TM_DTYPE_F16, N, factor, addend);
    for (size_t i = 0; i < N; i++) {
        float x = tm_f16_to_f32(from[i]);
        want[i] = x != x ? to[i] : tm_f32_to_f16(x * factor + addend);
        assert_true(x == x || tm_f16_to_f32(to[i]) != tm_f16_to_f32(to[i]));
    }
    assert_memory_equal(to, want, sizeof(to));
    for (size_t i = 0; i < N; i++)
        assert_int_equal(tm_f16_all_finite(&from[i], 1), (from[i] & 0x7c00) != 0x7c00);
}

static void test_adjust_others(void **state)
{
    (void)state;
    float x[3] = {1.0f, -2.0f, 3.5f};
    const float want[3] = {1.5f, -0.0f, 2.75f};
    uint16_t b[3];
    tm_convert(b, TM_DTYPE_BF16, x, TM_DTYPE_F32, 3);
    tm_adjust(x, TM_DTYPE_F32, 3, 0.5f, 1.0f);
    tm_adjust(b, TM_DTYPE_BF16, 3, 0.5f, 1.0f);
    for (int i = 0; i < 3; i++) {
        assert_true(x[i] == want[i]);
        assert_true(tm_bf16_to_f32(b[i]) == want[i]);
    }
}

int main(void)
{
    const char *s = getenv("TM_SEED");
    g_seed = s ? strtoull(s, NULL, 10) : (uint64_t)tm_clock_ns();
    printf("seed %llu (TM_SEED repeats it)\n", (unsigned long long)g_seed);
    snprintf(g_dir, sizeof(g_dir), "/tmp/tm-safetensors-XXXXXX");
    if (!mkdtemp(g_dir))
        return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),
        cmocka_unit_test(test_bad),
        cmocka_unit_test(test_bad_length),
        cmocka_unit_test(test_long_name),
        cmocka_unit_test(test_damage),
        cmocka_unit_test(test_index),
        cmocka_unit_test(test_slices),
        cmocka_unit_test(test_convert_exact),
        cmocka_unit_test(test_convert_rounding),
        cmocka_unit_test(test_convert_patterns),
        cmocka_unit_test(test_adjust_others),
        cmocka_unit_test(test_convert_arrays),
    };
    int rc = cmocka_run_group_tests(tests, NULL, NULL);
    rmdir(g_dir);
    return rc;
}
