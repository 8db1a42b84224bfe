/* Parser of the safetensors header.
 *
 * jansson reads the JSON with duplicate keys refused (a doubled tensor could hide another one); every
 * number is then checked by hand. Offsets must cover the data section exactly: sorted by place, each tensor
 * begins where the one before ends, so neither overlaps nor hidden bytes can exist. */
#include "engine/weights/safetensors.h"

#include <jansson.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/buf.h"
#include "common/check.h"
#include "common/file.h"
#include "common/json.h"

static const struct {
    const char *name;
    size_t size;
} dtypes[] = {
    [TM_ST_F32] = {"F32", 4}, [TM_ST_BF16] = {"BF16", 2},       [TM_ST_F16] = {"F16", 2},
    [TM_ST_F64] = {"F64", 8}, [TM_ST_F8_E4M3] = {"F8_E4M3", 1}, [TM_ST_F8_E5M2] = {"F8_E5M2", 1},
    [TM_ST_I64] = {"I64", 8}, [TM_ST_I32] = {"I32", 4},         [TM_ST_I16] = {"I16", 2},
    [TM_ST_I8] = {"I8", 1},   [TM_ST_U64] = {"U64", 8},         [TM_ST_U32] = {"U32", 4},
    [TM_ST_U16] = {"U16", 2}, [TM_ST_U8] = {"U8", 1},           [TM_ST_BOOL] = {"BOOL", 1},
};

const char *tm_st_dtype_name(tm_st_dtype t)
{
    return dtypes[t].name;
}

void tm_st_shape_text(char *out, size_t size, const int64_t *dims, int ndim)
{
    size_t at = 0;
    int n = snprintf(out, size, "[");
    for (int i = 0; i < ndim && n >= 0 && at + (size_t)n < size; i++) {
        at += (size_t)n;
        n = snprintf(out + at, size - at, "%s%lld", i ? ", " : "", (long long)dims[i]);
    }
    if (n >= 0 && at + (size_t)n < size)
        snprintf(out + at + n, size - at - (size_t)n, "]");
}

/* What the checks of one file share. */
typedef struct parse {
    const char *label;
    size_t data_begin, data_len; /* of the tensors' section */
    tm_err *err;
} parse;

#define REFUSE(p, ...) refuse((p), __LINE__, __VA_ARGS__)

static tm_status refuse(const parse *p, int line, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

static tm_status refuse(const parse *p, int line, const char *fmt, ...)
{
    char text[360];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    return tm_err_set(p->err, TM_STATUS_DATA, __FILE__, line, "%s: %s", p->label, text);
}

static tm_status read_dtype(const parse *p, const char *name, const json_t *v, tm_st_dtype *out)
{
    const char *text = json_string_value(v);
    if (!text)
        return REFUSE(p, "tensor %s: dtype: expected a string, got %s", name, tm_json_type_name(v));
    for (size_t i = 0; i < TM_ARRAY_LEN(dtypes); i++)
        if (strcmp(dtypes[i].name, text) == 0) {
            *out = (tm_st_dtype)i;
            return TM_OK;
        }
    return REFUSE(p, "tensor %s: dtype '%.32s' is unknown", name, text);
}

/* Fills dims and the number of bytes that shape and dtype ask for. */
static tm_status read_shape(const parse *p, const json_t *v, tm_st_tensor *t, size_t *bytes)
{
    if (!json_is_array(v))
        return REFUSE(p, "tensor %s: shape: expected an array, got %s", t->name,
                      tm_json_type_name(v));
    size_t n = json_array_size(v), total = dtypes[t->dtype].size;
    if (n > TM_ST_DIMS_MAX)
        return REFUSE(p, "tensor %s: shape has %zu dimensions, at most %d are read", t->name, n,
                      TM_ST_DIMS_MAX);
    for (size_t i = 0; i < n; i++) {
        const json_t *d = json_array_get(v, i);
        if (!json_is_integer(d) || json_integer_value(d) < 1)
            return REFUSE(p, "tensor %s: shape[%zu]: expected an integer >= 1", t->name, i);
        t->dims[i] = json_integer_value(d);
        if (!tm_size_mul(total, (size_t)t->dims[i], &total))
            return REFUSE(p, "tensor %s: shape is larger than memory can be", t->name);
    }
    t->ndim = (int)n;
    *bytes = total;
    return TM_OK;
}

static tm_status read_offsets(const parse *p, const json_t *v, tm_st_tensor *t)
{
    const json_t *a = json_array_get(v, 0), *b = json_array_get(v, 1);
    if (!json_is_array(v) || json_array_size(v) != 2 || !json_is_integer(a) || !json_is_integer(b))
        return REFUSE(p, "tensor %s: data_offsets: expected two integers", t->name);
    json_int_t begin = json_integer_value(a), end = json_integer_value(b);
    if (begin < 0 || end < begin)
        return REFUSE(p, "tensor %s: data_offsets [%lld, %lld] are negative or reversed", t->name,
                      (long long)begin, (long long)end);
    if ((uint64_t)end > p->data_len)
        return REFUSE(p,
                      "tensor %s: data_offsets end at %lld, but the file holds %zu bytes of data"
                      " (truncated?)",
                      t->name, (long long)end, p->data_len);
    t->offset = p->data_begin + (size_t)begin;
    t->bytes = (size_t)(end - begin);
    return TM_OK;
}

static tm_status read_tensor(const parse *p, const char *name, size_t name_len, const json_t *v,
                             tm_st_tensor *t)
{
    if (name_len == 0 || name_len > TM_ST_NAME_MAX)
        return REFUSE(p, "a tensor's name is %zu bytes long, expected 1 to %d", name_len,
                      TM_ST_NAME_MAX);
    t->name = strdup(name);
    if (!t->name)
        return TM_FAIL(p->err, TM_STATUS_NO_MEMORY, "%s: out of memory", p->label);
    if (!json_is_object(v))
        return REFUSE(p, "tensor %s: expected an object, got %s", name, tm_json_type_name(v));
    size_t want = 0;
    TM_TRY(read_dtype(p, name, json_object_get(v, "dtype"), &t->dtype));
    TM_TRY(read_shape(p, json_object_get(v, "shape"), t, &want));
    TM_TRY(read_offsets(p, json_object_get(v, "data_offsets"), t));
    if (want != t->bytes) {
        char shape[128];
        tm_st_shape_text(shape, sizeof(shape), t->dims, t->ndim);
        return REFUSE(p, "tensor %s: %s %s needs %zu bytes, data_offsets give %zu", name, shape,
                      dtypes[t->dtype].name, want, t->bytes);
    }
    return TM_OK;
}

static tm_status check_metadata(const parse *p, json_t *meta)
{
    const char *key;
    json_t *v;
    if (!json_is_object(meta))
        return REFUSE(p, "__metadata__: expected an object, got %s", tm_json_type_name(meta));
    json_object_foreach(meta, key, v)
    {
        if (!json_is_string(v))
            return REFUSE(p, "__metadata__: %.64s: expected a string, got %s", key,
                          tm_json_type_name(v));
    }
    return TM_OK;
}

static int by_offset(const void *a, const void *b)
{
    const tm_st_tensor *x = a, *y = b;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

/* Sorts by place and checks that the tensors cover the data section exactly. */
static tm_status check_cover(const parse *p, tm_st_list *l)
{
    if (l->count > 0)
        qsort(l->tensors, l->count, sizeof(l->tensors[0]), by_offset);
    size_t at = p->data_begin;
    for (size_t i = 0; i < l->count; i++) {
        const tm_st_tensor *t = &l->tensors[i];
        if (t->offset < at)
            return REFUSE(p, "tensors %s and %s overlap", l->tensors[i - 1].name, t->name);
        if (t->offset > at)
            return REFUSE(p, "%zu bytes before tensor %s belong to no tensor", t->offset - at,
                          t->name);
        at += t->bytes;
    }
    if (at != p->data_begin + p->data_len)
        return REFUSE(p, "%zu bytes at the end belong to no tensor",
                      p->data_begin + p->data_len - at);
    return TM_OK;
}

static tm_status read_header(const parse *p, json_t *root, tm_st_list *l)
{
    const char *name;
    size_t name_len;
    json_t *v;
    if (!json_is_object(root))
        return REFUSE(p, "header: expected an object, got %s", tm_json_type_name(root));
    size_t n = json_object_size(root);
    if (n > TM_ST_TENSORS_MAX)
        return REFUSE(p, "header names %zu tensors, at most %zu are read", n, TM_ST_TENSORS_MAX);
    l->tensors = calloc(n ? n : 1, sizeof(l->tensors[0]));
    if (!l->tensors)
        return TM_FAIL(p->err, TM_STATUS_NO_MEMORY, "%s: out of memory", p->label);
    json_object_keylen_foreach(root, name, name_len, v)
    {
        if (strcmp(name, "__metadata__") == 0) {
            TM_TRY(check_metadata(p, v));
            continue;
        }
        l->count++; /* before reading: the name is freed with the list */
        TM_TRY(read_tensor(p, name, name_len, v, &l->tensors[l->count - 1]));
    }
    return check_cover(p, l);
}

tm_status tm_st_parse(tm_st_list *out, const unsigned char *data, size_t len, const char *label,
                      tm_err *err)
{
    parse p = {.label = label, .err = err};
    if (len < 8)
        return REFUSE(&p, "%zu bytes are no safetensors file", len);
    uint64_t header = 0;
    for (int i = 7; i >= 0; i--)
        header = header << 8 | data[i];
    if (header > TM_ST_HEADER_MAX && tm_file_disguise(data, len))
        return REFUSE(&p, "no safetensors file: %s", tm_file_disguise(data, len));
    if (header > TM_ST_HEADER_MAX)
        return REFUSE(&p, "header length is %llu, at most %zu is read (not a safetensors file?)",
                      (unsigned long long)header, TM_ST_HEADER_MAX);
    if (header > len - 8)
        return REFUSE(&p, "header length is %llu, but the file has %zu bytes (truncated?)",
                      (unsigned long long)header, len);
    if (header < 2 || data[8] != '{')
        return REFUSE(&p, "header does not begin with '{'");
    p.data_begin = 8 + (size_t)header;
    p.data_len = len - p.data_begin;

    json_error_t je;
    json_t *root = json_loadb((const char *)data + 8, (size_t)header, JSON_REJECT_DUPLICATES, &je);
    if (!root)
        return REFUSE(&p, "header is not valid JSON: %.200s (byte %d)", je.text, je.position);
    tm_st_list l = {.header_bytes = p.data_begin};
    tm_status st = read_header(&p, root, &l);
    json_decref(root);
    if (st != TM_OK) {
        tm_st_list_deinit(&l);
        return st;
    }
    *out = l;
    return TM_OK;
}

void tm_st_list_deinit(tm_st_list *l)
{
    for (size_t i = 0; i < l->count; i++)
        free(l->tensors[i].name);
    free(l->tensors);
    *l = (tm_st_list){0};
}
