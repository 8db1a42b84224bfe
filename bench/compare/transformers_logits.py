#!/usr/bin/env python3
"""Logits of a known shape with random weights beside those of Hugging Face transformers, on one GPU.

    python3 bench/compare/transformers_logits.py BIN_DIR [--arch llama3-8b] [--dtype auto bfloat16 float16] [--tokens 256]

The checkpoint is drawn by transformers on the GPU (normal, 0.02; norms about 1, biases 0.1) and saved in bfloat16 under
--folder. What is compared with is transformers in float32, of the same numbers; transformers in bfloat16 stands beside
it. NMSE over all positions of one prompt, and of the last one alone: that of the answer's first token.
"""
import argparse
import os
import subprocess
import tempfile

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

SHAPES = {
    "llama3-8b": lambda: LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
        vocab_size=128256, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=False),
    "qwen2.5-7b": lambda: Qwen2Config(
        hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
        vocab_size=152064, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1000000.0,
        tie_word_embeddings=False),
    # Small enough for a try without a GPU.
    "tiny": lambda: Qwen2Config(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=512,
        vocab_size=1024, max_position_embeddings=512, tie_word_embeddings=False),
}


def draw(arch, device, seed):
    torch.manual_seed(seed)
    config = SHAPES[arch]()
    config._attn_implementation = "eager"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.uniform_(0.8, 1.2)
            elif name.endswith("bias"):
                p.normal_(0, 0.1)
            else:
                p.normal_(0, 0.02)
    return model


def nmse(got, want):
    got, want = got.astype(np.float64), want.astype(np.float64)
    return ((got - want) ** 2).sum() / (want ** 2).sum()


def show(title, got, want):
    print(f"{title:28} all positions {nmse(got, want):.2e}   last {nmse(got[-1], want[-1]):.2e}", flush=True)


def compare(a, folder):
    device = "cuda" if a.device == "cuda" else "cpu"
    model = draw(a.arch, device, a.seed)
    model.save_pretrained(os.path.join(folder, "model"), max_shard_size="5GB")
    ids = np.random.default_rng(a.seed).integers(0, model.config.vocab_size, a.tokens)
    prompt = torch.tensor(ids[None], device=device)
    with torch.no_grad():
        half = model(prompt).logits[0].float().cpu().numpy()
        model.float()
        torch.backends.cuda.matmul.allow_tf32 = False
        want = model(prompt).logits[0].cpu().numpy()
    del model
    torch.cuda.empty_cache()
    print(f"{a.arch}, {a.tokens} tokens, against transformers in float32")
    show("transformers bfloat16", half, want)
    out = os.path.join(folder, "logits.npy")
    for dtype in a.dtype:
        subprocess.run([os.path.join(a.bin, "turbomesh"), "score", os.path.join(folder, "model"), "--device", a.device,
                        "--dtype", dtype, "--ids", ",".join(map(str, ids)), "--logits", out, "--last", str(a.tokens)],
                       check=True, stdout=subprocess.DEVNULL)
        got = np.load(out).reshape(a.tokens, -1)[:, :want.shape[1]]
        show(f"turbomesh {dtype}", got, want)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("bin")
    p.add_argument("--arch", default="llama3-8b", choices=SHAPES)
    p.add_argument("--dtype", nargs="+", default=["auto", "bfloat16"])
    p.add_argument("--device", default="cuda")
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--folder", help="for the checkpoint; default: a temporary one")
    a = p.parse_args()
    if a.folder:
        return compare(a, a.folder)
    with tempfile.TemporaryDirectory(prefix="turbomesh-") as folder:
        compare(a, folder)


if __name__ == "__main__":
    main()
