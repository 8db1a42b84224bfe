/* Reference counts, a free stack and an intrusive LRU list over block numbers.
 *
 * Blocks are array elements and links are indices: no allocation after creation, and a walk over the
 * whole pool in a test is one loop. The free list is a stack, so that a lightly used server keeps writing
 * the same, cache-warm and already mapped, memory. */
#include "engine/cache/block_pool.h"

#include <stdlib.h>

#include "common/check.h"

typedef struct block {
    int32_t refs;
    int32_t prev, next; /* LRU neighbours when reusable; next = free stack when free */
    bool reusable;
} block;

struct tm_block_pool {
    block *blocks;
    int total, free_count, reusable_count;
    int32_t free_top;
    int32_t lru_oldest, lru_newest;
};

tm_status tm_block_pool_create(tm_block_pool **out, int n_blocks, tm_err *err)
{
    if (n_blocks < 1)
        return TM_FAIL(err, TM_STATUS_INVALID, "a KV pool of %d blocks; at least 1 is needed",
                       n_blocks);
    tm_block_pool *p = calloc(1, sizeof(*p));
    block *blocks = calloc((size_t)n_blocks, sizeof(*blocks));
    if (!p || !blocks) {
        free(p);
        free(blocks);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for %d KV block records", n_blocks);
    }
    for (int32_t i = 0; i < n_blocks; i++)
        blocks[i].next = i + 1 < n_blocks ? i + 1 : -1;
    p->blocks = blocks;
    p->total = p->free_count = n_blocks;
    p->lru_oldest = p->lru_newest = -1;
    *out = p;
    return TM_OK;
}

void tm_block_pool_destroy(tm_block_pool *p)
{
    if (!p)
        return;
    free(p->blocks);
    free(p);
}

static block *get(const tm_block_pool *p, int32_t id)
{
    TM_ASSERT(id >= 0 && id < p->total);
    return &p->blocks[id];
}

static void lru_append(tm_block_pool *p, int32_t id)
{
    block *b = &p->blocks[id];
    b->prev = p->lru_newest;
    b->next = -1;
    b->reusable = true;
    if (p->lru_newest >= 0)
        p->blocks[p->lru_newest].next = id;
    else
        p->lru_oldest = id;
    p->lru_newest = id;
    p->reusable_count++;
}

static void lru_remove(tm_block_pool *p, int32_t id)
{
    block *b = &p->blocks[id];
    if (b->prev >= 0)
        p->blocks[b->prev].next = b->next;
    else
        p->lru_oldest = b->next;
    if (b->next >= 0)
        p->blocks[b->next].prev = b->prev;
    else
        p->lru_newest = b->prev;
    b->reusable = false;
    p->reusable_count--;
}

static void free_push(tm_block_pool *p, int32_t id)
{
    p->blocks[id].next = p->free_top;
    p->free_top = id;
    p->free_count++;
}

int32_t tm_block_pool_take(tm_block_pool *p)
{
    if (p->free_count == 0)
        return -1;
    int32_t id = p->free_top;
    p->free_top = p->blocks[id].next;
    p->free_count--;
    p->blocks[id].refs = 1;
    return id;
}

void tm_block_pool_acquire(tm_block_pool *p, int32_t id)
{
    block *b = get(p, id);
    TM_ASSERT(b->refs > 0 || b->reusable);
    if (b->refs == 0)
        lru_remove(p, id);
    b->refs++;
}

void tm_block_pool_release(tm_block_pool *p, int32_t id, bool keep)
{
    block *b = get(p, id);
    TM_ASSERT(b->refs > 0);
    if (--b->refs > 0)
        return;
    if (keep)
        lru_append(p, id);
    else
        free_push(p, id);
}

int32_t tm_block_pool_oldest(const tm_block_pool *p)
{
    return p->lru_oldest;
}

void tm_block_pool_reclaim(tm_block_pool *p, int32_t id)
{
    TM_ASSERT(get(p, id)->reusable);
    lru_remove(p, id);
    free_push(p, id);
}

int tm_block_pool_refs(const tm_block_pool *p, int32_t id)
{
    return get(p, id)->refs;
}

int tm_block_pool_total(const tm_block_pool *p)
{
    return p->total;
}

int tm_block_pool_free(const tm_block_pool *p)
{
    return p->free_count;
}

int tm_block_pool_reusable(const tm_block_pool *p)
{
    return p->reusable_count;
}
