/* The tokens are sorted by bytes; a walk narrows the range of tokens that still fit, one byte at a time. No
 * automaton is needed: tokens are short, few, and nearly always share one first byte ('<') that memchr
 * finds. The rules for single_word, lstrip, rstrip and skipped tokens are those of the Hugging Face
 * library: a match that is refused still consumes its text. */
#include "text/tok/added.h"

#include <stdlib.h>
#include <string.h>

#include "text/tok/unicode.h"

void tm_added_deinit(tm_added *a)
{
    for (size_t i = 0; i < a->n; i++)
        free((char *)(uintptr_t)a->v[i].text);
    free(a->v);
    *a = (tm_added){0};
}

static int compare(const void *pa, const void *pb)
{
    const tm_added_token *a = pa, *b = pb;
    size_t n = a->len < b->len ? a->len : b->len;
    int c = memcmp(a->text, b->text, n);
    return c ? c : (a->len > b->len) - (a->len < b->len);
}

static int compare_order(const void *pa, const void *pb)
{
    const tm_added_token *a = pa, *b = pb;
    int c = compare(a, b);
    return c ? c : (a->order > b->order) - (a->order < b->order);
}

tm_status tm_added_put(tm_added *a, const tm_added_token *t, tm_err *err)
{
    if (t->len == 0)
        return TM_OK;
    if (t->len > TM_ADDED_LENGTH_MAX)
        return TM_FAIL(err, TM_STATUS_TOO_LARGE, "id %d is %u bytes long, at most %d are allowed",
                       (int)t->id, (unsigned)t->len, TM_ADDED_LENGTH_MAX);
    if (a->n >= TM_ADDED_MAX)
        return TM_FAIL(err, TM_STATUS_TOO_LARGE, "more than %d tokens", TM_ADDED_MAX);
    if (a->n == a->cap) {
        size_t cap = a->cap ? a->cap * 2 : 64;
        tm_added_token *v = realloc(a->v, cap * sizeof(*v));
        if (!v)
            return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for added tokens");
        a->v = v;
        a->cap = cap;
    }
    char *copy = malloc(t->len);
    if (!copy)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for added tokens");
    memcpy(copy, t->text, t->len);
    a->v[a->n] = *t;
    a->v[a->n].order = (uint32_t)a->n;
    a->v[a->n++].text = copy;
    return TM_OK;
}

void tm_added_build(tm_added *a)
{
    /* Equal texts lie side by side in the order of arrival; the one put last wins. */
    if (a->n > 1)
        qsort(a->v, a->n, sizeof(*a->v), compare_order);
    size_t n = 0;
    for (size_t i = 0; i < a->n; i++) {
        if (n > 0 && compare(&a->v[n - 1], &a->v[i]) == 0)
            free((char *)(uintptr_t)a->v[--n].text);
        a->v[n++] = a->v[i];
    }
    a->n = n;
    int firsts = 0;
    a->only_first = -1;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)a->v[i].text[0];
        if (!a->first[c]) {
            a->first[c] = true;
            a->only_first = firsts++ ? -1 : c;
        }
    }
}

const tm_added_token *tm_added_find(const tm_added *a, const char *text, size_t len)
{
    if (len > TM_ADDED_LENGTH_MAX)
        return NULL;
    tm_added_token key = {.text = text, .len = (uint32_t)len};
    return a->n ? bsearch(&key, a->v, a->n, sizeof(*a->v), compare) : NULL;
}

/* First index in [lo, hi) whose byte at depth is >= c; tokens that end before depth sort first. */
static size_t lower(const tm_added *a, size_t lo, size_t hi, size_t depth, int c)
{
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        const tm_added_token *t = &a->v[mid];
        int b = t->len > depth ? (unsigned char)t->text[depth] : -1;
        if (b < c)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static const tm_added_token *longest_at(const tm_added *a, const char *s, size_t len)
{
    const tm_added_token *best = NULL;
    size_t lo = 0, hi = a->n;
    for (size_t depth = 0; depth < len && lo < hi; depth++) {
        int c = (unsigned char)s[depth];
        lo = lower(a, lo, hi, depth, c);
        hi = lower(a, lo, hi, depth, c + 1);
        if (lo < hi && a->v[lo].len == depth + 1)
            best = &a->v[lo];
    }
    return best;
}

/* Moves pos to the next byte that can begin a token. */
static size_t skip_to_first(const tm_added *a, const char *s, size_t pos, size_t len)
{
    if (a->only_first >= 0) {
        const char *p = pos < len ? memchr(s + pos, a->only_first, len - pos) : NULL;
        return p ? (size_t)(p - s) : len;
    }
    while (pos < len && !a->first[(unsigned char)s[pos]])
        pos++;
    return pos;
}

static bool touches_input(tm_added_scan *s, size_t begin, size_t end)
{
    const tm_added_rules *r = s->rules;
    while (s->span < r->input_count && r->input[s->span].end <= begin)
        s->span++;
    return s->span < r->input_count && r->input[s->span].begin < end;
}

static bool is_word(uint32_t cp)
{
    return cp == '_' || (tm_uc_class(cp) & (TM_UC_LETTER | TM_UC_NUMBER | TM_UC_MARK));
}

static bool stands_alone(const tm_added_scan *s, size_t begin, size_t end)
{
    size_t at = begin;
    if (begin > 0 && is_word(tm_utf8_prev(s->text, &at)))
        return false;
    at = end;
    return end == s->len || !is_word(tm_utf8_next(s->text, &at));
}

static void widen(const tm_added_scan *s, const tm_added_token *t, tm_added_match *m)
{
    while (t->lstrip && m->begin > s->taken) {
        size_t at = m->begin;
        if (!(tm_uc_class(tm_utf8_prev(s->text, &at)) & TM_UC_SPACE))
            break;
        m->begin = at;
    }
    while (t->rstrip && m->end < s->len) {
        size_t at = m->end;
        if (!(tm_uc_class(tm_utf8_next(s->text, &at)) & TM_UC_SPACE))
            break;
        m->end = at;
    }
}

bool tm_added_next(tm_added_scan *s, tm_added_match *m)
{
    const tm_added *a = s->set;
    while (a->n > 0 && (s->pos = skip_to_first(a, s->text, s->pos, s->len)) < s->len) {
        const tm_added_token *t = longest_at(a, s->text + s->pos, s->len - s->pos);
        if (!t) {
            s->pos++;
            continue;
        }
        *m = (tm_added_match){s->pos, s->pos + t->len, t};
        s->pos = m->end;
        if (t->special && s->rules->plain)
            continue;
        if ((t->special || t->guarded) && touches_input(s, m->begin, m->end))
            continue;
        if (t->single_word && !stands_alone(s, m->begin, m->end))
            continue;
        widen(s, t, m);
        s->taken = m->end;
        if (s->pos < m->end)
            s->pos = m->end;
        return true;
    }
    return false;
}
