/* The blocks of a launch, and the shared memory of each.
 *
 * As many blocks as the device could hold at once may be under way, but a second one begins only when all threads of the
 * first have let others run, waiting for something outside of their block. */
#include "tests/cuda_emu/grid.h"

#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "common/check.h"
#include "tests/cuda_emu/asan.h"

#define GAP_BYTES      ((size_t)256)
#define SM_THREADS     2048
#define SM_BYTES       ((size_t)228 << 10)
#define SPIN_SECONDS   60
#define CLOCK_OF_LOOPS 64 /* rounds of waiting between two looks at the clock */

long long emu_clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (long long)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void set_up_thread(block *b, int i)
{
    const dim3 d = b->grid->launch->block;
    emu_thread *t = &b->threads[i];
    emu_copy_forget(t);
    t->index = (uint3){(unsigned)i % d.x, (unsigned)i / d.x % d.y, (unsigned)i / d.x / d.y};
    t->warp = (unsigned)i / EMU_LANES;
    t->lane = (unsigned)i % EMU_LANES;
    t->block = &b->seen;
    t->fiber = NULL;
    t->waited = false;
}

/* The next block of the launch into the memory of b. */
static void begin_block(grid *g, block *b)
{
    const emu_launch *l = g->launch;
    const size_t i = g->next_index++;
    b->grid = g;
    b->seen.launch = l;
    b->seen.index = (uint3){(unsigned)(i % l->grid.x), (unsigned)(i / l->grid.x % l->grid.y),
                            (unsigned)(i / l->grid.x / l->grid.y)};
    b->size = b->live = (int)(l->block.x * l->block.y * l->block.z);
    b->n_warps = (unsigned)(b->size + EMU_LANES - 1) / EMU_LANES;
    b->down = i % 2 == 1;
    b->number = i;
    b->cluster_rounds = 0;
    b->arrived = b->round = b->value[0] = b->value[1] = 0;
    b->ready_warps = 0;
    hopper_begin(b);
    for (int k = 0; k < b->size; k++)
        set_up_thread(b, k);
    for (unsigned w = 0; w < b->n_warps; w++) {
        const int lanes = b->size - (int)w * EMU_LANES;
        const unsigned all = lanes >= EMU_LANES ? EMU_ALL : (1u << lanes) - 1;
        b->warps[w].ready = 0;
        b->warps[w].exited = ~all;
        b->warps[w].n_groups = 0;
        grid_set_ready(b, w, all, 0);
    }
    race_begin(b);
    b->n_shared = 0;
    b->arena_used = 0;
    ASAN_POISON_MEMORY_REGION(b->arena, EMU_ARENA_BYTES);
    if (l->smem > 0)
        emu_shared_place(b, b, l->smem, 1024);
}

static void add_block(grid *g)
{
    if (g->n_resident == g->n_made) {
        block *b = calloc(1, sizeof(*b));
        TM_ASSERT(b);
        b->arena =
            mmap(NULL, EMU_ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        TM_ASSERT(b->arena != MAP_FAILED);
        g->made[g->n_made++] = b;
        g->resident[g->n_resident] = b;
    }
    begin_block(g, g->resident[g->n_resident++]);
}

void grid_begin(grid *g)
{
    const emu_launch *l = g->launch;
    const int threads = (int)(l->block.x * l->block.y * l->block.z);
    const size_t by_smem = SM_BYTES / (l->smem + 1024);
    size_t each = (size_t)(SM_THREADS / threads);
    each = by_smem < each ? by_smem : each;
    each = each < 1 ? 1 : each;
    g->resident_max = each * EMU_SMS < RESIDENT_MAX ? (int)each * EMU_SMS : RESIDENT_MAX;
    g->n_blocks = (size_t)l->grid.x * l->grid.y * l->grid.z;
    g->next_index = 0;
    g->n_resident = 0;
    g->quiet_since = emu_clock_ns();
    memcpy(g->resident, g->made, sizeof(g->made));
    add_block(g);
}

static int place_of(const grid *g, const block *b)
{
    int i = 0;
    while (g->resident[i] != b)
        i++;
    return i;
}

block *grid_end_block(grid *g, block *b)
{
    g->quiet_since = emu_clock_ns();
    if (g->next_index < g->n_blocks) {
        begin_block(g, b);
        return b;
    }
    const int i = place_of(g, b);
    g->resident[i] = g->resident[--g->n_resident];
    g->resident[g->n_resident] = b;
    return g->n_resident > 0 ? g->resident[i < g->n_resident ? i : 0] : NULL;
}

block *grid_next_block(grid *g, block *b)
{
    static __thread unsigned rounds;
    const int next = place_of(g, b) + 1;
    if (next < g->n_resident)
        return g->resident[next];
    if (g->n_resident < g->resident_max && g->next_index < g->n_blocks) {
        add_block(g);
        return g->resident[g->n_resident - 1];
    }
    sched_yield();
    if (++rounds % CLOCK_OF_LOOPS == 0 &&
        emu_clock_ns() - g->quiet_since > (long long)SPIN_SECONDS * 1000000000)
        emu_fail("waits in a loop for %d seconds, and no block has ended", SPIN_SECONDS);
    return g->resident[0];
}

/* ---- clusters ---- */

/* Block `rank` of the same cluster; NULL: it has not begun, or has ended. */
static block *cluster_block(const block *b, unsigned rank)
{
    const grid *g = b->grid;
    const size_t number = b->number / g->launch->cluster * g->launch->cluster + rank;
    for (int i = 0; i < g->n_resident; i++)
        if (g->resident[i]->number == number)
            return g->resident[i];
    return NULL;
}

/* A block that has ended has been at every barrier. */
static bool cluster_came(const block *b, unsigned rank, unsigned rounds)
{
    const block *o = cluster_block(b, rank);
    const size_t number = b->number / b->grid->launch->cluster * b->grid->launch->cluster + rank;
    return o ? o->cluster_rounds >= rounds : number < b->grid->next_index;
}

void emu_cluster_wait(emu_site site)
{
    block *b = block_of(emu_self);
    const unsigned rounds = b->cluster_rounds + 1;
    emu_barrier(0, site);
    b->cluster_rounds = rounds;
    for (unsigned r = 0; r < b->grid->launch->cluster; r++)
        while (!cluster_came(b, r, rounds))
            emu_yield();
}

block *grid_member(const block *b, int rank, const void *at)
{
    block *o = rank >= 0 && (unsigned)rank < b->grid->launch->cluster
                   ? cluster_block(b, (unsigned)rank)
                   : NULL;
    if (!o || (size_t)((const char *)at - b->arena) >= o->arena_used)
        emu_fail("writes to block %d of its cluster, which has not begun or has ended", rank);
    return o;
}

void emu_cluster_store(void *at, int rank, const void *v, size_t bytes)
{
    const block *b = block_of(emu_self);
    block *o = grid_member(b, rank, at);
    if (o == b)
        emu_watch(at, bytes, true);
    memcpy(o->arena + ((char *)at - b->arena), v, bytes);
}

/* ---- shared memory ---- */

void *emu_shared_place(block *b, const void *id, size_t bytes, size_t align)
{
    if (b->n_shared == SHARED_MAX)
        emu_fail("has more than %d shared variables", SHARED_MAX);
    const size_t at = (b->arena_used + GAP_BYTES + align - 1) / align * align;
    if (at + bytes + GAP_BYTES > EMU_ARENA_BYTES)
        emu_fail("has more than %zu bytes of shared memory", EMU_SMEM_MAX);
    b->arena_used = at + bytes;
    b->shared[b->n_shared++] = (shared_variable){id, bytes, b->arena + at};
    size_t all = 0;
    for (int i = 0; i < b->n_shared; i++)
        all += b->shared[i].bytes;
    if (all - b->grid->launch->smem > EMU_SMEM_DEFAULT || all > EMU_SMEM_MAX)
        emu_fail("has %zu bytes of shared memory, %zu of them dynamic", all, b->grid->launch->smem);
    ASAN_UNPOISON_MEMORY_REGION(b->arena + at, bytes);
    memset(b->arena + at, EMU_POISON, bytes);
    return b->arena + at;
}

void *emu_shared(const void *id, size_t bytes, size_t align)
{
    block *b = block_of(emu_self);
    for (int i = 0; i < b->n_shared; i++)
        if (b->shared[i].id == id)
            return b->shared[i].at;
    return emu_shared_place(b, id, bytes, align < 16 ? 16 : align);
}

void *emu_shared_dynamic(void)
{
    block *b = block_of(emu_self);
    if (b->grid->launch->smem == 0)
        emu_fail("uses dynamic shared memory, and the launch asked for none");
    return b->shared[0].at;
}

/* ---- faults ---- */

static __thread struct sigaction g_before;

static void on_fault(int sig, siginfo_t *info, void *context)
{
    (void)context;
    if (emu_self) {
        char where[200], name[256], text[640];
        const uint3 i = emu_self->block->index, x = emu_self->index;
        emu_describe_address(info->si_addr, where, sizeof(where));
        emu_name_of(emu_self->block->launch->kernel, name, sizeof(name));
        int n = snprintf(
            text, sizeof(text),
            "cuda_emu: kernel %s: thread (%u, %u, %u) of block (%u, %u, %u) touches %p, %s\n", name,
            x.x, x.y, x.z, i.x, i.y, i.z, info->si_addr, where);
        if (n > 0 &&
            write(STDERR_FILENO, text, (size_t)n < sizeof(text) ? (size_t)n : sizeof(text) - 1) < 0)
            _exit(9);
    }
    sigaction(sig, &g_before,
              NULL); /* the access is tried again, and whoever was there before has it */
}

void grid_watch_faults(bool on)
{
#ifdef EMU_ASAN
    (void)on, (void)on_fault, (void)g_before; /* it reports by itself */
#else
    struct sigaction a = {.sa_flags = SA_SIGINFO | SA_NODEFER};
    a.sa_sigaction = on_fault;
    sigaction(SIGSEGV, on ? &a : &g_before, on ? &g_before : NULL);
#endif
}
