/* Fuzz entry of chat templates: template text, then "~~~~" and a conversation as JSON {messages, tools, kwargs}
 * (without it: a usual one). What renders must have its marks in order and inside the text. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/json.h"
#include "text/chat/chat.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char usual[] =
    "{\"messages\":[{\"role\":\"system\",\"content\":\"S\"},{\"role\":\"user\",\"content\":\"U\"},"
    "{\"role\":\"assistant\",\"content\":\"A\",\"tool_calls\":[{\"type\":\"function\",\"function\":"
    "{\"name\":\"f\",\"arguments\":{\"a\":[1,2.5,null,true]}}}]},{\"role\":\"tool\",\"content\":"
    "\"{}\"}],\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{}}}]}";

static void render(const tm_template *t, const json_t *request, bool more)
{
    const tm_render_args args = {.messages = json_object_get(request, "messages"),
                                 .tools = json_object_get(request, "tools"),
                                 .kwargs = json_object_get(request, "kwargs"),
                                 .add_generation_prompt = !more,
                                 .continue_final_message = more};
    tm_rendered r = {.input_count = 0};
    tm_err err = TM_ERR_INIT;
    if (!json_is_array(args.messages))
        return;
    if (tm_template_render(t, &args, &r, &err) != TM_OK) {
        TM_ASSERT(err.status != TM_STATUS_INTERNAL);
        return;
    }
    size_t at = 0;
    for (size_t i = 0; i < r.input_count; i++) {
        TM_ASSERT(r.input[i].begin >= at && r.input[i].begin < r.input[i].end);
        at = r.input[i].end;
    }
    TM_ASSERT(at <= r.text.len);
    tm_rendered_deinit(&r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *source = (const char *)data, *part = memmem(source, size, "~~~~", 4);
    size_t len = part ? (size_t)(part - source) : size;
    const char *request = part ? part + 4 : usual;
    size_t request_len = part ? size - len - 4 : sizeof(usual) - 1;
    json_t *root;
    tm_err err = TM_ERR_INIT;
    tm_template t = {.plain = NULL};
    if (tm_json_parse(request, request_len, &root, NULL) != TM_OK)
        return 0;
    /* A source that begins like JSON is a format, everything else is Jinja. */
    tm_status st = len > 1 && source[0] == '{' && source[1] == '"'
                       ? tm_chat_format_read(&t, source, len, &err)
                       : tm_jinja_compile(&t.plain, source, len, &err);
    if (st == TM_OK) {
        render(&t, root, false);
        render(&t, root, true);
    } else {
        TM_ASSERT(err.msg[0] != 0);
    }
    tm_jinja_destroy(t.plain);
    json_decref(t.owned);
    json_decref(root);
    return 0;
}
