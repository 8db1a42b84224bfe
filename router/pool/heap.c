/* A textbook binary heap; the only point is that every node keeps its index, so that a cancelled
 * generation leaves the queue in O(log n). */
#include "router/pool/heap.h"

#include <stdlib.h>

#include "common/check.h"

static bool before(const tm_heap_node *a, const tm_heap_node *b)
{
    return a->rank != b->rank ? a->rank > b->rank : a->arrival < b->arrival;
}

static void put(tm_heap *h, int i, tm_heap_node *n)
{
    h->items[i] = n;
    n->index = i;
}

static void sift_up(tm_heap *h, int i)
{
    tm_heap_node *n = h->items[i];
    while (i > 0 && before(n, h->items[(i - 1) / 2])) {
        put(h, i, h->items[(i - 1) / 2]);
        i = (i - 1) / 2;
    }
    put(h, i, n);
}

static void sift_down(tm_heap *h, int i)
{
    tm_heap_node *n = h->items[i];
    for (;;) {
        int child = 2 * i + 1;
        if (child >= h->count)
            break;
        if (child + 1 < h->count && before(h->items[child + 1], h->items[child]))
            child++;
        if (!before(h->items[child], n))
            break;
        put(h, i, h->items[child]);
        i = child;
    }
    put(h, i, n);
}

bool tm_heap_reserve(tm_heap *h, int count)
{
    if (count <= h->cap)
        return true;
    int cap = TM_MAX(64, TM_MAX(h->cap * 2, count));
    tm_heap_node **items = realloc(h->items, (size_t)cap * sizeof(*items));
    if (items == NULL)
        return false;
    h->items = items;
    h->cap = cap;
    return true;
}

void tm_heap_push(tm_heap *h, tm_heap_node *n)
{
    TM_ASSERT(h->count < h->cap);
    put(h, h->count++, n);
    sift_up(h, n->index);
}

void tm_heap_remove(tm_heap *h, tm_heap_node *n)
{
    int i = n->index;
    TM_ASSERT(i >= 0 && i < h->count && h->items[i] == n);
    tm_heap_node *last = h->items[--h->count];
    n->index = -1;
    if (last == n)
        return;
    put(h, i, last);
    sift_up(h, i);
    sift_down(h, last->index);
}

tm_heap_node *tm_heap_top(const tm_heap *h)
{
    return h->count > 0 ? h->items[0] : NULL;
}

void tm_heap_deinit(tm_heap *h)
{
    free(h->items);
    *h = (tm_heap){0};
}
