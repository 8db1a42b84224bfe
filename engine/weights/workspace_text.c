/* Reads the two notations as far as their writers use them. Everything stays text here; whoever asks for a key says
 * what it must be.
 *
 * YAML proper is large. Dumps of nested maps of scalars and lists are small: one key or one list item a line,
 * indentation for nesting, quotes. What goes beyond (anchors, tags, block texts) is refused with its line. */
#include "engine/weights/workspace_text.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"

#define DEPTH_MAX    4
#define KEY_MAX_LEN  128
#define LINE_MAX_LEN 65536

typedef struct level {
    int indent;
    char prefix[KEY_MAX_LEN]; /* "rope_param." */
} level;

typedef struct reader {
    json_t *out;
    int line, entries;
    level levels[DEPTH_MAX];
    int depth;
    json_t *list;              /* of the last key without a value, until something else comes */
    char waiting[KEY_MAX_LEN]; /* that key */
    int waiting_indent;
    tm_err *err;
} reader;

#define REFUSE(r, ...) TM_FAIL((r)->err, TM_STATUS_DATA, "line %d: " __VA_ARGS__)

static const char *skip_spaces(const char *s, const char *end)
{
    while (s < end && (*s == ' ' || *s == '\t'))
        s++;
    return s;
}

static const char *trim_end(const char *s, const char *end)
{
    while (end > s && isspace((unsigned char)end[-1]))
        end--;
    return end;
}

static tm_status no_memory(reader *r)
{
    return TM_FAIL(r->err, TM_STATUS_NO_MEMORY, "out of memory");
}

static tm_status put(reader *r, const char *key, json_t *value)
{
    if (++r->entries > TM_WS_ENTRIES_MAX) {
        json_decref(value);
        return REFUSE(r, "more than %d entries", r->line, TM_WS_ENTRIES_MAX);
    }
    if (!tm_utf8_valid(key, strlen(key))) {
        json_decref(value);
        return REFUSE(r, "a key is not valid UTF-8", r->line);
    }
    if (json_object_get(r->out, key)) {
        json_decref(value);
        return REFUSE(r, "%s is there twice", r->line, key);
    }
    return json_object_set_new(r->out, key, value) == 0 ? TM_OK : no_memory(r);
}

/* ---- scalars of YAML ---- */

/* The quote that closes the one at s; NULL when none does. */
static const char *closing(const char *s, const char *end)
{
    char quote = *s;
    for (s++; s < end; s++) {
        bool doubled = quote == '\'' && s[0] == quote && s + 1 < end && s[1] == quote;
        bool escaped = quote == '"' && s[0] == '\\';
        if (doubled || escaped)
            s++;
        else if (*s == quote)
            return s;
    }
    return NULL;
}

/* Text up to `end`, quotes taken off. */
static tm_status read_scalar(reader *r, const char *s, const char *end, json_t **out)
{
    char text[LINE_MAX_LEN];
    size_t n = 0;
    char quote = s < end && (*s == '\'' || *s == '"') ? *s : '\0';
    if (quote && closing(s, end) != end - 1)
        return REFUSE(r, "a quote is not closed", r->line);
    if (!quote && s < end && strchr("&*!|>%@`{", *s))
        return REFUSE(r, "values that begin with '%c' are not read", r->line, *s);
    if (quote) {
        s++;
        end--;
    }
    for (; s < end; s++) {
        bool doubled = quote == '\'' && s[0] == '\'' && s + 1 < end;
        bool escaped = quote == '"' && s[0] == '\\' && s + 1 < end;
        if (doubled || escaped)
            s++;
        text[n++] = *s;
    }
    *out = json_stringn(text, n);
    return *out ? TM_OK : REFUSE(r, "the value is not valid UTF-8", r->line);
}

/* "[1, 2]" without quotes inside, as numbers need none. */
static tm_status read_flow(reader *r, const char *s, const char *end, json_t **out)
{
    if (end[-1] != ']')
        return REFUSE(r, "a list is not closed on its line", r->line);
    json_t *list = json_array();
    tm_status st = list ? TM_OK : no_memory(r);
    s++;
    end--;
    while (st == TM_OK && (s = skip_spaces(s, end)) < end) {
        const char *comma = memchr(s, ',', (size_t)(end - s)), *stop = comma ? comma : end;
        json_t *item = NULL;
        st = read_scalar(r, s, trim_end(s, stop), &item);
        if (st == TM_OK && ++r->entries > TM_WS_ENTRIES_MAX)
            st = REFUSE(r, "more than %d entries", r->line, TM_WS_ENTRIES_MAX);
        if (item && json_array_append_new(list, item) != 0)
            st = no_memory(r);
        s = comma ? comma + 1 : end;
    }
    if (st != TM_OK) {
        json_decref(list);
        return st;
    }
    *out = list;
    return TM_OK;
}

/* Where the value ends: before a comment outside of quotes. */
static const char *value_end(const char *begin, const char *end)
{
    const char *s = begin;
    bool quoted = s < end && (*s == '\'' || *s == '"');
    if (quoted && closing(s, end))
        s = closing(s, end) + 1;
    while (s < end && !(*s == '#' && (s == begin || isspace((unsigned char)s[-1]))))
        s++;
    return trim_end(begin, s);
}

/* ---- YAML ---- */

static tm_status yaml_item(reader *r, const char *s, const char *end, int indent)
{
    json_t *item = NULL;
    if (!r->waiting[0] || indent < r->waiting_indent)
        return REFUSE(r, "a list item without a key", r->line);
    if (!r->list) {
        r->list = json_array();
        TM_TRY(put(r, r->waiting, r->list));
    }
    TM_TRY(read_scalar(r, s, value_end(s, end), &item));
    if (++r->entries > TM_WS_ENTRIES_MAX) {
        json_decref(item);
        return REFUSE(r, "more than %d entries", r->line, TM_WS_ENTRIES_MAX);
    }
    return json_array_append_new(r->list, item) == 0 ? TM_OK : no_memory(r);
}

/* A deeper line opens the map of the key that waits for a value; a shallower one closes maps. */
static tm_status yaml_nest(reader *r, int indent)
{
    while (r->depth > 0 && r->levels[r->depth - 1].indent > indent)
        r->depth--;
    if (r->depth > 0 && r->levels[r->depth - 1].indent == indent)
        return TM_OK;
    if (r->depth > 0 && (!r->waiting[0] || r->list || indent <= r->waiting_indent))
        return REFUSE(r, "this indentation fits no map", r->line);
    if (r->depth == DEPTH_MAX)
        return REFUSE(r, "nested deeper than %d maps", r->line, DEPTH_MAX);
    level *l = &r->levels[r->depth];
    *l = (level){.indent = indent};
    if (r->depth > 1) /* the outermost maps' names are left out */
        snprintf(l->prefix, sizeof(l->prefix), "%.*s.", KEY_MAX_LEN - 2, r->waiting);
    r->depth++;
    return TM_OK;
}

static tm_status yaml_key(reader *r, const char *s, const char *end, int indent)
{
    const char *colon = memchr(s, ':', (size_t)(end - s));
    char key[KEY_MAX_LEN];
    if (!colon || (colon + 1 < end && colon[1] != ' '))
        return REFUSE(r, "expected 'key: value'", r->line);
    TM_TRY(yaml_nest(r, indent));
    int n = snprintf(key, sizeof(key), "%s%.*s", r->levels[r->depth - 1].prefix,
                     (int)TM_MIN(colon - s, KEY_MAX_LEN), s);
    if (n < 0 || (size_t)n >= sizeof(key))
        return REFUSE(r, "a key of more than %d letters", r->line, KEY_MAX_LEN - 1);
    r->list = NULL;
    r->waiting[0] = '\0';
    const char *value = skip_spaces(colon + 1, end);
    end = value_end(value, end);
    if (value == end) {
        memcpy(r->waiting, key, sizeof(key));
        r->waiting_indent = indent;
        return TM_OK;
    }
    json_t *v = NULL;
    TM_TRY(*value == '[' ? read_flow(r, value, end, &v) : read_scalar(r, value, end, &v));
    return put(r, key, v);
}

static tm_status yaml_line(reader *r, const char *s, const char *end)
{
    const char *at = s;
    while (at < end && *at == ' ')
        at++;
    int indent = (int)(at - s);
    end = trim_end(at, end);
    if (at == end || *at == '#' || (end - at == 3 && memcmp(at, "---", 3) == 0))
        return TM_OK;
    if (*at == '\t')
        return REFUSE(r, "a tab in the indentation", r->line);
    if (at[0] == '-' && (at + 1 == end || at[1] == ' '))
        return yaml_item(r, skip_spaces(at + 1, end), end, indent);
    return yaml_key(r, at, end, indent);
}

/* ---- INI ---- */

static tm_status ini_line(reader *r, const char *s, const char *end)
{
    char key[KEY_MAX_LEN];
    bool indented = s < end && isspace((unsigned char)*s);
    s = skip_spaces(s, end);
    end = trim_end(s, end);
    if (s == end || *s == '#' || *s == ';')
        return TM_OK;
    if (*s == '[')
        return end[-1] == ']' ? TM_OK : REFUSE(r, "a section's name is not closed", r->line);
    if (indented)
        return REFUSE(r, "values of several lines are not read", r->line);
    const char *eq = s;
    while (eq < end && *eq != '=' && *eq != ':')
        eq++;
    const char *key_end = trim_end(s, eq);
    if (eq == end || key_end == s || key_end - s >= KEY_MAX_LEN)
        return REFUSE(r, "expected 'key = value'", r->line);
    /* Edited files have capitals; the parser of the format does not tell them apart. */
    size_t n = 0;
    for (; s < key_end; s++)
        key[n++] = (char)tolower((unsigned char)*s);
    key[n] = '\0';
    const char *value = skip_spaces(eq + 1, end);
    json_t *v = json_stringn(value, (size_t)(end - value));
    return v ? put(r, key, v) : REFUSE(r, "the value is not valid UTF-8", r->line);
}

tm_status tm_ws_text_parse(json_t **out, const char *text, size_t len, bool yaml, tm_err *err)
{
    reader r = {.out = json_object(), .err = err};
    const char *end = text + len;
    if (!r.out)
        return no_memory(&r);
    tm_status st = TM_OK;
    while (st == TM_OK && text < end) {
        const char *nl = memchr(text, '\n', (size_t)(end - text)), *stop = nl ? nl : end;
        r.line++;
        if (stop - text >= LINE_MAX_LEN || memchr(text, '\0', (size_t)(stop - text)))
            st = REFUSE(&r, "a NUL byte, or more than %d bytes", r.line, LINE_MAX_LEN);
        else
            st = yaml ? yaml_line(&r, text, stop) : ini_line(&r, text, stop);
        text = nl ? nl + 1 : end;
    }
    if (st != TM_OK) {
        json_decref(r.out);
        return st;
    }
    *out = r.out;
    return TM_OK;
}
