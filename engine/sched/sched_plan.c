/* Planning a step: room for what runs, chunks of prompts, admission, and the flat arrays of the batch.
 *
 * Admission never takes room from a running sequence of the same priority, and asks for one spare block per
 * running sequence: without the spare a full pool would admit, preempt and admit again. */
#include <string.h>

#include "common/check.h"
#include "engine/sched/sched.h"
#include "engine/sched/sched_impl.h"

/* Waiting sequences looked at in one step beyond those admitted. */
#define LOOK_AHEAD 64

/* What is left of the step being planned. */
typedef struct budget {
    int prompt_tokens, prompt_rows;
} budget;

/* LATER: others may overtake it. */
typedef enum fit { FIT_YES, FIT_NO_ROOM, FIT_LATER } fit;

static int blocks_for(const tm_sched *s, int tokens)
{
    return (tokens + s->opts.block_tokens - 1) / s->opts.block_tokens;
}

/* Leading blocks that may come from the cache: the last token is always computed, and so is every prompt
 * position whose logits are still to be delivered. */
static int usable_blocks(const tm_seq *seq)
{
    int from = seq->rows_next < seq->rows_to ? seq->rows_next : seq->n_tokens - 1;
    return TM_MIN(from / seq->block_tokens, seq->n_keys);
}

/* Fills seq->blocks with the cached prefix and returns its length in blocks. Takes no reference. */
static int match_prefix(const tm_sched *s, tm_seq *seq)
{
    int usable = usable_blocks(seq), n = 0;
    for (; n < usable; n++) {
        tm_prefix_node node = {.parent = n ? seq->blocks[n - 1] : -1,
                               .salt = seq->salt,
                               .key = &seq->keys[n],
                               .tokens = seq->tokens + n * seq->block_tokens};
        int32_t block = tm_prefix_tree_find(s->tree, &node);
        if (block < 0)
            break;
        seq->blocks[n] = block;
    }
    return n;
}

/* True when a running sequence is about to compute block n of seq. The key stands for all tokens up to the
 * end of the block; a collision would only make seq wait for nothing. */
static bool sibling_computes(const tm_sched *s, const tm_seq *seq, int n)
{
    if (n >= usable_blocks(seq))
        return false;
    for (int i = 0; i < s->n_running; i++) {
        const tm_seq *r = s->running[i];
        if (n >= r->n_published && n < r->n_keys && tm_prefix_key_equal(&r->keys[n], &seq->keys[n]))
            return true;
    }
    return false;
}

static fit try_fit(const tm_sched *s, tm_seq *seq, int *matched)
{
    if (tm_seq_is_full(seq)) /* thrown out, and ends with the step in flight */
        return FIT_LATER;
    int n = match_prefix(s, seq);
    if (sibling_computes(s, seq, n))
        return FIT_LATER;
    if (s->n_running == s->opts.max_seqs)
        return FIT_NO_ROOM;
    int available = tm_block_pool_free(s->pool) + tm_block_pool_reusable(s->pool);
    for (int i = 0; i < n; i++)
        available -= tm_block_pool_refs(s->pool, seq->blocks[i]) == 0;
    if (blocks_for(s, seq->n_tokens) - n + s->n_running > available)
        return FIT_NO_ROOM;
    *matched = n;
    return FIT_YES;
}

/* The head of the queue may push out running sequences of lower priority. */
static void make_room(tm_sched *s)
{
    tm_seq *head = s->wait_first;
    int matched;
    while (head && s->n_running > 0 && try_fit(s, head, &matched) == FIT_NO_ROOM) {
        tm_seq *last = s->running[s->n_running - 1];
        if (last->priority >= head->priority || !tm_sched_before(head, last))
            break;
        tm_sched_preempt(s, last);
    }
}

/* Every running sequence has a block for its next token, or is preempted. */
static void extend_running(tm_sched *s)
{
    for (int i = 0; i < s->n_running; i++) {
        tm_seq *seq = s->running[i];
        while (seq->state == TM_SEQ_RUNNING && seq->n_blocks < blocks_for(s, tm_seq_wanted(seq))) {
            int32_t block = tm_prefix_tree_take(s->tree);
            if (block >= 0)
                seq->blocks[seq->n_blocks++] = block;
            else
                tm_sched_preempt(s, s->running[s->n_running - 1]);
        }
    }
}

/* Tokens of seq that fit into the step; bounded by the logits rows that its prompt positions need. */
static int chunk_of(const tm_seq *seq, const budget *left)
{
    int n = TM_MIN(tm_seq_wanted(seq) - seq->n_computed, left->prompt_tokens);
    int first = TM_MAX(seq->n_computed, seq->rows_next);
    int rows = TM_MIN(seq->n_computed + n, seq->rows_to) - first;
    if (rows > left->prompt_rows)
        n = first + left->prompt_rows - seq->n_computed;
    return n;
}

static int prompt_rows_of(const tm_seq *seq)
{
    int first = TM_MAX(seq->n_computed, seq->rows_next);
    int rows = TM_MIN(seq->n_computed + seq->step_rows, seq->rows_to) - first;
    return TM_MAX(rows, 0);
}

static void give_chunk(tm_seq *seq, budget *left)
{
    seq->step_rows = chunk_of(seq, left);
    left->prompt_tokens -= seq->step_rows;
    left->prompt_rows -= prompt_rows_of(seq);
}

static bool is_decode(const tm_seq *seq)
{
    return tm_seq_wanted(seq) - seq->n_computed == 1 && seq->n_computed >= seq->n_prompt;
}

static budget plan_running(tm_sched *s)
{
    int decodes = 0;
    for (int i = 0; i < s->n_running; i++) {
        s->running[i]->step_rows = is_decode(s->running[i]);
        decodes += s->running[i]->step_rows;
    }
    int least = TM_MIN(s->opts.block_tokens, s->opts.max_step_tokens);
    budget left = {TM_MAX(s->opts.max_step_tokens - decodes, least), s->opts.max_prompt_rows};
    for (int i = 0; i < s->n_running; i++)
        if (!s->running[i]->step_rows)
            give_chunk(s->running[i], &left);
    return left;
}

static void take_blocks(tm_sched *s, tm_seq *seq, int matched)
{
    for (int i = 0; i < matched; i++)
        tm_block_pool_acquire(s->pool, seq->blocks[i]);
    seq->n_blocks = seq->n_published = matched;
    seq->n_computed = matched * seq->block_tokens;
    int need = blocks_for(s, seq->n_tokens);
    while (seq->n_blocks < need) {
        int32_t block = tm_prefix_tree_take(s->tree);
        TM_ASSERT(block >= 0);
        seq->blocks[seq->n_blocks++] = block;
    }
}

static void admit_waiting(tm_sched *s, budget left)
{
    int looked = 0;
    for (tm_seq *seq = s->wait_first, *next; seq && left.prompt_tokens > 0; seq = next) {
        if (s->n_running == s->opts.max_seqs)
            break;
        int matched = 0;
        next = seq->next;
        fit f = try_fit(s, seq, &matched);
        if (f == FIT_NO_ROOM)
            break;
        if (f == FIT_LATER) {
            if (++looked == LOOK_AHEAD)
                break;
            continue;
        }
        seq->n_computed = matched * seq->block_tokens;
        int chunk = chunk_of(seq, &left);
        seq->n_computed = 0;
        if (chunk == 0)
            break;
        take_blocks(s, seq, matched);
        tm_sched_start(s, seq);
        give_chunk(seq, &left);
        if (!seq->admitted)
            seq->cached_tokens = seq->n_computed;
    }
}

static void add_entry(tm_step *step, tm_seq *seq)
{
    tm_step_seq *e = &step->seqs[step->n_seqs++];
    bool last = seq->n_computed + seq->step_rows == seq->n_tokens;
    bool samples = last && seq->max_tokens > 0;
    int prompt_rows = prompt_rows_of(seq);
    /* The row that gives the next token may also be the last wanted prompt position. */
    bool shared = samples && prompt_rows > 0 && seq->rows_to == seq->n_tokens;
    *e = (tm_step_seq){.seq = seq,
                       .rows = seq->step_rows,
                       .first_logit = step->n_logits,
                       .prompt_rows = prompt_rows,
                       .prompt_pos = seq->rows_next,
                       .sample_logit = -1,
                       .position = seq->n_tokens - seq->n_prompt,
                       .first = !seq->admitted};
    step->n_logits += prompt_rows + (samples && !shared);
    if (samples)
        e->sample_logit = step->n_logits - 1;
    step->n_tokens += seq->step_rows;
    step->n_decode += seq->step_rows == 1;
    step->n_prefill_tokens += is_decode(seq) ? 0 : seq->step_rows;
    seq->admitted = true;
}

/* Sequences with one row first, as the batch wants them. */
static void collect(tm_sched *s, tm_step *step)
{
    *step = (tm_step){.seqs = s->step_seqs[s->next_seqs]};
    for (int i = 0; i < s->n_running; i++)
        if (s->running[i]->step_rows == 1)
            add_entry(step, s->running[i]);
    for (int i = 0; i < s->n_running; i++)
        if (s->running[i]->step_rows > 1)
            add_entry(step, s->running[i]);
}

static void fill_seq(const tm_sched *s, const tm_step_seq *e, int index, int row, int stride,
                     tm_plan_arrays *a)
{
    const tm_seq *seq = e->seq;
    int kv_len = seq->n_computed + e->rows, used = blocks_for(s, kv_len);
    a->seq_begin[index] = row;
    a->kv_len[index] = kv_len;
    a->rope_len[index] = seq->rope_len;
    for (int i = 0; i < e->rows; i++) {
        a->tokens[row + i] = seq->tokens[seq->n_computed + i];
        a->positions[row + i] = seq->n_computed + i;
    }
    int32_t *blocks = a->blocks + (size_t)index * (size_t)stride;
    memcpy(blocks, seq->blocks, (size_t)used * sizeof(*blocks));
    memset(blocks + used, 0, (size_t)(stride - used) * sizeof(*blocks));
    int32_t *logit = a->logit_rows + e->first_logit;
    for (int i = 0; i < e->prompt_rows; i++)
        *logit++ = row + (e->prompt_pos + i - seq->n_computed);
    if (e->sample_logit >= e->first_logit + e->prompt_rows)
        *logit = row + e->rows - 1;
}

static void fill_plan(const tm_sched *s, uint64_t number, tm_plan_buf *buf, const tm_step *step)
{
    tm_plan_shape shape = {.n_tokens = step->n_tokens,
                           .n_seqs = step->n_seqs,
                           .n_decode = step->n_decode,
                           .n_logits = step->n_logits};
    for (int i = 0; i < step->n_seqs; i++) {
        const tm_step_seq *e = &step->seqs[i];
        shape.max_blocks = TM_MAX(shape.max_blocks, blocks_for(s, e->seq->n_computed + e->rows));
    }
    tm_plan_arrays a;
    tm_plan_begin(buf, number, &shape, &a);
    int row = 0;
    for (int i = 0; i < step->n_seqs; i++) {
        fill_seq(s, &step->seqs[i], i, row, shape.max_blocks, &a);
        row += step->seqs[i].rows;
    }
    a.seq_begin[step->n_seqs] = row;
}

void tm_sched_plan(tm_sched *s, uint64_t step_number, tm_plan_buf *buf, tm_step *step)
{
    TM_ASSERT(s->in_flight == 0 || (s->in_flight == 1 && s->flights[0].advanced));
    s->steps++;
    make_room(s);
    extend_running(s);
    admit_waiting(s, plan_running(s));
    collect(s, step);
    if (step->n_tokens == 0) {
        TM_ASSERT(s->in_flight > 0 || (s->n_running == 0 && s->n_waiting == 0));
        return;
    }
    fill_plan(s, step_number, buf, step);
    s->flights[s->in_flight++] = (tm_sched_flight){.seqs = step->seqs, .n_seqs = step->n_seqs};
    s->next_seqs = (s->next_seqs + 1) % TM_SCHED_FLIGHTS;
}
