/* Drives tm_model_forward by hand: sequences with their own KV blocks, steps of any mixture. */
#ifndef TM_TESTS_ENGINE_MODEL_RUN_H
#define TM_TESTS_ENGINE_MODEL_RUN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/model/model.h"

#define RUN_SEQS_MAX   16
#define RUN_BLOCKS_MAX 64 /* of one sequence */

typedef struct run_seq {
    const int32_t *ids; /* known tokens, fed one step after the other */
    int len, done;
    int rope_len; /* what a length-dependent rope is chosen by; 0 = len */
    int32_t blocks[RUN_BLOCKS_MAX];
    int n_blocks;
} run_seq;

typedef struct run {
    tm_comm *comm, *own; /* own: made by run_open */
    tm_model *model;
    int block_tokens, next_block, total_blocks;
    bool on_device; /* not the CPU */
    bool picks;     /* steps give the picks to `picked`, not logits */
    int32_t *picked;
    bool
        ahead; /* steps of picks are begun, not ended, and the last token of a sequence is what the step before chose
                   for it where `fed` says so */
    bool fed;
    const tm_sample_set *set; /* picks: what they are drawn by; NULL: the largest logit */
} run;

/* One sequence's part of a step: its next n tokens, logits of the last `want` of them. */
typedef struct run_item {
    run_seq *seq;
    int n, want;
} run_item;

/* Opens dir with small limits; exits the process with the message on failure. block_tokens is kept odd on
 * purpose by some callers. */
void run_open(run *r, const char *dir, const char *dtype, int block_tokens, int tp);
/* The same on another backend; false, with the reason on stdout, where it has no device here. */
bool run_open_on(run *r, const char *backend, const char *dir, const char *dtype, int block_tokens);
/* The same on a communicator that exists; isa NULL: what TM_ISA says; session_len 0: the model's. */
tm_status run_open_with(run *r, tm_comm *comm, const char *dir, const char *dtype, const char *isa,
                        int session_len, int block_tokens, tm_err *err);
/* The same on any backend. */
tm_status run_open_at(run *r, tm_comm *comm, const char *backend, const char *dir,
                      const char *dtype, const char *isa, int session_len, int block_tokens,
                      tm_err *err);
void run_close(run *r);
/* Items with n == 1 must come first. logits: sum of want rows, in order. */
void run_step(run *r, const run_item *items, int n_items, float *logits);

/* sum((x - g)^2) / sum((g - mean)^2) */
double run_nmse(const float *x, const float *g, size_t n);
/* log(sum(exp(x))) */
double run_logsumexp(const float *x, int n);
int run_argmax(const float *x, int n);

#endif
