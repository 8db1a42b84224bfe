/* The calls around the generations: keys and limits, bounds, clients that do not read, health, reflection, models,
 * the end of the server. */
#include "tests/router/grpc_harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/check.h"
#include "common/hash.h"
#include "proto/health.pb-c.h"
#include "proto/reflection.pb-c.h"

static void hold(gcall *c, bool on)
{
    pthread_mutex_lock(&c->lock);
    c->hold = on;
    pthread_cond_broadcast(&c->go);
    pthread_mutex_unlock(&c->lock);
}

/* `count` chunks of 64 tokens with 20 best ones each: 7 KB a chunk. */
static void pour(tm_gen *g, int count)
{
    int32_t ids[64];
    for (int i = 0; i < 64; i++)
        ids[i] = 300 + i;
    fake.top_count = 20;
    for (int i = 0; i < count && !g->over; i++)
        fake_tokens(g, ids, 64);
}

static void call_held(gcall *c, int n)
{
    PUB(SamplingParams) s = TURBOMESH__V1__SAMPLING_PARAMS__INIT;
    s.has_logprobs = 1;
    s.logprobs = 20;
    PUB(GenerateRequest) r = text_request("x", &s);
    gcall_start(c, "Generate", &r.base);
    WAIT_FOR(fake.gen_count == n);
    fake_admit(fake.gens[n - 1]);
    hold(c, true);
}

static void clients_that_do_not_read(void **state)
{
    (void)state;
    const tm_public_opts o = {.write_timeout_ms = 400, .text_inline_bytes = 8192};
    grig_start(NULL, &o, (tm_limit_opts){0});
    gcall c;
    fake.manual = true;
    /* Whatever the transport takes at first: in the end something waits, and is cut after the time. */
    call_held(&c, 1);
    for (int i = 0; i < 3000 && !fake.gens[0]->over; i++) {
        pour(fake.gens[0], 5);
        for (int k = 0; k < 5; k++)
            grig_turn();
    }
    WAIT_FOR(fake.cancels == 1);
    hold(&c, false);
    gcall_expect(&c, TM_STATUS_TIMEOUT, "");
    WAIT_FOR(tm_public_active(grig.server) == 0);
    /* More at once than queue and transport hold together. */
    call_held(&c, 2);
    pour(fake.gens[1], 8000);
    assert_true(fake.gens[1]->over);
    hold(&c, false);
    gcall_expect(&c, TM_STATUS_BUSY, "");
    /* One that reads is left alone, however long it takes. */
    PUB(GenerateRequest) r = text_request("x", NULL);
    gcall_start(&c, "Generate", &r.base);
    WAIT_FOR(fake.gen_count == 3);
    fake_admit(fake.gens[2]);
    pour(fake.gens[2], 10);
    for (int64_t end = tm_clock_ms() + 1500; tm_clock_ms() < end;)
        grig_turn();
    fake_end(fake.gens[2], TM_GEN_LENGTH);
    WAIT_FOR(gcall_closed(&c));
    assert_int_equal(c.st, TM_OK);
    gcall_free(&c);
    grig_teardown(NULL);
}

/* ---- keys ---- */

static void keys_and_limits(void **state)
{
    (void)state;
    char path[] = "/tmp/tm_grpc_test_XXXXXX", hex[65];
    uint8_t hash[32];
    int fd = mkstemp(path);
    tm_sha256("secret", 6, hash);
    tm_hex(hash, 32, hex);
    assert_true(dprintf(fd, "alice:%s\n", hex) > 0);
    close(fd);
    grig_start(path, NULL, (tm_limit_opts){.concurrent = 1});
    unlink(path);
    gcall c, d;
    PUB(GenerateRequest) r = text_request("x", NULL);
    static const char *const wrong[] = {NULL, "secret", "Bearer ", "Bearer secre", "Basic secret"};
    for (size_t i = 0; i < TM_ARRAY_LEN(wrong); i++) {
        gcall_open(&c, SERVICE "Generate", wrong[i], 0);
        gcall_send(&c, &r.base);
        gcall_expect(&c, TM_STATUS_DENIED, "key");
        PUB(ListModelsRequest) q = TURBOMESH__V1__LIST_MODELS_REQUEST__INIT;
        gcall_open(&c, SERVICE "ListModels", wrong[i], 0);
        gcall_send(&c, &q.base);
        gcall_expect(&c, TM_STATUS_DENIED, "key");
    }
    assert_int_equal(fake.gen_count, 0);
    fake.manual = true;
    for (int round = 0; round < 2; round++) {
        gcall_open(&c, SERVICE "Generate", "Bearer secret", 0);
        gcall_send(&c, &r.base);
        WAIT_FOR(fake.gen_count == round + 1);
        gcall_open(&d, SERVICE "Generate", "bearer  secret", 0);
        gcall_send(&d, &r.base);
        gcall_expect(&d, TM_STATUS_BUSY, "retry after");
        fake_admit(fake.gens[round]);
        fake_end(fake.gens[round], TM_GEN_STOP);
        WAIT_FOR(gcall_closed(&c));
        assert_int_equal(c.st, TM_OK);
        gcall_free(&c);
        WAIT_FOR(tm_public_active(grig.server) == 0);
    }
    /* Health needs no key. */
    Grpc__Health__V1__HealthCheckRequest h = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    gcall_start(&c, "/grpc.health.v1.Health/Check", &h.base);
    WAIT_FOR(gcall_closed(&c));
    assert_int_equal(c.st, TM_OK);
    gcall_free(&c);
    grig_teardown(NULL);
}

static void too_many_calls(void **state)
{
    (void)state;
    const tm_public_opts o = {.calls_max = 2, .text_inline_bytes = 8192};
    grig_start(NULL, &o, (tm_limit_opts){0});
    gcall c[3];
    PUB(GenerateRequest) r = text_request("x", NULL);
    fake.manual = true;
    gcall_start(&c[0], "Generate", &r.base);
    WAIT_FOR(fake.gen_count == 1);
    gcall_open(&c[1], SERVICE "Generate", NULL, 0); /* says nothing, and counts */
    gcall_start(&c[2], "Generate", &r.base);
    gcall_expect(&c[2], TM_STATUS_BUSY, "too many");
    tm_rpc_stream_cancel(c[1].stream);
    gcall_free(&c[1]);
    for (int n = 0; n < 50 && fake.gen_count < 2; n++) {
        gcall_start(&c[1], "Generate", &r.base);
        WAIT_FOR(gcall_closed(&c[1]) || fake.gen_count == 2);
        if (fake.gen_count < 2)
            gcall_free(&c[1]);
    }
    assert_int_equal(fake.gen_count, 2);
    gcall_free(&c[0]);
    gcall_free(&c[1]);
    WAIT_FOR(fake.active == 0);
    grig_teardown(NULL);
}

/* ---- health, reflection, models ---- */

static int health_of(const gcall *c, int i)
{
    Grpc__Health__V1__HealthCheckResponse *h =
        gcall_unpack(c, i, &grpc__health__v1__health_check_response__descriptor);
    int status = (int)h->status;
    protobuf_c_message_free_unpacked(&h->base, NULL);
    return status;
}

static void health(void **state)
{
    (void)state;
    gcall c, w, g;
    Grpc__Health__V1__HealthCheckRequest h = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    static const char *const names[] = {NULL, "", "turbomesh.v1.TurboMesh"};
    for (size_t i = 0; i < TM_ARRAY_LEN(names); i++) {
        h.service = (char *)(uintptr_t)names[i];
        gcall_start(&c, "/grpc.health.v1.Health/Check", &h.base);
        WAIT_FOR(gcall_closed(&c));
        assert_int_equal(c.count, 1);
        assert_int_equal(health_of(&c, 0), 1);
        gcall_free(&c);
    }
    h.service = (char *)(uintptr_t) "nothing";
    gcall_start(&c, "/grpc.health.v1.Health/Check", &h.base);
    gcall_expect(&c, TM_STATUS_NOT_FOUND, "");
    h.service = NULL;
    gcall_start(&w, "/grpc.health.v1.Health/Watch", &h.base);
    WAIT_FOR(gcall_count(&w) == 1);
    assert_int_equal(health_of(&w, 0), 1);
    fake.groups_ready = 0;
    WAIT_FOR(gcall_count(&w) == 2);
    assert_int_equal(health_of(&w, 1), 2);
    fake.groups_ready = 1;
    WAIT_FOR(gcall_count(&w) == 3);
    assert_int_equal(health_of(&w, 2), 1);
    /* Draining: what runs goes on, what is new is refused, the watcher is told. */
    PUB(GenerateRequest) r = text_request("x", NULL);
    fake.manual = true;
    gcall_start(&g, "Generate", &r.base);
    WAIT_FOR(fake.gen_count == 1);
    tm_public_set_serving(grig.server, false);
    WAIT_FOR(gcall_count(&w) == 4);
    assert_int_equal(health_of(&w, 3), 2);
    gcall_start(&c, "Generate", &r.base);
    gcall_expect(&c, TM_STATUS_UNAVAILABLE, "shutting down");
    fake_admit(fake.gens[0]);
    fake_end(fake.gens[0], TM_GEN_STOP);
    WAIT_FOR(gcall_closed(&g));
    assert_int_equal(g.st, TM_OK);
    gcall_free(&g);
    gcall_free(&w);
}

/* A server that goes away ends what runs with UNAVAILABLE. */
static void destroy_ends_all(void **state)
{
    (void)state;
    grig_setup(NULL);
    gcall c;
    PUB(GenerateRequest) r = text_request("x", NULL);
    fake.manual = true;
    gcall_start(&c, "Generate", &r.base);
    WAIT_FOR(fake.gen_count == 1);
    tm_public_destroy(grig.server, 2000);
    grig.server = NULL;
    assert_int_equal(fake.active, 0);
    gcall_expect(&c, TM_STATUS_UNAVAILABLE, "stops");
    grig_teardown(NULL);
}

static void models(void **state)
{
    (void)state;
    gcall c;
    PUB(ListModelsRequest) q = TURBOMESH__V1__LIST_MODELS_REQUEST__INIT;
    gcall_start(&c, "ListModels", &q.base);
    WAIT_FOR(gcall_closed(&c));
    assert_int_equal(c.st, TM_OK);
    PUB(ListModelsReply) *m = gcall_unpack(&c, 0, &turbomesh__v1__list_models_reply__descriptor);
    assert_int_equal(m->n_model, 1);
    assert_string_equal(m->model[0]->id, "demo");
    assert_int_equal(m->model[0]->max_context, fake_served->max_context);
    assert_int_equal(m->model[0]->groups, 1);
    protobuf_c_message_free_unpacked(&m->base, NULL);
    gcall_free(&c);
}

typedef Grpc__Reflection__V1__ServerReflectionRequest reflect_request;
typedef Grpc__Reflection__V1__ServerReflectionResponse reflect_response;

static reflect_response *ask(gcall *c, const reflect_request *q)
{
    int n = gcall_count(c);
    gcall_send(c, &q->base);
    WAIT_FOR(gcall_count(c) == n + 1);
    return gcall_unpack(c, n, &grpc__reflection__v1__server_reflection_response__descriptor);
}

/* The file descriptor that answers, or an empty one when the answer is an error. */
static void ask_file(gcall *c, bool by_symbol, const char *name, const char *want)
{
    reflect_request q = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    q.message_request_case =
        by_symbol
            ? GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL
            : GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME;
    q.file_by_filename = (char *)(uintptr_t)name; /* one union */
    reflect_response *r = ask(c, &q);
    if (want) {
        assert_int_equal(
            r->message_response_case,
            GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE);
        const ProtobufCBinaryData *f = &r->file_descriptor_response->file_descriptor_proto[0];
        assert_int_equal(r->file_descriptor_response->n_file_descriptor_proto, 1);
        assert_non_null(memmem(f->data, TM_MIN(f->len, (size_t)64), want, strlen(want)));
    } else {
        assert_int_equal(
            r->message_response_case,
            GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE);
        assert_int_equal(r->error_response->error_code, 5);
    }
    protobuf_c_message_free_unpacked(&r->base, NULL);
}

static void reflection(void **state)
{
    (void)state;
    static const char *const versions[] = {"v1", "v1alpha"};
    for (size_t v = 0; v < TM_ARRAY_LEN(versions); v++) {
        gcall c;
        char path[100];
        snprintf(path, sizeof path, "/grpc.reflection.%s.ServerReflection/ServerReflectionInfo",
                 versions[v]);
        gcall_open(&c, path, NULL, 0);
        reflect_request q = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
        q.message_request_case =
            GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES;
        q.list_services = (char *)(uintptr_t) "*";
        reflect_response *r = ask(&c, &q);
        assert_int_equal(r->list_services_response->n_service, 4);
        assert_string_equal(r->original_request->list_services, "*");
        protobuf_c_message_free_unpacked(&r->base, NULL);
        ask_file(&c, false, "turbomesh.proto", "turbomesh.v1");
        ask_file(&c, false, "health.proto", "grpc.health.v1");
        ask_file(&c, false, "nothing.proto", NULL);
        ask_file(&c, true, "turbomesh.v1.TurboMesh", "turbomesh.proto");
        ask_file(&c, true, "turbomesh.v1.TurboMesh.Chat", "turbomesh.proto");
        ask_file(&c, true, "turbomesh.v1.GenerateChunk.text", "turbomesh.proto");
        ask_file(&c, true, "grpc.health.v1.HealthCheckResponse.ServingStatus", "health.proto");
        ask_file(&c, true, "grpc.reflection.v1alpha.ServerReflection", "v1alpha");
        ask_file(&c, true, "turbomesh.v1.Nothing", NULL);
        ask_file(&c, true, "turbomesh.v1.Turbo", NULL);
        ask_file(&c, true, "turbomesh", NULL);
        ask_file(&c, true, "", NULL);
        tm_rpc_stream_half_close(c.stream);
        WAIT_FOR(gcall_closed(&c));
        assert_int_equal(c.st, TM_OK);
        gcall_free(&c);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(clients_that_do_not_read),
        cmocka_unit_test(keys_and_limits),
        cmocka_unit_test(too_many_calls),
        cmocka_unit_test(destroy_ends_all),
        cmocka_unit_test_setup_teardown(health, grig_setup, grig_teardown),
        cmocka_unit_test_setup_teardown(models, grig_setup, grig_teardown),
        cmocka_unit_test_setup_teardown(reflection, grig_setup, grig_teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
