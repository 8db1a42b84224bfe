/* tokenizer.model of SentencePiece, BPE and unigram.
 *
 * SentencePiece merges the two neighbours whose spellings together make the piece with the best score. Spelled
 * out over the vocabulary that is a finite list of pairs, the same rules that merges.txt gives, so one merger
 * serves both: for each piece and each place where it can be cut in two pieces there is one rule, ranked
 * by the piece's score. */
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "text/tok/spfile.h"
#include "text/tok/tok.h"
#include "text/tok/unicode.h"

#define RULES_MAX ((size_t)16 << 20)
#define PIECE_MAX 1024 /* SentencePiece itself stops at 512; bounds the work of finding rules */

typedef struct loader {
    tm_tokenizer *t;
    tm_sp_file f;
    const tm_tok_config *config;
    tm_buf piece;   /* scratch */
    uint32_t *rank; /* by id */
    tm_err *err;
} loader;

static bool is_of_model(tm_sp_type type)
{
    return type == TM_SP_NORMAL || type == TM_SP_USER_DEFINED || type == TM_SP_UNUSED;
}

/* ---- vocabulary ----------------------------------------------------------------------------------------- */

/* Marks become spaces. */
static void put_spaces(tm_buf *out, const char *s, size_t len)
{
    tm_buf_clear(out);
    for (size_t i = 0; i < len;) {
        if (len - i >= TM_SP_MARK_LEN && memcmp(s + i, TM_SP_MARK, TM_SP_MARK_LEN) == 0) {
            tm_buf_putc(out, ' ');
            i += TM_SP_MARK_LEN;
        } else {
            tm_buf_putc(out, s[i++]);
        }
    }
}

/* "<0xE2>" */
static int byte_of(const tm_sp_piece *p)
{
    static const char digits[] = "0123456789ABCDEF";
    if (p->len != 6 || memcmp(p->text, "<0x", 3) != 0 || p->text[5] != '>')
        return -1;
    const char *hi = memchr(digits, p->text[3], 16), *lo = memchr(digits, p->text[4], 16);
    return hi && lo ? (int)((hi - digits) * 16 + (lo - digits)) : -1;
}

static tm_status add_piece(loader *l, int32_t id)
{
    const tm_sp_piece *p = &l->f.pieces[id];
    uint8_t flags = is_of_model(p->type) ? 0 : TM_TOKEN_HIDDEN;
    put_spaces(&l->piece, p->text, p->len);
    if (p->type == TM_SP_BYTE) {
        int b = byte_of(p);
        if (b < 0)
            return TM_FAIL(l->err, TM_STATUS_DATA, "piece %d is of type byte, but not <0x..>",
                           (int)id);
        l->t->bpe.byte_id[b] = id;
        tm_buf_clear(&l->piece);
        tm_buf_putc(&l->piece, (char)b);
    }
    if (l->piece.failed)
        return TM_FAIL(l->err, TM_STATUS_NO_MEMORY, "out of memory for the vocabulary");
    if (!tm_utf8_valid(p->text, p->len))
        return TM_FAIL(l->err, TM_STATUS_DATA, "piece %d is not UTF-8", (int)id);
    if (p->len > PIECE_MAX)
        return TM_FAIL(l->err, TM_STATUS_TOO_LARGE, "piece %d has %u bytes, at most %d are allowed",
                       (int)id, (unsigned)p->len, PIECE_MAX);
    return tm_vocab_add(&l->t->vocab, id, p->text, p->len, l->piece.data, l->piece.len, flags,
                        l->err);
}

/* Spellings that only templates should write: placeholders which later models gave a meaning. */
static bool is_placeholder(const char *s, size_t len)
{
    return (s[0] == '<' || s[0] == '[') && len < 40 &&
           (memmem(s, len, "reserved", 8) || memmem(s, len, "UNUSED", 6) ||
            memmem(s, len, "unused", 6));
}

/* Control pieces are special tokens, user-defined ones are cut out of any text. */
static tm_status add_symbol(loader *l, int32_t id)
{
    const tm_sp_piece *p = &l->f.pieces[id];
    tm_added_spec a = {.text = p->text, .len = p->len, .id = id};
    if (p->type == TM_SP_CONTROL || p->type == TM_SP_UNKNOWN) {
        a.special = true;
        return tm_tok_add(l->t, &a, l->err);
    }
    a.guarded = is_placeholder(p->text, p->len);
    /* The unigram model finds them by itself, with the space in front that SentencePiece puts there. */
    if (p->type != TM_SP_USER_DEFINED || (l->f.model == TM_SP_UNIGRAM && !a.guarded))
        return TM_OK;
    put_spaces(&l->piece, p->text, p->len);
    if (l->f.escape_spaces && l->piece.len != p->len) {
        /* In the text it stands with spaces; the vocabulary has it with marks. */
        tm_added_token t = {.text = l->piece.data, .len = (uint32_t)l->piece.len, .id = id};
        return tm_added_put(&l->t->added[0], &t, l->err);
    }
    return tm_tok_add(l->t, &a, l->err);
}

static tm_status load_vocab(loader *l)
{
    for (size_t i = 0; i < l->f.count; i++)
        TM_TRY(add_piece(l, (int32_t)i));
    TM_TRY(tm_vocab_index(&l->t->vocab, l->err));
    for (size_t i = 0; i < l->f.count; i++) {
        if (l->f.pieces[i].type == TM_SP_UNKNOWN && l->t->bpe.unk < 0)
            l->t->bpe.unk = (int32_t)i;
        TM_TRY(add_symbol(l, (int32_t)i));
    }
    return TM_OK;
}

/* ---- BPE ------------------------------------------------------------------------------------------------ */

static int by_score(const void *pa, const void *pb)
{
    const tm_sp_piece *a = *(const tm_sp_piece *const *)pa, *b = *(const tm_sp_piece *const *)pb;
    return (a->score < b->score) - (a->score > b->score);
}

/* Equal scores are equal ranks: the leftmost pair then goes first. */
static tm_status rank_pieces(loader *l)
{
    const tm_sp_piece **order = malloc(l->f.count * sizeof(*order));
    l->rank = malloc(l->f.count * sizeof(*l->rank));
    if (!order || !l->rank) {
        free(order);
        return TM_FAIL(l->err, TM_STATUS_NO_MEMORY, "out of memory for the vocabulary");
    }
    for (size_t i = 0; i < l->f.count; i++)
        order[i] = &l->f.pieces[i];
    qsort(order, l->f.count, sizeof(*order), by_score);
    uint32_t rank = 0;
    for (size_t i = 0; i < l->f.count; i++) {
        rank += i > 0 && order[i]->score != order[i - 1]->score;
        l->rank[order[i] - l->f.pieces] = rank;
    }
    free(order);
    return TM_OK;
}

/* The pieces into which a piece can be cut behind `at`; false = none. */
static bool find_halves(loader *l, const tm_sp_piece *p, size_t at, int32_t half[2])
{
    const tm_vocab *v = &l->t->vocab;
    half[0] = tm_vocab_find(v, p->text, at);
    half[1] = half[0] < 0 ? -1 : tm_vocab_find(v, p->text + at, p->len - at);
    return half[1] >= 0;
}

/* add false: only counts. User-defined pieces are never merged together from parts. */
static size_t each_rule(loader *l, bool add)
{
    size_t n = 0;
    int32_t half[2];
    for (size_t i = 0; i < l->f.count; i++) {
        const tm_sp_piece *p = &l->f.pieces[i];
        if (p->type != TM_SP_NORMAL && p->type != TM_SP_UNUSED)
            continue;
        for (size_t at = 0; at < p->len;) {
            tm_utf8_next(p->text, &at);
            if (at >= p->len || !find_halves(l, p, at, half))
                continue;
            if (add)
                tm_bpe_add(&l->t->bpe, half[0], half[1], l->rank[i], (int32_t)i);
            n++;
        }
    }
    return n;
}

static void find_joins(loader *l)
{
    tm_spnorm *n = &l->t->spnorm;
    n->cut = n->escape;
    for (size_t i = 0; i < l->f.count; i++) {
        const tm_sp_piece *p = &l->f.pieces[i];
        for (size_t k = 1; is_of_model(p->type) && k + TM_SP_MARK_LEN <= p->len; k++) {
            bool mark = memcmp(p->text + k, TM_SP_MARK, TM_SP_MARK_LEN) == 0;
            bool run = k >= TM_SP_MARK_LEN &&
                       memcmp(p->text + k - TM_SP_MARK_LEN, TM_SP_MARK, TM_SP_MARK_LEN) == 0;
            if (mark && !run)
                n->joins[(unsigned char)p->text[k - 1]] = true;
        }
    }
}

static void expand_unused(const void *ctx, int32_t id, tm_ids *out)
{
    const tm_tokenizer *t = ctx;
    const tm_ids *to = &t->unused[id];
    if (to->n <= 1) { /* bytes, the unknown token, single characters */
        tm_ids_push(out, id);
        return;
    }
    /* Parts are shorter than the whole, which ends the recursion. */
    for (size_t i = 0; i < to->n; i++)
        expand_unused(ctx, to->v[i], out);
}

/* An unused piece takes part in merging, but is written as what it was merged from: as its spelling comes out
 * when its own rules are missing. */
static tm_status load_unused(loader *l)
{
    tm_tokenizer *t = l->t;
    bool any = false;
    for (size_t i = 0; i < l->f.count; i++)
        any |= l->f.pieces[i].type == TM_SP_UNUSED;
    if (!any)
        return TM_OK;
    t->unused = calloc(l->f.count, sizeof(*t->unused));
    if (!t->unused)
        return TM_FAIL(l->err, TM_STATUS_NO_MEMORY, "out of memory for the vocabulary");
    t->unused_n = (int32_t)l->f.count;
    for (size_t i = 0; i < l->f.count; i++) {
        const tm_sp_piece *p = &l->f.pieces[i];
        if (p->type != TM_SP_UNUSED)
            continue;
        tm_bpe_encode_without(&t->bpe, p->text, p->len, (int32_t)i, &t->unused[i]);
        if (t->unused[i].failed)
            return TM_FAIL(l->err, TM_STATUS_NO_MEMORY, "out of memory for the vocabulary");
    }
    for (size_t i = 0; i < l->f.count; i++)
        if (t->unused[i].n > 1)
            t->vocab.tokens[i].flags |= TM_TOKEN_HIDDEN;
    t->bpe.expand = expand_unused;
    t->bpe.expand_ctx = t;
    return TM_OK;
}

static void model_bpe(const tm_tokenizer *t, const char *piece, size_t len, tm_ids *out)
{
    tm_bpe_encode(&t->bpe, piece, len, out);
}

static tm_status load_bpe(loader *l)
{
    tm_bpe *b = &l->t->bpe;
    b->byte_fallback = l->f.byte_fallback;
    b->fuse_unk = true;
    l->t->model = model_bpe;
    find_joins(l);
    TM_TRY(rank_pieces(l));
    size_t rules = each_rule(l, false);
    if (rules > RULES_MAX)
        return TM_FAIL(l->err, TM_STATUS_TOO_LARGE, "the pieces make %zu merges, at most %zu",
                       rules, RULES_MAX);
    TM_TRY(tm_bpe_reserve(b, rules, l->err));
    each_rule(l, true);
    TM_TRY(load_unused(l));
    return tm_bpe_finish(b, &l->t->vocab, l->err);
}

/* ---- unigram -------------------------------------------------------------------------------------------- */

static void model_unigram(const tm_tokenizer *t, const char *piece, size_t len, tm_ids *out)
{
    tm_unigram_encode(t->unigram, piece, len, out);
}

static tm_status load_unigram(loader *l)
{
    tm_unigram_piece *v = malloc(l->f.count * sizeof(*v));
    if (!v)
        return TM_FAIL(l->err, TM_STATUS_NO_MEMORY, "out of memory for the vocabulary");
    size_t n = 0;
    tm_unigram_opts o = {.unk = l->t->bpe.unk,
                         .byte_id = l->f.byte_fallback ? l->t->bpe.byte_id : NULL,
                         .min_score = 1e30,
                         .max_score = -1e30,
                         .single = true};
    for (size_t i = 0; i < l->f.count; i++) {
        const tm_sp_piece *p = &l->f.pieces[i];
        if (p->type == TM_SP_NORMAL) {
            o.min_score = TM_MIN(o.min_score, (double)p->score);
            o.max_score = TM_MAX(o.max_score, (double)p->score);
        }
        if (p->type == TM_SP_NORMAL || p->type == TM_SP_USER_DEFINED)
            v[n++] = (tm_unigram_piece){p->text, p->len, (int32_t)i, (double)p->score,
                                        p->type == TM_SP_USER_DEFINED};
    }
    l->t->model = model_unigram;
    tm_status st = tm_unigram_create(&l->t->unigram, v, n, &o, l->err);
    free(v);
    return st;
}

/* ---- the whole file ------------------------------------------------------------------------------------- */

/* Tokenizers whose special tokens are in their code only: ids follow the model's last piece. `alone`: the
 * spelling is part of ordinary words. */
static const struct {
    const char *class_name;
    const struct {
        const char *text;
        bool alone;
    } added[10];
    const char *prefix[2];
    bool every;
} classes[] = {
    {"ChatGLMTokenizer",
     {{"[MASK]", false},
      {"[gMASK]", false},
      {"[sMASK]", false},
      {"sop", true},
      {"eop", true},
      {"<|system|>", false},
      {"<|user|>", false},
      {"<|assistant|>", false},
      {"<|observation|>", false}},
     {"[gMASK]", "sop"},
     true},
};

static int find_class(const tm_tok_config *c)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(classes); i++)
        if (tm_tok_config_class(c, classes[i].class_name))
            return (int)i;
    return -1;
}

static tm_status add_class_tokens(loader *l, int k)
{
    for (size_t i = 0; k >= 0 && i < TM_ARRAY_LEN(classes[k].added); i++) {
        const char *text = classes[k].added[i].text;
        if (!text)
            break;
        TM_TRY(tm_tok_add(l->t,
                          &(tm_added_spec){.text = text,
                                           .len = strlen(text),
                                           .id = (int32_t)(l->f.count + i),
                                           .special = true,
                                           .single_word = classes[k].added[i].alone},
                          l->err));
    }
    return TM_OK;
}

/* What the file itself says about names and ends; the config may then say more. */
static tm_status name_piece(loader *l, const char *name, int32_t id)
{
    char text[256];
    if (id < 0 || (size_t)id >= l->f.count || l->f.pieces[id].len >= sizeof(text))
        return TM_OK;
    const tm_sp_piece *p = &l->f.pieces[id];
    if (p->type != TM_SP_CONTROL && p->type != TM_SP_UNKNOWN)
        return TM_OK;
    memcpy(text, p->text, p->len);
    text[p->len] = 0;
    return tm_tok_name(l->t, name, text, l->err);
}

static tm_status load_ends(loader *l, int k)
{
    tm_tokenizer *t = l->t;
    for (int i = 0; k >= 0 && i < 2; i++)
        tm_ids_push(&t->prefix,
                    tm_tok_lookup(t, classes[k].prefix[i], strlen(classes[k].prefix[i])));
    const char *bos = tm_tokenizer_special(t, "bos_token"), *eos;
    int32_t id = bos ? tm_tok_lookup(t, bos, strlen(bos)) : -1;
    if (k < 0 && id >= 0)
        tm_ids_push(&t->prefix, id);
    eos = tm_tokenizer_special(t, "eos_token");
    t->eos = eos ? tm_tok_lookup(t, eos, strlen(eos)) : -1;
    if (t->prefix.failed)
        return TM_FAIL(l->err, TM_STATUS_NO_MEMORY, "out of memory");
    return k < 0 ? tm_tok_config_ends(l->config, t, true, l->err) : TM_OK;
}

static tm_status load_normalizer(loader *l, int k)
{
    tm_spnorm *n = &l->t->spnorm;
    bool legacy = false;
    if (l->config->config)
        TM_TRY(tm_json_bool(l->config->config, "legacy", &legacy, l->err));
    /* Trimming takes the space away that a text behind a special token begins with: there the prefix puts
     * it back. */
    bool every = legacy || l->f.remove_extra_spaces || (k >= 0 && classes[k].every);
    n->prefix = !l->f.add_dummy_prefix ? TM_SP_PREFIX_NEVER
                : every                ? TM_SP_PREFIX_EVERY
                                       : TM_SP_PREFIX_FIRST;
    n->prefix_behind = l->f.space_as_suffix;
    n->trim = l->f.remove_extra_spaces;
    n->escape = l->f.escape_spaces;
    l->t->strip_first_space = l->f.add_dummy_prefix && !l->f.space_as_suffix;
    l->t->strip_all_spaces = l->t->strip_first_space && n->trim;
    l->t->per_byte = true;
    TM_TRY(tm_charsmap_read(&n->map, l->f.charsmap, l->f.charsmap_len, l->err));
    TM_TRY(tm_norm_create(&l->t->norm, NULL, l->err));
    return tm_pretok_create_sp(&l->t->pretok, n, l->err);
}

static tm_status load_all(loader *l)
{
    static const char *const names[] = {"", "unigram", "BPE", "word", "char"};
    int k = find_class(l->config);
    TM_TRY(load_normalizer(l, k));
    TM_TRY(load_vocab(l));
    TM_TRY(add_class_tokens(l, k));
    TM_TRY(tm_tok_config_apply(l->config, l->t, l->err));
    TM_TRY(name_piece(l, "bos_token", l->f.bos_id));
    TM_TRY(name_piece(l, "eos_token", l->f.eos_id));
    TM_TRY(name_piece(l, "unk_token", l->t->bpe.unk));
    TM_TRY(load_ends(l, k));
    if (l->f.model == TM_SP_BPE)
        return load_bpe(l);
    if (l->f.model == TM_SP_UNIGRAM)
        return load_unigram(l);
    return TM_FAIL(l->err, TM_STATUS_UNSUPPORTED, "model type %d (%s) is not supported",
                   (int)l->f.model, l->f.model <= TM_SP_CHAR ? names[l->f.model] : "unknown");
}

tm_status tm_tok_load_sp(tm_tokenizer *t, const tm_text_file *file, const tm_tok_config *c,
                         tm_err *err)
{
    loader l = {.t = t, .config = c, .err = err};
    TM_TRY(tm_sp_file_read(&l.f, file->data, file->len, err));
    tm_buf_init(&l.piece, 0);
    tm_status st = load_all(&l);
    tm_buf_deinit(&l.piece);
    free(l.rank);
    tm_sp_file_deinit(&l.f);
    return st;
}
