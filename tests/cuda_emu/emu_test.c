/* The emulator itself: what it computes against plain C, and that it sees the mistakes it promises to see. */
#include <math.h>
#include <setjmp.h>
#include <signal.h>
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
#include "engine/backend/cpu/convert.h"
#include "tests/cuda_emu/emu.h"
#include "tests/cuda_emu/emu_kernels.h"
#include "tests/engine/op_test.h"

static tm_cuda_ctx g_ctx = {
    .act = TM_DTYPE_BF16, .sms = EMU_SMS, .dependent_launch = true};

static void ok(cudaError_t e)
{
    if (e != cudaSuccess)
        fail_msg("%s", cudaGetErrorName(e));
}

static void *take(size_t bytes)
{
    void *p = NULL;
    ok(cudaMalloc(&p, bytes));
    return p;
}

static void *put(const void *from, size_t bytes)
{
    void *p = take(bytes);
    ok(cudaMemcpy(p, from, bytes, cudaMemcpyHostToDevice));
    return p;
}

static void get(void *to, const void *from, size_t bytes)
{
    ok(cudaStreamSynchronize(g_ctx.stream));
    ok(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}

/* The kernel under way, with this in its message. */
static void must_fail(int mode, const char *says)
{
    assert_int_equal(cudaStreamSynchronize(g_ctx.stream), cudaErrorLaunchFailure);
    if (!strstr(emu_failure(), says))
        fail_msg("mode %d: not '%s' in '%s'", mode, says, emu_failure());
    ok(cudaDeviceReset());
}

/* ---- mistakes ---- */

static void mistakes_test(void **state)
{
    (void)state;
    int *out = take(64 * sizeof(int)), got[64];
    for (int m = 0; m < EMU_MISTAKES; m++) {
        ok(emu_mistake_launch(out, (emu_mistake)m, &g_ctx));
        const cudaError_t e = cudaStreamSynchronize(g_ctx.stream);
        if (m == EMU_NO_MISTAKE) {
            get(got, out, sizeof(got));
            for (int i = 0; i < 64; i++)
                assert_int_equal(got[i], i ^ 1);
            continue;
        }
        assert_int_equal(e, cudaErrorLaunchFailure);
        assert_non_null(strstr(emu_failure(), "mistake_kernel"));
        if (!strstr(emu_failure(), emu_mistake_says[m]))
            fail_msg("mistake %d: not '%s' in '%s'", m, emu_mistake_says[m], emu_failure());
        /* It stays, whatever is called, until the device is reset. */
        assert_int_equal(emu_poke_launch(out, 0, 1, &g_ctx), cudaErrorLaunchFailure);
        assert_int_equal(cudaStreamSynchronize(g_ctx.stream), cudaErrorLaunchFailure);
        ok(cudaDeviceReset());
    }
    ok(cudaFree(out));
}

/* Runs in a child process, which must end with a signal (or the sanitizer's exit code) and say why. */
static void must_die(int *p, int i, const char *says)
{
    int ends[2], status = 0;
    char text[16384];
    size_t len = 0;
    assert_int_equal(pipe(ends), 0);
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        signal(SIGSEGV, SIG_DFL);
        dup2(ends[1], STDERR_FILENO);
        emu_poke_launch(p, i, 1, &g_ctx);
        cudaStreamSynchronize(g_ctx.stream);
        cudaFree(p); /* looks at the bytes behind it */
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t n;
         len < sizeof(text) - 1 && (n = read(ends[0], text + len, sizeof(text) - 1 - len)) > 0;)
        len += (size_t)n;
    text[len] = '\0';
    close(ends[0]);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_false(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    if (!strstr(text, says) && !strstr(text, "use-after-poison") &&
        !strstr(text, "AddressSanitizer"))
        fail_msg("not '%s' in '%s'", says, text);
}

static void bounds_test(void **state)
{
    (void)state;
    int *p = take(1000);
    must_die(p, 250, "somebody wrote 0 bytes behind an allocation of 1000 bytes");
    must_die(p, 256, "behind an allocation of 1000 bytes");
    must_die(p, 2000, "poke_kernel");
    ok(cudaFree(p));
    assert_int_equal(cudaFree(p), cudaErrorInvalidDevicePointer);
    char host[8];
    p = take(8);
    assert_int_equal(cudaMemcpy(host, p, 9, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
    assert_int_equal(cudaMemcpy(host, host, 8, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
    (void)cudaGetLastError();
    ok(cudaFree(p));
}

/* Without a sanitizer of its own the build looks for races. */
static void race_test(void **state)
{
    (void)state;
    int *out = take(128 * sizeof(int)), got[64];
    ok(emu_race_launch(out, 128, true, &g_ctx));
    ok(emu_race_launch(out, 64, true, &g_ctx)); /* what the larger block left behind is no race */
    get(got, out, sizeof(got));
    for (int i = 0; i < 64; i++)
        assert_int_equal(got[i], 63 - i);
    ok(emu_race_launch(out, 64, false, &g_ctx));
    const cudaError_t e = cudaStreamSynchronize(g_ctx.stream);
#ifdef TM_CUDA_EMU_RACES
    assert_int_equal(e, cudaErrorLaunchFailure);
    assert_non_null(strstr(emu_failure(), "with no barrier between"));
#else
    ok(e);
#endif
    ok(cudaDeviceReset());
    ok(cudaFree(out));
}

/* What nobody wrote is no number, and shared memory has its limits. */
static void shared_test(void **state)
{
    (void)state;
    uint32_t *out = take(8), got[2];
    get(got, out, sizeof(got));
    assert_int_equal(got[0], UINT32_MAX);
    for (int round = 0; round < 2; round++) {
        ok(emu_shared_launch(out, (size_t)100 << 10, &g_ctx));
        get(got, out, sizeof(got));
        assert_int_equal(got[0], UINT32_MAX);
        assert_int_equal(got[1], UINT32_MAX);
    }
    assert_int_equal(emu_shared_launch(out, EMU_SMEM_MAX + 1, &g_ctx), cudaErrorInvalidValue);
    ok(emu_shared_launch(out, EMU_SMEM_MAX, &g_ctx)); /* and 32 bytes more */
    assert_int_equal(cudaStreamSynchronize(g_ctx.stream), cudaErrorLaunchFailure);
    ok(cudaDeviceReset());
    ok(cudaFree(out));
}

/* ---- exchanges and products ---- */

static uint32_t expect_exchange(const uint32_t *in, int n, int i, int what)
{
    const int lane = i % 32, base = i - lane, half = base + lane / 16 * 16;
    uint32_t r = 0;
    switch (what) {
    case 0:
        return in[base + 5];
    case 1:
        return in[i ^ 3];
    case 2:
        return in[lane < 2 ? i : i - 2] + in[lane % 8 + 7 < 8 ? i + 7 : i];
    case 3:
        for (int k = 0; k < 16; k++)
            r |= (in[half + k] & 1) << (half - base + k);
        return r;
    case 4: {
        int32_t low = INT32_MAX;
        for (int k = 0; k < 16; k++)
            r = TM_MAX(r, in[half + k]);
        for (int k = 0; k < 32; k++)
            low = TM_MIN(low, (int32_t)in[base + k]);
        return r ^ (uint32_t)low;
    }
    default:
        for (int k = 0; k < n; k++)
            r += in[k] & 1;
        return r;
    }
}

static void exchange_test(void **state)
{
    (void)state;
    enum { N = 1024 };
    static uint32_t in[N], got[N * 6];
    for (int threads = 32; threads <= N; threads *= 2) {
        for (int i = 0; i < threads; i++)
            in[i] = op_random();
        uint32_t *gi = put(in, sizeof(in)), *go = take(sizeof(got));
        ok(emu_exchange_launch(go, gi, threads, &g_ctx));
        get(got, go, sizeof(got));
        for (int i = 0; i < threads * 6; i++)
            assert_int_equal(got[i], expect_exchange(in, threads, i / 6, i % 6));
        ok(cudaFree(gi));
        ok(cudaFree(go));
    }
}

static void product_test(void **state)
{
    (void)state;
    float got[16 * 8];
    for (int round = 0; round < 8; round++) {
        const tm_dtype t = round % 2 ? TM_DTYPE_F16 : TM_DTYPE_BF16;
        uint16_t *a = op_random_array(256, t, -2, 2), *b = op_random_array(128, t, -2, 2);
        void *ga = put(a, 512), *gb = put(b, 256), *gc = take(sizeof(got));
        ok(emu_product_launch(gc, ga, gb, t == TM_DTYPE_F16, round / 2 % 2, &g_ctx));
        get(got, gc, sizeof(got));
        for (int m = 0; m < 16; m++)
            for (int n = 0; n < 8; n++) {
                double want = 0;
                for (int k = 0; k < 16; k++)
                    want += (double)tm_load_f32(a, (size_t)(m * 16 + k), t) *
                            (double)tm_load_f32(b, (size_t)(n * 16 + k), t);
                assert_true(fabs(got[m * 8 + n] - want) < 1e-4);
            }
        ok(cudaFree(ga));
        ok(cudaFree(gb));
        ok(cudaFree(gc));
        free(a), free(b);
    }
}

/* Tiles and products of a warpgroup; and that mistakes with them are seen. */
static void tiles_test(void **state)
{
    enum { A = 64 * 64, B = 128 * 64, SCORES = 64 * 128, SUMS = 64 * 64 };
    uint16_t *a = op_random_array(A, TM_DTYPE_BF16, -2, 2),
             *b = op_random_array(B, TM_DTYPE_BF16, -2, 2);
    uint16_t *ga = put(a, A * 2), *gb = put(b, B * 2);
    float *gs = take(SCORES * 4), *gw = take(SUMS * 4), *s = malloc(SCORES * 4),
          *w = malloc(SUMS * 4);
    (void)state;
    for (int mode = 0; mode < EMU_TILES_MODES; mode++) {
#ifndef TM_CUDA_EMU_RACES
        if (mode == EMU_TILES_RACE || mode == EMU_TILES_FENCE)
            continue;
#endif
        ok(emu_tiles_launch(gs, gw, ga, gb, (emu_tiles)mode, &g_ctx));
        if (mode > EMU_TILES_EARLY) {
            must_fail(mode, emu_tiles_says[mode]);
            continue;
        }
        get(s, gs, SCORES * 4);
        get(w, gw, SUMS * 4);
        for (int i = 0; i < SCORES; i++) {
            double want = 0;
            for (int k = 0; k < 64; k++)
                want += (double)tm_load_f32(a, (size_t)(i / 128 * 64 + k), TM_DTYPE_BF16) *
                        (double)tm_load_f32(b, (size_t)(i % 128 * 64 + k), TM_DTYPE_BF16);
            assert_true(fabs(s[i] - want) < 1e-3);
        }
        for (int i = 0; i < SUMS; i++) {
            double want = 0;
            for (int k = 0; k < 16; k++)
                want += (double)tm_load_f32(a, (size_t)(i / 64 * 64 + k), TM_DTYPE_BF16) *
                        (double)tm_load_f32(b, (size_t)(k * 64 + i % 64), TM_DTYPE_BF16);
            assert_true(mode == EMU_TILES_EARLY ? isnan(w[i]) : fabs(w[i] - want) < 1e-3);
        }
    }
    ok(cudaFree(ga)), ok(cudaFree(gb)), ok(cudaFree(gs)), ok(cudaFree(gw));
    free(a), free(b), free(s), free(w);
}

static void transpose_test(void **state)
{
    (void)state;
    uint16_t in[64], got[64];
    for (int i = 0; i < 64; i++)
        in[i] = (uint16_t)i;
    void *gi = put(in, sizeof(in)), *go = take(sizeof(got));
    ok(emu_transpose_launch(go, gi, &g_ctx));
    get(got, go, sizeof(got));
    for (int i = 0; i < 64; i++)
        assert_int_equal(got[i], i % 8 * 8 + i / 8);
    ok(cudaFree(gi));
    ok(cudaFree(go));
}

/* A copy that nobody waited for has not come; one that is not valid brings zeros. */
static void copies_test(void **state)
{
    (void)state;
    uint32_t in[12], got[12];
    for (uint32_t i = 0; i < 12; i++)
        in[i] = i + 1;
    void *gi = put(in, sizeof(in)), *go = take(sizeof(got));
    for (uint32_t waits = 0; waits <= 3; waits++) {
        ok(emu_copies_launch(go, gi, (int)waits, &g_ctx));
        get(got, go, sizeof(got));
        for (uint32_t i = 0; i < 12; i++)
            assert_int_equal(got[i], i / 4 >= waits ? UINT32_MAX : i / 4 == 1 ? 0 : i + 1);
    }
    ok(cudaFree(gi));
    ok(cudaFree(go));
}

static void convert_test(void **state)
{
    (void)state;
    enum { N = 65536 };
    static float from[N], wide[N];
    static uint16_t back[N], rounded[N];
    for (int f16 = 0; f16 < 2; f16++) {
        const tm_dtype t = f16 ? TM_DTYPE_F16 : TM_DTYPE_BF16;
        for (int i = 0; i < N; i++)
            from[i] = i % 3 ? op_uniform(-70000, 70000) * exp2f((float)op_pick(-45, 2))
                            : tm_f32_from_bits(op_random());
        void *gf = put(from, sizeof(from)), *gw = take(sizeof(wide)), *gb = take(sizeof(back)),
             *gr = take(sizeof(back));
        ok(emu_convert_launch(gw, gb, gf, gr, N, f16, &g_ctx));
        get(wide, gw, sizeof(wide));
        get(back, gb, sizeof(back));
        get(rounded, gr, sizeof(rounded));
        for (int i = 0; i < N; i++) {
            const uint16_t bits = (uint16_t)i;
            uint16_t want;
            const float f = tm_load_f32(&bits, 0, t);
            tm_store_f32(&want, 0, t, from[i]);
            assert_true(isnan(f) ? isnan(wide[i]) : wide[i] == f && back[i] == bits);
            assert_true(isnan(from[i]) ? isnan(tm_load_f32(&rounded[i], 0, t))
                                       : rounded[i] == want);
        }
        void *all[] = {gf, gw, gb, gr};
        for (size_t i = 0; i < TM_ARRAY_LEN(all); i++)
            ok(cudaFree(all[i]));
    }
}

/* ---- streams ---- */

/* A result that nobody waited for is not there; memory that is not pinned was read when the copy was asked for. */
static void late_test(void **state)
{
    (void)state;
    int *p = take(sizeof(int)), *pinned = NULL, pageable = 5;
    ok(cudaHostAlloc((void **)&pinned, sizeof(int), cudaHostAllocDefault));
    assert_int_equal(*pinned, -1);
    ok(cudaMemcpyAsync(p, &pageable, sizeof(int), cudaMemcpyHostToDevice, g_ctx.stream));
    pageable = 6;
    ok(cudaMemcpyAsync(pinned, p, sizeof(int), cudaMemcpyDeviceToHost, g_ctx.stream));
    assert_int_equal(*pinned, -1);
    ok(cudaStreamSynchronize(g_ctx.stream));
    assert_int_equal(*pinned, 5);
    *pinned = 7;
    ok(cudaMemcpyAsync(p, pinned, sizeof(int), cudaMemcpyHostToDevice, g_ctx.stream));
    *pinned = 8; /* too early: the copy has not begun */
    ok(cudaMemcpyAsync(&pageable, p, sizeof(int), cudaMemcpyDeviceToHost, g_ctx.stream));
    assert_int_equal(pageable, 8);
    ok(cudaFreeHost(pinned));
    ok(cudaFree(p));
}

/* Two streams and an event between them, directly and recorded. */
static void events_test(void **state)
{
    (void)state;
    tm_cuda_ctx other = g_ctx;
    cudaEvent_t there, back;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    int *a = take(sizeof(int)), *b = take(sizeof(int)), got = 0;
    ok(cudaStreamCreateWithFlags(&other.stream, cudaStreamNonBlocking));
    ok(cudaEventCreate(&there));
    ok(cudaEventCreateWithFlags(&back, cudaEventDisableTiming));
    ok(emu_poke_launch(a, 0, 1, &g_ctx));
    ok(cudaEventRecord(there, g_ctx.stream));
    ok(cudaStreamWaitEvent(other.stream, there, 0));
    ok(emu_copy_int_launch(b, a, &other));
    ok(cudaStreamSynchronize(other.stream));
    ok(cudaMemcpy(&got, b, sizeof(got), cudaMemcpyDeviceToHost));
    assert_int_equal(got, 1);
    ok(cudaStreamBeginCapture(g_ctx.stream, cudaStreamCaptureModeThreadLocal));
    ok(emu_poke_launch(a, 0, 2, &g_ctx));
    ok(cudaEventRecord(there, g_ctx.stream));
    ok(cudaStreamWaitEvent(other.stream, there, 0));
    ok(emu_copy_int_launch(b, a, &other));
    ok(cudaEventRecord(back, other.stream));
    ok(cudaStreamWaitEvent(g_ctx.stream, back, 0));
    assert_int_equal(cudaStreamSynchronize(g_ctx.stream), cudaErrorStreamCaptureUnsupported);
    void *none = NULL;
    assert_int_equal(cudaMalloc(&none, 4), cudaErrorStreamCaptureUnsupported);
    ok(cudaStreamEndCapture(g_ctx.stream, &graph));
    ok(cudaGraphInstantiate(&exec, graph, 0));
    ok(cudaGraphDestroy(graph));
    get(&got, b, sizeof(got));
    assert_int_equal(got, 1);
    for (int i = 0; i < 2; i++) {
        ok(cudaMemset(b, 0, sizeof(int)));
        ok(cudaDeviceSynchronize());
        ok(cudaGraphLaunch(exec, g_ctx.stream));
        get(&got, b, sizeof(got));
        assert_int_equal(got, 2);
    }
    ok(cudaGraphExecDestroy(exec));
    ok(cudaEventDestroy(there));
    ok(cudaEventDestroy(back));
    ok(cudaStreamDestroy(other.stream));
    ok(cudaFree(a));
    ok(cudaFree(b));
}

/* ---- waiting in loops ---- */

static void turns_test(void **state)
{
    (void)state;
    enum { BLOCKS = 50 };
    int zero = 0, got[BLOCKS];
    int *turn = put(&zero, sizeof(zero)), *order = take(sizeof(got));
    ok(emu_turns_launch(turn, order, BLOCKS, &g_ctx));
    get(got, order, sizeof(got));
    for (int i = 0; i < BLOCKS; i++)
        assert_int_equal(got[i], BLOCKS - 1 - i);
    ok(cudaFree(turn));
    ok(cudaFree(order));
}

/* Two processes whose kernels wait for each other, in memory of the first. */
static int other_process(int in, int out)
{
    cudaIpcMemHandle_t h;
    int *theirs = NULL, done = 0;
    if (read(in, &h, sizeof(h)) != sizeof(h) ||
        cudaIpcOpenMemHandle((void **)&theirs, h, 0) != cudaSuccess)
        return 1;
    if (emu_ping_launch(theirs + 1, theirs, 300, &g_ctx) != cudaSuccess ||
        cudaDeviceSynchronize() != cudaSuccess)
        return 2;
    if (cudaMemcpy(&done, theirs + 1, sizeof(done), cudaMemcpyDeviceToHost) != cudaSuccess ||
        done != 300)
        return 3;
    if (cudaIpcCloseMemHandle(theirs) != cudaSuccess || write(out, "", 1) != 1)
        return 4;
    return 0;
}

static void processes_test(void **state)
{
    (void)state;
    int ends[2], back[2], status = 0, zero[2] = {0, 0};
    cudaIpcMemHandle_t h;
    void *again = NULL;
    char byte;
    int *p = take(64);
    assert_int_equal(cudaIpcGetMemHandle(&h, p), cudaErrorNotSupported);
    ok(cudaFree(p));
    assert_int_equal(setenv("TM_EMU_SHARE", "1", 1), 0);
    p = put(zero, sizeof(zero));
    assert_int_equal(unsetenv("TM_EMU_SHARE"), 0);
    assert_int_equal(cudaIpcGetMemHandle(&h, p + 1), cudaErrorInvalidValue);
    ok(cudaIpcGetMemHandle(&h, p));
    assert_int_equal(cudaIpcOpenMemHandle(&again, h, 0), cudaErrorInvalidValue);
    (void)cudaGetLastError();
    assert_int_equal(pipe(ends), 0);
    assert_int_equal(pipe(back), 0);
    fflush(NULL);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0)
        _exit(other_process(ends[0], back[1]));
    assert_int_equal(write(ends[1], &h, sizeof(h)), sizeof(h));
    ok(emu_ping_launch(p, p + 1, 300, &g_ctx));
    ok(cudaStreamSynchronize(g_ctx.stream));
    close(back[1]);
    assert_int_equal(read(back[0], &byte, 1), 1);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    close(ends[0]), close(ends[1]), close(back[0]);
    ok(cudaFree(p));
}

static void cluster_test(void **state)
{
    (void)state;
    float got[5 * 8 * 2 * 8];
    float *out = take(sizeof(got));
    for (int size = 1; size <= 8; size *= 2) {
        ok(emu_cluster_launch(out, 5, size, EMU_CLUSTER_RIGHT, &g_ctx));
        ok(cudaStreamSynchronize(g_ctx.stream));
        ok(cudaMemcpy(got, out, sizeof(got), cudaMemcpyDeviceToHost));
        for (int b = 0; b < 5 * size; b++)
            for (int k = 0; k < 2; k++)
                for (int i = 0; i < size; i++)
                    assert_int_equal((int)got[(b * 2 + k) * size + i],
                                     b / size * size + size - 1 - i + 1000 * k);
    }
    assert_int_equal(emu_cluster_launch(out, 1, 16, EMU_CLUSTER_RIGHT, &g_ctx),
                     cudaErrorInvalidConfiguration);
    (void)cudaGetLastError();
    ok(emu_cluster_launch(out, 1, 2, EMU_CLUSTER_UNBEGUN, &g_ctx));
    assert_int_equal(cudaStreamSynchronize(g_ctx.stream), cudaErrorLaunchFailure);
    assert_non_null(strstr(emu_failure(), "has not begun"));
    ok(cudaDeviceReset());
    ok(emu_cluster_launch(out, 1, 8, EMU_CLUSTER_RACE, &g_ctx));
    const cudaError_t e = cudaStreamSynchronize(g_ctx.stream);
#ifdef TM_CUDA_EMU_RACES
    assert_int_equal(e, cudaErrorLaunchFailure);
    assert_non_null(strstr(emu_failure(), "with no barrier between"));
#else
    ok(e);
#endif
    ok(cudaDeviceReset());
    ok(cudaFree(out));
}

/* What blocks of a cluster send each other: a block that waits has all of it, one that does not lacks some. */
static void sends_test(void **state)
{
    (void)state;
    enum { CLUSTERS = 5 };
    static const int sizes[] = {2, 8, EMU_CLUSTER_MAX};
    static float got[CLUSTERS * EMU_CLUSTER_MAX * 2 * EMU_CLUSTER_MAX][4];
    float *out = take(sizeof(got));
    for (size_t s = 0; s < TM_ARRAY_LEN(sizes); s++)
        for (int mode = EMU_SENDS_RIGHT; mode <= EMU_SENDS_EARLY; mode++) {
            const int size = sizes[s], n = CLUSTERS * size * 2 * size;
            int missing = 0;
            ok(cudaMemset(out, 0, sizeof(got)));
            ok(cudaDeviceSynchronize());
            ok(emu_sends_launch(out, CLUSTERS, size, (emu_sends)mode, &g_ctx));
            get(got, out, sizeof(got));
            for (int i = 0; i < n; i++) {
                const int b = i / size / 2, from = b / size * size + i % size;
                const int want[4] = {from, b % size, i / size % 2, -from};
                if (isnan(got[i][0])) {
                    missing++;
                    continue;
                }
                for (int e = 0; e < 4; e++)
                    assert_int_equal((int)got[i][e], want[e]);
            }
            assert_true(mode == EMU_SENDS_EARLY ? missing > 0 : missing == 0);
        }
    for (int mode = EMU_SENDS_EARLY + 1; mode < EMU_SENDS_MODES; mode++) {
        ok(emu_sends_launch(out, 1, 2, (emu_sends)mode, &g_ctx));
        must_fail(mode, emu_sends_says[mode]);
    }
    ok(cudaFree(out));
}

/* What lies between the rows in shared memory stays as it was. */
static void rows_right(int rows, int bytes, int pitch, emu_rows mode)
{
    const int words = bytes / 4, apart = words + 4, n = rows * apart;
    uint32_t *in = malloc((size_t)(rows * pitch)), *got = malloc((size_t)n * 4);
    for (int i = 0; i < rows * pitch / 4; i++)
        in[i] = op_random() >> 1; /* never what nobody wrote */
    uint32_t *gi = put(in, (size_t)(rows * pitch)), *go = take((size_t)n * 4);
    ok(emu_rows_launch(go, gi, rows, bytes, pitch, mode, &g_ctx));
    get(got, go, (size_t)n * 4);
    for (int i = 0; i < n; i++) {
        const bool there = mode == EMU_ROWS_RIGHT && i % apart < words;
        assert_int_equal(got[i], there ? in[i / apart * (pitch / 4) + i % apart] : UINT32_MAX);
    }
    ok(cudaFree(gi)), ok(cudaFree(go));
    free(in), free(got);
}

/* Rows of odd multiples of 16 bytes; and that mistakes with them are seen. */
static void rows_test(void **state)
{
    (void)state;
    static const int shapes[][3] = {{1, 16, 16},    {3, 48, 48},    {33, 16, 48},
                                    {100, 80, 112}, {64, 208, 528}, {7, 4112, 4144}};
    for (size_t s = 0; s < TM_ARRAY_LEN(shapes); s++)
        for (int mode = EMU_ROWS_RIGHT; mode <= EMU_ROWS_EARLY; mode++)
            rows_right(shapes[s][0], shapes[s][1], shapes[s][2], (emu_rows)mode);
    enum { ROWS = 40, BYTES = 80, PITCH = 112 };
    void *in = take((ROWS + 1) * PITCH), *out = take(ROWS * (BYTES + 16));
    for (int mode = EMU_ROWS_EARLY + 1; mode < EMU_ROWS_MODES; mode++) {
#ifndef TM_CUDA_EMU_RACES
        if (mode == EMU_ROWS_RACE)
            continue;
#endif
        ok(emu_rows_launch(out, in, ROWS, BYTES, PITCH, (emu_rows)mode, &g_ctx));
        must_fail(mode, emu_rows_says[mode]);
    }
    ok(cudaFree(in)), ok(cudaFree(out));
}

static int set_up(void **state)
{
    (void)state;
    return cudaStreamCreateWithFlags(&g_ctx.stream, cudaStreamNonBlocking) == cudaSuccess ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    return cudaStreamDestroy(g_ctx.stream) == cudaSuccess ? 0 : -1;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(mistakes_test),  cmocka_unit_test(bounds_test),
        cmocka_unit_test(race_test),      cmocka_unit_test(shared_test),
        cmocka_unit_test(exchange_test),  cmocka_unit_test(product_test),
        cmocka_unit_test(transpose_test), cmocka_unit_test(copies_test),
        cmocka_unit_test(convert_test),   cmocka_unit_test(late_test),
        cmocka_unit_test(events_test),    cmocka_unit_test(turns_test),
        cmocka_unit_test(processes_test), cmocka_unit_test(tiles_test),
        cmocka_unit_test(cluster_test),   cmocka_unit_test(sends_test),
        cmocka_unit_test(rows_test),
    };
    op_seed();
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
