/* The whole answer of a request in one body. */
#include <stdio.h>

#include "common/check.h"
#include "router/api/internal.h"

void tm_api_put_ids(tm_jw *w, const char *key, const int32_t *ids, size_t count)
{
    if (key)
        tm_jw_key(w, key);
    else
        w->after_key = true; /* the caller wrote the key */
    tm_jw_arr(w);
    for (size_t i = 0; i < count; i++)
        tm_jw_int(w, ids[i]);
    tm_jw_arr_end(w);
}

void tm_api_put_usage(tm_jw *w, const tm_api_job *j)
{
    int64_t prompt = j->call->seen.prompt_tokens, output = 0, reasoning = 0;
    for (int i = 0; i < j->choice_count; i++) {
        output += j->choices[i].generated;
        reasoning += j->choices[i].reasoning_tokens;
    }
    tm_jw_obj(w);
    tm_jw_kint(w, "prompt_tokens", prompt);
    tm_jw_kint(w, "completion_tokens", output);
    tm_jw_kint(w, "total_tokens", prompt + output);
    tm_jw_key(w, "prompt_tokens_details");
    tm_jw_obj(w);
    tm_jw_kint(w, "cached_tokens", j->call->seen.cached_tokens);
    tm_jw_obj_end(w);
    tm_jw_key(w, "completion_tokens_details");
    tm_jw_obj(w);
    tm_jw_kint(w, "reasoning_tokens", reasoning);
    tm_jw_obj_end(w);
    tm_jw_obj_end(w);
}

static void put_choice(tm_jw *w, tm_api_choice *ch)
{
    const tm_api_job *j = ch->job;
    const char *text = ch->text.data ? ch->text.data : "";
    tm_jw_obj(w);
    tm_jw_kint(w, "index", ch->index);
    if (j->chat) {
        tm_jw_key(w, "message");
        tm_jw_obj(w);
        tm_jw_kstr(w, "role", "assistant");
        if (ch->parse) {
            tm_api_answer_put(w, ch);
        } else {
            tm_jw_key(w, "content");
            tm_jw_strn(w, text, ch->text.len);
            tm_jw_knull(w, "refusal");
        }
        tm_jw_obj_end(w);
    } else {
        tm_jw_key(w, "text");
        tm_jw_strn(w, text, ch->text.len);
    }
    tm_jw_key(w, "logprobs");
    if (j->logprobs >= 0)
        tm_api_lp_put(w, ch, ch->lp_count);
    else
        tm_jw_null(w);
    tm_jw_kstr(w, "finish_reason", ch->finish);
    if (j->return_ids) {
        const tm_api_prompt *p = &j->prompts[ch->prompt];
        tm_api_put_ids(w, "token_ids", ch->ids, ch->id_count);
        if (!j->chat)
            tm_api_put_ids(w, "prompt_token_ids", p->ids, p->len);
    }
    tm_jw_obj_end(w);
}

void tm_api_reply_job(tm_api_job *j)
{
    tm_buf *out = &j->call->api->out;
    char fingerprint[32];
    tm_jw w;
    snprintf(fingerprint, sizeof fingerprint, "tm-%.12s", j->served->digest);
    tm_buf_clear(out);
    tm_jw_init(&w, out);
    tm_jw_obj(&w);
    tm_jw_kstr(&w, "id", j->id);
    tm_jw_kstr(&w, "object", j->chat ? "chat.completion" : "text_completion");
    tm_jw_kint(&w, "created", j->created);
    tm_jw_kstr(&w, "model", j->served->name);
    tm_jw_kstr(&w, "system_fingerprint", fingerprint);
    tm_jw_key(&w, "choices");
    tm_jw_arr(&w);
    for (int i = 0; i < j->choice_count; i++) {
        put_choice(&w, &j->choices[i]);
        out->failed = out->failed || j->choices[i].text.failed;
    }
    tm_jw_arr_end(&w);
    tm_jw_key(&w, "usage");
    tm_api_put_usage(&w, j);
    if (j->return_ids && j->chat)
        tm_api_put_ids(&w, "prompt_token_ids", j->prompts[0].ids, j->prompts[0].len);
    tm_jw_obj_end(&w);
    tm_api_job_end(j);
    tm_api_reply(j->call, 200);
}
