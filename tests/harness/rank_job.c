/* See rank_job.h. Leaks are not looked for in the ranks: MPI itself has some. */
#include "tests/harness/rank_job.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

int rank_job(const char *mpirun, const char *program, int ranks, int limit_s, const char *format,
             ...)
{
    char exe[512], args[2400], cmd[3600];
    const char *wish = getenv("TM_MPIRUN");
    va_list ap;
    ssize_t len = readlink("/proc/self/exe", exe, sizeof(exe) - 1);
    assert_in_range(len, 1, sizeof(exe) - 100);
    exe[len] = '\0';
    if (program)
        snprintf(strrchr(exe, '/'), 100, "/%s", program);
    va_start(ap, format);
    int n = vsnprintf(args, sizeof(args), format, ap);
    va_end(ap);
    assert_in_range(n, 0, sizeof(args) - 1);
    n = snprintf(cmd, sizeof(cmd),
                 "ASAN_OPTIONS=detect_leaks=0 timeout -k 5 %d %s -n %d --oversubscribe "
                 "--allow-run-as-root --bind-to none %s %s 2>&1",
                 limit_s, wish ? wish : mpirun, ranks, exe, args);
    assert_in_range(n, 0, sizeof(cmd) - 1);
    fflush(stdout);
    int rc = system(cmd);
    assert_true(WIFEXITED(rc));
    return WEXITSTATUS(rc);
}
