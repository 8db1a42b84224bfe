/* The option table: parsing values, the environment and the command line.
 *
 * One row describes an option completely, and everything about options (flags, environment, help,
 * reference page, bounds) walks the rows. Values are parsed by hand from decimal text: no locale, no
 * hexadecimal, no "inf", nothing left over. */
#include "common/opt.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "common/check.h"
#include "common/fmt.h"

#define NAME_MAX_BYTES 64

typedef struct unit {
    const char *name;
    double factor;
} unit;

static const unit g_count_units[] = {
    {"", 1},        {"k", 1e3},     {"K", 1e3},     {"M", 1e6},     {"G", 1e9}, {"T", 1e12},
    {"Ki", 0x1p10}, {"Mi", 0x1p20}, {"Gi", 0x1p30}, {"Ti", 0x1p40}, {NULL, 0},
};
static const unit g_size_units[] = {
    {"", 1},        {"B", 1},        {"k", 1e3},      {"K", 1e3},      {"M", 1e6},
    {"G", 1e9},     {"T", 1e12},     {"kB", 1e3},     {"KB", 1e3},     {"MB", 1e6},
    {"GB", 1e9},    {"TB", 1e12},    {"Ki", 0x1p10},  {"Mi", 0x1p20},  {"Gi", 0x1p30},
    {"Ti", 0x1p40}, {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30}, {"TiB", 0x1p40},
    {NULL, 0},
};
/* Milliseconds. A bare number is seconds. */
static const unit g_time_units[] = {
    {"", 1e3},    {"ms", 1},   {"s", 1e3},   {"m", 6e4},
    {"min", 6e4}, {"h", 36e5}, {"d", 864e5}, {NULL, 0},
};

/* [-]digits[.digits], then the rest. Exact for what fits a double's 53 bits. */
static bool read_decimal(const char *s, double *out, const char **rest)
{
    bool neg = *s == '-';
    s += neg || *s == '+';
    if (!isdigit((unsigned char)*s))
        return false;
    double v = 0, scale = 1;
    for (; isdigit((unsigned char)*s); s++)
        v = v * 10 + (*s - '0');
    if (*s == '.') {
        if (!isdigit((unsigned char)s[1]))
            return false;
        for (s++; isdigit((unsigned char)*s); s++) {
            scale *= 10;
            v = v * 10 + (*s - '0');
        }
    }
    v /= scale;
    *out = neg ? -v : v;
    *rest = s;
    return isfinite(v);
}

static bool plain_integer(const char *text, int64_t *out)
{
    if (!isdigit((unsigned char)text[*text == '-']))
        return false;
    char *end;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    if (*end || errno)
        return false;
    *out = v;
    return true;
}

static bool scaled_integer(const char *text, const unit *units, int64_t *out)
{
    /* Whole numbers without a unit keep all 63 bits; the rest goes through a double. */
    if (units[0].factor == 1 && plain_integer(text, out))
        return true;
    double v;
    const char *rest;
    if (!read_decimal(text, &v, &rest))
        return false;
    for (; units->name; units++) {
        if (strcmp(units->name, rest) != 0)
            continue;
        v *= units->factor;
        if (v != floor(v) || fabs(v) >= 0x1p63)
            return false;
        *out = (int64_t)v;
        return true;
    }
    return false;
}

static bool real_number(const char *text, double *out)
{
    const char *rest;
    double v;
    if (!read_decimal(text, &v, &rest))
        return false;
    if (*rest == 'e' || *rest == 'E') {
        int64_t exp;
        const char *digits = rest + 1 + (rest[1] == '+');
        if (!plain_integer(digits, &exp) || exp < -400 || exp > 400)
            return false;
        v *= pow(10, (double)exp);
    } else if (*rest) {
        return false;
    }
    if (!isfinite(v))
        return false;
    *out = v;
    return true;
}

static bool boolean(const char *text, bool *out)
{
    static const char *const yes[] = {"true", "1", "yes", "on"};
    static const char *const no[] = {"false", "0", "no", "off"};
    for (size_t i = 0; i < TM_ARRAY_LEN(yes); i++) {
        if (strcasecmp(text, yes[i]) == 0 || strcasecmp(text, no[i]) == 0) {
            *out = strcasecmp(text, yes[i]) == 0;
            return true;
        }
    }
    return false;
}

/* '-' and '_' are the same in names and in choices. */
static bool same_name(const char *a, size_t n, const char *b, size_t m)
{
    if (n != m)
        return false;
    for (size_t i = 0; i < n; i++)
        if ((a[i] == '_' ? '-' : a[i]) != (b[i] == '_' ? '-' : b[i]))
            return false;
    return true;
}

/* Index of `word` in a comma-separated list, or -1. */
static int list_index(const char *list, const char *word, size_t len)
{
    for (int i = 0; list && *list; i++) {
        size_t n = strcspn(list, ",");
        if (same_name(list, n, word, len))
            return i;
        list += n;
        list += *list == ',';
    }
    return -1;
}

static void field_store(void *opts, const tm_opt_row *row, const void *v, size_t size)
{
    memcpy((char *)opts + row->offset, v, size);
}

static const char *wanted(const tm_opt_row *row)
{
    switch (row->type) {
    case TM_OPT_BOOL:
        return "true or false";
    case TM_OPT_INT:
        return "a whole number";
    case TM_OPT_SIZE:
        return "a size such as 64MiB";
    case TM_OPT_TIME:
        return "a time such as 30s or 500ms";
    case TM_OPT_NUM:
        return "a number";
    case TM_OPT_ENUM:
        return "one of";
    case TM_OPT_STR:
        break;
    }
    return "a text";
}

static tm_status bad_value(const tm_opt_row *row, const char *from, const char *text, tm_status st,
                           tm_err *err)
{
    if (row->type == TM_OPT_ENUM)
        return TM_FAIL(err, st, "%s: expected one of %s, got \"%s\"", from, row->choices, text);
    return TM_FAIL(err, st, "%s: expected %s, got \"%s\"", from, wanted(row), text);
}

/* Bounds of a time are in milliseconds, like its value. */
static tm_status check_range(const tm_opt_row *row, const char *from, double v, tm_status st,
                             tm_err *err)
{
    if ((row->min == 0 && row->max == 0) || (v >= row->min && v <= row->max))
        return TM_OK;
    char lo[TM_NUM_MAX], hi[TM_NUM_MAX], got[TM_NUM_MAX];
    tm_num_format(lo, row->min, false);
    tm_num_format(got, v, false);
    const char *of = row->type == TM_OPT_TIME ? " milliseconds" : "";
    if (!isfinite(row->max))
        return TM_FAIL(err, st, "%s: must be at least %s%s, got %s", from, lo, of, got);
    tm_num_format(hi, row->max, false);
    return TM_FAIL(err, st, "%s: must be from %s to %s%s, got %s", from, lo, hi, of, got);
}

/* Parses text into the row's field. `from` names the origin in messages; st is the status of a
 * failure: a flag is the user's usage error, an environment variable a configuration error. */
static tm_status set_value(const tm_opt_row *row, void *opts, const char *from, const char *text,
                           tm_status st, tm_err *err)
{
    bool b;
    int64_t i;
    double d;
    int e;
    switch (row->type) {
    case TM_OPT_BOOL:
        if (!boolean(text, &b))
            return bad_value(row, from, text, st, err);
        field_store(opts, row, &b, sizeof b);
        return TM_OK;
    case TM_OPT_INT:
    case TM_OPT_SIZE:
    case TM_OPT_TIME:
        if (!scaled_integer(text,
                            row->type == TM_OPT_INT    ? g_count_units
                            : row->type == TM_OPT_SIZE ? g_size_units
                                                       : g_time_units,
                            &i))
            return bad_value(row, from, text, st, err);
        TM_TRY(check_range(row, from, (double)i, st, err));
        field_store(opts, row, &i, sizeof i);
        return TM_OK;
    case TM_OPT_NUM:
        if (!real_number(text, &d))
            return bad_value(row, from, text, st, err);
        TM_TRY(check_range(row, from, d, st, err));
        field_store(opts, row, &d, sizeof d);
        return TM_OK;
    case TM_OPT_STR:
        field_store(opts, row, &text, sizeof text);
        return TM_OK;
    case TM_OPT_ENUM:
        e = list_index(row->choices, text, strlen(text));
        if (e < 0)
            return bad_value(row, from, text, st, err);
        field_store(opts, row, &e, sizeof e);
        return TM_OK;
    }
    return TM_FAIL(err, TM_STATUS_INTERNAL, "%s: unknown option type", from);
}

/* The field's zero, for a row without a default. */
static void set_zero(const tm_opt_row *row, void *opts)
{
    static const union {
        bool b;
        int64_t i;
        double d;
        const char *s;
        int e;
    } zero;
    size_t size = row->type == TM_OPT_BOOL   ? sizeof zero.b
                  : row->type == TM_OPT_STR  ? sizeof zero.s
                  : row->type == TM_OPT_ENUM ? sizeof zero.e
                  : row->type == TM_OPT_NUM  ? sizeof zero.d
                                             : sizeof zero.i;
    memset((char *)opts + row->offset, 0, size);
}

tm_status tm_opt_defaults(const tm_opt_table *table, void *opts, tm_err *err)
{
    for (int i = 0; i < table->count; i++) {
        const tm_opt_row *row = &table->rows[i];
        if (row->def)
            TM_TRY(set_value(row, opts, row->name, row->def, TM_STATUS_INTERNAL, err));
        else
            set_zero(row, opts);
    }
    return TM_OK;
}

static void env_name(const tm_opt_row *row, char out[NAME_MAX_BYTES])
{
    snprintf(out, NAME_MAX_BYTES, "TURBOMESH_%s", row->name);
    for (char *p = out; *p; p++)
        *p = *p == '-' ? '_' : (char)toupper((unsigned char)*p);
}

static tm_status from_environment(const tm_opt_table *table, void *opts, tm_err *err)
{
    for (int i = 0; i < table->count; i++) {
        char name[NAME_MAX_BYTES];
        env_name(&table->rows[i], name);
        const char *text = getenv(name);
        /* Empty means not set: charts and unit files write empty variables for "default". */
        if (text && *text)
            TM_TRY(set_value(&table->rows[i], opts, name, text, TM_STATUS_CONFIG, err));
    }
    return TM_OK;
}

static const tm_opt_row *find_row(const tm_opt_table *table, const char *name, size_t len)
{
    for (int i = 0; i < table->count; i++) {
        const tm_opt_row *row = &table->rows[i];
        if (same_name(row->name, strlen(row->name), name, len) ||
            list_index(row->aliases, name, len) >= 0)
            return row;
    }
    return NULL;
}

/* Levenshtein distance, one row of the matrix; words longer than the row count as far away. */
static size_t edit_distance(const char *a, size_t n, const char *b)
{
    size_t row[NAME_MAX_BYTES + 1], m = strlen(b);
    if (m > NAME_MAX_BYTES)
        return SIZE_MAX;
    for (size_t j = 0; j <= m; j++)
        row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t diag = row[0];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            char c = a[i - 1] == '_' ? '-' : a[i - 1];
            size_t sub = diag + (c != b[j - 1]);
            diag = row[j];
            row[j] = TM_MIN(sub, TM_MIN(row[j], row[j - 1]) + 1);
        }
    }
    return row[m];
}

static tm_status unknown_flag(const tm_opt_table *table, const char *arg, size_t len, tm_err *err)
{
    size_t best = len / 3 + 2; /* beyond this the two words have nothing in common */
    const char *name = NULL;
    for (int i = 0; i < table->count; i++) {
        size_t d = edit_distance(arg, len, table->rows[i].name);
        if (d < best) {
            best = d;
            name = table->rows[i].name;
        }
    }
    if (name)
        return TM_FAIL(err, TM_STATUS_INVALID, "unknown option --%.*s, did you mean --%s?",
                       (int)TM_MIN(len, (size_t)100), arg, name);
    return TM_FAIL(err, TM_STATUS_INVALID, "unknown option --%.*s, see --help",
                   (int)TM_MIN(len, (size_t)100), arg);
}

/* One flag at argv[*i]; moves *i over a separate value. */
static tm_status parse_flag(const tm_opt_table *table, int argc, char **argv, int *i, void *opts,
                            tm_err *err)
{
    const char *arg = argv[*i] + 2;
    size_t len = strcspn(arg, "=");
    const char *value = arg[len] == '=' ? arg + len + 1 : NULL;
    const tm_opt_row *row = find_row(table, arg, len);
    bool negated = false;
    if (!row && len > 3 && strncmp(arg, "no", 2) == 0 && (arg[2] == '-' || arg[2] == '_')) {
        row = find_row(table, arg + 3, len - 3);
        negated = row && row->type == TM_OPT_BOOL;
        row = negated ? row : NULL;
    }
    if (!row)
        return unknown_flag(table, arg, len, err);
    char from[NAME_MAX_BYTES];
    snprintf(from, sizeof from, "--%s", row->name);
    if (negated && value)
        return TM_FAIL(err, TM_STATUS_INVALID, "--no-%s takes no value", row->name);
    if (row->type == TM_OPT_BOOL && !value)
        value = negated ? "false" : "true";
    if (!value) {
        /* A forgotten value would otherwise eat the next flag. */
        if (*i + 1 >= argc || strncmp(argv[*i + 1], "--", 2) == 0)
            return TM_FAIL(err, TM_STATUS_INVALID, "%s needs a value (%s)", from, wanted(row));
        value = argv[++*i];
    }
    return set_value(row, opts, from, value, TM_STATUS_INVALID, err);
}

static bool asks_help(int argc, char **argv)
{
    for (int i = 1; i < argc && strcmp(argv[i], "--") != 0; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0)
            return true;
    return false;
}

tm_status tm_opt_parse(const tm_opt_table *table, int argc, char **argv, void *opts,
                       const char **positional, int *positional_count, bool *help, tm_err *err)
{
    int words = 0;
    bool flags = true;
    bool want_help = asks_help(argc, argv);
    TM_TRY(tm_opt_defaults(table, opts, err));
    if (!want_help)
        TM_TRY(from_environment(table, opts, err));
    for (int i = 1; i < argc && !want_help; i++) {
        const char *arg = argv[i];
        if (flags && strcmp(arg, "--") == 0) {
            flags = false;
        } else if (flags && strncmp(arg, "--", 2) == 0) {
            TM_TRY(parse_flag(table, argc, argv, &i, opts, err));
        } else if (flags && arg[0] == '-' && arg[1]) {
            return TM_FAIL(err, TM_STATUS_INVALID, "unknown option %.100s, see --help", arg);
        } else if (words >= table->positional_max) {
            return TM_FAIL(err, TM_STATUS_INVALID, "unexpected argument \"%.100s\", see --help",
                           arg);
        } else {
            positional[words++] = arg;
        }
    }
    if (positional_count)
        *positional_count = words;
    if (help)
        *help = want_help;
    return TM_OK;
}
