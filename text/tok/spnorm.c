/* One pass in the order of SentencePiece's own normaliser: replace, squeeze spaces, put the mark in front,
 * spell spaces as marks. Cutting in front of marks is no part of SentencePiece, which merges across the whole
 * text; where no piece reaches over such a place the result is the same, and words meet the fast path. */
#include "text/tok/spnorm.h"

#include <string.h>

#include "common/check.h"

static void put_text(const tm_spnorm *n, const char *s, size_t len, tm_buf *out)
{
    size_t from = 0;
    bool space_before = n->trim;
    for (size_t i = 0; i < len; i++) {
        if (s[i] != ' ') {
            space_before = false;
            continue;
        }
        tm_buf_append(out, s + from, i - from);
        if (!(n->trim && space_before)) {
            if (n->escape)
                tm_buf_append(out, TM_SP_MARK, TM_SP_MARK_LEN);
            else
                tm_buf_putc(out, ' ');
        }
        space_before = n->trim;
        from = i + 1;
    }
    tm_buf_append(out, s + from, len - from);
}

static bool ends_in(const tm_buf *b, const char *s, size_t len)
{
    return b->len >= len && memcmp(b->data + b->len - len, s, len) == 0;
}

static bool all_spaces(const char *s, size_t len)
{
    while (len > 0 && *s == ' ')
        s++, len--;
    return len == 0;
}

static void write_text(const tm_spnorm *n, const char *s, size_t len, bool at_start, tm_buf *out)
{
    const char *space = n->escape ? TM_SP_MARK : " ";
    size_t space_len = strlen(space);
    bool prefix = n->prefix == TM_SP_PREFIX_EVERY || (n->prefix == TM_SP_PREFIX_FIRST && at_start);
    if (len == 0 || (n->trim && all_spaces(s, len)))
        return;
    if (prefix && !n->prefix_behind)
        tm_buf_append(out, space, space_len);
    put_text(n, s, len, out);
    while (n->trim && ends_in(out, space, space_len))
        out->len -= space_len;
    if (prefix && n->prefix_behind)
        tm_buf_append(out, space, space_len);
}

static bool is_mark(const char *s)
{
    return memcmp(s, TM_SP_MARK, TM_SP_MARK_LEN) == 0;
}

static void cut_text(const tm_spnorm *n, const char *s, size_t len, tm_ranges *ranges)
{
    size_t from = 0;
    for (size_t i = 1; n->cut && i + TM_SP_MARK_LEN <= len; i++) {
        if (s[i] != TM_SP_MARK[0] || !is_mark(s + i) || n->joins[(unsigned char)s[i - 1]] ||
            (i >= TM_SP_MARK_LEN && is_mark(s + i - TM_SP_MARK_LEN)))
            continue;
        tm_ranges_push(ranges, from, i);
        from = i;
    }
    tm_ranges_push(ranges, from, len);
}

void tm_spnorm_run(const tm_spnorm *n, const char *s, size_t len, bool at_start, tm_buf *out,
                   tm_ranges *ranges)
{
    tm_buf_clear(out);
    if (n->map.unit_count > 0) {
        tm_buf b;
        tm_buf_init(&b, 0);
        tm_charsmap_apply(&n->map, s, len, &b);
        write_text(n, b.data ? b.data : "", b.len, at_start, out);
        out->failed |= b.failed;
        tm_buf_deinit(&b);
    } else {
        write_text(n, s, len, at_start, out);
    }
    if (!out->failed && out->len > 0)
        cut_text(n, out->data, out->len, ranges);
}
