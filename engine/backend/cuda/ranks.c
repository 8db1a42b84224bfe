/* How the devices of a group meet.
 *
 * Rounds of cards, each read by all: who I am (host, device); what memory I offer; whether I could open what the
 * others offered; and where NCCL is needed, who has it and who got in. A rank that failed still takes part in
 * the rounds, so nobody waits for it, and because every decision follows from the cards alone, all ranks decide the
 * same. Two ranks on one device are a mistake of whoever started them, except in tests, which say so. */
#include "engine/backend/cuda/ranks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/file.h"
#include "common/log.h"
#include "engine/backend/cuda/cuda.h"
#include "engine/backend/cuda/device.h"

/* Allocations from here on have pages of their own, which is what is shared with other processes. */
#define OWN_BYTES ((size_t)2 << 20)
#define KEYS_MAX  (1 << 16) /* picks of one call through NCCL */
/* A wait that lasts longer than this, more than any decode step, sleeps between looks. */
#define SPIN_NS  50000000
#define LOOK_NS  1000000 /* how often a wait looks at the peers */
#define SLEEP_NS 20000

/* By number of ranks. With two, what is pushed is what has to cross, once; fused, from 4 MiB on a block that pulls whole rows
 * is faster than a cluster that pushes them (bench/results/h200.csv). With more, TWO moves less and takes two meetings
 * more, which with four pays above 1 MiB; eight are not measured. */
static const tm_ranks_rule rules[] = {
    {2, {[TM_PEER_PUSH] = SIZE_MAX}, {[TM_PEER_PUSH] = (4 << 20) - 1, [TM_PEER_ONE] = SIZE_MAX}},
    {4,
     {[TM_PEER_PUSH] = 1 << 20, [TM_PEER_TWO] = 8 << 20},
     {[TM_PEER_PUSH] = 1 << 20, [TM_PEER_TWO] = 8 << 20}},
    {8,
     {[TM_PEER_PUSH] = 192 << 10, [TM_PEER_TWO] = 4 << 20},
     {[TM_PEER_PUSH] = 192 << 10, [TM_PEER_TWO] = 4 << 20}},
};

typedef struct card {
    int32_t status;
    /* who */
    uint64_t host;
    char bus[32]; /* PCI address of the device */
    /* what */
    int32_t reaches; /* this device can use the memory of all the others */
    int32_t nccl;    /* version, 0: not there */
    uint8_t nccl_id[TM_NCCL_ID_BYTES];
    cudaIpcMemHandle_t segment, gathered;
    /* could */
    int32_t opened;
} card;

_Static_assert(sizeof(card) <= TM_COMM_CARD_MAX, "cards travel in one piece");

typedef enum wish { WISH_AUTO, WISH_PEER, WISH_NCCL } wish;

typedef struct meeting {
    tm_device *dev;
    tm_ranks *r;
    const tm_join_args *args;
    wish wish;
    card mine;
    card *all;
    tm_err *err;
} meeting;

/* The same number for all processes of a running host. */
static uint64_t host_id(void)
{
    char *text = NULL;
    size_t len = 0;
    uint64_t h = 0xcbf29ce484222325u;
    if (tm_file_read("/proc/sys/kernel/random/boot_id", 4096, &text, &len, NULL) != TM_OK)
        return 0;
    for (size_t i = 0; i < len; i++)
        h = (h ^ (uint8_t)text[i]) * 0x100000001b3u;
    free(text);
    return h;
}

/* A round: everybody's card. A failure of this rank goes on its card, that of the round ends the group. */
static tm_status round_of_cards(meeting *m)
{
    tm_status st = tm_comm_allgather(m->r->comm, &m->mine, sizeof(m->mine), m->all);
    if (st != TM_OK)
        return TM_FAIL(m->err, st, "rank %d: another rank ended or hangs while the devices meet",
                       m->r->rank);
    for (int i = 0; i < m->r->size; i++)
        if (m->all[i].status != TM_OK) {
            st = (tm_status)m->all[i].status;
            return i == m->r->rank
                       ? st
                       : TM_FAIL(m->err, st, "rank %d failed (%s)", i, tm_status_name(st));
        }
    return TM_OK;
}

static bool same_device(const card *a, const card *b)
{
    return a->host == b->host && strcmp(a->bus, b->bus) == 0;
}

static tm_status refuse_sharing(const meeting *m)
{
    for (int i = 0; i < m->r->size; i++)
        for (int k = 0; k < i; k++)
            if (same_device(&m->all[i], &m->all[k]) && !m->dev->opts.share)
                return TM_FAIL(m->err, TM_STATUS_CONFIG,
                               "ranks %d and %d are on the same GPU (%s): every rank needs one of "
                               "its own (--device-index, CUDA_VISIBLE_DEVICES; --allow-shared-gpu "
                               "is for tests)",
                               k, i, m->all[i].bus);
    return TM_OK;
}

/* The number that this process knows a device by, -1: it is not visible here. */
static int index_of(const char *bus)
{
    int count = 0;
    char name[32];
    if (cudaGetDeviceCount(&count) != cudaSuccess)
        return -1;
    for (int i = 0; i < count; i++)
        if (cudaDeviceGetPCIBusId(name, (int)sizeof(name), i) == cudaSuccess &&
            strcmp(name, bus) == 0)
            return i;
    return -1;
}

static bool reaches(const meeting *m, int other)
{
    const card *c = &m->all[other];
    int can = 0;
    if (c->host != m->mine.host)
        return false;
    if (same_device(c, &m->mine))
        return true;
    int index = index_of(c->bus);
    return index >= 0 && cudaDeviceCanAccessPeer(&can, m->dev->index, index) == cudaSuccess &&
           can != 0;
}

static bool reaches_all(const meeting *m)
{
    if (m->r->size > TM_PEER_RANKS)
        return false;
    for (int i = 0; i < m->r->size; i++)
        if (i != m->r->rank && !reaches(m, i))
            return false;
    return true;
}

static tm_status take(meeting *m, size_t bytes, void *out)
{
    void *p = NULL;
    TM_TRY(tm_backend_cuda.dev->alloc(m->dev, bytes, &p, m->err));
    memcpy(out, &p, sizeof(p));
    return TM_OK;
}

static tm_status zero(meeting *m, void *p, size_t bytes)
{
    TM_TRY(TM_CUDA(m->dev, cudaMemsetAsync(p, 0, bytes, m->dev->ctx.stream)));
    return TM_CUDA(m->dev, cudaStreamSynchronize(m->dev->ctx.stream));
}

/* This rank's segment, state and words, empty; and on rank 0 the place of all columns. */
static tm_status take_memory(meeting *m)
{
    tm_ranks *r = m->r;
    void *words = NULL;
    if (r->rank == 0 && r->gather_bytes > 0)
        TM_TRY(take(m, TM_MAX(r->gather_bytes, OWN_BYTES), &r->gathered));
    if (!m->mine.reaches)
        return TM_OK;
    TM_TRY(take(m, TM_PEER_SEGMENT_BYTES, &r->peers.segment[r->rank]));
    TM_TRY(take(m, sizeof(tm_peer_state), &r->peers.state));
    TM_TRY(
        tm_backend_cuda.dev->alloc_host(m->dev, TM_PEER_WORDS * sizeof(uint32_t), &words, m->err));
    memset(words, 0, TM_PEER_WORDS * sizeof(uint32_t));
    r->peers.words = words;
    TM_TRY(zero(m, r->peers.state, sizeof(tm_peer_state)));
    TM_TRY(zero(m, r->peers.segment[r->rank], TM_PEER_SEGMENT_BYTES));
    cudaError_t e = cudaIpcGetMemHandle(&m->mine.segment, r->peers.segment[r->rank]);
    if (e == cudaSuccess && r->gathered)
        e = cudaIpcGetMemHandle(&m->mine.gathered, r->gathered);
    if (e != cudaSuccess) { /* not offered: NCCL may still do */
        (void)cudaGetLastError();
        m->mine.reaches = 0;
        tm_log(TM_LOG_WARN, "ranks", "device %d cannot offer its memory to other ranks: %s",
               m->dev->index, cudaGetErrorString(e));
    }
    return TM_OK;
}

static bool open_one(meeting *m, cudaIpcMemHandle_t handle, void *out)
{
    void *p = NULL;
    cudaError_t e = cudaIpcOpenMemHandle(&p, handle, cudaIpcMemLazyEnablePeerAccess);
    if (e != cudaSuccess) {
        (void)cudaGetLastError();
        tm_log(TM_LOG_WARN, "ranks", "device %d cannot open another rank's memory: %s",
               m->dev->index, cudaGetErrorString(e));
        return false;
    }
    memcpy(out, &p, sizeof(p));
    return true;
}

static bool open_all(meeting *m)
{
    tm_ranks *r = m->r;
    for (int i = 0; i < r->size; i++) {
        if (i == r->rank)
            continue;
        if (!open_one(m, m->all[i].segment, &r->peers.segment[i]))
            return false;
        r->opened[i] = true;
    }
    if (r->rank == 0 || r->gather_bytes == 0)
        return true;
    if (!open_one(m, m->all[0].gathered, &r->gathered))
        return false;
    r->gathered_foreign = true;
    return true;
}

/* What every rank said of its own. */
static bool all_say(const meeting *m, size_t offset)
{
    for (int i = 0; i < m->r->size; i++) {
        int32_t v;
        memcpy(&v, (const char *)&m->all[i] + offset, sizeof(v));
        if (!v)
            return false;
    }
    return true;
}

static const struct {
    const char *name;
    wish wish;
    tm_peer_way forced;
} wishes[] = {{"auto", WISH_AUTO, TM_PEER_WAYS}, {"peer", WISH_PEER, TM_PEER_WAYS},
              {"nccl", WISH_NCCL, TM_PEER_WAYS}, {"push", WISH_PEER, TM_PEER_PUSH},
              {"one", WISH_PEER, TM_PEER_ONE},   {"two", WISH_PEER, TM_PEER_TWO}};

static tm_status read_wish(meeting *m)
{
    const char *name = m->dev->opts.collectives ? m->dev->opts.collectives : "auto";
    size_t i = 0;
    while (i < TM_ARRAY_LEN(wishes) && strcmp(wishes[i].name, name) != 0)
        i++;
    if (i == TM_ARRAY_LEN(wishes))
        return TM_FAIL(m->err, TM_STATUS_CONFIG,
                       "collectives '%.40s': expected auto, peer, nccl, push, one or two", name);
    m->wish = wishes[i].wish;
    m->r->forced = wishes[i].forced;
    return TM_OK;
}

static void offer_nccl(meeting *m)
{
    tm_err why = TM_ERR_INIT;
    if (tm_nccl_load(&m->r->nccl, m->r->patience_ms, &why) != TM_OK ||
        (m->r->rank == 0 && tm_nccl_make_id(m->r->nccl, m->mine.nccl_id, &why) != TM_OK)) {
        tm_log(TM_LOG_INFO, "ranks", "without NCCL: %s", why.msg);
        tm_nccl_destroy(m->r->nccl, false);
        m->r->nccl = NULL;
        return;
    }
    m->mine.nccl = tm_nccl_version(m->r->nccl);
}

static void drop_nccl(tm_ranks *r)
{
    tm_nccl_destroy(r->nccl, r->lost);
    r->nccl = NULL;
}

/* NCCL takes seconds to start and memory to run: only where some message goes through it. It refuses two ranks on a
 * device. */
static bool needs_nccl(const meeting *m)
{
    const tm_ranks *r = m->r;
    if (m->wish == WISH_PEER || m->dev->opts.share)
        return false;
    if (!r->peer)
        return true;
    return tm_ranks_way(r, m->args->sum_bytes_max, false) == TM_PEER_WAYS;
}

/* Two more rounds: who has it, and who got in. */
static tm_status settle_nccl(meeting *m)
{
    tm_ranks *r = m->r;
    tm_err why = TM_ERR_INIT;
    uint8_t id[TM_NCCL_ID_BYTES];
    offer_nccl(m);
    TM_TRY(round_of_cards(m));
    bool all = all_say(m, offsetof(card, nccl));
    if (all) {
        memcpy(id, m->all[0].nccl_id, sizeof(id));
        m->mine.nccl = tm_nccl_join(r->nccl, id, r->comm, &why) == TM_OK;
        if (!m->mine.nccl)
            tm_log(TM_LOG_WARN, "ranks", "%s", why.msg);
        TM_TRY(round_of_cards(m));
        all = all_say(m, offsetof(card, nccl));
    }
    if (!all)
        drop_nccl(r);
    return TM_OK;
}

/* The third round. */
static tm_status settle_ways(meeting *m)
{
    tm_ranks *r = m->r;
    bool offered = all_say(m, offsetof(card, reaches)) && m->wish != WISH_NCCL;
    m->mine.opened = offered && open_all(m);
    TM_TRY(round_of_cards(m));
    r->peer = offered && all_say(m, offsetof(card, opened));
    if (needs_nccl(m))
        TM_TRY(settle_nccl(m));
    if (r->peer || r->nccl)
        return TM_OK;
    return TM_FAIL(m->err, TM_STATUS_UNSUPPORTED,
                   "the GPUs of the %d ranks cannot reach each other's memory, and NCCL cannot be "
                   "used (log level info says why)",
                   r->size);
}

static tm_status hold(meeting *m)
{
    tm_ranks *r = m->r;
    m->mine.status = read_wish(m);
    cudaError_t e = cudaDeviceGetPCIBusId(m->mine.bus, (int)sizeof(m->mine.bus), m->dev->index);
    if (e != cudaSuccess && m->mine.status == TM_OK)
        m->mine.status = TM_FAIL(m->err, TM_STATUS_CONFIG, "device %d: %s", m->dev->index,
                                 cudaGetErrorString(e));
    m->mine.host = host_id();
    TM_TRY(round_of_cards(m));
    TM_TRY(refuse_sharing(m));
    m->mine.reaches = reaches_all(m);
    m->mine.status = take_memory(m);
    TM_TRY(round_of_cards(m));
    TM_TRY(settle_ways(m));
    if (r->nccl && !r->peer) {
        TM_TRY(take(m, KEYS_MAX * sizeof(uint64_t), &r->keys));
        if (r->rank == 0)
            TM_TRY(take(m, r->gather_bytes, &r->inbox));
    }
    return TM_OK;
}

static void describe(const tm_ranks *r)
{
    if (r->rank > 0)
        return;
    if (!r->peer)
        tm_log(TM_LOG_WARN, "ranks",
               "the GPUs of the %d ranks cannot reach each other's memory: all sums go through "
               "NCCL %d, which is slower for small ones",
               r->size, tm_nccl_version(r->nccl));
    else if (r->nccl)
        tm_log(TM_LOG_INFO, "ranks", "%d GPUs sum through peer memory, large messages by NCCL %d",
               r->size, tm_nccl_version(r->nccl));
    else
        tm_log(TM_LOG_INFO, "ranks", "%d GPUs sum through peer memory", r->size);
}

tm_status tm_ranks_join(tm_device *dev, tm_comm *comm, const tm_join_args *args, float **gathered,
                        tm_err *err)
{
    tm_err local = TM_ERR_INIT;
    tm_ranks *r = calloc(1, sizeof(*r));
    card *all = calloc((size_t)tm_comm_size(comm), sizeof(*all));
    meeting m = {.dev = dev, .r = r, .args = args, .all = all, .err = err ? err : &local};
    if (!r || !all) {
        free(r);
        free(all);
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "no memory for %d ranks", tm_comm_size(comm));
    }
    r->comm = comm;
    r->rank = tm_comm_rank(comm);
    r->size = tm_comm_size(comm);
    r->gather_bytes = args->gather_bytes;
    r->patience_ms = tm_comm_step_timeout_ms(comm);
    r->rule = rules;
    while (r->rule->ranks < r->size && r->rule + 1 < rules + TM_ARRAY_LEN(rules))
        r->rule++;
    r->peers.rank = r->rank;
    r->peers.size = r->size;
    r->peers.place = tm_peer_place(r->size);
    r->peers.patience_ns = (uint64_t)r->patience_ms * 1000000u;
    dev->ranks = r;
    tm_status st = hold(&m);
    free(all);
    if (st != TM_OK) {
        tm_ranks_leave(dev);
        return st;
    }
    r->joined = true;
    describe(r);
    *gathered = r->rank == 0 ? r->gathered : NULL;
    return TM_OK;
}

void tm_ranks_leave(tm_device *dev)
{
    tm_ranks *r = dev->ranks;
    if (!r)
        return;
    r->lost = r->lost || tm_comm_check(r->comm) != TM_OK;
    if (r->lost &&
        r->peers.words) /* kernels that wait end, and with them what waits for the device */
        __atomic_store_n(&r->peers.words[TM_PEER_WORD_END], 1, __ATOMIC_RELAXED);
    drop_nccl(r);
    for (int i = 0; i < r->size && i < TM_PEER_RANKS; i++)
        if (r->opened[i])
            (void)TM_CUDA(dev, cudaIpcCloseMemHandle(r->peers.segment[i]));
    if (r->gathered_foreign)
        (void)TM_CUDA(dev, cudaIpcCloseMemHandle(r->gathered));
    /* Memory that another rank still has open is not given back. */
    if (r->joined && !r->lost && !dev->poisoned)
        (void)tm_comm_barrier(r->comm);
    if (!r->gathered_foreign && r->gathered)
        tm_backend_cuda.dev->free(dev, r->gathered);
    void *const own[] = {r->inbox, r->keys, r->peers.state,
                         r->rank < TM_PEER_RANKS ? r->peers.segment[r->rank] : NULL};
    for (size_t i = 0; i < TM_ARRAY_LEN(own); i++)
        if (own[i])
            tm_backend_cuda.dev->free(dev, own[i]);
    if (r->peers.words)
        tm_backend_cuda.dev->free_host(dev, r->peers.words);
    free(r);
    dev->ranks = NULL;
}

/* Marks the group as lost, with the reason in the log. */
static tm_status lose(tm_device *dev, const char *why)
{
    tm_ranks *r = dev->ranks;
    if (!r->lost)
        tm_log(TM_LOG_ERROR, "ranks_lost", "rank %d: %s", r->rank, why);
    r->lost = true;
    if (r->peers.words)
        __atomic_store_n(&r->peers.words[TM_PEER_WORD_END], 1, __ATOMIC_RELAXED);
    return TM_STATUS_UNAVAILABLE;
}

static uint32_t word(const tm_ranks *r, int which)
{
    return r->peers.words ? __atomic_load_n(&r->peers.words[which], __ATOMIC_RELAXED) : 0;
}

static tm_status check_words(tm_device *dev)
{
    const tm_ranks *r = dev->ranks;
    uint32_t late = word(r, TM_PEER_WORD_LATE);
    char text[96];
    if (late == 0)
        return TM_OK;
    snprintf(text, sizeof(text), "rank %u did not come to a sum within %lld ms", late - 1,
             (long long)r->patience_ms);
    return lose(dev, text);
}

/* Everything that can end a wait but the device itself. */
static tm_status look_around(tm_device *dev)
{
    tm_ranks *r = dev->ranks;
    TM_TRY(check_words(dev));
    if (tm_comm_check(r->comm) != TM_OK)
        return lose(dev, "another rank ended");
    if (r->nccl && tm_nccl_check(r->nccl) != TM_OK)
        return lose(dev, "NCCL failed");
    return TM_OK;
}

tm_status tm_ranks_wait(tm_device *dev, cudaEvent_t event)
{
    tm_ranks *r = dev->ranks;
    int64_t begin = tm_clock_ns(), looked = begin, moved = begin;
    uint32_t call = word(r, TM_PEER_WORD_CALL);
    if (r->lost)
        return TM_STATUS_UNAVAILABLE;
    for (;;) {
        cudaError_t e = event ? cudaEventQuery(event) : cudaStreamQuery(dev->ctx.stream);
        if (e != cudaErrorNotReady) {
            TM_TRY(TM_CUDA(dev, e));
            return check_words(dev);
        }
        (void)cudaGetLastError(); /* the runtime remembers it as if it were a failure */
        int64_t now = tm_clock_ns();
        if (now - begin > SPIN_NS)
            nanosleep(&(struct timespec){.tv_nsec = SLEEP_NS}, NULL);
        if (now - looked < LOOK_NS)
            continue;
        looked = now;
        TM_TRY(look_around(dev));
        if (word(r, TM_PEER_WORD_CALL) != call) {
            call = word(r, TM_PEER_WORD_CALL);
            moved = now;
        }
        /* Kernels give up by themselves after one patience; a device that does not even do that gets two. */
        if ((now - moved) / 1000000 > 2 * r->patience_ms)
            return lose(dev, "the device makes no progress");
    }
}
