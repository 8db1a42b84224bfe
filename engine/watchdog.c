/* One condition variable with a deadline.
 *
 * begin wakes the thread only when it would sleep past the new step's deadline. Otherwise it wakes by itself, at
 * most once per limit, sees that another step is running and waits for that one's deadline. So a busy engine pays for
 * a lock per step and an idle one for nothing. */
#include "engine/watchdog.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "common/check.h"
#include "common/clock.h"

#define HISTORY     64
#define KNOWN_AFTER 8
#define FACTOR      20
#define LEAST_MS    5000
#define UNKNOWN_MS  (10 * 60 * 1000)

typedef struct pace {
    bool known;
    double step_ms, token_ms; /* medians */
} pace;

/* The medians are taken again after so many steps. */
#define PACE_EVERY 16

struct tm_watchdog {
    tm_watchdog_opts opts;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    pthread_t thread;
    bool stop, busy;
    int64_t wakes_ms; /* when the thread wakes by itself */
    int64_t begun_ms, limit_ms;
    int tokens;
    tm_watchdog_step history[HISTORY];
    int known; /* steps seen */
    pace pace;
};

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *v, int n)
{
    qsort(v, (size_t)n, sizeof(*v), compare_doubles);
    return v[n / 2];
}

static pace pace_of(const tm_watchdog_step *steps, int n)
{
    double step[HISTORY], token[HISTORY];
    n = TM_MIN(n, HISTORY);
    if (n < KNOWN_AFTER)
        return (pace){0};
    for (int i = 0; i < n; i++) {
        step[i] = (double)steps[i].ms;
        token[i] = (double)steps[i].ms / TM_MAX(steps[i].tokens, 1);
    }
    return (pace){true, median(step, n), median(token, n)};
}

static int64_t limit_of(const pace *p, int tokens)
{
    if (!p->known)
        return UNKNOWN_MS;
    double limit = FACTOR * TM_MAX(p->step_ms, p->token_ms * tokens);
    return limit > LEAST_MS ? (int64_t)limit : LEAST_MS;
}

int64_t tm_watchdog_limit_ms(const tm_watchdog_step *steps, int n, int tokens)
{
    pace p = pace_of(steps, n);
    return limit_of(&p, tokens);
}

static void *watch(void *arg)
{
    tm_watchdog *w = arg;
    pthread_mutex_lock(&w->lock);
    while (!w->stop) {
        if (!w->busy) {
            w->wakes_ms = INT64_MAX;
            pthread_cond_wait(&w->cond, &w->lock);
            continue;
        }
        int64_t deadline = w->begun_ms + w->limit_ms, now = tm_clock_ms();
        if (now >= deadline) {
            int64_t after = now - w->begun_ms;
            pthread_mutex_unlock(&w->lock);
            w->opts.stalled(w->opts.user, after);
            return NULL;
        }
        w->wakes_ms = deadline;
        struct timespec ts = {.tv_sec = deadline / 1000, .tv_nsec = deadline % 1000 * 1000000};
        pthread_cond_timedwait(&w->cond, &w->lock, &ts);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

tm_status tm_watchdog_create(tm_watchdog **out, const tm_watchdog_opts *opts, tm_err *err)
{
    tm_watchdog *w = calloc(1, sizeof(*w));
    if (!w)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for the watchdog");
    w->opts = *opts;
    pthread_condattr_t attr;
    if (pthread_condattr_init(&attr) != 0)
        goto fail;
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    int bad = pthread_mutex_init(&w->lock, NULL) | pthread_cond_init(&w->cond, &attr);
    pthread_condattr_destroy(&attr);
    if (bad || pthread_create(&w->thread, NULL, watch, w) != 0)
        goto fail;
    *out = w;
    return TM_OK;

fail:
    free(w);
    return TM_FAIL(err, TM_STATUS_NO_MEMORY, "cannot start the watchdog thread");
}

void tm_watchdog_destroy(tm_watchdog *w)
{
    if (!w)
        return;
    pthread_mutex_lock(&w->lock);
    w->stop = true;
    pthread_cond_signal(&w->cond);
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    pthread_cond_destroy(&w->cond);
    pthread_mutex_destroy(&w->lock);
    free(w);
}

void tm_watchdog_begin(tm_watchdog *w, int tokens)
{
    pthread_mutex_lock(&w->lock);
    w->busy = true;
    w->begun_ms = tm_clock_ms();
    w->limit_ms = w->opts.fixed_ms > 0 ? w->opts.fixed_ms : limit_of(&w->pace, tokens);
    w->tokens = tokens;
    if (w->begun_ms + w->limit_ms < w->wakes_ms)
        pthread_cond_signal(&w->cond);
    pthread_mutex_unlock(&w->lock);
}

void tm_watchdog_end(tm_watchdog *w)
{
    pthread_mutex_lock(&w->lock);
    w->busy = false;
    w->history[w->known++ % HISTORY] = (tm_watchdog_step){tm_clock_ms() - w->begun_ms, w->tokens};
    if (w->known % PACE_EVERY == 0 || w->known == KNOWN_AFTER)
        w->pace = pace_of(w->history, w->known);
    if (w->known == 2 * HISTORY) /* the ring goes on where it is; the number stays bounded */
        w->known = HISTORY;
    pthread_mutex_unlock(&w->lock);
}
