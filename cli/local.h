/* A local engine for the commands that need no server (chat, score, bench engine): communicator, engine and
 * text side of one model in this process.
 *
 * With tp > 1 the command is started again under mpirun with the same arguments; ranks > 0 serve rank 0's
 * steps inside tm_local_open and end the process there. */
#ifndef TM_CLI_LOCAL_H
#define TM_CLI_LOCAL_H

#include "common/opt.h"
#include "engine/engine.h"
#include "text/template.h"
#include "text/tokenizer.h"

/* Options that every such command has; embed as first member and put TM_LOCAL_ROWS(type) into the table. */
typedef struct tm_local_opts {
    int64_t tp, threads, session_len, max_batch_size, max_prefill_token_num;
    double cache_max_entry_count;
    const char *dtype, *device, *isa, *collectives, *log_level;
    int64_t device_index;
    bool allow_shared_gpu;
    /* Without rows here: a model's shape with random weights instead of a folder; how decode steps run (tm_model_opts). */
    const char *shape;
    bool no_graphs;
} tm_local_opts;

#define TM_LOCAL_ROWS(T, m)                                                                          \
    {"tp", "tensor-parallel-size",  TM_OPT_INT, offsetof(T, m.tp), "1", 1, 64,                       \
     NULL, "Tensor-parallel ranks."},                                                                \
        {"threads",                                                                                  \
         NULL,                                                                                       \
         TM_OPT_INT,                                                                                 \
         offsetof(T, m.threads),                                                                     \
         "0",                                                                                        \
         0,                                                                                          \
         1024,                                                                                       \
         NULL,                                                                                       \
         "Threads of each rank; 0 divides the cores among the ranks."},                              \
        {"session-len",                                                                              \
         "max-model-len,context-length",                                                             \
         TM_OPT_INT,                                                                                 \
         offsetof(T, m.session_len),                                                                 \
         "0",                                                                                        \
         0,                                                                                          \
         1 << 24,                                                                                    \
         NULL,                                                                                       \
         "Context limit in tokens; 0 takes the model's."},                                           \
        {"max-batch-size",                                                                           \
         "max-num-seqs",                                                                             \
         TM_OPT_INT,                                                                                 \
         offsetof(T, m.max_batch_size),                                                              \
         "128",                                                                                      \
         1,                                                                                          \
         4096,                                                                                       \
         NULL,                                                                                       \
         "Sequences that run at once."},                                                             \
        {"max-prefill-token-num",                                                                    \
         NULL,                                                                                       \
         TM_OPT_INT,                                                                                 \
         offsetof(T, m.max_prefill_token_num),                                                       \
         "0",                                                                                        \
         0,                                                                                          \
         65536,                                                                                      \
         NULL,                                                                                       \
         "Tokens of one step; 0 is 512 on the CPU and 2048 on a GPU."},                              \
        {"cache-max-entry-count",                                                                    \
         "gpu-memory-utilization,mem-fraction-static",                                               \
         TM_OPT_NUM,                                                                                 \
         offsetof(T, m.cache_max_entry_count),                                                       \
         "0.8",                                                                                      \
         0.001,                                                                                      \
         1e9,                                                                                        \
         NULL,                                                                                       \
         "KV cache: up to 1 a share of the memory left, above 1 a number of blocks."},               \
        {"dtype",                                                                                    \
         NULL,                                                                                       \
         TM_OPT_STR,                                                                                 \
         offsetof(T, m.dtype),                                                                       \
         "auto",                                                                                     \
         0,                                                                                          \
         0,                                                                                          \
         NULL,                                                                                       \
         "Weights and KV cache: bfloat16, float16 or float32; auto: float16 on a "                   \
         "GPU, else bfloat16."},                                                                     \
        {"device", "backend", TM_OPT_STR, offsetof(T, m.device), "cpu", 0, 0, NULL, "cpu or cuda."}, \
        {"device-index",                                                                             \
         NULL,                                                                                       \
         TM_OPT_INT,                                                                                 \
         offsetof(T, m.device_index),                                                                \
         "0",                                                                                        \
         0,                                                                                          \
         1023,                                                                                       \
         NULL,                                                                                       \
         "cuda: GPU of the host's first rank; the other ranks take the next ones."},                 \
        {"collectives",                                                                              \
         NULL,                                                                                       \
         TM_OPT_STR,                                                                                 \
         offsetof(T, m.collectives),                                                                 \
         "auto",                                                                                     \
         0,                                                                                          \
         0,                                                                                          \
         NULL,                                                                                       \
         "cuda, several ranks: sums through peer memory and NCCL by size (auto), or peer or nccl "   \
         "alone."},                                                                                  \
        {"allow-shared-gpu",                                                                         \
         NULL,                                                                                       \
         TM_OPT_BOOL,                                                                                \
         offsetof(T, m.allow_shared_gpu),                                                            \
         "false",                                                                                    \
         0,                                                                                          \
         0,                                                                                          \
         NULL,                                                                                       \
         "For tests: all ranks use the GPU of --device-index."},                                     \
        {"isa",                                                                                      \
         NULL,                                                                                       \
         TM_OPT_STR,                                                                                 \
         offsetof(T, m.isa),                                                                         \
         "auto",                                                                                     \
         0,                                                                                          \
         0,                                                                                          \
         NULL,                                                                                       \
         "Instruction set of the CPU operators: auto, ref, avx2, avx512 or amx."},                   \
    {                                                                                                \
        "log-level", NULL, TM_OPT_STR, offsetof(T, m.log_level), "warn", 0, 0, NULL,                 \
            "trace, debug, info, warn or error."                                                     \
    }

typedef struct tm_local {
    tm_comm *comm;
    tm_engine *engine;
    const tm_engine_info *info;
    tm_tokenizer *tokenizer; /* NULL when not asked for */
    tm_template *template;   /* NULL when the model has none */
} tm_local;

/* argc/argv: of the command (argv[0] its name), for starting again under mpirun. */
tm_status tm_local_open(tm_local *l, const char *model, const tm_local_opts *opts, bool text,
                        int argc, char **argv, tm_err *err);
void tm_local_close(tm_local *l);

#endif
