/* The scheduler: which tokens of which sequences the next step computes, and in which blocks.
 *
 * A pure data structure: no thread, no clock, no kernel. The engine calls, between two steps,
 *   submit / cancel   requests that arrived (admit)
 *   plan              the next step
 *   retire            what the step gave
 * always in this order on one thread.
 *
 * Where the tokens of a step are known to the device before they are known here, the next step can be planned first:
 *   plan A, advance A, plan B, retire A, (submit, cancel,) advance B, plan C, retire B, ...
 * After advance(A) the sequences stand as after A, each with a token that is awaited and goes into B's plan as
 * TM_TOKEN_PICKED. B counts on every sequence to go on unless A takes it to its length limit. One that A's token ended
 * leaves with retire(A); its rows of B are computed for nothing: B's entry loses its sequence. Blocks are given back
 * and given out while steps in flight still write them, which the order of the steps makes safe; into the prefix tree
 * go only blocks whose tokens are known and were not dropped.
 *
 * Rules
 *   Order: a sequence's rank is priority * TM_SCHED_AGE_STEPS minus the step of its arrival, then arrival:
 *   a higher priority goes first, but a level is worth no more than that many steps of waiting, so that
 *   nothing waits for ever.
 *   A step has one token of every running sequence that generates, then chunks of prompts, in rank order, up to
 *   max_step_tokens in all; when decodes leave less than a block of tokens, prompts still get one block.
 *   Admission takes waiting sequences in rank order and never overtakes one that does not fit. The blocks of
 *   all known tokens are taken at admission.
 *   A sequence whose next full block is being computed by a running one waits for it (n choices of one
 *   prompt share its blocks) and may be overtaken meanwhile.
 *   When blocks run out, the lowest-ranked running sequence is preempted: it gives its blocks back, keeps its tokens
 *   and waits with its old rank, to be computed again. The highest-ranked is never preempted, so the
 *   group always progresses.
 *   A waiting sequence of higher priority preempts lower ones for room. */
#ifndef TM_ENGINE_SCHED_SCHED_H
#define TM_ENGINE_SCHED_SCHED_H

#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"
#include "engine/sched/plan.h"
#include "engine/sched/seq.h"

/* One level of priority against waiting time, in steps. */
#define TM_SCHED_AGE_STEPS 1024

typedef struct tm_sched tm_sched;

typedef struct tm_sched_opts {
    int max_seqs;        /* running at once */
    int max_step_tokens; /* budget of a step */
    int max_prompt_rows; /* logits rows of a step beyond the one per sequence: prompt scoring */
    int queue_max;       /* waiting, not counting preempted ones */
    int n_blocks, block_tokens;
} tm_sched_opts;

/* One sequence of a step. */
typedef struct tm_step_seq {
    tm_seq *seq;        /* NULL: it has left while the step was in flight */
    int rows;           /* tokens computed */
    int first_logit;    /* index of its first logits row, in 0..n_logits-1 */
    int prompt_rows;    /* leading logits rows that belong to prompt positions ... */
    int32_t prompt_pos; /* ... from this one on */
    int sample_logit; /* logits row that gives the next token, or -1; may be the last prompt row too */
    int32_t position; /* of that token among the generated ones */
    bool first;       /* first step since it was submitted */
    bool complete;    /* set by advance: a prompt that is only scored ends with this step */
    tm_seq_end end;   /* set by retire; when not GOES_ON the sequence has left the scheduler */
    bool failed;      /* set by retire: left because its token could not be chosen */
} tm_step_seq;

typedef struct tm_step {
    tm_step_seq
        *seqs; /* [n_seqs] in the order of the batch; borrowed until the plan after its retire */
    int n_seqs;
    int n_tokens, n_decode, n_logits;
    int n_prefill_tokens;
} tm_step;

#define TM_SAMPLED_NONE   (-1) /* nothing to sample for this sequence */
#define TM_SAMPLED_FAILED (-2) /* end this sequence with an error */

typedef struct tm_sched_stats {
    int running, waiting, preempted_waiting; /* waiting counts the preempted ones too */
    int64_t
        waiting_tokens; /* known tokens that are not computed yet, one per generating sequence aside */
    int blocks_total, blocks_used, blocks_cached;
    uint64_t preemptions;
} tm_sched_stats;

tm_status tm_sched_create(tm_sched **out, const tm_sched_opts *opts, tm_err *err);
void tm_sched_destroy(tm_sched *s); /* sequences stay their owner's */

/* Takes a new sequence. BUSY when queue_max are waiting. */
tm_status tm_sched_submit(tm_sched *s, tm_seq *seq, tm_err *err);
/* Forgets a sequence in whatever state; steps in flight lose it. It is the caller's again. */
void tm_sched_cancel(tm_sched *s, tm_seq *seq);
/* Any sequence that is still inside, or NULL: for ending everything. */
tm_seq *tm_sched_any(const tm_sched *s);

/* Plans the next step into buf (see plan.h). At most one step may be in flight, and that one advanced. n_tokens is 0
 * only when the scheduler holds nothing, or a step is in flight; such a step is not retired. */
void tm_sched_plan(tm_sched *s, uint64_t step_number, tm_plan_buf *buf, tm_step *step);
/* The step was begun and will give its tokens to the next one by itself. */
void tm_sched_advance(tm_sched *s, tm_step *step);
/* The oldest step in flight. sampled[i] is the token of step->seqs[i], or one of TM_SAMPLED_*. */
void tm_sched_retire(tm_sched *s, tm_step *step, const int32_t *sampled);

void tm_sched_stats_get(const tm_sched *s, tm_sched_stats *out);
#endif
