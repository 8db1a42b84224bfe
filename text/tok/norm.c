/* Each step is a row {JSON type, parser} and a function that either says "unchanged" or writes the new text.
 * Saying so matters: nearly all text is in NFC already and is then never copied. */
#include "text/tok/norm.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "common/check.h"
#include "common/hash.h"
#include "common/json.h"
#include "text/tok/charsmap.h"
#include "text/tok/regex.h"

#define STEPS_MAX 16
#define DEPTH_MAX 16

typedef struct step step;
/* Writes the result to out and sets *changed, or leaves both alone. */
typedef tm_status (*step_fn)(const step *s, const char *t, size_t len, tm_buf *out, bool *changed,
                             tm_err *err);

struct step {
    step_fn run;
    tm_uc_form form;
    tm_regex *regex;
    char *from, *to; /* Replace; Prepend uses `to` */
    size_t from_len, to_len;
    bool left, right; /* Strip */
    tm_charsmap map;  /* Precompiled */
};

struct tm_norm {
    step steps[STEPS_MAX];
    int count;
};

static tm_status run_form(const step *s, const char *t, size_t len, tm_buf *out, bool *changed,
                          tm_err *err)
{
    if (tm_uc_is_normal(t, len, s->form))
        return TM_OK;
    *changed = true;
    if (!tm_uc_normalize(out, t, len, s->form))
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory while normalising text");
    return TM_OK;
}

static tm_status run_replace(const step *s, const char *t, size_t len, tm_buf *out, bool *changed,
                             tm_err *err)
{
    (void)err;
    size_t pos = 0;
    const char *hit;
    while (pos < len && (hit = memmem(t + pos, len - pos, s->from, s->from_len))) {
        tm_buf_append(out, t + pos, (size_t)(hit - t) - pos);
        tm_buf_append(out, s->to, s->to_len);
        pos = (size_t)(hit - t) + s->from_len;
        *changed = true;
    }
    if (*changed)
        tm_buf_append(out, t + pos, len - pos);
    return TM_OK;
}

static tm_status replace_regex(const step *s, tm_regex_work *w, const char *t, size_t len,
                               tm_buf *out, bool *changed, tm_err *err)
{
    size_t copied = 0, from = 0;
    while (from <= len) {
        tm_regex_match m;
        bool found;
        TM_TRY(tm_regex_find(s->regex, w, t, len, from, &m, &found, err));
        if (!found)
            break;
        tm_buf_append(out, t + copied, m.begin - copied);
        tm_buf_append(out, s->to, s->to_len);
        *changed = true;
        copied = from = m.end;
        if (m.begin == m.end) {
            if (from == len)
                break;
            tm_utf8_next(t, &from);
        }
    }
    if (*changed)
        tm_buf_append(out, t + copied, len - copied);
    return TM_OK;
}

static tm_status run_replace_regex(const step *s, const char *t, size_t len, tm_buf *out,
                                   bool *changed, tm_err *err)
{
    tm_regex_work *w = tm_regex_work_create(s->regex);
    if (!w)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for matching");
    tm_status st = replace_regex(s, w, t, len, out, changed, err);
    tm_regex_work_destroy(w);
    return st;
}

static tm_status run_prepend(const step *s, const char *t, size_t len, tm_buf *out, bool *changed,
                             tm_err *err)
{
    (void)err;
    if (len == 0)
        return TM_OK;
    *changed = true;
    tm_buf_append(out, s->to, s->to_len);
    tm_buf_append(out, t, len);
    return TM_OK;
}

static tm_status run_strip(const step *s, const char *t, size_t len, tm_buf *out, bool *changed,
                           tm_err *err)
{
    (void)err;
    size_t begin = 0, end = len;
    while (s->left && begin < end) {
        size_t at = begin;
        if (!(tm_uc_class(tm_utf8_next(t, &at)) & TM_UC_SPACE))
            break;
        begin = at;
    }
    while (s->right && end > begin) {
        size_t at = end;
        if (!(tm_uc_class(tm_utf8_prev(t, &at)) & TM_UC_SPACE))
            break;
        end = at;
    }
    *changed = begin > 0 || end < len;
    if (*changed)
        tm_buf_append(out, t + begin, end - begin);
    return TM_OK;
}

/* Full lower case as Rust has it: one character gives one, but U+0130 gives "i" and U+0307. */
static tm_status run_lowercase(const step *s, const char *t, size_t len, tm_buf *out, bool *changed,
                               tm_err *err)
{
    (void)s;
    (void)err;
    *changed = true;
    for (size_t pos = 0; pos < len;) {
        char c[4];
        uint32_t cp = tm_utf8_next(t, &pos);
        uint32_t low = cp == 0x130 ? 'i' : (uint32_t)utf8proc_tolower((utf8proc_int32_t)cp);
        tm_buf_append(out, c, tm_utf8_put(low, c));
        if (cp == 0x130)
            tm_buf_append(out, "\xCC\x87", 2);
    }
    return TM_OK;
}

static tm_status run_strip_accents(const step *s, const char *t, size_t len, tm_buf *out,
                                   bool *changed, tm_err *err)
{
    (void)s;
    (void)err;
    *changed = true;
    for (size_t pos = 0; pos < len;) {
        size_t from = pos;
        uint32_t cp = tm_utf8_next(t, &pos);
        if (!(tm_uc_class(cp) & TM_UC_MARK))
            tm_buf_append(out, t + from, pos - from);
    }
    return TM_OK;
}

static tm_status run_precompiled(const step *s, const char *t, size_t len, tm_buf *out,
                                 bool *changed, tm_err *err)
{
    (void)err;
    *changed = true;
    tm_charsmap_apply_clusters(&s->map, t, len, out);
    return TM_OK;
}

/* ---- loading -------------------------------------------------------------------------------------------- */

static step *new_step(tm_norm *n, step_fn run, tm_err *err)
{
    if (n->count == STEPS_MAX) {
        (void)TM_FAIL(err, TM_STATUS_TOO_LARGE, "more than %d steps", STEPS_MAX);
        return NULL;
    }
    step *s = &n->steps[n->count++];
    s->run = run;
    return s;
}

static tm_status copy_string(const json_t *v, const char *key, char **out, size_t *len, tm_err *err)
{
    const json_t *s = tm_json_get(v, key);
    if (!json_is_string(s))
        return TM_FAIL(err, TM_STATUS_DATA, "%s: expected a string, got %s", key,
                       tm_json_type_name(s));
    *len = json_string_length(s);
    *out = malloc(*len + 1);
    if (!*out)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    memcpy(*out, json_string_value(s), *len + 1);
    return TM_OK;
}

static tm_status parse_replace(tm_norm *n, const json_t *v, int depth, tm_err *err)
{
    (void)depth;
    step *s = new_step(n, run_replace, err);
    if (!s)
        return TM_STATUS_TOO_LARGE;
    TM_TRY(copy_string(v, "content", &s->to, &s->to_len, err));
    const json_t *pat = tm_json_get(v, "pattern");
    const json_t *regex = pat ? tm_json_get(pat, "Regex") : NULL;
    if (json_is_string(regex)) {
        s->run = run_replace_regex;
        return tm_regex_create(&s->regex, json_string_value(regex), json_string_length(regex),
                               false, err);
    }
    if (!json_is_object(pat))
        return TM_FAIL(err, TM_STATUS_DATA, "pattern: expected an object, got %s",
                       tm_json_type_name(pat));
    TM_TRY(copy_string(pat, "String", &s->from, &s->from_len, err));
    return s->from_len ? TM_OK : TM_FAIL(err, TM_STATUS_DATA, "pattern: is empty");
}

static tm_status parse_prepend(tm_norm *n, const json_t *v, int depth, tm_err *err)
{
    (void)depth;
    step *s = new_step(n, run_prepend, err);
    return s ? copy_string(v, "prepend", &s->to, &s->to_len, err) : TM_STATUS_TOO_LARGE;
}

static tm_status parse_strip(tm_norm *n, const json_t *v, int depth, tm_err *err)
{
    (void)depth;
    step *s = new_step(n, run_strip, err);
    if (!s)
        return TM_STATUS_TOO_LARGE;
    s->left = s->right = true;
    TM_TRY(tm_json_bool(v, "strip_left", &s->left, err));
    return tm_json_bool(v, "strip_right", &s->right, err);
}

static tm_status parse_precompiled(tm_norm *n, const json_t *v, int depth, tm_err *err)
{
    (void)depth;
    const json_t *text = tm_json_get(v, "precompiled_charsmap");
    step *s = new_step(n, run_precompiled, err);
    if (!s)
        return TM_STATUS_TOO_LARGE;
    if (!text) /* a normaliser without a table does nothing */
        return TM_OK;
    size_t len = json_string_length(text), n_bytes = 0;
    char *bytes = malloc(len / 4 * 3 + 3);
    if (!bytes)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a normaliser");
    tm_status st =
        json_is_string(text) && tm_base64_bytes(bytes, &n_bytes, json_string_value(text), len)
            ? tm_charsmap_read(&s->map, bytes, n_bytes, err)
            : TM_FAIL(err, TM_STATUS_DATA, "precompiled_charsmap: expected base64");
    free(bytes);
    return st;
}

static tm_status parse_step(tm_norm *n, const json_t *v, int depth, tm_err *err);

static tm_status parse_sequence(tm_norm *n, const json_t *v, int depth, tm_err *err)
{
    const json_t *list = tm_json_get(v, "normalizers");
    if (!json_is_array(list))
        return TM_FAIL(err, TM_STATUS_DATA, "normalizers: expected an array, got %s",
                       tm_json_type_name(list));
    for (size_t i = 0; i < json_array_size(list); i++) {
        tm_status st = parse_step(n, json_array_get(list, i), depth + 1, err);
        if (st != TM_OK) {
            tm_err_prefix(err, "normalizers[%zu]", i);
            return st;
        }
    }
    return TM_OK;
}

static const struct {
    const char *type;
    tm_status (*parse)(tm_norm *n, const json_t *v, int depth,
                       tm_err *err); /* NULL = no parameters */
    step_fn run;
    tm_uc_form form;
} rows[] = {
    {"NFC", NULL, run_form, TM_UC_NFC},
    {"NFD", NULL, run_form, TM_UC_NFD},
    {"NFKC", NULL, run_form, TM_UC_NFKC},
    {"NFKD", NULL, run_form, TM_UC_NFKD},
    {"Lowercase", NULL, run_lowercase, TM_UC_NFC},
    {"StripAccents", NULL, run_strip_accents, TM_UC_NFC},
    {"Replace", parse_replace, NULL, TM_UC_NFC},
    {"Prepend", parse_prepend, NULL, TM_UC_NFC},
    {"Strip", parse_strip, NULL, TM_UC_NFC},
    {"Precompiled", parse_precompiled, NULL, TM_UC_NFC},
    {"Sequence", parse_sequence, NULL, TM_UC_NFC},
};

static tm_status parse_step(tm_norm *n, const json_t *v, int depth, tm_err *err)
{
    const char *type = NULL;
    if (depth > DEPTH_MAX)
        return TM_FAIL(err, TM_STATUS_DATA, "nested more than %d deep", DEPTH_MAX);
    if (!json_is_object(v))
        return TM_FAIL(err, TM_STATUS_DATA, "expected an object, got %s", tm_json_type_name(v));
    TM_TRY(tm_json_str(v, "type", &type, err));
    if (!type)
        return TM_FAIL(err, TM_STATUS_DATA, "type: is missing");
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        if (strcmp(rows[i].type, type) != 0)
            continue;
        if (rows[i].parse)
            return rows[i].parse(n, v, depth, err);
        step *s = new_step(n, rows[i].run, err);
        if (!s)
            return TM_STATUS_TOO_LARGE;
        s->form = rows[i].form;
        return TM_OK;
    }
    return TM_FAIL(err, TM_STATUS_UNSUPPORTED, "type: \"%s\" is not supported", type);
}

tm_status tm_norm_create(tm_norm **out, const json_t *v, tm_err *err)
{
    tm_norm *n = calloc(1, sizeof(*n));
    if (!n)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    tm_status st = v && !json_is_null(v) ? parse_step(n, v, 0, err) : TM_OK;
    if (st != TM_OK) {
        tm_norm_destroy(n);
        return st;
    }
    *out = n;
    return TM_OK;
}

tm_status tm_norm_create_form(tm_norm **out, tm_uc_form form, tm_err *err)
{
    tm_norm *n = calloc(1, sizeof(*n));
    if (!n)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    n->steps[n->count++] = (step){.run = run_form, .form = form};
    *out = n;
    return TM_OK;
}

void tm_norm_destroy(tm_norm *n)
{
    if (!n)
        return;
    for (int i = 0; i < n->count; i++) {
        tm_regex_destroy(n->steps[i].regex);
        free(n->steps[i].from);
        free(n->steps[i].to);
        tm_charsmap_deinit(&n->steps[i].map);
    }
    free(n);
}

void tm_norm_work_init(tm_norm_work *w)
{
    tm_buf_init(&w->buf[0], 0);
    tm_buf_init(&w->buf[1], 0);
}

void tm_norm_work_deinit(tm_norm_work *w)
{
    tm_buf_deinit(&w->buf[0]);
    tm_buf_deinit(&w->buf[1]);
}

tm_status tm_norm_run(const tm_norm *n, tm_norm_work *w, const char **text, size_t *len,
                      tm_err *err)
{
    for (int i = 0; i < n->count; i++) {
        tm_buf *b = &w->buf[*text == w->buf[0].data];
        bool changed = false;
        tm_buf_clear(b);
        TM_TRY(n->steps[i].run(&n->steps[i], *text, *len, b, &changed, err));
        if (b->failed)
            return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory while normalising text");
        if (!changed)
            continue;
        *text = b->data ? b->data : "";
        *len = b->len;
    }
    return TM_OK;
}
