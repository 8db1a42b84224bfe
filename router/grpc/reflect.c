/* Server reflection over the descriptors embedded at build time (proto/descriptor_set.h).
 *
 * A FileDescriptorSet is walked as plain wire format: of each file only its name, package and the names of
 * its messages, enums, services, methods and fields matter here, and the file's own bytes are the answer. The
 * files are few and import nothing, so every question is answered by a walk. */
#include <stdio.h>
#include <string.h>

#include "common/check.h"
#include "proto/descriptor_set.h"
#include "router/grpc/call.h"

typedef Grpc__Reflection__V1__ServerReflectionRequest reflect_request;
typedef Grpc__Reflection__V1__ServerReflectionResponse reflect_response;

#define NAME_MAX_BYTES 256
#define SERVICES_MAX   16
#define NOT_FOUND_CODE 5
#define UNIMPLEMENTED  12
#define WIRE_VARINT    0
#define WIRE_FIXED64   1
#define WIRE_BYTES     2
#define WIRE_FIXED32   5
/* Field numbers of descriptor.proto. */
#define SET_FILE       1
#define FILE_NAME      1
#define FILE_PACKAGE   2
#define FILE_MESSAGE   4
#define FILE_ENUM      5
#define FILE_SERVICE   6
#define ANY_NAME       1
#define ANY_PARTS      2 /* fields of a message, values of an enum, methods of a service */
#define MESSAGE_NESTED 3
#define MESSAGE_ENUM   4
#define DEPTH_MAX      8

typedef struct span {
    const unsigned char *at, *end;
} span;

/* ---- wire format ---- */

static bool read_varint(span *s, uint64_t *out)
{
    uint64_t v = 0;
    for (int shift = 0; shift < 64 && s->at < s->end; shift += 7) {
        unsigned char b = *s->at++;
        v |= (uint64_t)(b & 0x7f) << shift;
        if (b < 0x80) {
            *out = v;
            return true;
        }
    }
    return false;
}

/* The next length-delimited field; others are stepped over. False at the end. */
static bool next_field(span *s, int *number, span *value)
{
    uint64_t tag, v;
    while (read_varint(s, &tag)) {
        size_t skip = 0;
        switch (tag & 7) {
        case WIRE_VARINT:
            if (!read_varint(s, &v))
                return false;
            continue;
        case WIRE_FIXED64:
            skip = 8;
            break;
        case WIRE_FIXED32:
            skip = 4;
            break;
        case WIRE_BYTES:
            if (!read_varint(s, &v) || v > (uint64_t)(s->end - s->at))
                return false;
            *number = (int)(tag >> 3);
            *value = (span){s->at, s->at + v};
            s->at += v;
            return true;
        default:
            return false;
        }
        if (skip > (size_t)(s->end - s->at))
            return false;
        s->at += skip;
    }
    return false;
}

static span field_of(span s, int wanted)
{
    int number;
    span value;
    while (next_field(&s, &number, &value))
        if (number == wanted)
            return value;
    return (span){NULL, NULL};
}

static bool next_file(span *set, span *file)
{
    int number;
    while (next_field(set, &number, file))
        if (number == SET_FILE)
            return true;
    return false;
}

static span whole_set(void)
{
    return (span){tm_descriptor_set, tm_descriptor_set + tm_descriptor_set_len};
}

/* ---- questions ---- */

static bool is_text(span s, const char *text)
{
    size_t n = strlen(text);
    return (size_t)(s.end - s.at) == n && memcmp(s.at, text, n) == 0;
}

/* Cuts "name" or "name." off the front of *symbol. */
static bool cut_name(const char **symbol, span name)
{
    size_t n = (size_t)(name.end - name.at);
    if (n == 0 || strncmp(*symbol, (const char *)name.at, n) != 0)
        return false;
    if ((*symbol)[n] != '.' && (*symbol)[n] != '\0')
        return false;
    *symbol += n + ((*symbol)[n] == '.');
    return true;
}

/* Whether `symbol`, what is left after the names around it, is declared in this message, enum or service. */
static bool declares(span what, int kind, const char *symbol, int depth)
{
    int number;
    span part;
    if (!cut_name(&symbol, field_of(what, ANY_NAME)))
        return false;
    if (*symbol == '\0')
        return true;
    while (depth < DEPTH_MAX && next_field(&what, &number, &part)) {
        const char *rest = symbol;
        if (number == ANY_PARTS && cut_name(&rest, field_of(part, ANY_NAME)) && *rest == '\0')
            return true;
        if (kind == FILE_MESSAGE && (number == MESSAGE_NESTED || number == MESSAGE_ENUM) &&
            declares(part, number == MESSAGE_NESTED ? FILE_MESSAGE : FILE_ENUM, symbol, depth + 1))
            return true;
    }
    return false;
}

static bool file_has_symbol(span file, const char *symbol)
{
    int number;
    span part;
    if (!cut_name(&symbol, field_of(file, FILE_PACKAGE)))
        return false;
    while (next_field(&file, &number, &part))
        if (number >= FILE_MESSAGE && number <= FILE_SERVICE && declares(part, number, symbol, 0))
            return true;
    return false;
}

static bool find_file(const char *name, bool by_symbol, span *file)
{
    span set = whole_set();
    while (next_file(&set, file))
        if (by_symbol ? file_has_symbol(*file, name) : is_text(field_of(*file, FILE_NAME), name))
            return true;
    return false;
}

static size_t list_services(char names[SERVICES_MAX][NAME_MAX_BYTES])
{
    span set = whole_set(), file, part;
    size_t n = 0;
    while (next_file(&set, &file)) {
        span package = field_of(file, FILE_PACKAGE);
        int number;
        while (next_field(&file, &number, &part)) {
            if (number != FILE_SERVICE)
                continue;
            span name = field_of(part, ANY_NAME);
            TM_ASSERT(n < SERVICES_MAX); /* of our own files */
            snprintf(names[n++], NAME_MAX_BYTES, "%.*s.%.*s", (int)(package.end - package.at),
                     (const char *)package.at, (int)(name.end - name.at), (const char *)name.at);
        }
    }
    return n;
}

/* ---- answers ---- */

static void answer(tm_pcall *c, reflect_response *r, reflect_request *q)
{
    r->valid_host = q->host;
    r->original_request = q;
    if (tm_pcall_send(c, &r->base) == TM_STATUS_BUSY)
        tm_pcall_abort(c, TM_STATUS_BUSY, "the client does not read");
}

static void answer_error(tm_pcall *c, reflect_request *q, int code, const char *text)
{
    Grpc__Reflection__V1__ErrorResponse e = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
    reflect_response r = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    e.has_error_code = 1;
    e.error_code = code;
    e.error_message = (char *)(uintptr_t)text;
    r.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE;
    r.error_response = &e;
    answer(c, &r, q);
}

static void answer_file(tm_pcall *c, reflect_request *q, const char *name, bool by_symbol)
{
    Grpc__Reflection__V1__FileDescriptorResponse f =
        GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    reflect_response r = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    span file;
    if (!find_file(name, by_symbol, &file)) {
        answer_error(c, q, NOT_FOUND_CODE, by_symbol ? "no such symbol" : "no such file");
        return;
    }
    ProtobufCBinaryData data = {(size_t)(file.end - file.at), (uint8_t *)(uintptr_t)file.at};
    f.n_file_descriptor_proto = 1;
    f.file_descriptor_proto = &data;
    r.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
    r.file_descriptor_response = &f;
    answer(c, &r, q);
}

static void answer_services(tm_pcall *c, reflect_request *q)
{
    char names[SERVICES_MAX][NAME_MAX_BYTES];
    Grpc__Reflection__V1__ServiceResponse rows[SERVICES_MAX], *list[SERVICES_MAX];
    Grpc__Reflection__V1__ListServiceResponse l = GRPC__REFLECTION__V1__LIST_SERVICE_RESPONSE__INIT;
    reflect_response r = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    l.n_service = list_services(names);
    l.service = list;
    for (size_t i = 0; i < l.n_service; i++) {
        grpc__reflection__v1__service_response__init(&rows[i]);
        rows[i].name = names[i];
        list[i] = &rows[i];
    }
    r.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE;
    r.list_services_response = &l;
    answer(c, &r, q);
}

void tm_public_reflect(tm_pcall *c, ProtobufCMessage **m)
{
    reflect_request *q = (reflect_request *)*m;
    switch (q->message_request_case) {
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME:
        answer_file(c, q, q->file_by_filename, false);
        return;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL:
        answer_file(c, q, q->file_containing_symbol, true);
        return;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES:
        answer_services(c, q);
        return;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_EXTENSION:
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_ALL_EXTENSION_NUMBERS_OF_TYPE:
        answer_error(c, q, NOT_FOUND_CODE, "there are no extensions");
        return;
    default:
        answer_error(c, q, UNIMPLEMENTED, "unknown question");
    }
}
