/* What `turbomesh bench http --record FILE` keeps: lines of JSON, one for each answer and ten a second with the tokens
 * so far. Times are seconds of the monotonic clock, so another program on the host can set its own beside them. */
#ifndef TM_CLI_BENCH_RECORD_H
#define TM_CLI_BENCH_RECORD_H

#include "common/buf.h"
#include "common/status.h"

typedef struct tm_bench_record tm_bench_record;

/* One answer as it comes. ids and text are what stands between the brackets and the quotes of the events. */
typedef struct tm_bench_answer {
    tm_buf ids, text;
    int64_t last_ns;            /* of the newest token, 0 before the first */
    int64_t gap_ns, gap_end_ns; /* the longest time between two tokens, and when it ended */
} tm_bench_answer;

typedef struct tm_bench_outcome {
    int prompt; /* its line in the prompt file, from 0 */
    int64_t begin_ns, first_ns, end_ns;
    bool ok;
} tm_bench_outcome;

/* NULL `path` gives NULL, and the functions below do nothing then. */
tm_status tm_bench_record_open(const char *path, tm_bench_record **out, tm_err *err);
/* One event of a streamed answer: takes its token ids and its text. */
void tm_bench_record_event(tm_bench_record *r, tm_bench_answer *a, const char *event, int64_t now);
void tm_bench_record_tick(tm_bench_record *r, int64_t now);
void tm_bench_record_answer(tm_bench_record *r, const tm_bench_answer *a,
                            const tm_bench_outcome *o);
/* False when something could not be written. */
bool tm_bench_record_close(tm_bench_record *r);

void tm_bench_answer_init(tm_bench_answer *a);
void tm_bench_answer_clear(tm_bench_answer *a); /* keeps the memory */
void tm_bench_answer_deinit(tm_bench_answer *a);

#endif
