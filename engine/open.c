/* Opening: the model, the size of the KV pool that every rank can afford, and rank 0's own parts. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "engine/engine_impl.h"

#define BLOCKS_MAX       (1 << 24)
#define LOGITS_BYTES_MAX ((size_t)64 << 20) /* for the rows of prompt positions */
#define PROMPT_ROWS_MIN  16
/* Tokens of a step: a chunk of a prompt delays every running answer. */
#define PREFILL_TOKENS_CPU 512
#define PREFILL_TOKENS_GPU 2048

static bool is_cpu(const tm_engine_opts *o)
{
    return !o->model.backend || strcmp(o->model.backend, "cpu") == 0;
}

/* Blocks that this rank can hold. */
static tm_status count_blocks(const tm_engine *e, int *out, tm_err *err)
{
    const tm_engine_opts *o = &e->opts;
    size_t block = e->info.model.kv_block_bytes, bytes;
    TM_TRY(tm_model_mem_free(e->model, &bytes, err));
    double n = o->cache_max_entry_count;
    if (n > 1.0) {
        if (n * (double)block > (double)bytes)
            return TM_FAIL(
                err, TM_STATUS_CONFIG,
                "cache_max_entry_count: %.0f blocks of %zu bytes, but %zu bytes are free", n, block,
                bytes);
    } else {
        double share = n * (double)bytes;
        if (is_cpu(o) && o->cache_bytes_max > 0)
            share = TM_MIN(share, (double)o->cache_bytes_max);
        n = floor(share / (double)block);
    }
    if (n < 1.0)
        return TM_FAIL(err, TM_STATUS_CONFIG,
                       "no room for a KV cache: %zu bytes are free, one block takes %zu", bytes,
                       block);
    *out = (int)TM_MIN(n, (double)BLOCKS_MAX);
    return TM_OK;
}

/* Every rank uses what the poorest one has. Counts up to 2^24 are exact in a float. */
static tm_status agree_blocks(tm_engine *e, int *blocks, tm_err *err)
{
    int size = tm_comm_size(e->comm);
    float mine = (float)*blocks, *all = calloc((size_t)size, sizeof(*all));
    if (!all)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for %d ranks", size);
    tm_status st = tm_comm_gather_cols_f32(e->comm, &mine, 1, 1, all);
    int32_t least = *blocks;
    if (tm_comm_rank(e->comm) == 0)
        for (int i = 0; i < size; i++)
            least = TM_MIN(least, (int32_t)all[i]);
    free(all);
    size_t len = sizeof(least);
    if (st == TM_OK)
        st = tm_comm_bcast(e->comm, &least, &len, sizeof(least));
    if (st != TM_OK || len != sizeof(least))
        return TM_FAIL(err, TM_STATUS_UNAVAILABLE, "the ranks could not agree on the KV pool");
    *blocks = least;
    return TM_OK;
}

/* A session of the length that was asked for has to fit. Without one the context becomes what fits, see limit_context. */
static tm_status check_session(const tm_engine *e, int blocks, tm_err *err)
{
    const tm_model_info *m = &e->info.model;
    int tokens = e->info.block_tokens, need = (m->max_positions + tokens - 1) / tokens;
    double gb = (double)m->kv_block_bytes / 1e9;
    if (e->opts.model.session_len == 0 || blocks >= need)
        return TM_OK;
    return TM_FAIL(err, TM_STATUS_CONFIG,
                   "session_len %d needs %d blocks of %d tokens (%.2f GB a rank), the KV pool has "
                   "%d (%.2f GB): lower session_len, or raise cache_max_entry_count (%g)",
                   m->max_positions, need, tokens, need * gb, blocks, blocks * gb,
                   e->opts.cache_max_entry_count);
}

static tm_status open_pool(tm_engine *e, tm_err *err)
{
    int blocks = 0;
    int64_t begin = tm_clock_ns();
    tm_status st = count_blocks(e, &blocks, err);
    TM_TRY(tm_comm_agree(e->comm, st, err));
    TM_TRY(agree_blocks(e, &blocks, err));
    TM_TRY(check_session(e, blocks, err));
    st = tm_model_kv_alloc(e->model, blocks, err);
    TM_TRY(tm_comm_agree(e->comm, st, err));
    e->info.blocks_total = blocks;
    e->info.kv_bytes = (size_t)blocks * e->info.model.kv_block_bytes;
    e->info.kv_seconds = (double)(tm_clock_ns() - begin) * 1e-9;
    return TM_OK;
}

static int prompt_rows(const tm_engine *e)
{
    size_t rows = LOGITS_BYTES_MAX / ((size_t)e->info.model.vocab * sizeof(float));
    rows = TM_MAX(rows, (size_t)PROMPT_ROWS_MIN);
    return (int)TM_MIN(rows, (size_t)e->opts.max_prefill_token_num);
}

static tm_status open_plan(tm_engine *e, tm_err *err)
{
    const tm_engine_info *i = &e->info;
    tm_plan_limits limits = {.max_tokens = i->max_prefill_token_num + i->max_batch_size,
                             .max_seqs = i->max_batch_size,
                             .max_blocks =
                                 (i->model.max_positions + i->block_tokens - 1) / i->block_tokens,
                             .max_logits = i->max_batch_size + prompt_rows(e),
                             .vocab = i->model.vocab,
                             .n_blocks = i->blocks_total,
                             .block_tokens = i->block_tokens};
    return tm_plan_buf_init(&e->plan, &limits, err);
}

static void stalled(void *user, int64_t after_ms)
{
    tm_engine *e = user;
    tm_log(TM_LOG_ERROR, "watchdog", "a step has made no progress for %lld ms: the group ends",
           (long long)after_ms);
    tm_comm_abort(e->comm, tm_status_exit(TM_STATUS_UNAVAILABLE));
}

/* Everything that only rank 0 has, up to its thread. */
static tm_status open_rank0(tm_engine *e, tm_err *err)
{
    const tm_engine_info *i = &e->info;
    e->limits = (tm_seq_limits){.max_len = i->model.max_positions,
                                .block_tokens = i->block_tokens,
                                .digest = i->model.digest,
                                .stop_ids = i->model.stop_ids,
                                .stop_count = i->model.stop_count,
                                .prefix_caching = e->opts.enable_prefix_caching};
    tm_sched_opts so = {.max_seqs = i->max_batch_size,
                        .max_step_tokens = i->max_prefill_token_num,
                        .max_prompt_rows = prompt_rows(e),
                        .queue_max = i->queue_max,
                        .n_blocks = i->blocks_total,
                        .block_tokens = i->block_tokens};
    size_t rows = (size_t)(so.max_seqs + so.max_prompt_rows), n = (size_t)so.max_seqs;
    e->logits = malloc(rows * (size_t)i->model.vocab * sizeof(*e->logits));
    e->sampled = malloc(n * sizeof(*e->sampled));
    e->picked = malloc(rows * sizeof(*e->picked));
    e->failures = malloc(n * sizeof(*e->failures));
    size_t edits = (size_t)tm_model_edits_max(e->model);
    e->draw_rows = malloc(n * sizeof(*e->draw_rows));
    e->draw_edits = malloc((edits + 1) * sizeof(*e->draw_edits));
    if (!e->logits || !e->sampled || !e->picked || !e->failures || !e->draw_rows || !e->draw_edits)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for %zu rows of logits", rows);
    tm_watchdog_opts wo = {.fixed_ms = e->opts.watchdog_ms, .stalled = stalled, .user = e};
    const tm_plan_limits none = {0};
    TM_TRY(tm_plan_buf_init(&e->signal, &none, err));
    TM_TRY(tm_sched_create(&e->sched, &so, err));
    TM_TRY(tm_sample_space_create(&e->space, i->model.vocab, err));
    TM_TRY(tm_inbox_init(&e->inbox, i->queue_max + i->max_batch_size, err));
    TM_TRY(tm_outbox_init(&e->outbox, err));
    e->inbox.stats.blocks_total = i->blocks_total;
    return tm_watchdog_create(&e->watchdog, &wo, err);
}

static tm_status check_opts(const tm_engine_opts *o, tm_err *err)
{
    const struct {
        const char *name;
        double value, min, max;
    } rules[] = {
        {"max_batch_size", o->max_batch_size, 1, 65536},
        {"max_prefill_token_num", o->max_prefill_token_num, 1, 1 << 20},
        {"queue_max", o->queue_max, 1, 1 << 20},
        {"cache_max_entry_count", o->cache_max_entry_count, 1e-6, BLOCKS_MAX},
        {"cache_bytes_max", (double)o->cache_bytes_max, 0, 1e18},
        {"watchdog_ms", (double)o->watchdog_ms, 0, 1e12},
        {"cache_block_seq_len", o->model.block_tokens, 1, TM_BLOCK_TOKENS_MAX},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rules); i++)
        if (!(rules[i].value >= rules[i].min && rules[i].value <= rules[i].max))
            return TM_FAIL(err, TM_STATUS_CONFIG, "%s is %g, possible are %g to %g", rules[i].name,
                           rules[i].value, rules[i].min, rules[i].max);
    return TM_OK;
}

/* The answer of one sequence may fill the whole pool, but not more. */
static void limit_context(tm_engine *e)
{
    int64_t pool = (int64_t)e->info.blocks_total * e->info.block_tokens;
    if (pool >= e->info.model.max_positions)
        return;
    if (tm_comm_rank(e->comm) == 0)
        tm_log(TM_LOG_WARN, "engine", "the KV pool holds %lld tokens: the context is %lld, not %d",
               (long long)pool, (long long)pool, e->info.model.max_positions);
    e->info.model.max_positions = (int)pool;
}

/* Where this rank's memory went. */
static void log_memory(const tm_engine *e)
{
    const tm_engine_info *i = &e->info;
    size_t left = 0;
    if (tm_model_mem_free(e->model, &left, NULL) != TM_OK)
        return;
    tm_log(TM_LOG_INFO, "memory",
           "weights %.2f GB, workspaces %.2f GB, KV pool %.2f GB (%d blocks, %lld tokens), "
           "%.2f GB left",
           (double)i->model.weight_bytes / 1e9, (double)i->model.work_bytes / 1e9,
           (double)i->kv_bytes / 1e9, i->blocks_total, (long long)i->blocks_total * i->block_tokens,
           (double)left / 1e9);
}

static void log_opened(const tm_engine *e)
{
    const tm_engine_info *i = &e->info;
    tm_log(TM_LOG_INFO, "engine",
           "%s (%s, %s) on %s, tp %d: context %d, KV pool %d blocks of %d tokens (%.1f MiB a rank)",
           i->model.name, i->model.arch, i->model.dtype, i->model.device, i->model.tp,
           i->model.max_positions, i->blocks_total, i->block_tokens,
           (double)i->kv_bytes / 1048576.0);
    log_memory(e);
    const tm_model_times *t = &i->model.times;
    tm_log(TM_LOG_INFO, "start",
           "check and device %.2f s, weights %.2f s, prepare %.2f s, workspaces %.2f s, "
           "KV pool %.2f s, first products %.2f s, first steps %.2f s: %.2f s in all",
           t->check, t->weights, t->prepare, t->work, i->kv_seconds, t->products, t->steps,
           i->open_seconds);
}

tm_status tm_engine_build(tm_engine *e, tm_err *err)
{
    tm_engine_opts *o = &e->opts;
    int64_t begin = tm_clock_ns();
    if (o->max_prefill_token_num == 0)
        o->max_prefill_token_num = is_cpu(o) ? PREFILL_TOKENS_CPU : PREFILL_TOKENS_GPU;
    TM_TRY(tm_comm_agree(e->comm, check_opts(o, err), err));
    o->model.max_step_tokens = o->max_prefill_token_num + o->max_batch_size;
    o->model.max_seqs = o->max_batch_size;
    tm_status st = tm_model_open(&e->model, &o->model, e->comm, err);
    TM_TRY(tm_comm_agree(e->comm, st, err));
    e->info = (tm_engine_info){.model = *tm_model_info_get(e->model),
                               .block_tokens = o->model.block_tokens,
                               .max_batch_size = o->max_batch_size,
                               .max_prefill_token_num = o->max_prefill_token_num,
                               .queue_max = o->queue_max};
    TM_TRY(open_pool(e, err));
    limit_context(e);
    TM_TRY(tm_model_warm(e->model, err));
    e->info.model.times = tm_model_info_get(e->model)->times;
    st = open_plan(e, err);
    if (st == TM_OK && tm_comm_rank(e->comm) == 0)
        st = open_rank0(e, err);
    TM_TRY(tm_comm_agree(e->comm, st, err));
    e->info.open_seconds = (double)(tm_clock_ns() - begin) * 1e-9;
    if (tm_comm_rank(e->comm) == 0)
        log_opened(e);
    return TM_OK;
}

void tm_engine_unbuild(tm_engine *e)
{
    tm_watchdog_destroy(e->watchdog);
    tm_sched_destroy(e->sched);
    tm_sample_space_destroy(e->space);
    tm_inbox_deinit(&e->inbox);
    tm_events_deinit(&e->events);
    tm_plan_buf_deinit(&e->plan);
    tm_plan_buf_deinit(&e->signal);
    free(e->logits);
    free(e->sampled);
    free(e->picked);
    free(e->draw_rows);
    free(e->draw_edits);
    free(e->failures);
    tm_model_close(e->model);
}
