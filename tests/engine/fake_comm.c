/* Ranks as threads: messages of rank 0 in a list that each rank reads at its own pace, and rounds in which all
 * ranks meet for the rest. See fake.h. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "tests/engine/fake.h"

#define MESSAGES 4096
#define RANKS    4

typedef struct message {
    void *data;
    size_t len;
} message;

typedef struct group {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    int size, alive;
    bool lost;
    message messages[MESSAGES]; /* ring */
    long sent, read[RANKS];
    int arrived; /* of the current round */
    long round;
    float gathered[RANKS];
    tm_status statuses[RANKS];
} group;

struct tm_comm {
    group *g;
    int rank;
};

static bool g_aborted, g_damage;
static pthread_mutex_t g_flags = PTHREAD_MUTEX_INITIALIZER;

static bool swap_flag(bool *flag, bool value)
{
    pthread_mutex_lock(&g_flags);
    bool old = *flag;
    *flag = value;
    pthread_mutex_unlock(&g_flags);
    return old;
}

void fake_comm_group(int n, tm_comm **ranks)
{
    group *g = calloc(1, sizeof(*g));
    TM_ASSERT(g != NULL && n <= RANKS);
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->cond, NULL);
    g->size = g->alive = n;
    for (int i = 0; i < n; i++) {
        ranks[i] = calloc(1, sizeof(*ranks[i]));
        TM_ASSERT(ranks[i] != NULL);
        *ranks[i] = (tm_comm){g, i};
    }
    swap_flag(&g_aborted, false);
    swap_flag(&g_damage, false);
}

bool fake_comm_aborted(void)
{
    bool aborted = swap_flag(&g_aborted, false);
    swap_flag(&g_aborted, aborted);
    return aborted;
}

void fake_comm_damage_next(void)
{
    swap_flag(&g_damage, true);
}

void fake_comm_lose(tm_comm *c)
{
    pthread_mutex_lock(&c->g->lock);
    c->g->lost = true;
    pthread_cond_broadcast(&c->g->cond);
    pthread_mutex_unlock(&c->g->lock);
}

void tm_comm_destroy(tm_comm *c)
{
    group *g = c->g;
    pthread_mutex_lock(&g->lock);
    int left = --g->alive;
    pthread_mutex_unlock(&g->lock);
    free(c);
    if (left > 0)
        return;
    for (int i = 0; i < MESSAGES; i++)
        free(g->messages[i].data);
    pthread_mutex_destroy(&g->lock);
    pthread_cond_destroy(&g->cond);
    free(g);
}

int tm_comm_rank(const tm_comm *c)
{
    return c->rank;
}

int tm_comm_size(const tm_comm *c)
{
    return c->g->size;
}

static long slowest(const group *g)
{
    long least = g->sent;
    for (int r = 1; r < g->size; r++)
        least = TM_MIN(least, g->read[r]);
    return least;
}

static void send_message(group *g, const void *data, size_t len)
{
    message *m = &g->messages[g->sent++ % MESSAGES];
    free(m->data);
    m->data = malloc(len);
    m->len = len;
    TM_ASSERT(m->data != NULL);
    memcpy(m->data, data, len);
    if (swap_flag(&g_damage, false))
        ((int32_t *)m->data)[4] += 1; /* a count in the header */
}

tm_status tm_comm_bcast(tm_comm *c, void *data, size_t *len, size_t cap)
{
    group *g = c->g;
    if (g->size == 1)
        return TM_OK;
    pthread_mutex_lock(&g->lock);
    while (!g->lost && (c->rank == 0 ? g->sent - slowest(g) >= 8 : g->read[c->rank] == g->sent))
        pthread_cond_wait(&g->cond, &g->lock);
    tm_status st = g->lost ? TM_STATUS_UNAVAILABLE : TM_OK;
    if (st == TM_OK && c->rank == 0) {
        send_message(g, data, *len);
    } else if (st == TM_OK) {
        const message *m = &g->messages[g->read[c->rank]++ % MESSAGES];
        st = m->len <= cap ? TM_OK : TM_STATUS_TOO_LARGE;
        if (st == TM_OK) {
            memcpy(data, m->data, m->len);
            *len = m->len;
        }
    }
    pthread_cond_broadcast(&g->cond);
    pthread_mutex_unlock(&g->lock);
    return st;
}

/* Every rank's value is in the group when this returns. Call with the lock held. */
static void meet(group *g)
{
    long round = g->round;
    if (++g->arrived == g->size) {
        g->arrived = 0;
        g->round++;
        pthread_cond_broadcast(&g->cond);
    }
    while (g->round == round && !g->lost)
        pthread_cond_wait(&g->cond, &g->lock);
}

tm_status tm_comm_gather_cols_f32(tm_comm *c, const float *x, size_t rows, size_t cols, float *out)
{
    group *g = c->g;
    TM_ASSERT(rows == 1 && cols == 1);
    pthread_mutex_lock(&g->lock);
    g->gathered[c->rank] = *x;
    meet(g);
    if (c->rank == 0)
        memcpy(out, g->gathered, (size_t)g->size * sizeof(*out));
    meet(g);
    pthread_mutex_unlock(&g->lock);
    return TM_OK;
}

tm_status tm_comm_agree(tm_comm *c, tm_status mine, tm_err *err)
{
    group *g = c->g;
    tm_status worst = TM_OK;
    pthread_mutex_lock(&g->lock);
    g->statuses[c->rank] = mine;
    meet(g);
    for (int i = 0; i < g->size; i++)
        worst = TM_MAX(worst, g->statuses[i]);
    meet(g);
    pthread_mutex_unlock(&g->lock);
    if (worst != TM_OK && mine == TM_OK)
        TM_FAIL(err, worst, "another rank failed");
    return worst;
}

/* The thread that gives up ends here; the test looks at the flag. */
void tm_comm_abort(tm_comm *c, int exit_code)
{
    (void)c;
    (void)exit_code;
    swap_flag(&g_aborted, true);
    pthread_exit(NULL);
}
