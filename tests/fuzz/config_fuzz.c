/* Fuzz entry of config.json. What is understood must be splittable or refused, and every tensor's rows must lie inside
 * the tensor and inside the weight that they go to, on every rank. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "engine/model/layout.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct bounds {
    int src_rows, src_cols, rows, cols;
    int64_t numbers; /* copied */
} bounds;

static tm_status check_run(void *arg, tm_row_run run)
{
    bounds *b = arg;
    TM_ASSERT(run.n >= 0 && run.src >= 0 && run.dst >= 0 && run.src + run.n <= b->src_rows);
    if (run.turned)
        TM_ASSERT(run.dst + b->src_cols <= b->rows && run.n == b->cols);
    else
        TM_ASSERT(run.dst + run.n <= b->rows);
    b->numbers += (int64_t)run.n * b->src_cols;
    return TM_OK;
}

static void check_row(const tm_arch *a, const tm_shard *s, const tm_tensor_row *row)
{
    bounds b = {0};
    int tensor_cols, col0;
    int experts = tm_tensor_experts(a, row);
    tm_tensor_size(a, row, &b.src_rows, &tensor_cols);
    tm_tensor_cols(a, s, row, &col0, &b.src_cols);
    tm_role_size(a, s, row->role, &b.rows, &b.cols);
    TM_ASSERT(b.src_rows > 0 && tensor_cols > 0 && b.rows > 0 && b.cols > 0);
    TM_ASSERT(col0 >= 0 && col0 + b.src_cols <= tensor_cols);
    TM_ASSERT(tm_tensor_runs(a, s, row, 0, check_run, &b) == TM_OK);
    TM_ASSERT(tm_tensor_runs(a, s, row, experts - 1, check_run, &b) == TM_OK);
}

static void check_rows(const tm_arch *a, const tm_shard *s)
{
    for (int i = 0; i < a->family->row_count; i++) {
        const tm_tensor_row *row = &a->family->rows[i];
        int layers = tm_role_info_get(row->role)->of_layer ? a->layers : 1;
        for (int layer = 0; layer < layers; layer++)
            if (tm_need_met(a, row->need, layer)) {
                check_row(a, s, row);
                break;
            }
    }
}

static void check_rope(const tm_rope *r)
{
    static float freq[4096];
    static const int lengths[] = {0, 1, 1000, 1 << 20};
    float scale;
    TM_ASSERT(r->dim >= 0 && r->dim / 2 <= (int)TM_ARRAY_LEN(freq));
    for (size_t i = 0; i < TM_ARRAY_LEN(lengths); i++) {
        tm_rope_freqs_at(r, tm_rope_class(r, lengths[i]), freq, &scale);
        for (int k = 0; k < r->dim / 2; k++)
            TM_ASSERT(isfinite(freq[k]));
        TM_ASSERT(isfinite(scale));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static tm_arch a; /* large */
    static const int splits[] = {1, 2, 3, 8};
    json_t *root = NULL;
    tm_err err = TM_ERR_INIT;
    if (tm_json_parse((const char *)data, size, &root, &err) != TM_OK)
        return 0;
    tm_status st = tm_arch_read(&a, root, &err);
    json_decref(root);
    if (st != TM_OK) {
        TM_ASSERT(err.msg[0] && !strchr(err.msg, '\n'));
        return 0;
    }
    check_rope(&a.rope);
    check_rope(&a.rope_local);
    for (size_t i = 0; i < TM_ARRAY_LEN(splits); i++)
        for (int rank = 0; rank < splits[i]; rank++) {
            tm_shard s;
            if (tm_shard_make(&s, &a, splits[i], rank, &err) == TM_OK)
                check_rows(&a, &s);
        }
    return 0;
}
