/* Open addressing with linear probing; the list grows by doubling, and the slots stay at most half full. */
#include "engine/sample/seen.h"

#include <stdlib.h>

void tm_seen_init(tm_seen *s)
{
    *s = (tm_seen){0};
}

void tm_seen_deinit(tm_seen *s)
{
    free(s->list);
    free(s->slots);
    *s = (tm_seen){0};
}

/* The slot of a token, or the empty one where it belongs. */
static uint32_t find_slot(const tm_seen *s, const int32_t *slots, uint32_t mask, int32_t token)
{
    uint32_t i = (uint32_t)token * 0x9E3779B1u;
    i ^= i >> 15;
    for (i &= mask; slots[i]; i = (i + 1) & mask)
        if (s->list[slots[i] - 1].token == token)
            break;
    return i;
}

static tm_status grow(tm_seen *s)
{
    int cap = s->cap ? 2 * s->cap : 64;
    uint32_t mask = 2 * (uint32_t)cap - 1;
    tm_seen_token *list = realloc(s->list, (size_t)cap * sizeof(*list));
    if (!list)
        return TM_STATUS_NO_MEMORY;
    s->list = list;
    int32_t *slots = calloc((size_t)mask + 1, sizeof(*slots));
    if (!slots)
        return TM_STATUS_NO_MEMORY;
    for (int i = 0; i < s->count; i++)
        slots[find_slot(s, slots, mask, list[i].token)] = i + 1;
    free(s->slots);
    s->slots = slots;
    s->mask = mask;
    s->cap = cap;
    return TM_OK;
}

tm_status tm_seen_add(tm_seen *s, int32_t token, bool generated)
{
    uint32_t slot = s->slots ? find_slot(s, s->slots, s->mask, token) : 0;
    if (!s->slots || !s->slots[slot]) {
        if (s->count == s->cap) {
            tm_status st = grow(s);
            if (st != TM_OK)
                return st;
            slot = find_slot(s, s->slots, s->mask, token);
        }
        s->list[s->count] = (tm_seen_token){token, 0};
        s->slots[slot] = ++s->count;
    }
    s->list[s->slots[slot] - 1].generated += generated;
    return TM_OK;
}
