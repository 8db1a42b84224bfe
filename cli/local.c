/* See local.h. The order matters: the processes are multiplied before anything is opened, because MPI must be
 * initialised by the ranks themselves. */
#include "cli/local.h"

#include <stdlib.h>
#include <unistd.h>

#include "cli/launch.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"

static tm_status restart_under_mpirun(int tp, int argc, char **argv, tm_err *err)
{
    tm_launch l = {0};
    static char self[4096];
    TM_TRY(tm_launch_program(self, sizeof self, "turbomesh", err));
    TM_TRY(tm_launch_mpirun(&l, tp, err));
    TM_TRY(tm_launch_add(&l, self, err));
    for (int i = 0; i < argc; i++)
        TM_TRY(tm_launch_add(&l, argv[i], err));
    return tm_launch_exec(&l, err);
}

static tm_engine_opts engine_opts(const char *model, const tm_local_opts *o)
{
    tm_engine_opts e = tm_engine_opts_default();
    e.model.dir = model;
    e.model.shape = o->shape;
    e.model.no_graphs = o->no_graphs;
    e.model.dtype = o->dtype;
    e.model.backend = o->device;
    e.model.session_len = (int)o->session_len;
    e.model.device.threads = (int)o->threads;
    e.model.device.isa = o->isa;
    e.model.device.index = (int)o->device_index;
    e.model.device.collectives = o->collectives;
    e.model.device.share = o->allow_shared_gpu;
    e.max_batch_size = (int)o->max_batch_size;
    e.max_prefill_token_num = (int)o->max_prefill_token_num;
    e.cache_max_entry_count = o->cache_max_entry_count;
    return e;
}

tm_status tm_local_open(tm_local *l, const char *model, const tm_local_opts *o, bool text, int argc,
                        char **argv, tm_err *err)
{
    *l = (tm_local){0};
    tm_log_level level;
    if (!tm_log_level_parse(o->log_level, &level))
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "--log-level: '%s' is not trace, debug, info, warn or error", o->log_level);
    tm_log_init("turbomesh", level, TM_LOG_AUTO);
    if (o->tp > 1 && !tm_comm_launched())
        return restart_under_mpirun((int)o->tp, argc, argv, err);

    tm_status st = tm_comm_create(&l->comm, (int)o->tp, NULL, err);
    if (st != TM_OK)
        return st;
    if (text && tm_comm_rank(l->comm) == 0) {
        st = tm_tokenizer_load(&l->tokenizer, model, err);
        if (st == TM_OK)
            st = tm_template_load(&l->template, model, NULL, l->tokenizer, err);
        if (st == TM_STATUS_NOT_FOUND && l->tokenizer)
            st = TM_OK; /* a base model: prompts are completed as they are */
    }
    st = tm_comm_agree(l->comm, st, err);
    if (st != TM_OK)
        goto fail;
    tm_engine_opts eo = engine_opts(model, o);
    st = tm_engine_open(&l->engine, &eo, l->comm, err);
    if (st != TM_OK)
        goto fail;
    if (tm_comm_rank(l->comm) > 0) {
        st = tm_engine_follow(l->engine, err);
        if (st != TM_OK)
            tm_comm_abort(l->comm, tm_status_exit(st));
        tm_local_close(l);
        exit(0);
    }
    l->info = tm_engine_info_get(l->engine);
    return TM_OK;
fail:;
    /* Rank 0 tells the user. The launcher kills it as soon as another rank ends like this, so they give it time. */
    bool mute = tm_comm_rank(l->comm) > 0;
    tm_local_close(l);
    if (mute) {
        tm_sleep_ms(2000);
        _exit(tm_status_exit(st));
    }
    return st;
}

void tm_local_close(tm_local *l)
{
    tm_engine_close(l->engine);
    tm_template_destroy(l->template);
    tm_tokenizer_destroy(l->tokenizer);
    tm_comm_destroy(l->comm);
    *l = (tm_local){0};
}
