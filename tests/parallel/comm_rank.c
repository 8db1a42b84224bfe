/* One rank of comm_test: `comm_rank MODE KIND RANKS SEED`. Every rank can compute every other rank's
 * numbers from the seed, so each checks its results alone. Exit 0: as expected. */
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "common/check.h"
#include "common/clock.h"
#include "parallel/comm.h"

static uint64_t g_seed;

#define EXPECT(cond)                                                                               \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, "comm_rank: line %d: not so: %s\n", __LINE__, #cond);                  \
            exit(9);                                                                               \
        }                                                                                          \
    } while (0)

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Number i of operation `op` on one rank: magnitudes differ much, so that the order of a sum shows. */
static float number(int op, int rank, size_t i)
{
    uint64_t r = mix(g_seed ^ mix((uint64_t)op * 1000003u + (uint64_t)rank) ^ (uint64_t)i * 77);
    float f = (float)(int32_t)(uint32_t)r / 2147483648.0f;
    return (r >> 60) == 0 ? f * 1e6f : f;
}

static void check_allreduce(tm_comm *c, int op, size_t n)
{
    int rank = tm_comm_rank(c), size = tm_comm_size(c);
    float *x = malloc(n * sizeof(float) + 1);
    EXPECT(x);
    for (size_t i = 0; i < n; i++)
        x[i] = number(op, rank, i);
    EXPECT(tm_comm_allreduce_f32(c, x, n) == TM_OK);
    for (size_t i = 0; i < n; i++) {
        float want = number(op, 0, i);
        for (int r = 1; r < size; r++)
            want += number(op, r, i);
        EXPECT(memcmp(&want, &x[i], sizeof(want)) == 0);
    }
    free(x);
}

static void check_gather(tm_comm *c, int op, size_t rows, size_t cols)
{
    int rank = tm_comm_rank(c), size = tm_comm_size(c);
    float *x = malloc(rows * cols * sizeof(float));
    float *out = rank == 0 ? malloc(rows * cols * (size_t)size * sizeof(float)) : NULL;
    EXPECT(x && (out || rank > 0));
    for (size_t i = 0; i < rows * cols; i++)
        x[i] = number(op, rank, i);
    EXPECT(tm_comm_gather_cols_f32(c, x, rows, cols, out) == TM_OK);
    for (size_t i = 0; rank == 0 && i < rows; i++)
        for (int r = 0; r < size; r++)
            for (size_t j = 0; j < cols; j++)
                EXPECT(out[(i * (size_t)size + (size_t)r) * cols + j] ==
                       number(op, r, i * cols + j));
    free(out);
    free(x);
}

static void check_bcast(tm_comm *c, int op, size_t n, size_t cap)
{
    unsigned char *p = malloc(cap + 1);
    EXPECT(p);
    size_t len = 12345;
    if (tm_comm_rank(c) == 0) {
        len = n;
        for (size_t i = 0; i < n; i++)
            p[i] = (unsigned char)mix(g_seed + (uint64_t)op * 7919 + i);
    }
    EXPECT(tm_comm_bcast(c, p, &len, cap) == TM_OK);
    EXPECT(len == n);
    for (size_t i = 0; i < n; i++)
        EXPECT(p[i] == (unsigned char)mix(g_seed + (uint64_t)op * 7919 + i));
    free(p);
}

static void check_agree(tm_comm *c)
{
    int rank = tm_comm_rank(c), last = tm_comm_size(c) - 1;
    tm_err err = TM_ERR_INIT;
    EXPECT(tm_comm_agree(c, TM_OK, &err) == TM_OK);
    tm_status mine = TM_OK;
    if (rank == last)
        mine = TM_FAIL(&err, TM_STATUS_DATA, "tensor x is bad");
    EXPECT(tm_comm_agree(c, mine, &err) == TM_STATUS_DATA);
    char want[64];
    snprintf(want, sizeof(want), "rank %d: tensor x is bad", last);
    if (last > 0)
        EXPECT(strcmp(err.msg, want) == 0);
}

/* A follower whose room is too small says so and stays in step. */
static void check_bcast_cap(tm_comm *c)
{
    static char data[300000];
    size_t len = sizeof(data), cap = tm_comm_rank(c) == 0 ? sizeof(data) : 1000;
    tm_status st = tm_comm_bcast(c, data, &len, cap);
    EXPECT(st == (tm_comm_rank(c) == 0 ? TM_OK : TM_STATUS_TOO_LARGE));
    check_bcast(c, 999, 100, 100);
}

/* Cards of every size, and what a healthy group says of itself. */
static void check_allgather(tm_comm *c)
{
    static const size_t sizes[] = {1, 7, 64, 333, TM_COMM_CARD_MAX};
    int rank = tm_comm_rank(c), size = tm_comm_size(c);
    uint8_t *mine = malloc(TM_COMM_CARD_MAX), *all = malloc(TM_COMM_CARD_MAX * (size_t)size);
    EXPECT(mine && all);
    EXPECT(tm_comm_host_rank(c) == rank);
    for (size_t k = 0; k < TM_ARRAY_LEN(sizes); k++) {
        for (size_t i = 0; i < sizes[k]; i++)
            mine[i] = (uint8_t)mix(g_seed + k * 100003u + (size_t)rank * 5003u + i);
        EXPECT(tm_comm_allgather(c, mine, sizes[k], all) == TM_OK);
        for (int r = 0; r < size; r++)
            for (size_t i = 0; i < sizes[k]; i++)
                EXPECT(all[(size_t)r * sizes[k] + i] ==
                       (uint8_t)mix(g_seed + k * 100003u + (size_t)r * 5003u + i));
        EXPECT(tm_comm_check(c) == TM_OK);
    }
    EXPECT(tm_comm_allgather(c, mine, TM_COMM_CARD_MAX + 1, all) == TM_STATUS_INVALID);
    EXPECT(tm_comm_allgather(c, mine, 0, all) == TM_STATUS_INVALID);
    free(mine);
    free(all);
}

static int mode_collectives(tm_comm *c)
{
    check_allgather(c);
    static const size_t lens[] = {0, 1, 3, 64, 1023, 4096, 4097, 50000, 65536, 65537, 300001};
    for (size_t i = 0; i < TM_ARRAY_LEN(lens); i++)
        check_allreduce(c, (int)i, lens[i]);
    check_gather(c, 20, 1, 1);
    check_gather(c, 21, 7, 129);
    check_gather(c, 22, 3, 70001);
    check_bcast(c, 30, 0, 0);
    check_bcast(c, 31, 17, 64);
    check_bcast(c, 32, 65536, 65536);
    check_bcast(c, 33, 3000000, 4000000);
    if (tm_comm_size(c) > 1)
        check_bcast_cap(c);
    check_agree(c);
    for (int i = 0; i < 300; i++) {
        uint64_t r = mix(g_seed + (uint64_t)i);
        size_t n = (size_t)(r % 3000) + 1;
        switch ((r >> 32) % 4) {
        case 0:
            check_allreduce(c, 100 + i, n);
            break;
        case 1:
            check_gather(c, 100 + i, n % 5 + 1, n);
            break;
        case 2:
            check_bcast(c, 100 + i, n, n);
            break;
        default:
            EXPECT(tm_comm_barrier(c) == TM_OK);
        }
    }
    tm_comm_destroy(c);
    return 0;
}

static double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* Followers wait for two seconds, rank 0 sleeps: the share of a core that each uses meanwhile. */
static int mode_idle(tm_comm *c)
{
    char word[8] = "go";
    size_t len = 3;
    EXPECT(tm_comm_barrier(c) == TM_OK);
    double before = cpu_seconds();
    int64_t t0 = tm_clock_ms();
    if (tm_comm_rank(c) == 0)
        tm_sleep_ms(2000);
    EXPECT(tm_comm_bcast(c, word, &len, sizeof(word)) == TM_OK);
    double share = (cpu_seconds() - before) / ((double)(tm_clock_ms() - t0) * 1e-3);
    printf("idle rank %d: %.2f %% of a core\n", tm_comm_rank(c), share * 100);
    EXPECT(share < 0.02);
    tm_comm_destroy(c);
    return 0;
}

/* Microseconds of one small all-reduce; printed, not judged. */
static int mode_latency(tm_comm *c)
{
    float x[2048] = {0};
    static const int n[] = {1, 512, 2048};
    for (size_t k = 0; k < TM_ARRAY_LEN(n); k++) {
        EXPECT(tm_comm_barrier(c) == TM_OK);
        int64_t t0 = tm_clock_ns();
        for (int i = 0; i < 2000; i++)
            EXPECT(tm_comm_allreduce_f32(c, x, (size_t)n[k]) == TM_OK);
        if (tm_comm_rank(c) == 0)
            printf("%s, %d ranks, %d floats: %.1f us\n", tm_comm_kind(c), tm_comm_size(c), n[k],
                   (double)(tm_clock_ns() - t0) / 2000 / 1000);
    }
    tm_comm_destroy(c);
    return 0;
}

/* The last rank vanishes by `sig` in the middle of collectives; followers idle in a broadcast when
 * `idle`. The others must report within limit_ms; the exit code 69 tells the test that they did. */
static int mode_vanish(tm_comm *c, int sig, bool idle, int64_t limit_ms)
{
    int rank = tm_comm_rank(c), last = tm_comm_size(c) - 1;
    float x[64] = {1};
    char word[8];
    size_t len = 0;
    for (int i = 0; i < 10; i++)
        EXPECT(tm_comm_allreduce_f32(c, x, 64) == TM_OK);
    if (rank == last) {
        raise(sig);
        pause();
    }
    int64_t t0 = tm_clock_ms();
    tm_status st = idle && rank > 0 ? tm_comm_bcast(c, word, &len, sizeof(word)) : TM_OK;
    while (st == TM_OK)
        st = tm_comm_allreduce_f32(c, x, 64);
    int64_t took = tm_clock_ms() - t0;
    printf("rank %d: %s after %d ms\n", rank, tm_status_name(st), (int)took);
    fflush(stdout);
    EXPECT(st == TM_STATUS_UNAVAILABLE && took < limit_ms);
    EXPECT(tm_comm_barrier(c) == TM_STATUS_UNAVAILABLE);
    tm_comm_abort(c, 69);
}

static int mode_abort(tm_comm *c)
{
    float x[64] = {1};
    EXPECT(tm_comm_allreduce_f32(c, x, 64) == TM_OK);
    if (tm_comm_rank(c) == tm_comm_size(c) - 1)
        tm_comm_abort(c, 7);
    tm_status st = tm_comm_allreduce_f32(c, x, 64);
    EXPECT(st == TM_STATUS_UNAVAILABLE);
    tm_sleep_ms(5000);
    return 9;
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    const char *mode = argv[1];
    int ranks = (int)strtol(argv[3], NULL, 10);
    g_seed = strtoull(argv[4], NULL, 10);
    tm_comm_opts opts = tm_comm_opts_default();
    opts.kind = argv[2];
    if (strcmp(mode, "stop") == 0)
        opts.step_timeout_ms = 400;
    tm_err err = TM_ERR_INIT;
    tm_comm *c = NULL;
    tm_status st = tm_comm_create(&c, ranks, &opts, &err);
    if (strcmp(mode, "mismatch") == 0) {
        printf("%s\n", err.msg);
        return st == TM_STATUS_CONFIG ? 0 : 9;
    }
    if (st != TM_OK) {
        fprintf(stderr, "comm_rank: %s\n", err.msg);
        return 9;
    }
    if (strcmp(mode, "collectives") == 0)
        return mode_collectives(c);
    if (strcmp(mode, "idle") == 0)
        return mode_idle(c);
    if (strcmp(mode, "latency") == 0)
        return mode_latency(c);
    if (strcmp(mode, "kill") == 0)
        return mode_vanish(c, SIGKILL, false, 1000);
    if (strcmp(mode, "kill_idle") == 0)
        return mode_vanish(c, SIGKILL, true, 1000);
    if (strcmp(mode, "stop") == 0)
        return mode_vanish(c, SIGSTOP, false, 1500);
    if (strcmp(mode, "abort") == 0)
        return mode_abort(c);
    return 2;
}
