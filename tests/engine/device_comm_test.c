/* Devices of several ranks: sums, joined norms, columns and picks against what every rank can compute from the seed.
 *
 * The program starts itself under mpirun, one rank a device. Sums through peer memory have one right result, bit by
 * bit: f32 in the order of the ranks, rounded once. NCCL's are compared within the rounding of the dtype. TM_REPEAT is
 * the number of replays of a recorded sequence, TM_RANKS the number of ranks (default 2), TM_MPIRUN the launcher. On the emulator large
 * messages are left out unless TM_ALL_SIZES is set. */
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"
#include "engine/backend/backend.h"
#include "engine/backend/cpu/convert.h"
#include "parallel/comm.h"
#include "tests/harness/rank_job.h"

#define NO_DEVICE 77 /* exit code of a rank that has none */
#define GATHER    ((size_t)4 << 20)

static uint64_t g_seed;

#ifdef TM_MPIRUN

#define EXPECT(cond)                                                                               \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, "device_comm_test: line %d, rank %d: not so: %s\n", __LINE__, g.rank,  \
                    #cond);                                                                        \
            fflush(stderr);                                                                        \
            _exit(9);                                                                              \
        }                                                                                          \
    } while (0)

static struct {
    const tm_backend *b;
    tm_device *dev;
    tm_comm *comm;
    int rank, size;
    tm_dtype act;
    bool exact; /* not through NCCL */
    bool slow;  /* an emulated device: no large messages */
    float *gathered;
} g;

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* Number i of array `what` on one rank, as the dtype holds it. Magnitudes differ, so that the order shows; runs of
 * numbers are zeros of either sign, which peer memory sends in a way of their own. */
static float number(tm_dtype t, int what, int rank, size_t i)
{
    uint64_t r = mix(g_seed ^ mix((uint64_t)what * 1000003u + (uint64_t)rank) ^ (uint64_t)i * 77);
    float f = (float)(int32_t)(uint32_t)r / 2147483648.0f, place;
    f = (r >> 60) == 0 ? f * 100.0f : f;
    if (mix(g_seed + i / 16) % 8 == 0)
        f = r >> 62 == 0 ? -0.0f : r >> 62 == 1 ? f : 0.0f;
    tm_store_f32(&place, 0, t, f);
    return tm_load_f32(&place, 0, t);
}

static float sum_of(tm_dtype t, int what, size_t i)
{
    float sum = 0.0f, place;
    for (int r = 0; r < g.size; r++)
        sum += number(t, what, r, i);
    tm_store_f32(&place, 0, t, sum);
    return tm_load_f32(&place, 0, t);
}

static void *numbers(tm_dtype t, int what, int rank, size_t n)
{
    void *p = malloc(n * tm_dtype_size(t) + 1);
    EXPECT(p);
    for (size_t i = 0; i < n; i++)
        tm_store_f32(p, i, t, number(t, what, rank, i));
    return p;
}

static void *take(size_t bytes)
{
    void *p = NULL;
    EXPECT(g.b->dev->alloc(g.dev, bytes, &p, NULL) == TM_OK);
    return p;
}

static void *put(const void *host, size_t bytes)
{
    void *p = take(bytes);
    EXPECT(g.b->dev->upload(g.dev, p, host, bytes) == TM_OK);
    EXPECT(g.b->dev->sync(g.dev) == TM_OK);
    return p;
}

static void get(void *host, const void *p, size_t bytes)
{
    EXPECT(g.b->dev->download(g.dev, host, p, bytes) == TM_OK);
}

static void drop(void *p)
{
    g.b->dev->free(g.dev, p);
}

static double tolerance(tm_dtype t)
{
    return t == TM_DTYPE_BF16 ? 1.0 / 64 : t == TM_DTYPE_F16 ? 1.0 / 512 : 1e-5;
}

/* What NCCL's rounding goes by: on the way large numbers may not yet have met what makes them small. */
static double size_of(tm_dtype t, int what, size_t i)
{
    double size = 1.0;
    for (int r = 0; r < g.size; r++)
        size += fabs((double)number(t, what, r, i));
    return size;
}

static void expect_sum(tm_dtype t, const void *have, int what, size_t i)
{
    float want = sum_of(t, what, i), x = tm_load_f32(have, i, t);
    double bound = g.exact ? 0.0 : tolerance(t) * size_of(t, what, i);
    if (fabs((double)x - (double)want) <= bound)
        return;
    fprintf(stderr, "%s, number %zu: %g, expected %g\n", tm_dtype_name(t), i, (double)x,
            (double)want);
    EXPECT(!"the sum is right");
}

static void check_sum(bool f32, size_t n, int what)
{
    tm_dtype t = f32 ? TM_DTYPE_F32 : g.act;
    size_t bytes = n * tm_dtype_size(t);
    char *host = numbers(t, what, g.rank, n + 16); /* what follows stays as it is */
    char *after = malloc(bytes + 64);
    EXPECT(after);
    size_t all = (n + 16) * tm_dtype_size(t);
    void *x = put(host, all);
    const tm_sum_args a = {.x = x, .n = n, .f32 = f32};
    EXPECT(g.b->ops->sum(g.dev, &a) == TM_OK);
    get(after, x, all);
    for (size_t i = 0; i<n; i += n> 100000 ? 13 : 1)
        expect_sum(t, after, what, i);
    EXPECT(memcmp(after + bytes, host + bytes, all - bytes) == 0);
    drop(x);
    free(after);
    free(host);
}

static void check_sums(void)
{
    static const size_t sizes[] = {1,    3,     8,     100,    4096,   4099,
                                   8192, 32768, 65536, 131072, 300007, 1048576};
    for (size_t i = 0; i < TM_ARRAY_LEN(sizes); i++)
        for (int f32 = 0; f32 < 2 && !(g.slow && sizes[i] > 140000); f32++)
            check_sum(f32, sizes[i], (int)i * 2 + f32);
    if (!g.slow)
        check_sum(false, 5000000, 99); /* more than a stage holds */
}

/* ---- joined norms ---- */

typedef struct norm_case {
    int rows, h;
    tm_norm_kind kind;
    bool bias, add_one, no_out, other;
} norm_case;

/* A row in f64 from the rounded sums. */
static void reference_norm(const norm_case *c, int row, const float *w, const float *b,
                           float *residual, double *out)
{
    double mean = 0, sq = 0;
    for (int i = 0; i < c->h; i++) {
        size_t at = (size_t)row * (size_t)c->h + (size_t)i;
        float place;
        tm_store_f32(&place, 0, g.act, number(g.act, 51, 0, at) + sum_of(g.act, 50, at));
        residual[i] = tm_load_f32(&place, 0, g.act);
        mean += (double)residual[i] / c->h;
    }
    mean = c->kind == TM_NORM_LAYER ? mean : 0;
    for (int i = 0; i < c->h; i++)
        sq += ((double)residual[i] - mean) * ((double)residual[i] - mean) / c->h;
    for (int i = 0; i < c->h; i++)
        out[i] = ((double)residual[i] - mean) / sqrt(sq + 1e-5) *
                     ((double)w[i] + (c->add_one ? 1.0 : 0.0)) +
                 (b ? (double)b[i] : 0.0);
}

static void compare_norm(const norm_case *c, const void *out, const void *residual, const float *w,
                         const float *b)
{
    float *want = malloc((size_t)c->h * sizeof(*want));
    double *norm = malloc((size_t)c->h * sizeof(*norm)), off = 0, all = 0;
    EXPECT(want && norm);
    for (int row = 0; row<c->rows; row += c->rows> 20 ? 7 : 1) {
        reference_norm(c, row, w, c->bias ? b : NULL, want, norm);
        for (int i = 0; i < c->h; i++) {
            size_t at = (size_t)row * (size_t)c->h + (size_t)i;
            double r = (double)tm_load_f32(residual, at, g.act);
            /* The sum's, and that of adding it to a number that may be much larger. */
            double size = 2 * size_of(g.act, 50, at) + fabs((double)number(g.act, 51, 0, at));
            double bound = g.exact ? 0.0 : tolerance(g.act) * size;
            EXPECT(fabs(r - (double)want[i]) <= bound);
            double o = c->no_out ? norm[i] : (double)tm_load_f32(out, at, g.act);
            off += (o - norm[i]) * (o - norm[i]);
            all += norm[i] * norm[i];
        }
    }
    EXPECT(off <= all * tolerance(g.act) * tolerance(g.act));
    free(norm);
    free(want);
}

static void check_norm(const norm_case *c)
{
    size_t n = (size_t)c->rows * (size_t)c->h, bytes = n * tm_dtype_size(g.act);
    void *delta_host = numbers(g.act, 50, g.rank, n), *residual_host = numbers(g.act, 51, 0, n);
    float *w_host = numbers(TM_DTYPE_F32, 52, 0, (size_t)c->h);
    float *b_host = numbers(TM_DTYPE_F32, 53, 0, (size_t)c->h);
    void *delta = put(delta_host, bytes), *residual = put(residual_host, bytes);
    void *w = put(w_host, (size_t)c->h * 4), *b = put(b_host, (size_t)c->h * 4);
    void *out = take(bytes), *other = take(bytes);
    const tm_norm_args a = {.out = c->no_out ? NULL : out,
                            .residual = residual,
                            .delta = delta,
                            .w = w,
                            .b = c->bias ? b : NULL,
                            .residual_out = c->other ? other : NULL,
                            .n_tokens = c->rows,
                            .h = c->h,
                            .eps = 1e-5f,
                            .kind = c->kind,
                            .add_one = c->add_one};
    EXPECT(g.b->ops->sum_norm(g.dev, &a) == TM_OK);
    get(residual_host, c->other ? other : residual, bytes);
    get(delta_host, out, bytes);
    compare_norm(c, delta_host, residual_host, w_host, b_host);
    void *const device[] = {delta, residual, w, b, out, other};
    for (size_t i = 0; i < TM_ARRAY_LEN(device); i++)
        drop(device[i]);
    free(delta_host);
    free(residual_host);
    free(w_host);
    free(b_host);
}

static void check_norms(void)
{
    static const norm_case cases[] = {
        {1, 64, TM_NORM_RMS, false, false, false, false},
        {1, 4096, TM_NORM_RMS, false, false, false, true},
        {1, 16384, TM_NORM_RMS, false, true, false, false},
        {1, 8192, TM_NORM_LAYER, true, false, false, false},
        {3, 896, TM_NORM_LAYER, false, false, false, true},
        {17, 2048, TM_NORM_RMS, true, true, false, false},
        {5, 36, TM_NORM_RMS, false, false, false, false}, /* rows that are no whole packs */
        {8, 4096, TM_NORM_RMS, false, false, true, false},
        {7, 8200, TM_NORM_RMS, false, false, false, false},
        {3, 5000, TM_NORM_LAYER, true, true, false, true},
        {80, 1032, TM_NORM_LAYER, false, false, false, false},
        {140, 512, TM_NORM_RMS, false, false, false, false}, /* more rows than blocks */
        {64, 4096, TM_NORM_RMS, false, false, false, true},
        {33, 24, TM_NORM_RMS, false, false, false, false},    /* fewer packs than ranks */
        {600, 8192, TM_NORM_RMS, false, false, false, false}, /* more than a stage holds */
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(cases); i++)
        if (!g.slow || cases[i].rows * cases[i].h < 100000)
            check_norm(&cases[i]);
}

/* ---- columns and picks ---- */

static void check_gather(int rows, int cols, int n)
{
    float *mine = malloc((size_t)rows * (size_t)cols * 4),
          *all = malloc((size_t)rows * (size_t)n * 4);
    EXPECT(mine && all);
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < rows * cols; i++)
            mine[i] = number(TM_DTYPE_F32, 60 + round, g.rank, (size_t)i);
        void *x = put(mine, (size_t)rows * (size_t)cols * 4);
        const tm_gather_cols_args a = {.x = x, .n_rows = rows, .cols = cols, .n = n};
        EXPECT(g.b->ops->gather_cols(g.dev, &a) == TM_OK);
        if (g.rank == 0)
            get(all, g.gathered, (size_t)rows * (size_t)n * 4);
        for (int r = 0; g.rank == 0 && r < rows; r++)
            for (int i = 0; i < n; i++)
                EXPECT(all[r * n + i] ==
                       number(TM_DTYPE_F32, 60 + round, i / cols, (size_t)(r * cols + i % cols)));
        EXPECT(g.b->dev->sync(g.dev) == TM_OK);
        drop(x);
    }
    free(all);
    free(mine);
}

/* Rows by number: 0 equal everywhere, 1 without a number, 2 only the last valid column, the rest random with ties. */
static float logit(int row, int rank, int i, int cols, int n)
{
    if (row == 0)
        return -3.0f;
    if (row == 1)
        return NAN;
    if (row == 2)
        return rank * cols + i == n - 1 ? 5.0f : -1.0f;
    return floorf(number(TM_DTYPE_F32, 70 + row, rank, (size_t)i) * 50.0f) - 200.0f;
}

static void check_picks(int rows, int cols, int n)
{
    float *mine = malloc((size_t)rows * (size_t)cols * 4);
    int32_t *picked = malloc((size_t)rows * 4);
    int v0 = g.rank * cols, valid = TM_MIN(cols, TM_MAX(n - v0, 0));
    EXPECT(mine && picked);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < cols; i++) /* padding is larger than any number */
            mine[r * cols + i] = i < valid ? logit(r, g.rank, i, cols, n) : 0.0f;
    void *x = put(mine, (size_t)rows * (size_t)cols * 4), *out = take((size_t)rows * 4);
    const tm_argmax_args a = {.out = out, .x = x, .n_rows = rows, .n = valid, .ld = cols, .v0 = v0};
    EXPECT(g.b->ops->argmax_ranks(g.dev, &a) == TM_OK);
    get(picked, out, (size_t)rows * 4);
    for (int r = 0; r < rows; r++) {
        int best = 0;
        for (int i = 1; i < n; i++)
            if (logit(r, i / cols, i % cols, cols, n) > logit(r, best / cols, best % cols, cols, n))
                best = i;
        EXPECT(picked[r] == (r == 1 ? -1 : best));
    }
    drop(x);
    drop(out);
    free(picked);
    free(mine);
}

/* Tokens of rank 0, some of them none, to all; what the others had does not count. */
static void check_spread(int n)
{
    int32_t *x = malloc((size_t)n * 4);
    EXPECT(x);
    for (int i = 0; i < n; i++)
        x[i] = g.rank > 0 ? 100000 + i : i % 7 == 3 ? -1 : i * 31;
    void *d = put(x, (size_t)n * 4);
    const tm_spread_args a = {.x = d, .n = n};
    EXPECT(g.b->ops->spread(g.dev, &a) == TM_OK);
    get(x, d, (size_t)n * 4);
    for (int i = 0; i < n; i++)
        EXPECT(x[i] == (i % 7 == 3 ? -1 : i * 31));
    drop(d);
    free(x);
}

/* ---- recorded ---- */

enum { SETS = 3, PARTS = 3 };

typedef struct recorded {
    size_t n[PARTS];
    void *in[PARTS], *out[PARTS]; /* pinned */
    void *x[PARTS];
    void *set[SETS][PARTS], *want[SETS][PARTS];
    tm_graph *graph;
} recorded;

static void enqueue(const recorded *r)
{
    size_t size = tm_dtype_size(g.act);
    for (int p = 0; p < PARTS; p++) {
        const tm_sum_args a = {.x = r->x[p], .n = r->n[p]};
        EXPECT(g.b->dev->upload(g.dev, r->x[p], r->in[p], r->n[p] * size) == TM_OK);
        EXPECT(g.b->ops->sum(g.dev, &a) == TM_OK);
        EXPECT(g.b->dev->download_async(g.dev, r->out[p], r->x[p], r->n[p] * size) == TM_OK);
    }
}

static void open_recorded(recorded *r)
{
    static const size_t n[PARTS] = {640, 8192, 40003};
    size_t size = tm_dtype_size(g.act);
    memset(r, 0, sizeof(*r));
    for (int p = 0; p < PARTS; p++) {
        r->n[p] = n[p];
        r->x[p] = take(n[p] * size);
        EXPECT(g.b->dev->alloc_host(g.dev, n[p] * size, &r->in[p], NULL) == TM_OK);
        EXPECT(g.b->dev->alloc_host(g.dev, n[p] * size, &r->out[p], NULL) == TM_OK);
        for (int s = 0; s < SETS; s++) {
            r->set[s][p] = numbers(g.act, 200 + s * PARTS + p, g.rank, n[p]);
            r->want[s][p] = malloc(n[p] * size);
            EXPECT(r->want[s][p]);
            for (size_t i = 0; i < n[p]; i++)
                tm_store_f32(r->want[s][p], i, g.act, sum_of(g.act, 200 + s * PARTS + p, i));
        }
    }
}

/* Every replay has other numbers than the one before; ranks come late in turns. */
static void check_recorded(int repeat)
{
    recorded r;
    size_t size = tm_dtype_size(g.act);
    open_recorded(&r);
    for (int k = -1; k < repeat; k++) {
        int s = (k + SETS) % SETS;
        for (int p = 0; p < PARTS; p++)
            memcpy(r.in[p], r.set[s][p], r.n[p] * size);
        if (k == 0) {
            EXPECT(g.b->dev->graph_begin(g.dev) == TM_OK);
            enqueue(&r);
            EXPECT(g.b->dev->graph_end(g.dev, &r.graph) == TM_OK);
        }
        if (k % 50 == g.rank * 20)
            tm_sleep_ms(1);
        if (k < 0)
            enqueue(&r);
        else
            EXPECT(g.b->dev->graph_launch(g.dev, r.graph) == TM_OK);
        EXPECT(g.b->dev->sync(g.dev) == TM_OK);
        for (int p = 0; p < PARTS; p++)
            for (size_t i = 0; i < r.n[p]; i += g.exact ? r.n[p] : 1)
                if (g.exact)
                    EXPECT(memcmp(r.out[p], r.want[s][p], r.n[p] * size) == 0);
                else
                    expect_sum(g.act, r.out[p], 200 + s * PARTS + p, i);
    }
    g.b->dev->graph_free(g.dev, r.graph);
    for (int p = 0; p < PARTS; p++) {
        drop(r.x[p]);
        g.b->dev->free_host(g.dev, r.in[p]);
        g.b->dev->free_host(g.dev, r.out[p]);
        for (int s = 0; s < SETS; s++) {
            free(r.set[s][p]);
            free(r.want[s][p]);
        }
    }
}

/* ---- ranks ---- */

static bool open_rank(const char *collectives, tm_dtype dtype, int64_t patience_ms, tm_err *err)
{
    tm_comm_opts co = tm_comm_opts_default();
    const char *ranks = getenv("OMPI_COMM_WORLD_SIZE");
    co.step_timeout_ms = patience_ms;
    if (!g.comm && tm_comm_create(&g.comm, (int)strtol(ranks, NULL, 10), &co, err) != TM_OK)
        return false;
    g.rank = tm_comm_rank(g.comm);
    g.size = tm_comm_size(g.comm);
    g.b = tm_backend_find("cuda");
    g.act = dtype;
    g.exact = strcmp(collectives, "nccl") != 0;
    bool share = getenv("TM_SHARE_GPU") != NULL;
    const tm_device_opts o = {
        .index = share || strcmp(collectives, "same") == 0 ? 0 : tm_comm_host_rank(g.comm),
        .dtype = dtype,
        .share = share,
        .collectives = strcmp(collectives, "same") == 0 ? NULL : collectives};
    tm_status st = g.b ? g.b->dev->open(&g.dev, &o, err) : TM_STATUS_CONFIG;
    if (tm_comm_agree(g.comm, st, err) != TM_OK)
        return false;
    g.slow = strstr(g.b->dev->describe(g.dev), "emulated") && !getenv("TM_ALL_SIZES");
    return true;
}

static tm_status join(tm_err *err)
{
    const tm_join_args a = {.gather_bytes = GATHER, .sum_bytes_max = (size_t)64 << 20};
    return tm_comm_agree(g.comm, g.b->dev->join(g.dev, g.comm, &a, &g.gathered, err), err);
}

static int rank_all(const char *collectives, int repeat)
{
    static const tm_dtype dtypes[] = {TM_DTYPE_BF16, TM_DTYPE_F16};
    if (strcmp(collectives, "nccl") == 0)
        repeat = TM_MIN(repeat, 200); /* every number of every replay is judged */
    for (size_t i = 0; i < TM_ARRAY_LEN(dtypes) && !(i > 0 && g.slow); i++) {
        tm_err err = TM_ERR_INIT;
        if (!open_rank(collectives, dtypes[i], 30000, &err)) {
            if (g.rank == 0)
                printf("%s\n", err.msg);
            return NO_DEVICE;
        }
        if (join(&err) != TM_OK) {
            if (g.rank == 0)
                printf("%s: %s\n", collectives, err.msg);
            return strcmp(collectives, "nccl") == 0 ? NO_DEVICE : 9;
        }
        check_sums();
        check_norms();
        check_gather(1, 17, 17 * g.size);
        check_gather(7, 1000, 1000 * g.size - 3);
        check_gather(3, 5, 5 * g.size - 6); /* the last rank has no column */
        check_picks(20, 333, 333 * g.size - 2);
        check_picks(300, 64, 64 * g.size);
        check_spread(300);
        check_recorded(repeat);
        EXPECT((g.rank == 0) == (g.gathered != NULL));
        g.b->dev->close(g.dev);
        if (g.rank == 0)
            printf("%d ranks, %s, %s: sums, norms, columns, picks, %d replays: right\n", g.size,
                   collectives, tm_dtype_name(dtypes[i]), repeat);
    }
    tm_comm_destroy(g.comm);
    return 0;
}

/* The last rank dies or sleeps; the others must say so, soon and for good. Exit code 69: they did. */
static int rank_fault(bool dies)
{
    tm_err err = TM_ERR_INIT;
    if (!open_rank("peer", TM_DTYPE_BF16, 700, &err))
        return NO_DEVICE;
    EXPECT(join(&err) == TM_OK);
    void *host = numbers(g.act, 1, g.rank, 4096);
    void *x = put(host, 4096 * 2);
    const tm_sum_args a = {.x = x, .n = 4096};
    for (int i = 0; i < 5; i++)
        EXPECT(g.b->ops->sum(g.dev, &a) == TM_OK);
    EXPECT(g.b->dev->sync(g.dev) == TM_OK);
    if (g.rank == g.size - 1) {
        if (dies)
            raise(SIGKILL);
        tm_sleep_ms(20000);
        return 0;
    }
    int64_t begin = tm_clock_ms();
    tm_status st = g.b->ops->sum(g.dev, &a);
    if (st == TM_OK)
        st = g.b->dev->sync(g.dev);
    int64_t took = tm_clock_ms() - begin;
    printf("rank %d: %s after %d ms\n", g.rank, tm_status_name(st), (int)took);
    fflush(stdout);
    /* With its process a device's memory may go, and what still writes there then fails. */
    EXPECT(st == TM_STATUS_UNAVAILABLE || (dies && st == TM_STATUS_INTERNAL));
    EXPECT(took < 15000); /* not because the other one has gone on */
    EXPECT(g.b->dev->sync(g.dev) != TM_OK);
    EXPECT(g.b->ops->sum(g.dev, &a) != TM_OK);
    tm_comm_abort(g.comm, 69);
}

/* Two ranks on one GPU, and a wish that is unknown: refused on every rank, with the reason. */
static int rank_refused(void)
{
    tm_err err = TM_ERR_INIT;
    if (!open_rank("same", TM_DTYPE_BF16, 5000, &err))
        return NO_DEVICE;
    if (!getenv("TM_SHARE_GPU")) {
        EXPECT(join(&err) == TM_STATUS_CONFIG && strstr(err.msg, "the same GPU"));
        g.b->dev->close(g.dev);
        EXPECT(open_rank("wrong", TM_DTYPE_BF16, 5000, &err));
    }
    EXPECT(getenv("TM_SHARE_GPU") || join(&err) == TM_STATUS_CONFIG);
    EXPECT(getenv("TM_SHARE_GPU") || strstr(err.msg, "expected auto"));
    g.b->dev->close(g.dev);
    tm_comm_destroy(g.comm);
    return 0;
}

static int rank_main(const char *mode, int repeat)
{
    if (strcmp(mode, "dies") == 0 || strcmp(mode, "late") == 0)
        return rank_fault(strcmp(mode, "dies") == 0);
    return strcmp(mode, "refused") == 0 ? rank_refused() : rank_all(mode, repeat);
}

/* ---- the test ---- */

static int group(const char *mode, int limit_s)
{
    const char *ranks = getenv("TM_RANKS");
    return rank_job(TM_MPIRUN, NULL, ranks ? (int)strtol(ranks, NULL, 10) : 2, limit_s,
                    "rank %s %llu", mode, (unsigned long long)g_seed);
}

static void check_group(const char *mode)
{
    int rc = group(mode, 120);
    if (rc == NO_DEVICE)
        printf("skipped: %s: no such devices here\n", mode);
    else
        assert_int_equal(rc, 0);
}

static void test_auto(void **state)
{
    (void)state;
    check_group("auto");
}

static void test_push(void **state)
{
    (void)state;
    check_group("push");
}

static void test_one(void **state)
{
    (void)state;
    check_group("one");
}

static void test_two(void **state)
{
    (void)state;
    check_group("two");
}

static void test_nccl(void **state)
{
    (void)state;
    check_group("nccl");
}

static void test_refused(void **state)
{
    (void)state;
    check_group("refused");
}

static void check_fault(const char *mode)
{
    int64_t begin = tm_clock_ms();
    int rc = group(mode, 40);
    if (rc == NO_DEVICE)
        return;
    assert_true(rc == 69 || rc == 137);
    assert_true(tm_clock_ms() - begin < 25000);
}

static void test_dies(void **state)
{
    (void)state;
    check_fault("dies");
}

static void test_late(void **state)
{
    (void)state;
    check_fault("late");
}
#else
static void test_none(void **state)
{
    (void)state;
    printf("skipped: this build has no MPI\n");
}
#endif

int main(int argc, char **argv)
{
    const char *s = getenv("TM_SEED"), *only = getenv("TM_TEST");
#ifdef TM_MPIRUN
    if (argc == 4 && strcmp(argv[1], "rank") == 0) {
        const char *repeat = getenv("TM_REPEAT");
        g_seed = strtoull(argv[3], NULL, 10);
        return rank_main(argv[2], repeat ? (int)strtol(repeat, NULL, 10) : 20);
    }
#endif
    (void)argc;
    (void)argv;
    g_seed = s ? strtoull(s, NULL, 10) : (uint64_t)tm_clock_ns();
    printf("seed %llu (TM_SEED repeats it)\n", (unsigned long long)g_seed);
    setenv("TM_EMU_SHARE", "1",
           0); /* the emulator's memory can then be opened by other processes */
    if (only)
        cmocka_set_test_filter(only);
    const struct CMUnitTest tests[] = {
#ifdef TM_MPIRUN
        cmocka_unit_test(test_auto), cmocka_unit_test(test_push), cmocka_unit_test(test_one),
        cmocka_unit_test(test_two),  cmocka_unit_test(test_nccl), cmocka_unit_test(test_refused),
        cmocka_unit_test(test_dies), cmocka_unit_test(test_late),
#else
        cmocka_unit_test(test_none),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
