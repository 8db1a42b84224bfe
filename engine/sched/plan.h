/* The plan of one step as a flat buffer: what rank 0 sends to the others, and what every rank, rank 0
 * included, runs.
 *
 * Layout: a header of TM_PLAN_HEADER int32, then the arrays of tm_batch one after the other, all int32 in host
 * byte order (the ranks of a group are the same machine type). tm_batch points into the buffer. */
#ifndef TM_ENGINE_SCHED_PLAN_H
#define TM_ENGINE_SCHED_PLAN_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"
#include "engine/backend/backend.h"

/* PICK: a step of whose logits only the largest of each row are wanted (tm_model_begin). SAMPLE: one whose tokens the
 * device draws (tm_model_begin_sample). DRAIN: rank 0 waits for the steps in flight with none behind them, and so do the
 * others. */
typedef enum tm_plan_kind {
    TM_PLAN_STEP = 1,
    TM_PLAN_STOP = 2,
    TM_PLAN_PICK = 3,
    TM_PLAN_DRAIN = 4,
    TM_PLAN_SAMPLE = 5
} tm_plan_kind;

/* Equal on every rank. */
typedef struct tm_plan_limits {
    int max_tokens; /* T */
    int max_seqs;   /* B */
    int max_blocks; /* of one sequence */
    int max_logits; /* R */
    int vocab, n_blocks, block_tokens;
} tm_plan_limits;

/* Sizes of a step. */
typedef struct tm_plan_shape {
    int n_tokens, n_seqs, n_decode, max_blocks, n_logits;
} tm_plan_shape;

/* Writable views of the same buffer. */
typedef struct tm_plan_arrays {
    int32_t *tokens, *positions, *seq_begin, *kv_len, *rope_len, *blocks, *logit_rows;
} tm_plan_arrays;

typedef struct tm_plan_buf {
    int32_t *data;
    size_t len, cap; /* bytes */
    tm_plan_limits limits;
    int picks; /* rows of the last plan that was parsed, when that was a PICK or a SAMPLE: what TM_TOKEN_PICKED may refer to */
} tm_plan_buf;

tm_status tm_plan_buf_init(tm_plan_buf *b, const tm_plan_limits *limits, tm_err *err);
void tm_plan_buf_deinit(tm_plan_buf *b);

/* Writes the header for a step of this shape and hands out the arrays, to be filled completely. */
void tm_plan_begin(tm_plan_buf *b, uint64_t step, const tm_plan_shape *shape,
                   tm_plan_arrays *arrays);
/* Turns the step in the buffer into one of TM_PLAN_PICK, or of TM_PLAN_SAMPLE. */
void tm_plan_pick(tm_plan_buf *b);
void tm_plan_sample(tm_plan_buf *b);
/* Plans without a step; any buffer has room for them. */
void tm_plan_stop(tm_plan_buf *b, uint64_t step);
void tm_plan_drain(tm_plan_buf *b, uint64_t step);

/* Reads a received buffer of `len` bytes, checking every number against the limits: INTERNAL says what is wrong.
 * batch (of a step) borrows the buffer. */
tm_status tm_plan_parse(tm_plan_buf *b, size_t len, tm_plan_kind *kind, uint64_t *step,
                        tm_batch *batch, tm_err *err);

#endif
