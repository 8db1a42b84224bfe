/* The mailbox: everything that other threads have to say to the loop thread.
 *
 * gRPC, etcd and helper threads post notes; the loop thread takes all of them at once when the eventfd
 * wakes it. Bounded in notes and bytes: a poster is told when it is full, and its link is then given up,
 * because a router that far behind is as good as gone for it. */
#ifndef TM_ROUTER_POOL_MAILBOX_H
#define TM_ROUTER_POOL_MAILBOX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

typedef struct tm_note {
    struct tm_note *next;
    size_t bytes; /* counted against the bound */
    /* Runs on the loop thread, then `drop`. */
    void (*act)(void *owner, struct tm_note *n);
    void (*drop)(struct tm_note *n); /* frees; alone when the mailbox is destroyed */
} tm_note;

typedef struct tm_mailbox tm_mailbox;

tm_status tm_mailbox_create(tm_mailbox **out, size_t notes_max, size_t bytes_max, tm_err *err);
void tm_mailbox_destroy(tm_mailbox *m); /* no poster may be left */
int tm_mailbox_fd(const tm_mailbox *m); /* readable while there is something */
/* Any thread. BUSY: full, the note stays the caller's. `must` passes the bound: ends of links and results
 * that somebody waits for, at most one for each of them. */
tm_status tm_mailbox_post(tm_mailbox *m, tm_note *n, bool must);
/* Loop thread: acts on everything that is there now. Returns how many. */
int tm_mailbox_drain(tm_mailbox *m, void *owner);

#endif
