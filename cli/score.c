/* turbomesh score: the tool of every quality check. Windows of tokens or a text give mean negative
 * log-likelihoods and perplexity; a list of ids gives the log-probability of each, the best k after each
 * position, and raw logits of the last positions. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cmd.h"
#include "cli/local.h"
#include "cli/npy.h"
#include "common/check.h"
#include "common/file.h"
#include "common/json.h"

typedef struct score_opts {
    tm_local_opts local;
    const char *tokens, *text, *ids, *logits;
    int64_t top_k, last, window;
    bool json;
} score_opts;

#define OFF(f) offsetof(score_opts, f)
static const tm_opt_row ROWS[] = {
    {"tokens", NULL, TM_OPT_STR, OFF(tokens), NULL, 0, 0, NULL,
     "Token windows: a .npy of uint16 or int32, [windows, length]."},
    {"text", NULL, TM_OPT_STR, OFF(text), NULL, 0, 0, NULL,
     "A text file; scored in windows of --window tokens."},
    {"ids", NULL, TM_OPT_STR, OFF(ids), NULL, 0, 0, NULL, "Token ids, comma-separated."},
    {"top-k", NULL, TM_OPT_INT, OFF(top_k), "0", 0, 100, NULL,
     "With --ids: the best k after each position."},
    {"logits", NULL, TM_OPT_STR, OFF(logits), NULL, 0, 0, NULL,
     "With --ids: write raw float32 logits to this .npy."},
    {"last", NULL, TM_OPT_INT, OFF(last), "1", 1, 1 << 20, NULL,
     "With --logits: of this many last positions."},
    {"window", NULL, TM_OPT_INT, OFF(window), "1024", 1, 1 << 20, NULL,
     "With --text: scored tokens of a window."},
    {"json", NULL, TM_OPT_BOOL, OFF(json), "false", 0, 0, NULL, "JSON on stdout."},
    TM_LOCAL_ROWS(score_opts, local),
};
const tm_opt_table TM_SCORE_OPTIONS = {
    "turbomesh score",
    "turbomesh score MODEL (--tokens F | --text F | --ids LIST) [options]",
    "Log-probabilities and perplexity under a model.",
    ROWS,
    TM_ARRAY_LEN(ROWS),
    1};

/* Rows of equal or different length; row i is ids + begin[i] .. begin[i + 1]. */
typedef struct windows {
    int32_t *ids;
    size_t *begin;
    size_t count;
} windows;

static tm_status submit(tm_engine *e, const windows *w, size_t i, int top, int logits_last,
                        tm_err *err)
{
    tm_request r = {.id = i + 1,
                    .prompt = w->ids + w->begin[i],
                    .prompt_len = w->begin[i + 1] - w->begin[i],
                    .max_tokens = 0,
                    .sampling = tm_sampling_default(),
                    .logits_last = logits_last};
    r.sampling.temperature = 0;
    r.sampling.prompt_logprobs = top;
    return tm_engine_submit(e, &r, err);
}

/* Runs all windows with at most `inflight` at once. on_event sees every event of window i. */
static tm_status run_windows(tm_engine *e, const windows *w, int top, int logits_last,
                             void (*on_event)(void *u, size_t i, const tm_event *ev,
                                              const tm_step_events *b),
                             void *u, tm_err *err)
{
    const size_t inflight = 16;
    size_t next = 0, done = 0;
    while (done < w->count) {
        while (next < w->count && next - done < inflight) {
            tm_status st = submit(e, w, next, top, logits_last, err);
            if (st != TM_OK)
                return st;
            next++;
        }
        tm_step_events *b;
        tm_status st = tm_engine_wait(e, 1000, &b);
        if (st == TM_STATUS_TIMEOUT)
            continue;
        if (st != TM_OK)
            return TM_FAIL(err, st, "the engine ended");
        for (int k = 0; k < b->count && st == TM_OK; k++) {
            const tm_event *ev = &b->events[k];
            on_event(u, ev->request - 1, ev, b);
            if (ev->kind != TM_EVENT_FINISHED)
                continue;
            done++;
            if (ev->finish == TM_FINISH_ERROR)
                st = TM_FAIL(err, ev->status ? ev->status : TM_STATUS_INTERNAL, "window %zu failed",
                             (size_t)(ev->request - 1));
        }
        tm_engine_events_free(b);
        if (st != TM_OK)
            return st;
    }
    return TM_OK;
}

typedef struct nll_sum {
    double *nll; /* per window, summed */
    size_t *n;
} nll_sum;

static void add_nll(void *u, size_t i, const tm_event *ev, const tm_step_events *b)
{
    (void)b;
    nll_sum *s = u;
    if (ev->kind == TM_EVENT_PROMPT_LOGPROB) {
        s->nll[i] -= ev->logprob;
        s->n[i]++;
    }
}

static void print_windows(const nll_sum *s, size_t count, bool json)
{
    double sum = 0;
    size_t n = 0;
    tm_buf buf;
    tm_jw w;
    tm_buf_init(&buf, 0);
    tm_jw_init(&w, &buf);
    tm_jw_obj(&w);
    tm_jw_key(&w, "nll");
    tm_jw_arr(&w);
    for (size_t i = 0; i < count; i++) {
        double mean = s->n[i] ? s->nll[i] / (double)s->n[i] : 0;
        tm_jw_num(&w, mean);
        sum += s->nll[i];
        n += s->n[i];
    }
    tm_jw_arr_end(&w);
    double mean = n ? sum / (double)n : 0;
    tm_jw_kint(&w, "windows", (int64_t)count);
    tm_jw_kint(&w, "tokens", (int64_t)n);
    tm_jw_knum(&w, "mean_nll", mean);
    tm_jw_knum(&w, "perplexity", exp(mean));
    tm_jw_obj_end(&w);
    if (json)
        printf("%s\n", buf.data);
    else
        printf("windows %zu  tokens %zu  mean nll %.6f  perplexity %.4f\n", count, n, mean,
               exp(mean));
    tm_buf_deinit(&buf);
}

static tm_status score_windows(tm_local *l, const windows *w, bool json, tm_err *err)
{
    nll_sum s = {calloc(w->count, sizeof *s.nll), calloc(w->count, sizeof *s.n)};
    tm_status st = !s.nll || !s.n ? TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory")
                                  : run_windows(l->engine, w, 0, 0, add_nll, &s, err);
    for (size_t i = 0; st == TM_OK && i < w->count; i++)
        if (s.n[i] + 1 != w->begin[i + 1] - w->begin[i])
            st =
                TM_FAIL(err, TM_STATUS_INTERNAL, "window %zu: %zu log-probabilities for %zu tokens",
                        i, s.n[i], w->begin[i + 1] - w->begin[i]);
    if (st == TM_OK)
        print_windows(&s, w->count, json);
    free(s.nll);
    free(s.n);
    return st;
}

/* ---- --ids ---- */

typedef struct ids_out {
    int top, vocab, prompt_len, logits_rows;
    float *logprob;       /* [prompt_len] */
    tm_top_logprob *tops; /* [prompt_len][top], row i: the best after position i */
    float *logits;        /* [logits_rows][vocab] */
} ids_out;

static int by_logprob(const void *a, const void *b)
{
    const tm_top_logprob *x = a, *y = b;
    return x->logprob > y->logprob ? -1 : x->logprob < y->logprob ? 1 : x->token - y->token;
}

/* The best k of a row of raw logits. */
static void best_of_logits(const float *logits, int vocab, tm_top_logprob *out, int k)
{
    double max = logits[0], sum = 0;
    for (int i = 1; i < vocab; i++)
        max = logits[i] > max ? logits[i] : max;
    for (int i = 0; i < vocab; i++)
        sum += exp(logits[i] - max);
    double log_sum = max + log(sum);
    int n = 0;
    for (int i = 0; i < vocab; i++) {
        if (n == k && logits[i] - log_sum <= out[k - 1].logprob)
            continue;
        if (n < k)
            n++;
        out[n - 1] = (tm_top_logprob){i, (float)(logits[i] - log_sum)};
        qsort(out, (size_t)n, sizeof *out, by_logprob);
    }
}

static void collect_ids(void *u, size_t i, const tm_event *ev, const tm_step_events *b)
{
    (void)i;
    ids_out *o = u;
    if (ev->kind == TM_EVENT_PROMPT_LOGPROB && ev->pos > 0 && ev->pos < o->prompt_len) {
        o->logprob[ev->pos] = ev->logprob;
        for (int k = 0; k < o->top && k < ev->top_count; k++)
            o->tops[(size_t)(ev->pos - 1) * (size_t)o->top + (size_t)k] =
                b->tops[ev->top_first + k];
    } else if (ev->kind == TM_EVENT_LOGITS) {
        int row = ev->pos - (o->prompt_len - o->logits_rows);
        if (row >= 0 && row < o->logits_rows)
            memcpy(o->logits + (size_t)row * (size_t)o->vocab, b->logits + ev->logits_at,
                   sizeof(float) * (size_t)o->vocab);
    }
}

static void print_ids(const ids_out *o, const int32_t *ids, bool json)
{
    tm_buf buf;
    tm_jw w;
    tm_buf_init(&buf, 0);
    tm_jw_init(&w, &buf);
    tm_jw_obj(&w);
    tm_jw_key(&w, "ids");
    tm_jw_arr(&w);
    for (int i = 0; i < o->prompt_len; i++)
        tm_jw_int(&w, ids[i]);
    tm_jw_arr_end(&w);
    tm_jw_key(&w, "logprobs");
    tm_jw_arr(&w);
    tm_jw_null(&w); /* nothing precedes the first id */
    for (int i = 1; i < o->prompt_len; i++)
        tm_jw_num(&w, o->logprob[i]);
    tm_jw_arr_end(&w);
    if (o->top > 0) {
        tm_jw_key(&w, "top");
        tm_jw_arr(&w);
        for (int i = 0; i < o->prompt_len; i++) {
            tm_jw_arr(&w);
            for (int k = 0; k < o->top; k++) {
                const tm_top_logprob *t = &o->tops[(size_t)i * (size_t)o->top + (size_t)k];
                tm_jw_arr(&w);
                tm_jw_int(&w, t->token);
                tm_jw_num(&w, t->logprob);
                tm_jw_arr_end(&w);
            }
            tm_jw_arr_end(&w);
        }
        tm_jw_arr_end(&w);
    }
    tm_jw_obj_end(&w);
    if (json) {
        printf("%s\n", buf.data);
    } else {
        for (int i = 0; i < o->prompt_len; i++) {
            printf("%6d %8d %12.5f", i, ids[i], i ? o->logprob[i] : 0.0f);
            for (int k = 0; k < o->top; k++)
                printf("  %d:%.4f", o->tops[(size_t)i * (size_t)o->top + (size_t)k].token,
                       o->tops[(size_t)i * (size_t)o->top + (size_t)k].logprob);
            printf("\n");
        }
    }
    tm_buf_deinit(&buf);
}

static tm_status score_ids(tm_local *l, const windows *w, const score_opts *o, tm_err *err)
{
    int n = (int)w->begin[1];
    ids_out out = {.top = (int)o->top_k, .vocab = l->info->model.vocab, .prompt_len = n};
    out.logits_rows = o->logits ? (int)TM_MIN(o->last, n) : 1;
    out.logprob = calloc((size_t)n, sizeof *out.logprob);
    out.tops = calloc((size_t)n * (size_t)TM_MAX(out.top, 1), sizeof *out.tops);
    out.logits = calloc((size_t)out.logits_rows * (size_t)out.vocab, sizeof *out.logits);
    tm_status st = TM_OK;
    if (!out.logprob || !out.tops || !out.logits)
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    else
        st = run_windows(l->engine, w, out.top, out.logits_rows, collect_ids, &out, err);
    if (st == TM_OK && out.top > 0)
        best_of_logits(out.logits + (size_t)(out.logits_rows - 1) * (size_t)out.vocab, out.vocab,
                       out.tops + (size_t)(n - 1) * (size_t)out.top, out.top);
    if (st == TM_OK && o->logits)
        st = tm_npy_write_f32(o->logits, out.logits, (size_t)out.logits_rows, (size_t)out.vocab,
                              err);
    if (st == TM_OK)
        print_ids(&out, w->ids, o->json);
    free(out.logprob);
    free(out.tops);
    free(out.logits);
    return st;
}

/* ---- input ---- */

static tm_status equal_windows(windows *w, size_t rows, size_t cols, tm_err *err)
{
    w->count = rows;
    w->begin = malloc((rows + 1) * sizeof *w->begin);
    if (!w->begin)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    for (size_t i = 0; i <= rows; i++)
        w->begin[i] = i * cols;
    return TM_OK;
}

static tm_status parse_ids(const char *text, windows *w, tm_err *err)
{
    size_t n = 1, i = 0;
    for (const char *p = text; *p; p++)
        n += *p == ',';
    w->ids = malloc(n * sizeof *w->ids);
    if (!w->ids)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    for (const char *p = text; i < n; p++, i++) {
        char *end;
        long v = strtol(p, &end, 10);
        if (end == p || v < 0 || v > INT32_MAX || (*end != ',' && *end != '\0'))
            return TM_FAIL(err, TM_STATUS_INVALID,
                           "--ids: expected token ids separated by commas at '%s'", p);
        w->ids[i] = (int32_t)v;
        p = end;
    }
    return equal_windows(w, 1, n, err);
}

/* Windows of `window` scored tokens; each starts with the last token of the one before as context. */
static tm_status text_windows(const tm_tokenizer *t, const char *path, size_t window, windows *w,
                              tm_err *err)
{
    char *text;
    size_t len, n;
    TM_TRY(tm_file_read(path, (size_t)1 << 30, &text, &len, err));
    tm_encode_opts eo = {.plain = true};
    tm_status st = tm_tokenizer_encode(t, text, len, &eo, &w->ids, &n, err);
    free(text);
    TM_TRY(st);
    if (n < 2)
        return TM_FAIL(err, TM_STATUS_INVALID, "%s: fewer than two tokens", path);
    /* Overlapping by one token: copy into one array with the shared tokens twice. */
    size_t rows = (n - 1 + window - 1) / window;
    int32_t *ids = malloc((n + rows) * sizeof *ids);
    w->begin = malloc((rows + 1) * sizeof *w->begin);
    if (!ids || !w->begin) {
        free(ids);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    }
    size_t at = 0;
    for (size_t r = 0; r < rows; r++) {
        size_t from = r * window, to = TM_MIN(from + window + 1, n);
        w->begin[r] = at;
        memcpy(ids + at, w->ids + from, (to - from) * sizeof *ids);
        at += to - from;
    }
    w->begin[rows] = at;
    w->count = rows;
    free(w->ids);
    w->ids = ids;
    return TM_OK;
}

static tm_status load_input(const tm_local *l, const score_opts *o, windows *w, tm_err *err)
{
    if (o->ids)
        return parse_ids(o->ids, w, err);
    if (o->text) {
        size_t room = (size_t)l->info->model.max_positions - 1;
        return text_windows(l->tokenizer, o->text, TM_MIN((size_t)o->window, room), w, err);
    }
    size_t rows, cols;
    TM_TRY(tm_npy_read_tokens(o->tokens, &w->ids, &rows, &cols, err));
    if (cols < 2)
        return TM_FAIL(err, TM_STATUS_INVALID, "%s: windows need at least two tokens", o->tokens);
    return equal_windows(w, rows, cols, err);
}

int tm_cmd_score(int argc, char **argv)
{
    score_opts o = {0};
    const char *model;
    int n = 0, code;
    if (!tm_cmd_parse(&TM_SCORE_OPTIONS, argc, argv, &o, &model, &n, &code))
        return code;
    tm_err err = TM_ERR_INIT;
    if (n != 1 || !!o.tokens + !!o.text + !!o.ids != 1) {
        TM_FAIL(&err, TM_STATUS_INVALID, "give MODEL and exactly one of --tokens, --text, --ids");
        return tm_cmd_fail("score", &err);
    }
    tm_local l;
    tm_status st = tm_local_open(&l, model, &o.local, o.text != NULL, argc, argv, &err);
    if (st != TM_OK)
        return tm_cmd_fail("score", &err);
    windows w = {0};
    st = load_input(&l, &o, &w, &err);
    if (st == TM_OK)
        st = o.ids ? score_ids(&l, &w, &o, &err) : score_windows(&l, &w, o.json, &err);
    tm_local_close(&l);
    free(w.ids);
    free(w.begin);
    return st == TM_OK ? 0 : tm_cmd_fail("score", &err);
}
