/* Attention for the shapes that the two fast kernels leave out: every head size that is a multiple of 8 up to 576,
 * every block size, prompts and decodes alike. Latent attention (576 numbers, keys that are their values, all heads on
 * one kv head) is the case that matters; there it reads each key once for 64 heads.
 *
 * A block has 64 rows, which are pairs of a token and a query head of one kv head (row r: token r / group, head
 * r % group), one kv head, and one part of the keys. Keys pass through shared memory 32 at a time. Of the
 * scores each of the 8 warps computes 16 rows x 16 keys; the weights go through shared memory, and of the weighted sum
 * each warp has all rows of every eighth run of 8 dims, so that the sums of 64 x 576 numbers fit in registers.
 * Two buffers: keys and values in turn, or, where they are the same, this tile and the next. Rows of shared memory are
 * an odd multiple of 16 bytes: no bank conflicts. Dims behind the head (to a multiple of 16) are zeros.
 *
 * Decodes are cut into parts by their length on the device; the number of parts depends on the batch's shape alone. A
 * second kernel, a block per row, adds them up in order: one block for 64 rows would take longer than the attention
 * itself. Bytes moved: for every 64 rows the keys and values that they see, once. */
#include "engine/backend/cuda/launch.cuh"
#include "engine/backend/cuda/mma.cuh"
#include "engine/backend/cuda/softmax.cuh"

namespace
{

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int ROWS = 64, KEYS = 32;
constexpr int P_LD = KEYS + 8;
constexpr int MERGE_THREADS = 128;
constexpr int SPLITS_MAX = 64;

struct any_args {
    void *out;
    const void *qkv, *k, *v;
    const int32_t *blocks, *seq_begin, *kv_len;
    const float *alibi;
    float *scratch;
    int max_blocks, block_tokens, heads, kv_heads, group, d, ld, window;
    int first_seq, end_seq, splits;
    int seq_tiles; /* row tiles of a sequence with one token; 0: prompts */
    float scale, softcap;
};

/* Rows of one sequence and one kv head, and their part of the keys. */
struct tile {
    int seq, token0, rows,
        row0;      /* token0: of the sequence, in the batch; rows row0 .. row0 + rows - 1 */
    int pos0, len; /* position of token0; keys of the sequence */
    int kv_head, begin, end, part, parts;
    const int32_t *blocks;
};

/* What warps tell one another. */
struct any_smem {
    float max[2][ROWS], sum[2][ROWS]; /* of the two halves of a tile's keys */
    float corr[ROWS];                 /* what earlier sums are multiplied by */
};

/* Rows row0 .. of sequence s, whose n tokens begin at row token0 of the batch. */
__device__ bool set_rows(const any_args &a, tile *t, int s, int token0, int n, int row0)
{
    t->seq = s;
    t->token0 = token0;
    t->row0 = row0;
    t->rows = min(ROWS, n * a.group - row0);
    t->len = a.kv_len[s];
    t->pos0 = t->len - n;
    t->blocks = a.blocks + (size_t)s * a.max_blocks;
    return t->len > 0;
}

/* Tile `index`; of prompts counted from the last row of the last sequence, so that the longest of a sequence come
 * first. */
__device__ bool find_rows(const any_args &a, int index, tile *t)
{
    if (a.seq_tiles > 0)
        return set_rows(a, t, index / a.seq_tiles, index / a.seq_tiles, 1,
                        index % a.seq_tiles * ROWS);
    for (int s = a.end_seq - 1; s >= a.first_seq; s--) {
        const int begin = a.seq_begin[s], n = a.seq_begin[s + 1] - begin;
        const int tiles = (n * a.group + ROWS - 1) / ROWS;
        if (index < tiles)
            return set_rows(a, t, s, begin, n, (tiles - 1 - index) * ROWS);
        index -= tiles;
    }
    return false;
}

/* The keys that some row of the tile sees, and the block's part of them. */
__device__ bool find_part(const any_args &a, int part, tile *t)
{
    const int first_pos = t->pos0 + t->row0 / a.group;
    const int last_pos = t->pos0 + (t->row0 + t->rows - 1) / a.group;
    const int first = a.window > 0 ? max(first_pos - a.window + 1, 0) / KEYS * KEYS : 0;
    const int units = (last_pos + 1 - first + KEYS - 1) / KEYS;
    const int each = (units + a.splits - 1) / a.splits;
    t->part = part;
    t->parts = (units + each - 1) / each;
    t->begin = first + t->part * each * KEYS;
    t->end = min(t->begin + each * KEYS, last_pos + 1);
    return t->part < t->parts;
}

/* A row of the head's numbers into shared memory by `lanes` threads, of which this is number `lane`; zeros behind the
 * numbers, and instead of a row that is not there. */
template <typename T>
__device__ __forceinline__ void copy_row(const any_args &a, T *to, const T *from, bool there,
                                         int lane, int lanes)
{
    for (int c = lane * 8; c < a.ld - 8; c += lanes * 8) {
        const bool valid = there && c < a.d;
        copy_async(to + c, valid ? from + c : from, valid);
    }
}

/* KEYS rows of the cache from key j0 on; nothing behind the part's end. */
template <typename T>
__device__ void copy_keys(const any_args &a, const tile &t, const void *cache, T *to, int j0)
{
    constexpr int LANES = THREADS / KEYS;
    const int row = threadIdx.x / LANES, key = j0 + row;
    const T *from = static_cast<const T *>(cache);
    if (key < t.end) {
        const size_t block = t.blocks[key / a.block_tokens];
        from += ((block * a.kv_heads + t.kv_head) * a.block_tokens + key % a.block_tokens) * a.d;
    }
    copy_row(a, to + row * a.ld, from, key < t.end, threadIdx.x % LANES, LANES);
    copy_commit();
}

template <typename T> __device__ void copy_queries(const any_args &a, const tile &t, T *to)
{
    constexpr int LANES = THREADS / ROWS;
    const int r = threadIdx.x / LANES, row = t.row0 + r;
    const size_t row_size = (size_t)(a.heads + 2 * a.kv_heads) * a.d;
    const T *from = static_cast<const T *>(a.qkv);
    if (r < t.rows)
        from += (t.token0 + row / a.group) * row_size +
                (size_t)(t.kv_head * a.group + row % a.group) * a.d;
    copy_row(a, to + r * a.ld, from, r < t.rows, threadIdx.x % LANES, LANES);
    copy_commit();
}

/* The two rows of the score tile that a lane has: g and g + 8 of its warp's 16. */
struct lane_rows {
    int pos[2];
    float slope[2], max[2], sum[2];
};

__device__ lane_rows make_rows(const any_args &a, const tile &t)
{
    lane_rows r;
    for (int h = 0; h < 2; h++) {
        const int in = threadIdx.x / 32 % 4 * 16 + h * 8 + threadIdx.x % 32 / 4;
        const int row =
            t.row0 + min(in, t.rows - 1); /* rows behind the end compute what the last does */
        r.pos[h] = t.pos0 + row / a.group;
        r.slope[h] = a.alibi ? a.alibi[t.kv_head * a.group + row % a.group] : 0.0f;
        r.max[h] = -INFINITY;
        r.sum[h] = 0.0f;
    }
    return r;
}

/* s[16 rows of the warp, its 16 keys] = Q K^T, scaled, capped, biased, in powers of two; what a row does not see is
 * minus infinity. */
template <typename T>
__device__ void score(const any_args &a, const tile &t, const lane_rows &r, const T *q, const T *k,
                      int j0, float (&s)[2][4])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const T *x = q + (warp % 4 * 16 + lane % 16) * a.ld + lane / 16 * 8;
    const T *y = k + (warp / 4 * 16 + lane / 16 * 8 + lane % 8) * a.ld + lane / 8 % 2 * 8;
    for (int n = 0; n < 2; n++)
        s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll 4
    for (int c = 0; c < a.ld - 8; c += 16) {
        uint32_t u[4], v[4];
        load_matrix(u, x + c);
        load_matrix(v, y + c);
        mma<T>(s[0], u[0], u[1], u[2], u[3], v[0], v[1]);
        mma<T>(s[1], u[0], u[1], u[2], u[3], v[2], v[3]);
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int key = j0 + warp / 4 * 16 + n * 8 + lane % 4 * 2 + e % 2, p = r.pos[e / 2];
            float v = s[n][e] * a.scale;
            if (a.softcap > 0.0f)
                v = a.softcap * tanhf(v / a.softcap);
            v = (v + r.slope[e / 2] * (float)(key - p)) * LOG2E;
            const bool seen = key <= p && key < t.end && (a.window <= 0 || key > p - a.window);
            s[n][e] = seen ? v : -INFINITY;
        }
}

/* The largest score of each of a lane's rows over the warp's keys, for the other half to read. */
__device__ void share_max(any_smem &sm, const float (&s)[2][4])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int h = 0; h < 2; h++) {
        float top = fmaxf(fmaxf(s[0][2 * h], s[0][2 * h + 1]), fmaxf(s[1][2 * h], s[1][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        if (lane % 4 == 0)
            sm.max[warp / 4][warp % 4 * 16 + h * 8 + lane / 4] = top;
    }
}

/* Scores become weights in shared memory, [ROWS][P_LD]; the row's sum is the lane's own share. */
template <typename T>
__device__ void soften(any_smem &sm, lane_rows &r, const float (&s)[2][4], T *weights)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int h = 0; h < 2; h++) {
        const int row = warp % 4 * 16 + h * 8 + lane / 4;
        const float top = fmaxf(r.max[h], whole_maximum(fmaxf(sm.max[0][row], sm.max[1][row])));
        const float safe = top == -INFINITY ? 0.0f : top;
        const float corr = power2(r.max[h] - safe);
        if (warp < 4 && lane % 4 == 0)
            sm.corr[row] = corr;
        r.max[h] = top;
        r.sum[h] *= corr;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float u = power2(s[n][2 * h] - safe), v = power2(s[n][2 * h + 1] - safe);
            r.sum[h] += u + v;
            *reinterpret_cast<uint32_t *>(weights + row * P_LD + warp / 4 * 16 + n * 8 +
                                          lane % 4 * 2) = pack2<T>(u, v);
        }
    }
}

/* O[all rows, the warp's dims] = corr * O + P V. RUNS: runs of 8 dims of a warp at most. */
template <typename T, int RUNS>
__device__ void weigh(const any_args &a, const any_smem &sm, const T *weights, const T *v,
                      float (&o)[4][RUNS][4])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t p[4][2][4];
#pragma unroll
    for (int m = 0; m < 4; m++) {
        const float f0 = sm.corr[m * 16 + lane / 4], f1 = sm.corr[m * 16 + 8 + lane / 4];
#pragma unroll
        for (int i = 0; i < RUNS; i++)
            o[m][i][0] *= f0, o[m][i][1] *= f0, o[m][i][2] *= f1, o[m][i][3] *= f1;
#pragma unroll
        for (int k = 0; k < 2; k++)
            load_matrix(p[m][k], weights + (m * 16 + lane % 16) * P_LD + k * 16 + lane / 16 * 8);
    }
#pragma unroll
    for (int i = 0; i < RUNS; i++) {
        const int dim = (warp + i * WARPS) * 8;
        if (dim >= a.d)
            break;
        uint32_t b[4]; /* 32 keys by 8 dims */
        load_matrix_trans(b, v + lane * a.ld + dim);
#pragma unroll
        for (int m = 0; m < 4; m++) {
            mma<T>(o[m][i], p[m][0][0], p[m][0][1], p[m][0][2], p[m][0][3], b[0], b[1]);
            mma<T>(o[m][i], p[m][1][0], p[m][1][1], p[m][1][2], p[m][1][3], b[2], b[3]);
        }
    }
}

/* Sums and maxima of all rows into sm.sum[0] and sm.max[0]. */
__device__ void share_sums(any_smem &sm, lane_rows &r)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads(); /* the last tile's maxima have been read */
    for (int h = 0; h < 2; h++) {
        const int row = warp % 4 * 16 + h * 8 + lane / 4;
        r.sum[h] += __shfl_xor_sync(0xffffffffu, r.sum[h], 1);
        r.sum[h] += __shfl_xor_sync(0xffffffffu, r.sum[h], 2);
        if (lane % 4 == 0) {
            sm.sum[warp / 4][row] = r.sum[h];
            sm.max[warp / 4][row] = r.max[h]; /* the same in both */
        }
    }
    __syncthreads();
    if (threadIdx.x < ROWS)
        sm.sum[0][threadIdx.x] += sm.sum[1][threadIdx.x];
    __syncthreads();
}

/* Where row r of the tile goes. */
template <typename T> __device__ T *out_row(const any_args &a, const tile &t, int r)
{
    const int row = t.row0 + r;
    return static_cast<T *>(a.out) +
           ((size_t)(t.token0 + row / a.group) * a.heads + t.kv_head * a.group + row % a.group) *
               a.d;
}

template <typename T, int RUNS>
__device__ void store_rows(const any_args &a, const tile &t, const any_smem &sm,
                           const float (&o)[4][RUNS][4])
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = m * 16 + h * 8 + lane / 4;
            if (row >= t.rows)
                continue;
            const float f = 1.0f / sm.sum[0][row];
            T *to = out_row<T>(a, t, row) + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < RUNS; i++)
                if ((warp + i * WARPS) * 8 < a.d)
                    *reinterpret_cast<uint32_t *>(to + (warp + i * WARPS) * 8) =
                        pack2<T>(o[m][i][2 * h] * f, o[m][i][2 * h + 1] * f);
        }
}

/* A part in scratch: [ROWS][d] sums, then [ROWS] maxima, then [ROWS] weights. */
__host__ __device__ inline size_t part_floats(int d)
{
    return (size_t)ROWS * d + 2 * ROWS;
}

/* This block's tile and kv head, by part. */
__device__ float *part_of(const any_args &a, int part)
{
    const size_t unit = (size_t)blockIdx.x * gridDim.y + blockIdx.y;
    return a.scratch + (unit * a.splits + part) * part_floats(a.d);
}

template <int RUNS>
__device__ void store_part(const any_args &a, const tile &t, const any_smem &sm,
                           const float (&o)[4][RUNS][4], float *to)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = m * 16 + h * 8 + lane / 4;
#pragma unroll
            for (int i = 0; i < RUNS; i++)
                if (row < t.rows && (warp + i * WARPS) * 8 < a.d)
                    *reinterpret_cast<float2 *>(to + (size_t)row * a.d + (warp + i * WARPS) * 8 +
                                                lane % 4 * 2) =
                        make_float2(o[m][i][2 * h], o[m][i][2 * h + 1]);
        }
    if ((int)threadIdx.x < t.rows) {
        to[(size_t)ROWS * a.d + threadIdx.x] = sm.max[0][threadIdx.x];
        to[(size_t)ROWS * a.d + ROWS + threadIdx.x] = sm.sum[0][threadIdx.x];
    }
}

/* All keys of the part: buffer 0 has keys, buffer 1 values, or both have keys that are values, in turn. */
template <typename T, int RUNS>
__device__ void attend(const any_args &a, const tile &t, any_smem &sm, T *q, lane_rows &r,
                       float (&o)[4][RUNS][4])
{
    T *buffers[2] = {q + ROWS * a.ld, q + (ROWS + KEYS) * a.ld},
      *weights = buffers[1] + KEYS * a.ld;
    const bool latent = a.k == a.v;
    copy_queries<T>(a, t, q);
    copy_keys<T>(a, t, a.k, buffers[0], t.begin);
    for (int j = t.begin, i = 0; j < t.end; j += KEYS, i++) {
        const bool more = j + KEYS < t.end;
        float s[2][4];
        copy_wait<0>();
        __syncthreads(); /* keys are there; the last tile's values and weights have been used */
        if (!latent)
            copy_keys<T>(a, t, a.v, buffers[1], j);
        else if (more)
            copy_keys<T>(a, t, a.k, buffers[(i + 1) % 2], j + KEYS);
        score<T>(a, t, r, q, buffers[latent ? i % 2 : 0], j, s);
        share_max(sm, s);
        __syncthreads(); /* maxima are there; the keys have been used */
        if (!latent && more)
            copy_keys<T>(a, t, a.k, buffers[0], j + KEYS);
        soften<T>(sm, r, s, weights);
        if (!latent && more)
            copy_wait<1>(); /* the values, not yet the next keys */
        else if (!latent)
            copy_wait<0>();
        __syncthreads(); /* weights and values are there */
        weigh<T, RUNS>(a, sm, weights, buffers[latent ? i % 2 : 1], o);
    }
}

template <typename T, int RUNS> __global__ void __launch_bounds__(THREADS, 1) any_kernel(any_args a)
{
    DYNAMIC_SHARED(uint4, smem);
    SHARED(any_smem, sm);
    wait_previous();
    start_next();
    tile t;
    if (!find_rows(a, blockIdx.x, &t) || !find_part(a, blockIdx.z, &t))
        return;
    t.kv_head = blockIdx.y;
    lane_rows r = make_rows(a, t);
    float o[4][RUNS][4] = {};
    attend<T, RUNS>(a, t, sm, reinterpret_cast<T *>(smem), r, o);
    share_sums(sm, r);
    if (t.parts == 1) {
        store_rows<T, RUNS>(a, t, sm, o);
        return;
    }
    store_part<RUNS>(a, t, sm, o, part_of(a, t.part));
}

/* A row of a tile that has several parts: their sum. */
template <typename T> __global__ void __launch_bounds__(MERGE_THREADS) merge_kernel(any_args a)
{
    SHARED(float[SPLITS_MAX], tops);
    SHARED(float[SPLITS_MAX], factor);
    wait_previous();
    start_next();
    tile t;
    const int row = blockIdx.z, i = threadIdx.x;
    if (!find_rows(a, blockIdx.x, &t) || row >= t.rows)
        return;
    find_part(a, 0, &t);
    if (t.parts == 1)
        return;
    t.kv_head = blockIdx.y;
    const size_t stats = (size_t)ROWS * a.d + row;
    if (i < t.parts)
        tops[i] = part_of(a, i)[stats];
    __syncthreads();
    float top = -INFINITY, sum = 0.0f;
    for (int p = 0; p < t.parts; p++)
        top = fmaxf(top, tops[p]);
    if (i < t.parts)
        factor[i] = power2(tops[i] - top);
    __syncthreads();
    for (int p = 0; p < t.parts; p++)
        sum += factor[p] * part_of(a, p)[stats + ROWS];
    for (int at = i * 4; at < a.d; at += MERGE_THREADS * 4) {
        float v[4] = {};
#pragma unroll 4
        for (int p = 0; p < t.parts; p++) {
            const pack<float, 4> u = load_pack<float, 4>(part_of(a, p) + (size_t)row * a.d + at, 0);
#pragma unroll
            for (int e = 0; e < 4; e++)
                v[e] += factor[p] * u.e[e];
        }
        pack<T, 4> o;
#pragma unroll
        for (int e = 0; e < 4; e++)
            o.e[e] = from_f32<T>(v[e] / sum);
        store_pack<T, 4>(out_row<T>(a, t, row) + at, 0, o);
    }
}

template <typename T, int RUNS>
cudaError_t launch(const any_args &a, int tiles, const tm_cuda_ctx *c)
{
    const size_t smem = ((size_t)(ROWS + 2 * KEYS) * a.ld + ROWS * P_LD) * 2;
    const unsigned x = (unsigned)tiles, y = (unsigned)a.kv_heads;
    cudaError_t e =
        launch_kernel(c, any_kernel<T, RUNS>, dim3(x, y, (unsigned)a.splits), THREADS, smem, a);
    if (e != cudaSuccess || a.splits == 1)
        return e;
    const unsigned rows = (unsigned)(a.group < ROWS ? a.group : ROWS);
    return launch_kernel(c, merge_kernel<T>, dim3(x, y, rows), MERGE_THREADS, 0, a);
}

template <typename T> cudaError_t launch_dim(const any_args &a, int tiles, const tm_cuda_ctx *c)
{
    if (a.d <= 128)
        return launch<T, 2>(a, tiles, c);
    return a.d <= 256 ? launch<T, 4>(a, tiles, c) : launch<T, 9>(a, tiles, c);
}

/* Parts of a decode tile's keys: as few as leave little of the last round of places empty, as far as scratch goes. */
int find_splits(int units, int d, const tm_cuda_ctx *c)
{
    const int places = c->sms * (d <= 128 ? 2 : 1);
    const size_t room = TM_CUDA_SCRATCH_BYTES / (part_floats(d) * sizeof(float));
    int best = 1;
    float least = 0.0f;
    for (int s = 1; s <= SPLITS_MAX && (s == 1 || (size_t)units * (size_t)s <= room); s++) {
        const int rounds = (units * s + places - 1) / places;
        const float time = (float)rounds / (float)s + 0.01f; /* in lengths of a whole sequence */
        if (s == 1 || time < 0.9f * least) {
            best = s;
            least = time;
        }
    }
    return best;
}

} /* namespace */

extern "C" cudaError_t tm_cuda_attention_any_launch(const tm_attention_args *a, bool decode,
                                                    const tm_cuda_ctx *c)
{
    const tm_batch *b = a->batch;
    const int seqs = decode ? b->n_decode : b->n_seqs - b->n_decode;
    if (seqs == 0)
        return cudaSuccess;
    if (a->kv->dtype != c->act || c->act == TM_DTYPE_F32 || a->head_dim % 8 != 0 ||
        a->head_dim > TM_CUDA_HEAD_DIM_MAX)
        return cudaErrorInvalidValue;
    any_args d = {};
    d.out = a->out;
    d.qkv = a->qkv;
    d.k = a->kv->k;
    d.v = a->kv->v;
    d.blocks = b->blocks;
    d.seq_begin = b->seq_begin;
    d.kv_len = b->kv_len;
    d.alibi = a->alibi;
    d.scratch = c->scratch;
    d.max_blocks = b->max_blocks;
    d.block_tokens = a->kv->block_tokens;
    d.heads = a->n_heads;
    d.kv_heads = a->n_kv_heads;
    d.group = a->n_heads / a->n_kv_heads;
    d.d = a->head_dim;
    d.ld = (a->head_dim + 15) / 16 * 16 + 8;
    d.window = a->window;
    d.first_seq = decode ? 0 : b->n_decode;
    d.end_seq = decode ? b->n_decode : b->n_seqs;
    d.scale = a->scale;
    d.softcap = a->softcap;
    d.seq_tiles = decode ? (d.group + ROWS - 1) / ROWS : 0;
    /* Every prompt may end with a tile that is not full. */
    const int tiles =
        decode ? seqs * d.seq_tiles : (b->n_tokens - b->n_decode) * d.group / ROWS + seqs;
    d.splits = decode ? find_splits(tiles * d.kv_heads, d.d, c) : 1;
    return c->act == TM_DTYPE_BF16 ? launch_dim<__nv_bfloat16>(d, tiles, c)
                                   : launch_dim<__half>(d, tiles, c);
}
