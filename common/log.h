/* Logging: one line per call to stderr, written whole; text on a terminal, JSON otherwise.
 *
 * Thread-safe. Fields are name/value pairs after the message. Control characters are escaped, lines
 * are cut at 8 KiB. The level comes from --log-level / TURBOMESH_LOG_LEVEL. No prompt text, no keys. */
#ifndef TM_COMMON_LOG_H
#define TM_COMMON_LOG_H

#include <stdbool.h>
#include <stdint.h>

typedef enum tm_log_level {
    TM_LOG_TRACE,
    TM_LOG_DEBUG,
    TM_LOG_INFO,
    TM_LOG_WARN,
    TM_LOG_ERROR
} tm_log_level;

typedef enum tm_log_format { TM_LOG_AUTO, TM_LOG_TEXT, TM_LOG_JSON } tm_log_format;

/* Called once at start, before threads. `program` is copied and appears in every line. */
void tm_log_init(const char *program, tm_log_level level, tm_log_format format);
bool tm_log_level_parse(const char *name, tm_log_level *out);
bool tm_log_enabled(tm_log_level level);

/* `event` is a short fixed name ("request", "group_dead"); fmt adds free text after it. */
void tm_log(tm_log_level level, const char *event, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Typed fields for structured lines: end the list with {NULL}. */
typedef enum tm_log_kind { TM_LOG_STR, TM_LOG_INT, TM_LOG_NUM } tm_log_kind;
typedef struct tm_log_field {
    const char *name;
    tm_log_kind kind;
    const char *str; /* NULL prints as null */
    int64_t i;
    double num;
} tm_log_field;
#define TM_LOG_F_STR(n, v)                                                                         \
    {                                                                                              \
        (n), TM_LOG_STR, (v), 0, 0                                                                 \
    }
#define TM_LOG_F_INT(n, v)                                                                         \
    {                                                                                              \
        (n), TM_LOG_INT, 0, (int64_t)(v), 0                                                        \
    }
#define TM_LOG_F_NUM(n, v)                                                                         \
    {                                                                                              \
        (n), TM_LOG_NUM, 0, 0, (v)                                                                 \
    }

void tm_log_fields(tm_log_level level, const char *event, const tm_log_field *fields, int count);

#endif
