/* turbomesh bench engine: decode speed as a share of the read bandwidth that the same threads reach in the
 * same run, prefill speed, the gain of batching, and the gain of the prefix cache. Tokens are random ids, so
 * that neither the cache nor the text helps by accident. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cli/bench.h"
#include "cli/cmd.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/json.h"

typedef struct run {
    int64_t first_token_ns, end_ns, begin_ns;
    int tokens;
} run;

static uint64_t g_rng = 0x9e3779b97f4a7c15u;
static uint64_t g_id;

static int32_t random_token(int vocab)
{
    g_rng ^= g_rng << 13;
    g_rng ^= g_rng >> 7;
    g_rng ^= g_rng << 17;
    return (int32_t)(3 + g_rng % (uint64_t)(vocab - 3));
}

static void random_prompt(int32_t *ids, int n, int vocab)
{
    for (int i = 0; i < n; i++)
        ids[i] = random_token(vocab);
}

/* `streams` requests with prompts of len tokens each, all generating `tokens`. */
static tm_status generate(tm_engine *e, const int32_t *prompts, int len, int streams, int tokens,
                          run *out, tm_err *err)
{
    tm_status st = TM_OK;
    int done = 0;
    *out = (run){.begin_ns = tm_clock_ns()};
    for (int i = 0; i < streams && st == TM_OK; i++) {
        tm_request r = {.id = ++g_id,
                        .prompt = prompts + (size_t)i * (size_t)len,
                        .prompt_len = (size_t)len,
                        .max_tokens = tokens,
                        .sampling = tm_sampling_default()};
        r.sampling.temperature = 0;
        r.sampling.ignore_eos = true;
        st = tm_engine_submit(e, &r, err);
    }
    while (st == TM_OK && done < streams) {
        tm_step_events *b;
        st = tm_engine_wait(e, 10000, &b);
        if (st != TM_OK)
            return TM_FAIL(err, st, "the engine ended or made no step in 10 s");
        for (int i = 0; i < b->count; i++) {
            if (b->events[i].kind == TM_EVENT_TOKEN && out->tokens++ == 0)
                out->first_token_ns = tm_clock_ns();
            done += b->events[i].kind == TM_EVENT_FINISHED;
        }
        tm_engine_events_free(b);
    }
    out->end_ns = tm_clock_ns();
    return st;
}

typedef uint64_t lanes __attribute__((vector_size(32)));
enum { HUGE_PAGE = 2 << 20 };

/* Four streams at a time, each fetched ahead: nothing that reads once is faster here than this. */
static uint64_t read_share(const lanes *p, size_t n)
{
    const size_t part = n / 4;
    lanes s[4] = {{0}};
    for (size_t i = 0; i + 2 <= part; i += 2) {
#pragma GCC unroll 4
        for (size_t k = 0; k < 4; k++) {
            const lanes *at = p + k * part + i;
            __builtin_prefetch(at + 32);
            s[k] += at[0] + at[1];
        }
    }
    s[0] += s[1] + s[2] + s[3];
    return s[0][0] + s[0][1] + s[0][2] + s[0][3];
}

/* Bytes per second of summing a buffer with all the threads of the rank; best of several passes. */
static double read_bandwidth(size_t bytes, int threads)
{
    size_t size = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    size_t share = bytes / sizeof(lanes) / (size_t)threads;
    lanes *buf = aligned_alloc(HUGE_PAGE, size);
    double best = 0;
    volatile uint64_t sink = 0;
    if (!buf)
        return 0;
    (void)madvise(buf, size, MADV_HUGEPAGE); /* as the weights lie; only advice */
    memset(buf, 1, size);
    for (int pass = 0; pass < 15; pass++) {
        int64_t t0 = tm_clock_ns();
        uint64_t sum = 0;
#pragma omp parallel for reduction(+ : sum) num_threads(threads) schedule(static, 1)
        for (int t = 0; t < threads; t++)
            sum += read_share(buf + (size_t)t * share, share);
        sink += sum;
        double rate = (double)(share * (size_t)threads * sizeof(lanes)) /
                      ((double)(tm_clock_ns() - t0) * 1e-9);
        best = rate > best ? rate : best;
    }
    free(buf);
    return best;
}

typedef struct figures {
    double bandwidth_weights, bandwidth_large, decode_tps, decode_gbs, prefill_tps, single_tps,
        batch_tps, ttft_cold_ms, ttft_warm_ms;
} figures;

static double seconds(int64_t a, int64_t b)
{
    return (double)(b - a) * 1e-9;
}

static tm_status measure(tm_local *l, const tm_bench_opts *o, int threads, figures *f, tm_err *err)
{
    const tm_model_info *m = &l->info->model;
    int steps = (int)o->steps, batch = (int)o->batch;
    size_t cells = (size_t)TM_MAX(TM_MAX(o->prefill, o->context + 64), 64 * batch) + 64;
    int32_t *ids = malloc(cells * sizeof *ids);
    if (!ids)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    tm_status st = TM_OK;
    run r;
    for (int64_t i = 0; i < o->repeat && st == TM_OK; i++) {
        double bw = read_bandwidth(m->step_read_bytes, threads);
        f->bandwidth_weights = TM_MAX(f->bandwidth_weights, bw);
        random_prompt(ids, 16, m->vocab);
        TM_TRY_GOTO(generate(l->engine, ids, 16, 1, steps + 1, &r, err), out);
        f->decode_tps = TM_MAX(f->decode_tps, steps / seconds(r.first_token_ns, r.end_ns));
        f->single_tps = TM_MAX(f->single_tps, r.tokens / seconds(r.begin_ns, r.end_ns));
        random_prompt(ids, (int)o->prefill, m->vocab);
        TM_TRY_GOTO(generate(l->engine, ids, (int)o->prefill, 1, 1, &r, err), out);
        f->prefill_tps =
            TM_MAX(f->prefill_tps, (double)o->prefill / seconds(r.begin_ns, r.first_token_ns));
        random_prompt(ids, 16 * batch, m->vocab);
        TM_TRY_GOTO(generate(l->engine, ids, 16, batch, steps + 1, &r, err), out);
        f->batch_tps = TM_MAX(f->batch_tps, r.tokens / seconds(r.begin_ns, r.end_ns));
        random_prompt(ids, (int)o->context + 16, m->vocab);
        TM_TRY_GOTO(generate(l->engine, ids, (int)o->context + 16, 1, 1, &r, err), out);
        double cold = 1e3 * seconds(r.begin_ns, r.first_token_ns);
        random_prompt(ids + o->context, 16, m->vocab);
        TM_TRY_GOTO(generate(l->engine, ids, (int)o->context + 16, 1, 1, &r, err), out);
        double warm = 1e3 * seconds(r.begin_ns, r.first_token_ns);
        if (i == 0 || warm / cold < f->ttft_warm_ms / f->ttft_cold_ms) {
            f->ttft_cold_ms = cold;
            f->ttft_warm_ms = warm;
        }
    }
    f->bandwidth_large = read_bandwidth((size_t)512 << 20, threads);
    f->decode_gbs = f->decode_tps * (double)m->step_read_bytes;
out:
    free(ids);
    return st;
}

static void print_json(const tm_model_info *m, const figures *f, int threads)
{
    tm_buf b;
    tm_jw w;
    tm_buf_init(&b, 0);
    tm_jw_init(&w, &b);
    tm_jw_obj(&w);
    tm_jw_kstr(&w, "model", m->name);
    tm_jw_kstr(&w, "device", m->device);
    tm_jw_kint(&w, "tp", m->tp);
    tm_jw_kint(&w, "threads", threads);
    tm_jw_kint(&w, "step_read_bytes", (int64_t)m->step_read_bytes);
    tm_jw_knum(&w, "read_gbs_weights_size", f->bandwidth_weights / 1e9);
    tm_jw_knum(&w, "read_gbs_512mib", f->bandwidth_large / 1e9);
    tm_jw_knum(&w, "decode_tps", f->decode_tps);
    tm_jw_knum(&w, "decode_gbs", f->decode_gbs / 1e9);
    tm_jw_knum(&w, "decode_share_of_read", f->decode_gbs / f->bandwidth_weights);
    tm_jw_knum(&w, "prefill_tps", f->prefill_tps);
    tm_jw_knum(&w, "single_stream_tps", f->single_tps);
    tm_jw_knum(&w, "batch_tps", f->batch_tps);
    tm_jw_knum(&w, "batch_gain", f->batch_tps / f->single_tps);
    tm_jw_knum(&w, "ttft_cold_ms", f->ttft_cold_ms);
    tm_jw_knum(&w, "ttft_cached_ms", f->ttft_warm_ms);
    tm_jw_knum(&w, "ttft_cached_share", f->ttft_warm_ms / f->ttft_cold_ms);
    tm_jw_obj_end(&w);
    printf("%s\n", b.data);
    tm_buf_deinit(&b);
}

static void print_table(const tm_model_info *m, const tm_bench_opts *o, const figures *f,
                        int threads)
{
    printf("%s on %s, tp %d, %d thread%s, %.1f MB of weights read by a step\n", m->name, m->device,
           m->tp, threads, threads == 1 ? "" : "s", (double)m->step_read_bytes / 1e6);
    printf("  read bandwidth       %8.2f GB/s over the same bytes, %.2f GB/s over 512 MiB\n",
           f->bandwidth_weights / 1e9, f->bandwidth_large / 1e9);
    printf("  decode, batch 1      %8.1f tok/s = %.2f GB/s = %.0f %% of the read bandwidth\n",
           f->decode_tps, f->decode_gbs / 1e9, 100 * f->decode_gbs / f->bandwidth_weights);
    printf("  prefill, %4lld tokens %8.1f tok/s\n", (long long)o->prefill, f->prefill_tps);
    printf("  %3lld streams          %8.1f tok/s = %.2f x one stream (%.1f)\n", (long long)o->batch,
           f->batch_tps, f->batch_tps / f->single_tps, f->single_tps);
    printf("  %lld-token prefix     %8.2f ms first, %.2f ms cached = %.2f x\n",
           (long long)o->context, f->ttft_cold_ms, f->ttft_warm_ms,
           f->ttft_warm_ms / f->ttft_cold_ms);
}

int tm_bench_engine(const char *model, const tm_bench_opts *o, int argc, char **argv)
{
    tm_err err = TM_ERR_INIT;
    tm_local l;
    tm_status st = tm_local_open(&l, model, &o->local, false, argc, argv, &err);
    if (st != TM_OK)
        return tm_cmd_fail("bench", &err);
    int threads = (int)o->local.threads;
#ifdef _OPENMP
    if (threads == 0)
        threads = TM_MAX(1, omp_get_num_procs() / l.info->model.tp);
#else
    threads = 1;
#endif
    figures f = {0};
    if (o->context + 80 > l.info->model.max_positions ||
        o->prefill + 8 > l.info->model.max_positions)
        st = TM_FAIL(&err, TM_STATUS_INVALID,
                     "--context or --prefill is over the model's context of %d tokens",
                     l.info->model.max_positions);
    if (st == TM_OK)
        st = measure(&l, o, threads, &f, &err);
    if (st == TM_OK && o->json)
        print_json(&l.info->model, &f, threads);
    else if (st == TM_OK)
        print_table(&l.info->model, o, &f, threads);
    tm_local_close(&l);
    return st == TM_OK ? 0 : tm_cmd_fail("bench", &err);
}
