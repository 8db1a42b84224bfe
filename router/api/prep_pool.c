/* The threads behind long prompts.
 *
 * Work goes out through one list and comes back through another; an eventfd wakes the loop. There is one
 * mutex and it is held only to link and unlink. */
#include <errno.h>
#include <event2/event.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common/check.h"
#include "router/api/prep.h"

typedef struct prep_list {
    tm_prep *first, *last;
} prep_list;

struct tm_prep_pool {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    prep_list todo, finished;
    int queued, queue_max; /* queued: waiting or being worked on */
    bool stopping;
    int fd;
    struct event *ev;
    int thread_count;
    pthread_t threads[];
};

static void push(prep_list *l, tm_prep *p)
{
    p->next = NULL;
    if (l->last)
        l->last->next = p;
    else
        l->first = p;
    l->last = p;
}

static tm_prep *pop(prep_list *l)
{
    tm_prep *p = l->first;
    if (p)
        l->first = p->next;
    if (!l->first)
        l->last = NULL;
    return p;
}

static void *thread_main(void *arg)
{
    tm_prep_pool *pool = arg;
    const uint64_t one = 1;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->todo.first && !pool->stopping)
            pthread_cond_wait(&pool->wake, &pool->lock);
        if (pool->stopping)
            break;
        tm_prep *p = pop(&pool->todo);
        pthread_mutex_unlock(&pool->lock);
        tm_prep_work(p);
        pthread_mutex_lock(&pool->lock);
        push(&pool->finished, p);
        /* A full counter already means "wake up": nothing is lost when this fails. */
        if (write(pool->fd, &one, sizeof one) < 0)
            TM_ASSERT(errno == EAGAIN);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static void on_finished(evutil_socket_t fd, short what, void *arg)
{
    (void)what;
    tm_prep_pool *pool = arg;
    uint64_t count;
    if (read(fd, &count, sizeof count) < 0)
        TM_ASSERT(errno == EAGAIN || errno == EINTR);
    pthread_mutex_lock(&pool->lock);
    tm_prep *p = pool->finished.first;
    pool->finished = (prep_list){0};
    for (tm_prep *q = p; q; q = q->next)
        pool->queued--;
    pthread_mutex_unlock(&pool->lock);
    while (p) {
        tm_prep *next = p->next;
        p->done(p);
        p = next;
    }
}

static tm_status start(tm_prep_pool *pool, struct event_base *base, int threads, tm_err *err)
{
    pool->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (pool->fd < 0)
        return TM_FAIL(err, TM_STATUS_IO, "eventfd: %m");
    pool->ev = event_new(base, pool->fd, EV_READ | EV_PERSIST, on_finished, pool);
    if (!pool->ev || event_add(pool->ev, NULL) != 0)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    for (; pool->thread_count < threads; pool->thread_count++)
        if (pthread_create(&pool->threads[pool->thread_count], NULL, thread_main, pool) != 0)
            return TM_FAIL(err, TM_STATUS_NO_MEMORY, "cannot start a thread");
    return TM_OK;
}

tm_status tm_prep_pool_create(tm_prep_pool **out, struct event_base *base, int threads,
                              int queue_max, tm_err *err)
{
    tm_prep_pool *pool = calloc(1, sizeof *pool + (size_t)threads * sizeof(pthread_t));
    if (!pool)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->queue_max = queue_max;
    pool->fd = -1;
    tm_status st = start(pool, base, threads, err);
    if (st != TM_OK) {
        tm_prep_pool_destroy(pool);
        return st;
    }
    *out = pool;
    return TM_OK;
}

static void drop(prep_list *l)
{
    for (tm_prep *p; (p = pop(l));)
        tm_prep_destroy(p);
}

void tm_prep_pool_destroy(tm_prep_pool *pool)
{
    if (!pool)
        return;
    pthread_mutex_lock(&pool->lock);
    pool->stopping = true;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->thread_count; i++)
        pthread_join(pool->threads[i], NULL);
    drop(&pool->todo);
    drop(&pool->finished);
    if (pool->ev)
        event_free(pool->ev);
    if (pool->fd >= 0)
        close(pool->fd);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

bool tm_prep_pool_submit(tm_prep_pool *pool, tm_prep *p)
{
    pthread_mutex_lock(&pool->lock);
    bool room = pool->queued < pool->queue_max;
    if (room) {
        pool->queued++;
        push(&pool->todo, p);
        pthread_cond_signal(&pool->wake);
    }
    pthread_mutex_unlock(&pool->lock);
    return room;
}
