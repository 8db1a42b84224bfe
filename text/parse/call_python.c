/* Calls in Python's form: a list of them (small Llama 3.2 models), one behind Llama 3.1's mark for its built-in
 * tools, and ChatGLM3's, whose name stands in front of a code fence. The stretch is gathered to its last bracket
 * and then read as a whole: a half-read Python value says nothing that could be passed on. */
#include <stdlib.h>
#include <string.h>

#include "text/parse/machine.h"
#include "text/parse/pylit.h"

/* Follows brackets and strings; true at the bracket that closes the first. */
static bool closes(tm_parse *p, char c)
{
    if (p->quote) {
        if (p->escaped)
            p->escaped = false;
        else if (c == '\\')
            p->escaped = true;
        else if (c == p->quote)
            p->quote = 0;
        return false;
    }
    if (c == '"' || c == '\'')
        p->quote = c;
    else if (c == '(' || c == '[' || c == '{')
        p->depth++;
    else if (c == ')' || c == ']' || c == '}')
        return --p->depth <= 0;
    return false;
}

/* One call at the reader, whose arguments are read into p->text. */
static bool read_call(tm_parse *p, tm_pylit *r, bool dotted)
{
    const char *name;
    size_t len;
    tm_buf_clear(&p->text);
    if (!tm_pylit_name(r, &name, &len))
        return false;
    if (dotted && len > 5 && memcmp(name + len - 5, ".call", 5) == 0)
        len -= 5;
    return tm_parse_set_name(p, name, len) && tm_pylit_arguments(r, &p->text) && !p->text.failed;
}

/* ---- [f(a=1), g(b=2)] ----------------------------------------------------------------------------------- */

/* Every call is read twice: nothing may be given out before all of them are known to be good. */
static bool read_list(tm_parse *p, const char *s, size_t len, bool give)
{
    tm_pylit r = {s, s + len};
    if (!tm_pylit_char(&r, '['))
        return false;
    for (int n = 0; n == 0 || !tm_pylit_char(&r, ']'); n++) {
        if ((n > 0 && !tm_pylit_char(&r, ',')) || !read_call(p, &r, false) ||
            p->next + (give ? 0 : n) >= TM_PARSE_CALLS_MAX)
            return false;
        if (!give)
            continue;
        tm_parse_begin_call(p);
        tm_parse_arguments(p, p->text.data, p->text.len);
        tm_parse_end_call(p);
        if (p->complete == p->calls_max)
            return true;
    }
    return r.at == r.end;
}

static tm_step give_list(tm_parse *p)
{
    size_t begin = p->begin, len;
    if (!read_list(p, p->raw.data + begin, p->raw.len - begin, false))
        return TM_STEP_BAD;
    char *text = tm_buf_steal(&p->raw, &len);
    read_list(p, text + begin, len - begin, true);
    free(text);
    return TM_STEP_DONE;
}

static tm_step python_byte(tm_parse *p, char c)
{
    if (p->depth == 1 && !p->quote && tm_parse_strict(p) && tm_parse_is_name(c)) {
        /* The first name must be a known one, or the text is an ordinary list. */
        const char *s = p->raw.data + p->begin + 1;
        size_t len = p->raw.len - p->begin - 1;
        if (tm_parse_all_name(s, len) && !tm_parse_name_prefix(p, s, len))
            return TM_STEP_BAD;
    } else if (p->depth == 1 && p->raw.len == p->begin + 2 && c != ' ' && c != '\n') {
        return TM_STEP_BAD;
    }
    if (!closes(p, c))
        return TM_STEP_MORE;
    return give_list(p);
}

static void python_begin(tm_parse *p)
{
    p->begin = p->raw.len;
}

static bool python_bare(const tm_parse *p, char c)
{
    (void)p;
    return c == '[';
}

const tm_syntax tm_syntax_python = {python_begin, python_byte, python_bare};

/* ---- <|python_tag|>tool.call(a=1), or JSON objects ------------------------------------------------------ */

#define UNDECIDED (-1)

static void llama_begin(tm_parse *p)
{
    p->at = UNDECIDED;
    p->by_name = false;
}

static tm_step builtin_byte(tm_parse *p, char c)
{
    if (p->depth == 0 && !p->quote && c != '(' && !tm_parse_is_name(c))
        return TM_STEP_BAD;
    if (!closes(p, c))
        return TM_STEP_MORE;
    tm_pylit r = {p->raw.data + p->begin, p->raw.data + p->raw.len};
    if (!read_call(p, &r, true) || r.at != r.end || !tm_parse_begin_call(p))
        return TM_STEP_BAD;
    tm_parse_arguments(p, p->text.data, p->text.len);
    tm_parse_end_call(p);
    return TM_STEP_DONE;
}

static tm_step llama_byte(tm_parse *p, char c)
{
    if (p->at == UNDECIDED) {
        if (tm_parse_is_white(c))
            return TM_STEP_MORE;
        p->by_name = tm_parse_is_name(c);
        p->begin = p->raw.len - 1;
        p->at = 0;
    }
    return p->by_name ? builtin_byte(p, c) : tm_syntax_json.byte(p, c);
}

static bool llama_bare(const tm_parse *p, char c)
{
    (void)p;
    return c == '{';
}

const tm_syntax tm_syntax_llama = {llama_begin, llama_byte, llama_bare};

/* ---- NAME, a fence, tool_call(a=1), the end of the fence ------------------------------------------------ */

enum { NAME, FENCE, CODE, BEHIND };

static const char code_open[] = "```python\ntool_call", code_close[] = "```";

static void code_begin(tm_parse *p)
{
    p->at = NAME;
    p->begin = p->raw.len;
}

static tm_step code_name(tm_parse *p, char c)
{
    const char *s = p->raw.data + p->begin;
    size_t len = p->raw.len - p->begin;
    if (c != '\n')
        return tm_parse_name_prefix(p, s, len) ? TM_STEP_MORE : TM_STEP_BAD;
    if (!tm_parse_set_name(p, s, len - 1))
        return TM_STEP_BAD;
    p->at = FENCE;
    p->begin = p->raw.len;
    return TM_STEP_MORE;
}

static tm_step code_fence(tm_parse *p, char c)
{
    const char *s = p->raw.data + p->begin;
    size_t len = p->raw.len - p->begin;
    if (len == 1 && tm_parse_is_white(c)) {
        p->begin = p->raw.len;
        return TM_STEP_MORE;
    }
    if (!tm_parse_starts_mark(s, len, code_open))
        return TM_STEP_BAD;
    if (len == sizeof(code_open) - 1) {
        p->at = CODE;
        p->begin = p->raw.len;
    }
    return TM_STEP_MORE;
}

static tm_step code_body(tm_parse *p, char c)
{
    if (p->depth == 0 && c != '(')
        return TM_STEP_BAD;
    if (!closes(p, c))
        return TM_STEP_MORE;
    tm_pylit r = {p->raw.data + p->begin, p->raw.data + p->raw.len};
    tm_buf_clear(&p->text);
    if (!tm_pylit_arguments(&r, &p->text) || r.at != r.end || !tm_parse_begin_call(p))
        return TM_STEP_BAD;
    tm_parse_arguments(p, p->text.data, p->text.len);
    tm_parse_end_call(p);
    p->at = BEHIND;
    return TM_STEP_MORE;
}

static tm_step code_behind(tm_parse *p, char c)
{
    if (p->raw.len == 1 && tm_parse_is_white(c)) {
        tm_buf_clear(&p->raw);
        return TM_STEP_MORE;
    }
    if (!tm_parse_starts_mark(p->raw.data, p->raw.len, code_close))
        return TM_STEP_LEAVE;
    return p->raw.len == sizeof(code_close) - 1 ? TM_STEP_DONE : TM_STEP_MORE;
}

static tm_step code_byte(tm_parse *p, char c)
{
    static tm_step (*const states[])(tm_parse * p, char c) = {
        [NAME] = code_name, [FENCE] = code_fence, [CODE] = code_body, [BEHIND] = code_behind};
    return states[p->at](p, c);
}

static bool code_bare(const tm_parse *p, char c)
{
    return tm_parse_name_prefix(p, &c, 1);
}

const tm_syntax tm_syntax_code = {code_begin, code_byte, code_bare};
