/* Number formats of checkpoints to number formats of weights. */
#ifndef TM_ENGINE_WEIGHTS_CONVERT_H
#define TM_ENGINE_WEIGHTS_CONVERT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/backend/backend.h"

/* n numbers from src (type from) to dst (type to). src may be unaligned; the two must not overlap. Rounds to
 * nearest, ties to even; NaN stays NaN, what is too large for f16 becomes infinite. */
void tm_convert(void *dst, tm_dtype to, const void *src, tm_dtype from, size_t n);

/* x = x * factor + addend for n numbers where they lie. With a power of two alone that is exact, but for what becomes
 * subnormal or infinite. */
void tm_adjust(void *x, tm_dtype type, size_t n, float factor, float addend);
/* Neither infinite nor no number. */
bool tm_f16_all_finite(const uint16_t *x, size_t n);

float tm_f16_to_f32(uint16_t h);
uint16_t tm_f32_to_f16(float f);
uint16_t tm_f32_to_bf16(float f);
float tm_bf16_to_f32(uint16_t b);

#endif
