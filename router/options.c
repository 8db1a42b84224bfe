/* The option table of the router. Every limit of the API has a row here; the defaults are the ones of the
 * documentation. */
#include "router/options.h"

#include <arpa/inet.h>
#include <math.h>
#include <string.h>
#include <strings.h>

#include "common/check.h"

#define OFF(f) offsetof(tm_router_opts, f)
#define NO_MAX INFINITY
#define MINUTE 60000.0
#define HOUR   3600000.0
#define MIB    1048576.0

static const tm_opt_row g_rows[] = {
    {"host", "server-name", TM_OPT_STR, OFF(host), "127.0.0.1", 0, 0, NULL,
     "Address of the HTTP server. Another than loopback needs keys."},
    {"port", "server-port", TM_OPT_INT, OFF(port), "8000", 0, 65535, NULL,
     "Port of the HTTP server; 0 picks a free one."},
    {"grpc-host", NULL, TM_OPT_STR, OFF(grpc_host), "127.0.0.1", 0, 0, NULL,
     "Address of the public gRPC service. Its keys and limits are those of the HTTP API."},
    {"grpc-port", NULL, TM_OPT_INT, OFF(grpc_port), "0", 0, 65535, NULL,
     "Port of the public gRPC service; 0 leaves it off."},
    {"grpc-calls-max", NULL, TM_OPT_INT, OFF(grpc_calls_max), "4096", 1, 1e6, NULL,
     "Open gRPC calls (RESOURCE_EXHAUSTED)."},
    {"tls-cert", "ssl-certfile", TM_OPT_STR, OFF(tls_cert), NULL, 0, 0, NULL,
     "PEM file of the certificate: HTTP then speaks TLS only. Read again on SIGHUP."},
    {"tls-key", "ssl-keyfile", TM_OPT_STR, OFF(tls_key), NULL, 0, 0, NULL,
     "PEM file of the certificate's key."},
    {"port-file", NULL, TM_OPT_STR, OFF(port_file), NULL, 0, 0, NULL,
     "File that gets the HTTP port once the server listens, for scripts with port 0."},

    {"etcd", "etcd-endpoints", TM_OPT_STR, OFF(etcd), NULL, 0, 0, NULL,
     "etcd endpoints, comma-separated URLs; groups register there."},
    {"etcd-prefix", NULL, TM_OPT_STR, OFF(etcd_prefix), "/turbomesh/v1/groups/default/", 0, 0, NULL,
     "Prefix of the keys of this pool's groups."},
    {"etcd-ca", NULL, TM_OPT_STR, OFF(etcd_access.ca_file), NULL, 0, 0, NULL,
     "PEM file of the authority of etcd's certificate."},
    {"etcd-cert", NULL, TM_OPT_STR, OFF(etcd_access.cert_file), NULL, 0, 0, NULL,
     "PEM file of this client's certificate for etcd."},
    {"etcd-key", NULL, TM_OPT_STR, OFF(etcd_access.key_file), NULL, 0, 0, NULL,
     "PEM file of that certificate's key."},
    {"etcd-user", NULL, TM_OPT_STR, OFF(etcd_access.user), NULL, 0, 0, NULL,
     "User for etcd's authentication."},
    {"etcd-password", NULL, TM_OPT_STR, OFF(etcd_access.password), NULL, 0, 0, NULL,
     "Its password; better given as TURBOMESH_ETCD_PASSWORD."},
    {"workers", NULL, TM_OPT_STR, OFF(workers), NULL, 0, 0, NULL,
     "Static member list host:port,host:port, instead of or besides etcd."},
    {"router-id", NULL, TM_OPT_STR, OFF(router_id), NULL, 0, 0, NULL,
     "Name of this router towards workers; default: host name and process id."},
    {"policy", "routing-strategy", TM_OPT_ENUM, OFF(policy), "cost", 0, 0,
     "cost,session,least-load,round-robin", "How a group is chosen."},
    {"queue-max", NULL, TM_OPT_INT, OFF(queue_max), "1024", 1, 1e6, NULL,
     "Generations that wait in the router for a group; beyond it 429."},
    {"queue-wait", NULL, TM_OPT_TIME, OFF(queue_wait_ms), "30s", 0, HOUR, NULL,
     "Longest wait for a group before 503."},
    {"suspect-time", NULL, TM_OPT_TIME, OFF(suspect_ms), "500ms", 10, MINUTE, NULL,
     "A group that was silent for this long gets no new requests."},
    {"dead-time", NULL, TM_OPT_TIME, OFF(dead_ms), "2s", 50, 10 * MINUTE, NULL,
     "A group that was silent for this long is dead: its streams go on elsewhere."},
    {"moves-max", NULL, TM_OPT_INT, OFF(moves_max), "3", 0, 100, NULL,
     "How often a stream may move to another group."},
    {"chat-template", NULL, TM_OPT_STR, OFF(chat_template), NULL, 0, 0, NULL,
     "Built-in template name or template text instead of the models' own."},
    {"meta-instruction", NULL, TM_OPT_STR, OFF(meta_instruction), NULL, 0, 0, NULL,
     "System message of conversations that bring none."},
    {"tool-call-parser", NULL, TM_OPT_STR, OFF(tool_parser), "auto", 0, 0, NULL,
     "How the models write tool calls: auto by the template, none, or a name."},
    {"reasoning-parser", NULL, TM_OPT_STR, OFF(reason_parser), "auto", 0, 0, NULL,
     "How the models write reasoning: auto by the template, none, or a name."},

    {"api-key-file", "api-keys", TM_OPT_STR, OFF(api_key_file), NULL, 0, 0, NULL,
     "File of API keys, one name:sha256hex[:role] per line; read again on SIGHUP."},
    {"insecure-open", NULL, TM_OPT_BOOL, OFF(insecure_open), "false", 0, 0, NULL,
     "Allow another address than loopback without keys."},
    {"key-requests-per-minute", NULL, TM_OPT_INT, OFF(key_requests_per_minute), "0", 0, 1e9, NULL,
     "Generation requests of one key per minute; 0 is no limit."},
    {"key-concurrency", NULL, TM_OPT_INT, OFF(key_concurrency), "0", 0, 1e9, NULL,
     "Generation requests of one key at once; 0 is no limit."},

    {"body-max", NULL, TM_OPT_SIZE, OFF(body_max), "8MiB", 1024, 1024 * MIB, NULL,
     "Largest request body (413)."},
    {"header-bytes-max", NULL, TM_OPT_SIZE, OFF(header_bytes_max), "32KiB", 1024, MIB, NULL,
     "All headers of a request (431)."},
    {"header-line-max", NULL, TM_OPT_SIZE, OFF(header_line_max), "8KiB", 256, MIB, NULL,
     "Request line (414) and header line (431)."},
    {"header-count-max", NULL, TM_OPT_INT, OFF(header_count_max), "100", 8, 10000, NULL,
     "Header fields of a request (431)."},
    {"connections-max", NULL, TM_OPT_INT, OFF(connections_max), "16384", 1, 1e6, NULL,
     "Open HTTP connections."},
    {"header-timeout", NULL, TM_OPT_TIME, OFF(header_timeout_ms), "10s", 100, HOUR, NULL,
     "Time for the head of a request."},
    {"idle-timeout", NULL, TM_OPT_TIME, OFF(idle_timeout_ms), "75s", 100, 24 * HOUR, NULL,
     "Time between requests of one connection."},
    {"write-timeout", NULL, TM_OPT_TIME, OFF(write_timeout_ms), "60s", 100, HOUR, NULL,
     "A client that takes no byte for this long is cut."},
    {"body-grace", NULL, TM_OPT_TIME, OFF(body_grace_ms), "5s", 100, HOUR, NULL,
     "After this time a body must come at body-rate-min."},
    {"body-rate-min", NULL, TM_OPT_SIZE, OFF(body_rate_min), "1KiB", 1, 1024 * MIB, NULL,
     "Bytes per second of a slow body (408)."},
    {"stream-buffer-max", NULL, TM_OPT_SIZE, OFF(stream_buffer_max), "256KiB", 4096, 1024 * MIB,
     NULL, "Bytes waiting for a slow reader before its stream pauses."},
    {"ping-interval", NULL, TM_OPT_TIME, OFF(ping_ms), "15s", 10, HOUR, NULL,
     "A silent stream gets a comment this often."},

    {"stop-max", NULL, TM_OPT_INT, OFF(stop_max), "4", 1, 16, NULL,
     "Stop strings of a request (400)."},
    {"messages-max", NULL, TM_OPT_INT, OFF(messages_max), "4096", 1, 1e6, NULL,
     "Messages of a request (400)."},
    {"parts-max", NULL, TM_OPT_INT, OFF(parts_max), "64", 1, 10000, NULL,
     "Content parts of a message (400)."},
    {"choices-max", NULL, TM_OPT_INT, OFF(choices_max), "256", 1, 10000, NULL,
     "Answers of one request: prompts times n (400)."},
    {"timeout-max", NULL, TM_OPT_TIME, OFF(timeout_max_ms), "1h", 1000, 24 * HOUR, NULL,
     "Upper bound of a request's own timeout."},
    {"text-threads", NULL, TM_OPT_INT, OFF(text_threads), "2", 1, 64, NULL,
     "Threads that tokenize long prompts."},
    {"text-queue", NULL, TM_OPT_INT, OFF(text_queue), "256", 1, 100000, NULL,
     "Long prompts waiting to be tokenized; beyond it 503."},
    {"text-inline-max", NULL, TM_OPT_SIZE, OFF(text_inline_bytes), "8KiB", 0, MIB, NULL,
     "Prompts up to this size are tokenized at once, without a thread."},

    {"drain-timeout", NULL, TM_OPT_TIME, OFF(drain_ms), "30s", 0, 24 * HOUR, NULL,
     "Time for running streams after SIGTERM; a second SIGTERM ends at once."},
    {"log-level", NULL, TM_OPT_ENUM, OFF(log_level), "info", 0, 0, "trace,debug,info,warn,error",
     "Least level that is logged."},
    {"log-format", NULL, TM_OPT_ENUM, OFF(log_format), "auto", 0, 0, "auto,text,json",
     "Form of log lines; auto is text on a terminal."},
};

const tm_opt_table TM_ROUTER_OPTIONS = {
    "turbomesh-router",
    "turbomesh-router --workers HOST:PORT,... | --etcd URL [options]",
    "The front door of the cluster: the OpenAI HTTP API and gRPC, balanced over worker groups.",
    g_rows,
    TM_ARRAY_LEN(g_rows),
    0};

static bool is_loopback(const char *host)
{
    struct in_addr v4;
    struct in6_addr v6;
    if (strcasecmp(host, "localhost") == 0)
        return true;
    if (inet_pton(AF_INET, host, &v4) == 1)
        return (ntohl(v4.s_addr) >> 24) == 127;
    return inet_pton(AF_INET6, host, &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

tm_served_opts tm_router_served_opts(const tm_router_opts *o)
{
    return (tm_served_opts){.chat_template = o->chat_template,
                            .meta_instruction = o->meta_instruction,
                            .tool_parser = o->tool_parser,
                            .reason_parser = o->reason_parser};
}

tm_status tm_router_opts_check(const tm_router_opts *o, tm_err *err)
{
    const tm_served_opts served = tm_router_served_opts(o);
    TM_TRY(tm_served_opts_check(&served, err));
    if (!o->etcd && !o->workers)
        return TM_FAIL(err, TM_STATUS_CONFIG, "--etcd or --workers is needed, see --help");
    if (!o->api_key_file && !o->insecure_open && !is_loopback(o->host))
        return TM_FAIL(
            err, TM_STATUS_CONFIG,
            "--host %s is open to others: give --api-key-file, or --insecure-open if anybody "
            "may use this server",
            o->host);
    if (o->grpc_port > 0 && !o->api_key_file && !o->insecure_open && !is_loopback(o->grpc_host))
        return TM_FAIL(
            err, TM_STATUS_CONFIG,
            "--grpc-host %s is open to others: give --api-key-file, or --insecure-open if anybody "
            "may use it",
            o->grpc_host);
    if (!o->tls_cert != !o->tls_key)
        return TM_FAIL(err, TM_STATUS_CONFIG, "--tls-cert and --tls-key go together");
    if (o->dead_ms <= o->suspect_ms)
        return TM_FAIL(err, TM_STATUS_CONFIG, "--dead-time must be longer than --suspect-time");
    return TM_OK;
}
