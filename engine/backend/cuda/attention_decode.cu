/* Attention of sequences with one new token, over paged keys and values: bound by reading them once.
 *
 * A block has one sequence, one kv head, up to 8 of the query heads that share it, and one part of the keys; its
 * 4 warps take 16 keys each in turn. Keys are the M side of the tensor core and heads its N side:
 *   S[16 keys, 8 heads] = K Q^T, then O[d, 8 heads] += V^T P^T
 * Both operands of the first product are loaded from memory as they are (a lane owns 8 neighbouring dims); for
 * the second a lane loads its own dims of 4 keys and pairs keys by byte permutes, and P is transposed in
 * registers. So keys and values go through no shared memory, and the loads of the next 16 keys are under way
 * while these are used. The first 16 are asked for before the kernel in front, which makes q, has ended: what older
 * tokens left in the cache is there (launch.cuh), and the new token's key and value are put among them by hand.
 *
 * The parts of one sequence are as many as fill the device (fixed by the number of sequences alone, so that a
 * recorded graph serves every length) and are cut from its length on the device; the last block to finish adds
 * them up in order. With few sequences of a model with few kv heads a step is a chain of short kernels; there the blocks
 * are teams (clusters) that end through shared memory (attention_ends.cuh). Bytes moved: B * K * length * d * 4. */
#include "engine/backend/cuda/attention_ends.cuh"
#include "engine/backend/cuda/launch.cuh"

namespace
{

/* Of a block. A team's has more where registers allow: most sequences are one step for it then. */
constexpr int WARPS = 4;
/* Steps of a block, from which on a part more is worth its share of the end; of a team's, the end without a team. */
constexpr int LONG = 20, LONG_OF_TEAM = 8;
constexpr int TEAM_UNITS = 4; /* sequences times kv heads, at most: with more, teams gain nothing */

/* The warp's tiles behind the one at j into L2: asked for later they would come after weights of the products that follow. */
template <typename T, int D, int W>
__device__ __forceinline__ void prefetch_rest(const decode_args &a, const part &p, int j)
{
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int n = 1; n < LONG_OF_TEAM && j + n * STRIDE<W> < p.stored; n++) {
        const int key = j + n * STRIDE<W> + lane / 2;
        if (key >= p.stored)
            continue;
        const T *of = static_cast<const T *>(lane % 2 ? a.v : a.k) +
                      key_at<T, D>(a, p, __ldcg(p.blocks + (key >> a.block_shift)), key);
        for (int d = 0; d < D; d += 64)
            prefetch_l2(of + d);
    }
}

/* TEAMED: teams of blocks; sequences too long for one team end by tickets. */
template <typename T, int D, int W, bool TEAMED>
__global__ void __launch_bounds__(32 * W, D > 128 ? 1
                                          : W > 4 ? 2
                                                  : 3) decode_kernel(decode_args a)
{
    typedef merge_smem<D, W> merges;
    SHARED(merges, sm);
    SHARED(ticket_smem<D>, ts);
    SHARED(float2[D / 2], cs);
    SHARED(uint4[2 * D / 8], fresh_words);
    T *fresh = reinterpret_cast<T *>(fresh_words); /* [2][D], the new key and value */
    SHARED(uint64_t, sent);
    if (!a.inv_freq) /* alone: keys may be those of the kernel in front */
        wait_previous();
    const part p = find_part<W>(a, TEAMED ? LONG_OF_TEAM : LONG);
    const bool team = TEAMED && p.count > 0 && p.count <= TEAM;
    if (p.index >= (team ? TEAM : p.count)) {
        wait_left_to_others();
        return;
    }
#if defined(HOPPER)
    if constexpr (TEAMED) {
        if (team) {
            expect_shares<D>(p, &sent);
            cluster_arrive();
        }
    }
#endif
    softmax m = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    float o[D / 16][4] = {};
    tile_regs<D> r;
    uint32_t q[D / 8];
    const int j = p.begin + threadIdx.x / 32 * TILE;
    if (j < p.end) {
        const int32_t block = __ldcg(p.blocks + (j >> a.block_shift));
        load_keys<T, D>(r, a, p, block, j);
        load_values<T, D>(r, a, p, block, j);
        if (TEAMED)
            prefetch_rest<T, D, W>(a, p, j);
    }
    if (a.inv_freq) {
        fill_angles<D>(a, p, cs);
        wait_previous();
    }
    start_next();
    load_query<T, D>(q, a, p);
    if constexpr (D % 64 == 0) {
        if (a.inv_freq) {
            if (p.end == p.len && p.begin < p.end)
                append<T, D>(a, p, cs, fresh);
            rotate_query<T, D>(q, cs);
        }
    }
    attend<T, D, W>(a, p, m, o, q, r, j, fresh);
    merge_warps<D, W>(sm, m, o);
#if defined(HOPPER)
    if constexpr (TEAMED) {
        SHARED(team_smem<D>, in);
        if (team) {
            cluster_wait();
            end_by_team<T, D, W>(a, p, sm, in, &sent);
            return;
        }
    }
#endif
    end_by_ticket<T, D, W>(a, p, sm, ts);
}

/* Parts of a unit: as few as leave little of the last round of places empty. */
int find_splits(int units, int places)
{
    int best = 1;
    double best_share = 0.0;
    for (int s = 1; s <= SPLITS_MAX && (s == 1 || units * s <= 4 * places); s++) {
        const double rounds = (double)units * s / places;
        const double share = rounds / ceil(rounds);
        if (share > best_share + 0.03) {
            best = s;
            best_share = share;
        }
        if (rounds > 0.95 && best_share > 0.93)
            break;
    }
    return best;
}

template <typename T, int D> cudaError_t launch_teams(decode_args a, int seqs, const tm_cuda_ctx *c)
{
    constexpr int W = D == 64 ? 8 : WARPS;
    const cudaError_t e = cudaFuncSetAttribute(decode_kernel<T, D, W, true>,
                                               cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    a.few = TEAM;
    /* One team a unit where no sequence becomes too long for it: those that have nothing to do cost, too. */
    const int splits =
        (long)a.max_blocks << a.block_shift <= TEAM * STRIDE<W> * LONG_OF_TEAM ? TEAM : SPLITS_MAX;
    dim3 grid((unsigned)splits, (unsigned)(a.kv_heads * a.head_groups), (unsigned)seqs);
    return e == cudaSuccess
               ? launch_clusters(c, decode_kernel<T, D, W, true>, grid, 32 * W, TEAM, a)
               : e;
}

template <typename T, int D> cudaError_t launch(decode_args a, int seqs, const tm_cuda_ctx *c)
{
    const int units = seqs * a.kv_heads * a.head_groups;
    int splits = find_splits(units, c->sms * (D <= 128 ? 3 : 1));
    if (units > TM_CUDA_TICKETS ||
        (size_t)units * splits * part_floats<D>() * sizeof(float) > TM_CUDA_SCRATCH_BYTES)
        splits = 1;
    /* Two blocks a multiprocessor read as fast as three: with many units, short sequences are spared the end of parts. */
    a.few = units < c->sms * 3 / 4 ? splits : min(splits, (c->sms * 9 / 5 + units - 1) / units);
    if constexpr (D <= 128)
        if (c->tensor_map && units <= TEAM_UNITS)
            return launch_teams<T, D>(a, seqs, c);
    dim3 grid((unsigned)splits, (unsigned)(a.kv_heads * a.head_groups), (unsigned)seqs);
    return launch_kernel(c, decode_kernel<T, D, WARPS, false>, grid, 32 * WARPS, 0, a);
}

template <typename T>
cudaError_t launch_dim(const decode_args &a, int head_dim, int seqs, const tm_cuda_ctx *c)
{
    switch (head_dim) {
    case 64:
        return launch<T, 64>(a, seqs, c);
    case 96:
        return launch<T, 96>(a, seqs, c);
    case 128:
        return launch<T, 128>(a, seqs, c);
    case 256:
        return launch<T, 256>(a, seqs, c);
    default:
        return cudaErrorInvalidValue;
    }
}

} /* namespace */

extern "C" bool tm_cuda_rope_decode_fits(const tm_rope_append_args *r)
{
    return r->rotary_dim == r->head_dim && r->head_dim % 64 == 0 && !r->interleaved &&
           r->logn_len == 0 && r->kv->k != r->kv->v && r->n_heads / r->n_kv_heads <= HEADS;
}

extern "C" bool tm_cuda_attention_decode_fits(int head_dim, int block_tokens)
{
    return (head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256) &&
           block_tokens >= TILE && (block_tokens & (block_tokens - 1)) == 0;
}

extern "C" cudaError_t tm_cuda_attention_decode_launch(const tm_attention_args *a,
                                                       const tm_rope_append_args *r,
                                                       const tm_cuda_ctx *c)
{
    const tm_batch *b = a->batch;
    if (b->n_decode == 0)
        return cudaSuccess;
    if (a->kv->dtype != c->act || !tm_cuda_attention_decode_fits(a->head_dim, a->kv->block_tokens))
        return cudaErrorInvalidValue;
    decode_args d = {};
    d.out = a->out;
    d.qkv = a->qkv;
    d.k = a->kv->k;
    d.v = a->kv->v;
    d.blocks = b->blocks;
    d.kv_len = b->kv_len;
    d.alibi = a->alibi;
    d.scratch = c->scratch;
    d.tickets = c->tickets;
    d.max_blocks = b->max_blocks;
    while (1 << d.block_shift < a->kv->block_tokens)
        d.block_shift++;
    d.heads = a->n_heads;
    d.kv_heads = a->n_kv_heads;
    d.group = a->n_heads / a->n_kv_heads;
    d.head_groups = (d.group + HEADS - 1) / HEADS;
    d.window = a->window;
    if (r) {
        d.inv_freq = r->seq_inv_freq ? r->seq_inv_freq : r->inv_freq;
        d.freq_stride = r->seq_inv_freq ? r->rotary_dim / 2 : 0;
    }
    d.mscale = r ? r->mscale : 1.0f;
    d.scale = a->scale;
    d.softcap = a->softcap;
    d.shaped = a->softcap > 0.0f || a->alibi;
    return c->act == TM_DTYPE_BF16 ? launch_dim<__nv_bfloat16>(d, a->head_dim, b->n_decode, c)
                                   : launch_dim<__half>(d, a->head_dim, b->n_decode, c);
}
