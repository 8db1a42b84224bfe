/* Character classes come from utf8proc (one pinned Unicode version for scanners and normalisation) with a
 * table for ASCII in front. White space is the White_Space property, written out: it is what Rust, Python
 * and Oniguruma mean by \s, while PCRE2 adds U+180E. */
#include "text/tok/unicode.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#define L TM_UC_LETTER
#define N TM_UC_NUMBER
#define S TM_UC_SPACE
#define P TM_UC_PUNCT
const uint8_t tm_uc_ascii[128] = {
    0, 0, 0, 0, 0, 0, 0, 0, 0, S, S, S, S, S, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    S, P, P, P, 0, P, P, P, P, P, P, 0, P, P, P, P, N, N, N, N, N, N, N, N, N, N, P, P, 0, 0, 0, P,
    P, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, P, P, P, 0, P,
    0, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, L, P, 0, P, 0, 0};
#undef L
#undef N
#undef S
#undef P

static bool is_wide_space(uint32_t cp)
{
    return cp == 0x85 || cp == 0xA0 || cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200A) ||
           cp == 0x2028 || cp == 0x2029 || cp == 0x202F || cp == 0x205F || cp == 0x3000;
}

unsigned tm_uc_class_wide(uint32_t cp)
{
    static const uint8_t by_category[32] = {
        [UTF8PROC_CATEGORY_LU] = TM_UC_LETTER, [UTF8PROC_CATEGORY_LL] = TM_UC_LETTER,
        [UTF8PROC_CATEGORY_LT] = TM_UC_LETTER, [UTF8PROC_CATEGORY_LM] = TM_UC_LETTER,
        [UTF8PROC_CATEGORY_LO] = TM_UC_LETTER, [UTF8PROC_CATEGORY_MN] = TM_UC_MARK,
        [UTF8PROC_CATEGORY_MC] = TM_UC_MARK,   [UTF8PROC_CATEGORY_ME] = TM_UC_MARK,
        [UTF8PROC_CATEGORY_ND] = TM_UC_NUMBER, [UTF8PROC_CATEGORY_NL] = TM_UC_NUMBER,
        [UTF8PROC_CATEGORY_NO] = TM_UC_NUMBER, [UTF8PROC_CATEGORY_PC] = TM_UC_PUNCT,
        [UTF8PROC_CATEGORY_PD] = TM_UC_PUNCT,  [UTF8PROC_CATEGORY_PS] = TM_UC_PUNCT,
        [UTF8PROC_CATEGORY_PE] = TM_UC_PUNCT,  [UTF8PROC_CATEGORY_PI] = TM_UC_PUNCT,
        [UTF8PROC_CATEGORY_PF] = TM_UC_PUNCT,  [UTF8PROC_CATEGORY_PO] = TM_UC_PUNCT};
    if (is_wide_space(cp))
        return TM_UC_SPACE;
    return by_category[utf8proc_category((utf8proc_int32_t)cp) & 31];
}

size_t tm_utf8_put(uint32_t cp, char out[4])
{
    if (cp < 0x80) {
        out[0] = (char)cp;
        return 1;
    }
    if (cp < 0x800) {
        out[0] = (char)(0xC0 | cp >> 6);
        out[1] = (char)(0x80 | (cp & 0x3F));
        return 2;
    }
    if (cp < 0x10000) {
        out[0] = (char)(0xE0 | cp >> 12);
        out[1] = (char)(0x80 | (cp >> 6 & 0x3F));
        out[2] = (char)(0x80 | (cp & 0x3F));
        return 3;
    }
    out[0] = (char)(0xF0 | cp >> 18);
    out[1] = (char)(0x80 | (cp >> 12 & 0x3F));
    out[2] = (char)(0x80 | (cp >> 6 & 0x3F));
    out[3] = (char)(0x80 | (cp & 0x3F));
    return 4;
}

/* Allowed second bytes per lead byte (Unicode table 3-7); returns the length of the sequence, 0 = no lead. */
static int lead_info(unsigned char b, unsigned char *lo, unsigned char *hi)
{
    *lo = 0x80;
    *hi = 0xBF;
    if (b < 0x80)
        return 1;
    if (b >= 0xC2 && b <= 0xDF)
        return 2;
    if (b >= 0xE0 && b <= 0xEF) {
        *lo = b == 0xE0 ? 0xA0 : 0x80;
        *hi = b == 0xED ? 0x9F : 0xBF;
        return 3;
    }
    if (b >= 0xF0 && b <= 0xF4) {
        *lo = b == 0xF0 ? 0x90 : 0x80;
        *hi = b == 0xF4 ? 0x8F : 0xBF;
        return 4;
    }
    return 0;
}

int tm_utf8_check(const char *s, size_t len, size_t *bad, bool *cut)
{
    const unsigned char *p = (const unsigned char *)s;
    unsigned char lo, hi;
    int need = lead_info(p[0], &lo, &hi);
    *cut = false;
    *bad = 1;
    if (need <= 1)
        return need;
    for (int i = 1; i < need; i++) {
        if ((size_t)i == len) {
            *cut = true;
            *bad = len;
            return 0;
        }
        if (p[i] < lo || p[i] > hi) {
            *bad = (size_t)i;
            return 0;
        }
        lo = 0x80;
        hi = 0xBF;
    }
    return need;
}

bool tm_utf8_append_lossy(tm_buf *out, const char *s, size_t len, bool per_byte)
{
    size_t good = 0, pos = 0;
    while (pos < len) {
        size_t bad;
        bool cut;
        int n = tm_utf8_check(s + pos, len - pos, &bad, &cut);
        if (n > 0) {
            pos += (size_t)n;
            continue;
        }
        tm_buf_append(out, s + good, pos - good);
        for (size_t i = 0; i < (per_byte ? bad : 1); i++)
            tm_buf_append(out, "\xEF\xBF\xBD", 3);
        pos += bad;
        good = pos;
    }
    return tm_buf_append(out, s + good, pos - good);
}

int tm_byte_of_char(uint32_t cp)
{
    if ((cp >= 33 && cp <= 126) || (cp >= 161 && cp <= 172) || (cp >= 174 && cp <= 255))
        return (int)cp;
    /* The other 68 bytes follow from 256 on, in order: 0..32, 127..160, 173. */
    if (cp >= 256 && cp < 256 + 33)
        return (int)(cp - 256);
    if (cp >= 256 + 33 && cp < 256 + 33 + 34)
        return (int)(cp - 256 - 33 + 127);
    return cp == 256 + 67 ? 173 : -1;
}

uint32_t tm_char_of_byte(unsigned char b)
{
    if (tm_byte_of_char(b) == b)
        return b;
    if (b < 33)
        return 256u + b;
    return b == 173 ? 256 + 67 : 256u + 33 + (b - 127u);
}

/* A character that no canonical (or compatibility) rule touches, alone or beside a neighbour. Below
 * U+0300 only the composed forms count as normal, so the decomposing forms leave early. */
static bool is_inert(uint32_t cp, tm_uc_form form)
{
    if (cp < 0x80)
        return true;
    if (form == TM_UC_NFC && cp < 0x300)
        return true;
    if (cp >= 0xAC00 && cp <= 0xD7A3)
        return form == TM_UC_NFC || form == TM_UC_NFKC;
    if (cp >= 0x1100 && cp <= 0x11FF)
        return false;
    const utf8proc_property_t *p = utf8proc_get_property((utf8proc_int32_t)cp);
    return p->combining_class == 0 && p->decomp_seqindex == UINT16_MAX &&
           p->comb_index == UINT16_MAX;
}

bool tm_uc_is_normal(const char *s, size_t len, tm_uc_form form)
{
    for (size_t pos = 0; pos < len;) {
        if ((unsigned char)s[pos] < 0x80) {
            pos++;
            continue;
        }
        if (!is_inert(tm_utf8_next(s, &pos), form))
            return false;
    }
    return true;
}

/* Characters of a decomposition. */
typedef struct scalars {
    utf8proc_int32_t *v;
    size_t n, cap;
} scalars;

#define DECOMPOSITION_MAX 32 /* the longest of Unicode has 18 */

static bool decompose(scalars *d, const char *s, size_t len, int flags)
{
    for (size_t pos = 0; pos < len;) {
        if (d->cap - d->n < DECOMPOSITION_MAX) {
            size_t cap = d->cap * 2 + len + DECOMPOSITION_MAX;
            utf8proc_int32_t *v = realloc(d->v, cap * sizeof(*v));
            if (!v)
                return false;
            d->v = v;
            d->cap = cap;
        }
        int boundary = 0;
        utf8proc_ssize_t k = utf8proc_decompose_char((utf8proc_int32_t)tm_utf8_next(s, &pos),
                                                     d->v + d->n, (utf8proc_ssize_t)(d->cap - d->n),
                                                     (utf8proc_option_t)flags, &boundary);
        if (k < 0 || k > DECOMPOSITION_MAX)
            return false;
        d->n += (size_t)k;
    }
    return true;
}

static unsigned combining_class(utf8proc_int32_t cp)
{
    return cp < 0x300 ? 0 : (unsigned)utf8proc_get_property(cp)->combining_class & 0xFF;
}

/* Sorts marks by their class, keeping the order of equal ones. Long rows are counted: somebody who sends a
 * megabyte of marks must not make it quadratic, as utf8proc's own sorting does. */
static bool order_marks(utf8proc_int32_t *v, size_t n)
{
    if (n <= 16) {
        for (size_t i = 1; i < n; i++) {
            utf8proc_int32_t cp = v[i];
            size_t k = i;
            for (; k > 0 && combining_class(v[k - 1]) > combining_class(cp); k--)
                v[k] = v[k - 1];
            v[k] = cp;
        }
        return true;
    }
    size_t at[257] = {0};
    utf8proc_int32_t *copy = malloc(n * sizeof(*copy));
    if (!copy)
        return false;
    memcpy(copy, v, n * sizeof(*copy));
    for (size_t i = 0; i < n; i++)
        at[combining_class(v[i]) + 1]++;
    for (int c = 1; c < 257; c++)
        at[c] += at[c - 1];
    for (size_t i = 0; i < n; i++)
        v[at[combining_class(copy[i])]++] = copy[i];
    free(copy);
    return true;
}

static bool order(scalars *d)
{
    for (size_t i = 0; i < d->n;) {
        size_t end = i;
        while (end < d->n && combining_class(d->v[end]) > 0)
            end++;
        if (end - i > 1 && !order_marks(d->v + i, end - i))
            return false;
        i = end + 1;
    }
    return true;
}

bool tm_uc_normalize(tm_buf *out, const char *s, size_t len, tm_uc_form form)
{
    static const int flags[] = {UTF8PROC_STABLE | UTF8PROC_COMPOSE,
                                UTF8PROC_STABLE | UTF8PROC_DECOMPOSE,
                                UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT,
                                UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT};
    scalars d = {NULL, 0, 0};
    bool ok = decompose(&d, s, len, flags[form]) && order(&d);
    utf8proc_ssize_t n = (utf8proc_ssize_t)d.n;
    if (ok && flags[form] & UTF8PROC_COMPOSE)
        n = utf8proc_normalize_utf32(d.v, n, (utf8proc_option_t)flags[form]);
    for (utf8proc_ssize_t i = 0; ok && i < n; i++) {
        char c[4];
        ok = tm_buf_append(out, c, tm_utf8_put((uint32_t)d.v[i], c));
    }
    free(d.v);
    return ok && n >= 0;
}
