/* A stand-in for the engine behind engine/engine.h: requests run, tokens come, nothing is computed. The token
 * at position p is a function of (prompt, p) alone, so that a continued request goes on as it would have,
 * on this process or another. For tests of the worker's service and as the fake worker program. */
#ifndef TM_TESTS_WORKER_FAKE_ENGINE_H
#define TM_TESTS_WORKER_FAKE_ENGINE_H

#include "engine/engine.h"

typedef struct tm_fake_opts {
    const char *model_dir; /* name, vocabulary, stop ids and digest come from its config.json */
    int vocab;             /* 0 = the config's */
    int max_batch_size, queue_max, max_context;
    int64_t step_us; /* time of a step; < 0: steps happen only through tm_fake_step */
    int tokens_stop; /* > 0: every request ends with STOP after this many tokens */
} tm_fake_opts;

tm_fake_opts tm_fake_opts_default(void);
tm_status tm_fake_open(tm_engine **out, const tm_fake_opts *opts, tm_err *err);
int32_t tm_fake_token(const int32_t *prompt, size_t len, int64_t pos, int vocab);

void tm_fake_step(tm_engine *e);   /* runs one step now */
void tm_fake_lose(tm_engine *e);   /* the group is lost: wait answers UNAVAILABLE */
int tm_fake_live(tm_engine *e);    /* submitted and not finished */
int tm_fake_cancels(tm_engine *e); /* cancels of live requests so far */
uint64_t tm_fake_tokens(tm_engine *e);

#endif
