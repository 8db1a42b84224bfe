/* Where the parts of a model are: in its folder as Hugging Face lays it out, or in a TurboMind workspace, which has
 * a folder for the weights and one for everything about text. */
#ifndef TM_COMMON_MODEL_DIR_H
#define TM_COMMON_MODEL_DIR_H

#include <stdbool.h>
#include <stddef.h>

/* A folder that holds triton_models is a workspace. */
bool tm_model_is_workspace(const char *dir);
/* The folder of config.json, tokenizer and chat template; false when the path does not fit. */
bool tm_model_text_dir(char *out, size_t size, const char *dir);
/* The folder of the weights. */
bool tm_model_weights_dir(char *out, size_t size, const char *dir);

/* The name of the chat template that a workspace's config gives, "" when there is none. Workspaces choose templates by
 * name; the text library knows the names. */
#define TM_MODEL_TEMPLATE_FILE "template.name" /* what holds it among a model's text files */
void tm_model_template_name(char *out, size_t size, const char *dir);

#endif
