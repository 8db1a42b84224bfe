/* turbomesh: one program, one table of commands. */
#include <stdio.h>
#include <string.h>

#include "cli/cmd.h"
#include "common/buf.h"
#include "common/check.h"
#include "common/log.h"
#include "router/options.h"
#include "worker/options.h"

static int run_version(int argc, char **argv);
static int run_options(int argc, char **argv);
static int run_help(int argc, char **argv);

static const tm_cmd COMMANDS[] = {
    {"serve", tm_cmd_serve, "serve a model on this machine: one worker group and a router",
     &TM_SERVE_OPTIONS},
    {"chat", tm_cmd_chat, "talk to a model on a local engine", &TM_CHAT_OPTIONS},
    {"client", tm_cmd_client, "ask a running server over the OpenAI API", &TM_CLIENT_OPTIONS},
    {"score", tm_cmd_score, "log-probabilities and perplexity of tokens or text",
     &TM_SCORE_OPTIONS},
    {"list", tm_cmd_list, "the model families that are known", &TM_LIST_OPTIONS},
    {"inspect", tm_cmd_inspect, "what a model folder holds, without loading it",
     &TM_INSPECT_OPTIONS},
    {"tokenize", tm_cmd_tokenize, "text to token ids and back", &TM_TOKENIZE_OPTIONS},
    {"render", tm_cmd_render, "the prompt that a chat template makes of messages",
     &TM_RENDER_OPTIONS},
    {"convert", tm_cmd_convert, "write a model as a TurboMind workspace", &TM_CONVERT_OPTIONS},
    {"bench", tm_cmd_bench, "measure the engine or a running server", &TM_BENCH_OPTIONS},
    {"worker", tm_cmd_worker, "start a worker group under mpirun (options of turbomesh-worker)",
     &TM_WORKER_OPTIONS},
    {"router", tm_cmd_router, "start a router (options of turbomesh-router)", &TM_ROUTER_OPTIONS},
    {"options", run_options, "print the option reference as Markdown", NULL},
    {"free-port", tm_cmd_free_port, "print a free loopback port, the given one if possible", NULL},
    {"version", run_version, "print the version", NULL},
    {"help", run_help, "print this list", NULL},
};

static int run_version(int argc, char **argv)
{
    (void)argc;
    (void)argv;
    printf("turbomesh %s\n", TM_VERSION);
    return 0;
}

static int run_options(int argc, char **argv)
{
    (void)argc;
    (void)argv;
    tm_buf b;
    tm_buf_init(&b, 0);
    tm_buf_puts(
        &b, "# Options\n\nWritten by `turbomesh options` from the option tables; a flag beats its "
            "environment variable, that beats the default.\n");
    for (size_t i = 0; i < TM_ARRAY_LEN(COMMANDS); i++) {
        if (!COMMANDS[i].options)
            continue;
        tm_buf_puts(&b, "\n");
        tm_opt_markdown(COMMANDS[i].options, &b);
    }
    bool ok = !b.failed && fwrite(b.data, 1, b.len, stdout) == b.len;
    tm_buf_deinit(&b);
    return ok ? 0 : 1;
}

static int run_help(int argc, char **argv)
{
    (void)argc;
    (void)argv;
    printf("turbomesh %s: large language models served from a cluster\n\nusage: turbomesh COMMAND "
           "...\n\n",
           TM_VERSION);
    for (size_t i = 0; i < TM_ARRAY_LEN(COMMANDS); i++)
        printf("  %-10s %s\n", COMMANDS[i].name, COMMANDS[i].help);
    printf("\n`turbomesh COMMAND --help` shows a command's options.\n"
           "Exit codes: 0 success, 1 failure, 2 usage, 69 unavailable, 78 bad configuration or "
           "model files.\n");
    return 0;
}

int tm_cmd_fail(const char *command, const tm_err *err)
{
    fprintf(stderr, "turbomesh %s: %s\n", command, err->msg);
    return tm_status_exit(err->status);
}

bool tm_cmd_parse(const tm_opt_table *table, int argc, char **argv, void *opts,
                  const char **positional, int *positional_count, int *code)
{
    tm_err err = TM_ERR_INIT;
    bool help = false;
    tm_status st = tm_opt_parse(table, argc, argv, opts, positional, positional_count, &help, &err);
    if (st == TM_OK && !help)
        return true;
    if (help) {
        tm_buf b;
        tm_buf_init(&b, 0);
        tm_opt_help(table, &b);
        fputs(b.data ? b.data : "", stdout);
        tm_buf_deinit(&b);
        *code = 0;
    } else {
        fprintf(stderr, "%s: %s\n", table->command, err.msg);
        *code = 2;
    }
    return false;
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return run_help(argc, argv) ? 1 : 2;
    const char *name = argv[1];
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0)
        name = "help";
    if (strcmp(name, "--version") == 0)
        name = "version";
    for (size_t i = 0; i < TM_ARRAY_LEN(COMMANDS); i++)
        if (strcmp(COMMANDS[i].name, name) == 0)
            return COMMANDS[i].run(argc - 1, argv + 1);
    fprintf(stderr, "turbomesh: unknown command '%s'; `turbomesh help` lists them\n", argv[1]);
    return 2;
}
