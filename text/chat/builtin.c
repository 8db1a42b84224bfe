/* The formats that have names. The strings are LMDeploy's, so that its --chat-template names give the same
 * prompts. */
#include <string.h>

#include "common/check.h"
#include "text/chat/chat.h"

#define CHATML                                                                                     \
    .system = "<|im_start|>system\n", .eosys = "<|im_end|>\n", .user = "<|im_start|>user\n",       \
    .eoh = "<|im_end|>\n", .assistant = "<|im_start|>assistant\n", .eoa = "<|im_end|>",            \
    .separator = "\n", .tool = "<|im_start|>tool\n", .eotool = "<|im_end|>\n"

static const tm_chat_format formats[] = {
    {.name = "chatml", CHATML},
};

const tm_chat_format *tm_chat_builtin_find(const char *name)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(formats); i++)
        if (strcmp(formats[i].name, name) == 0)
            return &formats[i];
    return NULL;
}

void tm_chat_builtin_list(tm_buf *out)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(formats); i++) {
        tm_buf_puts(out, i ? ", " : "");
        tm_buf_puts(out, formats[i].name);
    }
}
