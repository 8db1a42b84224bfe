/* From a row of logits to a token.
 *
 * Order: repetition, frequency and presence penalties -> logit bias -> (stop ids out before min_tokens) ->
 * temperature -> top-k -> top-p -> min-p -> one draw. Each filter sees the distribution that the earlier ones
 * left; equal probabilities rank by the lower id, so exactly k tokens survive top-k. Greedy (temperature 0,
 * also below 1e-5) stops after the third and takes the largest, lowest id on ties.
 *
 * Log-probabilities are those of the model: log-softmax of the raw logits, before penalties, bias and temperature.
 *
 * The draw is the inverse of the cumulative distribution in id order at the uniform number of (seed, choice,
 * position): see philox.h. A sampler's state is a function of (parameters, tokens so far) alone.
 *
 * No function here allocates after creation, except that a sampler with penalties grows its table of seen tokens. One
 * sampler per sequence, one workspace per thread. */
#ifndef TM_ENGINE_SAMPLE_SAMPLER_H
#define TM_ENGINE_SAMPLE_SAMPLER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/sampling.h"
#include "common/status.h"
#include "engine/backend/backend.h"

/* Best log-probabilities that one position may ask for. */
#define TM_LOGPROBS_MAX 256

typedef struct tm_sampler tm_sampler;
typedef struct tm_sample_space tm_sample_space;

/* INVALID names the parameter that is out of range. */
tm_status tm_sampling_check(const tm_sampling *p, int vocab, tm_err *err);

/* Copies params, the bias list (what one token has several times is added up) and the stop ids (which cannot be drawn
 * before min_tokens). The tokens known now are replayed: prompt, then those already generated. */
typedef struct tm_sampler_opts {
    const tm_sampling *params; /* checked */
    int vocab;
    const int32_t *stop_ids;
    int stop_count;
    const int32_t *tokens; /* prompt and generated ones */
    int n_prompt, n_tokens;
} tm_sampler_opts;
tm_status tm_sampler_create(tm_sampler **out, const tm_sampler_opts *opts, tm_err *err);
void tm_sampler_destroy(tm_sampler *s);
/* A generated token, before the next draw. NO_MEMORY when the table cannot grow. */
tm_status tm_sampler_accept(tm_sampler *s, int32_t token);

/* True when the token at `position` is the index of the row's largest logit and nothing else is asked for. */
bool tm_sampler_takes_best(const tm_sampler *s, int position);

tm_status tm_sample_space_create(tm_sample_space **out, int vocab, tm_err *err);
void tm_sample_space_destroy(tm_sample_space *sp);

/* Log-probability of one token and the best ones, of a raw row. Points into the workspace: valid until its
 * next use. */
typedef struct tm_logprobs {
    float logprob; /* of the token */
    int top_count;
    const int32_t *top_ids;
    const float *top_logprobs;
} tm_logprobs;
/* token < 0: only the best ones. INTERNAL when the row has no finite maximum. */
tm_status tm_logprobs_of(tm_sample_space *sp, const float *row, int32_t token, int top,
                         tm_logprobs *out);

/* Chooses the token at `position` (generated tokens before it). row [vocab] may be changed. lp is filled when
 * the parameters ask for log-probabilities and lp is not NULL. INTERNAL when the row has no finite maximum:
 * the model's output is broken. */
tm_status tm_sampler_draw(tm_sampler *s, tm_sample_space *sp, float *row, int position,
                          int32_t *token, tm_logprobs *lp);

/* ---- the same on a device that has the operator `sample` ---- */

/* False while the draw at `position` depends on a token that was not accepted yet. */
bool tm_sampler_knows(const tm_sampler *s, int position);
/* The draw at `position` as the operator's parameters; edits [room], of which *count are taken, get the row's. False,
 * with nothing changed, when the device cannot do it: it lists fewer of the best, or the edits have no room. */
bool tm_sampler_device_row(const tm_sampler *s, int position, tm_sample_row *row,
                           tm_sample_edit *edits, int room, int *count);
/* What tm_sampler_draw would have put into lp. */
void tm_logprobs_of_detail(tm_sample_space *sp, const tm_sample_detail *d, tm_logprobs *lp);

#endif
