/* The bar comes after a moment only, so that small models do not flicker, and is gone when the weights are there. Where
 * stderr is no terminal, a line every few seconds tells that a slow disk is at work. */
#include "engine/model/load_progress.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"

#define FIRST_NS     ((int64_t)300 * 1000000)
#define BAR_EVERY_NS ((int64_t)100 * 1000000)
#define LOG_EVERY_NS ((int64_t)5000 * 1000000)
#define BAR_CELLS    24

void tm_load_rate_text(char *out, size_t size, size_t bytes, double seconds)
{
    double gb = (double)bytes / 1e9;
    snprintf(out, size, "%.2f GB in %.2f s (%.1f GB/s)", gb, seconds,
             seconds > 0 ? gb / seconds : 0.0);
}

void tm_load_progress_begin(tm_load_progress *p, size_t total, bool shows)
{
    *p = (tm_load_progress){.total = total,
                            .begin_ns = tm_clock_ns(),
                            .shows = shows,
                            .terminal =
                                shows && tm_log_enabled(TM_LOG_WARN) && isatty(STDERR_FILENO) == 1};
    p->shown_ns = p->begin_ns;
}

static void draw(tm_load_progress *p, double seconds)
{
    char cells[BAR_CELLS + 1];
    double share = p->total > 0 ? TM_MIN((double)p->done / (double)p->total, 1.0) : 1.0;
    size_t full = (size_t)(share * BAR_CELLS);
    memset(cells, '#', full);
    memset(cells + full, '.', BAR_CELLS - full);
    cells[BAR_CELLS] = '\0';
    fprintf(stderr, "\rloading [%s] %3.0f %%  %.2f of %.2f GB  %.1f GB/s\033[K", cells, share * 100,
            (double)p->done / 1e9, (double)p->total / 1e9, (double)p->done / 1e9 / seconds);
    fflush(stderr);
    p->drawn = true;
}

void tm_load_progress_add(tm_load_progress *p, size_t bytes)
{
    p->done += bytes;
    if (!p->shows)
        return;
    int64_t now = tm_clock_ns(), wait = p->terminal ? BAR_EVERY_NS : LOG_EVERY_NS;
    if (now - p->shown_ns < wait || now - p->begin_ns < FIRST_NS)
        return;
    double seconds = (double)(now - p->begin_ns) * 1e-9;
    p->shown_ns = now;
    if (p->terminal)
        draw(p, seconds);
    else
        tm_log(TM_LOG_INFO, "loading", "%.2f of %.2f GB (%.1f GB/s)", (double)p->done / 1e9,
               (double)p->total / 1e9, (double)p->done / 1e9 / seconds);
}

void tm_load_progress_end(tm_load_progress *p)
{
    if (p->drawn)
        fputs("\r\033[K", stderr);
    p->drawn = false;
}
