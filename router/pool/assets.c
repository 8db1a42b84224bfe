/* One fetch is one job with a channel of its own: the stream's channel may end at any moment. Tokenizers of
 * some megabytes take a second to build, which is why this is not the loop thread. */
#include "router/pool/assets.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/log.h"
#include "net/rpc/rpc.h"
#include "router/pool/pool.h"

#define ASSETS_PATH     "/turbomesh.worker.v1.Worker/GetModelAssets"
#define FETCH_MS        10000
#define ASSET_FILES_MAX 64

typedef Turbomesh__Worker__V1__AssetsRequest wire_request;
typedef Turbomesh__Worker__V1__AssetsReply wire_reply;

typedef struct fetch_job {
    tm_note note; /* carries the result back */
    tm_mailbox *mailbox;
    char address[256], model[128], digest[65];
    tm_served_opts opts;
    tm_served *served;
} fetch_job;

static void act_served(void *pool, tm_note *n)
{
    fetch_job *j = (fetch_job *)(void *)n;
    tm_served *s = j->served;
    j->served = NULL;
    tm_pool_on_served(pool, j->model, j->digest, s);
}

static void drop_served(tm_note *n)
{
    fetch_job *j = (fetch_job *)(void *)n;
    if (j->served != NULL)
        tm_served_release(j->served);
    free(j);
}

static tm_status build(fetch_job *j, const wire_reply *r, tm_err *err)
{
    tm_text_file files[ASSET_FILES_MAX];
    if (strcmp(r->digest, j->digest) != 0)
        return TM_FAIL(err, TM_STATUS_STALE, "it has other files by now");
    if (r->n_asset > ASSET_FILES_MAX)
        return TM_FAIL(err, TM_STATUS_TOO_LARGE, "more than %d files", ASSET_FILES_MAX);
    for (size_t i = 0; i < r->n_asset; i++)
        files[i] = (tm_text_file){r->asset[i]->name, (const char *)r->asset[i]->data.data,
                                  r->asset[i]->data.len};
    return tm_served_create(&j->served, j->model, j->digest, files, (int)r->n_asset, &j->opts, err);
}

static tm_status call(const fetch_job *j, tm_rpc_channel *ch, wire_reply **reply, tm_err *err)
{
    wire_request q = TURBOMESH__WORKER__V1__ASSETS_REQUEST__INIT;
    uint8_t packed[128];
    void *data;
    size_t len;
    q.digest = (char *)j->digest;
    size_t size = turbomesh__worker__v1__assets_request__get_packed_size(&q);
    TM_ASSERT(size <= sizeof(packed));
    turbomesh__worker__v1__assets_request__pack(&q, packed);
    TM_TRY(tm_rpc_unary(ch, ASSETS_PATH, packed, size, FETCH_MS, &data, &len, err));
    *reply = turbomesh__worker__v1__assets_reply__unpack(NULL, len, data);
    free(data);
    return *reply != NULL ? TM_OK : TM_FAIL(err, TM_STATUS_DATA, "its answer does not parse");
}

static tm_status fetch(fetch_job *j, tm_err *err)
{
    tm_rpc_channel *ch;
    wire_reply *reply = NULL;
    TM_TRY(tm_rpc_channel_create(&ch, j->address, err));
    tm_status st = call(j, ch, &reply, err);
    if (st == TM_OK) {
        st = build(j, reply, err);
        turbomesh__worker__v1__assets_reply__free_unpacked(reply, NULL);
    }
    tm_rpc_channel_destroy(ch);
    return st;
}

static void run_fetch(void *arg)
{
    fetch_job *j = arg;
    tm_err err = TM_ERR_INIT;
    if (fetch(j, &err) != TM_OK)
        tm_log(TM_LOG_ERROR, "assets", "text files of %s from %s: %s", j->model, j->address,
               err.msg);
    (void)tm_mailbox_post(j->mailbox, &j->note, true);
}

tm_status tm_assets_fetch(tm_jobs *helper, tm_mailbox *mailbox, const char *address,
                          const char *model, const char *digest, const tm_served_opts *opts)
{
    fetch_job *j = calloc(1, sizeof(*j));
    if (j == NULL)
        return TM_STATUS_NO_MEMORY;
    TM_ASSERT(strlen(address) < sizeof(j->address) && strlen(model) < sizeof(j->model) &&
              strlen(digest) < sizeof(j->digest)); /* the pool's own fields, of equal size */
    memcpy(j->address, address, strlen(address));
    memcpy(j->model, model, strlen(model));
    memcpy(j->digest, digest, strlen(digest));
    j->note = (tm_note){.bytes = sizeof(*j), .act = act_served, .drop = drop_served};
    j->mailbox = mailbox;
    j->opts = *opts;
    tm_status st = tm_jobs_add(helper, run_fetch, j);
    if (st != TM_OK)
        free(j);
    return st;
}
