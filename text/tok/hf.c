/* tokenizer.json of the Hugging Face tokenizers library: byte-pair and unigram models with any supported normaliser,
 * pre-tokenizer, decoder and post-processor. The streamed tables (vocabulary, merges) are resolved to ids
 * here; everything small is read from the tree. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "text/tok/decode.h"
#include "text/tok/jread.h"
#include "text/tok/tok.h"
#include "text/tok/unicode.h"

typedef struct loader {
    tm_tokenizer *t;
    tm_tokenizer_file f;
    tm_decoder decoder;
    bool byte_level;
    tm_buf key, piece; /* scratch */
    tm_err *err;
} loader;

/* A spelling in the GPT-2 alphabet as bytes; false when it has other characters. */
static bool to_bytes(const char *s, size_t len, tm_buf *out)
{
    tm_buf_clear(out);
    for (size_t pos = 0; pos < len;) {
        int b = tm_byte_of_char(tm_utf8_next(s, &pos));
        if (b < 0)
            return false;
        tm_buf_putc(out, (char)b);
    }
    return true;
}

/* ---- vocabulary and merges ------------------------------------------------------------------------------ */

static tm_status add_token(loader *l, const tm_vocab_entry *e)
{
    const char *s = l->f.blob.data + e->text, *key = s;
    size_t key_len = e->len;
    uint8_t flags = 0;
    if (l->byte_level) {
        /* A spelling outside the alphabet can be decoded, but no text leads to it. */
        if (to_bytes(s, e->len, &l->key)) {
            key = l->key.data ? l->key.data : "";
            key_len = l->key.len;
        } else {
            flags = TM_TOKEN_HIDDEN;
        }
    }
    tm_decoder_piece(&l->decoder, s, e->len, &l->piece);
    if (l->key.failed || l->piece.failed)
        return TM_FAIL(l->err, TM_STATUS_NO_MEMORY, "out of memory for the vocabulary");
    return tm_vocab_add(&l->t->vocab, e->id, key, key_len, l->piece.data ? l->piece.data : "",
                        l->piece.len, flags, l->err);
}

static tm_status load_vocab(loader *l)
{
    if (l->f.vocab_n == 0)
        return TM_FAIL(l->err, TM_STATUS_DATA, "model.vocab: is missing or empty");
    for (size_t i = 0; i < l->f.vocab_n; i++) {
        tm_status st = add_token(l, &l->f.vocab[i]);
        if (st != TM_OK) {
            tm_err_prefix(l->err, "model.vocab");
            return st;
        }
    }
    tm_status st = tm_vocab_index(&l->t->vocab, l->err);
    if (st != TM_OK)
        tm_err_prefix(l->err, "model.vocab");
    return st;
}

static int32_t find_spelling(loader *l, const char *s, size_t len)
{
    if (!l->byte_level)
        return tm_vocab_find(&l->t->vocab, s, len);
    if (!to_bytes(s, len, &l->key) || !l->key.data)
        return -1;
    return tm_vocab_find(&l->t->vocab, l->key.data, l->key.len);
}

static tm_status load_merge(loader *l, size_t i)
{
    const tm_merge_entry *m = &l->f.merges[i];
    const char *s = l->f.blob.data + m->text;
    const tm_vocab *v = &l->t->vocab;
    struct {
        const char *text;
        size_t len;
        int32_t id;
    } part[3] = {{s, m->left_len, -1},
                 {s + m->left_len, m->right_len, -1},
                 {s, m->left_len + m->right_len, -1}};
    for (int k = 0; k < 3; k++) {
        char q[64];
        part[k].id = find_spelling(l, part[k].text, part[k].len);
        if (part[k].id < 0)
            return TM_FAIL(l->err, TM_STATUS_DATA,
                           "model.merges[%zu]: %s %s, which is not in model.vocab", i,
                           k < 2 ? "names" : "makes", tm_token_quote(part[k].text, part[k].len, q));
    }
    /* Merging never ends in a special token, whatever the text spells. */
    if (!(v->tokens[part[2].id].flags & TM_TOKEN_SPECIAL))
        tm_bpe_add(&l->t->bpe, part[0].id, part[1].id, (uint32_t)i, part[2].id);
    return TM_OK;
}

static void find_bytes(loader *l)
{
    const tm_vocab *v = &l->t->vocab;
    for (int b = 0; b < 256; b++) {
        char text[8] = {(char)b};
        size_t len = 1;
        if (!l->byte_level)
            len = (size_t)snprintf(text, sizeof(text), "<0x%02X>", b);
        int32_t id = tm_vocab_find(v, text, len);
        bool special = id >= 0 && (v->tokens[id].flags & TM_TOKEN_SPECIAL);
        l->t->bpe.byte_id[b] = special ? -1 : id;
    }
}

static tm_status refuse_if_set(const json_t *model, const char *key, tm_err *err)
{
    const json_t *v = tm_json_get(model, key);
    bool off = !v || (json_is_string(v) && json_string_length(v) == 0) ||
               (json_is_number(v) && json_number_value(v) == 0);
    return off ? TM_OK : TM_FAIL(err, TM_STATUS_UNSUPPORTED, "model.%s: is not supported", key);
}

static void model_bpe(const tm_tokenizer *t, const char *piece, size_t len, tm_ids *out)
{
    tm_bpe_encode(&t->bpe, piece, len, out);
}

static tm_status load_bpe(loader *l, const json_t *model)
{
    tm_bpe *b = &l->t->bpe;
    const char *unk = NULL;
    if (!l->f.has_merges) /* every text would fall into letters */
        return TM_FAIL(l->err, TM_STATUS_DATA, "model.merges: is missing");
    TM_TRY(refuse_if_set(model, "dropout", l->err));
    TM_TRY(refuse_if_set(model, "continuing_subword_prefix", l->err));
    TM_TRY(refuse_if_set(model, "end_of_word_suffix", l->err));
    TM_TRY(tm_json_bool(model, "byte_fallback", &b->byte_fallback, l->err));
    TM_TRY(tm_json_bool(model, "fuse_unk", &b->fuse_unk, l->err));
    TM_TRY(tm_json_bool(model, "ignore_merges", &b->whole_first, l->err));
    TM_TRY(tm_json_str(model, "unk_token", &unk, l->err));
    if (unk) {
        b->unk = find_spelling(l, unk, strlen(unk));
        if (b->unk < 0)
            return TM_FAIL(l->err, TM_STATUS_DATA,
                           "model.unk_token: \"%.40s\" is not in model.vocab", unk);
    }
    find_bytes(l);
    TM_TRY(tm_bpe_reserve(b, l->f.merges_n, l->err));
    for (size_t i = 0; i < l->f.merges_n; i++)
        TM_TRY(load_merge(l, i));
    l->t->model = model_bpe;
    return tm_bpe_finish(b, &l->t->vocab, l->err);
}

static void model_unigram(const tm_tokenizer *t, const char *piece, size_t len, tm_ids *out)
{
    tm_unigram_encode(t->unigram, piece, len, out);
}

/* Byte fallback only works when all bytes have a token. */
static bool has_all_bytes(const tm_bpe *b)
{
    for (int i = 0; i < 256; i++)
        if (b->byte_id[i] < 0)
            return false;
    return true;
}

static tm_status load_unigram(loader *l, const json_t *model)
{
    const tm_tokenizer_file *f = &l->f;
    int64_t unk = -1;
    bool fallback = false;
    if (!f->vocab_is_array)
        return TM_FAIL(l->err, TM_STATUS_DATA, "model.vocab: expected an array, got an object");
    TM_TRY(tm_json_int(model, "unk_id", 0, (int64_t)f->vocab_n - 1, &unk, l->err));
    TM_TRY(tm_json_bool(model, "byte_fallback", &fallback, l->err));
    find_bytes(l);
    fallback = fallback && has_all_bytes(&l->t->bpe);
    tm_unigram_piece *v = malloc(f->vocab_n * sizeof(*v));
    if (!v)
        return TM_FAIL(l->err, TM_STATUS_NO_MEMORY, "out of memory for the vocabulary");
    tm_unigram_opts o = {
        .unk = (int32_t)unk, .byte_id = fallback ? l->t->bpe.byte_id : NULL, .min_score = 1e300};
    size_t n = 0;
    for (size_t i = 0; i < f->vocab_n; i++) {
        const tm_vocab_entry *e = &f->vocab[i];
        o.min_score = TM_MIN(o.min_score, e->score);
        if (e->len > 0 && !(l->t->vocab.tokens[e->id].flags & TM_TOKEN_SPECIAL))
            v[n++] = (tm_unigram_piece){f->blob.data + e->text, e->len, e->id, e->score, false};
    }
    l->t->model = model_unigram;
    tm_status st = tm_unigram_create(&l->t->unigram, v, n, &o, l->err);
    free(v);
    return st;
}

/* ---- added tokens and post-processor -------------------------------------------------------------------- */

static tm_status load_added(loader *l)
{
    const json_t *list = tm_json_get(l->f.tree, "added_tokens");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *v = json_array_get(list, i), *text = tm_json_get(v, "content");
        int64_t id = -1;
        tm_added_spec a = {0};
        tm_status st = json_is_string(text)
                           ? TM_OK
                           : TM_FAIL(l->err, TM_STATUS_DATA, "content: expected a string, got %s",
                                     tm_json_type_name(text));
        if (st == TM_OK)
            st = tm_json_int(v, "id", 0, TM_VOCAB_IDS_MAX - 1, &id, l->err);
        a.text = json_string_value(text);
        a.len = json_string_length(text);
        a.id = (int32_t)id;
        /* The library's default is "not special tokens are matched on normalised text". */
        if (st == TM_OK)
            st = tm_json_bool(v, "special", &a.special, l->err);
        a.normalized = !a.special;
        struct {
            const char *key;
            bool *out;
        } flags[] = {{"normalized", &a.normalized},
                     {"lstrip", &a.lstrip},
                     {"rstrip", &a.rstrip},
                     {"single_word", &a.single_word}};
        for (size_t k = 0; k < TM_ARRAY_LEN(flags) && st == TM_OK; k++)
            st = tm_json_bool(v, flags[k].key, flags[k].out, l->err);
        if (st == TM_OK)
            st = tm_tok_add(l->t, &a, l->err);
        if (st != TM_OK) {
            tm_err_prefix(l->err, "added_tokens[%zu]", i);
            return st;
        }
    }
    return TM_OK;
}

static tm_status push_template_token(loader *l, const json_t *v, const json_t *token, tm_ids *to)
{
    const char *name = NULL;
    TM_TRY(tm_json_str(token, "id", &name, l->err));
    const json_t *known = tm_json_get(v, "special_tokens");
    const json_t *entry = name && known ? tm_json_get(known, name) : NULL;
    const json_t *ids = entry ? tm_json_get(entry, "ids") : NULL;
    if (!json_is_array(ids))
        return TM_FAIL(l->err, TM_STATUS_DATA, "special_tokens: has no ids for \"%.40s\"",
                       name ? name : "");
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);
        json_int_t n = json_integer_value(id);
        if (!json_is_integer(id) || n < 0 || n >= TM_VOCAB_IDS_MAX ||
            !tm_vocab_has(&l->t->vocab, (int32_t)n))
            return TM_FAIL(l->err, TM_STATUS_DATA, "special_tokens.%.40s.ids[%zu]: no such token",
                           name, i);
        tm_ids_push(to, (int32_t)n);
    }
    return TM_OK;
}

static tm_status post_template(loader *l, const json_t *v, int depth)
{
    (void)depth;
    const json_t *single = tm_json_get(v, "single");
    bool behind = false;
    if (!json_is_array(single))
        return TM_FAIL(l->err, TM_STATUS_DATA, "single: expected an array, got %s",
                       tm_json_type_name(single));
    for (size_t i = 0; i < json_array_size(single); i++) {
        const json_t *part = json_array_get(single, i), *token = tm_json_get(part, "SpecialToken");
        if (token)
            TM_TRY(push_template_token(l, v, token, behind ? &l->t->suffix : &l->t->prefix));
        else
            behind = true;
    }
    return TM_OK;
}

/* {"cls": ["<s>", 0], "sep": ["</s>", 2]} */
static tm_status post_cls_sep(loader *l, const json_t *v, int depth)
{
    (void)depth;
    static const char *const keys[] = {"cls", "sep"};
    for (int i = 0; i < 2; i++) {
        const json_t *id = json_array_get(tm_json_get(v, keys[i]), 1);
        json_int_t n = json_integer_value(id);
        if (!json_is_integer(id) || n < 0 || n >= TM_VOCAB_IDS_MAX ||
            !tm_vocab_has(&l->t->vocab, (int32_t)n))
            return TM_FAIL(l->err, TM_STATUS_DATA, "%s: expected [token, id]", keys[i]);
        tm_ids_push(i ? &l->t->suffix : &l->t->prefix, (int32_t)n);
    }
    return TM_OK;
}

static tm_status post_nothing(loader *l, const json_t *v, int depth)
{
    (void)l;
    (void)v;
    (void)depth;
    return TM_OK;
}

static tm_status load_post(loader *l, const json_t *v, int depth);

static tm_status post_sequence(loader *l, const json_t *v, int depth)
{
    const json_t *list = tm_json_get(v, "processors");
    for (size_t i = 0; i < json_array_size(list); i++)
        TM_TRY(load_post(l, json_array_get(list, i), depth + 1));
    return TM_OK;
}

static const struct {
    const char *type;
    tm_status (*load)(loader *l, const json_t *v, int depth);
} post_processors[] = {
    {"TemplateProcessing", post_template}, {"ByteLevel", post_nothing},
    {"Sequence", post_sequence},           {"RobertaProcessing", post_cls_sep},
    {"BertProcessing", post_cls_sep},
};

static tm_status load_post(loader *l, const json_t *v, int depth)
{
    const char *type = NULL;
    if (!v || json_is_null(v))
        return TM_OK;
    if (depth > 8)
        return TM_FAIL(l->err, TM_STATUS_DATA, "nested more than 8 deep");
    if (!json_is_object(v))
        return TM_FAIL(l->err, TM_STATUS_DATA, "expected an object, got %s", tm_json_type_name(v));
    TM_TRY(tm_json_str(v, "type", &type, l->err));
    for (size_t i = 0; type && i < TM_ARRAY_LEN(post_processors); i++)
        if (strcmp(post_processors[i].type, type) == 0)
            return post_processors[i].load(l, v, depth);
    return TM_FAIL(l->err, TM_STATUS_UNSUPPORTED, "type: \"%.60s\" is not supported",
                   type ? type : "");
}

/* ---- the whole file ------------------------------------------------------------------------------------- */

static tm_status in_section(tm_status st, const char *name, tm_err *err)
{
    if (st != TM_OK)
        tm_err_prefix(err, "%s", name);
    return st;
}

static const struct {
    const char *type;
    tm_status (*load)(loader *l, const json_t *model);
} models[] = {{"BPE", load_bpe}, {"Unigram", load_unigram}};

static tm_status load_model(loader *l)
{
    const json_t *model = tm_json_get(l->f.tree, "model");
    const char *type = NULL;
    if (!json_is_object(model))
        return TM_FAIL(l->err, TM_STATUS_DATA, "model: expected an object, got %s",
                       tm_json_type_name(model));
    TM_TRY(in_section(tm_json_str(model, "type", &type, l->err), "model", l->err));
    /* Old files leave the type out; merges say that it is BPE. */
    if (!type && l->f.merges_n > 0)
        type = "BPE";
    for (size_t i = 0; type && i < TM_ARRAY_LEN(models); i++)
        if (strcmp(models[i].type, type) == 0)
            return models[i].load(l, model);
    return TM_FAIL(l->err, TM_STATUS_UNSUPPORTED, "model.type: \"%.40s\" is not supported",
                   type ? type : "");
}

static tm_status load_all(loader *l, const tm_tok_config *c)
{
    const json_t *tree = l->f.tree;
    tm_tokenizer *t = l->t;
    if (!json_is_object(tree) || !tm_json_get(tree, "model"))
        return TM_FAIL(l->err, TM_STATUS_DATA, "expected an object with \"model\"");
    TM_TRY(in_section(tm_norm_create(&t->norm, tm_json_get(tree, "normalizer"), l->err),
                      "normalizer", l->err));
    TM_TRY(in_section(tm_pretok_create(&t->pretok, tm_json_get(tree, "pre_tokenizer"), l->err),
                      "pre_tokenizer", l->err));
    TM_TRY(in_section(tm_decoder_parse(&l->decoder, tm_json_get(tree, "decoder"), l->err),
                      "decoder", l->err));
    l->byte_level = t->bpe.bytes = tm_pretok_is_byte_level(t->pretok);
    t->strip_first_space = l->decoder.strip_first_space;
    t->per_byte = l->decoder.per_byte;
    TM_TRY(load_vocab(l));
    TM_TRY(load_added(l));
    TM_TRY(tm_tok_config_apply(c, t, l->err));
    TM_TRY(load_model(l));
    TM_TRY(
        in_section(load_post(l, tm_json_get(tree, "post_processor"), 0), "post_processor", l->err));
    if (t->prefix.failed || t->suffix.failed)
        return TM_FAIL(l->err, TM_STATUS_NO_MEMORY, "out of memory");
    return tm_tok_config_ends(c, t, false, l->err);
}

tm_status tm_tok_load_hf(tm_tokenizer *t, const tm_text_file *file, const tm_tok_config *c,
                         tm_err *err)
{
    loader l = {.t = t, .err = err};
    TM_TRY(tm_tokenizer_file_read(&l.f, file->data, file->len, err));
    tm_buf_init(&l.key, 0);
    tm_buf_init(&l.piece, 0);
    tm_status st = load_all(&l, c);
    tm_decoder_deinit(&l.decoder);
    tm_buf_deinit(&l.key);
    tm_buf_deinit(&l.piece);
    tm_tokenizer_file_deinit(&l.f);
    return st;
}
