/* The public face: which file makes which tokenizer (a table), and the two ways through it.
 *
 * Encoding follows the Hugging Face library: cut at added tokens in the raw text, normalise what lies between,
 * cut again at added tokens of the normalised kind, split into pieces, give each piece to the model. Text
 * from a user takes part as a whole (so benign text gets the same ids), only special tokens that touch it
 * are not cut. */
#include "text/tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "text/tok/tok.h"
#include "text/tok/unicode.h"

/* ---- loading -------------------------------------------------------------------------------------------- */

typedef tm_status (*load_fn)(tm_tokenizer *t, const tm_text_file *file, const tm_tok_config *c,
                             tm_err *err);

static bool is_any(const tm_text_file *f)
{
    (void)f;
    return true;
}

/* Two formats share the name tokenizer.model: protobuf, whose first field is a piece, and lines of base64. */
static bool is_sentencepiece(const tm_text_file *f)
{
    return f->len == 0 || f->data[0] == 0x0A;
}

/* In the order of preference. A name that begins with '*' is an ending. */
static const struct {
    const char *file;
    bool (*is)(const tm_text_file *f);
    load_fn load;
} kinds[] = {
    {"tokenizer.json", is_any, tm_tok_load_hf},
    {"tokenizer.model", is_sentencepiece, tm_tok_load_sp},
    {"tokenizer.model", is_any, tm_tok_load_tiktoken},
    {"tekken.json", is_any, tm_tok_load_tekken},
    {"*.tiktoken", is_any, tm_tok_load_tiktoken},
    {"vocab.json", is_any, tm_tok_load_pair},
};

static const tm_text_file *find_kind(const tm_text_file *files, int count, size_t k)
{
    const char *name = kinds[k].file;
    for (int i = 0; i < count; i++) {
        size_t n = strlen(files[i].name), end = strlen(name + 1);
        bool same = name[0] == '*' ? n > end && strcmp(files[i].name + n - end, name + 1) == 0
                                   : strcmp(files[i].name, name) == 0;
        if (same && kinds[k].is(&files[i]))
            return &files[i];
    }
    return NULL;
}

static tm_status load_kind(tm_tokenizer *t, const tm_text_file *files, int count, tm_err *err)
{
    tm_tok_config c = {0};
    TM_TRY(tm_tok_config_read(&c, files, count, err));
    tm_status st = TM_OK;
    const tm_text_file *f = NULL;
    for (size_t i = 0; i < TM_ARRAY_LEN(kinds) && !f; i++) {
        f = find_kind(files, count, i);
        if (!f)
            continue;
        st = f->len <= TM_TOKENIZER_FILE_MAX
                 ? kinds[i].load(t, f, &c, err)
                 : TM_FAIL(err, TM_STATUS_TOO_LARGE, "larger than %zu MiB",
                           TM_TOKENIZER_FILE_MAX >> 20);
        if (st != TM_OK)
            tm_err_prefix(err, "%s", f->name);
    }
    if (!f)
        st = TM_FAIL(
            err, TM_STATUS_NOT_FOUND,
            "the model has no tokenizer file (tokenizer.json, tokenizer.model, tekken.json, "
            "*.tiktoken, vocab.json with merges.txt)");
    tm_tok_config_deinit(&c);
    return st;
}

/* Messages quote what stands in files: it stays on one line. */
static void clean_message(tm_err *err)
{
    for (char *c = err ? err->msg : NULL; c && *c; c++)
        if ((unsigned char)*c < ' ' || *c == 0x7F)
            *c = '?';
}

tm_status tm_tokenizer_create(tm_tokenizer **out, const tm_text_file *files, int count, tm_err *err)
{
    tm_tokenizer *t = calloc(1, sizeof(*t));
    if (!t)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a tokenizer");
    tm_vocab_init(&t->vocab);
    tm_bpe_init(&t->bpe, &t->vocab);
    t->eos = -1;
    tm_status st = load_kind(t, files, count, err);
    if (st != TM_OK) {
        clean_message(err);
        tm_tokenizer_destroy(t);
        return st;
    }
    *out = t;
    return TM_OK;
}

void tm_tokenizer_destroy(tm_tokenizer *t)
{
    if (!t)
        return;
    tm_vocab_deinit(&t->vocab);
    tm_norm_destroy(t->norm);
    tm_pretok_destroy(t->pretok);
    tm_added_deinit(&t->added[0]);
    tm_added_deinit(&t->added[1]);
    tm_bpe_deinit(&t->bpe);
    tm_unigram_destroy(t->unigram);
    tm_charsmap_deinit(&t->spnorm.map);
    for (int32_t i = 0; i < t->unused_n; i++)
        tm_ids_deinit(&t->unused[i]);
    free(t->unused);
    tm_ids_deinit(&t->prefix);
    tm_ids_deinit(&t->suffix);
    for (int i = 0; i < t->name_count; i++) {
        free(t->names[i].name);
        free(t->names[i].value);
    }
    free(t);
}

int32_t tm_tok_lookup(const tm_tokenizer *t, const char *text, size_t len)
{
    for (int i = 0; i < 2; i++) {
        const tm_added_token *a = tm_added_find(&t->added[i], text, len);
        if (a)
            return a->id;
    }
    return tm_vocab_find(&t->vocab, text, len);
}

static tm_status place_added(tm_tokenizer *t, const tm_added_spec *a, int32_t id, tm_err *err)
{
    tm_vocab *v = &t->vocab;
    if (!tm_vocab_has(v, id))
        return tm_vocab_add(v, id, a->text, a->len, NULL, 0, TM_TOKEN_HIDDEN, err);
    const tm_token *old = &v->tokens[id];
    if (old->piece_len == a->len && memcmp(tm_vocab_piece(v, id), a->text, a->len) == 0)
        return TM_OK;
    return tm_vocab_set_piece(v, id, a->text, a->len, err);
}

/* Keys of byte-level models are bytes, written in files in another alphabet; only printable ASCII looks the
 * same in both. Other contents never name a token of the model. */
static bool same_spelling(const tm_tokenizer *t, const tm_added_spec *a)
{
    for (size_t i = 0; i < a->len && t->bpe.bytes; i++)
        if (a->text[i] < 33 || a->text[i] > 126)
            return false;
    return true;
}

tm_status tm_tok_add(tm_tokenizer *t, const tm_added_spec *a, tm_err *err)
{
    /* The model's own id wins over a stated one, as in the Hugging Face library. */
    int32_t id = same_spelling(t, a) ? tm_vocab_find(&t->vocab, a->text, a->len) : -1;
    if (id < 0)
        id = a->id;
    if (id < 0 || a->len == 0)
        return TM_OK;
    TM_TRY(place_added(t, a, id, err));
    uint8_t *flags = &t->vocab.tokens[id].flags;
    *flags = (uint8_t)((*flags & ~TM_TOKEN_SPECIAL) | TM_TOKEN_ADDED |
                       (a->special ? TM_TOKEN_SPECIAL : 0));

    tm_norm_work w;
    tm_norm_work_init(&w);
    tm_added_token tok = {.text = a->text,
                          .len = (uint32_t)a->len,
                          .id = id,
                          .special = a->special,
                          .lstrip = a->lstrip,
                          .rstrip = a->rstrip,
                          .single_word = a->single_word,
                          .guarded = a->guarded};
    const char *text = a->text;
    size_t len = a->len;
    tm_status st = a->normalized && t->norm ? tm_norm_run(t->norm, &w, &text, &len, err) : TM_OK;
    if (st == TM_OK) {
        tok.text = text;
        tok.len = (uint32_t)len;
        st = tm_added_put(&t->added[a->normalized], &tok, err);
    }
    tm_norm_work_deinit(&w);
    return st;
}

/* ---- encoding ------------------------------------------------------------------------------------------- */

typedef struct encoder {
    const tm_tokenizer *t;
    tm_added_rules rules;
    tm_ids ids;
    tm_pieces pieces;
    tm_norm_work norm;
    tm_err *err;
} encoder;

static tm_status encode_plain(encoder *e, const char *s, size_t len, bool at_start)
{
    if (len == 0)
        return TM_OK;
    TM_TRY(tm_pretok_run(e->t->pretok, s, len, at_start, &e->pieces, e->err));
    const tm_ranges *r = &e->pieces.ranges;
    for (size_t i = 0; i < r->n; i++)
        e->t->model(e->t, e->pieces.text + r->v[i].begin, r->v[i].end - r->v[i].begin, &e->ids);
    return TM_OK;
}

/* Offsets of user text do not survive a normaliser that changed something. A special token is then only
 * cut when the whole stretch is free of user text. */
static bool overlaps(const tm_added_rules *r, size_t begin, size_t end)
{
    for (size_t i = 0; i < r->input_count && r->input[i].begin < end; i++)
        if (r->input[i].end > begin)
            return true;
    return false;
}

/* A stretch without raw added tokens: normalise and cut at tokens of the normalised text. */
static tm_status encode_stretch(encoder *e, const char *all, size_t begin, size_t end)
{
    const char *s = all + begin;
    size_t len = end - begin;
    TM_TRY(tm_norm_run(e->t->norm, &e->norm, &s, &len, e->err));
    tm_added_rules rules = e->rules;
    size_t shift = 0;
    if (s == all + begin) { /* unchanged: search in the whole text, where the spans are right */
        s = all;
        shift = begin;
    } else if (rules.input_count > 0) {
        rules.plain |= overlaps(&e->rules, begin, end);
        rules.input_count = 0;
    }
    tm_added_scan scan = {.set = &e->t->added[1],
                          .rules = &rules,
                          .text = s,
                          .len = shift + len,
                          .pos = shift,
                          .taken = shift};
    tm_added_match m;
    size_t done = shift;
    while (tm_added_next(&scan, &m)) {
        TM_TRY(encode_plain(e, s + done, m.begin - done, begin == 0 && done == shift));
        tm_ids_push(&e->ids, m.token->id);
        done = m.end;
    }
    return encode_plain(e, s + done, shift + len - done, begin == 0 && done == shift);
}

static tm_status encode_text(encoder *e, const char *text, size_t len)
{
    tm_added_scan scan = {.set = &e->t->added[0], .rules = &e->rules, .text = text, .len = len};
    tm_added_match m;
    size_t done = 0;
    while (tm_added_next(&scan, &m)) {
        if (done < m.begin)
            TM_TRY(encode_stretch(e, text, done, m.begin));
        tm_ids_push(&e->ids, m.token->id);
        done = m.end;
    }
    return done < len ? encode_stretch(e, text, done, len) : TM_OK;
}

static tm_status check_text(const char *text, size_t len, tm_err *err)
{
    if (len > TM_TEXT_BYTES_MAX)
        return TM_FAIL(err, TM_STATUS_TOO_LARGE, "text of %zu bytes, at most %zu can be tokenized",
                       len, TM_TEXT_BYTES_MAX);
    if (!tm_utf8_valid(text, len))
        return TM_FAIL(err, TM_STATUS_INVALID, "text is not valid UTF-8");
    return TM_OK;
}

static void push_all(tm_ids *out, const tm_ids *add)
{
    for (size_t i = 0; i < add->n; i++)
        tm_ids_push(out, add->v[i]);
}

tm_status tm_tokenizer_encode(const tm_tokenizer *t, const char *text, size_t len,
                              const tm_encode_opts *opts, int32_t **ids, size_t *count, tm_err *err)
{
    static const tm_encode_opts none;
    const tm_encode_opts *o = opts ? opts : &none;
    TM_TRY(check_text(text, len, err));
    encoder e = {.t = t, .rules = {o->plain, o->input, o->input_count}, .err = err};
    tm_pieces_init(&e.pieces);
    tm_norm_work_init(&e.norm);
    if (o->add_special)
        push_all(&e.ids, &t->prefix);
    tm_status st = encode_text(&e, text, len);
    if (o->add_special)
        push_all(&e.ids, &t->suffix);
    if (st == TM_OK && !e.ids.v && !(e.ids.v = malloc(sizeof(*e.ids.v))))
        e.ids.failed = true;
    if (st == TM_OK && e.ids.failed)
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for %zu token ids", e.ids.n);
    tm_pieces_deinit(&e.pieces);
    tm_norm_work_deinit(&e.norm);
    if (st != TM_OK) {
        tm_ids_deinit(&e.ids);
        return st;
    }
    *ids = e.ids.v;
    *count = e.ids.n;
    return TM_OK;
}

/* ---- looking up and decoding ---------------------------------------------------------------------------- */

const char *tm_tokenizer_piece(const tm_tokenizer *t, int32_t id, size_t *len)
{
    if (!tm_vocab_has(&t->vocab, id))
        return NULL;
    *len = t->vocab.tokens[id].piece_len;
    return tm_vocab_piece(&t->vocab, id);
}

bool tm_tokenizer_is_special(const tm_tokenizer *t, int32_t id)
{
    return tm_vocab_has(&t->vocab, id) && (t->vocab.tokens[id].flags & TM_TOKEN_SPECIAL);
}

int32_t tm_tokenizer_id(const tm_tokenizer *t, const char *token, size_t len)
{
    return tm_tok_lookup(t, token, len);
}

int32_t tm_tokenizer_vocab(const tm_tokenizer *t)
{
    return t->vocab.count;
}

int32_t tm_tokenizer_eos(const tm_tokenizer *t)
{
    return t->eos;
}

const char *tm_tokenizer_special(const tm_tokenizer *t, const char *name)
{
    for (int i = 0; i < t->name_count; i++)
        if (strcmp(t->names[i].name, name) == 0)
            return t->names[i].value;
    return NULL;
}

tm_status tm_tokenizer_decode(const tm_tokenizer *t, const int32_t *ids, size_t count,
                              bool skip_special, char **text, size_t *len, tm_err *err)
{
    tm_buf raw, out;
    tm_buf_init(&raw, 0);
    tm_buf_init(&out, 0);
    for (size_t i = 0; i < count; i++) {
        size_t n;
        const char *p = tm_tokenizer_piece(t, ids[i], &n);
        if (p && !(skip_special && tm_tokenizer_is_special(t, ids[i])))
            tm_buf_append(&raw, p, n);
    }
    size_t skip = 0, skip_max = t->strip_all_spaces ? raw.len : t->strip_first_space;
    while (skip < skip_max && skip < raw.len && raw.data[skip] == ' ')
        skip++;
    if (raw.len > skip)
        tm_utf8_append_lossy(&out, raw.data + skip, raw.len - skip, t->per_byte);
    tm_buf_reserve(&out, 1);
    bool failed = raw.failed || out.failed;
    tm_buf_deinit(&raw);
    if (failed) {
        tm_buf_deinit(&out);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for the text of %zu tokens", count);
    }
    out.data[out.len] = 0;
    *text = tm_buf_steal(&out, len);
    return TM_OK;
}
