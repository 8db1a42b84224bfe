/* The machine that all families share: first reasoning is cut off, then opening marks are looked for, and what
 * is behind one goes to the row's syntax. Text goes through byte by byte, so that how it was cut into pieces
 * cannot matter; at the rate of tokens that costs nothing.
 *
 * White space around calls belongs to the format, not to the content: a run of it is kept back until the next
 * byte tells. */
#include "text/parse/parse.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "text/parse/machine.h"

static void answer_byte(tm_parse *p, char c);

/* ---- small things --------------------------------------------------------------------------------------- */

bool tm_parse_is_white(char c)
{
    return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

bool tm_parse_is_name(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '-' || c == '.';
}

bool tm_parse_all_name(const char *s, size_t len)
{
    size_t i = 0;
    while (i < len && tm_parse_is_name(s[i]))
        i++;
    return i == len;
}

bool tm_parse_ends(const char *s, size_t len, const char *mark)
{
    size_t n = mark ? strlen(mark) : 0;
    return n > 0 && len >= n && memcmp(s + len - n, mark, n) == 0;
}

bool tm_parse_begins(const char *s, size_t len, const char *mark)
{
    size_t n = mark ? strlen(mark) : 0;
    return n > 0 && len >= n && memcmp(s, mark, n) == 0;
}

bool tm_parse_starts_mark(const char *s, size_t len, const char *mark)
{
    return mark && len <= strlen(mark) && memcmp(s, mark, len) == 0;
}

static void emit(tm_parse *p, tm_parse_kind kind, const char *s, size_t len)
{
    const tm_parse_event e = {.kind = kind, .call = p->next, .text = s, .len = len};
    p->fn(p->user, &e);
}

/* ---- calls, for the syntaxes ---------------------------------------------------------------------------- */

bool tm_parse_strict(const tm_parse *p)
{
    return p->known_only || p->is_bare;
}

static const char *function_name(const json_t *item, size_t *len)
{
    const json_t *name = json_object_get(json_object_get(item, "function"), "name");
    *len = json_string_length(name);
    return json_string_value(name);
}

const json_t *tm_parse_function(const tm_parse *p, const char *name, size_t len)
{
    for (size_t i = 0; i < json_array_size(p->functions); i++) {
        size_t n;
        const json_t *item = json_array_get(p->functions, i);
        const char *s = function_name(item, &n);
        if (s && n == len && memcmp(s, name, len) == 0)
            return item;
    }
    return NULL;
}

bool tm_parse_name_prefix(const tm_parse *p, const char *s, size_t len)
{
    for (size_t i = 0; i < json_array_size(p->functions); i++) {
        size_t n;
        const char *name = function_name(json_array_get(p->functions, i), &n);
        if (name && n >= len && memcmp(name, s, len) == 0)
            return true;
    }
    return false;
}

bool tm_parse_set_name(tm_parse *p, const char *s, size_t len)
{
    if (len == 0 || len > sizeof(p->name) || (tm_parse_strict(p) && !tm_parse_function(p, s, len)))
        return false;
    memcpy(p->name, s, len);
    p->name_len = len;
    return true;
}

bool tm_parse_begin_call(tm_parse *p)
{
    if (p->open)
        return true;
    if (p->name_len == 0 || p->next == TM_PARSE_CALLS_MAX)
        return false;
    p->open = true;
    emit(p, TM_PARSE_CALL, p->name, p->name_len);
    return true;
}

void tm_parse_arguments(tm_parse *p, const char *s, size_t len)
{
    if (len > 0)
        emit(p, TM_PARSE_ARGUMENTS, s, len);
}

void tm_parse_send(tm_parse *p, size_t end)
{
    if (!p->open || !p->sending || end <= p->sent)
        return;
    tm_parse_arguments(p, p->raw.data + p->sent, end - p->sent);
    p->sent = end;
}

void tm_parse_reset(tm_parse *p)
{
    tm_jscan_init(&p->js);
    p->begin = p->raw.len;
    p->name_len = 0;
    p->key = 0;
    p->has_args = p->sending = p->escaped = false;
    p->args_at = p->args_end = p->sent = 0;
    p->members = p->depth = 0;
    p->quote = 0;
    tm_buf_clear(&p->text);
}

void tm_parse_end_call(tm_parse *p)
{
    emit(p, TM_PARSE_CALL_END, NULL, 0);
    p->complete++;
    p->next++;
    p->open = false;
    p->white_len = 0; /* it stood between content and the call */
    p->after_call = true;
    p->tail = true;
    tm_buf_clear(&p->raw);
    tm_parse_reset(p);
}

/* ---- content -------------------------------------------------------------------------------------------- */

static void flush_white(tm_parse *p)
{
    tm_parse_kind kind = p->part == TM_PART_REASONING ? TM_PARSE_REASONING : TM_PARSE_CONTENT;
    if (p->white_len > 0)
        emit(p, kind, p->white, p->white_len);
    p->white_len = 0;
}

static void keep_white(tm_parse *p, char c)
{
    if (p->white_len == sizeof(p->white))
        flush_white(p);
    p->white[p->white_len++] = c;
}

static void content(tm_parse *p, const char *s, size_t len)
{
    if (len == 0)
        return;
    flush_white(p);
    p->fresh = p->after_call = false;
    emit(p, TM_PARSE_CONTENT, s, len);
}

static void content_byte(tm_parse *p, char c)
{
    if (p->row && tm_parse_is_white(c))
        keep_white(p, c);
    else
        content(p, &c, 1);
}

/* ---- stretches of calls --------------------------------------------------------------------------------- */

static void leave_section(tm_parse *p)
{
    p->in_section = false;
    p->fresh = true;
    tm_buf_clear(&p->raw);
}

/* What was taken for calls is content, up to `len` bytes of it. */
static void abandon(tm_parse *p, size_t len)
{
    if (p->open) {
        tm_parse_send(p, p->args_end > 0 ? p->args_end : len); /* the same in every cut */
        emit(p, TM_PARSE_DROP, NULL, 0);
        p->open = false;
        p->next++;
    }
    content(p, p->raw.data, len);
    leave_section(p);
    p->fresh = false;
    tm_parse_reset(p);
}

static void enter_section(tm_parse *p, const char *mark)
{
    p->in_section = true;
    p->is_bare = mark == NULL;
    p->tail = false;
    tm_buf_clear(&p->raw);
    if (mark)
        tm_buf_puts(&p->raw, mark);
    p->at = 0;
    p->in_list = false;
    tm_parse_reset(p);
    p->row->syntax->begin(p);
}

/* `raw` is ordinary text again: it may hold the beginning of the next mark. */
static void give_back(tm_parse *p)
{
    char again[TM_PARSE_MARK_MAX * 2];
    size_t len = p->raw.len;
    TM_ASSERT(len <= sizeof(again));
    memcpy(again, p->raw.data, len);
    leave_section(p);
    for (size_t i = 0; i < len; i++)
        answer_byte(p, again[i]);
}

static void section_byte(tm_parse *p, char c)
{
    if (p->raw.len == TM_PARSE_CALL_MAX) {
        abandon(p, p->raw.len);
        answer_byte(p, c);
        return;
    }
    if (!tm_buf_putc(&p->raw, c)) {
        p->failed = true;
        return;
    }
    switch (p->row->syntax->byte(p, c)) {
    case TM_STEP_MORE:
        break;
    case TM_STEP_DONE:
        leave_section(p);
        break;
    case TM_STEP_LEAVE:
        give_back(p);
        break;
    case TM_STEP_BAD:
        abandon(p, p->raw.len - 1);
        answer_byte(p, c);
        break;
    }
    if (p->complete == p->calls_max)
        p->row = NULL;
}

/* ---- marks ---------------------------------------------------------------------------------------------- */

static const char *whole_mark(const tm_parse *p)
{
    for (int i = 0; i < TM_PARSE_OPEN_MAX && p->row->open[i]; i++)
        if (strlen(p->row->open[i]) == p->hold_len &&
            tm_parse_starts_mark(p->hold, p->hold_len, p->row->open[i]))
            return p->row->open[i];
    return NULL;
}

static bool part_of_mark(const tm_parse *p)
{
    for (int i = 0; i < TM_PARSE_OPEN_MAX && p->row->open[i]; i++)
        if (tm_parse_starts_mark(p->hold, p->hold_len, p->row->open[i]))
            return true;
    return false;
}

static char take_held(tm_parse *p)
{
    char c = p->hold[0];
    memmove(p->hold, p->hold + 1, --p->hold_len);
    return c;
}

static void outside_byte(tm_parse *p, char c)
{
    if (!p->row || p->next == TM_PARSE_CALLS_MAX) {
        content_byte(p, c);
        return;
    }
    if (p->fresh && p->hold_len == 0 && p->row->bare && p->row->syntax->bare(p, c)) {
        enter_section(p, NULL);
        section_byte(p, c);
        return;
    }
    p->hold[p->hold_len++] = c;
    while (p->hold_len > 0 && !part_of_mark(p))
        content_byte(p, take_held(p));
    const char *mark = p->hold_len > 0 ? whole_mark(p) : NULL;
    if (mark) {
        p->hold_len = 0;
        enter_section(p, mark);
    }
}

static void answer_byte(tm_parse *p, char c)
{
    if (p->in_section && p->row)
        section_byte(p, c);
    else
        outside_byte(p, c);
}

/* ---- reasoning ------------------------------------------------------------------------------------------ */

/* White space and perhaps the opening mark; anything else begins the answer. */
static void before_byte(tm_parse *p, char c)
{
    char again[TM_PARSE_MARK_MAX + TM_PARSE_WHITE_MAX];
    size_t n = p->white_len;
    const char *open = p->reason->open;
    if (p->hold_len == 0 && tm_parse_is_white(c) && n < sizeof(p->white)) {
        p->white[p->white_len++] = c;
        return;
    }
    p->hold[p->hold_len++] = c;
    if (tm_parse_starts_mark(p->hold, p->hold_len, open)) {
        if (p->hold_len == strlen(open)) {
            p->part = TM_PART_REASONING;
            p->hold_len = p->white_len = 0;
        }
        return;
    }
    memcpy(again, p->white, n);
    memcpy(again + n, p->hold, p->hold_len);
    n += p->hold_len;
    p->part = TM_PART_ANSWER;
    p->hold_len = p->white_len = 0;
    for (size_t i = 0; i < n; i++)
        answer_byte(p, again[i]);
}

static void thought_byte(tm_parse *p, char c)
{
    if (tm_parse_is_white(c)) {
        if (!p->fresh)
            keep_white(p, c);
        return;
    }
    flush_white(p);
    p->fresh = false;
    emit(p, TM_PARSE_REASONING, &c, 1);
}

static void reasoning_byte(tm_parse *p, char c)
{
    const char *close = p->reason->close;
    p->hold[p->hold_len++] = c;
    while (p->hold_len > 0 && !tm_parse_starts_mark(p->hold, p->hold_len, close))
        thought_byte(p, take_held(p));
    if (p->hold_len < strlen(close))
        return;
    p->part = TM_PART_BEHIND;
    p->hold_len = p->white_len = 0;
    p->fresh = true;
}

static void byte(tm_parse *p, char c)
{
    switch (p->part) {
    case TM_PART_BEFORE:
        before_byte(p, c);
        break;
    case TM_PART_REASONING:
        reasoning_byte(p, c);
        break;
    case TM_PART_BEHIND:
        if (c == '\n' || c == '\r')
            break;
        p->part = TM_PART_ANSWER;
        answer_byte(p, c);
        break;
    case TM_PART_ANSWER:
        answer_byte(p, c);
        break;
    }
}

/* ---- public --------------------------------------------------------------------------------------------- */

tm_status tm_parse_create(tm_parse **out, const tm_parse_opts *opts, tm_parse_fn fn, void *user,
                          tm_err *err)
{
    tm_parse *p = calloc(1, sizeof(*p));
    if (!p)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    p->row = opts->tools;
    p->reason = opts->reason;
    p->functions = opts->functions;
    p->known_only = opts->known_only;
    p->calls_max = opts->calls_max > 0 ? opts->calls_max : TM_PARSE_CALLS_MAX;
    p->fn = fn;
    p->user = user;
    p->part = !opts->reason ? TM_PART_ANSWER : opts->inside ? TM_PART_REASONING : TM_PART_BEFORE;
    p->fresh = true;
    tm_buf_init(&p->raw, TM_PARSE_CALL_MAX + 1);
    tm_buf_init(&p->text, 8 * TM_PARSE_CALL_MAX); /* a byte is at most \u00XX */
    *out = p;
    return TM_OK;
}

void tm_parse_destroy(tm_parse *p)
{
    if (!p)
        return;
    tm_buf_deinit(&p->raw);
    tm_buf_deinit(&p->text);
    free(p);
}

void tm_parse_push(tm_parse *p, const char *text, size_t len)
{
    for (size_t i = 0; i < len && !p->failed && !tm_parse_full(p); i++)
        byte(p, text[i]);
    if (p->in_section && p->has_args)
        tm_parse_send(p, p->args_end > 0 ? p->args_end : p->raw.len);
}

/* Behind a call, the beginning of a mark that would have ended the stretch. */
static bool is_cut_tail(const tm_parse *p)
{
    const char *const marks[] = {p->row->close, p->row->call_close, p->row->call_open, "```"};
    for (size_t i = 0; i < TM_ARRAY_LEN(marks); i++)
        if (tm_parse_starts_mark(p->raw.data, p->raw.len, marks[i]))
            return true;
    return false;
}

static void finish_section(tm_parse *p, bool cut)
{
    if (p->tail && (p->raw.len == 0 || is_cut_tail(p)))
        leave_section(p);
    else if (!p->open || !cut)
        abandon(p, p->raw.len);
}

void tm_parse_finish(tm_parse *p, bool cut)
{
    bool thinking = p->part == TM_PART_REASONING;
    if (p->failed || tm_parse_full(p))
        return;
    if (p->part == TM_PART_BEFORE)
        p->part = TM_PART_ANSWER;
    if (p->in_section)
        finish_section(p, cut);
    while (p->hold_len > 0) {
        char c = take_held(p);
        if (thinking)
            thought_byte(p, c);
        else
            content_byte(p, c);
    }
    if (!p->after_call && !p->open)
        flush_white(p);
}

bool tm_parse_inside(const tm_parse *p)
{
    return p->part == TM_PART_REASONING;
}

int tm_parse_complete(const tm_parse *p)
{
    return p->complete;
}

bool tm_parse_in_call(const tm_parse *p)
{
    return p->open;
}

bool tm_parse_full(const tm_parse *p)
{
    return p->complete == p->calls_max;
}

bool tm_parse_failed(const tm_parse *p)
{
    return p->failed || p->text.failed;
}
