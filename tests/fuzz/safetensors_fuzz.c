/* Fuzz entry of safetensors headers: a list that is accepted has tensors inside the file, in file order, without
 * overlap and with as many bytes as type and shape say. */
#include <stdint.h>
#include <string.h>

#include "common/check.h"
#include "engine/weights/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    tm_st_list l;
    tm_err err = TM_ERR_INIT;
    if (tm_st_parse(&l, data, size, "fuzz", &err) != TM_OK) {
        TM_ASSERT(err.msg[0] && !strchr(err.msg, '\n'));
        return 0;
    }
    size_t at = l.header_bytes;
    for (size_t i = 0; i < l.count; i++) {
        const tm_st_tensor *t = &l.tensors[i];
        TM_ASSERT(t->ndim >= 0 && t->ndim <= TM_ST_DIMS_MAX && t->offset >= at);
        TM_ASSERT(t->bytes <= size && t->offset <= size - t->bytes);
        at = t->offset + t->bytes;
        for (int d = 0; d < t->ndim; d++)
            TM_ASSERT(t->dims[d] >= 1);
    }
    tm_st_list_deinit(&l);
    return 0;
}
