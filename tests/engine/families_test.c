/* Every family's tiny checkpoint against its golden logits and greedy ids: float32 on the reference operators and
 * bfloat16 on the fast ones, whole prompts and random mixtures of chunks and decodes, one rank and two; and bfloat16
 * and float16 on a GPU, or two, where there are some (TM_FAMILIES_CUDA=only: nothing else). Prints a table. The
 * checkpoints are tiny ones of the tree and those of TM_SHARED/testdata/families that have no pictures; TM_FAMILY names
 * one alone.
 *
 * Run as `families_test rank SEED OUT FIRST END` under mpirun it is one of two ranks, for modes FIRST to END - 1. */
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
#include "common/clock.h"
#include "common/file.h"
#include "tests/engine/golden_run.h"
#include "tests/harness/rank_job.h"

#define FAMILIES_MAX 128
#define SESSION_LEN  256

static uint64_t g_seed;

typedef struct result {
    double whole, mixed; /* worst NMSE of a sequence */
    int steps, wrong;    /* greedy */
    char refused[256];   /* the message of a model that cannot be cut */
} result;

typedef struct mode {
    const char *title, *backend, *dtype, *isa; /* isa of one rank */
    double gate;
    int block; /* tokens of a KV block */
} mode;

static bool evaluate(tm_comm *comm, const char *dir, const mode *how, const char *isa, result *out)
{
    golden g;
    run r;
    tm_err err = TM_ERR_INIT;
    *out = (result){0};
    if (!golden_load(&g, dir, g_seed++)) {
        golden_free(&g);
        return false;
    }
    if (run_open_at(&r, comm, how->backend, dir, how->dtype, isa, SESSION_LEN, how->block, &err) !=
        TM_OK) {
        snprintf(out->refused, sizeof(out->refused), "%.255s", err.msg);
        golden_free(&g);
        return true;
    }
    bool judge = tm_comm_rank(comm) == 0;
    float *all = calloc((size_t)g.count * GOLDEN_TAIL * (size_t)g.vocab, sizeof(float));
    float *step = calloc(RUN_SEQS_MAX * (size_t)g.vocab, sizeof(float));
    if (all && step) {
        golden_feed_whole(&r, &g, all);
        out->whole = golden_nmse(&g, all);
        golden_reset(&g, &r);
        golden_feed_mixed(&r, &g, all, step);
        out->mixed = golden_nmse(&g, all);
        golden_reset(&g, &r);
        out->wrong = golden_feed_greedy(&r, &g, strcmp(how->dtype, "float32") == 0, judge, step,
                                        &out->steps);
    }
    free(all);
    free(step);
    run_close(&r);
    golden_free(&g);
    return all && step;
}

/* ---- the families of this folder ---- */

static char g_names[FAMILIES_MAX][64];
static int g_name_count;

static int by_name(const void *a, const void *b)
{
    return strcmp(a, b);
}

#define OWN "tests/fixtures/families" /* made by tests/fixtures/make.py */

static bool shared_dir(char *out, size_t size)
{
    const char *root = getenv("TM_SHARED");
    return root && tm_path_join(out, size, root, "testdata/families") && tm_dir_exists(out);
}

static bool family_dir(char *out, size_t size, const char *name)
{
    char families[800];
    return (shared_dir(families, sizeof(families)) && tm_path_join(out, size, families, name) &&
            tm_dir_exists(out)) ||
           (tm_path_join(out, size, OWN, name) && tm_dir_exists(out));
}

/* A family's folder that has no pictures. */
static bool is_text(const char *name)
{
    char dir[1024], golden_path[1200], image_path[1200];
    return family_dir(dir, sizeof(dir), name) &&
           tm_path_join(golden_path, sizeof(golden_path), dir, "golden.json") &&
           tm_path_join(image_path, sizeof(image_path), dir, "preprocessor_config.json") &&
           tm_file_exists(golden_path) && !tm_file_exists(image_path);
}

static void list_folder(const char *dir)
{
    const char *only = getenv("TM_FAMILY");
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d)) != NULL && g_name_count < FAMILIES_MAX;)
        if (e->d_name[0] != '.' && is_text(e->d_name) && (!only || strcmp(only, e->d_name) == 0))
            snprintf(g_names[g_name_count++], sizeof(g_names[0]), "%.63s", e->d_name);
    if (d)
        closedir(d);
}

static void list_families(void)
{
    char dir[1024];
    list_folder(OWN);
    if (shared_dir(dir, sizeof(dir)))
        list_folder(dir);
    else
        printf("only the tree's own families: the full set is not there (set TM_SHARED)\n");
    qsort(g_names, (size_t)g_name_count, sizeof(g_names[0]), by_name);
}

static const mode modes[] = {{"float32", "cpu", "float32", "ref", 1e-6, 16},
                             {"bfloat16", "cpu", "bfloat16", "auto", 1e-3, 5},
                             {"bfloat16, CUDA", "cuda", "bfloat16", NULL, 1e-3, 16},
                             {"float16, CUDA", "cuda", "float16", NULL, 5e-5, 16}};

enum { CPU_MODES = 2, MODES = (int)TM_ARRAY_LEN(modes) };
static int g_first_mode, g_end_mode; /* what runs here */
static int g_two_end;                /* and with two ranks, from g_first_mode on */

#ifdef TM_FAMILIES_CUDA_ONLY /* the emulator */
static const bool g_cuda_only = true;
#else
static const bool g_cuda_only = false;
#endif

/* With two ranks some families stand for all on the emulator: grouped heads, experts, latent attention, norms of
 * outputs, parallel blocks, slopes, fused layouts, lengths. TM_ALL_SIZES: all. */
static bool runs_two(const char *name)
{
    static const char *const few[] = {"llama3.1-rope", "qwen2-moe",    "deepseek-v3",
                                      "gemma2",        "falcon-40b",   "baichuan-13b",
                                      "chatglm3-32k",  "phi3-longrope"};
    bool all = !g_cuda_only || getenv("TM_FAMILY") || getenv("TM_ALL_SIZES");
    for (size_t i = 0; i < TM_ARRAY_LEN(few) && !all; i++)
        all = strcmp(few[i], name) == 0;
    return all;
}

/* Says why where it is not there. */
static bool have_gpu(int index)
{
    const tm_backend *b = tm_backend_find("cuda");
    const tm_device_opts o = {.index = index};
    tm_device *dev = NULL;
    tm_err err = TM_ERR_INIT;
    if (b && b->dev->open(&dev, &o, &err) == TM_OK) {
        b->dev->close(dev);
        return true;
    }
    printf("CUDA%s: skipped: %s\n", index ? " with two ranks" : "",
           b ? err.msg : "not in this build");
    return false;
}

static void choose_modes(void)
{
    const char *only = getenv("TM_FAMILIES_CUDA");
    bool gpu = have_gpu(0);
    g_first_mode = gpu && (g_cuda_only || (only && strcmp(only, "only") == 0)) ? (int)CPU_MODES : 0;
    g_end_mode = gpu ? MODES : CPU_MODES;
    g_two_end = gpu && have_gpu(1) ? MODES : CPU_MODES;
}

/* Those of two ranks come from a job of its own, a line for each family and mode. */
static result g_two[FAMILIES_MAX][MODES];
static bool g_have_two;

static void print_result(const result *r, double gate)
{
    char greedy[32];
    if (r->refused[0]) {
        printf(" | %-28s", "refused");
        return;
    }
    snprintf(greedy, sizeof(greedy), "%d/%d", r->steps - r->wrong, r->steps);
    bool ok = r->whole < gate && r->mixed < gate && r->wrong == 0;
    printf(" | %8.1e %8.1e %7s %s", r->whole, r->mixed, greedy, ok ? "  " : "**");
}

static int failures_of(const result *r, double gate)
{
    return r->refused[0] ? 0 : !(r->whole < gate && r->mixed < gate && r->wrong == 0);
}

/* What must be refused with two ranks, and why. */
static const struct {
    const char *family, *says;
} refusals[] = {{"baichuan2-13b", "num_attention_heads 3 is not divisible by tp 2"}};

static bool may_refuse(const char *family, const char *message)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(refusals); i++)
        if (strcmp(refusals[i].family, family) == 0)
            return strstr(message, refusals[i].says) != NULL;
    return false;
}

#ifdef TM_MPIRUN
static int rank_main(const char *seed, const char *out_path, int first, int end)
{
    tm_comm *comm = NULL;
    tm_err err = TM_ERR_INIT;
    tm_comm_opts co = tm_comm_opts_default();
    co.step_timeout_ms = 60000;
    g_seed = strtoull(seed, NULL, 10);
    if (tm_comm_create(&comm, 2, &co, &err) != TM_OK) {
        fprintf(stderr, "%s\n", err.msg);
        return 9;
    }
    FILE *f = tm_comm_rank(comm) == 0 ? fopen(out_path, "w") : NULL;
    list_families();
    for (int i = 0; i < g_name_count; i++)
        for (int k = first; k < end; k++) {
            char dir[1024];
            result r = {0};
            if (!runs_two(g_names[i]))
                continue;
            family_dir(dir, sizeof(dir), g_names[i]);
            if (!evaluate(comm, dir, &modes[k], k < CPU_MODES ? "auto" : NULL, &r))
                return 9;
            if (f)
                fprintf(f, "%d %d %g %g %d %d %s\n", i, k, r.whole, r.mixed, r.steps, r.wrong,
                        r.refused[0] ? r.refused : "-");
        }
    tm_comm_destroy(comm);
    return f && fclose(f) != 0 ? 9 : 0;
}

static void read_two(const char *path)
{
    char line[512];
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    int lines = 0, families = 0;
    for (int i = 0; i < g_name_count; i++)
        families += runs_two(g_names[i]);
    while (fgets(line, sizeof(line), f)) {
        int i, k, at = 0;
        result r = {0};
        assert_int_equal(sscanf(line, "%d %d %lf %lf %d %d %n", &i, &k, &r.whole, &r.mixed,
                                &r.steps, &r.wrong, &at),
                         6);
        line[strcspn(line, "\n")] = '\0';
        if (strcmp(line + at, "-") != 0)
            snprintf(r.refused, sizeof(r.refused), "%.255s", line + at);
        assert_in_range(i, 0, g_name_count - 1);
        assert_in_range(k, g_first_mode, g_two_end - 1);
        g_two[i][k] = r;
        lines++;
    }
    fclose(f);
    assert_int_equal(lines, families * (g_two_end - g_first_mode));
    g_have_two = true;
}

static void run_two(void)
{
    char out[] = "/tmp/tm-families-test-XXXXXX";
    int fd = mkstemp(out);
    assert_true(fd >= 0);
    close(fd);
    assert_int_equal(rank_job(TM_MPIRUN, NULL, 2, 900, "rank %llu %s %d %d",
                              (unsigned long long)g_seed, out, g_first_mode, g_two_end),
                     0);
    read_two(out);
    unlink(out);
}
#endif

static int check_family(tm_comm *comm, int i)
{
    char dir[1024];
    int failures = 0;
    assert_true(family_dir(dir, sizeof(dir), g_names[i]));
    printf("%-17s", g_names[i]);
    for (int k = g_first_mode; k < g_end_mode; k++) {
        result r;
        assert_true(evaluate(comm, dir, &modes[k], modes[k].isa, &r));
        print_result(&r, modes[k].gate);
        failures += r.refused[0] ? 1 : failures_of(&r, modes[k].gate);
        if (r.refused[0])
            printf(" %s", r.refused);
    }
    for (int k = g_first_mode; g_have_two && runs_two(g_names[i]) && k < g_two_end; k++) {
        const result *r = &g_two[i][k];
        print_result(r, modes[k].gate);
        failures += failures_of(r, modes[k].gate);
        failures += r->refused[0] && !may_refuse(g_names[i], r->refused);
    }
    if (g_have_two && g_two[i][g_first_mode].refused[0])
        printf(" %s", g_two[i][g_first_mode].refused);
    printf("\n");
    return failures;
}

static void test_families(void **state)
{
    (void)state;
    int failures = 0;
    tm_comm *comm = NULL;
    tm_comm_opts co = tm_comm_opts_default();
    tm_err err = TM_ERR_INIT;
    list_families();
    assert_true(g_name_count > 0);
    assert_int_equal(tm_comm_create(&comm, 1, &co, &err), TM_OK);
    choose_modes();
#ifdef TM_MPIRUN
    if (g_first_mode < g_two_end)
        run_two();
#endif
    printf("%-17s", "whole mixed greedy");
    for (int k = g_first_mode; k < g_end_mode; k++)
        printf(" | %-28s", modes[k].title);
    for (int k = g_first_mode; g_have_two && k < g_two_end; k++)
        printf(" | %-18s, 2 ranks", modes[k].title);
    printf("\n");
    for (int i = 0; i < g_name_count; i++)
        failures += check_family(comm, i);
    tm_comm_destroy(comm);
    printf("%d checkpoints, %d failures\n", g_name_count, failures);
    assert_int_equal(failures, 0);
}

int main(int argc, char **argv)
{
#ifdef TM_MPIRUN
    if (argc == 6 && strcmp(argv[1], "rank") == 0)
        return rank_main(argv[2], argv[3], (int)strtol(argv[4], NULL, 10),
                         (int)strtol(argv[5], NULL, 10));
#endif
    (void)argc;
    (void)argv;
    const char *s = getenv("TM_SEED");
    setenv("TM_EMU_SHARE", "1", 0); /* ranks of the emulator read each other's memory */
    g_seed = s ? strtoull(s, NULL, 10) : (uint64_t)tm_clock_ns();
    printf("seed %llu (TM_SEED repeats it)\n", (unsigned long long)g_seed);
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_families)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
