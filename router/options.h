/* The options of turbomesh-router: one table for flags, environment, help and the reference page. */
#ifndef TM_ROUTER_OPTIONS_H
#define TM_ROUTER_OPTIONS_H

#include "common/opt.h"
#include "net/etcd/etcd.h"
#include "router/served.h"

typedef struct tm_router_opts {
    /* listening */
    const char *host;
    int64_t port;
    const char *grpc_host;
    int64_t grpc_port; /* 0 = off */
    int64_t grpc_calls_max;
    const char *tls_cert, *tls_key;
    const char *port_file;
    /* the cluster */
    const char *etcd, *etcd_prefix, *workers, *router_id;
    tm_etcd_access etcd_access;
    int policy; /* tm_policy_kind */
    int64_t queue_max, queue_wait_ms, suspect_ms, dead_ms, moves_max;
    const char *chat_template, *meta_instruction, *tool_parser, *reason_parser;
    /* access */
    const char *api_key_file;
    bool insecure_open;
    int64_t key_requests_per_minute, key_concurrency;
    /* limits of the HTTP side */
    int64_t body_max, header_bytes_max, header_line_max, header_count_max, connections_max;
    int64_t header_timeout_ms, idle_timeout_ms, write_timeout_ms, body_grace_ms, body_rate_min;
    int64_t stream_buffer_max, ping_ms;
    /* limits of requests */
    int64_t stop_max, messages_max, parts_max, choices_max, timeout_max_ms;
    int64_t text_threads, text_queue, text_inline_bytes;
    /* running */
    int64_t drain_ms;
    int log_level, log_format;
} tm_router_opts;

extern const tm_opt_table TM_ROUTER_OPTIONS;

/* What concerns the text side of models. */
tm_served_opts tm_router_served_opts(const tm_router_opts *o);
/* What the rows cannot say: host against keys, bounds against each other. CONFIG. */
tm_status tm_router_opts_check(const tm_router_opts *o, tm_err *err);

#endif
