/* How many threads a rank takes when nobody says.
 *
 * The launcher may have bound each rank to cores of its own (mpirun's default for few ranks); then this
 * process may use fewer processors than its parent, the launcher, and its mask is already the share.
 * Otherwise all ranks of the host see the same processors and divide them.
 * A cgroup CPU quota counts as that many processors: more threads would only be throttled. */
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "common/check.h"
#include "engine/backend/cpu/cpu.h"

/* What the usual launchers call the number of ranks on this host. */
static const char *const g_local_size_env[] = {"OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS",
                                               "PMI_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"};

int tm_cpu_local_ranks(void)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(g_local_size_env); i++) {
        const char *s = getenv(g_local_size_env[i]);
        if (!s)
            continue;
        char *end;
        long n = strtol(s, &end, 10);
        if (end != s && n >= 1 && n <= 4096)
            return (int)n;
    }
    return 1;
}

/* Processors' worth of time that cgroup v2 grants, rounded up; the most we use when unlimited. */
static int quota_cpus(void)
{
    int cpus = TM_CPU_THREADS_MAX;
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "re");
    if (!f)
        return cpus;
    long long quota, period;
    if (fscanf(f, "%lld %lld", &quota, &period) == 2 && quota > 0 && period > 0) {
        long long n = (quota + period - 1) / period;
        cpus = n < TM_CPU_THREADS_MAX ? (int)n : TM_CPU_THREADS_MAX;
    }
    fclose(f);
    return cpus;
}

int tm_cpu_default_threads(int local_ranks)
{
    cpu_set_t mine, parent;
    if (sched_getaffinity(0, sizeof mine, &mine) != 0)
        return 1;
    bool bound = sched_getaffinity(getppid(), sizeof parent, &parent) == 0 &&
                 CPU_COUNT(&mine) < CPU_COUNT(&parent);
    int n = CPU_COUNT(&mine), quota = quota_cpus();
    if (!bound)
        n = TM_MIN(n, quota) / local_ranks;
    else
        n = TM_MIN(n, quota / local_ranks);
    return TM_MAX(1, TM_MIN(n, TM_CPU_THREADS_MAX));
}
