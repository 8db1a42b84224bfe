/* The patterns are ordered alternatives over four classes (letter, number, white space, other), so the first
 * one or two characters decide which alternative matches; what remains is to find its end. */
#include "text/tok/scan.h"

#include <string.h>

#include "common/check.h"
#include "text/tok/unicode.h"

#define WORDISH (TM_UC_LETTER | TM_UC_NUMBER | TM_UC_SPACE)

/* End of the run of characters whose class meets `want` (any = true) or misses it (any = false). */
static inline size_t run(const char *s, size_t pos, size_t len, unsigned classes, bool any)
{
    while (pos < len) {
        size_t at = pos;
        if (((tm_uc_class(tm_utf8_next(s, &at)) & classes) != 0) != any)
            break;
        pos = at;
    }
    return pos;
}

/* \s*[\r\n]+ | \s+(?!\S) | \s+ at a white-space character. */
static size_t scan_space(const char *s, size_t pos, size_t len, bool newlines)
{
    size_t end = pos, last_char = pos, last_newline = 0;
    while (end < len) {
        size_t at = end;
        if (!(tm_uc_class(tm_utf8_next(s, &at)) & TM_UC_SPACE))
            break;
        if (s[end] == '\n' || s[end] == '\r')
            last_newline = at;
        last_char = end;
        end = at;
    }
    if (newlines && last_newline)
        return last_newline;
    return end == len || last_char == pos ? end : last_char;
}

/* 's 't 're 've 'm 'll 'd at an apostrophe; 0 = none. With fold also in capitals, where U+017F (long s)
 * counts as an s. */
static size_t scan_contraction(const char *s, size_t pos, size_t len, bool fold)
{
    size_t left = len - pos;
    if (left < 2)
        return 0;
    unsigned char a = (unsigned char)s[pos + 1], b = left > 2 ? (unsigned char)s[pos + 2] : 0;
    if (fold && a == 0xC5 && b == 0xBF)
        return pos + 3;
    if (fold) {
        a = a >= 'A' && a <= 'Z' ? (unsigned char)(a | 0x20) : a;
        b = b >= 'A' && b <= 'Z' ? (unsigned char)(b | 0x20) : b;
    }
    if (a == 's' || a == 't' || a == 'm' || a == 'd')
        return pos + 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l'))
        return pos + 3;
    return 0;
}

size_t tm_scan_gpt2(const char *s, size_t pos, size_t len)
{
    if (s[pos] == '\'') {
        size_t end = scan_contraction(s, pos, len, false);
        if (end)
            return end;
    }
    size_t at = pos;
    unsigned cls = tm_uc_class(tm_utf8_next(s, &at));
    if (s[pos] == ' ' && at < len) {
        size_t next = at;
        unsigned c = tm_uc_class(tm_utf8_next(s, &next));
        if (!(c & TM_UC_SPACE)) {
            cls = c;
            at = next;
        }
    }
    if (cls & (TM_UC_LETTER | TM_UC_NUMBER))
        return run(s, at, len, cls, true);
    if (!(cls & TM_UC_SPACE))
        return run(s, at, len, WORDISH, false);
    return scan_space(s, pos, len, false);
}

/* The cl100k family. `word`: classes inside words (letters, or letters and marks); digits: longest run of
 * numbers in one piece. */
static inline size_t scan_cl100k(const char *s, size_t pos, size_t len, unsigned word, int digits)
{
    if (s[pos] == '\'') {
        size_t end = scan_contraction(s, pos, len, true);
        if (end)
            return end;
    }
    size_t at = pos;
    unsigned cls = tm_uc_class(tm_utf8_next(s, &at));
    if (cls & word)
        return run(s, at, len, word, true);
    if (cls & TM_UC_NUMBER) {
        for (int i = 1; i < digits && at < len; i++) {
            size_t next = at;
            if (!(tm_uc_class(tm_utf8_next(s, &next)) & TM_UC_NUMBER))
                break;
            at = next;
        }
        return at;
    }
    /* One character that is neither letter, number nor line end may lead a word. */
    size_t next = at;
    unsigned after = at < len ? tm_uc_class(tm_utf8_next(s, &next)) : TM_UC_SPACE;
    if ((after & word) && s[pos] != '\r' && s[pos] != '\n')
        return run(s, next, len, word, true);
    bool mark = s[pos] == ' ' && !(after & (word | TM_UC_NUMBER | TM_UC_SPACE));
    if (mark || !(cls & TM_UC_SPACE)) {
        at = run(s, at, len, word | TM_UC_NUMBER | TM_UC_SPACE, false);
        while (at < len && (s[at] == '\r' || s[at] == '\n'))
            at++;
        return at;
    }
    return scan_space(s, pos, len, true);
}

static size_t scan_llama3(const char *s, size_t pos, size_t len)
{
    return scan_cl100k(s, pos, len, TM_UC_LETTER, 3);
}

static size_t scan_qwen2(const char *s, size_t pos, size_t len)
{
    return scan_cl100k(s, pos, len, TM_UC_LETTER, 1);
}

static size_t scan_qwen35(const char *s, size_t pos, size_t len)
{
    return scan_cl100k(s, pos, len, TM_UC_LETTER | TM_UC_MARK, 1);
}

#define CONTRACTIONS "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
#define SPACES       "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

static const struct {
    const char *pattern;
    tm_scan_fn scan;
} scanners[] = {
    {"'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
     tm_scan_gpt2},
    {CONTRACTIONS "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*" SPACES,
     scan_llama3},
    {CONTRACTIONS "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*" SPACES,
     scan_qwen2},
    {CONTRACTIONS "[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| "
                  "?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*" SPACES,
     scan_qwen35},
};

/* Tekken, o200k, DeepSeek V3, DeepSeek Coder: no scanner is written for them, but they may be compiled to
 * machine code. */
#define UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define LEAD  "[^\\r\\n\\p{L}\\p{N}]?"
#define SLASH "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*" SPACES
#define FOLD  "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

static const char *const published[] = {
    LEAD UPPER "*" LOWER "+|" LEAD UPPER "+" LOWER "*|\\p{N}" SLASH,
    LEAD UPPER "*" LOWER "+" FOLD "|" LEAD UPPER "+" LOWER "*" FOLD "|\\p{N}{1,3}" SLASH,
    "\\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?"
    "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*" SPACES,
    "[\\r\\n]",
    "\\s?\\p{L}+",
    "\\s?\\p{P}+",
    "[一-龥ࠀ-一가-퟿]+",
    "\\p{N}+",
    "\\p{N}",
};

bool tm_scan_is_published(const char *pattern, size_t len)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(published); i++)
        if (strlen(published[i]) == len && memcmp(published[i], pattern, len) == 0)
            return true;
    return false;
}

/* A run of white space matches up to the text's end, or else up to its last line end, if that is not its first
 * character. A regular expression tries each beginning inside the run, which is quadratic. */
bool tm_scan_trailing(const char *s, size_t len, size_t from, size_t *begin, size_t *end)
{
    while (from < len) {
        size_t pos = from, line_end = from;
        while (pos < len) {
            size_t at = pos;
            if (!(tm_uc_class(tm_utf8_next(s, &at)) & TM_UC_SPACE))
                break;
            if (s[pos] == '\n')
                line_end = pos;
            pos = at;
        }
        *begin = from;
        *end = pos == len ? len : line_end;
        if (*end > *begin)
            return true;
        from = pos;
        if (from < len)
            tm_utf8_next(s, &from);
    }
    return false;
}

tm_scan_fn tm_scan_for(const char *pattern, size_t len)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(scanners); i++)
        if (strlen(scanners[i].pattern) == len && memcmp(scanners[i].pattern, pattern, len) == 0)
            return scanners[i].scan;
    return NULL;
}

const char *tm_scan_pattern(int index)
{
    return index < (int)TM_ARRAY_LEN(scanners) ? scanners[index].pattern : NULL;
}
