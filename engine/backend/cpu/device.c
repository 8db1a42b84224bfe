/* The CPU device: memory is plain memory, calls run at once, sync has nothing to wait for.
 *
 * Weights and KV lie one after another in regions that start on a 2 MiB boundary and ask for huge pages: a
 * decode step reads all weights once, and with 4 KiB pages the page walks show in the time of every step
 * (measured: a sixth). Regions, because a matrix of a small model is less than a huge page. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "common/check.h"
#include "engine/backend/cpu/cpu.h"

enum {
    ALIGN_SMALL = 64,
    ALIGN_HUGE = 2 << 20,
    REGION_BYTES = 32 << 20,
    REGION_FROM = 32 << 10 /* smaller buffers are the C library's business */
};

/* Buffers are cut off a region's end; it is freed with the last of them. */
struct tm_cpu_region {
    char *base;
    size_t size, used;
    int buffers;
    struct tm_cpu_region *next;
};

static size_t round_up(size_t n, size_t unit)
{
    return (n + unit - 1) / unit * unit;
}

/* NULL when out of memory or when rounding up would overflow. */
static void *aligned_take(size_t bytes)
{
    if (bytes > SIZE_MAX / 2)
        return NULL;
    size_t align = bytes >= ALIGN_HUGE ? ALIGN_HUGE : ALIGN_SMALL;
    size_t rounded = round_up(bytes ? bytes : 1, align);
    void *p = aligned_alloc(align, rounded);
    if (p && align == ALIGN_HUGE)
        (void)madvise(p, rounded, MADV_HUGEPAGE); /* only advice: a kernel without it is slower */
    return p;
}

/* The first region has room for bytes, or NULL when out of memory. */
static tm_cpu_region *region_for(tm_device *dev, size_t bytes)
{
    tm_cpu_region *r = dev->regions;
    if (r && r->size - r->used >= bytes)
        return r;
    if (bytes > SIZE_MAX / 2)
        return NULL;
    size_t size = round_up(TM_MAX(bytes, (size_t)REGION_BYTES), ALIGN_HUGE);
    r = calloc(1, sizeof *r);
    char *base = r ? aligned_take(size) : NULL;
    if (!base) {
        free(r);
        return NULL;
    }
    *r = (tm_cpu_region){.base = base, .size = size, .next = dev->regions};
    dev->regions = r;
    return r;
}

static void *region_take(tm_device *dev, size_t bytes)
{
    tm_cpu_region *r = region_for(dev, bytes);
    if (!r)
        return NULL;
    void *p = r->base + r->used;
    r->used += TM_MIN(round_up(bytes, ALIGN_SMALL), r->size - r->used);
    r->buffers++;
    return p;
}

/* False: p is in no region. */
static bool region_release(tm_device *dev, void *p)
{
    uintptr_t at = (uintptr_t)p;
    for (tm_cpu_region **link = &dev->regions; *link; link = &(*link)->next) {
        tm_cpu_region *r = *link;
        if (at < (uintptr_t)r->base || at - (uintptr_t)r->base >= r->size)
            continue;
        if (--r->buffers == 0) {
            *link = r->next;
            free(r->base);
            free(r);
        }
        return true;
    }
    return false;
}

static tm_status cpu_open(tm_device **out, const tm_device_opts *opts, tm_err *err)
{
    const char *name = opts->isa && opts->isa[0] ? opts->isa : "auto";
    const tm_cpu_isa *isa = tm_cpu_isa_find(name);
    if (!isa)
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "instruction set '%s' is unknown or not in this build: use auto, ref, avx2, "
                       "avx512 or amx",
                       name);
    if (!isa->supported())
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "instruction set '%s' was asked for, but this processor does not have it",
                       name);
    if (opts->threads < 0 || opts->threads > TM_CPU_THREADS_MAX)
        return TM_FAIL(err, TM_STATUS_CONFIG, "threads is %d, expected 0 (choose) to %d",
                       opts->threads, TM_CPU_THREADS_MAX);
    tm_device *d = calloc(1, sizeof *d);
    if (!d)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for the cpu device");
    d->isa = isa;
    d->local_ranks = tm_cpu_local_ranks();
    int fit = tm_cpu_default_threads(d->local_ranks);
    d->threads = opts->threads ? opts->threads : fit;
    if (d->threads > 1) {
        tm_status st = tm_cpu_pool_create(&d->pool, d->threads, d->threads > fit, err);
        if (st != TM_OK) {
            free(d);
            return st;
        }
    }
    snprintf(d->text, sizeof d->text, "cpu %s, %d thread%s", isa->name, d->threads,
             d->threads == 1 ? "" : "s");
    *out = d;
    return TM_OK;
}

static void cpu_close(tm_device *dev)
{
    if (!dev)
        return;
    tm_cpu_pool_destroy(dev->pool);
    free(dev->scratch);
    free(dev);
}

static tm_status cpu_mem_free(tm_device *dev, size_t *bytes, tm_err *err)
{
    size_t all;
    TM_TRY(tm_cpu_mem_free("/proc", "/sys/fs/cgroup", &all, err));
    *bytes = all / (size_t)dev->local_ranks;
    return TM_OK;
}

static tm_status cpu_alloc(tm_device *dev, size_t bytes, void **out, tm_err *err)
{
    void *p = bytes < REGION_FROM ? aligned_take(bytes) : region_take(dev, bytes);
    if (!p)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for a buffer of %zu bytes", bytes);
    *out = p;
    return TM_OK;
}

static void cpu_free(tm_device *dev, void *p)
{
    if (p && !region_release(dev, p))
        free(p);
}

static tm_status cpu_copy(tm_device *dev, void *dst, const void *src, size_t bytes)
{
    (void)dev;
    if (bytes)
        memcpy(dst, src, bytes);
    return TM_OK;
}

static tm_status cpu_sync(tm_device *dev)
{
    (void)dev;
    return TM_OK;
}

static const char *cpu_describe(tm_device *dev)
{
    return dev->text;
}

void *tm_cpu_scratch(tm_device *dev, size_t bytes)
{
    if (bytes <= dev->scratch_bytes)
        return dev->scratch;
    void *p = aligned_take(bytes);
    if (!p)
        return NULL;
    free(dev->scratch);
    dev->scratch = p;
    dev->scratch_bytes = bytes;
    return p;
}

static const tm_device_ops g_device_ops = {
    .open = cpu_open,
    .close = cpu_close,
    .mem_free = cpu_mem_free,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .upload = cpu_copy,
    .download = cpu_copy,
    .sync = cpu_sync,
    .describe = cpu_describe,
};

const tm_backend tm_backend_cpu = {
    .name = "cpu",
    .act_dtype = TM_DTYPE_F32,
    .dev = &g_device_ops,
    .ops = &tm_cpu_ops,
};
