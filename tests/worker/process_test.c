/* The worker as a process: the banner, signals, exit codes, the etcd key. Runs tm-fake-worker (same service,
 * same drain) and, where they are built, turbomesh-worker alone and under mpirun with two ranks. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/file.h"
#include "common/json.h"
#include "common/log.h"
#include "net/etcd/etcd.h"
#include "tests/worker/fake_engine.h"
#include "tests/worker/router_end.h"

extern char **environ;

#define START_MS 90000 /* a real model on a busy machine */

typedef struct child {
    pid_t pid;
    bool ended;
    int status; /* once ended */
    int err_fd;
    char text[65536]; /* of stderr so far */
    size_t len;
    char address[64];
    tm_rpc_channel *channel;
} child;

static void read_some(child *c, int timeout_ms)
{
    struct pollfd p = {c->err_fd, POLLIN, 0};
    if (poll(&p, 1, timeout_ms) <= 0)
        return;
    size_t room = sizeof(c->text) - 1 - c->len;
    ssize_t n = room ? read(c->err_fd, c->text + c->len, room) : 0;
    if (n > 0)
        c->len += (size_t)n;
    c->text[c->len] = '\0';
}

static bool has_ended(child *c)
{
    c->ended = c->ended || waitpid(c->pid, &c->status, WNOHANG) == c->pid;
    return c->ended;
}

static bool wait_text(child *c, const char *what, int64_t ms)
{
    int64_t until = tm_clock_ms() + ms;
    while (!strstr(c->text, what) && tm_clock_ms() < until && !has_ended(c))
        read_some(c, 50);
    return strstr(c->text, what) != NULL;
}

static child *spawn(const char *const *argv)
{
    child *c = calloc(1, sizeof(*c));
    int fds[2];
    assert_non_null(c);
    assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
    posix_spawn_file_actions_t fa;
    posix_spawn_file_actions_init(&fa);
    posix_spawn_file_actions_adddup2(&fa, fds[1], 2);
    posix_spawn_file_actions_adddup2(&fa, fds[1], 1);
    assert_int_equal(posix_spawnp(&c->pid, argv[0], &fa, NULL, (char *const *)argv, environ), 0);
    posix_spawn_file_actions_destroy(&fa);
    close(fds[1]);
    c->err_fd = fds[0];
    return c;
}

/* Starts a worker and connects to the address of its banner. */
static child *start_worker(const char *const *argv)
{
    child *c = spawn(argv);
    if (!wait_text(c, "  KV ", START_MS))
        fail_msg("no banner from %s:\n%s", argv[0], c->text);
    const char *at = strstr(c->text, " on 127.0.0.1:");
    assert_non_null(at);
    snprintf(c->address, sizeof(c->address), "%.*s", (int)strcspn(at + 4, ","), at + 4);
    tm_err err = TM_ERR_INIT;
    assert_int_equal(tm_rpc_channel_create(&c->channel, c->address, &err), TM_OK);
    return c;
}

/* The exit code, -signal when killed, -1000 when it did not end. */
static int wait_exit(child *c)
{
    int64_t until = tm_clock_ms() + 60000;
    while (!has_ended(c) && tm_clock_ms() < until)
        read_some(c, 10);
    if (!c->ended) {
        kill(c->pid, SIGKILL);
        waitpid(c->pid, &c->status, 0);
        return -1000;
    }
    return WIFEXITED(c->status) ? WEXITSTATUS(c->status) : -WTERMSIG(c->status);
}

static void end_child(child *c)
{
    tm_rpc_channel_destroy(c->channel);
    close(c->err_fd);
    free(c);
}

static bool program(char *out, size_t size, const char *name)
{
    const char *bin = getenv("TM_BIN");
    return tm_path_join(out, size, bin ? bin : "build/bin", name) && access(out, X_OK) == 0;
}

/* ---- the fake worker ---- */

static child *fake(const char *drain, const char *delay, const char *etcd, const char *group)
{
    static char path[4096];
    if (!program(path, sizeof(path), "tm-fake-worker"))
        fail_msg("tm-fake-worker is not built (TM_BIN)");
    const char *argv[] = {path,
                          MODEL,
                          "--drain-timeout",
                          drain,
                          "--step-delay",
                          delay,
                          "--group",
                          group,
                          etcd ? "--etcd" : NULL,
                          etcd,
                          NULL};
    return start_worker(argv);
}

static void test_drain_lets_requests_finish(void **state)
{
    (void)state;
    child *c = fake("30s", "10ms", NULL, "t");
    router *r = attach(c->channel);
    send_plain(r, 1, 60);
    assert_true(wait_router(r, has_events, 5));
    kill(c->pid, SIGTERM);
    assert_true(wait_router(r, last_load_drains, 0));
    send_plain(r, 2, 60);
    assert_true(wait_router(r, is_closed, 0));
    told one = tell(r, 1), two = tell(r, 2);
    assert_int_equal(one.finish, FINISH(LENGTH));
    assert_int_equal(one.tokens, 60);
    assert_int_equal(two.rejects, 1);
    assert_int_equal(two.reject, REJECT(DRAINING));
    assert_int_equal(wait_exit(c), 0);
    detach(r);
    end_child(c);
}

static void expect_hand_back(child *c, router *r)
{
    assert_true(wait_router(r, is_closed, 0));
    told t = tell(r, 1);
    assert_int_equal(t.finishes, 1);
    assert_int_equal(t.finish, FINISH(HANDBACK));
    assert_false(t.broken);
    for (int i = 0; i < t.tokens; i++)
        assert_int_equal(t.token[i], tm_fake_token(PROMPT, 4, i, VOCAB));
    assert_int_equal(wait_exit(c), 0);
}

static void test_drain_timeout_hands_back(void **state)
{
    (void)state;
    child *c = fake("300ms", "20ms", NULL, "t");
    router *r = attach(c->channel);
    send_plain(r, 1, 200);
    assert_true(wait_router(r, has_events, 3));
    kill(c->pid, SIGTERM);
    expect_hand_back(c, r);
    detach(r);
    end_child(c);
}

static void test_second_signal_is_now(void **state)
{
    (void)state;
    child *c = fake("1h", "50ms", NULL, "t");
    router *r = attach(c->channel);
    send_plain(r, 1, 200);
    assert_true(wait_router(r, has_events, 2));
    kill(c->pid, SIGTERM);
    assert_true(wait_router(r, last_load_drains, 0));
    kill(c->pid, SIGINT);
    expect_hand_back(c, r);
    detach(r);
    end_child(c);
}

static void test_router_drains(void **state)
{
    (void)state;
    child *c = fake("1h", "50ms", NULL, "t");
    router *r = attach(c->channel);
    send_plain(r, 1, 200);
    assert_true(wait_router(r, has_events, 2));
    PB(RouterMessage) m = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__INIT;
    PB(Drain) d = TURBOMESH__WORKER__V1__DRAIN__INIT;
    d.has_deadline_ms = 1;
    d.deadline_ms = 100;
    m.m_case = TURBOMESH__WORKER__V1__ROUTER_MESSAGE__M_DRAIN;
    m.drain = &d;
    send_message(r, &m);
    expect_hand_back(c, r);
    detach(r);
    end_child(c);
}

static void test_bad_options(void **state)
{
    (void)state;
    char path[4096];
    const char *rows[][3] = {{"nowhere", NULL, NULL}, {MODEL, "--no-such-flag", NULL}, {NULL}};
    assert_true(program(path, sizeof(path), "tm-fake-worker"));
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        const char *argv[] = {path, rows[i][0], rows[i][1], NULL};
        child *c = spawn(argv);
        int code = wait_exit(c);
        assert_true(code > 0);
        assert_non_null(strstr(c->text, "tm-fake-worker: "));
        end_child(c);
    }
}

/* ---- etcd ---- */

static int free_port(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof(a);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    getsockname(fd, (struct sockaddr *)&a, &len);
    close(fd);
    return ntohs(a.sin_port);
}

typedef struct registry {
    child *etcd;
    char url[64], dir[64];
} registry;

static bool start_etcd(registry *g)
{
    char peer[64], cluster[80];
    tm_err err = TM_ERR_INIT;
    if (access("/usr/bin/etcd", X_OK) != 0)
        return false;
    snprintf(g->dir, sizeof(g->dir), "/tmp/turbomesh-test.XXXXXX");
    assert_non_null(mkdtemp(g->dir));
    snprintf(g->url, sizeof(g->url), "http://127.0.0.1:%d", free_port());
    snprintf(peer, sizeof(peer), "http://127.0.0.1:%d", free_port());
    snprintf(cluster, sizeof(cluster), "t=%s", peer);
    const char *argv[] = {"etcd",  "--name",
                          "t",     "--data-dir",
                          g->dir,  "--listen-client-urls",
                          g->url,  "--advertise-client-urls",
                          g->url,  "--listen-peer-urls",
                          peer,    "--initial-advertise-peer-urls",
                          peer,    "--initial-cluster",
                          cluster, "--log-level",
                          "error", NULL};
    g->etcd = spawn(argv);
    for (int i = 0; i < 200 && tm_etcd_health(g->url, &err) != TM_OK; i++)
        tm_sleep_ms(50);
    return tm_etcd_health(g->url, &err) == TM_OK;
}

static void stop_etcd(registry *g)
{
    char command[128];
    kill(g->etcd->pid, SIGKILL);
    wait_exit(g->etcd);
    end_child(g->etcd);
    snprintf(command, sizeof(command), "rm -rf %s", g->dir);
    assert_int_equal(system(command), 0);
}

/* The parsed value of the group's key, or NULL. */
static json_t *group_value(const registry *g)
{
    tm_err err = TM_ERR_INIT;
    char *text = NULL;
    json_t *v = NULL;
    if (tm_etcd_get(g->url, "/turbomesh/v1/groups/default/g7", &text, &err) != TM_OK)
        return NULL;
    assert_int_equal(tm_json_parse(text, strlen(text), &v, &err), TM_OK);
    free(text);
    return v;
}

/* Waits until the key's state is `state` (NULL: the key is gone); returns the epoch. */
static int64_t wait_state(const registry *g, const char *state, int64_t above)
{
    int64_t until = tm_clock_ms() + WAIT_MS;
    while (tm_clock_ms() < until) {
        json_t *v = group_value(g);
        int64_t epoch = v ? json_integer_value(tm_json_get(v, "epoch")) : 0;
        bool ok = state ? v && strcmp(json_string_value(tm_json_get(v, "state")), state) == 0 &&
                              epoch > above
                        : v == NULL;
        json_decref(v);
        if (ok)
            return epoch;
        tm_sleep_ms(20);
    }
    fail_msg("the key never came to state %s", state ? state : "gone");
    return 0;
}

static void test_registration(void **state)
{
    (void)state;
    registry g = {0};
    if (!start_etcd(&g)) {
        print_message("etcd is not installed: skipped\n");
        return;
    }
    child *c = fake("30s", "20ms", g.url, "g7");
    int64_t epoch = wait_state(&g, "READY", 0);
    json_t *v = group_value(&g);
    assert_string_equal(json_string_value(tm_json_get(v, "address")), c->address);
    assert_string_equal(json_string_value(tm_json_get(v, "model")), "demo-20m");
    static const char *const keys[] = {"digest",      "tp",           "max_batch_size",
                                       "max_context", "blocks_total", "version"};
    for (size_t i = 0; i < TM_ARRAY_LEN(keys); i++)
        assert_non_null(tm_json_get(v, keys[i]));
    json_decref(v);
    router *r = attach(c->channel);
    assert_true((int64_t)r->msg[0]->hello->epoch == epoch);
    send_plain(r, 1, 200);
    assert_true(wait_router(r, has_events, 2));

    /* Somebody removes the key: the group comes back under a higher epoch, its streams go on. */
    tm_err err = TM_ERR_INIT;
    assert_int_equal(tm_etcd_delete(g.url, "/turbomesh/v1/groups/default/g7", &err), TM_OK);
    int64_t second = wait_state(&g, "READY", epoch);
    print_message("epoch %lld, then %lld\n", (long long)epoch, (long long)second);
    router *late = attach(c->channel);
    assert_true((int64_t)late->msg[0]->hello->epoch == second);
    int events = r->events;
    assert_true(wait_router(r, has_events, events + 2));
    assert_true((int64_t)r->msg[r->count - 1]->epoch == epoch);

    kill(c->pid, SIGTERM);
    wait_state(&g, "DRAINING", 0);
    assert_true(wait_router(r, is_closed, 0));
    told t = tell(r, 1);
    assert_int_equal(t.tokens, 200);
    assert_int_equal(wait_exit(c), 0);
    wait_state(&g, NULL, 0); /* at once, not after the lease's 10 s */
    detach(r);
    detach(late);
    end_child(c);
    stop_etcd(&g);
}

/* ---- the real worker ---- */

static void run_real(const char *const *argv, int sig, int code_a, int code_b)
{
    child *c = start_worker(argv);
    router *r = attach(c->channel);
    PB(Submit) s = plain(1, 1000);
    PB(Sampling) p = TURBOMESH__WORKER__V1__SAMPLING__INIT;
    p.has_temperature = p.has_ignore_eos = p.ignore_eos = 1;
    s.sampling = &p;
    send_submit(r, &s);
    assert_true(wait_router(r, has_events, 4));
    kill(c->pid, sig);
    assert_true(wait_router(r, is_closed, 0));
    told t = tell(r, 1);
    assert_int_equal(t.admitted, 1);
    assert_int_equal(t.finishes, 1);
    assert_int_equal(t.finish, FINISH(HANDBACK));
    assert_int_equal(t.first_pos, 0);
    assert_false(t.broken);
    int code = wait_exit(c);
    if (code != code_a && code != code_b)
        fail_msg("exit code %d\n%s", code, c->text);
    detach(r);
    end_child(c);
}

static void test_real_worker(void **state)
{
    (void)state;
    char path[4096];
    if (!program(path, sizeof(path), "turbomesh-worker")) {
        print_message("turbomesh-worker is not built: skipped\n");
        return;
    }
    const char *argv[] = {path,    MODEL, "--drain-timeout", "100ms", "--cache-bytes-max",
                          "64MiB", NULL};
    run_real(argv, SIGTERM, 0, 0);
}

static void test_real_ranks(void **state)
{
    (void)state;
    char path[4096];
    if (!program(path, sizeof(path), "turbomesh-worker") || access("/usr/bin/mpirun", X_OK) != 0) {
        print_message("turbomesh-worker or mpirun is missing: skipped\n");
        return;
    }
    const char *argv[] = {"mpirun",    "-n",
                          "2",         "--oversubscribe",
                          "--bind-to", "none",
                          "--quiet",   path,
                          MODEL,       "--tp",
                          "2",         "--drain-timeout",
                          "100ms",     "--cache-bytes-max",
                          "64MiB",     "--threads",
                          "1",         NULL};
    run_real(argv, SIGUSR1, 0, 0);
    run_real(argv, SIGTERM, 0, 1); /* mpirun calls every end after its SIGTERM a failure */
}

/* Processes whose command line holds `word` as one argument. */
static int count_processes(const char *word)
{
    int found = 0;
    DIR *d = opendir("/proc");
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        char path[300], text[4096];
        snprintf(path, sizeof(path), "/proc/%s/cmdline", e->d_name);
        int fd = e->d_name[0] >= '0' && e->d_name[0] <= '9' ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        if (fd < 0)
            continue;
        ssize_t n = read(fd, text, sizeof(text));
        close(fd);
        found += n > 0 && memmem(text, (size_t)n, word, strlen(word)) != NULL;
    }
    closedir(d);
    return found;
}

static void test_no_orphans(void **state)
{
    (void)state;
    char path[4096], group[64];
    if (!program(path, sizeof(path), "turbomesh-worker") || access("/usr/bin/mpirun", X_OK) != 0) {
        print_message("turbomesh-worker or mpirun is missing: skipped\n");
        return;
    }
    snprintf(group, sizeof(group), "orphans-%ld", (long)getpid());
    const char *argv[] = {
        "mpirun", "-n",   "2", "--oversubscribe",   "--bind-to", "none",      "--quiet", path,
        MODEL,    "--tp", "2", "--cache-bytes-max", "64MiB",     "--threads", "1",       "--group",
        group,    NULL};
    child *c = start_worker(argv);
    router *r = attach(c->channel);
    assert_true(count_processes(group) >= 3);
    kill(c->pid, SIGKILL); /* mpirun itself: nobody is left to stop the ranks */
    assert_true(wait_router(r, is_closed, 0));
    for (int i = 0; i < 500 && count_processes(group) > 0; i++)
        tm_sleep_ms(10);
    assert_int_equal(count_processes(group), 0);
    wait_exit(c);
    detach(r);
    end_child(c);
}

int main(void)
{
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    tm_log_init("worker_process_test", TM_LOG_ERROR, TM_LOG_TEXT);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_drain_lets_requests_finish),
        cmocka_unit_test(test_drain_timeout_hands_back),
        cmocka_unit_test(test_second_signal_is_now),
        cmocka_unit_test(test_router_drains),
        cmocka_unit_test(test_bad_options),
        cmocka_unit_test(test_registration),
        cmocka_unit_test(test_real_worker),
        cmocka_unit_test(test_real_ranks),
        cmocka_unit_test(test_no_orphans),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
