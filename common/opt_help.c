/* What an option table says about itself: --help and the reference page. */
#include <ctype.h>
#include <math.h>
#include <string.h>

#include "common/fmt.h"
#include "common/opt.h"

static const char *const g_type_words[] = {
    [TM_OPT_BOOL] = "", [TM_OPT_INT] = "N",    [TM_OPT_SIZE] = "SIZE",   [TM_OPT_TIME] = "TIME",
    [TM_OPT_NUM] = "X", [TM_OPT_STR] = "TEXT", [TM_OPT_ENUM] = "CHOICE",
};

/* Breaks `text` at blanks so that lines with the indent stay under 80 columns. */
static void put_wrapped(tm_buf *out, const char *text, int indent)
{
    int column = 0;
    for (const char *p = text; *p;) {
        p += strspn(p, " ");
        int n = (int)strcspn(p, " ");
        if (n == 0)
            break;
        if (column == 0 || column + 1 + n > 80) {
            tm_buf_printf(out, "%s%*s", column ? "\n" : "", indent, "");
            column = indent;
        } else {
            tm_buf_putc(out, ' ');
            column++;
        }
        tm_buf_append(out, p, (size_t)n);
        column += n;
        p += n;
    }
    tm_buf_putc(out, '\n');
}

static void put_aliases(tm_buf *out, const char *aliases)
{
    for (const char *p = aliases; p && *p;) {
        int n = (int)strcspn(p, ",");
        tm_buf_printf(out, ", --%.*s", n, p);
        p += n;
        p += *p == ',';
    }
}

void tm_opt_help(const tm_opt_table *table, tm_buf *out)
{
    tm_buf_printf(out, "usage: %s\n\n", table->usage);
    if (table->about) {
        put_wrapped(out, table->about, 0);
        tm_buf_putc(out, '\n');
    }
    tm_buf_puts(out, "options:\n");
    for (int i = 0; i < table->count; i++) {
        const tm_opt_row *row = &table->rows[i];
        tm_buf_printf(out, "  --%s", row->name);
        put_aliases(out, row->aliases);
        if (row->type == TM_OPT_ENUM)
            tm_buf_printf(out, " {%s}", row->choices);
        else if (row->type != TM_OPT_BOOL)
            tm_buf_printf(out, " %s", g_type_words[row->type]);
        tm_buf_putc(out, '\n');
        tm_buf line;
        tm_buf_init(&line, 4096);
        tm_buf_puts(&line, row->help);
        if (row->def && *row->def)
            tm_buf_printf(&line, " Default: %s.", row->def);
        put_wrapped(out, line.data ? line.data : "", 8);
        tm_buf_deinit(&line);
    }
    tm_buf_puts(out, "  --help, -h\n        Shows this text.\n\n");
    put_wrapped(out,
                "Each option may also be given in the environment as TURBOMESH_<NAME>, upper case, "
                "with _ for -. Flags win over the environment.",
                0);
}

/* '|' would end the table cell. */
static void put_cell(tm_buf *out, const char *text)
{
    for (; *text; text++) {
        if (*text == '|')
            tm_buf_putc(out, '\\');
        tm_buf_putc(out, *text);
    }
}

static void put_values(tm_buf *out, const tm_opt_row *row)
{
    char num[TM_NUM_MAX];
    if (row->type == TM_OPT_ENUM) {
        put_cell(out, row->choices);
        return;
    }
    if (row->type == TM_OPT_BOOL)
        tm_buf_puts(out, "true, false");
    else
        tm_buf_puts(out, g_type_words[row->type]);
    if (row->type == TM_OPT_BOOL || row->type == TM_OPT_STR || (row->min == 0 && row->max == 0))
        return;
    tm_num_format(num, row->min, false);
    tm_buf_printf(out, ", %s", num);
    if (isfinite(row->max)) {
        tm_num_format(num, row->max, false);
        tm_buf_printf(out, " to %s", num);
    } else {
        tm_buf_puts(out, " or more");
    }
    if (row->type == TM_OPT_TIME)
        tm_buf_puts(out, " ms");
}

void tm_opt_markdown(const tm_opt_table *table, tm_buf *out)
{
    tm_buf_printf(out, "## %s\n\n`%s`\n\n", table->command, table->usage);
    if (table->about)
        tm_buf_printf(out, "%s\n\n", table->about);
    tm_buf_puts(out,
                "| option | environment | values | default | meaning |\n|---|---|---|---|---|\n");
    for (int i = 0; i < table->count; i++) {
        const tm_opt_row *row = &table->rows[i];
        tm_buf_printf(out, "| `--%s`", row->name);
        for (const char *p = row->aliases; p && *p;) {
            int n = (int)strcspn(p, ",");
            tm_buf_printf(out, ", `--%.*s`", n, p);
            p += n;
            p += *p == ',';
        }
        tm_buf_puts(out, " | `TURBOMESH_");
        for (const char *p = row->name; *p; p++)
            tm_buf_putc(out, *p == '-' ? '_' : (char)toupper((unsigned char)*p));
        tm_buf_puts(out, "` | ");
        put_values(out, row);
        tm_buf_puts(out, " | ");
        if (row->def && *row->def) {
            tm_buf_putc(out, '`');
            put_cell(out, row->def);
            tm_buf_putc(out, '`');
        }
        tm_buf_puts(out, " | ");
        put_cell(out, row->help);
        tm_buf_puts(out, " |\n");
    }
}
