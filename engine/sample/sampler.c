/* The sampling pipeline over one row.
 *
 * Cost for V logits: a maximum and an exponential pass, both in vector registers, then work in proportion to the
 * tokens that can still be chosen. Filters do not sort: a lower bound on the surviving weights, known from the
 * block sums and maxima, leaves a short list of candidates, and a radix selection cuts it. */
#include "engine/sample/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "engine/sample/mass.h"
#include "engine/sample/philox.h"
#include "engine/sample/row.h"
#include "engine/sample/seen.h"

#define GREEDY_BELOW 1e-5f

struct tm_sampler {
    tm_sampling p; /* logit_bias points to bias */
    int vocab;
    tm_logit_bias *bias;
    int32_t *stop_ids;
    int stop_count;
    bool greedy, penalties, edits; /* edits: penalties or bias */
    int generated;                 /* tokens that it was told of */
    tm_seen seen;
};

struct tm_sample_space {
    int vocab, blocks;
    float *raw;    /* [V] logits before edits */
    float *w;      /* [V] weights */
    float *spare;  /* [V] for the cuts */
    float *cand_w; /* [V] candidates in id order */
    int32_t *cand_id;
    uint64_t *block_mass; /* [blocks] */
    float *block_max;
    int32_t top_ids[TM_LOGPROBS_MAX];
    float top_values[TM_LOGPROBS_MAX];
};

/* One rule per parameter; the comparisons are false for NaN. */
tm_status tm_sampling_check(const tm_sampling *p, int vocab, tm_err *err)
{
    const struct {
        const char *name;
        double value, min, max;
    } rules[] = {
        {"temperature", (double)p->temperature, 0.0, 1e6},
        {"top_k", p->top_k, 0.0, INT32_MAX},
        {"top_p", (double)p->top_p, 0.0, 1.0},
        {"min_p", (double)p->min_p, 0.0, 1.0},
        {"repetition_penalty", (double)p->repetition_penalty, 1e-3, 1e3},
        {"presence_penalty", (double)p->presence_penalty, -1e3, 1e3},
        {"frequency_penalty", (double)p->frequency_penalty, -1e3, 1e3},
        {"logprobs", p->logprobs, -1.0, TM_LOGPROBS_MAX},
        {"prompt_logprobs", p->prompt_logprobs, -1.0, TM_LOGPROBS_MAX},
        {"min_tokens", p->min_tokens, 0.0, INT32_MAX},
        {"number of logit_bias entries", (double)p->logit_bias_count, 0.0, (double)vocab},
    };
    for (size_t i = 0; i < TM_ARRAY_LEN(rules); i++)
        if (!(rules[i].value >= rules[i].min && rules[i].value <= rules[i].max))
            return TM_FAIL(err, TM_STATUS_INVALID, "%s is %g, possible are %g to %g", rules[i].name,
                           rules[i].value, rules[i].min, rules[i].max);
    for (size_t i = 0; i < p->logit_bias_count; i++) {
        const tm_logit_bias *b = &p->logit_bias[i];
        if (b->token < 0 || b->token >= vocab || !(fabsf(b->bias) <= 1e6f))
            return TM_FAIL(err, TM_STATUS_INVALID,
                           "logit_bias of token %d is %g; ids are 0 to %d, biases -1e6 to 1e6",
                           (int)b->token, (double)b->bias, vocab - 1);
    }
    return TM_OK;
}

static tm_status replay(tm_sampler *s, const tm_sampler_opts *o)
{
    if (!s->penalties)
        return TM_OK;
    for (int i = 0; i < o->n_tokens; i++)
        TM_TRY(tm_seen_add(&s->seen, o->tokens[i], i >= o->n_prompt));
    return TM_OK;
}

static int by_token(const void *a, const void *b)
{
    const tm_logit_bias *x = a, *y = b;
    if (x->token != y->token)
        return x->token < y->token ? -1 : 1;
    return (x->bias > y->bias) - (x->bias < y->bias);
}

/* One entry for each token. */
static void merge_bias(tm_sampler *s)
{
    size_t n = 0;
    qsort(s->bias, s->p.logit_bias_count, sizeof(*s->bias), by_token);
    for (size_t i = 0; i < s->p.logit_bias_count; i++)
        if (n > 0 && s->bias[n - 1].token == s->bias[i].token)
            s->bias[n - 1].bias += s->bias[i].bias;
        else
            s->bias[n++] = s->bias[i];
    s->p.logit_bias_count = n;
}

tm_status tm_sampler_create(tm_sampler **out, const tm_sampler_opts *o, tm_err *err)
{
    tm_sampler *s = calloc(1, sizeof(*s));
    if (!s)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for a sampler");
    const tm_sampling *p = o->params;
    s->p = *p;
    s->vocab = o->vocab;
    s->generated = o->n_tokens - o->n_prompt;
    tm_seen_init(&s->seen);
    s->greedy = p->temperature < GREEDY_BELOW || p->top_k == 1 || p->top_p == 0.0f;
    s->penalties = p->repetition_penalty != 1.0f || p->presence_penalty != 0.0f ||
                   p->frequency_penalty != 0.0f;
    s->edits = s->penalties || p->logit_bias_count > 0;
    s->bias = malloc((p->logit_bias_count + 1) * sizeof(*s->bias));
    s->stop_ids = malloc(((size_t)o->stop_count + 1) * sizeof(*s->stop_ids));
    if (!s->bias || !s->stop_ids || replay(s, o) != TM_OK) {
        tm_sampler_destroy(s);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for a sampler");
    }
    if (p->logit_bias_count)
        memcpy(s->bias, p->logit_bias, p->logit_bias_count * sizeof(*s->bias));
    s->p.logit_bias = s->bias;
    merge_bias(s);
    for (int i = 0; i < o->stop_count; i++)
        if (o->stop_ids[i] >= 0 && o->stop_ids[i] < o->vocab)
            s->stop_ids[s->stop_count++] = o->stop_ids[i];
    *out = s;
    return TM_OK;
}

void tm_sampler_destroy(tm_sampler *s)
{
    if (!s)
        return;
    tm_seen_deinit(&s->seen);
    free(s->bias);
    free(s->stop_ids);
    free(s);
}

tm_status tm_sampler_accept(tm_sampler *s, int32_t token)
{
    s->generated++;
    return s->penalties ? tm_seen_add(&s->seen, token, true) : TM_OK;
}

bool tm_sampler_knows(const tm_sampler *s, int position)
{
    return !s->penalties || s->generated >= position;
}

bool tm_sampler_takes_best(const tm_sampler *s, int position)
{
    bool masked = position < s->p.min_tokens && s->stop_count > 0;
    return s->greedy && !s->edits && !masked && s->p.logprobs < 0;
}

tm_status tm_sample_space_create(tm_sample_space **out, int vocab, tm_err *err)
{
    tm_sample_space *sp = calloc(1, sizeof(*sp));
    if (!sp)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for a sampling workspace");
    size_t v = (size_t)vocab, blocks = (v + TM_ROW_BLOCK - 1) / TM_ROW_BLOCK;
    sp->vocab = vocab;
    sp->blocks = (int)blocks;
    sp->raw = malloc(v * sizeof(float));
    sp->w = malloc(v * sizeof(float));
    sp->spare = malloc(v * sizeof(float));
    sp->cand_w = malloc(v * sizeof(float));
    sp->cand_id = malloc(v * sizeof(int32_t));
    sp->block_mass = malloc(blocks * sizeof(*sp->block_mass));
    sp->block_max = malloc(blocks * sizeof(float));
    if (!sp->raw || !sp->w || !sp->spare || !sp->cand_w || !sp->cand_id || !sp->block_mass ||
        !sp->block_max) {
        tm_sample_space_destroy(sp);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory to sample from %d logits", vocab);
    }
    *out = sp;
    return TM_OK;
}

void tm_sample_space_destroy(tm_sample_space *sp)
{
    if (!sp)
        return;
    free(sp->raw);
    free(sp->w);
    free(sp->spare);
    free(sp->cand_w);
    free(sp->cand_id);
    free(sp->block_mass);
    free(sp->block_max);
    free(sp);
}

tm_status tm_logprobs_of(tm_sample_space *sp, const float *row, int32_t token, int top,
                         tm_logprobs *out)
{
    float max = tm_row_max(row, sp->vocab);
    if (!isfinite(max))
        return TM_STATUS_INTERNAL;
    double lse = tm_row_lse(row, sp->vocab, max);
    int count = tm_row_top(row, sp->vocab, top, sp->top_ids, sp->top_values);
    for (int i = 0; i < count; i++)
        sp->top_values[i] = (float)((double)sp->top_values[i] - lse);
    *out = (tm_logprobs){.logprob = token < 0 ? 0.0f : (float)((double)row[token] - lse),
                         .top_count = count,
                         .top_ids = sp->top_ids,
                         .top_logprobs = sp->top_values};
    return TM_OK;
}

/* Penalties: the repetition one as transformers has it, the other two as OpenAI's reference says. */
static void edit_row(const tm_sampler *s, float *row)
{
    const tm_sampling *p = &s->p;
    for (int i = 0; i < s->seen.count; i++) {
        const tm_seen_token *t = &s->seen.list[i];
        float x = row[t->token];
        x = x > 0.0f ? x / p->repetition_penalty : x * p->repetition_penalty;
        if (t->generated > 0)
            x -= p->frequency_penalty * (float)t->generated + p->presence_penalty;
        row[t->token] = x;
    }
    for (size_t i = 0; i < p->logit_bias_count; i++)
        row[s->bias[i].token] += s->bias[i].bias;
}

/* Copies the weights that are at least `floor` to the candidates; whole blocks below it are passed over. */
static int gather(tm_sample_space *sp, float floor)
{
    int n = 0;
    for (int b = 0; b < sp->blocks; b++) {
        if (sp->block_max[b] < floor)
            continue;
        int end = TM_MIN((b + 1) * TM_ROW_BLOCK, sp->vocab);
        for (int i = b * TM_ROW_BLOCK; i < end; i++) {
            sp->cand_w[n] = sp->w[i];
            sp->cand_id[n] = i;
            n += sp->w[i] >= floor;
        }
    }
    return n;
}

/* Keeps the candidates above the cut, in order; returns how many. */
static int apply_cut(tm_sample_space *sp, int n, tm_row_cut cut)
{
    int kept = 0, ties = cut.ties;
    for (int i = 0; i < n; i++) {
        float w = sp->cand_w[i];
        bool equal = w == cut.least && ties > 0;
        ties -= equal;
        sp->cand_w[kept] = w;
        sp->cand_id[kept] = sp->cand_id[i];
        kept += w > cut.least || equal;
    }
    return kept;
}

static uint64_t mass_of(const float *w, int n)
{
    uint64_t mass = 0;
    for (int i = 0; i < n; i++)
        mass += tm_mass_of(w[i]);
    return mass;
}

/* A weight below which no survivor of top-k and top-p lies.
 * top-k: k blocks have a maximum of at least the k-th largest block maximum, hence so have k tokens.
 * top-p: all tokens below (1 - p) * total / V together weigh less than what top-p leaves out; half of it
 * covers rounding. Valid only when top-k does not change the total. */
static float candidate_floor(const tm_sampler *s, const tm_sample_space *sp, uint64_t total)
{
    float floor = 0.0f;
    if (s->p.top_k > 0 && s->p.top_k <= sp->blocks)
        floor = tm_row_cut_count(sp->block_max, sp->blocks, s->p.top_k, sp->spare).least;
    else if (s->p.top_k == 0 && s->p.top_p < 1.0f)
        floor =
            (float)(0.5 * (1.0 - (double)s->p.top_p) * (double)total * TM_MASS_VALUE / sp->vocab);
    else if (s->p.top_k == 0)
        floor = s->p.min_p;
    return floor;
}

/* Fractions of 2^64. top_p is between 0 and 1. */
static uint64_t top_p_fraction(const tm_sampler *s)
{
    uint64_t p = (uint64_t)((double)s->p.top_p * 0x1p64);
    return p > 0 ? p : 1;
}

static uint64_t uniform_fraction(const tm_sampler *s, int position)
{
    return tm_philox_bits(s->p.seed, s->p.choice, (uint32_t)position) << 11;
}

static int filter(const tm_sampler *s, tm_sample_space *sp, uint64_t total)
{
    int n = gather(sp, candidate_floor(s, sp, total));
    if (s->p.top_k > 0) {
        if (s->p.top_k < n)
            n = apply_cut(sp, n, tm_row_cut_count(sp->cand_w, n, s->p.top_k, sp->spare));
        total = mass_of(sp->cand_w, n);
    }
    if (s->p.top_p < 1.0f) {
        uint64_t mass = tm_mass_reached(total, top_p_fraction(s));
        n = apply_cut(sp, n, tm_row_cut_mass(sp->cand_w, n, mass, sp->spare));
    }
    if (s->p.min_p > 0.0f) /* the largest weight is 1 */
        n = apply_cut(sp, n, (tm_row_cut){s->p.min_p, n});
    return n;
}

/* The first index where the running mass is more than target, which is less than that of all. */
static int walk(const float *w, int n, uint64_t target, uint64_t passed)
{
    for (int i = 0; i < n; i++) {
        passed += tm_mass_of(w[i]);
        if (passed > target)
            return i;
    }
    TM_ASSERT(!"the masses of a row and of its parts differ");
    return -1;
}

static int32_t draw_plain(const tm_sample_space *sp, uint64_t target)
{
    uint64_t passed = 0;
    int b = 0;
    while (passed + sp->block_mass[b] <= target)
        passed += sp->block_mass[b++];
    int from = b * TM_ROW_BLOCK;
    return from + walk(sp->w + from, TM_MIN(TM_ROW_BLOCK, sp->vocab - from), target, passed);
}

static int32_t draw(const tm_sampler *s, tm_sample_space *sp, const float *row, float max,
                    int position)
{
    uint64_t total = tm_row_weights(row, sp->vocab, max, 1.0f / s->p.temperature, sp->w,
                                    sp->block_mass, sp->block_max);
    uint64_t u = uniform_fraction(s, position);
    bool exact;
    if (s->p.top_k == 0 && s->p.top_p >= 1.0f && s->p.min_p <= 0.0f)
        return draw_plain(sp, tm_mass_part(total, u, &exact));
    int n = filter(s, sp, total);
    total = mass_of(sp->cand_w, n);
    return sp->cand_id[walk(sp->cand_w, n, tm_mass_part(total, u, &exact), 0)];
}

/* Penalties, bias and masked stop ids into the row; the index of its maximum. */
static int prepare(const tm_sampler *s, float *row, bool mask, float *max)
{
    if (s->edits)
        edit_row(s, row);
    for (int i = 0; mask && i < s->stop_count; i++)
        row[s->stop_ids[i]] = -INFINITY;
    return tm_row_argmax(row, s->vocab, max);
}

tm_status tm_sampler_draw(tm_sampler *s, tm_sample_space *sp, float *row, int position,
                          int32_t *token, tm_logprobs *lp)
{
    TM_ASSERT(s->vocab == sp->vocab);
    bool mask = position < s->p.min_tokens && s->stop_count > 0;
    bool wants = lp && s->p.logprobs >= 0;
    const float *raw = row;
    if (wants && (s->edits || mask)) {
        memcpy(sp->raw, row, (size_t)s->vocab * sizeof(*row));
        raw = sp->raw;
    }
    float max;
    int32_t chosen = prepare(s, row, mask, &max);
    if (!isfinite(max))
        return TM_STATUS_INTERNAL;
    if (!s->greedy)
        chosen = draw(s, sp, row, max, position);
    if (wants)
        TM_TRY(tm_logprobs_of(sp, raw, chosen, s->p.logprobs, lp));
    *token = chosen;
    return TM_OK;
}

static void put_edits(const tm_sampler *s, bool mask, tm_sample_row *row, tm_sample_edit *to)
{
    row->n_seen = s->penalties ? s->seen.count : 0;
    row->n_bias = (int32_t)s->p.logit_bias_count;
    row->n_banned = mask ? s->stop_count : 0;
    for (int i = 0; i < row->n_seen; i++)
        *to++ = (tm_sample_edit){s->seen.list[i].token, (float)s->seen.list[i].generated};
    for (int i = 0; i < row->n_bias; i++)
        *to++ = (tm_sample_edit){s->bias[i].token, s->bias[i].bias};
    for (int i = 0; i < row->n_banned; i++)
        *to++ = (tm_sample_edit){s->stop_ids[i], 0.0f};
}

bool tm_sampler_device_row(const tm_sampler *s, int position, tm_sample_row *row,
                           tm_sample_edit *edits, int room, int *count)
{
    const tm_sampling *p = &s->p;
    bool mask = position < p->min_tokens && s->stop_count > 0;
    size_t n = (s->penalties ? (size_t)s->seen.count : 0) + p->logit_bias_count +
               (mask ? (size_t)s->stop_count : 0);
    if (p->logprobs > TM_SAMPLE_TOP_MAX || n > (size_t)(room - *count))
        return false;
    *row = (tm_sample_row){.first_edit = *count,
                           .repetition = p->repetition_penalty,
                           .presence = p->presence_penalty,
                           .frequency = p->frequency_penalty,
                           .logprobs = p->logprobs + 1};
    put_edits(s, mask, row, edits + *count);
    *count += (int)n;
    if (s->greedy)
        return true;
    row->scale = 1.0f / p->temperature;
    row->top_k = p->top_k;
    row->min_p = p->min_p;
    row->top_p = p->top_p < 1.0f ? top_p_fraction(s) : 0;
    row->uniform = uniform_fraction(s, position);
    return true;
}

void tm_logprobs_of_detail(tm_sample_space *sp, const tm_sample_detail *d, tm_logprobs *lp)
{
    double lse = tm_row_lse_of(d->max, d->mass);
    for (int i = 0; i < d->top_count; i++) {
        sp->top_ids[i] = d->top_ids[i];
        sp->top_values[i] = (float)((double)d->top_logits[i] - lse);
    }
    *lp = (tm_logprobs){.logprob = (float)((double)d->logit - lse),
                        .top_count = d->top_count,
                        .top_ids = sp->top_ids,
                        .top_logprobs = sp->top_values};
}
