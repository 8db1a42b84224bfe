/* Memory of the emulated device: every allocation is a mapping of its own that ends where memory without access begins, and is
 * filled with bytes that are no number. It can come from a nameless file (TM_EMU_SHARE), which another process then opens
 * through an IPC handle by way of /proc. Pinned host memory is ordinary memory that is known to be pinned. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/check.h"
#include "tests/cuda_emu/asan.h"
#include "tests/cuda_emu/emu.h"

#define PAGE        ((size_t)4096)
#define GUARD       (64 * PAGE)
#define ALIGN       ((size_t)256) /* as cudaMalloc */
#define TOTAL_BYTES ((size_t)16 << 30)
#define TAIL        0xa5 /* between an allocation's end and the page behind it */

typedef struct region {
    char *at;
    size_t bytes;
    char *map; /* of map_bytes, between what has no access */
    size_t map_bytes;
    emu_memory kind;
    int fd;       /* -1: none */
    bool foreign; /* another process's */
} region;

/* What is behind an IPC handle. */
typedef struct handle {
    int pid, fd;
    size_t map_bytes, offset, bytes;
} handle;

static pthread_mutex_t g_lock = PTHREAD_MUTEX_INITIALIZER;
static region *g_regions; /* in no order */
static size_t g_count, g_room, g_used;

static void add(region r)
{
    pthread_mutex_lock(&g_lock);
    if (g_count == g_room) {
        g_room = g_room ? 2 * g_room : 256;
        g_regions = realloc(g_regions, g_room * sizeof(*g_regions));
        TM_ASSERT(g_regions);
    }
    g_regions[g_count++] = r;
    g_used += r.kind == EMU_DEVICE && !r.foreign ? r.map_bytes : 0;
    pthread_mutex_unlock(&g_lock);
}

/* The region that begins at p, removed from the list; false where none does. */
static bool take(const void *p, emu_memory kind, bool foreign, region *out)
{
    bool found = false;
    pthread_mutex_lock(&g_lock);
    for (size_t i = 0; i < g_count && !found; i++) {
        const region *r = &g_regions[i];
        if (r->at != p || r->kind != kind || r->foreign != foreign)
            continue;
        found = true;
        *out = *r;
        g_used -= r->kind == EMU_DEVICE && !r->foreign ? r->map_bytes : 0;
        g_regions[i] = g_regions[--g_count];
    }
    pthread_mutex_unlock(&g_lock);
    return found;
}

static bool find(const void *p, size_t bytes, region *out)
{
    const uintptr_t at = (uintptr_t)p;
    bool found = false;
    pthread_mutex_lock(&g_lock);
    for (size_t i = 0; i < g_count && !found; i++) {
        const uintptr_t begin = (uintptr_t)g_regions[i].at;
        found = at >= begin && at - begin <= g_regions[i].bytes &&
                bytes <= g_regions[i].bytes - (at - begin);
        if (found)
            *out = g_regions[i];
    }
    pthread_mutex_unlock(&g_lock);
    return found;
}

emu_memory emu_memory_of(const void *p)
{
    region r;
    return find(p, 1, &r) ? r.kind : EMU_PAGEABLE;
}

bool emu_inside(const void *p, size_t bytes)
{
    region r;
    return find(p, bytes, &r) && r.kind == EMU_DEVICE;
}

/* Called from a signal handler, so without the lock: the process is about to end. */
void emu_describe_address(const void *p, char *out, size_t size)
{
    const uintptr_t at = (uintptr_t)p;
    size_t best = SIZE_MAX;
    snprintf(out, size, "which is near no allocation");
    for (size_t i = 0; i < g_count; i++) {
        const uintptr_t begin = (uintptr_t)g_regions[i].at, end = begin + g_regions[i].bytes;
        const size_t far = at >= end ? at - end : at < begin ? begin - at : 0;
        if (far >= best || far > GUARD)
            continue;
        best = far;
        snprintf(out, size, "%zu bytes %s an allocation of %zu bytes", far,
                 at >= end ? "behind" : "before", g_regions[i].bytes);
    }
}

/* ---- the device ---- */

/* map_bytes at any place, with memory without access on both sides; fd -1: private memory. */
static char *map_guarded(size_t map_bytes, int fd)
{
    char *base = mmap(NULL, map_bytes + 2 * GUARD, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return NULL;
    const int flags = fd >= 0 ? MAP_SHARED | MAP_FIXED : MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    if (mmap(base + GUARD, map_bytes, PROT_READ | PROT_WRITE, flags, fd, 0) == MAP_FAILED) {
        munmap(base, map_bytes + 2 * GUARD);
        return NULL;
    }
    return base + GUARD;
}

static int shared_file(size_t bytes)
{
    int fd = memfd_create("tm-emu", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, (off_t)bytes) != 0) {
        close(fd);
        fd = -1;
    }
    return fd;
}

/* The bytes behind an allocation up to its page are known, and may not change. */
static size_t tail_of(const region *r)
{
    return (size_t)(r->map + r->map_bytes - (r->at + r->bytes));
}

static void protect(const region *r)
{
    memset(r->at + r->bytes, TAIL, tail_of(r));
    ASAN_POISON_MEMORY_REGION(r->map - GUARD, (size_t)(r->at - r->map) + GUARD);
    ASAN_POISON_MEMORY_REGION(r->at + r->bytes, tail_of(r) + GUARD);
}

cudaError_t cudaMalloc(void **p, size_t bytes)
{
    const size_t rounded = (bytes + ALIGN - 1) / ALIGN * ALIGN;
    if (emu_sticky())
        return emu_return(emu_sticky());
    if (bytes == 0) {
        *p = NULL;
        return cudaSuccess;
    }
    if (emu_capturing(NULL))
        return emu_return(cudaErrorStreamCaptureUnsupported);
    if (bytes > TOTAL_BYTES || g_used + rounded > TOTAL_BYTES)
        return emu_return(cudaErrorMemoryAllocation);
    region r = {.bytes = bytes, .kind = EMU_DEVICE, .fd = -1};
    r.map_bytes = (rounded + PAGE - 1) / PAGE * PAGE;
    if (getenv("TM_EMU_SHARE") && (r.fd = shared_file(r.map_bytes)) < 0)
        return emu_return(cudaErrorMemoryAllocation);
    r.map = map_guarded(r.map_bytes, r.fd);
    if (!r.map) {
        if (r.fd >= 0)
            close(r.fd);
        return emu_return(cudaErrorMemoryAllocation);
    }
    r.at = r.map + r.map_bytes - rounded;
    memset(r.at, EMU_POISON, bytes);
    protect(&r);
    add(r);
    *p = r.at;
    return cudaSuccess;
}

static void unmap(const region *r)
{
    ASAN_UNPOISON_MEMORY_REGION(r->map - GUARD, r->map_bytes + 2 * GUARD);
    for (size_t i = 0; i < tail_of(r); i++)
        if ((unsigned char)r->at[r->bytes + i] != TAIL) {
            fprintf(stderr,
                    "cuda_emu: somebody wrote %zu bytes behind an allocation of %zu bytes\n", i,
                    r->bytes);
            abort();
        }
    munmap(r->map - GUARD, r->map_bytes + 2 * GUARD);
    if (r->fd >= 0)
        close(r->fd);
}

/* Waits for the device, as CUDA does. */
cudaError_t cudaFree(void *p)
{
    region r;
    const cudaError_t e = cudaDeviceSynchronize();
    if (!p)
        return e;
    if (!take(p, EMU_DEVICE, false, &r))
        return emu_return(cudaErrorInvalidDevicePointer);
    unmap(&r);
    return e;
}

cudaError_t cudaMemGetInfo(size_t *left, size_t *total)
{
    *total = TOTAL_BYTES;
    *left = TOTAL_BYTES - g_used;
    return emu_return(emu_sticky());
}

/* ---- pinned memory ---- */

cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags)
{
    region r = {.bytes = bytes, .kind = EMU_PINNED, .fd = -1};
    (void)flags;
    if (emu_sticky())
        return emu_return(emu_sticky());
    r.at = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
    if (!r.at)
        return emu_return(cudaErrorMemoryAllocation);
    memset(r.at, EMU_POISON, bytes);
    add(r);
    *p = r.at;
    return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags)
{
    (void)flags;
    if (emu_memory_of(host) != EMU_PINNED)
        return emu_return(cudaErrorInvalidValue);
    *device = host;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *p)
{
    region r;
    const cudaError_t e = cudaDeviceSynchronize();
    if (!p)
        return e;
    if (!take(p, EMU_PINNED, false, &r))
        return emu_return(cudaErrorInvalidValue);
    free(r.at);
    return e;
}

/* ---- other processes ---- */

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *out, void *p)
{
    region r;
    if (!find(p, 1, &r) || r.kind != EMU_DEVICE || r.foreign || r.at != p)
        return emu_return(cudaErrorInvalidValue);
    if (r.fd < 0) {
        fprintf(stderr,
                "cuda_emu: memory is shared with other processes only when TM_EMU_SHARE is set\n");
        return emu_return(cudaErrorNotSupported);
    }
    const handle h = {getpid(), r.fd, r.map_bytes, (size_t)(r.at - r.map), r.bytes};
    memset(out, 0, sizeof(*out));
    memcpy(out, &h, sizeof(h));
    return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void **p, cudaIpcMemHandle_t in, unsigned flags)
{
    handle h;
    char path[64];
    region r = {.kind = EMU_DEVICE, .foreign = true};
    (void)flags;
    memcpy(&h, &in, sizeof(h));
    if (h.pid == getpid()) /* CUDA refuses to open a process's own */
        return emu_return(cudaErrorInvalidValue);
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", h.pid, h.fd);
    r.fd = open(path, O_RDWR | O_CLOEXEC);
    if (r.fd < 0) {
        fprintf(stderr, "cuda_emu: %s: %s\n", path, strerror(errno));
        return emu_return(cudaErrorInvalidResourceHandle);
    }
    r.map_bytes = h.map_bytes;
    r.bytes = h.bytes;
    r.map = map_guarded(h.map_bytes, r.fd);
    if (!r.map) {
        close(r.fd);
        return emu_return(cudaErrorMemoryAllocation);
    }
    r.at = r.map + h.offset;
    protect(&r);
    add(r);
    *p = r.at;
    return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void *p)
{
    region r;
    if (!take(p, EMU_DEVICE, true, &r))
        return emu_return(cudaErrorInvalidValue);
    unmap(&r);
    return cudaSuccess;
}
