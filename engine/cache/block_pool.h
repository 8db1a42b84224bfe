/* The KV blocks of this group as numbers 0..n-1: who refers to them, which are free, which could be reused.
 *
 * A block is in one of three states:
 *   used      at least one reference; its contents must not change hands
 *   reusable  no reference, but the prefix tree still knows its contents; in LRU order
 *   free      no reference, no contents
 * Every operation is O(1). All memory is taken at creation. One thread (the engine thread). */
#ifndef TM_ENGINE_CACHE_BLOCK_POOL_H
#define TM_ENGINE_CACHE_BLOCK_POOL_H

#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"

typedef struct tm_block_pool tm_block_pool;

tm_status tm_block_pool_create(tm_block_pool **out, int n_blocks, tm_err *err);
void tm_block_pool_destroy(tm_block_pool *p);

/* A free block with one reference, or -1. Reusable blocks are not touched. */
int32_t tm_block_pool_take(tm_block_pool *p);
/* One more reference to a used or reusable block. */
void tm_block_pool_acquire(tm_block_pool *p, int32_t id);
/* One reference less. At zero the block becomes reusable (keep) or free. Holders of a chain release its
 * last block first: so children stand before their parents in the LRU order. */
void tm_block_pool_release(tm_block_pool *p, int32_t id, bool keep);
/* The reusable block that was released longest ago, or -1. */
int32_t tm_block_pool_oldest(const tm_block_pool *p);
/* A reusable block becomes free. */
void tm_block_pool_reclaim(tm_block_pool *p, int32_t id);

int tm_block_pool_refs(const tm_block_pool *p, int32_t id);
int tm_block_pool_total(const tm_block_pool *p);
int tm_block_pool_free(const tm_block_pool *p);
int tm_block_pool_reusable(const tm_block_pool *p);

#endif
