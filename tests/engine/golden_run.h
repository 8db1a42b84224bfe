/* The goldens of a checkpoint (golden.json, logits.npy) and the ways to feed their sequences to a model. */
#ifndef TM_TESTS_ENGINE_GOLDEN_RUN_H
#define TM_TESTS_ENGINE_GOLDEN_RUN_H

#include "common/json.h"
#include "tests/engine/model_run.h"

#define GOLDEN_STEPS 16 /* greedy ones of a sequence, at most */
#define GOLDEN_TAIL  8  /* positions whose logits are in the golden */

typedef struct golden {
    json_t *root;
    int count, vocab;
    uint64_t seed;             /* of the mixtures; goes on */
    run_seq seq[RUN_SEQS_MAX]; /* ids have room for the greedy ones */
    float *logits;             /* [count, 8, vocab] */
} golden;

/* After a false, too, g is to be freed. */
bool golden_load(golden *g, const char *dir, uint64_t seed);
void golden_free(golden *g);
/* The sequences begin anew. */
void golden_reset(golden *g, run *r);

/* out: the logits that golden has. Every sequence alone in one step. */
void golden_feed_whole(run *r, golden *g, float *out);
/* All sequences together in chunks of random lengths; the last 8 tokens one by one, so that decodes and prefill chunks
 * of different sequences share steps. logits: room for the rows of a step. */
void golden_feed_mixed(run *r, golden *g, float *out, float *logits);
/* Greedy ids up to the first step that may go either way; gives the number of wrong ones, 0 where judge is false. The
 * golden's ids are fed, so all ranks agree. exact: float32. */
int golden_feed_greedy(run *r, golden *g, bool exact, bool judge, float *logits, int *steps);
/* The worst sequence's. */
double golden_nmse(const golden *g, const float *out);

#endif
