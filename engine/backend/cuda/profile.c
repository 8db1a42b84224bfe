/* See profile.h. Pairs of events are taken from a ring; when it is full its times are added to the rows. */
#include "engine/backend/cuda/profile.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"

#define ROWS_MAX 128
#define RING     1024

typedef struct slot {
    cudaEvent_t begin, end;
    int row;
} slot;

typedef struct row {
    const void *id;
    tm_profile_row seen;
} row;

struct tm_cuda_profile {
    row rows[ROWS_MAX];
    int row_count, used;
    bool failed;
    slot ring[RING];
};

tm_cuda_profile *tm_cuda_profile_create(void)
{
    tm_cuda_profile *p = calloc(1, sizeof(*p));
    for (int i = 0; p && i < RING; i++)
        if (cudaEventCreate(&p->ring[i].begin) != cudaSuccess ||
            cudaEventCreate(&p->ring[i].end) != cudaSuccess) {
            tm_cuda_profile_destroy(p);
            return NULL;
        }
    return p;
}

void tm_cuda_profile_destroy(tm_cuda_profile *p)
{
    for (int i = 0; p && i < RING; i++) {
        if (p->ring[i].begin)
            cudaEventDestroy(p->ring[i].begin);
        if (p->ring[i].end)
            cudaEventDestroy(p->ring[i].end);
    }
    free(p);
}

/* "_ZN39_GLOBAL__N__...11norm_kernelI6__halfLi8EEv..": a mangled name is a row of lengths and identifiers; the kernel's
 * own is the one that ends in "kernel". */
static void short_name(const char *mangled, char *out, size_t size)
{
    for (const char *at = mangled; *at; at++) {
        const char *digits = at;
        size_t len = 0;
        while (*at >= '0' && *at <= '9' && len < 1000)
            len = len * 10 + (size_t)(*at++ - '0');
        if (at == digits || len < 6 || len > strlen(at))
            continue;
        if (memcmp(at + len - 6, "kernel", 6) == 0) {
            snprintf(out, size, "%.*s", (int)len, at);
            return;
        }
        at += len - 1;
    }
    snprintf(out, size, "%s", mangled);
}

static int find_row(tm_cuda_profile *p, const void *id, const char *name)
{
    for (int i = 0; i < p->row_count; i++)
        if (p->rows[i].id == id && (!name || strcmp(p->rows[i].seen.name, name) == 0))
            return i;
    if (p->row_count == ROWS_MAX)
        return ROWS_MAX - 1; /* what is left shares the last row */
    row *r = &p->rows[p->row_count];
    *r = (row){.id = id};
    const char *own = NULL;
    if (name)
        snprintf(r->seen.name, sizeof(r->seen.name), "%s", name);
    else if (cudaFuncGetName(&own, id) == cudaSuccess && own)
        short_name(own, r->seen.name, sizeof(r->seen.name));
    else
        snprintf(r->seen.name, sizeof(r->seen.name), "kernel at %p", id);
    return p->row_count++;
}

static void collect(tm_cuda_profile *p)
{
    for (int i = 0; i < p->used; i++) {
        float ms = 0;
        const slot *s = &p->ring[i];
        if (cudaEventSynchronize(s->end) != cudaSuccess ||
            cudaEventElapsedTime(&ms, s->begin, s->end) != cudaSuccess)
            p->failed = true;
        p->rows[s->row].seen.calls++;
        p->rows[s->row].seen.seconds += (double)ms * 1e-3;
    }
    p->used = 0;
}

void tm_cuda_profile_enter(tm_cuda_profile *p, const void *id, const char *name, cudaStream_t s)
{
    if (p->used == RING)
        collect(p);
    p->ring[p->used].row = find_row(p, id, name);
    if (cudaEventRecord(p->ring[p->used].begin, s) != cudaSuccess)
        p->failed = true;
}

void tm_cuda_profile_leave(tm_cuda_profile *p, cudaStream_t s)
{
    if (cudaEventRecord(p->ring[p->used++].end, s) != cudaSuccess)
        p->failed = true;
}

static int longer(const void *a, const void *b)
{
    const double x = ((const tm_profile_row *)a)->seconds, y = ((const tm_profile_row *)b)->seconds;
    return (x < y) - (x > y);
}

cudaError_t tm_cuda_profile_rows(tm_cuda_profile *p, tm_profile_row *rows, int max, int *count)
{
    collect(p);
    if (p->failed)
        return cudaErrorUnknown;
    *count = TM_MIN(max, p->row_count);
    for (int i = 0; i < *count; i++)
        rows[i] = p->rows[i].seen;
    qsort(rows, (size_t)*count, sizeof(*rows), longer);
    return cudaSuccess;
}
