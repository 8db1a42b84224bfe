"""Writes a Llama checkpoint as a TurboMind workspace, with numpy and from the description of the format alone: whole
matrices are turned to [in, out], the halves of each head of q and k interleaved, q, k and v cut into equal column
slices and joined rank by rank, then everything split."""
import json
import os
import shutil
import struct

import numpy as np


def load(model):
    """Tensors as arrays of 16-bit patterns."""
    out = {}
    for f in sorted(os.listdir(model)):
        if not f.endswith(".safetensors"):
            continue
        with open(os.path.join(model, f), "rb") as fh:
            (n,) = struct.unpack("<Q", fh.read(8))
            header, data = json.loads(fh.read(n)), fh.read()
        for name, t in header.items():
            if name != "__metadata__":
                assert t["dtype"] == "BF16"
                a, b = t["data_offsets"]
                out[name] = np.frombuffer(data[a:b], np.uint16).reshape(t["shape"])
    return out


def save(path, tensors):
    header, at = {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(x.tobytes() for x in tensors.values()))


def permute(x, d):
    """Columns o and d/2 + o of each head become 2o and 2o + 1."""
    return x.reshape(x.shape[0], -1, 2, d // 2).swapaxes(2, 3).reshape(x.shape)


def write(model, dst, layout, tp, with_config, pad_width=0):
    with open(os.path.join(model, "config.json")) as f:
        c = json.load(f)
    t = load(model)
    weights, tok = os.path.join(dst, "triton_models", "weights"), os.path.join(dst, "triton_models", "tokenizer")
    os.makedirs(weights)
    os.makedirs(tok)
    c.setdefault("rope_theta", 10000.0)
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    d, repeat = c["hidden_size"] // heads, max(1, tp // kv)

    def save(x, name, axis=None):
        prefix, ext = os.path.splitext(name)
        parts = [x] if axis is None else np.split(x, tp, axis)
        for r, p in enumerate(parts):
            np.ascontiguousarray(p).tofile(os.path.join(weights, name if axis is None else f"{prefix}.{r}{ext}"))

    emb = t["model.embed_tokens.weight"]
    head = t.get("lm_head.weight", emb)
    pad = -len(emb) % tp
    emb, head = (np.pad(x, ((0, pad), (0, 0))) for x in (emb, head))
    save(emb, "tok_embeddings.weight", None if layout == "v0.1" else 1)
    if layout == "v0.9":
        save(head.T, "output.weight", 1)
    else:
        save(head, "output.weight", None if layout == "v0.1" else 0)
    save(t["model.norm.weight"], "norm.weight")
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        q, k, v = (t[p + f"self_attn.{n}_proj.weight"] for n in "qkv")
        k, v = (np.repeat(x.reshape(kv, d, -1), repeat, axis=0).reshape(kv * repeat * d, -1) for x in (k, v))
        q, k = permute(q.T, d), permute(k.T, d)
        qkv = np.concatenate([np.concatenate([np.split(x, tp, 1)[r] for x in (q, k, v.T)], 1) for r in range(tp)], 1)
        save(qkv, f"layers.{i}.attention.w_qkv.weight", 1)
        save(t[p + "self_attn.o_proj.weight"].T, f"layers.{i}.attention.wo.weight", 0)
        if p + "self_attn.q_proj.bias" in t:
            q, k, v = (t[p + f"self_attn.{n}_proj.bias"][None] for n in "qkv")
            k, v = (np.repeat(x.reshape(kv, d), repeat, axis=0).reshape(1, -1) for x in (k, v))
            q, k = permute(q, d), permute(k, d)
            save(np.concatenate([np.split(x, tp, 1)[r] for r in range(tp) for x in (q, k, v)], 1)[0], f"layers.{i}.attention.w_qkv.bias", 0)
            for r in range(tp):  # the output has none: zeros, a copy for each part
                save(np.zeros(c["hidden_size"], np.uint16), f"layers.{i}.attention.wo.{r}.bias")
        if p + "self_attn.q_norm.weight" in t:
            for n in "qk":
                save(permute(t[p + f"self_attn.{n}_norm.weight"][None], d)[0], f"layers.{i}.attention.{n}_norm")
        if p + "mlp.gate.weight" in t:
            save(t[p + "mlp.gate.weight"].T, f"layers.{i}.moe_ffn.gate.weight")
        for e in range(c["num_experts"]) if p + "mlp.gate.weight" in t else [""]:
            src, dst_name = (p + f"mlp.experts.{e}.", f"moe_ffn.experts.{e}") if e != "" else (p + "mlp.", "feed_forward")
            for ours, theirs, axis in (("w1", "gate", 1), ("w3", "up", 1), ("w2", "down", 0)):
                x = t[src + f"{theirs}_proj.weight"].T
                x = np.pad(x, ((0, 0), (0, pad_width)) if axis == 1 else ((0, pad_width), (0, 0)))
                save(x, f"layers.{i}.{dst_name}.{ours}.weight", axis)
        save(t[p + "input_layernorm.weight"], f"layers.{i}.attention_norm.weight")
        save(t[p + "post_attention_layernorm.weight"], f"layers.{i}.ffn_norm.weight")
    c["intermediate_size"] += pad_width
    write_config(weights, c, layout, tp, kv * repeat, d)
    for f in os.listdir(model):
        if f.endswith(".json") and "index" not in f and (with_config or f != "config.json"):
            shutil.copy(os.path.join(model, f), tok)


def write_config(weights, c, layout, tp, kv, d):
    n = c["num_hidden_layers"]
    common = {"model_name": "demo", "head_num": c["num_attention_heads"], "kv_head_num": kv, "vocab_size": c["vocab_size"], "num_layer": n,
              "norm_eps": c["rms_norm_eps"], "attn_bias": 0, "size_per_head": d, "session_len": 256}
    if layout == "v0.1":
        keys = {**common, "tensor_para_size": tp, "inter_size": c["intermediate_size"], "weight_type": "bf16", "rotary_embedding": d,
                "rope_theta": c["rope_theta"], "start_id": 1, "end_id": 2, "max_position_embeddings": c["max_position_embeddings"]}
        with open(os.path.join(weights, "config.ini"), "w") as f:
            f.write("[llama]\n" + "".join(f"{k} = {v}\n" for k, v in keys.items()) + "\n")
        return
    keys = {**common, "hidden_units": c["hidden_size"], "inter_size": [c["intermediate_size"]] * n, "weight_type": "bfloat16",
            "attn_tp_size": tp, "mlp_tp_size": tp, "model_arch": "LlamaForCausalLM", "chat_template": ""}
    if layout == "v0.9":
        keys["tokenizer_size"] = c["vocab_size"]
    rope = {"base": c["rope_theta"], "dim": d, "type": "default", "low_freq_factor": None}
    with open(os.path.join(weights, "config.yaml"), "w") as f:  # as PyYAML sorts and writes it
        f.write("attention_config:\n  cache_block_seq_len: 64\n" + f"  max_position_embeddings: {c['max_position_embeddings']}\n  rope_param:\n")
        f.write("".join(f"    {k}: {'null' if v is None else v}\n" for k, v in sorted(rope.items())) + "  softmax_scale: 0\n")
        f.write("lora_config:\n  lora_policy: ''\n  lora_r: 0\nmodel_config:\n")
        for k, v in sorted(keys.items()):
            f.write(f"  {k}:\n" + "".join(f"  - {x}\n" for x in v) if isinstance(v, list) else f"  {k}: {v if v != '' else repr('')}\n")
