/* Looking up merge rules; shared by the two mergers (bpe.c, bpe_long.c). */
#ifndef TM_TEXT_TOK_BPE_RULES_H
#define TM_TEXT_TOK_BPE_RULES_H

#include "text/tok/bpe.h"

#define TM_BPE_NO_RANK UINT32_MAX

static inline uint64_t tm_bpe_pair(int32_t left, int32_t right)
{
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

/* The rule's slot, or the free one where it would be. */
static inline tm_bpe_rule *tm_bpe_slot(const tm_bpe *b, uint64_t pair)
{
    uint64_t h = (pair ^ pair >> 31) * 0xD6E8FEB86659FD93u;
    for (uint32_t i = (uint32_t)(h >> 32) & b->mask;; i = (i + 1) & b->mask) {
        tm_bpe_rule *r = &b->rules[i];
        if (r->pair == pair || r->pair == UINT64_MAX)
            return r;
    }
}

/* The rank of merging two neighbours and what it gives; NO_RANK when there is no rule. Symbols without an
 * id (-1) never merge. */
static inline uint32_t tm_bpe_rank(const tm_bpe *b, int32_t left, int32_t right, int32_t *id)
{
    if ((left | right) < 0)
        return TM_BPE_NO_RANK;
    const tm_bpe_rule *r = tm_bpe_slot(b, tm_bpe_pair(left, right));
    if (r->pair == UINT64_MAX)
        return TM_BPE_NO_RANK;
    *id = r->id;
    return r->rank;
}

/* Merges any number of symbols; appends the ids that are left (-1 stays -1). */
void tm_bpe_merge_long(const tm_bpe *b, const int32_t *symbols, size_t n, tm_ids *out);

#endif
