/* Two growable arrays of the encoder. After a failed push `failed` stays set and later pushes are no-ops,
 * so a caller checks once at the end. */
#ifndef TM_TEXT_TOK_VEC_H
#define TM_TEXT_TOK_VEC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct tm_ids {
    int32_t *v;
    size_t n, cap;
    bool failed;
} tm_ids;

static inline bool tm_ids_push(tm_ids *a, int32_t id)
{
    if (a->n == a->cap) {
        size_t cap = a->cap ? a->cap * 2 : 64;
        int32_t *v = a->failed ? NULL : realloc(a->v, cap * sizeof(*v));
        if (!v) {
            a->failed = true;
            return false;
        }
        a->v = v;
        a->cap = cap;
    }
    a->v[a->n++] = id;
    return true;
}

static inline void tm_ids_deinit(tm_ids *a)
{
    free(a->v);
    *a = (tm_ids){0};
}

/* A range of the text at hand. Texts are below 2^31 bytes. */
typedef struct tm_range {
    uint32_t begin, end;
} tm_range;

typedef struct tm_ranges {
    tm_range *v;
    size_t n, cap;
    bool failed;
} tm_ranges;

/* Empty ranges are dropped: no pipeline stage keeps an empty piece. */
static inline void tm_ranges_push(tm_ranges *a, size_t begin, size_t end)
{
    if (begin >= end)
        return;
    if (a->n == a->cap) {
        size_t cap = a->cap ? a->cap * 2 : 64;
        tm_range *v = a->failed ? NULL : realloc(a->v, cap * sizeof(*v));
        if (!v) {
            a->failed = true;
            return;
        }
        a->v = v;
        a->cap = cap;
    }
    a->v[a->n++] = (tm_range){(uint32_t)begin, (uint32_t)end};
}

static inline void tm_ranges_deinit(tm_ranges *a)
{
    free(a->v);
    *a = (tm_ranges){0};
}

#endif
