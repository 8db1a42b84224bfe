/* turbomesh list: the model families that this build knows, and which backends run them. */
#include <stdio.h>
#include <string.h>

#include "cli/cmd.h"
#include "common/buf.h"
#include "common/check.h"
#include "common/json.h"
#include "engine/model/inspect.h"

typedef struct list_opts {
    bool json;
} list_opts;

static const tm_opt_row ROWS[] = {
    {"json", NULL, TM_OPT_BOOL, offsetof(list_opts, json), "false", 0, 0, NULL, "JSON on stdout."},
};
const tm_opt_table TM_LIST_OPTIONS = {"turbomesh list",
                                      "turbomesh list [options]",
                                      "Prints the model families that are known, and which "
                                      "backends run them.",
                                      ROWS,
                                      TM_ARRAY_LEN(ROWS),
                                      0};

/* "cpu", or "cuda: no experts" for a backend that lacks something. */
static void backend_text(const tm_family *f, const tm_backend *b, char *out, size_t size)
{
    const char *lacks = tm_inspect_lacks(f, b);
    snprintf(out, size, lacks ? "%s: no %s" : "%s", b->name, lacks);
}

static void print_text(void)
{
    int count = 0;
    const tm_backend *const *backends = tm_backend_list(&count);
    printf("%-11s %-64s %-28s %s\n", "family", "models", "architecture", "backends");
    for (int i = 0; i < tm_family_count; i++) {
        const tm_family *f = &tm_families[i];
        printf("%-11s %-64s %-28s ", f->name, f->title, f->archs[0]);
        for (int k = 0; k < count; k++) {
            char text[64];
            backend_text(f, backends[k], text, sizeof(text));
            printf("%s%s", k ? ", " : "", text);
        }
        printf("\n");
        for (size_t k = 1; k < TM_ARRAY_LEN(f->archs) && f->archs[k]; k++)
            printf("%-11s %-64s %s\n", "", "", f->archs[k]);
    }
}

static void write_json(tm_jw *w, const tm_family *f)
{
    int count = 0;
    const tm_backend *const *backends = tm_backend_list(&count);
    tm_jw_obj(w);
    tm_jw_kstr(w, "family", f->name);
    tm_jw_kstr(w, "models", f->title);
    tm_jw_key(w, "architectures");
    tm_jw_arr(w);
    for (size_t k = 0; k < TM_ARRAY_LEN(f->archs) && f->archs[k]; k++)
        tm_jw_str(w, f->archs[k]);
    tm_jw_arr_end(w);
    tm_jw_key(w, "backends");
    tm_jw_obj(w);
    for (int k = 0; k < count; k++) {
        const char *lacks = tm_inspect_lacks(f, backends[k]);
        tm_jw_key(w, backends[k]->name);
        tm_jw_obj(w);
        tm_jw_key(w, "runs");
        tm_jw_bool(w, !lacks);
        tm_jw_kstr(w, "lacks", lacks);
        tm_jw_obj_end(w);
    }
    tm_jw_obj_end(w);
    tm_jw_obj_end(w);
}

static int print_json(void)
{
    tm_buf b;
    tm_jw w;
    tm_buf_init(&b, 0);
    tm_jw_init(&w, &b);
    tm_jw_arr(&w);
    for (int i = 0; i < tm_family_count; i++)
        write_json(&w, &tm_families[i]);
    tm_jw_arr_end(&w);
    bool ok = !b.failed && printf("%s\n", b.data) > 0;
    tm_buf_deinit(&b);
    return ok ? 0 : 1;
}

int tm_cmd_list(int argc, char **argv)
{
    list_opts o = {0};
    const char *none = NULL;
    int n = 0, code;
    if (!tm_cmd_parse(&TM_LIST_OPTIONS, argc, argv, &o, &none, &n, &code))
        return code;
    if (o.json)
        return print_json();
    print_text();
    return 0;
}
