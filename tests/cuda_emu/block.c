/* The threads of a launch: who runs, who waits, and what it means when nobody can. See emu.h.
 *
 * A thread that has to wait looks for another one that can run: first a lane of its own warp, so that a warp meets in
 * its operations while its stacks are in the cache, then the other warps of its block. A thread that begins takes the
 * fiber of one that has ended, so a kernel without barriers runs on a single fiber. When no thread of the block
 * can run, some of them wait for threads that will never come, and the kernel has failed. */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "tests/cuda_emu/emu.h"
#include "tests/cuda_emu/fiber.h"
#include "tests/cuda_emu/grid.h"

__thread emu_thread *emu_self;

static pthread_mutex_t g_pool_lock = PTHREAD_MUTEX_INITIALIZER;
static grid *g_pool; /* those that run nothing */
static char g_failure[2048];

/* ---- who is next ---- */

static unsigned next_bit(unsigned mask, unsigned from, bool down)
{
    const unsigned rest = down ? mask & ((1u << from) - 1) : mask & ~((2u << from) - 1);
    mask = rest ? rest : mask;
    return down ? 31u - (unsigned)__builtin_clz(mask) : (unsigned)__builtin_ctz(mask);
}

/* Of a block in which some thread can run, the next behind this lane. */
static emu_thread *take_next(block *b, unsigned warp, unsigned lane)
{
    if (!b->warps[warp].ready) {
        warp = next_bit(b->ready_warps, warp, b->down);
        lane = b->down ? 0 : EMU_LANES - 1;
    }
    lane = next_bit(b->warps[warp].ready, lane, b->down);
    grid_set_ready(b, warp, 0, 1u << lane);
    return &b->threads[warp * EMU_LANES + lane];
}

static emu_thread *take_first(block *b)
{
    return take_next(b, b->down ? b->n_warps - 1 : 0, b->down ? 0 : EMU_LANES - 1);
}

static emu_fiber *take_fiber(grid *g);

/* Another thread goes on; returns when this one can. */
static void switch_to(emu_thread *t, emu_thread *next)
{
    if (t == next)
        return;
    if (!next->fiber)
        next->fiber = take_fiber(grid_of(next));
    emu_self = next;
    emu_fiber_switch(t->fiber, next->fiber);
}

static __attribute__((noreturn)) void leave(emu_thread *t)
{
    grid *g = grid_of(t);
    emu_self = NULL;
    emu_fiber_switch(t->fiber, g->main);
    abort();
}

void grid_wait(emu_thread *t)
{
    block *b = block_of(t);
    if (!b->ready_warps)
        emu_fail("waits for threads that do not come");
    switch_to(t, take_next(b, t->warp, t->lane));
}

/* The next thread in the order of blocks, warps and lanes: everybody gets a turn. At the end of a round one more block
 * comes in, or, when there is none, other processes run. */
void emu_yield(void)
{
    emu_thread *t = emu_self;
    if (!t)
        return;
    block *b = block_of(t);
    grid *g = b->grid;
    const unsigned later = b->warps[t->warp].ready & ~((2u << t->lane) - 1);
    const unsigned warps = b->ready_warps & ~((2u << t->warp) - 1);
    grid_set_ready(b, t->warp, 1u << t->lane, 0);
    unsigned warp = t->warp, lane;
    if (later) {
        lane = (unsigned)__builtin_ctz(later);
    } else if (warps) {
        warp = (unsigned)__builtin_ctz(warps);
        lane = (unsigned)__builtin_ctz(b->warps[warp].ready);
    } else {
        b = grid_next_block(g, b);
        warp = (unsigned)__builtin_ctz(b->ready_warps);
        lane = (unsigned)__builtin_ctz(b->warps[warp].ready);
    }
    grid_set_ready(b, warp, 0, 1u << lane);
    switch_to(t, &b->threads[warp * EMU_LANES + lane]);
}

/* ---- the life of a thread ---- */

static void end_thread(emu_thread *t)
{
    block *b = block_of(t);
    warp_state *w = &b->warps[t->warp];
    if (b->grid->launch->dependent && !t->waited)
        emu_fail("ends without wait_previous, which every kernel of launch_kernel has to call");
    b->live--;
    w->exited |= 1u << t->lane;
    warp_thread_ended(t);
    if (b->live > 0 && b->arrived == b->live)
        emu_fail("ends, and all others wait for it");
}

/* Every fiber runs threads from their beginning to their end, one after the other. */
static void fiber_main(emu_fiber *self)
{
    for (;;) {
        emu_thread *t = emu_self;
        block *b = block_of(t);
        grid *g = b->grid;
        t->fiber = self;
        g->launch->call(g->data);
        end_thread(t);
        emu_thread *next = NULL;
        if (b->ready_warps)
            next = take_next(b, t->warp, t->lane);
        else if (b->live > 0)
            emu_fail("ends, and others wait for threads that do not come");
        else if ((b = grid_end_block(g, b)) != NULL)
            next = take_first(b);
        emu_self = next;
        if (next && !next->fiber)
            continue;
        g->idle[g->n_idle++] = self;
        emu_fiber_switch(self, next ? next->fiber : g->main);
    }
}

static emu_fiber *take_fiber(grid *g)
{
    if (g->n_idle > 0)
        return g->idle[--g->n_idle];
    if (g->n_fibers == g->fibers_room) {
        g->fibers_room = g->fibers_room ? 2 * g->fibers_room : 64;
        g->fibers = realloc(g->fibers, (size_t)g->fibers_room * sizeof(*g->fibers));
        g->idle = realloc(g->idle, (size_t)g->fibers_room * sizeof(*g->idle));
        TM_ASSERT(g->fibers && g->idle);
    }
    emu_fiber *f = emu_fiber_create(fiber_main);
    TM_ASSERT(f);
    g->fibers[g->n_fibers++] = f;
    return f;
}

/* ---- barriers of the block ---- */

int emu_barrier(int value, emu_site site)
{
    emu_thread *t = emu_self;
    block *b = block_of(t);
    if (b->arrived == 0)
        b->barrier = site;
    else if (!grid_same_site(&b->barrier, &site))
        emu_fail("is at %s, %s:%d, while others wait at another barrier", site.what, site.file,
                 site.line);
    const int round = b->round & 1;
    b->arrived++;
    b->value[round] += value != 0;
    if (b->arrived == b->live) {
        if (b->live != b->size)
            emu_fail("is the last at %s, %s:%d, but %d of %d threads have ended before", site.what,
                     site.file, site.line, b->size - b->live, b->size);
        race_meet(b, b->n_warps == 32 ? EMU_ALL : (1u << b->n_warps) - 1);
        b->arrived = 0;
        b->round++;
        b->value[b->round & 1] = 0;
        for (unsigned w = 0; w < b->n_warps; w++)
            grid_set_ready(b, w, ~b->warps[w].exited, 0);
        grid_set_ready(b, t->warp, 0, 1u << t->lane);
        return b->value[round];
    }
    grid_wait(t);
    return b->value[round];
}

/* ---- failures ---- */

static void describe_waiters(const block *b, char *out, size_t size)
{
    size_t len = strlen(out);
    if (b->arrived > 0)
        len += (size_t)snprintf(out + len, size - len, "\n  %d threads wait at %s, %s:%d",
                                b->arrived, b->barrier.what, b->barrier.file, b->barrier.line);
    if (len < size)
        hopper_describe(b, out, size);
    len = strlen(out);
    for (unsigned w = 0; w < b->n_warps; w++)
        for (int i = 0; i < b->warps[w].n_groups && len < size; i++) {
            const group *g = &b->warps[w].groups[i];
            len += (size_t)snprintf(
                out + len, size - len, "\n  lanes %#x of warp %u wait at %s, %s:%d, for %#x",
                g->arrived, w, g->site.what, g->site.file, g->site.line, g->mask);
        }
}

void emu_fail(const char *fmt, ...)
{
    emu_thread *t = emu_self;
    char text[512], name[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    if (!t) {
        fprintf(stderr, "cuda_emu: %s\n", text);
        abort();
    }
    const block *b = block_of(t);
    const uint3 i = b->seen.index, x = t->index;
    emu_name_of(b->grid->launch->kernel, name, sizeof(name));
    snprintf(g_failure, sizeof(g_failure),
             "kernel %s: thread (%u, %u, %u) of block (%u, %u, %u) %s", name, x.x, x.y, x.z, i.x,
             i.y, i.z, text);
    describe_waiters(b, g_failure, sizeof(g_failure));
    fprintf(stderr, "cuda_emu: %s\n", g_failure);
    b->grid->failed = true;
    leave(t);
}

const char *emu_failure(void)
{
    return g_failure;
}

void emu_check_aligned(const void *p, size_t to)
{
    if ((uintptr_t)p % to != 0)
        emu_fail("reads or writes %zu bytes at %p, which is not a multiple of it", to, p);
}

/* ---- a launch ---- */

static grid *take_grid(void)
{
    pthread_mutex_lock(&g_pool_lock);
    grid *g = g_pool;
    if (g)
        g_pool = g->next;
    pthread_mutex_unlock(&g_pool_lock);
    if (!g) {
        g = calloc(1, sizeof(*g));
        TM_ASSERT(g);
        g->main = emu_fiber_adopt();
        TM_ASSERT(g->main);
    }
    return g;
}

static void put_grid(grid *g)
{
    pthread_mutex_lock(&g_pool_lock);
    g->next = g_pool;
    g_pool = g;
    pthread_mutex_unlock(&g_pool_lock);
}

/* Where the last thread stopped is of no interest any more. */
static void forget(grid *g)
{
    g->n_idle = 0;
    for (int i = 0; i < g->n_fibers; i++) {
        emu_fiber_reset(g->fibers[i]);
        g->idle[g->n_idle++] = g->fibers[i];
    }
}

cudaError_t emu_run_launch(void *data)
{
    const emu_launch *l = data;
    grid *g = take_grid();
    emu_thread *outer = emu_self;
    TM_ASSERT(!outer);
    g->launch = l;
    g->data = data;
    g->failed = false;
    grid_begin(g);
    block *b = g->resident[0];
    emu_thread *first = take_first(b);
    first->fiber = take_fiber(g);
    grid_watch_faults(true);
    emu_self = first;
    emu_fiber_switch(g->main, first->fiber);
    emu_self = NULL;
    grid_watch_faults(false);
    if (g->failed)
        forget(g);
    const cudaError_t e = g->failed ? cudaErrorLaunchFailure : cudaSuccess;
    put_grid(g);
    return e;
}
