/* A scheduler and a fake model under it.
 *
 * The fake model's KV cache is what the real one's is, a place per (block, slot); it stores token and position.
 * A sampled token is a hash of everything that the block table leads to, so a wrong, stale or doubly owned block
 * changes the answer. Every sequence must give exactly the tokens that its history alone determines, whatever
 * was preempted, cached, shared or cancelled around it.
 *
 * A step is computed when it is planned, as on a device whose steps follow each other in the order they are enqueued;
 * its tokens are told when it is retired. In worlds that run ahead another step is planned in between. */
#ifndef TM_TESTS_ENGINE_SCHED_WORLD_H
#define TM_TESTS_ENGINE_SCHED_WORLD_H

#include "engine/sched/sched.h"
#include "tests/engine/rng.h"

enum { VOCAB = 50, MODEL_STOP = 7 };

typedef struct slot {
    int32_t token, position;
} slot;

/* What a client asked for and what it has seen. */
typedef struct client {
    tm_seq *seq;
    int32_t prompt[512];
    int n_prompt, n_given, n_seen, max_tokens, rows_from, rows_to, rows_seen;
    int32_t expected[512]; /* undisturbed answer */
    int n_expected;
    bool submitted, finished, cancelled;
    uint64_t submit_step, finish_step;
} client;

enum { SEQS_MAX = 16, LOGITS_MAX = 64 };

/* A step that was computed and is not retired. */
typedef struct pending {
    tm_step step;
    int32_t sampled[SEQS_MAX];
} pending;

typedef struct world {
    tm_sched *s;
    tm_sched_opts o;
    tm_seq_limits limits;
    tm_plan_buf buf;
    slot *kv;
    bool ahead;
    rng *mood; /* of worlds that run ahead: now and then they do not */
    pending pend[2];
    int n_pend;
    int32_t picks[LOGITS_MAX]; /* of the last step, by logits row */
    uint64_t step;
    client *clients;
    int n_clients;
    int max_seen_tokens;
} world;

void world_open(world *w, const tm_sched_opts *o, int max_len, bool caching);
void world_close(world *w);
/* The token that follows these n. */
int32_t world_next_token(const int32_t *tokens, int n);
tm_status world_submit(world *w, client *c, const tm_seq_opts *base);
/* Plans, checks and computes a step; false: there is nothing to do. */
bool world_begin_step(world *w);
/* What world_begin_step does with a batch's tokens. */
void world_forward(world *w, const tm_batch *b);
/* Ends a step and returns its tokens; where the world runs ahead, the next one is begun before. */
int world_step(world *w);
/* Until nothing is left. */
void world_drain(world *w);

#endif
