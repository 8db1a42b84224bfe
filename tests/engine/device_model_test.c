/* Models over several ranks with a device each: the same ragged steps with one rank and with TM_RANKS (2) give the same
 * logits within rounding, the picks of decode steps are the largest of their logits, and steps in flight give the same
 * answers as steps one by one. demo-20m always; of
 * TM_SHARED/testdata/families those that the backend runs (TM_FAMILY names one alone). TM_COLLECTIVES: how they sum.
 *
 * Run as `device_model_test rank TP COLLECTIVES OUT LIST` under mpirun it is one rank: it runs every folder of the
 * file LIST and rank 0 writes what came out. */
#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/check.h"
#include "common/file.h"
#include "engine/sample/sampler.h"
#include "tests/engine/model_run.h"
#include "tests/harness/rank_job.h"

#define DEMO      "models/demo-20m"
#define DIRS_MAX  128
#define NO_DEVICE 77
#define SEQS      3
#define DECODES   5

#ifdef TM_MPIRUN

/* What one folder gave: n logits, then the picks of the last rows; or why it was refused. */
typedef struct answer {
    int32_t n, picks;
    char refused[248];
} answer;

static tm_status open_model(run *r, tm_comm *comm, const char *dir, const char *collectives,
                            tm_err *err)
{
    *r = (run){.comm = comm, .block_tokens = 16, .total_blocks = 64, .on_device = true};
    const tm_model_opts o = {
        .dir = dir,
        .dtype = getenv("TM_DTYPE") ? getenv("TM_DTYPE") : "auto",
        .backend = "cuda",
        .device = {.collectives = collectives, .share = getenv("TM_SHARE_GPU") != NULL},
        .block_tokens = r->block_tokens,
        .max_step_tokens = 64,
        .max_seqs = 4,
        .session_len = 128};
    tm_status st = tm_model_open(&r->model, &o, comm, err);
    if (st == TM_OK)
        st = tm_model_kv_alloc(r->model, r->total_blocks, err);
    return st;
}

/* Greedy answers of the three sequences, once with every token read by the host and once with two steps in flight: the
 * same picks. The first step is not a decode. */
static bool run_ahead(run *r, run_seq *seq, int vocab)
{
    enum { STEPS = 7 };
    int32_t ids[SEQS][48], picked[2][STEPS][SEQS];
    int done[SEQS];
    bool same = true;
    r->picks = true;
    for (int i = 0; i < SEQS; i++) {
        memcpy(ids[i], seq[i].ids, sizeof(ids[i]));
        seq[i].ids = ids[i];
        seq[i].done -= 3;
        done[i] = seq[i].done;
    }
    for (int turn = 0; turn < 2; turn++) {
        r->ahead = turn == 1;
        for (int k = 0; k < STEPS; k++) {
            run_item items[SEQS];
            for (int i = 0; i < SEQS; i++)
                items[i] = (run_item){&seq[i], k == 0 ? i + 1 : 1, 1};
            r->fed = turn == 1 && k > 0;
            r->picked = picked[turn][k];
            run_step(r, items, SEQS, NULL);
            for (int i = 0; turn == 0 && i < SEQS; i++)
                ids[i][seq[i].done] = picked[0][k][i];
            for (int i = 0; turn == 1 && k == 0 && i < SEQS; i++)
                ids[i][seq[i].done] = vocab - 1; /* not to be read */
            if (turn == 1 && tm_model_in_flight(r->model) == TM_MODEL_FLIGHTS)
                same &= tm_model_end(r->model, picked[1][k - 1]) == TM_OK;
        }
        for (int i = 0; i < SEQS; i++)
            seq[i].done = done[i];
    }
    same &= tm_model_end(r->model, picked[1][STEPS - 1]) == TM_OK;
    same &= tm_model_end(r->model, NULL) == TM_STATUS_INVALID;
    if (tm_comm_rank(r->comm) == 0)
        same &= memcmp(picked[0], picked[1], sizeof(picked[0])) == 0;
    r->picks = r->ahead = r->fed = false;
    return same;
}

static tm_sampler *new_sampler(int i, int vocab, const run_seq *seq)
{
    const tm_logit_bias bias[] = {{7, 2.0f}, {vocab - 2, -1.0f}};
    const int32_t stops[] = {2, 3};
    tm_sampling p = tm_sampling_default();
    tm_sampler *s = NULL;
    p.seed = (uint64_t)i + 77;
    p.top_p = i == 0 ? 0.9f : 1.0f;
    p.logprobs = i == 0 ? 3 : i == 2 ? 0 : -1;
    if (i == 1) {
        p.top_k = 20;
        p.repetition_penalty = 1.2f;
        p.frequency_penalty = 0.1f;
        p.logit_bias = bias;
        p.logit_bias_count = TM_ARRAY_LEN(bias);
    }
    p.temperature = i == 2 ? 0.0f : 1.5f;
    p.min_tokens = i == 2 ? 9 : 0;
    const tm_sampler_opts o = {.params = &p,
                               .vocab = vocab,
                               .stop_ids = stops,
                               .stop_count = 2,
                               .tokens = seq->ids,
                               .n_prompt = 8,
                               .n_tokens = 12};
    return tm_sampling_check(&p, vocab, NULL) == TM_OK && tm_sampler_create(&s, &o, NULL) == TM_OK
               ? s
               : NULL;
}

static bool same_draw(const run *r, tm_sampler *s, tm_sample_space *sp, tm_sample_space *other,
                      const float *logits, int vocab, int i, int32_t picked)
{
    tm_logprobs want = {0}, got = {0};
    float *row = malloc((size_t)vocab * sizeof(*row)); /* the draw changes it */
    int32_t token = -1;
    bool lists = i != 1, drawn = false;
    if (row) {
        memcpy(row, logits + (size_t)i * (size_t)vocab, (size_t)vocab * sizeof(*row));
        drawn = tm_sampler_draw(s, sp, row, 4, &token, &want) == TM_OK && token == picked;
    }
    free(row);
    if (!drawn)
        return false;
    if (lists)
        tm_logprobs_of_detail(other, &tm_model_details(r->model)[i], &got);
    return got.logprob == want.logprob && got.top_count == want.top_count &&
           (want.top_count == 0 ||
            memcmp(got.top_ids, want.top_ids, (size_t)want.top_count * sizeof(*want.top_ids)) == 0);
}

/* Tokens drawn by the device, in a decode step (the second time a recorded one) and in another: those that the host draws
 * from the logits of the same step, and the same log-probabilities. */
static bool run_sampled(run *r, run_seq *seq, int vocab)
{
    tm_sample_row rows[SEQS];
    tm_sample_edit edits[64];
    tm_sampler *samplers[SEQS];
    tm_sample_space *sp = NULL, *other = NULL;
    float *logits = malloc((size_t)SEQS * (size_t)vocab * sizeof(*logits));
    tm_sample_set set = {.rows = rows, .edits = edits, .details = true};
    bool first = tm_comm_rank(r->comm) == 0;
    bool same = logits && tm_sample_space_create(&sp, vocab, NULL) == TM_OK &&
                tm_sample_space_create(&other, vocab, NULL) == TM_OK &&
                tm_model_can_sample(r->model);
    for (int i = 0; same && i < SEQS; i++) {
        samplers[i] = new_sampler(i, vocab, &seq[i]);
        same =
            samplers[i] && tm_sampler_device_row(samplers[i], 4, &rows[i], edits, 64, &set.n_edits);
    }
    for (int k = 0; same && k < 5; k++) {
        run_item items[SEQS];
        int32_t picked[SEQS];
        bool samples = k != 0 && k != 3;
        for (int i = 0; i < SEQS; i++)
            items[i] = (run_item){&seq[i], k >= 3 ? i + 1 : 1, 1};
        r->picks = samples;
        r->set = &set;
        r->picked = picked;
        run_step(r, items, SEQS, logits);
        for (int i = 0; i < SEQS; i++) {
            seq[i].done -= items[i].n;
            if (samples && first)
                same &= same_draw(r, samplers[i], sp, other, logits, vocab, i, picked[i]);
        }
    }
    for (int i = 0; same && i < SEQS; i++)
        tm_sampler_destroy(samplers[i]);
    tm_sample_space_destroy(sp);
    tm_sample_space_destroy(other);
    free(logits);
    r->picks = false;
    r->set = NULL;
    return same;
}

/* A prompt step of three sequences, decodes with their logits, and decodes of which only the picks are wanted; the last
 * of these is computed again with logits, which is what the picks are compared with. */
static int run_model(run *r, float *logits, int32_t *picks, bool *same)
{
    static const int lens[SEQS] = {40, 16, 29};
    static int32_t ids[SEQS][48];
    run_seq seq[SEQS];
    int vocab = tm_model_info_get(r->model)->vocab, rows = 0;
    for (int i = 0; i < SEQS; i++) {
        for (int k = 0; k < 48; k++)
            ids[i][k] = (i * 911 + k * 37 + 5) % vocab;
        seq[i] = (run_seq){.ids = ids[i], .len = lens[i]};
    }
    run_item prefill[SEQS] = {{&seq[0], 30, 2}, {&seq[1], 4, 0}, {&seq[2], 18, 1}};
    run_step(r, prefill, SEQS, logits);
    rows += 3;
    run_item items[SEQS] = {{&seq[0], 1, 1}, {&seq[1], 1, 1}, {&seq[2], 1, 1}};
    for (int k = 0; k < DECODES; k++, rows += SEQS)
        run_step(r, items, SEQS, logits + (size_t)rows * (size_t)vocab);
    r->picks = true;
    r->picked = picks;
    for (int k = 0; k < 3; k++)
        run_step(r, items, SEQS, NULL);
    run_item again[SEQS] = {{&seq[0], 2, 1}, {&seq[1], 1, 1}, {&seq[2], 3, 2}};
    for (int i = 0; i < SEQS; i++)
        seq[i].done--;
    r->picks = false;
    run_step(r, items, SEQS, logits + (size_t)rows * (size_t)vocab);
    rows += SEQS;
    /* Not a decode step: picks by the other path. */
    r->picks = true;
    r->picked = picks + SEQS;
    run_item mixed[SEQS] = {again[1], again[0], again[2]};
    run_step(r, mixed, SEQS, NULL);
    for (int i = 0; i < SEQS; i++)
        seq[i].done -= again[i].n;
    r->picks = false;
    run_step(r, mixed, SEQS, logits + (size_t)rows * (size_t)vocab);
    *same = run_ahead(r, seq, vocab);
    if (*same && !run_sampled(r, seq, vocab)) {
        fprintf(stderr, "the device draws other tokens\n");
        *same = false;
    }
    return rows + 4;
}

static bool run_folder(tm_comm *comm, const char *dir, const char *collectives, FILE *f)
{
    run r;
    tm_err err = TM_ERR_INIT;
    answer a = {0};
    bool same = false;
    tm_status st = open_model(&r, comm, dir, collectives, &err);
    if (st != TM_OK) {
        snprintf(a.refused, sizeof(a.refused), "%.240s", err.msg);
        bool fatal = st != TM_STATUS_UNSUPPORTED && st != TM_STATUS_CONFIG;
        return (!f || fwrite(&a, sizeof(a), 1, f) == 1) && !fatal;
    }
    int vocab = tm_model_info_get(r.model)->vocab;
    int32_t picks[SEQS + 4];
    float *logits = calloc((size_t)(7 + SEQS * (DECODES + 1)) * (size_t)vocab, sizeof(float));
    if (!logits)
        return false;
    a.n = run_model(&r, logits, picks, &same) * vocab;
    a.picks = vocab;
    if (f && (fwrite(&a, sizeof(a), 1, f) != 1 ||
              fwrite(logits, sizeof(float), (size_t)a.n, f) != (size_t)a.n ||
              fwrite(picks, sizeof(picks), 1, f) != 1))
        return false;
    free(logits);
    run_close(&r);
    if (!same)
        fprintf(stderr, "%s: other picks with steps in flight, or on the device\n", dir);
    return same;
}

static int rank_main(int tp, const char *collectives, const char *out, const char *list)
{
    tm_comm *comm = NULL;
    tm_err err = TM_ERR_INIT;
    tm_comm_opts co = tm_comm_opts_default();
    const tm_backend *b = tm_backend_find("cuda");
    tm_device *dev = NULL;
    const tm_device_opts last = {.index = tp - 1}; /* one device a rank */
    char dir[1024];
    co.step_timeout_ms = 60000;
    if (!b || b->dev->open(&dev, &last, &err) != TM_OK)
        return NO_DEVICE;
    b->dev->close(dev);
    if (tm_comm_create(&comm, tp, &co, &err) != TM_OK)
        return 9;
    FILE *f = tm_comm_rank(comm) == 0 ? fopen(out, "wb") : NULL;
    FILE *l = fopen(list, "r");
    bool ok = l && (f || tm_comm_rank(comm) > 0);
    while (ok && fgets(dir, sizeof(dir), l)) {
        dir[strcspn(dir, "\n")] = '\0';
        ok = run_folder(comm, dir, collectives, f);
    }
    if (l)
        fclose(l);
    if (f && fclose(f) != 0)
        ok = false;
    tm_comm_destroy(comm);
    return ok ? 0 : 9;
}

/* ---- the test ---- */

static char g_dirs[DIRS_MAX][1024];
static int g_dir_count;

static int by_name(const void *a, const void *b)
{
    return strcmp(a, b);
}

/* On the emulator some families stand for all: grouped heads, experts, latent attention, norms of outputs, parallel
 * blocks, slopes, lengths. */
static bool is_chosen(const char *name)
{
#ifdef TM_TEST_FEW
    static const char *const few[] = {"llama3.1-rope", "qwen2-moe",    "deepseek-v3",  "gemma2",
                                      "falcon-40b",    "baichuan-13b", "phi3-longrope"};
    bool all = getenv("TM_FAMILY") || getenv("TM_ALL_SIZES");
    for (size_t i = 0; i < TM_ARRAY_LEN(few) && !all; i++)
        all = strcmp(few[i], name) == 0;
    return all;
#else
    (void)name;
    return true;
#endif
}

static void add_families(void)
{
    const char *root = getenv("TM_SHARED"), *only = getenv("TM_FAMILY");
    char path[900];
    snprintf(path, sizeof(path), "%s/testdata/families", root ? root : "");
    DIR *d = root ? opendir(path) : NULL;
    for (struct dirent *e; d && (e = readdir(d)) && g_dir_count < DIRS_MAX;) {
        char config[1024];
        snprintf(config, sizeof(config), "%s/%.80s/config.json", path, e->d_name);
        if (e->d_name[0] != '.' && is_chosen(e->d_name) && tm_file_exists(config) &&
            (!only || strcmp(only, e->d_name) == 0))
            snprintf(g_dirs[g_dir_count++], sizeof(g_dirs[0]), "%s/%.80s", path, e->d_name);
    }
    if (d)
        closedir(d);
    else
        printf("without the families: they are not there (set TM_SHARED)\n");
    qsort(g_dirs[1], (size_t)(g_dir_count - 1), sizeof(g_dirs[0]), by_name);
}

static void write_list(char *path)
{
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    FILE *f = fdopen(fd, "w");
    assert_non_null(f);
    for (int i = 0; i < g_dir_count; i++)
        fprintf(f, "%s\n", g_dirs[i]);
    assert_int_equal(fclose(f), 0);
}

/* What a group of tp ranks wrote; NULL: there are no devices. */
static char *run_group(int tp, const char *collectives, size_t *bytes)
{
    char out[] = "/tmp/tm-device-model-XXXXXX", list[] = "/tmp/tm-device-model-list-XXXXXX";
    char *data = NULL;
    int fd = mkstemp(out);
    assert_true(fd >= 0);
    close(fd);
    write_list(list);
    int rc = rank_job(TM_MPIRUN, NULL, tp, 300, "rank %d %s %s %s", tp, collectives, out, list);
    unlink(list);
    if (rc == 0)
        assert_int_equal(tm_file_read(out, 256 << 20, &data, bytes, NULL), TM_OK);
    unlink(out);
    assert_true(rc == 0 || rc == NO_DEVICE);
    return data;
}

/* Rows of `picks` are those from row `first` on. Ties within the noise of a recorded and an unrecorded step count. */
static int wrong_picks(const float *logits, const int32_t *picks, int first, int n, int vocab)
{
    int wrong = 0;
    for (int i = 0; i < n; i++) {
        const float *row = logits + (size_t)(first + i) * (size_t)vocab;
        float best = row[run_argmax(row, vocab)];
        wrong += picks[i] < 0 || picks[i] >= vocab || row[picks[i]] < best - 0.02f;
    }
    return wrong;
}

static const char *read_answer(const char *at, answer *a, const float **logits,
                               const int32_t **picks)
{
    memcpy(a, at, sizeof(*a));
    at += sizeof(*a);
    if (a->n == 0)
        return at;
    *logits = (const float *)(const void *)at;
    *picks = (const int32_t *)(const void *)(at + (size_t)a->n * sizeof(float));
    return at + (size_t)a->n * sizeof(float) + (SEQS + 4) * sizeof(int32_t);
}

static int compare(int i, const char **one, const char **many)
{
    answer a, b;
    const float *x = NULL, *y = NULL;
    const int32_t *px = NULL, *py = NULL;
    const char *name = strrchr(g_dirs[i], '/') + 1;
    *one = read_answer(*one, &a, &x, &px);
    *many = read_answer(*many, &b, &y, &py);
    if (a.n == 0 || b.n == 0) {
        printf("%-20s refused: %s\n", name, a.n == 0 ? a.refused : b.refused);
        return a.n != 0 && !strstr(b.refused, "divisible");
    }
    assert_int_equal(a.n, b.n);
    int vocab = a.picks, rows = a.n / vocab;
    double e = run_nmse(y, x, (size_t)a.n);
    int wrong = wrong_picks(y, py, rows - 4 - SEQS, SEQS, vocab) +
                wrong_picks(y, py + SEQS, rows - 4, 4, vocab) +
                wrong_picks(x, px, rows - 4 - SEQS, SEQS, vocab);
    printf("%-20s NMSE %.1e, %d wrong picks%s\n", name, e, wrong,
           e < 1e-3 && wrong == 0 ? "" : " **");
    return !(e < 1e-3 && wrong == 0);
}

static void check(void)
{
    const char *s = getenv("TM_RANKS"), *wish = getenv("TM_COLLECTIVES");
    const char *collectives = wish ? wish : "auto";
    int ranks = s ? (int)strtol(s, NULL, 10) : 2, failures = 0;
    size_t one_bytes = 0, many_bytes = 0;
    char *one = run_group(1, collectives, &one_bytes);
    char *many = one ? run_group(ranks, collectives, &many_bytes) : NULL;
    if (!one || !many) {
        printf("skipped: no device for %s\n", one ? "each rank" : "the backend");
        free(one);
        return;
    }
    const char *a = one, *b = many;
    for (int i = 0; i < g_dir_count; i++)
        failures += compare(i, &a, &b);
    assert_int_equal(a - one, one_bytes);
    assert_int_equal(b - many, many_bytes);
    free(one);
    free(many);
    assert_int_equal(failures, 0);
}

static void test_demo(void **state)
{
    (void)state;
    g_dir_count = 1;
    snprintf(g_dirs[0], sizeof(g_dirs[0]), "%s", DEMO);
    check();
}

static void test_families(void **state)
{
    (void)state;
    g_dir_count = 1;
    snprintf(g_dirs[0], sizeof(g_dirs[0]), "%s", DEMO);
    add_families();
    if (g_dir_count > 1)
        check();
}
#else
static void test_demo(void **state)
{
    (void)state;
    printf("skipped: this build has no MPI\n");
}
#endif

int main(int argc, char **argv)
{
#ifdef TM_MPIRUN
    if (argc == 6 && strcmp(argv[1], "rank") == 0)
        return rank_main((int)strtol(argv[2], NULL, 10), argv[3], argv[4], argv[5]);
#endif
    (void)argc;
    (void)argv;
    setenv("TM_EMU_SHARE", "1",
           0); /* the emulator's memory can then be opened by other processes */
    if (getenv("TM_TEST"))
        cmocka_set_test_filter(getenv("TM_TEST"));
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_demo),
#ifdef TM_MPIRUN
        cmocka_unit_test(test_families),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
