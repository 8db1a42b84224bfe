/* The rows: how families write tool calls and reasoning, and which row a model needs.
 *
 * Names are LMDeploy's where it has one, else vLLM's. Detection goes from the particular to the general: the
 * first row whose marks the template writes is taken. */
#include <string.h>

#include "common/check.h"
#include "text/parse/machine.h"

#define DS(name) "<｜tool▁" name "｜>"

static const tm_tool_parser tools[] = {
    {.name = "deepseek-v3",
     .aliases = {"deepseek_v3", "deepseek-r1", "deepseek"},
     .syntax = &tm_syntax_named,
     .open = {DS("calls▁begin"), DS("call▁begin")},
     .close = DS("calls▁end"),
     .call_open = DS("call▁begin"),
     .sep = DS("sep"),
     .gap = "```json",
     .call_close = DS("call▁end"),
     .typed = true,
     .force = DS("calls▁begin") DS("call▁begin") "function" DS("sep"),
     .force_name = "\n```json\n",
     .keep = {DS("calls▁begin"), DS("call▁begin"), DS("sep"), DS("call▁end"), DS("calls▁end")},
     .with = {DS("calls▁begin"), "```json"}},
    {.name = "deepseek-v31",
     .aliases = {"deepseek-v3.1", "deepseek_v31"},
     .syntax = &tm_syntax_named,
     .open = {DS("calls▁begin"), DS("call▁begin")},
     .close = DS("calls▁end"),
     .call_open = DS("call▁begin"),
     .sep = DS("sep"),
     .call_close = DS("call▁end"),
     .force = DS("calls▁begin") DS("call▁begin"),
     .force_name = DS("sep"),
     .keep = {DS("calls▁begin"), DS("call▁begin"), DS("sep"), DS("call▁end"), DS("calls▁end")},
     .with = {DS("calls▁begin")}},
    {.name = "deepseek-v32",
     .aliases = {"deepseek-v3.2", "deepseek_v32"},
     .syntax = &tm_syntax_tags,
     .open = {"<｜DSML｜function_calls>"},
     .close = "</｜DSML｜function_calls>",
     .name_open = "<｜DSML｜invoke name=\"",
     .name_close = "\">",
     .key_open = "<｜DSML｜parameter name=\"",
     .key_attr = "\" string=\"",
     .key_close = "\">",
     .value_close = "</｜DSML｜parameter>",
     .end = "</｜DSML｜invoke>",
     .force = "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"",
     .force_name = "\">\n",
     .keep = {"｜DSML｜"},
     .with = {"｜DSML｜", "function_calls>"}},
    {.name = "mistral-v11",
     .aliases = {"mistral_v11", "mistral-tekken"},
     .syntax = &tm_syntax_mistral,
     .open = {"[TOOL_CALLS]"},
     .sep = "",
     .gap = "[ARGS]",
     .short_ids = true,
     .force = "[TOOL_CALLS]",
     .force_name = "[ARGS]",
     .keep = {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"},
     .with = {"[TOOL_CALLS]", "[ARGS]"}},
    {.name = "mistral",
     .syntax = &tm_syntax_mistral,
     .open = {"[TOOL_CALLS]"},
     .sep = "",
     .gap = "[ARGS]",
     .short_ids = true,
     .force = "[TOOL_CALLS][{\"name\": \"",
     .force_name = "\", \"arguments\":",
     .keep = {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"},
     .with = {"[TOOL_CALLS]"}},
    {.name = "internlm",
     .aliases = {"internlm2", "internlm3"},
     .syntax = &tm_syntax_json,
     .open = {"<|action_start|><|plugin|>", "<|action_start|> <|plugin|>"},
     .close = "<|action_end|>",
     .force = "<|action_start|><|plugin|>\n{\"name\": \"",
     .force_name = "\", \"parameters\":",
     .keep = {"<|action_start|>", "<|plugin|>", "<|interpreter|>", "<|action_end|>"},
     .with = {"<|action_start|>"},
     .model_types = {"internlm2", "internlm3"}},
    {.name = "qwen3coder",
     .aliases = {"qwen3_coder", "qwen3-coder"},
     .syntax = &tm_syntax_tags,
     .open = {"<tool_call>", "<function="},
     .close = "</tool_call>",
     .name_open = "<function=",
     .name_close = ">",
     .key_open = "<parameter=",
     .key_close = ">",
     .value_close = "</parameter>",
     .end = "</function>",
     .text_values = true,
     .force = "<tool_call>\n<function=",
     .force_name = ">\n",
     .keep = {"<tool_call>", "</tool_call>"},
     .with = {"<tool_call>", "<function="}},
    {.name = "seed_oss",
     .aliases = {"seed-oss"},
     .syntax = &tm_syntax_tags,
     .open = {"<seed:tool_call>"},
     .close = "</seed:tool_call>",
     .name_open = "<function=",
     .name_close = ">",
     .key_open = "<parameter=",
     .key_close = ">",
     .value_close = "</parameter>",
     .end = "</function>",
     .text_values = true,
     .force = "<seed:tool_call>\n<function=",
     .force_name = ">\n",
     .keep = {"<seed:tool_call>", "</seed:tool_call>"},
     .with = {"<seed:tool_call>", "<function="}},
    {.name = "glm47",
     .aliases = {"glm45", "glm-4.5", "glm-4.7", "glm4_moe"},
     .syntax = &tm_syntax_tags,
     .open = {"<tool_call>"},
     .close = "</tool_call>",
     .key_open = "<arg_key>",
     .key_close = "</arg_key>",
     .value_open = "<arg_value>",
     .value_close = "</arg_value>",
     .end = "</tool_call>",
     .force = "<tool_call>",
     .force_name = "\n",
     .keep = {"<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>",
              "</arg_value>"},
     .with = {"<arg_key>", "<tool_call>"}},
    {.name = "granite",
     .syntax = &tm_syntax_json,
     .open = {"<|tool_call|>", "<tool_call>"},
     .array = true,
     .force = "<|tool_call|>[{\"name\": \"",
     .force_name = "\", \"arguments\":",
     .keep = {"<|tool_call|>", "<tool_call>"},
     .with = {"<|tool_call|>", "<|start_of_role|>"},
     .model_types = {"granite", "granitemoe"}},
    {.name = "hermes",
     .aliases = {"qwen", "qwen2d5", "qwen3", "intern-s1"},
     .syntax = &tm_syntax_json,
     .open = {"<tool_call>"},
     .close = "</tool_call>",
     .force = "<tool_call>\n{\"name\": \"",
     .force_name = "\", \"arguments\":",
     .keep = {"<tool_call>", "</tool_call>"},
     .with = {"<tool_call>"},
     .without = {"<|tool_call|>", "<invoke name="}},
    {.name = "llama3",
     .aliases = {"llama3_json", "llama3.1", "llama3.2"},
     .syntax = &tm_syntax_llama,
     .open = {"<|python_tag|>"},
     .bare = true,
     .semicolons = true,
     .force = "{\"name\": \"",
     .force_name = "\", \"parameters\":",
     .keep = {"<|python_tag|>"},
     .with = {"<|start_header_id|>", "\"parameters\": dictionary of argument name"}},
    {.name = "phi4",
     .aliases = {"phi4_mini_json", "phi-4-mini"},
     .syntax = &tm_syntax_json,
     .open = {"functools"},
     .array = true,
     .force = "functools[{\"name\": \"",
     .force_name = "\", \"arguments\":",
     .with = {"<|tool|>", "<|/tool|>"}},
    {.name = "react",
     .aliases = {"qwen-v1"},
     .syntax = &tm_syntax_named,
     .open = {"Action:"},
     .sep = "\n",
     .gap = "Action Input:",
     .force = "Action: ",
     .force_name = "\nAction Input:",
     .stop = "Observation:",
     .with = {"Action Input:"}},
    {.name = "glm4",
     .aliases = {"glm-4"},
     .syntax = &tm_syntax_named,
     .bare = true,
     .sep = "\n",
     .force_name = "\n",
     .with = {"[gMASK]<sop>", "<|observation|>"},
     .format = "glm4",
     .model_types = {"glm4"}},
    {.name = "chatglm3",
     .syntax = &tm_syntax_code,
     .bare = true,
     .force_name = "\n```python\ntool_call(",
     .format = "chatglm3"},
    {.name = "pythonic",
     .aliases = {"llama3-pythonic", "llama4_pythonic"},
     .syntax = &tm_syntax_python,
     .bare = true,
     .force = "[",
     .force_name = "("},
};

static const tm_reason_parser reasons[] = {
    {.name = "think",
     .aliases = {"qwen3", "qwen-qwq", "glm45", "intern-s1", "deepseek-v3", "deepseek_v3"},
     .open = "<think>",
     .close = "</think>",
     .detect = true},
    {.name = "deepseek-r1",
     .aliases = {"deepseek_r1"},
     .open = "<think>",
     .close = "</think>",
     .always = true},
    {.name = "seed_oss",
     .aliases = {"seed-oss"},
     .open = "<seed:think>",
     .close = "</seed:think>",
     .detect = true},
    {.name = "mistral", .open = "[THINK]", .close = "[/THINK]", .detect = true},
    {.name = "granite",
     .open = "Here is my thought process:",
     .close = "Here is my response:",
     .detect = true},
};

static bool has_name(const char *name, const char *own, const char *const *aliases, size_t n)
{
    bool same = strcmp(name, own) == 0;
    for (size_t i = 0; i < n && aliases[i]; i++)
        same = same || strcmp(name, aliases[i]) == 0;
    return same;
}

const tm_tool_parser *tm_tool_parser_find(const char *name)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(tools); i++)
        if (has_name(name, tools[i].name, tools[i].aliases, TM_ARRAY_LEN(tools[i].aliases)))
            return &tools[i];
    return NULL;
}

const tm_reason_parser *tm_reason_parser_find(const char *name)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(reasons); i++)
        if (has_name(name, reasons[i].name, reasons[i].aliases, TM_ARRAY_LEN(reasons[i].aliases)))
            return &reasons[i];
    return NULL;
}

static bool fits_template(const tm_tool_parser *p, const tm_template *t)
{
    bool fits = p->with[0] != NULL;
    for (int i = 0; i < 2; i++) {
        fits = fits && (!p->with[i] || tm_template_mentions(t, p->with[i]));
        fits = fits && (!p->without[i] || !tm_template_mentions(t, p->without[i]));
    }
    return fits || (p->format && strcmp(p->format, tm_template_name(t)) == 0);
}

static bool fits_type(const tm_tool_parser *p, const char *model_type)
{
    for (int i = 0; i < 3 && p->model_types[i]; i++)
        if (strcmp(p->model_types[i], model_type) == 0)
            return true;
    return false;
}

const tm_tool_parser *tm_tool_parser_detect(const tm_template *t, const char *model_type)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(tools); i++)
        if (fits_template(&tools[i], t))
            return &tools[i];
    for (size_t i = 0; model_type && i < TM_ARRAY_LEN(tools); i++)
        if (fits_type(&tools[i], model_type))
            return &tools[i];
    return NULL;
}

const tm_reason_parser *tm_reason_parser_detect(const tm_template *t)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(reasons); i++)
        if (reasons[i].detect && tm_template_mentions(t, reasons[i].close))
            return &reasons[i];
    return NULL;
}

const char *tm_tool_parser_name(const tm_tool_parser *p)
{
    return p->name;
}

const char *tm_reason_parser_name(const tm_reason_parser *p)
{
    return p->name;
}

void tm_tool_parser_list(tm_buf *out)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(tools); i++) {
        tm_buf_puts(out, i ? ", " : "");
        tm_buf_puts(out, tools[i].name);
    }
}

void tm_reason_parser_list(tm_buf *out)
{
    for (size_t i = 0; i < TM_ARRAY_LEN(reasons); i++) {
        tm_buf_puts(out, i ? ", " : "");
        tm_buf_puts(out, reasons[i].name);
    }
}

bool tm_tool_parser_short_ids(const tm_tool_parser *p)
{
    return p->short_ids;
}

const char *tm_tool_parser_stop(const tm_tool_parser *p)
{
    return p->stop;
}

/* ---- special tokens ------------------------------------------------------------------------------------- */

static void keep_token(const tm_tokenizer *t, const char *text, int32_t *keep, int *count)
{
    int32_t id = text ? tm_tokenizer_id(t, text, strlen(text)) : -1;
    if (id >= 0 && tm_tokenizer_is_special(t, id) && *count < TM_PARSE_KEEP_MAX)
        keep[(*count)++] = id;
}

int tm_parse_keep(const tm_tool_parser *parser, const tm_reason_parser *reason,
                  const tm_tokenizer *t, int32_t *keep)
{
    int count = 0;
    for (size_t i = 0; parser && i < TM_ARRAY_LEN(parser->keep); i++)
        keep_token(t, parser->keep[i], keep, &count);
    keep_token(t, reason ? reason->open : NULL, keep, &count);
    keep_token(t, reason ? reason->close : NULL, keep, &count);
    return count;
}

/* ---- prompts -------------------------------------------------------------------------------------------- */

bool tm_tool_parser_begin(const tm_tool_parser *p, const char *name, tm_buf *out)
{
    if (!name && !p->force)
        return false;
    tm_buf_puts(out, p->force ? p->force : "");
    if (name) {
        tm_buf_puts(out, name);
        tm_buf_puts(out, p->force_name);
    }
    return true;
}

bool tm_reason_parser_inside(const tm_reason_parser *p, const char *prompt, size_t len)
{
    while (len > 0 && tm_parse_is_white(prompt[len - 1]))
        len--;
    return tm_parse_ends(prompt, len, p->open) ||
           (p->always && !tm_parse_ends(prompt, len, p->close));
}

bool tm_reason_parser_open(const tm_reason_parser *p, const char *text, size_t len)
{
    const char *open = memmem(text, len, p->open, strlen(p->open));
    const char *from = open ? open : p->always ? text : NULL;
    return from && !memmem(from, len - (size_t)(from - text), p->close, strlen(p->close));
}

const char *tm_reason_parser_close(const tm_reason_parser *p)
{
    return p->close;
}
