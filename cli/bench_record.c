/* Ids and text are copied out of the events without parsing them: a server sends a hundred thousand a second, and
 * the load must not be slower than the server. The pieces are JSON already, so together they are JSON again. */
#include "cli/bench_record.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TICK_NS    INT64_C(100000000)
#define ANSWER_MAX ((size_t)64 << 20)

struct tm_bench_record {
    FILE *file;
    int64_t tokens, ticked_ns;
};

void tm_bench_answer_init(tm_bench_answer *a)
{
    *a = (tm_bench_answer){0};
    tm_buf_init(&a->ids, ANSWER_MAX);
    tm_buf_init(&a->text, ANSWER_MAX);
}

void tm_bench_answer_clear(tm_bench_answer *a)
{
    tm_buf_clear(&a->ids);
    tm_buf_clear(&a->text);
    a->last_ns = a->gap_ns = a->gap_end_ns = 0;
}

void tm_bench_answer_deinit(tm_bench_answer *a)
{
    tm_buf_deinit(&a->ids);
    tm_buf_deinit(&a->text);
}

tm_status tm_bench_record_open(const char *path, tm_bench_record **out, tm_err *err)
{
    *out = NULL;
    if (!path)
        return TM_OK;
    tm_bench_record *r = calloc(1, sizeof *r);
    if (!r)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    r->file = fopen(path, "w");
    if (!r->file) {
        free(r);
        return TM_FAIL(err, TM_STATUS_IO, "%s: cannot be written", path);
    }
    *out = r;
    return TM_OK;
}

/* Between the quotes, or NULL: a quote inside is escaped. */
static const char *string_end(const char *p)
{
    while (*p && *p != '"')
        p += *p == '\\' && p[1] ? 2 : 1;
    return *p ? p : NULL;
}

void tm_bench_record_event(tm_bench_record *r, tm_bench_answer *a, const char *event, int64_t now)
{
    /* Inside a string these keys would have escaped quotes, so they are found as keys alone. */
    static const char TEXT[] = "\"content\":\"", IDS[] = "\"token_ids\":[";
    if (!r)
        return;
    const char *text = strstr(event, TEXT);
    const char *end = text ? string_end(text + sizeof TEXT - 1) : NULL;
    if (end)
        tm_buf_append(&a->text, text + sizeof TEXT - 1, (size_t)(end - text) - (sizeof TEXT - 1));
    const char *ids = strstr(event, IDS);
    end = ids ? strchr(ids, ']') : NULL;
    if (!end)
        return;
    ids += sizeof IDS - 1;
    if (a->ids.len > 0)
        tm_buf_putc(&a->ids, ',');
    tm_buf_append(&a->ids, ids, (size_t)(end - ids));
    r->tokens++;
    for (const char *p = ids; p < end; p++)
        r->tokens += *p == ',';
    if (a->last_ns && now - a->last_ns > a->gap_ns) {
        a->gap_ns = now - a->last_ns;
        a->gap_end_ns = now;
    }
    a->last_ns = now;
}

static double seconds(int64_t ns)
{
    return (double)ns * 1e-9;
}

void tm_bench_record_tick(tm_bench_record *r, int64_t now)
{
    if (!r || now - r->ticked_ns < TICK_NS)
        return;
    r->ticked_ns = now;
    fprintf(r->file, "{\"t\": %.4f, \"tokens\": %lld}\n", seconds(now), (long long)r->tokens);
}

void tm_bench_record_answer(tm_bench_record *r, const tm_bench_answer *a, const tm_bench_outcome *o)
{
    if (!r)
        return;
    bool whole = o->ok && !a->ids.failed && !a->text.failed;
    fprintf(r->file,
            "{\"prompt\": %d, \"ok\": %s, \"begin\": %.4f, \"first\": %.4f, \"end\": %.4f, "
            "\"gap\": %.4f, \"gap_end\": %.4f, \"ids\": [%s], \"text\": \"%s\"}\n",
            o->prompt, whole ? "true" : "false", seconds(o->begin_ns), seconds(o->first_ns),
            seconds(o->end_ns), seconds(a->gap_ns), seconds(a->gap_end_ns),
            a->ids.len ? a->ids.data : "", a->text.len ? a->text.data : "");
}

bool tm_bench_record_close(tm_bench_record *r)
{
    if (!r)
        return true;
    bool ok = !ferror(r->file);
    ok = fclose(r->file) == 0 && ok;
    free(r);
    return ok;
}
