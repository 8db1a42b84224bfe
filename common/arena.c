/* The request arena: a list of blocks, each bump-allocated from its start.
 *
 * Requests below a quarter of the block size share a block; larger ones get their own block behind
 * the current one, so that a single big string does not waste the rest of the current block. */
#include "common/arena.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common/buf.h"
#include "common/check.h"

#define ARENA_ALIGN ((size_t)16)
#define ARENA_BLOCK ((size_t)4096 - 32)

typedef struct arena_block {
    struct arena_block *next;
    size_t used, cap;
    _Alignas(16) unsigned char data[];
} arena_block;

struct tm_arena {
    arena_block *head; /* the block that small requests are cut from */
    size_t used;       /* bytes handed out, after rounding */
    size_t max;
};

tm_arena *tm_arena_create(size_t max_bytes)
{
    tm_arena *a = calloc(1, sizeof *a);
    if (a)
        a->max = max_bytes ? max_bytes : PTRDIFF_MAX;
    return a;
}

void tm_arena_destroy(tm_arena *a)
{
    if (!a)
        return;
    for (arena_block *b = a->head; b;) {
        arena_block *next = b->next;
        free(b);
        b = next;
    }
    free(a);
}

static arena_block *new_block(size_t cap)
{
    size_t total;
    if (!tm_size_add(sizeof(arena_block), cap, &total))
        return NULL;
    arena_block *b = calloc(1, total);
    if (b)
        b->cap = cap;
    return b;
}

void *tm_arena_alloc(tm_arena *a, size_t size)
{
    size_t want;
    if (!tm_size_add(size ? size : 1, ARENA_ALIGN - 1, &want))
        return NULL;
    want &= ~(ARENA_ALIGN - 1);
    if (want > a->max - a->used)
        return NULL;
    arena_block *b = a->head;
    if (!b || want > b->cap - b->used) {
        bool own = want > ARENA_BLOCK / 4;
        b = new_block(own ? want : ARENA_BLOCK);
        if (!b)
            return NULL;
        if (own && a->head) {
            b->next = a->head->next;
            a->head->next = b;
        } else {
            b->next = a->head;
            a->head = b;
        }
    }
    void *p = b->data + b->used;
    b->used += want;
    a->used += want;
    return p;
}

void *tm_arena_memdup(tm_arena *a, const void *data, size_t size)
{
    void *p = tm_arena_alloc(a, size);
    if (p && size)
        memcpy(p, data, size);
    return p;
}

char *tm_arena_strndup(tm_arena *a, const char *s, size_t len)
{
    size_t size;
    if (!tm_size_add(len, 1, &size))
        return NULL;
    char *p = tm_arena_alloc(a, size);
    if (p && len)
        memcpy(p, s, len); /* the arena's memory is zeroed: the NUL is there */
    return p;
}

size_t tm_arena_used(const tm_arena *a)
{
    return a->used;
}
