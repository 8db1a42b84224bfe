/* turbomesh-worker: one rank of a worker group.
 *
 * All ranks parse the same options, join the communicator and open the engine together. Rank 0 then serves;
 * the others follow its steps and ignore SIGTERM, because rank 0 needs them until its drain is over and ends
 * them by closing the engine. A rank that finds the group lost ends the whole group. */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "common/check.h"
#include "common/log.h"
#include "parallel/comm.h"
#include "worker/options.h"
#include "worker/serve.h"

static int fail(const tm_err *err)
{
    fprintf(stderr, "turbomesh-worker: %s\n", err->msg);
    return tm_status_exit(err->status);
}

/* No orphans: a rank goes when the launcher goes. */
static void bind_to_parent(const tm_worker_opts *o)
{
    pid_t parent = getppid();
    if (!o->exit_with_parent && !tm_comm_launched())
        return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
}

static tm_engine_opts engine_opts(const tm_worker_opts *o, const char *model)
{
    tm_engine_opts e = tm_engine_opts_default();
    e.model.dir = model;
    e.model.dtype = o->dtype;
    e.model.backend = o->device;
    e.model.device.threads = (int)o->threads;
    e.model.device.isa = o->isa;
    e.model.device.index = (int)o->device_index;
    e.model.device.collectives = o->collectives;
    e.model.device.share = o->allow_shared_gpu;
    e.model.block_tokens = (int)o->block_seq_len;
    e.model.session_len = (int)o->session_len;
    e.max_batch_size = (int)o->max_batch_size;
    e.max_prefill_token_num = (int)o->max_prefill_token_num;
    e.queue_max = (int)o->queue_max;
    e.cache_max_entry_count = o->cache_max_entry_count;
    e.cache_bytes_max = o->cache_bytes_max;
    e.enable_prefix_caching = o->enable_prefix_caching;
    e.watchdog_ms = o->watchdog_ms;
    return e;
}

static void lost(void *user) __attribute__((noreturn));
static void lost(void *user)
{
    tm_comm_abort(user, tm_status_exit(TM_STATUS_UNAVAILABLE));
}

static tm_status run_rank(tm_engine *engine, tm_comm *comm, const tm_worker_opts *o,
                          const char *model, tm_err *err)
{
    if (tm_comm_rank(comm) > 0)
        return tm_engine_follow(engine, err);
    tm_worker_serve_args args = {
        .engine = engine,
        .model_dir = model,
        .opts = o,
        .launched = tm_comm_launched() != 0,
        .lost = lost,
        .user = comm,
    };
    return tm_worker_serve(&args, err);
}

static int run(const tm_worker_opts *o, const char *model)
{
    tm_err err = TM_ERR_INIT;
    tm_comm *comm = NULL;
    tm_engine *engine = NULL;
    tm_comm_opts co = tm_comm_opts_default();
    co.step_timeout_ms = o->step_timeout_ms;
    if (tm_comm_create(&comm, (int)o->tp, &co, &err) != TM_OK)
        return fail(&err);
    if (tm_comm_rank(comm) > 0) {
        signal(SIGTERM, SIG_IGN);
        signal(SIGINT, SIG_IGN);
        signal(SIGUSR1, SIG_IGN);
    }
    tm_engine_opts eo = engine_opts(o, model);
    tm_status st = tm_engine_open(&engine, &eo, comm, &err);
    if (st != TM_OK) { /* every rank fails together: rank 0 says why */
        int code = tm_comm_rank(comm) == 0 ? fail(&err) : tm_status_exit(st);
        tm_comm_destroy(comm);
        return code;
    }
    st = run_rank(engine, comm, o, model, &err);
    if (st != TM_OK) {
        fail(&err);
        tm_comm_abort(comm, tm_status_exit(st));
    }
    tm_engine_close(engine);
    tm_comm_destroy(comm);
    return 0;
}

int main(int argc, char **argv)
{
    tm_worker_opts o = {0};
    tm_err err = TM_ERR_INIT;
    const char *model = NULL;
    int count = 0;
    bool help = false;
    tm_log_level level;
    tm_status st = tm_opt_parse(&TM_WORKER_OPTIONS, argc, argv, &o, &model, &count, &help, &err);
    if (st != TM_OK)
        return fail(&err);
    if (help) {
        tm_buf text;
        tm_buf_init(&text, 0);
        tm_opt_help(&TM_WORKER_OPTIONS, &text);
        fputs(text.data, stdout);
        tm_buf_deinit(&text);
        return 0;
    }
    if (count != 1) {
        TM_FAIL(&err, TM_STATUS_CONFIG,
                "give MODEL, a Hugging Face folder such as models/demo-20m");
        return fail(&err);
    }
    if (!tm_log_level_parse(o.log_level, &level)) {
        TM_FAIL(&err, TM_STATUS_CONFIG,
                "--log-level: '%s' is not trace, debug, info, warn or error", o.log_level);
        return fail(&err);
    }
    tm_log_init("turbomesh-worker", level, (tm_log_format)o.log_format);
    bind_to_parent(&o);
    tm_worker_signals_block();
    return run(&o, model);
}
