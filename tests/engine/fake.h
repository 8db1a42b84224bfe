/* A model and a communicator for testing the engine without weights and without processes.
 *
 * fake_model.c implements engine/model/model.h: its KV cache stores tokens and positions, its logits are a hash of the
 * history that the block table leads to, so any wrong block changes the answer or fails the test. fake_comm.c
 * implements parallel/comm.h with the ranks as threads of one process. */
#ifndef TM_TESTS_ENGINE_FAKE_H
#define TM_TESTS_ENGINE_FAKE_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/model/model.h"
#include "parallel/comm.h"

enum { FAKE_VOCAB = 61, FAKE_STOP = 7, FAKE_POISON = 60 }; /* after POISON the logits are NaN */

typedef struct fake_opts {
    int max_positions;
    int blocks;       /* that fit into the memory of rank 0 ... */
    int blocks_rank1; /* ... and of the others; 0 = the same */
    int fail_at_step; /* forward number that fails on rank 0, from 1; 0 = none */
    int fail_at_end;  /* the same of tm_model_end */
    bool fail_open_rank1;
    bool pick; /* the device chooses the largest logit itself */
} fake_opts;

void fake_reset(const fake_opts *opts);
/* The logits after n tokens. */
void fake_logits(const int32_t *tokens, int n, float *row);

/* Holding: forward of rank 0 waits at its start. */
void fake_hold(bool hold);
void fake_wait_held(void);    /* until forward waits */
void fake_let_one_step(void); /* one forward passes; returns when the next one waits */
int fake_steps(int rank);
long fake_tokens(int rank); /* computed in all */
int fake_picks(int rank);   /* steps of picks */
int fake_ahead(int rank);   /* of those, begun while another one was in flight */
int fake_errors(void);      /* wrong positions, rows or blocks seen in forward */

/* A group of n ranks. The handles are freed by tm_comm_destroy, the group with the last of them. */
void fake_comm_group(int n, tm_comm **ranks);
bool fake_comm_aborted(void);
/* The next plan that rank 0 sends has one word changed. */
void fake_comm_damage_next(void);
/* Every later call of any rank fails. */
void fake_comm_lose(tm_comm *c);

#endif
