/* What the tests of tools share: a template with a place for them, and requests. */
#ifndef TM_TESTS_ROUTER_API_TOOLS_H
#define TM_TESTS_ROUTER_API_TOOLS_H

#include "tests/router/api_harness.h"

#define CHAT "/v1/chat/completions"

/* Writes tools, calls and results, and opens reasoning when asked; its marks are those of Qwen. */
static const char template_text[] =
    "{# </think> #}{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% "
    "endfor "
    "%}{{ 'Call with <tool_call>.' }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ "
    "m.role }}\n{% if m.content is not none %}{{ m.content }}{% endif %}{% for c in m.tool_calls "
    "or [] "
    "%}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}<|im_end|>\n{% "
    "endfor "
    "%}{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% "
    "endif "
    "%}{% endif %}";

#define WEATHER                                                                                    \
    "{\"type\":\"function\",\"function\":{\"name\":\"weather\",\"description\":\"d\","             \
    "\"parameters\":{\"type\":\"object\",\"properties\":{\"city\":{\"type\":\"string\"}}}}}"
#define NOW        "{\"type\":\"function\",\"function\":{\"name\":\"now\"}}"
#define TOOLS      "\"tools\":[" WEATHER "," NOW "]"
#define ASK        "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]"
#define BODY(more) "{\"model\":\"demo\"," ASK "," more "}"
#define CALL(name, args)                                                                           \
    "<tool_call>\n{\"name\": \"" name "\", \"arguments\": " args "}\n</tool_call>"
#define PARIS "{\"city\": \"Paris\"}"

#endif
