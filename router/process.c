/* See process.h. */
#include "router/process.h"

#include <dirent.h>
#include <stdio.h>
#include <sys/resource.h>
#include <unistd.h>

#include "common/clock.h"

#define FDS_EVERY 15 /* samples: listing thousands of descriptors takes a millisecond */

static const tm_metric_desc g_resident = {
    .name = "process_resident_memory_bytes", .help = "Resident memory.", .kind = TM_METRIC_GAUGE};
static const tm_metric_desc g_cpu = {.name = "process_cpu_seconds_total",
                                     .help = "User and system time.",
                                     .kind = TM_METRIC_COUNTER};
static const tm_metric_desc g_fds = {
    .name = "process_open_fds", .help = "Open descriptors.", .kind = TM_METRIC_GAUGE};
static const tm_metric_desc g_start = {.name = "process_start_time_seconds",
                                       .help = "Wall time of the start.",
                                       .kind = TM_METRIC_GAUGE};
static const tm_metric_desc g_build = {.name = "turbomesh_build_info",
                                       .help = "1, with the version as a label.",
                                       .kind = TM_METRIC_GAUGE,
                                       .labels = {"version"}};

void tm_process_init(tm_process *p, tm_metrics *m)
{
    *p = (tm_process){.resident = tm_metrics_series(m, &g_resident, NULL),
                      .cpu = tm_metrics_series(m, &g_cpu, NULL),
                      .fds = tm_metrics_series(m, &g_fds, NULL)};
    tm_series_set(tm_metrics_series(m, &g_start, NULL), (double)tm_clock_wall_ms() / 1000);
    tm_series_set(tm_metrics_series(m, &g_build, (const char *const[]){TM_VERSION}), 1);
    tm_process_sample(p);
}

static void sample_memory(const tm_process *p)
{
    long size, resident;
    FILE *f = fopen("/proc/self/statm", "re");
    if (!f)
        return;
    if (fscanf(f, "%ld %ld", &size, &resident) == 2)
        tm_series_set(p->resident, (double)resident * (double)sysconf(_SC_PAGESIZE));
    fclose(f);
}

static void sample_fds(const tm_process *p)
{
    int n = -3; /* ".", ".." and the descriptor of the listing itself */
    DIR *d = opendir("/proc/self/fd");
    if (!d)
        return;
    while (readdir(d))
        n++;
    closedir(d);
    tm_series_set(p->fds, n);
}

static double seconds(struct timeval t)
{
    return (double)t.tv_sec + (double)t.tv_usec / 1e6;
}

void tm_process_sample(tm_process *p)
{
    struct rusage u;
    sample_memory(p);
    if (p->samples++ % FDS_EVERY == 0)
        sample_fds(p);
    if (getrusage(RUSAGE_SELF, &u) != 0)
        return;
    double used = seconds(u.ru_utime) + seconds(u.ru_stime);
    tm_series_add(p->cpu, used - p->cpu_seen_s);
    p->cpu_seen_s = used;
}
