/* What the kernels of prompt attention share: their arguments, and the tiles of rows that a batch falls into. */
#ifndef TM_ENGINE_BACKEND_CUDA_PREFILL_CUH
#define TM_ENGINE_BACKEND_CUDA_PREFILL_CUH

#include "engine/backend/cuda/kernels.h"
#include "engine/backend/cuda/ptx.cuh"

struct prefill_args {
    void *out;
    const void *qkv, *k, *v;
    const int32_t *blocks, *seq_begin, *kv_len;
    const float *alibi;
    int max_blocks, block_tokens, heads, kv_heads, window, first_seq, seqs;
    float scale, softcap;
};

struct tile {
    int seq, row0, rows; /* rows of the batch: row0 .. row0 + rows - 1 */
    int pos0, len;       /* position of row0; keys of the sequence */
    const int32_t *blocks;
};

/* Tile `index` counted from the end, so that within a sequence the longest come first. */
__device__ inline bool find_tile(const prefill_args &a, int rows, int index, tile *out)
{
    for (int s = a.seqs - 1; s >= a.first_seq; s--) {
        const int begin = a.seq_begin[s], n = a.seq_begin[s + 1] - begin;
        const int tiles = (n + rows - 1) / rows;
        if (index >= tiles) {
            index -= tiles;
            continue;
        }
        const int at = (tiles - 1 - index) * rows;
        out->seq = s;
        out->row0 = begin + at;
        out->rows = min(rows, n - at);
        out->len = a.kv_len[s];
        out->pos0 = out->len - n + at;
        out->blocks = a.blocks + (size_t)s * a.max_blocks;
        return true;
    }
    return false;
}

/* Every sequence may end with a tile that is not full. */
inline int tiles_at_most(const tm_batch *b, int rows)
{
    return (b->n_tokens - b->n_decode) / rows + b->n_seqs - b->n_decode;
}

inline prefill_args prefill_args_of(const tm_attention_args *a)
{
    const tm_batch *b = a->batch;
    prefill_args p = {};
    p.out = a->out;
    p.qkv = a->qkv;
    p.k = a->kv->k;
    p.v = a->kv->v;
    p.blocks = b->blocks;
    p.seq_begin = b->seq_begin;
    p.kv_len = b->kv_len;
    p.alibi = a->alibi;
    p.max_blocks = b->max_blocks;
    p.block_tokens = a->kv->block_tokens;
    p.heads = a->n_heads;
    p.kv_heads = a->n_kv_heads;
    p.window = a->window;
    p.first_seq = b->n_decode;
    p.seqs = b->n_seqs;
    p.scale = a->scale;
    p.softcap = a->softcap;
    return p;
}

#endif
