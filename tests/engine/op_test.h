/* What the operator tests share: devices, random numbers with a printed seed, buffers with a guard behind
 * them, and the normalised mean square error that the bounds are given in. */
#ifndef TM_TESTS_ENGINE_OP_TEST_H
#define TM_TESTS_ENGINE_OP_TEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/backend/backend.h"

/* Bounds of the brief: the f32 reference against double, a fast path against the reference. */
#define OP_NMSE_REF  1e-10
#define OP_NMSE_FAST 1e-7

/* Seeds the generator from TM_SEED or the clock, and prints how to repeat the run. */
void op_seed(void);
uint32_t op_random(void);
float op_uniform(float lo, float hi);
int op_pick(int lo, int hi); /* inclusive */

/* A device of the CPU backend, or NULL (with a message) when this processor lacks the instruction set. */
tm_device *op_device_open(const char *isa, int threads);
void op_device_close(tm_device *dev);

/* Fast paths to compare with the reference. */
extern const char *const op_fast_isas[];
extern const int op_fast_isa_count;

/* n elements of dtype, uniform in lo..hi (rounded to dtype), 64-byte aligned. Freed with free. */
void *op_random_array(size_t n, tm_dtype t, float lo, float hi);

/* n floats with a guard on both sides, all set to a pattern that no operator leaves by chance. */
float *op_guarded(size_t n);
void op_guarded_check(const float *p, size_t n, const char *what);
void op_guarded_free(float *p);
bool op_untouched(float v);

/* sum (got - want)^2 / sum want^2; a NaN or infinity in `got` alone counts as infinite error. */
double op_nmse(const float *got, const float *want, size_t n);
double op_nmse_double(const float *got, const double *want, size_t n);

/* Fails the test with both numbers when error > bound. */
void op_check(double error, double bound, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

#endif
