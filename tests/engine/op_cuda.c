/* Helpers of the CUDA operator tests: see op_cuda.h. */
#include "tests/engine/op_cuda.h"

#include "common/check.h"

const tm_backend *gpu;
tm_device *gpu_dev, *gpu_ref;
tm_dtype gpu_dtype;

bool gpu_slow(void)
{
    return strstr(gpu->dev->describe(gpu_dev), "emulated") || getenv("TM_FEW");
}

bool gpu_takes(int of)
{
    return !gpu_slow() || getenv("TM_EMU_ALL") || op_pick(1, of) == 1;
}

int gpu_count(int all, int emulated)
{
    const char *few = getenv("TM_FEW");
    long by = few ? strtol(few, NULL, 10) : 1;
    if (few)
        return (int)TM_MAX(all / TM_MAX(by, 1L), 1L);
    return gpu_slow() ? emulated : all;
}

double gpu_bound(void)
{
    double relative = gpu_dtype == TM_DTYPE_F16 ? 2e-3 : 1e-2;
    return relative * relative;
}

void *gpu_take(size_t bytes)
{
    char *poison = malloc(bytes);
    TM_ASSERT(poison);
    memset(poison, 0xff, bytes);
    void *p = gpu_put(poison, bytes);
    free(poison);
    return p;
}

void *gpu_put(const void *host, size_t bytes)
{
    void *p = NULL;
    assert_int_equal(gpu->dev->alloc(gpu_dev, bytes, &p, NULL), TM_OK);
    assert_int_equal(gpu->dev->upload(gpu_dev, p, host, bytes), TM_OK);
    return p;
}

void gpu_free(void *p)
{
    gpu->dev->free(gpu_dev, p);
}

void gpu_get_f32(float *out, const void *p, size_t n)
{
    assert_int_equal(gpu->dev->download(gpu_dev, out, p, n * sizeof *out), TM_OK);
}

void gpu_get(float *out, const void *p, size_t n)
{
    uint16_t *h = malloc(n * sizeof *h);
    TM_ASSERT(h);
    assert_int_equal(gpu->dev->download(gpu_dev, h, p, n * sizeof *h), TM_OK);
    for (size_t i = 0; i < n; i++)
        out[i] = tm_load_f32(h, i, gpu_dtype);
    free(h);
}

float *gpu_widen(const void *x, tm_dtype t, size_t n)
{
    float *f = malloc(n * sizeof *f);
    TM_ASSERT(f);
    for (size_t i = 0; i < n; i++)
        f[i] = tm_load_f32(x, i, t);
    return f;
}

float gpu_round(float v)
{
    float place; /* wide enough for every dtype */
    tm_store_f32(&place, 0, gpu_dtype, v);
    return tm_load_f32(&place, 0, gpu_dtype);
}

int gpu_run(const struct CMUnitTest *tests, size_t count)
{
    static const tm_dtype dtypes[] = {TM_DTYPE_BF16, TM_DTYPE_F16};
    int failed = 0;
    op_seed();
    if (getenv("TM_TEST")) /* one test, or several by a pattern */
        cmocka_set_test_filter(getenv("TM_TEST"));
    gpu = tm_backend_find("cuda");
    gpu_ref = op_device_open("ref", 1);
    for (size_t i = 0; i < TM_ARRAY_LEN(dtypes); i++) {
        tm_err err = TM_ERR_INIT;
        tm_device_opts o = {.index = 0, .dtype = dtypes[i]};
        gpu_dtype = dtypes[i];
        if (!gpu || gpu->dev->open(&gpu_dev, &o, &err) != TM_OK) {
            printf("skipped: %s\n", gpu ? err.msg : "no CUDA in this build");
            return 0;
        }
        printf("%s, %s\n", gpu->dev->describe(gpu_dev), tm_dtype_name(gpu_dtype));
        failed += _cmocka_run_group_tests("cuda", tests, count, NULL, NULL);
        gpu->dev->close(gpu_dev);
    }
    op_device_close(gpu_ref);
    return failed;
}
