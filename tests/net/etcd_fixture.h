/* A real etcd on free loopback ports with a data folder of its own, and a relay in front of it that can hold
 * or swallow traffic. */
#ifndef TM_TESTS_NET_ETCD_FIXTURE_H
#define TM_TESTS_NET_ETCD_FIXTURE_H

#include <jansson.h>
#include <stdbool.h>
#include <sys/types.h>

typedef struct etcd_proc {
    char dir[64];
    char url[64]; /* client endpoint */
    int port, peer_port;
    pid_t pid;
    const char *cert, *key,
        *client_ca; /* set between prepare and start: TLS, client certificates */
} etcd_proc;

bool etcd_available(void);
void etcd_prepare(etcd_proc *e); /* ports and folder, not started */
void etcd_start(etcd_proc *e);   /* returns when healthy */
void etcd_kill(etcd_proc *e);    /* SIGKILL, waits */
void etcd_empty(etcd_proc *e);   /* removes the data; etcd must be down */
void etcd_remove(etcd_proc *e);  /* kill and remove */

/* One raw call with a text body; fails the test unless it succeeds. */
json_t *etcd_raw_ask(const etcd_proc *e, const char *path, const char *text);

typedef enum relay_mode {
    RELAY_PASS,
    RELAY_HOLD_WATCH, /* a connection whose request names /v3/watch is not passed on until PASS */
    RELAY_SWALLOW     /* nothing passes in either direction; connections stay open */
} relay_mode;

typedef struct relay relay;
relay *relay_start(int to_port);
int relay_port(const relay *r);
void relay_set(relay *r, relay_mode mode);
int relay_held(const relay *r); /* connections held now */
void relay_stop(relay *r);

#endif
