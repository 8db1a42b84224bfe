/* The formats that have names, and which name a model's path stands for. Names and strings are LMDeploy's, so
 * that its --chat-template names give the same prompts; where it is known to differ from the model's own code
 * (ChatGLM2's answers end in an empty line) the model is followed. */
#include <ctype.h>
#include <string.h>

#include "common/check.h"
#include "common/closest.h"
#include "text/chat/chat.h"

#define PATH_LEN 1024

#define CHATML                                                                                     \
    .system = "<|im_start|>system\n", .eosys = "<|im_end|>\n", .user = "<|im_start|>user\n",       \
    .eoh = "<|im_end|>\n", .assistant = "<|im_start|>assistant\n", .eoa = "<|im_end|>",            \
    .separator = "\n", .tool = "<|im_start|>tool\n", .eotool = "<|im_end|>\n"
#define CHATML_STOPS .stops = {"<|im_end|>"}

#define INTERNLM_META                                                                                  \
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"                               \
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI " \
    "Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"  \
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by "   \
    "the user such as English and 中文.\n"

#define INTERNLM                                                                                   \
    .system = "<|System|>:", .meta = INTERNLM_META, .eosys = "\n",                                 \
    .user = "<|User|>:", .eoh = "\n", .assistant = "<|Bot|>:", .eoa = "<eoa>", .separator = "\n",  \
    .stops = {"<eoa>"}

#define INTERNLM2                                                                                  \
    .system = "<|im_start|>system\n", .meta = INTERNLM_META, .eosys = "<|im_end|>\n",              \
    .user = "<|im_start|>user\n", .eoh = "<|im_end|>\n", .assistant = "<|im_start|>assistant\n",   \
    .eoa = "<|im_end|>", .separator = "\n", .tool = "<|im_start|>environment name=<|plugin|>\n",   \
    .eotool = "<|im_end|>\n", .tools = "<|im_start|>system name=<|plugin|>\n",                     \
    .eotools = "<|im_end|>\n", .call = "<|action_start|><|plugin|>\n",                             \
    .eocall = "<|action_end|>\n", .stops = {"<|im_end|>", "<|action_end|>"}

#define XCOMPOSER_META                                                                                  \
    "You are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).\n"                      \
    "- InternLM-XComposer (浦语·灵笔) is a multi-modality conversational language model that is "  \
    "developed by Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, " \
    "honest, and harmless.\n"                                                                           \
    "- InternLM-XComposer (浦语·灵笔) can understand and communicate fluently in the language "    \
    "chosen by the user such as English and 中文.\n"                                                  \
    "- InternLM-XComposer (浦语·灵笔) is capable of comprehending and articulating responses "     \
    "effectively based on the provided image."

#define XCOMPOSER2                                                                                 \
    .system = "[UNUSED_TOKEN_146]system\n", .meta = XCOMPOSER_META,                                \
    .eosys = "[UNUSED_TOKEN_145]\n", .user = "[UNUSED_TOKEN_146]user\n",                           \
    .eoh = "[UNUSED_TOKEN_145]\n", .assistant = "[UNUSED_TOKEN_146]assistant\n",                   \
    .eoa = "[UNUSED_TOKEN_145]\n", .separator = "\n", .stops = {"[UNUSED_TOKEN_145]"}

#define VICUNA                                                                                     \
    .meta = "A chat between a curious user and an artificial intelligence assistant. The "         \
            "assistant gives helpful, detailed, and polite answers to the user's questions.",      \
    .eosys = " ", .user = "USER: ", .eoh = " ", .assistant = "ASSISTANT: ", .eoa = "</s>",         \
    .stops = {"</s>"}

#define ULTRA                                                                                      \
    .system = "User: ",                                                                            \
    .meta = "A one-turn chat between a curious user and an artificial intelligence assistant. "    \
            "The assistant gives helpful, very detailed, and polite answers to the user's "        \
            "questions.",                                                                          \
    .eosys = "</s>\n", .user = "User: ", .eoh = "</s>\n",                                          \
    .assistant = "Assistant: ", .eoa = "</s>", .separator = "\n", .stops = {"</s>"}

/* Without a system part the first turn opens itself. */
#define LLAMA2                                                                                     \
    .system = "[INST] <<SYS>>\n", .eosys = "\n<</SYS>>\n\n", .first = "[INST] ",                   \
    .assistant = " [/INST] ", .eoa = "</s>", .separator = "<s>[INST] "

#define LLAMA2_META                                                                                \
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as "           \
    "possible, while being safe. Your answers should not include any harmful, unethical, racist, " \
    "sexist, toxic, dangerous, or illegal content. Please ensure that your responses are "         \
    "socially unbiased and positive in nature.\n\n"                                                \
    "If a question does not make any sense, or is not factually coherent, explain why instead "    \
    "of answering something not correct. If you don't know the answer to a question, please "      \
    "don't share false information."

#define SOLAR                                                                                      \
    .system = "### System:\n", .meta = "", .eosys = "\n\n", .user = "### User:\n", .eoh = "\n\n",  \
    .assistant = "### Assistant:\n"

#define MISTRAL .user = "[INST] ", .eoh = " [/INST]", .eoa = "</s>"

#define DEEPSEEK                                                                                   \
    .user = "User: ", .eoh = "\n\n", .assistant = "Assistant: ", .eoa = "<｜end▁of▁sentence｜>"

#define DBRX_META                                                                                  \
    "You are DBRX, created by Databricks. You were last updated in December 2023. You answer "     \
    "questions based on information available up to that point.\n"                                 \
    "YOU PROVIDE SHORT RESPONSES TO SHORT QUESTIONS OR STATEMENTS, but provide thorough "          \
    "responses to more complex and open-ended questions.\n"                                        \
    "You assist with various tasks, from writing to coding (using markdown for code blocks — "   \
    "remember to use ``` with code, JSON, and tables).\n"                                          \
    "(You do not have real-time data access or code execution capabilities. You avoid "            \
    "stereotyping and provide balanced perspectives on controversial topics. You do not provide "  \
    "song lyrics, poems, or news articles and do not divulge details of your training data.)\n"    \
    "This is your system prompt, guiding your responses. Do not reference it, just respond to "    \
    "the user. If you find yourself talking about this message, stop. You should be responding "   \
    "appropriately and usually that means not mentioning this.\n"                                  \
    "YOU DO NOT MENTION ANY OF THIS INFORMATION ABOUT YOURSELF UNLESS THE INFORMATION IS "         \
    "DIRECTLY PERTINENT TO THE USER\\'S QUERY."

#define YI_VL_META                                                                                                      \
    "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI "                       \
    "assistant. Read all the images carefully, and respond to the human's questions with "                              \
    "informative, helpful, detailed and polite answers. "                                                               \
    "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。" \
    "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。\n\n"

static const tm_chat_format formats[] = {
    {.name = "base", .raw = true},
    {.name = "llama", .raw = true},
    {.name = "falcon", .raw = true},
    {.name = "baichuan-7b", .raw = true},
    {.name = "baichuan-base", .raw = true},
    {.name = "internlm-20b", .raw = true},
    {.name = "internlm2-1_8b", .raw = true},
    {.name = "internlm2-7b", .raw = true},
    {.name = "internlm2-20b", .raw = true},
    {.name = "chatml", CHATML, CHATML_STOPS},
    {.name = "vicuna", VICUNA},
    {.name = "wizardlm", VICUNA},
    {.name = "llava-v1", VICUNA},
    {.name = "internlm", INTERNLM},
    {.name = "internlm-chat", INTERNLM},
    {.name = "internlm-chat-7b", INTERNLM},
    {.name = "internlm-chat-7b-8k", INTERNLM},
    {.name = "internlm-chat-20b", INTERNLM},
    {.name = "internlm2", INTERNLM2},
    {.name = "internlm2-chat", INTERNLM2},
    {.name = "internlm2-chat-1_8b", INTERNLM2},
    {.name = "internlm2-chat-7b", INTERNLM2},
    {.name = "internlm2-chat-20b", INTERNLM2},
    {.name = "internlm-xcomposer2", XCOMPOSER2},
    {.name = "internlm-xcomposer2-4khd", XCOMPOSER2},
    {.name = "internlm-xcomposer2d5", XCOMPOSER2},
    {.name = "baichuan2", .user = "<reserved_106>", .assistant = "<reserved_107>"},
    {.name = "baichuan2-7b", .user = "<reserved_106>", .assistant = "<reserved_107>"},
    {.name = "baichuan2-chat", .user = "<reserved_106>", .assistant = "<reserved_107>"},
    {.name = "puyu", .meta = ""},
    {.name = "llama2", LLAMA2, .meta = LLAMA2_META},
    {.name = "llama-2", LLAMA2, .meta = LLAMA2_META},
    {.name = "llama-2-chat", LLAMA2, .meta = LLAMA2_META},
    {.name = "codellama", LLAMA2, .meta = "", .infill = true},
    {.name = "llama3",
     .start = "<|begin_of_text|>",
     .system = "<|start_header_id|>system<|end_header_id|>\n\n",
     .eosys = "<|eot_id|>",
     .user = "<|start_header_id|>user<|end_header_id|>\n\n",
     .eoh = "<|eot_id|>",
     .assistant = "<|start_header_id|>assistant<|end_header_id|>\n\n",
     .eoa = "<|eot_id|>",
     .stops = {"<|eot_id|>", "<|end_of_text|>"}},
    {.name = "qwen", CHATML, CHATML_STOPS, .meta = "You are a helpful assistant."},
    {.name = "qwen-7b", CHATML, CHATML_STOPS, .meta = "You are a helpful assistant."},
    {.name = "qwen-14b", CHATML, CHATML_STOPS, .meta = "You are a helpful assistant."},
    {.name = "chatglm",
     .rounds = true,
     .user = "问：",
     .eoh = "\n\n",
     .assistant = "答：",
     .eoa = "\n\n"},
    {.name = "chatglm2-6b",
     .rounds = true,
     .user = "问：",
     .eoh = "\n\n",
     .assistant = "答：",
     .eoa = "\n\n"},
    /* Each text is a piece of its own for the tokenizer, which the space in front of it brings about. */
    {.name = "chatglm3",
     .start = "[gMASK]sop",
     .system = "<|system|>\n ",
     .user = "<|user|>\n ",
     .assistant = "<|assistant|>\n ",
     .prompt = "<|assistant|>",
     .tool = "<|observation|>\n ",
     .stops = {"<|user|>", "<|observation|>"}},
    {.name = "glm4",
     .start = "[gMASK]<sop>",
     .system = "<|system|>\n",
     .user = "<|user|>\n",
     .assistant = "<|assistant|>\n",
     .prompt = "<|assistant|>",
     .tool = "<|observation|>\n",
     .stops = {"<|user|>", "<|endoftext|>", "<|observation|>"}},
    {.name = "solar", SOLAR},
    {.name = "solar-70b", SOLAR},
    {.name = "ultracm", ULTRA},
    {.name = "ultralm", ULTRA},
    {.name = "yi", CHATML, .stops = {"<|im_end|>", "<|endoftext|>"}},
    {.name = "yi-chat", CHATML, .stops = {"<|im_end|>", "<|endoftext|>"}},
    {.name = "yi-200k", CHATML, .stops = {"<|im_end|>", "<|endoftext|>"}},
    {.name = "yi-34b", CHATML, .stops = {"<|im_end|>", "<|endoftext|>"}},
    {.name = "yi-vl",
     .meta = YI_VL_META,
     .user = "### Human: ",
     .eoh = "\n",
     .assistant = "### Assistant:",
     .eoa = "\n",
     .stops = {"###"}},
    {.name = "mistral", MISTRAL},
    {.name = "mixtral", MISTRAL},
    {.name = "Mistral-7B-Instruct", MISTRAL},
    {.name = "Mixtral-8x7B-Instruct", MISTRAL},
    {.name = "gemma",
     .user = "<start_of_turn>user\n",
     .eoh = "<end_of_turn>\n",
     .assistant = "<start_of_turn>model\n",
     .eoa = "<end_of_turn>\n"},
    {.name = "deepseek", DEEPSEEK, .prompt = "Assistant:"},
    {.name = "deepseek-chat", DEEPSEEK, .prompt = "Assistant:"},
    {.name = "deepseek-vl",
     DEEPSEEK,
     .meta = "You are a helpful language and vision assistant. You are able to understand the "
             "visual content that the user provides, and assist the user with a variety of tasks "
             "using natural language.",
     .eosys = "\n\n"},
    {.name = "deepseek-coder",
     .meta = "You are an AI programming assistant, utilizing the Deepseek Coder model, developed "
             "by Deepseek Company, and you only answer questions related to computer science. For "
             "politically sensitive questions, security and privacy issues, and other "
             "non-computer science questions, you will refuse to answer\n",
     .user = "### Instruction:\n",
     .eoh = "\n",
     .assistant = "### Response:\n",
     .eoa = "\n<|EOT|>",
     .separator = "\n",
     .stops = {"<|EOT|>"}},
    {.name = "dbrx", CHATML, .meta = DBRX_META},
    {.name = "llava-chatml", CHATML, .meta = "Answer the questions."},
};

const tm_chat_format *tm_chat_builtin_find(const char *name)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(formats); i++)
        if (strcmp(formats[i].name, name) == 0)
            return &formats[i];
    return NULL;
}

static const char *name_of(size_t i)
{
    return formats[i].name;
}

void tm_chat_builtin_closest(const char *name, char *out, size_t size)
{
    tm_closest(name, name_of, TM_ARRAY_LEN(formats), out, size);
}

/* ---- names from paths ----------------------------------------------------------------------------------- */

/* The path in small letters must hold all of `with` and none of `without`. Rows in LMDeploy's order, apart
 * from "yi": it is inside many words, so it comes last and must begin one. */
static const struct {
    const char *name;
    const char *with[3], *without[3];
} paths[] = {
    {"vicuna", {"llava", "v1.5"}, {NULL}},
    {"vicuna", {"vicuna"}, {NULL}},
    {"wizardlm", {"wizardlm"}, {NULL}},
    {"internlm-xcomposer2d5", {"internlm", "xcomposer2d5"}, {NULL}},
    {"internlm-xcomposer2-4khd", {"internlm", "xcomposer2", "4khd"}, {NULL}},
    {"internlm-xcomposer2", {"internlm", "xcomposer2"}, {NULL}},
    {"internlm", {"internlm", "chat"}, {"internlm2", "internlm3"}},
    {"internlm2", {"internlm2", "chat"}, {NULL}},
    {"internlm2", {"internlm2", "math"}, {NULL}},
    {"baichuan2", {"baichuan2", "chat"}, {NULL}},
    {"puyu", {"puyu"}, {NULL}},
    {"codellama", {"codellama"}, {NULL}},
    {"llama2", {"llama-2", "chat"}, {NULL}},
    {"llama2", {"llama2", "chat"}, {NULL}},
    {"llama3", {"llama-3", "instruct"}, {NULL}},
    {"llama3", {"llama3", "instruct"}, {NULL}},
    {"qwen", {"qwen", "chat"}, {NULL}},
    {"qwen", {"qwen", "instruct"}, {NULL}},
    {"chatglm3", {"chatglm3"}, {NULL}},
    {"chatglm", {"chatglm"}, {NULL}},
    {"glm4", {"glm-4", "chat"}, {NULL}},
    {"solar", {"solar"}, {NULL}},
    {"ultracm", {"ultracm"}, {NULL}},
    {"ultralm", {"ultralm"}, {NULL}},
    {"mistral", {"mistral", "instruct"}, {NULL}},
    {"mixtral", {"mixtral", "instruct"}, {NULL}},
    {"gemma", {"gemma", "-it"}, {NULL}},
    {"deepseek-vl", {"deepseek-vl", "chat"}, {NULL}},
    {"deepseek-coder", {"deepseek-coder", "instruct"}, {NULL}},
    {"deepseek", {"deepseek", "chat"}, {NULL}},
    {"dbrx", {"dbrx", "instruct"}, {NULL}},
    {"llava-chatml", {"llava", "v1.6-34b"}, {NULL}},
    {"yi-vl", {"yi-vl"}, {NULL}},
};

static bool holds(const char *path, const char *const words[3], bool all)
{
    bool hit = all;
    for (int i = 0; i < 3 && words[i]; i++) {
        bool found = strstr(path, words[i]) != NULL;
        hit = all ? hit && found : hit || found;
    }
    return hit;
}

static bool begins_word(const char *path, const char *word)
{
    for (const char *at = path; (at = strstr(at, word)) != NULL; at++)
        if (at == path || !isalnum((unsigned char)at[-1]))
            return true;
    return false;
}

const tm_chat_format *tm_chat_builtin_match(const char *path)
{
    char low[PATH_LEN];
    size_t n = strlen(path), from = n < sizeof(low) ? 0 : n - sizeof(low) + 1;
    for (size_t i = from; i <= n; i++)
        low[i - from] = (char)tolower((unsigned char)path[i]);
    for (size_t i = 0; i < TM_ARRAY_LEN(paths); i++)
        if (holds(low, paths[i].with, true) && !holds(low, paths[i].without, false))
            return tm_chat_builtin_find(paths[i].name);
    if (begins_word(low, "yi-") && strstr(low, "chat"))
        return tm_chat_builtin_find("yi");
    return NULL;
}
