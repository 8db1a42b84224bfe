/* What sm_90a has beyond sm_90, as the PTX manual describes it: barriers in shared memory that count arrivals and bytes,
 * barriers by number, the copy engine's tiles, and products of a warpgroup.
 *
 * Everything that runs in the background is done as late as it may be: a tile arrives when somebody waits for its barrier,
 * products are computed at the wait. Until then the tile's place and the registers of the sums hold what is no number, and
 * registers that a product reads are compared at the end with what they were. A product is computed warp by warp: each has
 * 16 of the 64 rows, and the four do not have to meet. Operands in shared memory are found by their descriptors: start
 * (bits 0-13, in 16 bytes), leading and stride offset (16-29, 32-45), swizzle of 128 bytes (62-63 = 1, the only one here):
 * bits 4-6 of an address are exchanged with bits 7-9 of it. */
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "tests/cuda_emu/grid.h"

enum { BARRIERS_MAX = 64, TILES_MAX = 512, PRODUCTS_MAX = 64, SUMS_MAX = 4, COLUMNS_MAX = 128 };

/* A copy that is on its way. */
typedef struct tile {
    const void *barrier;
    void *to;
    CUtensorMap map;
    int x, y;
    const void *from; /* not NULL: `bytes` of a row, without a map */
    size_t bytes;
} tile;

typedef struct mbarrier {
    const void *at;
    int arrivals, pending, phase; /* phase: the parity of the one under way */
    long long bytes;              /* announced and not yet there */
    unsigned waiting[WARPS_MAX];
    uint32_t clock[WARPS_MAX];
    emu_site site;
} mbarrier;

/* Numbers of a warp's 16 rows. */
typedef struct sum {
    float *c[EMU_LANES]; /* c[0] NULL: unused */
    int n, products;     /* columns; under way */
    float v[16][COLUMNS_MAX];
} sum;

typedef struct product {
    emu_product p;
    sum *to;
    int group;
    uint32_t a[EMU_LANES][4];
    const uint32_t *a_at[EMU_LANES];
} product;

typedef struct products {
    product all[PRODUCTS_MAX];
    sum sums[SUMS_MAX];
    int n, group;
    bool fenced; /* since the last wait */
} products;

typedef struct hopper {
    mbarrier barriers[BARRIERS_MAX];
    tile tiles[TILES_MAX];
    products *products[WARPS_MAX];
    int n_barriers, n_tiles;
} hopper;

void hopper_begin(block *b)
{
    hopper *h = b->hopper;
    memset(b->turns, 0, sizeof(b->turns));
    if (!h)
        return;
    h->n_barriers = h->n_tiles = 0;
    for (int w = 0; w < WARPS_MAX; w++)
        if (h->products[w]) {
            h->products[w]->n = h->products[w]->group = 0;
            h->products[w]->fenced = false;
            for (int i = 0; i < SUMS_MAX; i++)
                h->products[w]->sums[i].c[0] = NULL;
        }
}

static hopper *hopper_of(block *b)
{
    if (!b->hopper)
        b->hopper = calloc(1, sizeof(*b->hopper));
    TM_ASSERT(b->hopper);
    return b->hopper;
}

unsigned emu_shared_address(const void *p)
{
    const size_t at = (size_t)((const char *)p - block_of(emu_self)->arena);
    if (at >= EMU_ARENA_BYTES)
        emu_fail("takes the shared address of %p, which is not in shared memory", p);
    return (unsigned)at;
}

/* With the swizzle; `bytes` from there on are the block's. */
static char *swizzled(const block *b, size_t at, size_t bytes)
{
    at ^= (at >> 7 & 7) << 4;
    if (at + bytes > b->arena_used)
        emu_fail("has an operand at byte %zu of shared memory, of %zu", at, b->arena_used);
    return b->arena + at;
}

static void wake(block *b, unsigned *waiting)
{
    const emu_thread *t = emu_self;
    for (unsigned w = 0; w < b->n_warps; w++)
        if (waiting[w])
            grid_set_ready(b, w, waiting[w], 0);
    grid_set_ready(b, t->warp, 0, 1u << t->lane);
    memset(waiting, 0, sizeof(*waiting) * WARPS_MAX);
}

/* ---- barriers in shared memory ---- */

void emu_mbarrier_init(void *at, int arrivals)
{
    hopper *h = hopper_of(block_of(emu_self));
    emu_check_aligned(at, 8);
    (void)emu_shared_address(at);
    if (h->n_barriers == BARRIERS_MAX || arrivals < 1)
        emu_fail("makes barrier number %d, for %d arrivals", h->n_barriers, arrivals);
    h->barriers[h->n_barriers++] = (mbarrier){.at = at, .arrivals = arrivals, .pending = arrivals};
}

static mbarrier *barrier_at(hopper *h, const void *at)
{
    for (int i = 0; i < h->n_barriers; i++)
        if (h->barriers[i].at == at)
            return &h->barriers[i];
    emu_fail("uses a barrier at %p that nobody made", at);
}

static void try_phase(block *b, mbarrier *m)
{
    if (m->pending > 0 || m->bytes != 0)
        return;
    m->pending = m->arrivals;
    m->phase ^= 1;
    wake(b, m->waiting);
}

void emu_mbarrier_arrive(void *at, int bytes)
{
    block *b = block_of(emu_self);
    mbarrier *m = barrier_at(hopper_of(b), at);
    if (m->pending == 0)
        emu_fail("arrives at a barrier of %d once more in the same phase", m->arrivals);
    race_release(b, emu_self->warp, m->clock);
    m->bytes += bytes;
    m->pending--;
    try_phase(b, m);
}

void emu_cluster_send(void *at, int rank, const void *v, size_t bytes, void *barrier)
{
    block *b = block_of(emu_self), *o = grid_member(b, rank, barrier);
    mbarrier *m = barrier_at(hopper_of(o), o->arena + ((char *)barrier - b->arena));
    emu_check_aligned(at, bytes);
    emu_cluster_store(at, rank, v, bytes);
    if (o == b)
        race_release(b, emu_self->warp, m->clock);
    m->bytes -= (long long)bytes;
    if (m->pending > 0 || m->bytes != 0)
        return;
    m->pending = m->arrivals;
    m->phase ^= 1;
}

static void deliver(block *b, const tile *t);

static void deliver_all(block *b, mbarrier *m)
{
    hopper *h = b->hopper;
    for (int i = 0; i < h->n_tiles; i++)
        if (h->tiles[i].barrier == m->at) {
            const tile t = h->tiles[i];
            h->tiles[i--] = h->tiles[--h->n_tiles];
            deliver(b, &t);
        }
    try_phase(b, m);
}

void emu_mbarrier_wait(void *at, int parity, emu_site site)
{
    emu_thread *t = emu_self;
    block *b = block_of(t);
    mbarrier *m = barrier_at(hopper_of(b), at);
    if (m->phase == parity)
        deliver_all(b, m);
    while (m->phase == parity && b->grid->launch->cluster > 1)
        emu_yield(); /* another block may end it */
    while (m->phase == parity) {
        m->site = site;
        m->waiting[t->warp] |= 1u << t->lane;
        grid_wait(t);
    }
    race_acquire(b, t->warp, m->clock);
}

/* ---- barriers by number ---- */

void emu_turn(int name, int threads, bool wait, emu_site site)
{
    emu_thread *t = emu_self;
    block *b = block_of(t);
    if (name < 1 || name >= TURNS || threads % EMU_LANES != 0)
        emu_fail("meets %d threads at barrier %d", threads, name);
    turn *n = &b->turns[name];
    if (n->arrived > 0 && n->threads != threads)
        emu_fail("meets %d threads at barrier %d, and others %d", threads, name, n->threads);
    n->threads = threads;
    n->site = site;
    race_release(b, t->warp, n->clock);
    if (wait)
        n->waiting[t->warp] |= 1u << t->lane;
    if (++n->arrived < threads) {
        if (wait)
            grid_wait(t);
        return;
    }
    for (unsigned w = 0; w < b->n_warps; w++)
        if (n->waiting[w])
            race_acquire(b, w, n->clock);
    n->arrived = 0;
    wake(b, n->waiting);
}

void emu_fence_async(void)
{
    race_fence();
}

void hopper_describe(const block *b, char *out, size_t size)
{
    size_t len = strlen(out);
    const hopper *h = b->hopper;
    for (int i = 1; i < TURNS && len < size; i++)
        if (b->turns[i].arrived > 0)
            len += (size_t)snprintf(out + len, size - len,
                                    "\n  %d of %d threads have come to barrier %d, %s:%d",
                                    b->turns[i].arrived, b->turns[i].threads, i,
                                    b->turns[i].site.file, b->turns[i].site.line);
    for (int i = 0; h && i < h->n_barriers; i++)
        for (unsigned w = 0; w < b->n_warps && len < size; w++)
            if (h->barriers[i].waiting[w])
                len += (size_t)snprintf(out + len, size - len,
                                        "\n  lanes %#x of warp %u wait at %s, %s:%d: %d arrivals "
                                        "and %lld bytes to come",
                                        h->barriers[i].waiting[w], w, h->barriers[i].site.what,
                                        h->barriers[i].site.file, h->barriers[i].site.line,
                                        h->barriers[i].pending, h->barriers[i].bytes);
}

/* ---- tiles ---- */

enum { MAP_AT, MAP_COLUMNS, MAP_ROWS, MAP_PITCH, MAP_BOX, MAP_BOX_ROWS };

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult *found)
{
    (void)version, (void)flags;
    const bool known = strcmp(name, "cuTensorMapEncodeTiled") == 0;
    *function = known ? (void *)cuTensorMapEncodeTiled : NULL;
    *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

/* Matrices of 16-bit numbers with boxes of 64 columns. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *at, const cuuint64_t *size, const cuuint64_t *pitch,
                                const cuuint32_t *box, const cuuint32_t *step,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill)
{
    (void)type, (void)interleave, (void)promotion, (void)fill;
    if (rank != 2 || (uintptr_t)at % 16 != 0 || pitch[0] % 16 != 0 || pitch[0] >> 40 ||
        size[0] < 1 || size[1] < 1 || size[0] >> 32 || size[1] >> 32 || box[0] != 64 ||
        box[1] < 1 || box[1] > 256 || step[0] != 1 || step[1] != 1 ||
        swizzle != CU_TENSOR_MAP_SWIZZLE_128B)
        return CUDA_ERROR_INVALID_VALUE;
    memset(map, 0, sizeof(*map));
    map->opaque[MAP_AT] = (uintptr_t)at;
    map->opaque[MAP_COLUMNS] = size[0];
    map->opaque[MAP_ROWS] = size[1];
    map->opaque[MAP_PITCH] = pitch[0];
    map->opaque[MAP_BOX] = box[0];
    map->opaque[MAP_BOX_ROWS] = box[1];
    return CUDA_SUCCESS;
}

static size_t tile_bytes(const CUtensorMap *map)
{
    return (size_t)(map->opaque[MAP_BOX] * 2 * map->opaque[MAP_BOX_ROWS]);
}

static void deliver_row(block *b, const tile *t)
{
    memcpy(t->to, t->from, t->bytes);
    barrier_at(b->hopper, t->barrier)->bytes -= (long long)t->bytes;
}

static void deliver(block *b, const tile *t)
{
    if (t->from) {
        deliver_row(b, t);
        return;
    }
    const uint64_t *m = t->map.opaque;
    const size_t at = emu_shared_address(t->to);
    for (int r = 0; r < (int)m[MAP_BOX_ROWS]; r++)
        for (int c = 0; c < 8; c++) {
            char *to = swizzled(b, at + (size_t)(r * 128 + c * 16), 16);
            memset(to, 0, 16);
            const long long y = (long long)t->y + r;
            for (int i = 0; i < 8; i++) {
                const long long x = (long long)t->x + c * 8 + i;
                if (x >= 0 && x < (long long)m[MAP_COLUMNS] && y >= 0 && y < (long long)m[MAP_ROWS])
                    memcpy(to + 2 * i,
                           (const char *)(uintptr_t)m[MAP_AT] + (uint64_t)y * m[MAP_PITCH] +
                               (uint64_t)x * 2,
                           2);
            }
        }
    barrier_at(b->hopper, t->barrier)->bytes -= (long long)tile_bytes(&t->map);
}

/* Until it arrives, its place holds what is no number. */
static void begin_tile(const tile *t, size_t bytes)
{
    block *b = block_of(emu_self);
    hopper *h = hopper_of(b);
    mbarrier *m = barrier_at(h, t->barrier);
    if (h->n_tiles == TILES_MAX)
        emu_fail("has more than %d tiles under way", TILES_MAX);
    race_engine(t->to, bytes, true);
    memset(t->to, EMU_POISON, bytes);
    race_release(b, emu_self->warp, m->clock);
    h->tiles[h->n_tiles++] = *t;
    for (unsigned w = 0; w < b->n_warps; w++)
        if (m->waiting[w]) {
            deliver_all(b, m);
            return;
        }
}

void emu_tile_load(void *to, const CUtensorMap *map, int x, int y, void *barrier)
{
    emu_check_aligned((const void *)(uintptr_t)emu_shared_address(to), 128);
    begin_tile(&(tile){.barrier = barrier, .to = to, .map = *map, .x = x, .y = y}, tile_bytes(map));
}

void emu_row_load(void *to, const void *from, int bytes, void *barrier)
{
    const size_t at = emu_shared_address(to);
    emu_check_aligned((const void *)(uintptr_t)at, 16);
    emu_check_aligned(from, 16);
    if (bytes < 16 || bytes % 16 != 0 || at + (size_t)bytes > block_of(emu_self)->arena_used)
        emu_fail("loads %d bytes to byte %zu of shared memory", bytes, at);
    begin_tile(&(tile){.barrier = barrier, .to = to, .from = from, .bytes = (size_t)bytes}, (size_t)bytes);
}

/* ---- products ---- */

static products *products_of(block *b, unsigned warp)
{
    hopper *h = hopper_of(b);
    if (!h->products[warp])
        h->products[warp] = calloc(1, sizeof(*h->products[warp]));
    TM_ASSERT(h->products[warp]);
    return h->products[warp];
}

/* Eight numbers at a time, wherever they are. */
typedef float wide __attribute__((vector_size(32), aligned(4)));

static float widen(uint16_t v, bool f16)
{
    uint32_t bits = (uint32_t)v << 16;
    float f;
    if (f16) {
        const uint32_t magnitude = (v & 0x7fffu) << 13, sign = (v & 0x8000u) << 16;
        memcpy(&f, &magnitude, sizeof(f));
        f *= 0x1p112f;
        memcpy(&bits, &f, sizeof(bits));
        if (magnitude >= 0x0f800000u) /* infinite or no number */
            bits = magnitude | 0x7f800000u;
        bits |= sign;
    }
    memcpy(&f, &bits, sizeof(f));
    return f;
}

static void widen8(float *to, size_t stride, const block *b, size_t at, bool f16)
{
    uint16_t v[8];
    const char *p = swizzled(b, at, sizeof(v));
    race_engine(p, sizeof(v), false);
    memcpy(v, p, sizeof(v));
    for (size_t i = 0; i < 8; i++)
        to[i * stride] = widen(v[i], f16);
}

typedef struct operand {
    size_t at, leading, stride;
} operand;

static operand operand_of(uint64_t d)
{
    if (d >> 62 != 1 || (d >> 46 & 0xffff) != 0)
        emu_fail("has an operand %#llx that is not swizzled by 128 bytes, or whose swizzle does "
                 "not begin at 0",
                 (unsigned long long)d);
    return (operand){(size_t)(d & 0x3fff) << 4, (size_t)(d >> 16 & 0x3fff) << 4,
                     (size_t)(d >> 32 & 0x3fff) << 4};
}

/* Row r of an operand with its 16 k in a row. */
static void k_major(float *to, size_t stride, const block *b, const operand *o, int r, bool f16)
{
    const size_t at = o->at + (size_t)(r / 8) * o->stride + (size_t)(r % 8) * 128;
    widen8(to, stride, b, at, f16);
    widen8(to + 8 * stride, stride, b, at + 16, f16);
}

/* The operands as numbers: a [16 rows][16 k] of the warp, b [16 k][n]. */
static void find_operands(const block *b, unsigned warp, const product *x, float (*a)[16],
                          float (*m)[COLUMNS_MAX])
{
    const emu_product *p = &x->p;
    const operand mo = operand_of(p->b_tile);
    if (p->a) {
        for (int l = 0; l < EMU_LANES; l++)
            for (int r = 0; r < 4; r++)
                for (int e = 0; e < 2; e++)
                    a[l / 4 + r % 2 * 8][l % 4 * 2 + r / 2 * 8 + e] =
                        widen((uint16_t)(x->a[l][r] >> 16 * e), p->f16);
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < p->n; n += 8)
                widen8(&m[k][n], 1, b,
                       mo.at + (size_t)(n / 64) * mo.leading + (size_t)(n % 64) * 2 +
                           (size_t)(k / 8) * mo.stride + (size_t)(k % 8) * 128,
                       p->f16);
        return;
    }
    const operand ao = operand_of(p->a_tile);
    for (int r = 0; r < 16; r++)
        k_major(a[r], 1, b, &ao, (int)(warp % 4) * 16 + r, p->f16);
    for (int n = 0; n < p->n; n++)
        k_major(&m[0][n], COLUMNS_MAX, b, &mo, n, p->f16);
}

static inline __attribute__((always_inline)) void add_product(sum *s, float (*a)[16],
                                                              float (*m)[COLUMNS_MAX])
{
    for (int r = 0; r < 16; r++)
        for (int n = 0; n < s->n; n += 8) {
            wide v = {0};
            for (int k = 0; k < 16; k++)
                v += a[r][k] * *(const wide *)&m[k][n];
            *(wide *)&s->v[r][n] += v;
        }
}

#ifdef __x86_64__
static __attribute__((target("avx2,fma"))) void add_product_avx2(sum *s, float (*a)[16],
                                                                 float (*m)[COLUMNS_MAX])
{
    add_product(s, a, m);
}
#endif

static void run_product(const block *b, unsigned warp, product *x)
{
    float a[16][16], m[16][COLUMNS_MAX];
    sum *s = x->to;
    for (int l = 0; l < EMU_LANES && x->p.a; l++)
        if (memcmp(x->a[l], x->a_at[l], sizeof(x->a[l])) != 0)
            emu_fail("has changed registers that a product under way reads");
    find_operands(b, warp, x, a, m);
    if (!x->p.add)
        memset(s->v, 0, sizeof(s->v));
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        add_product_avx2(s, a, m);
    else
#endif
        add_product(s, a, m);
}

/* Between the lanes' registers and the rows of the sum. */
static void exchange(sum *s, bool in)
{
    for (int l = 0; l < EMU_LANES; l++)
        for (int i = 0; i < s->n / 2; i++) {
            float *v = &s->v[l / 4 + i / 2 % 2 * 8][i / 4 * 8 + l % 4 * 2 + i % 2];
            *(in ? v : &s->c[l][i]) = *(in ? &s->c[l][i] : v);
        }
}

static sum *find_sum(products *q, void **args)
{
    const emu_product *first = args[0];
    sum *free_one = NULL;
    for (int i = 0; i < SUMS_MAX; i++) {
        if (q->sums[i].c[0] == first->c)
            return &q->sums[i];
        if (!q->sums[i].c[0])
            free_one = &q->sums[i];
    }
    if (!free_one)
        emu_fail("has more than %d sums of products under way", SUMS_MAX);
    if (!q->fenced)
        emu_fail("begins products without products_begin behind the last wait");
    sum *s = free_one;
    s->n = first->n;
    s->products = 0;
    for (int l = 0; l < EMU_LANES; l++)
        s->c[l] = ((const emu_product *)args[l])->c;
    exchange(s, true);
    for (int l = 0; l < EMU_LANES; l++)
        memset(s->c[l], EMU_POISON, (size_t)s->n / 2 * sizeof(float));
    return s;
}

void emu_op_product(void **args, unsigned lanes)
{
    block *b = block_of(emu_self);
    products *q = products_of(b, emu_self->warp);
    const emu_product *first = args[0];
    (void)lanes;
    if (q->n == PRODUCTS_MAX)
        emu_fail("has more than %d products under way", PRODUCTS_MAX);
    product *x = &q->all[q->n++];
    *x = (product){.p = *first, .to = find_sum(q, args), .group = q->group};
    for (int l = 0; l < EMU_LANES; l++) {
        const emu_product *p = args[l];
        if (p->a_tile != first->a_tile || p->b_tile != first->b_tile || p->c != x->to->c[l])
            emu_fail("has other operands than lane 0 in a product, or other registers than before");
        x->a_at[l] = p->a;
        if (p->a)
            memcpy(x->a[l], p->a, sizeof(x->a[l]));
    }
    x->to->products++;
    float a[16][16], m[16][COLUMNS_MAX];
    find_operands(b, emu_self->warp, x, a, m); /* what it reads may be read from now on */
}

void emu_op_products_begin(void **args, unsigned lanes)
{
    (void)args, (void)lanes;
    products_of(block_of(emu_self), emu_self->warp)->fenced = true;
}

void emu_op_products_commit(void **args, unsigned lanes)
{
    (void)args, (void)lanes;
    products_of(block_of(emu_self), emu_self->warp)->group++;
}

void emu_op_products_wait(void **args, unsigned lanes)
{
    block *b = block_of(emu_self);
    products *q = products_of(b, emu_self->warp);
    const int groups = *(const int *)args[0];
    int done = 0;
    (void)lanes;
    for (; done < q->n && q->all[done].group < q->group - groups; done++) {
        product *x = &q->all[done];
        run_product(b, emu_self->warp, x);
        if (--x->to->products == 0) {
            exchange(x->to, false);
            x->to->c[0] = NULL;
        }
    }
    q->n -= done;
    if (done > 0)
        memmove(q->all, q->all + done, (size_t)q->n * sizeof(*q->all));
    q->fenced = false;
}
