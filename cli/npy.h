/* Reads and writes the small part of NumPy's .npy format that the tools need. */
#ifndef TM_CLI_NPY_H
#define TM_CLI_NPY_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

/* uint16 or int32 token windows, C order, one or two dimensions, as int32 [rows, cols]; freed by the caller. */
tm_status tm_npy_read_tokens(const char *path, int32_t **out, size_t *rows, size_t *cols,
                             tm_err *err);
/* float32 [rows, cols] */
tm_status tm_npy_write_f32(const char *path, const float *data, size_t rows, size_t cols,
                           tm_err *err);

#endif
