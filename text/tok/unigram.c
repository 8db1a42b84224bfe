/* Viterbi over byte positions, with a trie walk from each beginning of a character: time is the text's length
 * times the longest piece. The trie is one hash table from (node, byte) to node, small beside the
 * vocabulary itself and built in one pass. */
#include "text/tok/unigram.h"

#include <math.h>
#include <string.h>

#include "common/check.h"
#include "text/tok/unicode.h"

#define UNKNOWN_PENALTY 10.0
#define NONE            UINT32_MAX

typedef struct edge {
    uint64_t key; /* node << 8 | byte; UINT64_MAX = free */
    uint32_t node;
} edge;

typedef struct leaf {
    int32_t id; /* -1 = no piece ends here */
    double score;
} leaf;

struct tm_unigram {
    edge *edges;
    uint32_t mask;
    leaf *leaves; /* by node; node 0 is the root */
    uint32_t nodes;
    double unk_score;
    int32_t unk, byte_id[256];
    bool byte_fallback, single;
};

static edge *probe(const tm_unigram *u, uint32_t node, unsigned char c)
{
    uint64_t key = (uint64_t)node << 8 | c, h = key * 0xD6E8FEB86659FD93u;
    for (uint32_t i = (uint32_t)(h >> 32) & u->mask;; i = (i + 1) & u->mask) {
        edge *e = &u->edges[i];
        if (e->key == key || e->key == UINT64_MAX)
            return e;
    }
}

static void put(tm_unigram *u, const tm_unigram_piece *p, double score)
{
    uint32_t node = 0;
    for (size_t i = 0; i < p->len; i++) {
        edge *e = probe(u, node, (unsigned char)p->text[i]);
        if (e->key == UINT64_MAX)
            *e = (edge){(uint64_t)node << 8 | (unsigned char)p->text[i], u->nodes++};
        node = e->node;
    }
    u->leaves[node] = (leaf){p->id, score};
}

tm_status tm_unigram_create(tm_unigram **out, const tm_unigram_piece *pieces, size_t count,
                            const tm_unigram_opts *o, tm_err *err)
{
    size_t bytes = 1, size = 16;
    for (size_t i = 0; i < count; i++)
        bytes += pieces[i].len;
    while (size < bytes * 2)
        size *= 2;
    tm_unigram *u = bytes < (1u << 30) ? calloc(1, sizeof(*u)) : NULL;
    if (u) {
        u->edges = malloc(size * sizeof(*u->edges));
        u->leaves = malloc(bytes * sizeof(*u->leaves));
    }
    if (!u || !u->edges || !u->leaves) {
        tm_unigram_destroy(u);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for %zu pieces", count);
    }
    memset(u->edges, 0xFF, size * sizeof(*u->edges));
    u->mask = (uint32_t)(size - 1);
    u->nodes = 1;
    for (size_t i = 0; i < bytes; i++)
        u->leaves[i].id = -1;
    u->unk = o->unk;
    u->single = o->single;
    u->unk_score = o->min_score - UNKNOWN_PENALTY;
    if (o->single)
        u->unk_score = (double)((float)o->min_score - (float)UNKNOWN_PENALTY);
    u->byte_fallback = o->byte_id != NULL;
    if (o->byte_id)
        memcpy(u->byte_id, o->byte_id, sizeof(u->byte_id));
    for (size_t i = 0; i < count; i++) {
        const tm_unigram_piece *p = &pieces[i];
        double always = (double)p->len * o->max_score - 0.1;
        put(u, p, p->always ? always : p->score);
    }
    *out = u;
    return TM_OK;
}

void tm_unigram_destroy(tm_unigram *u)
{
    if (!u)
        return;
    free(u->edges);
    free(u->leaves);
    free(u);
}

/* The best cut of the text up to a position: its sum, and its last piece. */
typedef struct best {
    double sum;
    uint32_t from; /* NONE = not reached */
    int32_t id;
} best;

/* SentencePiece compares the new sum in double precision with one that it stored in single precision, which
 * decides between cuts of (nearly) equal worth. */
static inline void offer(const tm_unigram *u, best *b, double sum, size_t from, int32_t id)
{
    if (b->from == NONE || sum > b->sum)
        *b = (best){u->single ? (double)(float)sum : sum, (uint32_t)from, id};
}

static void walk(const tm_unigram *u, const char *s, size_t len, best *b)
{
    for (size_t pos = 0; pos < len;) {
        size_t next = pos;
        tm_utf8_next(s, &next);
        bool one = false;
        uint32_t node = 0;
        for (size_t i = pos; i < len; i++) {
            const edge *e = probe(u, node, (unsigned char)s[i]);
            if (e->key == UINT64_MAX)
                break;
            node = e->node;
            const leaf *l = &u->leaves[node];
            if (l->id < 0)
                continue;
            offer(u, &b[i + 1], b[pos].sum + l->score, pos, l->id);
            one |= i + 1 == next;
        }
        if (!one)
            offer(u, &b[next], b[pos].sum + u->unk_score, pos, -1);
        pos = next;
    }
}

static void put_unknown(const tm_unigram *u, const char *s, size_t from, size_t to, bool *joined,
                        tm_ids *out)
{
    bool all = u->byte_fallback;
    for (size_t i = from; i < to && all; i++)
        all = u->byte_id[(unsigned char)s[i]] >= 0;
    for (size_t i = from; i < to && all; i++)
        tm_ids_push(out, u->byte_id[(unsigned char)s[i]]);
    if (!all && !*joined && u->unk >= 0)
        tm_ids_push(out, u->unk);
    *joined = !all;
}

void tm_unigram_encode(const tm_unigram *u, const char *s, size_t len, tm_ids *out)
{
    best *b = malloc((len + 1) * sizeof(*b));
    uint32_t *ends = malloc((len + 1) * sizeof(*ends));
    if (!b || !ends) {
        out->failed = true;
        goto done;
    }
    for (size_t i = 0; i <= len; i++)
        b[i].from = NONE;
    b[0].sum = 0;
    walk(u, s, len, b);
    size_t n = 0;
    for (size_t at = len; at > 0; at = b[at].from)
        ends[n++] = (uint32_t)at;
    bool joined = false; /* a run of unknown characters is one unknown token */
    while (n > 0) {
        size_t end = ends[--n];
        if (b[end].id >= 0) {
            tm_ids_push(out, b[end].id);
            joined = false;
        } else {
            put_unknown(u, s, b[end].from, end, &joined, out);
        }
    }
done:
    free(b);
    free(ends);
}
