/* An engine of one rank around the fake model, and requests for it. */
#ifndef TM_TESTS_ENGINE_ENGINE_RIG_H
#define TM_TESTS_ENGINE_ENGINE_RIG_H

#include "engine/engine.h"
#include "parallel/comm.h"
#include "tests/engine/drive.h"
#include "tests/engine/fake.h"
#include "tests/engine/rng.h"

typedef struct rig {
    tm_engine *e;
    tm_comm *comm;
} rig;

/* Of a model and a pool that nothing in these tests exhausts. */
extern const fake_opts roomy;
tm_engine_opts small_opts(void);
/* Resets the fakes; fails the test where the engine does not open. */
rig rig_open(const fake_opts *f, const tm_engine_opts *o);
/* The fakes must have found nothing wrong. */
void rig_close(rig *r);

typedef struct ask {
    int32_t prompt[256];
    tm_request r;
} ask;

/* Greedy, n tokens from `first` on in steps of 5. */
void make_ask(ask *a, uint64_t id, int n, int first, int max_tokens);
/* Any parameters; the other one is greedy for the most part, so that steps run ahead, and ends by stop ids and length. */
void random_ask(ask *a, rng *r, uint64_t id);
void random_greedy_ask(ask *a, rng *r, uint64_t id);

/* Submits and drives until it has ended. */
void run_alone(rig *g, const tm_request *r, answer *a);
void expect_same(const answer *got, const answer *want);

#endif
