/* The model end to end against goldens: the demo model and stories260K; chunked prefill and decode; several
 * ranks against one. The families are families_test's. Run as `model_test rank DIR DTYPE TP OUT` under mpirun it is
 * one rank of the last part. */
#include <math.h>
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
#include "common/json.h"
#include "tests/engine/model_run.h"
#include "tests/harness/rank_job.h"

#define DEMO "models/demo-20m"

#ifdef TM_CUDA_EMU_ONLY /* a slow device: a part of the test for it alone */
enum { CASES_MAX = 2, STEPS_MIN = 40 };
#else
enum { CASES_MAX = 1000, STEPS_MIN = 100 };
#endif

/* Path below TM_SHARED/testdata; NULL, with a message, when the data is not there. */
static const char *shared(const char *name)
{
    static char path[1024];
    const char *root = getenv("TM_SHARED");
    snprintf(path, sizeof(path), "%s/testdata/%s", root ? root : "", name);
    if (root && tm_dir_exists(path))
        return path;
    printf("skipped: %s is not there (set TM_SHARED)\n", name);
    return NULL;
}

static json_t *load_json(const char *dir, const char *name)
{
    char path[1024];
    json_t *root = NULL;
    tm_err err = TM_ERR_INIT;
    assert_true(tm_path_join(path, sizeof(path), dir, name));
    assert_int_equal(tm_json_load_file(path, 64 << 20, &root, &err), TM_OK);
    return root;
}

static int32_t *ids_of(const json_t *array, int extra, int *len)
{
    size_t n = json_array_size(array);
    int32_t *ids = calloc(n + (size_t)extra, sizeof(*ids));
    assert_non_null(ids);
    for (size_t i = 0; i < n; i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(array, i));
    *len = (int)n;
    return ids;
}

/* One golden text: prompt ids, the ids of the continuation and the top 5 after each step. Counts what was
 * compared, so that an empty golden cannot pass. */
typedef struct tally {
    int steps, skipped;
    double worst;
    double margin; /* between the best two, below which the best is not judged */
} tally;

/* f32: every log-probability within 2e-3. bf16: the same best token, unless the best two are close. */
static void compare_step(const float *logits, int vocab, const json_t *top5, bool exact, tally *t)
{
    double lse = run_logsumexp(logits, vocab);
    double first = json_number_value(json_array_get(json_array_get(top5, 0), 1));
    double second = json_number_value(json_array_get(json_array_get(top5, 1), 1));
    t->steps++;
    for (size_t i = 0; i < json_array_size(top5); i++) {
        const json_t *pair = json_array_get(top5, i);
        json_int_t id = json_integer_value(json_array_get(pair, 0));
        double diff = fabs(logits[id] - lse - json_number_value(json_array_get(pair, 1)));
        t->worst = diff > t->worst ? diff : t->worst;
        assert_true(diff < (exact ? 2e-3 : 0.5));
    }
    if (!exact && first - second < t->margin) {
        t->skipped++;
        return;
    }
    if (!exact)
        assert_int_equal(run_argmax(logits, vocab),
                         json_integer_value(json_array_get(json_array_get(top5, 0), 0)));
}

/* Prefill of the prompt in chunks of at most `chunk`, then one decode step per golden id. */
static void check_text(run *r, const json_t *prompt, const json_t *out_ids, const json_t *top5s,
                       int chunk, bool exact, tally *t)
{
    int vocab = tm_model_info_get(r->model)->vocab, len, n = (int)json_array_size(out_ids);
    int32_t *ids = ids_of(prompt, n, &len);
    float *logits = malloc((size_t)vocab * sizeof(float));
    assert_non_null(logits);
    run_seq s = {.ids = ids, .len = len};
    while (s.done < len) {
        int m = TM_MIN(chunk, len - s.done);
        run_item item = {&s, m, s.done + m == len};
        run_step(r, &item, 1, logits);
    }
    for (int i = 0; i < n; i++) {
        compare_step(logits, vocab, json_array_get(top5s, (size_t)i), exact, t);
        ids[len + i] = (int32_t)json_integer_value(json_array_get(out_ids, (size_t)i));
        run_item item = {&s, 1, 1};
        if (i + 1 < n)
            run_step(r, &item, 1, logits);
    }
    free(logits);
    free(ids);
}

static void check_demo_on(run *r, const char *dtype, bool exact)
{
    /* Activations of 16 bits move a logit by some 0.05 by themselves. */
    tally t = {.margin = r->on_device ? 0.1 : 0.02};
    json_t *root = load_json(DEMO "/eval", "golden.json");
    const json_t *cases = json_object_get(root, "cases");
    for (size_t i = 0; i < json_array_size(cases) && i < CASES_MAX; i++) {
        const json_t *c = json_array_get(cases, i), *steps = json_object_get(c, "steps");
        json_t *ids = json_array(), *tops = json_array();
        for (size_t k = 0; k < json_array_size(steps); k++) {
            json_array_append(ids, json_object_get(json_array_get(steps, k), "id"));
            json_array_append(tops, json_object_get(json_array_get(steps, k), "top5"));
        }
        check_text(r, json_object_get(c, "prompt_ids"), ids, tops, i % 2 ? 7 : 512, exact, &t);
        json_decref(ids);
        json_decref(tops);
        r->next_block = 0;
    }
    printf("demo-20m %s: %d steps, %d not judged, worst log-probability off by %.2g\n", dtype,
           t.steps, t.skipped, t.worst);
    assert_true(t.steps > STEPS_MIN && t.skipped < t.steps / 10);
    run_close(r);
    json_decref(root);
}

static void check_demo(const char *dtype, bool exact)
{
    run r;
    run_open(&r, DEMO, dtype, 64, 1);
    check_demo_on(&r, dtype, exact);
}

/* On the GPU a step of one sequence is a recorded one from the third on. */
static void test_demo_cuda(void **state)
{
    (void)state;
    static const char *const dtypes[] = {"bfloat16", "float16"};
    for (size_t i = 0; i < TM_ARRAY_LEN(dtypes); i++) {
        run r;
        if (!run_open_on(&r, "cuda", DEMO, dtypes[i], 64))
            return;
        check_demo_on(&r, dtypes[i], false);
    }
}

static void test_demo_f32(void **state)
{
    (void)state;
    check_demo("float32", true);
}

static void test_demo_bf16(void **state)
{
    (void)state;
    check_demo("auto", false);
}

static void test_demo_info(void **state)
{
    (void)state;
    run r;
    run_open(&r, DEMO, "auto", 64, 1);
    const tm_model_info *i = tm_model_info_get(r.model);
    assert_string_equal(i->name, "demo-20m");
    assert_string_equal(i->family, "llama");
    assert_string_equal(i->dtype, "bfloat16");
    assert_int_equal(i->parameters, 19928576);
    assert_int_equal(i->stop_count, 1);
    assert_int_equal(i->stop_ids[0], 2);
    assert_int_equal(i->max_positions, 2048);
    assert_int_equal(i->kv_block_bytes, 2 * 5 * 4 * 64 * 64 * 2);
    assert_int_equal(strlen(i->digest), 64);
    /* all matrices in bf16, 11 norms of 512 in f32; the embedding is the head */
    assert_int_equal(i->weight_bytes, (19928576 - 11 * 512) * 2 + 11 * 512 * 4);
    assert_int_equal(i->step_read_bytes, (19928576 - 11 * 512) * 2);
    size_t left = 0;
    assert_int_equal(tm_model_mem_free(r.model, &left, NULL), TM_OK);
    assert_true(left > 0);
    assert_int_equal(tm_model_kv_alloc(r.model, 4, NULL), TM_STATUS_INTERNAL);
    run_close(&r);
}

static void test_stories(void **state)
{
    (void)state;
    const char *dir = shared("stories260K");
    if (!dir)
        return;
    run r;
    tally t = {0};
    json_t *root = load_json(dir, "golden.json");
    const json_t *cases = json_object_get(root, "cases");
    if (!cases)
        cases = json_object_get(root, "prompts");
    run_open(&r, dir, "float32", 16, 1);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *c = json_array_get(cases, i);
        check_text(&r, json_object_get(c, "prompt_ids"), json_object_get(c, "output_ids"),
                   json_object_get(c, "top5"), 5, true, &t);
        r.next_block = 0;
    }
    printf("stories260K: %d steps, worst %.2g\n", t.steps, t.worst);
    assert_true(t.steps > 100);
    assert_int_equal(tm_model_info_get(r.model)->stop_count, 2);
    run_close(&r);
    json_decref(root);
}

/* ---- several ranks ---- */

#ifdef TM_CUDA_EMU_ONLY
/* More weights than the device has: refused with numbers before anything is taken. */
static void test_no_room_cuda(void **state)
{
    (void)state;
    tm_comm *comm = NULL;
    tm_model *m = NULL;
    tm_err err = TM_ERR_INIT;
    assert_int_equal(tm_comm_create(&comm, 1, NULL, &err), TM_OK);
    const tm_model_opts o = {.shape = "llama3-70b",
                             .backend = "cuda",
                             .block_tokens = 64,
                             .max_step_tokens = 64,
                             .max_seqs = 1};
    assert_int_equal(tm_model_open(&m, &o, comm, &err), TM_STATUS_NO_MEMORY);
    assert_non_null(strstr(err.msg, "the weights of rank 0 take 141.11 GB, but"));
    assert_null(m);
    tm_comm_destroy(comm);
}
#endif

#ifdef TM_MPIRUN
/* The same ragged steps on every rank; rank 0 writes the logits. */
static int rank_main(const char *dir, const char *dtype, int tp, const char *out_path)
{
    static const int lens[] = {40, 9, 23};
    int32_t ids[3][40];
    run_seq seq[3] = {{0}};
    run r;
    run_open(&r, dir, dtype, 16, tp);
    int vocab = tm_model_info_get(r.model)->vocab;
    for (int i = 0; i < 3; i++) {
        for (int k = 0; k < 40; k++)
            ids[i][k] = (i * 911 + k * 37 + 5) % vocab;
        seq[i] = (run_seq){.ids = ids[i], .len = lens[i]};
    }
    float *logits = malloc(3 * 8 * (size_t)vocab * sizeof(float));
    FILE *f = tm_comm_rank(r.comm) == 0 ? fopen(out_path, "wb") : NULL;
    if (!logits || (tm_comm_rank(r.comm) == 0 && !f))
        return 9;
    run_item prefill[] = {{&seq[0], 30, 2}, {&seq[1], 4, 0}, {&seq[2], 18, 1}};
    run_step(&r, prefill, 3, logits);
    if (f)
        fwrite(logits, sizeof(float), 3 * (size_t)vocab, f);
    for (int k = 0; k < 5; k++) {
        run_item items[] = {{&seq[0], 1, 1}, {&seq[1], 1, 1}, {&seq[2], 1, 1}};
        run_step(&r, items, 3, logits);
        if (f)
            fwrite(logits, sizeof(float), 3 * (size_t)vocab, f);
    }
    free(logits);
    if (f && fclose(f) != 0)
        return 9;
    run_close(&r);
    return 0;
}

static float *ranks_logits(const char *dir, const char *dtype, int tp, size_t *n)
{
    char out[] = "/tmp/tm-model-test-XXXXXX";
    int fd = mkstemp(out);
    assert_true(fd >= 0);
    close(fd);
    assert_int_equal(rank_job(TM_MPIRUN, NULL, tp, 120, "rank %s %s %d %s", dir, dtype, tp, out),
                     0);
    char *data = NULL;
    size_t bytes = 0;
    assert_int_equal(tm_file_read(out, 64 << 20, &data, &bytes, NULL), TM_OK);
    unlink(out);
    *n = bytes / sizeof(float);
    return (float *)(void *)data;
}

static void check_ranks(const char *dir, const char *dtype, int tp, double gate)
{
    size_t n1 = 0, n = 0;
    float *one = ranks_logits(dir, dtype, 1, &n1), *many = ranks_logits(dir, dtype, tp, &n);
    assert_true(n1 > 0 && n == n1);
    double e = run_nmse(many, one, n);
    printf("%s %s: tp %d against 1: NMSE %.2g\n", strrchr(dir, '/') + 1, dtype, tp, e);
    assert_true(e < gate);
    free(one);
    free(many);
}

static void test_ranks_demo(void **state)
{
    (void)state;
    check_ranks(DEMO, "float32", 2, 1e-9);
    check_ranks(DEMO, "float32", 4, 1e-9);
    check_ranks(DEMO, "bfloat16", 2, 1e-3);
}

/* Four ranks: key heads replicated, tied head, grouped queries, unequal heads. Two: families_test. */
static void test_ranks_four(void **state)
{
    (void)state;
    static const char *const names[] = {"families/llama3.1-rope", "families/internlm2",
                                        "families/glm4-hf", "stories260K"};
    for (size_t i = 0; i < TM_ARRAY_LEN(names); i++) {
        const char *dir = shared(names[i]);
        if (dir)
            check_ranks(dir, "float32", 4, 1e-9);
    }
}
#endif

int main(int argc, char **argv)
{
#ifdef TM_MPIRUN
    if (argc == 6 && strcmp(argv[1], "rank") == 0)
        return rank_main(argv[2], argv[3], (int)strtol(argv[4], NULL, 10), argv[5]);
#endif
    (void)argc;
    (void)argv;
#ifdef TM_CUDA_EMU_ONLY
    cmocka_set_test_filter("test_*_cuda");
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_demo_info),    cmocka_unit_test(test_demo_f32),
        cmocka_unit_test(test_demo_bf16),    cmocka_unit_test(test_demo_cuda),
        cmocka_unit_test(test_stories),
#ifdef TM_CUDA_EMU_ONLY
        cmocka_unit_test(test_no_room_cuda),
#endif
#ifdef TM_MPIRUN
        cmocka_unit_test(test_ranks_demo),   cmocka_unit_test(test_ranks_four),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
