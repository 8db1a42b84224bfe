/* turbomesh convert: a model folder as a TurboMind workspace, the format of LMDeploy's releases up to 0.9.
 *
 * The workspace is written beside its place and takes it when it is complete, so that a failure leaves what was there.
 * Upstream's converter removes whatever the destination is; this one only replaces a workspace or an empty folder. */
#include <dirent.h>
#include <errno.h>
#include <fts.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/cmd.h"
#include "common/check.h"
#include "common/file.h"
#include "common/log.h"
#include "common/model_dir.h"
#include "engine/model/workspace_write.h"
#include "text/chat/chat.h"
#include "text/tokenizer.h"

#define PATH_MAX_LEN 4096
#define COPY_MAX     ((size_t)1 << 30)

typedef struct convert_opts {
    const char *dst_path, *model_name, *chat_template, *tokenizer_path, *quant_path;
    int64_t tp, group_size;
    int model_format, format;
} convert_opts;

#define OFF(f) offsetof(convert_opts, f)
static const tm_opt_row ROWS[] = {
    {"dst-path", NULL, TM_OPT_STR, OFF(dst_path), "workspace", 0, 0, NULL,
     "Where the workspace goes; a workspace that is there is replaced."},
    {"tp", "tensor-parallel-size", TM_OPT_INT, OFF(tp), "1", 1, 64, NULL,
     "Parts that the weights are cut into; any number of ranks reads them."},
    {"format", NULL, TM_OPT_ENUM, OFF(format), "yaml", 0, 0, "ini,yaml",
     "Generation: config.ini (releases up to 0.5) or config.yaml (0.9)."},
    {"model-name", NULL, TM_OPT_STR, OFF(model_name), NULL, 0, 0, NULL,
     "Name of the model and its chat template, such as internlm2; default: by the folder's name."},
    {"chat-template", NULL, TM_OPT_STR, OFF(chat_template), NULL, 0, 0, NULL,
     "Name of the chat template, where it is not the model's name (config.yaml)."},
    {"tokenizer-path", NULL, TM_OPT_STR, OFF(tokenizer_path), NULL, 0, 0, NULL,
     "Tokenizer's file or folder, where it is not in MODEL."},
    {"model-format", NULL, TM_OPT_ENUM, OFF(model_format), "hf", 0, 0, "hf,llama,awq",
     "Format of MODEL; only hf is read."},
    {"quant-path", NULL, TM_OPT_STR, OFF(quant_path), NULL, 0, 0, NULL,
     "Of quantised weights, which are not converted."},
    {"group-size", NULL, TM_OPT_INT, OFF(group_size), "0", 0, 1024, NULL,
     "Of quantised weights, which are not converted."},
};
const tm_opt_table TM_CONVERT_OPTIONS = {
    "turbomesh convert",
    "turbomesh convert [MODEL_NAME] MODEL [options]",
    "Writes a model as a TurboMind workspace. Every command reads workspaces as well as model "
    "folders.",
    ROWS,
    TM_ARRAY_LEN(ROWS),
    2};

/* Paths of one conversion. */
typedef struct job {
    const convert_opts *o;
    const char *model;
    char name[128], template[128];
    char text[PATH_MAX_LEN];    /* where the tokenizer is */
    char partial[PATH_MAX_LEN]; /* where the workspace is written */
    char part_text[PATH_MAX_LEN], part_weights[PATH_MAX_LEN];
    tm_workspace_report report;
    int copied;
} job;

/* ---- folders ---- */

static tm_status join(char *out, const char *dir, const char *name, tm_err *err)
{
    return tm_path_join(out, PATH_MAX_LEN, dir, name)
               ? TM_OK
               : TM_FAIL(err, TM_STATUS_CONFIG, "%s/%s: the path is too long", dir, name);
}

static tm_status make_dir(const char *path, tm_err *err)
{
    return mkdir(path, 0777) == 0 ? TM_OK : TM_FAIL(err, TM_STATUS_IO, "%s: %m", path);
}

/* Removes a folder with all that is in it, without following links out of it. */
static tm_status remove_tree(const char *path, tm_err *err)
{
    char *const roots[] = {(char *)(uintptr_t)path, NULL};
    FTS *t = fts_open(roots, FTS_PHYSICAL | FTS_NOCHDIR | FTS_XDEV, NULL);
    if (!t)
        return TM_FAIL(err, TM_STATUS_IO, "%s: %m", path);
    tm_status st = TM_OK;
    for (FTSENT *e; st == TM_OK && (e = fts_read(t)) != NULL;)
        if (e->fts_info != FTS_D && remove(e->fts_accpath) != 0)
            st = TM_FAIL(err, TM_STATUS_IO, "%s: %m", e->fts_path);
    fts_close(t);
    return st;
}

static bool is_empty(const char *path)
{
    DIR *d = opendir(path);
    bool empty = d != NULL;
    for (struct dirent *e; d && empty && (e = readdir(d)) != NULL;)
        empty = strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0;
    if (d)
        closedir(d);
    return empty;
}

static bool is_workspace(const char *path)
{
    char weights[PATH_MAX_LEN], yaml[PATH_MAX_LEN], ini[PATH_MAX_LEN];
    return tm_model_is_workspace(path) && tm_model_weights_dir(weights, sizeof(weights), path) &&
           tm_path_join(yaml, sizeof(yaml), weights, "config.yaml") &&
           tm_path_join(ini, sizeof(ini), weights, "config.ini") &&
           (tm_file_exists(yaml) || tm_file_exists(ini));
}

static bool same_place(const char *a, const char *b)
{
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

/* May the destination be replaced? */
static tm_status check_place(const job *j, tm_err *err)
{
    const char *dst = j->o->dst_path;
    struct stat sb;
    if (lstat(dst, &sb) != 0)
        return errno == ENOENT ? TM_OK : TM_FAIL(err, TM_STATUS_IO, "%s: %m", dst);
    if (same_place(dst, j->model))
        return TM_FAIL(err, TM_STATUS_INVALID, "--dst-path: %s is the model itself", dst);
    if (!S_ISDIR(sb.st_mode) || !(is_empty(dst) || is_workspace(dst)))
        return TM_FAIL(err, TM_STATUS_INVALID,
                       "--dst-path: %s is there and is not a workspace: it is not replaced", dst);
    return TM_OK;
}

/* ---- the tokenizer's files ---- */

static bool is_text_file(const char *name)
{
    static const char *const ends[] = {".json", ".py", ".model", ".tiktoken", ".jinja", ".txt"};
    static const char *const not_these[] = {"model.safetensors.index.json",
                                            "pytorch_model.bin.index.json"};
    size_t n = strlen(name);
    bool hit = false;
    for (size_t i = 0; i < TM_ARRAY_LEN(ends); i++) {
        size_t m = strlen(ends[i]);
        hit = hit || (n > m && strcmp(name + n - m, ends[i]) == 0);
    }
    for (size_t i = 0; i < TM_ARRAY_LEN(not_these); i++)
        hit = hit && strcmp(name, not_these[i]) != 0;
    return hit && name[0] != '.';
}

static tm_status copy_file(const char *from, const char *to, tm_err *err)
{
    char *data;
    size_t len;
    TM_TRY(tm_file_read(from, COPY_MAX, &data, &len, err));
    FILE *f = fopen(to, "wb");
    bool ok = f && fwrite(data, 1, len, f) == len;
    ok = (!f || fclose(f) == 0) && ok;
    free(data);
    return ok ? TM_OK : TM_FAIL(err, TM_STATUS_IO, "%s: %m", to);
}

static tm_status copy_into(job *j, const char *dir, const char *name, tm_err *err)
{
    char from[PATH_MAX_LEN], to[PATH_MAX_LEN];
    TM_TRY(join(from, dir, name, err));
    TM_TRY(join(to, j->part_text, name, err));
    if (!tm_file_exists(from))
        return TM_OK;
    j->copied++;
    return copy_file(from, to, err);
}

/* Every text file of a folder; those of a later folder replace earlier ones. */
static tm_status copy_texts(job *j, const char *dir, tm_err *err)
{
    DIR *d = opendir(dir);
    if (!d)
        return TM_FAIL(err, TM_STATUS_NOT_FOUND, "%s: %m", dir);
    tm_status st = TM_OK;
    for (struct dirent *e; st == TM_OK && (e = readdir(d)) != NULL;)
        if (is_text_file(e->d_name))
            st = copy_into(j, dir, e->d_name, err);
    closedir(d);
    return st;
}

/* A folder of templates beside the tokenizer. */
static tm_status copy_templates(job *j, tm_err *err)
{
    static const char sub[] = "additional_chat_templates";
    char dir[PATH_MAX_LEN];
    TM_TRY(join(dir, j->text, sub, err));
    if (!tm_dir_exists(dir))
        return TM_OK;
    TM_TRY(join(dir, j->part_text, sub, err));
    TM_TRY(make_dir(dir, err));
    return copy_into(j, j->text, "additional_chat_templates/tool_use.jinja", err);
}

static tm_status copy_tokenizer(job *j, tm_err *err)
{
    const char *path = j->o->tokenizer_path;
    TM_TRY(copy_texts(j, j->text, err));
    TM_TRY(copy_templates(j, err));
    if (!path)
        return TM_OK;
    if (tm_dir_exists(path))
        return copy_texts(j, path, err);
    const char *slash = strrchr(path, '/');
    char dir[PATH_MAX_LEN];
    int n = snprintf(dir, sizeof(dir), "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
    if (n < 0 || (size_t)n >= sizeof(dir) || !tm_file_exists(path))
        return TM_FAIL(err, TM_STATUS_NOT_FOUND, "--tokenizer-path: %s does not exist", path);
    return copy_into(j, slash == path ? "/" : dir, slash ? slash + 1 : path, err);
}

/* ---- names ---- */

static tm_status check_name(const char *option, const char *name, tm_err *err)
{
    if (tm_chat_builtin_find(name))
        return TM_OK;
    char close[256];
    tm_chat_builtin_closest(name, close, sizeof(close));
    return TM_FAIL(err, TM_STATUS_INVALID,
                   "%s: '%.60s' is not the name of a chat template; the closest ones are %s",
                   option, name, close);
}

/* The name that was given, the template that the folder's name asks for, or the folder's name. */
static tm_status settle_names(job *j, const char *given, tm_err *err)
{
    char real[PATH_MAX_LEN];
    char *full = realpath(j->model, NULL);
    snprintf(real, sizeof(real), "%.4000s", full ? full : j->model);
    free(full);
    const char *name = given ? given : j->o->model_name;
    const tm_chat_format *match = tm_chat_builtin_match(real);
    const char *slash = strrchr(real, '/');
    if (name)
        TM_TRY(check_name("--model-name", name, err));
    if (j->o->chat_template)
        TM_TRY(check_name("--chat-template", j->o->chat_template, err));
    const char *chosen = name ? name : match ? match->name : slash ? slash + 1 : real;
    snprintf(j->name, sizeof(j->name), "%.127s", chosen);
    const char *template = j->o->chat_template ? j->o->chat_template : name;
    snprintf(j->template, sizeof(j->template), "%.127s",
             template ? template
             : match  ? match->name
                      : "");
    return TM_OK;
}

/* ---- the whole ---- */

static tm_status check_options(const convert_opts *o, tm_err *err)
{
    if (o->model_format == 2 || o->quant_path || o->group_size > 0)
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "--model-format awq: quantised weights are not converted; give the model "
                       "in 16 bits");
    if (o->model_format == 1)
        return TM_FAIL(err, TM_STATUS_UNSUPPORTED,
                       "--model-format llama: checkpoints of Meta's own format (.pth) are not "
                       "read; give the Hugging Face folder");
    return TM_OK;
}

/* Ids that begin and end a text; -1 where the tokenizer has none, or is not there. */
static void find_ids(const char *dir, tm_workspace_opts *w)
{
    tm_tokenizer *t;
    w->start_id = w->end_id = -1;
    if (tm_tokenizer_load(&t, dir, NULL) != TM_OK)
        return;
    const char *bos = tm_tokenizer_special(t, "bos_token");
    w->start_id = bos ? tm_tokenizer_id(t, bos, strlen(bos)) : -1;
    w->end_id = tm_tokenizer_eos(t);
    tm_tokenizer_destroy(t);
}

static tm_status write_parts(job *j, tm_err *err)
{
    char models[PATH_MAX_LEN];
    TM_TRY(join(models, j->partial, "triton_models", err));
    TM_TRY(make_dir(models, err));
    TM_TRY(join(j->part_text, models, "tokenizer", err));
    TM_TRY(make_dir(j->part_text, err));
    TM_TRY(join(j->part_weights, models, "weights", err));
    TM_TRY(make_dir(j->part_weights, err));
    TM_TRY(copy_tokenizer(j, err));
    tm_workspace_opts w = {.tp = (int)j->o->tp,
                           .yaml = j->o->format == 1,
                           .model_name = j->name,
                           .chat_template = j->template};
    find_ids(j->part_text, &w);
    return tm_workspace_write(j->model, j->part_weights, &w, &j->report, err);
}

static tm_status convert(job *j, tm_err *err)
{
    const char *dst = j->o->dst_path;
    size_t n = strlen(dst);
    while (n > 1 && dst[n - 1] == '/')
        n--;
    int len =
        snprintf(j->partial, sizeof(j->partial), "%.*s.partial", (int)TM_MIN(n, (size_t)4000), dst);
    if (len < 0 || (size_t)len >= sizeof(j->partial) || n > 4000 ||
        !tm_model_text_dir(j->text, sizeof(j->text), j->model))
        return TM_FAIL(err, TM_STATUS_CONFIG, "the paths are too long");
    if (!tm_dir_exists(j->model))
        return TM_FAIL(err, TM_STATUS_NOT_FOUND, "model folder %s does not exist", j->model);
    TM_TRY(check_place(j, err));
    if (tm_model_is_workspace(j->partial)) /* of a conversion that was interrupted */
        TM_TRY(remove_tree(j->partial, err));
    TM_TRY(make_dir(j->partial, err));
    tm_status st = write_parts(j, err);
    if (st == TM_OK && tm_dir_exists(dst))
        st = remove_tree(dst, err);
    if (st == TM_OK && rename(j->partial, dst) != 0)
        st = TM_FAIL(err, TM_STATUS_IO, "%s: %m", dst);
    if (st != TM_OK && tm_dir_exists(j->partial))
        remove_tree(j->partial, NULL);
    return st;
}

static void print_report(const job *j)
{
    const tm_workspace_report *r = &j->report;
    printf(
        "model_name    %s\nmodel_path    %s\narchitecture  %s\nweight_type   %s%s\ntp            "
        "%lld\ndst_path      %s\nfiles         %d of weights, %.3f GB; %d of the tokenizer\n",
        j->name, j->model, r->arch, r->weight_type,
        r->rounded ? ", rounded from float32 (workspaces have 16 bits)" : "", (long long)j->o->tp,
        j->o->dst_path, r->files, (double)r->bytes / 1e9, j->copied);
    if (r->scaled_rope)
        printf(
            "note          the scaling of the rope is read from tokenizer/config.json: keep it\n");
}

int tm_cmd_convert(int argc, char **argv)
{
    convert_opts o = {0};
    const char *words[2] = {NULL, NULL};
    int n = 0, code;
    if (!tm_cmd_parse(&TM_CONVERT_OPTIONS, argc, argv, &o, words, &n, &code))
        return code;
    tm_err err = TM_ERR_INIT;
    tm_log_init("turbomesh", TM_LOG_WARN, TM_LOG_AUTO);
    if (n < 1 || (n == 2 && o.model_name)) {
        TM_FAIL(&err, TM_STATUS_INVALID,
                n < 1 ? "give MODEL" : "the model's name is given twice: MODEL_NAME, --model-name");
        return tm_cmd_fail("convert", &err);
    }
    job j = {.o = &o, .model = words[n - 1]};
    tm_status st = check_options(&o, &err);
    if (st == TM_OK)
        st = settle_names(&j, n == 2 ? words[0] : NULL, &err);
    if (st == TM_OK)
        st = convert(&j, &err);
    if (st != TM_OK)
        return tm_cmd_fail("convert", &err);
    print_report(&j);
    return 0;
}
