/* Every stage is a row {JSON type, parser, run}. A splitter is "find the next delimiter" plus one of the five
 * behaviours of the Hugging Face library, which decide what happens to the delimiter; the behaviours are
 * applied in one place (add_part). The common case, one Split with a known pattern, runs a hand-written
 * scanner. */
#include "text/tok/pretok.h"

#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "text/tok/regex.h"
#include "text/tok/scan.h"
#include "text/tok/unicode.h"

#define STAGES_MAX 16
#define DEPTH_MAX  16
#define METASPACE  "\xE2\x96\x81"

typedef enum behavior { REMOVED, ISOLATED, MERGED_PREVIOUS, MERGED_NEXT, CONTIGUOUS } behavior;

typedef struct stage stage;
typedef tm_status (*stage_fn)(const stage *s, tm_pieces *p, const char *text, bool at_start,
                              tm_err *err);

struct stage {
    stage_fn run;
    behavior behave;
    bool invert;
    tm_scan_fn scan;
    tm_regex *regex;
    char *literal; /* Split by a string; Metaspace: the replacement */
    size_t literal_len;
    unsigned classes; /* split at characters of these classes */
    bool ascii_punct; /* ... and at ASCII symbols */
    bool prefix_space, prefix_first, split;
    bool trailing; /* the pattern TM_SCAN_TRAILING */
    const tm_spnorm *sp;
};

struct tm_pretok {
    stage stages[STAGES_MAX];
    int count;
    bool byte_level;
    int spelled_from; /* first stage behind ByteLevel */
};

/* ---- splitting ------------------------------------------------------------------------------------------ */

typedef struct splitter {
    tm_ranges *out;
    behavior behave;
    bool invert;
    size_t base; /* where the piece at hand begins in the text */
    tm_range open;
    bool has_open, open_is_match;
} splitter;

static void flush_part(splitter *sp)
{
    if (sp->has_open)
        tm_ranges_push(sp->out, sp->open.begin, sp->open.end);
    sp->has_open = false;
}

/* One stretch, delimiter (match) or not, in order. What may still grow is kept open. */
static void add_part(splitter *sp, size_t begin, size_t end, bool match)
{
    match ^= sp->invert;
    tm_range r = {(uint32_t)(sp->base + begin), (uint32_t)(sp->base + end)};
    bool join = false;
    if (sp->has_open) {
        join = (sp->behave == CONTIGUOUS && match == sp->open_is_match) ||
               (sp->behave == MERGED_PREVIOUS && match && !sp->open_is_match) ||
               (sp->behave == MERGED_NEXT && !match && sp->open_is_match);
    }
    if (sp->behave == REMOVED && match)
        return;
    if (join) {
        sp->open.end = r.end;
        sp->open_is_match = match;
        return;
    }
    flush_part(sp);
    sp->open = r;
    sp->has_open = true;
    sp->open_is_match = match;
}

static void split_classes(const stage *s, splitter *sp, const char *t, size_t len)
{
    size_t gap = 0;
    for (size_t pos = 0; pos < len;) {
        size_t at = pos;
        uint32_t cp = tm_utf8_next(t, &pos);
        bool hit = (tm_uc_class(cp) & s->classes) != 0;
        if (s->ascii_punct && cp < 128)
            hit = cp > 32 && cp < 127 && !(tm_uc_ascii[cp] & (TM_UC_LETTER | TM_UC_NUMBER));
        if (!hit)
            continue;
        if (gap < at)
            add_part(sp, gap, at, false);
        add_part(sp, at, pos, true);
        gap = pos;
    }
    if (gap < len)
        add_part(sp, gap, len, false);
}

static void split_literal(const stage *s, splitter *sp, const char *t, size_t len)
{
    size_t gap = 0;
    while (gap < len) {
        const char *hit = memmem(t + gap, len - gap, s->literal, s->literal_len);
        if (!hit)
            break;
        size_t at = (size_t)(hit - t);
        if (gap < at)
            add_part(sp, gap, at, false);
        add_part(sp, at, at + s->literal_len, true);
        gap = at + s->literal_len;
    }
    if (gap < len)
        add_part(sp, gap, len, false);
}

static void split_trailing(splitter *sp, const char *t, size_t len)
{
    size_t gap = 0, begin, end;
    while (tm_scan_trailing(t, len, gap, &begin, &end)) {
        if (gap < begin)
            add_part(sp, gap, begin, false);
        add_part(sp, begin, end, true);
        gap = end;
    }
    if (gap < len)
        add_part(sp, gap, len, false);
}

static tm_status split_regex(const stage *s, tm_regex_work *w, splitter *sp, const char *t,
                             size_t len, tm_err *err)
{
    size_t gap = 0, from = 0;
    while (from <= len) {
        tm_regex_match m;
        bool found;
        TM_TRY(tm_regex_find(s->regex, w, t, len, from, &m, &found, err));
        if (!found)
            break;
        if (gap < m.begin)
            add_part(sp, gap, m.begin, false);
        if (m.begin < m.end)
            add_part(sp, m.begin, m.end, true);
        gap = from = m.end;
        if (m.begin == m.end) {
            if (from == len)
                break;
            tm_utf8_next(t, &from);
        }
    }
    if (gap < len)
        add_part(sp, gap, len, false);
    return TM_OK;
}

/* The scanners' patterns match everywhere, so there are no gaps and every behaviour but the joining ones
 * comes down to a cut; tm_pretok_create only picks them for Isolated (or Removed with invert). */
static void split_scan(tm_scan_fn scan, tm_ranges *out, const char *t, tm_range r)
{
    size_t pos = 0, len = r.end - r.begin;
    while (pos < len) {
        size_t end = scan(t + r.begin, pos, len);
        tm_ranges_push(out, r.begin + pos, r.begin + end);
        pos = end;
    }
}

static tm_status run_split(const stage *s, tm_pieces *p, const char *text, bool at_start,
                           tm_err *err)
{
    (void)at_start;
    tm_status st = TM_OK;
    tm_regex_work *w = s->regex ? tm_regex_work_create(s->regex) : NULL;
    if (s->regex && !w)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for matching");
    p->spare.n = 0;
    for (size_t i = 0; i < p->ranges.n && st == TM_OK; i++) {
        tm_range r = p->ranges.v[i];
        splitter sp = {.out = &p->spare, .behave = s->behave, .invert = s->invert, .base = r.begin};
        if (s->scan)
            split_scan(s->scan, &p->spare, text, r);
        else if (s->trailing)
            split_trailing(&sp, text + r.begin, r.end - r.begin);
        else if (s->regex)
            st = split_regex(s, w, &sp, text + r.begin, r.end - r.begin, err);
        else if (s->literal)
            split_literal(s, &sp, text + r.begin, r.end - r.begin);
        else
            split_classes(s, &sp, text + r.begin, r.end - r.begin);
        flush_part(&sp);
    }
    tm_regex_work_destroy(w);
    tm_ranges t = p->ranges;
    p->ranges = p->spare;
    p->spare = t;
    return st;
}

/* ---- rewriting stages ----------------------------------------------------------------------------------- */

/* The buffer that the current text does not lie in. */
static tm_buf *other_buf(tm_pieces *p, const char *text)
{
    tm_buf *b = &p->own[text == p->own[0].data];
    tm_buf_clear(b);
    return b;
}

static tm_status finish_rewrite(tm_pieces *p, tm_buf *b, tm_err *err)
{
    if (b->failed)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for the text");
    p->text = b->data;
    return TM_OK;
}

/* ByteLevel with add_prefix_space: every piece begins with a space. */
static tm_status run_prefix_space(const stage *s, tm_pieces *p, const char *text, bool at_start,
                                  tm_err *err)
{
    (void)s;
    (void)at_start;
    tm_buf *b = other_buf(p, text);
    for (size_t i = 0; i < p->ranges.n; i++) {
        tm_range *r = &p->ranges.v[i];
        size_t begin = b->len;
        if (text[r->begin] != ' ')
            tm_buf_putc(b, ' ');
        tm_buf_append(b, text + r->begin, r->end - r->begin);
        *r = (tm_range){(uint32_t)begin, (uint32_t)b->len};
    }
    return finish_rewrite(p, b, err);
}

/* ByteLevel spells bytes in the GPT-2 alphabet, and stages behind it see those letters (the byte 0xB2 is the
 * digit '\xC2\xB2' to them). Only for such stages the text is really spelled out, and read back at the end. */
static tm_status run_to_alphabet(const stage *s, tm_pieces *p, const char *text, bool at_start,
                                 tm_err *err)
{
    (void)s;
    (void)at_start;
    tm_buf *b = other_buf(p, text);
    for (size_t i = 0; i < p->ranges.n; i++) {
        tm_range *r = &p->ranges.v[i];
        size_t begin = b->len;
        for (size_t k = r->begin; k < r->end; k++) {
            char c[4];
            tm_buf_append(b, c, tm_utf8_put(tm_char_of_byte((unsigned char)text[k]), c));
        }
        *r = (tm_range){(uint32_t)begin, (uint32_t)b->len};
    }
    return finish_rewrite(p, b, err);
}

static tm_status run_from_alphabet(const stage *s, tm_pieces *p, const char *text, bool at_start,
                                   tm_err *err)
{
    (void)s;
    (void)at_start;
    tm_buf *b = other_buf(p, text);
    for (size_t i = 0; i < p->ranges.n; i++) {
        tm_range *r = &p->ranges.v[i];
        size_t begin = b->len;
        for (size_t k = r->begin; k < r->end;)
            tm_buf_putc(b, (char)tm_byte_of_char(tm_utf8_next(text, &k)));
        *r = (tm_range){(uint32_t)begin, (uint32_t)b->len};
    }
    return finish_rewrite(p, b, err);
}

static tm_status run_metaspace(const stage *s, tm_pieces *p, const char *text, bool at_start,
                               tm_err *err)
{
    tm_buf *b = other_buf(p, text);
    for (size_t i = 0; i < p->ranges.n; i++) {
        tm_range *r = &p->ranges.v[i];
        const char *t = text + r->begin;
        size_t len = r->end - r->begin, begin = b->len;
        bool marked =
            t[0] == ' ' || (len >= s->literal_len && memcmp(t, s->literal, s->literal_len) == 0);
        bool wanted = s->prefix_space || (s->prefix_first && at_start && i == 0);
        if (wanted && !marked)
            tm_buf_append(b, s->literal, s->literal_len);
        for (size_t k = 0; k < len; k++) {
            if (t[k] == ' ')
                tm_buf_append(b, s->literal, s->literal_len);
            else
                tm_buf_putc(b, t[k]);
        }
        *r = (tm_range){(uint32_t)begin, (uint32_t)b->len};
    }
    TM_TRY(finish_rewrite(p, b, err));
    return s->split ? run_split(s, p, p->text, at_start, err) : TM_OK;
}

static tm_status run_sp(const stage *s, tm_pieces *p, const char *text, bool at_start, tm_err *err)
{
    tm_buf *b = other_buf(p, text);
    tm_range all = p->ranges.n ? p->ranges.v[0] : (tm_range){0, 0};
    p->ranges.n = 0;
    tm_spnorm_run(s->sp, text + all.begin, all.end - all.begin, at_start, b, &p->ranges);
    return finish_rewrite(p, b, err);
}

/* ---- loading -------------------------------------------------------------------------------------------- */

static stage *new_stage(tm_pretok *p, stage_fn run, tm_err *err)
{
    if (p->count == STAGES_MAX) {
        (void)TM_FAIL(err, TM_STATUS_TOO_LARGE, "more than %d stages", STAGES_MAX);
        return NULL;
    }
    stage *s = &p->stages[p->count++];
    s->run = run;
    s->behave = ISOLATED;
    return s;
}

static tm_status read_behavior(const json_t *v, behavior *out, tm_err *err)
{
    static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious",
                                        "MergedWithNext", "Contiguous"};
    const char *name = "Isolated";
    TM_TRY(tm_json_str(v, "behavior", &name, err));
    for (size_t i = 0; i < TM_ARRAY_LEN(names); i++) {
        if (strcmp(names[i], name) == 0) {
            *out = (behavior)i;
            return TM_OK;
        }
    }
    return TM_FAIL(err, TM_STATUS_DATA, "behavior: unknown value \"%s\"", name);
}

static tm_status set_literal(stage *s, const char *text, size_t len, tm_err *err)
{
    s->literal = malloc(len + 1);
    if (!s->literal)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for a pattern");
    memcpy(s->literal, text, len);
    s->literal[len] = 0;
    s->literal_len = len;
    return TM_OK;
}

static tm_status set_pattern(stage *s, const char *pattern, size_t len, tm_err *err)
{
    s->trailing = len == strlen(TM_SCAN_TRAILING) && memcmp(pattern, TM_SCAN_TRAILING, len) == 0;
    if (s->trailing)
        return TM_OK;
    bool cuts_all = (s->behave == ISOLATED) || (s->behave == REMOVED && s->invert);
    s->scan = cuts_all ? tm_scan_for(pattern, len) : NULL;
    return s->scan
               ? TM_OK
               : tm_regex_create(&s->regex, pattern, len, tm_scan_is_published(pattern, len), err);
}

static tm_status parse_split(tm_pretok *p, const json_t *v, int depth, tm_err *err)
{
    (void)depth;
    stage *s = new_stage(p, run_split, err);
    if (!s)
        return TM_STATUS_TOO_LARGE;
    TM_TRY(tm_json_bool(v, "invert", &s->invert, err));
    TM_TRY(read_behavior(v, &s->behave, err));
    const json_t *pat = tm_json_get(v, "pattern");
    const json_t *regex = pat ? tm_json_get(pat, "Regex") : NULL;
    const json_t *text = pat ? tm_json_get(pat, "String") : NULL;
    if (json_is_string(regex))
        return set_pattern(s, json_string_value(regex), json_string_length(regex), err);
    if (json_is_string(text) && json_string_length(text) > 0)
        return set_literal(s, json_string_value(text), json_string_length(text), err);
    return TM_FAIL(err, TM_STATUS_DATA, "pattern: expected {\"Regex\": ...} or {\"String\": ...}");
}

static tm_status parse_byte_level(tm_pretok *p, const json_t *v, int depth, tm_err *err)
{
    (void)depth;
    bool prefix = true, regex = true;
    TM_TRY(tm_json_bool(v, "add_prefix_space", &prefix, err));
    TM_TRY(tm_json_bool(v, "use_regex", &regex, err));
    if (p->byte_level)
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED, "ByteLevel twice");
    p->byte_level = true;
    if (prefix && !new_stage(p, run_prefix_space, err))
        return TM_STATUS_TOO_LARGE;
    if (regex) {
        stage *s = new_stage(p, run_split, err);
        if (!s)
            return TM_STATUS_TOO_LARGE;
        s->scan = tm_scan_gpt2;
    }
    p->spelled_from = p->count;
    return TM_OK;
}

static tm_status parse_metaspace(tm_pretok *p, const json_t *v, int depth, tm_err *err)
{
    (void)depth;
    stage *s = new_stage(p, run_metaspace, err);
    if (!s)
        return TM_STATUS_TOO_LARGE;
    const char *text = METASPACE, *scheme = NULL;
    bool prefix = true;
    s->split = true;
    s->behave = MERGED_NEXT;
    TM_TRY(tm_json_str(v, "replacement", &text, err));
    TM_TRY(tm_json_str(v, "prepend_scheme", &scheme, err));
    TM_TRY(tm_json_bool(v, "add_prefix_space", &prefix, err));
    TM_TRY(tm_json_bool(v, "split", &s->split, err));
    if (!scheme)
        scheme = prefix ? "always" : "never";
    s->prefix_space = strcmp(scheme, "always") == 0;
    s->prefix_first = strcmp(scheme, "first") == 0;
    if (!s->prefix_space && !s->prefix_first && strcmp(scheme, "never") != 0)
        return TM_FAIL(err, TM_STATUS_DATA, "prepend_scheme: unknown value \"%s\"", scheme);
    if (!text[0])
        return TM_FAIL(err, TM_STATUS_DATA, "replacement: is empty");
    return set_literal(s, text, strlen(text), err);
}

static tm_status parse_digits(tm_pretok *p, const json_t *v, int depth, tm_err *err)
{
    (void)depth;
    bool single = false;
    TM_TRY(tm_json_bool(v, "individual_digits", &single, err));
    stage *s = new_stage(p, run_split, err);
    if (!s)
        return TM_STATUS_TOO_LARGE;
    s->classes = TM_UC_NUMBER;
    s->behave = single ? ISOLATED : CONTIGUOUS;
    return TM_OK;
}

static tm_status parse_punctuation(tm_pretok *p, const json_t *v, int depth, tm_err *err)
{
    (void)depth;
    stage *s = new_stage(p, run_split, err);
    if (!s)
        return TM_STATUS_TOO_LARGE;
    s->classes = TM_UC_PUNCT;
    s->ascii_punct = true;
    return read_behavior(v, &s->behave, err);
}

static tm_status parse_whitespace_split(tm_pretok *p, const json_t *v, int depth, tm_err *err)
{
    (void)depth;
    (void)v;
    stage *s = new_stage(p, run_split, err);
    if (!s)
        return TM_STATUS_TOO_LARGE;
    s->classes = TM_UC_SPACE;
    s->behave = REMOVED;
    return TM_OK;
}

static tm_status parse_whitespace(tm_pretok *p, const json_t *v, int depth, tm_err *err)
{
    /* \w+|[^\w\s]+ with \w as Rust has it: alphabetic, marks, digits, connectors, joiners. */
#define WORD                                                                                       \
    "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{200C}\\x{200D}\\x{24B6}-\\x{24E9}"                       \
    "\\x{1F130}-\\x{1F149}\\x{1F150}-\\x{1F169}\\x{1F170}-\\x{1F189}"
    static const char words[] = "[" WORD "]+|[^" WORD "\\s]+";
    (void)depth;
    (void)v;
    stage *s = new_stage(p, run_split, err);
    if (!s)
        return TM_STATUS_TOO_LARGE;
    s->behave = REMOVED;
    s->invert = true;
    return set_pattern(s, words, sizeof(words) - 1, err);
}

static tm_status parse_stage(tm_pretok *p, const json_t *v, int depth, tm_err *err);

static tm_status parse_sequence(tm_pretok *p, const json_t *v, int depth, tm_err *err)
{
    const json_t *list = tm_json_get(v, "pretokenizers");
    if (!json_is_array(list))
        return TM_FAIL(err, TM_STATUS_DATA, "pretokenizers: expected an array, got %s",
                       tm_json_type_name(list));
    for (size_t i = 0; i < json_array_size(list); i++) {
        tm_status st = parse_stage(p, json_array_get(list, i), depth + 1, err);
        if (st != TM_OK) {
            tm_err_prefix(err, "pretokenizers[%zu]", i);
            return st;
        }
    }
    return TM_OK;
}

static const struct {
    const char *type;
    tm_status (*parse)(tm_pretok *p, const json_t *v, int depth, tm_err *err);
} parsers[] = {
    {"Split", parse_split},           {"ByteLevel", parse_byte_level},
    {"Metaspace", parse_metaspace},   {"Digits", parse_digits},
    {"Sequence", parse_sequence},     {"Punctuation", parse_punctuation},
    {"Whitespace", parse_whitespace}, {"WhitespaceSplit", parse_whitespace_split},
};

static tm_status parse_stage(tm_pretok *p, const json_t *v, int depth, tm_err *err)
{
    const char *type = NULL;
    if (depth > DEPTH_MAX)
        return TM_FAIL(err, TM_STATUS_DATA, "nested more than %d deep", DEPTH_MAX);
    if (!json_is_object(v))
        return TM_FAIL(err, TM_STATUS_DATA, "expected an object, got %s", tm_json_type_name(v));
    TM_TRY(tm_json_str(v, "type", &type, err));
    if (!type)
        return TM_FAIL(err, TM_STATUS_DATA, "type: is missing");
    for (size_t i = 0; i < TM_ARRAY_LEN(parsers); i++)
        if (strcmp(parsers[i].type, type) == 0)
            return parsers[i].parse(p, v, depth, err);
    return TM_FAIL(err, TM_STATUS_UNSUPPORTED, "type: \"%s\" is not supported", type);
}

static tm_status spell_out(tm_pretok *p, tm_err *err)
{
    if (!p->byte_level || p->spelled_from == p->count)
        return TM_OK;
    if (!new_stage(p, run_from_alphabet, err) || !new_stage(p, run_from_alphabet, err))
        return TM_STATUS_TOO_LARGE;
    stage *at = &p->stages[p->spelled_from];
    memmove(at + 1, at, (size_t)(p->count - p->spelled_from - 1) * sizeof(*at));
    *at = (stage){.run = run_to_alphabet};
    return TM_OK;
}

tm_status tm_pretok_create(tm_pretok **out, const json_t *v, tm_err *err)
{
    tm_pretok *p = calloc(1, sizeof(*p));
    if (!p)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    tm_status st = v && !json_is_null(v) ? parse_stage(p, v, 0, err) : TM_OK;
    if (st == TM_OK)
        st = spell_out(p, err);
    if (st != TM_OK) {
        tm_pretok_destroy(p);
        return st;
    }
    *out = p;
    return TM_OK;
}

tm_status tm_pretok_create_split(tm_pretok **out, const char *pattern, tm_err *err)
{
    tm_pretok *p = calloc(1, sizeof(*p));
    if (!p)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    p->byte_level = true;
    stage *s = new_stage(p, run_split, err);
    tm_status st = set_pattern(s, pattern, strlen(pattern), err);
    if (st != TM_OK) {
        tm_pretok_destroy(p);
        return st;
    }
    *out = p;
    return TM_OK;
}

tm_status tm_pretok_create_sp(tm_pretok **out, const tm_spnorm *n, tm_err *err)
{
    tm_pretok *p = calloc(1, sizeof(*p));
    if (!p)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    new_stage(p, run_sp, err)->sp = n;
    *out = p;
    return TM_OK;
}

void tm_pretok_destroy(tm_pretok *p)
{
    if (!p)
        return;
    for (int i = 0; i < p->count; i++) {
        tm_regex_destroy(p->stages[i].regex);
        free(p->stages[i].literal);
    }
    free(p);
}

bool tm_pretok_is_byte_level(const tm_pretok *p)
{
    return p->byte_level;
}

/* ---- running -------------------------------------------------------------------------------------------- */

void tm_pieces_init(tm_pieces *p)
{
    *p = (tm_pieces){0};
    tm_buf_init(&p->own[0], 0);
    tm_buf_init(&p->own[1], 0);
}

void tm_pieces_deinit(tm_pieces *p)
{
    tm_ranges_deinit(&p->ranges);
    tm_ranges_deinit(&p->spare);
    tm_buf_deinit(&p->own[0]);
    tm_buf_deinit(&p->own[1]);
}

tm_status tm_pretok_run(const tm_pretok *p, const char *text, size_t len, bool at_start,
                        tm_pieces *out, tm_err *err)
{
    out->text = text;
    out->ranges.n = 0;
    tm_ranges_push(&out->ranges, 0, len);
    for (int i = 0; i < p->count; i++)
        TM_TRY(p->stages[i].run(&p->stages[i], out, out->text, at_start, err));
    if (out->ranges.failed || out->spare.failed)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory for the pieces of a text");
    return TM_OK;
}
