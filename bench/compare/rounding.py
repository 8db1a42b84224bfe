#!/usr/bin/env python3
"""What rounding activations to bfloat16 costs: logits of a decoder with random weights, with and without each rounding.

    python3 bench/compare/rounding.py [--layers 32] [--hidden 512] [--tokens 24]

The weights are those of a Llama as transformers draws them (normal, 0.02 at a hidden size of 4096, scaled so that a
product of this size grows its input as much), rounded to bfloat16 once. Everything is computed in float64; a row of the
table rounds what it names at every layer, as the CUDA backend does. NMSE of the logits against no rounding at all.
"""
import argparse

import numpy as np

HEAD, GROUP, VOCAB = 128, 4, 2048
# norm: output of the norms; qkv: out of the product; qk: after rope; v; p: attention's weights; attention: its output;
# added: outputs of o and down; residual: the sum; gate_up; act: their product
PLACES = ["norm", "qkv", "qk", "v", "p", "attention", "added", "residual", "gate_up", "act"]


def bf16(x):
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + ((bits >> 16) & 1) + 0x7FFF) & np.uint32(0xFFFF0000)).view(np.float32)


class Model:
    def __init__(self, layers, hidden, tokens, seed):
        rng = np.random.default_rng(seed)
        inner, self.heads = hidden * 7 // 2, hidden // HEAD
        self.kv = max(1, self.heads // GROUP)

        def draw(n, k, like):
            return bf16(rng.standard_normal((n, k)) * 0.02 * np.sqrt(like / k))

        self.layers = [{
            "q": draw(self.heads * HEAD, hidden, 4096), "k": draw(self.kv * HEAD, hidden, 4096),
            "v": draw(self.kv * HEAD, hidden, 4096), "o": draw(hidden, self.heads * HEAD, 4096),
            "gate": draw(inner, hidden, 4096), "up": draw(inner, hidden, 4096),
            "down": draw(hidden, inner, 14336)} for _ in range(layers)]
        self.x = bf16(rng.standard_normal((tokens, hidden)) * 0.02)
        self.head = draw(VOCAB, hidden, 4096)
        angle = np.arange(tokens)[:, None] * 500000.0 ** (-np.arange(0, HEAD, 2) / HEAD)
        self.cos, self.sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rope(self, x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1)

    def logits(self, rounded):
        def at(place, x):
            return bf16(x) if place in rounded else x

        def norm(x):
            return at("norm", x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5))

        t = len(self.x)
        mask = np.triu(np.full((t, t), -1e30), 1)
        x = self.x.astype(np.float64)
        for w in self.layers:
            h = norm(x)
            q, k, v = (at("qkv", h @ w[n].T).reshape(t, -1, HEAD) for n in "qkv")
            q, k = at("qk", self.rope(q)), at("qk", self.rope(k))
            k, v = (np.repeat(y, self.heads // self.kv, 1) for y in (k, at("v", v)))
            s = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD) + mask
            p = np.exp(s - s.max(-1, keepdims=True))
            o = np.einsum("hqk,khd->hqd", at("p", p), v) / p.sum(-1, keepdims=True)
            o = at("attention", o.transpose(1, 0, 2).reshape(t, -1))
            x = at("residual", x + at("added", o @ w["o"].T))
            h = norm(x)
            gate, up = (at("gate_up", h @ w[n].T) for n in ("gate", "up"))
            x = at("residual", x + at("added", at("act", gate / (1 + np.exp(-gate)) * up) @ w["down"].T))
        return norm(x) @ self.head.T


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--tokens", type=int, default=24)
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    model = Model(a.layers, a.hidden, a.tokens, a.seed)
    exact = model.logits(set())

    def show(title, rounded):
        got = model.logits(rounded)
        print(f"{title:40} {((got - exact) ** 2).sum() / (exact ** 2).sum():.2e}", flush=True)

    everything = set(PLACES)
    show("all rounded", everything)
    show("residual and what is added to it in f32", everything - {"residual", "added"})
    show("only what tensor cores read", everything - {"residual", "added", "qkv", "gate_up"})
    for place in PLACES:
        show(f"{place} alone", {place})


if __name__ == "__main__":
    main()
