/* Two small pieces that the JSON writer, the log and the metrics share: UTF-8 stepping and numbers as
 * text. Both are independent of the process locale. */
#ifndef TM_COMMON_FMT_H
#define TM_COMMON_FMT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Length (1..4) of the well-formed UTF-8 sequence at s, or 0. Overlong forms, surrogates and code
 * points above U+10FFFF are not well-formed. len > 0. */
size_t tm_utf8_seq(const char *s, size_t len);

#define TM_NUM_MAX 32
/* Writes v so that reading it back gives the same value, in few digits: as float when `single`, else
 * as double. Finite v only. Returns the length; out is NUL-terminated. */
size_t tm_num_format(char out[TM_NUM_MAX], double v, bool single);
size_t tm_int_format(char out[TM_NUM_MAX], int64_t v);

#endif
