/* A sequence: one request on its way through the scheduler.
 *
 * Created by the submitting thread (it hashes the prompt's blocks there, off the engine thread), then owned
 * by the scheduler's thread. All its arrays are taken at creation for the longest length that it may reach,
 * so nothing is allocated in a step. Fields are read freely inside the engine; only sched.c writes those
 * below the line. */
#ifndef TM_ENGINE_SCHED_SEQ_H
#define TM_ENGINE_SCHED_SEQ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"
#include "engine/cache/prefix_tree.h"

/* What all sequences of an engine have in common. */
typedef struct tm_seq_limits {
    int max_len;             /* tokens of prompt and answer together: context limit and pool size */
    int block_tokens;        /* tokens of a KV block */
    const char *digest;      /* of the model, for the keys */
    const int32_t *stop_ids; /* the model's */
    int stop_count;
    bool prefix_caching;
} tm_seq_limits;

typedef struct tm_seq_opts {
    uint64_t id;
    const int32_t *prompt;
    size_t prompt_len;
    const int32_t *generated; /* continuation */
    size_t generated_len;
    int32_t max_tokens; /* generated ones in all; 0 = only the prompt is computed */
    const int32_t *stop_ids;
    size_t stop_count;
    bool ignore_eos;
    int32_t min_tokens;
    int32_t priority;
    uint64_t salt;
    int32_t rope_len;           /* see tm_model_rope_len; keys of different ones are never shared */
    int32_t rows_from, rows_to; /* prompt positions whose logits are wanted: [from, to) */
    void *user;
} tm_seq_opts;

typedef enum tm_seq_state { TM_SEQ_NEW, TM_SEQ_WAITING, TM_SEQ_RUNNING, TM_SEQ_DONE } tm_seq_state;

typedef struct tm_seq {
    uint64_t id;
    uint64_t salt;
    void *user;
    int32_t *tokens; /* prompt, then generated ones */
    int n_prompt;
    int n_given; /* generated tokens that came with the request */
    int max_len; /* prompt + max_tokens, or the limit */
    int32_t max_tokens, min_tokens, priority;
    int32_t rows_to, rope_len;
    int32_t *stop_ids; /* sorted; the model's are among them unless they are to be ignored */
    int stop_count;
    int block_tokens;
    bool prefix_caching;
    /* ---- the scheduler's */
    tm_seq_state state;
    int64_t rank;               /* higher runs first, then ... */
    uint64_t order;             /* ... the earlier arrival */
    int step_rows;              /* rows in the step being planned */
    struct tm_seq *prev, *next; /* waiting list */
    int n_tokens;               /* known tokens, and the one that is awaited */
    bool awaits;                /* the last token is TM_TOKEN_PICKED: a step in flight chooses it */
    int n_computed; /* tokens whose keys and values are in the cache, or will be after the steps in flight */
    int32_t rows_next; /* next prompt position whose logits are to be delivered */
    int32_t *blocks;   /* [n_blocks]; position p is in blocks[p / block_tokens] */
    int n_blocks;
    int n_published;   /* leading blocks that are in the prefix tree */
    int cached_tokens; /* prefix hit at the first admission */
    bool admitted;     /* has been running before */
    tm_prefix_key root;
    tm_prefix_key *keys; /* [n_keys] of the leading full blocks of known tokens */
    int n_keys;
} tm_seq;

/* INVALID when the request can never run: empty, or longer than max_len (says both numbers). */
tm_status tm_seq_create(tm_seq **out, const tm_seq_opts *opts, const tm_seq_limits *limits,
                        tm_err *err);
void tm_seq_destroy(tm_seq *s);

/* Generated tokens that are known. */
static inline int tm_seq_generated(const tm_seq *s)
{
    return s->n_tokens - s->n_prompt - s->awaits;
}

/* True when the awaited token will be the last one, whichever it is. */
static inline bool tm_seq_is_full(const tm_seq *s)
{
    return s->awaits && s->n_tokens >= s->max_len;
}

/* Tokens to be computed, as far as is known. */
static inline int tm_seq_wanted(const tm_seq *s)
{
    return s->n_tokens - tm_seq_is_full(s);
}

typedef enum tm_seq_end { TM_SEQ_GOES_ON, TM_SEQ_END_STOP, TM_SEQ_END_LENGTH } tm_seq_end;

/* Whether the tokens known now complete the sequence. A function of the tokens alone, so that a continued
 * sequence ends where the undisturbed one would have. */
tm_seq_end tm_seq_ended(const tm_seq *s);
/* Appends a place for the token that a step chooses in its logits row. Room was taken at creation. */
void tm_seq_await(tm_seq *s, int logit);
/* The token that was awaited, and with it the key of the block that it completes. */
void tm_seq_settle(tm_seq *s, int32_t token);
bool tm_seq_is_stop(const tm_seq *s, int32_t token);

#endif
