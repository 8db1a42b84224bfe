/* Layout of the shared segment and the waiting on it.
 *
 * Every rank owns one tm_shm_rank line and two data slots; only the owner writes them, the others read.
 * `arrived` counts the chunks this rank has published: a reader may read slot[c & 1] of a peer when the
 * peer's arrived >= c, and a writer may overwrite slot[c & 1] when every peer's arrived >= c - 1 (they have
 * then all finished reading chunk c - 2). Counters wrap; they are compared by signed difference.
 *
 * Broadcast is apart: a ring of slots that only rank 0 writes. `head` is the number of the next slot,
 * `eaten` of each follower the number of slots it has read. */
#ifndef TM_PARALLEL_SHM_IMPL_H
#define TM_PARALLEL_SHM_IMPL_H

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "parallel/comm_impl.h"

#define TM_SHM_MAGIC      0x746d73686d303031u
#define TM_SHM_SLOT_BYTES ((size_t)256 * 1024) /* one chunk of a collective */
#define TM_SHM_RING_SLOTS 16u                  /* messages (or pieces) rank 0 may be ahead */
#define TM_SHM_RING_BYTES ((size_t)64 * 1024)
#define TM_SHM_POLL_MS    50 /* how often a sleeper looks whether its peers live */

/* A counter that others may sleep on. sleepers is raised before the last look at value, and value is
 * stored before sleepers is read (both sequentially consistent), so no wake-up is lost. */
typedef struct tm_shm_counter {
    _Atomic uint32_t value;
    _Atomic uint32_t sleepers;
} __attribute__((aligned(64))) tm_shm_counter;

typedef struct tm_shm_rank {
    tm_shm_counter arrived;
    tm_shm_counter eaten;
    int32_t pid;
    uint64_t start_time; /* of the process, clock ticks since boot: a pid alone may be reused */
    cpu_set_t cpus;      /* where it may run */
} __attribute__((aligned(64))) tm_shm_rank;

typedef struct tm_shm_ring_slot {
    uint32_t total; /* bytes of the whole message */
    uint32_t bytes; /* in this slot */
    char data[TM_SHM_RING_BYTES];
} __attribute__((aligned(64))) tm_shm_ring_slot;

typedef struct tm_shm_seg {
    uint64_t magic;
    _Atomic uint32_t alarm; /* a rank ends on purpose: everybody stops waiting */
    tm_shm_counter head;
    tm_shm_ring_slot ring[TM_SHM_RING_SLOTS];
    tm_shm_rank ranks[]; /* [size], then the data slots: [size][2][TM_SHM_SLOT_BYTES] */
} tm_shm_seg;

typedef struct tm_shm {
    tm_shm_seg *seg;
    size_t bytes;
    char *slots;
    uint32_t chunk; /* number of the last chunk this rank published */
    uint32_t ring;  /* number of the next ring slot (rank 0: to write, others: to read) */
    int spins; /* looks at a counter before sleeping; 0 when the host has fewer cores than ranks */
    const float **parts; /* [size] scratch */
    int64_t looked_ms;   /* when tm_shm_check last looked at the peers */
} tm_shm;

void tm_shm_identify(tm_shm_rank *me);
void tm_shm_counter_set(tm_shm_counter *c, uint32_t value);
/* Waits until counter >= target. peer is the rank that owns it, or -1 to watch every rank. timeout_ms 0:
 * none. UNAVAILABLE when a watched rank died, the alarm was raised or the time is over. */
tm_status tm_shm_wait(tm_comm *c, tm_shm_counter *counter, uint32_t target, int peer,
                      int64_t timeout_ms);
void tm_shm_raise_alarm(tm_comm *c);
/* Looks at the alarm each time and at the peers every TM_SHM_POLL_MS. */
tm_status tm_shm_check(tm_comm *c);

#endif
