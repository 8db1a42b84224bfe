/* One helper thread with a bounded queue, for what blocks: fetching and parsing a model's text files,
 * joining the threads of a closed connection. */
#ifndef TM_ROUTER_POOL_JOBS_H
#define TM_ROUTER_POOL_JOBS_H

#include "common/status.h"

typedef struct tm_jobs tm_jobs;

tm_status tm_jobs_create(tm_jobs **out, int max, tm_err *err);
/* Runs what is queued, then joins. */
void tm_jobs_destroy(tm_jobs *j);
/* BUSY: the queue is full. */
tm_status tm_jobs_add(tm_jobs *j, void (*run)(void *arg), void *arg);

#endif
