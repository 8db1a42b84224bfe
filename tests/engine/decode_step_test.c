/* A decode step as one kernel against the same step as operators: sequences of several lengths, alone and together,
 * long enough that the keys of one are shared among many blocks; the same graphs replayed. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "common/check.h"
#include "tests/engine/model_run.h"

enum { SEQS = 3, STEPS = 5, VOCAB_MAX = 512 };

static const int g_lens[SEQS] = {400, 17, 130};

typedef struct logits {
    float all[STEPS][SEQS * VOCAB_MAX], alone[STEPS][VOCAB_MAX];
    int vocab;
} logits;

/* False where there is no device. */
static bool run_model(const char *dir, const char *dtype, bool one, logits *out)
{
    int32_t ids[SEQS][512];
    float *row = malloc(SEQS * VOCAB_MAX * sizeof(*row));
    run r;
    run_step_kernel = one;
    bool opened = run_open_on(&r, "cuda", dir, dtype, 64);
    run_step_kernel = false;
    if (!opened) {
        free(row);
        return false;
    }
    out->vocab = tm_model_info_get(r.model)->vocab;
    assert_true(out->vocab <= VOCAB_MAX);
    run_seq seq[SEQS] = {{0}};
    for (int i = 0; i < SEQS; i++) {
        for (int k = 0; k < 512; k++)
            ids[i][k] = (i * 911 + k * k * 7 + k * 37 + 5) % out->vocab;
        seq[i] = (run_seq){.ids = ids[i], .len = g_lens[i] + 2 * STEPS};
    }
    for (int i = 0; i < SEQS; i++) {
        run_item prompt = {&seq[i], g_lens[i], 1};
        run_step(&r, &prompt, 1, row);
    }
    for (int k = 0; k < STEPS; k++) {
        run_item together[SEQS] = {{&seq[0], 1, 1}, {&seq[1], 1, 1}, {&seq[2], 1, 1}};
        run_step(&r, together, SEQS, out->all[k]);
        run_step(&r, &together[0], 1, out->alone[k]);
    }
    run_close(&r);
    free(row);
    return true;
}

static void compare(const char *dir, const char *dtype)
{
    logits *ops = calloc(1, sizeof(*ops)), *one = calloc(1, sizeof(*one));
    assert_non_null(ops);
    assert_non_null(one);
    double worst = 0;
    if (run_model(dir, dtype, false, ops) && run_model(dir, dtype, true, one)) {
        for (int k = 0; k < STEPS; k++) {
            double a = run_nmse(one->all[k], ops->all[k], (size_t)(SEQS * ops->vocab));
            double b = run_nmse(one->alone[k], ops->alone[k], (size_t)ops->vocab);
            worst = TM_MAX(worst, TM_MAX(a, b));
        }
        printf("%s, %s: worst NMSE %.2g\n", dir, dtype, worst);
        assert_true(worst < 1e-4);
    }
    free(ops);
    free(one);
}

static void test_decode_step(void **state)
{
    static const char *const dirs[] = {"llama3-d128", "qwen2-d128", "qwen2-d64"};
    const char *shared = getenv("TM_SHARED");
    char dir[512];
    struct stat st;
    (void)state;
    for (size_t i = 0; i < TM_ARRAY_LEN(dirs); i++) {
        snprintf(dir, sizeof(dir), "%s/testdata/families/%s", shared ? shared : "", dirs[i]);
        if (stat(dir, &st) != 0) {
            printf("%s is not there\n", dir);
            skip();
        }
        compare(dir, "bfloat16");
        compare(dir, "float16");
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_decode_step)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
