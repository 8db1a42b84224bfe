/* Starting programs. posix_spawn and not fork: the caller may have gRPC threads, and a forked copy of
 * gRPC's state is not usable. */
#include "cli/launch.h"

#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "cli/cmd.h"
#include "common/check.h"

extern char **environ;

tm_status tm_launch_program(char *out, size_t size, const char *name, tm_err *err)
{
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0)
        return TM_FAIL(err, TM_STATUS_IO, "cannot find the folder of this program: %s",
                       strerror(errno));
    self[n] = '\0';
    char *slash = strrchr(self, '/');
    if (slash)
        *slash = '\0';
    int w = snprintf(out, size, "%s/%s", self, name);
    if (w < 0 || (size_t)w >= size)
        return TM_FAIL(err, TM_STATUS_CONFIG, "path of %s is too long", name);
    if (access(out, X_OK) != 0)
        return TM_FAIL(err, TM_STATUS_NOT_FOUND, "%s is not beside this program (%s)", name, self);
    return TM_OK;
}

tm_status tm_launch_add(tm_launch *l, const char *arg, tm_err *err)
{
    if (l->argc >= TM_LAUNCH_ARGS_MAX)
        return TM_FAIL(err, TM_STATUS_TOO_LARGE, "more than %d arguments", TM_LAUNCH_ARGS_MAX);
    l->argv[l->argc++] = arg;
    l->argv[l->argc] = NULL;
    return TM_OK;
}

tm_status tm_launch_mpirun(tm_launch *l, int ranks, tm_err *err)
{
    static char count[16];
    snprintf(count, sizeof count, "%d", ranks);
    const char *words[] = {"mpirun",    "-n",   count,    "--oversubscribe",
                           "--bind-to", "none", "--quiet"};
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        tm_status st = tm_launch_add(l, words[i], err);
        if (st != TM_OK)
            return st;
    }
    if (geteuid() == 0) {
        /* Open MPI refuses root unless told twice; in a container root is the usual user. */
        setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 0);
        setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 0);
    }
    return TM_OK;
}

tm_status tm_launch_exec(const tm_launch *l, tm_err *err)
{
    execvp(l->argv[0], (char *const *)l->argv);
    return TM_FAIL(err, errno == ENOENT ? TM_STATUS_CONFIG : TM_STATUS_IO, "cannot start %s: %s%s",
                   l->argv[0], strerror(errno),
                   errno == ENOENT ? " (is the package installed?)" : "");
}

tm_status tm_launch_tied(tm_launch *l, tm_err *err)
{
    static const char *const words[] = {"setpriv", "--pdeathsig", "TERM", "--"};
    for (size_t i = 0; i < TM_ARRAY_LEN(words); i++)
        TM_TRY(tm_launch_add(l, words[i], err));
    return TM_OK;
}

tm_status tm_launch_spawn(const tm_launch *l, pid_t *pid, tm_err *err)
{
    posix_spawn_file_actions_t fa;
    posix_spawnattr_t at;
    sigset_t none;
    posix_spawn_file_actions_init(&fa);
    posix_spawn_file_actions_addopen(&fa, 0, "/dev/null", 0, 0);
    posix_spawn_file_actions_adddup2(&fa, 2, 1);
    posix_spawnattr_init(&at);
    sigemptyset(&none);
    posix_spawnattr_setsigmask(&at, &none);
    /* A process group of its own: Ctrl-C on the terminal reaches us, and we decide the order of stopping. */
    posix_spawnattr_setflags(&at, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETPGROUP);
    posix_spawnattr_setpgroup(&at, 0);
    int rc = posix_spawnp(pid, l->argv[0], &fa, &at, (char *const *)l->argv, environ);
    posix_spawn_file_actions_destroy(&fa);
    posix_spawnattr_destroy(&at);
    if (rc != 0)
        return TM_FAIL(err, rc == ENOENT ? TM_STATUS_CONFIG : TM_STATUS_IO, "cannot start %s: %s%s",
                       l->argv[0], strerror(rc),
                       rc == ENOENT ? " (is the package installed?)" : "");
    return TM_OK;
}

int tm_launch_free_port(int wanted)
{
    for (int try = 0; try < 2; try++) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0)
            return 0;
        struct sockaddr_in a = {.sin_family = AF_INET,
                                .sin_port = htons((uint16_t)(try == 0 ? wanted : 0))};
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t len = sizeof a;
        int one = 1;
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        bool ok = bind(fd, (struct sockaddr *)&a, sizeof a) == 0 && listen(fd, 1) == 0 &&
                  getsockname(fd, (struct sockaddr *)&a, &len) == 0;
        close(fd);
        if (ok)
            return ntohs(a.sin_port);
    }
    return 0;
}

int tm_cmd_free_port(int argc, char **argv)
{
    long wanted = 0;
    if (argc > 1) {
        char *end;
        wanted = strtol(argv[1], &end, 10);
        if (*end || wanted < 0 || wanted > 65535) {
            fprintf(stderr, "turbomesh free-port: '%s' is not a port\n", argv[1]);
            return 2;
        }
    }
    int port = tm_launch_free_port((int)wanted);
    if (port == 0)
        return 1;
    printf("%d\n", port);
    return 0;
}
