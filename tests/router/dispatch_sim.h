/* A cluster in one process with a virtual clock: scripted worker groups behind the pool's transport.
 *
 * Everything that crosses a link is packed and unpacked as on the wire and arrives after a delay, in order
 * per link. The token at a position is a function of (prompt, position), so every owner can check what it
 * was given, and every group checks that what it is asked to continue is right. */
#ifndef TM_TESTS_ROUTER_DISPATCH_SIM_H
#define TM_TESTS_ROUTER_DISPATCH_SIM_H

#include "router/pool/pool.h"

#define SIM_GROUPS    8
#define SIM_SEQS      64
#define SIM_LINKS     4096
#define SIM_VOCAB     1000
#define SIM_STOP      7
#define SIM_PROMPT    16
#define SIM_LINK_SEQS 256

typedef struct sim_seq {
    bool used, admitted, held; /* held: gives no tokens although its group lives */
    uint64_t id, link_id;
    uint32_t key; /* of the prompt */
    int prompt_len, have, max_tokens;
    bool want_prompt;
} sim_seq;

typedef struct sim_group {
    char name[32], address[32], model[32], digest[32];
    uint64_t epoch;
    bool alive;  /* the process */
    bool frozen; /* alive, says nothing (SIGSTOP) */
    bool draining;
    bool reject_busy;  /* refuses every submit */
    bool hello_old;    /* says an epoch of the past */
    bool bad_position; /* skips one position, once */
    bool doubling;     /* repeats the last token of the step before */
    int max_batch, queue_max;
    int64_t step_ns, next_step_ns, next_load_ns;
    double prefill_tps;
    sim_seq seqs[SIM_SEQS];
    int submits, cancels, submits_of_link;
    int deaths;
} sim_group;

typedef struct sim_event {
    int64_t at_ns;
    uint64_t order, link_id;
    unsigned char *data; /* NULL: the link closed */
    size_t len;
} sim_event;

typedef struct sim {
    int64_t now_ns;
    uint64_t rng, order;
    sim_group groups[SIM_GROUPS];
    int group_count;
    struct sim_link {
        uint64_t id;
        int group;
        uint64_t epoch; /* of the process that accepted it */
        bool open;      /* not yet closed by the router */
        bool up;        /* not yet closed by the group */
        int64_t last_at_ns;
        int submits;
    } links[SIM_LINKS];
    int link_count;
    sim_event *events;
    int event_count, event_cap;
    int fetches;
    bool fetch_fails, fetch_due;
    char fetch_model[32], fetch_digest[32];
    tm_metrics *metrics;
    tm_pool *pool;
    int64_t next_tick_ns;
    /* The router closes its link to this group; its generations are still on it. May be NULL. */
    void (*on_close)(struct sim *s, const sim_group *g);
} sim;

/* One owner of a generation; checks every callback. */
typedef struct sim_owner {
    sim *s;
    tm_gen *gen;
    uint32_t key;
    int max_tokens, got, admitted, prompt_got;
    int cancel_at; /* cancels itself inside on_tokens at this many, 0 = never */
    bool ended, failed, cancelled;
    tm_gen_finish finish;
    tm_gen_error error;
    int64_t retry_after_ms;
    tm_served *served;
    int32_t priority;
    int64_t deadline_ms;
    const char *session;
    bool prompt_logprobs;
    int64_t started_ns, first_ns, ended_ns;
    int losses; /* links it lost while on them, kept by the schedules */
} sim_owner;

void sim_init(sim *s, uint64_t seed);
void sim_deinit(sim *s);
tm_pool_opts sim_pool_opts(sim *s);
sim_group *sim_add(sim *s, const char *name); /* alive, one model */
void sim_list(sim *s);                        /* tells the pool all groups that were added */
void sim_list_only(sim *s, unsigned mask);
void sim_run(sim *s, int64_t ms);
void sim_run_until_idle(sim *s, int64_t ms_max);
uint64_t sim_random(sim *s);

void sim_kill(sim *s, sim_group *g);    /* SIGKILL: links close, what was not yet sent is lost */
void sim_restart(sim *s, sim_group *g); /* a new epoch */
void sim_drain(sim *s, sim_group *g);   /* hands everything back */
sim_seq *sim_seq_of(sim *s, const sim_owner *o, sim_group **group);

int32_t sim_token(uint32_t key, int pos);
/* Length and finish of the undisturbed run. */
int sim_expected(uint32_t key, int max_tokens, tm_gen_finish *finish);
tm_status sim_start(sim *s, sim_owner *o);
void sim_check_done(const sim_owner *o); /* ended with exactly the expected tokens */

#endif
