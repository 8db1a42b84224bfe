/* Inside the CPU backend: the device, the tables of the instruction sets, and the helpers they share.
 *
 * Only files under engine/backend include this. A path ("isa") is one tm_op_table; entries that a path
 * does not speed up point at the reference. The public table (ops.c) forwards through the device, so one
 * process can hold a reference device and a fast one and compare them. */
#ifndef TM_ENGINE_BACKEND_CPU_CPU_H
#define TM_ENGINE_BACKEND_CPU_CPU_H

#include "engine/backend/backend.h"

/* Bound on the threads of one rank. */
#define TM_CPU_THREADS_MAX 256

typedef struct tm_cpu_isa {
    const char *name;        /* "ref", "avx2", "avx512", "amx" */
    bool (*supported)(void); /* this processor can run it */
    const tm_op_table *ops;
} tm_cpu_isa;

typedef struct tm_cpu_pool tm_cpu_pool;
typedef struct tm_cpu_region tm_cpu_region;

struct tm_device {
    const tm_cpu_isa *isa;
    tm_cpu_pool *pool;      /* NULL: one thread */
    tm_cpu_region *regions; /* of alloc, newest first */
    int threads;
    int local_ranks; /* processes of this job on this host, which share its memory */
    void *scratch;   /* 64-byte aligned workspace of all threads, grown between operators */
    size_t scratch_bytes;
    char text[64];
};

extern const tm_backend tm_backend_cpu;
extern const tm_op_table tm_cpu_ops;

/* The id of a token, which may be one that an earlier step chose. */
static inline int32_t tm_embed_id(const tm_embed_args *a, int token)
{
    int32_t id = a->ids[token];
    return id < 0 && a->picked ? a->picked[-1 - id] : id;
}

/* The reference, one entry per operator (ref_*.c). */
tm_status tm_cpu_ref_embed(tm_device *dev, const tm_embed_args *a);
tm_status tm_cpu_ref_norm(tm_device *dev, const tm_norm_args *a);
tm_status tm_cpu_ref_linear(tm_device *dev, const tm_linear_args *a);
tm_status tm_cpu_ref_rope_append(tm_device *dev, const tm_rope_append_args *a);
tm_status tm_cpu_ref_attention_prefill(tm_device *dev, const tm_attention_args *a);
tm_status tm_cpu_ref_attention_decode(tm_device *dev, const tm_attention_args *a);
tm_status tm_cpu_ref_act(tm_device *dev, const tm_act_args *a);
tm_status tm_cpu_ref_gather_rows(tm_device *dev, const tm_gather_rows_args *a);
tm_status tm_cpu_ref_head_norm(tm_device *dev, const tm_head_norm_args *a);
tm_status tm_cpu_ref_bound(tm_device *dev, const tm_bound_args *a);
tm_status tm_cpu_ref_copy(tm_device *dev, const tm_copy_args *a);
tm_status tm_cpu_ref_moe_route(tm_device *dev, const tm_moe_route_args *a);
/* On the device's own linear and act, so one version serves every path. */
tm_status tm_cpu_moe_experts(tm_device *dev, const tm_moe_experts_args *a);
size_t tm_cpu_moe_work_bytes(const tm_moe_experts_args *a);

/* A weight is used as it lies in memory, so nothing is prepared or released. */
tm_status tm_cpu_linear_prepare(tm_device *dev, tm_weight *w, tm_err *err);
void tm_cpu_linear_release(tm_device *dev, tm_weight *w);

/* NULL when no such path is built. "auto" gives the best one that this processor supports. */
const tm_cpu_isa *tm_cpu_isa_find(const char *name);

/* Runs fn(arg, thread, unit) once for each unit 0 .. units - 1, spread over the device's threads, and
 * returns when all are done. Which thread takes a unit is not known; a thread takes one at a time, so
 * `thread` (below dev->threads) can select a workspace. One caller at a time. This is the only fork and join
 * of the backend; one unit is a plain call. */
typedef void (*tm_cpu_task_fn)(void *arg, int thread, int unit);
void tm_cpu_run(tm_device *dev, int units, tm_cpu_task_fn fn, void *arg);

/* threads - 1 workers beside the caller. crowded: there are fewer processors than threads, so nobody
 * waits awake. */
tm_status tm_cpu_pool_create(tm_cpu_pool **out, int threads, bool crowded, tm_err *err);
void tm_cpu_pool_destroy(tm_cpu_pool *p);

/* The workspace, at least `bytes`, 64-byte aligned; contents are lost between operators. Grows only, so
 * a warm engine does not allocate in a step. NULL when out of memory. */
void *tm_cpu_scratch(tm_device *dev, size_t bytes);

/* Threads for a rank that was given none: the processors it may use (affinity, cgroup quota), divided by
 * the ranks on this host unless the launcher already bound each to its own. */
int tm_cpu_default_threads(int local_ranks);
int tm_cpu_local_ranks(void);

/* Memory still free for this process: the least of MemAvailable and what each cgroup above it (v1 or v2)
 * leaves, clean page cache counted as free. The two roots are "/proc" and "/sys/fs/cgroup" outside tests. */
tm_status tm_cpu_mem_free(const char *proc_root, const char *cgroup_root, size_t *bytes,
                          tm_err *err);

#endif
