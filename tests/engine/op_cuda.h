/* What the tests of the CUDA operators share: one device per dtype, copies, and the bounds. */
#ifndef TM_TESTS_ENGINE_OP_CUDA_H
#define TM_TESTS_ENGINE_OP_CUDA_H

#include "tests/engine/op_test.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "engine/backend/cpu/convert.h"

extern const tm_backend *gpu;
extern tm_device *gpu_dev, *gpu_ref; /* the GPU and the CPU reference */
extern tm_dtype gpu_dtype;           /* of activations */

/* Runs the tests once per dtype; 0 with a message where there is no GPU. */
int gpu_run(const struct CMUnitTest *tests, size_t count);

/* True where an access takes long: on the CPU's emulator, and under a tool that watches all of them (TM_FEW=N: tests that draw
 * take an N-th of their cases). */
bool gpu_slow(void);
/* Cases of a test that draws them. */
int gpu_count(int all, int emulated);
/* True on a GPU; where it is slow, for one case in `of`, drawn by the seed (TM_EMU_ALL: every one). */
bool gpu_takes(int of);

/* Relative errors of the product: 1e-2 bf16, 2e-3 f16; as mean squares. */
double gpu_bound(void);

void *gpu_put(const void *host, size_t bytes);
void *gpu_take(size_t bytes); /* filled with bytes that are no number in any dtype */
void gpu_free(void *p);
/* n numbers of the device's dtype, or f32. */
void gpu_get(float *out, const void *p, size_t n);
void gpu_get_f32(float *out, const void *p, size_t n);

/* n numbers of dtype t as f32. */
float *gpu_widen(const void *x, tm_dtype t, size_t n);
float gpu_round(float v);

#endif
