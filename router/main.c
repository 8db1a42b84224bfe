/* turbomesh-router: options, one router, its run. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "common/check.h"
#include "common/log.h"
#include "router/options.h"
#include "router/router.h"

#define DESCRIPTORS_BESIDE 256 /* links, etcd, files */

static int print_help(void)
{
    tm_buf text;
    tm_buf_init(&text, 0);
    tm_opt_help(&TM_ROUTER_OPTIONS, &text);
    fputs(text.data ? text.data : "", stdout);
    tm_buf_deinit(&text);
    return 0;
}

static tm_status write_port(const char *path, int port, tm_err *err)
{
    FILE *f = fopen(path, "we");
    if (!f)
        return TM_FAIL(err, TM_STATUS_IO, "%s: %m", path);
    bool ok = fprintf(f, "%d\n", port) > 0;
    ok = fclose(f) == 0 && ok;
    return ok ? TM_OK : TM_FAIL(err, TM_STATUS_IO, "%s: %m", path);
}

/* The usual soft limit of 1024 descriptors is meant for programs with select; every stream here needs one. */
static void raise_descriptors(int64_t connections)
{
    struct rlimit lim;
    rlim_t want = (rlim_t)connections + DESCRIPTORS_BESIDE;
    if (getrlimit(RLIMIT_NOFILE, &lim) != 0)
        return;
    if (lim.rlim_max != RLIM_INFINITY && lim.rlim_max < want) {
        tm_log(TM_LOG_WARN, "descriptors",
               "%lld connections need %llu descriptors, the hard limit is %llu: further ones will "
               "wait",
               (long long)connections, (unsigned long long)want, (unsigned long long)lim.rlim_max);
        want = lim.rlim_max;
    }
    if (lim.rlim_cur == RLIM_INFINITY || lim.rlim_cur >= want)
        return;
    lim.rlim_cur = want;
    if (setrlimit(RLIMIT_NOFILE, &lim) != 0)
        tm_log(TM_LOG_WARN, "descriptors", "the limit stays as it is: %m");
}

static tm_status run(const tm_router_opts *o, tm_err *err)
{
    tm_router *r;
    TM_TRY(tm_router_create(&r, o, err));
    tm_status st = o->port_file ? write_port(o->port_file, tm_router_port(r), err) : TM_OK;
    if (st == TM_OK) {
        tm_log(TM_LOG_INFO, "listening", "%s://%s:%d version %s", o->tls_cert ? "https" : "http",
               o->host, tm_router_port(r), TM_VERSION);
        if (tm_router_grpc_port(r) > 0)
            tm_log(TM_LOG_INFO, "listening", "grpc %s:%d", o->grpc_host, tm_router_grpc_port(r));
        st = tm_router_run(r, err);
    }
    tm_router_destroy(r);
    return st;
}

int main(int argc, char **argv)
{
    tm_router_opts o;
    tm_err err = TM_ERR_INIT;
    bool help = false;
    tm_status st = tm_opt_parse(&TM_ROUTER_OPTIONS, argc, argv, &o, NULL, NULL, &help, &err);
    if (st == TM_OK && help)
        return print_help();
    if (st == TM_OK) {
        tm_log_init("turbomesh-router", (tm_log_level)o.log_level, (tm_log_format)o.log_format);
        raise_descriptors(o.connections_max);
        st = run(&o, &err);
    }
    if (st != TM_OK)
        fprintf(stderr, "turbomesh-router: %s\n", err.msg);
    return tm_status_exit(st);
}
