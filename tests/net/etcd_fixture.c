#include "tests/net/etcd_fixture.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "common/clock.h"
#include "net/etcd/etcd.h"
#include "net/etcd/link.h"

#define ETCD "/usr/bin/etcd"

bool etcd_available(void)
{
    return access(ETCD, X_OK) == 0;
}

static int listen_loopback(int *port)
{
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof(addr);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&addr, len), 0);
    assert_int_equal(listen(fd, 64), 0);
    getsockname(fd, (struct sockaddr *)&addr, &len);
    *port = ntohs(addr.sin_port);
    return fd;
}

void etcd_prepare(etcd_proc *e)
{
    int a = listen_loopback(&e->port), b = listen_loopback(&e->peer_port);
    close(a), close(b);
    snprintf(e->dir, sizeof(e->dir), "/tmp/tm-etcd-test-XXXXXX");
    assert_non_null(mkdtemp(e->dir));
    snprintf(e->url, sizeof(e->url), "http://127.0.0.1:%d", e->port);
    e->pid = 0;
    e->cert = e->key = e->client_ca = NULL;
}

void etcd_start(etcd_proc *e)
{
    char data[128], peer[64], cluster[80];
    snprintf(data, sizeof(data), "%s/data", e->dir);
    snprintf(peer, sizeof(peer), "http://127.0.0.1:%d", e->peer_port);
    snprintf(cluster, sizeof(cluster), "default=%s", peer);
    snprintf(e->url, sizeof(e->url), "%s://127.0.0.1:%d", e->cert ? "https" : "http", e->port);
    e->pid = fork();
    if (e->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        int null = open("/dev/null", O_RDWR);
        dup2(null, 1), dup2(null, 2);
        const char *argv[32] = {ETCD,    "--data-dir",
                                data,    "--listen-client-urls",
                                e->url,  "--advertise-client-urls",
                                e->url,  "--listen-peer-urls",
                                peer,    "--initial-advertise-peer-urls",
                                peer,    "--initial-cluster",
                                cluster, "--heartbeat-interval",
                                "20",    "--election-timeout",
                                "200"};
        int n = 17;
        if (e->cert) {
            const char *const tls[] = {"--cert-file", e->cert, "--key-file", e->key};
            memcpy(argv + n, tls, sizeof(tls));
            n += 4;
        }
        if (e->client_ca) {
            const char *const ca[] = {"--client-cert-auth", "--trusted-ca-file", e->client_ca};
            memcpy(argv + n, ca, sizeof(ca));
        }
        execv(ETCD, (char **)argv);
        _exit(127);
    }
    int64_t end = tm_clock_ms() + 20000;
    while (tm_etcd_health(e->url, NULL) != TM_OK && tm_clock_ms() < end)
        tm_sleep_ms(20);
    assert_int_equal(tm_etcd_health(e->url, NULL), TM_OK);
}

void etcd_kill(etcd_proc *e)
{
    if (e->pid <= 0)
        return;
    kill(e->pid, SIGKILL);
    waitpid(e->pid, NULL, 0);
    e->pid = 0;
}

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st, (void)type, (void)ftw;
    return remove(path);
}

void etcd_empty(etcd_proc *e)
{
    char data[128];
    snprintf(data, sizeof(data), "%s/data", e->dir);
    nftw(data, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

void etcd_remove(etcd_proc *e)
{
    etcd_kill(e);
    nftw(e->dir, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

json_t *etcd_raw_ask(const etcd_proc *e, const char *path, const char *text)
{
    tm_etcd_link *l;
    tm_buf body;
    json_t *reply = NULL;
    tm_err err = TM_ERR_INIT;
    assert_int_equal(tm_etcd_link_create(&l, e->url, NULL), TM_OK);
    tm_buf_init(&body, 0);
    tm_buf_puts(&body, text);
    if (tm_etcd_link_ask(l, path, &body, 2000, &reply, &err) != TM_OK)
        fail_msg("%s: %s", path, err.msg);
    tm_buf_deinit(&body);
    tm_etcd_link_destroy(l);
    return reply;
}

/* ---- the relay: one thread polls all pairs ------------------------------------------------------------ */

enum { PAIRS_MAX = 32 };

typedef struct pair {
    int a, b; /* client side, etcd side; -1 = free */
    bool held;
    char waiting[8192]; /* of a held request */
    size_t waiting_len;
} pair;

struct relay {
    int listen_fd, port, to_port;
    atomic_int mode, held;
    atomic_bool stop;
    pthread_t thread;
    pair pairs[PAIRS_MAX];
};

static void close_pair(pair *p)
{
    close(p->a);
    close(p->b);
    *p = (pair){.a = -1, .b = -1};
}

static void accept_pair(relay *r)
{
    struct sockaddr_in addr = {.sin_family = AF_INET,
                               .sin_port = htons((uint16_t)r->to_port),
                               .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int a = accept4(r->listen_fd, NULL, NULL, SOCK_CLOEXEC);
    int b = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    for (int i = 0; i < PAIRS_MAX; i++) {
        if (r->pairs[i].a >= 0)
            continue;
        if (connect(b, (struct sockaddr *)&addr, sizeof(addr)) != 0)
            break;
        r->pairs[i] = (pair){.a = a, .b = b};
        return;
    }
    close(a), close(b);
}

/* Passes on what has come; false when a side has closed. */
static bool pass(relay *r, pair *p, int from, int to)
{
    char data[8192];
    ssize_t n = recv(from, data, sizeof(data), MSG_DONTWAIT);
    if (n <= 0)
        return n < 0 && errno == EAGAIN;
    if (from == p->a && atomic_load(&r->mode) == RELAY_HOLD_WATCH &&
        memmem(data, (size_t)n, "/v3/watch", 9)) {
        p->held = true;
        memcpy(p->waiting, data, (size_t)n);
        p->waiting_len = (size_t)n;
        atomic_fetch_add(&r->held, 1);
        return true;
    }
    return send(to, data, (size_t)n, MSG_NOSIGNAL) == n;
}

static void release(relay *r, pair *p)
{
    p->held = false;
    atomic_fetch_sub(&r->held, 1);
    (void)!send(p->b, p->waiting, p->waiting_len, MSG_NOSIGNAL);
}

static void serve_pair(relay *r, pair *p)
{
    int mode = atomic_load(&r->mode);
    if (p->a < 0 || mode == RELAY_SWALLOW)
        return;
    if (p->held) {
        if (mode == RELAY_PASS)
            release(r, p);
        return;
    }
    if (!pass(r, p, p->a, p->b) || (!p->held && !pass(r, p, p->b, p->a)))
        close_pair(p);
}

static void *run_relay(void *arg)
{
    relay *r = arg;
    while (!atomic_load(&r->stop)) {
        struct pollfd fd = {.fd = r->listen_fd, .events = POLLIN};
        if (poll(&fd, 1, 2) > 0)
            accept_pair(r);
        for (int i = 0; i < PAIRS_MAX; i++)
            serve_pair(r, &r->pairs[i]);
    }
    return NULL;
}

relay *relay_start(int to_port)
{
    relay *r = calloc(1, sizeof(*r));
    for (int i = 0; i < PAIRS_MAX; i++)
        r->pairs[i].a = r->pairs[i].b = -1;
    r->to_port = to_port;
    r->listen_fd = listen_loopback(&r->port);
    pthread_create(&r->thread, NULL, run_relay, r);
    return r;
}

int relay_port(const relay *r)
{
    return r->port;
}

void relay_set(relay *r, relay_mode mode)
{
    atomic_store(&r->mode, (int)mode);
}

int relay_held(const relay *r)
{
    return atomic_load(&r->held);
}

void relay_stop(relay *r)
{
    atomic_store(&r->stop, true);
    pthread_join(r->thread, NULL);
    for (int i = 0; i < PAIRS_MAX; i++)
        if (r->pairs[i].a >= 0)
            close_pair(&r->pairs[i]);
    close(r->listen_fd);
    free(r);
}
