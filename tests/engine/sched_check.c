/* The scheduler's invariants, one by one. */
#include "tests/engine/sched_check.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

#include "engine/sched/sched_impl.h"

static void check_running(const tm_sched *s, int *refs, int64_t *pending)
{
    for (int i = 0; i < s->n_running; i++) {
        const tm_seq *q = s->running[i];
        assert_int_equal(q->state, TM_SEQ_RUNNING);
        assert_true(i == 0 || tm_sched_before(s->running[i - 1], q));
        /* A scored prompt is complete while its last step is in flight. */
        assert_true(q->n_computed < q->n_tokens + (q->max_tokens == 0 && s->in_flight > 0));
        assert_true(q->n_tokens <= q->max_len);
        assert_true(!q->awaits || s->in_flight > 0);
        assert_true(q->n_blocks * q->block_tokens >= q->n_computed);
        assert_true(q->n_published <= q->n_blocks && q->n_published <= q->n_keys);
        *pending += q->n_tokens - q->n_computed;
        for (int b = 0; b < q->n_blocks; b++) {
            refs[q->blocks[b]]++;
            assert_int_equal(tm_prefix_tree_contains(s->tree, q->blocks[b]), b < q->n_published);
            for (int other = 0; other < b; other++)
                assert_int_not_equal(q->blocks[b], q->blocks[other]);
        }
    }
}

static void check_waiting(const tm_sched *s, int64_t *pending)
{
    int n = 0, preempted = 0;
    for (const tm_seq *q = s->wait_first; q; q = q->next) {
        assert_int_equal(q->state, TM_SEQ_WAITING);
        assert_true(!q->next || (q->next->prev == q && tm_sched_before(q, q->next)));
        assert_int_equal(q->n_blocks, 0);
        assert_int_equal(q->n_computed, 0);
        *pending += q->n_tokens;
        preempted += q->admitted;
        n++;
    }
    assert_int_equal(n, s->n_waiting);
    assert_int_equal(preempted, s->n_preempted);
}

void sched_check(const tm_sched *s)
{
    int total = s->opts.n_blocks, used = 0, cached = 0;
    int64_t pending = 0;
    int *refs = calloc((size_t)total, sizeof(*refs));
    assert_non_null(refs);
    check_running(s, refs, &pending);
    check_waiting(s, &pending);
    assert_int_equal(pending, s->pending);
    for (int b = 0; b < total; b++) {
        assert_int_equal(refs[b], tm_block_pool_refs(s->pool, b));
        used += refs[b] > 0;
        cached += refs[b] == 0 && tm_prefix_tree_contains(s->tree, b);
    }
    assert_int_equal(cached, tm_block_pool_reusable(s->pool));
    assert_int_equal(used + cached + tm_block_pool_free(s->pool), total);
    free(refs);
}
