/* A unit of the array is 32 bits: the label of the step that leads to it, the offset to its children (XORed
 * with the next byte), and whether a key ends here; the unit at the offset itself then holds the value.
 * The file is input: every index is checked against the array while walking. */
#include "text/tok/charsmap.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "common/check.h"
#include "text/tok/unicode.h"

static uint32_t read_u32(const char *s)
{
    const unsigned char *p = (const unsigned char *)s;
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

tm_status tm_charsmap_read(tm_charsmap *out, const char *blob, size_t len, tm_err *err)
{
    tm_charsmap m = {0};
    if (len == 0) {
        *out = m;
        return TM_OK;
    }
    size_t trie = len >= 4 ? read_u32(blob) : 0;
    if (trie < 4 || trie % 4 || trie > len - 4 || (len > 4 + trie && blob[len - 1] != 0))
        return TM_FAIL(err, TM_STATUS_DATA, "precompiled_charsmap: not a trie with replacements");
    m.unit_count = trie / 4;
    m.text_len = len - 4 - trie;
    m.units = malloc(trie);
    m.text = malloc(m.text_len + 1);
    if (!m.units || !m.text) {
        tm_charsmap_deinit(&m);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a normaliser");
    }
    for (size_t i = 0; i < m.unit_count; i++)
        m.units[i] = read_u32(blob + 4 + 4 * i);
    memcpy(m.text, blob + 4 + trie, m.text_len);
    m.text[m.text_len] = 0;
    *out = m;
    return TM_OK;
}

void tm_charsmap_deinit(tm_charsmap *m)
{
    free(m->units);
    free(m->text);
    *m = (tm_charsmap){0};
}

static size_t offset_of(uint32_t unit)
{
    return (size_t)(unit >> 10) << ((unit & (1u << 9)) >> 6);
}

const char *tm_charsmap_find(const tm_charsmap *m, const char *s, size_t len, bool longest,
                             size_t *used)
{
    const char *found = NULL;
    size_t at = m->unit_count ? offset_of(m->units[0]) : 0;
    for (size_t i = 0; i < len && m->unit_count; i++) {
        unsigned char c = (unsigned char)s[i];
        at ^= c;
        /* Labels have the highest bit clear; a unit that holds a value has it set. */
        if (at >= m->unit_count || (m->units[at] & (1u << 31 | 0xFF)) != c)
            break;
        uint32_t unit = m->units[at];
        at ^= offset_of(unit);
        if (!(unit >> 8 & 1))
            continue;
        size_t value = at < m->unit_count ? m->units[at] & 0x7FFFFFFF : SIZE_MAX;
        if (value > m->text_len)
            break;
        found = m->text + value;
        *used = i + 1;
        if (!longest)
            break;
    }
    return found;
}

bool tm_charsmap_apply(const tm_charsmap *m, const char *s, size_t len, tm_buf *out)
{
    for (size_t pos = 0; pos < len;) {
        size_t used = 0;
        const char *to = tm_charsmap_find(m, s + pos, len - pos, true, &used);
        if (to) {
            tm_buf_puts(out, to);
            pos += used;
            /* A key that ends inside a character takes the whole of it. */
            while (pos < len && ((unsigned char)s[pos] & 0xC0) == 0x80)
                pos++;
        } else {
            size_t from = pos;
            tm_utf8_next(s, &pos);
            tm_buf_append(out, s + from, pos - from);
        }
    }
    return !out->failed;
}

static size_t cluster_end(const char *s, size_t pos, size_t len)
{
    utf8proc_int32_t state = 0;
    uint32_t before = tm_utf8_next(s, &pos);
    while (pos < len) {
        size_t at = pos;
        uint32_t cp = tm_utf8_next(s, &at);
        if (utf8proc_grapheme_break_stateful((utf8proc_int32_t)before, (utf8proc_int32_t)cp,
                                             &state))
            break;
        before = cp;
        pos = at;
    }
    return pos;
}

bool tm_charsmap_apply_clusters(const tm_charsmap *m, const char *s, size_t len, tm_buf *out)
{
    for (size_t pos = 0; pos < len;) {
        size_t end = cluster_end(s, pos, len), used;
        const char *to =
            end - pos < 6 ? tm_charsmap_find(m, s + pos, end - pos, false, &used) : NULL;
        if (to) {
            tm_buf_puts(out, to);
            pos = end;
        }
        while (pos < end) {
            size_t from = pos;
            tm_utf8_next(s, &pos);
            to = tm_charsmap_find(m, s + from, pos - from, false, &used);
            if (to)
                tm_buf_puts(out, to);
            else
                tm_buf_append(out, s + from, pos - from);
        }
    }
    return !out->failed;
}
