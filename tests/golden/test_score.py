"""The scorer against the demo model's reference values: log-probabilities, logits, perplexity, bad model files."""
import json
import math
import os
import shutil
import struct
import subprocess

import numpy as np
import pytest

from cluster import BIN, MODEL, ROOT, SLOW

TURBOMESH = os.path.join(BIN, "turbomesh")


def run(*args, timeout=300):
    return subprocess.run([TURBOMESH, *map(str, args)], capture_output=True, text=True, timeout=timeout * SLOW)


def score(*args):
    r = run("score", *args, "--json")
    assert r.returncode == 0, r.stderr
    return json.loads(r.stdout)


def cases():
    with open(os.path.join(MODEL, "eval", "golden.json")) as f:
        return json.load(f)["cases"]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype,bound", [("float32", 2e-5), ("bfloat16", 2e-2)])
def test_log_probabilities(tp, dtype, bound):
    case = cases()[1]
    ids = case["prompt_ids"] + [s["id"] for s in case["steps"]]
    r = score(MODEL, "--ids", ",".join(map(str, ids)), "--top-k", 5, "--dtype", dtype, "--tp", tp)
    assert r["ids"] == ids and r["logprobs"][0] is None
    diffs = []
    for i, step in enumerate(case["steps"]):
        top = r["top"][len(case["prompt_ids"]) - 1 + i]
        assert top[0][0] == step["top5"][0][0] or step["top5"][0][1] - step["top5"][1][1] < 0.02
        ours = dict(map(tuple, top))
        diffs += [abs(ours[token] - lp) for token, lp in step["top5"] if token in ours]
    mean = sum(diffs) / len(diffs)
    print(f"tp {tp} {dtype}: {len(diffs)} log-probabilities, mean difference {mean:.2g}, worst {max(diffs):.2g}")
    assert len(diffs) > 4.8 * len(case["steps"])
    assert mean < bound and max(diffs) < 10 * bound


def test_logits_file(tmp_path):
    ids = cases()[0]["prompt_ids"]
    out = tmp_path / "logits.npy"
    r = score(MODEL, "--ids", ",".join(map(str, ids)), "--top-k", 3, "--logits", out, "--last", 4, "--dtype", "float32")
    logits = np.load(out)
    assert logits.shape == (4, 8192) and logits.dtype == np.float32
    for row, i in zip(logits.astype(np.float64), range(len(ids) - 4, len(ids))):
        logp = row - (row.max() + math.log(np.exp(row - row.max()).sum()))
        assert np.argmax(logp) == r["top"][i][0][0]
        for token, lp in r["top"][i]:
            assert abs(logp[token] - lp) < 1e-3


def test_perplexity_of_the_held_out_windows():
    with open(os.path.join(MODEL, "eval", "heldout.json")) as f:
        want = json.load(f)
    r = score(MODEL, "--tokens", os.path.join(MODEL, "eval", "heldout_tokens.npy"))
    assert r["windows"] == 96 and r["tokens"] == 96 * 1024
    print(f"perplexity {r['perplexity']:.4f}, reference {want['ppl_fp32']:.4f}")
    assert abs(r["perplexity"] / want["ppl_fp32"] - 1) < 0.003
    for got, ref in zip(r["nll"], want["nll_fp32"]):
        assert abs(got - ref) < 0.01


def test_text_windows():
    r = score(MODEL, "--text", os.path.join(MODEL, "README.md"))
    assert r["tokens"] > 200 and 1 < r["perplexity"] < 8192


def edit_json(path, change):
    with open(path) as f:
        v = json.load(f)
    change(v)
    with open(path, "w") as f:
        json.dump(v, f)


def edit_header(path, change):
    with open(path, "rb") as f:
        (n,) = struct.unpack("<Q", f.read(8))
        header, data = json.loads(f.read(n)), f.read()
    change(header)
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


SHARD = "model-00002-of-00003.safetensors"
TENSOR = "model.layers.1.mlp.down_proj.weight"


def offsets(begin, end):
    return lambda d: edit_header(d / SHARD, lambda h: h[TENSOR].update(data_offsets=[begin, end]))


BAD = {
    "missing shard": (lambda d: os.remove(d / SHARD), [SHARD]),
    "truncated shard": (lambda d: os.truncate(d / SHARD, os.path.getsize(d / SHARD) - 1000), [SHARD]),
    "offset outside": (offsets(0, 1 << 40), [SHARD, TENSOR]),
    "overlap": (offsets(2, 2 + 512 * 1536 * 2), [SHARD]),
    "wrong shape": (lambda d: edit_header(d / SHARD, lambda h: h[TENSOR].update(shape=[1536, 512])), [TENSOR]),
    "config without a key": (lambda d: edit_json(d / "config.json", lambda c: c.pop("hidden_size")), ["config.json", "hidden_size"]),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), ["config.json"]),
    "unknown architecture": (lambda d: edit_json(d / "config.json", lambda c: c.update(architectures=["NoSuch"], model_type="nosuch")),
                             ["NoSuch"]),
    "tokenizer is not JSON": (lambda d: (d / "tokenizer.json").write_text("hello"), ["tokenizer.json"]),
    "merge of an unknown token": (lambda d: edit_json(d / "tokenizer.json", lambda t: t["model"]["merges"].append(["Zzqx", "qqzz"])),
                                  ["tokenizer.json", "Zzqx"]),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("program", ["chat", "worker"])
def test_bad_model_is_refused_in_one_line(tmp_path, name, program):
    change, words = BAD[name]
    if program == "worker" and "tokenizer" in "".join(words):
        pytest.skip("a worker reads no tokenizer")
    d = tmp_path / "model"
    shutil.copytree(MODEL, d, ignore=shutil.ignore_patterns("eval"))
    change(d)
    r = run("chat", d, "--prompt", "hello", timeout=60) if program == "chat" else run("worker", d, timeout=60)
    lines = [line for line in r.stderr.strip().split("\n") if line]
    print(r.stderr)
    assert r.returncode == 78 and len(lines) == 1
    assert all(w in lines[0] for w in words), lines[0]


def test_unknown_model_folder():
    r = run("chat", "/no/such/folder", "--prompt", "x")
    assert r.returncode == 78 and "/no/such/folder" in r.stderr


def test_option_reference_is_current():
    with open(os.path.join(ROOT, "docs", "options.md")) as f:
        assert f.read() == run("options").stdout


@pytest.mark.parametrize("name", ["story", "dog", "byte_fallback"])
def test_greedy_text_of_stories260k(name):
    model = os.path.join(os.environ.get("TM_SHARED", ""), "testdata", "stories260K")
    if not os.path.isdir(model):
        pytest.skip("TM_SHARED has no stories260K")
    with open(os.path.join(model, "golden.json")) as f:
        case = next(p for p in json.load(f)["prompts"] if p["name"] == name)
    r = run("chat", model, "--prompt", case["prompt"], "--temperature", 0, "--max-tokens", len(case["output_ids"]), "--dtype", "float32")
    assert r.returncode == 0, r.stderr
    assert r.stdout == case["output_text"] + "\n"
