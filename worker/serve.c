/* Rank 0's main thread. It waits on a signalfd (SIGTERM, SIGINT, SIGUSR1) and on an eventfd (a router's
 * Drain); everything else happens on the service's threads.
 *
 * Drain: announce (load reports, etcd, health) -> running requests go on until the timeout -> what is left
 * is handed back -> the lease is revoked -> the streams end -> return.
 *
 * Under mpirun (Open MPI 4.1, measured): SIGTERM to mpirun gives its ranks SIGCONT at once, SIGTERM after T and
 * SIGKILL after 2T, T = odls_base_sigkill_timeout (1 s), which mpirun puts into their environment. So that
 * SIGCONT, when it comes from mpirun and did not wake us from a stop, starts the drain, and the drain is cut
 * to fit. SIGUSR1, which mpirun passes on and does not act on, gives the whole --drain-timeout. */
#include "worker/serve.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "worker/register.h"
#include "worker/service.h"

#define DRAIN_POLL_MS 20
#define DRAIN_LINGER_MS                                                                            \
    100 /* for Submits under way when DRAINING was announced: they get a reject */
#define HAND_BACK_MS     2000 /* the engine ends cancelled requests within a step */
#define CLOSE_GRACE_MS   1000
#define REVOKE_MS        2000
#define MPI_MARGIN_MS    700 /* of mpirun's kill timeout, for handing back, revoking and leaving */
#define HEARTBEAT_MS     200 /* under mpirun: a longer sleep means that this process was stopped */
#define STOPPED_MS       600
#define WARM_UP_TOKENS   16
#define WARM_UP_LIMIT_MS 120000

typedef struct serving {
    const tm_worker_serve_args *args;
    tm_worker_service *service;
    tm_worker_reg *reg;
    int signal_fd, event_fd;
    int64_t asked_ms; /* atomic: a router's drain deadline, set before event_fd is written */
    bool draining, handed_back, hurried; /* hurried: SIGTERM or SIGINT came */
    int64_t drain_start, drain_end, leave_by;
    int64_t awake_ms; /* the main thread ran last */
} serving;

static void signal_set(sigset_t *set)
{
    sigemptyset(set);
    sigaddset(set, SIGTERM);
    sigaddset(set, SIGINT);
    sigaddset(set, SIGUSR1);
    sigaddset(set, SIGCONT);
}

void tm_worker_signals_block(void)
{
    sigset_t set;
    signal_set(&set);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
}

/* One request through the whole engine, so that a group which registers has computed before. */
static tm_status warm_up(tm_engine *e, tm_err *err)
{
    int32_t prompt[WARM_UP_TOKENS];
    int vocab = tm_engine_info_get(e)->model.vocab;
    for (int i = 0; i < WARM_UP_TOKENS; i++)
        prompt[i] = i % vocab;
    tm_request r = {.id = 0,
                    .prompt = prompt,
                    .prompt_len = WARM_UP_TOKENS,
                    .max_tokens = 2,
                    .sampling = tm_sampling_default()};
    r.sampling.temperature = 0;
    r.sampling.ignore_eos = true;
    int64_t start = tm_clock_ms();
    TM_TRY(tm_engine_submit(e, &r, err));
    for (bool done = false; !done;) {
        tm_step_events *ev = NULL;
        tm_status st = tm_engine_wait(e, 1000, &ev);
        if (st == TM_STATUS_TIMEOUT && tm_clock_ms() - start < WARM_UP_LIMIT_MS)
            continue;
        if (st != TM_OK)
            return TM_FAIL(err, st, "the warm-up request did not finish: %s", tm_status_name(st));
        for (int i = 0; i < ev->count; i++)
            if (ev->events[i].kind == TM_EVENT_FINISHED) {
                done = true;
                if (ev->events[i].finish == TM_FINISH_ERROR)
                    st = TM_FAIL(err, ev->events[i].status, "the warm-up request failed: %s",
                                 tm_status_name(ev->events[i].status));
            }
        tm_engine_events_free(ev);
        TM_TRY(st);
    }
    tm_log(TM_LOG_INFO, "warm_up", "%lld ms", (long long)(tm_clock_ms() - start));
    return TM_OK;
}

/* The address that routers are told. */
static void advertised(char *out, size_t size, const tm_worker_opts *o, int port)
{
    char name[256] = "localhost";
    const char *host = o->advertise ? o->advertise : o->host;
    const char *colon = strrchr(host, ':');
    if (o->advertise && colon && !strchr(colon, ']')) {
        snprintf(out, size, "%s", host);
        return;
    }
    if (!o->advertise && (strcmp(host, "0.0.0.0") == 0 || strcmp(host, "[::]") == 0)) {
        gethostname(name, sizeof(name) - 1);
        host = name;
    }
    snprintf(out, size, "%s:%d", host, port);
}

static void default_group(char *out, size_t size, const tm_worker_opts *o)
{
    char name[128] = "group";
    gethostname(name, sizeof(name) - 1);
    if (o->group)
        snprintf(out, size, "%s", o->group);
    else
        snprintf(out, size, "%.100s-%ld", name, (long)getpid());
}

static void on_lost(void *user)
{
    serving *v = user;
    tm_log(TM_LOG_ERROR, "group_lost", "the engine lost its group: this rank ends it");
    v->args->lost(v->args->user);
}

static void on_drain(void *user, int64_t deadline_ms)
{
    serving *v = user;
    uint64_t one = 1;
    __atomic_store_n(&v->asked_ms, deadline_ms, __ATOMIC_RELEASE); /* read in main_loop */
    if (write(v->event_fd, &one, sizeof(one)) != (ssize_t)sizeof(one))
        tm_log(TM_LOG_WARN, "drain", "a router's request could not be passed on: %m");
}

static void begin_drain(serving *v, int64_t budget_ms, const char *why)
{
    v->draining = true;
    v->drain_start = tm_clock_ms();
    v->drain_end = v->drain_start + TM_MAX(budget_ms, 0);
    tm_log(TM_LOG_INFO, "drain", "%s: %d requests may go on for %lld ms", why,
           tm_worker_service_live(v->service), (long long)budget_ms);
    tm_worker_service_drain(v->service);
    tm_worker_reg_drain(v->reg);
}

/* mpirun's time from SIGTERM to SIGKILL, seconds. */
static int64_t mpi_kill_ms(void)
{
    const char *text = getenv("OMPI_MCA_odls_base_sigkill_timeout");
    long s = text ? strtol(text, NULL, 10) : 1;
    return s > 0 && s < 86400 ? (int64_t)s * 1000 : 1000;
}

/* How long running requests may go on after this signal. */
static int64_t signal_budget(const serving *v, int sig)
{
    int64_t budget = v->args->opts->drain_timeout_ms;
    if (!v->args->launched || sig == SIGUSR1)
        return budget;
    int64_t kill_ms = mpi_kill_ms() * (sig == SIGCONT ? 2 : 1) - MPI_MARGIN_MS;
    return TM_MIN(budget, TM_MAX(kill_ms, 0));
}

static void on_signal(serving *v, const struct signalfd_siginfo *si)
{
    int sig = (int)si->ssi_signo;
    bool stopped = tm_clock_ms() - v->awake_ms > STOPPED_MS;
    if (sig == SIGCONT && (!v->args->launched || (pid_t)si->ssi_pid != getppid() || stopped))
        return;
    int64_t budget = signal_budget(v, sig);
    if (!v->draining)
        begin_drain(v, budget, strsignal(sig));
    else if (v->args->launched && !v->hurried)
        v->drain_end = TM_MIN(v->drain_end, tm_clock_ms() + budget);
    else
        v->drain_end = v->drain_start; /* the second signal: now */
    v->hurried = v->hurried || sig == SIGTERM || sig == SIGINT;
}

/* Returns true when the drain is complete. */
static bool drain_step(serving *v)
{
    int64_t now = tm_clock_ms();
    int live = tm_worker_service_live(v->service);
    if (live == 0 && now >= v->drain_start + DRAIN_LINGER_MS)
        return true;
    if (!v->handed_back && now >= v->drain_end) {
        tm_log(TM_LOG_INFO, "drain", "%d requests are handed back", live);
        tm_worker_service_hand_back(v->service);
        v->handed_back = true;
        v->leave_by = now + HAND_BACK_MS;
    }
    return v->handed_back && now >= v->leave_by;
}

static void main_loop(serving *v)
{
    v->awake_ms = tm_clock_ms();
    for (;;) {
        struct pollfd p[2] = {{v->signal_fd, POLLIN, 0}, {v->event_fd, POLLIN, 0}};
        poll(p, 2, v->draining ? DRAIN_POLL_MS : v->args->launched ? HEARTBEAT_MS : -1);
        struct signalfd_siginfo si;
        while (read(v->signal_fd, &si, sizeof(si)) == (ssize_t)sizeof(si))
            on_signal(v, &si);
        v->awake_ms = tm_clock_ms();
        uint64_t asked;
        if (read(v->event_fd, &asked, sizeof(asked)) == (ssize_t)sizeof(asked) && !v->draining) {
            int64_t ms = __atomic_load_n(&v->asked_ms, __ATOMIC_ACQUIRE);
            begin_drain(v, ms < 0 ? v->args->opts->drain_timeout_ms : ms, "a router asked");
        }
        if (v->draining && drain_step(v))
            return;
    }
}

static void banner(const tm_engine_info *i, const char *model, const char *group,
                   const char *address)
{
    fprintf(stderr,
            "turbomesh-worker %s: %s on %s, group %s, %d rank%s\n"
            "  model   %s, %.1f M parameters, %s, context %d\n"
            "  memory  %.1f MiB weights, %.1f MiB KV cache in each rank\n"
            "  KV      %d blocks of %d tokens, up to %d sequences\n",
            TM_VERSION, model, address, group, i->model.tp, i->model.tp == 1 ? "" : "s",
            i->model.arch, (double)i->model.parameters / 1e6, i->model.dtype,
            i->model.max_positions, (double)i->model.weight_bytes / 1048576.0,
            (double)i->kv_bytes / 1048576.0, i->blocks_total, i->block_tokens, i->max_batch_size);
}

static tm_status start_service(serving *v, const char *group, uint64_t epoch, tm_err *err)
{
    const tm_worker_opts *o = v->args->opts;
    char listen[300];
    snprintf(listen, sizeof(listen), "%s:%d", o->host, (int)o->port);
    tm_worker_service_opts so = {
        .engine = v->args->engine,
        .address = listen,
        .group = group,
        .model_name = o->served_model_name,
        .model_dir = v->args->model_dir,
        .epoch = epoch,
        .stream_queue_max = (size_t)o->stream_queue_max,
        .on_lost = on_lost,
        .on_drain = on_drain,
        .user = v,
    };
    return tm_worker_service_create(&v->service, &so, err);
}

static tm_status start(serving *v, tm_err *err)
{
    const tm_worker_opts *o = v->args->opts;
    const tm_engine_info *info = tm_engine_info_get(v->args->engine);
    const char *model = o->served_model_name ? o->served_model_name : info->model.name;
    uint64_t epoch = (uint64_t)tm_clock_wall_ms();
    char group[128], address[300];
    default_group(group, sizeof(group), o);
    TM_TRY(warm_up(v->args->engine, err));
    TM_TRY(start_service(v, group, epoch, err));
    advertised(address, sizeof(address), o, tm_worker_service_port(v->service));
    banner(info, model, group, address);
    if (!o->etcd)
        return TM_OK;
    tm_worker_reg_opts ro = {o->etcd, o->pool, group, address, model, info, v->service, epoch};
    return tm_worker_reg_create(&v->reg, &ro, err);
}

tm_status tm_worker_serve(const tm_worker_serve_args *args, tm_err *err)
{
    serving v = {.args = args};
    sigset_t set;
    signal_set(&set);
    v.signal_fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    v.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    tm_status st = TM_OK;
    if (v.signal_fd < 0 || v.event_fd < 0)
        st = TM_FAIL(err, TM_STATUS_IO, "signalfd: %m");
    if (st == TM_OK)
        st = start(&v, err);
    if (st == TM_OK) {
        main_loop(&v);
        int handed = tm_worker_service_handed_back(v.service);
        tm_log(TM_LOG_INFO, "drained", "after %lld ms, %d requests handed back",
               (long long)(tm_clock_ms() - v.drain_start), handed);
    }
    tm_worker_reg_destroy(v.reg, args->launched ? REVOKE_MS / 8 : REVOKE_MS);
    tm_worker_service_destroy(v.service, CLOSE_GRACE_MS);
    if (v.signal_fd >= 0)
        close(v.signal_fd);
    if (v.event_fd >= 0)
        close(v.event_fd);
    return st;
}
