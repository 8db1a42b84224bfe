/* How far loading is: a bar on a terminal, else a line in the log every few seconds. */
#ifndef TM_ENGINE_MODEL_LOAD_PROGRESS_H
#define TM_ENGINE_MODEL_LOAD_PROGRESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct tm_load_progress {
    size_t total, done;
    int64_t begin_ns, shown_ns;
    bool shows;    /* this rank shows anything */
    bool terminal; /* a bar */
    bool drawn;
} tm_load_progress;

void tm_load_progress_begin(tm_load_progress *p, size_t total, bool shows);
void tm_load_progress_add(tm_load_progress *p, size_t bytes);
void tm_load_progress_end(tm_load_progress *p); /* removes the bar; also after a failure */

/* "16.06 GB in 1.20 s (13.4 GB/s)" */
void tm_load_rate_text(char *out, size_t size, size_t bytes, double seconds);

#endif
