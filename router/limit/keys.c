/* The key file. A reload builds a whole new table and swaps it in, so a bad line changes nothing. */
#include "router/limit/keys.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "common/check.h"
#include "common/file.h"
#include "common/hash.h"

#define KEY_FILE_MAX ((size_t)1 << 20)
#define KEYS_MAX     8192
#define HASH_HEX     64

typedef struct key_row {
    uint8_t hash[32];
    tm_key_owner *owner;
} key_row;

typedef struct key_table {
    key_row *rows;
    int count;
} key_table;

struct tm_keys {
    char *path;
    tm_key_owner *anonymous;
    key_table table;
};

static tm_key_owner *owner_create(const char *name, size_t len, bool admin)
{
    tm_key_owner *o = calloc(1, sizeof *o);
    if (!o)
        return NULL;
    o->refs = 1;
    o->admin = admin;
    memcpy(o->name, name, len);
    return o;
}

tm_key_owner *tm_key_owner_acquire(tm_key_owner *o)
{
    o->refs++;
    return o;
}

void tm_key_owner_release(tm_key_owner *o)
{
    if (o && --o->refs == 0)
        free(o);
}

static void table_clear(key_table *t)
{
    for (int i = 0; i < t->count; i++)
        tm_key_owner_release(t->rows[i].owner);
    free(t->rows);
    *t = (key_table){0};
}

static tm_key_owner *owner_named(const key_table *t, const char *name, size_t len)
{
    for (int i = 0; i < t->count; i++)
        if (strlen(t->rows[i].owner->name) == len && memcmp(t->rows[i].owner->name, name, len) == 0)
            return t->rows[i].owner;
    return NULL;
}

static bool name_ok(const char *s, size_t len)
{
    if (len == 0 || len >= sizeof(((tm_key_owner *)0)->name))
        return false;
    for (size_t i = 0; i < len; i++)
        if (s[i] <= ' ' || s[i] == 0x7f || (unsigned char)s[i] >= 0x80)
            return false;
    return true;
}

/* The owner of a new row: the same name in this file, else in the old table (its limits go on), else new. */
static tm_key_owner *owner_for(const key_table *table, const key_table *old, const char *name,
                               size_t len, bool admin)
{
    tm_key_owner *o = owner_named(table, name, len);
    if (o)
        return tm_key_owner_acquire(o);
    o = owner_named(old, name, len);
    if (o && o->admin == admin)
        return tm_key_owner_acquire(o);
    return owner_create(name, len, admin);
}

/* One line without its end. Messages name the line, never its contents. */
static tm_status add_line(key_table *t, const key_table *old, const char *line, size_t len,
                          const char *path, int number, tm_err *err)
{
    while (len > 0 && strchr(" \t\r", line[len - 1]))
        len--;
    if (len == 0 || line[0] == '#')
        return TM_OK;
    const char *colon = memchr(line, ':', len);
    size_t name_len = colon ? (size_t)(colon - line) : 0;
    const char *hex = colon ? colon + 1 : line;
    size_t rest = len - (size_t)(hex - line);
    bool admin = rest == HASH_HEX + 6 && memcmp(hex + HASH_HEX, ":admin", 6) == 0;
    bool user =
        rest == HASH_HEX || (rest == HASH_HEX + 5 && memcmp(hex + HASH_HEX, ":user", 5) == 0);
    uint8_t hash[32];
    if (!colon || !name_ok(line, name_len) || (!admin && !user) || !tm_unhex(hex, HASH_HEX, hash))
        return TM_FAIL(
            err, TM_STATUS_CONFIG,
            "%s:%d: expected name:sha256hex or name:sha256hex:role with role user or admin", path,
            number);
    if (t->count >= KEYS_MAX)
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s: more than %d keys", path, KEYS_MAX);
    tm_key_owner *o = owner_for(t, old, line, name_len, admin);
    if (!o)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    if (o->admin != admin) {
        tm_key_owner_release(o);
        return TM_FAIL(err, TM_STATUS_CONFIG, "%s:%d: the name has another role in an earlier line",
                       path, number);
    }
    key_row *row = &t->rows[t->count++];
    memcpy(row->hash, hash, sizeof hash);
    row->owner = o;
    return TM_OK;
}

static tm_status read_table(key_table *out, const key_table *old, const char *path, tm_err *err)
{
    char *data;
    size_t len;
    TM_TRY(tm_file_read(path, KEY_FILE_MAX, &data, &len, err));
    key_table t = {.rows = calloc(KEYS_MAX, sizeof(key_row))};
    tm_status st = t.rows ? TM_OK : TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    int number = 0;
    for (size_t i = 0; i < len && st == TM_OK;) {
        const char *end = memchr(data + i, '\n', len - i);
        size_t n = end ? (size_t)(end - data) - i : len - i;
        st = add_line(&t, old, data + i, n, path, ++number, err);
        i += n + 1;
    }
    if (st == TM_OK && t.count == 0)
        st = TM_FAIL(err, TM_STATUS_CONFIG, "%s: no key in the file", path);
    explicit_bzero(data, len);
    free(data);
    if (st != TM_OK) {
        table_clear(&t);
        return st;
    }
    key_row *fit = realloc(t.rows, (size_t)t.count * sizeof *fit);
    t.rows = fit ? fit : t.rows;
    *out = t;
    return TM_OK;
}

tm_status tm_keys_create(tm_keys **out, const char *path, tm_err *err)
{
    tm_status st = TM_OK;
    tm_keys *k = calloc(1, sizeof *k);
    if (!k)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    k->anonymous = owner_create("anonymous", strlen("anonymous"), true);
    k->path = path ? strdup(path) : NULL;
    if (!k->anonymous || (path && !k->path))
        st = TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    else if (path)
        st = read_table(&k->table, &k->table, path, err);
    if (st != TM_OK) {
        tm_keys_destroy(k);
        return st;
    }
    *out = k;
    return TM_OK;
}

void tm_keys_destroy(tm_keys *k)
{
    if (!k)
        return;
    table_clear(&k->table);
    tm_key_owner_release(k->anonymous);
    free(k->path);
    free(k);
}

tm_status tm_keys_reload(tm_keys *k, tm_err *err)
{
    if (!k->path)
        return TM_OK;
    key_table fresh;
    TM_TRY(read_table(&fresh, &k->table, k->path, err));
    table_clear(&k->table);
    k->table = fresh;
    return TM_OK;
}

bool tm_keys_required(const tm_keys *k)
{
    return k->path != NULL;
}

int tm_keys_count(const tm_keys *k)
{
    return k->table.count;
}

tm_key_owner *tm_keys_find(tm_keys *k, const char *key, size_t len)
{
    uint8_t hash[32];
    tm_sha256(key, len, hash);
    tm_key_owner *found = NULL;
    for (int i = 0; i < k->table.count; i++)
        if (tm_equal_ct(k->table.rows[i].hash, hash, sizeof hash))
            found = k->table.rows[i].owner;
    return found;
}

tm_key_owner *tm_keys_anonymous(tm_keys *k)
{
    return k->anonymous;
}

const char *tm_keys_bearer(const char *authorization)
{
    static const char scheme[] = "bearer ";
    if (strncasecmp(authorization, scheme, sizeof scheme - 1) != 0)
        return NULL;
    authorization += sizeof scheme - 1;
    return authorization + strspn(authorization, " ");
}
