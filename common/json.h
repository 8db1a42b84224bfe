/* JSON: typed getters over jansson with one-line errors, and a streaming writer.
 *
 * Reading: tm_json_parse is strict (UTF-8, depth <= 64, finite numbers, nothing after the value; the
 * last of duplicate keys wins). Getters name the key and what was expected:
 * "config.json: hidden_size: expected an integer >= 1, got a string".
 *
 * Writing: tm_jw appends to a tm_buf without building a tree; it places the commas. Strings that are
 * not valid UTF-8 are written with U+FFFD for each bad byte run. */
#ifndef TM_COMMON_JSON_H
#define TM_COMMON_JSON_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/buf.h"
#include "common/status.h"

tm_status tm_json_parse(const char *data, size_t len, json_t **out, tm_err *err);
/* In files a whole number of more than 18 digits is read as a double. */
tm_status tm_json_load_file(const char *path, size_t max_bytes, json_t **out, tm_err *err);

/* null and absent are the same: NULL. */
json_t *tm_json_get(const json_t *obj, const char *key);
const char *tm_json_type_name(const json_t *v); /* "an object", "a string", "null" ... */

/* Each: absent -> *out = def, TM_OK; wrong type or range -> TM_STATUS_INVALID naming the key. A real
 * with an integral value is accepted as integer. Pass def in *out. */
tm_status tm_json_int(const json_t *obj, const char *key, int64_t min, int64_t max, int64_t *out,
                      tm_err *err);
tm_status tm_json_num(const json_t *obj, const char *key, double min, double max, double *out,
                      tm_err *err);
tm_status tm_json_bool(const json_t *obj, const char *key, bool *out, tm_err *err);
tm_status tm_json_str(const json_t *obj, const char *key, const char **out, tm_err *err);

typedef struct tm_jw {
    tm_buf *buf;
    int depth;
    uint64_t comma; /* bit per depth: a value was already written there */
    bool after_key;
} tm_jw;

void tm_jw_init(tm_jw *w, tm_buf *buf);
void tm_jw_obj(tm_jw *w);
void tm_jw_obj_end(tm_jw *w);
void tm_jw_arr(tm_jw *w);
void tm_jw_arr_end(tm_jw *w);
void tm_jw_key(tm_jw *w, const char *key);
void tm_jw_str(tm_jw *w, const char *s); /* NULL writes null */
void tm_jw_strn(tm_jw *w, const char *s, size_t len);
void tm_jw_int(tm_jw *w, int64_t v);
void tm_jw_num(tm_jw *w, double v); /* reads back as the same double; NaN, infinities: null */
void tm_jw_f32(tm_jw *w, float v);  /* reads back as the same float: fewer digits */
void tm_jw_bool(tm_jw *w, bool v);
void tm_jw_null(tm_jw *w);
void tm_jw_raw(tm_jw *w, const char *json, size_t len); /* one complete value */
/* key + value in one call */
void tm_jw_kstr(tm_jw *w, const char *key, const char *s);
void tm_jw_kint(tm_jw *w, const char *key, int64_t v);
void tm_jw_knum(tm_jw *w, const char *key, double v);
void tm_jw_kbool(tm_jw *w, const char *key, bool v);
void tm_jw_knull(tm_jw *w, const char *key);

bool tm_utf8_valid(const char *s, size_t len);

#endif
