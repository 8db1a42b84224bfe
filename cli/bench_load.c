/* turbomesh bench load: how long a model takes from the start of the command to a ready engine and to the first token.
 *
 * One run, because only a process's first one opens the device. Whether the checkpoint comes from the disk or from the
 * page cache is up to the caller: read the files once before to measure the latter. */
#include <stdio.h>
#include <stdlib.h>

#include "cli/bench.h"
#include "cli/cmd.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/json.h"

typedef struct figures {
    int prompt;
    double ready_s, first_token_s; /* since the start */
} figures;

/* One token after a prompt of any ids: what they are does not matter to the time. */
static tm_status first_token(tm_engine *e, int prompt, tm_err *err)
{
    int vocab = tm_engine_info_get(e)->model.vocab;
    int32_t *ids = malloc((size_t)prompt * sizeof(*ids));
    if (!ids)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    for (int i = 0; i < prompt; i++)
        ids[i] = (int32_t)(((uint32_t)i * 2654435761u >> 8) % (uint32_t)vocab);
    tm_request r = {.id = 1,
                    .prompt = ids,
                    .prompt_len = (size_t)prompt,
                    .max_tokens = 1,
                    .sampling = tm_sampling_default()};
    r.sampling.temperature = 0;
    r.sampling.ignore_eos = true;
    tm_status st = tm_engine_submit(e, &r, err);
    for (bool done = false; st == TM_OK && !done;) {
        tm_step_events *b;
        st = tm_engine_wait(e, 60000, &b);
        if (st != TM_OK) {
            st = TM_FAIL(err, st, "the engine ended or made no step in a minute");
            break;
        }
        for (int i = 0; i < b->count; i++) {
            done = done || b->events[i].kind == TM_EVENT_FINISHED;
            if (b->events[i].kind == TM_EVENT_FINISHED && b->events[i].finish == TM_FINISH_ERROR)
                st = TM_FAIL(err, b->events[i].status, "the first request failed");
        }
        tm_engine_events_free(b);
    }
    free(ids);
    return st;
}

static void print_json(const tm_engine_info *i, const figures *f)
{
    const tm_model_info *m = &i->model;
    tm_buf b;
    tm_jw w;
    tm_buf_init(&b, 0);
    tm_jw_init(&w, &b);
    tm_jw_obj(&w);
    tm_jw_kstr(&w, "model", m->name);
    tm_jw_kstr(&w, "dtype", m->dtype);
    tm_jw_kstr(&w, "device", m->device);
    tm_jw_kint(&w, "tp", m->tp);
    tm_jw_kint(&w, "weight_bytes", (int64_t)m->weight_bytes);
    tm_jw_kint(&w, "kv_bytes", (int64_t)i->kv_bytes);
    tm_jw_knum(&w, "check_s", m->times.check);
    tm_jw_knum(&w, "weights_s", m->times.weights);
    tm_jw_knum(&w, "weights_gbs", (double)m->weight_bytes / m->times.weights / 1e9);
    tm_jw_knum(&w, "prepare_s", m->times.prepare);
    tm_jw_knum(&w, "workspaces_s", m->times.work);
    tm_jw_knum(&w, "kv_s", i->kv_seconds);
    tm_jw_knum(&w, "products_s", m->times.products);
    tm_jw_knum(&w, "steps_s", m->times.steps);
    tm_jw_knum(&w, "open_s", i->open_seconds);
    tm_jw_knum(&w, "ready_s", f->ready_s);
    tm_jw_kint(&w, "prompt_tokens", f->prompt);
    tm_jw_knum(&w, "first_token_s", f->first_token_s);
    tm_jw_obj_end(&w);
    printf("%s\n", b.data);
    tm_buf_deinit(&b);
}

static void print_table(const tm_engine_info *i, const figures *f)
{
    const tm_model_info *m = &i->model;
    printf("%s (%s) on %s, tp %d\n", m->name, m->dtype, m->device, m->tp);
    printf("  check and device %8.3f s\n", m->times.check);
    printf("  weights          %8.3f s = %.2f GB at %.2f GB/s a rank\n", m->times.weights,
           (double)m->weight_bytes / 1e9, (double)m->weight_bytes / m->times.weights / 1e9);
    printf("  prepare          %8.3f s\n", m->times.prepare);
    printf("  workspaces       %8.3f s\n", m->times.work);
    printf("  KV pool          %8.3f s = %.2f GB a rank\n", i->kv_seconds,
           (double)i->kv_bytes / 1e9);
    printf("  first products   %8.3f s\n", m->times.products);
    printf("  first steps      %8.3f s\n", m->times.steps);
    printf("  ready            %8.3f s after the start\n", f->ready_s);
    printf("  first token      %8.3f s after the start, of a prompt of %d tokens\n",
           f->first_token_s, f->prompt);
}

static double since(int64_t begin)
{
    return (double)(tm_clock_ns() - begin) * 1e-9;
}

int tm_bench_load(const char *model, const tm_bench_opts *o, int argc, char **argv)
{
    int64_t begin = tm_clock_ns();
    tm_err err = TM_ERR_INIT;
    tm_local l = {0};
    figures f = {0};
    tm_status st = tm_local_open(&l, model, &o->local, false, argc, argv, &err);
    if (st != TM_OK)
        return tm_cmd_fail("bench", &err);
    f.ready_s = since(begin);
    f.prompt = (int)TM_MIN(o->prefill, (int64_t)TM_MAX(l.info->model.max_positions - 1, 1));
    st = first_token(l.engine, f.prompt, &err);
    f.first_token_s = since(begin);
    if (st == TM_OK && o->json)
        print_json(l.info, &f);
    else if (st == TM_OK)
        print_table(l.info, &f);
    tm_local_close(&l);
    return st == TM_OK ? 0 : tm_cmd_fail("bench", &err);
}
