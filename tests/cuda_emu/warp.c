/* What the lanes of a warp do together. The last lane to arrive works for all of them: each has left the address of its
 * operands, on its own stack. */
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "tests/cuda_emu/grid.h"

static void complete(block *b, emu_thread *t, warp_state *w, group *g)
{
    const unsigned lanes = g->arrived;
    *g = w->groups[--w->n_groups];
    grid_set_ready(b, t->warp, lanes & ~(1u << t->lane), 0);
}

void emu_warp(unsigned mask, emu_warp_op *op, void *arg, emu_site site)
{
    emu_thread *t = emu_self;
    block *b = block_of(t);
    warp_state *w = &b->warps[t->warp];
    const unsigned bit = 1u << t->lane;
    group *g = NULL;
    if (!(mask & bit))
        emu_fail("calls %s, %s:%d, with the mask %#x, which does not have its own lane", site.what,
                 site.file, site.line, mask);
    /* Groups with other masks may be under way: those lanes come here later. */
    for (int i = 0; i < w->n_groups && !g; i++)
        if (w->groups[i].mask == mask)
            g = &w->groups[i];
    if (!g) {
        g = &w->groups[w->n_groups++];
        *g = (group){mask, 0, site};
    } else if (!grid_same_site(&g->site, &site)) {
        emu_fail("calls %s, %s:%d, while other lanes of the mask %#x are at %s, %s:%d", site.what,
                 site.file, site.line, mask, g->site.what, g->site.file, g->site.line);
    }
    g->arrived |= bit;
    w->args[t->lane] = arg;
    if (g->arrived != (mask & ~w->exited)) {
        /* op runs in whoever comes last: all of a group call with the same one. */
        w->op[t->lane] = op;
        grid_wait(t);
        return;
    }
    op(w->args, g->arrived);
    if (op == emu_op_sync)
        race_meet(b, 1u << t->warp);
    complete(b, t, w, g);
}

void emu_warp_all(emu_warp_op *op, void *arg, emu_site site)
{
    const emu_thread *t = emu_self;
    if (block_of(t)->warps[t->warp].exited)
        emu_fail(
            "calls %s, %s:%d, which takes a whole warp, but lanes %#x have ended or never were",
            site.what, site.file, site.line, block_of(t)->warps[t->warp].exited);
    emu_warp(EMU_ALL, op, arg, site);
}

void warp_thread_ended(emu_thread *t)
{
    block *b = block_of(t);
    warp_state *w = &b->warps[t->warp];
    for (int i = w->n_groups - 1; i >= 0; i--) {
        group *g = &w->groups[i];
        if (!(g->mask >> t->lane & 1) || g->arrived != (g->mask & ~w->exited))
            continue;
        w->op[__builtin_ctz(g->arrived)](w->args, g->arrived);
        complete(b, t, w, g);
    }
}

/* ---- exchanges ---- */

void emu_op_sync(void **args, unsigned lanes)
{
    (void)args, (void)lanes;
}

/* From a lane that is not there nobody knows what comes. */
void emu_op_shuffle(void **args, unsigned lanes)
{
    for (int i = 0; i < EMU_LANES; i++) {
        if (!(lanes >> i & 1))
            continue;
        struct emu_shuffle *a = args[i];
        const int from = a->from >= 0 && a->from < EMU_LANES ? a->from : i;
        a->out = lanes >> from & 1 ? ((const struct emu_shuffle *)args[from])->in : ~UINT64_C(0);
    }
}

void emu_op_vote(void **args, unsigned lanes)
{
    unsigned ballot = 0;
    for (unsigned i = 0; i < EMU_LANES; i++)
        if (lanes >> i & 1 && ((const struct emu_vote *)args[i])->in)
            ballot |= 1u << i;
    for (unsigned i = 0; i < EMU_LANES; i++)
        if (lanes >> i & 1) {
            ((struct emu_vote *)args[i])->ballot = ballot;
            ((struct emu_vote *)args[i])->lanes = lanes;
        }
}

static unsigned combine(const struct emu_reduce *r, unsigned a, unsigned b)
{
    const bool less = r->is_signed ? (int)a < (int)b : a < b;
    switch (r->op) {
    case '+':
        return a + b;
    case '&':
        return a & b;
    case '|':
        return a | b;
    case '^':
        return a ^ b;
    case 'm':
        return less ? a : b;
    default:
        return less ? b : a;
    }
}

void emu_op_reduce(void **args, unsigned lanes)
{
    const unsigned first = (unsigned)__builtin_ctz(lanes);
    unsigned sum = ((const struct emu_reduce *)args[first])->in;
    for (unsigned i = first + 1; i < EMU_LANES; i++)
        if (lanes >> i & 1)
            sum = combine(args[i], sum, ((const struct emu_reduce *)args[i])->in);
    for (unsigned i = first; i < EMU_LANES; i++)
        if (lanes >> i & 1)
            ((struct emu_reduce *)args[i])->out = sum;
}

/* ---- matrices ---- */

/* Eight numbers at a time, whatever the processor makes of them. */
typedef float wide __attribute__((vector_size(32)));
typedef uint32_t bits __attribute__((vector_size(32)));

/* 16-bit numbers in the upper halves as f32; exact. An f16's exponent is moved by a product with a power of two. */
static inline __attribute__((always_inline)) void widen(bits *to, const bits *from, int shift,
                                                        bool f16)
{
    const bits v = *from << shift & 0xffff0000u;
    *to = v;
    if (!f16)
        return;
    const bits magnitude = v >> 3 & 0x0fffe000u, sign = v & 0x80000000u;
    const bits strange = (bits)(magnitude >= 0x0f800000u); /* infinite or no number */
    const bits moved = (bits)((wide)magnitude * 0x1p112f);
    *to = (strange & (magnitude | 0x7f800000u)) | (~strange & moved) | sign;
}

/* c[16 x 8] += a[16 x 16] b[16 x 8]; the lanes' parts as engine/backend/cuda/mma.cuh says. */
static inline __attribute__((always_inline)) void multiply(void **args, bool f16)
{
    union {
        bits v[6][EMU_LANES / 8];
        uint32_t e[6][EMU_LANES];
        float f[6][EMU_LANES];
    } in, lo, hi; /* of each register: the lanes */
    float a[16][16];
    union {
        wide v;
        float e[8];
    } b[16], c[16];
    for (int i = 0; i < EMU_LANES; i++) {
        const struct emu_mma *x = args[i];
        for (int r = 0; r < 6; r++)
            in.e[r][i] = r < 4 ? x->a[r] : x->b[r - 4];
        memcpy(&c[i / 4].e[i % 4 * 2], x->c, 2 * sizeof(float));
        memcpy(&c[i / 4 + 8].e[i % 4 * 2], x->c + 2, 2 * sizeof(float));
    }
    for (int r = 0; r < 6; r++)
        for (int i = 0; i < EMU_LANES / 8; i++) {
            widen(&lo.v[r][i], &in.v[r][i], 16, f16);
            widen(&hi.v[r][i], &in.v[r][i], 0, f16);
        }
    for (int i = 0; i < EMU_LANES; i++) {
        const int g = i / 4, t = i % 4 * 2;
        for (int r = 0; r < 4; r++) {
            a[g + r % 2 * 8][t + r / 2 * 8] = lo.f[r][i];
            a[g + r % 2 * 8][t + r / 2 * 8 + 1] = hi.f[r][i];
        }
        for (int r = 0; r < 2; r++) {
            b[t + r * 8].e[g] = lo.f[4 + r][i];
            b[t + r * 8 + 1].e[g] = hi.f[4 + r][i];
        }
    }
    for (int m = 0; m < 16; m += 4) {
        wide sum[4] = {{0}, {0}, {0}, {0}};
        for (int k = 0; k < 16; k++)
            for (int i = 0; i < 4; i++)
                sum[i] += a[m + i][k] * b[k].v;
        for (int i = 0; i < 4; i++)
            c[m + i].v += sum[i];
    }
    for (int i = 0; i < EMU_LANES; i++) {
        float *out = ((const struct emu_mma *)args[i])->c;
        memcpy(out, &c[i / 4].e[i % 4 * 2], 2 * sizeof(float));
        memcpy(out + 2, &c[i / 4 + 8].e[i % 4 * 2], 2 * sizeof(float));
    }
}

#ifdef __x86_64__
static __attribute__((target("avx2,fma"))) void multiply_avx2(void **args, bool f16)
{
    multiply(args, f16);
}
#endif

void emu_op_mma(void **args, unsigned lanes)
{
    const bool f16 = ((const struct emu_mma *)args[0])->f16;
    (void)lanes;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        multiply_avx2(args, f16);
        return;
    }
#endif
    multiply(args, f16);
}

void emu_op_transpose8(void **args, unsigned lanes)
{
    uint16_t m[8][8];
    (void)lanes;
    for (int i = 0; i < EMU_LANES; i++)
        memcpy(&m[i / 4][i % 4 * 2], &((const struct emu_transpose8 *)args[i])->in, 4);
    for (int i = 0; i < EMU_LANES; i++) {
        const int r = i / 4, k = i % 4 * 2;
        ((struct emu_transpose8 *)args[i])->out = (uint32_t)m[k][r] | (uint32_t)m[k + 1][r] << 16;
    }
}

/* Matrix i has its rows at the addresses of lanes 8 i to 8 i + 7. */
void emu_op_load_matrix(void **args, unsigned lanes)
{
    const struct emu_load_matrix *first = args[0];
    (void)lanes;
    for (int i = 0; i < first->n; i++) {
        uint16_t m[8][8];
        for (int r = 0; r < 8; r++)
            memcpy(m[r], ((const struct emu_load_matrix *)args[i * 8 + r])->row, sizeof(m[r]));
        for (int l = 0; l < EMU_LANES; l++) {
            const int r = l / 4, k = l % 4 * 2;
            const uint32_t lo = first->trans ? m[k][r] : m[r][k],
                           hi = first->trans ? m[k + 1][r] : m[r][k + 1];
            ((const struct emu_load_matrix *)args[l])->out[i] = lo | hi << 16;
        }
    }
}

/* ---- asynchronous copies ---- */

struct emu_copy {
    void *to;
    const void *from; /* NULL: zeros */
    size_t bytes;
    int group;
};

/* Until somebody waits, what was there is gone and what comes is not there yet. */
void emu_copy_async(void *to, const void *from, size_t bytes, bool valid)
{
    emu_thread *t = emu_self;
    emu_check_aligned(to, bytes);
    if (valid)
        emu_check_aligned(from, bytes);
    if (t->n_copies == t->copies_room) {
        t->copies_room = t->copies_room ? 2 * t->copies_room : 16;
        t->copies = realloc(t->copies, (size_t)t->copies_room * sizeof(*t->copies));
        TM_ASSERT(t->copies);
    }
    emu_watch(to, bytes, true);
    memset(to, EMU_POISON, bytes);
    t->copies[t->n_copies++] = (struct emu_copy){to, valid ? from : NULL, bytes, t->copy_group};
}

void emu_copy_commit(void)
{
    emu_self->copy_group++;
}

void emu_copy_wait(int groups)
{
    emu_thread *t = emu_self;
    int done = 0;
    for (; done < t->n_copies && t->copies[done].group < t->copy_group - groups; done++) {
        const struct emu_copy *c = &t->copies[done];
        emu_watch(c->to, c->bytes, true);
        if (c->from)
            memcpy(c->to, c->from, c->bytes);
        else
            memset(c->to, 0, c->bytes);
    }
    t->n_copies -= done;
    if (done > 0)
        memmove(t->copies, t->copies + done, (size_t)t->n_copies * sizeof(*t->copies));
}

void emu_copy_forget(emu_thread *t)
{
    t->n_copies = t->copy_group = 0;
}
