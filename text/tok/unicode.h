/* UTF-8 and character classes for tokenizers.
 *
 * Functions named _next expect valid UTF-8 (encode checks its input once); the lossy writer takes any bytes. */
#ifndef TM_TEXT_TOK_UNICODE_H
#define TM_TEXT_TOK_UNICODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/buf.h"

enum {
    TM_UC_LETTER = 1, /* \p{L} */
    TM_UC_NUMBER = 2, /* \p{N} */
    TM_UC_SPACE = 4,  /* \s: the White_Space property */
    TM_UC_PUNCT = 8,  /* \p{P} */
    TM_UC_MARK = 16   /* \p{M} */
};

unsigned tm_uc_class_wide(uint32_t cp); /* cp >= 128 */
extern const uint8_t tm_uc_ascii[128];

static inline unsigned tm_uc_class(uint32_t cp)
{
    return cp < 128 ? tm_uc_ascii[cp] : tm_uc_class_wide(cp);
}

/* The character at s[*pos], *pos moved behind it. */
static inline uint32_t tm_utf8_next(const char *s, size_t *pos)
{
    const unsigned char *p = (const unsigned char *)s + *pos;
    if (p[0] < 0x80) {
        *pos += 1;
        return p[0];
    }
    if (p[0] < 0xE0) {
        *pos += 2;
        return (uint32_t)(p[0] & 0x1F) << 6 | (p[1] & 0x3F);
    }
    if (p[0] < 0xF0) {
        *pos += 3;
        return (uint32_t)(p[0] & 0x0F) << 12 | (uint32_t)(p[1] & 0x3F) << 6 | (p[2] & 0x3F);
    }
    *pos += 4;
    return (uint32_t)(p[0] & 0x07) << 18 | (uint32_t)(p[1] & 0x3F) << 12 |
           (uint32_t)(p[2] & 0x3F) << 6 | (p[3] & 0x3F);
}

/* The same backwards: the character that ends at s[*pos]. */
static inline uint32_t tm_utf8_prev(const char *s, size_t *pos)
{
    size_t p = *pos - 1;
    while (p > 0 && ((unsigned char)s[p] & 0xC0) == 0x80)
        p--;
    *pos = p;
    size_t at = p;
    return tm_utf8_next(s, &at);
}

/* 1..4 bytes into out; returns their number. cp is a scalar value. */
size_t tm_utf8_put(uint32_t cp, char out[4]);

/* Looks at the start of s[0..len): returns the length of the valid character there (1..4), or 0 when
 * the bytes are wrong: *bad is then the length of the maximal invalid part (>= 1). When the bytes are
 * a proper beginning that only lacks its end, *cut is true and *bad is len. */
int tm_utf8_check(const char *s, size_t len, size_t *bad, bool *cut);

/* Appends s with each invalid part as U+FFFD: maximal subparts, or every byte by itself. */
bool tm_utf8_append_lossy(tm_buf *out, const char *s, size_t len, bool per_byte);

/* The alphabet in which byte-level tokenizer files spell bytes: the byte of a character (-1 = not in it) and
 * back. */
int tm_byte_of_char(uint32_t cp);
uint32_t tm_char_of_byte(unsigned char b);

/* Unicode normalisation forms. */
typedef enum tm_uc_form { TM_UC_NFC, TM_UC_NFD, TM_UC_NFKC, TM_UC_NFKD } tm_uc_form;

/* True when s is certainly in the form already (a quick look, false negatives allowed). */
bool tm_uc_is_normal(const char *s, size_t len, tm_uc_form form);
bool tm_uc_normalize(tm_buf *out, const char *s, size_t len, tm_uc_form form);

#endif
