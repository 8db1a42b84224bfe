/* Masses: weights as whole numbers, so that a sum over them is the same in every order.
 *
 * A weight exp((x - max) / temperature) is in [0, 1]; its mass is that times 2^44, rounded to the nearest whole
 * number, ties to even. A row of up to 2^19 of them fits in 64 bits. What the sampler compares with a sum (a share of
 * the total) is the high half of a product with a 64-bit fraction: no rounding either. So any number of threads,
 * registers of any width and every device (engine/backend/cuda/sample.cu) cut at the same token and draw the same. */
#ifndef TM_ENGINE_SAMPLE_MASS_H
#define TM_ENGINE_SAMPLE_MASS_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define TM_MASS_BITS  44
#define TM_MASS_VALUE 0x1p-44 /* of one unit */
/* Adding it to a weight rounds it: one unit in the last place of a double of this size is one of mass. */
#define TM_MASS_ROUND 0x1.8p8

static inline uint64_t tm_mass_of(float w)
{
    double sum = (double)w + TM_MASS_ROUND, none = TM_MASS_ROUND;
    uint64_t a, b;
    memcpy(&a, &sum, sizeof(a));
    memcpy(&b, &none, sizeof(b));
    return a - b;
}

/* floor(mass * fraction / 2^64); *exact: nothing was cut off. */
static inline uint64_t tm_mass_part(uint64_t mass, uint64_t fraction, bool *exact)
{
    unsigned __int128 product = (unsigned __int128)mass * fraction;
    *exact = (uint64_t)product == 0;
    return (uint64_t)(product >> 64);
}

/* The least mass that is at least the share p of the total, p < 1 being a fraction of 2^64. */
static inline uint64_t tm_mass_reached(uint64_t total, uint64_t p)
{
    bool exact;
    uint64_t least = tm_mass_part(total, p, &exact);
    least += !exact;
    return least > 0 ? least : 1;
}

#endif
