#!/usr/bin/python3
"""The llama.cpp side of the CPU comparison: decode and 512-token prefill of a Llama checkpoint in bf16.

    npm install --ignore-scripts node-llama-cpp      # brings llama.cpp's shared libraries
    bench/compare/llama_cpp.py --libs node_modules/@node-llama-cpp/linux-x64/bins/linux-x64 models/demo-20m

Writes the checkpoint as GGUF (bf16 matrices, f32 norms, no vocabulary), loads it through llama.cpp's C API with
ctypes, and prints tokens per second as JSON. Run it beside `turbomesh bench engine` and quote the ratio."""
import argparse
import ctypes
import glob
import json
import os
import struct
import tempfile
import time

import numpy as np

BF16, F32 = 30, 0
CTX_PARAMS_BYTES = MODEL_PARAMS_BYTES = 1024  # larger than any release's struct: passed on the stack, read in part


def read_safetensors(path):
    with open(path, "rb") as f:
        (n,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(n))
        data = f.read()
    for name, t in header.items():
        if name != "__metadata__":
            assert t["dtype"] == "BF16", f"{name}: {t['dtype']}"
            a, b = t["data_offsets"]
            yield name, np.frombuffer(data[a:b], dtype=np.uint16).reshape(t["shape"])


def permute_rope(w, heads):
    """Half-split rotary pairs to the interleaved pairs that GGUF's llama architecture has."""
    n, k = w.shape
    return w.reshape(heads, 2, n // heads // 2, k).swapaxes(1, 2).reshape(n, k)


NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm"}


def gguf_name(name):
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def write_gguf(model, path):
    with open(os.path.join(model, "config.json")) as f:
        c = json.load(f)
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    tensors = {}
    for shard in sorted(glob.glob(os.path.join(model, "*.safetensors"))):
        for name, w in read_safetensors(shard):
            if ".q_proj." in name or ".k_proj." in name:
                w = permute_rope(w, heads if ".q_proj." in name else kv)
            if w.ndim == 1:
                tensors[gguf_name(name)] = (F32, (w.astype(np.uint32) << 16).view(np.float32))
            else:
                tensors[gguf_name(name)] = (BF16, np.ascontiguousarray(w))
    text = lambda s: struct.pack("<Q", len(s)) + s.encode()
    u32 = lambda v: struct.pack("<II", 4, v)
    f32 = lambda v: struct.pack("<If", 6, v)
    keys = {"general.architecture": struct.pack("<I", 8) + text("llama"), "tokenizer.ggml.model": struct.pack("<I", 8) + text("none"),
            "llama.context_length": u32(c["max_position_embeddings"]), "llama.embedding_length": u32(c["hidden_size"]),
            "llama.block_count": u32(c["num_hidden_layers"]), "llama.feed_forward_length": u32(c["intermediate_size"]),
            "llama.attention.head_count": u32(heads), "llama.attention.head_count_kv": u32(kv),
            "llama.attention.layer_norm_rms_epsilon": f32(c["rms_norm_eps"]), "llama.vocab_size": u32(c["vocab_size"]),
            "llama.rope.freq_base": f32(c["rope_parameters"]["rope_theta"]), "llama.rope.dimension_count": u32(c["head_dim"])}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(text(k) + v for k, v in keys.items())
    at = 0
    for name, (kind, w) in tensors.items():
        head += text(name) + struct.pack("<I", w.ndim) + b"".join(struct.pack("<Q", d) for d in reversed(w.shape)) + struct.pack("<IQ", kind, at)
        at += -(-w.nbytes // 32) * 32
    with open(path, "wb") as f:
        f.write(head + b"\0" * (-len(head) % 32))
        for _, w in tensors.values():
            f.write(w.tobytes() + b"\0" * (-w.nbytes % 32))
    return c


class ContextParams(ctypes.Structure):
    _fields_ = [("n_ctx", ctypes.c_uint32), ("n_batch", ctypes.c_uint32), ("n_ubatch", ctypes.c_uint32), ("rest", ctypes.c_char * (CTX_PARAMS_BYTES - 12))]


class ModelParams(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * MODEL_PARAMS_BYTES)]


class Batch(ctypes.Structure):
    _fields_ = [("n_tokens", ctypes.c_int32), ("ptr", ctypes.c_void_p * 6)]


def library(libs, stem):
    found = sorted(glob.glob(os.path.join(libs, stem)))
    assert found, f"no {stem} in {libs}"
    return ctypes.CDLL(found[0], mode=ctypes.RTLD_GLOBAL)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("model")
    ap.add_argument("--libs", required=True)
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    ap.add_argument("--steps", type=int, default=256)
    ap.add_argument("--prefill", type=int, default=512)
    ap.add_argument("--repeat", type=int, default=3)
    o = ap.parse_args()
    library(o.libs, "libggml-base*.so")
    ggml, llama = library(o.libs, "libggml.*so"), library(o.libs, "libllama.*so")
    quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, user: None)
    llama.llama_log_set(quiet, None)
    ggml.ggml_backend_load_all_from_path(o.libs.encode())
    llama.llama_backend_init()
    llama.llama_model_default_params.restype = ModelParams
    llama.llama_context_default_params.restype = ContextParams
    llama.llama_model_load_from_file.restype = ctypes.c_void_p
    llama.llama_model_load_from_file.argtypes = [ctypes.c_char_p, ModelParams]
    llama.llama_init_from_model.restype = ctypes.c_void_p
    llama.llama_init_from_model.argtypes = [ctypes.c_void_p, ContextParams]
    llama.llama_set_n_threads.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
    llama.llama_batch_get_one.restype = Batch
    llama.llama_batch_get_one.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    llama.llama_decode.argtypes = [ctypes.c_void_p, Batch]
    llama.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
    llama.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    llama.llama_get_memory.restype = ctypes.c_void_p
    llama.llama_get_memory.argtypes = [ctypes.c_void_p]
    llama.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]

    with tempfile.TemporaryDirectory() as d:
        path = os.path.join(d, "model.gguf")
        config = write_gguf(o.model, path)
        model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        assert model, "llama.cpp refused the model"
    params = llama.llama_context_default_params()
    params.n_ctx = config["max_position_embeddings"]
    params.n_batch = params.n_ubatch = max(512, o.prefill)
    ctx = llama.llama_init_from_model(model, params)
    assert ctx, "llama.cpp could not make a context"
    llama.llama_set_n_threads(ctx, o.threads, o.threads)
    rng = np.random.default_rng(1)

    def decode(ids):
        a = (ctypes.c_int32 * len(ids))(*[int(i) for i in ids])
        assert llama.llama_decode(ctx, llama.llama_batch_get_one(a, len(ids))) == 0
        return int(np.argmax(np.ctypeslib.as_array(llama.llama_get_logits_ith(ctx, -1), (config["vocab_size"],))))

    best = {"prefill_tps": 0.0, "decode_tps": 0.0}
    capital = [1, 320, 201, 367, 323, 271, 595, 281, 2032, 33, 2, 201, 1, 321, 201]
    first = decode(capital)  # also warms up
    for _ in range(o.repeat):
        llama.llama_memory_clear(llama.llama_get_memory(ctx), True)
        prompt = rng.integers(3, config["vocab_size"], o.prefill)
        t = time.perf_counter()
        decode(prompt)
        best["prefill_tps"] = max(best["prefill_tps"], o.prefill / (time.perf_counter() - t))
        llama.llama_memory_clear(llama.llama_get_memory(ctx), True)
        token = decode(prompt[:16])
        t = time.perf_counter()
        for _ in range(o.steps):
            token = decode([token])
        best["decode_tps"] = max(best["decode_tps"], o.steps / (time.perf_counter() - t))
    print(json.dumps({"engine": "llama.cpp", "threads": o.threads, "first_token_of_capital_prompt": first, **best}))


if __name__ == "__main__":
    main()
