/* Helpers of the operator tests: see op_test.h. */
#include "tests/engine/op_test.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <math.h>

#include <cmocka.h>

#include "common/check.h"
#include "common/clock.h"
#include "engine/backend/cpu/convert.h"

const char *const op_fast_isas[] = {"avx2", "avx512", "amx"};
const int op_fast_isa_count = (int)TM_ARRAY_LEN(op_fast_isas);

enum { GUARD = 64 };
static const uint32_t g_pattern = 0x7fc0beefu; /* a NaN with a payload of our own */
static uint64_t g_state;

void op_seed(void)
{
    const char *s = getenv("TM_SEED");
    uint64_t seed = s ? strtoull(s, NULL, 10) : (uint64_t)tm_clock_ns();
    g_state = seed;
    printf("seed: TM_SEED=%llu repeats this run\n", (unsigned long long)seed);
}

/* splitmix64, upper half. */
uint32_t op_random(void)
{
    uint64_t z = (g_state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}

float op_uniform(float lo, float hi)
{
    return lo + (hi - lo) * (float)(op_random() >> 8) * 0x1p-24f;
}

int op_pick(int lo, int hi)
{
    return lo + (int)(op_random() % (uint32_t)(hi - lo + 1));
}

tm_device *op_device_open(const char *isa, int threads)
{
    tm_device *dev = NULL;
    tm_err err = TM_ERR_INIT;
    tm_device_opts o = {.threads = threads, .isa = isa};
    if (tm_backend_find("cpu")->dev->open(&dev, &o, &err) != TM_OK) {
        printf("skipped: %s\n", err.msg);
        return NULL;
    }
    return dev;
}

void op_device_close(tm_device *dev)
{
    tm_backend_find("cpu")->dev->close(dev);
}

void *op_random_array(size_t n, tm_dtype t, float lo, float hi)
{
    size_t bytes = (n * tm_dtype_size(t) + 127) / 64 * 64;
    void *p = aligned_alloc(64, bytes);
    TM_ASSERT(p);
    for (size_t i = 0; i < n; i++)
        tm_store_f32(p, i, t, op_uniform(lo, hi));
    return p;
}

float *op_guarded(size_t n)
{
    float *p = malloc((n + 2 * GUARD) * sizeof *p);
    TM_ASSERT(p);
    for (size_t i = 0; i < n + 2 * GUARD; i++)
        memcpy(&p[i], &g_pattern, sizeof *p);
    return p + GUARD;
}

bool op_untouched(float v)
{
    return memcmp(&v, &g_pattern, sizeof v) == 0;
}

void op_guarded_check(const float *p, size_t n, const char *what)
{
    for (size_t i = 0; i < GUARD; i++)
        if (!op_untouched(p[-1 - (ptrdiff_t)i]) || !op_untouched(p[n + i]))
            fail_msg("%s: wrote outside its output", what);
}

void op_guarded_free(float *p)
{
    free(p - GUARD);
}

double op_nmse_double(const float *got, const double *want, size_t n)
{
    double err = 0, all = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)got[i] - want[i];
        if (!isfinite(d))
            return INFINITY;
        err += d * d;
        all += want[i] * want[i];
    }
    return all > 0 ? err / all : err;
}

double op_nmse(const float *got, const float *want, size_t n)
{
    double err = 0, all = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)got[i] - (double)want[i];
        if (!isfinite(d))
            return INFINITY;
        err += d * d;
        all += (double)want[i] * (double)want[i];
    }
    return all > 0 ? err / all : err;
}

void op_check(double error, double bound, const char *fmt, ...)
{
    if (error <= bound)
        return;
    char what[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(what, sizeof what, fmt, ap);
    va_end(ap);
    fail_msg("%s: NMSE %.3g, bound %.3g", what, error, bound);
}
