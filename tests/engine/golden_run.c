/* See golden_run.h. The goldens' README is beside them. */
#include "tests/engine/golden_run.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/file.h"

static uint32_t random_below(golden *g, uint32_t n)
{
    g->seed = g->seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(g->seed >> 33) % n;
}

static json_t *load_json(const char *dir, const char *name)
{
    char path[1024];
    json_t *root = NULL;
    tm_err err = TM_ERR_INIT;
    bool ok = tm_path_join(path, sizeof(path), dir, name) &&
              tm_json_load_file(path, 64 << 20, &root, &err) == TM_OK;
    if (!ok)
        fprintf(stderr, "%s/%s: %s\n", dir, name, err.msg);
    return root;
}

void golden_free(golden *g)
{
    for (int i = 0; i < g->count; i++)
        free((void *)(uintptr_t)g->seq[i].ids);
    free(g->logits);
    json_decref(g->root);
}

static bool load_logits(golden *g, const char *dir)
{
    char path[1024];
    char *data = NULL;
    size_t len = 0, want = (size_t)g->count * GOLDEN_TAIL * (size_t)g->vocab * sizeof(float);
    g->logits = malloc(want);
    if (!g->logits || !tm_path_join(path, sizeof(path), dir, "logits.npy") ||
        tm_file_read(path, 64 << 20, &data, &len, NULL) != TM_OK || len <= want) {
        free(data);
        return false;
    }
    memcpy(g->logits, data + len - want, want); /* the numbers are the end of the file */
    free(data);
    return true;
}

bool golden_load(golden *g, const char *dir, uint64_t seed)
{
    *g = (golden){.root = load_json(dir, "golden.json"), .seed = seed};
    const json_t *seqs = json_object_get(g->root, "sequences");
    g->vocab = (int)json_integer_value(json_object_get(g->root, "vocab_size"));
    if (json_array_size(seqs) < 1 || json_array_size(seqs) > RUN_SEQS_MAX)
        return false;
    for (size_t i = 0; i < json_array_size(seqs); i++) {
        const json_t *ids = json_object_get(json_array_get(seqs, i), "ids");
        int n = (int)json_array_size(ids);
        int32_t *copy = calloc((size_t)n + GOLDEN_STEPS, sizeof(*copy));
        if (!copy || n <= GOLDEN_TAIL)
            return false;
        for (int k = 0; k < n; k++)
            copy[k] = (int32_t)json_integer_value(json_array_get(ids, (size_t)k));
        g->seq[g->count++] = (run_seq){.ids = copy, .len = n, .rope_len = n};
    }
    return load_logits(g, dir);
}

void golden_reset(golden *g, run *r)
{
    for (int i = 0; i < g->count; i++)
        g->seq[i].done = g->seq[i].n_blocks = 0;
    r->next_block = 0;
}

/* ---- feeding ---- */

void golden_feed_whole(run *r, golden *g, float *out)
{
    for (int i = 0; i < g->count; i++) {
        run_item item = {&g->seq[i], g->seq[i].len, GOLDEN_TAIL};
        run_step(r, &item, 1, out + (size_t)i * GOLDEN_TAIL * (size_t)g->vocab);
    }
}

static bool unfinished(const golden *g)
{
    for (int i = 0; i < g->count; i++)
        if (g->seq[i].done < g->seq[i].len)
            return true;
    return false;
}

/* Some sequences take part, those that decode first. */
static int draw_step(golden *g, run_item *items)
{
    int n = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < g->count; i++) {
            run_seq *s = &g->seq[i];
            int left = s->len - GOLDEN_TAIL - s->done;
            if (pass == 0 && left <= 0 && s->done < s->len)
                items[n++] = (run_item){s, 1, 1};
            if (pass == 1 && left > 0 && random_below(g, 4) > 0)
                items[n++] = (run_item){s, 1 + (int)random_below(g, (uint32_t)left), 0};
        }
    return n;
}

void golden_feed_mixed(run *r, golden *g, float *out, float *logits)
{
    size_t row_size = (size_t)g->vocab;
    while (unfinished(g)) {
        run_item items[RUN_SEQS_MAX];
        int n = draw_step(g, items);
        if (n > 0)
            run_step(r, items, n, logits);
        for (int k = 0, row = 0; k < n; k++) {
            const run_seq *s = items[k].seq;
            size_t at =
                (size_t)(s - g->seq) * GOLDEN_TAIL + (size_t)(s->done - (s->len - GOLDEN_TAIL) - 1);
            if (items[k].want)
                memcpy(out + at * row_size, logits + (size_t)row++ * row_size,
                       row_size * sizeof(float));
        }
    }
}

double golden_nmse(const golden *g, const float *out)
{
    double worst = 0;
    size_t n = GOLDEN_TAIL * (size_t)g->vocab;
    for (int i = 0; i < g->count; i++) {
        double e = run_nmse(out + (size_t)i * n, g->logits + (size_t)i * n, n);
        worst = e > worst || e != e ? e : worst;
    }
    return worst;
}

int golden_feed_greedy(run *r, golden *g, bool exact, bool judge, float *logits, int *steps)
{
    int wrong = 0;
    for (int i = 0; i < g->count; i++) {
        const json_t *seq = json_array_get(json_object_get(g->root, "sequences"), (size_t)i);
        const json_t *greedy = json_object_get(seq, "greedy");
        run_seq s = g->seq[i];
        int32_t *ids = (int32_t *)(uintptr_t)s.ids;
        run_item item = {&s, s.len, 1};
        if (json_is_false(json_object_get(seq, "greedy_gate")))
            continue;
        for (int k = 0; k < (int)json_array_size(greedy) && k < GOLDEN_STEPS; k++) {
            const json_t *step = json_array_get(greedy, (size_t)k);
            const json_t *router = json_object_get(step, "router_margin");
            if (json_number_value(json_object_get(step, "margin")) < (exact ? 1e-3 : 0.2) ||
                (!exact && router && json_number_value(router) < 0.1))
                break;
            run_step(r, &item, 1, logits);
            int id = (int)json_integer_value(json_object_get(step, "id"));
            (*steps)++;
            wrong += judge && run_argmax(logits, g->vocab) != id;
            ids[g->seq[i].len + k] = id;
            item = (run_item){&s, 1, 1};
        }
    }
    return wrong;
}
