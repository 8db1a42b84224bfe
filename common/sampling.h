/* Sampling parameters of one sequence, as router and engine both understand them. A value type:
 * logit_bias is borrowed and its owner is named where the struct is passed. */
#ifndef TM_COMMON_SAMPLING_H
#define TM_COMMON_SAMPLING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct tm_logit_bias {
    int32_t token;
    float bias;
} tm_logit_bias;

typedef struct tm_sampling {
    float temperature;        /* 0 = greedy (argmax, lowest id on ties) */
    int32_t top_k;            /* 0 = off */
    float top_p;              /* 1 = off; 0 = the best token only */
    float min_p;              /* 0 = off; keeps p >= min_p * p_max */
    float repetition_penalty; /* 1 = off; over prompt and generated tokens (HF rule) */
    float presence_penalty;   /* 0 = off; over generated tokens */
    float frequency_penalty;  /* 0 = off; over generated tokens */
    uint64_t seed;            /* noise for position p is a function of (seed, choice, p) alone */
    uint32_t choice;
    int32_t logprobs;        /* -1 = none, else the chosen one plus this many best */
    int32_t prompt_logprobs; /* -1 = none, the same for every prompt token after the first */
    int32_t min_tokens;      /* stop ids are ignored before this many generated tokens */
    bool ignore_eos;         /* the model's own stop ids are ignored */
    const tm_logit_bias *logit_bias;
    size_t logit_bias_count;
} tm_sampling;

static inline tm_sampling tm_sampling_default(void)
{
    tm_sampling s = {0};
    s.temperature = 1.0f;
    s.top_p = 1.0f;
    s.repetition_penalty = 1.0f;
    s.logprobs = -1;
    s.prompt_logprobs = -1;
    return s;
}

#endif
