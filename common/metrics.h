/* Metrics: counters, gauges and histograms, rendered as Prometheus text.
 *
 * A metric family is a static descriptor registered once; a series is one label set of it. Updates are
 * lock-free atomics and may come from any thread; creating a series and rendering take a lock. Series
 * per family are bounded (max_series); beyond it every new label set shares the series "other". */
#ifndef TM_COMMON_METRICS_H
#define TM_COMMON_METRICS_H

#include <stddef.h>
#include <stdint.h>

#include "common/buf.h"

typedef enum tm_metric_kind {
    TM_METRIC_COUNTER,
    TM_METRIC_GAUGE,
    TM_METRIC_HISTOGRAM
} tm_metric_kind;

typedef struct tm_metric_desc {
    const char *name; /* turbomesh_..._total, _seconds, _bytes */
    const char *help;
    tm_metric_kind kind;
    const char *labels[4]; /* label names, NULL-terminated */
    const double *buckets; /* histogram upper bounds, ascending */
    int bucket_count;
    int max_series; /* 0 = 64 */
} tm_metric_desc;

typedef struct tm_metrics tm_metrics;
typedef struct tm_series tm_series;

/* 1 ms to 2 minutes; the enum is for static descriptors. */
enum { TM_BUCKETS_LATENCY_S_LEN = 16 };
extern const double TM_BUCKETS_LATENCY_S[TM_BUCKETS_LATENCY_S_LEN];
extern const int TM_BUCKETS_LATENCY_S_COUNT;

tm_metrics *tm_metrics_create(void);
void tm_metrics_destroy(tm_metrics *m);
/* values: one per label of desc. Never NULL. Valid until destroy or remove. */
tm_series *tm_metrics_series(tm_metrics *m, const tm_metric_desc *desc, const char *const *values);
/* Series of a label value that vanished (a group that left). `label` is the index in desc->labels. */
void tm_metrics_remove(tm_metrics *m, const tm_metric_desc *desc, int label, const char *value);
void tm_series_add(tm_series *s, double v);     /* counter, gauge */
void tm_series_set(tm_series *s, double v);     /* gauge */
void tm_series_observe(tm_series *s, double v); /* histogram */
double tm_series_value(const tm_series *s);     /* histogram: sum */
uint64_t tm_series_count(const tm_series *s);   /* histogram: observations */
void tm_metrics_render(tm_metrics *m, tm_buf *out);

#endif
