/* ChatML without the template engine, for builds where text/template.c is not there yet. */
#include <stdlib.h>
#include <string.h>

#include "text/template.h"

struct tm_template {
    int unused;
};

tm_status tm_template_create(tm_template **out, const tm_text_file *files, int count,
                             const char *override, const tm_tokenizer *t, tm_err *err)
{
    (void)files;
    (void)count;
    (void) override;
    (void)t;
    (void)err;
    *out = calloc(1, sizeof **out);
    return TM_OK;
}

void tm_template_destroy(tm_template *t)
{
    free(t);
}

tm_status tm_template_render(const tm_template *t, const tm_render_args *args, tm_rendered *out,
                             tm_err *err)
{
    (void)t;
    size_t i;
    json_t *m;
    tm_buf_init(&out->text, 0);
    out->input = calloc(json_array_size(args->messages), sizeof *out->input);
    out->input_count = 0;
    json_array_foreach(args->messages, i, m)
    {
        const json_t *content = json_object_get(m, "content");
        if (strcmp(json_string_value(content), "refuse me") == 0)
            return TM_FAIL(err, TM_STATUS_INVALID, "the template says no");
        tm_buf_printf(&out->text, "<|im_start|>%s\n",
                      json_string_value(json_object_get(m, "role")));
        out->input[i].begin = out->text.len;
        tm_buf_append(&out->text, json_string_value(content), json_string_length(content));
        out->input[i].end = out->text.len;
        out->input_count++;
        tm_buf_puts(&out->text, "<|im_end|>\n");
    }
    if (args->add_generation_prompt)
        tm_buf_puts(&out->text, "<|im_start|>assistant\n");
    return TM_OK;
}

void tm_rendered_deinit(tm_rendered *r)
{
    tm_buf_deinit(&r->text);
    free(r->input);
}
