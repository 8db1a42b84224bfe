/* Drives an engine in tests: submits, collects answers, and checks what every event stream must obey: ADMITTED
 * first, prompt positions once and in order, tokens in order without gap, one FINISHED, nothing after it. */
#ifndef TM_TESTS_ENGINE_DRIVE_H
#define TM_TESTS_ENGINE_DRIVE_H

#include <stdbool.h>

#include "engine/engine.h"

#define ANSWER_MAX 2048

typedef struct answer {
    uint64_t id;
    bool admitted, finished;
    tm_finish finish;
    tm_status status;
    int prompt_tokens, cached_tokens;
    int first_pos; /* generated tokens that came with the request */
    int n;         /* new tokens */
    int32_t tokens[ANSWER_MAX];
    float logprobs[ANSWER_MAX];
    int next_prompt_pos; /* of PROMPT_LOGPROB, from 1 */
    float prompt_logprobs[ANSWER_MAX];
    int first_logits_pos, n_logits; /* of LOGITS */
    int logits_argmax[ANSWER_MAX];
    int tops; /* top entries seen */
} answer;

/* Prepares a and submits; the request's id is the answer's. */
tm_status drive_submit(tm_engine *e, tm_request *r, answer *a, tm_err *err);
/* Applies one batch to the answers (n of them, any order). */
void drive_apply(const tm_step_events *ev, answer **answers, int n, int vocab);
/* Waits until all have finished; fails after 60 s without an event. */
void drive_all(tm_engine *e, answer **answers, int n);

#endif
