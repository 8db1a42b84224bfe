/* The text files of a model folder in memory. */
#ifndef TM_TEXT_TOK_FILES_H
#define TM_TEXT_TOK_FILES_H

#include "text/tokenizer.h"

#define TM_TEXT_FILES_MAX 16
/* A second template, for conversations with tools. */
#define TM_TEXT_TOOLS_FILE "additional_chat_templates/tool_use.jinja"

typedef struct tm_text_files {
    tm_text_file v[TM_TEXT_FILES_MAX];
    int count;
} tm_text_files;

/* Files that do not exist are left out. */
tm_status tm_text_files_load(tm_text_files *out, const char *dir, tm_err *err);
void tm_text_files_deinit(tm_text_files *f);

#endif
