/* Merging long rows of symbols in linear time.
 *
 * The order of merging is by rank over the whole row, but a merge only ever looks at its neighbours. So if no
 * merge crosses a place, both sides come out as they would alone. And whether one would cross a place can be
 * seen from the two tokens beside it: their insides never met anything else, so merging just these two again
 * shows the crossing, if there is one. Hence: merge short chunks by themselves (with a heap, in memory that
 * fits the cache), and check the seams; where the two tokens at a seam do not stay what they are, merge a
 * window around it, widened until its own ends hold. A heap over the whole row, the obvious way, costs a
 * cache miss for nearly every step of a long row; it remains for rows whose windows would grow too large. */
#include <string.h>

#include "common/check.h"
#include "text/tok/bpe_rules.h"

#define CHUNK      512
#define WINDOW_MAX (16 * CHUNK)
#define NONE       UINT32_MAX

typedef struct node {
    int32_t id;
    uint32_t prev, next;
    uint32_t rank; /* of merging with the next one */
    int32_t merged;
} node;

/* A merged token: it reaches to the beginning of the next one. */
typedef struct token {
    int32_t id;
    uint32_t begin;
} token;

typedef struct merger {
    const tm_bpe *b;
    const int32_t *sym;
    uint32_t n;
    node *nodes;
    uint64_t *heap; /* rank << 32 | node: the lowest rank, then the leftmost pair */
    size_t heap_n;
    token *done; /* tokens of what lies before the chunk at hand */
    size_t done_n;
    token fresh[CHUNK], window[WINDOW_MAX], pair[WINDOW_MAX];
} merger;

/* ---- one stretch, with a heap --------------------------------------------------------------------------- */

/* Four children a node: half the levels, and the children share a cache line. */
static void heap_push(merger *m, uint64_t key)
{
    size_t i = m->heap_n++;
    for (; i > 0 && key < m->heap[(i - 1) / 4]; i = (i - 1) / 4)
        m->heap[i] = m->heap[(i - 1) / 4];
    m->heap[i] = key;
}

static uint64_t heap_pop(merger *m)
{
    uint64_t top = m->heap[0], key = m->heap[--m->heap_n];
    size_t i = 0;
    for (size_t kid = 1; kid < m->heap_n; kid = 4 * i + 1) {
        size_t end = TM_MIN(kid + 4, m->heap_n);
        for (size_t k = kid + 1; k < end; k++)
            kid = m->heap[k] < m->heap[kid] ? k : kid;
        if (m->heap[kid] >= key)
            break;
        m->heap[i] = m->heap[kid];
        i = kid;
    }
    m->heap[i] = key;
    return top;
}

static void look(merger *m, uint32_t left)
{
    if (left == NONE)
        return;
    node *l = &m->nodes[left];
    l->rank = l->next == NONE ? TM_BPE_NO_RANK
                              : tm_bpe_rank(m->b, l->id, m->nodes[l->next].id, &l->merged);
    if (l->rank != TM_BPE_NO_RANK)
        heap_push(m, (uint64_t)l->rank << 32 | left);
}

/* Merges symbols [begin, end); out has room for all of them. Returns the number of tokens. */
static size_t merge_stretch(merger *m, uint32_t begin, uint32_t end, token *out)
{
    uint32_t n = end - begin;
    m->heap_n = 0;
    for (uint32_t i = 0; i < n; i++)
        m->nodes[i] = (node){
            .id = m->sym[begin + i], .prev = i ? i - 1 : NONE, .next = i + 1 < n ? i + 1 : NONE};
    for (uint32_t i = 0; i < n; i++)
        look(m, i);
    while (m->heap_n > 0) {
        uint64_t key = heap_pop(m);
        uint32_t left = (uint32_t)key;
        node *l = &m->nodes[left];
        if (l->rank != key >> 32) /* the pair is no longer there */
            continue;
        node *r = &m->nodes[l->next];
        l->id = l->merged;
        l->next = r->next;
        r->rank = TM_BPE_NO_RANK;
        if (l->next != NONE)
            m->nodes[l->next].prev = left;
        look(m, l->prev);
        look(m, left);
    }
    size_t count = 0;
    for (uint32_t i = n ? 0 : NONE; i != NONE; i = m->nodes[i].next)
        out[count++] = (token){m->nodes[i].id, begin + i};
    return count;
}

/* ---- seams ---------------------------------------------------------------------------------------------- */

/* Do the two neighbours stay apart when they are merged by themselves? */
static bool stays_cut(merger *m, token left, token right, uint32_t end)
{
    if (end - left.begin > WINDOW_MAX)
        return false;
    return merge_stretch(m, left.begin, end, m->pair) == 2 && m->pair[1].begin == right.begin;
}

static void keep(merger *m, const token *v, size_t n)
{
    memcpy(m->done + m->done_n, v, n * sizeof(*v));
    m->done_n += n;
}

/* Puts the fresh tokens of a chunk behind the finished ones. false: the window would be too large. */
static bool stitch(merger *m, size_t fresh_n, uint32_t end)
{
    size_t back = 1, ahead = 1;
    uint32_t first_end = fresh_n > 1 ? m->fresh[1].begin : end;
    if (m->done_n == 0 || stays_cut(m, m->done[m->done_n - 1], m->fresh[0], first_end)) {
        keep(m, m->fresh, fresh_n);
        return true;
    }
    for (;;) {
        back = TM_MIN(back * 2, m->done_n);
        ahead = TM_MIN(ahead * 2, fresh_n);
        const token *behind = ahead < fresh_n ? &m->fresh[ahead] : NULL;
        uint32_t from = m->done[m->done_n - back].begin, to = behind ? behind->begin : end;
        if (to - from > WINDOW_MAX)
            return false;
        size_t n = merge_stretch(m, from, to, m->window);
        uint32_t head_end = n > 1 ? m->window[1].begin : to;
        uint32_t behind_end = ahead + 1 < fresh_n ? m->fresh[ahead + 1].begin : end;
        if ((back == m->done_n ||
             stays_cut(m, m->done[m->done_n - back - 1], m->window[0], head_end)) &&
            (!behind || stays_cut(m, m->window[n - 1], *behind, behind_end))) {
            m->done_n -= back;
            keep(m, m->window, n);
            keep(m, m->fresh + ahead, fresh_n - ahead);
            return true;
        }
    }
}

static bool merge_chunks(merger *m)
{
    for (uint32_t at = 0; at < m->n; at += CHUNK) {
        uint32_t end = TM_MIN(at + CHUNK, m->n);
        if (!stitch(m, merge_stretch(m, at, end, m->fresh), end))
            return false;
    }
    return true;
}

/* Nodes and heap for a stretch of n symbols: each merge looks twice and pops once. */
static bool make_room(merger *m, size_t n)
{
    free(m->nodes);
    free(m->heap);
    m->nodes = malloc(n * sizeof(*m->nodes));
    m->heap = malloc(3 * n * sizeof(*m->heap));
    return m->nodes && m->heap;
}

void tm_bpe_merge_long(const tm_bpe *b, const int32_t *symbols, size_t n, tm_ids *out)
{
    merger *m = malloc(sizeof(*m));
    if (!m) {
        out->failed = true;
        return;
    }
    m->b = b;
    m->sym = symbols;
    m->n = (uint32_t)n;
    m->nodes = NULL;
    m->heap = NULL;
    m->done_n = 0;
    m->done = malloc(n * sizeof(*m->done));
    bool ok = m->done && make_room(m, TM_MIN(n, WINDOW_MAX));
    if (ok && !merge_chunks(m)) {
        ok = make_room(m, n);
        if (ok)
            m->done_n = merge_stretch(m, 0, m->n, m->done);
    }
    for (size_t i = 0; ok && i < m->done_n; i++)
        tm_ids_push(out, m->done[i].id);
    out->failed |= !ok;
    free(m->done);
    free(m->nodes);
    free(m->heap);
    free(m);
}
