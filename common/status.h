/* Status codes and the error record.
 *
 * A function that can fail returns tm_status. Whoever decides that something failed fills the
 * caller's tm_err once, at the origin; everybody above passes status and record on unchanged.
 * Outputs change only on TM_OK. A NULL tm_err is allowed everywhere: the text is then dropped.
 *
 * One table (status.c) maps each status to its HTTP code, gRPC code and process exit code. */
#ifndef TM_COMMON_STATUS_H
#define TM_COMMON_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

typedef enum tm_status {
    TM_OK = 0,
    /* request level: one client is told, nothing else suffers */
    TM_STATUS_INVALID,     /* bad argument or malformed input */
    TM_STATUS_NOT_FOUND,   /* no such model, key, file */
    TM_STATUS_TOO_LARGE,   /* over a stated limit */
    TM_STATUS_BUSY,        /* a bounded queue is full: try again later */
    TM_STATUS_CANCELLED,   /* the asker went away */
    TM_STATUS_TIMEOUT,     /* a deadline passed */
    TM_STATUS_UNSUPPORTED, /* understood, but not offered */
    TM_STATUS_DENIED,      /* no or wrong credentials */
    /* connection or worker level */
    TM_STATUS_UNAVAILABLE, /* the peer is gone, draining or not ready: go elsewhere */
    TM_STATUS_CLOSED,      /* the handle was closed */
    TM_STATUS_STALE,       /* wrong epoch, compacted revision: list again */
    /* process level */
    TM_STATUS_IO, /* read, write, network system call */
    TM_STATUS_NO_MEMORY,
    TM_STATUS_CONFIG,   /* bad option, config file, model folder: exit code 78 */
    TM_STATUS_DATA,     /* a file's contents are wrong: exit code 78 */
    TM_STATUS_INTERNAL, /* a bug or an impossible state */
    TM_STATUS_COUNT
} tm_status;

typedef struct tm_err {
    tm_status status;
    int line;         /* origin */
    const char *file; /* origin, static string */
    char msg[480];    /* one line: control characters in what it quotes became spaces */
} tm_err;

#define TM_ERR_INIT                                                                                \
    {                                                                                              \
        TM_OK, 0, "", ""                                                                           \
    }

/* Fills *err (if not NULL) and returns st, so that `return TM_FAIL(err, st, "...", ...)` works. */
tm_status tm_err_set(tm_err *err, tm_status st, const char *file, int line, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));

/* The value is the status itself rather than tm_err_set's result, so that the compiler sees at the
 * place of failure that it is not TM_OK and does not take outputs for uninitialised. */
#define TM_FAIL(err, st, ...)                                                                      \
    (__extension__({                                                                               \
        const tm_status tm_fail_st_ = (st);                                                        \
        tm_err_set((err), tm_fail_st_, __FILE__, __LINE__, __VA_ARGS__);                           \
        tm_fail_st_;                                                                               \
    }))

/* Puts "prefix: " before the message that is already in *err; for adding the file a parser was
 * reading. No effect on NULL. */
void tm_err_prefix(tm_err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* The status of a parser's failure when what it read came from a file: INVALID (the asker's fault) becomes
 * DATA (the file's). Changes *err alike; other statuses stay. */
tm_status tm_err_of_file(tm_err *err, tm_status st);

const char *tm_status_name(tm_status st); /* "invalid", "not_found", ... */
int tm_status_http(tm_status st);         /* 400, 404, 413, 429, 499, 503, 500 ... */
int tm_status_grpc(tm_status st);         /* grpc_status_code number */
int tm_status_exit(tm_status st);         /* process exit code: 0, 1, 69 unavailable, 78 config */

#ifdef __cplusplus
}
#endif
#endif
