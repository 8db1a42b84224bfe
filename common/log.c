/* Log lines: built in a stack buffer, written with one write(2) under a lock.
 *
 * The buffer is the 8 KiB bound itself. Text that does not fit is cut, and the reserve at the end
 * always has room to close the open string and the object, so a cut JSON line is still JSON. */
#include "common/log.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/fmt.h"

#define LINE_MAX_BYTES ((size_t)8192)
#define LINE_RESERVE   ((size_t)16) /* for the closing quote, brace and newline */

typedef struct log_line {
    size_t len;
    bool full; /* something was cut: nothing more is added */
    char data[LINE_MAX_BYTES];
} log_line;

static const char *const g_level_names[] = {"trace", "debug", "info", "warn", "error"};
static char g_program[64] = "turbomesh";
static _Atomic int g_level = TM_LOG_INFO;
static bool g_json = true;
static pthread_mutex_t g_write_lock = PTHREAD_MUTEX_INITIALIZER;

void tm_log_init(const char *program, tm_log_level level, tm_log_format format)
{
    snprintf(g_program, sizeof g_program, "%s", program);
    g_json = format == TM_LOG_JSON || (format == TM_LOG_AUTO && !isatty(STDERR_FILENO));
    atomic_store(&g_level, (int)level);
}

bool tm_log_level_parse(const char *name, tm_log_level *out)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(g_level_names); i++) {
        if (strcasecmp(name, g_level_names[i]) == 0) {
            *out = (tm_log_level)i;
            return true;
        }
    }
    return false;
}

bool tm_log_enabled(tm_log_level level)
{
    return (int)level >= atomic_load_explicit(&g_level, memory_order_relaxed);
}

/* All of s or nothing. */
static bool put(log_line *l, const char *s, size_t n)
{
    if (l->full || n > LINE_MAX_BYTES - LINE_RESERVE - l->len) {
        l->full = true;
        return false;
    }
    memcpy(l->data + l->len, s, n);
    l->len += n;
    return true;
}

static void puts_raw(log_line *l, const char *s)
{
    put(l, s, strlen(s));
}

/* Escapes what would break a line or a JSON string; bad UTF-8 becomes U+FFFD. */
static void put_escaped(log_line *l, const char *s, size_t len)
{
    for (size_t i = 0; i < len && !l->full;) {
        unsigned char c = (unsigned char)s[i];
        size_t n = tm_utf8_seq(s + i, len - i);
        char esc[8];
        if (n == 0) {
            put(l, "\xef\xbf\xbd", 3);
            n = 1;
        } else if (c == '"' || c == '\\') {
            esc[0] = '\\';
            esc[1] = (char)c;
            put(l, esc, 2);
        } else if (c < 0x20 || c == 0x7f) {
            snprintf(esc, sizeof esc, "\\u%04x", c);
            put(l, esc, 6);
        } else {
            put(l, s + i, n);
        }
        i += n;
    }
}

/* The closing quote goes into the reserve, so it is there even when the text was cut. */
static void put_quoted(log_line *l, const char *s)
{
    if (!put(l, "\"", 1))
        return;
    put_escaped(l, s, strlen(s));
    l->data[l->len++] = '"';
}

/* A name and its opening are written together or not at all. */
static bool put_name(log_line *l, const char *name)
{
    char head[80];
    int n = snprintf(head, sizeof head, g_json ? ",\"%.60s\":" : " %.60s=", name);
    /* Room for a number or for the quotes as well, so that no name stands without a value. */
    if (l->full || (size_t)n + 32 > LINE_MAX_BYTES - LINE_RESERVE - l->len) {
        l->full = true;
        return false;
    }
    return put(l, head, (size_t)n);
}

static bool needs_quotes(const char *s)
{
    if (!*s)
        return true;
    for (; *s; s++)
        if ((unsigned char)*s <= ' ' || (unsigned char)*s >= 0x7f || strchr("\"\\=", *s))
            return true;
    return false;
}

static void put_field(log_line *l, const tm_log_field *f)
{
    if (!put_name(l, f->name))
        return;
    char num[TM_NUM_MAX];
    switch (f->kind) {
    case TM_LOG_STR:
        if (!f->str)
            puts_raw(l, "null");
        else if (g_json || needs_quotes(f->str))
            put_quoted(l, f->str);
        else
            put_escaped(l, f->str, strlen(f->str));
        return;
    case TM_LOG_INT:
        put(l, num, tm_int_format(num, f->i));
        return;
    case TM_LOG_NUM:
        if (isfinite(f->num))
            put(l, num, tm_num_format(num, f->num, true));
        else
            puts_raw(l, "null");
        return;
    }
}

static void begin_line(log_line *l, tm_log_level level, const char *event)
{
    int64_t ms = tm_clock_wall_ms();
    time_t sec = (time_t)(ms / 1000);
    struct tm tm = {0};
    gmtime_r(&sec, &tm);
    char head[256];
    char when[40];
    size_t n = strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%S", &tm);
    snprintf(when + n, sizeof when - n, ".%03dZ", (int)(ms % 1000));
    l->len = 0;
    l->full = false;
    if (g_json)
        snprintf(head, sizeof head, "{\"ts\":\"%s\",\"level\":\"%s\",\"program\":", when,
                 g_level_names[level]);
    else
        snprintf(head, sizeof head, "%s %-5s ", when, g_level_names[level]);
    puts_raw(l, head);
    if (g_json) {
        put_quoted(l, g_program);
        puts_raw(l, ",\"event\":");
        put_quoted(l, event);
    } else {
        put_escaped(l, g_program, strlen(g_program));
        puts_raw(l, " ");
        put_escaped(l, event, strlen(event));
    }
}

static void end_line(log_line *l)
{
    if (g_json)
        l->data[l->len++] = '}';
    l->data[l->len++] = '\n';
    int saved = errno;
    pthread_mutex_lock(&g_write_lock);
    for (size_t done = 0; done < l->len;) {
        ssize_t n = write(STDERR_FILENO, l->data + done, l->len - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) /* nobody reads, or a full non-blocking pipe: serving matters more */
            break;
        done += (size_t)n;
    }
    pthread_mutex_unlock(&g_write_lock);
    errno = saved;
}

void tm_log(tm_log_level level, const char *event, const char *fmt, ...)
{
    if (!tm_log_enabled(level))
        return;
    char msg[4096];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(msg, sizeof msg, fmt, ap);
    va_end(ap);
    if (n < 0)
        msg[0] = '\0';
    log_line l;
    begin_line(&l, level, event);
    if (msg[0] && g_json) {
        if (put_name(&l, "msg"))
            put_quoted(&l, msg);
    } else if (msg[0]) {
        puts_raw(&l, ": ");
        put_escaped(&l, msg, strlen(msg));
    }
    end_line(&l);
}

void tm_log_fields(tm_log_level level, const char *event, const tm_log_field *fields, int count)
{
    if (!tm_log_enabled(level))
        return;
    log_line l;
    begin_line(&l, level, event);
    for (int i = 0; i < count && fields[i].name; i++)
        put_field(&l, &fields[i]);
    end_line(&l);
}
