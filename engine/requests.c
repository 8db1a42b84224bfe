/* Requests on their way in: the id table, and turning a tm_request into what the engine thread needs.
 *
 * All work that depends on the prompt's length (checking ids, hashing blocks, counting tokens for penalties) is
 * done here, on the submitting thread. */
#include <stdlib.h>

#include "common/check.h"
#include "engine/engine_impl.h"

tm_status tm_inbox_init(tm_inbox *in, int live_max, tm_err *err)
{
    size_t buckets = 64;
    while (buckets < (size_t)live_max)
        buckets *= 2;
    *in = (tm_inbox){.mask = buckets - 1};
    in->buckets = calloc(buckets, sizeof(*in->buckets));
    if (!in->buckets || pthread_mutex_init(&in->lock, NULL) != 0 ||
        pthread_cond_init(&in->work, NULL) != 0) {
        free(in->buckets);
        in->buckets = NULL;
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for a table of %d requests", live_max);
    }
    return TM_OK;
}

void tm_inbox_deinit(tm_inbox *in)
{
    if (!in->buckets)
        return;
    free(in->buckets);
    pthread_mutex_destroy(&in->lock);
    pthread_cond_destroy(&in->work);
}

static tm_live **bucket_of(const tm_inbox *in, uint64_t id)
{
    uint64_t h = id * 0x9E3779B97F4A7C15u;
    return &in->buckets[(h >> 32) & in->mask];
}

tm_live *tm_inbox_find(const tm_inbox *in, uint64_t id)
{
    tm_live *l = *bucket_of(in, id);
    while (l && l->id != id)
        l = l->chain;
    return l;
}

void tm_inbox_insert(tm_inbox *in, tm_live *l)
{
    tm_live **bucket = bucket_of(in, l->id);
    l->chain = *bucket;
    *bucket = l;
    l->next = in->all;
    if (in->all)
        in->all->prev = l;
    in->all = l;
    if (in->last)
        in->last->inbox_next = l;
    else
        in->first = l;
    in->last = l;
    in->count++;
}

void tm_inbox_remove(tm_inbox *in, tm_live *l)
{
    tm_live **link = bucket_of(in, l->id);
    while (*link != l) {
        TM_ASSERT(*link != NULL);
        link = &(*link)->chain;
    }
    *link = l->chain;
    if (l->prev)
        l->prev->next = l->next;
    else
        in->all = l->next;
    if (l->next)
        l->next->prev = l->prev;
}

static tm_status check_ids(const char *what, const int32_t *ids, size_t n, int vocab, tm_err *err)
{
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocab)
            return TM_FAIL(err, TM_STATUS_INVALID,
                           "%s id %d at %zu is outside the vocabulary of %d", what, (int)ids[i], i,
                           vocab);
    return TM_OK;
}

/* Prompt positions whose logits are wanted. A continued request was told about its prompt before its first
 * token, so there is nothing left to tell. */
static void choose_rows(const tm_request *r, tm_seq_opts *o)
{
    int32_t n = (int32_t)r->prompt_len;
    if (r->generated_len > 0)
        return;
    int32_t last = TM_MIN(r->logits_last, n);
    if (r->sampling.prompt_logprobs >= 0) {
        o->rows_to = last > 0 ? n : n - 1;
    } else if (last > 0) {
        o->rows_from = n - last;
        o->rows_to = n;
    }
}

static tm_status make_seq(const tm_engine *e, const tm_request *r, tm_live *l, tm_err *err)
{
    tm_seq_opts o = {.id = r->id,
                     .prompt = r->prompt,
                     .prompt_len = r->prompt_len,
                     .generated = r->generated,
                     .generated_len = r->generated_len,
                     .max_tokens = r->max_tokens,
                     .stop_ids = r->stop_ids,
                     .stop_count = r->stop_count,
                     .ignore_eos = r->sampling.ignore_eos,
                     .min_tokens = r->sampling.min_tokens,
                     .priority = r->priority,
                     .salt = r->cache_salt,
                     .rope_len = tm_model_rope_len(e->model, r->prompt_len),
                     .user = l};
    if (r->prompt_len <= INT32_MAX)
        choose_rows(r, &o);
    return tm_seq_create(&l->seq, &o, &e->limits, err);
}

tm_status tm_live_create(const tm_engine *e, const tm_request *r, tm_live **out, tm_err *err)
{
    int vocab = e->info.model.vocab;
    TM_TRY(tm_sampling_check(&r->sampling, vocab, err));
    if (r->logits_last < 0)
        return TM_FAIL(err, TM_STATUS_INVALID, "logits_last is %d, expected at least 0",
                       (int)r->logits_last);
    tm_live *l = calloc(1, sizeof(*l));
    if (!l)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for a request");
    tm_status st;
    l->id = r->id;
    l->logprobs = r->sampling.logprobs;
    l->prompt_logprobs = r->sampling.prompt_logprobs;
    l->logits_last = r->logits_last;
    /* Lengths first: they bound the loops over the ids. */
    TM_TRY_GOTO(make_seq(e, r, l, err), fail);
    TM_TRY_GOTO(check_ids("prompt", r->prompt, r->prompt_len, vocab, err), fail);
    TM_TRY_GOTO(check_ids("generated", r->generated, r->generated_len, vocab, err), fail);
    tm_sampler_opts so = {.params = &r->sampling,
                          .vocab = vocab,
                          .stop_ids = l->seq->stop_ids,
                          .stop_count = l->seq->stop_count,
                          .tokens = l->seq->tokens,
                          .n_prompt = l->seq->n_prompt,
                          .n_tokens = l->seq->n_tokens};
    TM_TRY_GOTO(tm_sampler_create(&l->sampler, &so, err), fail);
    *out = l;
    return TM_OK;

fail:
    tm_live_destroy(l);
    return st;
}

void tm_live_destroy(tm_live *l)
{
    if (!l)
        return;
    tm_sampler_destroy(l->sampler);
    tm_seq_destroy(l->seq);
    free(l);
}
