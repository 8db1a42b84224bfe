/* A hash table of tree nodes, one possible node per block of the pool.
 *
 * A table keyed by the hash of the whole prefix needs no pointer from parent to child: walking down is one
 * look-up per block, and removing a leaf is unlinking it from its bucket. A radix tree over single
 * tokens would share partial blocks too, but the pool can only share full ones. */
#include "engine/cache/prefix_tree.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/hash.h"

typedef struct node {
    tm_prefix_key key;
    uint64_t salt;
    int32_t parent;
    int32_t children;
    int32_t chain; /* next node of the bucket, or -1 */
    bool present;
} node;

struct tm_prefix_tree {
    tm_block_pool *pool;
    node *nodes;      /* [total], by block */
    int32_t *tokens;  /* [total, block_tokens] */
    int32_t *buckets; /* [mask + 1], first node or -1 */
    uint64_t mask;
    int block_tokens, count;
};

void tm_prefix_key_root(tm_prefix_key *out, const char *digest, uint64_t salt, int block_tokens)
{
    struct {
        char magic[8];
        uint64_t salt;
        uint64_t block_tokens;
        char digest[64];
    } in = {"tmkvtree", salt, (uint64_t)block_tokens, {0}};
    memcpy(in.digest, digest, strnlen(digest, sizeof(in.digest)));
    uint8_t sha[32];
    tm_sha256(&in, sizeof(in), sha);
    memcpy(out, sha, sizeof(*out));
}

void tm_prefix_key_extend(tm_prefix_key *out, const tm_prefix_key *parent, const int32_t *tokens,
                          int n)
{
    struct {
        tm_prefix_key parent;
        int32_t tokens[TM_BLOCK_TOKENS_MAX];
    } in;
    TM_ASSERT(n >= 1 && n <= TM_BLOCK_TOKENS_MAX);
    in.parent = *parent;
    memcpy(in.tokens, tokens, (size_t)n * sizeof(*tokens));
    uint8_t sha[32];
    tm_sha256(&in, sizeof(in.parent) + (size_t)n * sizeof(*tokens), sha);
    memcpy(out, sha, sizeof(*out));
}

tm_status tm_prefix_tree_create(tm_prefix_tree **out, tm_block_pool *pool, int block_tokens,
                                tm_err *err)
{
    if (block_tokens < 1 || block_tokens > TM_BLOCK_TOKENS_MAX)
        return TM_FAIL(err, TM_STATUS_INVALID, "KV blocks of %d tokens; 1 to %d are possible",
                       block_tokens, TM_BLOCK_TOKENS_MAX);
    size_t total = (size_t)tm_block_pool_total(pool), buckets = 16;
    while (buckets < 2 * total)
        buckets *= 2;
    tm_prefix_tree *t = calloc(1, sizeof(*t));
    if (!t)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for the prefix tree");
    t->nodes = calloc(total, sizeof(*t->nodes));
    t->tokens = malloc(total * (size_t)block_tokens * sizeof(*t->tokens));
    t->buckets = malloc(buckets * sizeof(*t->buckets));
    if (!t->nodes || !t->tokens || !t->buckets) {
        tm_prefix_tree_destroy(t);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for a prefix tree of %zu blocks",
                       total);
    }
    memset(t->buckets, 0xff, buckets * sizeof(*t->buckets));
    t->mask = buckets - 1;
    t->pool = pool;
    t->block_tokens = block_tokens;
    *out = t;
    return TM_OK;
}

void tm_prefix_tree_destroy(tm_prefix_tree *t)
{
    if (!t)
        return;
    free(t->nodes);
    free(t->tokens);
    free(t->buckets);
    free(t);
}

static int32_t *tokens_of(const tm_prefix_tree *t, int32_t block)
{
    return t->tokens + (size_t)block * (size_t)t->block_tokens;
}

int32_t tm_prefix_tree_find(const tm_prefix_tree *t, const tm_prefix_node *want)
{
    size_t bytes = (size_t)t->block_tokens * sizeof(*want->tokens);
    for (int32_t b = t->buckets[want->key->w[0] & t->mask]; b >= 0; b = t->nodes[b].chain) {
        const node *n = &t->nodes[b];
        if (tm_prefix_key_equal(&n->key, want->key) && n->parent == want->parent &&
            n->salt == want->salt && memcmp(tokens_of(t, b), want->tokens, bytes) == 0)
            return b;
    }
    return -1;
}

int32_t tm_prefix_tree_insert(tm_prefix_tree *t, const tm_prefix_node *want, int32_t block)
{
    TM_ASSERT(tm_block_pool_refs(t->pool, block) > 0 && !t->nodes[block].present);
    TM_ASSERT(want->parent < 0 || t->nodes[want->parent].present);
    int32_t old = tm_prefix_tree_find(t, want);
    if (old >= 0)
        return old;
    int32_t *bucket = &t->buckets[want->key->w[0] & t->mask];
    t->nodes[block] = (node){.key = *want->key,
                             .salt = want->salt,
                             .parent = want->parent,
                             .chain = *bucket,
                             .present = true};
    memcpy(tokens_of(t, block), want->tokens, (size_t)t->block_tokens * sizeof(*want->tokens));
    *bucket = block;
    if (want->parent >= 0)
        t->nodes[want->parent].children++;
    t->count++;
    return block;
}

static void remove_leaf(tm_prefix_tree *t, int32_t block)
{
    node *n = &t->nodes[block];
    TM_ASSERT(n->present && n->children == 0);
    int32_t *link = &t->buckets[n->key.w[0] & t->mask];
    while (*link != block) {
        TM_ASSERT(*link >= 0);
        link = &t->nodes[*link].chain;
    }
    *link = n->chain;
    if (n->parent >= 0)
        t->nodes[n->parent].children--;
    n->present = false;
    t->count--;
}

int32_t tm_prefix_tree_take(tm_prefix_tree *t)
{
    int32_t id = tm_block_pool_take(t->pool);
    if (id >= 0)
        return id;
    int32_t oldest = tm_block_pool_oldest(t->pool);
    if (oldest < 0)
        return -1;
    remove_leaf(t, oldest);
    tm_block_pool_reclaim(t->pool, oldest);
    return tm_block_pool_take(t->pool);
}

void tm_prefix_tree_release(tm_prefix_tree *t, int32_t block)
{
    tm_block_pool_release(t->pool, block, t->nodes[block].present);
}

bool tm_prefix_tree_contains(const tm_prefix_tree *t, int32_t block)
{
    return t->nodes[block].present;
}

int tm_prefix_tree_count(const tm_prefix_tree *t)
{
    return t->count;
}
