list(APPEND TM_ENGINE_SOURCES model/family.c model/config.c model/stop_ids.c model/rope.c model/layout.c
  model/load.c model/forward.c model/layer.c model/attention.c model/ffn.c model/extras.c model/device_step.c
  model/shape.c model/model.c)
