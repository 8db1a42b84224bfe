/* See engine_rig.h. */
#include "tests/engine/engine_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

const fake_opts roomy = {.max_positions = 512, .blocks = 1000};

tm_engine_opts small_opts(void)
{
    tm_engine_opts o = tm_engine_opts_default();
    o.model.block_tokens = 8;
    o.max_batch_size = 8;
    o.max_prefill_token_num = 32;
    o.cache_max_entry_count = 1.0;
    o.queue_max = 64;
    return o;
}

rig rig_open(const fake_opts *f, const tm_engine_opts *o)
{
    rig r;
    tm_err err = TM_ERR_INIT;
    fake_reset(f);
    fake_comm_group(1, &r.comm);
    if (tm_engine_open(&r.e, o, r.comm, &err) != TM_OK)
        fail_msg("%s", err.msg);
    return r;
}

void rig_close(rig *r)
{
    fake_hold(false);
    tm_engine_close(r->e);
    tm_comm_destroy(r->comm);
    assert_int_equal(fake_errors(), 0);
}

void make_ask(ask *a, uint64_t id, int n, int first, int max_tokens)
{
    for (int i = 0; i < n; i++)
        a->prompt[i] = (first + i * 5) % (FAKE_VOCAB - 1);
    a->r = (tm_request){.id = id,
                        .prompt = a->prompt,
                        .prompt_len = (size_t)n,
                        .max_tokens = max_tokens,
                        .sampling = tm_sampling_default()};
    a->r.sampling.temperature = 0.0f;
    a->r.sampling.ignore_eos = true;
}

void random_ask(ask *a, rng *r, uint64_t id)
{
    make_ask(a, id, rng_between(r, 1, 60), rng_below(r, 3), rng_between(r, 1, 50));
    tm_sampling *s = &a->r.sampling;
    s->ignore_eos = rng_below(r, 3) > 0;
    s->min_tokens = rng_below(r, 3) ? 0 : rng_between(r, 1, 20);
    s->seed = rng_u64(r);
    s->choice = (uint32_t)rng_below(r, 3);
    if (rng_below(r, 3))
        s->temperature = 1.0f;
    if (rng_below(r, 2))
        s->top_k = rng_between(r, 2, 30);
    if (rng_below(r, 2))
        s->top_p = 0.8f;
    if (rng_below(r, 2)) {
        s->repetition_penalty = 1.3f;
        s->presence_penalty = 0.5f;
        s->frequency_penalty = 0.2f;
    }
    if (rng_below(r, 2))
        s->logprobs = rng_below(r, 4);
    if (rng_below(r, 4) == 0)
        s->prompt_logprobs = rng_below(r, 3);
    if (rng_below(r, 4) == 0)
        a->r.logits_last = rng_between(r, 1, 12);
}

void random_greedy_ask(ask *a, rng *r, uint64_t id)
{
    if (rng_below(r, 12) == 0) {
        random_ask(a, r, id); /* the host's answer is waited for while it takes part */
        return;
    }
    make_ask(a, id, rng_between(r, 1, 60), rng_below(r, 3), rng_between(r, 1, 50));
    a->r.sampling.ignore_eos = rng_below(r, 4) == 0;
    a->r.sampling.min_tokens = rng_below(r, 3) ? 0 : rng_between(r, 1, 20);
    a->r.priority = rng_below(r, 6) == 0;
    if (rng_below(r, 8) == 0)
        a->r.max_tokens = 0;
}

void run_alone(rig *g, const tm_request *r, answer *a)
{
    tm_request copy = *r;
    tm_err err = TM_ERR_INIT;
    if (drive_submit(g->e, &copy, a, &err) != TM_OK)
        fail_msg("%s", err.msg);
    drive_all(g->e, &a, 1);
}

void expect_same(const answer *got, const answer *want)
{
    assert_int_equal(got->n, want->n);
    assert_int_equal(got->finish, want->finish);
    assert_memory_equal(got->tokens, want->tokens, (size_t)want->n * sizeof(int32_t));
    assert_memory_equal(got->logprobs, want->logprobs, (size_t)want->n * sizeof(float));
    assert_int_equal(got->next_prompt_pos, want->next_prompt_pos);
    assert_memory_equal(got->prompt_logprobs, want->prompt_logprobs,
                        (size_t)want->next_prompt_pos * sizeof(float));
    assert_int_equal(got->first_logits_pos, want->first_logits_pos);
    assert_int_equal(got->n_logits, want->n_logits);
    assert_int_equal(got->tops, want->tops);
}
