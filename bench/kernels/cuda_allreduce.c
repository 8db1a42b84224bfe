/* mpirun -n R tm-bench-cuda allreduce [replays [h]]: microseconds of one sum over the ranks' devices, by way and size.
 *
 * Calls are recorded in a graph, as in a decode step. A message is T rows of h (8192) bf16, up to 8 MiB. Behind the time
 * of `auto` stands which way that is. Columns: NCCL alone, NCCL and
 * then the residual norm, each way of peer memory alone and joined with the norm. The median of the replays of rank 0
 * counts; ranks begin each replay together. */
#include "bench/kernels/cuda_allreduce.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "engine/backend/backend.h"
#include "engine/backend/cuda/device.h"
#include "parallel/comm.h"

enum { H_MAX = 16384, BYTES_MAX = 8 << 20, CALLS = 100, REPLAYS_MAX = 101, SIZES = 11 };

typedef struct lab {
    const tm_backend *b;
    tm_device *dev;
    tm_comm *comm;
    void *x, *residual, *out, *w;
    int replays, h;
} lab;

/* Rows of a message of 8 KiB << i, 0: none has that size. */
static int rows_of(const lab *l, int i)
{
    const int bytes = 8192 << i;
    return bytes / (l->h * 2);
}

static void must(tm_status st, const tm_err *err, const char *what)
{
    if (st == TM_OK)
        return;
    fprintf(stderr, "tm-bench-cuda allreduce: %s: %s\n", what, err ? err->msg : tm_status_name(st));
    exit(1);
}

static void call(lab *l, int rows, bool norm)
{
    const tm_sum_args s = {.x = l->x, .n = (size_t)rows * (size_t)l->h};
    const tm_norm_args n = {.out = l->out,
                            .residual = l->residual,
                            .delta = l->x,
                            .w = l->w,
                            .n_tokens = rows,
                            .h = l->h,
                            .eps = 1e-5f};
    must(norm ? l->b->ops->sum_norm(l->dev, &n) : l->b->ops->sum(l->dev, &s), NULL, "sum");
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double time_call(lab *l, int rows, bool norm)
{
    const tm_device_ops *dev = l->b->dev;
    tm_graph *graph = NULL;
    double t[REPLAYS_MAX];
    call(l, rows, norm);
    must(dev->sync(l->dev), NULL, "first call");
    must(dev->graph_begin(l->dev), NULL, "recording");
    for (int i = 0; i < CALLS; i++)
        call(l, rows, norm);
    must(dev->graph_end(l->dev, &graph), NULL, "recording");
    for (int i = -2; i < l->replays; i++) {
        must(tm_comm_barrier(l->comm), NULL, "barrier");
        int64_t begin = tm_clock_ns();
        must(dev->graph_launch(l->dev, graph), NULL, "replay");
        must(dev->sync(l->dev), NULL, "replay");
        if (i >= 0)
            t[i] = (double)(tm_clock_ns() - begin) * 1e-3 / CALLS;
    }
    dev->graph_free(l->dev, graph);
    qsort(t, (size_t)l->replays, sizeof t[0], by_value);
    return t[l->replays / 2];
}

static void take(lab *l)
{
    const size_t bytes = (size_t)BYTES_MAX;
    void **const places[] = {&l->x, &l->residual, &l->out, &l->w};
    void *zeros = calloc(1, bytes);
    must(zeros ? TM_OK : TM_STATUS_NO_MEMORY, NULL, "memory");
    for (size_t i = 0; i < TM_ARRAY_LEN(places); i++) {
        must(l->b->dev->alloc(l->dev, bytes, places[i], NULL), NULL, "memory");
        must(l->b->dev->upload(l->dev, *places[i], zeros, bytes), NULL, "copy");
    }
    must(l->b->dev->sync(l->dev), NULL, "copy");
    free(zeros);
}

/* Opens the device with one way of summing; false where there is no such way. */
static bool open_way(lab *l, const char *way)
{
    tm_err err = TM_ERR_INIT;
    const tm_device_opts o = {.index = tm_comm_host_rank(l->comm), .collectives = way};
    const tm_join_args a = {.sum_bytes_max = (size_t)BYTES_MAX};
    float *none = NULL;
    must(tm_comm_agree(l->comm, l->b->dev->open(&l->dev, &o, &err), &err), &err, "device");
    tm_status st = l->b->dev->join(l->dev, l->comm, &a, &none, &err);
    if (tm_comm_agree(l->comm, st, &err) == TM_OK) {
        take(l);
        return true;
    }
    if (tm_comm_rank(l->comm) == 0)
        printf("%s: %s\n", way, err.msg);
    l->b->dev->close(l->dev);
    return false;
}

int bench_allreduce(int replays, int h)
{
    static const char *const ways[] = {"nccl", "push", "one", "two", "auto"};
    static const char *const peer_ways[] = {"push", "one", "two", "nccl"};
    lab l = {.b = tm_backend_find("cuda"),
             .replays = TM_MAX(1, TM_MIN(replays, REPLAYS_MAX)),
             .h = TM_MAX(8, TM_MIN(h, H_MAX))};
    double us[TM_ARRAY_LEN(ways)][SIZES][2] = {0};
    const char *chosen[SIZES] = {0};
    tm_err err = TM_ERR_INIT;
    const char *ranks = getenv("OMPI_COMM_WORLD_SIZE");
    tm_log_init("tm-bench-cuda", TM_LOG_WARN, TM_LOG_AUTO);
    must(tm_comm_create(&l.comm, ranks ? (int)strtol(ranks, NULL, 10) : 1, NULL, &err), &err,
         "ranks");
    if (!l.b || tm_comm_size(l.comm) < 2) {
        fprintf(stderr, "tm-bench-cuda allreduce: needs CUDA, and mpirun with two ranks or more\n");
        return 1;
    }
    for (size_t w = 0; w < TM_ARRAY_LEN(ways); w++) {
        if (!open_way(&l, ways[w]))
            continue;
        for (int i = 0; i < SIZES; i++) {
            const int rows = rows_of(&l, i);
            for (int norm = 0; rows > 0 && norm < 2; norm++)
                us[w][i][norm] = time_call(&l, rows, norm);
            chosen[i] = peer_ways[tm_ranks_way(l.dev->ranks, (size_t)rows * (size_t)l.h * 2, true)];
        }
        l.b->dev->close(l.dev);
    }
    if (tm_comm_rank(l.comm) == 0) {
        printf(
            "allreduce of %d ranks, us a call in a graph: alone, with residual + norm of rows of "
            "%d\n%-10s",
            tm_comm_size(l.comm), l.h, "KiB");
        for (size_t w = 0; w < TM_ARRAY_LEN(ways); w++)
            printf("%17s", ways[w]);
        for (int i = 0; i < SIZES; i++) {
            if (rows_of(&l, i) == 0)
                continue;
            printf("\n%-10.4g", rows_of(&l, i) * l.h / 512.0);
            for (size_t w = 0; w < TM_ARRAY_LEN(ways); w++)
                printf("%9.2f%8.2f", us[w][i][0], us[w][i][1]);
            printf(" %s", chosen[i]);
        }
        printf("\n");
    }
    tm_comm_destroy(l.comm);
    return 0;
}
