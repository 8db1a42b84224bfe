/* Reading JSON: jansson behind a depth check, and typed getters.
 *
 * jansson is strict about syntax, UTF-8 and number overflow, but nests to 2048; one linear scan before
 * it holds the depth at 64, so a hostile document costs neither stack nor memory. jansson's messages
 * quote the input: the quote is cut off, because prompts do not belong in errors and logs. */
#include "common/json.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/file.h"

#define JSON_DEPTH_MAX 64

/* Deepest nesting of brackets outside strings. Malformed input may be miscounted; it is refused by
 * the parser anyway, and never with more depth than counted here. */
static bool depth_ok(const char *data, size_t len)
{
    int depth = 0;
    bool in_string = false;
    for (size_t i = 0; i < len; i++) {
        char c = data[i];
        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = false;
        } else if (c == '"') {
            in_string = true;
        } else if (c == '[' || c == '{') {
            if (++depth > JSON_DEPTH_MAX)
                return false;
        } else if (c == ']' || c == '}') {
            depth--;
        }
    }
    return true;
}

tm_status tm_json_parse(const char *data, size_t len, json_t **out, tm_err *err)
{
    if (!depth_ok(data, len))
        return TM_FAIL(err, TM_STATUS_INVALID, "not valid JSON: nested deeper than %d levels",
                       JSON_DEPTH_MAX);
    /* A raw NUL is never JSON, but jansson takes one behind a number for the end of the text. */
    if (len > 0 && memchr(data, '\0', len))
        return TM_FAIL(err, TM_STATUS_INVALID, "not valid JSON: a NUL byte");
    json_error_t je;
    json_t *v = json_loadb(data, len, JSON_DECODE_ANY | JSON_ALLOW_NUL, &je);
    if (!v) {
        char *quote = strstr(je.text, " near '");
        if (quote)
            *quote = '\0';
        if (json_error_code(&je) == json_error_out_of_memory)
            return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory while reading JSON");
        return TM_FAIL(err, TM_STATUS_INVALID, "not valid JSON: %s (line %d, column %d)", je.text,
                       je.line, je.column);
    }
    *out = v;
    return TM_OK;
}

#define INTEGER_DIGITS 18 /* what surely fits 64 bits */

/* Bytes of the number that begins at data[0], and whether it is a whole one that may not fit. */
static size_t number_length(const char *data, size_t len, bool *long_integer)
{
    size_t n = 0, digits = 0;
    while (n < len && data[n] && strchr("0123456789.eE+-", data[n]))
        digits += data[n] >= '0' && data[n] <= '9', n++;
    *long_integer = digits == n && n > INTEGER_DIGITS;
    return n;
}

/* Whole numbers of more digits become "....0" and so doubles: tokenizer configs say 10^30 for "no limit". out has
 * room for half as much again, since such a number has at least 19 bytes. */
static size_t widen_integers(const char *data, size_t len, char *out)
{
    size_t n = 0, take;
    bool in_string = false;
    for (size_t i = 0; i < len; i += take) {
        bool widen = false;
        take = 1;
        if (data[i] == '"')
            in_string = !in_string;
        else if (in_string && data[i] == '\\')
            take = TM_MIN((size_t)2, len - i);
        else if (!in_string && data[i] >= '0' && data[i] <= '9')
            take = number_length(data + i, len - i, &widen);
        memcpy(out + n, data + i, take);
        n += take;
        if (widen) {
            memcpy(out + n, ".0", 2);
            n += 2;
        }
    }
    return n;
}

static tm_status parse_file(const char *data, size_t len, json_t **out, tm_err *err)
{
    const char *disguise = tm_file_disguise(data, len);
    if (disguise)
        return TM_FAIL(err, TM_STATUS_INVALID, "not valid JSON: %s", disguise);
    char *wide = malloc(len + len / 2 + 1);
    if (!wide)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory while reading JSON");
    tm_status st = tm_json_parse(wide, widen_integers(data, len, wide), out, err);
    free(wide);
    return st;
}

tm_status tm_json_load_file(const char *path, size_t max_bytes, json_t **out, tm_err *err)
{
    char *data;
    size_t len;
    TM_TRY(tm_file_read(path, max_bytes, &data, &len, err));
    tm_status st = tm_err_of_file(err, parse_file(data, len, out, err));
    free(data);
    if (st != TM_OK)
        tm_err_prefix(err, "%s", path);
    return st;
}

json_t *tm_json_get(const json_t *obj, const char *key)
{
    json_t *v = json_object_get(obj, key);
    return json_is_null(v) ? NULL : v;
}

const char *tm_json_type_name(const json_t *v)
{
    if (!v)
        return "nothing";
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "an array";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a number";
    case JSON_TRUE:
    case JSON_FALSE:
        return "a boolean";
    case JSON_NULL:
        return "null";
    }
    return "an unknown type";
}

/* "an integer", "an integer >= 1", "an integer in [1, 8]". */
static void int_wanted(char *out, size_t size, int64_t min, int64_t max)
{
    if (min == INT64_MIN && max == INT64_MAX)
        snprintf(out, size, "an integer");
    else if (max == INT64_MAX)
        snprintf(out, size, "an integer >= %" PRId64, min);
    else if (min == INT64_MIN)
        snprintf(out, size, "an integer <= %" PRId64, max);
    else
        snprintf(out, size, "an integer in [%" PRId64 ", %" PRId64 "]", min, max);
}

tm_status tm_json_int(const json_t *obj, const char *key, int64_t min, int64_t max, int64_t *out,
                      tm_err *err)
{
    const json_t *v = tm_json_get(obj, key);
    if (!v)
        return TM_OK;
    char want[80];
    int_wanted(want, sizeof want, min, max);
    int64_t i = 0;
    if (json_is_integer(v)) {
        i = json_integer_value(v);
    } else if (json_is_real(v)) {
        double d = json_real_value(v);
        if (d != floor(d) || d < -0x1p63 || d >= 0x1p63)
            return TM_FAIL(err, TM_STATUS_INVALID, "%s: expected %s, got %g", key, want, d);
        i = (int64_t)d;
    } else {
        return TM_FAIL(err, TM_STATUS_INVALID, "%s: expected %s, got %s", key, want,
                       tm_json_type_name(v));
    }
    if (i < min || i > max)
        return TM_FAIL(err, TM_STATUS_INVALID, "%s: expected %s, got %" PRId64, key, want, i);
    *out = i;
    return TM_OK;
}

tm_status tm_json_num(const json_t *obj, const char *key, double min, double max, double *out,
                      tm_err *err)
{
    const json_t *v = tm_json_get(obj, key);
    if (!v)
        return TM_OK;
    char want[80];
    if (isfinite(min) && isfinite(max))
        snprintf(want, sizeof want, "a number in [%g, %g]", min, max);
    else if (isfinite(min))
        snprintf(want, sizeof want, "a number >= %g", min);
    else if (isfinite(max))
        snprintf(want, sizeof want, "a number <= %g", max);
    else
        snprintf(want, sizeof want, "a number");
    if (!json_is_number(v))
        return TM_FAIL(err, TM_STATUS_INVALID, "%s: expected %s, got %s", key, want,
                       tm_json_type_name(v));
    double d = json_number_value(v);
    if (!(d >= min && d <= max))
        return TM_FAIL(err, TM_STATUS_INVALID, "%s: expected %s, got %g", key, want, d);
    *out = d;
    return TM_OK;
}

tm_status tm_json_bool(const json_t *obj, const char *key, bool *out, tm_err *err)
{
    const json_t *v = tm_json_get(obj, key);
    if (!v)
        return TM_OK;
    if (!json_is_boolean(v))
        return TM_FAIL(err, TM_STATUS_INVALID, "%s: expected a boolean, got %s", key,
                       tm_json_type_name(v));
    *out = json_is_true(v);
    return TM_OK;
}

tm_status tm_json_str(const json_t *obj, const char *key, const char **out, tm_err *err)
{
    const json_t *v = tm_json_get(obj, key);
    if (!v)
        return TM_OK;
    if (!json_is_string(v))
        return TM_FAIL(err, TM_STATUS_INVALID, "%s: expected a string, got %s", key,
                       tm_json_type_name(v));
    /* *out is a C string: a NUL inside would cut it silently. */
    if (strlen(json_string_value(v)) != json_string_length(v))
        return TM_FAIL(err, TM_STATUS_INVALID, "%s: expected a string without NUL characters", key);
    *out = json_string_value(v);
    return TM_OK;
}
