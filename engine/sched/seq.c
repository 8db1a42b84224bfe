/* Sequences: creation with every bound checked, the block keys, and the rule that ends a sequence. */
#include "engine/sched/seq.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/hash.h"
#include "engine/backend/backend.h"

static int compare_ids(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

static tm_status check_lengths(const tm_seq_opts *o, const tm_seq_limits *l, tm_err *err)
{
    if (o->prompt_len < 1)
        return TM_FAIL(err, TM_STATUS_INVALID, "the prompt is empty");
    if (o->max_tokens < 0 || o->min_tokens < 0)
        return TM_FAIL(err, TM_STATUS_INVALID,
                       "max_tokens %d and min_tokens %d must not be negative", (int)o->max_tokens,
                       (int)o->min_tokens);
    size_t room = (size_t)l->max_len - (o->max_tokens > 0 ? 1 : 0);
    if (o->prompt_len > room)
        return TM_FAIL(err, TM_STATUS_INVALID,
                       "the prompt has %zu tokens; at most %zu fit into the context of %d",
                       o->prompt_len, room, l->max_len);
    if (o->generated_len > (size_t)l->max_len - o->prompt_len)
        return TM_FAIL(err, TM_STATUS_INVALID,
                       "prompt and generated tokens are %zu + %zu; the context holds %d",
                       o->prompt_len, o->generated_len, l->max_len);
    if (o->generated_len > (size_t)o->max_tokens)
        return TM_FAIL(err, TM_STATUS_INVALID, "%zu tokens are already generated, max_tokens is %d",
                       o->generated_len, (int)o->max_tokens);
    if (o->rows_from < 0 || o->rows_to < o->rows_from || (size_t)o->rows_to > o->prompt_len)
        return TM_FAIL(err, TM_STATUS_INVALID, "logits of prompt positions %d to %d of %zu",
                       (int)o->rows_from, (int)o->rows_to, o->prompt_len);
    return TM_OK;
}

static void add_keys(tm_seq *s)
{
    if (!s->prefix_caching)
        return;
    for (; (s->n_keys + 1) * s->block_tokens <= s->n_tokens; s->n_keys++)
        tm_prefix_key_extend(&s->keys[s->n_keys], s->n_keys ? &s->keys[s->n_keys - 1] : &s->root,
                             s->tokens + s->n_keys * s->block_tokens, s->block_tokens);
}

static void fill(tm_seq *s, const tm_seq_opts *o, const tm_seq_limits *l)
{
    s->id = o->id;
    s->salt = o->salt;
    s->rope_len = o->rope_len;
    if (o->rope_len > 0) /* its keys are rotated unlike others */
        s->salt = tm_hash64(&o->salt, sizeof(o->salt), (uint64_t)o->rope_len);
    s->user = o->user;
    s->n_prompt = (int)o->prompt_len;
    s->n_given = (int)o->generated_len;
    s->n_tokens = s->n_prompt + s->n_given;
    s->max_tokens = o->max_tokens;
    s->min_tokens = o->min_tokens;
    s->priority = o->priority;
    s->rows_next = o->rows_from;
    s->rows_to = o->rows_to;
    s->block_tokens = l->block_tokens;
    s->prefix_caching = l->prefix_caching;
    memcpy(s->tokens, o->prompt, o->prompt_len * sizeof(*s->tokens));
    if (o->generated_len)
        memcpy(s->tokens + o->prompt_len, o->generated, o->generated_len * sizeof(*s->tokens));
    if (o->stop_count)
        memcpy(s->stop_ids, o->stop_ids, o->stop_count * sizeof(*s->stop_ids));
    s->stop_count = (int)o->stop_count;
    if (!o->ignore_eos)
        for (int i = 0; i < l->stop_count; i++)
            s->stop_ids[s->stop_count++] = l->stop_ids[i];
    qsort(s->stop_ids, (size_t)s->stop_count, sizeof(*s->stop_ids), compare_ids);
    tm_prefix_key_root(&s->root, l->digest, s->salt, s->block_tokens);
    add_keys(s);
}

tm_status tm_seq_create(tm_seq **out, const tm_seq_opts *o, const tm_seq_limits *l, tm_err *err)
{
    TM_TRY(check_lengths(o, l, err));
    int room = l->max_len - (int)o->prompt_len;
    int max_len = (int)o->prompt_len + TM_MIN(room, o->max_tokens);
    size_t blocks = ((size_t)max_len + (size_t)l->block_tokens - 1) / (size_t)l->block_tokens;
    size_t stops = o->stop_count + (size_t)l->stop_count + 1;
    if (o->stop_count > (size_t)1 << 16)
        return TM_FAIL(err, TM_STATUS_INVALID, "%zu stop ids; at most 65536", o->stop_count);
    tm_seq *s = calloc(1, sizeof(*s));
    if (!s)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for a sequence");
    s->tokens = malloc((size_t)max_len * sizeof(*s->tokens));
    s->blocks = malloc(blocks * sizeof(*s->blocks));
    s->keys = malloc(blocks * sizeof(*s->keys));
    s->stop_ids = malloc(stops * sizeof(*s->stop_ids));
    if (!s->tokens || !s->blocks || !s->keys || !s->stop_ids) {
        tm_seq_destroy(s);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for a sequence of %d tokens", max_len);
    }
    s->max_len = max_len;
    fill(s, o, l);
    *out = s;
    return TM_OK;
}

void tm_seq_destroy(tm_seq *s)
{
    if (!s)
        return;
    free(s->tokens);
    free(s->blocks);
    free(s->keys);
    free(s->stop_ids);
    free(s);
}

bool tm_seq_is_stop(const tm_seq *s, int32_t token)
{
    return s->stop_count && bsearch(&token, s->stop_ids, (size_t)s->stop_count,
                                    sizeof(*s->stop_ids), compare_ids) != NULL;
}

tm_seq_end tm_seq_ended(const tm_seq *s)
{
    int generated = tm_seq_generated(s);
    if (generated > 0 && generated > s->min_tokens && tm_seq_is_stop(s, s->tokens[s->n_tokens - 1]))
        return TM_SEQ_END_STOP;
    if (s->max_tokens > 0 && s->n_tokens >= s->max_len)
        return TM_SEQ_END_LENGTH;
    return TM_SEQ_GOES_ON;
}

void tm_seq_await(tm_seq *s, int logit)
{
    TM_ASSERT(!s->awaits && s->n_tokens < s->max_len);
    s->tokens[s->n_tokens++] = TM_TOKEN_PICKED(logit);
    s->awaits = true;
}

void tm_seq_settle(tm_seq *s, int32_t token)
{
    TM_ASSERT(s->awaits && token >= 0);
    s->tokens[s->n_tokens - 1] = token;
    s->awaits = false;
    add_keys(s);
}
