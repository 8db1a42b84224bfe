/* The engine: the only face that worker, CLI and library see.
 *
 * Rank 0 opens an engine, which starts one engine thread that owns scheduler, cache and model. submit,
 * cancel, stats and wait may be called from any thread. Ranks > 0 open it too and call
 * tm_engine_follow, which returns when rank 0 closes its engine or the group is lost.
 *
 * A step: admit -> plan -> broadcast -> forward -> sample -> retire; where the device chooses the tokens, the next one
 * is begun before this one has ended (steps.c). Everything that happened in a step leaves as one tm_step_events,
 * fetched with tm_engine_wait in order. The queue of undelivered batches is bounded: when the reader does not keep up
 * the engine pauses, it never drops an event.
 *
 * Every accepted request ends with exactly one FINISHED event. Token positions count generated tokens
 * from 0 and include those that a continued request brought along (`generated`), which are not repeated:
 * the first new one has position generated_len. */
#ifndef TM_ENGINE_ENGINE_H
#define TM_ENGINE_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/sampling.h"
#include "common/status.h"
#include "engine/model/model.h"
#include "parallel/comm.h"

typedef struct tm_engine tm_engine;

typedef struct tm_engine_opts {
    tm_model_opts model;
    int max_batch_size;        /* running sequences, default 128 */
    int max_prefill_token_num; /* tokens of one step; 0 (default) = 512 on the CPU, 2048 on a GPU */
    int queue_max;             /* waiting requests before BUSY, default 1024 */
    double
        cache_max_entry_count; /* <= 1: share of the memory left; > 1: number of blocks; default 0.8 */
    int64_t cache_bytes_max;    /* cap of the KV pool on the CPU backend, default 1 GiB; 0 = none */
    bool enable_prefix_caching; /* default true */
    int64_t
        watchdog_ms; /* a step that takes longer ends the group; default 0 = max(5 s, 20 x median) */
} tm_engine_opts;
tm_engine_opts tm_engine_opts_default(void);

typedef struct tm_engine_info {
    tm_model_info model;
    int block_tokens, blocks_total;
    size_t kv_bytes;
    int max_batch_size, max_prefill_token_num, queue_max;
    double kv_seconds, open_seconds; /* of the KV pool, of opening in all; see also model.times */
} tm_engine_info;

typedef struct tm_request {
    uint64_t id; /* chosen by the caller, unique among live requests */
    const int32_t *prompt;
    size_t prompt_len;        /* >= 1 */
    const int32_t *generated; /* continuation: tokens already sent to the client */
    size_t generated_len;
    int32_t
        max_tokens; /* generated tokens in all, continued ones included; 0 = score the prompt only */
    const int32_t *stop_ids; /* in addition to the model's */
    size_t stop_count;
    tm_sampling sampling; /* logit_bias borrowed during the call */
    int32_t priority;     /* higher first, then arrival */
    uint64_t cache_salt;  /* prefix blocks are shared only within one salt */
    int32_t logits_last;  /* raw logits of this many last prompt positions (score tool), 0 = none */
} tm_request;

typedef enum tm_event_kind {
    TM_EVENT_ADMITTED,       /* prompt_tokens, cached_tokens */
    TM_EVENT_PROMPT_LOGPROB, /* pos (prompt index of `token`, from 1), logprob, tops */
    TM_EVENT_LOGITS,  /* pos (prompt index), logits_at: [vocab] floats at that index of `logits` */
    TM_EVENT_TOKEN,   /* pos, token, logprob (if asked), tops */
    TM_EVENT_FINISHED /* finish; the request is forgotten afterwards */
} tm_event_kind;

typedef enum tm_finish {
    TM_FINISH_STOP,   /* stop id (the id is the last TOKEN event) */
    TM_FINISH_LENGTH, /* max_tokens or the context limit */
    TM_FINISH_CANCELLED,
    TM_FINISH_ERROR /* the engine could not go on with this request: see status */
} tm_finish;

typedef struct tm_top_logprob {
    int32_t token;
    float logprob;
} tm_top_logprob;

typedef struct tm_event {
    tm_event_kind kind;
    uint64_t request;
    int32_t pos, token;
    float logprob;
    int32_t top_first, top_count; /* in tm_step_events.tops */
    int32_t prompt_tokens, cached_tokens;
    tm_finish finish;
    tm_status status;
    size_t logits_at;
} tm_event;

typedef struct tm_step_events {
    uint64_t step;
    int count;
    tm_event *events;
    tm_top_logprob *tops;
    float *logits;
} tm_step_events;

typedef struct tm_engine_stats {
    uint64_t steps;
    int running, waiting;
    int64_t waiting_tokens; /* prompt tokens not yet computed, of waiting and running sequences */
    int blocks_total, blocks_used,
        blocks_cached; /* used: referred to by sequences; cached: reusable */
    uint64_t prompt_tokens, cached_tokens, generated_tokens, finished, preemptions;
    float prefill_tps, decode_tps; /* moving averages, 0 = unknown */
    float step_ms;                 /* moving average of a step */
    int64_t step_age_ms;           /* since the last step ended; 0 when idle */
} tm_engine_stats;

/* Collective: every rank of comm opens with equal options. comm stays the caller's. */
tm_status tm_engine_open(tm_engine **out, const tm_engine_opts *opts, tm_comm *comm, tm_err *err);
/* Rank 0: cancels what runs and releases the followers. Batches that are still queued can be fetched; then
 * tm_engine_wait answers CLOSED. A thread that reads events stops itself on CLOSED and is joined between stop and
 * close. Waits for the step in progress. */
void tm_engine_stop(tm_engine *e);
/* Stops, waits for threads inside tm_engine_wait to leave, and frees. NULL is fine. */
void tm_engine_close(tm_engine *e);
const tm_engine_info *tm_engine_info_get(const tm_engine *e);

/* Ranks > 0: serves rank 0's steps. TM_OK on an orderly end, UNAVAILABLE when the group is lost. */
tm_status tm_engine_follow(tm_engine *e, tm_err *err);

/* Copies everything it needs. INVALID (bad ids, prompt too long: says both numbers), BUSY (queue full),
 * UNAVAILABLE (group lost), CLOSED. */
tm_status tm_engine_submit(tm_engine *e, const tm_request *r, tm_err *err);
/* Takes effect within one step; unknown ids are ignored. */
void tm_engine_cancel(tm_engine *e, uint64_t id);

/* The next batch, or TIMEOUT, CLOSED (after stop), UNAVAILABLE (group lost; every request was told by then). A
 * negative timeout waits without end. Free with _events_free. */
tm_status tm_engine_wait(tm_engine *e, int64_t timeout_ms, tm_step_events **out);
void tm_engine_events_free(tm_step_events *ev);
/* Wakes a thread in tm_engine_wait (it returns TIMEOUT); when none is there, the next one to come. */
void tm_engine_wake(tm_engine *e);

/* Times the device's kernels one by one (tm_model_profile). rows NULL begins, which may be while steps run; the end is
 * taken when every request has finished. */
tm_status tm_engine_profile(tm_engine *e, tm_profile_row *rows, int max, int *count);

void tm_engine_stats_get(tm_engine *e, tm_engine_stats *out);

#endif
