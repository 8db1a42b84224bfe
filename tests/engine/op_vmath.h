/* The vector functions under test, compiled with the flags of one instruction set; the test itself is
 * portable, so that it can say "skipped" on a processor without them. */
#ifndef TM_TESTS_ENGINE_OP_VMATH_H
#define TM_TESTS_ENGINE_OP_VMATH_H

#include <stdint.h>

/* `lanes` elements from x to y. */
typedef void (*op_vector_fn)(const float *x, float *y);

typedef struct op_vmath_table {
    const char *isa;
    int lanes;
    op_vector_fn exp, tanh, erfc, sin, cos;
    void (*store_bf16)(uint16_t *out, const float *x);
    void (*store_f16)(uint16_t *out, const float *x);
} op_vmath_table;

extern const op_vmath_table op_vmath;

#endif
