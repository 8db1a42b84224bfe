/* Rows of the worker's option table. Names and aliases follow LMDeploy where it has the option. */
#include "worker/options.h"

#include <stddef.h>

#include "common/check.h"

#define OFF(f) offsetof(tm_worker_opts, f)

static const tm_opt_row ROWS[] = {
    {"tp", "tensor-parallel-size", TM_OPT_INT, OFF(tp), "1", 1, 64, NULL,
     "Tensor-parallel ranks; with more than one, start the program with mpirun -n TP."},
    {"host", "server-name", TM_OPT_STR, OFF(host), "127.0.0.1", 0, 0, NULL,
     "Address that rank 0 listens on."},
    {"port", "server-port", TM_OPT_INT, OFF(port), "0", 0, 65535, NULL,
     "Port that rank 0 listens on; 0 picks one."},
    {"advertise", NULL, TM_OPT_STR, OFF(advertise), NULL, 0, 0, NULL,
     "host or host:port that routers connect to; default: --host, or this machine's name when "
     "--host "
     "is a wildcard."},
    {"etcd", "etcd-endpoints", TM_OPT_STR, OFF(etcd), NULL, 0, 0, NULL,
     "etcd endpoints, comma-separated; without it the group serves unregistered."},
    {"group", NULL, TM_OPT_STR, OFF(group), NULL, 0, 0, NULL,
     "Name of this group, unique in its pool; default: machine name and process id."},
    {"pool", NULL, TM_OPT_STR, OFF(pool), "default", 0, 0, NULL, "Pool the group belongs to."},
    {"served-model-name", "model-name", TM_OPT_STR, OFF(served_model_name), NULL, 0, 0, NULL,
     "Model name in the API; default: the folder's name."},
    {"drain-timeout", NULL, TM_OPT_TIME, OFF(drain_timeout_ms), "30s", 0, 86400000, NULL,
     "Time for running requests after SIGTERM; what is left then goes on in another group."},
    {"stream-queue-max", NULL, TM_OPT_SIZE, OFF(stream_queue_max), "16MiB", 65536, 1 << 30, NULL,
     "Bytes a router may leave unread before its stream is cut."},
    {"dtype", NULL, TM_OPT_STR, OFF(dtype), "auto", 0, 0, NULL,
     "Weights and KV cache: bfloat16, float16 or float32; auto: float16 on a GPU, else bfloat16."},
    {"device", "backend", TM_OPT_STR, OFF(device), "cpu", 0, 0, NULL, "cpu or cuda."},
    {"device-index", NULL, TM_OPT_INT, OFF(device_index), "0", 0, 1023, NULL,
     "cuda: GPU of the host's first rank; the other ranks take the next ones."},
    {"collectives", NULL, TM_OPT_STR, OFF(collectives), "auto", 0, 0, NULL,
     "cuda, several ranks: sums through peer memory and NCCL by size (auto), or peer or nccl "
     "alone."},
    {"allow-shared-gpu", NULL, TM_OPT_BOOL, OFF(allow_shared_gpu), "false", 0, 0, NULL,
     "For tests: all ranks use the GPU of --device-index."},
    {"isa", NULL, TM_OPT_STR, OFF(isa), "auto", 0, 0, NULL,
     "CPU path: auto, ref, avx2, avx512 or amx."},
    {"threads", NULL, TM_OPT_INT, OFF(threads), "0", 0, 1024, NULL,
     "Threads of each rank; 0 divides the cores."},
    {"session-len", "max-model-len,context-length", TM_OPT_INT, OFF(session_len), "0", 0, 1 << 24,
     NULL, "Context limit; 0 takes the model's."},
    {"max-batch-size", "max-num-seqs", TM_OPT_INT, OFF(max_batch_size), "128", 1, 4096, NULL,
     "Sequences that run at once."},
    {"max-prefill-token-num", NULL, TM_OPT_INT, OFF(max_prefill_token_num), "0", 0, 65536, NULL,
     "Tokens of one step; 0 is 512 on the CPU and 2048 on a GPU."},
    {"queue-max", NULL, TM_OPT_INT, OFF(queue_max), "1024", 1, 1 << 20, NULL,
     "Waiting requests before new ones are refused as busy."},
    {"cache-max-entry-count", "gpu-memory-utilization,mem-fraction-static", TM_OPT_NUM,
     OFF(cache_max_entry_count), "0.8", 0.001, 1e9, NULL,
     "KV cache: up to 1 a share of the memory left, above 1 a number of blocks."},
    {"cache-bytes-max", NULL, TM_OPT_SIZE, OFF(cache_bytes_max), "1GiB", 0, 1e15, NULL,
     "Cap of the KV cache on the CPU; 0 = none."},
    {"cache-block-seq-len", "block-size", TM_OPT_INT, OFF(block_seq_len), "64", 16, 1024, NULL,
     "Tokens of one KV block."},
    {"enable-prefix-caching", NULL, TM_OPT_BOOL, OFF(enable_prefix_caching), "true", 0, 0, NULL,
     "Share the KV blocks of equal prompt beginnings."},
    {"watchdog", NULL, TM_OPT_TIME, OFF(watchdog_ms), "0", 0, 3600000, NULL,
     "A step that takes longer ends the group; 0 = the larger of 5 s and 20 median steps."},
    {"step-timeout", NULL, TM_OPT_TIME, OFF(step_timeout_ms), "5s", 10, 3600000, NULL,
     "Longest wait for another rank inside a step."},
    {"exit-with-parent", NULL, TM_OPT_BOOL, OFF(exit_with_parent), "false", 0, 0, NULL,
     "End when the process that started this one ends; always so under mpirun."},
    {"log-level", NULL, TM_OPT_STR, OFF(log_level), "info", 0, 0, NULL,
     "trace, debug, info, warn or error."},
    {"log-format", NULL, TM_OPT_ENUM, OFF(log_format), "auto", 0, 0, "auto,text,json",
     "Form of log lines; auto = text on a terminal, else JSON."},
};

const tm_opt_table TM_WORKER_OPTIONS = {
    .command = "turbomesh-worker",
    .usage = "turbomesh-worker MODEL [options]",
    .about =
        "One rank of a worker group: loads its shard of MODEL (a Hugging Face folder) and "
        "computes; "
        "rank 0 also serves routers over gRPC and registers the group in etcd. SIGTERM drains: no "
        "new requests, running ones finish within --drain-timeout, the rest is handed to other "
        "groups. A second SIGTERM hands everything over at once. Under mpirun: SIGUSR1 to mpirun "
        "drains with all of --drain-timeout and exit code 0; SIGTERM to mpirun drains within the "
        "time that mpirun leaves, twice odls_base_sigkill_timeout (1 s unless set with --mca).",
    .rows = ROWS,
    .count = (int)TM_ARRAY_LEN(ROWS),
    .positional_max = 1,
};
