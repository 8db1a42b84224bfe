/* SentencePiece's tokenizer.model: the protobuf message, read without a protobuf library. */
#ifndef TM_TEXT_TOK_SPFILE_H
#define TM_TEXT_TOK_SPFILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

typedef enum tm_sp_type {
    TM_SP_NORMAL = 1,
    TM_SP_UNKNOWN,
    TM_SP_CONTROL,
    TM_SP_USER_DEFINED,
    TM_SP_UNUSED,
    TM_SP_BYTE
} tm_sp_type;

typedef enum tm_sp_model { TM_SP_UNIGRAM = 1, TM_SP_BPE, TM_SP_WORD, TM_SP_CHAR } tm_sp_model;

typedef struct tm_sp_piece {
    const char *text; /* in the file */
    uint32_t len;
    float score;
    tm_sp_type type;
} tm_sp_piece;

/* Valid as long as the file's bytes. */
typedef struct tm_sp_file {
    tm_sp_piece *pieces;
    size_t count;
    tm_sp_model model;
    bool byte_fallback, space_as_suffix;
    int32_t bos_id, eos_id; /* -1 = none */
    bool add_dummy_prefix, remove_extra_spaces, escape_spaces;
    const char *charsmap;
    size_t charsmap_len;
} tm_sp_file;

tm_status tm_sp_file_read(tm_sp_file *out, const char *data, size_t len, tm_err *err);
void tm_sp_file_deinit(tm_sp_file *f);

#endif
