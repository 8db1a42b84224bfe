/* Read bandwidth and multiply-add peak, measured with the same threads that run the operators.
 *
 * The loops are written with vector types and for each vector width, so that the numbers are the
 * machine's limits and not the compiler's. */
#include "bench/kernels/cpu_limits.h"

#include <stdint.h>

#include "common/clock.h"
#include "engine/backend/cpu/cpu.h"

typedef uint64_t v4u __attribute__((vector_size(32)));
typedef float v8f __attribute__((vector_size(32)));
typedef float v16f __attribute__((vector_size(64)));

double bench_now(void)
{
    return (double)tm_clock_ns() * 1e-9;
}

enum { READ_AHEAD = 2048 };

enum { READ_UNITS = 64 };

typedef struct read_task {
    const char *p;
    size_t bytes;
    uint64_t sums[READ_UNITS];
} read_task;

/* Two lines in flight per step and more fetched ahead of use. */
__attribute__((target("avx2"))) static uint64_t read_lines(const char *p, size_t lines)
{
    v4u a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t i = 0; i < lines; i++) {
        const v4u *v = (const v4u *)(const void *)(p + i * 64);
        __builtin_prefetch(p + i * 64 + READ_AHEAD);
        if (i & 1)
            a += v[0], b += v[1];
        else
            c += v[0], d += v[1];
    }
    a += b + c + d;
    return a[0] + a[1] + a[2] + a[3];
}

static void read_unit(void *arg, int thread, int unit)
{
    read_task *r = arg;
    size_t lines = r->bytes / 64;
    size_t from = lines * (size_t)unit / READ_UNITS;
    size_t end = lines * (size_t)(unit + 1) / READ_UNITS;
    (void)thread;
    r->sums[unit] = read_lines(r->p + from * 64, end - from);
}

static volatile uint64_t g_sink;

double bench_read_seconds(tm_device *dev, const void *p, size_t bytes)
{
    static read_task r;
    r.p = p;
    r.bytes = bytes;
    double t = bench_now();
    tm_cpu_run(dev, READ_UNITS, read_unit, &r);
    t = bench_now() - t;
    for (int i = 0; i < READ_UNITS; i++)
        g_sink += r.sums[i];
    return t;
}

/* About 1 ms, short enough to fall between two interruptions of a shared machine. */
enum { FMA_STEPS = 250 * 1000, FMA_CHAINS = 12 };

/* 12 chains hide the latency of 4 cycles on 2 units with room to spare. */
__attribute__((target("avx2,fma"))) static float fma_256(void)
{
    v8f acc[FMA_CHAINS], x = {1e-9f, 1}, y = {0.5f, 0.25f};
    __asm__ volatile("" : "+x"(x), "+x"(y));
    for (int j = 0; j < FMA_CHAINS; j++) {
        acc[j] = y;
        __asm__ volatile("" : "+x"(acc[j])); /* else equal chains would be computed once */
    }                                        /* the values are not known to the compiler */
    for (int i = 0; i < FMA_STEPS; i++)
#pragma GCC unroll 16
        for (int j = 0; j < FMA_CHAINS; j++)
            acc[j] = x * acc[j] + y;
    float s = 0;
    for (int j = 0; j < FMA_CHAINS; j++)
        s += acc[j][0];
    return s;
}

__attribute__((target("avx512f"))) static float fma_512(void)
{
    v16f acc[FMA_CHAINS], x = {1e-9f, 1}, y = {0.5f, 0.25f};
    __asm__ volatile("" : "+v"(x), "+v"(y));
    for (int j = 0; j < FMA_CHAINS; j++) {
        acc[j] = y;
        __asm__ volatile("" : "+v"(acc[j]));
    }
    for (int i = 0; i < FMA_STEPS; i++)
#pragma GCC unroll 16
        for (int j = 0; j < FMA_CHAINS; j++)
            acc[j] = x * acc[j] + y;
    float s = 0;
    for (int j = 0; j < FMA_CHAINS; j++)
        s += acc[j][0];
    return s;
}

static void fma_unit(void *arg, int thread, int unit)
{
    (void)thread;
    float *out = arg;
    out[unit * 16] = __builtin_cpu_supports("avx512f") ? fma_512() : fma_256();
}

double bench_fma_flops(tm_device *dev)
{
    static float out[TM_CPU_THREADS_MAX * 16];
    double lanes = __builtin_cpu_supports("avx512f") ? 16 : 8;
    double t = bench_now();
    tm_cpu_run(dev, dev->threads, fma_unit, out);
    t = bench_now() - t;
    return 2.0 * lanes * FMA_CHAINS * FMA_STEPS * dev->threads / t;
}
