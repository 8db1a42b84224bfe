/* A ring of jobs, one thread, one condition. */
#include "router/pool/jobs.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

typedef struct job {
    void (*run)(void *arg);
    void *arg;
} job;

struct tm_jobs {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t more;
    bool stop;
    int max, head, count;
    job ring[];
};

static void *work(void *arg)
{
    tm_jobs *j = arg;
    pthread_mutex_lock(&j->lock);
    for (;;) {
        while (j->count == 0 && !j->stop)
            pthread_cond_wait(&j->more, &j->lock);
        if (j->count == 0)
            break;
        job next = j->ring[j->head];
        j->head = (j->head + 1) % j->max;
        j->count--;
        pthread_mutex_unlock(&j->lock);
        next.run(next.arg);
        pthread_mutex_lock(&j->lock);
    }
    pthread_mutex_unlock(&j->lock);
    return NULL;
}

tm_status tm_jobs_create(tm_jobs **out, int max, tm_err *err)
{
    tm_jobs *j = calloc(1, sizeof(*j) + (size_t)max * sizeof(job));
    if (j == NULL)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for a helper thread");
    j->max = max;
    pthread_mutex_init(&j->lock, NULL);
    pthread_cond_init(&j->more, NULL);
    if (pthread_create(&j->thread, NULL, work, j) != 0) {
        pthread_cond_destroy(&j->more);
        pthread_mutex_destroy(&j->lock);
        free(j);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "a helper thread could not be started");
    }
    *out = j;
    return TM_OK;
}

void tm_jobs_destroy(tm_jobs *j)
{
    if (j == NULL)
        return;
    pthread_mutex_lock(&j->lock);
    j->stop = true;
    pthread_cond_signal(&j->more);
    pthread_mutex_unlock(&j->lock);
    pthread_join(j->thread, NULL);
    pthread_cond_destroy(&j->more);
    pthread_mutex_destroy(&j->lock);
    free(j);
}

tm_status tm_jobs_add(tm_jobs *j, void (*run)(void *arg), void *arg)
{
    pthread_mutex_lock(&j->lock);
    bool full = j->count == j->max;
    if (!full) {
        j->ring[(j->head + j->count++) % j->max] = (job){run, arg};
        pthread_cond_signal(&j->more);
    }
    pthread_mutex_unlock(&j->lock);
    return full ? TM_STATUS_BUSY : TM_OK;
}
