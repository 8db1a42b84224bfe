/* Inside the mixture of experts: what its kernels share.
 *
 * A pair is a token and one of its chosen experts, pair t * k + j. Sorted by expert, pairs become items: up to
 * `item_rows` pairs of one expert. Their number is known on the device alone, so grids are sized by the maximum and
 * blocks without an item end at once: the launches are the same for every routing, as a recorded graph wants. */
#ifndef TM_ENGINE_BACKEND_CUDA_MOE_CUH
#define TM_ENGINE_BACKEND_CUDA_MOE_CUH

#include "engine/backend/cuda/launch.cuh"

constexpr int MOE_EXPERTS_MAX = 1024;
constexpr int MOE_STREAM_ROWS = 8; /* pairs of an item on the way of few tokens */

struct moe_item {
    int expert, first, rows; /* places first .. first + rows - 1 of the order */
};

/* One of the two products over all items. */
struct moe_product {
    const void *x; /* rows of k numbers: gate_up reads row order[i] / top_k, down row i */
    const void *w; /* of all experts: [2 n, k] each, gate rows first, or [n, k] */
    void *out;     /* [pairs, n]: gate_up writes row i, down row order[i] */
    const int32_t *order;
    const moe_item *items;
    const int *n_items;
    int max_items, top_k, n, k;
    tm_act_kind act;
};

/* moe_stream.cu: items of at most 8 pairs; the weights are streamed. moe_tiles.cu: items of `rows` pairs, 64 or 128. */
cudaError_t moe_stream_launch(const moe_product &p, bool gated, const tm_cuda_ctx *c);
cudaError_t moe_tiles_launch(const moe_product &p, bool gated, int rows, const tm_cuda_ctx *c);

#endif
