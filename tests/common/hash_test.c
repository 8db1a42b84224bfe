/* SHA-256 against published vectors (FIPS 180-4 examples), hex, base64 (RFC 4648 section 10). */
#include "tests/common/test.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/hash.h"

static void sha256_vectors(void **state)
{
    (void)state;
    static const char *const rows[][2] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        uint8_t d[32], parts[32];
        char hex[65];
        size_t n = strlen(rows[i][0]);
        tm_sha256(rows[i][0], n, d);
        tm_hex(d, 32, hex);
        assert_string_equal(hex, rows[i][1]);
        tm_sha256_ctx *c = tm_sha256_begin();
        for (size_t j = 0; j < n; j++)
            tm_sha256_add(c, rows[i][0] + j, 1);
        tm_sha256_end(c, parts);
        assert_true(tm_equal_ct(d, parts, 32));
        parts[31] ^= 1;
        assert_false(tm_equal_ct(d, parts, 32));
    }
}

static void hex_both_ways(void **state)
{
    (void)state;
    uint8_t all[256], back[256] = {0};
    char hex[513];
    for (int i = 0; i < 256; i++)
        all[i] = (uint8_t)i;
    tm_hex(all, 256, hex);
    assert_true(tm_unhex(hex, 512, back));
    assert_memory_equal(all, back, 256);
    assert_true(tm_unhex("aAfF", 4, back));
    assert_int_equal(back[0], 0xaa);
    assert_int_equal(back[1], 0xff);
    assert_false(tm_unhex("abc", 3, back));
    assert_false(tm_unhex("0x", 2, back));
    assert_false(tm_unhex("00g0", 4, back));
    assert_int_equal(back[0], 0xaa); /* unchanged by the failures */
    assert_true(tm_unhex("", 0, back));
}

static void base64_vectors(void **state)
{
    (void)state;
    static const char *const rows[][2] = {
        {"", ""},
        {"f", "Zg=="},
        {"fo", "Zm8="},
        {"foo", "Zm9v"},
        {"foob", "Zm9vYg=="},
        {"fooba", "Zm9vYmE="},
        {"foobar", "Zm9vYmFy"},
        {"\xff\xfe\xfd", "//79"},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        tm_buf b;
        tm_buf_init(&b, 0);
        assert_true(tm_base64_encode(&b, rows[i][0], strlen(rows[i][0])));
        assert_string_equal(b.data ? b.data : "", rows[i][1]);
        tm_buf_clear(&b);
        assert_true(tm_base64_decode(&b, rows[i][1], strlen(rows[i][1])));
        assert_string_equal(b.data ? b.data : "", rows[i][0]);
        tm_buf_deinit(&b);
    }
}

static void base64_refusals(void **state)
{
    (void)state;
    static const char *const bad[] = {"Z",    "Zg",   "Zg=",      "Zg==Zg==", "====",
                                      "Z===", "Zh==", "Zm9=",     "Zm8=\n",   " Zm8",
                                      "Zm-v", "Zm_v", "Zm9v====", "Zg=A"};
    for (size_t i = 0; i < TM_ARRAY_LEN(bad); i++) {
        tm_buf b;
        tm_buf_init(&b, 0);
        tm_buf_puts(&b, "kept");
        assert_false(tm_base64_decode(&b, bad[i], strlen(bad[i])));
        assert_string_equal(b.data, "kept");
        tm_buf_deinit(&b);
    }
}

static void random_round_trips(void **state)
{
    (void)state;
    for (size_t n = 0; n < 100; n++) {
        uint8_t data[100] = {0};
        tm_random_bytes(data, n);
        tm_buf text, back;
        tm_buf_init(&text, 0);
        tm_buf_init(&back, 0);
        assert_true(tm_base64_encode(&text, data, n));
        assert_int_equal(text.len, (n + 2) / 3 * 4);
        assert_true(tm_base64_decode(&back, text.data ? text.data : "", text.len));
        assert_int_equal(back.len, n);
        if (n)
            assert_memory_equal(back.data, data, n);
        tm_buf_deinit(&text);
        tm_buf_deinit(&back);
    }
    uint8_t a[32], b[32];
    tm_random_bytes(a, 32);
    tm_random_bytes(b, 32);
    assert_memory_not_equal(a, b, 32);
}

/* Every input bit changes about half of the 64 output bits, at every length up to three words. */
static void hash64_spreads(void **state)
{
    (void)state;
    uint8_t data[24] = {0};
    for (size_t len = 1; len <= sizeof data; len++) {
        uint64_t base = tm_hash64(data, len, 1);
        assert_true(base != tm_hash64(data, len, 2));
        assert_true(base != tm_hash64(data, len - 1, 1));
        for (size_t bit = 0; bit < len * 8; bit++) {
            data[bit / 8] ^= (uint8_t)(1 << bit % 8);
            int changed = __builtin_popcountll(base ^ tm_hash64(data, len, 1));
            assert_in_range(changed, 10, 54);
            data[bit / 8] ^= (uint8_t)(1 << bit % 8);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sha256_vectors),     cmocka_unit_test(hex_both_ways),
        cmocka_unit_test(base64_vectors),     cmocka_unit_test(base64_refusals),
        cmocka_unit_test(random_round_trips), cmocka_unit_test(hash64_spreads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
