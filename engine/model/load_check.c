/* The first pass of loading: every tensor that a model needs is there, in the right shape and number format, and
 * what is there beside them is reported, apart from leftovers that every engine ignores. Nothing is copied. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/log.h"
#include "engine/model/model_impl.h"

#define NAMES_SHOWN 4

/* The text model inside a model of text and pictures has names in front of its own. */
static const struct {
    const char *from, *to;
} prefixes[] = {{"", ""}, {"", "language_model."}, {"model.", "model.language_model."}};

/* The pattern under the checkpoint's prefix. */
static void prefixed(char *out, const char *pattern, int prefix)
{
    const char *from = prefixes[prefix].from;
    size_t n = strlen(from);
    bool hit = strncmp(pattern, from, n) == 0;
    snprintf(out, TM_TENSOR_NAME_MAX, "%s%s", hit ? prefixes[prefix].to : "",
             hit ? pattern + n : pattern);
}

/* The name with its numbers put in; written out by hand to keep formats checked. */
void tm_load_tensor_name(char *out, const tm_arch *a, const tm_tensor_row *row, int layer,
                         int expert)
{
    const int numbers[] = {layer, expert};
    char pattern[TM_TENSOR_NAME_MAX];
    const char *from = pattern;
    size_t at = 0;
    prefixed(pattern, row->pattern, a->prefix);
    for (int i = 0; i < 2; i++) {
        const char *hole = strstr(from, "%d");
        if (!hole)
            break;
        at += (size_t)snprintf(out + at, TM_TENSOR_NAME_MAX - at, "%.*s%d", (int)(hole - from),
                               from, numbers[i]);
        from = hole + 2;
    }
    snprintf(out + at, TM_TENSOR_NAME_MAX - at, "%s", from);
}

int tm_load_layers(const tm_arch *a, const tm_tensor_row *row)
{
    return tm_role_info_get(row->role)->of_layer ? a->layers : 1;
}

static const tm_tensor_row *row_of(const tm_arch *a, tm_role role)
{
    for (int i = 0; i < a->family->row_count; i++)
        if (a->family->rows[i].role == role)
            return &a->family->rows[i];
    return NULL;
}

/* Are the experts of each layer in one tensor? The first layer that has experts tells. */
static bool has_stacked(const tm_arch *a, const tm_checkpoint *c)
{
    char name[TM_TENSOR_NAME_MAX];
    for (int i = 0; i < a->family->row_count; i++) {
        const tm_tensor_row *row = &a->family->rows[i];
        int layer = 0;
        while (layer < a->layers && !a->layer[layer].moe)
            layer++;
        tm_load_tensor_name(name, a, row, layer, 0);
        if (row->part == TM_PART_EXPERTS_GATE_UP && tm_checkpoint_find(c, name))
            return true;
    }
    return false;
}

/* The embedding's rows decide the vocabulary; a head that is not stored is the embedding. */
static tm_status settle_ends(tm_arch *a, const tm_checkpoint *c, tm_err *err)
{
    const tm_tensor_row *embed = row_of(a, TM_ROLE_EMBED), *head = row_of(a, TM_ROLE_HEAD);
    const tm_st_tensor *t = NULL, *h = NULL;
    char name[TM_TENSOR_NAME_MAX] = "a head";
    for (a->prefix = 0; !t && a->prefix < (int)TM_ARRAY_LEN(prefixes); a->prefix += !t) {
        tm_load_tensor_name(name, a, embed, 0, 0);
        t = tm_checkpoint_find(c, name);
    }
    if (!t) {
        a->prefix = 0; /* none was found: what else is there is named without */
        return TM_FAIL(err, TM_STATUS_DATA, "tensor %s is missing", embed->pattern);
    }
    if (head) {
        tm_load_tensor_name(name, a, head, 0, 0);
        h = tm_checkpoint_find(c, name);
    }
    if (h && a->tie && !tm_checkpoint_equal(c, t, h))
        tm_log(TM_LOG_WARN, "model", "%s differs from %s, which the config ties it to: not used",
               h->name, t->name);
    if (!h && a->head_apart)
        return TM_FAIL(err, TM_STATUS_DATA,
                       "tensor %s is missing, and the config does not tie it to %s", name, t->name);
    if (!h && !a->tie)
        tm_log(TM_LOG_WARN, "model", "%s is not there: the embedding is the head", name);
    a->tie = a->tie || !h;
    a->moe.stacked = has_stacked(a, c);
    if (t->ndim == 2 && t->dims[0] > a->vocab && t->dims[0] <= 1 << 24)
        a->vocab = (int)t->dims[0];
    return TM_OK;
}

static tm_status check_tensor(const tm_arch *a, const tm_checkpoint *c, const tm_tensor_row *row,
                              const tm_st_tensor *t, tm_err *err)
{
    const char *name = t->name;
    const char *file = tm_checkpoint_file(c, t);
    tm_dtype dtype;
    if (!tm_checkpoint_is_float(t, &dtype))
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED, "%s: tensor %s is %s, expected F32, BF16 or F16",
                       file, name, tm_st_dtype_name(t->dtype));
    int rows, cols;
    tm_tensor_size(a, row, &rows, &cols);
    tm_role_kind kind = tm_role_info_get(row->role)->kind;
    bool matrix = kind == TM_ROLE_MATRIX || kind == TM_ROLE_MATRIX_F32;
    bool stack = row->part == TM_PART_EXPERTS_GATE_UP || row->part == TM_PART_EXPERTS_DOWN;
    int64_t want[3] = {rows, cols, 0};
    int ndim = stack ? 3 : matrix ? 2 : 1;
    if (stack) {
        want[0] = a->moe.experts;
        want[1] = rows / a->moe.experts;
        want[2] = cols;
    }
    if (t->ndim != ndim || memcmp(t->dims, want, (size_t)ndim * sizeof(want[0])) != 0) {
        char is[128], should[64];
        tm_st_shape_text(is, sizeof(is), t->dims, t->ndim);
        tm_st_shape_text(should, sizeof(should), want, ndim);
        return TM_FAIL(err, TM_STATUS_DATA, "%s: tensor %s is %s, expected %s", file, name, is,
                       should);
    }
    return TM_OK;
}

static bool ignored(const char *name)
{
    static const char *const ends[] = {".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq",
                                       ".attention.masked_bias"};
    size_t n = strlen(name);
    for (size_t i = 0; i < TM_ARRAY_LEN(ends); i++) {
        size_t m = strlen(ends[i]);
        if (n >= m && strcmp(name + n - m, ends[i]) == 0)
            return true;
    }
    return false;
}

/* Matches a name with a pattern up to its end, or up to where they differ; the numbers found go to n[2]. */
static bool matches(const char *p, const char *name, long n[2])
{
    n[0] = n[1] = -1;
    for (int i = 0; *p;) {
        if (p[0] != '%') {
            if (*p++ != *name++)
                return false;
            continue;
        }
        if (*name < '0' || *name > '9')
            return false;
        char *end;
        n[i++] = strtol(name, &end, 10);
        name = end;
        p += 2;
    }
    return *name == '\0';
}

/* Does a needed row of some layer name this tensor? Layers past the last (multi-token prediction) and a head
 * that is stored beside a tied embedding are known too. */
static bool wanted(const tm_arch *a, const char *tensor)
{
    for (int i = 0; i < a->family->row_count; i++) {
        const tm_tensor_row *row = &a->family->rows[i];
        long n[2];
        char pattern[TM_TENSOR_NAME_MAX];
        prefixed(pattern, row->pattern, a->prefix);
        bool hit = matches(pattern, tensor, n);
        if (n[0] >= a->layers || (hit && row->role == TM_ROLE_HEAD))
            return true;
        if (hit && tm_need_met(a, row->need, (int)TM_MAX(n[0], 0)) &&
            n[1] < tm_tensor_experts(a, row))
            return true;
    }
    return false;
}

/* The part of a model of text and pictures that sees. */
static bool sees(const tm_arch *a, const char *tensor)
{
    static const char *const starts[] = {"vision_tower.", "multi_modal_projector.",
                                         "model.vision_tower.", "model.multi_modal_projector."};
    for (size_t i = 0; a->prefix > 0 && i < TM_ARRAY_LEN(starts); i++)
        if (strncmp(tensor, starts[i], strlen(starts[i])) == 0)
            return true;
    return false;
}

bool tm_load_knows(const tm_arch *a, const char *tensor)
{
    return ignored(tensor) || sees(a, tensor) || wanted(a, tensor);
}

void tm_load_report_unread(const tm_arch *a, const tm_checkpoint *c)
{
    size_t count = 0;
    char names[NAMES_SHOWN * TM_TENSOR_NAME_MAX] = "";
    for (size_t i = 0; i < tm_checkpoint_count(c); i++) {
        const tm_st_tensor *t = tm_checkpoint_at(c, i);
        if (tm_load_knows(a, t->name))
            continue;
        size_t at = strlen(names);
        if (count++ < NAMES_SHOWN)
            snprintf(names + at, sizeof(names) - at, "%s%.200s", at ? ", " : "", t->name);
    }
    if (count > 0)
        tm_log(TM_LOG_WARN, "model", "%zu tensors of the checkpoint are not used: %s%s", count,
               names, count > NAMES_SHOWN ? ", ..." : "");
}

/* What walking over all needed tensors finds. */
typedef struct survey {
    int64_t numbers;
    size_t missing;
    char first_missing[TM_TENSOR_NAME_MAX];
} survey;

/* One row in all its layers; counted: an earlier row reads the same tensors. */
static tm_status check_row(const tm_arch *a, const tm_checkpoint *c, const tm_tensor_row *row,
                           bool counted, survey *s, tm_err *err)
{
    char name[TM_TENSOR_NAME_MAX];
    for (int layer = 0; layer < tm_load_layers(a, row); layer++) {
        if (!tm_need_met(a, row->need, layer))
            continue;
        for (int e = 0; e < tm_tensor_experts(a, row); e++) {
            tm_load_tensor_name(name, a, row, layer, e);
            const tm_st_tensor *t = tm_checkpoint_find(c, name);
            if (!t && s->missing++ == 0)
                snprintf(s->first_missing, sizeof(s->first_missing), "%s", name);
            if (!t)
                continue;
            TM_TRY(check_tensor(a, c, row, t, err));
            for (int64_t n = 1, d = 0; !counted && d <= t->ndim; d++) {
                s->numbers += d == t->ndim ? n : 0;
                n *= d < t->ndim ? t->dims[d] : 1;
            }
        }
    }
    return TM_OK;
}

tm_status tm_load_check(tm_arch *a, const tm_checkpoint *c, int64_t *parameters, tm_err *err)
{
    const tm_tensor_row *rows = a->family->rows;
    survey s = {0};
    TM_TRY(settle_ends(a, c, err));
    for (int i = 0; i < a->family->row_count; i++) {
        bool again = i > 0 && strcmp(rows[i].pattern, rows[i - 1].pattern) == 0;
        TM_TRY(check_row(a, c, &rows[i], again, &s, err));
    }
    if (s.missing > 1)
        return TM_FAIL(err, TM_STATUS_DATA, "tensor %s is missing (and %zu more)", s.first_missing,
                       s.missing - 1);
    if (s.missing == 1)
        return TM_FAIL(err, TM_STATUS_DATA, "tensor %s is missing", s.first_missing);
    *parameters = s.numbers;
    return TM_OK;
}
