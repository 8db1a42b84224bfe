/* The JSON writer: exact bytes, numbers that come back, bad UTF-8, other locales, jansson as the
 * reader of random documents. */
#include "tests/common/test.h"

#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/check.h"
#include "common/fmt.h"
#include "common/json.h"

static void exact_bytes(void **state)
{
    (void)state;
    tm_buf b;
    tm_buf_init(&b, 0);
    tm_jw w;
    tm_jw_init(&w, &b);
    tm_jw_obj(&w);
    tm_jw_kstr(&w, "s", "a\"b\\c/\n\t\r\b\f\x01\x7f");
    tm_jw_kstr(&w, "null", NULL);
    tm_jw_kint(&w, "i", -12);
    tm_jw_knum(&w, "d", 0.5);
    tm_jw_kbool(&w, "t", true);
    tm_jw_kbool(&w, "f", false);
    tm_jw_knull(&w, "n");
    tm_jw_key(&w, "a");
    tm_jw_arr(&w);
    tm_jw_arr(&w);
    tm_jw_arr_end(&w);
    tm_jw_obj(&w);
    tm_jw_obj_end(&w);
    tm_jw_int(&w, 1);
    tm_jw_raw(&w, "[2]", 3);
    tm_jw_arr_end(&w);
    tm_jw_kint(&w, "last", 9);
    tm_jw_obj_end(&w);
    assert_string_equal(b.data, "{\"s\":\"a\\\"b\\\\c/\\n\\t\\r\\b\\f\\u0001\x7f\",\"null\":null,"
                                "\"i\":-12,\"d\":0.5,\"t\":true,\"f\":false,\"n\":null,"
                                "\"a\":[[],{},1,[2]],\"last\":9}");
    tm_buf_deinit(&b);
}

static const char *string_of(tm_buf *b, const char *s, size_t len)
{
    tm_jw w;
    tm_buf_clear(b);
    tm_jw_init(&w, b);
    tm_jw_strn(&w, s, len);
    return b->data;
}

static void strings(void **state)
{
    (void)state;
    static const struct {
        const char *in, *out;
    } rows[] = {
        {"", "\"\""},
        {"h\xc3\xa9 \xe4\xbd\xa0 \xf0\x9f\x98\x80", "\"h\xc3\xa9 \xe4\xbd\xa0 \xf0\x9f\x98\x80\""},
        {"\xff", "\"\xef\xbf\xbd\""},
        {"a\xff\xfe\xfd"
         "b",
         "\"a\xef\xbf\xbd"
         "b\""},
        {"\xff\xc3\xa9\xff", "\"\xef\xbf\xbd\xc3\xa9\xef\xbf\xbd\""},
        {"\xe4\xbd", "\"\xef\xbf\xbd\""},
        {"\xc0\x80", "\"\xef\xbf\xbd\""},
        {"\xed\xa0\x80", "\"\xef\xbf\xbd\""},
        {"\xf4\x90\x80\x80", "\"\xef\xbf\xbd\""},
        {"a\xe2\x80\xa8\xe2\x80\xa9\xc2\x85z", "\"a\\u2028\\u2029\\u0085z\""},
    };
    tm_buf b;
    tm_buf_init(&b, 0);
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++)
        assert_string_equal(string_of(&b, rows[i].in, strlen(rows[i].in)), rows[i].out);
    assert_string_equal(string_of(&b, "a\0b", 3), "\"a\\u0000b\"");
    tm_buf_deinit(&b);
}

static void any_bytes_make_valid_json(void **state)
{
    (void)state;
    unsigned seed = (unsigned)time(NULL);
    print_message("seed %u\n", seed);
    tm_buf b;
    tm_buf_init(&b, 0);
    for (int round = 0; round < 20000; round++) {
        char in[24];
        size_t n = (size_t)rand_r(&seed) % sizeof in;
        for (size_t i = 0; i < n; i++)
            in[i] =
                (char)(rand_r(&seed) % 4 ? rand_r(&seed) : "\xe4\xbd\xa0\xc3"[rand_r(&seed) % 4]);
        string_of(&b, in, n);
        json_t *v = NULL;
        assert_int_equal(tm_json_parse(b.data, b.len, &v, NULL), TM_OK);
        if (tm_utf8_valid(in, n)) {
            assert_int_equal(json_string_length(v), n);
            assert_memory_equal(json_string_value(v), in, n + 0);
        }
        json_decref(v);
    }
    tm_buf_deinit(&b);
}

/* The decoder of the Unicode standard's table 3-7, written as a range table: another way to the same
 * answer as tm_utf8_seq. */
static bool well_formed(const unsigned char *p, size_t n)
{
    static const unsigned char rows[][10] = {
        {1, 0x00, 0x7f},
        {2, 0xc2, 0xdf, 0x80, 0xbf},
        {3, 0xe0, 0xe0, 0xa0, 0xbf, 0x80, 0xbf},
        {3, 0xe1, 0xec, 0x80, 0xbf, 0x80, 0xbf},
        {3, 0xed, 0xed, 0x80, 0x9f, 0x80, 0xbf},
        {3, 0xee, 0xef, 0x80, 0xbf, 0x80, 0xbf},
        {4, 0xf0, 0xf0, 0x90, 0xbf, 0x80, 0xbf, 0x80, 0xbf},
        {4, 0xf1, 0xf3, 0x80, 0xbf, 0x80, 0xbf, 0x80, 0xbf},
        {4, 0xf4, 0xf4, 0x80, 0x8f, 0x80, 0xbf, 0x80, 0xbf},
    };
    for (size_t r = 0; r < TM_ARRAY_LEN(rows); r++) {
        bool ok = rows[r][0] == n;
        for (size_t i = 0; ok && i < n; i++)
            ok = p[i] >= rows[r][1 + 2 * i] && p[i] <= rows[r][2 + 2 * i];
        if (ok)
            return true;
    }
    return false;
}

static void utf8_all_short_sequences(void **state)
{
    (void)state;
    for (unsigned v = 0; v < 1u << 24; v++) {
        unsigned char p[4] = {(unsigned char)(v >> 16), (unsigned char)(v >> 8), (unsigned char)v,
                              (unsigned char)(v % 3 ? 0x80 : v)};
        size_t n = tm_utf8_seq((const char *)p, 4), want = 0;
        for (size_t k = 1; k <= 4 && !want; k++)
            want = well_formed(p, k) ? k : 0;
        if (n != want)
            fail_msg("%02x %02x %02x %02x: %zu, expected %zu", p[0], p[1], p[2], p[3], n, want);
        /* A sequence that is cut is not whole. */
        if (n > 1 && tm_utf8_seq((const char *)p, n - 1) != 0)
            fail_msg("cut");
    }
}

static void numbers(void **state)
{
    (void)state;
    static const struct {
        double v;
        const char *text;
    } rows[] = {
        {0, "0"},
        {1, "1"},
        {-1, "-1"},
        {0.1, "0.1"},
        {-0.0, "-0.0"},
        {1e15, "1e+15"},
        {123456789012345, "123456789012345"},
        {0.3, "0.3"},
        {1e-7, "1e-07"},
        {1.5e300, "1.5e+300"},
        {0.1 + 0.2, "0.30000000000000004"},
        {4.9e-324, "4.94065645841247e-324"},
        {NAN, "null"},
        {INFINITY, "null"},
        {-INFINITY, "null"},
    };
    tm_buf b;
    tm_buf_init(&b, 0);
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        tm_jw w;
        tm_buf_clear(&b);
        tm_jw_init(&w, &b);
        tm_jw_num(&w, rows[i].v);
        assert_string_equal(b.data, rows[i].text);
    }
    tm_jw w;
    tm_buf_clear(&b);
    tm_jw_init(&w, &b);
    tm_jw_arr(&w);
    tm_jw_int(&w, INT64_MIN);
    tm_jw_int(&w, INT64_MAX);
    tm_jw_int(&w, 0);
    tm_jw_f32(&w, -0.1f);
    tm_jw_f32(&w, 1e-10f);
    tm_jw_f32(&w, NAN);
    tm_jw_arr_end(&w);
    assert_string_equal(b.data, "[-9223372036854775808,9223372036854775807,0,-0.1,1e-10,null]");
    tm_buf_deinit(&b);
}

static void numbers_come_back(void **state)
{
    (void)state;
    unsigned seed = (unsigned)time(NULL);
    print_message("seed %u\n", seed);
    /* With a comma locale, when the machine has one, the text must not change. */
    bool comma = setlocale(LC_NUMERIC, "de_DE.UTF-8") != NULL;
    print_message("comma locale: %s\n", comma ? "yes" : "not here");
    for (int i = 0; i < 200000; i++) {
        uint64_t bits =
            (uint64_t)rand_r(&seed) << 42 ^ (uint64_t)rand_r(&seed) << 21 ^ (uint64_t)rand_r(&seed);
        double d;
        memcpy(&d, &bits, sizeof d);
        char text[TM_NUM_MAX];
        if (!isfinite(d))
            continue;
        size_t n = tm_num_format(text, d, false);
        assert_int_equal(strlen(text), n);
        assert_null(strchr(text, ','));
        json_t *v = NULL;
        assert_int_equal(tm_json_parse(text, n, &v, NULL), TM_OK);
        assert_true(json_number_value(v) == d);
        json_decref(v);
        float f = (float)((double)rand_r(&seed) / (1 + rand_r(&seed) % 1000) - 1e5);
        n = tm_num_format(text, (double)f, true);
        assert_int_equal(tm_json_parse(text, n, &v, NULL), TM_OK);
        assert_true((float)json_number_value(v) == f);
        json_decref(v);
    }
    setlocale(LC_NUMERIC, "C");
}

static void full_buffer_is_harmless(void **state)
{
    (void)state;
    tm_buf b;
    tm_buf_init(&b, 10);
    tm_jw w;
    tm_jw_init(&w, &b);
    tm_jw_arr(&w);
    for (int i = 0; i < 20; i++)
        tm_jw_str(&w, "xyz");
    tm_jw_arr_end(&w);
    assert_true(b.failed);
    assert_true(b.len <= 10);
    tm_buf_deinit(&b);
}

static void deep_documents(void **state)
{
    (void)state;
    tm_buf b;
    tm_buf_init(&b, 0);
    tm_jw w;
    tm_jw_init(&w, &b);
    for (int i = 0; i < 63; i++) {
        tm_jw_arr(&w);
        tm_jw_int(&w, i);
    }
    for (int i = 0; i < 63; i++)
        tm_jw_arr_end(&w);
    json_t *v = NULL;
    assert_int_equal(tm_json_parse(b.data, b.len, &v, NULL), TM_OK);
    json_decref(v);
    tm_buf_deinit(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exact_bytes),
        cmocka_unit_test(strings),
        cmocka_unit_test(any_bytes_make_valid_json),
        cmocka_unit_test(utf8_all_short_sequences),
        cmocka_unit_test(numbers),
        cmocka_unit_test(numbers_come_back),
        cmocka_unit_test(full_buffer_is_harmless),
        cmocka_unit_test(deep_documents),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
