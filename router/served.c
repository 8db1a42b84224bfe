/* A served model from its text files.
 *
 * config.json and generation_config.json are read for what the API needs: context, vocabulary, stop ids and
 * the sampling defaults. Both may be absent (the worker's Hello then says the limits); a file that is there
 * and wrong is refused. */
#include "router/served.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "common/clock.h"
#include "common/json.h"

static tm_status parse_file(const tm_text_file *files, int count, const char *name, json_t **out,
                            tm_err *err)
{
    *out = NULL;
    for (int i = 0; i < count; i++) {
        if (strcmp(files[i].name, name) != 0)
            continue;
        tm_status st = tm_json_parse(files[i].data, files[i].len, out, err);
        if (st == TM_OK && !json_is_object(*out)) {
            json_decref(*out);
            *out = NULL;
            st = TM_FAIL(err, TM_STATUS_DATA, "expected an object");
        }
        if (st != TM_OK)
            tm_err_prefix(err, "%s", name);
        return st;
    }
    return TM_OK;
}

static tm_status add_stop(tm_served *s, const json_t *v, tm_err *err)
{
    if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > INT32_MAX)
        return TM_FAIL(err, TM_STATUS_DATA, "eos_token_id: expected a token id, got %s",
                       tm_json_type_name(v));
    int32_t id = (int32_t)json_integer_value(v);
    for (int i = 0; i < s->stop_count; i++)
        if (s->stop_ids[i] == id)
            return TM_OK;
    if (s->stop_count == (int)TM_ARRAY_LEN(s->stop_ids))
        return TM_FAIL(err, TM_STATUS_DATA, "eos_token_id: more than %d stop ids", s->stop_count);
    s->stop_ids[s->stop_count++] = id;
    return TM_OK;
}

/* An id or a list of ids, as Hugging Face writes it. */
static tm_status read_stops(tm_served *s, const json_t *root, tm_err *err)
{
    const json_t *v = tm_json_get(root, "eos_token_id");
    if (!json_is_array(v))
        return v ? add_stop(s, v, err) : TM_OK;
    size_t i;
    json_t *item;
    json_array_foreach(v, i, item)
    {
        TM_TRY(add_stop(s, item, err));
    }
    return TM_OK;
}

/* What config.json says of the model's kind; tool calls are written differently by kind. */
static const char *model_type(const json_t *config)
{
    return json_string_value(tm_json_get(config, "model_type"));
}

static tm_status read_config(tm_served *s, const json_t *root, tm_err *err)
{
    int64_t context = s->max_context, vocab = s->vocab;
    TM_TRY(tm_json_int(root, "max_position_embeddings", 1, 1 << 30, &context, err));
    TM_TRY(tm_json_int(root, "vocab_size", 1, 1 << 30, &vocab, err));
    s->max_context = (int32_t)context;
    s->vocab = (int32_t)vocab;
    return read_stops(s, root, err);
}

static tm_status read_generation(tm_served *s, const json_t *root, tm_err *err)
{
    double temperature = s->temperature, top_p = s->top_p, penalty = s->repetition_penalty;
    int64_t top_k = s->top_k;
    bool sample = true;
    TM_TRY(tm_json_num(root, "temperature", 0, INFINITY, &temperature, err));
    TM_TRY(tm_json_num(root, "top_p", 0, 1, &top_p, err));
    TM_TRY(tm_json_int(root, "top_k", -1, INT32_MAX, &top_k, err));
    TM_TRY(tm_json_num(root, "repetition_penalty", 0, INFINITY, &penalty, err));
    TM_TRY(tm_json_bool(root, "do_sample", &sample, err));
    /* A checkpoint that says do_sample: false was made for greedy decoding. */
    s->temperature = sample ? (float)temperature : 0;
    s->top_p = (float)top_p;
    s->top_k = top_k > 0 ? (int32_t)top_k : 0;
    s->repetition_penalty = penalty > 0 ? (float)penalty : 1;
    return read_stops(s, root, err);
}

static tm_status read_files(tm_served *s, const tm_text_file *files, int count, tm_err *err)
{
    static const struct {
        const char *name;
        tm_status (*read)(tm_served *s, const json_t *root, tm_err *err);
    } rows[] = {{"config.json", read_config}, {"generation_config.json", read_generation}};
    for (size_t i = 0; i < TM_ARRAY_LEN(rows); i++) {
        json_t *root;
        TM_TRY(parse_file(files, count, rows[i].name, &root, err));
        if (!root)
            continue;
        tm_status st = rows[i].read(s, root, err);
        json_decref(root);
        if (st != TM_OK) {
            tm_err_prefix(err, "%s", rows[i].name);
            return st;
        }
    }
    return TM_OK;
}

static void destroy(tm_served *s)
{
    tm_template_destroy(s->template);
    tm_tokenizer_destroy(s->tokenizer);
    free(s);
}

/* ---- parsers ---- */

static bool is_choice(const char *name, const char *word)
{
    return name && strcmp(name, word) == 0;
}

static bool is_auto(const char *name)
{
    return !name || !*name || is_choice(name, "auto");
}

tm_status tm_served_opts_check(const tm_served_opts *o, tm_err *err)
{
    tm_buf names;
    tm_status st = TM_OK;
    tm_buf_init(&names, 400);
    if (!is_auto(o->tool_parser) && !is_choice(o->tool_parser, "none") &&
        !tm_tool_parser_find(o->tool_parser)) {
        tm_tool_parser_list(&names);
        st = TM_FAIL(err, TM_STATUS_CONFIG,
                     "tool-call-parser: '%.40s' is not auto, none or one of %.300s", o->tool_parser,
                     names.data ? names.data : "");
    } else if (!is_auto(o->reason_parser) && !is_choice(o->reason_parser, "none") &&
               !tm_reason_parser_find(o->reason_parser)) {
        tm_reason_parser_list(&names);
        st = TM_FAIL(err, TM_STATUS_CONFIG,
                     "reasoning-parser: '%.40s' is not auto, none or one of %.300s",
                     o->reason_parser, names.data ? names.data : "");
    }
    tm_buf_deinit(&names);
    return st;
}

static tm_status choose_parsers(tm_served *s, const tm_text_file *files, int count,
                                const tm_served_opts *o, tm_err *err)
{
    json_t *config;
    TM_TRY(tm_served_opts_check(o, err));
    TM_TRY(parse_file(files, count, "config.json", &config, err));
    if (!is_auto(o->tool_parser))
        s->tool_parser = tm_tool_parser_find(o->tool_parser);
    else if (s->template)
        s->tool_parser = tm_tool_parser_detect(s->template, model_type(config));
    if (!is_auto(o->reason_parser))
        s->reason_parser = tm_reason_parser_find(o->reason_parser);
    else if (s->template)
        s->reason_parser = tm_reason_parser_detect(s->template);
    json_decref(config);
    return TM_OK;
}

tm_status tm_served_create(tm_served **out, const char *name, const char *digest,
                           const tm_text_file *files, int count, const tm_served_opts *opts,
                           tm_err *err)
{
    static const tm_served_opts defaults = {.chat_template = NULL};
    const tm_served_opts *o = opts ? opts : &defaults;
    tm_status st = TM_OK;
    tm_served *s = calloc(1, sizeof *s);
    if (!s)
        return TM_FAIL(err, TM_STATUS_NO_MEMORY, "out of memory");
    s->refs = 1;
    s->temperature = s->top_p = s->repetition_penalty = 1;
    s->created = tm_clock_wall_ms() / 1000;
    if (strlen(name) == 0 || strlen(name) >= sizeof s->name || strlen(digest) >= sizeof s->digest) {
        st = TM_FAIL(err, TM_STATUS_INVALID, "a model name has 1 to %zu bytes, a digest up to %zu",
                     sizeof s->name - 1, sizeof s->digest - 1);
        goto fail;
    }
    memcpy(s->name, name, strlen(name));
    memcpy(s->digest, digest, strlen(digest));
    TM_TRY_GOTO(tm_tokenizer_create(&s->tokenizer, files, count, err), fail);
    s->vocab = tm_tokenizer_vocab(s->tokenizer);
    TM_TRY_GOTO(read_files(s, files, count, err), fail);
    if (s->stop_count == 0 && tm_tokenizer_eos(s->tokenizer) >= 0)
        s->stop_ids[s->stop_count++] = tm_tokenizer_eos(s->tokenizer);
    st = tm_template_create(&s->template, files, count, o->chat_template, s->tokenizer, err);
    if (st != TM_OK && st != TM_STATUS_NOT_FOUND)
        goto fail;
    if (s->template)
        TM_TRY_GOTO(tm_template_set_meta(s->template, o->meta_instruction, err), fail);
    TM_TRY_GOTO(choose_parsers(s, files, count, o, err), fail);
    *out = s;
    return TM_OK;
fail:
    destroy(s);
    return st;
}

tm_served *tm_served_acquire(tm_served *s)
{
    s->refs++;
    return s;
}

void tm_served_release(tm_served *s)
{
    if (s && --s->refs == 0)
        destroy(s);
}

bool tm_served_stops_at(const tm_served *s, int32_t token)
{
    for (int i = 0; i < s->stop_count; i++)
        if (s->stop_ids[i] == token)
            return true;
    return false;
}
