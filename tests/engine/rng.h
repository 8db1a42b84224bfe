/* Random numbers for tests: splitmix64, seeded from TM_TEST_SEED or the test's own default, which is printed. */
#ifndef TM_TESTS_ENGINE_RNG_H
#define TM_TESTS_ENGINE_RNG_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct rng {
    uint64_t state;
} rng;

static inline uint64_t rng_u64(rng *r)
{
    uint64_t z = (r->state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* 0..n-1 */
static inline int rng_below(rng *r, int n)
{
    return (int)(rng_u64(r) % (uint64_t)n);
}

static inline int rng_between(rng *r, int lo, int hi)
{
    return lo + rng_below(r, hi - lo + 1);
}

/* [0, 1) */
static inline double rng_unit(rng *r)
{
    return (double)(rng_u64(r) >> 11) / 9007199254740992.0;
}

static inline uint64_t rng_seed(const char *test, uint64_t def)
{
    const char *text = getenv("TM_TEST_SEED");
    uint64_t seed = text ? strtoull(text, NULL, 0) : def;
    printf("%s: TM_TEST_SEED=%llu\n", test, (unsigned long long)seed);
    return seed;
}

#endif
