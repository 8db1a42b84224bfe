/* Metrics of the process itself, under the names that Prometheus clients use everywhere. */
#ifndef TM_ROUTER_PROCESS_H
#define TM_ROUTER_PROCESS_H

#include "common/metrics.h"

typedef struct tm_process {
    tm_series *resident, *cpu, *fds;
    double cpu_seen_s;
    unsigned samples;
} tm_process;

/* Start time and version are set here, once. */
void tm_process_init(tm_process *p, tm_metrics *m);
/* Reads /proc; what cannot be read keeps its value. */
void tm_process_sample(tm_process *p);

#endif
