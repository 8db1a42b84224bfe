/* Sampling: one token of each row by the parameters of engine/sample, without the row leaving the device.
 *
 * Four kernels. keys: edits, and the largest logit of every chunk of a row; the whole GPU reads all rows. begin: one
 * block a row reports log-probabilities, takes the largest logit of a greedy row, for which the following two have
 * nothing to do, and says which weights are too small to stay. weigh: mass of every chunk, and a histogram of the weights
 * where a cut is sought, again by the whole GPU. choose: a cluster a row cuts and draws (sample_cut.cuh, sample_draw.cuh).
 *
 * A row of n logits, 4n bytes, is read by keys and, unless it is greedy, by weigh; with top-k or min-p alone weigh reads
 * only the chunks of the best ones. choose reads what the cut leaves, a few chunks; where thousands of tokens stay, it
 * reads the row twice (once to list the bin with the cut, once to weigh what stays), as weights, which weigh has put in
 * the logits' places, 4n bytes more. Edits are 8 bytes each and are looked at by every block of the row.
 *
 * Sums are of whole numbers (engine/sample/mass.h), so the order in which threads come does not show: cuts and draws
 * are those of the CPU, bit for bit. */
#include "engine/backend/cuda/sample_detail.cuh"
#include "engine/backend/cuda/sample_draw.cuh"
#include "engine/backend/cuda/sample_edit.cuh"

namespace
{

constexpr int PART = 256; /* threads of keys and weigh */
constexpr int CHUNKS_MAX = TM_SAMPLE_VOCAB_MAX / CHUNK;

typedef struct row_state {
    float max;          /* after edits */
    bool draws;         /* else the token is known, or there is none */
    bool keeps;         /* weights take the logits' places */
    range r;            /* what lies below has no mass, or cannot stay */
    u64 total;          /* mass of the row, where top_p is the first filter */
    unsigned listed[2]; /* of two lists */
} row_state;

/* Places in the device's scratch memory. */
typedef struct work {
    row_state *states; /* [R] */
    u64 *masses;       /* [R, chunks] */
    u64 *lists;        /* [R, LIST] */
    u64 *bin_masses;   /* [R, 2, BINS] */
    unsigned *bin_counts;
    /* [R, chunks]: order_of the largest logit, then bits of the largest weight, then ties */
    unsigned *keys;
    int chunks;
} work;

__device__ __forceinline__ histogram histogram_of(const work &w, int row, int i)
{
    const size_t at = ((size_t)row * 2 + (size_t)i) * BINS;
    return {w.bin_masses + at, w.bin_counts + at};
}

__device__ __forceinline__ float *row_at(const tm_sample_args &a, int row)
{
    return a.x + (size_t)row * (size_t)(a.ld ? a.ld : a.n);
}

/* The chunks of a block in keys and weigh. */
__device__ __forceinline__ stretch stretch_of(int chunks)
{
    const int each = (chunks + (int)gridDim.x - 1) / (int)gridDim.x;
    const int begin = min((int)blockIdx.x * each, chunks);
    return {begin, min(begin + each, chunks)};
}

/* ---- keys ---- */

/* The key of a chunk, from all lanes' parts. */
__device__ __forceinline__ unsigned key_of(const float (&v)[EACH])
{
    float top = v[0];
#pragma unroll
    for (int j = 1; j < EACH; j++)
        top = fmaxf(top, v[j]); /* passes over what is not a number */
    return __reduce_max_sync(ALL, order_of(top));
}

/* Log-probabilities are of the row before edits, so where they are wanted begin edits. */
__global__ void __launch_bounds__(PART, 4) keys_kernel(tm_sample_args a, work w)
{
    wait_previous();
    start_next();
    const int row = (int)blockIdx.y;
    const tm_sample_row p = a.rows[row];
    const stretch part = stretch_of(w.chunks);
    float *x = row_at(a, row);
    unsigned *keys = w.keys + (size_t)row * w.chunks;
    const bool packed = is_packed(x);
    if (edits_of(p) > 0 && !p.logprobs)
        edit_stretch(p, x, a.edits + p.first_edit, part, [](int) {});
    for (int c = part.begin + warp_id(); c < part.end; c += AHEAD * (PART / 32)) {
        float v[AHEAD][EACH];
#pragma unroll
        for (int q = 0; q < AHEAD; q++) {
            const int at = c + q * (PART / 32);
            load_chunk(v[q], x, at < part.end ? a.n : 0, at, packed, NAN);
        }
#pragma unroll
        for (int q = 0; q < AHEAD; q++) {
            const int at = c + q * (PART / 32);
            const unsigned key = key_of(v[q]);
            if (lane_id() == 0 && at < part.end)
                keys[at] = key;
        }
    }
}

/* ---- begin ---- */

__device__ void edit_row(const tm_sample_row &p, float *x, tm_sample_edit *edits, unsigned *keys,
                         int chunks, int n, unsigned *touched)
{
    for (int i = (int)threadIdx.x; i < CHUNKS_MAX / 32; i += THREADS)
        touched[i] = 0;
    __syncthreads();
    edit_stretch(p, x, edits, {0, chunks},
                 [&](int c) { atomicOr(&touched[c / 32], 1u << (c % 32)); });
    each_chunk(
        warp_id(), WARPS, chunks, [&](int c) { return touched[c / 32] >> (c % 32) & 1; },
        [&](const int(&c)[AHEAD]) {
            float v[AHEAD][EACH];
#pragma unroll
            for (int q = 0; q < AHEAD; q++)
                load_chunk(v[q], x, c[q] < 0 ? 0 : n, max(c[q], 0), false, NAN);
#pragma unroll
            for (int q = 0; q < AHEAD; q++) {
                const unsigned key = key_of(v[q]);
                if (lane_id() == 0 && c[q] >= 0)
                    keys[c[q]] = key;
            }
        });
    __syncthreads();
}

/* All threads come with the token; its logit before edits is in the first edit of it, if there is one. */
__device__ void finish(slots_t &slots, const tm_sample_args &a, const tm_sample_row &p, int row,
                       int token)
{
    if (threadIdx.x == 0)
        a.out[row] = token;
    if (!p.logprobs || token < 0)
        return;
    u64 first = 0;
    for (int i = (int)threadIdx.x; i < edits_of(p); i += THREADS)
        if (a.edits[p.first_edit + i].token == token && !first)
            first = 0xffffffffu - (unsigned)i;
    first = block_max(slots, first);
    if (threadIdx.x == 0)
        a.details[row].logit =
            first ? a.edits[p.first_edit + index_of(first)].value : row_at(a, row)[token];
}

/* The lowest index of the chunk's largest logit; by the first warp. */
__device__ int first_of(const float *x, int n, int c, unsigned key)
{
    for (int j = 0; j < EACH; j++) {
        const int i = c * CHUNK + j * 32 + lane_id();
        const unsigned same = __ballot_sync(ALL, i < n && order_of(x[i]) == key);
        if (same)
            return c * CHUNK + j * 32 + __ffs((int)same) - 1;
    }
    return -1;
}

__device__ bool finite_key(u64 best)
{
    return best && fabsf(value_of((unsigned)(best >> 32))) < INFINITY;
}

/* Some weight that k ones reach, as far down as that: of k chunks with a weight there. */
__device__ range range_of_tops(slots_t &slots, unsigned (&counts)[BINS], unsigned &floor,
                               const unsigned *keys, int chunks, float max, float scale, u64 k)
{
    const range r = range_from(NO_MASS_BITS);
    const int bin = BINS - 1 - (int)threadIdx.x;
    u64 all;
    counts[threadIdx.x] = 0;
    if (threadIdx.x == 0)
        floor = NO_MASS_BITS;
    __syncthreads();
    for (int c = (int)threadIdx.x; c < chunks; c += THREADS) {
        const unsigned bits =
            keys[c] ? __float_as_uint(weight_of(value_of(keys[c]), max, scale)) : 0;
        if (bits >= r.least)
            atomicAdd(&counts[(bits - r.least) >> r.shift], 1u);
    }
    __syncthreads();
    const u64 own = counts[bin], above = block_scan(slots, own, &all);
    if (above < k && k <= above + own)
        floor = r.least + ((unsigned)bin << r.shift);
    __syncthreads();
    return range_from(floor);
}

/* Many tokens will stay: a quarter of the chunks have weights from 2^-10 on. choose would compute them again and again. */
__device__ bool is_hot(slots_t &slots, const unsigned *keys, int chunks, float max, float scale)
{
    u64 count = 0;
    for (int c = (int)threadIdx.x; c < chunks; c += THREADS)
        count += keys[c] && weight_of(value_of(keys[c]), max, scale) >= 0x1p-10f;
    return 4 * block_sum(slots, count) >= (u64)chunks;
}

__global__ void __launch_bounds__(THREADS) begin_kernel(tm_sample_args a, work w)
{
    SHARED(slots_t, slots);
    SHARED(unsigned[CHUNKS_MAX / 32], touched);
    SHARED(int[TM_SAMPLE_TOP_MAX], picked);
    SHARED(unsigned[BINS], counts);
    SHARED(unsigned, floor);
    SHARED(int, token);
    wait_previous();
    start_next();
    const int row = (int)blockIdx.x;
    const tm_sample_row p = a.rows[row];
    float *x = row_at(a, row);
    unsigned *keys = w.keys + (size_t)row * w.chunks;
    u64 best = best_chunk(slots, keys, w.chunks, ~0ull);
    bool usable = finite_key(best);
    if (usable && p.logprobs) {
        describe(slots, x, keys, w.chunks, a.n, value_of((unsigned)(best >> 32)), &a.details[row]);
        list_tops(slots, picked, x, keys, w.chunks, a.n, min(p.logprobs - 1, TM_SAMPLE_TOP_MAX),
                  &a.details[row]);
    }
    if (edits_of(p) > 0 && p.logprobs) {
        __syncthreads(); /* nobody looks at the row as it was */
        edit_row(p, x, a.edits + p.first_edit, keys, w.chunks, a.n, touched);
        best = best_chunk(slots, keys, w.chunks, ~0ull);
        usable = usable && finite_key(best);
    }
    const bool draws = usable && p.scale > 0.0f;
    const float max = value_of((unsigned)(best >> 32));
    range r = {__float_as_uint(p.min_p), 0};
    if (draws && cuts_by_number(p, a.n))
        r = range_of_tops(slots, counts, floor, keys, w.chunks, max, p.scale, (u64)p.top_k);
    else if (draws && p.top_p)
        r = range_from(__float_as_uint(top_p_floor(p.top_p, a.n)));
    /* Where log-probabilities are wanted, so is the token's logit. */
    const bool keeps =
        draws && cuts(p, a.n) && !p.logprobs && is_hot(slots, keys, w.chunks, max, p.scale);
    if (threadIdx.x == 0)
        w.states[row] = {max, draws, keeps, r, 0, {0, 0}};
    if (draws) {
        const histogram h = histogram_of(w, row, 0);
        h.masses[threadIdx.x] = 0;
        h.counts[threadIdx.x] = 0;
        return;
    }
    if (warp_id() == 0) {
        const int first = usable ? first_of(x, a.n, index_of(best), (unsigned)(best >> 32)) : -1;
        if (lane_id() == 0)
            token = first;
    }
    __syncthreads();
    finish(slots, a, p, row, token);
}

/* ---- weigh ---- */

__global__ void __launch_bounds__(PART, 4) weigh_kernel(tm_sample_args a, work w)
{
    SHARED(tally, t);
    wait_previous();
    start_next();
    const int row = (int)blockIdx.y;
    const row_state s = w.states[row];
    const tm_sample_row p = a.rows[row];
    if (!s.draws)
        return;
    const bool tallies = cuts(p, a.n), keeps = s.keeps;
    /* Of everything, or of what may stay. */
    const bool all = !cuts_by_number(p, a.n) && (p.top_p || p.min_p == 0.0f);
    const stretch part = stretch_of(w.chunks);
    float *x = row_at(a, row);
    const bool packed = is_packed(x);
    unsigned *keys = w.keys + (size_t)row * w.chunks;
    u64 *masses = w.masses + (size_t)row * w.chunks, total = 0;
    if (tallies) {
        clear(t);
        __syncthreads();
    }
    const auto worth = [&](int c) {
        const float v = value_of(keys[c]), low = __fmul_rn(__fsub_rn(v, s.max), p.scale);
        if (keys[c] && low >= NO_MASS &&
            (all || __float_as_uint(exp_of(low)) + DISORDER >= s.r.least))
            return true;
        keys[c] = 0;
        masses[c] = 0;
        return false;
    };
    const auto read = [&](const int(&c)[AHEAD]) {
        float e[AHEAD][EACH];
#pragma unroll
        for (int q = 0; q < AHEAD; q++)
            load_chunk(e[q], x, c[q] < 0 ? 0 : a.n, c[q] < 0 ? 0 : c[q], packed, NAN);
#pragma unroll
        for (int q = 0; q < AHEAD; q++) {
            unsigned top = 0;
            u64 mass = 0;
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                e[q][j] = weight_of(e[q][j], s.max, p.scale);
                const unsigned bits = __float_as_uint(e[q][j]);
                mass += all || bits >= s.r.least ? mass_of(e[q][j]) : 0;
                top = max(top, bits);
            }
            mass = warp_sum(mass);
            top = __reduce_max_sync(ALL, top);
            if (lane_id() == 0 && c[q] >= 0) {
                keys[c[q]] = top;
                masses[c[q]] = mass;
                total += mass;
            }
            if (tallies && top >= s.r.least) {
#pragma unroll
                for (int j = 0; j < EACH; j++)
                    add_weight(t, s.r, __float_as_uint(e[q][j]));
                if (keeps)
                    store_chunk(x, a.n, c[q], packed, e[q]);
            }
        }
    };
    each_chunk(part.begin + warp_id(), PART / 32, part.end, worth, read);
    if (!tallies)
        return;
    __syncthreads();
    give(t, s.r, histogram_of(w, row, 0));
    if (all && lane_id() == 0)
        atomicAdd(&w.states[row].total, total);
}

/* ---- choose ---- */

__global__ void __launch_bounds__(THREADS) choose_kernel(tm_sample_args a, work w)
{
    SHARED(board, b);
    SHARED(int, token);
    wait_previous();
    start_next();
    const int row = (int)blockIdx.y;
    const team t = {cluster_rank(), cluster_size()};
    const row_state state = w.states[row];
    const tm_sample_row p = a.rows[row];
    if (!state.draws)
        return;
    const size_t at = (size_t)row * w.chunks;
    const weights v = {row_at(a, row),
                       w.keys + at,
                       w.masses + at,
                       a.n,
                       w.chunks,
                       state.max,
                       p.scale,
                       state.keeps,
                       is_packed(row_at(a, row))};
    owned o = {};
    stay s = {p.min_p > 0.0f ? __float_as_uint(p.min_p) - 1 : 0, 0};
    if (cuts(p, a.n)) {
        const listing l = {histogram_of(w, row, 0), histogram_of(w, row, 1),
                           w.lists + (size_t)row * LIST, w.states[row].listed};
        s = filter(b, t, p, v, l, state.r, state.total, o);
        if (!o.all)
            weigh_stay(v, t, s);
    }
    if (t.rank)
        return;
    const int i = o.all ? draw_of_list(b, v, o, s, p.uniform) : draw_of_chunks(b, v, s, p.uniform);
    if (threadIdx.x == 0)
        token = i;
    __syncthreads();
    finish(b.slots, a, p, row, token);
}

/* Blocks of a row in keys and weigh: as many as the device holds at once (one more would have all wait for it twice), and
 * no more than have two chunks for each warp. */
unsigned parts_of(int chunks, int rows, int sms)
{
    const int most = (chunks + PART / 16 - 1) / (PART / 16), fill = 1024 / PART * sms / rows;
    const int parts = fill < most ? fill : most;
    return (unsigned)(parts > 1 ? parts : 1);
}

/* Blocks of a row in choose, one cluster. */
int team_of(int rows, const tm_cuda_ctx *c)
{
    int size = c->dependent_launch ? 8 : 1; /* they came together */
    while (size > 1 && size * rows > c->sms)
        size /= 2;
    return size;
}

size_t bytes_of_row(int chunks)
{
    return sizeof(row_state) + (size_t)chunks * (sizeof(u64) + sizeof(unsigned)) +
           LIST * sizeof(u64) + 2 * BINS * (sizeof(u64) + sizeof(unsigned));
}

cudaError_t launch_rows(const tm_sample_args &a, const tm_cuda_ctx *c)
{
    const int chunks = (a.n + CHUNK - 1) / CHUNK, team = team_of(a.n_rows, c);
    const size_t rows = (size_t)a.n_rows;
    const dim3 grid(parts_of(chunks, a.n_rows, c->sms), (unsigned)a.n_rows);
    work w = {};
    w.chunks = chunks;
    w.states = reinterpret_cast<row_state *>(c->scratch);
    w.masses = reinterpret_cast<u64 *>(w.states + rows);
    w.lists = w.masses + rows * (size_t)chunks;
    w.bin_masses = w.lists + rows * LIST;
    w.bin_counts = reinterpret_cast<unsigned *>(w.bin_masses + rows * 2 * BINS);
    w.keys = w.bin_counts + rows * 2 * BINS;
    cudaError_t e = launch_kernel(c, keys_kernel, grid, PART, 0, a, w);
    if (e == cudaSuccess)
        e = launch_kernel(c, begin_kernel, dim3((unsigned)a.n_rows), THREADS, 0, a, w);
    if (e == cudaSuccess)
        e = launch_kernel(c, weigh_kernel, grid, PART, 0, a, w);
    if (e == cudaSuccess)
        e = launch_clusters(c, choose_kernel, dim3((unsigned)team, (unsigned)a.n_rows), THREADS,
                            team, a, w);
    return e;
}

} /* namespace */

extern "C" cudaError_t tm_cuda_sample_launch(const tm_sample_args *all, const tm_cuda_ctx *c)
{
    const int chunks = (all->n + CHUNK - 1) / CHUNK;
    const int most = (int)(TM_CUDA_SCRATCH_BYTES / bytes_of_row(chunks));
    if (chunks > CHUNKS_MAX)
        return cudaErrorInvalidValue;
    for (int first = 0; first < all->n_rows; first += most) {
        tm_sample_args a = *all;
        a.n_rows = all->n_rows - first < most ? all->n_rows - first : most;
        a.out += first;
        a.rows += first;
        a.x += (size_t)first * (size_t)(a.ld ? a.ld : a.n);
        a.details = a.details ? a.details + first : nullptr;
        const cudaError_t e = launch_rows(a, c);
        if (e != cudaSuccess)
            return e;
    }
    return cudaSuccess;
}
