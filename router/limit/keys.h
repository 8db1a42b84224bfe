/* API keys: a file of SHA-256 values, one `name:sha256hex[:role]` per line (role `user` or `admin`, `#`
 * begins a comment). The server never holds a key itself, only hashes.
 *
 * Several lines may have one name (a key being replaced by another): they are one owner with one set of
 * limits. An owner keeps its limits over a reload as long as its name stays. Loop thread only. */
#ifndef TM_ROUTER_LIMIT_KEYS_H
#define TM_ROUTER_LIMIT_KEYS_H

#include <stdbool.h>
#include <stddef.h>

#include "common/status.h"
#include "router/limit/limit.h"

typedef struct tm_key_owner {
    int refs;
    char name[64];
    bool admin;
    tm_limit limit;
} tm_key_owner;

typedef struct tm_keys tm_keys;

/* path NULL: no keys are needed and every request belongs to the owner "anonymous" (an admin). A file
 * without a key is an error, not an open door. */
tm_status tm_keys_create(tm_keys **out, const char *path, tm_err *err);
void tm_keys_destroy(tm_keys *k);
/* Reads the file again; on failure the old keys stay. */
tm_status tm_keys_reload(tm_keys *k, tm_err *err);
bool tm_keys_required(const tm_keys *k);
int tm_keys_count(const tm_keys *k);

/* The owner of a key, or NULL. Takes the same time whichever key it is; every key is compared. The answer
 * is borrowed until the next reload: acquire it to keep it. */
tm_key_owner *tm_keys_find(tm_keys *k, const char *key, size_t len);
tm_key_owner *tm_keys_anonymous(tm_keys *k);
/* What follows "Bearer " in an Authorization value, or NULL. */
const char *tm_keys_bearer(const char *authorization);
tm_key_owner *tm_key_owner_acquire(tm_key_owner *o);
void tm_key_owner_release(tm_key_owner *o);

#endif
