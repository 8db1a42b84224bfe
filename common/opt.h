/* Option tables: one row is the flag, the environment variable, the help line, the default, the bound
 * and the row of docs/reference/options.md.
 *
 * Precedence: flag > environment (TURBOMESH_<NAME>) > default. Flags may be written --a-b or --a_b,
 * `--flag value` or `--flag=value`; booleans --x, --no-x, --x=true|false. Numbers take units: sizes
 * 8k 32K 2GiB, times 30s 500ms. An unknown flag is an error that names the nearest one. */
#ifndef TM_COMMON_OPT_H
#define TM_COMMON_OPT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/buf.h"
#include "common/status.h"

typedef enum tm_opt_type {
    TM_OPT_BOOL, /* bool */
    TM_OPT_INT,  /* int64_t, decimal units k M G and Ki Mi Gi accepted */
    TM_OPT_SIZE, /* int64_t bytes */
    TM_OPT_TIME, /* int64_t milliseconds; a bare number is seconds */
    TM_OPT_NUM,  /* double */
    TM_OPT_STR,  /* const char *; points into argv, the environment or the row: never freed */
    TM_OPT_ENUM  /* int: index into `choices` */
} tm_opt_type;

typedef struct tm_opt_row {
    const char *name;    /* "max-batch-size" */
    const char *aliases; /* "max-num-seqs,batch" or NULL */
    tm_opt_type type;
    size_t offset;       /* of the field in the options struct */
    const char *def;     /* default in text form, parsed like a flag; NULL = zero / NULL */
    double min, max;     /* for INT, SIZE, TIME, NUM; min == max == 0 means no bound */
    const char *choices; /* ENUM: "cost,session,..." */
    const char *help;    /* one sentence */
} tm_opt_row;

typedef struct tm_opt_table {
    const char *command; /* "turbomesh-router" */
    const char *usage;   /* "turbomesh serve MODEL [options]" */
    const char *about;   /* one paragraph */
    const tm_opt_row *rows;
    int count;
    int positional_max;
} tm_opt_table;

/* Fills *opts (a struct described by the table) with defaults, then environment, then argv[1..].
 * Positional words go to positional[] (room for table->positional_max). `--` ends the flags.
 * *help is set when --help or -h was given (nothing else is checked then). */
tm_status tm_opt_parse(const tm_opt_table *table, int argc, char **argv, void *opts,
                       const char **positional, int *positional_count, bool *help, tm_err *err);
tm_status tm_opt_defaults(const tm_opt_table *table, void *opts, tm_err *err);
void tm_opt_help(const tm_opt_table *table, tm_buf *out);     /* for --help */
void tm_opt_markdown(const tm_opt_table *table, tm_buf *out); /* for the option reference */

#endif
