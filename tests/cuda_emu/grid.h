/* Inside the emulator: the state of a launch that runs. block.c moves between threads, grid.c between blocks. */
#ifndef TM_TESTS_CUDA_EMU_GRID_H
#define TM_TESTS_CUDA_EMU_GRID_H

#include <string.h>

#include "tests/cuda_emu/emu.h"
#include "tests/cuda_emu/fiber.h"

enum { WARPS_MAX = EMU_THREADS_MAX / EMU_LANES, SHARED_MAX = 32, RESIDENT_MAX = 64, TURNS = 16 };

/* Lanes that meet in one operation; the masks of a warp's groups have no lane in common. */
typedef struct group {
    unsigned mask, arrived;
    emu_site site;
} group;

typedef struct warp_state {
    unsigned ready, exited; /* lanes that can run; that have ended or never were */
    int n_groups;
    group groups[EMU_LANES];
    emu_warp_op *op[EMU_LANES]; /* of those that wait */
    void *args[EMU_LANES];
} warp_state;

typedef struct shared_variable {
    const void *id;
    size_t bytes;
    void *at;
} shared_variable;

/* A barrier of some of the block's threads. */
typedef struct turn {
    int arrived, threads;
    unsigned waiting[WARPS_MAX];
    uint32_t clock[WARPS_MAX];
    emu_site site;
} turn;

#define EMU_ARENA_BYTES ((size_t)512 << 10)

typedef struct grid grid;

typedef struct block {
    emu_block seen; /* first: what kernels see */
    grid *grid;
    int size, live; /* threads: in all, not ended */
    unsigned n_warps, ready_warps;
    bool down; /* the order */
    size_t number;           /* of the launch's blocks */
    unsigned cluster_rounds; /* barriers of the cluster that all its threads have come to */
    warp_state warps[WARPS_MAX];
    emu_thread threads[EMU_THREADS_MAX];
    /* The barrier that some have reached; its rounds take turns with the two values. */
    int arrived, round, value[2];
    emu_site barrier;
    turn turns[TURNS];
    struct hopper *hopper; /* NULL: nothing of it was used; else of hopper.c */
    char *arena;           /* shared memory, EMU_ARENA_BYTES: the variables with gaps between */
    struct emu_place *
        places; /* who touched it (race.c), by warps' clocks and what a warp knows of the others' */
    uint32_t clock[WARPS_MAX], known[WARPS_MAX][WARPS_MAX];
    uint32_t fenced[WARPS_MAX]; /* what it wrote before is seen by products and the copy engine */
    size_t arena_used;
    int n_shared;
    shared_variable shared[SHARED_MAX];
} block;

struct grid {
    const emu_launch *launch;
    const void *data;
    size_t next_index, n_blocks; /* blocks begun, of */
    int n_resident, resident_max, n_made;
    block *resident[RESIDENT_MAX],
        *made[RESIDENT_MAX]; /* those that run; all, for later launches too */
    bool failed;
    long long quiet_since; /* ns: the last time a block ended */
    emu_fiber *main, **fibers, **idle;
    int n_fibers, n_idle, fibers_room;
    grid *next;
};

static inline block *block_of(const emu_thread *t)
{
    return (block *)t->block;
}

static inline grid *grid_of(const emu_thread *t)
{
    return block_of(t)->grid;
}

/* The first blocks of a launch; resident[0] can run. */
void grid_begin(grid *g);
/* Block `rank` of b's cluster, in whose shared memory `at` of b is a place. */
block *grid_member(const block *b, int rank, const void *at);
/* Block b has ended: the next one to run, NULL when all have. */
block *grid_end_block(grid *g, block *b);
/* Block b waits for others: the next one in turn, perhaps b. */
block *grid_next_block(grid *g, block *b);
/* Faults of memory are reported with the kernel while it runs. */
void grid_watch_faults(bool on);

static inline void grid_set_ready(block *b, unsigned warp, unsigned set, unsigned clear)
{
    unsigned *ready = &b->warps[warp].ready;
    *ready = (*ready | set) & ~clear;
    b->ready_warps = *ready ? b->ready_warps | 1u << warp : b->ready_warps & ~(1u << warp);
}

/* Room for one more shared variable of the block, filled with what nobody wrote. */
void *emu_shared_place(block *b, const void *id, size_t bytes, size_t align);
/* Drops the asynchronous copies of the thread's last life. */
void emu_copy_forget(emu_thread *t);

/* The texts of a place are nearly always the very same ones. */
static inline bool grid_same_site(const emu_site *a, const emu_site *b)
{
    return a->line == b->line && (a->what == b->what || strcmp(a->what, b->what) == 0) &&
           (a->file == b->file || strcmp(a->file, b->file) == 0);
}

/* Races in shared memory (race.c): the block begins; the warps of the mask meet at a barrier; a number of its own. */
void race_begin(block *b);
void race_meet(block *b, unsigned warps);
uint32_t race_tick(void);
/* One warp passes on all that it knows and has done, to whoever takes it from `clock` later. */
void race_release(block *b, unsigned warp, uint32_t *clock);
void race_acquire(block *b, unsigned warp, const uint32_t *clock);
/* Accesses of the copy engine and of products, for the thread that began them. */
void race_engine(const void *p, size_t bytes, bool write);
void race_fence(void);

/* hopper.c: the block begins. */
void hopper_begin(block *b);
void hopper_describe(const block *b, char *out, size_t size);

/* t waits until somebody makes it ready. */
void grid_wait(emu_thread *t);
/* Operations of the warp may be complete without t. */
void warp_thread_ended(emu_thread *t);

#endif
