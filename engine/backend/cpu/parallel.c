/* Fork and join, on OpenMP: the only file that knows it.
 *
 * libgomp keeps its threads between regions and lets them spin for a few milliseconds before they sleep,
 * which is what a decode step wants (about 50 regions of 20 to 400 us in a row) and what an idle server
 * wants (no spinning). The team size stays the same from call to call, because libgomp rebuilds its team
 * when it changes. Without OpenMP a region runs on the calling thread alone. */
#include "engine/backend/cpu/cpu.h"

#ifdef _OPENMP
#include <omp.h>

void tm_cpu_run(int threads, tm_cpu_task_fn fn, void *arg)
{
    if (threads <= 1) {
        fn(arg, 0, 1);
        return;
    }
#pragma omp parallel num_threads(threads)
    fn(arg, omp_get_thread_num(), omp_get_num_threads());
}

#else

void tm_cpu_run(int threads, tm_cpu_task_fn fn, void *arg)
{
    (void)threads;
    fn(arg, 0, 1);
}

#endif
