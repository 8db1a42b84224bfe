/* A binary heap of intrusive nodes: the waiting queue. Order: rank high first, then arrival low first. Any
 * node can be taken out, because it knows where it stands. */
#ifndef TM_ROUTER_POOL_HEAP_H
#define TM_ROUTER_POOL_HEAP_H

#include <stdbool.h>
#include <stdint.h>

typedef struct tm_heap_node {
    int64_t rank;
    uint64_t arrival;
    int index; /* in the heap */
    void *owner;
} tm_heap_node;

typedef struct tm_heap {
    tm_heap_node **items;
    int count, cap;
} tm_heap;

/* Room for `count` nodes in all; false without memory. push relies on it and cannot fail. */
bool tm_heap_reserve(tm_heap *h, int count);
void tm_heap_push(tm_heap *h, tm_heap_node *n);
void tm_heap_remove(tm_heap *h, tm_heap_node *n);
tm_heap_node *tm_heap_top(const tm_heap *h); /* NULL when empty */
void tm_heap_deinit(tm_heap *h);

#endif
