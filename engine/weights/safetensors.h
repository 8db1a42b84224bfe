/* The header of one safetensors file: names, number formats, shapes and places of its tensors.
 *
 * The format: 8 bytes length of the header (little endian), the header in JSON, then the tensors without
 * gaps. Parsing trusts nothing: a file is refused as a whole, with one line that names the tensor and
 * the rule it breaks. */
#ifndef TM_ENGINE_WEIGHTS_SAFETENSORS_H
#define TM_ENGINE_WEIGHTS_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

#define TM_ST_HEADER_MAX  ((size_t)100 * 1000 * 1000)
#define TM_ST_TENSORS_MAX ((size_t)1000 * 1000)
#define TM_ST_DIMS_MAX    8
#define TM_ST_NAME_MAX    1024

typedef enum tm_st_dtype {
    TM_ST_F32,
    TM_ST_BF16,
    TM_ST_F16,
    TM_ST_F64,
    TM_ST_F8_E4M3,
    TM_ST_F8_E5M2,
    TM_ST_I64,
    TM_ST_I32,
    TM_ST_I16,
    TM_ST_I8,
    TM_ST_U64,
    TM_ST_U32,
    TM_ST_U16,
    TM_ST_U8,
    TM_ST_BOOL
} tm_st_dtype;
const char *tm_st_dtype_name(tm_st_dtype t);

typedef struct tm_st_tensor {
    char *name; /* owned by the list */
    tm_st_dtype dtype;
    int ndim;
    int64_t dims[TM_ST_DIMS_MAX]; /* each >= 1 */
    size_t offset, bytes;         /* in the file */
    int shard;                    /* index of its file in a checkpoint, 0 in a single file */
} tm_st_tensor;

typedef struct tm_st_list {
    tm_st_tensor *tensors; /* in file order */
    size_t count;
    size_t header_bytes; /* the 8 length bytes and the JSON: what identifies the file's contents */
} tm_st_list;

/* data[len] is the whole file. label (the file's name) begins every message; refusals are
 * TM_STATUS_DATA. *out is set only on TM_OK and freed with tm_st_list_deinit. */
tm_status tm_st_parse(tm_st_list *out, const unsigned char *data, size_t len, const char *label,
                      tm_err *err);
void tm_st_list_deinit(tm_st_list *l);

/* "[4096, 11008]" into out, cut when it does not fit. */
void tm_st_shape_text(char *out, size_t size, const int64_t *dims, int ndim);

#endif
