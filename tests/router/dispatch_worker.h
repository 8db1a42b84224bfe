/* A worker group in this process behind a real gRPC server: Hello, load reports, text files, and tokens that
 * are a function of (first prompt token, position). Made for speed and for dying on request. */
#ifndef TM_TESTS_ROUTER_DISPATCH_WORKER_H
#define TM_TESTS_ROUTER_DISPATCH_WORKER_H

#include <stdbool.h>
#include <stdint.h>

typedef struct fake_worker fake_worker;

typedef struct fake_worker_opts {
    const char *group, *model;
    const char *model_dir; /* text files are read from here; NULL = none are sent */
    int port;              /* 0 = any */
    uint64_t epoch;
    int step_us; /* pause between steps; 0 = as fast as the link takes them */
    int max_batch, vocab, stop_id;
} fake_worker_opts;

fake_worker *fake_worker_start(const fake_worker_opts *opts);
int fake_worker_port(const fake_worker *w);
void fake_worker_stop(fake_worker *w);                /* abrupt: open streams end as in a crash */
void fake_worker_drain(fake_worker *w);               /* hands back what runs and refuses more */
void fake_worker_freeze(fake_worker *w, bool frozen); /* as SIGSTOP does: nothing is said */
int fake_worker_running(fake_worker *w);
uint64_t fake_worker_cancels(fake_worker *w);
/* The token at a position of the sequence whose prompt begins with `first`. */
int32_t fake_worker_token(int vocab, int32_t first, int pos);

#endif
