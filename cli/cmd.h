/* The commands of the `turbomesh` program: one file and one table row each. A command gets argv with its own
 * name at argv[0] and returns the process exit code. Data goes to stdout, talk to stderr. */
#ifndef TM_CLI_CMD_H
#define TM_CLI_CMD_H

#include "common/opt.h"
#include "common/status.h"

typedef struct tm_cmd {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
    const tm_opt_table
        *options; /* for the option reference; NULL = the program it starts has them */
} tm_cmd;

int tm_cmd_serve(int argc, char **argv);
int tm_cmd_chat(int argc, char **argv);
int tm_cmd_client(int argc, char **argv);
int tm_cmd_score(int argc, char **argv);
int tm_cmd_bench(int argc, char **argv);
int tm_cmd_list(int argc, char **argv);
int tm_cmd_inspect(int argc, char **argv);
int tm_cmd_tokenize(int argc, char **argv);
int tm_cmd_render(int argc, char **argv);
int tm_cmd_convert(int argc, char **argv);
int tm_cmd_worker(int argc, char **argv);
int tm_cmd_router(int argc, char **argv);
int tm_cmd_free_port(int argc, char **argv);

extern const tm_opt_table TM_SERVE_OPTIONS, TM_CHAT_OPTIONS, TM_CLIENT_OPTIONS, TM_SCORE_OPTIONS,
    TM_BENCH_OPTIONS, TM_LIST_OPTIONS, TM_INSPECT_OPTIONS, TM_TOKENIZE_OPTIONS, TM_RENDER_OPTIONS,
    TM_CONVERT_OPTIONS;

/* Prints "turbomesh score: message" and gives the exit code of the status. */
int tm_cmd_fail(const char *command, const tm_err *err);
/* Parses into opts; on --help or an error prints and returns the exit code in *code, false. */
bool tm_cmd_parse(const tm_opt_table *table, int argc, char **argv, void *opts,
                  const char **positional, int *positional_count, int *code);

#endif
