/* turbomesh inspect: what a model folder holds, without loading it: the config as it is understood, tensors, memory
 * when it is split, the chat template, and whatever is not recognised. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cmd.h"
#include "common/buf.h"
#include "common/check.h"
#include "common/json.h"
#include "common/log.h"
#include "engine/model/inspect.h"
#include "text/template.h"
#include "text/tokenizer.h"

typedef struct inspect_opts {
    bool json, tensors;
} inspect_opts;

static const tm_opt_row ROWS[] = {
    {"tensors", NULL, TM_OPT_BOOL, offsetof(inspect_opts, tensors), "false", 0, 0, NULL,
     "Every tensor with its type and shape, not only their number."},
    {"json", NULL, TM_OPT_BOOL, offsetof(inspect_opts, json), "false", 0, 0, NULL,
     "JSON on stdout, with every tensor."},
};
const tm_opt_table TM_INSPECT_OPTIONS = {
    "turbomesh inspect",
    "turbomesh inspect MODEL [options]",
    "What a model folder holds: config as understood, tensors, memory, template, and anything "
    "that is not recognised.",
    ROWS,
    TM_ARRAY_LEN(ROWS),
    1};

/* The text side; NULL and a reason when it is not there. */
typedef struct text_side {
    tm_tokenizer *tokenizer;
    tm_template *template;
    tm_err tokenizer_err, template_err;
} text_side;

static void open_text(text_side *t, const char *dir)
{
    *t = (text_side){.tokenizer_err = TM_ERR_INIT, .template_err = TM_ERR_INIT};
    if (tm_tokenizer_load(&t->tokenizer, dir, &t->tokenizer_err) != TM_OK)
        return;
    if (tm_template_load(&t->template, dir, NULL, t->tokenizer, &t->template_err) != TM_OK)
        t->template = NULL;
}

static void close_text(text_side *t)
{
    tm_template_destroy(t->template);
    tm_tokenizer_destroy(t->tokenizer);
}

/* Everything of the config, as rows of name and text, so that both outputs say the same. */
enum { FACTS_MAX = 40 };
typedef struct fact {
    const char *name;
    char text[200];
} fact;
typedef struct facts {
    fact at[FACTS_MAX];
    int count;
} facts;

static void __attribute__((format(printf, 3, 4)))
say(facts *f, const char *name, const char *fmt, ...)
{
    va_list ap;
    TM_ASSERT(f->count < FACTS_MAX);
    fact *x = &f->at[f->count++];
    x->name = name;
    va_start(ap, fmt);
    vsnprintf(x->text, sizeof(x->text), fmt, ap);
    va_end(ap);
}

static void say_attention(facts *f, const tm_arch *a)
{
    const tm_mla_arch *m = &a->mla;
    if (m->kv_rank > 0)
        say(f, "attention", "latent: %d heads, key %d + %d rotated, value %d, cached %d + %d",
            a->heads, m->nope, m->rope, m->v, m->kv_rank, m->rope);
    else
        say(f, "attention", "%d heads, %d key heads, head size %d%s", a->heads, a->kv_heads,
            a->head_dim, tm_family_has(a->family, TM_ROLE_Q_NORM) ? ", q and k normalised" : "");
    if (m->q_rank > 0)
        say(f, "query rank", "%d", m->q_rank);
    say(f, "score scale", "%.6g", (double)a->attn_scale);
    if (a->attn_softcap > 0)
        say(f, "score soft cap", "%g", (double)a->attn_softcap);
    if (a->clip_qkv > 0)
        say(f, "q, k, v bounded by", "%g", (double)a->clip_qkv);
    int windows = 0, window = 0;
    for (int i = 0; i < a->layers; i++) {
        windows += a->layer[i].window > 0;
        window = a->layer[i].window > 0 ? a->layer[i].window : window;
    }
    if (windows > 0)
        say(f, "sliding window", "%d positions in %d of %d layers", window, windows, a->layers);
}

static void say_rope(facts *f, const tm_arch *a)
{
    const tm_rope *r = &a->rope;
    if (a->alibi) {
        say(f, "positions", "ALiBi, slopes times %g", (double)a->alibi_scale);
        return;
    }
    say(f, "positions", "rope %s, base %g, %d dimensions%s", tm_rope_type_name(r->type), r->base,
        r->dim, r->interleaved ? " in pairs (2i, 2i + 1)" : "");
    if (r->type != TM_ROPE_DEFAULT)
        say(f, "rope scaling", "factor %g, trained for %g positions", r->factor, r->original);
    if (a->family->window == TM_WINDOW_PATTERN)
        say(f, "local rope", "base %g in sliding layers", a->rope_local.base);
    if (a->logn_len > 0)
        say(f, "logn scaling", "beyond position %d", a->logn_len);
}

static void say_ffn(facts *f, const tm_arch *a)
{
    const tm_moe_arch *m = &a->moe;
    int sparse = 0;
    for (int i = 0; i < a->layers; i++)
        sparse += a->layer[i].moe;
    if (sparse < a->layers)
        say(f, "feed-forward", "%s%s, width %d", a->gated ? "gated " : "", tm_act_name(a->act),
            a->ffn);
    if (sparse == 0)
        return;
    say(f, "experts", "%d of width %d in %d of %d layers, %d per token%s", m->experts, m->ffn,
        sparse, a->layers, m->top_k, m->normalise ? ", weights sum to 1" : "");
    say(f, "routing", "%s%s, weights times %g", m->score == TM_MOE_SIGMOID ? "sigmoid" : "softmax",
        m->choice_bias ? " with a bias for the choice" : "", (double)m->scale);
    if (m->groups > 1)
        say(f, "expert groups", "%d of %d, by their %s", m->top_groups, m->groups,
            m->group_score == TM_GROUP_TOP2 ? "two best experts" : "best expert");
    if (m->shared > 0)
        say(f, "shared expert", "width %d%s", m->shared, m->shared_gate ? ", gated" : "");
}

static void say_all(facts *f, const tm_inspect *i)
{
    static const char *const blocks[] = {[TM_BLOCK_SEQUENTIAL] = "attention, then feed-forward",
                                         [TM_BLOCK_PARALLEL1] = "side by side on one norm",
                                         [TM_BLOCK_PARALLEL2] = "side by side on two norms"};
    const tm_arch *a = &i->arch;
    say(f, "family", "%s (%s)", a->family->name, a->family->title);
    say(f, "architecture", "%s", a->arch);
    say(f, "hidden size", "%d", a->hidden);
    say(f, "layers", "%d: %s%s", a->layers, blocks[a->block],
        tm_family_has(a->family, TM_ROLE_POST_ATTN_NORM) ? ", outputs normalised" : "");
    say_attention(f, a);
    say_rope(f, a);
    say_ffn(f, a);
    say(f, "norm", "%s%s, epsilon %g", a->norm == TM_NORM_RMS ? "RMS" : "LayerNorm",
        a->norm_add_one ? " by 1 + w" : "", (double)a->eps);
    say(f, "biases", "%s%s%s%s", a->qkv_bias ? "q k v " : "", a->o_bias ? "o " : "",
        a->mlp_bias ? "feed-forward" : "", a->qkv_bias || a->o_bias || a->mlp_bias ? "" : "none");
    if (a->embed_scale != 1.0f)
        say(f, "embedding scale", "%g", (double)a->embed_scale);
    say(f, "vocabulary", "%d, head %s%s", a->vocab, a->tie ? "tied" : "of its own",
        a->head_norm ? " with unit rows" : "");
    if (a->head_softcap > 0)
        say(f, "logit soft cap", "%g", (double)a->head_softcap);
    say(f, "context", "%d positions", a->max_positions);
}

static void say_text(facts *f, const tm_inspect *i, const text_side *t)
{
    char ids[160] = "";
    for (int k = 0; k < i->stop_count; k++) {
        size_t at = strlen(ids);
        snprintf(ids + at, sizeof(ids) - at, "%s%d", k ? ", " : "", (int)i->stop_ids[k]);
    }
    say(f, "stop ids", "%s", i->stop_count ? ids : "none");
    if (!t->tokenizer) {
        say(f, "tokenizer", "none: %.180s", t->tokenizer_err.msg);
        return;
    }
    int tokens = (int)tm_tokenizer_vocab(t->tokenizer);
    say(f, "tokenizer", "%d tokens%s", tokens,
        tokens > i->arch.vocab ? ": the model has no rows for the last ones" : "");
    say(f, "template", "%.190s", t->template ? tm_template_name(t->template) : t->template_err.msg);
}

static double gib(size_t bytes)
{
    return (double)bytes / (1024.0 * 1024.0 * 1024.0);
}

static void print_tensors(const tm_inspect *i)
{
    for (size_t k = 0; i->ckpt && k < tm_checkpoint_count(i->ckpt); k++) {
        const tm_st_tensor *t = tm_checkpoint_at(i->ckpt, k);
        char shape[128];
        tm_st_shape_text(shape, sizeof(shape), t->dims, t->ndim);
        printf("  %-64s %-5s %s%s\n", t->name, tm_st_dtype_name(t->dtype), shape,
               tm_inspect_knows_tensor(i, t) ? "" : "  not recognised");
    }
}

/* Calls fn for each key of config.json, and of the text model's part of it, that is not recognised. */
static void each_unknown_key(const tm_inspect *i, void (*fn)(void *arg, const char *key), void *arg)
{
    json_t *parts[] = {i->config, json_object_get(i->config, "text_config")}, *v;
    const char *key;
    for (size_t k = 0; k < TM_ARRAY_LEN(parts); k++)
        json_object_foreach(parts[k], key, v)
        {
            if (!tm_inspect_knows_key(key))
                fn(arg, key);
        }
}

static void print_unknown_key(void *arg, const char *key)
{
    int *n = arg;
    printf("%s  config.json: %s\n", (*n)++ ? "" : "not recognised:\n", key);
}

/* Returns how many things are not recognised. */
static int print_unknown(const tm_inspect *i)
{
    int n = 0;
    each_unknown_key(i, print_unknown_key, &n);
    for (size_t k = 0; i->ckpt && k < tm_checkpoint_count(i->ckpt); k++) {
        const tm_st_tensor *t = tm_checkpoint_at(i->ckpt, k);
        if (!tm_inspect_knows_tensor(i, t))
            printf("%s  tensor %s\n", n++ ? "" : "not recognised:\n", t->name);
    }
    return n;
}

static void print_text(const tm_inspect *i, const facts *f, bool tensors)
{
    for (int k = 0; k < f->count; k++)
        printf("%-20s %s\n", f->at[k].name, f->at[k].text);
    if (i->ckpt)
        printf("%-20s %zu in the files, %.3f GiB\n", "tensors", tm_checkpoint_count(i->ckpt),
               gib(i->file_bytes));
    if (i->parameters > 0)
        printf("%-20s %lld\n", "parameters", (long long)i->parameters);
    if (tensors)
        print_tensors(i);
    printf("per rank, in 16 bits:\n");
    for (int k = 0; k < TM_INSPECT_SPLITS; k++) {
        const tm_inspect_split *s = &i->split[k];
        if (s->refused[0])
            printf("  tp %-2d %s\n", s->tp, s->refused);
        else
            printf("  tp %-2d weights %.3f GiB, KV cache %zu bytes per token\n", s->tp,
                   gib(s->weight_bytes), s->kv_bytes);
    }
    if (print_unknown(i) == 0)
        printf("everything in config.json and the files is recognised\n");
    if (i->problem[0])
        printf("PROBLEM: %s\n", i->problem);
}

static void write_tensors(tm_jw *w, const tm_inspect *i)
{
    tm_jw_key(w, "tensors");
    tm_jw_arr(w);
    for (size_t k = 0; i->ckpt && k < tm_checkpoint_count(i->ckpt); k++) {
        const tm_st_tensor *t = tm_checkpoint_at(i->ckpt, k);
        tm_jw_obj(w);
        tm_jw_kstr(w, "name", t->name);
        tm_jw_kstr(w, "dtype", tm_st_dtype_name(t->dtype));
        tm_jw_key(w, "shape");
        tm_jw_arr(w);
        for (int d = 0; d < t->ndim; d++)
            tm_jw_int(w, t->dims[d]);
        tm_jw_arr_end(w);
        tm_jw_kstr(w, "file", tm_checkpoint_file(i->ckpt, t));
        tm_jw_key(w, "recognised");
        tm_jw_bool(w, tm_inspect_knows_tensor(i, t));
        tm_jw_obj_end(w);
    }
    tm_jw_arr_end(w);
}

static void write_sizes(tm_jw *w, const tm_arch *a)
{
    const struct {
        const char *key;
        int value;
    } sizes[] = {{"hidden", a->hidden},       {"layers", a->layers},
                 {"heads", a->heads},         {"kv_heads", a->kv_heads},
                 {"head_dim", a->head_dim},   {"ffn", a->ffn},
                 {"vocab", a->vocab},         {"max_positions", a->max_positions},
                 {"experts", a->moe.experts}, {"experts_per_token", a->moe.top_k},
                 {"expert_ffn", a->moe.ffn},  {"shared_ffn", a->moe.shared}};
    tm_jw_key(w, "sizes");
    tm_jw_obj(w);
    for (size_t k = 0; k < TM_ARRAY_LEN(sizes); k++)
        tm_jw_kint(w, sizes[k].key, sizes[k].value);
    tm_jw_obj_end(w);
}

static void write_splits(tm_jw *w, const tm_inspect *i)
{
    tm_jw_key(w, "splits");
    tm_jw_arr(w);
    for (int k = 0; k < TM_INSPECT_SPLITS; k++) {
        const tm_inspect_split *s = &i->split[k];
        tm_jw_obj(w);
        tm_jw_kint(w, "tp", s->tp);
        if (s->refused[0]) {
            tm_jw_kstr(w, "refused", s->refused);
        } else {
            tm_jw_kint(w, "weight_bytes", (int64_t)s->weight_bytes);
            tm_jw_kint(w, "kv_bytes_per_token", (int64_t)s->kv_bytes);
        }
        tm_jw_obj_end(w);
    }
    tm_jw_arr_end(w);
}

static void write_unknown_key(void *arg, const char *key)
{
    tm_jw_str(arg, key);
}

static void write_unknown_keys(tm_jw *w, const tm_inspect *i)
{
    tm_jw_key(w, "unknown_keys");
    tm_jw_arr(w);
    each_unknown_key(i, write_unknown_key, w);
    tm_jw_arr_end(w);
}

static int print_json(const tm_inspect *i, const facts *f)
{
    tm_buf b;
    tm_jw w;
    tm_buf_init(&b, 0);
    tm_jw_init(&w, &b);
    tm_jw_obj(&w);
    tm_jw_key(&w, "config");
    tm_jw_obj(&w);
    for (int k = 0; k < f->count; k++)
        tm_jw_kstr(&w, f->at[k].name, f->at[k].text);
    tm_jw_obj_end(&w);
    write_sizes(&w, &i->arch);
    tm_jw_kint(&w, "parameters", i->parameters);
    tm_jw_kint(&w, "file_bytes", (int64_t)i->file_bytes);
    write_splits(&w, i);
    write_unknown_keys(&w, i);
    write_tensors(&w, i);
    tm_jw_kstr(&w, "problem", i->problem[0] ? i->problem : NULL);
    tm_jw_obj_end(&w);
    bool ok = !b.failed && printf("%s\n", b.data) > 0;
    tm_buf_deinit(&b);
    return ok ? 0 : 1;
}

int tm_cmd_inspect(int argc, char **argv)
{
    inspect_opts o = {0};
    const char *model;
    int n = 0, code;
    if (!tm_cmd_parse(&TM_INSPECT_OPTIONS, argc, argv, &o, &model, &n, &code))
        return code;
    tm_err err = TM_ERR_INIT;
    if (n != 1) {
        TM_FAIL(&err, TM_STATUS_INVALID, "give MODEL");
        return tm_cmd_fail("inspect", &err);
    }
    tm_inspect *i;
    text_side t;
    facts f = {0};
    tm_log_init("turbomesh", TM_LOG_WARN, TM_LOG_AUTO);
    if (tm_inspect_open(&i, model, &err) != TM_OK)
        return tm_cmd_fail("inspect", &err);
    open_text(&t, model);
    say_all(&f, i);
    say_text(&f, i, &t);
    code = 0;
    if (o.json)
        code = print_json(i, &f);
    else
        print_text(i, &f, o.tensors);
    if (i->problem[0])
        code = tm_status_exit(TM_STATUS_CONFIG);
    close_text(&t);
    tm_inspect_close(i);
    return code;
}
