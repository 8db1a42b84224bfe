/* turbomesh serve: a worker group and a router on this machine, with a static member list: no etcd, no
 * configuration. This process only starts, watches and stops the two; a group that dies is started again
 * with a backoff, and the router answers 503 meanwhile. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <poll.h>
#include <unistd.h>

#include "cli/cmd.h"
#include "cli/launch.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/file.h"
#include "common/json.h"
#include "common/log.h"
#include "common/model_dir.h"
#include "net/rpc/rpc.h"
#include "proto/worker.pb-c.h"
#include "text/template.h"
#include "text/tokenizer.h"

typedef struct serve_opts {
    const char *host, *name, *api_key_file, *dtype, *device, *collectives, *log_level,
        *chat_template, *meta_instruction, *tool_parser, *reason_parser;
    int64_t device_index;
    int64_t port, tp, threads, session_len, max_batch_size, max_prefill_token_num, drain_ms;
    double cache_max_entry_count;
    bool insecure_open, allow_shared_gpu;
} serve_opts;

#define OFF(f) offsetof(serve_opts, f)
static const tm_opt_row ROWS[] = {
    {"host", "server-name", TM_OPT_STR, OFF(host), "127.0.0.1", 0, 0, NULL,
     "Address of the HTTP server."},
    {"port", "server-port", TM_OPT_INT, OFF(port), "23333", 1, 65535, NULL,
     "Port of the HTTP server."},
    {"tp", "tensor-parallel-size", TM_OPT_INT, OFF(tp), "1", 1, 64, NULL,
     "Tensor-parallel ranks of the group."},
    {"served-model-name", "model-name", TM_OPT_STR, OFF(name), NULL, 0, 0, NULL,
     "Model name in the API; default: the folder's name."},
    {"api-key-file", NULL, TM_OPT_STR, OFF(api_key_file), NULL, 0, 0, NULL,
     "File of API keys, one name:sha256hex per line."},
    {"insecure-open", NULL, TM_OPT_BOOL, OFF(insecure_open), "false", 0, 0, NULL,
     "Allow another address than loopback without keys."},
    {"chat-template", NULL, TM_OPT_STR, OFF(chat_template), NULL, 0, 0, NULL,
     "Built-in template name or template text instead of the model's."},
    {"meta-instruction", NULL, TM_OPT_STR, OFF(meta_instruction), NULL, 0, 0, NULL,
     "System message of conversations that bring none."},
    {"tool-call-parser", NULL, TM_OPT_STR, OFF(tool_parser), NULL, 0, 0, NULL,
     "How the model writes tool calls: auto (default), none, or a name."},
    {"reasoning-parser", NULL, TM_OPT_STR, OFF(reason_parser), NULL, 0, 0, NULL,
     "How the model writes reasoning: auto (default), none, or a name."},
    {"dtype", NULL, TM_OPT_STR, OFF(dtype), "auto", 0, 0, NULL,
     "Weights and KV cache: bfloat16, float16 or float32; auto: float16 on a GPU, else bfloat16."},
    {"device", "backend", TM_OPT_STR, OFF(device), "cpu", 0, 0, NULL, "cpu or cuda."},
    {"device-index", NULL, TM_OPT_INT, OFF(device_index), "0", 0, 1023, NULL,
     "cuda: GPU of the host's first rank; the other ranks take the next ones."},
    {"collectives", NULL, TM_OPT_STR, OFF(collectives), "auto", 0, 0, NULL,
     "cuda, several ranks: sums through peer memory and NCCL by size (auto), or peer or nccl "
     "alone."},
    {"allow-shared-gpu", NULL, TM_OPT_BOOL, OFF(allow_shared_gpu), "false", 0, 0, NULL,
     "For tests: all ranks use the GPU of --device-index."},
    {"threads", NULL, TM_OPT_INT, OFF(threads), "0", 0, 1024, NULL,
     "Threads of each rank; 0 divides the cores."},
    {"session-len", "max-model-len,context-length", TM_OPT_INT, OFF(session_len), "0", 0, 1 << 24,
     NULL, "Context limit; 0 takes the model's."},
    {"max-batch-size", "max-num-seqs", TM_OPT_INT, OFF(max_batch_size), "128", 1, 4096, NULL,
     "Sequences that run at once."},
    {"max-prefill-token-num", NULL, TM_OPT_INT, OFF(max_prefill_token_num), "0", 0, 65536, NULL,
     "Tokens of one step; 0 is 512 on the CPU and 2048 on a GPU."},
    {"cache-max-entry-count", "gpu-memory-utilization,mem-fraction-static", TM_OPT_NUM,
     OFF(cache_max_entry_count), "0.8", 0.001, 1e9, NULL,
     "KV cache: up to 1 a share of the memory left, above 1 a number of blocks."},
    {"drain-timeout", NULL, TM_OPT_TIME, OFF(drain_ms), "30s", 0, 86400000, NULL,
     "Time for running streams when stopping."},
    {"log-level", NULL, TM_OPT_STR, OFF(log_level), "info", 0, 0, NULL,
     "trace, debug, info, warn or error."},
};
const tm_opt_table TM_SERVE_OPTIONS = {
    "turbomesh serve",
    "turbomesh serve MODEL [options]",
    "Serve a model on this machine: one worker group and a router.",
    ROWS,
    TM_ARRAY_LEN(ROWS),
    1};

#define RESTARTS_MAX      5 /* within RESTART_WINDOW_MS: then give up */
#define RESTART_WINDOW_MS 600000

typedef struct serve {
    const serve_opts *o;
    const char *model;
    int group_port;
    pid_t group, router;
    int restarts;
    int64_t window_start_ms, restart_at_ms, backoff_ms;
    bool stopping, announced;
    tm_rpc_channel *channel;
} serve;

typedef struct words {
    char text[32][64];
    int n;
} words;

/* Adds --flag value with the number printed into w. */
static tm_status add_int(tm_launch *l, words *w, const char *flag, int64_t v, tm_err *err)
{
    TM_ASSERT(w->n < 32);
    snprintf(w->text[w->n], sizeof w->text[0], "%lld", (long long)v);
    TM_TRY(tm_launch_add(l, flag, err));
    return tm_launch_add(l, w->text[w->n++], err);
}

static tm_status add_str(tm_launch *l, const char *flag, const char *v, tm_err *err)
{
    if (!v)
        return TM_OK;
    TM_TRY(tm_launch_add(l, flag, err));
    return tm_launch_add(l, v, err);
}

static tm_status start_group(serve *s, tm_err *err)
{
    const serve_opts *o = s->o;
    tm_launch l = {0};
    words w = {0};
    char program[4096], share[64];
    TM_TRY(tm_launch_program(program, sizeof program, "turbomesh-worker", err));
    TM_TRY(tm_launch_tied(&l, err));
    if (o->tp > 1)
        TM_TRY(tm_launch_mpirun(&l, (int)o->tp, err));
    TM_TRY(tm_launch_add(&l, program, err));
    TM_TRY(tm_launch_add(&l, s->model, err));
    TM_TRY(add_int(&l, &w, "--tp", o->tp, err));
    TM_TRY(add_int(&l, &w, "--port", s->group_port, err));
    TM_TRY(add_int(&l, &w, "--threads", o->threads, err));
    TM_TRY(add_int(&l, &w, "--session-len", o->session_len, err));
    TM_TRY(add_int(&l, &w, "--max-batch-size", o->max_batch_size, err));
    TM_TRY(add_int(&l, &w, "--max-prefill-token-num", o->max_prefill_token_num, err));
    snprintf(share, sizeof share, "%.9g", o->cache_max_entry_count);
    TM_TRY(add_str(&l, "--cache-max-entry-count", share, err));
    TM_TRY(add_str(&l, "--dtype", o->dtype, err));
    TM_TRY(add_str(&l, "--device", o->device, err));
    TM_TRY(add_int(&l, &w, "--device-index", o->device_index, err));
    TM_TRY(add_str(&l, "--collectives", o->collectives, err));
    if (o->allow_shared_gpu)
        TM_TRY(tm_launch_add(&l, "--allow-shared-gpu", err));
    TM_TRY(add_str(&l, "--group", "local", err));
    TM_TRY(add_str(&l, "--served-model-name", o->name, err));
    TM_TRY(add_str(&l, "--log-level", o->log_level, err));
    return tm_launch_spawn(&l, &s->group, err);
}

/* The router would say what is wrong with these files only in its log, and answer 503 for ever. */
static tm_status check_text(const serve *s, tm_err *err)
{
    tm_tokenizer *t;
    tm_template *c = NULL;
    char config[4096];
    if (!tm_path_join(config, sizeof config, s->model, "config.json") ||
        (!tm_file_exists(config) && !tm_model_is_workspace(s->model)))
        return TM_OK; /* no model at all: the group says so */
    TM_TRY(tm_tokenizer_load(&t, s->model, err));
    tm_status st = tm_template_load(&c, s->model, s->o->chat_template, t, err);
    if (st == TM_STATUS_NOT_FOUND) /* a base model: completions work */
        st = TM_OK;
    tm_template_destroy(c);
    tm_tokenizer_destroy(t);
    return st;
}

static tm_status start_router(serve *s, tm_err *err)
{
    const serve_opts *o = s->o;
    tm_launch l = {0};
    words w = {0};
    char program[4096], workers[64], drain[32];
    TM_TRY(tm_launch_program(program, sizeof program, "turbomesh-router", err));
    snprintf(workers, sizeof workers, "127.0.0.1:%d", s->group_port);
    snprintf(drain, sizeof drain, "%lldms", (long long)o->drain_ms);
    TM_TRY(tm_launch_tied(&l, err));
    TM_TRY(tm_launch_add(&l, program, err));
    TM_TRY(add_str(&l, "--host", o->host, err));
    TM_TRY(add_int(&l, &w, "--port", o->port, err));
    TM_TRY(add_str(&l, "--workers", workers, err));
    TM_TRY(add_str(&l, "--drain-timeout", drain, err));
    TM_TRY(add_str(&l, "--api-key-file", o->api_key_file, err));
    TM_TRY(add_str(&l, "--chat-template", o->chat_template, err));
    TM_TRY(add_str(&l, "--meta-instruction", o->meta_instruction, err));
    TM_TRY(add_str(&l, "--tool-call-parser", o->tool_parser, err));
    TM_TRY(add_str(&l, "--reasoning-parser", o->reason_parser, err));
    TM_TRY(add_str(&l, "--log-level", o->log_level, err));
    if (o->insecure_open)
        TM_TRY(tm_launch_add(&l, "--insecure-open", err));
    return tm_launch_spawn(&l, &s->router, err);
}

/* The group's own description once it serves; prints the banner. */
static void try_announce(serve *s)
{
    void *reply;
    size_t len;
    tm_err err = TM_ERR_INIT;
    char address[64];
    snprintf(address, sizeof address, "127.0.0.1:%d", s->group_port);
    if (!s->channel && tm_rpc_channel_create(&s->channel, address, &err) != TM_OK)
        return;
    if (tm_rpc_unary(s->channel, "/turbomesh.worker.v1.Worker/GetStatus", "", 0, 1000, &reply, &len,
                     &err) != TM_OK)
        return;
    Turbomesh__Worker__V1__StatusReply *r =
        turbomesh__worker__v1__status_reply__unpack(NULL, len, reply);
    free(reply);
    if (!r)
        return;
    const Turbomesh__Worker__V1__Hello *h = r->hello;
    if (h) {
        fprintf(stderr,
                "\n  turbomesh %s serves %s\n"
                "    API       http://%s:%lld/v1   (OpenAI protocol)\n"
                "    group     %u rank%s, context %u tokens, up to %u sequences\n"
                "    memory    %.1f MiB weights and %.1f MiB KV cache in each rank\n"
                "    KV cache  %u blocks of %u tokens\n"
                "    keys      %s\n"
                "    try       curl http://%s:%lld/v1/chat/completions -H 'content-type: "
                "application/json' \\\n"
                "                -d '{\"model\": \"%s\", \"messages\": [{\"role\": \"user\", "
                "\"content\": \"Hello\"}]}'\n\n",
                TM_VERSION, h->model, s->o->host, (long long)s->o->port, h->tp,
                h->tp == 1 ? "" : "s", h->max_context, h->max_batch_size,
                (double)h->weight_bytes / 1048576.0, (double)h->kv_bytes / 1048576.0,
                h->blocks_total, h->block_tokens,
                s->o->api_key_file ? s->o->api_key_file : "none (loopback only)", s->o->host,
                (long long)s->o->port, h->model);
        s->announced = true;
    }
    turbomesh__worker__v1__status_reply__free_unpacked(r, NULL);
}

/* The group ended by itself: plan a restart, or say that it is hopeless. */
static bool plan_restart(serve *s, int status)
{
    int64_t now = tm_clock_ms();
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    /* Its own exit before it served is about the model or the options: again would be the same. A signal is not. */
    if (!s->announced && WIFEXITED(status)) {
        fprintf(stderr,
                "turbomesh serve: the worker group ended before it was ready (exit code %d)\n",
                code);
        return false;
    }
    if (now - s->window_start_ms > RESTART_WINDOW_MS) {
        s->window_start_ms = now;
        s->restarts = 0;
        s->backoff_ms = 1000;
    }
    if (++s->restarts > RESTARTS_MAX) {
        fprintf(stderr,
                "turbomesh serve: the worker group ended %d times in 10 minutes, giving up\n",
                s->restarts);
        return false;
    }
    tm_log(TM_LOG_WARN, "group_restart",
           "the worker group ended with code %d; started again in %lld ms", code,
           (long long)s->backoff_ms);
    s->restart_at_ms = now + s->backoff_ms;
    s->backoff_ms = TM_MIN(s->backoff_ms * 2, 30000);
    return true;
}

/* Reaps children. Returns false when serving is over; *code is then the exit code. */
static bool reap(serve *s, int *code)
{
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        if (pid == s->router) {
            s->router = 0;
            if (!s->stopping)
                fprintf(stderr, "turbomesh serve: the router ended\n");
            *code = WIFEXITED(status) ? WEXITSTATUS(status) : 1;
            return false;
        }
        if (pid == s->group) {
            s->group = 0;
            if (!s->stopping && !plan_restart(s, status)) {
                *code = WIFEXITED(status) && WEXITSTATUS(status) ? WEXITSTATUS(status) : 1;
                return false;
            }
        }
    }
    return true;
}

static void stop_child(pid_t pid, int64_t timeout_ms)
{
    int64_t deadline = tm_clock_ms() + timeout_ms;
    if (pid <= 0)
        return;
    kill(pid, SIGTERM);
    while (tm_clock_ms() < deadline) {
        if (waitpid(pid, NULL, WNOHANG) != 0)
            return;
        tm_sleep_ms(20);
    }
    kill(-pid, SIGKILL);
    waitpid(pid, NULL, 0);
}

static int supervise(serve *s, int sigfd)
{
    int code = 0, signals = 0;
    tm_err err = TM_ERR_INIT;
    for (;;) {
        struct pollfd p = {.fd = sigfd, .events = POLLIN};
        poll(&p, 1, s->announced && !s->restart_at_ms ? 1000 : 100);
        struct signalfd_siginfo si;
        while (read(sigfd, &si, sizeof si) == (ssize_t)sizeof si) {
            if (si.ssi_signo == SIGCHLD)
                continue;
            /* The router drains; the group stays until the router has ended. A second signal hurries it. */
            s->stopping = true;
            if (s->router > 0)
                kill(s->router, SIGTERM);
            if (++signals > 2 && s->router > 0)
                kill(s->router, SIGKILL);
        }
        if (!reap(s, &code))
            return code;
        if (s->restart_at_ms && tm_clock_ms() >= s->restart_at_ms && !s->stopping) {
            s->restart_at_ms = 0;
            if (start_group(s, &err) != TM_OK)
                return tm_cmd_fail("serve", &err);
        }
        if (!s->announced)
            try_announce(s);
    }
}

int tm_cmd_serve(int argc, char **argv)
{
    serve_opts o = {0};
    const char *model;
    int n = 0, code;
    /* LMDeploy's spelling: `serve api_server MODEL`. */
    if (argc > 1 && strcmp(argv[1], "api_server") == 0) {
        argv[1] = argv[0];
        argv++;
        argc--;
    }
    if (!tm_cmd_parse(&TM_SERVE_OPTIONS, argc, argv, &o, &model, &n, &code))
        return code;
    tm_err err = TM_ERR_INIT;
    tm_log_level level;
    if (n != 1) {
        TM_FAIL(&err, TM_STATUS_INVALID,
                "give MODEL, a Hugging Face folder such as models/demo-20m");
        return tm_cmd_fail("serve", &err);
    }
    if (!tm_log_level_parse(o.log_level, &level)) {
        TM_FAIL(&err, TM_STATUS_CONFIG,
                "--log-level: '%s' is not trace, debug, info, warn or error", o.log_level);
        return tm_cmd_fail("serve", &err);
    }
    tm_log_init("turbomesh-serve", level, TM_LOG_AUTO);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    int sigfd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    serve s = {.o = &o, .model = model, .backoff_ms = 1000, .window_start_ms = tm_clock_ms()};
    if (check_text(&s, &err) != TM_OK)
        return tm_cmd_fail("serve", &err);
    s.group_port = tm_launch_free_port(0);
    fprintf(stderr, "starting the worker group: %s, %lld rank%s\n", model, (long long)o.tp,
            o.tp == 1 ? "" : "s");
    tm_status st = start_group(&s, &err);
    if (st == TM_OK)
        st = start_router(&s, &err);
    code = st == TM_OK ? supervise(&s, sigfd) : tm_cmd_fail("serve", &err);
    s.stopping = true;
    tm_rpc_channel_destroy(s.channel);
    stop_child(s.router, o.drain_ms + 5000);
    stop_child(s.group, 10000);
    close(sigfd);
    return code;
}

static int exec_program(const char *name, int argc, char **argv, int tp)
{
    tm_err err = TM_ERR_INIT;
    tm_launch l = {0};
    static char program[4096];
    tm_status st = tm_launch_program(program, sizeof program, name, &err);
    if (st == TM_OK && tp > 1)
        st = tm_launch_mpirun(&l, tp, &err);
    if (st == TM_OK)
        st = tm_launch_add(&l, program, &err);
    for (int i = 1; i < argc && st == TM_OK; i++)
        st = tm_launch_add(&l, argv[i], &err);
    if (st == TM_OK)
        tm_launch_exec(&l, &err);
    return tm_cmd_fail(argv[0], &err);
}

int tm_cmd_worker(int argc, char **argv)
{
    int tp = 1;
    for (int i = 1; i < argc; i++) {
        const char *v = strncmp(argv[i], "--tp=", 5) == 0 ? argv[i] + 5
                        : strcmp(argv[i], "--tp") == 0    ? argv[i + 1]
                                                          : NULL;
        if (v)
            tp = (int)strtol(v, NULL, 10);
    }
    return exec_program("turbomesh-worker", argc, argv, tp);
}

int tm_cmd_router(int argc, char **argv)
{
    return exec_program("turbomesh-router", argc, argv, 1);
}
