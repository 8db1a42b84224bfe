/* One state per place of the grammar; open containers are bits of a word, which is what bounds the depth. */
#include "text/parse/jscan.h"

enum {
    VALUE,          /* a value is due */
    VALUE_OR_CLOSE, /* behind [ */
    KEY_OR_CLOSE,   /* behind { */
    KEY,            /* behind a comma of an object */
    COLON,
    COMMA_OR_CLOSE,
    STRING,
    ESCAPE,
    HEX,
    LITERAL,
    MINUS,
    ZERO,
    DIGITS,
    POINT,
    FRACTION,
    E,
    E_SIGN,
    EXPONENT,
    OVER
};

void tm_jscan_init(tm_jscan *s)
{
    *s = (tm_jscan){.state = VALUE};
}

static bool is_white(char c)
{
    return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

static bool is_hex(char c)
{
    return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

static bool in_object(const tm_jscan *s)
{
    return s->depth > 0 && (s->objects >> (s->depth - 1) & 1);
}

static int bad(tm_jscan *s)
{
    s->state = OVER;
    return TM_JSCAN_BAD;
}

static int end_value(tm_jscan *s)
{
    s->level = s->depth;
    s->state = s->depth > 0 ? COMMA_OR_CLOSE : OVER;
    return TM_JSCAN_END;
}

static int open_container(tm_jscan *s, bool object)
{
    if (s->depth == TM_JSCAN_DEPTH_MAX)
        return bad(s);
    uint64_t bit = (uint64_t)1 << s->depth++;
    s->objects = object ? s->objects | bit : s->objects & ~bit;
    s->state = object ? KEY_OR_CLOSE : VALUE_OR_CLOSE;
    return TM_JSCAN_VALUE;
}

static int close_container(tm_jscan *s, char c)
{
    if (s->depth == 0 || c != (in_object(s) ? '}' : ']'))
        return bad(s);
    s->depth--;
    return end_value(s);
}

static int begin_value(tm_jscan *s, char c)
{
    s->level = s->depth;
    switch (c) {
    case '{':
    case '[':
        return open_container(s, c == '{');
    case '"':
        s->key = false;
        s->state = STRING;
        return TM_JSCAN_VALUE;
    case 't':
    case 'f':
    case 'n':
        s->word = c == 't' ? "rue" : c == 'f' ? "alse" : "ull";
        s->state = LITERAL;
        return TM_JSCAN_VALUE;
    case '-':
        s->state = MINUS;
        return TM_JSCAN_VALUE;
    default:
        if (!is_digit(c))
            return bad(s);
        s->state = c == '0' ? ZERO : DIGITS;
        return TM_JSCAN_VALUE;
    }
}

static int string_byte(tm_jscan *s, char c)
{
    if ((unsigned char)c < 0x20)
        return bad(s);
    if (c == '\\')
        s->state = ESCAPE;
    if (c != '"')
        return 0;
    if (!s->key)
        return end_value(s);
    s->level = s->depth;
    s->state = COLON;
    return TM_JSCAN_KEY;
}

static int escape_byte(tm_jscan *s, char c)
{
    switch (c) {
    case '"':
    case '\\':
    case '/':
    case 'b':
    case 'f':
    case 'n':
    case 'r':
    case 't':
        s->state = STRING;
        return 0;
    case 'u':
        s->state = HEX;
        s->left = 4;
        return 0;
    default:
        return bad(s);
    }
}

static int after_value(tm_jscan *s, char c)
{
    if (is_white(c))
        return 0;
    if (c != ',')
        return close_container(s, c);
    s->state = in_object(s) ? KEY : VALUE;
    return 0;
}

/* A byte that does not go on with the number ends it, and is looked at again behind it. */
static int number_byte(tm_jscan *s, char c)
{
    switch (s->state) {
    case MINUS:
        if (!is_digit(c))
            return bad(s);
        s->state = c == '0' ? ZERO : DIGITS;
        return 0;
    case POINT:
    case E_SIGN:
        if (!is_digit(c))
            return bad(s);
        s->state = s->state == POINT ? FRACTION : EXPONENT;
        return 0;
    case E:
        if (c == '+' || c == '-') {
            s->state = E_SIGN;
            return 0;
        }
        s->state = EXPONENT;
        return is_digit(c) ? 0 : bad(s);
    default:
        break;
    }
    if (is_digit(c) && s->state != ZERO)
        return 0;
    if (c == '.' && (s->state == ZERO || s->state == DIGITS)) {
        s->state = POINT;
        return 0;
    }
    if ((c == 'e' || c == 'E') && s->state != EXPONENT) {
        s->state = E;
        return 0;
    }
    if (s->depth == 0)
        return bad(s);
    s->before_level = s->depth;
    s->state = COMMA_OR_CLOSE;
    return TM_JSCAN_END_BEFORE | after_value(s, c);
}

static int key_byte(tm_jscan *s, char c)
{
    if (is_white(c))
        return 0;
    if (c == '}' && s->state == KEY_OR_CLOSE)
        return close_container(s, c);
    if (c != '"')
        return bad(s);
    s->key = true;
    s->state = STRING;
    s->level = s->depth;
    return TM_JSCAN_KEY_BEGIN;
}

int tm_jscan_byte(tm_jscan *s, char c)
{
    switch (s->state) {
    case VALUE:
    case VALUE_OR_CLOSE:
        if (is_white(c))
            return 0;
        return c == ']' && s->state == VALUE_OR_CLOSE ? close_container(s, c) : begin_value(s, c);
    case KEY_OR_CLOSE:
    case KEY:
        return key_byte(s, c);
    case COLON:
        if (c == ':')
            s->state = VALUE;
        return c == ':' || is_white(c) ? 0 : bad(s);
    case COMMA_OR_CLOSE:
        return after_value(s, c);
    case STRING:
        return string_byte(s, c);
    case ESCAPE:
        return escape_byte(s, c);
    case HEX:
        if (--s->left == 0)
            s->state = STRING;
        return is_hex(c) ? 0 : bad(s);
    case LITERAL:
        if (*s->word != c)
            return bad(s);
        return *++s->word ? 0 : end_value(s);
    case OVER:
        return bad(s);
    default:
        return number_byte(s, c);
    }
}
