/* Certificates and user of the one etcd cluster a process talks to. Kept here rather than in every option
 * struct: registrations, watches and one-shot calls of a process never differ in it. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/check.h"
#include "net/etcd/etcd.h"
#include "net/etcd/link.h"

/* Written by tm_etcd_set_access before any thread of net/etcd exists, only read afterwards. */
static tm_etcd_secrets g_secrets;

static tm_status copy_text(char *to, size_t size, const char *text, const char *what, tm_err *err)
{
    int n = snprintf(to, size, "%s", text ? text : "");
    if ((size_t)n >= size)
        return TM_FAIL(err, TM_STATUS_CONFIG, "etcd: the %s is longer than %zu bytes", what,
                       size - 1);
    return TM_OK;
}

static tm_status copy_file(char *to, size_t size, const char *file, const char *what, tm_err *err)
{
    TM_TRY(copy_text(to, size, file, what, err));
    if (*to && access(to, R_OK) != 0)
        return TM_FAIL(err, TM_STATUS_CONFIG, "etcd: %s %s cannot be read", what, to);
    return TM_OK;
}

tm_status tm_etcd_set_access(const tm_etcd_access *a, tm_err *err)
{
    tm_etcd_secrets s = {0};
    if (a) {
        TM_TRY(copy_file(s.ca_file, sizeof(s.ca_file), a->ca_file, "CA file", err));
        TM_TRY(copy_file(s.cert_file, sizeof(s.cert_file), a->cert_file, "certificate", err));
        TM_TRY(copy_file(s.key_file, sizeof(s.key_file), a->key_file, "key file", err));
        TM_TRY(copy_text(s.user, sizeof(s.user), a->user, "user name", err));
        TM_TRY(copy_text(s.password, sizeof(s.password), a->password, "password", err));
    }
    if (!s.cert_file[0] != !s.key_file[0])
        return TM_FAIL(err, TM_STATUS_CONFIG, "etcd: certificate and key file go together");
    g_secrets = s;
    return TM_OK;
}

const tm_etcd_secrets *tm_etcd_secrets_borrow(void)
{
    return &g_secrets;
}
