/* Rank 0 from the loaded engine to the end of the drain: warm-up, service, registration, signals. */
#ifndef TM_WORKER_SERVE_H
#define TM_WORKER_SERVE_H

#include "engine/engine.h"
#include "worker/options.h"

typedef struct tm_worker_serve_args {
    tm_engine *engine; /* stays the caller's */
    const char *model_dir;
    const tm_worker_opts *opts;
    bool launched; /* by mpirun: it kills its ranks some time after SIGTERM */
    /* Ends the process, and the group, at once: the engine has lost its group. */
    void (*lost)(void *user) __attribute__((noreturn));
    void *user;
} tm_worker_serve_args;

/* Blocks SIGTERM, SIGINT, SIGUSR1 and SIGCONT in this thread and those it starts; before any thread exists. */
void tm_worker_signals_block(void);
/* Returns TM_OK after a drain. */
tm_status tm_worker_serve(const tm_worker_serve_args *args, tm_err *err);

#endif
