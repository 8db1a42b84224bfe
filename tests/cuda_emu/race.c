/* Races in shared memory: two threads of a block touch the same bytes, one of them writes, and nothing says which comes
 * first. Kernels are compiled as for the thread sanitizer, whose calls before every access end here; its library is not
 * used, since its threads are not fibers.
 *
 * A place remembers who wrote it last and two of those who have read it since, each with the clock of its warp. The clocks
 * move at barriers and at __syncwarp, which order memory; shuffles, votes and products do not. Bytes of other memory are
 * not watched. A volatile read lets others run, so that a loop around it ends. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "common/check.h"
#include "tests/cuda_emu/asan.h"
#include "tests/cuda_emu/grid.h"

typedef struct touch {
    uint32_t clock;
    uint16_t thread;
    uint16_t bytes; /* of the four */
} touch;

/* In `bytes`: the copy engine or a product did it. */
enum { BYTES = 0xf, ENGINE = 0x10 };

/* Four bytes of shared memory. */
struct emu_place {
    touch write, read, other; /* other: the last read from another warp than `read` */
};

static bool g_on; /* since the first block, unless TM_EMU_RACES is 0 */
static uint32_t
    g_clock; /* only grows: what blocks before have left in a place is older than all of this one */

uint32_t race_tick(void)
{
    return __atomic_add_fetch(&g_clock, 1, __ATOMIC_RELAXED);
}

void race_begin(block *b)
{
    if (!b->places) {
        b->places = mmap(NULL, EMU_ARENA_BYTES / 4 * sizeof(*b->places), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        TM_ASSERT(b->places != MAP_FAILED);
        const char *wanted = getenv("TM_EMU_RACES");
        g_on = !wanted || strcmp(wanted, "0") != 0;
    }
    const uint32_t now = race_tick();
    for (unsigned w = 0; w < b->n_warps; w++) {
        b->clock[w] = b->fenced[w] = now;
        for (unsigned u = 0; u < WARPS_MAX; u++) /* blocks before may have had more warps */
            b->known[w][u] = now;
    }
}

/* The warps meet: each knows what all of them know, and everything that any of them has done. */
void race_meet(block *b, unsigned warps)
{
    const uint32_t now = race_tick();
    uint32_t all[WARPS_MAX] = {0};
    for (unsigned w = 0; w < b->n_warps; w++)
        for (unsigned u = 0; warps >> w & 1 && u < b->n_warps; u++)
            all[u] = b->known[w][u] > all[u] ? b->known[w][u] : all[u];
    for (unsigned w = 0; w < b->n_warps; w++) {
        if (!(warps >> w & 1))
            continue;
        for (unsigned u = 0; u < b->n_warps; u++)
            b->known[w][u] = warps >> u & 1 ? now : all[u];
        b->clock[w] = now;
    }
}

/* The lanes of a warp are not told apart: what one of them passes on are the deeds of all. */
void race_release(block *b, unsigned warp, uint32_t *clock)
{
    const uint32_t now = race_tick();
    for (unsigned u = 0; u < b->n_warps; u++)
        clock[u] = b->known[warp][u] > clock[u] ? b->known[warp][u] : clock[u];
    clock[warp] = b->clock[warp] = now;
}

void race_acquire(block *b, unsigned warp, const uint32_t *clock)
{
    for (unsigned u = 0; u < b->n_warps; u++)
        b->known[warp][u] = clock[u] > b->known[warp][u] ? clock[u] : b->known[warp][u];
}

void race_fence(void)
{
    block *b = block_of(emu_self);
    b->clock[emu_self->warp] = b->fenced[emu_self->warp] = race_tick();
}

static bool after(const block *b, const emu_thread *t, const touch *o, unsigned me, unsigned bytes)
{
    return o->thread == me || !(o->bytes & bytes & BYTES) ||
           o->clock < b->known[t->warp][o->thread / EMU_LANES];
}

static size_t variable_at(const block *b, int i)
{
    return (size_t)((const char *)b->shared[i].at - b->arena);
}

static __attribute__((noinline)) void report(const block *b, size_t at, const touch *o, bool write,
                                             const char *did)
{
    int i = b->n_shared - 1;
    while (i > 0 && variable_at(b, i) > at)
        i--;
    emu_fail("%s byte %zu of shared variable %d (%zu bytes), which thread %u has %s, with no "
             "barrier between",
             write ? "writes" : "reads", at - variable_at(b, i), i, b->shared[i].bytes, o->thread,
             did);
}

/* `bytes` of the place, at byte `at` of the block's memory. */
static void watch_place(block *b, const emu_thread *t, size_t at, unsigned bytes, bool write)
{
    struct emu_place *x = &b->places[at / 4];
    const unsigned me = t->warp * EMU_LANES + t->lane;
    touch now = {b->clock[t->warp], (uint16_t)me, (uint16_t)bytes};
    touch *mine = write ? &x->write : &x->read;
    if (mine->clock == now.clock && mine->thread == me) {
        if ((mine->bytes & bytes) == bytes)
            return; /* whoever came between has been reported */
        now.bytes |= mine->bytes;
    }
    if (!after(b, t, &x->write, me, bytes))
        report(b, at, &x->write, write, "written");
    if (!write) {
        if (x->read.thread / EMU_LANES != t->warp)
            x->other = x->read;
        x->read = now;
        return;
    }
    if (!after(b, t, &x->read, me, bytes))
        report(b, at, &x->read, true, "read");
    if (!after(b, t, &x->other, me, bytes))
        report(b, at, &x->other, true, "read");
    x->write = now;
}

static inline void watch(const void *p, size_t n, bool write, unsigned engine)
{
    const emu_thread *t = g_on ? emu_self : NULL;
    if (!t)
        return;
    block *b = block_of(t);
    const size_t begin = (size_t)((uintptr_t)p - (uintptr_t)b->arena), end = begin + n;
    if (begin >= EMU_ARENA_BYTES)
        return;
    for (size_t at = begin & ~(size_t)3; at < end; at += 4) {
        const unsigned low = at < begin ? (unsigned)(begin - at) : 0,
                       high = end - at < 4 ? (unsigned)(end - at) : 4;
        watch_place(b, t, at, (1u << high) - (1u << low) + engine, write);
    }
}

/* What threads wrote has to be fenced before. */
void race_engine(const void *p, size_t bytes, bool write)
{
    const emu_thread *t = g_on ? emu_self : NULL;
    if (!t)
        return;
    block *b = block_of(t);
    const size_t begin = (size_t)((const char *)p - b->arena);
    for (size_t at = begin & ~(size_t)3; !write && at < begin + bytes; at += 4) {
        const touch *o = &b->places[at / 4].write;
        if (!(o->bytes & ENGINE) && o->clock >= b->fenced[o->thread / EMU_LANES] &&
            o->thread / EMU_LANES < b->n_warps)
            report(b, at, o, false, "written, with no fence_async behind it, or");
    }
    watch(p, bytes, write, ENGINE);
}

void emu_watch(const void *p, size_t bytes, bool write)
{
    watch(p, bytes, write, 0);
}

/* ---- what the compiler calls; with the address sanitizer it does not, and knows these names ---- */

#ifndef EMU_ASAN

#define ACCESS(name, n, write)                                                                     \
    void __tsan_##name(const void *p);                                                             \
    void __tsan_##name(const void *p)                                                              \
    {                                                                                              \
        watch(p, n, write, 0);                                                                     \
    }
#define ACCESSES(n)                                                                                \
    ACCESS(read##n, n, false)                                                                      \
    ACCESS(write##n, n, true)                                                                      \
    ACCESS(unaligned_read##n, n, false)                                                            \
    ACCESS(unaligned_write##n, n, true)                                                            \
    ACCESS(volatile_write##n, n, true)                                                             \
    ACCESS(unaligned_volatile_write##n, n, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

#define WAITING_READ(name)                                                                         \
    void __tsan_##name(const void *p);                                                             \
    void __tsan_##name(const void *p)                                                              \
    {                                                                                              \
        (void)p;                                                                                   \
        emu_yield();                                                                               \
    }
#define WAITING_READS(n)                                                                           \
    WAITING_READ(volatile_read##n)                                                                 \
    WAITING_READ(unaligned_volatile_read##n)
WAITING_READS(1)
WAITING_READS(2)
WAITING_READS(4)
WAITING_READS(8)
WAITING_READS(16)

void __tsan_init(void);
void __tsan_init(void)
{
}
void __tsan_func_entry(void *pc);
void __tsan_func_entry(void *pc)
{
    (void)pc;
}
void __tsan_func_exit(void);
void __tsan_func_exit(void)
{
}
void __tsan_read_range(const void *p, size_t n);
void __tsan_read_range(const void *p, size_t n)
{
    watch(p, n, false, 0);
}
void __tsan_write_range(const void *p, size_t n);
void __tsan_write_range(const void *p, size_t n)
{
    watch(p, n, true, 0);
}
void *__tsan_memcpy(void *to, const void *from, size_t n);
void *__tsan_memcpy(void *to, const void *from, size_t n)
{
    watch(from, n, false, 0);
    watch(to, n, true, 0);
    return memcpy(to, from, n);
}
void *__tsan_memset(void *p, int v, size_t n);
void *__tsan_memset(void *p, int v, size_t n)
{
    watch(p, n, true, 0);
    return memset(p, v, n);
}

/* Atomic operations race with nothing. */
#define CHANGE(T, bits, name)                                                                      \
    T __tsan_atomic##bits##_##name(T *p, T v, int order);                                          \
    T __tsan_atomic##bits##_##name(T *p, T v, int order)                                           \
    {                                                                                              \
        (void)order;                                                                               \
        return __atomic_##name(p, v, __ATOMIC_SEQ_CST);                                            \
    }
#define ATOMICS(T, bits)                                                                           \
    CHANGE(T, bits, fetch_add)                                                                     \
    CHANGE(T, bits, fetch_sub)                                                                     \
    CHANGE(T, bits, fetch_and)                                                                     \
    CHANGE(T, bits, fetch_or)                                                                      \
    CHANGE(T, bits, fetch_xor)                                                                     \
    T __tsan_atomic##bits##_exchange(T *p, T v, int order);                                        \
    T __tsan_atomic##bits##_exchange(T *p, T v, int order)                                         \
    {                                                                                              \
        (void)order;                                                                               \
        return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                        \
    }                                                                                              \
    T __tsan_atomic##bits##_load(const T *p, int order);                                           \
    T __tsan_atomic##bits##_load(const T *p, int order)                                            \
    {                                                                                              \
        (void)order;                                                                               \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                               \
    }                                                                                              \
    void __tsan_atomic##bits##_store(T *p, T v, int order);                                        \
    void __tsan_atomic##bits##_store(T *p, T v, int order)                                         \
    {                                                                                              \
        (void)order;                                                                               \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                  \
    }                                                                                              \
    int __tsan_atomic##bits##_compare_exchange_strong(T *p, T *old, T v, int yes, int no);         \
    int __tsan_atomic##bits##_compare_exchange_strong(T *p, T *old, T v, int yes, int no)          \
    {                                                                                              \
        (void)yes, (void)no;                                                                       \
        return __atomic_compare_exchange_n(p, old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
    }                                                                                              \
    T __tsan_atomic##bits##_compare_exchange_val(T *p, T old, T v, int yes, int no);               \
    T __tsan_atomic##bits##_compare_exchange_val(T *p, T old, T v, int yes, int no)                \
    {                                                                                              \
        (void)yes, (void)no;                                                                       \
        __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
        return old;                                                                                \
    }
ATOMICS(uint8_t, 8)
ATOMICS(uint16_t, 16)
ATOMICS(uint32_t, 32)
ATOMICS(uint64_t, 64)
void __tsan_atomic_thread_fence(int order);
void __tsan_atomic_thread_fence(int order)
{
    (void)order;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
#endif
