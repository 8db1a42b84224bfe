/* tm-fake-worker: a worker group without a model. It serves the real Worker service over the fake engine, so
 * that routers can be tested and measured without computing: tokens come at a given rate, the same ones for the
 * same prompt on every instance (a continued stream goes on as it would have). Drain, registration and options
 * are those of the worker. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/check.h"
#include "common/log.h"
#include "tests/worker/fake_engine.h"
#include "worker/serve.h"

typedef struct fake_worker_opts {
    tm_worker_opts worker;
    int64_t tokens, step_delay_ms, vocab, context;
} fake_worker_opts;

#define W(f) offsetof(fake_worker_opts, worker.f)
#define F(f) offsetof(fake_worker_opts, f)

static const tm_opt_row ROWS[] = {
    {"host", NULL, TM_OPT_STR, W(host), "127.0.0.1", 0, 0, NULL, "Address to listen on."},
    {"port", NULL, TM_OPT_INT, W(port), "0", 0, 65535, NULL, "Port; 0 picks one."},
    {"advertise", NULL, TM_OPT_STR, W(advertise), NULL, 0, 0, NULL, "Address for routers."},
    {"etcd", NULL, TM_OPT_STR, W(etcd), NULL, 0, 0, NULL, "etcd endpoints, or none."},
    {"group", NULL, TM_OPT_STR, W(group), NULL, 0, 0, NULL, "Name of the group."},
    {"pool", NULL, TM_OPT_STR, W(pool), "default", 0, 0, NULL, "Pool of the group."},
    {"served-model-name", NULL, TM_OPT_STR, W(served_model_name), NULL, 0, 0, NULL, "Model name."},
    {"drain-timeout", NULL, TM_OPT_TIME, W(drain_timeout_ms), "30s", 0, 86400000, NULL,
     "Time for running requests after SIGTERM."},
    {"stream-queue-max", NULL, TM_OPT_SIZE, W(stream_queue_max), "16MiB", 65536, 1 << 30, NULL,
     "Bytes a router may leave unread."},
    {"max-batch-size", NULL, TM_OPT_INT, W(max_batch_size), "4096", 1, 65536, NULL,
     "Requests that get a token in each step."},
    {"queue-max", NULL, TM_OPT_INT, W(queue_max), "4096", 1, 65536, NULL, "Waiting requests."},
    {"tokens", NULL, TM_OPT_INT, F(tokens), "0", 0, 1 << 30, NULL,
     "End every request with STOP after this many tokens; 0 = its max_tokens decides."},
    {"step-delay", NULL, TM_OPT_TIME, F(step_delay_ms), "10ms", 0, 60000, NULL,
     "Time of a step: every running request gets one token in it."},
    {"vocab", NULL, TM_OPT_INT, F(vocab), "0", 0, 1 << 24, NULL,
     "Vocabulary; 0 = the model folder's."},
    {"context", NULL, TM_OPT_INT, F(context), "32768", 16, 1 << 24, NULL, "Context limit."},
    {"log-level", NULL, TM_OPT_STR, W(log_level), "info", 0, 0, NULL, "Log level."},
};

static const tm_opt_table TABLE = {
    .command = "tm-fake-worker",
    .usage = "tm-fake-worker MODEL [options]",
    .about = "Serves the Worker service with scripted tokens; MODEL gives tokenizer and names.",
    .rows = ROWS,
    .count = (int)TM_ARRAY_LEN(ROWS),
    .positional_max = 1,
};

static void lost(void *user) __attribute__((noreturn));
static void lost(void *user)
{
    (void)user;
    _exit(69);
}

static tm_status run(const fake_worker_opts *o, const char *model, tm_err *err)
{
    tm_fake_opts fo = tm_fake_opts_default();
    fo.model_dir = model;
    fo.vocab = (int)o->vocab;
    fo.max_batch_size = (int)o->worker.max_batch_size;
    fo.queue_max = (int)o->worker.queue_max;
    fo.max_context = (int)o->context;
    fo.step_us = o->step_delay_ms * 1000;
    fo.tokens_stop = (int)o->tokens;
    tm_engine *engine = NULL;
    TM_TRY(tm_fake_open(&engine, &fo, err));
    tm_worker_serve_args args = {
        .engine = engine, .model_dir = model, .opts = &o->worker, .lost = lost};
    tm_status st = tm_worker_serve(&args, err);
    tm_engine_close(engine);
    return st;
}

int main(int argc, char **argv)
{
    fake_worker_opts o = {0};
    tm_err err = TM_ERR_INIT;
    const char *model = NULL;
    int count = 0;
    bool help = false;
    tm_log_level level = TM_LOG_INFO;
    tm_status st = tm_opt_parse(&TABLE, argc, argv, &o, &model, &count, &help, &err);
    if (st == TM_OK && help) {
        tm_buf text;
        tm_buf_init(&text, 0);
        tm_opt_help(&TABLE, &text);
        fputs(text.data, stdout);
        tm_buf_deinit(&text);
        return 0;
    }
    if (st == TM_OK && (count != 1 || !tm_log_level_parse(o.worker.log_level, &level)))
        st = TM_FAIL(&err, TM_STATUS_CONFIG, "give MODEL, and a --log-level that exists");
    if (st == TM_OK) {
        tm_log_init("tm-fake-worker", level, TM_LOG_AUTO);
        tm_worker_signals_block();
        st = run(&o, model, &err);
    }
    if (st != TM_OK)
        fprintf(stderr, "tm-fake-worker: %s\n", err.msg);
    return tm_status_exit(st);
}
