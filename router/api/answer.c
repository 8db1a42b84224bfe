/* An answer that is taken apart into reasoning, content and calls.
 *
 * The parser's events become parts: stretches of the choice's text with a kind. A stream writes them as deltas and
 * forgets them, a whole answer gathers them to the end. A call that turns out to be none is taken back only from
 * a whole answer; its text is content in both. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/hash.h"
#include "router/api/internal.h"

/* ---- gathering ---- */

static tm_api_part *add_part(tm_api_choice *ch, const tm_parse_event *e)
{
    if (ch->part_count == ch->part_cap) {
        size_t cap = TM_MAX(ch->part_cap * 2, (size_t)8);
        tm_api_part *parts = realloc(ch->parts, cap * sizeof *parts);
        if (!parts) {
            ch->text.failed = true; /* ends the answer with an error */
            return NULL;
        }
        ch->parts = parts;
        ch->part_cap = cap;
    }
    tm_api_part *part = &ch->parts[ch->part_count++];
    *part = (tm_api_part){.kind = e->kind, .call = e->call, .begin = ch->text.len};
    return part;
}

/* "call_" and 24 hex digits; Mistral's templates insist on nine letters and digits. */
static void make_id(const tm_api_job *j, char out[TM_API_CALL_ID])
{
    uint8_t random[12];
    char hex[2 * sizeof random + 1];
    tm_random_bytes(random, sizeof random);
    tm_hex(random, sizeof random, hex);
    if (tm_tool_parser_short_ids(j->tool_parser))
        snprintf(out, TM_API_CALL_ID, "%.9s", hex);
    else
        snprintf(out, TM_API_CALL_ID, "call_%s", hex);
}

static void drop_call(tm_api_choice *ch, int call)
{
    for (size_t i = 0; i < ch->part_count; i++)
        if (ch->parts[i].kind >= TM_PARSE_CALL && ch->parts[i].call == call)
            ch->parts[i].dropped = true;
}

static void on_event(void *user, const tm_parse_event *e)
{
    tm_api_choice *ch = user;
    tm_api_part *last = ch->part_count > 0 ? &ch->parts[ch->part_count - 1] : NULL;
    if (e->kind == TM_PARSE_CALL_END)
        return;
    if (e->kind == TM_PARSE_DROP) {
        if (!ch->job->stream)
            drop_call(ch, e->call);
        return;
    }
    bool same = last && last->kind == e->kind && e->kind != TM_PARSE_CALL &&
                (e->kind != TM_PARSE_ARGUMENTS || last->call == e->call);
    if (!same && !(last = add_part(ch, e)))
        return;
    if (e->kind == TM_PARSE_CALL)
        make_id(ch->job, last->id);
    tm_buf_append(&ch->text, e->text, e->len);
    last->len += e->len;
}

bool tm_api_answer_open(tm_api_choice *ch)
{
    const tm_api_job *j = ch->job;
    const tm_parse_opts o = {.tools = j->tool_parser,
                             .reason = j->reason_parser,
                             .inside = j->inside,
                             .functions = j->tools.list,
                             .known_only = j->forced != NULL,
                             .calls_max = j->tools.one ? 1 : 0};
    if (!j->tool_parser && !j->reason_parser)
        return true;
    if (tm_parse_create(&ch->parse, &o, on_event, ch, NULL) != TM_OK)
        return false;
    tm_buf_init(&ch->raw, 0);
    if (j->forced)
        tm_parse_push(ch->parse, j->forced, strlen(j->forced));
    return true;
}

/* What the detokeniser gave. */
void tm_api_answer_take(tm_api_choice *ch)
{
    if (ch->raw.len > 0)
        tm_parse_push(ch->parse, ch->raw.data, ch->raw.len);
    ch->text.failed |= ch->raw.failed || tm_parse_failed(ch->parse);
    tm_buf_clear(&ch->raw);
}

const char *tm_api_answer_finish(tm_api_choice *ch, const char *reason)
{
    bool cut = strcmp(reason, "length") == 0;
    if (!ch->parse)
        return reason;
    tm_parse_finish(ch->parse, cut);
    ch->text.failed |= tm_parse_failed(ch->parse);
    if (tm_parse_complete(ch->parse) == 0 || (cut && tm_parse_in_call(ch->parse)))
        return reason;
    return ch->job->tools.old ? "function_call" : "tool_calls";
}

void tm_api_answer_deinit(tm_api_choice *ch)
{
    tm_parse_destroy(ch->parse);
    tm_buf_deinit(&ch->raw);
    free(ch->parts);
}

/* ---- the whole answer ---- */

static const char *part_text(const tm_api_choice *ch, const tm_api_part *part)
{
    return ch->text.data ? ch->text.data + part->begin : "";
}

/* All parts of a kind, joined into `raw`, which is of no other use by now. true: there was one. */
static bool join(tm_api_choice *ch, tm_parse_kind kind, int call)
{
    bool any = false;
    tm_buf_clear(&ch->raw);
    for (size_t i = 0; i < ch->part_count; i++) {
        const tm_api_part *part = &ch->parts[i];
        if (part->kind != kind || part->dropped || (call >= 0 && part->call != call))
            continue;
        any = true;
        tm_buf_append(&ch->raw, part_text(ch, part), part->len);
    }
    ch->text.failed |= ch->raw.failed;
    return any;
}

static void put_joined(tm_jw *w, const tm_api_choice *ch, const char *key)
{
    tm_jw_key(w, key);
    tm_jw_strn(w, ch->raw.data ? ch->raw.data : "", ch->raw.len);
}

static void put_function(tm_jw *w, tm_api_choice *ch, const tm_api_part *part)
{
    tm_jw_obj(w);
    tm_jw_key(w, "name");
    tm_jw_strn(w, part_text(ch, part), part->len);
    join(ch, TM_PARSE_ARGUMENTS, part->call);
    put_joined(w, ch, "arguments");
    tm_jw_obj_end(w);
}

static void put_call(tm_jw *w, tm_api_choice *ch, const tm_api_part *part)
{
    tm_jw_obj(w);
    tm_jw_kstr(w, "id", part->id);
    tm_jw_kstr(w, "type", "function");
    tm_jw_key(w, "function");
    put_function(w, ch, part);
    tm_jw_obj_end(w);
}

static int count_calls(const tm_api_choice *ch)
{
    int n = 0;
    for (size_t i = 0; i < ch->part_count; i++)
        n += ch->parts[i].kind == TM_PARSE_CALL && !ch->parts[i].dropped;
    return n;
}

static void put_calls(tm_jw *w, tm_api_choice *ch)
{
    bool old = ch->job->tools.old;
    tm_jw_key(w, old ? "function_call" : "tool_calls");
    if (!old)
        tm_jw_arr(w);
    for (size_t i = 0; i < ch->part_count; i++) {
        const tm_api_part *part = &ch->parts[i];
        if (part->kind != TM_PARSE_CALL || part->dropped)
            continue;
        if (old) {
            put_function(w, ch, part);
            return; /* the old form has room for one */
        }
        put_call(w, ch, part);
    }
    tm_jw_arr_end(w);
}

void tm_api_answer_put(tm_jw *w, tm_api_choice *ch)
{
    int calls = count_calls(ch);
    if (!join(ch, TM_PARSE_CONTENT, -1) && calls > 0)
        tm_jw_knull(w, "content");
    else
        put_joined(w, ch, "content");
    tm_jw_knull(w, "refusal");
    if (join(ch, TM_PARSE_REASONING, -1))
        put_joined(w, ch, "reasoning_content");
    if (calls > 0)
        put_calls(w, ch);
}

/* ---- one delta of a stream ---- */

static void put_call_delta(tm_jw *w, const tm_api_choice *ch, const tm_api_part *part)
{
    bool begins = part->kind == TM_PARSE_CALL, old = ch->job->tools.old;
    if (old) {
        tm_jw_key(w, "function_call");
    } else {
        tm_jw_key(w, "tool_calls");
        tm_jw_arr(w);
        tm_jw_obj(w);
        tm_jw_kint(w, "index", part->call);
        if (begins) {
            tm_jw_kstr(w, "id", part->id);
            tm_jw_kstr(w, "type", "function");
        }
        tm_jw_key(w, "function");
    }
    tm_jw_obj(w);
    if (begins) {
        tm_jw_key(w, "name");
        tm_jw_strn(w, part_text(ch, part), part->len);
    }
    tm_jw_key(w, "arguments");
    tm_jw_strn(w, part_text(ch, part), begins ? 0 : part->len);
    tm_jw_obj_end(w);
    if (!old) {
        tm_jw_obj_end(w);
        tm_jw_arr_end(w);
    }
}

void tm_api_answer_put_delta(tm_jw *w, const tm_api_choice *ch, const tm_api_part *part)
{
    tm_jw_kstr(w, "role", "assistant");
    if (part->kind == TM_PARSE_CALL || part->kind == TM_PARSE_ARGUMENTS) {
        put_call_delta(w, ch, part);
        return;
    }
    tm_jw_key(w, part->kind == TM_PARSE_REASONING ? "reasoning_content" : "content");
    tm_jw_strn(w, part_text(ch, part), part->len);
}
