"""turbomesh list and inspect: what they say of the model that is always there, and of folders that are no models."""
import glob
import json
import os
import shutil
import subprocess

import pytest

from cluster import BIN, MODEL

FAMILIES = os.path.join(os.environ.get("TM_SHARED", ""), "testdata", "families")


def run(*args):
    p = subprocess.run([os.path.join(BIN, "turbomesh"), *args], capture_output=True, text=True, timeout=60)
    return p.returncode, p.stdout, p.stderr


def test_list():
    rc, out, _ = run("list", "--json")
    assert rc == 0
    rows = json.loads(out)
    archs = [a for r in rows for a in r["architectures"]]
    assert len(archs) == len(set(archs)) and "LlamaForCausalLM" in archs and "DbrxForCausalLM" in archs
    assert all(r["backends"]["cpu"] == {"runs": True, "lacks": None} for r in rows)
    rc, text, _ = run("list")
    assert rc == 0 and all(a in text for a in archs)


def test_inspect_demo():
    rc, out, _ = run("inspect", MODEL, "--json")
    assert rc == 0
    d = json.loads(out)
    assert d["parameters"] == 19928576 and d["problem"] is None and d["unknown_keys"] == []
    assert d["sizes"]["hidden"] == 512 and d["sizes"]["kv_heads"] == 4
    assert [s["kv_bytes_per_token"] for s in d["splits"]] == [5120, 2560, 1280, 1280]
    assert sum(len(t["shape"]) == 1 for t in d["tensors"]) == 11 and all(t["recognised"] for t in d["tensors"])
    rc, text, _ = run("inspect", MODEL, "--tensors")
    assert rc == 0 and "model.layers.0.self_attn.q_proj.weight" in text and "is recognised" in text


def test_inspect_says_what_it_does_not_know(tmp_path):
    for f in glob.glob(os.path.join(MODEL, "*")):
        if os.path.isfile(f):
            shutil.copy(f, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["mystery_key"] = 1
    config["num_hidden_layers"] = 6
    (tmp_path / "config.json").write_text(json.dumps(config))
    rc, out, _ = run("inspect", str(tmp_path))
    assert rc == 78 and "config.json: mystery_key" in out
    assert "PROBLEM: tensor model.layers.5.input_layernorm.weight is missing (and 8 more)" in out


def test_inspect_without_the_embedding(tmp_path):
    for f in glob.glob(os.path.join(MODEL, "*")):
        if os.path.isfile(f):
            shutil.copy(f, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    del text["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(text))
    rc, out, _ = run("inspect", str(tmp_path))
    assert rc == 78 and "PROBLEM: tensor model.embed_tokens.weight is missing" in out
    assert run("inspect", str(tmp_path), "--json")[0] == 78


def test_inspect_compares_the_vocabularies(tmp_path):
    for f in glob.glob(os.path.join(MODEL, "*")):
        if os.path.isfile(f):
            shutil.copy(f, tmp_path)
    assert "tokenizer            8192 tokens\n" in run("inspect", str(tmp_path))[1]
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 8192, "content": "<pad>", "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "8193 tokens: the model has no rows for the last ones" in run("inspect", str(tmp_path))[1]


def test_inspect_refusals(tmp_path):
    assert run("inspect", "/no/such/model")[0] == 78
    rc, _, err = run("inspect", str(tmp_path))
    assert rc == 78 and "no config.json" in err
    (tmp_path / "config.json").write_text('{"architectures": ["Lama3ForCausalLM"]}')
    rc, _, err = run("inspect", str(tmp_path))
    assert rc == 78 and "the closest known ones are LlamaForCausalLM" in err


@pytest.mark.skipif(not os.path.isdir(FAMILIES), reason="TM_SHARED is not set")
def test_inspect_families():
    seen = 0
    for folder in sorted(glob.glob(os.path.join(FAMILIES, "*", "config.json"))):
        folder = os.path.dirname(folder)
        if os.path.exists(os.path.join(folder, "preprocessor_config.json")):
            continue
        rc, out, err = run("inspect", folder, "--json")
        d = json.loads(out)
        assert rc == 0 and d["problem"] is None and d["unknown_keys"] == [], (folder, err)
        assert all(t["recognised"] for t in d["tensors"]), folder
        seen += 1
    assert seen >= 44


def test_how_to_shows_the_real_diff():
    root = os.path.join(os.path.dirname(__file__), "..", "..")
    doc = open(os.path.join(root, "docs", "how-to-add-a-family.md")).read()
    diff = doc.split("```diff\n")[1].split("```")[0].splitlines()
    source = open(os.path.join(root, "engine", "model", "families.c")).read()
    hunks, now = [], []
    for line in diff[2:] + ["@@"]:
        if line.startswith("@@"):
            hunks.append("\n".join(now))
            now = []
        else:
            assert line[0] in "+ ", line
            now.append(line[1:])
    assert len(hunks) == 3 and all(h in source for h in hunks)
