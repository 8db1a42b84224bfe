/* Mixture of experts: which experts a token goes to, and their feed-forward parts.
 *
 * Routing is in f32 from the logits on. The experts go one after the other, each over all tokens that chose it
 * together: its weights are read once per step however many tokens there are. The products are the device's
 * own linear and act, which are parallel inside; gathering and adding rows is one pass over the activations. */
#include <math.h>
#include <string.h>

#include "common/check.h"
#include "engine/backend/cpu/cpu.h"

#define EXPERTS_MAX 1024

/* Scores of one token's experts. */
static void score_row(const tm_moe_route_args *a, const float *logits, float *score)
{
    float max = -INFINITY, sum = 0.0f;
    for (int e = 0; e < a->n_experts; e++)
        max = fmaxf(max, logits[e]);
    for (int e = 0; e < a->n_experts; e++) {
        bool sigmoid = a->score == TM_MOE_SIGMOID;
        score[e] = sigmoid ? 1.0f / (1.0f + expf(-logits[e])) : expf(logits[e] - max);
        sum += score[e];
    }
    for (int e = 0; a->score == TM_MOE_SOFTMAX && e < a->n_experts; e++)
        score[e] /= sum;
}

/* The largest number that is not taken; -1 when all are. */
static int best_of(const float *x, const bool *taken, int n)
{
    int best = -1;
    for (int i = 0; i < n; i++)
        if (!taken[i] && (best < 0 || x[i] > x[best]))
            best = i;
    return best;
}

static float group_value(const tm_moe_route_args *a, const float *choice, int n)
{
    float first = -INFINITY, second = -INFINITY;
    for (int i = 0; i < n; i++) {
        second = fmaxf(second, fminf(first, choice[i]));
        first = fmaxf(first, choice[i]);
    }
    return a->group_score == TM_GROUP_TOP2 ? first + second : first;
}

/* Marks the experts of all groups but the best as taken. */
static void close_groups(const tm_moe_route_args *a, const float *choice, bool *taken)
{
    float value[EXPERTS_MAX];
    bool open[EXPERTS_MAX] = {false};
    int per = a->n_experts / a->n_groups;
    for (int g = 0; g < a->n_groups; g++)
        value[g] = group_value(a, choice + g * per, per);
    for (int i = 0; i < a->top_groups; i++)
        open[best_of(value, open, a->n_groups)] = true;
    for (int e = 0; e < a->n_experts; e++)
        taken[e] = !open[e / per];
}

static void route_row(const tm_moe_route_args *a, const float *logits, int32_t *ids, float *weights)
{
    float score[EXPERTS_MAX], choice[EXPERTS_MAX], sum = 0.0f;
    bool taken[EXPERTS_MAX] = {false};
    score_row(a, logits, score);
    for (int e = 0; e < a->n_experts; e++)
        choice[e] = a->bias ? score[e] + a->bias[e] : score[e];
    if (a->n_groups > 1)
        close_groups(a, choice, taken);
    for (int i = 0; i < a->top_k; i++) {
        ids[i] = best_of(choice, taken, a->n_experts);
        taken[ids[i]] = true;
        weights[i] = score[ids[i]];
        sum += weights[i];
    }
    float scale = a->normalise ? a->scale / (sum + 1e-20f) : a->scale;
    for (int i = 0; i < a->top_k; i++)
        weights[i] *= scale;
}

tm_status tm_cpu_ref_moe_route(tm_device *dev, const tm_moe_route_args *a)
{
    (void)dev;
    int groups = TM_MAX(a->n_groups, 1);
    TM_ASSERT(a->n_experts <= EXPERTS_MAX && a->n_experts % groups == 0 &&
              a->top_k <= (groups > 1 ? a->top_groups * (a->n_experts / groups) : a->n_experts));
    for (int t = 0; t < a->n_tokens; t++)
        route_row(a, a->logits + (size_t)t * (size_t)a->n_experts, a->ids + (ptrdiff_t)t * a->top_k,
                  a->weights + (ptrdiff_t)t * a->top_k);
    return TM_OK;
}

/* Each token chooses an expert at most once, so an expert has T rows at most. */
size_t tm_cpu_moe_work_bytes(const tm_moe_experts_args *a)
{
    size_t row = 2 * (size_t)a->h + 3 * (size_t)a->f;
    return (size_t)a->n_tokens * (row * sizeof(float) + sizeof(int32_t));
}

typedef struct moe_work {
    float *x, *gate_up, *act, *y; /* [T, h], [T, 2F], [T, F], [T, h] */
    int32_t *pick;                /* [T] index into ids and weights */
} moe_work;

static moe_work carve(const tm_moe_experts_args *a)
{
    size_t t = (size_t)a->n_tokens, h = (size_t)a->h, f = (size_t)a->f;
    moe_work w = {.x = a->work};
    w.y = w.x + t * h;
    w.gate_up = w.y + t * h;
    w.act = w.gate_up + t * 2 * f;
    w.pick = (int32_t *)(void *)(w.act + t * f);
    return w;
}

/* The part of a stacked weight that is one expert's. */
static tm_weight expert_of(const tm_weight *all, int rows, int e)
{
    tm_weight w = *all;
    size_t at = (size_t)e * (size_t)rows * (size_t)all->k * tm_dtype_size(all->dtype);
    w.n = rows;
    w.data = (const char *)all->data + at;
    w.packed = NULL;
    return w;
}

static tm_status run_expert(tm_device *dev, const tm_moe_experts_args *a, const moe_work *w, int e,
                            int rows)
{
    const tm_op_table *ops = dev->isa->ops;
    tm_weight gate_up = expert_of(a->gate_up, 2 * a->f, e), down = expert_of(a->down, a->h, e);
    const tm_linear_args up = {.out = w->gate_up,
                               .x = w->x,
                               .w = &gate_up,
                               .n_tokens = rows,
                               .ldx = a->h,
                               .ldo = 2 * a->f};
    const tm_act_args act = {.out = w->act,
                             .gate_up = w->gate_up,
                             .n_tokens = rows,
                             .f = a->f,
                             .act = a->act,
                             .gated = true};
    const tm_linear_args dn = {
        .out = w->y, .x = w->act, .w = &down, .n_tokens = rows, .ldx = a->f, .ldo = a->h};
    TM_TRY(ops->linear(dev, &up));
    TM_TRY(ops->act(dev, &act));
    return ops->linear(dev, &dn);
}

static void add_row(float *out, const float *x, float scale, int n)
{
    for (int i = 0; i < n; i++)
        out[i] += scale * x[i];
}

static tm_status expert_rows(tm_device *dev, const tm_moe_experts_args *a, const moe_work *w, int e)
{
    size_t h = (size_t)a->h, k = (size_t)a->top_k;
    int rows = 0;
    for (size_t i = 0; i < (size_t)a->n_tokens * k; i++) {
        if (a->ids[i] != e)
            continue;
        memcpy(w->x + (size_t)rows * h, (const float *)a->x + i / k * h, h * sizeof(float));
        w->pick[rows++] = (int32_t)i;
    }
    if (rows == 0)
        return TM_OK;
    TM_TRY(run_expert(dev, a, w, e, rows));
    for (int r = 0; r < rows; r++) {
        size_t i = (size_t)w->pick[r];
        add_row((float *)a->out + i / k * h, w->y + (size_t)r * h, a->weights[i], a->h);
    }
    return TM_OK;
}

tm_status tm_cpu_moe_experts(tm_device *dev, const tm_moe_experts_args *a)
{
    moe_work w = carve(a);
    size_t h = (size_t)a->h;
    memset(a->out, 0, (size_t)a->n_tokens * h * sizeof(float));
    for (int e = 0; e < a->n_experts; e++)
        TM_TRY(expert_rows(dev, a, &w, e));
    for (int t = 0; a->add && t < a->n_tokens; t++) {
        float gate = a->add_gate ? 1.0f / (1.0f + expf(-a->add_gate[t])) : 1.0f;
        add_row((float *)a->out + (size_t)t * h, (const float *)a->add + (size_t)t * h, gate, a->h);
    }
    return TM_OK;
}
