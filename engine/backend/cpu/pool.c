/* The threads of a CPU device: a parallel loop whose pieces are claimed, not dealt out.
 *
 * A decode step is some thirty loops of 10 to 400 us in a row. With pieces dealt out (OpenMP's way) every loop
 * waits for its slowest thread, and on a shared host that is often one that does not run at all. Here each
 * thread starts with a share of its own (the same rows of the same weights each time) and then takes from
 * the others' shares; a thread that is late finds the loop closed and is not waited for.
 *
 * One word, the gate, holds the state: the number of the loop, whether it may be joined, and how many
 * workers are inside. A worker enters by adding itself to an open gate, so nothing of a loop is touched by a
 * worker that is not counted. Idle workers watch the gate for a short while (the next loop of the step is
 * microseconds away), then let others run, then sleep: an idle device takes no time. */
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/check.h"
#include "common/clock.h"
#include "engine/backend/cpu/cpu.h"

enum {
    INSIDE = 0xfff, /* workers in the loop */
    STOP = 1 << 13,
    ASLEEP = 1 << 14, /* the caller sleeps until nobody is inside */
    OPEN = 1 << 15,
    NUMBER_SHIFT = 16,
    WAKE_WORKERS = 1, /* futex bit sets */
    WAKE_CALLER = 2,
    WATCH_NS = 50 * 1000, /* a few times the longest pause inside a step */
    YIELD_NS = 200 * 1000 /* pauses between the steps of a busy engine */
};

/* Units next..end - 1 of one thread; any thread claims by adding to next. */
typedef struct share {
    _Alignas(64) atomic_int next;
    int end;
} share;

typedef struct worker {
    tm_cpu_pool *pool;
    int thread; /* from 1 */
    pthread_t id;
} worker;

struct tm_cpu_pool {
    _Alignas(64) _Atomic uint32_t gate;
    _Alignas(64) _Atomic uint32_t sleepers; /* workers in or on the way to futex sleep */
    /* Written by the caller while the gate is closed and nobody is inside. */
    _Alignas(64) tm_cpu_task_fn fn;
    void *arg;
    int threads;
    int64_t watch_ns, yield_ns;
    int started; /* workers to join */
    worker *workers;
    share *shares; /* [threads] */
};

static void futex_wait(_Atomic uint32_t *word, uint32_t value, uint32_t bits)
{
    (void)syscall(SYS_futex, word, FUTEX_WAIT_BITSET_PRIVATE, value, NULL, NULL, bits);
}

static void futex_wake(_Atomic uint32_t *word, uint32_t bits)
{
    (void)syscall(SYS_futex, word, FUTEX_WAKE_BITSET_PRIVATE, INT_MAX, NULL, NULL, bits);
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* The thread's own share, then the others'. */
static void take_units(tm_cpu_pool *p, int thread)
{
    for (int i = 0; i < p->threads; i++) {
        share *s = &p->shares[(thread + i) % p->threads];
        for (;;) {
            int unit = atomic_fetch_add_explicit(&s->next, 1, memory_order_relaxed);
            if (unit >= s->end)
                break;
            p->fn(p->arg, thread, unit);
        }
    }
}

static bool concerns(uint32_t gate, uint32_t seen)
{
    return (gate & STOP) || ((gate & OPEN) && gate >> NUMBER_SHIFT != seen);
}

/* The gate when there is a loop that this worker has not seen, or when the pool ends. */
static uint32_t await_loop(tm_cpu_pool *p, uint32_t seen)
{
    int64_t begun = tm_clock_ns();
    for (;;) {
        for (int i = 0; i < 64; i++) {
            uint32_t gate = atomic_load_explicit(&p->gate, memory_order_acquire);
            if (concerns(gate, seen))
                return gate;
            relax();
        }
        int64_t waited = tm_clock_ns() - begun;
        if (waited < p->watch_ns)
            continue;
        if (waited < p->yield_ns) {
            sched_yield();
            continue;
        }
        /* Partner: tm_cpu_run opens the gate, then looks for sleepers. One of the two sees the other. */
        atomic_fetch_add(&p->sleepers, 1);
        uint32_t gate = atomic_load(&p->gate);
        if (!concerns(gate, seen))
            futex_wait(&p->gate, gate, WAKE_WORKERS);
        atomic_fetch_sub(&p->sleepers, 1);
        begun = tm_clock_ns(); /* when late for this loop, there for the next */
    }
}

static void *work(void *arg)
{
    worker *w = arg;
    tm_cpu_pool *p = w->pool;
    uint32_t seen = 0;
    for (;;) {
        uint32_t gate = await_loop(p, seen);
        if (gate & STOP)
            return NULL;
        /* Partners: the caller's writes before it opened the gate; its wait for those inside. */
        if (!atomic_compare_exchange_weak_explicit(&p->gate, &gate, gate + 1, memory_order_acquire,
                                                   memory_order_relaxed))
            continue;
        seen = gate >> NUMBER_SHIFT;
        take_units(p, w->thread);
        gate = atomic_fetch_sub_explicit(&p->gate, 1, memory_order_acq_rel);
        if ((gate & ASLEEP) && (gate & INSIDE) == 1)
            futex_wake(&p->gate, WAKE_CALLER);
    }
}

static tm_status start_workers(tm_cpu_pool *p, tm_err *err)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* signals are for the program's own threads */
    int failed = 0;
    for (int i = 1; i < p->threads && !failed; i++) {
        worker *w = &p->workers[i - 1];
        *w = (worker){.pool = p, .thread = i};
        failed = pthread_create(&w->id, NULL, work, w);
        if (!failed) {
            pthread_setname_np(w->id, "tm-cpu");
            p->started++;
        }
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return failed ? TM_FAIL(err, TM_STATUS_NO_MEMORY, "cannot start %d compute threads", p->threads)
                  : TM_OK;
}

tm_status tm_cpu_pool_create(tm_cpu_pool **out, int threads, bool crowded, tm_err *err)
{
    tm_cpu_pool *p = aligned_alloc(64, sizeof(*p));
    if (!p)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for compute threads");
    *p = (tm_cpu_pool){
        .threads = threads, .watch_ns = crowded ? 0 : WATCH_NS, .yield_ns = crowded ? 0 : YIELD_NS};
    p->workers = calloc((size_t)threads, sizeof(*p->workers));
    p->shares = aligned_alloc(64, (size_t)threads * sizeof(*p->shares));
    tm_status st = p->workers && p->shares ? start_workers(p, err)
                                           : TM_FAIL(err, TM_STATUS_NO_MEMORY,
                                                     "no memory for %d compute threads", threads);
    if (st != TM_OK) {
        tm_cpu_pool_destroy(p);
        return st;
    }
    *out = p;
    return TM_OK;
}

void tm_cpu_pool_destroy(tm_cpu_pool *p)
{
    if (!p)
        return;
    atomic_store(&p->gate, STOP);
    futex_wake(&p->gate, WAKE_WORKERS);
    for (int i = 0; i < p->started; i++)
        pthread_join(p->workers[i].id, NULL);
    free(p->workers);
    free(p->shares);
    free(p);
}

/* Closes the gate and waits for those inside: first watching, then asleep, because a worker that was
 * interrupted may need this very processor. */
static void close_gate(tm_cpu_pool *p)
{
    uint32_t gate = atomic_fetch_and_explicit(&p->gate, ~(uint32_t)OPEN, memory_order_acquire);
    int64_t begun = 0;
    for (int i = 1; gate & INSIDE; i++) {
        relax();
        gate = atomic_load_explicit(&p->gate, memory_order_acquire);
        if (i % 64 != 0 || !(gate & INSIDE))
            continue;
        int64_t now = tm_clock_ns();
        begun = begun ? begun : now;
        if (now - begun < p->watch_ns)
            continue;
        if (atomic_compare_exchange_strong(&p->gate, &gate, gate | ASLEEP))
            futex_wait(&p->gate, gate | ASLEEP, WAKE_CALLER);
        gate = atomic_load_explicit(&p->gate, memory_order_acquire);
    }
}

void tm_cpu_run(tm_device *dev, int units, tm_cpu_task_fn fn, void *arg)
{
    tm_cpu_pool *p = dev->pool;
    if (!p || units <= 1) {
        for (int i = 0; i < units; i++)
            fn(arg, 0, i);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    for (int i = 0; i < p->threads; i++) {
        int64_t from = (int64_t)units * i / p->threads, end = (int64_t)units * (i + 1) / p->threads;
        atomic_store_explicit(&p->shares[i].next, (int)from, memory_order_relaxed);
        p->shares[i].end = (int)end;
    }
    uint32_t number = (atomic_load_explicit(&p->gate, memory_order_relaxed) >> NUMBER_SHIFT) + 1;
    number &= UINT32_MAX >> NUMBER_SHIFT;
    atomic_store(&p->gate, number << NUMBER_SHIFT | OPEN);
    if (atomic_load(&p->sleepers) > 0)
        futex_wake(&p->gate, WAKE_WORKERS);
    take_units(p, 0);
    close_gate(p);
}
