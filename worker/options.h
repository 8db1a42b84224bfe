/* The worker's options: one table for flags, environment, --help and the option reference. */
#ifndef TM_WORKER_OPTIONS_H
#define TM_WORKER_OPTIONS_H

#include "common/opt.h"

typedef struct tm_worker_opts {
    const char *host, *advertise, *etcd, *group, *pool, *served_model_name;
    int64_t port, drain_timeout_ms, stream_queue_max;
    const char *dtype, *device, *isa, *collectives;
    int64_t device_index;
    bool allow_shared_gpu;
    int64_t tp, threads, max_batch_size, max_prefill_token_num, queue_max, session_len;
    int64_t block_seq_len, cache_bytes_max, watchdog_ms, step_timeout_ms;
    double cache_max_entry_count;
    bool enable_prefix_caching, exit_with_parent;
    const char *log_level;
    int log_format;
} tm_worker_opts;

extern const tm_opt_table TM_WORKER_OPTIONS;

#endif
