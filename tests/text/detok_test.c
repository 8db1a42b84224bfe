/* The detokeniser against whole decoding: random tokens, random stop strings, a stream taken over in the
 * middle. The stop oracle is a plain search over the whole text. */
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
#include "common/json.h"
#include "text/detok.h"

#define ROUNDS 3000

static tm_tokenizer *g_tok;
static uint64_t g_seed;

static uint32_t rnd(uint32_t n)
{
    g_seed = g_seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(g_seed >> 33) % n;
}

/* Half of the tokens are single bytes, so that characters break in every way. */
static int32_t random_id(void)
{
    return rnd(2) ? (int32_t)rnd((uint32_t)tm_tokenizer_vocab(g_tok)) : (int32_t)(3 + rnd(256));
}

typedef struct run {
    tm_buf text;
    bool stopped;
    int used, matched;
} run;

/* Pushes ids[0..n); checks at every step that the text is whole UTF-8. */
static run push_all(const int32_t *ids, int n, const tm_detok_opts *opts)
{
    run r = {0};
    tm_detok *d = NULL;
    tm_buf_init(&r.text, 0);
    assert_int_equal(tm_detok_create(&d, g_tok, opts, NULL), TM_OK);
    for (r.used = 0; r.used < n && !r.stopped; r.used++) {
        r.stopped = tm_detok_push(d, ids[r.used], &r.text);
        assert_true(tm_utf8_valid(r.text.data ? r.text.data : "", r.text.len));
    }
    if (!r.stopped)
        tm_detok_finish(d, &r.text);
    r.matched = tm_detok_matched(d);
    /* Nothing comes after a stop. */
    size_t len = r.text.len;
    if (r.matched >= 0) {
        assert_true(tm_detok_push(d, 70, &r.text));
        tm_detok_finish(d, &r.text);
        assert_int_equal(r.text.len, len);
    }
    tm_detok_destroy(d);
    return r;
}

static void test_equals_whole_decode(void **state)
{
    (void)state;
    for (int round = 0; round < ROUNDS; round++) {
        int32_t ids[24];
        int n = (int)rnd(24);
        bool skip = rnd(2);
        for (int i = 0; i < n; i++)
            ids[i] = random_id();
        char *want;
        size_t len;
        assert_int_equal(tm_tokenizer_decode(g_tok, ids, (size_t)n, skip, &want, &len, NULL),
                         TM_OK);
        run r = push_all(ids, n, &(tm_detok_opts){.skip_special = skip});
        assert_int_equal(r.text.len, len);
        assert_int_equal(r.matched, -1);
        if (len)
            assert_memory_equal(r.text.data, want, len);
        tm_buf_deinit(&r.text);
        free(want);
    }
}

/* The first byte at which some stop string is complete; of several the longest. */
static size_t find_stop(const char *text, size_t len, const char *const *stops, int n, int *which)
{
    for (size_t end = 1; end <= len; end++) {
        *which = -1;
        for (int i = 0; i < n; i++) {
            size_t k = strlen(stops[i]);
            if (k <= end && memcmp(text + end - k, stops[i], k) == 0 &&
                (*which < 0 || k > strlen(stops[*which])))
                *which = i;
        }
        if (*which >= 0)
            return end - strlen(stops[*which]);
    }
    *which = -1;
    return len;
}

static void test_stops_against_search(void **state)
{
    (void)state;
    /* A tiny alphabet makes overlaps and near misses common. */
    static const char *const words[] = {"a", "b", "ab", "ba", "aa", "\xC3\xA9", " a", "\n"};
    int hits = 0;
    for (int round = 0; round < ROUNDS; round++) {
        char stop_text[4][8];
        const char *stops[4];
        int count = 1 + (int)rnd(4), n = (int)rnd(30);
        for (int i = 0; i < count; i++) {
            size_t k = 0;
            for (int c = 1 + (int)rnd(5); c > 0; c--)
                stop_text[i][k++] = (char)('a' + rnd(2));
            stop_text[i][k] = 0;
            stops[i] = stop_text[i];
        }
        int32_t ids[30];
        for (int i = 0; i < n; i++) {
            const char *w = words[rnd(TM_ARRAY_LEN(words))];
            ids[i] = tm_tokenizer_id(g_tok, w, strlen(w));
            if (ids[i] < 0)
                ids[i] = tm_tokenizer_id(g_tok, "a", 1);
        }
        char *all;
        size_t len;
        int which;
        assert_int_equal(tm_tokenizer_decode(g_tok, ids, (size_t)n, true, &all, &len, NULL), TM_OK);
        size_t cut = find_stop(all, len, stops, count, &which);
        tm_detok_opts opts = {
            .skip_special = true, .stops = stops, .stop_count = count, .include_stop = rnd(2)};
        if (which >= 0 && opts.include_stop)
            cut += strlen(stops[which]);
        run r = push_all(ids, n, &opts);
        assert_int_equal(r.matched >= 0, which >= 0);
        if (which >= 0)
            assert_string_equal(stops[r.matched], stops[which]);
        assert_int_equal(r.text.len, cut);
        if (cut)
            assert_memory_equal(r.text.data, all, cut);
        hits += which >= 0;
        tm_buf_deinit(&r.text);
        free(all);
    }
    assert_true(hits > ROUNDS / 4 && hits < ROUNDS);
}

/* A stream that moves to another place: pushing the tokens so far again gives the same state, so what comes
 * after is the same, whatever was sent before. */
static void test_replay(void **state)
{
    (void)state;
    static const char *const stops[] = {"the end", "e e", "\xC3\xA9t"};
    tm_detok_opts opts = {.skip_special = true, .stops = stops, .stop_count = 3};
    for (int round = 0; round < ROUNDS / 10; round++) {
        int32_t ids[20];
        for (int i = 0; i < 20; i++)
            ids[i] = random_id();
        run live = push_all(ids, 20, &opts);
        for (int at = 0; at <= live.used; at++) {
            tm_detok *a = NULL, *b = NULL;
            tm_buf before, after;
            tm_buf_init(&before, 0);
            tm_buf_init(&after, 0);
            assert_int_equal(tm_detok_create(&a, g_tok, &opts, NULL), TM_OK);
            assert_int_equal(tm_detok_create(&b, g_tok, &opts, NULL), TM_OK);
            tm_buf dropped;
            tm_buf_init(&dropped, 0);
            for (int i = 0; i < at; i++) {
                tm_detok_push(a, ids[i], &before);
                tm_detok_push(b, ids[i], &dropped);
            }
            bool stop = tm_detok_matched(b) >= 0;
            for (int i = at; i < 20 && !stop; i++)
                stop = tm_detok_push(b, ids[i], &after);
            tm_detok_finish(b, &after);
            assert_int_equal(before.len + after.len, live.text.len);
            if (before.len)
                assert_memory_equal(before.data, live.text.data, before.len);
            if (after.len)
                assert_memory_equal(after.data, live.text.data + before.len, after.len);
            tm_buf_deinit(&before);
            tm_buf_deinit(&after);
            tm_buf_deinit(&dropped);
            tm_detok_destroy(a);
            tm_detok_destroy(b);
        }
        tm_buf_deinit(&live.text);
    }
}

static void test_bounds(void **state)
{
    (void)state;
    char longest[258];
    const char *stops[TM_DETOK_STOPS_MAX + 1];
    tm_detok *d = NULL;
    memset(longest, 'x', sizeof(longest));
    longest[256] = 0;
    for (int i = 0; i <= TM_DETOK_STOPS_MAX; i++)
        stops[i] = longest;
    tm_detok_opts opts = {.stops = stops, .stop_count = TM_DETOK_STOPS_MAX + 1};
    assert_int_equal(tm_detok_create(&d, g_tok, &opts, NULL), TM_STATUS_INVALID);
    opts.stop_count = TM_DETOK_STOPS_MAX;
    assert_int_equal(tm_detok_create(&d, g_tok, &opts, NULL), TM_OK);
    int32_t x = tm_tokenizer_id(g_tok, "x", 1);
    tm_buf text;
    tm_buf_init(&text, 0);
    for (int i = 0; i < 255; i++)
        assert_false(tm_detok_push(d, x, &text));
    assert_int_equal(text.len, 0);
    assert_true(tm_detok_push(d, x, &text));
    assert_int_equal(text.len, 0);
    tm_detok_destroy(d);
    d = NULL;
    stops[0] = "";
    assert_int_equal(tm_detok_create(&d, g_tok, &opts, NULL), TM_STATUS_INVALID);
    longest[256] = 'x';
    longest[257] = 0;
    stops[0] = longest;
    assert_int_equal(tm_detok_create(&d, g_tok, &opts, NULL), TM_STATUS_INVALID);
    assert_null(d);
    tm_buf_deinit(&text);
}

/* Marks that are special tokens are text where somebody reads them, the others are still skipped. */
static void test_kept_tokens(void **state)
{
    (void)state;
    int32_t start = tm_tokenizer_id(g_tok, "<|im_start|>", 12);
    int32_t end = tm_tokenizer_id(g_tok, "<|im_end|>", 10), x = tm_tokenizer_id(g_tok, "x", 1);
    int32_t keep[TM_DETOK_KEEP_MAX + 1] = {start}, ids[] = {x, start, end, x};
    tm_detok_opts opts = {.skip_special = true, .keep = keep, .keep_count = 1};
    tm_detok *d = NULL;
    run r = push_all(ids, 4, &opts);
    assert_string_equal(r.text.data, "x<|im_start|>x");
    tm_buf_deinit(&r.text);
    opts.keep_count = TM_DETOK_KEEP_MAX + 1;
    assert_int_equal(tm_detok_create(&d, g_tok, &opts, NULL), TM_STATUS_INVALID);
    assert_null(d);
}

/* Where the text goes on after a prompt, the space that a tokenizer drops from the first word stays. */
static void test_continues(void **state)
{
    (void)state;
    static const char file[] =
        "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"\u2581a\":0,\"b\":1},\"merges\":[]},"
        "\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":"
        "{\"String\":\"\u2581\"},\"content\":\" \"},{\"type\":\"Fuse\"},{\"type\":\"Strip\","
        "\"content\":\" \",\"start\":1,\"stop\":0}]}}";
    const tm_text_file files[] = {{"tokenizer.json", file, sizeof(file) - 1}};
    const int32_t ids[] = {0, 1, 0};
    tm_tokenizer *all = g_tok, *t;
    tm_err err = TM_ERR_INIT;
    if (tm_tokenizer_create(&t, files, 1, &err) != TM_OK)
        fail_msg("%s", err.msg);
    g_tok = t;
    run first = push_all(ids, 3, &(tm_detok_opts){.skip_special = true});
    run later = push_all(ids, 3, &(tm_detok_opts){.skip_special = true, .continues = true});
    g_tok = all;
    assert_string_equal(first.text.data, "ab a");
    assert_string_equal(later.text.data, " ab a");
    tm_buf_deinit(&first.text);
    tm_buf_deinit(&later.text);
    tm_tokenizer_destroy(t);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_equals_whole_decode),
        cmocka_unit_test(test_stops_against_search),
        cmocka_unit_test(test_replay),
        cmocka_unit_test(test_bounds),
        cmocka_unit_test(test_kept_tokens),
        cmocka_unit_test(test_continues),
    };
    g_seed = argc > 1 ? strtoull(argv[1], NULL, 10) : (uint64_t)time(NULL);
    printf("seed %llu (repeat with: detok_test %llu)\n", (unsigned long long)g_seed,
           (unsigned long long)g_seed);
    tm_err err = TM_ERR_INIT;
    if (tm_tokenizer_load(&g_tok, "models/demo-20m", &err) != TM_OK) {
        fprintf(stderr, "%s\n", err.msg);
        return 1;
    }
    int rc = cmocka_run_group_tests_name("detok", tests, NULL, NULL);
    tm_tokenizer_destroy(g_tok);
    return rc;
}
