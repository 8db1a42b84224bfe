/* Tokens of one generation into text, logprobs and a finish.
 *
 * A stop id ends the sequence and is not text, but only dispatch knows whether a token that could be one did
 * end it (min_tokens may forbid it). So such a token is held for the moment: the next token or the end
 * decides. Stop strings are found by the detokeniser; the generation is then cancelled. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "router/api/args.h"
#include "router/api/internal.h"

static void choice_event(tm_api_choice *ch)
{
    tm_api_job *j = ch->job;
    if (j->over)
        return;
    if (j->stream) {
        tm_api_stream_flush(ch);
    } else if (ch->finished && !ch->closed) {
        ch->closed = true;
        if (--j->open == 0)
            tm_api_reply_job(j);
    }
}

static bool is_stop_id(const tm_api_job *j, int32_t token)
{
    for (int i = 0; i < j->stop_id_count; i++)
        if (j->stop_ids[i] == token)
            return true;
    if (j->ignore_eos)
        return false;
    return tm_served_stops_at(j->served, token);
}

/* Special tokens that are skipped write nothing, so they have no record either. */
static bool has_record(const tm_api_job *j, int32_t token)
{
    if (j->logprobs < 0)
        return false;
    for (int i = 0; i < j->keep_count; i++)
        if (j->keep[i] == token)
            return true;
    return !(j->skip_special && tm_tokenizer_is_special(j->served->tokenizer, token));
}

static void finish(tm_api_choice *ch, const char *reason)
{
    ch->finished = true;
    ch->finish = tm_api_answer_finish(ch, reason);
    if (ch->gen)
        tm_gen_cancel(ch->gen);
    ch->gen = NULL;
}

/* Counts what the detokeniser appended since its buffer had `before` bytes, and has it taken apart. */
static void took_text(tm_api_choice *ch, size_t before)
{
    if (!ch->parse) {
        ch->text_bytes += ch->text.len - before;
        return;
    }
    bool inside = tm_parse_inside(ch->parse);
    ch->text_bytes += ch->raw.len - before;
    tm_api_answer_take(ch);
    ch->reasoning_tokens += inside && tm_parse_inside(ch->parse);
}

/* The text of a token. True when a stop string completed, or the only call that was wanted. */
static bool take_token(tm_api_choice *ch, int32_t token, const tm_api_lp *lp)
{
    tm_buf *out = ch->parse ? &ch->raw : &ch->text;
    if (lp)
        tm_api_lp_add(ch, *lp);
    size_t before = out->len;
    bool stopped = tm_detok_push(ch->detok, token, out);
    took_text(ch, before);
    if (stopped)
        tm_api_lp_trim(ch);
    return stopped || (ch->parse && tm_parse_full(ch->parse));
}

static bool release_held(tm_api_choice *ch)
{
    if (!ch->holds)
        return false;
    ch->holds = false;
    return take_token(ch, ch->held, has_record(ch->job, ch->held) ? &ch->held_lp : NULL);
}

static void keep_id(tm_api_choice *ch, int32_t token)
{
    if (!ch->job->return_ids)
        return;
    if (ch->id_count == ch->id_cap) {
        size_t cap = TM_MAX(ch->id_cap * 2, (size_t)16);
        int32_t *ids = realloc(ch->ids, cap * sizeof *ids);
        if (!ids) {
            ch->text.failed = true; /* ends the answer with an error */
            return;
        }
        ch->ids = ids;
        ch->id_cap = cap;
    }
    ch->ids[ch->id_count++] = token;
}

/* One token. True when the answer is over. */
static bool add_token(tm_api_choice *ch, const tm_gen_token *t)
{
    tm_api_job *j = ch->job;
    if (release_held(ch))
        return true;
    ch->generated++;
    keep_id(ch, t->token);
    bool record = has_record(j, t->token);
    tm_api_lp lp = {0};
    if (record)
        lp = tm_api_lp_make(ch, t, true);
    if (!is_stop_id(j, t->token))
        return take_token(ch, t->token, record ? &lp : NULL);
    ch->holds = true;
    ch->held = t->token;
    ch->held_lp = lp;
    return false;
}

/* ---- echo ---- */

static void put_echo(tm_api_choice *ch)
{
    const tm_api_prompt *p = &ch->job->prompts[ch->prompt];
    if (ch->echoed || !ch->job->echo)
        return;
    ch->echoed = true;
    tm_buf_append(&ch->text, p->echo, p->echo_len);
    ch->text_bytes += p->echo_len;
}

/* A BOS that the tokenizer added is not in the text of the prompt and has no record. */
static bool in_echo(const tm_api_job *j, const tm_api_prompt *p, int32_t token)
{
    size_t len;
    const char *piece = tm_tokenizer_piece(j->served->tokenizer, token, &len);
    if (!piece || !tm_tokenizer_is_special(j->served->tokenizer, token))
        return true;
    return len <= p->echo_len && memcmp(piece, p->echo, len) == 0;
}

static void first_prompt_record(tm_api_choice *ch)
{
    tm_api_job *j = ch->job;
    const tm_api_prompt *p = &j->prompts[ch->prompt];
    const tm_gen_token first = {.token = p->ids[0]};
    if (ch->prompt_pos > 0)
        return;
    ch->prompt_pos = 1;
    if (in_echo(j, p, first.token))
        tm_api_lp_add(ch, tm_api_lp_make(ch, &first, false));
}

static void on_prompt(void *user, int32_t first_pos, const tm_gen_token *tokens, int count)
{
    tm_api_choice *ch = user;
    if (!ch->job->echo || ch->job->logprobs < 0 || ch->echoed)
        return;
    first_prompt_record(ch);
    /* After a move the prompt is computed again: what is here already is not taken twice. */
    for (int i = 0; i < count; i++) {
        if (first_pos + i != ch->prompt_pos)
            continue;
        ch->prompt_pos++;
        tm_api_lp_add(ch, tm_api_lp_make(ch, &tokens[i], true));
    }
    if ((size_t)ch->prompt_pos >= ch->job->prompts[ch->prompt].len) {
        put_echo(ch);
        choice_event(ch);
    }
}

/* The prompt comes before the first token, whatever was heard of its log-probabilities. */
static void settle_echo(tm_api_choice *ch)
{
    if (!ch->job->echo || ch->echoed)
        return;
    if (ch->job->logprobs >= 0)
        first_prompt_record(ch);
    put_echo(ch);
}

/* ---- callbacks of dispatch ---- */

static void on_admitted(void *user, int32_t prompt_tokens, int32_t cached_tokens)
{
    (void)prompt_tokens;
    tm_api_choice *ch = user;
    tm_api_call *c = ch->job->call;
    snprintf(c->seen.group, sizeof c->seen.group, "%s", tm_gen_group(ch->gen));
    if (ch->admitted) {
        c->seen.moves++;
        return;
    }
    ch->admitted = true;
    /* The prompt counts once, however many answers it has. */
    if (ch->index % ch->job->n == 0)
        c->seen.cached_tokens += cached_tokens;
    if (ch->job->logprobs < 0)
        put_echo(ch);
    choice_event(ch);
}

static void on_tokens(void *user, int32_t first_pos, const tm_gen_token *tokens, int count)
{
    (void)first_pos; /* dispatch delivers in order and once */
    tm_api_choice *ch = user;
    settle_echo(ch);
    int32_t before = ch->generated;
    for (int i = 0; i < count && !ch->finished; i++)
        if (add_token(ch, &tokens[i]))
            finish(ch, "stop");
    tm_api_call *c = ch->job->call;
    tm_observe_tokens(c->api->opts.metrics, &c->seen, ch->generated - before);
    choice_event(ch);
}

static void on_end(void *user, tm_gen_finish how)
{
    tm_api_choice *ch = user;
    ch->gen = NULL;
    settle_echo(ch);
    bool stopped = false;
    if (how == TM_GEN_STOP && !ch->job->include_stop)
        ch->holds = false;
    else
        stopped = release_held(ch);
    if (!stopped) {
        tm_buf *out = ch->parse ? &ch->raw : &ch->text;
        size_t before = out->len;
        tm_detok_finish(ch->detok, out);
        took_text(ch, before);
    }
    finish(ch, how == TM_GEN_STOP || stopped ? "stop" : "length");
    choice_event(ch);
}

static void on_error(void *user, tm_gen_error error, int64_t retry_after_ms)
{
    tm_api_choice *ch = user;
    tm_api_error e;
    ch->gen = NULL;
    tm_api_fail_gen(&e, ch->job->call->api->opts.metrics, error, retry_after_ms);
    tm_api_job_fail(ch->job, &e);
}

const tm_gen_ops tm_api_choice_ops = {on_admitted, on_prompt, on_tokens, on_end, on_error};

void tm_api_choice_deinit(tm_api_choice *ch)
{
    TM_ASSERT(ch->gen == NULL);
    tm_detok_destroy(ch->detok);
    tm_api_answer_deinit(ch);
    tm_buf_deinit(&ch->text);
    free(ch->lps);
    free(ch->tops);
    free(ch->ids);
}
