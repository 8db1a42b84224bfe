/* Calls that are tags around names and values (Qwen3-Coder, GLM-4.5). Values are text and become JSON by the
 * type that the request's schema gives the parameter; an argument goes out when its value is complete. */
#include <jansson.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "text/parse/machine.h"

/* What p->key says of the value to come. */
enum { BY_SCHEMA, TEXT, JSON };

enum { OPEN, NAME, BETWEEN, KEY, VALUE_OPEN, VALUE, BEHIND };

static const char *since(const tm_parse *p, size_t *len)
{
    *len = p->raw.len - p->begin;
    return p->raw.data + p->begin;
}

static void to(tm_parse *p, int state)
{
    p->at = state;
    p->begin = p->raw.len;
}

static void trim(const char **s, size_t *len)
{
    while (*len > 0 && tm_parse_is_white(**s))
        ++*s, --*len;
    while (*len > 0 && tm_parse_is_white((*s)[*len - 1]))
        --*len;
}

/* One line break on either side belongs to the tags. */
static void trim_lines(const char **s, size_t *len)
{
    if (*len > 0 && **s == '\n')
        ++*s, --*len;
    if (*len > 0 && (*s)[*len - 1] == '\n')
        --*len;
}

/* ---- values --------------------------------------------------------------------------------------------- */

/* Whether the schema has the parameter as text; *known: whether it says anything. */
static bool is_text(const tm_parse *p, const char *key, size_t key_len, bool *known)
{
    const json_t *f = json_object_get(tm_parse_function(p, p->name, p->name_len), "function");
    const json_t *all = json_object_get(json_object_get(f, "parameters"), "properties");
    const json_t *type = json_object_get(json_object_getn(all, key, key_len), "type");
    *known = type != NULL;
    if (json_is_string(type))
        return strcmp(json_string_value(type), "string") == 0;
    for (size_t i = 0; i < json_array_size(type); i++) {
        const char *s = json_string_value(json_array_get(type, i));
        if (s && strcmp(s, "string") != 0 && strcmp(s, "null") != 0)
            return false;
    }
    return *known;
}

static bool is_json(const char *s, size_t len)
{
    json_t *v = json_loadb(s, len, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
    bool ok = v != NULL;
    json_decref(v);
    return ok;
}

/* Python's spellings, which models write for booleans and nothing. */
static const char *python_word(const char *s, size_t len)
{
    static const char *const words[][2] = {{"True", "true"}, {"False", "false"}, {"None", "null"}};
    for (size_t i = 0; i < TM_ARRAY_LEN(words); i++)
        if (strlen(words[i][0]) == len && memcmp(words[i][0], s, len) == 0)
            return words[i][1];
    return NULL;
}

static void put_argument(tm_parse *p, const char *s, size_t len)
{
    bool known;
    bool text = is_text(p, p->text.data, p->text.len, &known);
    if (p->key != BY_SCHEMA) {
        known = true;
        text = p->key == TEXT;
    }
    tm_buf out;
    tm_jw w;
    tm_buf_init(&out, 8 * TM_PARSE_CALL_MAX);
    tm_jw_init(&w, &out);
    tm_buf_puts(&out, p->members++ ? ", " : "{");
    tm_jw_strn(&w, p->text.data ? p->text.data : "", p->text.len);
    tm_buf_puts(&out, ": ");
    if (p->key == BY_SCHEMA)
        trim_lines(&s, &len);
    const char *bare = s;
    size_t bare_len = len;
    trim(&bare, &bare_len);
    const char *word = python_word(bare, bare_len);
    tm_jw_init(&w, &out);
    if (text || (!known && p->row->text_values))
        tm_jw_strn(&w, s, len);
    else if (word)
        tm_buf_puts(&out, word);
    else if (is_json(bare, bare_len))
        tm_buf_append(&out, bare, bare_len);
    else
        tm_jw_strn(&w, s, len);
    if (out.failed)
        p->failed = true;
    tm_parse_arguments(p, out.data, out.len);
    tm_buf_deinit(&out);
}

/* The key in front of its attribute, which says what the value is. */
static void split_key(tm_parse *p, const char *s, size_t *len)
{
    const char *attr = p->row->key_attr;
    const char *at = attr ? memmem(s, *len, attr, strlen(attr)) : NULL;
    p->key = BY_SCHEMA;
    if (!at)
        return;
    const char *value = at + strlen(attr);
    p->key = (size_t)(s + *len - value) == 4 && memcmp(value, "true", 4) == 0 ? TEXT : JSON;
    *len = (size_t)(at - s);
}

/* ---- states --------------------------------------------------------------------------------------------- */

static void start(tm_parse *p)
{
    tm_parse_reset(p);
    p->tail = false;
    to(p, NAME);
}

static tm_step open_byte(tm_parse *p, char c)
{
    size_t len;
    const char *s = since(p, &len);
    if (len == 1 && tm_parse_is_white(c)) {
        p->begin = p->raw.len;
        return TM_STEP_MORE;
    }
    if (!tm_parse_starts_mark(s, len, p->row->name_open))
        return TM_STEP_BAD;
    if (len == strlen(p->row->name_open))
        start(p);
    return TM_STEP_MORE;
}

static tm_step end_call(tm_parse *p)
{
    if (!tm_parse_begin_call(p))
        return TM_STEP_BAD;
    tm_parse_arguments(p, p->members ? "}" : "{}", p->members ? 1 : 2);
    tm_parse_end_call(p);
    to(p, BEHIND);
    return strcmp(p->row->end, p->row->close) == 0 ? TM_STEP_DONE : TM_STEP_MORE;
}

/* The name ends at its closing mark, or where that is NULL, at a line break or the next tag. */
static tm_step name_byte(tm_parse *p, char c)
{
    size_t len;
    const char *s = since(p, &len), *close = p->row->name_close;
    bool over = close ? tm_parse_ends(s, len, close) : len > 1 && (c == '\n' || c == '<');
    if (!over)
        return len > TM_PARSE_NAME_MAX || (!close && len > 1 && !tm_parse_is_name(c) && c != ' ')
                   ? TM_STEP_BAD
                   : TM_STEP_MORE;
    len -= close ? strlen(close) : 1;
    trim(&s, &len);
    if (!tm_parse_set_name(p, s, len) || !tm_parse_begin_call(p))
        return TM_STEP_BAD;
    to(p, BETWEEN);
    p->begin -= !close && c == '<';
    return TM_STEP_MORE;
}

static tm_step between_byte(tm_parse *p, char c)
{
    size_t len;
    const char *s = since(p, &len);
    if (len == 1 && tm_parse_is_white(c)) {
        p->begin = p->raw.len;
        return TM_STEP_MORE;
    }
    bool key = tm_parse_starts_mark(s, len, p->row->key_open);
    bool end = tm_parse_starts_mark(s, len, p->row->end);
    if (key && len == strlen(p->row->key_open))
        to(p, KEY);
    if (end && len == strlen(p->row->end))
        return end_call(p);
    return key || end ? TM_STEP_MORE : TM_STEP_BAD;
}

static tm_step key_byte(tm_parse *p)
{
    size_t len;
    const char *s = since(p, &len);
    if (!tm_parse_ends(s, len, p->row->key_close))
        return len > 2 * TM_PARSE_NAME_MAX ? TM_STEP_BAD : TM_STEP_MORE;
    len -= strlen(p->row->key_close);
    trim(&s, &len);
    split_key(p, s, &len);
    tm_buf_clear(&p->text);
    tm_buf_append(&p->text, s, len);
    to(p, p->row->value_open ? VALUE_OPEN : VALUE);
    return len > 0 ? TM_STEP_MORE : TM_STEP_BAD;
}

static tm_step value_open_byte(tm_parse *p, char c)
{
    size_t len;
    const char *s = since(p, &len);
    if (len == 1 && tm_parse_is_white(c)) {
        p->begin = p->raw.len;
        return TM_STEP_MORE;
    }
    if (!tm_parse_starts_mark(s, len, p->row->value_open))
        return TM_STEP_BAD;
    if (len == strlen(p->row->value_open))
        to(p, VALUE);
    return TM_STEP_MORE;
}

static tm_step value_byte(tm_parse *p)
{
    size_t len;
    const char *s = since(p, &len);
    if (!tm_parse_ends(s, len, p->row->value_close))
        return TM_STEP_MORE;
    put_argument(p, s, len - strlen(p->row->value_close));
    to(p, BETWEEN);
    return TM_STEP_MORE;
}

static tm_step behind_byte(tm_parse *p, char c)
{
    if (p->raw.len == 1 && tm_parse_is_white(c)) {
        tm_buf_clear(&p->raw);
        return TM_STEP_MORE;
    }
    bool close = tm_parse_starts_mark(p->raw.data, p->raw.len, p->row->close);
    bool again = tm_parse_starts_mark(p->raw.data, p->raw.len, p->row->name_open);
    if (close && p->raw.len == strlen(p->row->close))
        return TM_STEP_DONE;
    if (again && p->raw.len == strlen(p->row->name_open))
        start(p);
    return close || again ? TM_STEP_MORE : TM_STEP_LEAVE;
}

static tm_step tags_byte(tm_parse *p, char c)
{
    switch (p->at) {
    case OPEN:
        return open_byte(p, c);
    case NAME:
        return name_byte(p, c);
    case BETWEEN:
        return between_byte(p, c);
    case KEY:
        return key_byte(p);
    case VALUE_OPEN:
        return value_open_byte(p, c);
    case VALUE:
        return value_byte(p);
    default:
        return behind_byte(p, c);
    }
}

static void tags_begin(tm_parse *p)
{
    const char *open = p->row->name_open;
    if (open && !tm_parse_ends(p->raw.data, p->raw.len, open))
        to(p, OPEN);
    else
        start(p);
}

const tm_syntax tm_syntax_tags = {tags_begin, tags_byte, NULL};
