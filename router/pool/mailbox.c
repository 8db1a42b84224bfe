/* A list under a mutex and an eventfd. At a few thousand notes a second (one per engine step of a group,
 * not one per token) a lock-free queue would buy nothing. */
#include "router/pool/mailbox.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct tm_mailbox {
    pthread_mutex_t lock;
    tm_note *first, **last;
    size_t notes, bytes, notes_max, bytes_max;
    int fd;
};

tm_status tm_mailbox_create(tm_mailbox **out, size_t notes_max, size_t bytes_max, tm_err *err)
{
    tm_mailbox *m = calloc(1, sizeof(*m));
    if (m == NULL)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for the mailbox");
    m->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (m->fd < 0) {
        free(m);
        return TM_FAIL(err, TM_STATUS_IO, "eventfd: %s", strerror(errno));
    }
    pthread_mutex_init(&m->lock, NULL);
    m->last = &m->first;
    m->notes_max = notes_max;
    m->bytes_max = bytes_max;
    *out = m;
    return TM_OK;
}

void tm_mailbox_destroy(tm_mailbox *m)
{
    if (m == NULL)
        return;
    while (m->first != NULL) {
        tm_note *n = m->first;
        m->first = n->next;
        n->drop(n);
    }
    close(m->fd);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

int tm_mailbox_fd(const tm_mailbox *m)
{
    return m->fd;
}

tm_status tm_mailbox_post(tm_mailbox *m, tm_note *n, bool must)
{
    pthread_mutex_lock(&m->lock);
    bool full = m->notes >= m->notes_max || m->bytes + n->bytes > m->bytes_max;
    if (full && !must) {
        pthread_mutex_unlock(&m->lock);
        return TM_STATUS_BUSY;
    }
    bool wake = m->first == NULL;
    n->next = NULL;
    *m->last = n;
    m->last = &n->next;
    m->notes++;
    m->bytes += n->bytes;
    pthread_mutex_unlock(&m->lock);
    if (wake)
        eventfd_write(m->fd, 1);
    return TM_OK;
}

int tm_mailbox_drain(tm_mailbox *m, void *owner)
{
    eventfd_t ignored;
    /* Fails with EAGAIN when nobody woke us: the list decides. */
    (void)eventfd_read(m->fd, &ignored);
    pthread_mutex_lock(&m->lock);
    tm_note *n = m->first;
    m->first = NULL;
    m->last = &m->first;
    m->notes = 0;
    m->bytes = 0;
    pthread_mutex_unlock(&m->lock);
    int count = 0;
    while (n != NULL) {
        tm_note *next = n->next;
        n->act(owner, n);
        n->drop(n);
        n = next;
        count++;
    }
    return count;
}
