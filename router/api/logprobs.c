/* Log-probability records: gathered per token, given out with the text they belong to.
 *
 * Text may be held back (a cut character, the beginning of a stop string), so a record waits until the text
 * given out has passed the place where its token begins. A token that writes nothing (a skipped special token)
 * has no record: the bytes of all records together are the text. */
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "router/api/internal.h"

static size_t count_chars(const char *s, size_t len)
{
    size_t n = 0;
    for (size_t i = 0; i < len; i++)
        n += ((unsigned char)s[i] & 0xc0) != 0x80;
    return n;
}

static bool grow(void **data, size_t *cap, size_t need, size_t size)
{
    if (need <= *cap)
        return true;
    size_t n = TM_MAX(TM_MAX(*cap * 2, need), (size_t)8);
    void *p = realloc(*data, n * size);
    if (!p)
        return false;
    *data = p;
    *cap = n;
    return true;
}

/* Keeps the best ones and moves the text position over the token. */
tm_api_lp tm_api_lp_make(tm_api_choice *ch, const tm_gen_token *t, bool has_logprob)
{
    size_t len = 0;
    const char *piece = tm_tokenizer_piece(ch->job->served->tokenizer, t->token, &len);
    tm_api_lp lp = {.token = t->token,
                    .logprob = t->logprob,
                    .has_logprob = has_logprob,
                    .begin = ch->raw_bytes,
                    .char_offset = ch->raw_chars,
                    .top_start = (uint32_t)ch->top_count};
    ch->raw_bytes += len;
    ch->raw_chars += piece ? count_chars(piece, len) : 0;
    int count = TM_MIN(t->top_count, TM_MAX(ch->job->logprobs, 0));
    void *tops = ch->tops;
    if (count > 0 && grow(&tops, &ch->top_cap, ch->top_count + (size_t)count, sizeof *ch->tops)) {
        ch->tops = tops;
        memcpy(ch->tops + ch->top_count, t->top, (size_t)count * sizeof *ch->tops);
        ch->top_count += (size_t)count;
        lp.top_count = (uint16_t)count;
    }
    return lp;
}

void tm_api_lp_add(tm_api_choice *ch, tm_api_lp lp)
{
    void *lps = ch->lps;
    if (grow(&lps, &ch->lp_cap, ch->lp_count + 1, sizeof *ch->lps)) {
        ch->lps = lps;
        ch->lps[ch->lp_count++] = lp;
    }
}

void tm_api_lp_trim(tm_api_choice *ch)
{
    while (ch->lp_count > 0 && ch->lps[ch->lp_count - 1].begin >= ch->text_bytes)
        ch->lp_count--;
}

size_t tm_api_lp_due(const tm_api_choice *ch, bool all)
{
    if (all)
        return ch->lp_count;
    size_t n = 0;
    while (n < ch->lp_count && ch->lps[n].begin < ch->text_bytes)
        n++;
    return n;
}

/* The best ones of records that are gone make room, also while later records still wait. */
static void drop_tops(tm_api_choice *ch)
{
    uint32_t gone = ch->lp_count > 0 ? ch->lps[0].top_start
                    : ch->holds      ? ch->held_lp.top_start
                                     : (uint32_t)ch->top_count;
    if (gone == 0)
        return;
    ch->top_count -= gone;
    memmove(ch->tops, ch->tops + gone, ch->top_count * sizeof *ch->tops);
    for (size_t i = 0; i < ch->lp_count; i++)
        ch->lps[i].top_start -= gone;
    if (ch->holds)
        ch->held_lp.top_start -= gone;
}

void tm_api_lp_consume(tm_api_choice *ch, size_t count)
{
    if (count == 0)
        return;
    memmove(ch->lps, ch->lps + count, (ch->lp_count - count) * sizeof *ch->lps);
    ch->lp_count -= count;
    drop_tops(ch);
}

static const char *piece_of(const tm_api_choice *ch, int32_t token, size_t *len)
{
    *len = 0;
    const char *p = tm_tokenizer_piece(ch->job->served->tokenizer, token, len);
    return p ? p : "";
}

static void put_bytes(tm_jw *w, const char *piece, size_t len)
{
    tm_jw_key(w, "bytes");
    tm_jw_arr(w);
    for (size_t i = 0; i < len; i++)
        tm_jw_int(w, (unsigned char)piece[i]);
    tm_jw_arr_end(w);
}

static void put_logprob(tm_jw *w, bool known, float v)
{
    if (known)
        tm_jw_f32(w, TM_MAX(v, -9999.0f)); /* JSON has no minus infinity */
    else
        tm_jw_null(w);
}

static void put_chat_entry(tm_jw *w, const tm_api_choice *ch, int32_t token, bool known,
                           float logprob)
{
    size_t len;
    const char *piece = piece_of(ch, token, &len);
    tm_jw_key(w, "token");
    tm_jw_strn(w, piece, len);
    tm_jw_key(w, "logprob");
    put_logprob(w, known, logprob);
    put_bytes(w, piece, len);
}

static void put_chat(tm_jw *w, const tm_api_choice *ch, size_t count)
{
    tm_jw_obj(w);
    tm_jw_key(w, "content");
    tm_jw_arr(w);
    for (size_t i = 0; i < count; i++) {
        const tm_api_lp *lp = &ch->lps[i];
        tm_jw_obj(w);
        put_chat_entry(w, ch, lp->token, lp->has_logprob, lp->logprob);
        tm_jw_key(w, "top_logprobs");
        tm_jw_arr(w);
        for (size_t k = 0; k < lp->top_count; k++) {
            const tm_top *t = &ch->tops[lp->top_start + k];
            tm_jw_obj(w);
            put_chat_entry(w, ch, t->token, true, t->logprob);
            tm_jw_obj_end(w);
        }
        tm_jw_arr_end(w);
        tm_jw_obj_end(w);
    }
    tm_jw_arr_end(w);
    tm_jw_knull(w, "refusal");
    tm_jw_obj_end(w);
}

/* The old form names a token that is not text by its bytes, since it is a key of an object. */
static void token_name(tm_buf *out, const tm_api_choice *ch, int32_t token)
{
    size_t len;
    const char *piece = piece_of(ch, token, &len);
    tm_buf_clear(out);
    if (tm_utf8_valid(piece, len) && memchr(piece, '\0', len) == NULL) {
        tm_buf_append(out, piece, len);
        return;
    }
    tm_buf_puts(out, "bytes:");
    for (size_t i = 0; i < len; i++)
        tm_buf_printf(out, "\\x%02x", (unsigned char)piece[i]);
}

static void put_tops(tm_jw *w, const tm_api_choice *ch, const tm_api_lp *lp, tm_buf *name)
{
    if (!lp->has_logprob) {
        tm_jw_null(w);
        return;
    }
    tm_jw_obj(w);
    for (size_t k = 0; k < lp->top_count; k++) {
        const tm_top *t = &ch->tops[lp->top_start + k];
        token_name(name, ch, t->token);
        tm_jw_key(w, name->data ? name->data : "");
        put_logprob(w, true, t->logprob);
    }
    tm_jw_obj_end(w);
}

static void put_completion(tm_jw *w, const tm_api_choice *ch, size_t count)
{
    tm_buf name;
    tm_buf_init(&name, 0);
    tm_jw_obj(w);
    tm_jw_key(w, "tokens");
    tm_jw_arr(w);
    for (size_t i = 0; i < count; i++) {
        token_name(&name, ch, ch->lps[i].token);
        tm_jw_strn(w, name.data ? name.data : "", name.len);
    }
    tm_jw_arr_end(w);
    tm_jw_key(w, "token_logprobs");
    tm_jw_arr(w);
    for (size_t i = 0; i < count; i++)
        put_logprob(w, ch->lps[i].has_logprob, ch->lps[i].logprob);
    tm_jw_arr_end(w);
    tm_jw_key(w, "top_logprobs");
    if (ch->job->logprobs > 0) {
        tm_jw_arr(w);
        for (size_t i = 0; i < count; i++)
            put_tops(w, ch, &ch->lps[i], &name);
        tm_jw_arr_end(w);
    } else {
        tm_jw_null(w);
    }
    tm_jw_key(w, "text_offset");
    tm_jw_arr(w);
    for (size_t i = 0; i < count; i++)
        tm_jw_int(w, (int64_t)ch->lps[i].char_offset);
    tm_jw_arr_end(w);
    tm_jw_obj_end(w);
    tm_buf_deinit(&name);
}

void tm_api_lp_put(tm_jw *w, const tm_api_choice *ch, size_t count)
{
    if (ch->job->chat)
        put_chat(w, ch, count);
    else
        put_completion(w, ch, count);
}
