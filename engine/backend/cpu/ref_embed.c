/* Row copies: the embedding and the rows whose logits are wanted. */
#include <string.h>

#include "engine/backend/cpu/convert.h"
#include "engine/backend/cpu/cpu.h"

tm_status tm_cpu_ref_embed(tm_device *dev, const tm_embed_args *a)
{
    (void)dev;
    int h = a->table->k;
    for (int t = 0; t < a->n_tokens; t++) {
        float *out = (float *)a->out + (size_t)t * (size_t)h;
        int64_t row = (int64_t)tm_embed_id(a, t) - a->v0;
        bool here = row >= 0 && row < a->table->n;
        for (int i = 0; i < h; i++) {
            size_t at = here ? (size_t)row * (size_t)h + (size_t)i : 0;
            out[i] = here ? tm_load_f32(a->table->data, at, a->table->dtype) * a->scale : 0.0f;
        }
    }
    return TM_OK;
}

tm_status tm_cpu_ref_gather_rows(tm_device *dev, const tm_gather_rows_args *a)
{
    (void)dev;
    size_t row = (size_t)a->h * sizeof(float);
    for (int i = 0; i < a->n_rows; i++)
        memcpy((char *)a->out + (size_t)i * row, (const char *)a->x + (size_t)a->rows[i] * row,
               row);
    return TM_OK;
}
