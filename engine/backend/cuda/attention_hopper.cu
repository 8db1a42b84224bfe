/* Causal attention of prompt chunks on Hopper (sm_90a), for heads of 64 and 128: bound by tensor cores.
 *
 * A block stays on its multiprocessor and takes item after item: 128 rows of one sequence and one query head. One warp
 * has the copy engine bring queries, keys and values as swizzled tiles (hopper.cuh); two warpgroups of 64 rows each
 * multiply. Keys and values pass through two slots each, 128 at a time from the last ones down; queries have two slots,
 * so that the next item's are there early. Four lanes that share a row of the results put together what each of them writes.
 *
 * Within a warpgroup, the scores of the next keys are enqueued in front of the weighted sum of the last ones, so the
 * softmax of the scores runs beside that sum; and the warpgroups take turns with the tensor cores: one multiplies
 * while the other has its softmax. The packed scores are the operand of the sum, as in attention_prefill.cu.
 *
 * Items are dealt by a counter, the longest first; heads of one kv head are neighbours. */
#include "engine/backend/cuda/hopper.cuh"
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/mma.cuh"
#include "engine/backend/cuda/prefill.cuh"
#include "engine/backend/cuda/softmax.cuh"

namespace
{

constexpr int GROUP = 128;         /* threads of a warpgroup */
constexpr int THREADS = 3 * GROUP; /* one copies, two multiply */
constexpr int CONSUMERS = 2 * 4;   /* warps that multiply */
constexpr int ROWS = 128;          /* of an item */
constexpr int KEYS = 128;          /* of a tile */
constexpr int BOX = 64;            /* rows and columns of one copy */
constexpr int BOX_BYTES = BOX * BOX * 2;
constexpr int WIDE = ROWS * BOX * 2; /* bytes of 64 columns of a tile */
constexpr int SLOTS = 2;

enum { TURN = 1 }; /* barriers by number: whose turn it is */

struct hopper_args {
    CUtensorMap q, k, v;
    prefill_args p;
    int *next; /* item that nobody has taken, less the first of every block; 0 between launches */
    int items;
};

/* What the copying warp tells the others about an item; rows 0: there are no more. */
struct item {
    int head, row0, rows, pos0, last; /* last: first key of the last tile */
};

struct control {
    uint64_t q_full[SLOTS], q_empty[SLOTS], k_full[SLOTS], k_empty[SLOTS], v_full[SLOTS],
        v_empty[SLOTS], v_part;
    item items[SLOTS];
};

template <int D> struct geometry {
    enum {
        COLUMNS = D / BOX,
        TILE = COLUMNS * WIDE, /* bytes; rows of Q and keys are as many */
        Q = 0,
        K = SLOTS * TILE,
        V = 2 * SLOTS * TILE,
        CONTROL = 3 * SLOTS * TILE
    };
    static constexpr size_t SMEM = 1024 + CONTROL + sizeof(control);
};
static_assert(ROWS == KEYS, "tiles of one size");

#if defined(HOPPER)

/* The tiles begin at a multiple of 1024 bytes. */
__device__ __forceinline__ char *tiles_begin(void *smem)
{
    return static_cast<char *>(smem) + (1024 - shared_address(smem) % 1024) % 1024;
}

/* ---- the warp that copies ---- */

/* Where the two boxes of the keys from j on are in the cache's map; negative: behind the sequence. */
struct box_rows {
    int y[KEYS / BOX];
};

__device__ __forceinline__ box_rows find_boxes(const prefill_args &a, const tile &t, int kv_head,
                                               int j)
{
    const int boxes = a.block_tokens / BOX; /* of a block */
    box_rows r;
#pragma unroll
    for (int i = 0; i < KEYS / BOX; i++) {
        const int box = j / BOX + i;
        r.y[i] = -1;
        if (box * BOX < t.len)
            r.y[i] =
                (t.blocks[box / boxes] * a.kv_heads + kv_head) * a.block_tokens + box % boxes * BOX;
    }
    return r;
}

/* By one lane. */
template <int D>
__device__ __forceinline__ void load_boxes(char *to, const CUtensorMap *map, const box_rows &r,
                                           uint64_t *full)
{
    int bytes = 0;
#pragma unroll
    for (int i = 0; i < KEYS / BOX; i++)
        bytes += r.y[i] >= 0 ? geometry<D>::COLUMNS * BOX_BYTES : 0;
    barrier_expect(full, bytes);
#pragma unroll
    for (int i = 0; i < KEYS / BOX; i++)
#pragma unroll
        for (int c = 0; c < geometry<D>::COLUMNS; c++)
            if (r.y[i] >= 0)
                tile_load(to + c * WIDE + i * BOX_BYTES, map, c * BOX, r.y[i], full);
}

/* Values of the last tile of a sequence: weights are 0 behind its end, and what lies there may be no number. */
template <int D>
__device__ __forceinline__ void load_last_values(char *to, const CUtensorMap *map,
                                                 const box_rows &r, int valid, uint64_t *part,
                                                 int parity, uint64_t *full)
{
    const int lane = threadIdx.x % 32;
    if (lane == 0)
        load_boxes<D>(to, map, r, part);
    barrier_wait(part, parity);
    for (int i = lane; i < geometry<D>::COLUMNS * (KEYS - valid) * 8; i += 32) {
        const int c = i / ((KEYS - valid) * 8), at = i % ((KEYS - valid) * 8);
        *reinterpret_cast<uint4 *>(to + c * WIDE + valid * 128 + at * 16) = make_uint4(0, 0, 0, 0);
    }
    fence_async();
    __syncwarp();
    if (lane == 0)
        barrier_arrive(full);
}

template <int D>
__device__ __forceinline__ void load_queries(const hopper_args &a, char *to, const item &it,
                                             uint64_t *full)
{
    barrier_expect(full, geometry<D>::TILE);
#pragma unroll
    for (int i = 0; i < ROWS / BOX; i++)
#pragma unroll
        for (int c = 0; c < geometry<D>::COLUMNS; c++)
            tile_load(to + c * WIDE + i * BOX_BYTES, &a.q, it.head * D + c * BOX, it.row0 + i * BOX,
                      full);
}

/* Keys and values of one item; `done` tiles have passed through the slots before. */
template <int D>
__device__ __forceinline__ void copy_item(const hopper_args &a, const tile &t, int kv_head,
                                          int last, char *tiles, control *c, int done, int &parts)
{
    using g = geometry<D>;
    const bool first_lane = threadIdx.x % 32 == 0;
    box_rows now, next = find_boxes(a.p, t, kv_head, last);
    for (int i = -1, j = last + KEYS; j >= 0; i++, j -= KEYS) {
        if (j > 0) { /* keys i + 1 */
            const int n = done + i + 1, s = n % SLOTS;
            barrier_wait(&c->k_empty[s], (n / SLOTS + 1) % 2);
            if (first_lane)
                load_boxes<D>(tiles + g::K + s * g::TILE, &a.k, next, &c->k_full[s]);
        }
        if (i >= 0) { /* values i */
            const int n = done + i, s = n % SLOTS;
            char *to = tiles + g::V + s * g::TILE;
            barrier_wait(&c->v_empty[s], (n / SLOTS + 1) % 2);
            if (j + KEYS > t.len)
                load_last_values<D>(to, &a.v, now, t.len - j, &c->v_part, parts++ % 2,
                                    &c->v_full[s]);
            else if (first_lane)
                load_boxes<D>(to, &a.v, now, &c->v_full[s]);
        }
        now = next;
        if (j > KEYS)
            next = find_boxes(a.p, t, kv_head, j - 2 * KEYS);
    }
}

template <int D>
__device__ __forceinline__ void copy_items(const hopper_args &a, char *tiles, control *c)
{
    using g = geometry<D>;
    const int lane = threadIdx.x % 32;
    int done = 0, parts = 0, n = 0, following = 0;
    for (int index = blockIdx.x; index < a.items;
         index = (int)gridDim.x + __shfl_sync(0xffffffffu, following, 0)) {
        if (lane == 0) /* every item asks once: the last one sets the counter back to 0 */
            following = (int)atomicInc(reinterpret_cast<unsigned *>(a.next), (unsigned)a.items - 1);
        tile t;
        if (!find_tile(a.p, ROWS, index / a.p.heads, &t))
            continue;
        const int s = n % SLOTS, head = index % a.p.heads;
        const item it = {head, t.row0, t.rows, t.pos0, (t.pos0 + t.rows - 1) / KEYS * KEYS};
        barrier_wait(&c->q_empty[s], (n / SLOTS + 1) % 2);
        if (lane == 0) {
            c->items[s] = it;
            load_queries<D>(a, tiles + g::Q + s * g::TILE, it, &c->q_full[s]);
        }
        copy_item<D>(a, t, head / (a.p.heads / a.p.kv_heads), it.last, tiles, c, done, parts);
        done += it.last / KEYS + 1;
        n++;
    }
    barrier_wait(&c->q_empty[n % SLOTS], (n / SLOTS + 1) % 2);
    if (lane == 0) {
        c->items[n % SLOTS].rows = 0;
        barrier_arrive(&c->q_full[n % SLOTS]);
    }
}

/* ---- the warpgroups that multiply ---- */

/* Of a thread: rows g and g + 8 of the warp's 16. */
template <int D> struct rows {
    float o[D / 2];
    float s[KEYS / 2];
    uint32_t p[KEYS / 16][4];
    float m[2], l[2]; /* l is the thread's own share */
};

template <typename T, int D>
__device__ __forceinline__ void scores(rows<D> &w, uint64_t q, uint64_t k)
{
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
        const int at = c / 4 * WIDE + c % 4 * 32;
        if (c == 0)
            product_shared<T, false>(w.s, q, k);
        else
            product_shared<T, true>(w.s, operand_at(q, at), operand_at(k, at));
    }
    products_commit();
}

template <typename T, int D> __device__ __forceinline__ void weigh(rows<D> &w, uint64_t v)
{
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++)
        product_registers<T>(w.o, w.p[k], operand_at(v, k * 16 * 128));
    products_commit();
}

/* Keys behind the row: `ahead` is the position of the thread's first row less its first key. */
template <int D> __device__ __forceinline__ void mask_scores(rows<D> &w, int ahead)
{
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
        if (i / 4 * 8 + i % 2 > ahead + i / 2 % 2 * 8)
            w.s[i] = -INFINITY;
}

/* Scores become weights, 2^(factor * s - m); corr: what o has to be multiplied with. */
template <int D> __device__ __forceinline__ void soften(rows<D> &w, float factor, float (&corr)[2])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 2 * h; i < KEYS / 2; i += 4)
            top[0] = fmaxf(top[0], w.s[i]), top[1] = fmaxf(top[1], w.s[i + 1]);
        float max = fmaxf(top[0], top[1]);
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
        max = fmaxf(w.m[h], whole_maximum(max * factor));
        const float safe = max == -INFINITY ? 0.0f : max;
        corr[h] = power2(w.m[h] - safe);
        w.m[h] = max;
#pragma unroll
        for (int i = 2 * h; i < KEYS / 2; i += 4)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                w.s[i + e] = power2(w.s[i + e] * factor - safe);
                sum[e] += w.s[i + e];
            }
        w.l[h] = w.l[h] * corr[h] + (sum[0] + sum[1]);
    }
}

template <typename T, int D> __device__ __forceinline__ void pack_weights(rows<D> &w)
{
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++)
        w.p[i / 4][i % 4] = pack2<T>(w.s[2 * i], w.s[2 * i + 1]);
}

/* Number i of lane t becomes number t of lane i, for the four lanes that share a row. */
__device__ __forceinline__ void turn_four(uint32_t (&v)[4])
{
#pragma unroll
    for (int far = 1; far < 4; far *= 2) {
        const bool upper = threadIdx.x & far;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int lo = far == 1 ? 2 * k : k, hi = lo + far;
            const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? v[lo] : v[hi], far);
            v[lo] = upper ? other : v[lo];
            v[hi] = upper ? v[hi] : other;
        }
    }
}

/* A lane has two neighbouring columns of eight; it writes eight of the fourth part of them, 16 bytes at a time. */
template <typename T, int D>
__device__ __forceinline__ void store_rows(const prefill_args &a, const item &it, const rows<D> &w,
                                           int group)
{
    const int lane = threadIdx.x % 32, row0 = group * 64 + threadIdx.x / 32 % 4 * 16;
    T *out = static_cast<T *>(a.out) + ((size_t)it.row0 * a.heads + it.head) * D;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float l = w.l[h];
        l += __shfl_xor_sync(0xffffffffu, l, 1);
        l += __shfl_xor_sync(0xffffffffu, l, 2);
        const float f = l > 0.0f ? 1.0f / l : 0.0f; /* rows behind the item's end may see nothing */
        const int row = row0 + h * 8 + lane / 4;
#pragma unroll
        for (int i = 0; i < D / 8; i += 4) {
            uint32_t v[4];
#pragma unroll
            for (int e = 0; e < 4; e++)
                v[e] = pack2<T>(w.o[(i + e) * 4 + h * 2] * f, w.o[(i + e) * 4 + h * 2 + 1] * f);
            turn_four(v);
            if (row < it.rows)
                *reinterpret_cast<uint4 *>(out + (size_t)row * a.heads * D + (i + lane % 4) * 8) =
                    make_uint4(v[0], v[1], v[2], v[3]);
        }
    }
}

/* The slot's next content may come; once per warp. */
__device__ __forceinline__ void release(uint64_t *empty)
{
    if (threadIdx.x % 32 == 0)
        barrier_arrive(empty);
}

/* The rows of one warpgroup; `done` tiles have passed through the slots before. */
template <typename T, int D>
__device__ __forceinline__ void attend(const hopper_args &a, const item &it, rows<D> &w, char *q,
                                       char *tiles, control *c, int group, int done)
{
    using g = geometry<D>;
    const float factor = a.p.scale * LOG2E;
    const int pos = it.pos0 + group * 64,
              mine = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 - threadIdx.x % 4 * 2;
    const uint64_t queries = tile_operand(q + group * 64 * 128, 16);
    const uint64_t keys = tile_operand(tiles + g::K, 16);
    const uint64_t values = tile_operand(tiles + g::V, WIDE);
    float corr[2];
#pragma unroll
    for (int i = 0; i < D / 2; i++)
        w.o[i] = 0.0f;
    w.m[0] = w.m[1] = -INFINITY;
    w.l[0] = w.l[1] = 0.0f;

    int s = done % SLOTS, parity = done / SLOTS % 2;
    barrier_wait(&c->k_full[s], parity);
    products_begin();
    scores<T>(w, queries, operand_at(keys, s * g::TILE));
    products_wait<0>(w.s);
    release(&c->k_empty[s]);
    if (it.last + KEYS > pos + 1)
        mask_scores(w, pos + mine - it.last);
    soften(w, factor, corr);
    pack_weights<T>(w);
    for (int j = it.last - KEYS; j >= 0; j -= KEYS) {
        const int before = s, before_parity = parity;
        s = ++done % SLOTS, parity = done / SLOTS % 2;
        barrier_wait(&c->k_full[s], parity);
        turn_wait<2 * GROUP>(TURN + group);
        products_begin();
        scores<T>(w, queries, operand_at(keys, s * g::TILE));
        barrier_wait(&c->v_full[before], before_parity);
        products_begin();
        weigh<T>(w, operand_at(values, before * g::TILE));
        turn_pass<2 * GROUP>(TURN + 1 - group);
        products_wait<1>(w.s);
        release(&c->k_empty[s]);
        if (j + KEYS > pos + 1)
            mask_scores(w, pos + mine - j);
        soften(w, factor, corr);
        products_wait<0>(w.o);
        release(&c->v_empty[before]);
        pack_weights<T>(w);
#pragma unroll
        for (int i = 0; i < D / 2; i++)
            w.o[i] *= corr[i / 2 % 2];
    }
    barrier_wait(&c->v_full[s], parity);
    products_begin();
    weigh<T>(w, operand_at(values, s * g::TILE));
    products_wait<0>(w.o);
    release(&c->v_empty[s]);
}

/* By a warp: the lane that reads it is the one that gives the slot back. */
__device__ __forceinline__ item take_item(const item *from)
{
    item it = {};
    if (threadIdx.x % 32 == 0)
        it = *from;
    it.head = __shfl_sync(0xffffffffu, it.head, 0);
    it.row0 = __shfl_sync(0xffffffffu, it.row0, 0);
    it.rows = __shfl_sync(0xffffffffu, it.rows, 0);
    it.pos0 = __shfl_sync(0xffffffffu, it.pos0, 0);
    it.last = __shfl_sync(0xffffffffu, it.last, 0);
    return it;
}

template <typename T, int D>
__device__ __forceinline__ void multiply_items(const hopper_args &a, char *tiles, control *c,
                                               int group)
{
    using g = geometry<D>;
    int done = 0, n = 0;
    if (group == 1)
        turn_pass<2 * GROUP>(TURN); /* group 0 is the first */
    for (;; n++) {
        const int s = n % SLOTS;
        char *q = tiles + g::Q + s * g::TILE;
        barrier_wait(&c->q_full[s], n / SLOTS % 2);
        const item it = take_item(&c->items[s]);
        if (it.rows == 0)
            break;
        rows<D> w;
        attend<T>(a, it, w, q, tiles, c, group, done);
        done += it.last / KEYS + 1;
        release(&c->q_empty[s]);
        store_rows<T>(a.p, it, w, group);
    }
    if (group == 0)
        turn_wait<2 * GROUP>(TURN); /* the turn that is left over */
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1) hopper_kernel(const __grid_constant__ hopper_args a)
{
    DYNAMIC_SHARED(uint4, smem);
    char *tiles = tiles_begin(smem);
    control *c = reinterpret_cast<control *>(tiles + geometry<D>::CONTROL);
    const int group = __shfl_sync(0xffffffffu, (int)threadIdx.x / GROUP, 0);
    if (threadIdx.x == 0) {
        for (int s = 0; s < SLOTS; s++) {
            barrier_init(&c->q_full[s], 1), barrier_init(&c->q_empty[s], CONSUMERS);
            barrier_init(&c->k_full[s], 1), barrier_init(&c->k_empty[s], CONSUMERS);
            barrier_init(&c->v_full[s], 1), barrier_init(&c->v_empty[s], CONSUMERS);
        }
        barrier_init(&c->v_part, 1);
        barriers_made();
        prefetch_map(&a.q), prefetch_map(&a.k), prefetch_map(&a.v);
    }
    __syncthreads();
    wait_previous();
    start_next();
    if (group == 0) {
        give_registers<40>();
        fence_async();
        if (threadIdx.x < 32)
            copy_items<D>(a, tiles, c);
    } else {
        take_registers<232>();
        multiply_items<T, D>(a, tiles, c, group - 1);
    }
}

#else

/* Not for this processor, and not started there. */
template <typename T, int D> __global__ void hopper_kernel(const __grid_constant__ hopper_args a)
{
    (void)a;
    __trap();
}

#endif

/* ---- launching ---- */

typedef CUresult (*encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                              const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                              const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* A matrix of 16-bit numbers, of which boxes are copied. */
cudaError_t make_map(const tm_cuda_ctx *c, CUtensorMap *map, const void *p, uint64_t columns,
                     uint64_t height)
{
    const encode_fn encode = reinterpret_cast<encode_fn>(c->tensor_map);
    const cuuint64_t size[2] = {columns, height}, pitch[1] = {columns * 2};
    const cuuint32_t box[2] = {BOX, BOX}, step[2] = {1, 1};
    const CUresult r =
        encode(map,
               c->act == TM_DTYPE_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
               2, const_cast<void *>(p), size, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename T, int D> cudaError_t launch(const hopper_args &a, const tm_cuda_ctx *c)
{
    const dim3 grid((unsigned)min(a.items, c->sms));
    return launch_kernel(c, hopper_kernel<T, D>, grid, THREADS, geometry<D>::SMEM, a);
}

} /* namespace */

extern "C" bool tm_cuda_attention_hopper_fits(const tm_attention_args *a, const tm_cuda_ctx *c)
{
    const tm_kv_layer *kv = a->kv;
    return c->tensor_map && (a->head_dim == 64 || a->head_dim == 128) && kv->dtype == c->act &&
           kv->block_tokens % BOX == 0 && a->window == 0 && a->softcap <= 0.0f && !a->alibi &&
           (int64_t)kv->n_blocks * kv->n_kv_heads * kv->block_tokens < INT32_MAX &&
           (uintptr_t)a->qkv % 16 == 0 && (uintptr_t)kv->k % 16 == 0 && (uintptr_t)kv->v % 16 == 0;
}

extern "C" cudaError_t tm_cuda_attention_hopper_launch(const tm_attention_args *a,
                                                       const tm_cuda_ctx *c)
{
    const tm_batch *b = a->batch;
    const tm_kv_layer *kv = a->kv;
    if (b->n_seqs == b->n_decode)
        return cudaSuccess;
    hopper_args h = {};
    h.p = prefill_args_of(a);
    h.next = c->tickets;
    h.items = tiles_at_most(b, ROWS) * a->n_heads;
    const uint64_t d = (uint64_t)a->head_dim,
                   keys = (uint64_t)kv->n_blocks * (uint64_t)(kv->n_kv_heads * kv->block_tokens);
    cudaError_t e = make_map(c, &h.q, a->qkv, (uint64_t)(a->n_heads + 2 * a->n_kv_heads) * d,
                             (uint64_t)b->n_tokens);
    if (e == cudaSuccess)
        e = make_map(c, &h.k, kv->k, d, keys);
    if (e == cudaSuccess)
        e = make_map(c, &h.v, kv->v, d, keys);
    if (e != cudaSuccess)
        return e;
    if (c->act == TM_DTYPE_BF16)
        return d == 64 ? launch<__nv_bfloat16, 64>(h, c) : launch<__nv_bfloat16, 128>(h, c);
    return d == 64 ? launch<__half, 64>(h, c) : launch<__half, 128>(h, c);
}
