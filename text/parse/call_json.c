/* Calls that are JSON objects {"name": ..., "arguments": {...}}, one or several, bare or in an array, with or
 * without a closing mark. The arguments are passed on as they were written, from their opening brace on, as
 * soon as the name is known; names of keys may come in any order. */
#include <jansson.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "text/parse/machine.h"

enum { START, OBJECT, BEHIND, NEXT };
enum { KEY_OTHER, KEY_NAME, KEY_ARGS };

static int key_of(const tm_parse *p, const char *s, size_t len)
{
    static const struct {
        const char *text;
        int key;
    } keys[] = {{"name", KEY_NAME}, {"arguments", KEY_ARGS}, {"parameters", KEY_ARGS}};
    for (size_t i = 0; i < TM_ARRAY_LEN(keys); i++)
        if (strlen(keys[i].text) == len && memcmp(keys[i].text, s, len) == 0)
            return keys[i].key == KEY_NAME                  ? (p->name_len ? KEY_OTHER : KEY_NAME)
                   : keys[i].key == KEY_ARGS && p->has_args ? KEY_OTHER
                                                            : keys[i].key;
    return KEY_OTHER;
}

/* Without a mark an object that begins with another key is the answer itself, not a call. */
static bool is_other_object(const tm_parse *p, const char *s, size_t len)
{
    return p->is_bare && p->name_len == 0 && !p->has_args && p->key == KEY_OTHER &&
           !(len == 4 && memcmp(s, "type", 4) == 0) && !(len == 2 && memcmp(s, "id", 2) == 0);
}

static void start_object(tm_parse *p, size_t at)
{
    tm_parse_reset(p);
    p->begin = at;
    p->tail = false;
    p->at = OBJECT;
    tm_jscan_byte(&p->js, '{');
}

/* Arguments that are JSON text themselves. */
static bool take_text(tm_parse *p, const json_t *v)
{
    const char *s = json_string_value(v);
    size_t len = json_string_length(v);
    json_t *root = NULL;
    if (len == 0) {
        tm_buf_puts(&p->text, "{}");
        return true;
    }
    bool ok = tm_json_parse(s, len, &root, NULL) == TM_OK && json_is_object(root);
    if (ok)
        tm_buf_append(&p->text, s, len);
    json_decref(root);
    return ok;
}

/* The value of a key is complete: it ends before raw[end]. */
static bool take_value(tm_parse *p, size_t end)
{
    const char *s = p->raw.data + p->begin;
    size_t len = end - p->begin;
    if (p->key == KEY_OTHER)
        return true;
    if (p->key == KEY_ARGS && *s == '{') {
        p->args_end = end;
        return true;
    }
    json_error_t error = {.text = ""};
    json_t *v = json_loadb(s, len, JSON_DECODE_ANY, &error);
    if (!v && json_error_code(&error) == json_error_out_of_memory)
        p->failed = true;
    bool ok;
    if (p->key == KEY_NAME)
        ok = json_is_string(v) && tm_parse_set_name(p, json_string_value(v), json_string_length(v));
    else
        ok = json_is_null(v) || (json_is_string(v) && take_text(p, v));
    json_decref(v);
    return ok;
}

static void begin_value(tm_parse *p, char c)
{
    p->begin = p->raw.len - 1;
    if (p->key != KEY_ARGS)
        return;
    p->has_args = true;
    p->sending = c == '{';
    p->args_at = p->sent = p->begin;
}

static tm_step end_object(tm_parse *p)
{
    if (p->name_len == 0 || (p->is_bare && !p->has_args) || !tm_parse_begin_call(p))
        return TM_STEP_BAD;
    if (p->sending)
        tm_parse_send(p, p->args_end);
    else if (p->text.len > 0)
        tm_parse_arguments(p, p->text.data, p->text.len);
    else
        tm_parse_arguments(p, "{}", 2);
    tm_parse_end_call(p);
    p->at = BEHIND;
    return !p->row->close && !p->in_list && !p->row->semicolons ? TM_STEP_DONE : TM_STEP_MORE;
}

static tm_step object_byte(tm_parse *p, char c)
{
    int what = tm_jscan_byte(&p->js, c);
    size_t here = p->raw.len;
    if (what & TM_JSCAN_BAD)
        return TM_STEP_BAD;
    if ((what & TM_JSCAN_END_BEFORE) && p->js.before_level == 1 && !take_value(p, here - 1))
        return TM_STEP_BAD;
    if (what & TM_JSCAN_END && p->js.level == 1 && !take_value(p, here))
        return TM_STEP_BAD;
    if (what & TM_JSCAN_END && p->js.level == 0)
        return end_object(p);
    if (what & TM_JSCAN_KEY && p->js.level == 1) {
        const char *key = p->raw.data + p->begin + 1;
        size_t len = here - 2 - p->begin;
        p->key = key_of(p, key, len);
        if (is_other_object(p, key, len))
            return TM_STEP_BAD;
    }
    if (what & TM_JSCAN_KEY_BEGIN && p->js.level == 1)
        p->begin = here - 1;
    if (what & TM_JSCAN_VALUE && p->js.level == 1)
        begin_value(p, c);
    if (p->name_len > 0 && p->sending && !p->open && !tm_parse_begin_call(p))
        return TM_STEP_BAD;
    return TM_STEP_MORE;
}

/* Behind the mark. */
static tm_step start_byte(tm_parse *p, char c)
{
    if (tm_parse_is_white(c))
        return TM_STEP_MORE;
    if (c == '[' && !p->in_list && !p->is_bare) {
        p->in_list = true;
        return TM_STEP_MORE;
    }
    if (c != '{' || (p->row->array && !p->in_list))
        return TM_STEP_BAD;
    start_object(p, p->raw.len - 1);
    return TM_STEP_MORE;
}

/* Behind a call: raw holds what may become the closing mark. */
static tm_step behind_byte(tm_parse *p, char c)
{
    if (p->raw.len == 1 && tm_parse_is_white(c)) {
        tm_buf_clear(&p->raw);
        return TM_STEP_MORE;
    }
    if (p->raw.len == 1 && (c == ',' || c == ';') && (p->in_list || p->row->semicolons)) {
        tm_buf_clear(&p->raw);
        p->at = NEXT;
        return TM_STEP_MORE;
    }
    if (p->raw.len == 1 && c == ']' && p->in_list) {
        tm_buf_clear(&p->raw);
        p->in_list = false;
        return p->row->close ? TM_STEP_MORE : TM_STEP_DONE;
    }
    if (p->raw.len == 1 && c == '{' && !p->row->array) {
        start_object(p, 0);
        return TM_STEP_MORE;
    }
    if (!tm_parse_starts_mark(p->raw.data, p->raw.len, p->row->close))
        return TM_STEP_LEAVE;
    return p->raw.len == strlen(p->row->close) ? TM_STEP_DONE : TM_STEP_MORE;
}

static tm_step next_byte(tm_parse *p, char c)
{
    if (tm_parse_is_white(c)) {
        tm_buf_clear(&p->raw);
        return TM_STEP_MORE;
    }
    if (c != '{')
        return TM_STEP_LEAVE;
    start_object(p, p->raw.len - 1);
    return TM_STEP_MORE;
}

static tm_step json_byte(tm_parse *p, char c)
{
    static tm_step (*const states[])(tm_parse * p, char c) = {
        [START] = start_byte, [OBJECT] = object_byte, [BEHIND] = behind_byte, [NEXT] = next_byte};
    return states[p->at](p, c);
}

static void json_begin(tm_parse *p)
{
    p->at = START;
}

static bool json_bare(const tm_parse *p, char c)
{
    (void)p;
    return c == '{';
}

const tm_syntax tm_syntax_json = {json_begin, json_byte, json_bare};
