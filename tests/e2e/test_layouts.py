"""Tensor layouts that no checkpoint of the families has: experts of a layer stacked in one tensor, as Transformers 5 may
write them, give the same logits as a tensor for each; and what is wrong with a stack is named."""
import array
import glob
import json
import os
import shutil
import struct
import subprocess

import pytest

from cluster import BIN

FAMILIES = os.path.join(os.environ.get("TM_SHARED", ""), "testdata", "families")
pytestmark = pytest.mark.skipif(not os.path.isdir(FAMILIES), reason="TM_SHARED is not set")


def read_tensors(folder):
    """{name: (dtype, shape, bytes)} of all files of a checkpoint."""
    tensors = {}
    for path in glob.glob(os.path.join(folder, "*.safetensors")):
        with open(path, "rb") as f:
            data = f.read()
        n = struct.unpack("<Q", data[:8])[0]
        for name, t in json.loads(data[8:8 + n]).items():
            if name != "__metadata__":
                begin, end = t["data_offsets"]
                tensors[name] = (t["dtype"], t["shape"], data[8 + n + begin:8 + n + end])
    return tensors


def write_tensors(folder, tensors):
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(t[2] for t in tensors.values()))


def stack(tensors):
    """The experts of each layer as gate_up_proj [E, 2F, h] and down_proj [E, h, F]."""
    out = {n: t for n, t in tensors.items() if ".mlp.experts." not in n}
    layers = sorted({n.split(".mlp.experts.")[0] for n in tensors if ".mlp.experts." in n})
    for layer in layers:
        prefix = layer + ".mlp.experts."
        count = 1 + max(int(n[len(prefix):].split(".")[0]) for n in tensors if n.startswith(prefix))

        def part(e, name):
            return tensors[f"{prefix}{e}.{name}_proj.weight"]
        f, h = part(0, "gate")[1]
        out[prefix + "gate_up_proj"] = ("BF16", [count, 2 * f, h], b"".join(
            part(e, "gate")[2] + part(e, "up")[2] for e in range(count)))
        out[prefix + "down_proj"] = ("BF16", [count, h, f], b"".join(part(e, "down")[2] for e in range(count)))
    return out


def logits(folder, tmp_path, *args):
    with open(os.path.join(folder, "golden.json")) as f:
        ids = json.load(f)["sequences"][0]["ids"]
    out = os.path.join(tmp_path, "logits.npy")
    p = subprocess.run([os.path.join(BIN, "turbomesh"), "score", str(folder), "--ids", ",".join(map(str, ids)), "--logits",
                        out, "--last", "8", "--dtype", "float32", *args], capture_output=True, text=True, timeout=120)
    if p.returncode:
        return p.stderr
    with open(out, "rb") as f:
        return array.array("f", f.read()[-8 * 256 * 4:])


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v2"])
@pytest.mark.parametrize("tp", [1, 2])
def test_stacked_experts(tmp_path, family, tp):
    source = os.path.join(FAMILIES, family)
    for name in ("config.json", "golden.json"):
        shutil.copy(os.path.join(source, name), tmp_path)
    tensors = stack(read_tensors(source))
    write_tensors(tmp_path, tensors)
    want, got = logits(source, tmp_path), logits(tmp_path, tmp_path, "--tp", str(tp))
    assert not isinstance(got, str), got
    if tp == 1:
        assert got == want
    assert max(abs(a - b) for a, b in zip(got, want)) < 1e-3
    name = next(n for n in tensors if n.endswith("experts.gate_up_proj"))
    dtype, (e, f2, h), data = tensors[name]
    tensors[name] = (dtype, [e, f2 // 2, h], data[:len(data) // 2])
    write_tensors(tmp_path, tensors)
    assert f"{name} is [{e}, {f2 // 2}, {h}], expected [{e}, {f2}, {h}]" in logits(tmp_path, tmp_path)


@pytest.mark.parametrize("front", [("", "language_model."), ("model.", "model.language_model.")])
def test_text_of_a_model_that_sees(tmp_path, front):
    """Gemma 3 from 4B on: the text model's config is nested and its tensors have a prefix, in two dialects."""
    source = os.path.join(FAMILIES, "gemma3")
    shutil.copy(os.path.join(source, "golden.json"), tmp_path)
    with open(os.path.join(source, "config.json")) as f:
        config = json.load(f)
    del config["architectures"]
    with open(os.path.join(tmp_path, "config.json"), "w") as f:
        json.dump({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": config,
                   "vision_config": {}}, f)
    tensors = {front[1] + n[len(front[0]):]: t for n, t in read_tensors(source).items()}
    tensors["vision_tower.patch.weight"] = ("BF16", [2], bytes(4))
    write_tensors(tmp_path, tensors)
    assert logits(tmp_path, tmp_path) == logits(source, tmp_path)
    p = subprocess.run([os.path.join(BIN, "turbomesh"), "inspect", str(tmp_path)], capture_output=True, text=True)
    assert p.returncode == 0 and "is recognised" in p.stdout, p.stdout
    with open(os.path.join(tmp_path, "config.json"), "w") as f:
        json.dump({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {**config, "odd_key": 1}}, f)
    p = subprocess.run([os.path.join(BIN, "turbomesh"), "inspect", str(tmp_path)], capture_output=True, text=True)
    assert p.returncode == 0 and "config.json: odd_key" in p.stdout, p.stdout
