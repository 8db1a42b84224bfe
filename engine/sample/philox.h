/* Philox4x32-10, the counter-based generator of Salmon et al. (SC 2011): 128 random bits as a function of a
 * 128-bit counter and a 64-bit key, with no state. So the noise of a position needs nothing but the
 * request's seed: a stream that is continued on another worker, or computed again after preemption, draws
 * the same numbers. */
#ifndef TM_ENGINE_SAMPLE_PHILOX_H
#define TM_ENGINE_SAMPLE_PHILOX_H

#include <stdint.h>

static inline void tm_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* 53 random bits for (seed, choice, position of the generated token). */
static inline uint64_t tm_philox_bits(uint64_t seed, uint32_t choice, uint32_t position)
{
    uint32_t counter[4] = {position, choice, 0, 0}, out[4];
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    tm_philox4x32(counter, key, out);
    return (uint64_t)(out[0] >> 5) << 26 | out[1] >> 6;
}

/* The same as a uniform number in [0, 1). */
static inline double tm_philox_uniform(uint64_t seed, uint32_t choice, uint32_t position)
{
    return (double)tm_philox_bits(seed, choice, position) / 9007199254740992.0;
}

#endif
