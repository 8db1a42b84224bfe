/* Every family's tiny checkpoint against its golden logits and greedy ids: float32 on the reference operators and
 * bfloat16 on the fast ones, whole prompts and random mixtures of chunks and decodes, one rank and two; and bfloat16
 * and float16 on a GPU where there is one (TM_FAMILIES_CUDA=only: nothing else). Prints a table. The checkpoints are tiny ones of
 * the tree and those of TM_SHARED/testdata/families that have no pictures; TM_FAMILY names one alone.
 *
 * Run as `families_test rank SEED OUT` under mpirun it is one rank of the second half. */
#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/file.h"
#include "common/json.h"
#include "tests/engine/model_run.h"

#define FAMILIES_MAX 128
#define GREEDY_STEPS 16
#define SESSION_LEN  256
#define TAIL         8 /* positions whose logits are in the golden */

static uint64_t g_seed;

static uint32_t random_below(uint32_t n)
{
    g_seed = g_seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(g_seed >> 33) % n;
}

/* ---- goldens ---- */

typedef struct golden {
    json_t *root;
    int count, vocab;
    run_seq seq[RUN_SEQS_MAX]; /* ids have room for the greedy ones */
    float *logits;             /* [count, 8, vocab] */
} golden;

static json_t *load_json(const char *dir, const char *name)
{
    char path[1024];
    json_t *root = NULL;
    tm_err err = TM_ERR_INIT;
    bool ok = tm_path_join(path, sizeof(path), dir, name) &&
              tm_json_load_file(path, 64 << 20, &root, &err) == TM_OK;
    if (!ok)
        fprintf(stderr, "%s/%s: %s\n", dir, name, err.msg);
    return root;
}

static void golden_free(golden *g)
{
    for (int i = 0; i < g->count; i++)
        free((void *)(uintptr_t)g->seq[i].ids);
    free(g->logits);
    json_decref(g->root);
}

static bool load_logits(golden *g, const char *dir)
{
    char path[1024];
    char *data = NULL;
    size_t len = 0, want = (size_t)g->count * TAIL * (size_t)g->vocab * sizeof(float);
    g->logits = malloc(want);
    if (!g->logits || !tm_path_join(path, sizeof(path), dir, "logits.npy") ||
        tm_file_read(path, 64 << 20, &data, &len, NULL) != TM_OK || len <= want) {
        free(data);
        return false;
    }
    memcpy(g->logits, data + len - want, want); /* the numbers are the end of the file */
    free(data);
    return true;
}

static bool golden_load(golden *g, const char *dir)
{
    *g = (golden){.root = load_json(dir, "golden.json")};
    const json_t *seqs = json_object_get(g->root, "sequences");
    g->vocab = (int)json_integer_value(json_object_get(g->root, "vocab_size"));
    if (json_array_size(seqs) < 1 || json_array_size(seqs) > RUN_SEQS_MAX)
        return false;
    for (size_t i = 0; i < json_array_size(seqs); i++) {
        const json_t *ids = json_object_get(json_array_get(seqs, i), "ids");
        int n = (int)json_array_size(ids);
        int32_t *copy = calloc((size_t)n + GREEDY_STEPS, sizeof(*copy));
        if (!copy || n <= TAIL)
            return false;
        for (int k = 0; k < n; k++)
            copy[k] = (int32_t)json_integer_value(json_array_get(ids, (size_t)k));
        g->seq[g->count++] = (run_seq){.ids = copy, .len = n, .rope_len = n};
    }
    return load_logits(g, dir);
}

static void golden_reset(golden *g, run *r)
{
    for (int i = 0; i < g->count; i++)
        g->seq[i].done = g->seq[i].n_blocks = 0;
    r->next_block = 0;
}

/* ---- feeding ---- */

/* Every sequence alone in one step. */
static void feed_whole(run *r, golden *g, float *out)
{
    for (int i = 0; i < g->count; i++) {
        run_item item = {&g->seq[i], g->seq[i].len, TAIL};
        run_step(r, &item, 1, out + (size_t)i * TAIL * (size_t)g->vocab);
    }
}

static bool unfinished(const golden *g)
{
    for (int i = 0; i < g->count; i++)
        if (g->seq[i].done < g->seq[i].len)
            return true;
    return false;
}

/* Some sequences take part, those that decode first. */
static int draw_step(golden *g, run_item *items)
{
    int n = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < g->count; i++) {
            run_seq *s = &g->seq[i];
            int left = s->len - TAIL - s->done;
            if (pass == 0 && left <= 0 && s->done < s->len)
                items[n++] = (run_item){s, 1, 1};
            if (pass == 1 && left > 0 && random_below(4) > 0)
                items[n++] = (run_item){s, 1 + (int)random_below((uint32_t)left), 0};
        }
    return n;
}

/* All sequences together in chunks of random lengths; the last 8 tokens one by one, so that decodes and
 * prefill chunks of different sequences share steps. */
static void feed_mixed(run *r, golden *g, float *out, float *logits)
{
    size_t row_size = (size_t)g->vocab;
    while (unfinished(g)) {
        run_item items[RUN_SEQS_MAX];
        int n = draw_step(g, items);
        if (n > 0)
            run_step(r, items, n, logits);
        for (int k = 0, row = 0; k < n; k++) {
            const run_seq *s = items[k].seq;
            size_t at = (size_t)(s - g->seq) * TAIL + (size_t)(s->done - (s->len - TAIL) - 1);
            if (items[k].want)
                memcpy(out + at * row_size, logits + (size_t)row++ * row_size,
                       row_size * sizeof(float));
        }
    }
}

/* ---- results ---- */

typedef struct result {
    double whole, mixed; /* worst NMSE of a sequence */
    int steps, wrong;    /* greedy */
    char refused[256];   /* the message of a model that cannot be cut */
} result;

static double worst_nmse(const golden *g, const float *out)
{
    double worst = 0;
    size_t n = TAIL * (size_t)g->vocab;
    for (int i = 0; i < g->count; i++) {
        double e = run_nmse(out + (size_t)i * n, g->logits + (size_t)i * n, n);
        worst = e > worst || e != e ? e : worst;
    }
    return worst;
}

/* Greedy ids up to the first step that may go either way. The golden's ids are fed, so all ranks agree. */
static void feed_greedy(run *r, golden *g, bool exact, bool judge, float *logits, result *out)
{
    for (int i = 0; i < g->count; i++) {
        const json_t *seq = json_array_get(json_object_get(g->root, "sequences"), (size_t)i);
        const json_t *greedy = json_object_get(seq, "greedy");
        run_seq s = g->seq[i];
        int32_t *ids = (int32_t *)(uintptr_t)s.ids;
        run_item item = {&s, s.len, 1};
        if (json_is_false(json_object_get(seq, "greedy_gate")))
            continue;
        for (int k = 0; k < (int)json_array_size(greedy) && k < GREEDY_STEPS; k++) {
            const json_t *step = json_array_get(greedy, (size_t)k);
            const json_t *router = json_object_get(step, "router_margin");
            if (json_number_value(json_object_get(step, "margin")) < (exact ? 1e-3 : 0.2) ||
                (!exact && router && json_number_value(router) < 0.1))
                break;
            run_step(r, &item, 1, logits);
            int id = (int)json_integer_value(json_object_get(step, "id"));
            out->steps++;
            out->wrong += judge && run_argmax(logits, g->vocab) != id;
            ids[g->seq[i].len + k] = id;
            item = (run_item){&s, 1, 1};
        }
    }
}

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
    if (!golden_load(&g, dir)) {
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
    float *all = calloc((size_t)g.count * TAIL * (size_t)g.vocab, sizeof(float));
    float *step = calloc(RUN_SEQS_MAX * (size_t)g.vocab, sizeof(float));
    if (all && step) {
        feed_whole(&r, &g, all);
        out->whole = worst_nmse(&g, all);
        golden_reset(&g, &r);
        feed_mixed(&r, &g, all, step);
        out->mixed = worst_nmse(&g, all);
        golden_reset(&g, &r);
        feed_greedy(&r, &g, strcmp(how->dtype, "float32") == 0, judge, step, out);
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

#ifdef TM_FAMILIES_CUDA_ONLY
static const bool g_cuda_only = true;
#else
static const bool g_cuda_only = false;
#endif

/* Leaves the GPU out, with the reason, where there is none. */
static void choose_modes(void)
{
    const char *only = getenv("TM_FAMILIES_CUDA");
    const tm_backend *b = tm_backend_find("cuda");
    const tm_device_opts none = {0};
    tm_device *dev = NULL;
    tm_err err = TM_ERR_INIT;
    g_end_mode = MODES;
    if (b && b->dev->open(&dev, &none, &err) == TM_OK) {
        b->dev->close(dev);
        g_first_mode = g_cuda_only || (only && strcmp(only, "only") == 0) ? CPU_MODES : 0;
        return;
    }
    printf("CUDA: skipped: %s\n", b ? err.msg : "not in this build");
    g_end_mode = CPU_MODES;
}

/* Those of two ranks come from a job of its own, a line for each family and mode. */
static result g_two[FAMILIES_MAX][CPU_MODES];
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
static int rank_main(const char *seed, const char *out_path)
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
        for (int k = 0; k < CPU_MODES; k++) {
            char dir[1024];
            result r = {0};
            family_dir(dir, sizeof(dir), g_names[i]);
            if (!evaluate(comm, dir, &modes[k], "auto", &r))
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
    int lines = 0;
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
        assert_in_range(k, 0, CPU_MODES - 1);
        g_two[i][k] = r;
        lines++;
    }
    fclose(f);
    assert_int_equal(lines, g_name_count * CPU_MODES);
    g_have_two = true;
}

static void run_two(void)
{
    char exe[512], cmd[2000], out[] = "/tmp/tm-families-test-XXXXXX";
    ssize_t len = readlink("/proc/self/exe", exe, sizeof(exe) - 1);
    assert_true(len > 0);
    exe[len] = '\0';
    int fd = mkstemp(out);
    assert_true(fd >= 0);
    close(fd);
    snprintf(cmd, sizeof(cmd),
             "ASAN_OPTIONS=detect_leaks=0 timeout -k 5 300 %s -n 2 --oversubscribe "
             "--allow-run-as-root --bind-to none %s rank %llu %s",
             TM_MPIRUN, exe, (unsigned long long)g_seed, out);
    int rc = system(cmd);
    assert_true(WIFEXITED(rc));
    assert_int_equal(WEXITSTATUS(rc), 0);
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
    for (int k = 0; g_have_two && k < CPU_MODES; k++) {
        const result *r = &g_two[i][k];
        print_result(r, modes[k].gate);
        failures += failures_of(r, modes[k].gate);
        failures += r->refused[0] && !may_refuse(g_names[i], r->refused);
    }
    if (g_have_two && g_two[i][0].refused[0])
        printf(" %s", g_two[i][0].refused);
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
    if (g_first_mode == 0)
        run_two();
#endif
    printf("%-17s", "whole mixed greedy");
    for (int k = g_first_mode; k < g_end_mode; k++)
        printf(" | %-28s", modes[k].title);
    printf("%s\n", g_have_two ? " | float32, 2 ranks             | bfloat16, 2 ranks" : "");
    for (int i = 0; i < g_name_count; i++)
        failures += check_family(comm, i);
    tm_comm_destroy(comm);
    printf("%d checkpoints, %d failures\n", g_name_count, failures);
    assert_int_equal(failures, 0);
}

int main(int argc, char **argv)
{
#ifdef TM_MPIRUN
    if (argc == 4 && strcmp(argv[1], "rank") == 0)
        return rank_main(argv[2], argv[3]);
#endif
    (void)argc;
    (void)argv;
    const char *s = getenv("TM_SEED");
    g_seed = s ? strtoull(s, NULL, 10) : (uint64_t)tm_clock_ns();
    printf("seed %llu (TM_SEED repeats it)\n", (unsigned long long)g_seed);
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_families)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
