/* Members: which groups exist and where, from etcd values or a static list. Values only, no state. */
#ifndef TM_ROUTER_POOL_MEMBERS_H
#define TM_ROUTER_POOL_MEMBERS_H

#include <stdbool.h>
#include <stdint.h>

#include "common/status.h"
#include "net/etcd/etcd.h"

typedef struct tm_member {
    char name[256];    /* last part of the etcd key, or the address of a static member */
    char address[256]; /* "host:port" */
    uint64_t epoch;    /* 0 = not stated */
    bool draining;
} tm_member;

typedef struct tm_member_list {
    tm_member *items; /* in order of name, names unique */
    int count;
    int ignored; /* values that were refused */
} tm_member_list;

#define TM_MEMBERS_MAX 4096

/* "host:port,host:port". INVALID names the bad part. */
tm_status tm_members_from_static(const char *list, tm_member_list *out, tm_err *err);
/* Bad values (not JSON, no address, too long) are counted in `ignored` and left out. */
tm_status tm_members_from_etcd(const tm_etcd_kv *kvs, int count, tm_member_list *out);
void tm_member_list_deinit(tm_member_list *l);
const tm_member *tm_member_find(const tm_member_list *l, const char *name);

#endif
