list(APPEND TM_ENGINE_SOURCES model/family.c model/families.c model/family_hooks.c model/config.c
  model/folder.c model/workspace_arch.c model/workspace_write.c model/workspace_rows.c model/workspace_config.c model/config_value.c model/config_rope.c model/config_layers.c model/stop_ids.c model/rope.c model/sample_step.c model/layout.c
  model/load_check.c model/load.c model/loader.c model/scale.c model/load_progress.c model/forward.c model/layer.c model/attention.c model/ffn.c model/extras.c model/device_step.c
  model/warm.c model/shape.c model/inspect.c model/model.c)
