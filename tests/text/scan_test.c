/* The hand-written scanners against the regular expressions that they stand for, on random texts that favour
 * what the patterns look at. TM_SEED repeats a run. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

#include "common/check.h"
#include "text/tok/regex.h"
#include "text/tok/scan.h"
#include "text/tok/unicode.h"

static uint64_t g_state;

static uint32_t random_below(uint32_t n)
{
    g_state = g_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((g_state >> 33) % n);
}

static size_t random_text(char *out, size_t room)
{
    static const char *const parts[] = {" ",
                                        "  ",
                                        "\n",
                                        "\r\n",
                                        "\t",
                                        "'s",
                                        "'LL",
                                        "'",
                                        "'\xC5\xBF",
                                        "a",
                                        "Zz",
                                        "1",
                                        "12",
                                        "345",
                                        ".",
                                        "!?",
                                        "_",
                                        "\xC3\xA9",
                                        "e\xCC\x81",
                                        "\xE4\xB8\xAD",
                                        "\xC2\xBD",
                                        "\xC2\xA0",
                                        "\xE3\x80\x80",
                                        "\xE2\x80\x8D",
                                        "\xF0\x9F\x98\x80",
                                        "\xC2\x85",
                                        "\xE0\xA4\xB9\xE0\xA4\xBF",
                                        "'ve",
                                        "'re",
                                        "\xE1\xA0\x8E",
                                        "\xE2\x85\xA7"};
    size_t n = 0, want = 1 + random_below(30);
    for (size_t i = 0; i < want; i++) {
        char any[4];
        const char *s = parts[random_below(TM_ARRAY_LEN(parts))];
        size_t len = strlen(s);
        if (random_below(8) == 0) {
            /* The two libraries have their classes from different versions of Unicode: characters that are
             * new in version 15 are left out, which are two below U+10000. */
            uint32_t cp = 0xD800;
            while ((cp >= 0xD800 && cp < 0xE000) || cp == 0x0CF3 || cp == 0x0ECE)
                cp = 1 + random_below(random_below(2) ? 0x3100 : 0xFFFF);
            len = tm_utf8_put(cp, any);
            s = any;
        }
        if (n + len > room)
            break;
        memcpy(out + n, s, len);
        n += len;
    }
    return n;
}

static void show(const char *pattern, const char *text, size_t len, size_t pos, size_t a, size_t b)
{
    tm_buf hex;
    tm_buf_init(&hex, 0);
    for (size_t i = 0; i < len; i++)
        tm_buf_printf(&hex, "%02x", (unsigned char)text[i]);
    fail_msg("%s\nat %zu of %s: scanner %zu, pattern %zu", pattern, pos, hex.data, a, b);
}

static void check_pattern(const char *pattern)
{
    tm_scan_fn scan = tm_scan_for(pattern, strlen(pattern));
    tm_regex *r = NULL;
    assert_non_null(scan);
    assert_int_equal(tm_regex_create(&r, pattern, strlen(pattern), true, NULL), TM_OK);
    tm_regex_work *w = tm_regex_work_create(r);
    assert_non_null(w);
    for (int round = 0; round < 20000; round++) {
        char text[256];
        size_t len = random_text(text, sizeof(text));
        for (size_t pos = 0; pos < len;) {
            tm_regex_match m;
            bool found;
            size_t end = scan(text, pos, len);
            assert_int_equal(tm_regex_find(r, w, text, len, pos, &m, &found, NULL), TM_OK);
            if (!found || m.begin != pos || m.end != end)
                show(pattern, text, len, pos, end, found ? m.end : 0);
            pos = end;
        }
    }
    tm_regex_work_destroy(w);
    tm_regex_destroy(r);
}

static void test_scanners(void **state)
{
    (void)state;
    int n = 0;
    for (; tm_scan_pattern(n); n++)
        check_pattern(tm_scan_pattern(n));
    assert_true(n >= 4);
}

/* tm_scan_trailing against the pattern it stands for, as a sequence of matches. */
static void test_trailing(void **state)
{
    (void)state;
    tm_regex *r = NULL;
    assert_int_equal(tm_regex_create(&r, TM_SCAN_TRAILING, strlen(TM_SCAN_TRAILING), false, NULL),
                     TM_OK);
    tm_regex_work *w = tm_regex_work_create(r);
    for (int round = 0; round < 50000; round++) {
        static const char *const parts[] = {" ", "\n", "\t", "a", "\xC2\xA0", "\r", "  "};
        char text[64];
        size_t len = 0, begin, end;
        for (uint32_t k = random_below(14); k > 0; k--) {
            const char *s = parts[random_below(TM_ARRAY_LEN(parts))];
            memcpy(text + len, s, strlen(s));
            len += strlen(s);
        }
        for (size_t from = 0; from <= len;) {
            tm_regex_match m;
            bool found;
            assert_int_equal(tm_regex_find(r, w, text, len, from, &m, &found, NULL), TM_OK);
            bool ours = tm_scan_trailing(text, len, from, &begin, &end);
            if (ours != found || (found && (m.begin != begin || m.end != end)))
                show(TM_SCAN_TRAILING, text, len, from, ours ? end : 0, found ? m.end : 0);
            if (!found)
                break;
            from = end;
        }
    }
    tm_regex_work_destroy(w);
    tm_regex_destroy(r);
}

/* Marks in any number are ordered by class, equal ones as they come, in linear time. */
static void test_normal_forms(void **state)
{
    (void)state;
    enum { PAIRS = 150000 };
    static const struct {
        const char *in, *out[4]; /* NFC, NFD, NFKC, NFKD */
    } rows[] = {
        {"e\xCC\x81", {"\xC3\xA9", "e\xCC\x81", "\xC3\xA9", "e\xCC\x81"}},
        {"q\xCC\x87\xCC\xA3",
         {"q\xCC\xA3\xCC\x87", "q\xCC\xA3\xCC\x87", "q\xCC\xA3\xCC\x87", "q\xCC\xA3\xCC\x87"}},
        {"\xEF\xAC\x81", {"\xEF\xAC\x81", "\xEF\xAC\x81", "fi", "fi"}},
        {"\xED\x95\x9C",
         {"\xED\x95\x9C", "\xE1\x84\x92\xE1\x85\xA1\xE1\x86\xAB", "\xED\x95\x9C",
          "\xE1\x84\x92\xE1\x85\xA1\xE1\x86\xAB"}},
        {"\xE2\x84\xAB", {"\xC3\x85", "A\xCC\x8A", "\xC3\x85", "A\xCC\x8A"}},
    };
    tm_buf b, long_text;
    tm_buf_init(&b, 0);
    tm_buf_init(&long_text, 0);
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        for (int f = 0; f < 4; f++) {
            tm_buf_clear(&b);
            assert_true(tm_uc_normalize(&b, rows[i].in, strlen(rows[i].in), (tm_uc_form)f));
            assert_string_equal(b.data, rows[i].out[f]);
        }
    }
    for (int i = 0; i < PAIRS; i++)
        tm_buf_puts(&long_text, "\xCC\x81\xCC\xA3"); /* classes 230 and 220 */
    tm_buf_clear(&b);
    assert_true(tm_uc_normalize(&b, long_text.data, long_text.len, TM_UC_NFC));
    assert_int_equal(b.len, long_text.len);
    for (size_t i = 0; i < b.len; i += 2)
        assert_memory_equal(b.data + i, i < b.len / 2 ? "\xCC\xA3" : "\xCC\x81", 2);
    tm_buf_deinit(&b);
    tm_buf_deinit(&long_text);
}

/* White space and word characters of the engines that the files were written for. */
static void test_classes(void **state)
{
    (void)state;
    static const struct {
        const char *pattern, *text;
        bool match;
    } rows[] = {
        {"^\\s$", "\xC2\x85", true},       {"^\\s$", "\xE1\xA0\x8E", false},
        {"^[\\s]$", "\xE3\x80\x80", true}, {"^[^\\s]$", "\xE1\xA0\x8E", true},
        {"^\\S$", "\xC2\xA0", false},      {"^\\w$", "\xE0\xA4\xBF", true},
        {"^\\w$", "\xE2\x80\xBF", true},   {"^\\w$", "\xC2\xBD", false},
        {"^[\\w.]$", "_", true},           {"^\\W$", "\xCC\x81", false},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        tm_regex *r;
        tm_regex_match m;
        bool found;
        assert_int_equal(tm_regex_create(&r, rows[i].pattern, strlen(rows[i].pattern), false, NULL),
                         TM_OK);
        tm_regex_work *w = tm_regex_work_create(r);
        assert_int_equal(
            tm_regex_find(r, w, rows[i].text, strlen(rows[i].text), 0, &m, &found, NULL), TM_OK);
        if (found != rows[i].match)
            fail_msg("row %zu: %s", i, rows[i].pattern);
        tm_regex_work_destroy(w);
        tm_regex_destroy(r);
    }
}

int main(void)
{
    const char *seed = getenv("TM_SEED");
    g_state = seed ? strtoull(seed, NULL, 10) : (uint64_t)time(NULL);
    printf("TM_SEED=%llu\n", (unsigned long long)g_state);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_scanners),
        cmocka_unit_test(test_trailing),
        cmocka_unit_test(test_normal_forms),
        cmocka_unit_test(test_classes),
    };
    return cmocka_run_group_tests_name("scan", tests, NULL, NULL);
}
