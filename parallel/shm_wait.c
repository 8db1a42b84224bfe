/* Waiting on a counter in shared memory: a short spin, then futex sleep, with a look at the peers' health
 * at every wake-up.
 *
 * The spin is bounded to about 20 microseconds and used only when the host has a core for every rank: on
 * an oversubscribed host it would take the core from the very rank it waits for. A dead peer is noticed
 * by pid and start time, because mpirun needs a second to end a job and a stopped rank is never reported. */
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <fcntl.h>

#include "common/clock.h"
#include "parallel/shm_impl.h"

/* Start time and state letter from /proc; false when the file cannot be read. */
static bool process_stat(int32_t pid, uint64_t *start, char *state)
{
    char path[64], text[1024];
    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, text, sizeof(text) - 1);
    close(fd);
    if (n <= 0)
        return false;
    text[n] = '\0';
    /* The command name may hold spaces and brackets: fields count from the last bracket. */
    char *p = strrchr(text, ')');
    if (!p || p[1] != ' ' || !p[2])
        return false;
    *state = p[2];
    p += 2;
    for (int field = 3; field < 22; field++) {
        p = strchr(p, ' ');
        if (!p)
            return false;
        p++;
    }
    *start = strtoull(p, NULL, 10);
    return true;
}

void tm_shm_identify(tm_shm_rank *me)
{
    char state = 0;
    me->pid = (int32_t)getpid();
    if (!process_stat(me->pid, &me->start_time, &state))
        me->start_time = 0;
    if (sched_getaffinity(0, sizeof(me->cpus), &me->cpus) != 0)
        CPU_ZERO(&me->cpus);
}

static bool rank_alive(const tm_shm_rank *r)
{
    if (kill(r->pid, 0) != 0 && errno == ESRCH)
        return false;
    uint64_t start = 0;
    char state = 0;
    if (r->start_time == 0 || !process_stat(r->pid, &start, &state))
        return true; /* no /proc: the pid has to do */
    return start == r->start_time && state != 'Z' && state != 'X';
}

static bool peers_alive(const tm_comm *c, int peer)
{
    const tm_shm *s = c->impl;
    for (int r = 0; r < c->size; r++)
        if (r != c->rank && (peer < 0 || peer == r) && !rank_alive(&s->seg->ranks[r]))
            return false;
    return true;
}

static void futex_wake_all(_Atomic uint32_t *word)
{
    syscall(SYS_futex, (uint32_t *)word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void futex_sleep(_Atomic uint32_t *word, uint32_t seen, int ms)
{
    struct timespec ts = {.tv_sec = 0, .tv_nsec = (long)ms * 1000000L};
    syscall(SYS_futex, (uint32_t *)word, FUTEX_WAIT, seen, &ts, NULL, 0);
}

void tm_shm_counter_set(tm_shm_counter *c, uint32_t value)
{
    atomic_store(&c->value, value);
    if (atomic_load(&c->sleepers) > 0)
        futex_wake_all(&c->value);
}

static bool reached(uint32_t value, uint32_t target)
{
    return (int32_t)(value - target) >= 0;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

tm_status tm_shm_wait(tm_comm *c, tm_shm_counter *counter, uint32_t target, int peer,
                      int64_t timeout_ms)
{
    tm_shm *s = c->impl;
    for (int i = 0; i <= s->spins; i++) {
        if (reached(atomic_load_explicit(&counter->value, memory_order_acquire), target))
            return TM_OK;
        relax();
    }
    int64_t begin = tm_clock_ms(), looked = begin;
    tm_status st = TM_OK;
    atomic_fetch_add(&counter->sleepers, 1);
    for (;;) {
        uint32_t seen = atomic_load(&counter->value);
        if (reached(seen, target))
            break;
        if (atomic_load(&s->seg->alarm)) {
            st = TM_STATUS_UNAVAILABLE;
            break;
        }
        futex_sleep(&counter->value, seen, TM_SHM_POLL_MS);
        int64_t now = tm_clock_ms();
        if (now - looked < TM_SHM_POLL_MS)
            continue;
        looked = now;
        if (reached(atomic_load(&counter->value), target))
            break;
        if (!peers_alive(c, peer) || (timeout_ms > 0 && now - begin >= timeout_ms)) {
            /* Those that wait for this rank must not first run into their own time limit. */
            tm_shm_raise_alarm(c);
            st = TM_STATUS_UNAVAILABLE;
            break;
        }
    }
    atomic_fetch_sub(&counter->sleepers, 1);
    return st;
}

tm_status tm_shm_check(tm_comm *c)
{
    tm_shm *s = c->impl;
    if (atomic_load_explicit(&s->seg->alarm, memory_order_relaxed))
        return TM_STATUS_UNAVAILABLE;
    int64_t now = tm_clock_ms();
    if (now - s->looked_ms < TM_SHM_POLL_MS)
        return TM_OK;
    s->looked_ms = now;
    if (peers_alive(c, -1))
        return TM_OK;
    tm_shm_raise_alarm(c);
    return TM_STATUS_UNAVAILABLE;
}

void tm_shm_raise_alarm(tm_comm *c)
{
    tm_shm *s = c->impl;
    atomic_store(&s->seg->alarm, 1);
    futex_wake_all(&s->seg->head.value);
    for (int r = 0; r < c->size; r++) {
        futex_wake_all(&s->seg->ranks[r].arrived.value);
        futex_wake_all(&s->seg->ranks[r].eaten.value);
    }
}
