/* Metrics registry and Prometheus text.
 *
 * A series is found once by its user and then updated without a lock: doubles live in 64-bit atomics
 * and are added to by compare-and-swap. Removed series go to a list of spares and are reused, never
 * freed before destroy, so an update that races with a removal cannot touch freed memory. */
#include "common/metrics.h"

#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/fmt.h"

#define MAX_SERIES_DEFAULT 64
#define LABELS_MAX         4

const double TM_BUCKETS_LATENCY_S[TM_BUCKETS_LATENCY_S_LEN] = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
                                       0.5,   1,      2.5,   5,    10,    30,   60,  120};
const int TM_BUCKETS_LATENCY_S_COUNT = TM_BUCKETS_LATENCY_S_LEN;

struct tm_series {
    struct tm_series *next;
    const tm_metric_desc *desc;
    char *values[LABELS_MAX];
    _Atomic uint64_t value;    /* bits of a double; histogram: the sum */
    _Atomic uint64_t counts[]; /* histogram: bucket_count + 1, the last is above all bounds */
};

typedef struct family {
    struct family *next;
    const tm_metric_desc *desc;
    tm_series *series, *last, *spare;
    tm_series *other;
    int count;
} family;

struct tm_metrics {
    pthread_mutex_t lock; /* guards the lists, never an update */
    family *families, *last;
};

static uint64_t bits_of(double v)
{
    uint64_t b;
    memcpy(&b, &v, sizeof b);
    return b;
}

static double double_of(uint64_t b)
{
    double v;
    memcpy(&v, &b, sizeof v);
    return v;
}

tm_metrics *tm_metrics_create(void)
{
    tm_metrics *m = calloc(1, sizeof *m);
    TM_ASSERT(m != NULL);
    pthread_mutex_init(&m->lock, NULL);
    return m;
}

static void free_series(tm_series *s)
{
    while (s) {
        tm_series *next = s->next;
        for (int i = 0; i < LABELS_MAX; i++)
            free(s->values[i]);
        free(s);
        s = next;
    }
}

void tm_metrics_destroy(tm_metrics *m)
{
    if (!m)
        return;
    for (family *f = m->families; f;) {
        family *next = f->next;
        free_series(f->series);
        free_series(f->spare);
        free_series(f->other);
        free(f);
        f = next;
    }
    pthread_mutex_destroy(&m->lock);
    free(m);
}

static int label_count(const tm_metric_desc *d)
{
    int n = 0;
    while (n < LABELS_MAX && d->labels[n])
        n++;
    return n;
}

/* Families are known by name, so that a descriptor in a header used by two files is one family. */
static family *find_family(tm_metrics *m, const tm_metric_desc *desc)
{
    for (family *f = m->families; f; f = f->next)
        if (f->desc == desc || strcmp(f->desc->name, desc->name) == 0)
            return f;
    return NULL;
}

static family *add_family(tm_metrics *m, const tm_metric_desc *desc)
{
    family *f = calloc(1, sizeof *f);
    TM_ASSERT(f != NULL);
    f->desc = desc;
    if (m->last)
        m->last->next = f;
    else
        m->families = f;
    m->last = f;
    return f;
}

static tm_series *new_series(family *f, const char *const *values, const char *all)
{
    const tm_metric_desc *d = f->desc;
    size_t counts = d->kind == TM_METRIC_HISTOGRAM ? (size_t)d->bucket_count + 1 : 0;
    tm_series *s = f->spare;
    if (s) {
        f->spare = s->next;
        s->next = NULL;
        atomic_store(&s->value, bits_of(0));
        for (size_t i = 0; i < counts; i++)
            atomic_store(&s->counts[i], 0);
    } else {
        s = calloc(1, sizeof *s + counts * sizeof s->counts[0]);
        TM_ASSERT(s != NULL);
        s->desc = d;
    }
    for (int i = 0; i < label_count(d); i++) {
        free(s->values[i]);
        s->values[i] = strdup(all ? all : values[i] ? values[i] : "");
        TM_ASSERT(s->values[i] != NULL);
    }
    return s;
}

static bool same_values(const tm_series *s, const char *const *values, int n)
{
    for (int i = 0; i < n; i++)
        if (strcmp(s->values[i], values[i] ? values[i] : "") != 0)
            return false;
    return true;
}

static tm_series *find_or_add(family *f, const char *const *values)
{
    int labels = label_count(f->desc);
    for (tm_series *s = f->series; s; s = s->next)
        if (same_values(s, values, labels))
            return s;
    if (f->count >= (f->desc->max_series > 0 ? f->desc->max_series : MAX_SERIES_DEFAULT)) {
        if (!f->other)
            f->other = new_series(f, NULL, "other");
        return f->other;
    }
    tm_series *s = new_series(f, values, NULL);
    if (f->last)
        f->last->next = s;
    else
        f->series = s;
    f->last = s;
    f->count++;
    return s;
}

tm_series *tm_metrics_series(tm_metrics *m, const tm_metric_desc *desc, const char *const *values)
{
    pthread_mutex_lock(&m->lock);
    family *f = find_family(m, desc);
    if (!f)
        f = add_family(m, desc);
    tm_series *s = find_or_add(f, values);
    pthread_mutex_unlock(&m->lock);
    return s;
}

void tm_metrics_remove(tm_metrics *m, const tm_metric_desc *desc, int label, const char *value)
{
    TM_ASSERT(label >= 0 && label < label_count(desc));
    pthread_mutex_lock(&m->lock);
    family *f = find_family(m, desc);
    tm_series *keep_last = NULL;
    for (tm_series **p = f ? &f->series : NULL; p && *p;) {
        tm_series *s = *p;
        if (strcmp(s->values[label], value) != 0) {
            keep_last = s;
            p = &s->next;
            continue;
        }
        *p = s->next;
        s->next = f->spare;
        f->spare = s;
        f->count--;
    }
    if (f)
        f->last = keep_last;
    pthread_mutex_unlock(&m->lock);
}

static void atomic_add(_Atomic uint64_t *a, double v)
{
    uint64_t old = atomic_load_explicit(a, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(a, &old, bits_of(double_of(old) + v),
                                                  memory_order_relaxed, memory_order_relaxed))
        continue;
}

void tm_series_add(tm_series *s, double v)
{
    /* A counter never goes down; one bad value must not turn it into NaN for ever. */
    if (!isfinite(v) || (s->desc->kind == TM_METRIC_COUNTER && v < 0))
        return;
    atomic_add(&s->value, v);
}

void tm_series_set(tm_series *s, double v)
{
    atomic_store_explicit(&s->value, bits_of(v), memory_order_relaxed);
}

void tm_series_observe(tm_series *s, double v)
{
    TM_ASSERT(s->desc->kind == TM_METRIC_HISTOGRAM);
    if (!isfinite(v))
        return;
    int i = 0;
    while (i < s->desc->bucket_count && v > s->desc->buckets[i])
        i++;
    atomic_fetch_add_explicit(&s->counts[i], 1, memory_order_relaxed);
    atomic_add(&s->value, v);
}

double tm_series_value(const tm_series *s)
{
    return double_of(atomic_load_explicit(&s->value, memory_order_relaxed));
}

uint64_t tm_series_count(const tm_series *s)
{
    uint64_t n = 0;
    if (s->desc->kind == TM_METRIC_HISTOGRAM)
        for (int i = 0; i <= s->desc->bucket_count; i++)
            n += atomic_load_explicit(&s->counts[i], memory_order_relaxed);
    return n;
}

static void put_number(tm_buf *out, double v)
{
    char text[TM_NUM_MAX];
    if (isnan(v))
        tm_buf_puts(out, "NaN");
    else if (isinf(v))
        tm_buf_puts(out, v > 0 ? "+Inf" : "-Inf");
    else
        tm_buf_append(out, text, tm_num_format(text, v, false));
}

static void put_text(tm_buf *out, const char *s, bool quotes)
{
    for (; *s; s++) {
        if (*s == '\\' || (quotes && *s == '"'))
            tm_buf_putc(out, '\\');
        if (*s == '\n')
            tm_buf_puts(out, "\\n");
        else
            tm_buf_putc(out, *s);
    }
}

static void put_sample(tm_buf *out, const tm_series *s, const char *suffix, const double *le,
                       double v)
{
    const tm_metric_desc *d = s->desc;
    int labels = label_count(d);
    tm_buf_puts(out, d->name);
    tm_buf_puts(out, suffix);
    for (int i = 0; i < labels; i++) {
        tm_buf_puts(out, i == 0 ? "{" : ",");
        tm_buf_puts(out, d->labels[i]);
        tm_buf_puts(out, "=\"");
        put_text(out, s->values[i], true);
        tm_buf_putc(out, '"');
    }
    if (le) {
        tm_buf_puts(out, labels ? ",le=\"" : "{le=\"");
        put_number(out, *le);
        tm_buf_putc(out, '"');
    }
    if (labels || le)
        tm_buf_putc(out, '}');
    tm_buf_putc(out, ' ');
    put_number(out, v);
    tm_buf_putc(out, '\n');
}

static void put_series(tm_buf *out, const tm_series *s)
{
    const tm_metric_desc *d = s->desc;
    if (d->kind != TM_METRIC_HISTOGRAM) {
        put_sample(out, s, "", NULL, tm_series_value(s));
        return;
    }
    /* The count is the last cumulative bucket, so that the two agree while updates go on. */
    uint64_t total = 0;
    double sum = tm_series_value(s);
    for (int i = 0; i <= d->bucket_count; i++) {
        double le = i < d->bucket_count ? d->buckets[i] : INFINITY;
        total += atomic_load_explicit(&s->counts[i], memory_order_relaxed);
        put_sample(out, s, "_bucket", &le, (double)total);
    }
    put_sample(out, s, "_sum", NULL, sum);
    put_sample(out, s, "_count", NULL, (double)total);
}

void tm_metrics_render(tm_metrics *m, tm_buf *out)
{
    static const char *const kinds[] = {"counter", "gauge", "histogram"};
    pthread_mutex_lock(&m->lock);
    for (family *f = m->families; f; f = f->next) {
        tm_buf_puts(out, "# HELP ");
        tm_buf_puts(out, f->desc->name);
        tm_buf_putc(out, ' ');
        put_text(out, f->desc->help ? f->desc->help : "", false);
        tm_buf_printf(out, "\n# TYPE %s %s\n", f->desc->name, kinds[f->desc->kind]);
        for (tm_series *s = f->series; s; s = s->next)
            put_series(out, s);
        if (f->other)
            put_series(out, f->other);
    }
    pthread_mutex_unlock(&m->lock);
}
