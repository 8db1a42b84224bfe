/* Calls that are a name and a JSON object: NAME sep [gap] {arguments}, in marks of their own or in none. With
 * them Mistral's mark, behind which either these or an array of objects stand. */
#include <string.h>

#include "text/parse/machine.h"

enum { OPEN, TYPE, NAME, GAP, ARGS, BEHIND };

#define GAP_MAX 80

static const char *since(const tm_parse *p, size_t *len)
{
    *len = p->raw.len - p->begin;
    return p->raw.data + p->begin;
}

static void to(tm_parse *p, int state)
{
    p->at = state;
    p->begin = p->raw.len;
}

static void start(tm_parse *p)
{
    tm_parse_reset(p);
    p->tail = false;
    to(p, p->row->typed ? TYPE : NAME);
}

/* Up to the mark of one call. */
static tm_step open_byte(tm_parse *p, char c)
{
    size_t len;
    const char *s = since(p, &len);
    if (len == 1 && tm_parse_is_white(c)) {
        p->begin = p->raw.len;
        return TM_STEP_MORE;
    }
    if (!tm_parse_starts_mark(s, len, p->row->call_open))
        return TM_STEP_BAD;
    if (len == strlen(p->row->call_open))
        start(p);
    return TM_STEP_MORE;
}

static tm_step type_byte(tm_parse *p)
{
    size_t len;
    const char *s = since(p, &len);
    if (tm_parse_ends(s, len, p->row->sep))
        to(p, NAME);
    return len > GAP_MAX ? TM_STEP_BAD : TM_STEP_MORE;
}

/* What may stand between name and arguments: white space, the gap of the family, and for Mistral the id of the
 * call. */
static bool gap_fits(const tm_parse *p, const char *s, size_t len, bool whole)
{
    const char *gap = p->row->gap;
    while (len > 0 && tm_parse_is_white(*s))
        s++, len--;
    while (len > 0 && tm_parse_is_white(s[len - 1]))
        len--;
    if (len == 0)
        return true;
    if (gap && tm_parse_begins(s, len, "[CALL_ID]"))
        return !whole || tm_parse_ends(s, len, gap);
    if (whole)
        return gap && len == strlen(gap) && memcmp(s, gap, len) == 0;
    return tm_parse_starts_mark(s, len, gap) ||
           (p->row->short_ids && tm_parse_starts_mark(s, len, "[CALL_ID]"));
}

static tm_step gap_byte(tm_parse *p, char c)
{
    size_t len;
    const char *s = since(p, &len);
    bool brace = c == '{';
    if (!gap_fits(p, s, len - brace, brace) || len > GAP_MAX)
        return TM_STEP_BAD;
    if (!brace)
        return TM_STEP_MORE;
    if (!tm_parse_begin_call(p))
        return TM_STEP_BAD;
    p->has_args = p->sending = true;
    p->args_at = p->sent = p->raw.len - 1;
    p->at = ARGS;
    tm_jscan_byte(&p->js, c);
    return TM_STEP_MORE;
}

/* The name ends at the separator, or, where that is empty, at the first byte that no name has. */
static tm_step name_byte(tm_parse *p, char c)
{
    const char *sep = p->row->typed ? "\n" : p->row->sep;
    size_t len, sep_len = strlen(sep);
    const char *s = since(p, &len);
    bool over = sep_len > 0 ? tm_parse_ends(s, len, sep) : len > 1 && !tm_parse_is_name(c);
    if (len == 1 && (c == ' ' || (c == '\n' && !p->is_bare))) {
        p->begin = p->raw.len;
        return TM_STEP_MORE;
    }
    if (!over) {
        if (tm_parse_strict(p) && len <= TM_PARSE_NAME_MAX && tm_parse_all_name(s, len) &&
            !tm_parse_name_prefix(p, s, len))
            return TM_STEP_BAD;
        bool fits = sep_len > 1 || tm_parse_is_name(c) || c == ' ' || c == '\r';
        return len > TM_PARSE_NAME_MAX || !fits ? TM_STEP_BAD : TM_STEP_MORE;
    }
    len -= sep_len > 0 ? sep_len : 1;
    while (len > 0 && tm_parse_is_white(s[len - 1]))
        len--;
    if (!tm_parse_set_name(p, s, len))
        return TM_STEP_BAD;
    to(p, GAP);
    if (sep_len > 0)
        return TM_STEP_MORE;
    p->begin--; /* the byte belongs to what follows */
    return gap_byte(p, c);
}

static tm_step args_byte(tm_parse *p, char c)
{
    int what = tm_jscan_byte(&p->js, c);
    if (what & TM_JSCAN_BAD)
        return TM_STEP_BAD;
    if (!(what & TM_JSCAN_END) || p->js.level > 0)
        return TM_STEP_MORE;
    tm_parse_send(p, p->raw.len);
    tm_parse_end_call(p);
    to(p, BEHIND);
    return p->row->call_close ? TM_STEP_MORE : TM_STEP_DONE;
}

/* Behind a call: marks that close it, the end of a code fence, or the next call. */
static tm_step behind_byte(tm_parse *p, char c)
{
    const char *const marks[] = {p->row->call_close, p->row->close, p->row->call_open, "```"};
    size_t len = p->raw.len;
    if (len == 1 && tm_parse_is_white(c)) {
        tm_buf_clear(&p->raw);
        return TM_STEP_MORE;
    }
    bool fits = false;
    for (int i = 0; i < 4; i++) {
        if (!tm_parse_starts_mark(p->raw.data, len, marks[i]))
            continue;
        fits = true;
        if (len < strlen(marks[i]))
            continue;
        if (i == 1)
            return TM_STEP_DONE;
        if (i == 2) {
            start(p);
        } else {
            tm_buf_clear(&p->raw);
            p->begin = 0;
        }
        return TM_STEP_MORE;
    }
    return fits ? TM_STEP_MORE : TM_STEP_LEAVE;
}

static tm_step named_byte(tm_parse *p, char c)
{
    switch (p->at) {
    case OPEN:
        return open_byte(p, c);
    case TYPE:
        return type_byte(p);
    case NAME:
        return name_byte(p, c);
    case GAP:
        return gap_byte(p, c);
    case ARGS:
        return args_byte(p, c);
    default:
        return behind_byte(p, c);
    }
}

/* The mark of the stretch, or already that of its first call. */
static void named_begin(tm_parse *p)
{
    const char *open = p->row->call_open;
    if (open && !tm_parse_ends(p->raw.data, p->raw.len, open))
        to(p, OPEN);
    else
        start(p);
}

static bool named_bare(const tm_parse *p, char c)
{
    return tm_parse_name_prefix(p, &c, 1);
}

const tm_syntax tm_syntax_named = {named_begin, named_byte, named_bare};

/* ---- Mistral -------------------------------------------------------------------------------------------- */

/* Not yet known which; the states of both forms are from 0 on. */
#define UNDECIDED (-1)

static void mistral_begin(tm_parse *p)
{
    p->at = UNDECIDED;
}

static tm_step mistral_byte(tm_parse *p, char c)
{
    if (p->at == UNDECIDED) {
        if (tm_parse_is_white(c))
            return TM_STEP_MORE;
        p->by_name = c != '[' && c != '{';
        p->begin = p->raw.len - 1;
        (p->by_name ? tm_syntax_named : tm_syntax_json).begin(p);
        if (p->by_name)
            p->begin = p->raw.len - 1;
    }
    return (p->by_name ? tm_syntax_named : tm_syntax_json).byte(p, c);
}

const tm_syntax tm_syntax_mistral = {mistral_begin, mistral_byte, NULL};
