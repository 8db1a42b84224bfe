/* The loading pipeline on a device that copies as late as it may: buffers that are filled again too early, jobs out of
 * order, failures in the middle, and what is left behind then. */
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
#include "engine/model/load_progress.h"
#include "engine/model/loader.h"
#include "tests/engine/rng.h"

enum { ROWS = 300, COLS = 64, TENSORS = 6, BUFFER = 16 << 10, PENDING_MAX = 64 };

static char g_dir[64];
static rng g_rng;

/* ---- a device ---- */

typedef struct pending {
    void *dst;
    const void *src;
    size_t bytes;
} pending;

struct tm_device {
    pending queue[PENDING_MAX];
    size_t queued, ran;
    int hosts, events;          /* given out and not given back */
    int uploads;                /* so far */
    int fail_upload, fail_host; /* the n-th of them fails, from 1 */
    int host_calls;
};

struct tm_dev_event {
    size_t until;
};

static tm_device g_dev;

static void run_until(tm_device *d, size_t until)
{
    for (; d->ran < until; d->ran++) {
        const pending *p = &d->queue[d->ran % PENDING_MAX];
        memcpy(p->dst, p->src, p->bytes);
    }
}

static tm_status fake_upload(tm_device *d, void *dst, const void *src, size_t bytes)
{
    assert_true(d->queued - d->ran < PENDING_MAX);
    if (++d->uploads == d->fail_upload)
        return TM_STATUS_INTERNAL;
    d->queue[d->queued++ % PENDING_MAX] = (pending){dst, src, bytes};
    return TM_OK;
}

static tm_status fake_upload_now(tm_device *d, void *dst, const void *src, size_t bytes)
{
    (void)d;
    memcpy(dst, src, bytes);
    return TM_OK;
}

static tm_status fake_alloc_host(tm_device *d, size_t bytes, void **out, tm_err *err)
{
    if (++d->host_calls == d->fail_host)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no pinned memory");
    *out = malloc(bytes);
    assert_non_null(*out);
    d->hosts++;
    return TM_OK;
}

/* What a copy would still read may not be given back. */
static void fake_free_host(tm_device *d, void *p)
{
    for (size_t i = d->ran; i < d->queued; i++)
        assert_true(d->queue[i % PENDING_MAX].src != p);
    free(p);
    d->hosts--;
}

static tm_status fake_event_create(tm_device *d, tm_dev_event **out, tm_err *err)
{
    (void)err;
    *out = calloc(1, sizeof(**out));
    assert_non_null(*out);
    d->events++;
    return TM_OK;
}

static tm_status fake_event_record(tm_device *d, tm_dev_event *e)
{
    e->until = d->queued;
    return TM_OK;
}

static tm_status fake_event_wait(tm_device *d, tm_dev_event *e)
{
    run_until(d, e->until);
    return TM_OK;
}

static void fake_event_free(tm_device *d, tm_dev_event *e)
{
    free(e);
    d->events--;
}

static const tm_device_ops g_async_ops = {
    .upload = fake_upload,
    .alloc_host = fake_alloc_host,
    .free_host = fake_free_host,
    .event_create = fake_event_create,
    .event_record = fake_event_record,
    .event_wait = fake_event_wait,
    .event_free = fake_event_free,
};
static const tm_device_ops g_plain_ops = {.upload = fake_upload_now};
static const tm_backend g_async = {.name = "async", .dev = &g_async_ops};
static const tm_backend g_plain = {.name = "plain", .dev = &g_plain_ops};

/* ---- a checkpoint ---- */

static float value_of(int tensor, size_t row, size_t col)
{
    return (float)((int)(((size_t)tensor * 7919 + row * 131 + col * 17) % 509) - 254) / 64.0f;
}

static void path_of(char *out, size_t size)
{
    snprintf(out, size, "%s/model.safetensors", g_dir);
}

/* Tensors t0.. [ROWS, COLS]; the even ones f32, the odd ones bf16 (all values fit). */
static tm_checkpoint *make_checkpoint(void)
{
    char header[4096], path[128];
    size_t at = 1, offset = 0;
    header[0] = '{';
    for (int i = 0; i < TENSORS; i++) {
        size_t bytes = (size_t)ROWS * COLS * (i % 2 ? 2 : 4);
        at += (size_t)snprintf(
            header + at, sizeof(header) - at,
            "%s\"t%d\":{\"dtype\":\"%s\",\"shape\":[%d,%d],\"data_offsets\":[%zu,%zu]}",
            i ? "," : "", i, i % 2 ? "BF16" : "F32", ROWS, COLS, offset, offset + bytes);
        offset += bytes;
    }
    header[at++] = '}';
    path_of(path, sizeof(path));
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    uint64_t n = at;
    fwrite(&n, sizeof(n), 1, f);
    fwrite(header, 1, at, f);
    for (int i = 0; i < TENSORS; i++)
        for (size_t r = 0; r < ROWS; r++)
            for (size_t c = 0; c < COLS; c++) {
                float v = value_of(i, r, c);
                uint32_t bits;
                memcpy(&bits, &v, sizeof(bits));
                uint16_t high = (uint16_t)(bits >> 16);
                if (i % 2)
                    fwrite(&high, sizeof(high), 1, f);
                else
                    fwrite(&v, sizeof(v), 1, f);
            }
    assert_int_equal(fclose(f), 0);
    tm_checkpoint *c = NULL;
    tm_err err = TM_ERR_INIT;
    assert_int_equal(tm_checkpoint_open(&c, g_dir, &err), TM_OK);
    return c;
}

/* ---- runs ---- */

typedef struct world {
    tm_checkpoint *c;
    tm_loader *loader;
    float *memory; /* [TENSORS, ROWS, COLS], turned tensors [COLS, ROWS] */
} world;

static void begin(world *w, const tm_backend *b, bool host, int readers)
{
    tm_err err = TM_ERR_INIT;
    g_dev = (tm_device){.fail_upload = g_dev.fail_upload, .fail_host = g_dev.fail_host};
    w->c = make_checkpoint();
    w->memory = calloc((size_t)TENSORS * ROWS * COLS, sizeof(float));
    assert_non_null(w->memory);
    const tm_loader_opts o = {.backend = b,
                              .dev = &g_dev,
                              .host_memory = host,
                              .checkpoint = w->c,
                              .buffer_bytes = BUFFER,
                              .readers = readers};
    assert_int_equal(tm_loader_create(&w->loader, &o, &err), TM_OK);
}

/* Whatever happened, nothing is left. */
static void end(world *w)
{
    tm_loader_destroy(w->loader);
    assert_int_equal(g_dev.hosts, 0);
    assert_int_equal(g_dev.events, 0);
    tm_checkpoint_close(w->c);
    free(w->memory);
    char path[128];
    path_of(path, sizeof(path));
    unlink(path);
    g_dev = (tm_device){0};
}

static bool is_turned(int tensor)
{
    return tensor % 3 == 2;
}

/* A tensor in jobs of random heights; turned ones in jobs of some columns. */
static tm_status add_tensor(world *w, int i, tm_err *err)
{
    char name[16];
    snprintf(name, sizeof(name), "t%d", i);
    tm_load_job j = {.tensor = tm_checkpoint_find(w->c, name),
                     .cols_all = COLS,
                     .turned = is_turned(i),
                     .dtype = TM_DTYPE_F32};
    float *base = w->memory + (size_t)i * ROWS * COLS;
    size_t step, all = is_turned(i) ? COLS : ROWS, line = is_turned(i) ? ROWS : COLS;
    for (size_t at = 0; at < all; at += step) {
        step = (size_t)rng_between(&g_rng, 1, (int)(BUFFER / 4 / line));
        step = TM_MIN(step, all - at);
        j.slice = is_turned(i) ? (tm_slice){0, ROWS, at, step} : (tm_slice){at, step, 0, COLS};
        j.dst = (char *)(base + at * line);
        j.bytes = step * line * sizeof(float);
        TM_TRY(tm_loader_add(w->loader, &j, err));
    }
    return TM_OK;
}

static tm_status load_all(world *w, tm_err *err)
{
    for (int i = 0; i < TENSORS; i++)
        TM_TRY(add_tensor(w, i, err));
    return tm_loader_finish(w->loader, err);
}

static void check_all(const world *w)
{
    for (int i = 0; i < TENSORS; i++)
        for (size_t r = 0; r < ROWS; r++)
            for (size_t c = 0; c < COLS; c++) {
                size_t at = is_turned(i) ? c * ROWS + r : r * COLS + c;
                assert_true(w->memory[(size_t)i * ROWS * COLS + at] == value_of(i, r, c));
            }
}

static void test_copies(void **state)
{
    (void)state;
    static const int readers[] = {1, 3, 8};
    for (size_t i = 0; i < TM_ARRAY_LEN(readers); i++)
        for (int kind = 0; kind < 3; kind++) {
            world w = {0};
            tm_err err = TM_ERR_INIT;
            begin(&w, kind == 0 ? &g_async : &g_plain, kind == 2, readers[i]);
            assert_int_equal(load_all(&w, &err), TM_OK);
            check_all(&w);
            assert_true(kind != 0 || g_dev.ran == g_dev.queued);
            end(&w);
        }
}

/* Zeros, and rows of length one in the end. */
static void test_kinds(void **state)
{
    (void)state;
    world w = {0};
    tm_err err = TM_ERR_INIT;
    begin(&w, &g_async, false, 2);
    float *row = w.memory;
    for (int i = 0; i < 100; i++)
        row[i] = 5;
    tm_load_job zero = {.dst = (char *)(row + 10), .bytes = 50 * sizeof(float)};
    tm_load_job unit = {.tensor = tm_checkpoint_find(w.c, "t1"),
                        .cols_all = COLS,
                        .slice = {7, 2, 0, COLS},
                        .unit_rows = true,
                        .dtype = TM_DTYPE_F32,
                        .dst = (char *)(row + 200),
                        .bytes = 2 * COLS * sizeof(float)};
    assert_int_equal(tm_loader_add(w.loader, &zero, &err), TM_OK);
    assert_int_equal(tm_loader_add(w.loader, &unit, &err), TM_OK);
    assert_int_equal(tm_loader_finish(w.loader, &err), TM_OK);
    for (int i = 0; i < 100; i++)
        assert_true(row[i] == (i >= 10 && i < 60 ? 0.0f : 5.0f));
    for (size_t r = 0; r < 2; r++) {
        float want[COLS];
        for (size_t c = 0; c < COLS; c++)
            want[c] = value_of(1, 7 + r, c);
        tm_load_unit_row(want, COLS);
        assert_memory_equal(row + 200 + r * COLS, want, sizeof(want));
    }
    end(&w);
}

/* The file is cut while it is loaded: the first tensor that is not whole is told, and nothing hangs. */
static void test_truncated(void **state)
{
    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        world w = {0};
        tm_err err = TM_ERR_INIT;
        char path[128];
        begin(&w, kind == 0 ? &g_async : &g_plain, kind == 2, 4);
        path_of(path, sizeof(path));
        const tm_st_tensor *t = tm_checkpoint_find(w.c, "t3");
        assert_int_equal(truncate(path, (off_t)(t->offset + t->bytes / 2)), 0);
        assert_int_equal(load_all(&w, &err), TM_STATUS_DATA);
        assert_string_equal(err.msg,
                            "model.safetensors: the file shrank or vanished while it was read");
        tm_err again = TM_ERR_INIT;
        assert_int_equal(tm_loader_finish(w.loader, &again), TM_STATUS_DATA);
        assert_string_equal(again.msg, err.msg);
        for (size_t i = 0; i < (size_t)ROWS * COLS; i++) /* what came before is there */
            assert_true(w.memory[i] == value_of(0, i / COLS, i % COLS));
        end(&w);
    }
}

/* Failures of the device: in the n-th copy, or when pinned memory ends. */
static void test_device_fails(void **state)
{
    (void)state;
    for (int n = 1; n < 40; n += 6) {
        world w = {0};
        tm_err err = TM_ERR_INIT;
        g_dev.fail_upload = n;
        begin(&w, &g_async, false, 3);
        assert_int_equal(load_all(&w, &err), TM_STATUS_IO);
        assert_non_null(strstr(err.msg, "the copy to the device failed"));
        end(&w);
    }
    for (int n = 1; n < 16; n += 5) {
        world w = {0};
        tm_err err = TM_ERR_INIT;
        g_dev.fail_host = n;
        begin(&w, &g_async, false, 3);
        assert_int_equal(load_all(&w, &err), TM_STATUS_NO_MEMORY);
        assert_string_equal(err.msg, "no pinned memory");
        end(&w);
    }
}

/* Given up with jobs everywhere in the pipeline. */
static void test_abandoned(void **state)
{
    (void)state;
    for (int n = 0; n < TENSORS; n++) {
        world w = {0};
        tm_err err = TM_ERR_INIT;
        begin(&w, &g_async, false, 8);
        for (int i = 0; i < n; i++)
            assert_int_equal(add_tensor(&w, i, &err), TM_OK);
        end(&w);
    }
}

static void test_rate(void **state)
{
    (void)state;
    char text[80];
    tm_load_rate_text(text, sizeof(text), (size_t)16060000000, 1.2);
    assert_string_equal(text, "16.06 GB in 1.20 s (13.4 GB/s)");
    tm_load_rate_text(text, sizeof(text), 0, 0);
    assert_string_equal(text, "0.00 GB in 0.00 s (0.0 GB/s)");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_copies),    cmocka_unit_test(test_kinds),
        cmocka_unit_test(test_truncated), cmocka_unit_test(test_device_fails),
        cmocka_unit_test(test_abandoned), cmocka_unit_test(test_rate),
    };
    g_rng.state = rng_seed("loader_test", 17);
    snprintf(g_dir, sizeof(g_dir), "/tmp/tm-loader-XXXXXX");
    if (!mkdtemp(g_dir))
        return 1;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    rmdir(g_dir);
    return failed;
}
