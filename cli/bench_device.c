/* turbomesh bench engine on a GPU: tokens per second of decoding and of prefill through the whole engine, beside
 * the read bandwidth of the same device in the same run.
 *
 * Decoding: `--batch` prompts of `--context` random tokens are computed first; then the time of `--steps` steps in
 * which every stream generates is taken. Bytes of a step: the weights that are streamed and the keys and values that
 * are read. Prefill: the time from a prompt of `--prefill` tokens to its first token. Prompts are random, so the
 * prefix cache does not help. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/bench.h"
#include "cli/cmd.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/json.h"

enum { WARM_STEPS = 8, PROFILE_ROWS = 64 };

typedef struct figures {
    double read_rate;          /* bytes per second of the device's memory */
    double step_s, decode_tps; /* best repetition */
    double step_bytes;         /* of the step in the middle of the run */
    double prefill_s;
} figures;

static uint64_t g_random = 0x9e3779b97f4a7c15u;
static uint64_t g_id;

static void random_prompt(int32_t *ids, int64_t n, int vocab)
{
    for (int64_t i = 0; i < n; i++) {
        g_random = g_random * 6364136223846793005u + 1442695040888963407u;
        ids[i] = (int32_t)(3 + (g_random >> 33) % (uint64_t)(vocab - 3));
    }
}

static tm_status submit(tm_engine *e, const int32_t *ids, int64_t len, int64_t tokens, tm_err *err)
{
    tm_request r = {.id = ++g_id,
                    .prompt = ids,
                    .prompt_len = (size_t)len,
                    .max_tokens = (int32_t)tokens,
                    .sampling = tm_sampling_default()};
    r.sampling.temperature = 0;
    r.sampling.ignore_eos = true;
    return tm_engine_submit(e, &r, err);
}

/* Counts of one batch of events. */
typedef struct counts {
    int64_t tokens, first, finished; /* first: streams whose first token came */
} counts;

static tm_status next_events(tm_engine *e, counts *c, tm_err *err)
{
    tm_step_events *b;
    *c = (counts){0};
    tm_status st = tm_engine_wait(e, 60000, &b);
    if (st != TM_OK)
        return TM_FAIL(err, st, "the engine ended or made no step in a minute");
    for (int i = 0; i < b->count; i++) {
        const tm_event *ev = &b->events[i];
        c->tokens += ev->kind == TM_EVENT_TOKEN;
        c->first += ev->kind == TM_EVENT_TOKEN && ev->pos == 0;
        c->finished += ev->kind == TM_EVENT_FINISHED;
    }
    tm_engine_events_free(b);
    return TM_OK;
}

static tm_status begin_profile(tm_engine *e, tm_err *err)
{
    tm_status st = tm_engine_profile(e, NULL, 0, NULL);
    return st == TM_OK ? TM_OK : TM_FAIL(err, st, "--profile: this device cannot time its kernels");
}

static tm_status print_profile(tm_engine *e, const char *title, tm_err *err)
{
    tm_profile_row rows[PROFILE_ROWS];
    int count = 0;
    double all = 0;
    tm_status st = tm_engine_profile(e, rows, PROFILE_ROWS, &count);
    if (st != TM_OK)
        return TM_FAIL(err, st, "--profile: the device's events failed");
    for (int i = 0; i < count; i++)
        all += rows[i].seconds;
    fprintf(stderr, "%s: %.3f ms in kernels\n  share      calls   us/call  kernel\n", title,
            all * 1e3);
    for (int i = 0; i < count; i++)
        fprintf(stderr, "  %4.1f %%  %8lld  %8.2f  %s\n", 100 * rows[i].seconds / all,
                (long long)rows[i].calls, rows[i].seconds * 1e6 / (double)rows[i].calls,
                rows[i].name);
    return TM_OK;
}

/* Time of o->steps steps in which all streams generate. */
static tm_status decode(tm_engine *e, const tm_bench_opts *o, int32_t *ids, double *seconds,
                        tm_err *err)
{
    int64_t started = 0, finished = 0, steps = 0, begin = 0;
    int vocab = tm_engine_info_get(e)->model.vocab;
    *seconds = 0;
    for (int64_t i = 0; i < o->batch; i++) {
        random_prompt(ids, o->context, vocab);
        /* The streams that started first go on until the last one has done its steps. */
        TM_TRY(submit(e, ids, o->context, o->steps + WARM_STEPS + o->batch + 64, err));
    }
    while (finished < o->batch) {
        counts c;
        TM_TRY(next_events(e, &c, err));
        started += c.first;
        finished += c.finished;
        if (started < o->batch || c.tokens < o->batch || finished > 0)
            continue;
        if (++steps == WARM_STEPS) {
            if (o->local.no_graphs)
                TM_TRY(begin_profile(e, err));
            begin = tm_clock_ns();
        }
        if (steps == WARM_STEPS + o->steps) {
            *seconds = (double)(tm_clock_ns() - begin) * 1e-9;
            for (uint64_t id = g_id; id > g_id - (uint64_t)o->batch; id--)
                tm_engine_cancel(e, id);
        }
    }
    return *seconds > 0 ? TM_OK
                        : TM_FAIL(err, TM_STATUS_INVALID,
                                  "the streams did not generate %lld steps together: the KV cache "
                                  "or the context is too small",
                                  (long long)o->steps);
}

static tm_status prefill(tm_engine *e, const tm_bench_opts *o, int32_t *ids, double *seconds,
                         tm_err *err)
{
    int64_t begin = tm_clock_ns(), finished = 0;
    random_prompt(ids, o->prefill, tm_engine_info_get(e)->model.vocab);
    TM_TRY(submit(e, ids, o->prefill, 1, err));
    while (finished == 0) {
        counts c;
        TM_TRY(next_events(e, &c, err));
        if (c.first)
            *seconds = (double)(tm_clock_ns() - begin) * 1e-9;
        finished += c.finished;
    }
    return TM_OK;
}

static tm_status read_rate(const tm_local_opts *o, double *rate, tm_err *err)
{
    const tm_backend *b = tm_backend_find(o->device);
    tm_device *dev = NULL;
    if (!b || !b->dev->read_rate)
        return TM_FAIL(err, TM_STATUS_CONFIG, "device '%.40s' is unknown or not in this build",
                       o->device);
    const tm_device_opts opts = {.index = 0};
    TM_TRY(b->dev->open(&dev, &opts, err));
    tm_status st = b->dev->read_rate(dev, (size_t)8 << 30, rate, err);
    b->dev->close(dev);
    return st;
}

/* One run of each kind under the profile, tables on stderr. */
static tm_status profile(const tm_local *l, const tm_bench_opts *o, int32_t *ids, tm_err *err)
{
    double seconds;
    TM_TRY(decode(l->engine, o, ids, &seconds, err));
    TM_TRY(print_profile(l->engine, "decode", err));
    TM_TRY(begin_profile(l->engine, err));
    TM_TRY(prefill(l->engine, o, ids, &seconds, err));
    return print_profile(l->engine, "prefill", err);
}

static tm_status measure(const tm_local *l, const tm_bench_opts *o, figures *f, tm_err *err)
{
    const tm_model_info *m = &l->info->model;
    int32_t *ids = malloc((size_t)TM_MAX(o->context, o->prefill) * sizeof(*ids));
    if (!ids)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    tm_status st = TM_OK;
    f->step_s = f->prefill_s = 1e30;
    if (o->local.no_graphs)
        st = profile(l, o, ids, err);
    for (int64_t i = 0; !o->local.no_graphs && i < o->repeat && st == TM_OK; i++) {
        double seconds = 0;
        st = decode(l->engine, o, ids, &seconds, err);
        if (st == TM_OK)
            f->step_s = TM_MIN(f->step_s, seconds / (double)o->steps);
        for (int k = 0; k < 2 && st == TM_OK; k++) {
            st = prefill(l->engine, o, ids, &seconds, err);
            if (st == TM_OK)
                f->prefill_s = TM_MIN(f->prefill_s, seconds);
        }
    }
    free(ids);
    f->decode_tps = (double)o->batch / f->step_s;
    double context = (double)o->context + WARM_STEPS + (double)o->steps / 2;
    f->step_bytes = (double)m->step_read_bytes +
                    (double)o->batch * context * (double)m->kv_block_bytes / l->info->block_tokens;
    return st;
}

static void print_json(const tm_model_info *m, const tm_bench_opts *o, const figures *f)
{
    tm_buf b;
    tm_jw w;
    tm_buf_init(&b, 0);
    tm_jw_init(&w, &b);
    tm_jw_obj(&w);
    tm_jw_kstr(&w, "model", m->name);
    tm_jw_kstr(&w, "dtype", m->dtype);
    tm_jw_kstr(&w, "device", m->device);
    tm_jw_kint(&w, "batch", o->batch);
    tm_jw_kint(&w, "context", o->context);
    tm_jw_kint(&w, "prefill", o->prefill);
    tm_jw_knum(&w, "read_gbs", f->read_rate / 1e9);
    tm_jw_knum(&w, "step_ms", f->step_s * 1e3);
    tm_jw_knum(&w, "decode_tps", f->decode_tps);
    tm_jw_knum(&w, "step_gb", f->step_bytes / 1e9);
    tm_jw_knum(&w, "decode_gbs", f->step_bytes / f->step_s / 1e9);
    tm_jw_knum(&w, "decode_share_of_read", f->step_bytes / f->step_s / f->read_rate);
    tm_jw_knum(&w, "prefill_ms", f->prefill_s * 1e3);
    tm_jw_knum(&w, "prefill_tps", (double)o->prefill / f->prefill_s);
    tm_jw_obj_end(&w);
    printf("%s\n", b.data);
    tm_buf_deinit(&b);
}

static void print_table(const tm_model_info *m, const tm_bench_opts *o, const figures *f)
{
    printf("%s (%s) on %s\n", m->name, m->dtype, m->device);
    printf("  read bandwidth        %9.3f TB/s\n", f->read_rate / 1e12);
    printf("  decode, batch %3lld, context %lld\n", (long long)o->batch, (long long)o->context);
    printf("                        %9.1f tok/s, %.3f ms a step\n", f->decode_tps, f->step_s * 1e3);
    printf("                        %9.3f GB a step = %.3f TB/s = %.0f %% of the read bandwidth\n",
           f->step_bytes / 1e9, f->step_bytes / f->step_s / 1e12,
           100 * f->step_bytes / f->step_s / f->read_rate);
    printf("  prefill, %5lld tokens %9.2f ms = %.0f tok/s\n", (long long)o->prefill,
           f->prefill_s * 1e3, (double)o->prefill / f->prefill_s);
}

int tm_bench_device(const char *model, const tm_bench_opts *o, int argc, char **argv)
{
    tm_err err = TM_ERR_INIT;
    tm_local l = {0};
    figures f = {0};
    tm_status st = read_rate(&o->local, &f.read_rate, &err);
    if (st == TM_OK)
        st = tm_local_open(&l, model, &o->local, false, argc, argv, &err);
    if (st != TM_OK)
        return tm_cmd_fail("bench", &err);
    st = measure(&l, o, &f, &err);
    if (st == TM_OK && o->local.no_graphs)
        fprintf(stderr, "%s (%s) on %s\n", l.info->model.name, l.info->model.dtype,
                l.info->model.device);
    else if (st == TM_OK && o->json)
        print_json(&l.info->model, o, &f);
    else if (st == TM_OK)
        print_table(&l.info->model, o, &f);
    tm_local_close(&l);
    return st == TM_OK ? 0 : tm_cmd_fail("bench", &err);
}
