/* Block pool and prefix tree: states of a block, exactness of a hit, and eviction under random use. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "common/check.h"
#include "engine/cache/block_pool.h"
#include "engine/cache/prefix_tree.h"
#include "tests/engine/rng.h"

#define BT 4 /* tokens of a block in these tests */

static void test_pool_states(void **state)
{
    (void)state;
    tm_block_pool *p;
    assert_int_equal(tm_block_pool_create(&p, 0, NULL), TM_STATUS_INVALID);
    assert_int_equal(tm_block_pool_create(&p, 3, NULL), TM_OK);
    int32_t a = tm_block_pool_take(p), b = tm_block_pool_take(p), c = tm_block_pool_take(p);
    assert_int_equal(tm_block_pool_take(p), -1);
    assert_true(a != b && b != c && a != c);
    tm_block_pool_acquire(p, a);
    tm_block_pool_release(p, a, true);
    assert_int_equal(tm_block_pool_refs(p, a), 1);
    tm_block_pool_release(p, a, true);
    tm_block_pool_release(p, b, true);
    assert_int_equal(tm_block_pool_reusable(p), 2);
    assert_int_equal(tm_block_pool_take(p), -1); /* reusable is not free */
    assert_int_equal(tm_block_pool_oldest(p), a);
    tm_block_pool_acquire(p, a); /* used again: leaves the order */
    assert_int_equal(tm_block_pool_oldest(p), b);
    tm_block_pool_release(p, a, true);
    assert_int_equal(tm_block_pool_oldest(p), b);
    tm_block_pool_reclaim(p, b);
    assert_int_equal(tm_block_pool_take(p), b);
    tm_block_pool_release(p, c, false);
    assert_int_equal(tm_block_pool_free(p), 1);
    tm_block_pool_destroy(p);
}

static void test_keys(void **state)
{
    (void)state;
    int32_t t[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    tm_prefix_key root, other, a, b;
    tm_prefix_key_root(&root, "digest", 0, BT);
    tm_prefix_key_root(&other, "digest", 1, BT);
    assert_false(tm_prefix_key_equal(&root, &other));
    tm_prefix_key_root(&other, "digesu", 0, BT);
    assert_false(tm_prefix_key_equal(&root, &other));
    tm_prefix_key_root(&other, "digest", 0, 2 * BT);
    assert_false(tm_prefix_key_equal(&root, &other));
    tm_prefix_key_extend(&a, &root, t, BT);
    tm_prefix_key_extend(&b, &other, t, BT);
    assert_false(tm_prefix_key_equal(&a, &b));
    tm_prefix_key_extend(&b, &root, t, BT);
    assert_true(tm_prefix_key_equal(&a, &b));
    tm_prefix_key_extend(&b, &root, t, BT + 1);
    assert_false(tm_prefix_key_equal(&a, &b));
}

/* A hit needs key, tokens, parent and salt: a collision of the key alone must not be one. */
static void test_exact(void **state)
{
    (void)state;
    tm_block_pool *p;
    tm_prefix_tree *t;
    assert_int_equal(tm_block_pool_create(&p, 4, NULL), TM_OK);
    assert_int_equal(tm_prefix_tree_create(&t, p, BT, NULL), TM_OK);
    tm_prefix_key key = {{7, 7}};
    int32_t one[BT] = {1, 2, 3, 4}, two[BT] = {1, 2, 3, 5};
    int32_t a = tm_prefix_tree_take(t), b = tm_prefix_tree_take(t), c = tm_prefix_tree_take(t);
    tm_prefix_node n1 = {-1, 0, &key, one}, n2 = {-1, 0, &key, two}, n3 = {-1, 1, &key, one};
    assert_int_equal(tm_prefix_tree_insert(t, &n1, a), a);
    assert_int_equal(tm_prefix_tree_find(t, &n1), a);
    assert_int_equal(tm_prefix_tree_find(t, &n2), -1);
    assert_int_equal(tm_prefix_tree_find(t, &n3), -1);
    assert_int_equal(tm_prefix_tree_insert(t, &n2, b), b);
    assert_int_equal(tm_prefix_tree_insert(t, &n1, c), a); /* the first one stays */
    tm_prefix_node below = {a, 0, &key, one};
    assert_int_equal(tm_prefix_tree_find(t, &below), -1);
    assert_int_equal(tm_prefix_tree_insert(t, &below, c), c);
    assert_int_equal(tm_prefix_tree_count(t), 3);

    /* c is the leaf of a: released first, evicted first, although the pool is out of free blocks. */
    tm_prefix_tree_release(t, c);
    tm_prefix_tree_release(t, a);
    int32_t d = tm_prefix_tree_take(t), e = tm_prefix_tree_take(t);
    assert_int_not_equal(d, -1);
    assert_int_equal(e, c);
    assert_int_equal(tm_prefix_tree_find(t, &below), -1);
    assert_int_equal(tm_prefix_tree_find(t, &n1), a);
    assert_int_equal(tm_prefix_tree_take(t), a);
    assert_int_equal(tm_prefix_tree_take(t), -1);
    assert_int_equal(tm_prefix_tree_count(t), 1);
    tm_prefix_tree_destroy(t);
    tm_block_pool_destroy(p);
}

/* Chains over a tiny alphabet are taken, published and released in random order; a hit must always be the
 * very tokens, and in the end every block is free or reusable. */
#define CHAIN 6
typedef struct holder {
    int32_t tokens[CHAIN * BT];
    int32_t blocks[CHAIN];
    int n;
} holder;

static void acquire_chain(tm_block_pool *p, tm_prefix_tree *t, rng *r, holder *h,
                          int32_t contents[][BT])
{
    tm_prefix_key parent, key;
    tm_prefix_key_root(&parent, "m", 0, BT);
    for (int i = 0; i < CHAIN * BT; i++)
        h->tokens[i] = rng_below(r, 8) == 0;
    h->n = 0;
    int want = rng_between(r, 1, CHAIN);
    for (bool hit = true; h->n < want; h->n++) {
        const int32_t *tokens = h->tokens + h->n * BT;
        tm_prefix_key_extend(&key, &parent, tokens, BT);
        tm_prefix_node node = {h->n ? h->blocks[h->n - 1] : -1, 0, &key, tokens};
        int32_t b = hit ? tm_prefix_tree_find(t, &node) : -1;
        if (b >= 0) {
            assert_memory_equal(contents[b], tokens, sizeof(contents[b]));
            tm_block_pool_acquire(p, b);
        } else {
            hit = false;
            b = tm_prefix_tree_take(t);
            if (b < 0)
                return;
            memcpy(contents[b], tokens, sizeof(contents[b]));
            assert_int_equal(tm_prefix_tree_insert(t, &node, b), b);
        }
        h->blocks[h->n] = b;
        parent = key;
    }
}

static void test_random_chains(void **state)
{
    (void)state;
    enum { BLOCKS = 24, HOLDERS = 5 };
    rng r = {rng_seed("random_chains", 11)};
    int32_t contents[BLOCKS][BT];
    holder h[HOLDERS] = {0};
    tm_block_pool *p;
    tm_prefix_tree *t;
    assert_int_equal(tm_block_pool_create(&p, BLOCKS, NULL), TM_OK);
    assert_int_equal(tm_prefix_tree_create(&t, p, BT, NULL), TM_OK);
    for (int i = 0; i < 50000; i++) {
        holder *x = &h[rng_below(&r, HOLDERS)];
        if (x->n)
            while (x->n)
                tm_prefix_tree_release(t, x->blocks[--x->n]);
        else
            acquire_chain(p, t, &r, x, contents);
        int used = 0;
        for (int b = 0; b < BLOCKS; b++)
            used += tm_block_pool_refs(p, b) > 0;
        assert_int_equal(used + tm_block_pool_free(p) + tm_block_pool_reusable(p), BLOCKS);
    }
    for (int i = 0; i < HOLDERS; i++)
        while (h[i].n)
            tm_prefix_tree_release(t, h[i].blocks[--h[i].n]);
    assert_int_equal(tm_block_pool_free(p) + tm_block_pool_reusable(p), BLOCKS);
    assert_int_equal(tm_prefix_tree_count(t), tm_block_pool_reusable(p));
    tm_prefix_tree_destroy(t);
    tm_block_pool_destroy(p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pool_states),
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_exact),
        cmocka_unit_test(test_random_chains),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
