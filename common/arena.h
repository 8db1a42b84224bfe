/* An arena: memory of one request, dropped whole. Not thread-safe. */
#ifndef TM_COMMON_ARENA_H
#define TM_COMMON_ARENA_H

#include <stddef.h>

typedef struct tm_arena tm_arena;

tm_arena *tm_arena_create(size_t max_bytes); /* NULL when out of memory; 0 = no bound */
void tm_arena_destroy(tm_arena *a);
void *tm_arena_alloc(tm_arena *a, size_t size); /* zeroed, 16-byte aligned; NULL over the bound */
void *tm_arena_memdup(tm_arena *a, const void *data, size_t size);
char *tm_arena_strndup(tm_arena *a, const char *s, size_t len);
size_t tm_arena_used(const tm_arena *a);

#endif
