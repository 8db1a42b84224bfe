/* .npy, format versions 1 and 2: magic, version, header length, a Python dictionary literal, the data. The
 * header is searched for its three keys; anything unusual is refused. */
#include "cli/npy.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/buf.h"
#include "common/file.h"

#define NPY_BYTES_MAX ((size_t)1 << 31)

/* Position after "'key': " in the header, or NULL. */
static const char *find_key(const char *header, const char *key)
{
    const char *p = strstr(header, key);
    if (!p)
        return NULL;
    p += strlen(key);
    while (*p == ' ' || *p == ':')
        p++;
    return p;
}

static bool parse_shape(const char *p, size_t *rows, size_t *cols)
{
    if (!p || *p != '(')
        return false;
    char *end;
    unsigned long long a = strtoull(p + 1, &end, 10), b = 0;
    if (end == p + 1)
        return false;
    bool two = false;
    while (*end == ',' || *end == ' ')
        end++;
    if (*end != ')') {
        const char *q = end;
        b = strtoull(q, &end, 10);
        two = end != q;
        while (*end == ',' || *end == ' ')
            end++;
    }
    *rows = two ? (size_t)a : 1;
    *cols = two ? (size_t)b : (size_t)a;
    return *end == ')' && *rows > 0 && *cols > 0;
}

tm_status tm_npy_read_tokens(const char *path, int32_t **out, size_t *rows, size_t *cols,
                             tm_err *err)
{
    char *data;
    size_t len, r, c, n, bytes;
    tm_status st = tm_file_read(path, NPY_BYTES_MAX, &data, &len, err);
    if (st != TM_OK)
        return st;
    st = TM_STATUS_DATA;
    char *header = NULL;
    const unsigned char *u = (const unsigned char *)data;
    size_t at = 10, hlen = 0;
    if (len < 12 || memcmp(data, "\x93NUMPY", 6) != 0 || (u[6] != 1 && u[6] != 2)) {
        TM_FAIL(err, st, "%s: not a .npy file of version 1 or 2", path);
        goto out;
    }
    hlen = u[8] | (size_t)u[9] << 8;
    if (u[6] == 2) {
        hlen |= (size_t)u[10] << 16 | (size_t)u[11] << 24;
        at = 12;
    }
    if (hlen > len - at) {
        TM_FAIL(err, st, "%s: header of %zu bytes does not fit the file", path, hlen);
        goto out;
    }
    header = strndup(data + at, hlen);
    if (!header) {
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "%s: out of memory", path);
        goto out;
    }
    const char *descr = find_key(header, "'descr'"), *order = find_key(header, "'fortran_order'");
    size_t size = descr && strncmp(descr, "'<u2'", 5) == 0   ? 2
                  : descr && strncmp(descr, "'<i4'", 5) == 0 ? 4
                                                             : 0;
    if (size == 0) {
        TM_FAIL(err, st, "%s: dtype must be '<u2' (uint16) or '<i4' (int32)", path);
        goto out;
    }
    if (!order || strncmp(order, "False", 5) != 0 ||
        !parse_shape(find_key(header, "'shape'"), &r, &c)) {
        TM_FAIL(err, st, "%s: expected a C-ordered array of one or two dimensions", path);
        goto out;
    }
    if (!tm_size_mul(r, c, &n) || !tm_size_mul(n, size, &bytes) || bytes != len - at - hlen) {
        TM_FAIL(err, st, "%s: shape [%zu, %zu] does not match the file's size", path, r, c);
        goto out;
    }
    int32_t *ids = malloc(n * sizeof *ids);
    if (!ids) {
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "%s: out of memory", path);
        goto out;
    }
    const char *src = data + at + hlen;
    for (size_t i = 0; i < n; i++) {
        uint16_t v16;
        if (size == 2) {
            memcpy(&v16, src + 2 * i, 2);
            ids[i] = v16;
        } else {
            memcpy(&ids[i], src + 4 * i, 4);
        }
    }
    *out = ids;
    *rows = r;
    *cols = c;
    st = TM_OK;
out:
    free(header);
    free(data);
    return st;
}

tm_status tm_npy_write_f32(const char *path, const float *data, size_t rows, size_t cols,
                           tm_err *err)
{
    char header[128];
    int n = snprintf(header, sizeof header,
                     "{'descr': '<f4', 'fortran_order': False, 'shape': (%zu, %zu), }", rows, cols);
    size_t pad = 128 - 10 - (size_t)n; /* the data starts at a multiple of 64 */
    FILE *f = fopen(path, "wb");
    if (!f)
        return TM_FAIL(err, TM_STATUS_IO, "%s: cannot create: %m", path);
    size_t hlen = 128 - 10;
    const unsigned char lead[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)hlen, 0};
    bool ok = fwrite(lead, 1, 10, f) == 10 && fwrite(header, 1, (size_t)n, f) == (size_t)n;
    for (size_t i = 0; ok && i < pad; i++)
        ok = fputc(i + 1 == pad ? '\n' : ' ', f) != EOF;
    ok = ok && fwrite(data, sizeof *data, rows * cols, f) == rows * cols;
    ok = fclose(f) == 0 && ok;
    return ok ? TM_OK : TM_FAIL(err, TM_STATUS_IO, "%s: write failed: %m", path);
}
