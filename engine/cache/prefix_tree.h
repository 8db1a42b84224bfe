/* The prefix tree: which full blocks of tokens already have their keys and values in the pool.
 *
 * A node is a full block. Its key is a 128-bit hash chain: SHA-256 (truncated) of the parent's key and the
 * block's tokens; the root key is made of the model digest and the request's salt. A hit is confirmed by
 * the exact tokens, the parent node and the salt, so a colliding key can never show one client another's
 * cache. The node of a block is stored under the block's number: the tree never allocates.
 *
 * Whoever refers to a node refers to all its ancestors, and releases the last block first. So a parent is
 * never older in the pool's LRU order than its children, and evicting the oldest block always removes a leaf.
 *
 * One thread (the engine thread), apart from the two pure key functions. */
#ifndef TM_ENGINE_CACHE_PREFIX_TREE_H
#define TM_ENGINE_CACHE_PREFIX_TREE_H

#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"
#include "engine/cache/block_pool.h"

#define TM_BLOCK_TOKENS_MAX 1024

typedef struct tm_prefix_key {
    uint64_t w[2];
} tm_prefix_key;

typedef struct tm_prefix_tree tm_prefix_tree;

/* Key of the empty prefix. digest: the model's, any text. */
void tm_prefix_key_root(tm_prefix_key *out, const char *digest, uint64_t salt, int block_tokens);
/* Key of a block of n <= TM_BLOCK_TOKENS_MAX tokens below parent. */
void tm_prefix_key_extend(tm_prefix_key *out, const tm_prefix_key *parent, const int32_t *tokens,
                          int n);
static inline bool tm_prefix_key_equal(const tm_prefix_key *a, const tm_prefix_key *b)
{
    return a->w[0] == b->w[0] && a->w[1] == b->w[1];
}

/* The pool stays the caller's and outlives the tree. */
tm_status tm_prefix_tree_create(tm_prefix_tree **out, tm_block_pool *pool, int block_tokens,
                                tm_err *err);
void tm_prefix_tree_destroy(tm_prefix_tree *t);

/* A node's place and contents. parent is a block in the tree, or -1 for the first block of a prompt. */
typedef struct tm_prefix_node {
    int32_t parent;
    uint64_t salt;
    const tm_prefix_key *key;
    const int32_t *tokens; /* block_tokens of them */
} tm_prefix_node;

/* The block that holds this node, or -1. Takes no reference. */
int32_t tm_prefix_tree_find(const tm_prefix_tree *t, const tm_prefix_node *node);
/* Publishes a computed block, which the caller refers to. Returns the block that holds the node from now on:
 * `block`, or an earlier one with the same contents (the caller then changes over to it). */
int32_t tm_prefix_tree_insert(tm_prefix_tree *t, const tm_prefix_node *node, int32_t block);

/* A block with one reference and no contents: a free one, else the oldest reusable leaf, else -1. */
int32_t tm_prefix_tree_take(tm_prefix_tree *t);
/* One reference less; a block in the tree stays reusable. */
void tm_prefix_tree_release(tm_prefix_tree *t, int32_t block);
bool tm_prefix_tree_contains(const tm_prefix_tree *t, int32_t block);
/* Blocks in the tree, used or reusable. */
int tm_prefix_tree_count(const tm_prefix_tree *t);

#endif
