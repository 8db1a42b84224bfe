/* The kinds of `turbomesh bench`. Each prints a table, or JSON with --json. Figures are ratios taken in one
 * run wherever a machine's speed would otherwise decide. */
#ifndef TM_CLI_BENCH_H
#define TM_CLI_BENCH_H

#include "cli/local.h"

typedef struct tm_bench_opts {
    tm_local_opts local;
    bool json;
    /* engine */
    int64_t steps, prefill, context, batch, repeat;
    /* http */
    double rate;
    int64_t requests, streams, max_tokens, duration_ms, start_ms;
    const char *prompt_file, *model, *record;
} tm_bench_opts;

int tm_bench_engine(const char *model, const tm_bench_opts *o, int argc, char **argv);
/* On a GPU: decode and prefill as shares of what its memory and its matrix units reach. model NULL: the shape in
 * o->local.shape. */
int tm_bench_device(const char *model, const tm_bench_opts *o, int argc, char **argv);
/* Seconds from the start to a ready engine and to the first token. */
int tm_bench_load(const char *model, const tm_bench_opts *o, int argc, char **argv);
int tm_bench_http(const char *url, const tm_bench_opts *o);

#endif
