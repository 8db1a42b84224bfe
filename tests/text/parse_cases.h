/* What models write, and what it means: one row per case, played in every cut by parse_test.c and seeds of the
 * fuzz target. The form of `expect` is described there. */
#ifndef TM_TESTS_TEXT_PARSE_CASES_H
#define TM_TESTS_TEXT_PARSE_CASES_H

#include <stdbool.h>

typedef struct parse_case {
    const char *tools, *reason; /* names of parsers; NULL = none */
    const char *text, *expect;
    bool cut, inside, known_only;
    int calls_max;
} parse_case;

#define DSM(name) "<｜tool▁" name "｜>"
#define DS_OPEN   DSM("calls▁begin")
#define DS_CALL   DSM("call▁begin")
#define DS_SEP    DSM("sep")
#define DS_END    DSM("call▁end")
#define DS_CLOSE  DSM("calls▁end")
#define PARIS     "{\"city\": \"Paris\"}"
#define OSLO      "{\"city\":\"Osl\\u00f8\",\"days\":[1,2.5e3,{}]}"

#define CASE(tools_, reason_, text_, expect_, ...)                                                 \
    {                                                                                              \
        .tools = tools_, .reason = reason_, .text = text_, .expect = expect_, __VA_ARGS__          \
    }

static const parse_case parse_cases[] = {
    /* hermes: plain, text around, two calls, order of keys, no arguments */
    CASE("hermes", NULL, "Just text <b> & <tool.", "C(Just text <b> & <tool.)"),
    CASE("hermes", NULL,
         "<tool_call>\n{\"name\": \"weather\", \"arguments\": " PARIS "}\n</tool_call>",
         "0:weather" PARIS "!"),
    CASE("hermes", NULL,
         "Let me look.\n\n<tool_call>\n{\"name\": \"weather\", \"arguments\": " PARIS
         "}\n</tool_call>\n<tool_call>\n{\"name\":\"weather\",\"arguments\":" OSLO
         "}\n</tool_call>\n",
         "C(Let me look.)0:weather" PARIS "!1:weather" OSLO "!"),
    CASE("hermes", NULL,
         "<tool_call>{\"arguments\": " PARIS ", \"name\": \"weather\"}</tool_call> Done.",
         "0:weather" PARIS "!C( Done.)"),
    CASE("hermes", NULL, "<tool_call>{\"name\": \"now\"}</tool_call>", "0:now{}!"),
    CASE("hermes", NULL, "<tool_call>{\"name\": \"now\", \"arguments\": null}</tool_call>",
         "0:now{}!"),
    CASE("hermes", NULL,
         "<tool_call>{\"name\": \"weather\", \"arguments\": \"{\\\"city\\\": "
         "\\\"Paris\\\"}\"}</tool_call>",
         "0:weather" PARIS "!"),
    CASE("hermes", NULL,
         "<tool_call>{\"id\": 7, \"name\": \"now\", \"arguments\": {}, \"x\": [1]}</tool_call>",
         "0:now{}!"),
    CASE("hermes", NULL, "<tool_call>{\"name\": \"now\", \"parameters\": {}}", "0:now{}!"),
    CASE("hermes", NULL, "<tool_call>{\"name\": \"now\", \"arguments\": {}}\n</tool_c", "0:now{}!"),
    CASE("hermes", NULL,
         "<tool_call>{\"name\":\"now\"}{\"name\":\"weather\",\"arguments\":{}}</tool_call>",
         "0:now{}!1:weather{}!"),
    CASE("hermes", NULL,
         "<tool_call>[{\"name\":\"now\"}, {\"name\":\"weather\",\"arguments\":{}}]</tool_call>",
         "0:now{}!1:weather{}!"),
    CASE("hermes", NULL, "<tool_call>{\"name\":\"now\"}\n<tool_call>{\"name\":\"now\"}</tool_call>",
         "0:now{}!1:now{}!"),
    CASE("hermes", NULL, "<tool_call>{\"name\":\"now\"}</tool_call>\n\nText\n",
         "0:now{}!C(\n\nText\n)"),
    CASE("hermes", NULL, "<tool_call>{\"name\":\"unknown_fn\"}</tool_call>", "0:unknown_fn{}!"),
    /* hermes: malformed */
    CASE("hermes", NULL, "<tool_call>oops</tool_call>", "C(<tool_call>oops</tool_call>)"),
    CASE("hermes", NULL, "<tool_call>\n<tool_call>{\"name\":\"now\"}</tool_call>",
         "C(<tool_call>\n)0:now{}!"),
    CASE("hermes", NULL, "a <tool_call>{\"name\": 3}</tool_call>",
         "C(a <tool_call>{\"name\": 3}</tool_call>)"),
    CASE("hermes", NULL, "<tool_call>{\"name\": \"now\", \"arguments\": [1]}</tool_call>",
         "C(<tool_call>{\"name\": \"now\", \"arguments\": [1]}</tool_call>)"),
    CASE("hermes", NULL, "<tool_call>{\"name\": \"now\", \"arguments\": {\"a\": 01}}</tool_call>",
         "0:now{\"a\": 0x0C(<tool_call>{\"name\": \"now\", \"arguments\": {\"a\": "
         "01}}</tool_call>)"),
    CASE("hermes", NULL, "<tool_call>{\"arguments\": {}}</tool_call>",
         "C(<tool_call>{\"arguments\": {}}</tool_call>)"),
    CASE("hermes", NULL, "<tool_call>{\"name\": \"now\", \"arguments\": \"no\"}</tool_call>",
         "C(<tool_call>{\"name\": \"now\", \"arguments\": \"no\"}</tool_call>)"),
    CASE("hermes", NULL, "<tool_call>{\"name\": \"now\"", "C(<tool_call>{\"name\": \"now\")"),
    CASE("hermes", NULL, "Hm <tool_ca", "C(Hm <tool_ca)"),
    CASE("hermes", NULL, "<tool_call>{\"name\": \"other\"}</tool_call>",
         "C(<tool_call>{\"name\": \"other\"}</tool_call>)", .known_only = true),
    /* the end in the middle of arguments: cut by a limit, or given up by the model */
    CASE("hermes", NULL, "x <tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Pa",
         "C(x)0:weather{\"city\": \"Pa", .cut = true),
    CASE("hermes", NULL, "x <tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Pa",
         "C(x)0:weather{\"city\": \"Pax0C( <tool_call>{\"name\": \"weather\", \"arguments\": "
         "{\"city\": "
         "\"Pa)"),
    CASE("hermes", NULL, "<tool_call>{\"name\": \"weat", "C(<tool_call>{\"name\": \"weat)",
         .cut = true),
    CASE("hermes", NULL, "<tool_call>{\"name\":\"now\"}</tool_call><tool_call>{\"name\":\"now\"}",
         "0:now{}!", .calls_max = 1),
    /* internlm */
    CASE("internlm", NULL,
         "I see.\n<|action_start|><|plugin|>\n{\"name\": \"weather\", \"parameters\": " PARIS
         "}<|action_end|>",
         "C(I see.)0:weather" PARIS "!"),
    CASE("internlm", NULL, "<|action_start|> <|plugin|>{\"name\":\"now\",\"parameters\":{}}",
         "0:now{}!"),
    CASE("internlm", NULL, "<|action_start|><|interpreter|>\nprint(1)<|action_end|>",
         "C(<|action_start|><|interpreter|>\nprint(1)<|action_end|>)"),
    /* llama3 */
    CASE("llama3", NULL, "{\"name\": \"weather\", \"parameters\": " PARIS "}",
         "0:weather" PARIS "!"),
    CASE(
        "llama3", NULL,
        " {\"type\": \"function\", \"name\": \"now\", \"parameters\": {}}; {\"name\": \"weather\", "
        "\"parameters\": " PARIS "}\n{\"name\": \"now\", \"parameters\": {}}",
        "0:now{}!1:weather" PARIS "!2:now{}!"),
    CASE("llama3", NULL, "<|python_tag|>{\"name\": \"any\", \"parameters\": {}}", "0:any{}!"),
    CASE("llama3", NULL, "<|python_tag|>brave_search.call(query=\"2 + 2\", n=3)",
         "0:brave_search{\"query\": \"2 + 2\", \"n\": 3}!"),
    CASE("llama3", NULL, "<|python_tag|>import os\nprint(1)",
         "C(<|python_tag|>import os\nprint(1))"),
    CASE("llama3", NULL, "{\"name\": \"stranger\", \"parameters\": {}}",
         "C({\"name\": \"stranger\", \"parameters\": {}})"),
    CASE("llama3", NULL, "{\"answer\": {\"name\": \"now\"}}",
         "C({\"answer\": {\"name\": \"now\"}})"),
    CASE("llama3", NULL, "{\"name\": \"now\"}", "C({\"name\": \"now\"})"),
    CASE("llama3", NULL, "Use {\"name\": \"now\", \"parameters\": {}}",
         "C(Use {\"name\": \"now\", \"parameters\": {}})"),
    /* mistral, both forms */
    CASE("mistral", NULL,
         "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": " PARIS
         ", \"id\": \"abcdefghi\"}, {\"name\": \"now\", \"arguments\": {}}]",
         "0:weather" PARIS "!1:now{}!"),
    CASE("mistral", NULL, "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": " PARIS "}] ok",
         "0:weather" PARIS "!C( ok)"),
    CASE("mistral", NULL, "Hi [TOOL_CALLS]weather" PARIS, "C(Hi)0:weather" PARIS "!"),
    CASE("mistral-v11", NULL, "[TOOL_CALLS]weather[ARGS]" PARIS "[TOOL_CALLS]now[ARGS]{}",
         "0:weather" PARIS "!1:now{}!"),
    CASE("mistral-v11", NULL, "[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]" PARIS,
         "0:weather" PARIS "!"),
    CASE("mistral", NULL, "[TOOL_CALLS]weather or not", "C([TOOL_CALLS]weather or not)"),
    CASE("mistral", NULL, "[TOOL_CALLS][]", "C([TOOL_CALLS][])"),
    CASE("mistral", NULL, "[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}, oh",
         "0:now{}!C(oh)"),
    CASE("mistral", NULL, "[TOOL_C]", "C([TOOL_C])"),
    /* deepseek */
    CASE("deepseek-v3", NULL,
         "One moment." DS_OPEN DS_CALL "function" DS_SEP "weather\n```json\n" PARIS "\n```" DS_END
         "\n" DS_CALL "function" DS_SEP "now\n```json\n{}\n```" DS_END DS_CLOSE,
         "C(One moment.)0:weather" PARIS "!1:now{}!"),
    CASE("deepseek-v3", NULL, DS_CALL "function" DS_SEP "now\n```json\n{}\n```" DS_END, "0:now{}!"),
    CASE("deepseek-v3", NULL, DS_OPEN DS_CALL "function" DS_SEP "now\n```python\n",
         "C(" DS_OPEN DS_CALL "function" DS_SEP "now\n```python\n)"),
    CASE("deepseek-v3", NULL, DS_OPEN "nothing" DS_CLOSE, "C(" DS_OPEN "nothing" DS_CLOSE ")"),
    CASE("deepseek-v31", NULL,
         DS_OPEN DS_CALL "weather" DS_SEP PARIS DS_END DS_CALL "now" DS_SEP "{}" DS_END DS_CLOSE,
         "0:weather" PARIS "!1:now{}!"),
    CASE("deepseek-v31", NULL, DS_OPEN DS_CALL "weather" DS_SEP "{\"ci", "0:weather{\"ci",
         .cut = true),
    CASE("deepseek-v32", NULL,
         "Yes.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"weather\">\n"
         "<｜DSML｜parameter name=\"city\" string=\"true\">Paris</｜DSML｜parameter>\n"
         "<｜DSML｜parameter name=\"x\" string=\"false\">[1, \"a\"]</｜DSML｜parameter>\n"
         "</｜DSML｜invoke>\n<｜DSML｜invoke "
         "name=\"now\">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
         "C(Yes.)0:weather{\"city\": \"Paris\", \"x\": [1, \"a\"]}!1:now{}!"),
    CASE("deepseek-v32", NULL, "<｜DSML｜function_calls>\nnone",
         "C(<｜DSML｜function_calls>\nnone)"),
    /* glm 4 */
    CASE("glm4", NULL, "weather\n" PARIS, "0:weather" PARIS "!"),
    CASE("glm4", NULL, "\nweather\n" PARIS "\nnow\n{}", "0:weather" PARIS "!1:now{}!"),
    CASE("glm4", NULL, "weather is fine", "C(weather is fine)"),
    CASE("glm4", NULL, "weathers\n{}", "C(weathers\n{})"),
    CASE("glm4", NULL, "now\nand then", "C(now\nand then)"),
    CASE("glm4", NULL, "Hello", "C(Hello)"),
    CASE("glm47", NULL,
         "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
         "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now</"
         "tool_call>",
         "0:weather{\"city\": \"Paris\", \"days\": 3}!1:now{}!"),
    CASE("glm47", NULL,
         "<tool_call>weather<arg_key>city</arg_key><arg_value>42</arg_value></tool_call>",
         "0:weather{\"city\": \"42\"}!"),
    CASE("glm47", NULL,
         "<tool_call>weather\n<arg_key>other</arg_key>\n<arg_value>[1, "
         "\"a\"]</arg_value></tool_call>",
         "0:weather{\"other\": [1, \"a\"]}!"),
    CASE("glm47", NULL, "<tool_call>weather\nrubbish</tool_call>",
         "0:weatherx0C(<tool_call>weather\nrubbish</tool_call>)"),
    /* qwen3-coder */
    CASE("qwen3coder", NULL,
         "I write.\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\nand "
         "\"Oslo\"\n</parameter>\n"
         "<parameter=days>\n7\n</parameter>\n</function>\n</tool_call>",
         "C(I write.)0:weather{\"city\": \"Paris\\nand \\\"Oslo\\\"\", \"days\": 7}!"),
    CASE("qwen3coder", NULL,
         "<tool_call><function=now></function></tool_call><tool_call><function=now></function></"
         "tool_call>",
         "0:now{}!1:now{}!"),
    CASE("qwen3coder", NULL, "<function=weather><parameter=dry>True</parameter></function>",
         "0:weather{\"dry\": true}!"),
    CASE("qwen3coder", NULL, "<function=weather><parameter=days>many</parameter></function>",
         "0:weather{\"days\": \"many\"}!"),
    CASE("qwen3coder", NULL, "<function=weather><parameter=free>12</parameter></function>",
         "0:weather{\"free\": \"12\"}!"),
    CASE("qwen3coder", NULL, "<tool_call>\nno function</tool_call>",
         "C(<tool_call>\nno function</tool_call>)"),
    CASE("qwen3coder", NULL, "<function=weather><parameter=city>Pa", "0:weather", .cut = true),
    CASE("seed_oss", "seed_oss",
         "<seed:think>hm</seed:think><seed:tool_call>\n<function=weather>\n"
         "<parameter=city>Paris</parameter>\n</function>\n</seed:tool_call>",
         "R(hm)0:weather" PARIS "!"),
    /* granite, phi, react */
    CASE("granite", NULL, "<|tool_call|>[{\"name\": \"weather\", \"arguments\": " PARIS "}]",
         "0:weather" PARIS "!"),
    CASE("granite", NULL,
         "<tool_call>[{\"name\":\"now\",\"arguments\":{}},{\"name\":\"now\",\"arguments\":{}}]",
         "0:now{}!1:now{}!"),
    CASE("granite", NULL, "<|tool_call|>{\"name\":\"now\"}", "C(<|tool_call|>{\"name\":\"now\"})"),
    CASE("phi4", NULL, "functools[{\"name\": \"now\", \"arguments\": {}}]", "0:now{}!"),
    CASE("phi4", NULL, "functools is a module", "C(functools is a module)"),
    CASE("react", NULL, "Thought: look\nAction: weather\nAction Input: " PARIS "\n",
         "C(Thought: look)0:weather" PARIS "!"),
    CASE("react", NULL, "Action: weather\nThen", "C(Action: weather\nThen)"),
    /* python's form */
    CASE("pythonic", NULL, "[weather(city='Pa\\'ris', days=[1, -2.5], dry=True), now()]",
         "0:weather{\"city\": \"Pa'ris\", \"days\": [1, -2.5], \"dry\": true}!1:now{}!"),
    CASE("pythonic", NULL, "[weather(city={'a': None, \"b\": (1,)})]",
         "0:weather{\"city\": {\"a\": null, \"b\": [1]}}!"),
    CASE("pythonic", NULL, "[1, 2]", "C([1, 2])"),
    CASE("pythonic", NULL, "[weather(1)]", "C([weather(1)])"),
    CASE("pythonic", NULL, "[weather(city=open('x'))]", "C([weather(city=open('x'))])"),
    CASE("pythonic", NULL, "[now(), other()]", "C([now(), other()])"),
    CASE("pythonic", NULL, "[weather(city=\"])\")] ", "0:weather{\"city\": \"])\"}!"),
    CASE("chatglm3", NULL, "weather\n ```python\ntool_call(city='Paris')\n```",
         "0:weather{\"city\": \"Paris\"}!"),
    CASE("chatglm3", NULL, "weather\n```python\ntool_call(city='Paris')\n```\n",
         "0:weather{\"city\": \"Paris\"}!"),
    CASE("chatglm3", NULL, "weather\n```python\nprint(1)\n```",
         "C(weather\n```python\nprint(1)\n```)"),
    /* reasoning */
    CASE(NULL, "think", "<think>\nHm, 2 < 3.\n</think>\n\nIt is so.\n",
         "R(Hm, 2 < 3.)C(It is so.\n)"),
    CASE(NULL, "think", "Hm.\n</think>\n\nYes.", "R(Hm.)C(Yes.)", .inside = true),
    CASE(NULL, "think", "Just </think> an answer <think> here.",
         "C(Just </think> an answer <think> here.)"),
    CASE(NULL, "think", "\n <think> a\n\nb </think>", "R(a\n\nb)"),
    CASE(NULL, "think", "<think>never closed </thi", "R(never closed </thi)"),
    CASE(NULL, "think", " <thin", "C( <thin)"),
    CASE(NULL, "think", "<think>\n\n</think>\n\nHi", "C(Hi)"),
    CASE(NULL, "granite", "Here is my thought process: x Here is my response: y", "R(x)C( y)"),
    CASE(NULL, "mistral", "[THINK]a[/THINK]b", "R(a)C(b)"),
    CASE("hermes", "think",
         "<think>\nI could <tool_call>{\"name\": "
         "\"now\"}</tool_call>\n</think>\n\n<tool_call>\n{\"name\": "
         "\"now\", \"arguments\": {}}\n</tool_call>",
         "R(I could <tool_call>{\"name\": \"now\"}</tool_call>)0:now{}!"),
    CASE("llama3", "think", "plan</think>\n{\"name\": \"now\", \"parameters\": {}}",
         "R(plan)0:now{}!", .inside = true),
};

#define PARSE_FUNCTIONS                                                                            \
    "[{\"type\":\"function\",\"function\":{\"name\":\"weather\",\"parameters\":{\"type\":"         \
    "\"object\",\"properties\":{\"city\":{\"type\":\"string\"},\"days\":{\"type\":\"integer\"},"   \
    "\"dry\":{\"type\":[\"boolean\",\"null\"]}}}}},"                                               \
    "{\"type\":\"function\",\"function\":{\"name\":\"now\"}}]"

#endif
