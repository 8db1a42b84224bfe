/* The merger of long rows against the definition: look for the pair with the lowest rank, leftmost first, merge
 * it, and begin again. Random rules over few symbols, with equal ranks and ranks in no sensible order, make
 * merges run across the seams of chunks all the time. TM_SEED repeats a run. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

#include "text/tok/bpe_rules.h"

static uint64_t g_state;

static uint32_t random_below(uint32_t n)
{
    g_state = g_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)((g_state >> 33) % n);
}

static size_t merge_plainly(const tm_bpe *b, int32_t *v, size_t n)
{
    for (;;) {
        size_t best = n;
        uint32_t rank = TM_BPE_NO_RANK;
        int32_t id, best_id = -1;
        for (size_t i = 0; i + 1 < n; i++) {
            uint32_t r = tm_bpe_rank(b, v[i], v[i + 1], &id);
            if (r < rank) {
                rank = r;
                best = i;
                best_id = id;
            }
        }
        if (best == n)
            return n;
        v[best] = best_id;
        memmove(v + best + 1, v + best + 2, (n - best - 2) * sizeof(*v));
        n--;
    }
}

/* Rules among `ids` symbols; sensible: a rule makes a new symbol and is ranked behind those of its parts. */
static void make_rules(tm_bpe *b, const tm_vocab *v, int letters, int rules, bool sensible)
{
    tm_bpe_init(b, v);
    assert_int_equal(tm_bpe_reserve(b, (size_t)rules, NULL), TM_OK);
    int32_t ids = letters;
    for (int i = 0; i < rules; i++) {
        int32_t l = (int32_t)random_below((uint32_t)ids), r = (int32_t)random_below((uint32_t)ids);
        if (sensible)
            tm_bpe_add(b, l, r, (uint32_t)i, ids++);
        else
            tm_bpe_add(b, l, r, random_below(8), (int32_t)random_below((uint32_t)letters * 3));
        if (!sensible)
            ids = letters * 3;
    }
}

static void check_row(const tm_bpe *b, int letters, size_t n)
{
    int32_t *row = malloc((n + 1) * sizeof(*row)), *want = malloc((n + 1) * sizeof(*row));
    uint32_t run = random_below(40) == 0; /* sometimes one symbol throughout */
    for (size_t i = 0; i < n; i++) {
        row[i] = run ? 0 : (int32_t)random_below((uint32_t)letters);
        if (random_below(2000) == 0)
            row[i] = -1;
    }
    memcpy(want, row, n * sizeof(*row));
    size_t want_n = merge_plainly(b, want, n);
    tm_ids got = {0};
    tm_bpe_merge_long(b, row, n, &got);
    assert_false(got.failed);
    assert_int_equal(got.n, want_n);
    assert_memory_equal(got.v, want, want_n * sizeof(*want));
    tm_ids_deinit(&got);
    free(row);
    free(want);
}

static void test_random_rules(void **state)
{
    (void)state;
    tm_vocab v;
    tm_vocab_init(&v);
    for (int round = 0; round < 150; round++) {
        tm_bpe b;
        int letters = 1 + (int)random_below(4);
        make_rules(&b, &v, letters, 1 + (int)random_below(60), round % 3 != 0);
        for (int i = 0; i < 3; i++)
            check_row(&b, letters, 1 + random_below(2600));
        tm_bpe_deinit(&b);
    }
    tm_vocab_deinit(&v);
}

/* A chain of merges that only the end of the row decides: the windows grow to their bound. */
static void test_far_reaching(void **state)
{
    (void)state;
    enum { N = 20000 };
    tm_vocab v;
    tm_bpe b;
    tm_vocab_init(&v);
    tm_bpe_init(&b, &v);
    assert_int_equal(tm_bpe_reserve(&b, 8, NULL), TM_OK);
    /* 0 1 -> 1 eats a row of zeros from its end; nothing else merges. */
    tm_bpe_add(&b, 0, 1, 5, 1);
    int32_t *row = calloc(N, sizeof(*row));
    row[N - 1] = 1;
    tm_ids got = {0};
    tm_bpe_merge_long(&b, row, N, &got);
    assert_int_equal(got.n, 1);
    assert_int_equal(got.v[0], 1);
    tm_ids_deinit(&got);
    free(row);
    tm_bpe_deinit(&b);
    tm_vocab_deinit(&v);
}

int main(void)
{
    const char *seed = getenv("TM_SEED");
    g_state = seed ? strtoull(seed, NULL, 10) : (uint64_t)time(NULL);
    printf("TM_SEED=%llu\n", (unsigned long long)g_state);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_rules),
        cmocka_unit_test(test_far_reaching),
    };
    return cmocka_run_group_tests_name("bpe", tests, NULL, NULL);
}
