/* Server-sent events.
 *
 * Everything that is due for a choice is written into one reused buffer and given to the connection at once:
 * tokens that came together make one chunk. The part of a chunk that never changes was rendered when the
 * request began, so a chunk costs one escaping pass over its text and a few copies.
 *
 * When the client reads too slowly (BUSY) nothing more is written until the connection has drained; tokens
 * gather as text in the choice meanwhile, which takes a hundredth of the room of chunks. A client that does
 * not read at all is cut by the connection's write timeout. */
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "router/api/internal.h"

#define LITERAL(out, text) tm_buf_append((out), (text), sizeof(text) - 1)

static void put_int(tm_buf *out, int64_t v)
{
    tm_jw w;
    tm_jw_init(&w, out);
    tm_jw_int(&w, v);
}

static void put_prompt_ids(tm_buf *out, const tm_api_prompt *p)
{
    tm_jw w;
    LITERAL(out, ",\"prompt_token_ids\":");
    tm_jw_init(&w, out);
    tm_jw_arr(&w);
    for (size_t i = 0; i < p->len; i++)
        tm_jw_int(&w, p->ids[i]);
    tm_jw_arr_end(&w);
}

static void put_head(const tm_api_choice *ch, tm_buf *out)
{
    const tm_api_job *j = ch->job;
    tm_buf_append(out, j->head.data, j->head.len);
    LITERAL(out, "{\"index\":");
    put_int(out, ch->index);
}

/* What follows the text: the first `lps` records, the waiting ids, and finish or NULL. */
static void put_tail(tm_api_choice *ch, tm_buf *out, size_t lps, const char *finish)
{
    tm_api_job *j = ch->job;
    tm_jw w;
    bool first = !ch->role_sent;
    ch->role_sent = true;
    LITERAL(out, ",\"logprobs\":");
    tm_jw_init(&w, out);
    if (lps > 0)
        tm_api_lp_put(&w, ch, lps);
    else
        tm_jw_null(&w);
    if (j->return_ids && ch->id_count > 0) {
        LITERAL(out, ",\"token_ids\":");
        tm_api_put_ids(&w, NULL, ch->ids, ch->id_count);
        ch->id_count = 0;
    }
    if (first && j->return_ids && !j->chat)
        put_prompt_ids(out, &j->prompts[ch->prompt]);
    LITERAL(out, ",\"finish_reason\":");
    tm_jw_init(&w, out);
    tm_jw_str(&w, finish);
    LITERAL(out, "}]");
    if (j->return_ids && j->chat && !j->ids_sent) {
        put_prompt_ids(out, &j->prompts[0]);
        j->ids_sent = true;
    }
    if (j->include_usage)
        LITERAL(out, ",\"usage\":null");
    LITERAL(out, "}\n\n");
}

/* One chunk with `len` bytes of text. */
static void put_chunk(tm_api_choice *ch, tm_buf *out, const char *text, size_t len, size_t lps,
                      const char *finish)
{
    tm_jw w;
    put_head(ch, out);
    if (ch->job->chat)
        LITERAL(out, ",\"delta\":{\"role\":\"assistant\",\"content\":");
    else
        LITERAL(out, ",\"text\":");
    tm_jw_init(&w, out);
    tm_jw_strn(&w, text, len);
    if (ch->job->chat)
        tm_buf_putc(out, '}');
    put_tail(ch, out, lps, finish);
}

/* An answer that is taken apart: a chunk for each part. The records go with the first. */
static void put_parts(tm_api_choice *ch, tm_buf *out, size_t lps)
{
    tm_jw w;
    for (size_t i = 0; i < ch->part_count; i++) {
        put_head(ch, out);
        LITERAL(out, ",\"delta\":");
        tm_jw_init(&w, out);
        tm_jw_obj(&w);
        tm_api_answer_put_delta(&w, ch, &ch->parts[i]);
        tm_jw_obj_end(&w);
        put_tail(ch, out, i == 0 ? lps : 0, NULL);
    }
    ch->part_count = 0;
}

/* What the choice has to say now. */
static void put_due(tm_api_choice *ch, tm_buf *out)
{
    tm_api_job *j = ch->job;
    if (ch->admitted && !ch->role_sent && j->chat)
        put_chunk(ch, out, "", 0, 0, NULL);
    size_t lps = tm_api_lp_due(ch, ch->finished);
    if (ch->part_count > 0) {
        put_parts(ch, out, lps);
        tm_buf_clear(&ch->text);
        tm_api_lp_consume(ch, lps);
    } else if (ch->text.len > 0 || lps > 0 || (j->return_ids && ch->id_count > 0)) {
        put_chunk(ch, out, ch->text.data ? ch->text.data : "", ch->text.len, lps, NULL);
        tm_buf_clear(&ch->text);
        tm_api_lp_consume(ch, lps);
    }
    if (ch->finished && !ch->closed) {
        put_chunk(ch, out, "", 0, 0, ch->finish);
        ch->closed = true;
        j->open--;
    }
}

static void put_end(tm_api_job *j, tm_buf *out)
{
    if (j->include_usage) {
        tm_jw w;
        tm_buf_append(out, j->head.data, j->head.len);
        LITERAL(out, "],\"usage\":");
        tm_jw_init(&w, out);
        tm_api_put_usage(&w, j);
        LITERAL(out, "}\n\n");
    }
    LITERAL(out, "data: [DONE]\n\n");
}

/* The connection has room again: what gathered goes out, one choice after the other. */
static void on_drain(void *user, tm_http_req *req)
{
    (void)req;
    tm_api_call *c = user;
    tm_api_job *j = c->job;
    j->paused = false;
    for (int i = 0; i < j->choice_count && !j->over && !j->paused; i++)
        tm_api_stream_flush(&j->choices[i]);
}

static void begin(tm_api_job *j)
{
    tm_api_call *c = j->call;
    tm_api_headers(c);
    tm_http_set_header(c->http, "cache-control", "no-cache");
    tm_http_set_header(c->http, "x-accel-buffering", "no");
    tm_http_stream_begin(c->http, 200, "text/event-stream");
    tm_http_stream_on_drain(c->http, on_drain);
    TAILQ_INSERT_TAIL(&c->api->streams, j, link);
    j->begun = true;
}

void tm_api_stream_flush(tm_api_choice *ch)
{
    tm_api_job *j = ch->job;
    tm_api_call *c = j->call;
    tm_buf *out = &c->api->out;
    if (j->over || j->paused)
        return;
    if (!j->begun)
        begin(j);
    tm_buf_clear(out);
    put_due(ch, out);
    if (j->open == 0)
        put_end(j, out);
    if (out->failed || ch->text.failed) {
        tm_api_error e;
        tm_api_fail(&e, TM_API_INTERNAL, NULL, NULL);
        tm_api_job_fail(j, &e);
        return;
    }
    if (out->len == 0)
        return;
    tm_status st = tm_http_stream_write(c->http, out->data, out->len);
    j->last_write_ms = tm_clock_ms();
    if (j->open == 0) {
        tm_api_job_end(j);
        tm_http_stream_end(c->http);
    } else {
        j->paused = st == TM_STATUS_BUSY;
    }
}

/* After the status line an error is one event with the nested object, and a cut stream. */
void tm_api_stream_fail(tm_api_job *j, const tm_api_error *e)
{
    tm_api_call *c = j->call;
    tm_buf *out = &c->api->out;
    const char *code = tm_api_code_get(e->code)->code;
    c->seen.error = code ? code : "error";
    tm_buf_clear(out);
    LITERAL(out, "data: ");
    tm_api_error_body(e, out);
    LITERAL(out, "\n\n");
    tm_http_stream_write(c->http, out->data, out->len);
    tm_http_stream_abort(c->http);
}

void tm_api_stream_ping(tm_api *a, int64_t now_ms)
{
    static const char ping[] = ": ping\n\n";
    tm_api_job *j;
    TAILQ_FOREACH(j, &a->streams, link)
    {
        if (j->paused || now_ms - j->last_write_ms < a->opts.ping_ms)
            continue;
        j->last_write_ms = now_ms;
        j->paused = tm_http_stream_write(j->call->http, ping, sizeof ping - 1) == TM_STATUS_BUSY;
    }
}
