/* A message is a row of (field number, value); unknown fields are skipped, as protobuf wants it. Values with
 * a length must lie inside the message that holds them: that is the whole safety of this reader. */
#include "text/tok/spfile.h"

#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/file.h"
#include "text/tok/vocab.h"

typedef struct reader {
    const unsigned char *at, *end;
} reader;

typedef struct field {
    uint32_t number, wire; /* wire: 0 varint, 1 eight bytes, 2 bytes, 5 four bytes */
    uint64_t value;
    reader bytes; /* wire 2 */
} field;

static bool read_varint(reader *r, uint64_t *out)
{
    uint64_t v = 0;
    for (int shift = 0; shift < 70 && r->at < r->end; shift += 7) {
        unsigned char c = *r->at++;
        if (shift < 64)
            v |= (uint64_t)(c & 0x7F) << shift;
        if (c < 0x80) {
            *out = v;
            return true;
        }
    }
    return false;
}

static bool read_fixed(reader *r, int n, uint64_t *out)
{
    if (r->end - r->at < n)
        return false;
    *out = 0;
    for (int i = 0; i < n; i++)
        *out |= (uint64_t)r->at[i] << (8 * i);
    r->at += n;
    return true;
}

/* *more false: the end. A result of false: not a message. */
static bool next_field(reader *r, field *f, bool *more)
{
    uint64_t key, n;
    *more = r->at < r->end;
    if (!*more)
        return true;
    if (!read_varint(r, &key) || key >> 3 == 0 || key >> 32)
        return false;
    *f = (field){.number = (uint32_t)(key >> 3), .wire = key & 7};
    switch (f->wire) {
    case 0:
        return read_varint(r, &f->value);
    case 1:
        return read_fixed(r, 8, &f->value);
    case 2:
        if (!read_varint(r, &n) || n > (uint64_t)(r->end - r->at))
            return false;
        f->bytes = (reader){r->at, r->at + n};
        r->at += n;
        return true;
    case 5:
        return read_fixed(r, 4, &f->value);
    default:
        return false;
    }
}

static bool read_piece(reader r, tm_sp_piece *p)
{
    field f;
    bool more;
    *p = (tm_sp_piece){.text = "", .type = TM_SP_NORMAL};
    while (next_field(&r, &f, &more)) {
        if (!more)
            return true;
        if (f.number == 1 && f.wire == 2) {
            p->text = (const char *)f.bytes.at;
            p->len = (uint32_t)(f.bytes.end - f.bytes.at);
        } else if (f.number == 2 && f.wire == 5) {
            uint32_t bits = (uint32_t)f.value;
            memcpy(&p->score, &bits, sizeof(bits));
        } else if (f.number == 3 && f.wire == 0) {
            p->type = (tm_sp_type)(f.value & 0xFF);
        }
    }
    return false;
}

static bool read_trainer(reader r, tm_sp_file *out)
{
    field f;
    bool more;
    while (next_field(&r, &f, &more)) {
        if (!more)
            return true;
        if (f.wire != 0)
            continue;
        if (f.number == 3)
            out->model = (tm_sp_model)(f.value & 0xFF);
        else if (f.number == 24)
            out->space_as_suffix = f.value != 0;
        else if (f.number == 35)
            out->byte_fallback = f.value != 0;
        else if (f.number == 41)
            out->bos_id = (int32_t)(int64_t)f.value;
        else if (f.number == 42)
            out->eos_id = (int32_t)(int64_t)f.value;
    }
    return false;
}

static bool read_normalizer(reader r, tm_sp_file *out)
{
    field f;
    bool more;
    while (next_field(&r, &f, &more)) {
        if (!more)
            return true;
        if (f.number == 2 && f.wire == 2) {
            out->charsmap = (const char *)f.bytes.at;
            out->charsmap_len = (size_t)(f.bytes.end - f.bytes.at);
        } else if (f.number == 3 && f.wire == 0) {
            out->add_dummy_prefix = f.value != 0;
        } else if (f.number == 4 && f.wire == 0) {
            out->remove_extra_spaces = f.value != 0;
        } else if (f.number == 5 && f.wire == 0) {
            out->escape_spaces = f.value != 0;
        }
    }
    return false;
}

static tm_status add_piece(tm_sp_file *out, size_t *cap, reader bytes, tm_err *err)
{
    if (out->count == *cap) {
        size_t n = *cap ? *cap * 2 : 4096;
        tm_sp_piece *v = n <= TM_VOCAB_IDS_MAX ? realloc(out->pieces, n * sizeof(*v)) : NULL;
        if (!v)
            return TM_FAIL(err, TM_STATUS_TOO_LARGE, "more than %zu pieces", *cap);
        out->pieces = v;
        *cap = n;
    }
    tm_sp_piece *p = &out->pieces[out->count];
    if (!read_piece(bytes, p))
        return TM_FAIL(err, TM_STATUS_DATA, "piece %zu is not a protobuf message", out->count);
    if (p->len == 0 || p->type < TM_SP_NORMAL || p->type > TM_SP_BYTE)
        return TM_FAIL(err, TM_STATUS_DATA, "piece %zu is empty or of the unknown type %d",
                       out->count, (int)p->type);
    if (!(p->score >= -1e30f && p->score <= 1e30f))
        return TM_FAIL(err, TM_STATUS_DATA, "piece %zu has no finite score", out->count);
    out->count++;
    return TM_OK;
}

static tm_status read_model(tm_sp_file *out, reader r, tm_err *err)
{
    const unsigned char *begin = r.at;
    size_t cap = 0;
    field f;
    bool more, good = true;
    while (good && next_field(&r, &f, &more)) {
        if (!more)
            return TM_OK;
        if (f.wire != 2)
            continue;
        if (f.number == 1)
            TM_TRY(add_piece(out, &cap, f.bytes, err));
        else if (f.number == 2)
            good = read_trainer(f.bytes, out);
        else if (f.number == 3)
            good = read_normalizer(f.bytes, out);
    }
    const char *disguise = tm_file_disguise(begin, (size_t)(r.end - begin));
    if (disguise)
        return TM_FAIL(err, TM_STATUS_DATA, "not a SentencePiece model: %s", disguise);
    return TM_FAIL(err, TM_STATUS_DATA, "not a SentencePiece model: bad protobuf near byte %zu",
                   (size_t)(r.at - begin));
}

tm_status tm_sp_file_read(tm_sp_file *out, const char *data, size_t len, tm_err *err)
{
    tm_sp_file f = {.model = TM_SP_UNIGRAM,
                    .bos_id = 1,
                    .eos_id = 2,
                    .add_dummy_prefix = true,
                    .remove_extra_spaces = true,
                    .escape_spaces = true};
    const unsigned char *p = (const unsigned char *)data;
    tm_status st = read_model(&f, (reader){p, p + len}, err);
    if (st == TM_OK && f.count == 0)
        st = TM_FAIL(err, TM_STATUS_DATA, "not a SentencePiece model: it has no pieces");
    if (st != TM_OK) {
        tm_sp_file_deinit(&f);
        return st;
    }
    *out = f;
    return TM_OK;
}

void tm_sp_file_deinit(tm_sp_file *f)
{
    free(f->pieces);
    f->pieces = NULL;
}
