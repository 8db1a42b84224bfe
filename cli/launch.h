/* Starting TurboMesh's own programs: where they are, how mpirun is called, free ports, children. */
#ifndef TM_CLI_LAUNCH_H
#define TM_CLI_LAUNCH_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#include "common/status.h"

#define TM_LAUNCH_ARGS_MAX 160

/* An argument vector under construction; strings are borrowed. */
typedef struct tm_launch {
    const char *argv[TM_LAUNCH_ARGS_MAX + 1];
    int argc;
} tm_launch;

/* Path of a program beside this one ("turbomesh-worker") into out. */
tm_status tm_launch_program(char *out, size_t size, const char *name, tm_err *err);
tm_status tm_launch_add(tm_launch *l, const char *arg, tm_err *err);
/* For ranks > 1: the mpirun words that start `ranks` processes of one group on this host. */
tm_status tm_launch_mpirun(tm_launch *l, int ranks, tm_err *err);
/* First of all words, when the child shall get SIGTERM however its parent ends: setpriv of util-linux sets the
 * death signal, which posix_spawn cannot. The caller's thread is the parent and must live as long. */
tm_status tm_launch_tied(tm_launch *l, tm_err *err);
/* Replaces this process; returns only on failure. */
tm_status tm_launch_exec(const tm_launch *l, tm_err *err);
/* Starts a child in a process group of its own. Its
 * stdout goes to our stderr, so that our stdout stays data only. */
tm_status tm_launch_spawn(const tm_launch *l, pid_t *pid, tm_err *err);
/* A free port on the loopback address: `wanted` when it is free, else one from the kernel; 0 = none. */
int tm_launch_free_port(int wanted);

#endif
